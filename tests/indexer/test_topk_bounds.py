"""Top-k does not depend on the bound of lengths, nor does a CPU's memory; bounds of numbers."""

from __future__ import annotations

import textwrap

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from tests.support import fresh
from tests.support.tensors import int32, to_numpy


def paged(bound, lengths, next_n=1, **extra):
    """Keys of one channel, whose values are the logits: scores follow from their positions."""
    rng = np.random.default_rng(3)
    batch, pages, size = len(lengths), 4, 64
    cache = np.zeros((batch * pages, size * 132), np.uint8)
    scores = rng.permutation(batch * pages * size).astype(np.float32).reshape(batch, -1) + 1
    codes = cache[:, : size * 128].reshape(-1, size, 128)
    codes[..., 0] = 0x38  # 1 as e4m3
    cache[:, size * 128 :] = scores.reshape(-1, size).view(np.uint8)
    q = np.zeros((batch, next_n, 8, 128), np.uint8)
    q[..., 0, 0] = 0x38
    weights = np.ones((batch * next_n, 8), np.float32)
    tables = np.arange(batch * pages).reshape(batch, pages)
    result = F.paged_indexer_topk(
        paddle.to_tensor(q),
        paddle.to_tensor(cache.reshape(-1, size, 132)),
        paddle.to_tensor(weights),
        int32(lengths),
        int32(tables),
        bound,
        4,
        **extra,
    )
    return to_numpy(result), scores


@pytest.mark.parametrize("bound", [100, 256, 2**20])
@pytest.mark.parametrize("lengths", [[0, 0], [3, 256], [100, 1], [7, 90]])
@pytest.mark.parametrize("next_n", [1, 2])
def test_any_bound_of_the_lengths(bound, lengths, next_n):
    found, scores = paged(bound, lengths, next_n)
    for row, indices in enumerate(found):
        sequence, step = divmod(row, next_n)
        size = min(max(lengths[sequence] - next_n + step + 1, 0), bound)
        best = np.sort(np.argsort(-scores[sequence, :size])[:4])
        assert indices.tolist() == [*best, *[-1] * (4 - len(best))]


def test_a_large_bound_takes_no_memory():
    """32 rows of 2^30 columns would have 128 GiB of logits."""
    code = """
        import resource
        from tests.indexer.test_topk_bounds import paged
        paged(256, [5, 200])
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (256 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        found, scores = paged(2**30, [5, 200])
        assert found.tolist() == paged(256, [5, 200])[0].tolist()
    """
    process = fresh.run(textwrap.dedent(code))
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("relative", [False, True])
def test_ragged_rows_of_several_lengths(relative):
    rng = np.random.default_rng(5)
    scores = rng.permutation(500).astype(np.float32) + 1
    keys, q = np.zeros((500, 128), np.uint8), np.zeros((4, 8, 128), np.uint8)
    keys[:, 0] = q[:, 0, 0] = 0x38
    starts, ends = [0, 400, 10, 30], [3, 480, 10, 300]
    bound = {"max_seqlen_k": 2**20} if relative else {}
    found = F.indexer_topk(
        paddle.to_tensor(q),
        paddle.to_tensor(keys),
        paddle.ones([4, 8]),
        int32(starts),
        int32(ends),
        4,
        k_scales=paddle.to_tensor(scores),
        **bound,
    )
    for indices, start, end in zip(to_numpy(found), starts, ends):
        best = np.sort(np.argsort(-scores[start:end])[:4])
        assert indices.tolist() == [*best, *[-1] * (4 - len(best))]


@pytest.mark.parametrize("tile", [0, -1, 65, 2**31])
def test_one_upper_bound_of_tile(tile):
    with pytest.raises(ValueError, match=f"query_rows: tile: expected 1 to 64, got {tile}"):
        F.query_rows(int32([0]), int32([0]), int32([[1]]), int32([0, 1]), tile=tile)


@pytest.mark.parametrize("scale", [3e38, -3e38, 2.4e38])
def test_a_softmax_scale_that_overflows(scale):
    """Times log2(e), as kernels have it, it would be infinite, and the output NaN."""
    q, cache = paddle.ones([1, 4, 64], "bfloat16"), paddle.ones([1, 4, 64, 64], "bfloat16")
    latent = paddle.ones([1, 4, 576], "bfloat16"), paddle.ones([1, 64, 576], "bfloat16")
    seqs = int32([[0]]), int32([0, 1]), int32([0]), int32([1])
    text = "softmax_scale: expected a magnitude below 2.3"
    for call in (
        lambda: F.flash_attention(q, q, q, seqs[1], seqs[1], 1, 1, softmax_scale=scale),
        lambda: F.paged_attention(q, cache, cache, *seqs, 1, 1, softmax_scale=scale),
        lambda: F.mla_attention(*latent, *seqs, 1, 1, softmax_scale=scale, cache_format="bf16"),
        lambda: F.mla_sparse_attention(
            *latent, int32([[0]]), softmax_scale=scale, cache_format="bf16"
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()
