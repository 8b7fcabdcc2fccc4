"""indexer_k_write_cache and indexer_k_gather: every byte, written or left alone."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from tests.support.compare import assert_same_bits
from tests.support.indexer_keys import (
    CANARY,
    TOKEN,
    dequantized,
    empty_pages,
    keys,
    row_of,
    touched_rows,
)
from tests.support.static import run_all_modes
from tests.support.tensors import (
    BF16,
    DTYPES,
    EMPTY_OUTPUTS,
    int32,
    skip_slices_on,
    to_numpy,
    to_paddle,
)

RNG = np.random.default_rng
RULES = [("fp8", "pow2"), ("fp8", "amax"), ("fp8", "amax_div"), ("mxfp4", "pow2")]


def write(place, key, cache, slots, quant, rule, page_size=None):
    """The cache after the operator, which must be the model's."""
    tensor = to_paddle(cache.copy(), place)
    result = F.indexer_k_write_cache(
        to_paddle(key, place),
        tensor,
        to_paddle(slots, place),
        quant=quant,
        scale_rule=rule,
        page_size=page_size,
    )
    want = reference.indexer_k_write_cache(
        key, cache, slots, quant=quant, scale_rule=rule, page_size=page_size
    )
    assert_same_bits(to_numpy(tensor), want, "cache")
    assert_same_bits(to_numpy(result), want, "result")
    return want


# ---- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "rule"), RULES)
def test_model_quantises_as_its_definition_says(quant, rule):
    key = keys(RNG(1), 9)
    key[3] = 0
    key[4] *= 1e-7
    cache = reference.indexer_k_write_cache(
        key, empty_pages(3, 3, quant), np.arange(9), quant=quant, scale_rule=rule, page_size=3
    )
    for i, x in enumerate(key.astype(np.float64)):
        codes, scales = row_of(cache, i // 3, i % 3, 3, quant)
        got, scale = dequantized(codes, scales, quant)
        if quant == "fp8":
            largest = max(np.abs(x).max(), 1e-4)
            exact = 2.0 ** np.ceil(np.log2(largest / 448)) if rule == "pow2" else largest / 448
            np.testing.assert_allclose(scale, exact, rtol=0 if rule == "pow2" else 1e-7)
            bound = np.abs(x) * 2.0**-4 * 1.0001 + scale * 2.0**-10
        else:
            for b in range(4):
                largest = max(np.abs(x[32 * b : 32 * b + 32]).max(), 6 * 2.0**-126)
                assert scale[32 * b] == 2.0 ** np.ceil(np.log2(largest / 6))
            bound = np.maximum(np.abs(x) / 4, scale / 4)
        assert (np.abs(got - x) <= bound).all(), i


# ---- indexer_k_write_cache ---------------------------------------------------------------------

FORMS = [("bfloat16", np.int64, 64, 0), ("float16", np.int32, 3, 12), ("float32", np.int64, 7, 192)]


@pytest.mark.parametrize("tokens", [1, 5, 64, 333])
@pytest.mark.parametrize(("dtype", "index", "page_size", "padding"), FORMS)
@pytest.mark.parametrize(("quant", "rule"), RULES)
def test_written_bytes(place, tokens, dtype, index, page_size, padding, quant, rule):
    rng = RNG(tokens)
    pages = tokens // page_size + 2
    slots = rng.permutation(pages * page_size)[:tokens].astype(index)
    skipped = rng.random(tokens) < 0.2
    slots[skipped] = -1
    cache = write(
        place,
        keys(rng, tokens, DTYPES[dtype]),
        empty_pages(pages, page_size, quant, padding),
        slots,
        quant,
        rule,
        page_size,
    )
    assert touched_rows(cache, page_size, quant) == sorted(slots[~skipped].tolist())


@pytest.mark.parametrize(("quant", "rule"), RULES)
def test_page_size_from_the_shape(place, quant, rule):
    rng = RNG(2)
    width = sum(TOKEN[quant])
    slots = rng.permutation(48)[:20]
    flat = write(place, keys(rng, 20), empty_pages(3, 16, quant), slots, quant, rule, 16)
    for shape in ((3, 16, width), (3, 16, 1, width)):
        cache = empty_pages(3, 16, quant).reshape(shape)
        got = write(place, keys(RNG(2), 20), cache, slots, quant, rule)
        if shape == (3, 16, width):
            again = got.reshape(3, -1)
            assert again.shape == flat.shape


@pytest.mark.parametrize("slot", [-1, -(2**63), 12, 2**31, 2**62, 2**63 - 1])
def test_slots_that_are_skipped(place, slot):
    key = keys(RNG(3), 2)
    slots = np.array([slot, 5], np.int64)
    cache = write(place, key, empty_pages(3, 4, "fp8"), slots, "fp8", "pow2", 4)
    assert touched_rows(cache, 4, "fp8") == [5]


@pytest.mark.parametrize("slot", [-1, -(2**31), 12, 2**31 - 1])
def test_int32_slots_that_are_skipped(place, slot):
    slots = np.array([slot, 11], np.int32)
    cache = write(place, keys(RNG(3), 2), empty_pages(3, 4, "mxfp4"), slots, "mxfp4", "pow2", 4)
    assert touched_rows(cache, 4, "mxfp4") == [11]


def test_fewer_slots_than_keys(place):
    """Padding of a graph: keys without a slot are not written, whatever they hold."""
    key = keys(RNG(4), 9)
    key[6:] = np.nan
    cache = write(place, key, empty_pages(2, 8, "fp8"), np.array([3, 9, -1, 0, 8, 15]), "fp8",
                  "amax", 8)  # fmt: skip
    assert touched_rows(cache, 8, "fp8") == [0, 3, 8, 9, 15]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("quant", "rule"), RULES)
def test_special_values(place, quant, rule, dtype):
    x = np.zeros((10, 128), np.float32)
    x[1] = -0.0
    x[2] = keys(RNG(5), 1)[0]
    x[2, 7] = np.nan
    x[3, 100] = np.inf
    x[4, 1] = -np.inf
    x[4, 64] = np.nan
    x[5] = 1e-30
    x[6] = np.arange(128) / 1024 + 1  # ties of e4m3
    x[7] = np.tile([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], 16)  # ties of E2M1
    x[8] = 3e38
    x[9] = np.tile([448, -448, 1e-4, 0.0625], 32)
    with np.errstate(over="ignore"):
        x = x.astype(DTYPES[dtype])
    cache = write(place, x, empty_pages(1, 10, quant), np.arange(10), quant, rule, 10)
    if quant == "fp8":
        for token in (2, 4):
            codes, scales = row_of(cache, 0, token, 10, quant)
            assert (codes == 0x7F).all() and np.isnan(scales.view(np.float32)[0])
        codes, scales = row_of(cache, 0, 0, 10, quant)
        floor = 2.0**-22 if rule == "pow2" else np.float32(1e-4) / np.float32(448)
        assert (codes == 0).all() and scales.view(np.float32)[0] == floor
        assert (row_of(cache, 0, 1, 10, quant)[0] == 0x80).all()
        codes, scales = row_of(cache, 0, 3, 10, quant)
        assert codes[100] == 0x7E and np.isfinite(scales.view(np.float32)[0])
    else:
        codes, _ = row_of(cache, 0, 2, 10, quant)
        assert codes[3] >> 4 == 7  # the NaN; its neighbours keep their values
        assert (row_of(cache, 0, 1, 10, quant)[0] == 0x88).all()


def test_every_bf16(place):
    bits = np.arange(65536, dtype=np.uint16)
    key = np.resize(np.concatenate([bits, bits[::-7]]), (600, 128)).view(BF16)
    for quant, rule in RULES:
        write(place, key, empty_pages(10, 60, quant), np.arange(600)[::-1], quant, rule, 60)


def test_keys_of_a_wider_tensor(place):
    skip_slices_on(place)
    wide = keys(RNG(6), 7, BF16)
    wide = np.concatenate([wide, wide[::-1], wide], axis=1)
    for first in (0, 3, 8, 192):
        cache = to_paddle(empty_pages(1, 8, "fp8"), place)
        key = to_paddle(wide, place)[:, first : first + 128]
        slots = np.arange(7)
        F.indexer_k_write_cache(key, cache, to_paddle(slots, place), page_size=8)
        want = reference.indexer_k_write_cache(
            wide[:, first : first + 128], empty_pages(1, 8, "fp8"), slots, page_size=8
        )
        assert_same_bits(to_numpy(cache), want)


@pytest.mark.parametrize(("quant", "rule"), RULES)
@pytest.mark.parametrize("offset", [0, 1, 4, 16])
def test_pages_that_lie_apart(place, quant, rule, offset):
    """A pool whose pages hold other bytes as well, at any offset."""
    skip_slices_on(place)
    page = 8 * sum(TOKEN[quant])
    pool = np.full((5, page + 44), CANARY, np.uint8)
    tensor = to_paddle(pool, place)
    view = tensor[:, offset : offset + page]
    key, slots = keys(RNG(7), 17), np.append(RNG(8).permutation(40)[:15], [-1, 40])
    F.indexer_k_write_cache(
        to_paddle(key, place),
        view,
        to_paddle(slots, place),
        quant=quant,
        scale_rule=rule,
        page_size=8,
    )
    want = pool.copy()
    want[:, offset : offset + page] = reference.indexer_k_write_cache(
        key, pool[:, offset : offset + page], slots, quant=quant, scale_rule=rule, page_size=8
    )
    assert_same_bits(to_numpy(tensor), want)
    tables, cu_seqlens = np.array([[3, 1], [4, 0]], np.int32), np.array([0, 16, 29], np.int32)
    got = F.indexer_k_gather(
        view, to_paddle(tables, place), to_paddle(cu_seqlens, place), 29, quant=quant, page_size=8
    )
    expected = reference.indexer_k_gather(
        want[:, offset : offset + page], tables, cu_seqlens, 29, quant=quant, page_size=8
    )
    for a, b in zip(got, expected):
        assert_same_bits(to_numpy(a), b)


def test_no_tokens(place):
    cache = empty_pages(2, 4, "fp8")
    write(place, keys(RNG(0), 3), cache, np.zeros(0, np.int64), "fp8", "pow2", 4)
    write(place, keys(RNG(0), 0), cache, np.zeros(0, np.int64), "fp8", "pow2", 4)


def test_no_pages(place):
    write(place, keys(RNG(0), 3), empty_pages(0, 4, "fp8"), np.arange(3), "fp8", "pow2", 4)


# ---- indexer_k_gather --------------------------------------------------------------------------


class Sequences:
    """Random bytes in pages, and sequences over them; the last pages belong to nobody."""

    def __init__(self, lengths, page_size, quant, padding=0, seed=0):
        rng = RNG(seed)
        self.quant, self.page_size = quant, page_size
        needed = [-(-n // page_size) for n in lengths]
        pages = sum(needed) + 3
        shape = (pages, page_size * sum(TOKEN[quant]) + padding)
        self.cache = rng.integers(0, 256, shape).astype(np.uint8)
        order = rng.permutation(pages)
        self.tables = np.full((len(lengths), max([*needed, 1]) + 1), -1, np.int32)
        at = 0
        for seq, count in enumerate(needed):
            self.tables[seq, :count] = order[at : at + count]
            at += count
        self.cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def check(self, place, rows, scale_dtype=None):
        """Gather into canaries; every byte must be the model's."""
        if scale_dtype is None:
            scale_dtype = np.float32 if self.quant == "fp8" else np.int32
        code_bytes = TOKEN[self.quant][0]
        out = np.full((rows, code_bytes), CANARY, np.uint8)
        words = 1 if np.dtype(scale_dtype).itemsize == 4 else 4
        out_scales = np.full(rows * 4, CANARY, np.uint8).view(scale_dtype).reshape(rows, words)
        options = {"quant": self.quant, "page_size": self.page_size}
        want = reference.indexer_k_gather(
            self.cache, self.tables, self.cu_seqlens, rows,
            out=out, out_scales=out_scales, **options,
        )  # fmt: skip
        tensors = [to_paddle(x.copy(), place) for x in (out, out_scales)]
        metadata = [to_paddle(x, place) for x in (self.cache, self.tables, self.cu_seqlens)]
        got = F.indexer_k_gather(*metadata, rows, out=tensors[0], out_scales=tensors[1], **options)
        for a, b, c in zip(tensors, got, want):
            assert_same_bits(to_numpy(a), c)
            assert_same_bits(to_numpy(b), c)
        # And into new tensors, where a row of nobody holds anything.
        fresh = F.indexer_k_gather(*metadata, rows, **options)
        mine = self.gathered(rows)
        assert_same_bits(to_numpy(fresh[0])[mine], want[0][mine])
        flat = np.ascontiguousarray(to_numpy(fresh[1])).view(np.uint8).reshape(-1, 4)
        assert_same_bits(flat[mine], want[1].view(np.uint8).reshape(-1, 4)[mine])
        return want

    def gathered(self, rows):
        """Which rows belong to a token with a page, by definition."""
        mine, starts = np.zeros(rows, bool), self.cu_seqlens.tolist()
        for seq, (begin, end) in enumerate(zip(starts, starts[1:])):
            for row in range(begin, min(end, rows)):
                index = (row - begin) // self.page_size
                if index < self.tables.shape[1]:
                    mine[row] = 0 <= self.tables[seq, index] < len(self.cache)
        return mine


@pytest.mark.parametrize("quant", TOKEN)
@pytest.mark.parametrize(("page_size", "padding"), [(64, 0), (64, 192), (5, 0), (1, 3), (7, 9)])
def test_gathered_bytes(place, quant, page_size, padding):
    seqs = Sequences([0, 1, 130, 0, 64, 3, 257, 0], page_size, quant, padding)
    codes, scales = seqs.check(place, 455)
    assert seqs.gathered(455).all()
    # A row by hand: token 2 of the sequence with 3.
    page, row = seqs.tables[5, 2 // page_size], 2 % page_size
    want = row_of(seqs.cache, page, row, page_size, quant)
    assert_same_bits(codes[1 + 130 + 64 + 2], want[0])
    assert_same_bits(scales.view(np.uint8).reshape(-1, 4)[1 + 130 + 64 + 2], want[1])


@pytest.mark.parametrize("rows", [1, 30, 454, 456, 700])
def test_more_or_fewer_rows_than_tokens(place, rows):
    """Rows past the last token stay as they are; a sequence that reaches past the end is cut."""
    seqs = Sequences([0, 1, 130, 0, 64, 3, 257, 0], 64, "fp8")
    codes, _ = seqs.check(place, rows)
    assert (codes[455:] == CANARY).all()


@pytest.mark.parametrize("scale_dtype", [np.float32, np.int32, np.uint8])
@pytest.mark.parametrize("quant", TOKEN)
def test_scales_of_any_dtype_of_four_bytes(place, quant, scale_dtype):
    Sequences([3, 70], 64, quant).check(place, 73, scale_dtype)


@pytest.mark.parametrize("bad", [-1, -(2**31), 9, 2147480000, 2**31 - 1])
def test_pages_that_do_not_exist(place, bad):
    seqs = Sequences([130, 100], 64, "fp8")
    assert len(seqs.cache) == 8
    seqs.tables[0, 1] = bad
    codes, _ = seqs.check(place, 230)
    assert (codes[64:128] == CANARY).all() and (codes[128:] != CANARY).any(axis=1).all()


def test_tables_that_are_too_short(place):
    seqs = Sequences([130, 3], 64, "mxfp4")
    seqs.tables = np.ascontiguousarray(seqs.tables[:, :2])
    codes, _ = seqs.check(place, 133)
    assert (codes[128:130] == CANARY).all()


def test_more_tables_than_sequences(place):
    """Tables of slots that do not run."""
    seqs = Sequences([70, 3, 50], 64, "fp8")
    seqs.cu_seqlens = np.array([0, 70], np.int32)
    seqs.check(place, 75)


@pytest.mark.parametrize("quant", TOKEN)
def test_rows_before_the_first_sequence(place, quant):
    seqs = Sequences([3, 70], 64, quant)
    seqs.cu_seqlens += 5
    seqs.check(place, 80)


def test_many_sequences(place):
    lengths = RNG(9).integers(0, 9, 700)
    lengths[100:400] = 0
    seqs = Sequences(lengths.tolist(), 4, "fp8")
    seqs.check(place, int(lengths.sum()) + 3)


def test_nothing_to_gather(place):
    seqs = Sequences([0, 0], 64, "fp8")
    seqs.check(place, 3)
    if EMPTY_OUTPUTS:
        codes, scales = F.indexer_k_gather(
            *(to_paddle(x, place) for x in (seqs.cache, seqs.tables, seqs.cu_seqlens)),
            0,
            page_size=64,
        )
        assert (codes.shape, scales.shape) == ([0, 128], [0])


@pytest.mark.parametrize("quant", TOKEN)
@pytest.mark.parametrize(
    ("lengths", "page_size"),
    [
        ([4 * 1023], 4),
        ([4 * 1024], 4),
        ([20000], 64),
        ([9000, 0, 8000], 64),
        ([5, 2, 0] * 85, 4),
        ([5, 2, 0, 9] * 64, 4),
    ],
    ids=["1024 pages", "1025", "one long", "two long", "255 sequences", "256"],
)
def test_few_and_many_pages(place, quant, lengths, page_size):
    """Up to 1024 entries of tables and 255 sequences are read at once, others row by row."""
    seqs = Sequences(lengths, page_size, quant)
    rows = sum(lengths)
    seqs.check(place, rows)
    seqs.tables[-1, 0] = seqs.tables[0, 1] = -1
    seqs.cu_seqlens += 3
    seqs.check(place, rows + 9)


@pytest.mark.parametrize(("quant", "rule"), RULES)
def test_a_prompt_in_chunks_comes_back_whole(place, quant, rule):
    """Chunks of any size over permuted pages, then the whole prefix gathered."""
    rng = RNG(10)
    key, n, pages = keys(rng, 150, BF16), 16, 12
    table = rng.permutation(pages)[:10].astype(np.int32)
    whole = reference.indexer_k_write_cache(
        key, empty_pages(10, n, quant), np.arange(150), quant=quant, scale_rule=rule, page_size=n
    )
    cache = to_paddle(empty_pages(pages, n, quant), place)
    cuts = [0, 1, 17, 64, 149, 150]
    for begin, end in zip(cuts, cuts[1:]):
        at = np.arange(begin, end)
        F.indexer_k_write_cache(
            to_paddle(key[begin:end], place),
            cache,
            to_paddle(table[at // n].astype(np.int64) * n + at % n, place),
            quant=quant,
            scale_rule=rule,
            page_size=n,
        )
        got = F.indexer_k_gather(
            cache, int32(table[None], place), int32([0, end], place), end,
            quant=quant, page_size=n,
        )  # fmt: skip
        for token in range(end):
            codes, scales = row_of(whole, token // n, token % n, n, quant)
            assert_same_bits(to_numpy(got[0])[token], codes)
            row = np.ascontiguousarray(to_numpy(got[1])[token : token + 1]).view(np.uint8)
            assert_same_bits(row, scales)


@pytest.mark.parametrize("quant", TOKEN)
def test_a_pool_of_more_than_2_gib(place, quant):
    """Offsets of 64 bits. A CPU's pool is never touched but for a few pages."""
    page = 64 * sum(TOKEN[quant])
    pages = 2**31 // page + 70000 // page + 9
    device = paddle.CPUPlace() if place == "cpu" else paddle.CUDAPlace(0)
    with paddle.base.dygraph.guard(device):
        cache = paddle.empty([pages, page], "uint8")
    key = keys(RNG(11), 192, BF16)
    table = np.array([0, 2**31 // page, pages - 1], np.int32)
    at = np.arange(192)
    slots = table[at // 64].astype(np.int64) * 64 + at % 64
    F.indexer_k_write_cache(
        to_paddle(key, place), cache, to_paddle(slots, place), quant=quant, page_size=64
    )
    codes, scales = F.indexer_k_gather(
        cache, int32(table[None], place), int32([0, 192], place), 192, quant=quant, page_size=64
    )
    small = reference.indexer_k_write_cache(
        key, empty_pages(3, 64, quant), at, quant=quant, page_size=64
    )
    want = reference.indexer_k_gather(
        small, np.arange(3)[None], np.array([0, 192]), 192, quant=quant, page_size=64
    )
    assert_same_bits(to_numpy(codes), want[0])
    assert_same_bits(to_numpy(scales), want[1])


# ---- programs and errors -----------------------------------------------------------------------


def write_amax(key, cache, slots):
    return F.indexer_k_write_cache(key, cache, slots, scale_rule="amax")


def gather_nine(cache, tables, cu_seqlens):
    return F.indexer_k_gather(cache, tables, cu_seqlens, 9, quant="mxfp4")


def gather_into(cache, tables, cu_seqlens, out, out_scales):
    return F.indexer_k_gather(cache, tables, cu_seqlens, 9, out=out, out_scales=out_scales)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_and_saved(place, dynamic):
    key, slots = keys(RNG(12), 5, BF16), np.array([7, 1, -1, 2, 5])
    cache = empty_pages(2, 4, "fp8").reshape(2, 4, 132)
    want = reference.indexer_k_write_cache(key, cache, slots, scale_rule="amax")
    outputs, inputs = run_all_modes(write_amax, [key, cache, slots], place, dynamic=dynamic)
    assert_same_bits(outputs[0], want)
    assert_same_bits(inputs[1], want)

    cache = RNG(13).integers(0, 256, (4, 4, 68)).astype(np.uint8)
    given = [cache, np.array([[2, 0], [3, -1]], np.int32), np.array([0, 7, 9], np.int32)]
    outputs, _ = run_all_modes(gather_nine, given, place, dynamic=dynamic)
    for got, expected in zip(outputs, reference.indexer_k_gather(*given, 9, quant="mxfp4")):
        assert_same_bits(got, expected)

    cache = RNG(14).integers(0, 256, (4, 4, 132)).astype(np.uint8)
    given = [cache, np.array([[2, 0], [3, -1]], np.int32), np.array([0, 5, 7], np.int32)]
    out = [np.full((9, 128), 3, np.uint8), np.full((9, 4), 5, np.uint8)]
    expected = reference.indexer_k_gather(*given, 9, out=out[0], out_scales=out[1])
    outputs, inputs = run_all_modes(gather_into, [*given, *out], place, dynamic=dynamic)
    for i in range(2):
        assert_same_bits(outputs[i], expected[i])
        assert_same_bits(inputs[3 + i], expected[i])


def zeros(*shape, dtype="uint8"):
    return paddle.zeros(shape, dtype)


WRITE = {
    "key": zeros(3, 128, dtype="float32"),
    "cache": zeros(2, 4, 132),
    "slot_mapping": zeros(3, dtype="int64"),
}
WRONG_WRITES = [
    ({"key": zeros(3, 64, dtype="float32")}, ValueError, r"key: expected shape \[\?, 128\]"),
    ({"key": zeros(3, 128, dtype="int32")}, TypeError, "key: expected dtype"),
    ({"key": zeros(128, 3, dtype="float32").t()}, ValueError, "key: expected stride 1"),
    ({"cache": zeros(2, 4, 132, dtype="int8")}, TypeError, "cache: expected dtype uint8"),
    ({"cache": zeros(2, 4, 131)}, ValueError, "cache: expected pages of at least 528 bytes"),
    ({"cache": zeros(528)}, ValueError, r"page_size: a cache of shape \[528\]"),
    ({"cache": zeros(528), "page_size": 4}, ValueError, r"cache: expected \[num_pages"),
    ({"cache": zeros(2, 528)}, ValueError, "page_size: .* does not tell it"),
    ({"cache": None}, TypeError, "cache: expected a tensor, got None"),
    ({"cache": zeros(132, 4, 2).transpose([2, 1, 0])}, ValueError, "cache: .* side by side"),
    ({"page_size": 0}, ValueError, "page_size: expected a positive number of tokens, got 0"),
    ({"page_size": 2**62}, ValueError, "page_size: expected sizes whose product fits"),
    ({"page_size": 4.0}, TypeError, "page_size: expected int, got float"),
    ({"slot_mapping": zeros(4, dtype="int64")}, ValueError, "slot_mapping: expected at most 3"),
    ({"slot_mapping": zeros(3, dtype="int16")}, TypeError, "slot_mapping: expected dtype int64"),
    ({"slot_mapping": zeros(3, 1, dtype="int64")}, ValueError, "slot_mapping: expected 1 dim"),
    ({"quant": "fp8_512"}, ValueError, "quant: expected fp8 or mxfp4, got 'fp8_512'"),
    (
        {"scale_rule": "ue8m0"},
        ValueError,
        "scale_rule: expected pow2, amax or amax_div, got 'ue8m0'",
    ),
    ({"quant": "mxfp4", "scale_rule": "amax"}, ValueError, "scale_rule: expected pow2 with mxfp4"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG_WRITES)
def test_wrong_writes(change, error, text):
    with pytest.raises(error, match=f"indexer_k_write_cache: {text}"):
        F.indexer_k_write_cache(**{**WRITE, **change})


GATHER = {
    "cache": zeros(2, 4, 132),
    "block_tables": zeros(2, 3, dtype="int32"),
    "cu_seqlens_k": zeros(3, dtype="int32"),
    "num_tokens": 5,
}
WRONG_GATHERS = [
    ({"cache": zeros(2, 4, 100)}, ValueError, "cache: expected pages of at least 528"),
    ({"block_tables": zeros(6, dtype="int32")}, ValueError, "block_tables: expected 2 dim"),
    ({"block_tables": zeros(2, 3, dtype="int64")}, TypeError, "block_tables: expected dtype"),
    ({"block_tables": zeros(1, 3, dtype="int32")}, ValueError, "cu_seqlens_k: expected 1 to 2"),
    ({"cu_seqlens_k": zeros(0, dtype="int32")}, ValueError, "cu_seqlens_k: expected 1 to 3"),
    ({"num_tokens": -1}, ValueError, "num_tokens: expected at least 0, got -1"),
    ({"num_tokens": True}, TypeError, "num_tokens: expected int, got bool"),
    ({"quant": "fp4"}, ValueError, "quant: expected fp8 or mxfp4, got 'fp4'"),
    ({"out": zeros(5, 128)}, ValueError, "out_scales: expected both"),
    ({"out_scales": zeros(5, 4)}, ValueError, "out: expected both"),
    ({"out": zeros(5, 64), "out_scales": zeros(5, 4)}, ValueError, "out: expected shape"),
    ({"out": zeros(5, 128), "out_scales": zeros(5)}, ValueError, "out_scales: expected at least"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG_GATHERS)
def test_wrong_gathers(change, error, text):
    with pytest.raises(error, match=f"indexer_k_gather: {text}"):
        F.indexer_k_gather(**{**GATHER, **change})


def test_results_apart_from_the_cache():
    cache = zeros(2, 4, 132)
    flat = cache.reshape([-1])
    with pytest.raises(ValueError, match=r"out: .* share memory with cache"):
        F.indexer_k_gather(
            cache, GATHER["block_tables"], GATHER["cu_seqlens_k"], 1,
            out=flat[:128].reshape([1, 128]), out_scales=zeros(1, 4),
        )  # fmt: skip
