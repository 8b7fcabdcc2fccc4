"""Summaries of blocks of keys, and the choice of blocks by them."""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import check_int
from fastattn.functional._cache_types import operator_cache_type
from fastattn.functional._marker import unified
from fastattn.functional.topk import MAX_K


@unified
def update_block_summaries(
    summaries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    *,
    granularity: int,
    kind: str = "mean",
    pool_weights: Tensor | None = None,
    cache_k_scales: Tensor | None = None,
    cache_v_scales: Tensor | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    k_rotation: str = "none",
    k_center: Tensor | None = None,
    k_feedback: Tensor | None = None,
) -> Tensor:
    r"""Update the summaries of a layer's key blocks after a step's keys were written.

    A key block is `granularity` tokens of a sequence, counted from its start. Its summary stands
    for its keys k_0 .. k_{n-1} when :func:`select_key_blocks` chooses blocks. It has for each KV
    head and channel

    - ``mean``: :math:`\frac1n\sum_t k_t`, as MoBA does (arXiv:2502.13189),
    - ``minmax``: :math:`\min_t k_t` and :math:`\max_t k_t`, as Quest does (arXiv:2406.10774),
    - ``pooled``: :math:`\sum_t w_t k_t` with learned weights, as the attention gate of FastDeploy's
      PLAS does.

    The call follows :func:`write_cache_kv` or :func:`rope_write_cache_kv` with the same lengths. It
    makes each summary with new tokens anew, from all keys that the block has now.

    Parameters
    ----------
    summaries : Tensor, shape [num_blocks, KV, n, rows, D], float32 or bfloat16
        Written in place. A physical block has n = 64 / `granularity` summaries, and 1 for a
        `granularity` of 128. `rows` is 2 for ``minmax``, the least ahead of the largest, and else
        1. Contents need no start value.
    key_cache : Tensor, shape [num_blocks, KV, 64, D]
        The keys, already written.
    value_cache : Tensor, shape [num_blocks, KV, D, 64]
        Checked and not read. Both are as in :func:`write_cache_kv`.
    block_tables : Tensor, shape [B, max_blocks], int32
    cu_seqlens_q : Tensor, shape [B + 1], int32
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        The step that wrote the keys, as in :func:`write_cache_kv`.
    granularity : {16, 32, 64, 128}
        Tokens of a key block.
    kind : {"mean", "minmax", "pooled"}
    pool_weights : Tensor, shape [KV, granularity, D], float32, optional
        Weights of ``pooled``, by a token's place in its key block.
    cache_k_scales, cache_v_scales : Tensor, float32, bfloat16 or uint8, optional
        Dequantisation multipliers, as in :func:`paged_attention`.
    cache_quant_type : str
        ``none``, ``cache_int8`` (or ``int8``), ``cache_fp8`` (or ``float8_e4m3fn``),
        ``block_wise_int8``, ``block_wise_fp8``, ``block_wise_int4``, ``block_wise_mxfp4``,
        ``block_wise_k8v4`` or ``block_wise_kfp8v4``.
    fp8_format : {"e4m3", "e5m2"}
        Format of the codes of ``cache_fp8``.
    k_rotation : {"none", "hadamard"}
    k_center : Tensor, shape [KV, D], float32, optional
        What was done to K before it was stored, as in :func:`write_cache_kv`. It is undone, so that
        summaries are those of keys as the model made them, and queries need no rotation.
    k_feedback : Tensor, optional
        Not read. It is here so that the writer and this call take the same ``arguments`` of
        :func:`make_cache`.

    Returns
    -------
    Tensor
        `summaries` itself.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes or places do not match, scales or weights are missing or superfluous, or an option
        is out of range.
    NotImplementedError
        If `cache_quant_type` or the head dimension is not supported, or another argument does not
        go with `k_rotation` or `k_center`. Supported head dimensions are 64, 96, 128, 192 and 256.

    Notes
    -----
    Keys are read from the cache and not from the step's tensors. So a summary stands for the keys
    that attention sees, rounded as they are stored. Its bits do not depend on how the sequence was
    cut into steps: a key block's keys are always added in the order of the tokens. The same call
    repairs the summaries after rejected draft tokens, and makes those of a prefix that came from
    elsewhere (with `seq_lens_decoder` 0 and all of its tokens as new ones). The price is that a
    step reads up to ``min(granularity, 64) - 1`` earlier keys of each sequence once more.

    A summary belongs to a physical block, so sequences that share a prefix share its summaries. A
    key block of 128 tokens has one in each of its two physical blocks. A block that is not assigned
    is left out. A NaN in a key is a NaN in its summary.

    See Also
    --------
    select_key_blocks : reads the summaries.
    fastattn.reference.update_block_summaries : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import update_block_summaries, write_cache_kv
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> caches = [paddle.zeros([1, 1, 64, 64], "bfloat16") for _ in range(2)]
    >>> k = paddle.arange(20).astype("bfloat16").reshape([20, 1, 1]).expand([20, 1, 64])
    >>> step = int32([[0]]), int32([0, 20]), int32([0]), int32([20])
    >>> _ = write_cache_kv(k, k, *caches, *step)
    >>> summaries = paddle.zeros([1, 1, 4, 1, 64])
    >>> _ = update_block_summaries(summaries, *caches, *step, granularity=16)
    >>> summaries[0, 0, :, 0, 0].tolist()
    [7.5, 17.5, 0.0, 0.0]
    """
    inputs = (
        summaries,
        key_cache,
        value_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        cache_k_scales,
        cache_v_scales,
        pool_weights,
        k_center,
    )
    attrs = (
        granularity,
        kind,
        operator_cache_type("update_block_summaries", cache_quant_type),
        fp8_format,
        k_rotation,
    )
    result: Any = _ops.call("update_block_summaries", inputs, attrs)[0]
    return result


@unified
def select_key_blocks(
    q: Tensor,
    summaries: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    k: int,
    *,
    granularity: int,
    kind: str = "mean",
    reduction: str = "max",
    first_blocks: int = 0,
    last_blocks: int = 1,
    q_descale: Tensor | None = None,
) -> Tensor:
    r"""Choose k key blocks for each new token and KV head, by the summaries of the blocks.

    The result is the `selected` of :func:`sparse_paged_attention`. A query at position p sees the
    key blocks up to its own, ``p // granularity``. Its list has the first ones, the last ones up to
    its own, and of those between the ones with the largest scores. With q_h the KV head's query
    heads and s the summary, the score is

    .. math:: \max_h q_h \cdot s \quad\text{or}\quad \sum_h q_h \cdot s

    For ``minmax``, :math:`\sum_d \max(q_{hd} \min_d, q_{hd} \max_d)` takes the place of
    :math:`q_h \cdot s`. No key of the block has a larger inner product with q_h, up to rounding:
    bfloat16 summaries are rounded to nearest.

    Parameters
    ----------
    q : Tensor, shape [T, H, D], float32, float16, bfloat16, or uint8 / float8_e4m3fn (e4m3 codes)
        Queries as :func:`sparse_paged_attention` gets them: not rotated by a cache's `k_rotation`.
    summaries : Tensor, shape [num_blocks, KV, n, rows, D], float32 or bfloat16
        As :func:`update_block_summaries` wrote them for this step.
    block_tables : Tensor, shape [B, max_blocks], int32
    cu_seqlens_q : Tensor, shape [B + 1], int32
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        As in :func:`paged_attention`. Nothing else is needed of lengths.
    k : int
        Entries of a list, 1 to 4096, `first_blocks` and `last_blocks` included.
    granularity : {16, 32, 64, 128}
    kind : {"mean", "minmax", "pooled"}
        As the summaries were made.
    reduction : {"max", "sum"}
        How the scores of the query heads of a KV head become one.
    first_blocks : int
        Blocks at the start of the sequence that every query takes.
    last_blocks : int
        The same up to the query, its own block included; at least 1. The own block is always taken,
        because its summary may have tokens after the query.
    q_descale : Tensor, shape [1], [B, KV] or [T, H], float32 or bfloat16, optional
        Dequantisation multipliers of e4m3 queries. Default: 1.

    Returns
    -------
    Tensor, shape [T, KV, k], int32
        Blocks in ascending order. A query that sees fewer than k has all of them, then -1. -1 for
        tokens of no sequence.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes or places do not match, or an option is out of range.
    NotImplementedError
        If the head dimension is not supported. Supported are 64, 96, 128, 192 and 256.

    Notes
    -----
    Of equal scores the smaller index is taken, as in :func:`topk_indices`. Scores are sums in fp32
    in a fixed order, so a query's list depends on the query and on the summaries that it sees, and
    on nothing else. It is the same on a CPU and on a GPU. A score that is NaN, and a block that is
    not assigned, come after all others. A block of 128 tokens is scored by its two summaries
    together.

    See Also
    --------
    sparse_paged_attention : attends to the blocks.
    update_block_summaries : makes the summaries.
    fastattn.reference.select_key_blocks : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import select_key_blocks
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> means = paddle.to_tensor([0.5, 3.0, 1.0, 2.0]).reshape([1, 1, 4, 1, 1])
    >>> summaries = means.expand([1, 1, 4, 1, 64]).contiguous()
    >>> step = int32([[0]]), int32([0, 1]), int32([63]), int32([1])
    >>> select_key_blocks(paddle.ones([1, 2, 64]), summaries, *step, 3, granularity=16).tolist()
    [[[1, 2, 3]]]
    """
    op = "select_key_blocks"
    inputs = (
        q,
        summaries,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        q_descale,
    )
    attrs = (
        check_int(op, "k", k, 1, MAX_K),  # a traced program needs it before the operator runs
        granularity,
        kind,
        reduction,
        first_blocks,
        last_blocks,
    )
    result: Any = _ops.call(op, inputs, attrs)[0]
    return result
