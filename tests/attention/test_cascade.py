"""cascade_attention against the fp64 model of the whole sequences, and the backends that use it."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn.backends import AppendAttentionBackend, FlashAttentionBackend
from fastattn.reference import numerics
from tests.support.attention import (
    BLOCK_WISE_FP8,
    BLOCK_WISE_INT8,
    CACHE_KINDS,
    FEW_KINDS,
    PLAIN,
    PagedProblem,
    assert_fp8_products,
    paged_problem,
)
from tests.support.bounds import assert_codes, assert_error_ratio
from tests.support.compare import assert_same_bits
from tests.support.serving import Model, Server, assert_fp8_probabilities
from tests.support.tensors import EMPTY_OUTPUTS, int32, to_numpy, to_paddle

P = 192
#: (cached, new): decode, chunks, drafts, and sequences that rest, one of them without the prefix.
SEQS = [(P, 65), (P + 70, 1), (3, 0), (P + 300, 5), (P + 64, 1), (P + 1, 64), (P + 9, 0)]


@dataclasses.dataclass
class CascadeProblem(PagedProblem):
    """Sequences that share their first `shared` tokens; the reference attends them whole."""

    shared: int = P

    def plan(self, place: str = "cpu"):
        return F.plan_cascade(
            self.block_tables,
            self.seq_lens_decoder,
            self.seq_lens_this_time,
            self.shared,
            place=paddle.CPUPlace() if place == "cpu" else paddle.CUDAPlace(0),
        )

    def call(self, place: str = "cpu", **extra):
        (q, key, value, _, cu, _, new, *lengths), keywords = self.arguments(place)
        arguments = {"plan": self.plan(place), **keywords, **extra}
        plan = arguments.pop("plan")
        return F.cascade_attention(q, key, value, plan, cu, new, *lengths, **arguments)

    def run(self, place: str = "cpu", **extra):
        out, lse = self.call(place, return_softmax_lse=True, **extra)
        return to_numpy(out), to_numpy(lse)


def cascade_problem(seqs=SEQS, shared: int = P, **options) -> CascadeProblem:
    """As :func:`paged_problem`; sequences that rest without the prefix have their own tables."""
    problem = paged_problem(seqs, share=True, **options)
    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    problem = CascadeProblem(**fields, shared=shared)
    blocks = shared // 64
    prefix = problem.block_tables[0, :blocks]
    for seq, (cached, new) in enumerate(seqs):  # blocks that only two sequences have in common
        if new:
            same = problem.block_tables[seq, :blocks] == prefix
            assert cached >= shared and same.all()
    return problem


@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_every_cache_type(place, kind):
    out, lse = cascade_problem(kind=kind, seed=1, padding=3).check(place)
    assert not out[-3:].any() and np.isneginf(lse[:, -3:]).all(), "padding tokens"


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (5, 5)], ids=str)
def test_heads(place, kind, heads):
    cascade_problem(heads=heads, dim=128, kind=kind, seed=2).check(place)


@pytest.mark.parametrize("shared", [64, 128, 1024])
@pytest.mark.parametrize("new", [1, 4, 130])
def test_lengths_of_the_prefix(place, shared, new):
    """More and fewer new tokens than the prefix has."""
    seqs = [(shared, new), (shared + 63, 1), (shared + 200, new)]
    cascade_problem(seqs, shared, kind=BLOCK_WISE_FP8, seed=3).check(place)


def test_one_seq_and_a_table_as_long_as_the_prefix(place):
    cascade_problem([(P, 2)]).check(place)
    problem = cascade_problem([(P, 0), (P, 0)], padding=2)
    problem.block_tables = np.ascontiguousarray(problem.block_tables[:, : P // 64])
    assert problem.plan().suffix_block_tables.shape == [2, 1]
    out, lse = problem.run(place)
    assert not out.any() and np.isneginf(lse).all()


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize("sinks_dtype", [np.float32, "bfloat16"], ids=str)
def test_sinks_join_once(place, kind, sinks_dtype):
    sinks = np.array([3.0, -1.0, 7.0, -np.inf], np.float32)
    if sinks_dtype == "bfloat16":
        sinks = sinks.astype(numerics.bfloat16)
    cascade_problem(kind=kind, seed=4, sinks=sinks).check(place)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_softcap_and_scale(place, kind, causal):
    cascade_problem(kind=kind, seed=5, softcap=8.0, softmax_scale=0.21, causal=causal).check(place)


@pytest.mark.parametrize("q_type", ["float32", "float16", "e4m3:tensor", "e4m3:token_head"])
@pytest.mark.parametrize("kind", [BLOCK_WISE_FP8, BLOCK_WISE_INT8], ids=str)
def test_queries(place, q_type, kind):
    if place == "gpu" and q_type == "float32":
        pytest.skip("fp32 queries are for the CPU")
    cascade_problem(kind=kind, q_type=q_type, seed=6).check(place)


@pytest.mark.parametrize("q_type", ["bfloat16", "float16"])
def test_queries_that_it_quantises(place, q_type):
    problem = cascade_problem(kind=BLOCK_WISE_FP8, q_type=q_type, seed=6, quantize_q=True)
    problem.check(place)


@pytest.mark.parametrize("kind", CACHE_KINDS[::3], ids=str)
@pytest.mark.parametrize("q_type", ["bfloat16", "e4m3:token_head"])
def test_fp8_output(place, kind, q_type):
    if kind.quant_type == "none":
        q_type = kind.dtype
    scale = np.array([0.0337], np.float32)
    cascade_problem(kind=kind, q_type=q_type, seed=7, out_scale=scale).check(place)


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_fp8_output_is_the_merge_of_both_sides(place, kind):
    """The codes of the fp64 merge of two fp64 attentions, but where that lies at a boundary."""
    problem = cascade_problem(kind=kind, seed=8)
    scale = np.array([0.0219], np.float32)
    codes, _ = problem.run(place, out_scale=to_paddle(scale, place))
    sides = {}
    for precision in ("float64", "float32" if place == "cpu" else "bfloat16"):
        (prefix, p), (suffix, s) = (
            problem.reference(
                precision, causal=True, mask_offsets=np.tile(span, (len(problem.q), 1))
            )
            for span in ((0, P), (P, 2**30))
        )
        with np.errstate(invalid="ignore"):
            share = 1 / (1 + np.exp(np.asarray(s - p, np.float64)))
        share = np.nan_to_num(share.T)[..., None]
        sides[precision] = prefix * share + suffix * (1 - share)
    exact, naive = sides.values()
    owned = problem.owned()
    slack = 0.0
    if place != "cpu" and problem.multiplies_bf16():  # as Problem.check
        magnitudes, _ = problem.with_magnitudes().reference()
        slack = 2.0**-9 * np.asarray(magnitudes, np.float64)[owned]
    assert_codes(codes[owned], exact[owned], naive[owned], float(scale[0]), extra=slack)
    # far fewer than 1 in 100 lie at a boundary
    expected = numerics.quantize(exact, scale, "e4m3")
    if place == "cpu":
        assert (codes != expected)[owned].mean() < 1e-2


@pytest.mark.parametrize("given", ["float32", "bfloat16", "uint8"])
def test_given_output(place, given):
    """Written in place; tokens of no sequence become 0."""
    problem = cascade_problem(seed=9, padding=2)
    extra = {"out_dtype": "float32"} if given == "float32" else {}
    if given == "uint8":
        extra["out_scale"] = to_paddle(np.array([0.02], np.float32), place)
    fill = np.full(problem.q.shape, 3, problem.q.dtype if given == "bfloat16" else given)
    out = to_paddle(fill, place)
    result = problem.call(place, out=out, **extra)
    assert_same_bits(to_numpy(out), to_numpy(result))
    fresh = problem.call(place, **extra)
    assert_same_bits(to_numpy(out), to_numpy(fresh))
    assert not to_numpy(out)[-2:].any()


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_output_types_of_e4m3_queries(place, name):
    problem = cascade_problem(kind=BLOCK_WISE_FP8, q_type="e4m3:tensor", seed=10)
    out, lse = problem.run(place, out_dtype=name)
    assert str(out.dtype) == name
    if place != "cpu":
        assert_fp8_products(problem, out, lse)
        return
    exact, _ = problem.reference()
    naive, _ = problem.reference("float32")
    owned = problem.owned()
    assert_error_ratio(out[owned], exact[owned], naive[owned], name)


def test_nan_stays_with_its_seq_or_with_all(place):
    """NaN in a suffix is its sequence's alone; NaN in the prefix is everyone's."""
    seqs = [(P + 10, 1), (P + 20, 2)]
    problem = cascade_problem(seqs)
    problem.poison("v", 1, P + 3)
    out, _ = problem.run(place)
    assert np.isfinite(out[0].astype(np.float32)).all()
    assert np.isnan(out[1:].astype(np.float32)).any(-1).all()
    problem = cascade_problem(seqs)
    problem.poison("k", 0, 7)
    out, lse = problem.run(place)
    assert np.isnan(out.astype(np.float32)).all() and np.isnan(lse).all()


def test_the_prefix_is_not_read_from_the_seqs(place):
    """A sequence's own first blocks are of no account: the plan's are attended."""
    problem = cascade_problem([(P + 10, 1), (P + 20, 2)])
    out, _ = problem.run(place)
    plan = problem.plan(place)
    assert plan.prefix_block_table.shape == [1, P // 64]
    assert plan.suffix_block_tables.shape == [2, problem.block_tables.shape[1] - P // 64]
    other = plan._replace(prefix_block_table=int32(problem.block_tables[:1, : P // 64], place))
    assert_same_bits(problem.run(place, plan=other)[0], out)
    swapped = problem.block_tables[:1, [2, 0, 1]]  # whole blocks may come in any order
    other = plan._replace(prefix_block_table=int32(swapped, place))
    exact, _ = problem.reference()
    naive, _ = problem.reference("float32" if place == "cpu" else "bfloat16")
    assert_error_ratio(problem.run(place, plan=other)[0], exact, naive, "bfloat16")


def test_no_tokens(place):
    if not EMPTY_OUTPUTS:
        pytest.skip("Paddle 2.6 returns no empty tensor")
    out, lse = cascade_problem([(P, 0), (P, 0)]).run(place)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)


def refused(error, text, **extra):
    with pytest.raises(error) as raised:
        cascade_problem([(P, 1), (P, 2)], kind=BLOCK_WISE_FP8).call(**extra)
    assert text in str(raised.value)


def test_refused_arguments():
    q_descale = to_paddle(np.ones((2, 2), np.float32))
    refused(NotImplementedError, "cascade_attention: window_size: (9, -1)", window_size=(9, -1))
    refused(TypeError, "cascade_attention: plan: expected a CascadePlan, got dict", plan={})
    refused(ValueError, "cascade_attention: q_descale: expected shape [1] or", q_descale=q_descale)
    refused(TypeError, "cascade_attention: out_dtype: expected bfloat16", out_dtype="float16")
    refused(ValueError, "cascade_attention: out_dtype: expected auto, f", out_dtype="int8")
    refused(TypeError, "cascade_attention: out_scale: expected a tensor", out_scale=0.5)
    out = to_paddle(np.zeros((3, 4, 64), np.float32))
    refused(TypeError, "cascade_attention: out: expected dtype bfloat16, got float32", out=out)
    refused(NotImplementedError, "cache_quant_type", cache_quant_type="int4")
    refused(ValueError, "cascade_attention: cache_k_zp", cache_k_zp=out)
    refused(ValueError, "sinks", sinks=out)
    refused(ValueError, "cache_k_scales", cache_k_scales=None)
    scale = to_paddle(np.zeros(1, np.float32))
    refused(ValueError, "expected a finite positive scale", out_scale=scale)


def test_refused_lengths_and_queries():
    problem = cascade_problem([(P, 1), (P, 2)])
    (q, key, value, _, cu, _, new, *_), _ = problem.arguments()
    for bad, error in ((-1, ValueError), (2.5, TypeError), (None, TypeError)):
        with pytest.raises(error, match="cascade_attention: max_seqlen_k: expected"):
            F.cascade_attention(q, key, value, problem.plan(), cu, new, 2, bad)
    with pytest.raises(TypeError, match="cascade_attention: q: expected a tensor, got None"):
        F.cascade_attention(None, key, value, problem.plan(), cu, new, 2, 200)
    with pytest.raises(ValueError, match="cascade_attention: q: expected 3 dimensions, got shape"):
        F.cascade_attention(q[0], key, value, problem.plan(), cu, new, 2, 200)


def test_refused_in_a_static_program():
    problem = cascade_problem([(P, 1), (P, 2)])
    (q, key, value, _, cu, _, new, *lengths), _ = problem.arguments()
    plan = problem.plan()
    paddle.enable_static()
    try:
        with pytest.raises(NotImplementedError, match="in dygraph only"):
            F.cascade_attention(q, key, value, plan, cu, new, *lengths)
    finally:
        paddle.disable_static()


@pytest.mark.parametrize(
    ("error", "text", "changed"),
    [
        (ValueError, "shared_prefix_tokens: expected a positive multiple of 64", {"tokens": 0}),
        (ValueError, "shared_prefix_tokens: expected a positive multiple of 64", {"tokens": 65}),
        (ValueError, "at most 192 as block_tables can hold, got 256", {"tokens": 256}),
        (TypeError, "shared_prefix_tokens: expected int, got float", {"tokens": 64.0}),
        (ValueError, "the same first 2 blocks in sequences 0 and 1", {"tokens": 128}),
        (
            ValueError,
            "at least shared_prefix_tokens = 64 in sequence 1, got 63",
            {"cached": [64, 63]},
        ),
        (ValueError, "seq_lens_decoder: expected shape [2], got [3]", {"cached": [64] * 3}),
        (ValueError, "seq_lens_this_time: expected shape [2], got [1]", {"new": [1]}),
        (ValueError, "block_tables: expected shape [B, max_blocks], got [2]", {"tables": [1, 2]}),
        (
            ValueError,
            "1 blocks of the prefix in sequence 0, got [-1]",
            {"tables": [[-1, 1, 2]] * 2},
        ),
        (TypeError, "block_tables: expected integers, got float64", {"tables": [[0.5, 1, 2]] * 2}),
        (TypeError, "seq_lens_decoder: expected integers on the host", {"cached": int32([64, 64])}),
    ],
    ids=lambda x: None,
)
def test_refused_plans(error, text, changed):
    given = {"tables": [[5, 6, 7], [5, 4, 3]], "cached": [128, 128], "new": [1, 1], "tokens": 64}
    F.plan_cascade(*given.values())
    with pytest.raises(error) as raised:
        F.plan_cascade(*{**given, **changed}.values())
    message = re.sub(r"\brow(s?)\b", r"sequence\1", str(raised.value))
    assert message.startswith("plan_cascade: ") and text in message


def test_seqs_that_rest_need_no_prefix():
    plan = F.plan_cascade([[-1, -1], [9, 2], [9, 3]], [0, 64, 70], [0, 1, 2], 64)
    assert to_numpy(plan.prefix_block_table).tolist() == [[9]]
    assert to_numpy(plan.suffix_seq_lens_decoder).tolist() == [0, 0, 6]
    assert to_numpy(plan.prefix_cu_seqlens_q).tolist() == [0, 3]
    resting = F.plan_cascade([[-1, -1]], [0], [0], 64)
    assert to_numpy(resting.prefix_block_table).tolist() == [[-1]]


CACHES = [
    ("none", "e4m3"),
    ("cache_int8", "e4m3"),
    ("cache_fp8", "e5m2"),
    ("block_wise_int8", "e4m3"),
    ("block_wise_fp8", "e4m3"),
    ("block_wise_int4", "e4m3"),
    ("block_wise_mxfp4", "e4m3"),
    ("block_wise_k8v4", "e4m3"),
    ("block_wise_kfp8v4", "e4m3"),
]


def server_with_prefix(backend, model: Model, place: str) -> Server:
    """Three sequences; the first two start with the same two blocks, written by sequence 0."""
    server = Server(backend, model, [210, 190, 40], place, shared=2)
    server.cached[1] = 0
    server.step([140, 0, 30])
    server.cached[1] = 128
    return server


def cascades(monkeypatch) -> list:
    """Plans of the cascades that run from now on."""
    plans, function = [], F.cascade_attention

    def counted(query, key, value, plan, *rest, **options):
        plans.append(plan)
        return function(query, key, value, plan, *rest, **options)

    monkeypatch.setattr(F, "cascade_attention", counted)
    return plans


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("backend", [FlashAttentionBackend, AppendAttentionBackend])
def test_backend_takes_the_cascade_when_told(place, monkeypatch, backend, cache):
    """Every step holds to the dense model's bounds with the cascade and without."""
    plans = cascades(monkeypatch)
    server = server_with_prefix(backend, Model(*cache, sinks=True, num_layers=2), place)
    assert not plans
    server.step([1, 30, 0], shared_prefix_tokens=128, padding=2)
    server.step([5, 1, 0], shared_prefix_tokens=64)
    assert [plan.tokens for plan in plans] == [128, 128, 64, 64]
    server.step([1, 1, 2])
    assert len(plans) == 4


@pytest.mark.parametrize("q_quant", ["per_tensor", "per_token_head"])
def test_backend_with_quantised_queries(place, monkeypatch, q_quant):
    plans = cascades(monkeypatch)
    model = Model("block_wise_fp8", q_quant=q_quant)
    server = server_with_prefix(FlashAttentionBackend, model, place)
    server.step([1, 30, 0], shared_prefix_tokens=128)
    assert len(plans) == 1


@pytest.mark.parametrize("shared", [0, 128])
@pytest.mark.parametrize("q_quant", ["none", "per_token_head"])
def test_backend_gives_fp8_for_the_next_gemm(place, shared, q_quant):
    model = Model("block_wise_fp8", q_quant=q_quant)
    server = server_with_prefix(FlashAttentionBackend, model, place)
    scale = np.array([0.013], np.float32)
    server.layers[0].fp8_output_scale = to_paddle(scale, place)
    new = [2, 30, 0]
    codes = server.run(new, shared_prefix_tokens=shared, padding=1)[0]
    assert codes.dtype == np.uint8 and not codes[-1].any()
    start = 0
    for seq, n in enumerate(new[:2]):
        tokens = server.tokens[seq][0, : server.cached[seq] + n]
        exact, naive = (
            model.attention(tokens, server.cached[seq], p).reshape(n, model.heads, -1)
            for p in ("float64", "bfloat16")
        )
        part = codes[start : start + n].reshape(exact.shape)
        if place != "cpu" and model.multiplies_fp8():
            values = numerics.from_codes(part, "e4m3") * scale
            assert_fp8_probabilities(values, exact, f"sequence {seq}", 2.0**-4)
        else:
            assert_codes(part, exact, naive, float(scale[0]), f"sequence {seq}")
        start += n


def test_backend_attends_windows_and_mask_offsets_as_ever(place, monkeypatch):
    plans = cascades(monkeypatch)
    server = server_with_prefix(FlashAttentionBackend, Model(window=150), place)
    server.step([1, 30, 0], shared_prefix_tokens=128)
    server = server_with_prefix(FlashAttentionBackend, Model(), place)
    seen = np.concatenate([[141], 129 + np.arange(30)])
    offsets = np.stack([np.zeros(31), seen], 1)
    server.step([1, 30, 0], shared_prefix_tokens=128, attn_mask_offsets=int32(offsets, place))
    assert not plans


def test_a_step_whose_seqs_do_not_share_is_refused():
    server = server_with_prefix(FlashAttentionBackend, Model(), "cpu")
    with pytest.raises(ValueError, match=r"at least shared_prefix_tokens = 128 in \w+ 2, got 30"):
        server.run([1, 1, 1], shared_prefix_tokens=128)
