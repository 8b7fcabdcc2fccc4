"""Long sequences over caches of codes, whose K and V become 16-bit ones ahead of the attention.

Only on a Hopper GPU, where enough packed rows see a key and the call has enough operations,
here any number of them; the plan says so (``_host.dequantize_plan``). Many heads a KV head make
that few tokens. Results are held to the error of 16-bit products of the cache's values (see
tests.support.attention).
"""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import _ops, env
from tests.support.attention import CacheKind, PagedProblem, flash_problem, paged_problem
from tests.support.compare import assert_same_bits
from tests.support.graph import capture
from tests.support.tensors import to_numpy, to_paddle

host = pytest.importorskip("fastattn._host")

_CODES = ("fp8", "int8", "int4", "mxfp4", "k8v4", "kfp8v4")
DYNAMIC = [CacheKind(f"block_wise_{code}") for code in _CODES]
STATIC = [
    CacheKind("cache_fp8", "head"),
    CacheKind("cache_fp8", "tensor", "e5m2"),
    CacheKind("cache_int8", "channel"),
]

#: Some that take part (the first and the fourth), some whose keys few rows see, that decode, that
#: speculate, that rest.
MIXED = [(0, 100), (130, 33), (40, 3), (300, 95), (513, 1), (33, 0), (64, 64)]
HEADS = (32, 2)


def room(mib: float) -> None:
    """Give calls of any size so much memory."""
    _ops.prepare()
    _ops.limit_dequantized(mib, 0)


@pytest.fixture(autouse=True)
def calls_of_any_size():
    room(512)
    yield
    _ops.limit_dequantized(*env.dequantized())


def plan(kind: CacheKind, dim: int, seqs, heads, **options) -> dict[str, int]:
    new, keys = [n for _, n in seqs], [sum(seq) for seq in seqs]
    code = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}.get(kind.code, kind.code)
    return host.dequantize_plan(
        options.pop("q_dtype", "bfloat16"),
        code,
        kind.quant_type,
        options.pop("tokens", sum(new)),
        len(seqs),
        *heads,
        dim,
        max(new),
        options.pop("max_k", max(keys)),
        **options,
    )


def problem_of(seqs, kind: CacheKind, dim: int = 128, heads=HEADS, **options) -> PagedProblem:
    """A problem some of whose sequences take part, as far as the host knows."""
    assert plan(kind, dim, seqs, heads, operations=0)["blocks"] > 0
    problem = paged_problem(seqs, kind=kind, heads=heads, dim=dim, **options)
    problem.rounds_values = True
    return problem


def check(problem: PagedProblem) -> tuple[np.ndarray, np.ndarray]:
    """Hold the result to the reference, and tell it from that over the codes; returns both."""
    out, _ = problem.check("gpu")
    room(0)
    codes, _ = problem.run("gpu")
    assert (bits(out) != bits(codes)).any(), "codes were attended as they are"
    return out, codes


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


def taking_part(kind: CacheKind, dim: int, seqs, heads) -> list[int]:
    """Sequences of a causal call of which enough rows see a key."""
    found, group = plan(kind, dim, seqs, heads, operations=0), heads[0] // heads[1]
    return [
        i
        for i, (cached, new) in enumerate(seqs)
        if new >= found["min_tokens"]
        and group * new * (cached + new / 2) >= found["min_rows"] * (cached + new)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DYNAMIC, ids=str)
def test_seqs_of_every_kind_in_one_call(kind):
    assert {0, 3} <= set(taking_part(kind, 128, MIXED, HEADS)) <= {0, 3, 6}
    problem = problem_of(MIXED, kind, seed=1, padding=5)
    out, codes = check(problem)
    for i, (first, new) in enumerate(zip(problem.cu_seqlens_q, problem.seq_lens_this_time)):
        moved = (bits(out) != bits(codes))[first : first + new].any()
        assert moved == (i in taking_part(kind, 128, MIXED, HEADS)), i


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 192, 256])
@pytest.mark.parametrize("kind", [*DYNAMIC, *STATIC], ids=str)
def test_head_dims(kind, dim):
    if dim not in (192, 256) and not kind.dynamic:
        pytest.skip("attended as they are")
    check(problem_of([(0, 90), (130, 3), (201, 130)], kind, dim, seed=2))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"softcap": 20.0},
        {"window_size": (-1, 7)},
        {"sinks": np.linspace(-3, 4, HEADS[0]).astype(np.float32)},
        {"out_scale": np.array([0.02], np.float32)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options):
    check(problem_of([(90, 91), (257, 70)], DYNAMIC[0], seed=3, **options))


@pytest.mark.gpu
def test_masks():
    seqs = [(90, 91), (257, 70)]
    rng = np.random.default_rng(4)
    masks = np.zeros((161, 2), np.int32)
    first = 0
    for cached, new in seqs:
        masks[first : first + new, 0] = rng.integers(0, cached, new)
        masks[first : first + new, 1] = rng.integers(cached, cached + new + 9, new)
        first += new
    check(problem_of(seqs, DYNAMIC[1], seed=4, mask_offsets=masks))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DYNAMIC, ids=str)
def test_unassigned_blocks_and_short_tables(kind):
    problem = problem_of([(200, 120), (0, 150)], kind, seed=5)
    problem.block_tables[0, 2], problem.block_tables[1, 1] = -1, 2**31 - 1
    problem.check("gpu")
    problem.block_tables = np.ascontiguousarray(problem.block_tables[:, :4])
    problem.check("gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DYNAMIC, ids=str)
def test_a_nan_stays_in_the_rows_that_see_it(kind):
    problem = problem_of([(100, 100), (0, 110)], kind, seed=6)
    if kind.code_of("v") in ("int8", "int4"):
        block, token = problem.slot(0, 133)
        problem.v.scales[block, 0, token] = np.nan
    else:
        problem.poison("v", 0, 133)
    out, _ = problem.check("gpu")
    seen = np.isnan(out.astype(np.float32)).any((1, 2))
    assert seen[33:100].all() and not seen[:33].any() and not seen[100:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_token_scales_far_apart(scale_dtype):
    kind = CacheKind("block_wise_int8", scale_dtype=scale_dtype)
    problem = problem_of([(300, 100)], kind, seed=7)
    rng = np.random.default_rng(7)
    for stored in (problem.k, problem.v):
        size = 2.0 ** rng.integers(-12, 4, stored.scales.shape)
        stored.scales[:] = (stored.scales.astype(np.float32) * size).astype(stored.scales.dtype)
    problem.check("gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("memory, parts", [(0, []), (2, [1]), (4, [0]), (6, [0, 1, 2, 3])])
def test_seqs_without_room_are_attended_as_they_lie(memory, parts):
    """Some of a call's sequences as 16-bit values, the others as codes.

    Blocks of 64 KiB, of which the sequences have 42, 25, 16 and 3: none finds room; the second,
    as the first has too many; the first; all.
    """
    room(memory)
    seqs = [(2580, 64), (1500, 70), (900, 80), (0, 130)]
    problem = problem_of(seqs, DYNAMIC[0], seed=8)
    out, _ = problem.check("gpu")
    room(0)
    codes, _ = problem.run("gpu")
    moved = (bits(out) != bits(codes)).any((1, 2))
    found = [i for i, part in enumerate(np.split(moved, problem.cu_seqlens_q[1:-1])) if part.any()]
    assert found == parts


@pytest.mark.gpu
@pytest.mark.parametrize("descale_shape", ["tensor", "head"])
@pytest.mark.parametrize("kv_type", ["e4m3", "e5m2", "int8"])
@pytest.mark.parametrize("dim", [96, 192, 256])
def test_contiguous_codes(dim, kv_type, descale_shape):
    seqs = [(100, 130), (0, 40), (3, 70), (90, 90)]
    sizes = dict(heads=HEADS, dim=dim, seed=11)
    problem = flash_problem(
        seqs, kv_type=kv_type, descale_shape=descale_shape, causal=True, **sizes
    )
    out, _ = problem.check("gpu")
    room(0)  # the portable kernel's sums have another order
    assert (problem.run("gpu")[0] != out).any()


@pytest.mark.gpu
def test_no_memory_turns_it_off():
    """Integers as codes have an fp32 output of fp32 scores; rounded to bf16 they have not."""
    problem = problem_of([(100, 150)], DYNAMIC[1], seed=9)
    exact, _ = problem.reference()
    error = {}
    for memory in (0, 64):
        room(memory)
        out, _ = problem.run("gpu", out_dtype="float32")
        error[memory] = np.sqrt(np.mean((out - exact) ** 2) / np.mean(exact**2))
    assert error[0] < 6e-4 and 8e-4 < error[64] < 4e-3


@pytest.mark.gpu
def test_wild_lengths_stay_in_bounds():
    problem = problem_of([(300, 100), (300, 110)], DYNAMIC[0])
    for decoder, this_time, cu in (
        ([2**31 - 1, -7], [100, 110], [0, 100, 210]),
        ([100, 300], [2**31 - 1, -4], [0, 100, 210]),
        ([100, 300], [2**31 - 1, 2**30], [0, 210, 2**31 - 1]),
        ([-(2**31), 2**30], [100, 110], [0, 210, -5]),
    ):
        problem.seq_lens_decoder = np.array(decoder, np.int32)
        problem.seq_lens_this_time = np.array(this_time, np.int32)
        problem.cu_seqlens_q = np.array(cu, np.int32)
        problem.max_seqlen_q = 110
        positional, keywords = problem.arguments("gpu")
        positional[-1] = 500
        to_numpy(F.paged_attention(*positional, **keywords))
    problem_of([(300, 100), (300, 110)], DYNAMIC[0]).check("gpu")


@pytest.mark.gpu
def test_a_graph_follows_the_lengths():
    """Replays with other lengths: sequences that take part, that do not, and that rest."""
    steps = [[(0, 100), (300, 90)], [(400, 90), (0, 20)], [(0, 0), (250, 110)]]
    kind = DYNAMIC[0]
    problems = [
        paged_problem(seqs, kind=kind, heads=HEADS, dim=128, seed=10, spans=(100, 110))
        for seqs in steps
    ]
    assert plan(kind, 128, steps[0], HEADS, max_k=600, tokens=210, operations=0)["blocks"] > 0
    _, keywords = problems[0].arguments("gpu")
    blocks = max(p.k.elements.shape[0] for p in problems)
    width = max(p.block_tables.shape[1] for p in problems)

    def padded(array, size, axis, fill=0):
        missing = [(0, size - array.shape[a] if a == axis else 0) for a in range(array.ndim)]
        return np.pad(array, missing, constant_values=fill)

    def arrays(p):
        return [
            p.q,
            padded(p.k.packed(), blocks, 0),
            padded(p.v.packed(), blocks, 0),
            padded(p.block_tables, width, 1, -1),
            p.cu_seqlens_q,
            p.seq_lens_decoder,
            p.seq_lens_this_time,
            padded(p.k.scales, blocks, 0),
            padded(p.v.scales, blocks, 0),
        ]

    tensors = [to_paddle(array, "gpu") for array in arrays(problems[0])]
    *positional, k_scales, v_scales = tensors
    keywords.update(cache_k_scales=k_scales, cache_v_scales=v_scales)

    def call():
        return F.paged_attention(*positional, 110, 600, return_softmax_lse=True, **keywords)

    call()
    with capture() as graph:
        captured = call()
    for p in problems:
        for tensor, array in zip(tensors, arrays(p)):
            tensor.copy_(to_paddle(array, "gpu"), True)
        graph.replay()
        out, lse = (to_numpy(x) for x in captured)
        p.check("gpu", results=(out, lse))
        assert_same_bits(out, to_numpy(call()[0]), "out")


def test_where_it_pays():
    seqs = [(6144, 2048)]
    for kind in DYNAMIC:
        assert plan(kind, 128, seqs, (32, 8))["blocks"] == 128
    for kind in STATIC:
        assert plan(kind, 128, seqs, (32, 8))["blocks"] == 0
        assert plan(kind, 256, seqs, (32, 8))["blocks"] == 128
        assert plan(kind, 192, seqs, (32, 8))["blocks"] == 128
    for kv in ("float8_e4m3fn", "float8_e5m2", "int8"):
        sizes = (2048, 1, 32, 8)
        for dim, blocks in ((64, 0), (96, 128), (128, 0), (192, 128), (256, 128)):
            found = host.dequantize_plan("bfloat16", kv, "ragged", *sizes, dim, 2048, 8192)
            assert found["blocks"] == blocks, (kv, dim)
    kind = DYNAMIC[0]
    none = {"blocks": 0, "table_width": 0, "min_tokens": 0, "min_rows": 0, "bytes": 0}
    for options in (
        {"q_dtype": "float16"},
        {"q_dtype": "float8_e4m3fn"},
        {"compute_major": 10},
        {"window_left": 128},
        {"batch_invariant": True},
        {"memory": 0},
    ):
        assert plan(kind, 128, seqs, (32, 8), **options)["blocks"] == 0, options
    assert plan(kind, 128, [(6144, 100)], (32, 8)) == none
    assert plan(kind, 128, [(8000, 1)] * 64, (32, 8)) == none
    # Launches would take longer than they save, whatever the bound of keys says.
    assert plan(kind, 128, [(0, 512)], (32, 8)) == none
    assert plan(kind, 128, [(0, 512)], (32, 8), max_k=32768) == none
    assert plan(kind, 128, [(0, 1024)], (32, 8)) == none
    assert plan(kind, 128, [(0, 1024)], (32, 8), max_k=32768)["blocks"] > 0


def test_room():
    """Within the memory asked for, and no more than the bounds of the call's lengths ask for."""
    kind, chunk = DYNAMIC[0], [(6144, 2048)] + [(8000, 1)] * 32
    found = plan(kind, 128, chunk, (32, 8))
    block = 64 * 8 * 2 * 128 * 2
    # As many sequences of 125 tokens as 2080 tokens can be, each as long as the longest: 512 MiB,
    # of which the block tables take some.
    assert found["min_tokens"] == 125
    assert (found["blocks"], found["table_width"]) == (16 * 128 - 1, 128)
    assert found["blocks"] * block < found["bytes"] <= 512 << 20
    assert plan(kind, 128, chunk[:1], (32, 8))["blocks"] == 128
    assert plan(kind, 128, [(131072, 2048)], (32, 8))["blocks"] == 2047
    # Rows of a table of many sequences take an eighth of the memory, at most.
    for batch, longest in ((256, 131072), (4096, 1 << 20), (65535, 1 << 20)):
        seqs = [(longest - 8192, 8192 - batch)] + [(100, 1)] * (batch - 1)
        many = (
            plan(kind, 128, seqs, (8, 1), operations=0)
            if batch < 8192
            else plan(kind, 128, [(longest - 9000, 9000)] * batch, (8, 1), operations=0)
        )
        assert 0 < many["bytes"] <= 512 << 20
        assert many["table_width"] * batch * 4 <= 64 << 20
    small = plan(kind, 128, chunk, (32, 8), memory=100 * block + 4 * 33 * (128 + 5))
    assert (small["blocks"], small["table_width"]) == (100, 100)
    huge = plan(kind, 128, [(2**30 - 2048, 2048)] * 4, (32, 8), memory=2**50, operations=0)
    assert 0 < huge["blocks"] * 64 * 8 * 2 <= 2**31
