"""Attention by the kernel of every instruction set that this processor has."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from fastattn import _ops
from tests.support.attention import CACHE_KINDS, FEW_KINDS, flash_problem, paged_problem

BASELINE, AVX2, AVX512 = range(3)
#: More rows of Q than a register block, and fewer; whole blocks, and parts of one.
SEQS = [(0, 65), (320, 63), (0, 0), (64, 1), (1, 64), (130, 2), (2100, 1)]


@pytest.fixture(params=[BASELINE, AVX2, AVX512], ids=["baseline", "avx2", "avx512"])
def isa(request):
    limit = ctypes.CDLL(str(_ops.library_path())).fastattn_limit_isa
    try:
        if limit(request.param) != request.param:
            pytest.skip("this processor does not have it")
        yield request.param
    finally:
        limit(AVX512)


def test_the_limit_is_what_the_processor_has(isa):
    limit = ctypes.CDLL(str(_ops.library_path())).fastattn_limit_isa
    assert [limit(i) for i in range(isa + 1)] == list(range(isa + 1))


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", CACHE_KINDS[::2], ids=str)
def test_paged_attention(isa, kind, dim):
    paged_problem(SEQS, kind=kind, dim=dim).check("cpu")


@pytest.mark.parametrize("kind", FEW_KINDS[1:], ids=str)
def test_fp8_queries_and_options(isa, kind):
    sinks = np.array([0.4, -3.0, 2.5, 0.0], np.float32)
    options = {"sinks": sinks, "softcap": 2.0, "window_size": (65, -1)}
    paged_problem(SEQS, kind=kind, q_type="e4m3:token_head", **options).check("cpu")


@pytest.mark.parametrize("letter", ["k", "v"])
@pytest.mark.parametrize("kind", FEW_KINDS[::2], ids=str)
def test_a_visible_nan(isa, kind, letter):
    problem = paged_problem(SEQS, kind=kind)
    problem.poison(letter, 1, 350)
    out, _ = problem.check("cpu")
    hidden = 65 + 350 - 320  # the first query that sees it
    nan = np.isnan(out.astype(np.float32)).any(axis=(1, 2))
    assert nan[hidden : 65 + 63].all() and nan.sum() == 65 + 63 - hidden


@pytest.mark.parametrize("types", [("bfloat16", "bfloat16"), ("float32", "float32"),
                                   ("e4m3:tensor", "e4m3"), ("float16", "e5m2"),
                                   ("bfloat16", "int8")], ids="-".join)  # fmt: skip
def test_flash_attention(isa, types):
    seqs = [(65, 75), (0, 3), (1, 300), (66, 64)]
    flash_problem(seqs, q_type=types[0], kv_type=types[1], causal=True).check("cpu")
