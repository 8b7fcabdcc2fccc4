"""save_partial_states, and the compressor that reads what it stored: any cut of a prompt."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.indexer import PAGE_FORMATS
from tests.support.compare import assert_same_bits
from tests.support.indexer import cos_sin, slots_for
from tests.support.static import run_all_modes
from tests.support.strides import default_place, strided
from tests.support.tensors import BF16, skip_slices_on, to_numpy, to_paddle

RNG = np.random.default_rng
F32 = np.dtype(np.float32)


def case(rng, tokens, width, ratio, blocks=11, state_block=4, dtypes=(F32, F32, F32)):
    kv, ape, state = dtypes
    return [
        rng.normal(size=(tokens, 2 * width)).astype(kv),
        (3 * rng.normal(size=(ratio, width))).astype(ape),
        rng.integers(-2, 1000, tokens),  # some negative
        rng.normal(size=(blocks, state_block, 2 * width)).astype(state),
        slots_for(rng, tokens, blocks * state_block),
    ]


def run(arrays, place):
    given = [x if isinstance(x, paddle.Tensor) else to_paddle(np.array(x), place) for x in arrays]
    result = F.save_partial_states(*given)
    assert result is given[3]
    return to_numpy(result)


@pytest.mark.parametrize("kv", [F32, BF16])
@pytest.mark.parametrize("ape", [F32, BF16])
@pytest.mark.parametrize("state", [F32, BF16])
@pytest.mark.parametrize(("width", "ratio"), [(8, 1), (128, 128), (256, 4), (512, 128), (1024, 4)])
def test_bits(place, kv, ape, state, width, ratio):
    arrays = case(RNG(width), 53, width, ratio, dtypes=(kv, ape, state))
    assert_same_bits(run(arrays, place), reference.save_partial_states(*arrays))


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (9, 4), (40, 40)])
def test_rows_in_plain_loops(place, tokens, count, index_dtype):
    """Independent of the model: which row, which bias, and nothing else."""
    rng = RNG(tokens)
    kv_score, ape, positions, state, slots = case(rng, tokens, 24, 5, state_block=3)
    arrays = [
        kv_score, ape, positions.astype(index_dtype), state, slots[:count].astype(index_dtype)
    ]  # fmt: skip
    got = run(arrays, place)
    want = state.astype(np.float64)
    for i in range(count):
        if positions[i] < 0 or not 0 <= slots[i] < 33:
            continue
        block, row = divmod(int(slots[i]), 3)
        for d in range(24):
            want[block, row, d] = kv_score[i, d]
            bias = float(ape[positions[i] % 5, d])
            want[block, row, 24 + d] = np.float32(float(kv_score[i, 24 + d]) + bias)
    np.testing.assert_array_equal(got.astype(np.float64), want)


@pytest.mark.parametrize("kv", [F32, BF16])
@pytest.mark.parametrize("state", [F32, BF16])
def test_special_values(place, kv, state):
    """Infinities, NaN, -0, subnormals and overflow; bits of a copy are those of its source."""
    rng = RNG(3)
    arrays = case(rng, 8, 16, 4, dtypes=(kv, F32, state))
    arrays[2], arrays[4] = np.arange(8), np.arange(8) + 3
    x = arrays[0]
    x[0, :4] = [np.inf, -np.inf, np.nan, -0.0]
    x[1, 16:20] = [np.inf, -np.inf, np.nan, -0.0]
    arrays[1][1, :3] = -np.inf
    arrays[1][2] = [3e38, -3e38, np.nan, -0.0, 1e-45, *[2.0**-130] * 11]
    x[2, 16:] = np.array([3e38, -3e38, 1, -0.0, 0, *[2.0**-131] * 11]).astype(kv)
    with np.errstate(all="ignore"):
        want = reference.save_partial_states(*arrays)
    got = run(arrays, place)
    assert_same_bits(got, want)
    row = got[0, 3]
    assert np.isinf(row[:2]).all() and np.isnan(row[2]) and np.signbit(row[3])
    second = got[1, 0]
    assert np.isnan(second[[16, 18]]).all() and second[17] == -np.inf
    raw = np.ascontiguousarray(second[[16, 18]]).view(f"u{state.itemsize}")
    assert (raw == (0x7FFFFFFF if state == F32 else 0x7FFF)).all()


def test_strides(place):
    """Values and scores that are columns of a wider projection; a layer of a pool of states."""
    rng = RNG(4)
    arrays = case(rng, 30, 32, 4)
    rows = np.full((30, 8 + 64 + 24), np.nan, np.float32)
    rows[:, 8:72] = arrays[0]
    pool = rng.normal(size=(11, 4, 3, 64)).astype(np.float32)
    memory = to_paddle(pool.copy(), place)
    given = [strided(to_paddle(rows, place), [30, 64], [96, 1], 32), *arrays[1:]]
    given[3] = strided(memory, [11, 4, 64], [4 * 3 * 64, 3 * 64, 1], 64 * 4)
    arrays[3] = np.ascontiguousarray(pool[:, :, 1])
    F.save_partial_states(
        *[x if isinstance(x, paddle.Tensor) else to_paddle(x, place) for x in given]
    )
    pool[:, :, 1] = reference.save_partial_states(*arrays)
    assert_same_bits(to_numpy(memory), pool)


@pytest.mark.parametrize("at_end", [False, True])
def test_pools_of_more_than_two_gib(place, at_end):
    """Offsets of 64 bits."""
    rng = RNG(5)
    blocks = 2**31 // (4 * 2048 * 4) + 3
    with default_place(place):
        state = paddle.empty([blocks, 4, 2048], dtype="float32")
    arrays = case(rng, 16, 1024, 4, blocks=4)
    arrays[2], arrays[4] = np.arange(16), np.arange(16)
    first = blocks - 4 if at_end else 0
    given = [to_paddle(x, place) for x in (*arrays[:3], arrays[4] + 4 * first)]
    F.save_partial_states(*given[:3], state, given[3])
    skip_slices_on(place)
    part = strided(state, [4, 4, 2048], [4 * 2048, 2048, 1], first * 4 * 2048 * 4)
    assert_same_bits(to_numpy(part.clone()), reference.save_partial_states(*arrays))


def test_nothing_to_do(place):
    arrays = case(RNG(6), 5, 32, 4)
    for change in ({4: arrays[4][:0]}, {0: arrays[0][:0], 2: arrays[2][:0], 4: arrays[4][:0]}):
        given = [change.get(i, a) for i, a in enumerate(arrays)]
        assert_same_bits(run(given, place), arrays[3])
    for shape in ((0, 4, 64), (3, 0, 64)):
        given = [*arrays[:3], np.zeros(shape, np.float32), arrays[4]]
        assert run(given, place).shape == shape


# ---- with the compressor -----------------------------------------------------------------------

#: Prompt lengths around the ends of groups.
LENGTHS = [*range(1, 10), *range(124, 133), 300]
STATE_BLOCK, PAGE = {4: 4, 128: 8}, 16


class Compressor:
    """Two sequences whose tokens come in chunks: states, then the keys of complete groups."""

    def __init__(self, quant, ratio, length, place):
        rng = RNG(ratio + length)
        self.place, self.quant, self.ratio, self.length = place, quant, ratio, length
        head = PAGE_FORMATS[quant].head_dim
        self.width = head * (2 if ratio == 4 else 1)
        kv_score = rng.normal(size=(2, length, 2 * self.width)).astype(np.float32)
        kv_score[..., self.width :] *= 3
        self.kv_score = kv_score
        self.ape = rng.normal(size=(ratio, self.width)).astype(np.float32)
        block = STATE_BLOCK[ratio]
        self.tables = rng.permutation(2 * -(-length // block)).reshape(2, -1)
        self.state = np.full((self.tables.size, block, 2 * self.width), np.nan, np.float32)
        groups = length // ratio
        self.pages = rng.permutation(2 * (groups // PAGE + 1)).reshape(2, -1)
        page_bytes = PAGE * sum(PAGE_FORMATS[quant][1:])
        self.cache = np.full((self.pages.size, page_bytes), 0xA5, np.uint8)
        self.weight = rng.uniform(0.5, 2, head).astype(np.float32)
        self.table = cos_sin(length)

    def step(self, module, state, cache, begin, end):
        """New tokens `begin` .. `end` of both sequences."""
        block = STATE_BLOCK[self.ratio]
        at = np.arange(begin, end)
        positions, batch = np.tile(at, 2), np.repeat([0, 1], end - begin)
        slots = self.tables[batch, positions // block] * block + positions % block
        group = positions // self.ratio
        complete = (positions + 1) % self.ratio == 0
        page = self.pages[batch, np.minimum(group // PAGE, self.pages.shape[1] - 1)]
        kv_slots = np.where(complete, page * PAGE + group % PAGE, -1)
        kv_score = np.concatenate([self.kv_score[0, begin:end], self.kv_score[1, begin:end]])

        def give(x):
            return to_paddle(x, self.place) if module is F else x

        state = module.save_partial_states(
            give(kv_score), give(self.ape), give(positions), state, give(slots)
        )
        cache = module.indexer_kv_compress_insert(
            state,
            give(self.tables.astype(np.int32)),
            give(batch.astype(np.int32)),
            give(positions),
            give(slots),
            give(kv_slots),
            give(self.weight),
            give(self.table),
            cache,
            compress_ratio=self.ratio,
            page_size=PAGE,
            quant=self.quant,
        )
        return state, cache

    def run(self, cuts):
        """Bits of the states and of the pages after all chunks."""
        state, cache = to_paddle(self.state.copy(), self.place), to_paddle(self.cache, self.place)
        for begin, end in zip([0, *cuts], [*cuts, self.length]):
            self.step(F, state, cache, begin, end)
        return to_numpy(state), to_numpy(cache)


def cuts_of(length):
    """Whole, each single cut (a few of a long prompt), decode from every start of the last ones."""
    yield []
    near = {1, 2, 3, 4, 5, 7, 8, 9, 124, 125, 126, 127, 128, 129, 131, 132, length - 1}
    for cut in sorted(n for n in near if 0 < n < length):
        yield [cut]
    yield list(range(max(1, length - 9), length))  # a chunk, then one token at a time
    if length < 10:
        yield list(range(1, length))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("quant", "ratio"), [("fp8", 4), ("fp8_512", 128)])
def test_any_cut_of_a_prompt_gives_the_same_bytes(place, quant, ratio, length):
    compressor = Compressor(quant, ratio, length, place)
    whole = compressor.step(reference, compressor.state, compressor.cache, 0, length)
    if length < ratio:
        assert (whole[1] == 0xA5).all()
    for cuts in cuts_of(length):
        state, cache = compressor.run(cuts)
        assert_same_bits(state, whole[0], f"states, cut at {cuts}")
        assert_same_bits(cache, whole[1], f"pages, cut at {cuts}")


@pytest.mark.parametrize(("quant", "ratio"), [("fp8", 4), ("fp8_512", 4), ("mxfp4", 128)])
def test_a_hundred_steps_in_one_stream(place, quant, ratio):
    """The compression waits for the states that the launch before it writes, each time."""
    repeats = 100 if place == "gpu" else 5
    compressor = Compressor(quant, ratio, 256, place)
    whole = compressor.step(reference, compressor.state, compressor.cache, 0, 256)
    pairs = [
        (to_paddle(compressor.state.copy(), place), to_paddle(compressor.cache.copy(), place))
        for _ in range(repeats)
    ]
    for state, cache in pairs:
        compressor.step(F, state, cache, 0, 256)
    for state, cache in pairs:
        assert_same_bits(to_numpy(cache), whole[1])
        assert_same_bits(to_numpy(state), whole[0])


# ---- errors and programs -----------------------------------------------------------------------


def saved(kv_score, ape, positions, state, slots):
    return F.save_partial_states(kv_score, ape, positions, state, slots)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_and_saved(place, dynamic):
    arrays = case(RNG(7), 9, 32, 4)
    outputs, inputs = run_all_modes(saved, arrays, place, dynamic=dynamic)
    want = reference.save_partial_states(*arrays)
    assert_same_bits(outputs[0], want)
    assert_same_bits(inputs[3], want)


def good():
    names = ("kv_score", "ape", "positions", "state_cache", "state_slots")
    return dict(zip(names, (to_paddle(x) for x in case(RNG(8), 6, 32, 4))))


def fp32(*shape):
    return np.zeros(shape, np.float32)


WRONG = [
    ({"kv_score": None}, TypeError, "kv_score: expected a tensor, got None"),
    ({"kv_score": np.zeros((6, 64), np.float16)}, TypeError, "kv_score: expected dtype float32"),
    ({"kv_score": fp32(6, 32)}, ValueError, r"kv_score: expected shape \[\?, 64\], got \[6, 32\]"),
    ({"ape": fp32(4, 64)}, ValueError, r"state_cache: expected shape \[\?, \?, 128\]"),
    ({"ape": fp32(4, 12)}, ValueError, r"ape: expected shape .* a multiple of 8, got \[4, 12\]"),
    ({"ape": fp32(0, 32)}, ValueError, "ape: expected shape .* at least 1 row"),
    ({"ape": fp32(32)}, ValueError, "ape: expected 2 dimensions"),
    ({"ape": np.zeros((4, 32), np.float16)}, TypeError, "ape: expected dtype float32"),
    ({"positions": np.arange(5)}, ValueError, r"positions: expected shape \[6\], got \[5\]"),
    ({"positions": fp32(6)}, TypeError, "positions: expected dtype int32"),
    ({"state_cache": fp32(44, 64)}, ValueError, "state_cache: expected shape"),
    ({"state_cache": np.zeros((11, 4, 64), np.float16)}, TypeError, "state_cache: expected dtype"),
    ({"state_slots": np.arange(7)}, ValueError, "expected at most 6 slots, .* got 7"),
    ({"state_slots": fp32(6)}, TypeError, "state_slots: expected dtype"),
    ({"state_slots": np.zeros((6, 1), np.int64)}, ValueError, "state_slots: expected shape"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG)
def test_wrong_arguments(change, error, text):
    given = {k: to_paddle(v) if isinstance(v, np.ndarray) else v for k, v in change.items()}
    with pytest.raises(error, match=f"save_partial_states: .*{text}"):
        F.save_partial_states(**{**good(), **given})


def test_a_state_whose_rows_overlap():
    memory = to_paddle(fp32(11 * 4 * 64))
    state = strided(memory, [11, 4, 64], [4 * 64, 32, 1])
    with pytest.raises(ValueError, match="no two of its elements may share memory"):
        F.save_partial_states(**{**good(), "state_cache": state})
