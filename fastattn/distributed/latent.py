"""Context parallelism of latent caches: each rank attends to its tokens, then all ranks merge."""

from __future__ import annotations

from collections.abc import Callable
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
from fastattn.functional import mla_attention, mla_sparse_attention
from fastattn.functional._partial import check_tensor

_VALUE_DIM = 512


def _attend(
    op: str,
    attend: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    results: dict[str, Any],
    group: Any,
    exchange_dtype: str,
    localized: Callable[[], tuple[Any, ...]] | None = None,
) -> Any:
    """Merge the partial results that `attend` gives on every rank.

    Parameters
    ----------
    arguments : positional arguments, the queries first
    options : keyword arguments of a partial result
    results : sinks, return_softmax_lse, out and out_dtype, which belong to the whole
    localized : function or None
        Turns the positional arguments into arguments for the rank's own keys, with the same result.
    """
    check_call(op, exchange_dtype)
    world_size, q = ranks_of(op, group), arguments[0]
    sinks, out, dtype = results["sinks"], results["out"], results["out_dtype"]
    # Sparse attention has no tokens outside sequences: its operator writes all of `out`.
    writes_all = out is None or attend is mla_sparse_attention or not paddle.in_dynamic_mode()
    shape = q.shape if is_tensor(q) else []
    if (world_size == 1 and writes_all) or len(shape) != 3 or 0 in shape:
        return attend(*arguments, **options, **results)
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"{op}: out_dtype: expected bfloat16 or float32, got {dtype!r}")
    check_tensor(op, "out", out, [*shape[:2], _VALUE_DIM], (dtype,))
    check_tensor(op, "sinks", sinks, list(shape[1:2]), ("float32",))
    if out is not None:
        others = {**options, "sinks": sinks}
        check_place_of_result(op, out, named(attend, arguments, others))
    if world_size == 1:
        return store(attend(*arguments, **options, **{**results, "out": None}), out)
    partial = partial_dtype(exchange_dtype, dtype)
    exchange = Exchange([*shape[:2], _VALUE_DIM], partial, q.place, world_size, group)
    if localized is not None:
        arguments = localized()
    with partial_tables():
        _, partial_lse = attend(
            *arguments, **options, return_softmax_lse=True, out=exchange.out, out_dtype=partial
        )
    states = exchange.gather(partial_lse)
    result, lse = merge_ranks(states, sinks, dtype, out, None, in_lse=False)
    return (result, lse) if results["return_softmax_lse"] else result


def _page_tokens(cache: Any, page_size: int | None) -> int:
    """Tokens of a page; 0 if the operator refuses the cache or `page_size`."""
    shape = cache.shape if is_tensor(cache) else []
    if not 2 <= len(shape) <= 4:
        return 0
    own: Any = page_size
    if len(shape) > 2:
        own = shape[1 if len(shape) == 3 or shape[2] == 1 else 2]
    return own if type(own) is int and own > 0 and page_size in (None, own) else 0


def mla_attention_dcp(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    cache_format: str,
    group: Any = None,
    exchange_dtype: str = "float32",
    scale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    sinks: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    page_size: int | None = None,
    out_dtype: str = "bfloat16",
    local_keys: LocalKeys | None = None,
) -> Any:
    """Dense attention over a paged latent cache that is spread over the ranks of a group.

    Each rank holds some pages of a sequence and attends to them with all queries. All ranks get the
    merge of all partial results, with the same bits, as with :func:`paged_attention_dcp`.
    :func:`fastattn.functional.mla_attention` documents the parameters that are not listed below.
    They must be the same on every rank, including `q`.

    Parameters
    ----------
    cache : Tensor
        This rank's cache; ranks may have different numbers of pages.
    block_tables : Tensor, shape [B, max_blocks], int32
        This rank's table. It has the same shape on every rank. Entry i of a sequence is the page of
        this rank's cache that holds the sequence's keys from ``i * page_size`` on, or -1 if another
        rank has them. Every page of a sequence must be on exactly one rank.
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        Lengths of the whole sequences.
    group : Group of paddle.distributed, optional
        Default: the group of all ranks. A group of one rank, and a single process without
        ``paddle.distributed.init_parallel_env()``, only call :func:`mla_attention`.
    exchange_dtype : {"float32", "output"}
        Dtype in which partial results are exchanged and merged. "output" halves the bytes of a
        bfloat16 output, but rounds on every rank.
    sinks : Tensor, shape [H], float32, optional
        As for :func:`mla_attention`, but finite or -inf. Here +inf means no sink.
    out : Tensor, shape [T, H, 512], optional
        Written in place and returned. Tokens of no sequence become 0.
    local_keys : LocalKeys, optional
        Result of :func:`dcp_local_keys` for these arguments, with the tokens of a page as
        `block_size`. Used if ``max_seqlen_q`` is 1; such a call finds it itself if it is not given.

    Returns
    -------
    out : Tensor, shape [T, H, 512]
    softmax_lse : Tensor, shape [H, T], float32
        Natural logarithm, without the sink. Only with `return_softmax_lse`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`mla_attention`. Also raised for a group without this process, and in a static
        program. Every rank must make the call. If one raises, the others wait in the collective.

    See Also
    --------
    fastattn.distributed.dcp_local_block_tables : the table of a rank.
    fastattn.distributed.dcp_local_keys : what all layers of a step have in common.
    mla_sparse_attention_dcp : over chosen tokens.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.distributed import dcp_local_block_tables, mla_attention_dcp
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> rank, world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    >>> table = dcp_local_block_tables([[0]], rank, world_size)
    >>> out = mla_attention_dcp(
    ...     paddle.ones([1, 16, 576], "bfloat16"), paddle.ones([1, 64, 576], "bfloat16"),
    ...     *(int32(x) for x in (table, [0, 1], [9], [1])), 1, 10, cache_format="bf16",
    ... )
    >>> list(out.shape), float(out[0, 0, 0])
    ([1, 16, 512], 1.0)
    """
    op = "mla_attention_dcp"
    arguments = (
        *(q, cache, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time),
        *(max_seqlen_q, max_seqlen_k),
    )
    tokens = _page_tokens(cache, page_size)

    def localized() -> tuple[Any, ...]:
        return local_call(op, local_keys, arguments, block_size=tokens, causal=causal)[0]

    return _attend(
        op,
        mla_attention,
        arguments,
        {
            "cache_format": cache_format,
            "scale": scale,
            "softmax_scale": softmax_scale,
            "causal": causal,
            "page_size": page_size,
        },
        {
            "sinks": sinks,
            "return_softmax_lse": return_softmax_lse,
            "out": out,
            "out_dtype": out_dtype,
        },
        group,
        exchange_dtype,
        # With several new tokens each one sees other keys, and the operator has no masks for them.
        localized if max_seqlen_q == 1 and tokens > 0 else None,
    )


def mla_sparse_attention_dcp(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    *,
    cache_format: str,
    group: Any = None,
    exchange_dtype: str = "float32",
    topk_length: Tensor | None = None,
    extra_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    extra_cache_format: str | None = None,
    scale: Tensor | None = None,
    extra_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    page_size: int | None = None,
    extra_page_size: int | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "bfloat16",
) -> Any:
    """Attention over selected tokens of latent caches that are spread over the ranks of a group.

    Each rank attends to the selected tokens that it holds, and gets the merge of all partial
    results, as with :func:`mla_attention_dcp`. :func:`fastattn.functional.mla_sparse_attention`
    documents the parameters that are not listed below. They must be the same on every rank,
    including `q`.

    Parameters
    ----------
    cache, extra_cache : Tensor
        This rank's cache; ranks may have different numbers of pages.
    indices, extra_indices : Tensor, shape [T, topk], int32
        Slots of this rank's cache. :func:`fastattn.functional.topk_to_slots` makes them on the
        device, from token positions and this rank's block tables: tokens of other ranks become -1
        or are left out. A token that two ranks name counts twice. Ranks may have different numbers
        of columns.
    topk_length, extra_topk_length : Tensor, shape [T], int32, optional
        Lengths of this rank's index lists.
    group, exchange_dtype
        As for :func:`mla_attention_dcp`.
    sinks : Tensor, shape [H], float32, optional
        As for :func:`mla_sparse_attention`, but finite or -inf. Here +inf means no sink.
    out : Tensor, shape [T, H, 512], optional
        Written in place and returned.

    Returns
    -------
    out : Tensor, shape [T, H, 512]
    softmax_lse : Tensor, shape [H, T], float32
        Natural logarithm, without the sink. Only with `return_softmax_lse`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`mla_sparse_attention`. Also raised for a group without this process, and in a
        static program. Every rank must make the call. If one raises, the others wait in the
        collective.

    See Also
    --------
    fastattn.functional.topk_to_slots : from positions to this rank's slots.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.distributed import dcp_local_block_tables, mla_sparse_attention_dcp
    >>> from fastattn.functional import topk_to_slots
    >>> rank, world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    >>> table = paddle.to_tensor(dcp_local_block_tables([[0, 0]], rank, world_size))
    >>> chosen = paddle.to_tensor([[3, 60, 70, -1]], "int32")  # tokens of the sequence
    >>> slots, lengths = topk_to_slots(chosen, table)
    >>> out = mla_sparse_attention_dcp(
    ...     paddle.ones([1, 16, 576], "bfloat16"), paddle.ones([1, 64, 576], "bfloat16"), slots,
    ...     topk_length=lengths, cache_format="bf16",
    ... )
    >>> list(out.shape), float(out[0, 0, 0])
    ([1, 16, 512], 1.0)
    """
    return _attend(
        "mla_sparse_attention_dcp",
        mla_sparse_attention,
        (q, cache, indices),
        {
            "cache_format": cache_format,
            "topk_length": topk_length,
            "extra_cache": extra_cache,
            "extra_indices": extra_indices,
            "extra_topk_length": extra_topk_length,
            "extra_cache_format": extra_cache_format,
            "scale": scale,
            "extra_scale": extra_scale,
            "softmax_scale": softmax_scale,
            "page_size": page_size,
            "extra_page_size": extra_page_size,
        },
        {
            "sinks": sinks,
            "return_softmax_lse": return_softmax_lse,
            "out": out,
            "out_dtype": out_dtype,
        },
        group,
        exchange_dtype,
    )
