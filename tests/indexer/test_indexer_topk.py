"""indexer_topk and paged_indexer_topk: the indices of logits and top-k in turn, tile by tile."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _host, reference
from fastattn.functional.indexer_topk import WORKSPACE_BYTES
from tests.attention.test_gpu_graph import capture
from tests.support.mqa_logits import Codes, Pages, exponents, poison, weights_of
from tests.support.static import run_all_modes
from tests.support.strides import PeakMemory
from tests.support.tensors import E4M3, int32, to_numpy, to_paddle

RNG = np.random.default_rng
QUANTS = ("fp8", "mxfp4")
#: Workspaces: tiles of 32 rows, of 64 and of all. Rows of a test are a few hundred columns.
BYTES = (1, 64 * 4 * 620, WORKSPACE_BYTES)


def whole_numbers(rng, shape, dim: int, quant: str) -> Codes:
    """Codes and scales whose logits are whole numbers, exact in any order of the sums."""
    codes = Codes(rng, shape, dim, quant)
    if quant == "fp8":
        values = rng.integers(-2, 3, (*shape, dim))
        codes.codes = values.astype(np.float32).astype(E4M3).view(np.uint8)
        codes.scales = (2.0 ** rng.integers(0, 4, shape)).astype(np.float32)
    else:
        scales = np.full((*shape, 4), 127, np.uint8) + rng.integers(0, 3, (*shape, 1))
        codes.scales = scales.astype(np.uint8).view("<i4")[..., 0]
    return codes


def whole_weights(rng, rows: int, heads: int):
    return rng.integers(-3, 4, (rows, heads)).astype(np.float32)


class Ragged:
    """A ragged call: causal queries of some sequences, and ranges of every other kind."""

    def __init__(self, seed, quant, heads=16, dim=128, rows=117, keys=611, exact=True):
        rng = RNG(seed)
        make = whole_numbers if exact else Codes
        self.quant = quant
        self.q, self.keys = make(rng, (rows, heads), dim, quant), make(rng, (keys,), dim, quant)
        self.weights = (whole_weights if exact else weights_of)(rng, rows, heads)
        self.starts, self.ends = rng.integers(-40, keys + 40, (2, rows))
        causal = rows // 2
        self.starts[:causal], self.ends[:causal] = 70, keys - causal + np.arange(causal)
        self.starts[:5], self.ends[:5] = [0, 9, 70, -(2**31), 2**31 - 1], [0, 5, 71, 2**31 - 1, 3]

    def arguments(self, place):
        inputs = [self.q.codes, self.keys.codes, self.weights]
        ranges = [int32(self.starts, place), int32(self.ends, place)]
        return [to_paddle(x, place) for x in inputs] + ranges

    def options(self, place):
        q_scales = to_paddle(self.q.scales, place) if self.quant == "mxfp4" else None
        scales = to_paddle(self.keys.scales, place)
        return {"k_scales": scales, "q_scales": q_scales, "quant": self.quant}

    def run(self, place, k, **more):
        return to_numpy(F.indexer_topk(*self.arguments(place), k, **self.options(place), **more))

    def in_turn(self, place, k, columns=None):
        logits = F.mqa_logits(*self.arguments(place), **self.options(place), max_seqlen_k=columns)
        total = len(self.keys.codes)
        first = np.clip(self.starts, 0, total)
        lengths = np.clip(self.ends, first, total) - first
        starts = int32(first, place) if columns is None else None
        return to_numpy(F.topk_indices(logits, int32(lengths, place), k, starts=starts))

    def model(self, k, columns=None):
        return reference.indexer_topk(
            self.q.codes, self.keys.codes, self.weights, self.starts, self.ends, k,
            k_scales=self.keys.scales, quant=self.quant, max_seqlen_k=columns,
            q_scales=self.q.scales if self.quant == "mxfp4" else None,
        )  # fmt: skip


class Paged:
    """A paged call; a page that is not assigned within a length is chosen from last."""

    def __init__(self, seed, quant, next_n=2, heads=16, dim=128, lengths=None, exact=True,
                 page_size=16, per_row=False):  # fmt: skip
        rng = RNG(seed)
        self.quant = quant
        lengths = np.array([0, 1, 63, 64, 65, 130, 517, 2, 128] if lengths is None else lengths)
        self.pages = pages = Pages(rng, lengths, dim, quant, page_size=page_size)
        if exact:
            pages.keys = whole_numbers(rng, pages.keys.scales.shape, dim, quant)
            code_bytes = page_size * pages.keys.codes.shape[-1]
            total = len(pages.cache)
            pages.cache[:, :code_bytes] = pages.keys.codes.reshape(total, -1)
            scales = np.ascontiguousarray(pages.keys.scales).view(np.uint8).reshape(total, -1)
            pages.cache[:, code_bytes : code_bytes + 4 * page_size] = scales
        make = whole_numbers if exact else Codes
        self.q = make(rng, (len(lengths), next_n, heads), dim, quant)
        self.weights = (whole_weights if exact else weights_of)(rng, len(lengths) * next_n, heads)
        self.lengths, self.next_n = lengths, next_n
        if per_row:
            self.lengths = lengths[:, None] - rng.integers(0, 90, (len(lengths), next_n))
        self.columns = max(int(lengths.max()) - 2, 1)

    def arguments(self, place):
        inputs = [self.q.codes, self.pages.cache, self.weights]
        rest = [int32(self.lengths, place), int32(self.pages.tables, place), self.columns]
        return [to_paddle(x, place) for x in inputs] + rest

    def options(self, place):
        q_scales = to_paddle(self.q.scales, place) if self.quant == "mxfp4" else None
        return {"q_scales": q_scales, "quant": self.quant, "page_size": self.pages.page_size}

    def run(self, place, k, **more):
        arguments = self.arguments(place)
        return to_numpy(F.paged_indexer_topk(*arguments, k, **self.options(place), **more))

    def in_turn(self, place, k):
        logits = F.paged_mqa_logits(*self.arguments(place), **self.options(place))
        lengths = self.lengths
        if lengths.ndim == 1:
            lengths = lengths[:, None] - self.next_n + 1 + np.arange(self.next_n)
        return to_numpy(F.topk_indices(logits, int32(lengths.ravel(), place), k))

    def model(self, k):
        return reference.paged_indexer_topk(
            self.q.codes, self.pages.cache, self.weights, self.lengths, self.pages.tables,
            self.columns, k, quant=self.quant, page_size=self.pages.page_size,
            q_scales=self.q.scales if self.quant == "mxfp4" else None,
        )  # fmt: skip


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("workspace", BYTES)
@pytest.mark.parametrize("k", [1, 40, 700])
def test_ragged_against_the_model(place, quant, workspace, k):
    """Whole numbers, of which many are equal: ties as in fp64."""
    case = Ragged(0, quant)
    np.testing.assert_array_equal(case.run(place, k, workspace_bytes=workspace), case.model(k))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("columns", [1, 130, 611, 900])
def test_columns_from_the_start_of_a_range(place, quant, columns):
    case = Ragged(1, quant, heads=32, dim=64)
    got = case.run(place, 50, max_seqlen_k=columns, workspace_bytes=1)
    np.testing.assert_array_equal(got, case.model(50, columns))
    np.testing.assert_array_equal(got, case.in_turn(place, 50, columns))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("next_n", [1, 2, 5, 33])
@pytest.mark.parametrize("per_row", [False, True])
def test_paged_against_the_model(place, quant, next_n, per_row):
    """Tiles of several sequences, and of a part of one."""
    case = Paged(2, quant, next_n=next_n, heads=8, per_row=per_row)
    for workspace in (1, BYTES[-1]):
        np.testing.assert_array_equal(
            case.run(place, 60, workspace_bytes=workspace), case.model(60)
        )


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("heads", [8, 24, 64])
@pytest.mark.parametrize("workspace", BYTES)
def test_the_bits_of_the_two_in_turn(place, quant, heads, workspace):
    case = Ragged(3, quant, heads=heads, exact=False)
    np.testing.assert_array_equal(
        case.run(place, 40, workspace_bytes=workspace), case.in_turn(place, 40)
    )
    for next_n in (1, 3, 50):
        paged = Paged(4, quant, next_n=next_n, heads=heads, exact=False)
        np.testing.assert_array_equal(
            paged.run(place, 40, workspace_bytes=workspace), paged.in_turn(place, 40)
        )


@pytest.mark.parametrize("heads", [8, 64])
def test_rows_that_share_an_operand(place, heads):
    """MXFP4 blocks far apart take another path with their whole group: tiles keep the groups."""
    case = Ragged(5, "mxfp4", heads=heads, rows=101, exact=False)
    case.q.scales = exponents(RNG(5), (101, heads), 4, 20)
    case.keys.scales[::3] = exponents(RNG(6), case.keys.scales[::3].shape, 4, 20)
    for workspace in BYTES[:2]:
        np.testing.assert_array_equal(
            case.run(place, 80, workspace_bytes=workspace), case.in_turn(place, 80)
        )


@pytest.mark.parametrize("quant", QUANTS)
def test_plateaus(place, quant):
    """Weights of 0: every logit is 0, and the first keys are chosen."""
    case = Ragged(7, quant)
    case.weights[:] = 0
    got = case.run(place, 30, workspace_bytes=1)
    np.testing.assert_array_equal(got, case.model(30))
    first = np.clip(case.starts, 0, 611)
    count = np.minimum(np.clip(case.ends, first, 611) - first, 30)
    for row, n in zip(got, count):
        assert row.tolist() == [*range(n), *[-1] * (30 - n)]


@pytest.mark.parametrize("quant", QUANTS)
def test_nan_is_chosen_last(place, quant):
    case = Ragged(8, quant)
    poison(case.keys, np.r_[75:90])
    got = case.run(place, 20, workspace_bytes=1)
    np.testing.assert_array_equal(got, case.model(20))
    enough = np.clip(case.ends, 0, 611) - np.clip(case.starts, 0, 611) >= 35
    keys = got[enough] + np.clip(case.starts, 0, 611)[enough, None]
    assert enough.sum() > 50 and not ((keys >= 75) & (keys < 90)).any()


def test_what_lies_outside_a_range_is_not_seen(place):
    """NaN in every key that a query does not see."""
    case = Ragged(9, "fp8", rows=80)
    case.starts[:], case.ends[:] = 101, 300 + np.arange(80)
    want = case.model(40)
    poison(case.keys, np.r_[0:101, 379:611])
    np.testing.assert_array_equal(case.run(place, 40, workspace_bytes=1), want)


@pytest.mark.parametrize("quant", QUANTS)
def test_pages_that_are_not_assigned(place, quant):
    case = Paged(10, quant, lengths=[400, 70, 256], page_size=16)
    case.pages.tables[0, [0, 2, 3]] = [-1, len(case.pages.cache), 2**31 - 1]
    case.columns = 430
    case.lengths = np.array([400, 70, 430])  # past the table's end
    for k in (30, 429):
        got = case.run(place, k)
        np.testing.assert_array_equal(got, case.model(k))
        np.testing.assert_array_equal(got, case.in_turn(place, k))
    chosen = case.run(place, 30)[:2]
    assert not (chosen < 16).any() and not ((chosen >= 32) & (chosen < 64)).any()


def test_all_lengths_zero(place):
    case = Paged(11, "fp8", lengths=[0] * 7)
    assert (case.run(place, 9) == -1).all()


def test_out_is_written(place):
    case = Ragged(12, "fp8")
    out = int32(np.full((117, 20), 7), place)
    result = case.run(place, 20, out=out)
    np.testing.assert_array_equal(to_numpy(out), case.model(20))
    np.testing.assert_array_equal(result, case.model(20))


@pytest.mark.parametrize(("rows", "keys"), [(0, 40), (9, 0)])
def test_empty(place, rows, keys):
    case = Ragged(13, "fp8", rows=max(rows, 10), keys=max(keys, 10))
    arguments = case.arguments("cpu")
    q, k, weights, starts, ends = (x.numpy() for x in arguments)
    scales = to_paddle(case.keys.scales[:keys], place)
    got = F.indexer_topk(
        to_paddle(q[:rows], place), to_paddle(k[:keys], place), to_paddle(weights[:rows], place),
        int32(starts[:rows], place), int32(ends[:rows], place), 5, k_scales=scales,
    )  # fmt: skip
    assert got.shape == [rows, 5] and (to_numpy(got) == -1).all()
    paged = Paged(13, "fp8", lengths=[5, 6])
    paged.columns = 0
    assert (paged.run(place, 3) == -1).all()


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 4096, 70000])
@pytest.mark.parametrize("columns", [0, 1, 63, 4097, 131072, 1 << 20])
@pytest.mark.parametrize("limit", [1, 10**6, 1 << 27, 1 << 40])
def test_bound_of_the_workspace(rows, columns, limit):
    tile, total = _host.plan_indexer_topk(rows, columns, limit)
    row_bytes = 4 * ((max(columns, 1) + 3) // 4 * 4)
    assert total == tile * row_bytes + 4 * rows
    assert tile == rows or tile % 32 == 0
    assert tile * row_bytes <= limit or tile <= 32
    if tile < rows:  # as many as fit
        assert (tile + 32) * row_bytes > limit
    assert _host.plan_indexer_topk(rows, columns, limit, False) == (tile, tile * row_bytes)


def test_a_chunk_of_4096_over_128k_keys():
    tile, total = _host.plan_indexer_topk(4096, 1 << 17, WORKSPACE_BYTES)
    assert (tile, total) == (256, (1 << 27) + 4 * 4096)


@pytest.mark.gpu
def test_memory_of_a_gpu():
    """What the allocator hands out for a call is the workspace of the plan, and the result."""
    rng, rows, keys, k = RNG(14), 512, 1 << 16, 64
    q, weights = Codes(rng, (rows, 8), 128, "fp8"), weights_of(rng, rows, 8)
    codes = rng.integers(0, 127, (keys, 128)).astype(np.uint8)
    arguments = [
        to_paddle(q.codes, "gpu"), to_paddle(codes, "gpu"), to_paddle(weights, "gpu"),
        int32(np.zeros(rows), "gpu"), int32(np.full(rows, keys), "gpu"), k,
    ]  # fmt: skip
    scales = to_paddle(np.ones(keys, np.float32), "gpu")
    limit = 1 << 24
    F.indexer_topk(*arguments, k_scales=scales, workspace_bytes=limit)
    paddle.device.cuda.synchronize()
    memory = PeakMemory("gpu")
    memory.start()
    result = F.indexer_topk(*arguments, k_scales=scales, workspace_bytes=limit)
    paddle.device.cuda.synchronize()
    _, total = _host.plan_indexer_topk(rows, keys, limit)
    assert total <= memory.growth() <= total + 4 * rows * k + 4096
    assert result.shape == [rows, k]


# ---- programs, graphs, errors ------------------------------------------------------------------


def choose(q, keys, weights, starts, ends, scales):
    return F.indexer_topk(q, keys, weights, starts, ends, 20, k_scales=scales, workspace_bytes=1)


def choose_paged(q, cache, weights, lengths, tables, q_scales, out):
    return F.paged_indexer_topk(
        q, cache, weights, lengths, tables, 300, 20, q_scales=q_scales, quant="mxfp4",
        page_size=16, out=out,
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_and_saved(place, dynamic):
    case = Ragged(15, "fp8")
    arrays = [x.numpy() for x in case.arguments("cpu")] + [case.keys.scales]
    outputs, _ = run_all_modes(choose, arrays, place, dynamic=dynamic)
    np.testing.assert_array_equal(outputs[0], case.model(20))
    paged = Paged(16, "mxfp4", lengths=[300, 17, 0])
    paged.columns = 300
    inputs = [x.numpy() for x in paged.arguments("cpu")[:5]]
    given = [*inputs, paged.q.scales, np.full((6, 20), 3, np.int32)]
    outputs, after = run_all_modes(choose_paged, given, place, dynamic=dynamic)
    np.testing.assert_array_equal(outputs[0], paged.model(20))
    np.testing.assert_array_equal(after[6], paged.model(20))


@pytest.mark.gpu
def test_lengths_change_between_replays():
    ragged, paged = Ragged(17, "fp8", heads=64), Paged(17, "fp8", heads=64)
    inputs, steps = ragged.arguments("gpu"), paged.arguments("gpu")
    options, step_options = ragged.options("gpu"), paged.options("gpu")
    outs = [int32(np.zeros((n, 40)), "gpu") for n in (117, 18)]

    def both():
        F.indexer_topk(*inputs, 40, **options, workspace_bytes=1, out=outs[0])
        F.paged_indexer_topk(*steps, 40, **step_options, out=outs[1])

    both()
    with capture() as graph:
        both()
    for seed in range(3):
        rng = RNG(seed)
        ragged.ends = rng.integers(0, 700, 117)
        paged.lengths = rng.integers(0, paged.lengths + 1)
        inputs[4].copy_(int32(ragged.ends, "gpu"), True)
        steps[3].copy_(int32(paged.lengths, "gpu"), True)
        graph.replay()
        paddle.device.cuda.synchronize()
        np.testing.assert_array_equal(to_numpy(outs[0]), ragged.model(40))
        np.testing.assert_array_equal(to_numpy(outs[1]), paged.model(40))
    graph.reset()


WRONG = [
    ({"k": 0}, ValueError, "k: expected 1 to 4096, got 0"),
    ({"k": 4097}, ValueError, "k: expected 1 to 4096, got 4097"),
    ({"k": 2.0}, TypeError, "k: expected int, got float"),
    ({"workspace_bytes": 0}, ValueError, "workspace_bytes: expected at least 1, got 0"),
    ({"workspace_bytes": None}, TypeError, "workspace_bytes: expected int, got NoneType"),
    ({"quant": "fp4"}, ValueError, "quant: expected fp8 or mxfp4, got 'fp4'"),
    ({"weights": paddle.zeros([117, 8])}, ValueError, r"weights: expected shape \[117, 16\]"),
    ({"q_scales": paddle.zeros([117, 16], "int32")}, ValueError, "q_scales: expected None with"),
    ({"out": paddle.zeros([117, 4], "int32")}, ValueError, r"out: expected shape \[117, 3\]"),
    ({"out": paddle.zeros([117, 3])}, TypeError, "out: expected dtype int32"),
]  # fmt: skip
WRONG_RAGGED = [
    ({"starts": None}, TypeError, "starts: expected a tensor, got None"),
    ({"ends": paddle.zeros([116], "int32")}, ValueError, r"ends: expected shape \[117\]"),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected at least 0, got -1"),
    ({"max_seqlen_k": (1 << 30) + 1}, ValueError, "max_seqlen_k: expected at most 1073741824 col"),
]
WRONG_PAGED = [
    ({"context_lens": paddle.zeros([5], "int32")}, ValueError, r"context_lens: expected shape \[9"),
    ({"max_context_len": 1.0}, TypeError, "max_context_len: expected int, got float"),
    ({"max_context_len": 1 << 30 | 1}, ValueError, "max_context_len: expected at most 1073741824"),
    ({"page_size": 0}, ValueError, "page_size: expected a positive number of tokens, got 0"),
    ({"page_size": None}, ValueError, "page_size: a cache of shape .* does not tell it, got None"),
    ({"q": paddle.zeros([117, 16, 128], "uint8")}, ValueError, "q: expected 4 dimensions"),
]


@pytest.mark.parametrize(("change", "error", "text"), [*WRONG, *WRONG_RAGGED])
def test_wrong_arguments(change, error, text):
    case = Ragged(18, "fp8")
    names = ("q", "keys", "weights", "starts", "ends")
    good = dict(zip(names, case.arguments("cpu")), k=3, **case.options("cpu"))
    with pytest.raises(error, match=f"^indexer_topk: {text}"):
        F.indexer_topk(**{**good, **change})


@pytest.mark.parametrize(("change", "error", "text"), [*WRONG, *WRONG_PAGED])
def test_wrong_arguments_of_pages(change, error, text):
    case = Paged(19, "fp8", next_n=13)  # 117 rows
    names = ("q", "cache", "weights", "context_lens", "block_tables", "max_context_len")
    good = dict(zip(names, case.arguments("cpu")), k=3, **case.options("cpu"))
    if "q_scales" in change:
        change = {"q_scales": paddle.zeros([9, 13, 16], "int32")}
    with pytest.raises(error, match=f"^paged_indexer_topk: {text}"):
        F.paged_indexer_topk(**{**good, **change})
