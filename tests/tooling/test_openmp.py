"""The bits of a CPU kernel do not depend on the number of OpenMP threads.

The rest of the suite runs with one OpenMP thread a process (scripts/test.sh). Each call here is
large enough for several of them (custom_ops/cpu/parallel.h).
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import fastattn.functional as F
from tests.support import mla_dense, mla_sparse
from tests.support.attention import CACHE_KINDS, PLAIN, flash_problem, paged_problem
from tests.support.cache import make_cache, make_step, make_values, write
from tests.support.compare import assert_same_bits
from tests.support.mqa_logits import Codes, weights_of
from tests.support.rope import make_case
from tests.support.rope import run as write_rotated
from tests.support.sparse import sparse_problem
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

THREADS = (1, 2, 3, 7)
KINDS = [PLAIN, *CACHE_KINDS[4::4], CACHE_KINDS[-1]]


def _values(*shape: int, dtype=np.float16, seed: int = 0):
    return to_paddle(np.random.default_rng(seed).normal(size=shape).astype(dtype), "cpu")


def _quantize():
    x = _values(1024, 4096)
    return [*F.quantize_fp8(x), *F.quantize_fp8(x, granularity="token"), *F.mxfp4_quantize(x)]


def _merge():
    lses = [_values(8, 4096, dtype=np.float32, seed=i) for i in range(2)]
    outs = [_values(4096, 8, 128, seed=i + 2) for i in range(2)]
    many = _values(3, 2048, 8, 128, seed=4), _values(3, 8, 2048, dtype=np.float32, seed=5)
    return [
        *F.merge_attn_states(outs[0], lses[0], outs[1], lses[1]),
        *F.merge_many_attn_states(*many),
    ]


def _flash():
    return flash_problem([(1, 20000), (130, 130), (0, 0), (3, 4000)], q_type="float16").run("cpu")


def _paged(kind):
    return paged_problem([(9000, 1), (3, 1), (0, 130)], heads=(4, 2), kind=kind, dim=128).run("cpu")


def _write(cache_quant_type):
    step, blocks = make_step([3, 0, 70], [2000, 1, 1500])
    cache = make_cache(cache_quant_type, blocks, 4, 128)
    tokens = [make_values((step.num_tokens, 4, 128), BF16, seed) for seed in (0, 1)]
    written = write(cache, *tokens, step, "cpu")
    return [
        x for x in (written.key, written.value, written.k_scales, written.v_scales) if x is not None
    ]


def _rotate_and_write():
    qkv, quantized, cache = write_rotated(
        make_case([5, 900], [3500, 1], heads=8, max_seq=4096), "cpu"
    )
    return [x for x in (qkv, quantized, cache.key, cache.value) if x is not None]


def _sparse(kind):
    problem = sparse_problem(
        [(3000, 3), (500, 9), (0, 0)], kind=kind, groups=2, granularity=16, width=90, window=20
    )
    return problem.run("cpu")


def _mla():
    return mla_dense.Problem([3000, 5, 0], [1, 3, 40]).run()


def _mla_sparse():
    lengths = np.random.default_rng(1).integers(0, 300, 70)
    return mla_sparse.make_problem(0, "fp8_656", 16, lengths, 300).run("cpu")


def _logits(quant):
    rng = np.random.default_rng(0)
    rows, keys, heads, dim = 40, 3000, 8, 128
    q, k = Codes(rng, (rows, heads), dim, quant), Codes(rng, (keys,), dim, quant)
    scales = {} if quant == "fp8" else {"q_scales": to_paddle(q.scales, "cpu")}
    starts = int32(np.arange(rows), "cpu")
    ends = int32(keys - np.arange(rows), "cpu")
    logits = F.mqa_logits(
        to_paddle(q.codes, "cpu"),
        to_paddle(k.codes, "cpu"),
        to_paddle(weights_of(rng, rows, heads), "cpu"),
        starts,
        ends,
        k_scales=to_paddle(k.scales, "cpu"),
        quant=quant,
        **scales,
    )
    return [
        logits,
        F.topk_indices(_values(256, 20000, dtype=np.float32), int32([19999] * 256, "cpu"), 512),
    ]


CALLS = {
    "quantize": _quantize,
    "merge": _merge,
    "flash_attention": _flash,
    **{f"paged_attention-{kind}": lambda kind=kind: _paged(kind) for kind in KINDS},
    **{
        f"write_cache_kv-{name}": lambda name=name: _write(name)
        for name in (
            *("none", "cache_int8", "block_wise_fp8", "block_wise_int4", "block_wise_mxfp4"),
            *("block_wise_k8v4", "block_wise_kfp8v4"),
        )
    },
    "rope_write_cache_kv": _rotate_and_write,
    **{
        f"sparse_paged_attention-{kind}": lambda kind=kind: _sparse(kind)
        for kind in KINDS
        if kind.code_of("k") == kind.code_of("v")
    },
    "mla_attention": _mla,
    "mla_sparse_attention": _mla_sparse,
    "mqa_logits-fp8": lambda: _logits("fp8"),
    "mqa_logits-mxfp4": lambda: _logits("mxfp4"),
}


@pytest.fixture
def openmp():
    try:
        library = ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("not built with GNU OpenMP")
    threads = library.omp_get_max_threads()
    yield library
    library.omp_set_num_threads(threads)


@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_number_of_threads(openmp, name):
    results = {}
    for threads in THREADS:
        openmp.omp_set_num_threads(threads)
        results[threads] = [x if isinstance(x, np.ndarray) else to_numpy(x) for x in CALLS[name]()]
    for threads in THREADS[1:]:
        assert len(results[threads]) == len(results[1])
        for i, (got, want) in enumerate(zip(results[threads], results[1])):
            assert_same_bits(got, want, f"{threads} threads, result {i}")
