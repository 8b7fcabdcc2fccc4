"""The indexer's selection of keys: logits and top-k in one call, without a matrix of all logits."""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified
from fastattn.functional.indexer_keys import _page_size
from fastattn.functional.mqa_logits import _whole
from fastattn.functional.topk import MAX_K

#: Bytes of logits that exist at the same time.
WORKSPACE_BYTES = 1 << 27


def _check_sizes(op: str, k: Any, workspace_bytes: Any) -> None:
    if type(k) is not int or type(workspace_bytes) is not int:
        name, value = ("k", k) if type(k) is not int else ("workspace_bytes", workspace_bytes)
        raise TypeError(f"{op}: {name}: expected int, got {type(value).__name__}")
    if not 1 <= k <= MAX_K:  # a traced program needs the shape before the operator runs
        raise ValueError(f"{op}: k: expected 1 to {MAX_K}, got {k}")


@unified
def indexer_topk(
    q: Tensor,
    keys: Tensor,
    weights: Tensor,
    starts: Tensor,
    ends: Tensor,
    k: int,
    *,
    k_scales: Tensor,
    q_scales: Tensor | None = None,
    quant: str = "fp8",
    max_seqlen_k: int | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    out: Tensor | None = None,
) -> Tensor:
    """Indices of the k keys with the largest logits of each query, over contiguous keys.

    The indices are the same, bit for bit, as from :func:`mqa_logits` and then :func:`topk_indices`
    over each query's range. Queries are scored one tile at a time: 4096 queries over 128k keys need
    128 MiB of logits instead of 2 GiB.

    Parameters
    ----------
    q : Tensor, shape [M, H, D] ("fp8") or [M, H, D / 2] ("mxfp4"), uint8 or float8_e4m3fn
    keys : Tensor, shape [N, D] or [N, D / 2], uint8 or float8_e4m3fn
    weights : Tensor, shape [M, H], float32
    starts, ends : Tensor, shape [M], int32
        Range of keys that each query sees, clamped to [0, N]. An end before its start means an
        empty range.
    k : int
        1 to 4096.
    k_scales : Tensor, shape [N], float32 ("fp8") or int32 ("mxfp4")
    q_scales : Tensor, shape [M, H], int32, optional
        Scales of "mxfp4" queries.
    quant : {"fp8", "mxfp4"}
    max_seqlen_k : int, optional
        Maximum number of keys of a range. A longer range is cut. With it, a row of the workspace
        has the length of a range instead of all keys.
    workspace_bytes : int
        Upper limit of the bytes of logits. Logits of 32 queries are always kept together, even
        beyond it.
    out : Tensor, shape [M, k], int32, contiguous, optional
        Written in place and returned.

    Returns
    -------
    Tensor, shape [M, k], int32
        Indices relative to the (clamped) start, ascending. A range with fewer than k keys ends in
        -1.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a number is not an integer.
    ValueError
        If shapes do not match, `k` or a size is out of range, `quant` is unknown, or `out` shares
        memory with an input.
    NotImplementedError
        If the number of heads or channels is not supported.

    See Also
    --------
    fastattn.reference.indexer_topk : the same in NumPy, with fp64 logits.
    paged_indexer_topk : over a paged cache.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import indexer_topk
    >>> q = paddle.full([1, 8, 64], 56, "uint8")  # e4m3 of 1
    >>> keys = paddle.full([4, 64], 48, "uint8")  # of 0.5
    >>> indices = indexer_topk(
    ...     q,
    ...     keys,
    ...     paddle.ones([1, 8]),
    ...     paddle.to_tensor([1], "int32"),
    ...     paddle.to_tensor([4], "int32"),
    ...     2,
    ...     k_scales=paddle.to_tensor([9.0, 3.0, 1.0, 2.0]),
    ... )
    >>> indices.tolist()
    [[0, 2]]
    """
    op = "indexer_topk"
    _check_sizes(op, k, workspace_bytes)
    columns = -1 if max_seqlen_k is None else _whole(op, "max_seqlen_k", max_seqlen_k)
    # `indices` shares its memory with a given `out`.
    indices, _ = _ops.call(
        op,
        (q, keys, k_scales, weights, starts, ends, q_scales, out),
        (k, columns, workspace_bytes, quant),
    )
    return indices


@unified
def paged_indexer_topk(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_context_len: int,
    k: int,
    *,
    q_scales: Tensor | None = None,
    quant: str = "fp8",
    page_size: int | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    out: Tensor | None = None,
) -> Tensor:
    """Indices of the k keys with the largest logits of each query, over a paged cache of index
    keys.

    The indices are the same, bit for bit, as from :func:`paged_mqa_logits` and then
    :func:`topk_indices` over each row's length. Keys of an unassigned page rank after all others.

    Parameters
    ----------
    q : Tensor, shape [B, next_n, H, D] or [B, next_n, H, D / 2], uint8 or float8_e4m3fn
    cache : Tensor, shape [num_pages, page_bytes], uint8
        As for :func:`paged_mqa_logits`.
    weights : Tensor, shape [B * next_n, H], float32
    context_lens : Tensor, shape [B] or [B, next_n], int32
        Number of keys that each row sees. 1-D: query j sees ``context_lens[b] - next_n + 1 + j``
        keys.
    block_tables : Tensor, shape [>= B, max_blocks], int32
    max_context_len : int
        Maximum number of keys of a row. A longer row is cut.
    k : int
        1 to 4096.
    q_scales : Tensor, shape [B, next_n, H], int32, optional
        Scales of "mxfp4" queries.
    quant : {"fp8", "mxfp4"}
    page_size : int, optional
        Tokens of a page. Default: the second dimension of a cache that has at least three.
    workspace_bytes : int
        Upper limit of the bytes of logits. Logits of 32 queries are always kept together, even
        beyond it.
    out : Tensor, shape [B * next_n, k], int32, contiguous, optional
        Written in place and returned.

    Returns
    -------
    Tensor, shape [B * next_n, k], int32
        Positions in the sequence, ascending; A row with fewer than k keys ends in -1.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a number is not an integer.
    ValueError
        If shapes do not match, pages are too small, `k` or a size is out of range, `quant` is
        unknown, or `out` shares memory with an input.
    NotImplementedError
        If the number of heads or channels is not supported.

    See Also
    --------
    fastattn.reference.paged_indexer_topk : the same in NumPy, with fp64 logits.
    topk_to_slots : turns positions into slots of the cache.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import paged_indexer_topk
    >>> cache = paddle.zeros([1, 64, 132], "uint8")
    >>> indices = paged_indexer_topk(
    ...     paddle.full([1, 1, 8, 128], 56, "uint8"),
    ...     cache,
    ...     paddle.ones([1, 8]),
    ...     paddle.to_tensor([2], "int32"),
    ...     paddle.to_tensor([[0]], "int32"),
    ...     64,
    ...     3,
    ... )
    >>> indices.tolist()
    [[0, 1, -1]]
    """
    op = "paged_indexer_topk"
    _check_sizes(op, k, workspace_bytes)
    if _ops.is_tensor(q) and len(q.shape) != 4:
        raise ValueError(f"{op}: q: expected 4 dimensions, got shape {list(q.shape)}")
    indices, _ = _ops.call(
        op,
        (q, cache, weights, context_lens, block_tables, q_scales, out),
        (
            k,
            _whole(op, "max_context_len", max_context_len),
            _page_size(op, cache, page_size),
            workspace_bytes,
            quant,
        ),
    )
    return indices
