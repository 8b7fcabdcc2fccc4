"""paged_attention_dcp in 2 and 4 processes: the result of one process."""

from __future__ import annotations

import pickle
import time

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn.functional as F
from benchmarks.core.processes import ProcessesFailed, run_group
from fastattn import distributed
from fastattn.distributed import (
    dcp_local_block_tables,
    dcp_num_local_blocks,
    dcp_stripe_block_tables,
    paged_attention_dcp,
)
from fastattn.reference import numerics
from tests.support import dcp
from tests.support.attention import (
    NUMPY_TYPES,
    assert_fp8_products,
    output_type,
    paged_problem,
)
from tests.support.bounds import assert_codes, assert_error_ratio, assert_lse, rounding_step
from tests.support.compare import assert_same_bits, assert_within
from tests.support.tensors import to_paddle

CASES = {**dcp.CASES, **dcp.SINK_CASES}

#: Difference from one process, relative to a row's largest channel: a few fp32 roundings (5.7e-7 is
#: the largest seen). A 16-bit output is rounded once, from values this near to each other.
FP32_BOUND = 2.0**-20
#: Share of 16-bit or 8-bit elements that may then be rounded to the other neighbour.
MOST_DIFFERENT = 1e-3
#: Natural logarithm, absolute; that of 1000 keys is about 10.
LSE_BOUND = 1e-5


def modes():
    """(place, world size): processes on the CPU, and through NCCL where there are two GPUs.

    What two ranks do, four do as well, and have ranks that are neither the first nor the last.
    """
    found = [pytest.param(("cpu", 2), marks=pytest.mark.slow), ("cpu", 4)]
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 1:
        found.append(("gpu", 2))
    return found


@pytest.fixture(scope="module", params=modes(), ids=lambda mode: f"{mode[0]}{mode[1]}")
def ranks(request, tmp_path_factory):
    """Results of every rank: (case -> name -> array) for each."""
    mode, world_size = request.param
    folder = tmp_path_factory.mktemp("dcp")
    backend = "gloo" if mode == "cpu" else "nccl"
    try:
        run_group(
            "tests.support.dcp",
            str(folder),
            mode,
            world_size=world_size,
            logs=folder,
            backend=backend,
        )
    except ProcessesFailed as error:
        if mode == "gpu" and "no CUDA kernel in this build" in str(error):
            pytest.skip("paged_attention: no CUDA kernel in this build")
        raise
    return Ranks(
        [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(world_size)],
        mode,
    )


class Ranks(list):
    """Results by rank, and where attention ran."""

    def __init__(self, results, mode):
        super().__init__(results)
        self.place = mode
        # A GPU kernel rounds probabilities to 16 bits, by other maxima where keys are split
        # otherwise: 2^-9 of every one, in either result.
        self.bound = FP32_BOUND if self.place == "cpu" else 2.0**-7
        self.most_different = MOST_DIFFERENT if self.place == "cpu" else 0.5
        self.lse_bound = LSE_BOUND if self.place == "cpu" else 1e-3

    def of(self, name):
        """Results of a case on rank 0; skips what was not run."""
        if name not in self[0]:
            pytest.skip("uses arithmetic of Paddle, or gloo")
        return self[0][name]


def one_process(case, place="cpu"):
    """(problem, out, lse) of paged_attention over the whole cache."""
    problem = case.make()
    extra = {name: case.options[name] for name in ("out_dtype",) if name in case.options}
    return problem, *problem.run(place, **extra)


def ordered(codes):
    """E4m3 codes as integers in the order of their values."""
    return np.where(codes & 0x80, -(codes & 0x7F).astype(int), codes.astype(int))


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_have_the_same_bits(ranks, name):
    first = ranks.of(name)
    for other in ranks[1:]:
        assert_same_bits(other[name]["out"], first["out"], "out")
        assert_same_bits(other[name]["lse"], first["lse"], "lse")


@pytest.mark.parametrize("name", [name for name in CASES if "exchange_output" not in name])
def test_the_result_is_that_of_one_process(ranks, name):
    found = ranks.of(name)
    problem, expected, expected_lse = one_process(CASES[name], ranks.place)
    owned = problem.owned()
    out, lse = found["out"], found["lse"]
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert_within(lse, expected_lse, ranks.lse_bound, "lse")
    if ranks.place == "gpu" and problem.multiplies_fp8():
        # Both round probabilities to e4m3, each rank relative to the maximum of its own keys: both
        # are held to the exact result.
        assert_fp8_products(problem, out, lse, "ranks")
        assert_fp8_products(problem, expected, expected_lse, "one process")
        return
    out, expected = out[owned], expected[owned]
    if out.dtype == np.uint8:
        apart = np.abs(ordered(out) - ordered(expected))
        assert ranks.place == "gpu" or apart.max() <= 1
        assert np.mean(apart > 0) <= ranks.most_different
        return
    exact = expected.astype(np.float64)
    bound = ranks.bound * np.nan_to_num(np.abs(exact)).max(-1, keepdims=True)
    if out.dtype != np.float32:
        kind = "float16" if out.dtype == np.float16 else "bfloat16"
        bound = bound + rounding_step(np.nan_to_num(exact), kind)
        different = (out != expected) & ~np.isnan(exact)
        assert np.mean(different) <= ranks.most_different
    assert_within(out, expected, bound, "out")


# With a window a rank's tables begin at the first block that a query may see, and the passes of the
# softmax count from there.
@pytest.mark.parametrize(
    "name",
    [n for n in dcp.CASES if ("whole_seqs" in n or "all_on_the_last" in n) and "window" not in n],
)
def test_seqs_on_one_rank_have_the_same_bits(ranks, name):
    if ranks.place == "gpu" and "all_on_the_last" not in name:
        pytest.skip("a GPU splits the keys of a sequence by all that a rank has")
    _, expected, expected_lse = one_process(CASES[name], ranks.place)
    assert_same_bits(ranks[0][name]["out"], expected, "out")
    assert_same_bits(ranks[0][name]["lse"], expected_lse, "lse")


@pytest.mark.parametrize("name", [n for n in CASES if n != "exchange_output-fp8"])
def test_against_fp64(ranks, name):
    """The rule of every attention test: at most twice a naive implementation's error."""
    case = CASES[name]
    problem = case.make()
    owned = problem.owned()
    out, lse = ranks.of(name)["out"], ranks.of(name)["lse"]
    if ranks.place == "gpu" and problem.multiplies_fp8():
        assert_fp8_products(problem, out, lse)
        return
    exact, exact_lse = problem.reference(out_scale=None)
    # Parts that travel in 16 bits make it a 16-bit implementation.
    coarse = "exchange_output" in name or ranks.place == "gpu"
    precision = "bfloat16" if coarse else "float32"
    naive, naive_lse = problem.reference(precision, out_scale=None)
    assert_lse(lse[:, owned], exact_lse[:, owned], naive_lse[:, owned])
    if "out_scale" in problem.options:
        assert_codes(out[owned], exact[owned], naive[owned], float(problem.options["out_scale"][0]))
        return
    kind = case.options.get("out_dtype", output_type(problem.q))
    assert out.dtype == NUMPY_TYPES[kind]
    assert_error_ratio(out[owned], exact[owned], naive[owned], kind)


@pytest.mark.parametrize("name", dcp.PRECOMPUTED)
def test_keys_found_before_the_call(ranks, name):
    before, within = ranks.of(f"local_keys-{name}"), ranks.of(name)
    assert_same_bits(before["out"], within["out"], "out")
    assert_same_bits(before["lse"], within["lse"], "lse")


def test_fp32_exchange_is_nearer_than_16_bits(ranks):
    if ranks.place == "gpu":
        pytest.skip("a GPU kernel multiplies in 16 bits: no exchange is exact")
    _, expected, _ = one_process(CASES["exchange_output"])
    _, expected_fp32, _ = one_process(CASES["fp32_output"])
    half = np.mean(ranks[0]["exchange_output"]["out"] != expected)
    name = "type-block_wise_fp8-token-float32"
    full = np.mean(ranks[0][name]["out"] != one_process(CASES[name])[1])
    assert full <= MOST_DIFFERENT < 0.02 < half
    assert ranks[0]["fp32_output"]["out"].dtype == expected_fp32.dtype == np.float32
    name = "exchange_output-fp8"
    assert 0.005 < np.mean(ranks[0][name]["out"] != one_process(CASES[name])[1]) < 0.05


def test_a_nan_stays_in_the_seqs_that_see_it(ranks):
    problem, expected, _ = one_process(CASES["nan"], ranks.place)
    out = ranks.of("nan")["out"]
    assert_same_bits(np.isnan(out.astype(np.float32)), np.isnan(expected.astype(np.float32)))
    cu = problem.cu_seqlens_q
    seqs = [bool(np.isnan(out[a:b].astype(np.float32)).any()) for a, b in zip(cu, cu[1:])]
    assert seqs == [seq in (1, 2, 7) for seq in range(len(seqs))]


def test_padding_tokens_are_zero(ranks):
    problem = CASES["padding"].make()
    rest = ~problem.owned()
    assert rest.sum() == 10
    assert not ranks[0]["padding"]["out"][rest].any()
    assert np.isneginf(ranks[0]["padding"]["lse"][:, rest]).all()


def test_groups_of_some_ranks(ranks):
    name = "type-block_wise_fp8-token-float32"
    ranks.of("groups")
    _, expected, expected_lse = one_process(CASES[name])
    bound = FP32_BOUND * np.abs(expected.astype(np.float64)).max(-1, keepdims=True)
    for rank in (0, 1):
        pair = ranks[rank]["groups"]
        step = rounding_step(expected, "bfloat16")
        assert_within(pair["out"], expected, bound + step, "a group of two")
        assert_within(pair["lse"], expected_lse, LSE_BOUND)
    assert_same_bits(ranks[0]["groups"]["alone"], expected, "a group of one")
    for other in ranks[1:]:
        assert "group: this process is not in it, ranks [0]" in str(other["groups"]["refused"])


@pytest.mark.parametrize("kind", dcp.SERVED, ids=str)
def test_steps_of_a_server(ranks, kind):
    """Prefill chunks, decode and speculative steps; every rank writes its own blocks only."""
    name = f"serve-{kind}"
    one = dcp.serve(kind, 0, 1, ranks.place)
    for i in range(len(dcp.STEPS)):
        expected = one[f"out{i}"].astype(np.float64)
        bound = ranks.bound * np.abs(expected).max(-1, keepdims=True)
        bound = bound + rounding_step(
            expected, "bfloat16" if kind.quant_type == "none" else "float16"
        )
        for rank in ranks:
            assert_within(rank[name][f"out{i}"], one[f"out{i}"], bound, f"step {i}")
            assert_same_bits(rank[name][f"out{i}"], ranks[0][name][f"out{i}"], f"step {i}")
    # Every token's K codes and scales are on exactly one rank, with the bytes of one process.
    for seq, length in enumerate(one["lengths"]):
        for block in range(-(-int(length) // 64)):
            owners = [r for r in ranks if r[name]["tables"][seq, block] >= 0]
            assert owners == [ranks[block % len(ranks)]]
            tokens = min(64, int(length) - 64 * block)
            at, there = one["tables"][seq, block], owners[0][name]["tables"][seq, block]
            for part in ("key", "k_scales") if kind.dynamic else ("key",):
                got, expected = owners[0][name][part][there], one[part][at]
                assert_same_bits(got[:, :tokens], expected[:, :tokens], f"{part} of {seq}, {block}")


def test_writers_leave_other_blocks_alone(ranks):
    """What no table of a rank names keeps the bytes that it had."""
    kind = dcp.SERVED[0]
    for rank, results in enumerate(ranks):
        found = results[f"serve-{kind}"]
        fresh = dcp.make_cache("none", len(found["key"]), dcp.KV_HEADS, dcp.DIM, seed=rank)
        used = np.zeros(fresh.key.shape[0], bool)
        for seq, length in enumerate(found["lengths"]):
            ids = found["tables"][seq, : -(-int(length) // 64)]
            used[ids[ids >= 0]] = True
        assert used.any() and not used.all()
        assert_same_bits(found["key"][~used], fresh.key[~used], "key")


# --- one process ---------------------------------------------------------------------------------


def test_one_process_is_paged_attention():
    problem = paged_problem(dcp.SEQS, kind=dcp.BLOCK_WISE_FP8, sinks=dcp.SINKS)
    expected, expected_lse = problem.run("cpu")
    positional, keywords = problem.arguments("cpu")
    out, lse = paged_attention_dcp(*positional, return_softmax_lse=True, **keywords)
    assert_same_bits(out.numpy(), F.paged_attention(*positional, **keywords).numpy())
    assert_same_bits(lse.numpy(), expected_lse)
    assert expected.shape == tuple(out.shape)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("codes", [False, True])
def test_one_process_clears_padding_in_a_given_out(lse, codes):
    """As several ranks do, whose merge writes `out`."""
    problem = CASES["padding"].make()
    positional, keywords = problem.arguments("cpu")
    scale = {"out_scale": paddle.full([1], 0.02)} if codes else {}
    want = F.paged_attention(*positional, **keywords, **scale)
    out = paddle.full(want.shape, 7, want.dtype)
    got = paged_attention_dcp(*positional, **keywords, **scale, out=out, return_softmax_lse=lse)
    assert (got[0] if lse else got) is out
    assert_same_bits(out.numpy(), want.numpy())
    assert not out.numpy()[~problem.owned()].any()


def call(**changes):
    positional, keywords = paged_problem([(3, 2)]).arguments("cpu")
    return paged_attention_dcp(*positional, **{**keywords, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"exchange_dtype": "float16"}, ValueError, "exchange_dtype: expected float32 or output"),
        ({"group": 3}, TypeError, "group: expected a group of paddle.distributed, got int"),
        ({"cache_quant_type": "cache_int4_zp"}, NotImplementedError, "cache_int4_zp"),
        ({"sinks": paddle.zeros([3])}, ValueError, "sinks: expected shape"),
    ],
)
def test_errors(changes, error, text):
    with pytest.raises(error, match=text):
        call(**changes)


def two_ranks(monkeypatch):
    """As if in a group of two, whose other rank has the same part: no collective runs."""
    monkeypatch.setattr(distributed.attention, "ranks_of", lambda op, group: 2)
    monkeypatch.setattr(
        distributed._exchange.Exchange, "_all_gather", lambda _, own: paddle.concat([own, own])
    )


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"out_dtype": "float64"}, ValueError, "out_dtype: expected auto, float32, float16"),
        ({"out_dtype": "float16"}, TypeError, "out_dtype: expected bfloat16 as q has, or float32"),
        (
            {"out_dtype": "float32", "out_scale": paddle.ones([1])},
            ValueError,
            "out_dtype: expected auto with out_scale",
        ),
        ({"out": [1]}, TypeError, "out: expected a tensor, got list"),
        ({"out": paddle.zeros([2, 4, 64])}, TypeError, "out: expected dtype bfloat16, got float32"),
        (
            {"out": paddle.zeros([2, 4, 32], "bfloat16")},
            ValueError,
            r"out: expected shape \[2, 4, 64\], got \[2, 4, 32\]",
        ),
        (
            {"out": paddle.zeros([2, 4, 64], "bfloat16"), "out_scale": paddle.ones([1])},
            TypeError,
            "out: expected dtype uint8 or float8_e4m3fn, got bfloat16",
        ),
        ({"out_scale": 0.5}, TypeError, "out_scale: expected a tensor, got float"),
        ({"out_scale": paddle.ones([2])}, ValueError, r"out_scale: expected shape \[1\]"),
        ({"sinks": paddle.zeros([3])}, ValueError, r"sinks: expected shape \[4\], got \[3\]"),
        ({"sinks": paddle.zeros([4], "float64")}, TypeError, "sinks: expected dtype float32 or bf"),
        ({"window_size": 3}, TypeError, "window_size"),
        (
            {"tree_mask": paddle.ones([1, 2, 2], "bool")},
            NotImplementedError,
            "tree_mask is not supported with several ranks",
        ),
        (
            {"head_windows": paddle.zeros([2, 2], "int32")},
            NotImplementedError,
            "head_windows is not supported with several ranks",
        ),
    ],
)
def test_errors_among_ranks(monkeypatch, changes, error, text):
    two_ranks(monkeypatch)
    with pytest.raises(error, match=text):
        call(**changes)


def test_a_table_for_each_head_among_ranks(monkeypatch):
    two_ranks(monkeypatch)
    x = paddle.zeros([2, 4, 64], "bfloat16")
    caches = [paddle.zeros([4, 2, 64, 64], "bfloat16") for _ in range(2)]
    seqs = [paddle.to_tensor(x, "int32") for x in ([[[0] * 2] * 2], [0, 2], [0], [2])]
    with pytest.raises(NotImplementedError, match="a block table for each KV head is not supp"):
        distributed.paged_attention_dcp(x, *caches, *seqs, 2, 2)


@pytest.mark.parametrize(
    ("made", "changes", "error", "text"),
    [
        ({}, {"local_keys": 3}, TypeError, "local_keys: expected LocalKeys, got int"),
        ({"causal": False}, {}, ValueError, "expected keys for causal True, got False"),
        ({"window_size": (3, 0)}, {}, ValueError, r"for window_size \(-1, -1\), got \(3, 0\)"),
        ({"num_tokens": 3}, {}, ValueError, "expected keys for num_tokens 2, got 3"),
        ({"num_blocks": 1}, {}, ValueError, "expected keys for num_blocks 4, got 1"),
        ({"block_size": 8}, {}, ValueError, "expected keys for block_size 64, got 8"),
        ({"max_seqlen_q": 1}, {}, ValueError, "expected keys for max_seqlen_q > 1"),
        (
            {},
            {"mask_offsets": paddle.zeros([2, 2], "int32")},
            ValueError,
            "expected keys for masked True, got False",
        ),
        (
            {"block_tables": paddle.zeros([1, 7], "int32")},
            {},
            ValueError,
            r"expected keys for shape \(1, 2\), got \(1, 7\)",
        ),
    ],
)
def test_keys_of_other_arguments_are_refused(monkeypatch, made, changes, error, text):
    two_ranks(monkeypatch)
    positional, keywords = paged_problem([(3, 2)]).arguments("cpu")
    names = ("block_tables", "cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time")
    facts = {"max_seqlen_q": 2, "num_tokens": 2, "num_blocks": positional[1].shape[0]}
    local = distributed.dcp_local_keys(**{**dict(zip(names, positional[3:7])), **facts, **made})
    with pytest.raises(error, match=f"paged_attention_dcp: .*{text}"):
        paged_attention_dcp(*positional, **{**keywords, "local_keys": local, **changes})


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, TypeError, "expected int, got NoneType"),
        (1.5, TypeError, "expected int, got float"),
        (True, TypeError, "expected int, got bool"),
        (-1, ValueError, "expected at least 0, got -1"),
    ],
)
def test_bounds_of_new_tokens_that_are_none(value, error, text):
    """Whether masks are needed follows from it."""
    seqs = [paddle.to_tensor(x, "int32") for x in ([[0]], [0, 2], [3], [2])]
    with pytest.raises(error, match=f"dcp_local_keys: max_seqlen_q: {text}"):
        distributed.dcp_local_keys(*seqs, max_seqlen_q=value, num_tokens=2, num_blocks=1)


def test_a_query_that_is_no_tensor(monkeypatch):
    two_ranks(monkeypatch)
    positional, keywords = paged_problem([(3, 2)]).arguments("cpu")
    with pytest.raises(TypeError, match="paged_attention: q: expected a tensor, got None"):
        paged_attention_dcp(None, *positional[1:], **keywords)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_out_is_written_in_place(monkeypatch, out_dtype):
    two_ranks(monkeypatch)
    # Twice the same keys: the same output.
    problem = paged_problem(dcp.SEQS, kind=dcp.BLOCK_WISE_FP8)
    expected, lse = problem.run("cpu", out_dtype=out_dtype)
    out = paddle.zeros(list(expected.shape), out_dtype)
    positional, keywords = problem.arguments("cpu")
    returned, merged_lse = paged_attention_dcp(
        *positional, out=out, out_dtype=out_dtype, return_softmax_lse=True, **keywords
    )
    assert returned.data_ptr() == out.data_ptr()
    assert_within(
        out.astype("float32").numpy(), expected, 2.0**-7 * np.abs(expected.astype(np.float32))
    )
    assert_within(merged_lse.numpy(), lse + np.float32(np.log(2)), LSE_BOUND)


def test_fp8_out_is_written_in_place(monkeypatch):
    two_ranks(monkeypatch)
    problem = paged_problem(dcp.SEQS, kind=dcp.BLOCK_WISE_FP8, out_scale=dcp.SCALE)
    expected, _ = problem.run("cpu")
    out = to_paddle(np.zeros(expected.shape, np.uint8))
    positional, keywords = problem.arguments("cpu")
    paged_attention_dcp(*positional, out=out, **keywords)
    assert np.abs(ordered(out.numpy()) - ordered(expected)).max() <= 1


def test_a_static_program_is_refused():
    paddle.enable_static()
    try:
        with pytest.raises(NotImplementedError, match="dygraph only"):
            paged_attention_dcp(*[None] * 7, 1, 1)
    finally:
        paddle.disable_static()


def test_processes_without_a_group(monkeypatch):
    monkeypatch.setattr(distributed._exchange.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed._exchange.dist, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match=r"one of 2 processes: call .*init_parallel_env"):
        call()


# --- tables --------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    seqs=st.integers(0, 4),
    blocks=st.integers(0, 30),
    world_size=st.integers(1, 9),
    interleave=st.integers(1, 5),
    tokens=st.integers(0, 30 * 64),
)
def test_local_tables_are_a_partition(seqs, blocks, world_size, interleave, tokens):
    tables = np.random.default_rng(0).integers(0, 2**31 - 1, (seqs, blocks))
    before = tables.copy()
    local = [
        dcp_local_block_tables(tables, rank, world_size, interleave=interleave)
        for rank in range(world_size)
    ]
    assert (tables == before).all() and all(x.dtype == np.int32 for x in local)
    assert (np.sum([x >= 0 for x in local], axis=0) == 1).all()
    assert (np.max(local, axis=0) == tables).all()
    used = -(-tokens // 64)
    counts = [
        dcp_num_local_blocks(tokens, rank, world_size, interleave=interleave)
        for rank in range(world_size)
    ]
    assert sum(counts) == used
    assert max(counts) - min(counts) <= interleave
    if seqs and used <= blocks:
        assert counts == [int((x[0, :used] >= 0).sum()) for x in local]


@settings(max_examples=50, deadline=None)
@given(seqs=st.integers(0, 4), stripes=st.integers(0, 9), world_size=st.integers(1, 9))
def test_stripes(seqs, stripes, world_size):
    ids = np.random.default_rng(0).integers(-1, 99, (seqs, stripes))
    for rank in range(world_size):
        table = dcp_stripe_block_tables(ids, rank, world_size)
        assert table.shape == (seqs, stripes * world_size) and table.dtype == np.int32
        assert (table[:, rank::world_size] == ids).all()
        everyone = np.repeat(ids, world_size, axis=1)
        assert (dcp_local_block_tables(everyone, rank, world_size) == table).all()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([[1]], 2, 2), ValueError, "rank: expected 0 to 1, got 2"),
        (([[1]], -1, 2), ValueError, "rank: expected an int of at least 0"),
        (([[1]], 0, 0), ValueError, "world_size: expected an int of at least 1"),
        (([[1]], 0.0, 2), TypeError, "rank: expected int, got float"),
        (([[1]], True, 2), ValueError, "rank"),
        (([1], 0, 2), ValueError, r"block_tables: expected shape \[B, max_blocks\]"),
        (([[1.5]], 0, 2), TypeError, "block_tables: expected integers"),
        (([[2**31]], 0, 2), ValueError, "ids that fit int32"),
    ],
)
def test_table_errors(arguments, error, text):
    for function in (dcp_local_block_tables, dcp_stripe_block_tables):
        with pytest.raises(error, match=text):
            function(*arguments)


def test_number_errors():
    with pytest.raises(ValueError, match="interleave"):
        dcp_local_block_tables([[1]], 0, 1, interleave=0)
    with pytest.raises(ValueError, match="num_tokens"):
        dcp_num_local_blocks(-1, 0, 1)
    assert dcp_local_block_tables(np.zeros((0, 0)), 0, 2).shape == (0, 0)
    assert dcp_num_local_blocks(np.int64(65), np.int32(1), 2) == 1


def test_order_of_codes():
    """The order that the FP8 comparison uses is the order of the values."""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    values = numerics.from_codes(codes, "e4m3")
    assert (np.argsort(ordered(codes), kind="stable") == np.argsort(values, kind="stable")).all()


@pytest.mark.parametrize("words", ["max_seqlen_q=60", "local_keys=local"])
def test_the_examples_run_in_two_processes(tmp_path, words):
    run_group("tests.support.snippet", "docs/dcp.md", words, world_size=2, logs=tmp_path)


# --- the launcher of the processes ---------------------------------------------------------------


def test_a_hung_rank_ends_the_run(tmp_path):
    begin = time.monotonic()
    with pytest.raises(ProcessesFailed, match="not done after 1 s"):
        run_group("timeit", "import time; time.sleep(60)", world_size=2, logs=tmp_path, timeout=1)
    assert time.monotonic() - begin < 30


def test_a_failing_rank_ends_the_others_and_is_quoted(tmp_path):
    code = "import os, time; time.sleep(60 * (os.environ['PADDLE_TRAINER_ID'] == '1')); 1 / 0"
    with pytest.raises(ProcessesFailed, match=r"(?s)a process failed.*ZeroDivisionError"):
        run_group("timeit", "-n", "1", code, world_size=2, logs=tmp_path, timeout=50)
