"""token_maps, query_rows, indexer_q_quant: what a step of latent attention needs of its tokens."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, E4M3, EMPTY_OUTPUTS, int32, to_numpy, to_paddle

FAR = 2147480000  # what a server leaves in entries that it does not use


def check(name, arrays, place, **options):
    """Run an operator and its model, and compare every result."""
    given = {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
    plain = {k: v for k, v in options.items() if not isinstance(v, np.ndarray)}
    tensors = [to_paddle(array, place) for array in arrays]
    got = getattr(F, name)(*tensors, **{k: to_paddle(v, place) for k, v in given.items()}, **plain)
    want = getattr(reference, name)(*arrays, **options)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert_same_bits(to_numpy(a), b)
    return want


def step(new, cached, padding=0, width=4, dtype=np.int32):
    """Sequences of tokens, tables, starts and cached lengths of a step."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.repeat(np.arange(len(new)), new), np.full(padding, -1)]).astype(dtype)
    tables = rng.permutation(len(new) * width + 5)[: len(new) * width].reshape(len(new), width)
    starts = np.concatenate([[0], np.cumsum(new)])
    return ids, tables.astype(np.int32), starts.astype(np.int32), np.array(cached, np.int32)


# ---- token_maps --------------------------------------------------------------------------------

STEPS = [
    ([1, 1, 1], [63, 64, 200], 0),
    ([5, 0, 1, 70], [0, 9, 127, 60], 3),
    ([0, 0], [4, 4], 2),
    ([130], [0], 0),
]


@pytest.mark.parametrize(("new", "cached", "padding"), STEPS)
@pytest.mark.parametrize("block_size", [64, 16, 61])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_tokens(place, new, cached, padding, block_size, dtype):
    ids, tables, starts, lengths = step(new, cached, padding, width=20, dtype=dtype)
    tokens = len(ids)
    seqs, positions, slots = check(
        "token_maps", [ids, tables, starts, lengths], place, num_tokens=tokens,
        block_size=block_size,
    )  # fmt: skip
    token = 0
    for seq, (n, done) in enumerate(zip(new, cached)):
        for i in range(n):
            at = done + i
            slot = tables[seq, at // block_size] * block_size + at % block_size
            assert (seqs[token], positions[token], slots[token]) == (seq, at, slot)
            token += 1
    assert (np.stack([seqs, positions, slots])[:, token:] == -1).all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_positions_of_a_server(place, dtype):
    ids, tables, starts, cached = step([3, 1, 4], [0, 0, 0], 2)
    given = np.array([7, 255, 256, 0, -1, -(2**31), 2**31 - 1, 63, 5, 5], dtype)
    if dtype == np.int64:
        given[:2] = 2**31, -(2**40)
    _, positions, slots = check(
        "token_maps", [ids, tables, starts, cached, given], place, num_tokens=10
    )
    assert slots[2] == -1 and positions[2] == 256  # past the table
    assert positions[4] == -1 and positions[5] == -1
    assert positions[8:].tolist() == [-1, -1]  # padding


def test_buffers_of_a_server(place):
    """Any shape, more elements than the step has; tables of sequences that do not run."""
    ids, tables, starts, cached = step([2, 1], [9, 70], 1)
    ids = np.concatenate([ids, np.full(6, FAR)]).astype(np.int32).reshape(5, 2)
    tables = np.concatenate([tables, np.full((3, 4), FAR)]).astype(np.int32)
    cached = np.concatenate([cached, np.full(3, FAR)]).astype(np.int32).reshape(-1, 1)
    given = np.arange(12).reshape(3, 4)
    for positions in ([], [given]):
        seqs, _, slots = check(
            "token_maps", [ids, tables, starts, cached, *positions], place, num_tokens=4
        )
        assert seqs.tolist() == [0, 0, 1, -1] and (slots[:3] >= 0).all()


@pytest.mark.parametrize("bad", [-1, -(2**31), 17, FAR, 2**31 - 1])
def test_table_entries_out_of_range(place, bad):
    ids, tables, starts, cached = step([4, 4], [62, 126])
    tables[:, 1] = bad
    _, positions, slots = check(
        "token_maps", [ids, tables, starts, cached], place, num_tokens=8, num_blocks=13
    )
    assert (positions >= 0).all() and (slots[2:6] == -1).all()


def test_slots_and_positions_past_int32(place):
    ids, _, starts, cached = step([2, 2], [2**31 - 1, 63])
    tables = np.array([[0, 1], [2**25 - 1, 2**25]], np.int32)
    _, positions, slots = check("token_maps", [ids, tables, starts, cached], place, num_tokens=4)
    assert positions.tolist() == [2**31 - 1, -1, 63, 64]
    assert slots.tolist() == [-1, -1, 2**31 - 1, -1]


def test_sequences_out_of_range_and_none(place):
    _, tables, starts, cached = step([2, 1], [9, 70])
    ids = np.array([1, 2, -5, FAR, -(2**31)])
    _, _, slots = check("token_maps", [ids, tables, starts, cached], place, num_tokens=5)
    assert (slots[1:] == -1).all()
    none = [ids, np.zeros((0, 4), np.int32), np.zeros(1, np.int32), np.zeros(0, np.int32)]
    seqs, _, _ = check("token_maps", none, place, num_tokens=5)
    assert (seqs == -1).all()


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="Paddle 2.6 has no empty outputs")
def test_no_tokens(place):
    ids, tables, starts, cached = step([0, 0], [9, 70])
    for result in check("token_maps", [ids, tables, starts, cached], place, num_tokens=0):
        assert result.shape == (0,)


@pytest.mark.parametrize(
    ("index", "array", "options", "message"),
    [
        (0, np.zeros(3, np.int32), {}, r"batch_ids: expected values of 4 tokens, got shape \[3\]"),
        (0, np.zeros(4, np.float32), {}, "batch_ids: expected dtype int32 or int64"),
        (1, np.zeros(4, np.int32), {}, "block_tables: expected 2 dimensions"),
        (1, np.zeros((2, 4), np.int64), {}, "block_tables: expected dtype int32"),
        (2, np.zeros(0, np.int32), {}, r"cu_seqlens_q: expected shape \[B \+ 1\], got \[0\]"),
        (2, np.zeros((1, 3), np.int32), {}, "cu_seqlens_q: expected 1 dimensions"),
        (3, np.zeros(1, np.int32), {}, r"seq_lens_decoder: expected values of 2 sequences, got"),
        (4, np.zeros(3, np.int32), {}, r"position_ids: expected values of 4 tokens"),
        (0, None, {}, "batch_ids: expected a tensor, got None"),
        (None, None, {"num_tokens": -1}, "num_tokens: expected 0 to 2147483647, got -1"),
        (None, None, {"num_tokens": 4.0}, "num_tokens: expected int, got float"),
        (None, None, {"block_size": 0}, "block_size: expected 1 to"),
        (None, None, {"num_blocks": -2}, "num_blocks: expected 0 to"),
    ],
)
def test_wrong_arguments(index, array, options, message):
    arrays = [*step([2, 2], [1, 2]), np.zeros(4, np.int32)]
    if index is not None:
        arrays[index] = array
    tensors = [None if a is None else to_paddle(a, "cpu") for a in arrays]
    with pytest.raises((ValueError, TypeError), match=f"token_maps: {message}"):
        F.token_maps(*tensors, **{"num_tokens": 4, **options})


# ---- query_rows --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "cached", "padding"), [*STEPS, ([7, 8, 9, 0, 1], [3] * 5, 9), ([1] * 33, [5] * 33, 0)]
)
@pytest.mark.parametrize("tile", [1, 2, 8, 64])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_rows(place, new, cached, padding, tile, dtype):
    ids, tables, starts, _ = step(new, cached, padding, dtype=dtype)
    positions = np.concatenate([done + np.arange(n) for n, done in zip(new, cached)])
    positions = np.concatenate([positions, np.full(padding, -1)]).astype(np.int32)
    lengths, rows, tokens, queries = check(
        "query_rows", [ids, positions, tables, starts], place, tile=tile
    )
    # Each token has a query of its own, in a row of its sequence, and sees its keys; in order.
    owned = ids >= 0
    assert (queries[~owned] == -1).all() and (np.diff(queries[owned]) > 0).all()
    assert (tokens[queries[owned]] == np.flatnonzero(owned)).all()
    assert (lengths.ravel()[queries[owned]] == positions[owned] + 1).all()
    assert (rows[queries[owned] // tile] == tables[ids[owned]]).all()
    # Nothing else is a query.
    assert (tokens >= 0).sum() == owned.sum() and (lengths.ravel()[tokens < 0] == 0).all()
    assert len(rows) == (len(ids) if tile == 1 else len(ids) // tile + len(new))


@pytest.mark.parametrize("tile", [1, 8])
def test_starts_of_sequences_that_do_not_run(place, tile):
    """Behind those that do, out of the way, as StaleStarts leaves them."""
    ids, tables, starts, _ = step([3, 9, 0, 0], [0, 0, 0, 0], 2)
    starts[3:] = 2**30
    positions = np.arange(14, dtype=np.int32)
    ids[-2:] = -1
    _, _, tokens, _ = check("query_rows", [ids, positions, tables, starts], place, tile=tile)
    assert (tokens >= 0).sum() == 12


@pytest.mark.parametrize("tile", [1, 8])
def test_tokens_of_no_sequence_and_positions_without_keys(place, tile):
    ids, tables, starts, _ = step([5, 6], [0, 0])
    ids[[1, 7, 8]] = [2, -3, FAR]
    positions = np.array([0, 1, -1, -(2**31), 2**31 - 1, 2**31 - 2, 6, 7, 8, 9, 3], np.int32)
    lengths, *_, queries = check("query_rows", [ids, positions, tables, starts], place, tile=tile)
    assert (queries[[1, 7, 8]] == -1).all()
    assert lengths.ravel()[queries[[2, 3, 4]]].tolist() == [0, 0, 0]
    assert lengths.ravel()[queries[5]] == 2**31 - 1


@pytest.mark.parametrize("tile", [1, 8])
def test_garbage_stays_inside_the_results(place, tile):
    """Starts, sequences and positions of any value: every result is an index or none."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        tokens, count = int(rng.integers(1, 40)), int(rng.integers(1, 9))
        values = np.concatenate([rng.integers(-(2**31), 2**31, 60), rng.integers(-3, 45, 200)])
        arrays = [rng.choice(values, n).astype(np.int32) for n in (tokens, tokens, count + 1)]
        tables = rng.integers(0, 9, (count, 3)).astype(np.int32)
        ids, positions, starts = (to_paddle(a, place) for a in arrays)
        results = F.query_rows(ids, positions, to_paddle(tables, place), starts, tile=tile)
        lengths, _, found, queries = (to_numpy(x) for x in results)
        assert (lengths >= 0).all()
        assert ((found >= -1) & (found < tokens)).all()
        assert ((queries >= -1) & (queries < len(found))).all()
        cached = to_paddle(rng.choice(values, count).astype(np.int32), place)
        maps = F.token_maps(
            ids, to_paddle(tables, place), starts, cached, num_tokens=tokens, num_blocks=9
        )
        assert all((to_numpy(x) >= -1).all() for x in maps)
        assert (to_numpy(maps[2]) < 9 * 64).all()


def test_no_sequences(place):
    ids, positions = np.full(5, -1, np.int32), np.full(5, -1, np.int32)
    none = [ids, positions, np.zeros((0, 3), np.int32), np.zeros(1, np.int32)]
    lengths, rows, _, queries = check("query_rows", none, place, tile=8)
    assert lengths.shape == (1, 8) and not lengths.any()
    assert (rows == -1).all() and (queries == -1).all()
    lengths, rows, tokens, _ = check("query_rows", none, place, tile=1)
    assert not lengths.any() and (rows == -1).all() and (tokens == -1).all()


@pytest.mark.parametrize(
    ("index", "array", "tile", "message"),
    [
        (0, np.zeros(3, np.int32), 8, "batch_ids: expected values of 4 tokens"),
        (1, np.zeros(4, np.int64), 8, "positions: expected dtype int32"),
        (1, np.zeros((4, 1), np.int32), 8, "positions: expected 1 dimensions"),
        (2, np.zeros((2, 3), np.int64), 8, "block_tables: expected dtype int32"),
        (3, np.zeros(0, np.int32), 8, r"cu_seqlens_q: expected shape \[B \+ 1\]"),
        (None, None, 0, "tile: expected 1 to 64, got 0"),
        (None, None, 65, "tile: expected 1 to 64, got 65"),
        (None, None, True, "tile: expected int, got bool"),
    ],
)
def test_wrong_arguments_of_rows(index, array, tile, message):
    ids, tables, starts, _ = step([2, 2], [1, 2])
    arrays = [ids, np.arange(4, dtype=np.int32), tables, starts]
    if index is not None:
        arrays[index] = array
    with pytest.raises((ValueError, TypeError), match=f"query_rows: {message}"):
        F.query_rows(*(to_paddle(a, "cpu") for a in arrays), tile=tile)


# ---- topk_to_slots with row_ids ----------------------------------------------------------------


@pytest.mark.parametrize("compact", [True, False])
def test_slots_of_rows_that_a_map_names(place, compact):
    rng = np.random.default_rng(5)
    indices = rng.integers(-1, 256, (9, 70)).astype(np.int32)
    tables = rng.permutation(16).reshape(4, 4).astype(np.int32)
    ids = np.array([3, 8, 0, -1, 9, FAR, 3])
    seqs = np.array([0, 1, 3, 2, 1, 0, 2], np.int32)
    slots, lengths = check(
        "topk_to_slots", [indices, tables, seqs], place, row_ids=ids, compact=compact
    )
    known = [0, 1, 2, 6]
    plain = reference.topk_to_slots(indices[ids[known]], tables, seqs[known], compact=compact)
    assert_same_bits(slots[known], plain[0])
    assert_same_bits(lengths[known], plain[1])
    assert (slots[3:6] == -1).all() and (lengths[3:6] == 0).all()


def test_wrong_row_ids():
    indices, tables = int32([[0, 1]], "cpu"), int32([[0]], "cpu")
    for ids, message in (
        (paddle.zeros([1]), "row_ids: expected dtype int32 or int64"),
        (paddle.zeros([1, 1], "int32"), "row_ids: expected 1 dimensions"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            F.topk_to_slots(indices, tables, row_ids=ids)
    with pytest.raises(ValueError, match=r"batch_ids: expected shape \[2\], got \[1\]"):
        F.topk_to_slots(indices, tables, int32([0], "cpu"), row_ids=int32([0, 0], "cpu"))


# ---- indexer_q_quant ---------------------------------------------------------------------------


def index_queries(tokens, heads):
    """Queries of very different sizes, with zeros, infinities and NaN; weights of both signs."""
    rng = np.random.default_rng(6)
    sizes = np.exp2(rng.integers(-60, 60, (tokens, heads, 1)))
    q = (rng.normal(size=(tokens, heads, 128)) * sizes).astype(BF16)
    q[0, 0] = 0
    q[-1, -1, 3] = np.inf
    q[tokens // 2, 0, 7] = -np.inf
    return q, rng.normal(size=(tokens, heads)).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 3, 67])
@pytest.mark.parametrize("heads", [1, 5, 8, 64])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("mapped", [False, True])
def test_queries(place, tokens, heads, dtype, mapped):
    q, weights = index_queries(tokens, heads)
    weights = weights.astype(dtype)
    options = {}
    if mapped:
        order = np.random.default_rng(7).permutation(tokens)
        options["token_of_query"] = np.concatenate([[-1, tokens], order, [FAR]]).astype(np.int32)
    codes, folded = check("indexer_q_quant", [q, weights], place, factor=0.37, **options)
    if mapped:
        assert not codes[[0, 1, -1]].any() and not folded[[0, 1, -1]].any()
        codes, folded = codes[2:-1], folded[2:-1]
        q, weights = q[order], weights[order]
    finite = np.isfinite(q.astype(np.float64)).all(-1)
    # A code times what the weights have besides theirs and the factor is the query's channel.
    scale = folded / (weights.astype(np.float64) * 0.37)
    values = codes.view(E4M3).astype(np.float64) * scale[..., None]
    amax = np.abs(q.astype(np.float64)).max(-1, keepdims=True)
    error = np.abs(values - q.astype(np.float64))
    assert (error[finite] <= np.maximum(amax / 27.9, 1e-11)[finite]).all()


def test_a_nan_is_of_its_head_alone(place):
    q, weights = index_queries(4, 3)
    q[~np.isfinite(q.astype(np.float32))] = 1
    q[2, 1, 100] = np.nan
    codes, folded = (to_numpy(x) for x in F.indexer_q_quant(
        to_paddle(q, place), to_paddle(weights, place), 0.5
    ))  # fmt: skip
    bad = np.zeros((4, 3), bool)
    bad[2, 1] = True
    assert (np.isnan(folded) == bad).all() and (codes[2, 1] == 0x7F).all()
    want = reference.indexer_q_quant(q, weights, 0.5)
    assert_same_bits(codes[~bad], want[0][~bad])
    assert_same_bits(folded[~bad], want[1][~bad])


def test_queries_that_lie_apart():
    """A slice of heads, and channels behind others."""
    q, weights = index_queries(5, 8)
    wide = to_paddle(np.concatenate([q, q], -1), "cpu")
    for view, part in ((wide[:, ::2, 128:], slice(None, None, 2)), (wide[:, 3:5, :128], [3, 4])):
        want = reference.indexer_q_quant(q[:, part], weights[:, part], 2.0)
        got = F.indexer_q_quant(view, to_paddle(weights[:, part].copy(), "cpu"), 2.0)
        for a, b in zip(got, want):
            assert_same_bits(to_numpy(a), b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": np.zeros((2, 3, 64), BF16)}, r"q: expected shape \[\?, \?, 128\]"),
        ({"q": np.zeros((2, 3, 128), np.float32)}, "q: expected dtype bfloat16"),
        ({"weights": np.zeros((2, 2), np.float32)}, r"weights: expected shape \[2, 3\]"),
        ({"weights": np.zeros((2, 3), np.float16)}, "weights: expected dtype float32 or bfloat16"),
        ({"tokens": np.zeros(2)}, "token_of_query: expected dtype int32"),
        ({"tokens": np.zeros((2, 1), np.int32)}, "token_of_query: expected 1 dimensions"),
        ({"factor": "x"}, "factor: expected"),
    ],
)
def test_wrong_queries(changes, message):
    given = {
        "q": np.zeros((2, 3, 128), BF16),
        "weights": np.zeros((2, 3), np.float32),
        "tokens": np.zeros(2, np.int32),
        "factor": 1.0,
        **changes,
    }
    q, weights, tokens = (to_paddle(given[x], "cpu") for x in ("q", "weights", "tokens"))
    with pytest.raises((ValueError, TypeError), match=f"indexer_q_quant: {message}"):
        F.indexer_q_quant(q, weights, given["factor"], token_of_query=tokens)
