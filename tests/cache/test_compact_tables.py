"""compact_block_tables against its model, and against each sequence's keys told one by one."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn.functional as F
from fastattn import reference
from tests.support.compare import assert_same_bits
from tests.support.operators import calls, run
from tests.support.tensors import int32, to_numpy

BLOCKS = 40
#: Ids that name no block.
FOREIGN = (-1, -(2**31), BLOCKS, 2**31 - 1)
TABLES = {
    "random": lambda rng, b, m: np.where(
        rng.random((b, m)) < 0.5, rng.integers(0, BLOCKS, (b, m)), rng.choice(FOREIGN, (b, m))
    ),
    "interleaved": lambda rng, b, m: np.where(
        np.arange(m) % 2, rng.integers(0, BLOCKS, (b, m)), -1
    ),
    "whole": lambda rng, b, m: np.where(
        np.arange(b)[:, None] % 2, rng.integers(0, BLOCKS, (b, m)), -1
    ),
    "nothing": lambda rng, b, m: np.full((b, m), -1),
    "everything": lambda rng, b, m: rng.integers(0, BLOCKS, (b, m)),
}
#: Cached and new tokens: decode, a prefill, chunks, resting and empty sequences, lengths beyond the
#: table of 9 blocks of 64, and negative ones.
CACHED = (300, 0, 63, 0, 64, 517, 5, 575, 576, 2000, -9, 130, 0)
NEW = (1, 66, 2, 0, 7, 1, 3, 1, 1, 5, 4, 0, 1)
MASKS = ("none", "window", "both_sides", "not_causal", "offsets")


def make(tables: str, cached, new, max_blocks=9, gap=0, seed=0):
    """Arrays of a step, with `gap` tokens of padding before each sequence and after the last."""
    rng = np.random.default_rng(seed)
    sizes = np.maximum(new, 0) + gap
    cu = np.concatenate([[0], np.cumsum(sizes)]) + gap
    table = TABLES[tables](rng, len(new), max_blocks)
    return [table.astype(np.int32), cu, np.asarray(cached), np.asarray(new)], int(cu[-1]) + gap


def options_of(mask: str, tokens: int):
    rng = np.random.default_rng(1)
    offsets = rng.integers(-5, 700, (tokens, 2))
    offsets[::7] = rng.choice([-(2**31), 2**31 - 1, 0, 64], offsets[::7].shape)
    return {
        "none": {},
        "window": {"window_size": (100, -1)},
        "both_sides": {"window_size": (17, 3), "causal": False},
        "not_causal": {"causal": False},
        "offsets": {"mask_offsets": offsets.astype(np.int32), "causal": False},
    }[mask]


def call(seqs, tokens, place="cpu", **options):
    options = {
        k: int32(v, place) if k == "mask_offsets" and v is not None else v
        for k, v in options.items()
    }
    found = F.compact_block_tables(*(int32(x, place) for x in seqs), num_tokens=tokens, **options)
    return [None if x is None else to_numpy(x) for x in found]


def check(seqs, tokens, place="cpu", **options):
    found = call(seqs, tokens, place, num_blocks=BLOCKS, **options)
    expected = reference.compact_block_tables(
        *seqs, num_tokens=tokens, num_blocks=BLOCKS, **options
    )
    for name, got, want in zip(("tables", "seq_lens", "masks"), found, expected):
        assert got.dtype == np.int32
        assert_same_bits(got, want, name)
    return found


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("block_size", [64, 7])
def test_is_the_model(place, tables, mask, block_size):
    max_blocks = 9 if block_size == 64 else 83
    seqs, tokens = make(tables, CACHED, NEW, max_blocks, gap=3)
    check(seqs, tokens, place, block_size=block_size, **options_of(mask, tokens))


@pytest.mark.parametrize("mask", MASKS)
def test_each_query_sees_its_keys(mask):
    """Key by key: what a local interval names is what the global masks let the query see."""
    seqs, tokens = make("random", CACHED, NEW, gap=2, seed=4)
    options = options_of(mask, tokens)
    table, cu, cached, new = seqs
    tables, lens, masks = call(seqs, tokens, num_blocks=BLOCKS, **options)
    left, right = options.get("window_size", (-1, -1))
    owned = np.zeros(tokens, bool)
    for b, count in enumerate(new):
        past = max(cached[b], 0)
        keys = [
            (int(table[b, x // 64]), x % 64)
            for x in range(min(past + count, 9 * 64))
            if 0 <= table[b, x // 64] < BLOCKS
        ]
        for i in range(count):
            t, position = int(cu[b]) + i, past + i
            owned[t] = True
            sees = []
            for x in range(min(past + count, 9 * 64)):
                visible = not (options.get("causal", True) and x > position)
                visible &= left < 0 or x >= position - left
                visible &= right < 0 or x <= position + right
                if "mask_offsets" in options:
                    visible &= options["mask_offsets"][t, 0] <= x < options["mask_offsets"][t, 1]
                if visible and 0 <= table[b, x // 64] < BLOCKS:
                    sees.append((int(table[b, x // 64]), x % 64))
            begin, end = masks[t]
            assert 0 <= begin <= end <= lens[b] + count
            assert [(int(tables[b, y // 64]), y % 64) for y in range(begin, end)] == sees
        if left < 0:
            assert lens[b] == max(len(keys) - count, 0)
            assert (tables[b] >= 0).sum() == sum(x == 0 for _, x in keys)
    assert not masks[~owned].any()


def test_one_new_token_needs_no_mask(place):
    cached, new = [c for c in CACHED if c >= 0], None
    new = [1] * len(cached)
    seqs, tokens = make("interleaved", cached, new)
    tables, lens, masks = call(
        seqs, tokens, place, num_blocks=BLOCKS, want_masks=False, causal=False
    )
    assert masks is None
    _, _, wanted = reference.compact_block_tables(*seqs, num_tokens=tokens, num_blocks=BLOCKS)
    # Its keys are all of the local ones; without any its own position is in no block.
    assert ((lens + 1 == wanted[:, 1]) | ((wanted[:, 1] == 0) & (tables[:, 0] < 0))).all()
    assert not wanted[:, 0].any()


@pytest.mark.parametrize("max_blocks", [0, 1, 1023, 1024, 1025, 16383, 16384, 16385, 40000])
def test_long_tables(place, max_blocks):
    """Several rounds of the kernel, and the edges between them."""
    k = max_blocks * 3
    cached = [max(k - 4, 0), max(k - 5000 * 3 - 1, 0), 2, 10**9]
    seqs, tokens = make("random", cached, [4, 2, 1, 1], max_blocks, seed=max_blocks)
    check(seqs, tokens, place, block_size=3)
    check(seqs, tokens, place, block_size=3, window_size=(1000, 0))


def test_windows_leave_out_the_blocks_before_them(place):
    seqs, tokens = make("everything", [500], [2])
    tables, lens, masks = check(seqs, tokens, place, window_size=(70, 0))
    assert (tables[0] >= 0).sum() == 2  # keys 430 to 501, in blocks 6 and 7
    assert lens.tolist() == [502 - 6 * 64 - 2]
    assert masks.tolist() == [[46, 117], [47, 118]]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    block_size=st.integers(1, 70),
    max_blocks=st.integers(0, 20),
    causal=st.booleans(),
    left=st.integers(-1, 100),
    right=st.integers(-1, 100),
)
def test_any_lengths(data, block_size, max_blocks, causal, left, right):
    """Lengths that are no lengths, offsets out of order and out of the tensor."""
    batch = data.draw(st.integers(0, 4))
    number = st.one_of(st.integers(-5, 300), st.sampled_from([-(2**31), 2**29]))
    draw = lambda n: [data.draw(number) for _ in range(n)]  # noqa: E731
    seqs = [
        np.array([draw(max_blocks) for _ in range(batch)], np.int64).reshape(batch, max_blocks),
        np.sort(draw(batch + 1)),
        np.array(draw(batch), np.int64),
        np.array(draw(batch), np.int64),
    ]
    check(seqs, 200, block_size=block_size, causal=causal, window_size=(left, right))


def test_unordered_offsets_stay_inside(place):
    seqs = [np.zeros((3, 2)), [9, 3, -4, 2**31 - 1], [5, 5, 5], [4, 4, 2**31 - 1]]
    found = call(seqs, 6, place, num_blocks=BLOCKS)
    assert [x.shape for x in found] == [(3, 2), (3,), (6, 2)]
    assert (found[2] >= 0).all() and (found[2] <= 128).all()


def test_more_slots_than_sequences(place):
    """A server's tables and cached lengths of all slots, of which the first run."""
    seqs, tokens = make("random", CACHED, NEW)
    seqs[1], seqs[3] = seqs[1][:5], seqs[3][:4]
    tables, lens, _ = check(seqs, tokens, place)
    assert tables.shape == (4, 9) and lens.shape == (4,)


def test_no_sequences(place):
    seqs = [np.zeros((0, 3)), [0], np.zeros(0), np.zeros(0)]
    found = call(seqs, 5, place, num_blocks=BLOCKS)
    assert [x.shape for x in found] == [(0, 3), (0,), (5, 2)]
    assert not found[2].any()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"num_blocks": -1}, ValueError, "num_blocks: expected 0 to"),
        ({"num_blocks": 2**31}, ValueError, "num_blocks: expected 0 to"),
        ({"num_tokens": -1}, ValueError, "num_tokens: expected 0 to"),
        ({"block_size": 0}, ValueError, "block_size: expected 1 to"),
        ({"window_left": -2}, ValueError, "window_size: expected -1"),
        ({"window_right": -2}, ValueError, "window_size: expected -1"),
        ({"mask_offsets": int32([[0, 1]])}, ValueError, r"mask_offsets: expected shape \[2, 2\]"),
        (
            {"mask_offsets": int32([[0, 1], [0, 2]]), "want_masks": False},
            ValueError,
            "mask_offsets: expected None without want_masks",
        ),
        ({"block_tables": paddle.zeros([1, 1])}, TypeError, "block_tables: expected dtype int32"),
        ({"cu_seqlens_q": int32([0])}, ValueError, r"cu_seqlens_q: expected shape \[2\]"),
        ({"seq_lens_decoder": int32([0, 1])}, ValueError, "seq_lens_decoder: expected shape"),
    ],
)
def test_errors(changes, error, text):
    sample = calls()["compact_block_tables"].changed(
        **{k: v for k, v in changes.items() if k != "mask_offsets"}
    )
    inputs = dict(sample.inputs)
    if "mask_offsets" in changes:
        inputs["mask_offsets"] = changes["mask_offsets"]
    with pytest.raises(error, match=text):
        run("compact_block_tables", inputs, sample.attrs)


def test_python_errors():
    seqs, tokens = make("random", [3], [1])
    with pytest.raises(TypeError, match="window_size: expected"):
        call(seqs, tokens, num_blocks=1, window_size=3)
    with pytest.raises(TypeError, match="num_blocks: expected int"):
        call(seqs, tokens, num_blocks=1.0)
