"""flash-attn's inference functions, with the arguments of flash-attn 2 and 3 and of vLLM's build.

A program that calls them changes one line::

    # from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
    from fastattn.compat.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

Paged caches ``[num_blocks, page_size, KV, D]`` are read in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paddle import Tensor

from fastattn import _ops
from fastattn._views import view
from fastattn.compat._flash_attn_checks import INSTEAD, check_common, check_number, window_of
from fastattn.compat._flash_attn_dense import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from fastattn.compat._flash_attn_steps import (
    check_ahead,
    lengths_of_varlen,
    lengths_with_kvcache,
)
from fastattn.compat._paged import (
    BLOCK_SIZE,
    Blocks,
    blocks_of_pages,
    dtype_name,
    nhd_blocks,
    progression,
    refuse,
    refuse_given,
    require_given,
    require_tensors,
)
from fastattn.functional import flash_attention, paged_attention, write_cache_kv
from fastattn.functional._marker import unified

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

_VARLEN = "flash_attn_varlen_func"
_KVCACHE = "flash_attn_with_kvcache"
_KV_DTYPES = {"float8_e5m2": "e5m2", "int8": "int8"}


def _cache_scale(op: str, name: str, descale: Any, cache: Tensor, blocks: Blocks) -> Any:
    """A descale as static scales of the cache, which are the same for all sequences."""
    if blocks.quant_type == "none":
        if descale is not None:
            raise ValueError(f"{op}: {name}: the cache has 16 bits and takes no scale")
        return None
    if descale is None:
        return progression(1.0, 0, 1, "float32", cache)
    require_tensors(op, **{name: descale})
    shape = list(descale.shape)
    if len(shape) == 2 and shape[0] == 1:
        return view(descale, [shape[1]])
    if len(shape) == 2:
        refuse(
            op,
            name,
            f"scales {shape} of each sequence for a cache that sequences share; expected [1] or "
            "[KV]",
        )
    return descale


@unified
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    s_aux: Tensor | None = None,
    seq_lens_decoder: Tensor | None = None,
    qv: Tensor | None = None,
    q_v: Tensor | None = None,
    attention_chunk: int = 0,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    fa_version: int | None = None,
) -> Any:
    r"""Attention of ragged sequences over contiguous keys, or over a paged cache.

    Positional arguments are in the order of flash-attn 2. FlashAttention-3 has the same first
    seven. vLLM's first seven,
    ``(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k)``, are recognised by an int
    in the fourth place. All other arguments are passed by name, for any of the three packages.

    With `block_table`, `k` and `v` are a paged cache, which is read in place and never copied:

    - 16 bits: ``[num_blocks, page_size, KV, D]``. Pages of 64 tokens may have any strides but the
      last; pages of a multiple of 64 tokens must be contiguous.
    - 8 bits (uint8 is e4m3, float8_e4m3fn, float8_e5m2, int8): `k` as above with pages of 64. `v`
      has this package's layout ``[num_blocks, KV, D, 64]`` (docs/formats.md), as
      :func:`fastattn.functional.write_cache_kv` writes it.

    Sequence b then has ``seqused_k[b]`` keys (or as many as `cu_seqlens_k` says), including the
    keys of its queries. The last query is at the last key, even if there are fewer keys than
    queries. A query before the first key sees no key with `causal`, and its output is 0.

    Parameters
    ----------
    q : Tensor, shape [T, H, D], bfloat16, float16, or uint8 / float8_e4m3fn (e4m3 codes)
    k, v : Tensor, shape [sum k, KV, D], or a paged cache
        As for :func:`fastattn.functional.flash_attention`.
    cu_seqlens_q, cu_seqlens_k : Tensor, shape [B + 1], int32
        `cu_seqlens_k` is required for contiguous keys.
    max_seqlen_q, max_seqlen_k : int
        Upper bounds of the sequence lengths. They mask nothing.
    dropout_p : float
        Must be 0.
    softmax_scale : float, optional
        Default: ``D ** -0.5``.
    causal : bool
        Mask the keys after a query's position; the last query sees the last key.
    window_size : (int, int), optional
        Number of keys before and after a query's position that stay visible; -1 means unlimited.
    softcap : float
        Bound of the logits; 0 means none.
    alibi_slopes : None
    deterministic : bool
        Not used, because the result is always deterministic.
    return_attn_probs : bool
        Return (out, softmax_lse, None), as flash-attn 2 does without dropout.
    block_table : Tensor, shape [B, max_pages], int32, optional
    seqused_q, seqused_k : Tensor, shape [B], int32, optional
        Number of queries and keys of each sequence. `seqused_k` requires `block_table`. `seqused_q`
        may leave queries out; their output is 0.
    return_softmax_lse : bool
        Return (out, softmax_lse).
    out : Tensor, shape [T, H, D], optional
        Written in place and returned.
    q_descale : Tensor, shape [1], [B, KV] or [T, H], float32 or bfloat16, optional
    k_descale, v_descale : Tensor, float32 or bfloat16, optional
        Contiguous keys: [1], [KV] or [B, KV]. A paged cache: [1], [KV], or [1, KV]. Scales that
        differ between sequences are refused.
    s_aux : Tensor, shape [H], float32 or bfloat16, optional
        Sinks: a logit for each head that counts in the denominator and in the LSE.
    seq_lens_decoder : Tensor, shape [B], int32, optional
        An addition to the packages' arguments: ``seqused_k`` minus the queries of each sequence. If
        a step computes it once, each layer saves about ten small kernels, which compute it and the
        masks of sequences with fewer keys than queries. On a GPU its values are not checked and
        must not be negative: every sequence then has at least as many keys as queries.
    qv, q_v, attention_chunk, cp_world_size, cp_rank, cp_tot_seqused_k
        Refused, except for their defaults.
    scheduler_metadata, num_splits, pack_gqa, sm_margin, fa_version
        Not used. The shape of the call determines the kernels.

    Returns
    -------
    out : Tensor, shape [T, H, D]
        The dtype of `q`; bfloat16 for e4m3 queries.
    softmax_lse : Tensor, shape [H, T], float32
        Natural logarithm; -inf for a query that sees no key (flash-attn 2: +inf).

    Raises
    ------
    NotImplementedError
        For arguments that are refused, a page size that is not a multiple of 64, a cache that would
        have to be copied, and `seqused_q` or `seqused_k` with contiguous keys.
    TypeError, ValueError
        As :func:`fastattn.functional.flash_attention` and ``paged_attention``. Also for arguments
        in the positions of another package.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flash_attn import flash_attn_varlen_func
    >>> x = paddle.ones([3, 1, 64])
    >>> starts = paddle.to_tensor([0, 3], "int32")
    >>> out = flash_attn_varlen_func(x, x, 2 * x, starts, starts, 3, 3, causal=True)
    >>> out[:, 0, 0].tolist()
    [2.0, 2.0, 2.0]
    """
    op = _VARLEN
    if isinstance(cu_seqlens_q, int):  # vLLM's positions
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = (
            cu_seqlens_k,  # type: ignore[assignment]
            max_seqlen_k if _ops.is_tensor(max_seqlen_k) else None,  # type: ignore[assignment]
            cu_seqlens_q,
            max_seqlen_q,
        )
    require_tensors(op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q)
    require_given(op, cu_seqlens_k=cu_seqlens_k, s_aux=s_aux, q_descale=q_descale, out=out)
    check_number(op, "dropout_p", dropout_p, 0, INSTEAD["dropout_p"])
    check_common(op, causal, softmax_scale)
    if attention_chunk != 0 or cp_world_size != 1 or cp_rank != 0:
        ranks = {"cp_rank": cp_rank or None, "cp_world_size": cp_world_size}
        refuse_given(op, INSTEAD, attention_chunk=attention_chunk or None, **ranks)
    refuse_given(
        op, INSTEAD, alibi_slopes=alibi_slopes, qv=qv, q_v=q_v, cp_tot_seqused_k=cp_tot_seqused_k
    )
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "sinks": s_aux,
        "q_descale": q_descale,
        "return_softmax_lse": return_softmax_lse or return_attn_probs,
        "out": out,
    }
    masks: dict[str, Any] = {"causal": bool(causal), "window_size": window_of(window_size)}
    if block_table is None:
        for name, value in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
            if value is not None:
                refuse(op, name, "contiguous keys have exact cu_seqlens; give a block_table")
        if cu_seqlens_k is None:
            raise ValueError(f"{op}: cu_seqlens_k: required without block_table")
        result = flash_attention(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            k_descale=k_descale,
            v_descale=v_descale,
            kv_dtype=_KV_DTYPES.get(dtype_name(k.dtype), "auto"),
            **masks,
            **options,
        )
    else:
        blocks = nhd_blocks(op, k, v, ("k", "v"))
        table = _blocks(op, block_table, blocks.per_page)
        if len(cu_seqlens_q.shape) != 1 or cu_seqlens_q.shape[0] == 0:
            shape = list(cu_seqlens_q.shape)
            raise ValueError(f"{op}: cu_seqlens_q: expected shape [B + 1], got {shape}")
        lengths = lengths_of_varlen(
            op,
            cu_seqlens_q,
            int(q.shape[0]),
            cu_seqlens_k,
            (seqused_q, seqused_k),
            seq_lens_decoder,
            # A query of no sequence gives 0 and -inf, but a given `out` is not written for it.
            single=max_seqlen_q == 1 and out is None,
            **masks,
        )
        if "mask_offsets" in lengths.masks and type(max_seqlen_k) is type(max_seqlen_q):
            max_seqlen_k = max(max_seqlen_k, max_seqlen_q)
        result = paged_attention(
            q,
            blocks.key,
            blocks.value,
            table,
            cu_seqlens_q,
            lengths.cached,
            lengths.new,
            max_seqlen_q,
            max_seqlen_k,
            cache_k_scales=_cache_scale(op, "k_descale", k_descale, k, blocks),
            cache_v_scales=_cache_scale(op, "v_descale", v_descale, v, blocks),
            **blocks.options(),
            **lengths.masks,
            **options,
        )
    return (*result, None) if return_attn_probs and not return_softmax_lse else result


@unified
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    attention_chunk: int = 0,
    scheduler_metadata: Any = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Any:
    r"""Append `k` and `v` to the caches of a batch, then attend to them with its new queries.

    Positional arguments are in the order of flash-attn 2. FlashAttention-3 has the same first five;
    its other arguments are passed by name. The caches are read and written in place. Paged caches
    are as for :func:`flash_attn_varlen_func`. Without a block table the caches are contiguous,
    ``[B, S, KV, D]`` with S a multiple of 64. The last query is at the last key, even if there are
    fewer keys than queries. A query before the first key sees no key with `causal`, and its output
    is 0.

    All arguments are checked before the caches are written. Lengths are checked if the host knows
    them: as an int or on the CPU. On a GPU they are not read. A negative length there gives
    undefined results, and a new token without room in the cache is left out.

    Parameters
    ----------
    q : Tensor, shape [B, N, H, D], bfloat16, float16, or uint8 / float8_e4m3fn (e4m3 codes)
    k_cache, v_cache : Tensor, shape [num_blocks, page_size, KV, D] or [>= B, S, KV, D]
        V of an 8-bit cache has shape [num_blocks, KV, D, 64] (docs/formats.md).
    k, v : Tensor, shape [B, M, KV, D], bfloat16 or float16, optional
        New keys and values, written after the `cache_seqlens` cached ones, and quantised if the
        cache has 8 bits.
    rotary_cos, rotary_sin : None
        Must be None. :func:`fastattn.functional.rope_write_cache_kv` rotates and writes in one
        kernel.
    cache_seqlens : int or Tensor, shape [B], int32, optional
        Number of keys in the cache, without `k`: at least 0, and at most the room of the cache
        minus the keys of `k`. Default: that maximum.
    cache_batch_idx, cache_leftpad, alibi_slopes : None
    block_table, page_table : Tensor, shape [B, max_pages], int32, optional
        Two names for one argument.
    softmax_scale, causal, window_size, softcap
        As in :func:`flash_attn_varlen_func`.
    return_softmax_lse : bool
    q_descale, k_descale, v_descale, s_aux, out
        As in :func:`flash_attn_varlen_func`; `out` has the shape [B, N, H, D].
    qv, cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens, attention_chunk
        Refused, except for their defaults.
    rotary_interleaved, num_splits, max_seqlen_q, scheduler_metadata, pack_gqa, sm_margin
        Not used.

    Returns
    -------
    out : Tensor, shape [B, N, H, D]
    softmax_lse : Tensor, shape [B, H, N], float32
        Natural logarithm; -inf for a query that sees no key. Only with `return_softmax_lse`.

    Raises
    ------
    NotImplementedError
        For arguments that are refused, and a cache that would have to be copied.
    TypeError, ValueError
        As :func:`fastattn.functional.paged_attention` and ``write_cache_kv``. Also for lengths that
        are negative or beyond the room of the cache, if the host knows them.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flash_attn import flash_attn_with_kvcache
    >>> caches = [paddle.zeros([2, 64, 1, 64], "bfloat16") for _ in range(2)]
    >>> x = paddle.ones([2, 1, 1, 64], "bfloat16")  # a new token for each of two sequences
    >>> lengths = paddle.to_tensor([0, 5], "int32")
    >>> out = flash_attn_with_kvcache(0 * x, *caches, x, 12 * x, cache_seqlens=lengths, causal=True)
    >>> out[:, 0, 0, 0].astype("float32").tolist()
    [12.0, 2.0]
    """
    op = _KVCACHE
    require_tensors(op, q=q, k_cache=k_cache, v_cache=v_cache)
    require_given(op, q_descale=q_descale, s_aux=s_aux, out=out, page_table=page_table)
    check_common(op, causal, softmax_scale)
    refuse_given(
        op,
        INSTEAD,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        alibi_slopes=alibi_slopes,
        qv=qv,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        rotary_seqlens=rotary_seqlens,
        attention_chunk=attention_chunk or None,
    )
    if len(q.shape) != 4:
        raise ValueError(f"{op}: q: expected shape [B, N, H, D], got {list(q.shape)}")
    batch, queries, heads, head_dim = (int(n) for n in q.shape)
    if block_table is not None and page_table is not None:
        raise ValueError(f"{op}: page_table: given together with block_table")
    blocks = nhd_blocks(op, k_cache, v_cache, ("k_cache", "v_cache"))
    table = block_table if block_table is not None else page_table
    if table is None:
        table = _rows_as_tables(op, k_cache, batch)
    else:
        table = _blocks(op, table, blocks.per_page)
    _check_out(op, out, q)
    room = int(table.shape[1]) * BLOCK_SIZE
    fresh = _new_keys(op, k, v, batch)
    before, lengths = lengths_with_kvcache(
        op, cache_seqlens, (batch, queries, fresh, room), bool(causal), window_of(window_size), q
    )
    cache: dict[str, Any] = {
        "cache_k_scales": _cache_scale(op, "k_descale", k_descale, k_cache, blocks),
        "cache_v_scales": _cache_scale(op, "v_descale", v_descale, v_cache, blocks),
        **blocks.options(),
    }
    options: dict[str, Any] = {
        "q_descale": q_descale,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "sinks": s_aux,
        "return_softmax_lse": return_softmax_lse,
        "out": None if out is None else view(out, [batch * queries, heads, head_dim]),
        **cache,
    }
    arguments: tuple[Any, ...] = (
        view(q, [batch * queries, heads, head_dim]),
        blocks.key,
        blocks.value,
        table,
        _starts(batch, queries, q),
    )
    attend: Callable[..., Any] = paged_attention
    if k is not None and v is not None:
        check_ahead(attend, arguments, options, batch)
        write_cache_kv(
            view(k, [batch * fresh, *k.shape[2:]]),
            view(v, [batch * fresh, *v.shape[2:]]),
            blocks.key,
            blocks.value,
            table,
            _starts(batch, fresh, q),
            before,
            progression(fresh, 0, batch, "int32", q),
            **cache,
        )
    step = (lengths.cached, lengths.new, queries, max(room, queries))
    result = attend(*arguments, *step, **lengths.masks, **options)
    shape = [batch, queries, heads, head_dim]
    if not return_softmax_lse:
        return view(result, shape) if out is None else out
    lse = view(result[1], [heads, batch, queries]).transpose([1, 0, 2])
    return (view(result[0], shape) if out is None else out), lse


def _check_out(op: str, out: Tensor | None, q: Tensor) -> None:
    if out is None:
        return
    if list(out.shape) != list(q.shape):
        raise ValueError(f"{op}: out: expected shape {list(q.shape)}, got {list(out.shape)}")
    if not out.is_contiguous():
        refuse(op, "out", "not contiguous: the result would go to a copy")


def _blocks(op: str, block_table: Any, per_page: int) -> Tensor:
    """Convert a page table to a block table, and check its rank."""
    require_tensors(op, block_table=block_table)
    if len(block_table.shape) != 2:
        shape = list(block_table.shape)
        raise ValueError(f"{op}: block_table: expected shape [B, max_pages], got {shape}")
    return blocks_of_pages(block_table, per_page)


def _rows_as_tables(op: str, cache: Tensor, batch: int) -> Tensor:
    """Block tables of caches [B, S, KV, D], in which each row is a page of its own."""
    rows, tokens = int(cache.shape[0]), int(cache.shape[1])
    if rows < batch:
        raise ValueError(f"{op}: k_cache: expected at least {batch} rows, got {rows}")
    count = tokens // BLOCK_SIZE
    return progression(0, 1, batch * count, "int32", cache).reshape([batch, count])


def _new_keys(op: str, k: Any, v: Any, batch: int) -> int:
    """Number of new keys of each sequence."""
    if k is None and v is None:
        return 0
    require_tensors(op, k=k, v=v)
    for name, tensor in (("k", k), ("v", v)):
        if len(tensor.shape) != 4 or tensor.shape[0] != batch:
            raise ValueError(
                f"{op}: {name}: expected shape [{batch}, M, KV, D], got {list(tensor.shape)}"
            )
    return int(k.shape[1])


def _starts(batch: int, tokens: int, like: Tensor) -> Tensor:
    return progression(0, tokens, batch + 1, "int32", like)
