"""Logits of the indexer, which score each key for each query token."""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified
from fastattn.functional.indexer_keys import _page_size


def _whole(op: str, name: str, value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{op}: {name}: expected int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{op}: {name}: expected at least 0, got {value}")
    return value


@unified
def mqa_logits(
    q: Tensor,
    keys: Tensor,
    weights: Tensor,
    starts: Tensor,
    ends: Tensor,
    *,
    k_scales: Tensor,
    q_scales: Tensor | None = None,
    quant: str = "fp8",
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Score contiguous keys with the indexer's queries, for prefill, chunks and cached prefixes.

    .. math:: \mathrm{logits}_{mn} = s_n \sum_h \max(q_{mh} \cdot k_n, 0)\, w_{mh}

    for keys n in ``[starts[m], ends[m])``; every other element is -inf. :math:`s_n` is the scale of
    an FP8 key; the scale of an FP8 query head is a factor of its weight. For MXFP4 operands the
    product includes the scales of their blocks. Products are exact and sums are fp32. The result
    has the same bits in every run.

    Parameters
    ----------
    q : Tensor, shape [M, H, D] ("fp8") or [M, H, D / 2] ("mxfp4"), uint8 or float8_e4m3fn
        H is a multiple of 8, at most 256. D is 64 or 128. `indexer_q_rope_quant` makes these
        queries.
    keys : Tensor, shape [N, D] or [N, D / 2], uint8 or float8_e4m3fn
        Keys of all sequences, such as keys gathered from a paged cache.
    weights : Tensor, shape [M, H], float32
    starts, ends : Tensor, shape [M], int32
        Range of keys that each query sees, clamped to [0, N]. An end before its start means an
        empty range.
    k_scales : Tensor, shape [N]
        "fp8": float32. "mxfp4": int32, whose byte b (little endian) is the UE8M0 exponent of
        channels 32b .. 32b + 31.
    q_scales : Tensor, shape [M, H], int32, optional
        Scales of "mxfp4" queries, in the form of `k_scales`.
    quant : {"fp8", "mxfp4"}
        Format of queries and keys.
    max_seqlen_k : int, optional
        Number of columns of the result; column j is then key ``starts[m] + j``. Default: column n
        is key n.
    out : Tensor, shape [M, N] or [M, max_seqlen_k], float32, optional
        Written in place and returned. Any row stride.

    Returns
    -------
    Tensor, shape [M, N] or [M, max_seqlen_k], float32

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or `max_seqlen_k` is not an integer.
    ValueError
        If shapes do not match, `quant` is unknown, or `out` shares memory with an input.
    NotImplementedError
        If the number of heads or channels is not supported.

    See Also
    --------
    fastattn.reference.mqa_logits : the same in NumPy, in fp64.
    topk_indices : selects from the result.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import mqa_logits
    >>> q = paddle.full([1, 8, 64], 56, "uint8")  # e4m3 of 1
    >>> keys = paddle.full([3, 64], 48, "uint8")  # of 0.5
    >>> logits = mqa_logits(
    ...     q,
    ...     keys,
    ...     paddle.ones([1, 8]),
    ...     paddle.to_tensor([0], "int32"),
    ...     paddle.to_tensor([2], "int32"),
    ...     k_scales=paddle.to_tensor([1.0, 2.0, 3.0]),
    ... )
    >>> logits.tolist()
    [[256.0, 512.0, -inf]]
    """
    # A traced program needs the shape before the operator runs. -1 means as many columns as keys.
    columns = -1 if max_seqlen_k is None else _whole("mqa_logits", "max_seqlen_k", max_seqlen_k)
    # `logits` shares its memory with a given `out`.
    logits, _ = _ops.call(
        "mqa_logits",
        (q, keys, k_scales, weights, starts, ends, q_scales, out),
        (columns, quant),
    )
    return logits


@unified
def paged_mqa_logits(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_context_len: int,
    *,
    q_scales: Tensor | None = None,
    quant: str = "fp8",
    page_size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Score a paged cache of index keys with the queries of a decode step.

    The logits are the same as in :func:`mqa_logits`. Row ``b * next_n + j`` is query j of sequence
    b. Elements past a row's length are -inf, and so are elements of an unassigned page: an id
    outside [0, num_pages), or a position past `max_blocks`.

    Parameters
    ----------
    q : Tensor, shape [B, next_n, H, D] or [B, next_n, H, D / 2], uint8 or float8_e4m3fn
        As in :func:`mqa_logits`. next_n is at least 1: the new token and its draft tokens.
    cache : Tensor, shape [num_pages, page_bytes], uint8
        Further dimensions are allowed (for example [num_pages, 64, 132] or [num_pages, 64, 1,
        132]). A page holds the codes of its tokens, then 4 bytes of scales for each token
        (``docs/formats.md``). Pages may have any stride.
    weights : Tensor, shape [B * next_n, H], float32
    context_lens : Tensor, shape [B] or [B, next_n], int32
        Number of keys that each row sees. 1-D: the length of the sequence with all new tokens. The
        last query sees all of it; query j sees ``context_lens[b] - next_n + 1 + j`` keys. 2-D: one
        length per row. A length of 0 or less means no keys. Lengths are clamped to
        `max_context_len`.
    block_tables : Tensor, shape [>= B, max_blocks], int32
        Pages of each sequence.
    max_context_len : int
        Number of columns of the result.
    q_scales : Tensor, shape [B, next_n, H], int32, optional
        Scales of "mxfp4" queries, as in :func:`mqa_logits`.
    quant : {"fp8", "mxfp4"}
    page_size : int, optional
        Tokens of a page. Default: the second dimension of a cache that has at least three.
    out : Tensor, shape [B * next_n, max_context_len], float32, optional
        Written in place and returned. Any row stride.

    Returns
    -------
    Tensor, shape [B * next_n, max_context_len], float32

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a number is not an integer.
    ValueError
        If shapes do not match, pages are too small, `quant` is unknown, or `out` shares memory with
        an input.
    NotImplementedError
        If the number of heads or channels is not supported.

    See Also
    --------
    fastattn.reference.paged_mqa_logits : the same in NumPy, in fp64.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import paged_mqa_logits
    >>> cache = paddle.zeros([1, 64 * 132], "uint8")
    >>> logits = paged_mqa_logits(
    ...     paddle.full([1, 1, 8, 128], 56, "uint8"),
    ...     cache.reshape([1, 64, 132]),
    ...     paddle.ones([1, 8]),
    ...     paddle.to_tensor([2], "int32"),
    ...     paddle.to_tensor([[0]], "int32"),
    ...     3,
    ... )
    >>> logits.tolist()
    [[0.0, 0.0, -inf]]
    """
    op = "paged_mqa_logits"
    page_size = _page_size(op, cache, page_size)
    if _ops.is_tensor(q) and len(q.shape) != 4:
        raise ValueError(f"{op}: q: expected 4 dimensions, got shape {list(q.shape)}")
    logits, _ = _ops.call(
        op,
        (q, cache, weights, context_lens, block_tables, q_scales, out),
        (_whole(op, "max_context_len", max_context_len), page_size, quant),
    )
    return logits
