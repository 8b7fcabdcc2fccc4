"""topk_to_slots, window_indices, short_context_indices, combine_topk_window: every index."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from tests.support.compare import assert_same_bits
from tests.support.static import run_all_modes
from tests.support.tensors import EMPTY_OUTPUTS, int32, skip_slices_on, to_numpy, to_paddle

RNG = np.random.default_rng
FAR = 2147480000  # what a table's unused entries may hold


def check(name, arrays, place, **options):
    """Run a map and its model, and compare; arrays may be given by position or by name."""
    positional = [a for a in arrays if not isinstance(a, tuple)]
    named = {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
    plain = {k: v for k, v in options.items() if not isinstance(v, np.ndarray)}
    tensors = [to_paddle(a, place) if isinstance(a, np.ndarray) else a for a in positional]
    got = getattr(F, name)(*tensors, **{k: to_paddle(v, place) for k, v in named.items()}, **plain)
    want = getattr(reference, name)(*positional, **options)
    for a, b, what in zip(got, want, ("indices", "lengths")):
        assert to_numpy(a).dtype == np.int32
        assert_same_bits(to_numpy(a), b, what)
    return want


# ---- topk_to_slots -----------------------------------------------------------------------------


def chosen(rows, k, tokens, seed=0):
    """Rows as a top-k gives them: ascending, then -1; of lengths 0, k and between."""
    rng = RNG(seed)
    out = np.full((rows, k), -1, np.int32)
    for row in range(rows):
        count = [0, min(k, tokens)][row] if row < 2 else int(rng.integers(0, min(k, tokens) + 1))
        out[row, :count] = np.sort(rng.permutation(tokens)[:count])
    return out


def tables_of(batch, blocks, num_blocks, seed=1):
    rng = RNG(seed)
    return np.stack([rng.permutation(num_blocks)[:blocks] for _ in range(batch)]).astype(np.int32)


@pytest.mark.parametrize("k", [1, 7, 32, 500, 2048, 2049, 5000])
@pytest.mark.parametrize("block_size", [64, 2, 61])
@pytest.mark.parametrize("compact", [True, False])
def test_slots(place, k, block_size, compact):
    tokens = 6000
    blocks = -(-tokens // block_size)
    tables = tables_of(5, blocks, blocks + 3)
    indices = chosen(5, k, tokens)
    slots, lengths = check(
        "topk_to_slots", [indices, tables], place, block_size=block_size, compact=compact
    )
    # By definition, in another form than the model's.
    for row in range(5):
        count = int((indices[row] >= 0).sum())
        at = indices[row, :count]
        want = tables[row, at // block_size].astype(np.int64) * block_size + at % block_size
        assert_same_bits(slots[row, :count].astype(np.int64), want)
        assert (slots[row, count:] == -1).all() and lengths[row] == count


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("bad", [-1, -(2**31), 12, FAR, 2**31 - 1])
def test_table_entries_out_of_range(place, bad, compact):
    tables = tables_of(4, 10, 12)
    tables[:, 3] = bad
    tables[2, 9] = bad
    indices = chosen(4, 300, 640)
    slots, lengths = check(
        "topk_to_slots", [indices, tables], place, num_blocks=12, compact=compact
    )
    lost = (indices >= 192) & (indices < 256) | (np.arange(4) == 2)[:, None] & (indices >= 576)
    assert ((slots >= 0).sum(axis=1) == ((indices >= 0) & ~lost).sum(axis=1)).all()
    assert (slots < 12 * 64).all()
    if compact:
        assert_same_bits(lengths, (slots >= 0).sum(axis=1).astype(np.int32))
    else:
        assert (slots[lost] == -1).all()


@pytest.mark.parametrize("compact", [True, False])
def test_indices_past_the_table_and_slots_past_int32(place, compact):
    indices = np.array([[0, 127, 128, 2**31 - 1, -5], [63, 64, -1, 65, 10**6]], np.int32)
    tables = np.array([[2, FAR], [33554431, 33554432]], np.int32)
    slots, _ = check("topk_to_slots", [indices, tables], place, compact=compact)
    # The last slot that fits int32, and the first that does not.
    assert slots[1, 0] == 2**31 - 1 and (slots[1, 1:] == -1).all()
    assert slots[0].tolist() == [128, -1, -1, -1, -1]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_rows_of_any_sequence_and_padding(place, dtype):
    indices, tables = chosen(9, 40, 128), tables_of(3, 2, 9)
    seqs = np.array([2, 2, 0, 1, -1, 3, 0, -(2**31), 2**31 - 1], dtype)
    slots, lengths = check("topk_to_slots", [indices, tables, seqs], place)
    assert (slots[[4, 5, 7, 8]] == -1).all() and (lengths[[4, 5, 7, 8]] == 0).all()
    assert lengths[1] == 40


def test_more_rows_than_tables(place):
    _, lengths = check("topk_to_slots", [chosen(5, 9, 64), tables_of(3, 1, 5)], place)
    assert (lengths[3:] == 0).all()


@pytest.mark.parametrize("stride", [64, 65, 320])
def test_blocks_that_lie_apart(place, stride):
    """A page of 64 rows of a cache whose next page begins further on."""
    check("topk_to_slots", [chosen(4, 99, 256), tables_of(4, 4, 8)], place, block_stride=stride)


@pytest.mark.parametrize(("world_size", "interleave"), [(2, 1), (3, 64), (4, 5)])
def test_ranks_share_the_tokens(place, world_size, interleave):
    """Every token is of one rank, in the order of its own tokens."""
    tokens, rows = 700, 6
    indices = chosen(rows, 600, tokens)
    found = np.zeros(rows, np.int64)
    for rank in range(world_size):
        mine = [t for t in range(tokens) if t // interleave % world_size == rank]
        blocks = -(-len(mine) // 16)
        tables = tables_of(rows, blocks, blocks, seed=rank)
        slots, lengths = check(
            "topk_to_slots", [indices, tables], place,
            block_size=16, rank=rank, world_size=world_size, interleave=interleave,
        )  # fmt: skip
        place_of = {token: i for i, token in enumerate(mine)}
        for row in range(rows):
            locals_ = [place_of[t] for t in indices[row].tolist() if t in place_of]
            want = [int(tables[row, i // 16]) * 16 + i % 16 for i in locals_]
            assert slots[row, : len(want)].tolist() == want and lengths[row] == len(want)
        found += lengths
    assert (found == (indices >= 0).sum(axis=1)).all()


def test_indices_of_a_wider_tensor(place):
    skip_slices_on(place)
    wide = chosen(4, 90, 640)
    got = F.topk_to_slots(to_paddle(wide, place)[:, 3:50], int32(tables_of(4, 10, 10), place))
    want = reference.topk_to_slots(wide[:, 3:50], tables_of(4, 10, 10))
    for a, b in zip(got, want):
        assert_same_bits(to_numpy(a), b)


def test_a_topk_over_permuted_pages_is_the_same_tokens(place):
    """Ties and all: whatever the pages, slots lead back to the tokens that were chosen."""
    logits = np.maximum(RNG(2).standard_normal((3, 640)), 0.5).astype(np.float32)
    picked = F.topk_indices(to_paddle(logits, place), int32([640, 600, 5], place), 64)
    want = to_numpy(picked)
    for seed in range(5):
        tables = tables_of(3, 10, 10, seed)
        slots = to_numpy(F.topk_to_slots(picked, int32(tables, place))[0])
        for row in range(3):
            back = {int(tables[row, t // 64]) * 64 + t % 64: t for t in range(640)}
            assert [back.get(slot, -1) for slot in slots[row].tolist()] == want[row].tolist()


# ---- window_indices ----------------------------------------------------------------------------


def test_windows_at_their_edges():
    """Position 126 has 127 tokens from 0, 127 has 128 from 0, 128 has 128 from 1."""
    indices, lengths = F.window_indices(paddle.to_tensor([0, 126, 127, 128]))
    assert lengths.tolist() == [1, 127, 128, 128]
    assert indices[:, 0].tolist() == [0, 0, 0, 1]
    assert indices[:, 127].tolist() == [-1, -1, 127, 128]
    assert indices[0, 1:].tolist() == [-1] * 127


@pytest.mark.parametrize("window", [1, 3, 128, 300])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_windows(place, window, dtype):
    positions = np.array([0, 1, 2, 63, 64, 127, 128, 129, 500, 639, 640, 700, -1], dtype)
    rows = len(positions)
    check("window_indices", [positions], place, window=window)
    seqs = (np.arange(rows) % 3).astype(dtype)
    starts = np.array([0, 5, 600], np.int32)
    check("window_indices", [positions, seqs], place, window=window, starts=starts)
    tables = tables_of(3, 10, 12)
    tables[1, 4:] = -1
    tables[2, 3] = FAR
    for num_blocks in (None, 12, 9):
        check(
            "window_indices", [positions, seqs], place,
            window=window, block_tables=tables, num_blocks=num_blocks,
        )  # fmt: skip
    check("window_indices", [positions, seqs], place, window=window, block_tables=tables,
          block_size=7)  # fmt: skip


def test_padding_has_no_window(place):
    positions = np.array([5, 5, 5, -1, -(2**63), 2**31, 2**62, 2**31 - 1])
    seqs = np.array([-1, 2, 0, 0, 0, 0, 0, 0], np.int32)
    tables = np.array([[3], [4]], np.int32)
    for given in ({"block_tables": tables}, {"starts": np.array([1, 2], np.int32)}):
        _, lengths = check("window_indices", [positions, seqs], place, window=4, **given)
        assert (lengths[[0, 1, 3, 4, 5, 6]] == 0).all() and lengths[2] == 4
    _, lengths = check("window_indices", [positions], place, window=4)
    assert lengths.tolist() == [4, 4, 4, 0, 0, 0, 0, 4]


def test_starts_of_any_value(place):
    positions = np.array([5, 2**31 - 1, 7, 9])
    starts = np.array([-(2**31), -(2**31), 2**31 - 1, 8], np.int32)
    indices, lengths = check("window_indices", [positions], place, window=4, starts=starts)
    assert (indices[1] == -1).all() and lengths[2] == 0
    assert indices[3].tolist() == [-1, -1, 0, 1] and lengths[3] == 4


# ---- short_context_indices ---------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1, 4, 128])
@pytest.mark.parametrize("k", [1, 31, 512])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_short_contexts(place, ratio, k, dtype):
    positions = np.arange(-2, 700).astype(dtype)
    indices, lengths = check("short_context_indices", [positions, k], place, compress_ratio=ratio)
    want = np.minimum((positions + 1) // ratio, k) * (positions >= 0)
    assert_same_bits(lengths, want.astype(np.int32))
    assert ((indices >= 0).sum(axis=1) == want).all()


def test_short_contexts_at_group_boundaries(place):
    positions = np.array([2, 3, 6, 7, 126, 127])
    lengths = check("short_context_indices", [positions, 64], place, compress_ratio=4)[1]
    assert lengths.tolist() == [0, 1, 1, 2, 31, 32]
    lengths = check("short_context_indices", [positions, 64], place, compress_ratio=128)[1]
    assert lengths.tolist() == [0, 0, 0, 0, 0, 1]


def test_short_contexts_of_padding(place):
    positions = np.array([9, 9, -1, 2**31, 2**31 - 1, -(2**63)])
    seqs = np.array([-1, 7, 0, 0, 0, 0])
    lengths = check("short_context_indices", [positions, 5, seqs], place, compress_ratio=2)[1]
    assert lengths.tolist() == [0, 5, 0, 0, 5, 0]


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_short_context_is_what_a_topk_gives(place, ratio):
    positions = np.arange(120)
    logits = RNG(3).standard_normal((120, 128)).astype(np.float32)
    lengths = ((positions + 1) // ratio).astype(np.int32)
    want = F.topk_indices(to_paddle(logits, place), int32(lengths, place), 128)
    got = F.short_context_indices(to_paddle(positions, place), 128, compress_ratio=ratio)
    assert_same_bits(to_numpy(got[0]), to_numpy(want))


# ---- combine_topk_window -----------------------------------------------------------------------


@pytest.mark.parametrize(("k", "window"), [(1, 1), (64, 128), (512, 128), (2048, 128), (3000, 1)])
@pytest.mark.parametrize("multiple", [1, 128])
def test_combined(place, k, window, multiple):
    rows = 6
    topk, tail = chosen(rows, k, 4000), chosen(rows, window, 200, seed=4)
    tail[3, ::3] = -1  # gaps, as of tokens before a workspace's start
    seqs = np.array([2, 0, 1, 1, -1, 7])
    options = {"seq_stride": 5000, "window_offset": 4100, "multiple": multiple}
    indices, lengths = check("combine_topk_window", [topk, tail, seqs], place, **options)
    assert indices.shape[1] % multiple == 0 and indices.shape[1] - k - window < multiple
    assert lengths[4] == 0
    for row in (0, 1, 2, 3, 5):
        base = int(seqs[row]) * 5000
        want = [base + i for i in topk[row].tolist() if i >= 0]
        want += [base + 4100 + i for i in tail[row].tolist() if i >= 0]
        assert indices[row, : len(want)].tolist() == want and lengths[row] == len(want)
        assert (indices[row, len(want) :] == -1).all()


@pytest.mark.parametrize("behind", [5, FAR, 2**31 - 1, -(2**31)])
def test_what_lies_behind_the_lengths_is_not_seen(place, behind):
    topk, tail = chosen(7, 40, 90, seed=5), chosen(7, 16, 30, seed=6)
    counts = [np.array([0, 3, 40, 41, -1, 2**31 - 1, 7], np.int32) for _ in range(2)]
    want = check("combine_topk_window", [topk, tail], place, topk_lengths=counts[0],
                 window_lengths=counts[1], multiple=8)  # fmt: skip
    for part, lengths in ((topk, counts[0]), (tail, counts[1])):
        part[np.arange(part.shape[1]) >= lengths[:, None]] = behind
    again = check("combine_topk_window", [topk, tail], place, topk_lengths=counts[0],
                  window_lengths=counts[1], multiple=8)  # fmt: skip
    for a, b in zip(want, again):
        assert_same_bits(a, b)


def test_indices_past_int32(place):
    topk = np.array([[2**31 - 1, 0], [5, 2**31 - 101]], np.int32)
    tail = np.array([[2**31 - 1], [0]], np.int32)
    seqs = np.array([0, 1], np.int64)
    indices, lengths = check("combine_topk_window", [topk, tail, seqs], place, seq_stride=100,
                             window_offset=1, multiple=1)  # fmt: skip
    assert indices.tolist() == [[2**31 - 1, 0, -1], [105, 2**31 - 1, 101]]
    assert lengths.tolist() == [2, 3]
    far = np.array([2**31 - 1, 2**62], np.int64)
    check("combine_topk_window", [topk, tail, far], place, seq_stride=2**31 - 1, multiple=1)


def test_no_topk(place):
    topk, tail = np.zeros((3, 0), np.int32), chosen(3, 8, 9)
    check("combine_topk_window", [topk, tail], place, multiple=16)


def test_a_step_of_a_workspace(place):
    """Windows and top-k of a chunk, each token found where a prefill's workspace has it."""
    prefix, new, rows, seq_stride = [0, 300, 5], [7, 40, 200], 90, 500
    seqs = np.repeat(np.arange(3), new)
    positions = np.concatenate([np.arange(p, p + n) for p, n in zip(prefix, new)])
    starts = np.array([max(p - 127, 0) for p in prefix], np.int32)
    topk, topk_lengths = F.short_context_indices(
        to_paddle(positions, place), rows, compress_ratio=4
    )
    windows, window_lengths = F.window_indices(
        to_paddle(positions, place), to_paddle(seqs, place), starts=int32(starts, place)
    )
    indices, lengths = F.combine_topk_window(
        topk, windows, to_paddle(seqs, place), topk_lengths=topk_lengths,
        window_lengths=window_lengths, seq_stride=seq_stride, window_offset=rows,
    )  # fmt: skip
    indices, lengths = to_numpy(indices), to_numpy(lengths)
    for row, (seq, position) in enumerate(zip(seqs.tolist(), positions.tolist())):
        base = seq * seq_stride
        want = [base + i for i in range(min((position + 1) // 4, rows))]
        first = max(position - 127, 0)
        want += [base + rows + t - int(starts[seq]) for t in range(first, position + 1)]
        assert indices[row, : lengths[row]].tolist() == want, row
        assert (indices[row, lengths[row] :] == -1).all()


# ---- empty, programs and errors ----------------------------------------------------------------


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="Paddle 2.6 returns no empty tensor")
def test_no_rows(place):
    none, tables = np.zeros((0, 5), np.int32), np.zeros((2, 3), np.int32)
    ids = np.zeros(0, np.int64)
    check("topk_to_slots", [none, tables, ids], place)
    check("window_indices", [ids, ids], place, block_tables=tables)
    check("short_context_indices", [ids, 4, ids], place)
    check("combine_topk_window", [none, none, ids], place,
          topk_lengths=np.zeros(0, np.int32))  # fmt: skip


def to_slots(indices, tables, seqs):
    return F.topk_to_slots(indices, tables, seqs, block_size=4, num_blocks=9)


def windows_of(positions, seqs, tables):
    return F.window_indices(positions, seqs, window=5, block_tables=tables, block_size=4)


def short_of(positions):
    return F.short_context_indices(positions, 6, compress_ratio=4)


def combined_of(topk, window, seqs):
    return F.combine_topk_window(topk, window, seqs, seq_stride=50, multiple=8)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_and_saved(place, dynamic):
    seqs, positions = np.array([1, 0, -1, 2]), np.array([3, 17, 9, 30], np.int64)
    topk, tables = chosen(4, 9, 32), tables_of(3, 8, 12)
    cases = [
        (to_slots, [topk, tables, seqs],
         reference.topk_to_slots(topk, tables, seqs, block_size=4, num_blocks=9)),
        (windows_of, [positions, seqs, tables],
         reference.window_indices(positions, seqs, window=5, block_tables=tables, block_size=4)),
        (short_of, [positions], reference.short_context_indices(positions, 6, compress_ratio=4)),
        (combined_of, [topk, chosen(4, 3, 9, 7), seqs],
         reference.combine_topk_window(topk, chosen(4, 3, 9, 7), seqs, seq_stride=50, multiple=8)),
    ]  # fmt: skip
    for function, arrays, want in cases:
        outputs, _ = run_all_modes(function, arrays, place, dynamic=dynamic)
        for a, b in zip(outputs, want):
            assert_same_bits(a, b)


def zeros(*shape, dtype="int32"):
    return paddle.zeros(shape, dtype)


GOOD = {
    "topk_to_slots": {"indices": zeros(2, 3), "block_tables": zeros(2, 4)},
    "window_indices": {"positions": zeros(2)},
    "short_context_indices": {"positions": zeros(2), "k": 3},
    "combine_topk_window": {"topk": zeros(2, 3), "window": zeros(2, 4)},
}
WRONG = [
    ("topk_to_slots", {"indices": zeros(6)}, ValueError, "indices: expected 2 dim"),
    ("topk_to_slots", {"indices": zeros(3, 2).t()}, ValueError, "indices: expected stride 1"),
    ("topk_to_slots", {"indices": zeros(2, 3, dtype="int64")}, TypeError, "indices: expected dty"),
    ("topk_to_slots", {"block_tables": zeros(8)}, ValueError, "block_tables: expected 2 dim"),
    ("topk_to_slots", {"block_tables": None}, TypeError, "block_tables: expected a tensor"),
    ("topk_to_slots", {"batch_ids": zeros(3)}, ValueError, r"batch_ids: expected shape \[2\]"),
    ("topk_to_slots", {"batch_ids": zeros(2, dtype="int16")}, TypeError, "batch_ids: expected"),
    ("topk_to_slots", {"block_size": 0}, ValueError, "block_size: expected 1 to"),
    ("topk_to_slots", {"block_size": 64.0}, TypeError, "block_size: expected int, got float"),
    ("topk_to_slots", {"block_stride": 63}, ValueError, "block_stride: expected 64 to"),
    ("topk_to_slots", {"num_blocks": -1}, ValueError, "num_blocks: expected 0 to"),
    ("topk_to_slots", {"rank": 1}, ValueError, "rank: expected less than world_size = 1, got 1"),
    ("topk_to_slots", {"world_size": 0}, ValueError, "world_size: expected 1 to"),
    ("topk_to_slots", {"interleave": 2**31}, ValueError, "interleave: expected 1 to 2147483647"),
    ("window_indices", {"positions": zeros(2, 1)}, ValueError, "positions: expected 1 dim"),
    ("window_indices", {"window": 0}, ValueError, "window: expected 1 to"),
    ("window_indices", {"window": True}, TypeError, "window: expected int, got bool"),
    ("window_indices", {"starts": zeros(2, dtype="int64")}, TypeError, "starts: expected dtype"),
    (
        "window_indices",
        {"starts": zeros(2), "block_tables": zeros(2, 2)},
        ValueError,
        "starts: expected block_tables or starts, got both",
    ),
    ("short_context_indices", {"k": 0}, ValueError, "k: expected 1 to"),
    ("short_context_indices", {"compress_ratio": 0}, ValueError, "compress_ratio: expected 1 to"),
    ("combine_topk_window", {"window": zeros(3, 4)}, ValueError, r"window: expected shape \[2"),
    ("combine_topk_window", {"topk_lengths": zeros(3)}, ValueError, "topk_lengths: expected sh"),
    ("combine_topk_window", {"seq_stride": -1}, ValueError, "seq_stride: expected 0 to"),
    ("combine_topk_window", {"multiple": 0}, ValueError, "multiple: expected 1 to"),
]


@pytest.mark.parametrize(("name", "change", "error", "text"), WRONG)
def test_wrong_arguments(name, change, error, text):
    with pytest.raises(error, match=f"{name}: {text}"):
        getattr(F, name)(**{**GOOD[name], **change})
