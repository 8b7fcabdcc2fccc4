"""A token's output on the CPU has the same bits however its sequence was cut into steps."""

from __future__ import annotations

import ctypes
import dataclasses
import os

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import _ops
from tests.support.compare import assert_same_bits
from tests.support.cuts import CACHES, Sequence, Served, Step, draw_sequence, draw_steps
from tests.support.tensors import to_numpy, to_paddle

AVX512 = 2


def check(got: Served, wanted: Served, what: str) -> None:
    assert_same_bits(got.out, wanted.out, f"{what}: out")
    assert_same_bits(got.lse, wanted.lse, f"{what}: lse")
    for i, (a, b) in enumerate(zip(got.stored, wanted.stored)):
        assert_same_bits(a, b, f"{what}: stored {i}")


def cut(tokens: int, chunk: int) -> list[Step]:
    return [Step(min(chunk, tokens - at)) for at in range(0, tokens, chunk)]


def run_trial(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seq = draw_sequence(rng)
    tokens = len(seq.q)
    wanted = seq.serve([Step(tokens)], seed=seed)
    for again in range(2):
        steps = draw_steps(rng, tokens)
        what = f"seed {seed}: {seq.cache}, {seq.q.shape}, {[*seq.options]}, {steps[:6]}"
        check(seq.serve(steps, seed=seed + 1 + again), wanted, what)


@pytest.mark.parametrize("seed", range(0, 120, 10))
def test_random_cuts(seed):
    for i in range(seed, seed + 10):
        run_trial(i)


@pytest.mark.slow
def test_many_random_cuts():
    """Two cuts a trial; FASTATTN_CUTS is the number of trials."""
    for i in range(10_000, 10_000 + int(os.environ.get("FASTATTN_CUTS", "1000"))):
        run_trial(i)


@pytest.fixture
def limit():
    set_limit = ctypes.CDLL(str(_ops.library_path())).fastattn_limit_isa
    yield set_limit
    set_limit(AVX512)


@pytest.mark.parametrize("isa", range(3), ids=["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_every_instruction_set(limit, isa, cache):
    if limit(isa) != isa:
        pytest.skip("this processor does not have it")
    seq = dataclasses.replace(draw_sequence(np.random.default_rng(5), 333), cache=cache)
    seq = dataclasses.replace(seq, cache_options={}, options={"window_size": (150, 0)})
    wanted = seq.serve([Step(333)])
    for chunk in (1, 7, 64, 100):
        check(seq.serve(cut(333, chunk), seed=chunk), wanted, f"chunks of {chunk}")


def long_sequence(cache) -> Sequence:
    rng = np.random.default_rng(8)
    seq = draw_sequence(rng, 64)
    shapes = {"q": (4, 64), "k": (2, 64), "v": (2, 64)}
    arrays = {n: rng.standard_normal((4500, *s)).astype(seq.q.dtype) for n, s in shapes.items()}
    return Sequence(**arrays, cache=cache, cache_options={}, options={})


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_sequences_of_several_splits(cache):
    """Splits of 2048 keys: a chunk of many rows takes all of them, few rows are split up."""
    seq = long_sequence(cache)
    wanted = seq.serve([Step(4500)])
    ends = [Step(2030), *[Step(1)] * 40, *[Step(9, 2)] * 4, Step(1900), *[Step(1)] * 70]
    ends.append(Step(4500 - sum(step.accepted for step in ends)))
    check(seq.serve(ends, seed=1), wanted, "several kinds of steps")
    check(seq.serve(cut(4500, 1000), seed=2), wanted, "chunks of 1000")


def test_quantised_queries():
    """Scales of a token and head: they come from the token alone."""
    seq = draw_sequence(np.random.default_rng(3), 200)
    seq = dataclasses.replace(seq, cache=("cache_fp8", "head"), cache_options={})
    seq = dataclasses.replace(seq, options={"quantize_q": True})
    wanted = seq.serve([Step(200)])
    check(seq.serve(cut(200, 1), seed=1), wanted, "token by token")
    check(seq.serve(cut(200, 33), seed=2), wanted, "chunks of 33")


def test_another_order_of_the_keys_is_seen():
    """The same softmax in two parts, merged: equal to rounding, and the comparison tells."""
    seq = dataclasses.replace(draw_sequence(np.random.default_rng(4), 256), cache=("none", ""))
    seq = dataclasses.replace(seq, cache_options={}, options={"out_dtype": "float32"})
    q, k, v = (to_paddle(x, "cpu") for x in (seq.q, seq.k, seq.v))
    cu = to_paddle(np.array([0, 256], np.int32), "cpu")

    def attend(first: int, last: int):
        part = to_paddle(np.array([0, last - first], np.int32), "cpu")
        return F.flash_attention(
            q, k[first:last], v[first:last], cu, part, 256, last - first,
            causal=False, return_softmax_lse=True, out_dtype="float32",
        )  # fmt: skip

    whole, whole_lse = attend(0, 256)
    (left, left_lse), (right, right_lse) = attend(0, 100), attend(100, 256)
    merged, _ = F.merge_attn_states(left, left_lse, right, right_lse)
    got, wanted = to_numpy(merged), to_numpy(whole)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    served = Served(wanted, to_numpy(whole_lse), [])
    check(served, served, "itself")
    with pytest.raises(AssertionError, match=r"out: \d+ of \d+ elements differ"):
        check(served._replace(out=got), served, "another order")
