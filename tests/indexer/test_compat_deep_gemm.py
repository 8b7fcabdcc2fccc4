"""fastattn.compat.deep_gemm: DeepGEMM's calls, by position, and none of its faults."""

from __future__ import annotations

import inspect

import numpy as np
import paddle
import pytest

from fastattn import reference
from fastattn.compat import deep_gemm
from tests.attention.test_gpu_graph import capture
from tests.support.mqa_logits import Codes, Pages, check_logits, paged_reference, poison, weights_of
from tests.support.static import run_all_modes
from tests.support.tensors import int32, skip_slices_on, to_numpy, to_paddle

RNG = np.random.default_rng
LENGTHS = np.array([0, 1, 63, 64, 65, 130, 517, 2, 128])


class Prefill:
    """Causal queries of two sequences over keys that lie one after the other."""

    def __init__(self, seed=0, heads=32):
        rng = RNG(seed)
        self.starts = np.array([0] * 40 + [73] * 30)
        self.ends = np.r_[34 + np.arange(40), 150 + np.arange(30)]
        self.q, self.keys = Codes(rng, (70, heads), 128, "fp8"), Codes(rng, (179,), 128, "fp8")
        self.weights = weights_of(rng, 70, heads)

    def arguments(self, place):
        kv = to_paddle(self.keys.codes, place), to_paddle(self.keys.scales, place)
        ranges = int32(self.starts, place), int32(self.ends, place)
        return to_paddle(self.q.codes, place), kv, to_paddle(self.weights, place), *ranges

    def model(self, columns=None):
        return reference.mqa_logits(
            self.q.codes, self.keys.codes, self.weights, self.starts, self.ends,
            k_scales=self.keys.scales, max_seqlen_k=columns,
        )  # fmt: skip


class Decode:
    """A step over pages; the first sequences have no or few keys."""

    def __init__(self, seed=1, next_n=1, heads=64, page_size=64, lengths=LENGTHS):
        rng, self.lengths = RNG(seed), np.array(lengths)
        self.pages = Pages(rng, self.lengths, 128, "fp8", page_size=page_size, padding=0)
        self.q = Codes(rng, (len(lengths), next_n, heads), 128, "fp8")
        self.weights = weights_of(rng, len(lengths) * next_n, heads)
        self.columns = max(600, int(self.lengths.max()))

    def run(self, place, *more, lengths=None, meta=None):
        shape = (len(self.pages.cache), self.pages.page_size, 1, 132)
        return deep_gemm.fp8_paged_mqa_logits(
            to_paddle(self.q.codes, place),
            to_paddle(self.pages.cache.reshape(shape), place),
            to_paddle(self.weights, place),
            int32(self.lengths, place) if lengths is None else lengths,
            int32(self.pages.tables, place),
            meta,
            self.columns,
            *more,
        )

    def model(self, lengths=None):
        lengths = self.lengths if lengths is None else lengths
        return paged_reference(self.q, self.pages, self.weights, lengths, self.columns, "fp8")


# ---- calls -------------------------------------------------------------------------------------


def test_positions_of_arguments_are_deepgemms():
    orders = {
        deep_gemm.fp8_mqa_logits: (
            "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits max_seqlen_k "
            "logits_dtype"
        ),
        deep_gemm.fp8_paged_mqa_logits: (
            "q kv_cache weights context_lens block_table schedule_meta max_context_len "
            "clean_logits indices logits_dtype"
        ),
        deep_gemm.fp8_fp4_mqa_logits: (
            "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits max_seqlen_k "
            "logits_dtype"
        ),
        deep_gemm.fp8_fp4_paged_mqa_logits: (
            "q kv_cache weights context_lens block_table schedule_meta max_context_len "
            "clean_logits logits_dtype indices"
        ),
        deep_gemm.get_paged_mqa_logits_metadata: "context_lens block_kv num_sms indices",
        deep_gemm.get_num_sms: "",
    }
    for function, order in orders.items():
        assert list(inspect.signature(function).parameters) == order.split(), function
    for function in (deep_gemm.fp8_mqa_logits, deep_gemm.fp8_fp4_mqa_logits):
        defaults = inspect.signature(function).parameters
        assert defaults["clean_logits"].default is True and defaults["max_seqlen_k"].default == 0
    for function in (deep_gemm.fp8_paged_mqa_logits, deep_gemm.fp8_fp4_paged_mqa_logits):
        assert inspect.signature(function).parameters["clean_logits"].default is False
    assert sorted(f.__name__ for f in orders) == sorted(deep_gemm.__all__)


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("heads", [8, 32, 64])
def test_prefill(place, heads, clean):
    case = Prefill(heads=heads)
    logits = deep_gemm.fp8_mqa_logits(*case.arguments(place), clean)
    assert logits.shape == [70, 179]
    check_logits(to_numpy(logits), case.model())


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("columns", [106, 180])
def test_compressed_prefill(place, columns, clean):
    """Column j is key start + j, as FastDeploy calls it."""
    case = Prefill(2)
    logits = deep_gemm.fp8_mqa_logits(
        *case.arguments(place), max_seqlen_k=columns, clean_logits=clean
    )
    assert logits.shape == [70, columns]
    check_logits(to_numpy(logits), case.model(columns))


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("next_n", [1, 2, 3])
def test_decode(place, next_n, clean):
    case = Decode(next_n=next_n)
    sms = deep_gemm.get_num_sms()
    meta = deep_gemm.get_paged_mqa_logits_metadata(int32(case.lengths, place), 64, sms)
    assert meta.shape == [sms + 1, 2] and "int32" in str(meta.dtype)
    logits = case.run(place, clean, meta=meta)
    assert logits.shape == [len(LENGTHS) * next_n, case.columns]
    check_logits(to_numpy(logits), case.model())


def test_codes_of_float8_tensors():
    if not hasattr(paddle, "float8_e4m3fn"):
        pytest.skip("this Paddle has no FP8 tensors")
    case = Prefill(3)
    q, (codes, scales), *rest = case.arguments("cpu")
    fp8 = q.view(paddle.float8_e4m3fn), (codes.view(paddle.float8_e4m3fn), scales)
    logits = deep_gemm.fp8_mqa_logits(*fp8, *rest)
    check_logits(to_numpy(logits), case.model())


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("dim", "columns"), [(128, 0), (64, 180)])
def test_prefill_of_fp4(place, dim, columns, dtype):
    case, rng = Prefill(), RNG(12)
    q, keys = Codes(rng, (70, 16), dim, "mxfp4"), Codes(rng, (179,), dim, "mxfp4")
    weights = weights_of(rng, 70, 16)
    queries, kv = (
        (to_paddle(x.codes.view(dtype), place), to_paddle(x.scales, place)) for x in (q, keys)
    )
    ranges = int32(case.starts, place), int32(case.ends, place)
    logits = deep_gemm.fp8_fp4_mqa_logits(
        queries, kv, to_paddle(weights, place), *ranges, False, columns
    )
    model = reference.mqa_logits(
        q.codes, keys.codes, weights, case.starts, case.ends, k_scales=keys.scales,
        q_scales=q.scales, quant="mxfp4", max_seqlen_k=columns or None,
    )  # fmt: skip
    assert logits.shape == [70, columns or 179]
    check_logits(to_numpy(logits), model)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("dim", "next_n"), [(128, 1), (64, 2)])
def test_decode_of_fp4(place, dim, next_n, dtype):
    rng = RNG(13)
    pages = Pages(rng, LENGTHS, dim, "mxfp4", padding=0)
    q = Codes(rng, (len(LENGTHS), next_n, 32), dim, "mxfp4")
    weights = weights_of(rng, len(LENGTHS) * next_n, 32)
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(
        (to_paddle(q.codes.view(dtype), place), to_paddle(q.scales, place)),
        to_paddle(pages.cache.reshape(-1, 64, 1, dim // 2 + 4), place),
        to_paddle(weights, place),
        int32(LENGTHS, place),
        int32(pages.tables, place),
        None,
        600,
    )
    check_logits(to_numpy(logits), paged_reference(q, pages, weights, LENGTHS, 600, "mxfp4"))


def test_newer_names_take_fp8(place):
    """Without scales of its own a query is FP8, and the results are those of the older names."""
    prefill, decode = Prefill(), Decode(next_n=2)
    q, *rest = prefill.arguments(place)
    logits = deep_gemm.fp8_fp4_mqa_logits((q, None), *rest)
    check_logits(to_numpy(logits), prefill.model())
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(
        (to_paddle(decode.q.codes, place), None),
        to_paddle(decode.pages.cache.reshape(-1, 64, 1, 132), place),
        to_paddle(decode.weights, place),
        int32(decode.lengths, place),
        int32(decode.pages.tables, place),
        None,
        decode.columns,
    )
    check_logits(to_numpy(logits), decode.model())


@pytest.mark.parametrize("newer", [True, False])
def test_sequences_of_different_numbers_of_queries(place, newer):
    """Each query is a row with its length and its sequence's pages, which `indices` tell."""
    counts = np.array([2, 1, 3])
    indices = np.repeat(np.arange(3), counts)
    rng, whole = RNG(14), np.array([131, 64, 400])
    pages = Pages(rng, whole, 128, "fp8", padding=0)
    lengths = np.concatenate([n - c + 1 + np.arange(c) for n, c in zip(whole, counts)])
    pages.tables = pages.tables[indices]
    q, weights = Codes(rng, (6, 1, 64), 128, "fp8"), weights_of(rng, 6, 64)
    tensors = [to_paddle(x, place) for x in (pages.cache.reshape(-1, 64, 1, 132), weights)]
    rows = (int32(lengths[:, None], place), int32(pages.tables, place), None, 450, False)
    codes = to_paddle(q.codes, place)
    if newer:
        function, head, tail = deep_gemm.fp8_fp4_paged_mqa_logits, (codes, None), (None,)
    else:
        function, head, tail = deep_gemm.fp8_paged_mqa_logits, codes, ()
    logits = function(head, *tensors, *rows, *tail, int32(indices, place))
    want = reference.paged_mqa_logits(
        q.codes, pages.cache, weights, lengths[:, None], pages.tables, 450, page_size=64
    )
    check_logits(to_numpy(logits), want)


# ---- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 31, 32, 64])
def test_bug35_all_lengths_zero(place, batch):
    """As at the capture of a graph: no row of a schedule names a sequence that is not there."""
    case = Decode(4, lengths=[0] * batch)
    lengths = int32(case.lengths, place)
    meta = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, 132)
    rows = to_numpy(meta)
    assert rows.shape == (133, 2) and (rows[:, 0] >= 0).all() and (rows[:, 0] < batch).all()
    assert np.isneginf(to_numpy(case.run(place, meta=meta))).all()


@pytest.mark.parametrize("columns", [0, 106, 300])
def test_bug36_cells_that_nobody_sees_are_clean(place, columns):
    """Starts and ends at no multiple of anything, keys outside the ranges of NaN."""
    case = Prefill(5)
    case.starts[:], case.ends[:] = 73 + np.arange(70) % 5, 101 + np.arange(70)
    poison(case.keys, np.r_[0:73, 170:179])
    logits = to_numpy(deep_gemm.fp8_mqa_logits(*case.arguments(place), False, columns))
    for row, (start, end) in enumerate(zip(case.starts, case.ends)):
        first = start if columns else 0
        seen = slice(start - first, end - first)
        assert np.isfinite(logits[row, seen]).all()
        assert np.isneginf(np.delete(logits[row], np.r_[seen])).all()
    check_logits(logits, case.model(columns or None))


@pytest.mark.parametrize("page_size", [64, 16])
def test_bug37_blocks_that_are_not_assigned_are_not_followed(place, page_size):
    case = Decode(6, next_n=2, lengths=[400, 70, 256], page_size=page_size)
    case.pages.tables[0, [0, 2]] = [-1, len(case.pages.cache)]
    case.pages.tables[2, 1] = -(2**31)
    logits = to_numpy(case.run(place))
    assert np.isneginf(logits[:2, :page_size]).all() and np.isfinite(logits[0, page_size])
    check_logits(logits, case.model())


def test_bug38_each_row_has_its_own_length(place):
    """The first query of a sequence sees more keys than the last, or none."""
    case = Decode(7, next_n=3)
    lengths = np.stack([LENGTHS, LENGTHS // 2, LENGTHS * 0], axis=1)
    logits = to_numpy(case.run(place, lengths=int32(lengths, place)))
    assert (np.isfinite(logits).sum(axis=1) == lengths.ravel()).all()
    check_logits(logits, case.model(lengths))


@pytest.mark.parametrize("next_n", [1, 2, 4])
def test_bug39_lengths_of_both_forms(place, next_n):
    """[B]: query j sees B - next_n + 1 + j keys. [B, next_n]: the same, spelt out."""
    case = Decode(8, next_n=next_n)
    spelt = np.maximum(LENGTHS[:, None] - next_n + 1 + np.arange(next_n), 0)
    runs = [case.run(place), case.run(place, lengths=int32(spelt, place))]
    first, second = (to_numpy(run) for run in runs)
    np.testing.assert_array_equal(first.view(np.uint32), second.view(np.uint32))
    check_logits(first, case.model())


def test_bug39_lengths_of_any_strides(place):
    skip_slices_on(place)
    case = Decode(9, next_n=2)
    lengths = np.stack([LENGTHS // 2, LENGTHS], axis=1)
    wide = np.repeat(lengths, 2, axis=1)
    wide[:, 1::2] = 77
    strided = int32(wide, place)[:, ::2]
    check_logits(to_numpy(case.run(place, lengths=strided)), case.model(lengths))


# ---- graphs, programs, errors ------------------------------------------------------------------


@pytest.mark.gpu
def test_lengths_change_between_replays():
    case = Decode(10, next_n=2)
    lengths = int32(case.lengths * 0, "gpu")
    sms = deep_gemm.get_num_sms()
    inputs = [to_paddle(x, "gpu") for x in (case.q.codes, case.pages.cache, case.weights)]
    inputs[1] = to_paddle(case.pages.cache.reshape(-1, 64, 1, 132), "gpu")
    tables = int32(case.pages.tables, "gpu")

    def step():
        meta = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, sms)
        return deep_gemm.fp8_paged_mqa_logits(*inputs, lengths, tables, meta, case.columns)

    step()
    with capture() as graph:
        logits = step()
    for now in (LENGTHS, LENGTHS // 3):
        lengths.copy_(int32(now, "gpu"), True)
        graph.replay()
        paddle.device.cuda.synchronize()
        check_logits(to_numpy(logits), case.model(now))
    graph.reset()


def traced(q, cache, weights, lengths, tables):
    meta = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, 4)
    return deep_gemm.fp8_paged_mqa_logits(q, cache, weights, lengths, tables, meta, 600), meta


def test_traced_and_saved():
    """On the CPU: a program makes the schedule with one of Paddle's own operators."""
    case = Decode(11)
    cache = case.pages.cache.reshape(-1, 64, 1, 132)
    arrays = [case.q.codes, cache, case.weights, case.lengths.astype(np.int32), case.pages.tables]
    outputs, _ = run_all_modes(traced, arrays, "cpu")
    check_logits(outputs[0], case.model())
    assert outputs[1].shape == (5, 2)


WRONG = [
    ({"kv": paddle.zeros([5, 128], "uint8")}, TypeError, "kv: expected keys and their scales, got"),
    ({"kv": (paddle.zeros([5, 128], "uint8"),) * 3}, TypeError, "kv: expected keys and their sca"),
    ({"clean_logits": 1}, TypeError, "clean_logits: expected bool, got int"),
    ({"max_seqlen_k": 2.0}, TypeError, "max_seqlen_k: expected int, got float"),
    ({"logits_dtype": paddle.bfloat16}, NotImplementedError, "logits_dtype: expected float32"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG)
def test_wrong_arguments(change, error, text):
    names = ("q", "kv", "weights", "cu_seq_len_k_start", "cu_seq_len_k_end")
    good = dict(zip(names, Prefill().arguments("cpu")))
    deep_gemm.fp8_mqa_logits(**good, logits_dtype=paddle.float32)
    with pytest.raises(error, match=f"^fp8_mqa_logits: {text}"):
        deep_gemm.fp8_mqa_logits(**{**good, **change})


def test_wrong_arguments_of_newer_names():
    q, kv, *rest = Prefill().arguments("cpu")
    for arguments, text in (
        ((q, kv), "q: expected queries and their scales or None, got Tensor"),
        (((q,), kv), "q: expected queries and their scales or None, got tuple"),
        (((q, None), kv[0]), "kv: expected keys and their scales, got Tensor"),
    ):
        with pytest.raises(TypeError, match=f"^fp8_fp4_mqa_logits: {text}"):
            deep_gemm.fp8_fp4_mqa_logits(*arguments, *rest)
    codes = paddle.zeros([2, 1, 8, 128], "uint8")
    pages = paddle.zeros([1, 64, 1, 132], "uint8"), paddle.zeros([2, 8])
    rows = int32([1, 1], "cpu"), int32([[0], [0]], "cpu"), None, 4
    scalar = paddle.ones([])
    with pytest.raises(ValueError, match=r"paged_mqa_logits: q: expected"):
        deep_gemm.fp8_paged_mqa_logits(scalar, *pages, *rows, False, int32([0, 0], "cpu"))
    with pytest.raises(TypeError, match=r"^fp8_fp4_paged_mqa_logits: q: expected queries"):
        deep_gemm.fp8_fp4_paged_mqa_logits(codes, *pages, *rows)


def test_wrong_arguments_of_pages():
    with pytest.raises(TypeError, match=r"^fp8_paged_mqa_logits: clean_logits: expected bool"):
        Decode().run("cpu", None)
    for next_n, indices, error, text in (
        (1, paddle.float32, TypeError, "expected a tensor, got"),
        (1, int32([0, 0], "cpu"), ValueError, r"expected shape \[9\], got \[2\]"),
        (2, int32([0] * 9, "cpu"), ValueError, "expected one query a row of q, got 2"),
    ):
        with pytest.raises(error, match=f"^fp8_paged_mqa_logits: indices: {text}"):
            Decode(next_n=next_n).run("cpu", False, indices)
    lengths = paddle.zeros([3], "int32")
    for arguments, error, text in (
        ((None, 64, 4), TypeError, "context_lens: expected a tensor, got NoneType"),
        ((lengths, 64, None), TypeError, "num_sms: expected int, got NoneType"),
        ((lengths, 0, 4), ValueError, "block_kv: expected at least 1, got 0"),
    ):
        with pytest.raises(error, match=f"^get_paged_mqa_logits_metadata: {text}"):
            deep_gemm.get_paged_mqa_logits_metadata(*arguments)
