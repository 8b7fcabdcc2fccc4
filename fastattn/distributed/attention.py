"""Decode context parallelism: each rank attends to its own blocks, then all ranks merge."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor

from fastattn._check import partial_tables
from fastattn._ops import is_tensor
from fastattn.distributed._exchange import (
    Exchange,
    check_call,
    check_place_of_result,
    merge_ranks,
    named,
    partial_dtype,
    ranks_of,
    store,
)
from fastattn.distributed.local_keys import LocalKeys, local_call
from fastattn.functional import paged_attention
from fastattn.functional._partial import check_results, check_tensor, output_shape, value_dtype

_OP = "paged_attention_dcp"


def paged_attention_dcp(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    group: Any = None,
    exchange_dtype: str = "float32",
    cache_k_scales: Tensor | None = None,
    cache_v_scales: Tensor | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    q_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mask_offsets: Tensor | None = None,
    out_scale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "auto",
    cache_k_zp: Tensor | None = None,
    cache_v_zp: Tensor | None = None,
    quantize_q: bool = False,
    batch_invariant: bool = False,
    split_invariant: bool = False,
    k_rotation: str = "none",
    k_center: Tensor | None = None,
    tree_mask: Tensor | None = None,
    head_windows: Tensor | None = None,
    k_feedback: Tensor | None = None,
    local_keys: LocalKeys | None = None,
) -> Any:
    r"""Attention of a step's new tokens over a cache that is spread over the ranks of a group.

    In decode context parallelism each rank holds some of a sequence's blocks (with all KV heads)
    and attends to them with all queries. Every rank gathers the partial results :math:`o_r` and
    their :math:`\mathrm{lse}_r` and merges them in the order of the ranks:

    .. math:: \mathrm{lse} = \ln \sum_r e^{\mathrm{lse}_r}, \qquad
              o = \sum_r e^{\mathrm{lse}_r - \mathrm{lse}} o_r

    All ranks get the same bits. :func:`fastattn.functional.paged_attention` documents the
    parameters that are not listed below. They must be the same on every rank, including `q`.

    Parameters
    ----------
    key_cache, value_cache, cache_k_scales, cache_v_scales : Tensor
        This rank's cache; ranks may have different numbers of blocks.
    block_tables : Tensor, shape [B, max_blocks], int32
        This rank's table. It has the same shape on every rank. Entry j of a sequence is the block
        of this rank's cache that holds the tokens ``64 j`` to ``64 j + 63`` of the sequence, or -1
        if another rank holds them. Positions are global, so lengths, masks, windows and rotary
        positions are the same as on a single rank. Every logical block must be on exactly one rank;
        a block on two ranks counts twice.
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        Lengths of the whole sequences, not of this rank's part.
    max_seqlen_q : int
        At least the number of new tokens of any sequence. Unlike in :func:`paged_attention`, a
        bound that is too small gives wrong results.
    group : Group of paddle.distributed, optional
        Default: the group of all ranks. A group of one rank, and a single process without
        ``paddle.distributed.init_parallel_env()``, only call :func:`paged_attention`.
    exchange_dtype : {"float32", "output"}
        Dtype in which partial results are exchanged and merged. "float32" gives the result of one
        process within 1e-6 of the largest channel of a token and head: fewer than 1 in 1000
        elements of a 16-bit output differ, by about one rounding step. "output" halves the bytes of
        a 16-bit output, but rounds to 16 bits on every rank: 1 element in 12 differs.
    sinks : Tensor, shape [H], float32 or bfloat16, optional
        As for :func:`paged_attention`, but finite or -inf. Here +inf means no sink.
    out : Tensor, shape [T, H, D], optional
        Written in place and returned. Tokens of no sequence become 0.
    batch_invariant : bool
        As for :func:`paged_attention`, for the same ranks. The ranks that hold a sequence's blocks
        must follow from the sequence alone, as with :func:`dcp_local_block_tables`. Partial results
        are merged for each token separately.
    split_invariant : bool
        As for :func:`paged_attention`, with one rank only.
    tree_mask, head_windows : Tensor, optional
        As for :func:`paged_attention`, with one rank only. Several ranks take neither of them, nor
        a table for each KV head: a rank counts its own keys.
    k_feedback : Tensor, optional
        As for :func:`paged_attention`: not read.
    local_keys : LocalKeys, optional
        Result of :func:`dcp_local_keys` for these arguments. It is the same for all layers of a
        step that have the same mask. Without it, every call launches one more kernel to find it.

    Returns
    -------
    out : Tensor, shape [T, H, D]
        uint8 (e4m3 codes) with `out_scale`, quantised by the merge from its fp32 values.
    softmax_lse : Tensor, shape [H, T], float32
        Natural logarithm. Only with `return_softmax_lse`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`paged_attention`. Also raised for a group without this process, in a static
        program, and for `local_keys` of other arguments. Every rank must make the call. If one
        raises, the others wait in the collective.

    Notes
    -----
    A rank attends to a table without the entries of other ranks, so its work is proportional to its
    own keys. Of these keys, each query sees an interval.

    Writes use the same table. ``rope_write_cache_kv`` and ``write_cache_kv`` skip tokens whose
    block is -1. So every rank receives all new tokens and stores its own.

    See Also
    --------
    fastattn.distributed.dcp_local_block_tables : the table of a rank.
    fastattn.distributed.dcp_local_keys : what all layers of a step have in common.
    fastattn.functional.merge_many_attn_states : the merge.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.distributed import dcp_local_block_tables, paged_attention_dcp
    >>> from fastattn.functional import write_cache_kv
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> rank, world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    >>> caches = [paddle.zeros([1, 1, 64, 64], "bfloat16") for _ in range(2)]
    >>> table = dcp_local_block_tables([[0]], rank, world_size)
    >>> seqs = int32(table), int32([0, 2]), int32([0]), int32([2])
    >>> x = paddle.ones([2, 1, 64], "bfloat16")
    >>> _ = write_cache_kv(x, 3 * x, *caches, *seqs)
    >>> paged_attention_dcp(x, *caches, *seqs, 2, 2)[:, 0, 0].cast("float32").numpy().tolist()
    [3.0, 3.0]
    """
    check_call(_OP, exchange_dtype)
    world_size = ranks_of(_OP, group)
    arguments = (
        q,
        key_cache,
        value_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        max_seqlen_q,
        max_seqlen_k,
    )
    options: dict[str, Any] = {
        "cache_k_scales": cache_k_scales,
        "cache_v_scales": cache_v_scales,
        "cache_quant_type": cache_quant_type,
        "fp8_format": fp8_format,
        "q_descale": q_descale,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "mask_offsets": mask_offsets,
        "cache_k_zp": cache_k_zp,
        "cache_v_zp": cache_v_zp,
        "quantize_q": quantize_q,
        "batch_invariant": batch_invariant,
        "split_invariant": split_invariant,
        "k_rotation": k_rotation,
        "k_center": k_center,
    }
    masks: dict[str, Any] = {"tree_mask": tree_mask, "head_windows": head_windows}
    alone = world_size == 1 and (out is None or not paddle.in_dynamic_mode())
    shape = q.shape if is_tensor(q) else []
    if alone or len(shape) != 3 or 0 in shape:
        return paged_attention(
            *arguments,
            **{**options, **masks},
            sinks=sinks,
            out_scale=out_scale,
            return_softmax_lse=return_softmax_lse,
            out=out,
            out_dtype=out_dtype,
        )
    if world_size > 1:
        if split_invariant:
            raise NotImplementedError(
                f"{_OP}: split_invariant is not supported with several ranks: each has other splits"
            )
        _refuse_holes(masks, block_tables)
    dtype = value_dtype(_OP, q, out, out_scale, out_dtype)
    check_results(_OP, q, out, out_scale, dtype)
    check_tensor(_OP, "sinks", sinks, list(shape[1:2]), ("float32", "bfloat16"))
    if out is not None:
        others = {**options, "sinks": sinks, "out_scale": out_scale}
        check_place_of_result(_OP, out, named(paged_attention, arguments, others))
    if world_size == 1:
        results: dict[str, Any] = {"sinks": sinks, "out_scale": out_scale}
        results["return_softmax_lse"] = return_softmax_lse
        results["out_dtype"] = out_dtype if out_scale is not None else dtype
        return store(paged_attention(*arguments, **{**options, **masks, **results}), out)
    partial = partial_dtype(exchange_dtype, dtype)
    exchange = Exchange(output_shape(q), partial, q.place, world_size, group)
    # otherwise the operator reports the error
    if is_tensor(key_cache) and len(key_cache.shape) == 4:
        arguments, local_masks = local_call(
            _OP,
            local_keys,
            arguments,
            block_size=64,
            causal=causal,
            window_size=window_size,
            mask_offsets=mask_offsets,
        )
        if local_masks is not None:
            options.update(causal=False, window_size=(-1, -1), mask_offsets=local_masks)
    with partial_tables():
        _, partial_lse = paged_attention(
            *arguments, **options, return_softmax_lse=True, out=exchange.out, out_dtype=partial
        )
    states = exchange.gather(partial_lse)
    result, lse = merge_ranks(states, sinks, dtype, out, out_scale, in_lse=True)
    return (result, lse) if return_softmax_lse else result


def _refuse_holes(masks: dict[str, Any], block_tables: Any) -> None:
    """Refuse what a rank cannot tell from the keys that it holds."""
    given = next((name for name, mask in masks.items() if mask is not None), None)
    if given is None and is_tensor(block_tables) and len(block_tables.shape) == 3:
        given = "a block table for each KV head"
    if given is not None:
        raise NotImplementedError(f"{_OP}: {given} is not supported with several ranks")
