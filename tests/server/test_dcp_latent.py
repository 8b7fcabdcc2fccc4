"""Latent caches over the ranks of a group: the result of fp64 over the whole cache."""

from __future__ import annotations

import inspect
import pickle

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from benchmarks.core.processes import run_group
from fastattn import distributed
from fastattn.distributed import mla_attention_dcp, mla_sparse_attention_dcp
from fastattn.distributed._exchange import check_place_of_result
from tests.support import dcp_latent
from tests.support.compare import assert_same_bits
from tests.support.mla_dense import assert_close, assert_outputs_close
from tests.support.mla_sparse import check_lse, check_output
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

CASES = {**dcp_latent.CASES, **dcp_latent.SINK_CASES}


def modes():
    """(place, world size): processes on the CPU, and through NCCL where there are two GPUs.

    What two ranks do, three do as well, and have one that is neither the first nor the last.
    """
    found = [pytest.param(("cpu", 2), marks=pytest.mark.slow), ("cpu", 3)]
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 1:
        found.append(("gpu", 2))
    return found


@pytest.fixture(scope="module", params=modes(), ids=lambda mode: f"{mode[0]}{mode[1]}")
def ranks(request, tmp_path_factory):
    """Results of every rank: case -> name -> array."""
    place, world_size = request.param
    folder = tmp_path_factory.mktemp("dcp_latent")
    run_group(
        "tests.support.dcp_latent",
        str(folder),
        place,
        world_size=world_size,
        logs=folder,
        backend="gloo" if place == "cpu" else "nccl",
    )
    names = [folder / f"rank{rank}.pickle" for rank in range(world_size)]
    return [{"place": place, **pickle.loads(name.read_bytes())} for name in names]


def of(ranks, name):
    if name not in ranks[0]:
        pytest.skip("uses arithmetic of Paddle")
    return ranks[0][name]


@pytest.mark.parametrize("name", [*CASES, *(f"serve-{f}" for f in dcp_latent.WRITTEN)])
def test_all_ranks_have_the_same_bits(ranks, name):
    for part, first in of(ranks, name).items():
        for other in ranks[1:]:
            assert_same_bits(other[name][part], first, part)


@pytest.mark.parametrize("name", CASES)
def test_against_fp64_over_the_whole_cache(ranks, name):
    """fp32 parts: the bounds of one process. Unrounded outputs of CPUs are exact to fp32."""
    found, case = of(ranks, name), CASES[name]
    want, want_lse = case.want()
    out, lse = found["out"], found["lse"]
    if "exchange_output" in name:
        # Rounded to bf16 on every rank, by every merge, and at the end.
        error = np.linalg.norm(out.astype(np.float64) - want) / np.linalg.norm(want)
        assert error <= 4e-3
        assert_close((want, lse), (want, want_lse))
        return
    assert out.dtype == (np.float32 if "out_dtype" in case.options else BF16)
    if case.sparse and ranks[0]["place"] == "gpu":
        check_output(out, want)
        check_lse(lse, want_lse, case.noise())
        return
    if case.sparse:
        assert_close((out, lse), (want, want_lse))
    else:
        case.problem.accept(ranks[0]["place"], (out, lse), **case.results())
    if ranks[0]["place"] == "cpu" and out.dtype == np.float32:
        assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", ["dense-fp8_584", "sparse-fp8_584"])
def test_fp32_parts_round_once(ranks, name):
    """An output that is rounded once is nearly always the fp64 result's neighbour."""
    if ranks[0]["place"] == "gpu":
        pytest.skip("a GPU kernel multiplies in 16 bits")
    want = CASES[name].want()[0].astype(BF16)
    assert np.mean(ranks[0][name]["out"] != want) <= 1e-3
    exchanged = ranks[0][name.replace("fp8_584", "exchange_output")]["out"]
    assert np.mean(exchanged != want) > 0.01


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_queries_without_a_key(ranks, kind):
    """On no rank, and on one only: 0 and -inf, or that rank's result."""
    for name in (f"{kind}-fp8_656", f"{kind}-all_on_the_last", f"{kind}-whole_seqs"):
        out, lse = ranks[0][name]["out"], ranks[0][name]["lse"]
        gone = np.isneginf(CASES[name].want()[1])
        assert gone.any() and not gone.all()
        np.testing.assert_array_equal(np.isneginf(lse), gone)
        assert not out.transpose(1, 0, 2)[gone].any()


@pytest.mark.parametrize("cache_format", dcp_latent.WRITTEN)
def test_every_rank_writes_its_tokens(ranks, cache_format):
    """Slots of a rank's table from positions: the writer skips the tokens of other ranks."""
    found = ranks[0][f"serve-{cache_format}"]
    dense, sparse = dcp_latent.served_results(cache_format)
    if ranks[0]["place"] == "gpu" and cache_format == "fp8":
        # Of so few rows a GPU may leave keys unrounded. The queries chose all that they see.
        errors = [np.linalg.norm(found["out"].astype(np.float64) - x) for x in (dense, sparse)]
        dense = (dense, sparse)[int(np.argmin(errors))]
    assert_outputs_close(found["out"], dense)
    assert_outputs_close(found["sparse"], sparse)


def test_the_example_runs_in_two_processes(tmp_path):
    arguments = ("tests.support.snippet", "docs/dcp.md", "mla_attention_dcp(")
    run_group(*arguments, world_size=2, logs=tmp_path)


# --- one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense-fp8_656", "sparse-fp8_656", "dense-sinks", "sparse-sinks"])
def test_one_process_just_attends(name):
    case = CASES[name]
    found, want = case.run(0, 1, "cpu"), case.want()
    assert_close((found["out"], found["lse"]), want)


def test_a_group_of_one_takes_out():
    q = paddle.ones([2, 3, 576], "bfloat16")
    cache, out = paddle.ones([1, 64, 576], "bfloat16"), paddle.zeros([2, 3, 512], "bfloat16")
    slots = int32(np.zeros((2, 1)), "cpu")
    result = mla_sparse_attention_dcp(q, cache, slots, cache_format="bf16", out=out)
    assert (to_numpy(out) == 1).all() and (to_numpy(result) == 1).all()


def two_ranks(monkeypatch):
    """As if in a group of two, whose other rank has the same part: no collective runs."""
    monkeypatch.setattr(distributed.latent, "ranks_of", lambda op, group: 2)
    monkeypatch.setattr(
        distributed._exchange.Exchange, "_all_gather", lambda _, own: paddle.concat([own, own])
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("lse", [False, True])
def test_tokens_of_no_sequence_are_0_in_a_given_out(monkeypatch, ranks, dtype, lse):
    """In a group of one as in one of two, where a merge writes `out`."""
    rng = np.random.default_rng(8)
    q = to_paddle(rng.normal(size=(7, 3, 576)).astype(BF16))
    cache = to_paddle(rng.normal(size=(2, 64, 576)).astype(BF16))
    seqs = [int32(x) for x in ([[1, -1], [0, -1]], [0, 2, 5], [4, 9], [2, 1])]
    options = {"cache_format": "bf16", "out_dtype": dtype, "return_softmax_lse": True}
    want, want_lse = (to_numpy(x) for x in F.mla_attention(q, cache, *seqs, 2, 12, **options))
    if ranks == 2:
        two_ranks(monkeypatch)
    out = to_paddle(np.full((7, 3, 512), 7, np.float32).astype(want.dtype))
    got = mla_attention_dcp(
        q, cache, *seqs, 2, 12, **{**options, "return_softmax_lse": lse}, out=out
    )
    assert (got[0] if lse else got).data_ptr() == out.data_ptr()
    assert_same_bits(to_numpy(out), want)
    assert not to_numpy(out)[3:].any() and to_numpy(out)[:3].all(axis=(1, 2)).all()
    if lse and ranks == 1:
        assert_same_bits(to_numpy(got[1]), want_lse)


def sparse_call(**changes):
    q = to_paddle(np.random.default_rng(3).normal(size=(2, 3, 576)).astype(BF16))
    cache = to_paddle(np.random.default_rng(4).normal(size=(1, 64, 576)).astype(BF16))
    arguments = {"q": q, "cache": cache, "indices": int32([[0, 5], [7, -1]])}
    return mla_sparse_attention_dcp(**{**arguments, "cache_format": "bf16", **changes})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_out_is_written_in_place(monkeypatch, dtype):
    alone = sparse_call(out_dtype=dtype)
    two_ranks(monkeypatch)
    out = paddle.full([2, 3, 512], 7.0, dtype)
    result, lse = sparse_call(out=out, out_dtype=dtype, return_softmax_lse=True)
    assert_same_bits(to_numpy(out), to_numpy(result))
    np.testing.assert_allclose(
        to_numpy(out).astype(np.float64), to_numpy(alone).astype(np.float64), rtol=1e-2
    )
    assert list(lse.shape) == [3, 2]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"exchange_dtype": "bfloat16"}, ValueError, "exchange_dtype: expected float32 or output"),
        ({"out_dtype": "float16"}, ValueError, "out_dtype: expected bfloat16 or float32"),
        ({"out": [1]}, TypeError, "out: expected a tensor, got list"),
        ({"out": paddle.zeros([2, 3, 512])}, TypeError, "out: expected dtype bfloat16"),
        ({"out": paddle.zeros([2, 3, 576], "bfloat16")}, ValueError, r"out: expected shape \[2, 3"),
        ({"sinks": paddle.zeros([4])}, ValueError, r"sinks: expected shape \[3\]"),
        ({"sinks": paddle.zeros([3], "bfloat16")}, TypeError, "sinks: expected dtype float32"),
        ({"q": None}, TypeError, "mla_sparse_attention: q: expected a tensor, got None"),
        ({"cache_format": "e4m3"}, NotImplementedError, "cache_format: 'e4m3'"),
    ],
)
def test_errors_among_ranks(monkeypatch, changes, error, text):
    two_ranks(monkeypatch)
    with pytest.raises(error, match=text):
        sparse_call(**changes)


def test_a_group_that_is_none():
    with pytest.raises(TypeError, match="mla_sparse_attention_dcp: group: expected a group"):
        sparse_call(group=3)


def test_a_static_program_is_refused():
    paddle.enable_static()
    try:
        with pytest.raises(NotImplementedError, match=r"mla_attention_dcp: .* dygraph only"):
            mla_attention_dcp(*[None] * 6, 1, 1, cache_format="bf16")
    finally:
        paddle.disable_static()


def test_they_take_what_the_operators_take():
    """The same names and defaults; no largest logits, which no merge joins."""
    for ours, base in (
        (mla_attention_dcp, F.mla_attention),
        (mla_sparse_attention_dcp, F.mla_sparse_attention),
    ):
        mine = inspect.signature(ours).parameters
        for name, parameter in inspect.signature(base).parameters.items():
            if name != "return_max_logits":
                assert mine[name].kind is parameter.kind, name
                assert mine[name].default == parameter.default, name


def test_a_result_over_an_input_is_refused():
    """With several ranks another operator writes it, which knows nothing of the inputs."""
    memory = paddle.zeros([4, 4, 512], "bfloat16")
    cache, apart = memory[:2], paddle.zeros([4, 512], "bfloat16")
    check_place_of_result("op", None, [("cache", memory)])
    others = [("a", None), ("b", 3), ("c", paddle.zeros([0, 512]))]
    check_place_of_result("op", apart, [("cache", memory), *others])
    for out in (cache, cache[1], memory[1, 1:3]):
        with pytest.raises(ValueError, match="out: it is written and must not share memory with b"):
            check_place_of_result("op", out, [("a", apart), ("b", memory)])
    strided = paddle.as_strided(apart, [2, 512], [1024, 1])
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        check_place_of_result("op", strided, [])
