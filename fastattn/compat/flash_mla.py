"""FlashMLA's functions under their own names, with their own argument orders and conventions.

A program that calls them changes one line::

    # import flash_mla
    from fastattn.compat import flash_mla

Differences from FlashMLA: any number of heads from 1 to 128 and any number of indices is allowed.
An index outside the cache is skipped and never read. ``topk_length`` and a second cache are allowed
for every format, and ``indices`` also for bf16 caches. A float32 scale of a cache is not rounded to
bf16. There is nothing to plan: the metadata object is empty and may be used for any call. float16,
which FlashMLA's dense decode takes, is refused, because the kernels read bfloat16 and FP8 and no
cache is copied.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import paddle
from paddle import Tensor

from fastattn import _ops
from fastattn._foreign import not_a_tensor
from fastattn._views import view
from fastattn.compat._paged import dtype_name, progression
from fastattn.functional._attributes import ANY_LENGTH
from fastattn.functional._marker import unified
from fastattn.functional.mla_dense import mla_attention
from fastattn.functional.mla_sparse import call

__all__ = [
    "FlashMLASchedMeta",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

_VALUE_DIM = 512


class FlashMLASchedMeta:
    """Stands for FlashMLA's plan of a step; it is empty."""


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """Metadata for :func:`flash_mla_with_kvcache`. The arguments do not matter.

    Returns
    -------
    tile_scheduler_metadata : FlashMLASchedMeta
    num_splits : None
    """
    return FlashMLASchedMeta(), None


def _refuse(op: str, name: str, text: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{op}: {name}: {text}")


def _rank(op: str, name: str, tensor: Any, rank: int) -> list[int]:
    if not _ops.is_tensor(tensor):
        raise not_a_tensor(op, name, tensor)
    if len(tensor.shape) != rank:
        _refuse(op, name, f"expected {rank} dimensions, got shape {list(tensor.shape)}")
    return list(tensor.shape)


def _format(op: str, dim: int, is_fp8: bool) -> str:
    if not is_fp8:
        return "bf16"
    if dim not in (576, 512):
        _refuse(op, "q", f"expected 576 or 512 channels, got {dim}")
    return "fp8_656" if dim == 576 else "fp8_584"


def _codes(cache: Tensor | None, is_fp8: bool) -> Tensor | None:
    """The bytes of an FP8 cache that a server keeps as int8."""
    if cache is None or not is_fp8 or not str(getattr(cache, "dtype", "")).endswith(".int8"):
        return cache
    return cache.view("uint8")


def _require_queries(op: str, s_q: int) -> None:
    """Refuse a number of queries that a traced program does not know."""
    if s_q < 0:
        _refuse(op, "q", "expected a number of queries a sequence that is known while tracing")


def _of_each_query(op: str, name: str, lengths: Tensor | None, s_q: int) -> Any:
    if lengths is None or s_q == 1:
        return lengths
    _require_queries(op, s_q)
    _rank(op, name, lengths, 1)
    return lengths.reshape([-1, 1]).expand([-1, s_q]).reshape([-1])


def _of_each(op: str, name: str, indices: Tensor, batch: int, s_q: int) -> int:
    """Number of indices per query; -1 for a size that a traced program does not know."""
    sizes = _rank(op, name, indices, 3)
    for got, want in zip(sizes, (batch, s_q)):
        if -1 not in (got, want) and got != want:
            _refuse(op, name, f"expected shape [{batch}, {s_q}, topk], got {sizes}")
    return sizes[-1]


def _check_no_half(op: str, **tensors: Any) -> None:
    """Refuse float16, which FlashMLA's dense decode takes, and say what to do instead."""
    for name, tensor in tensors.items():
        if _ops.is_tensor(tensor) and dtype_name(tensor.dtype) == "float16":
            what = "keep the cache in bfloat16 or FP8: it is not copied here"
            what = f'give {name}.astype("bfloat16")' if name == "q" else what
            _refuse(op, name, f"expected dtype bfloat16, got float16; {what}", TypeError)


def _dense(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    is_fp8: bool,
) -> tuple[Tensor, Tensor]:
    """Attention over all tokens of each sequence."""
    batch, s_q, heads, dim = _rank(op, "q", q, 4)
    blocks = _rank(op, "block_table", block_table, 2)[1]
    page_size = _rank(op, "k_cache", k_cache, 4)[1]
    _rank(op, "cache_seqlens", cache_seqlens, 1)
    tables, lengths = cast(Tensor, block_table), cast(Tensor, cache_seqlens)
    _require_queries(op, s_q)
    if 0 in (batch, s_q):
        return q[..., :_VALUE_DIM], paddle.empty([batch, heads, s_q], "float32")
    if not causal and s_q > 1:
        # All queries see all tokens, even if there are fewer tokens than queries: each query is a
        # sequence.
        tables = tables.unsqueeze(1).expand([-1, s_q, -1])
        tables = tables.reshape([-1, blocks]) if blocks >= 0 else tables.flatten(0, 1)
        lengths = lengths.unsqueeze(1).expand([-1, s_q]).reshape([-1])
        q = view(q, [-1, 1, heads, dim])
        out, lse = _dense(op, q, k_cache, tables, lengths, sinks, softmax_scale, True, is_fp8)
        lse = lse.reshape([-1, s_q, heads]).transpose([0, 2, 1])
        return view(out, [-1, s_q, heads, _VALUE_DIM]), lse
    # FlashMLA's lengths include the new tokens. A shorter sequence has only the last of them.
    new = lengths.clip(0, s_q)
    if paddle.in_dynamic_mode():
        ends = progression(s_q, s_q, batch, "int32", lengths)
        last = progression(batch * s_q, 0, 1, "int32", lengths)
    else:
        # A traced program may not know the number of sequences.
        ends = paddle.cumsum(paddle.full_like(lengths, s_q), dtype="int32")
        last = ends[-1:]
    starts = paddle.concat([ends - new, last])
    out, lse = mla_attention(
        view(q, [-1, heads, dim]),
        _codes(k_cache, is_fp8),
        tables,
        starts,
        lengths - new,
        new,
        s_q,
        blocks * page_size if min(blocks, page_size) >= 0 else ANY_LENGTH,
        cache_format=_format(op, dim, is_fp8),
        softmax_scale=softmax_scale,
        causal=causal,
        sinks=sinks,
        return_softmax_lse=True,
    )
    lse = view(paddle.where(lse == -float("inf"), -lse, lse), [heads, -1, s_q])
    return view(out, [-1, s_q, heads, _VALUE_DIM]), lse.transpose([1, 0, 2])


@unified
def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """FlashMLA's decode over a paged latent cache: over the tokens in `indices`, or over all
    tokens.

    This is :func:`fastattn.functional.mla_sparse_attention` or
    :func:`fastattn.functional.mla_attention` under FlashMLA's name.

    Parameters
    ----------
    q : Tensor, shape [B, s_q, H, 576 or 512], bfloat16
    k_cache : Tensor, shape [num_blocks, block_size, 1, W]
        With `is_fp8_kvcache`, W is 656 (576 channels) or 584 (512 channels, blocks may be padded),
        and the dtype is uint8, int8 or float8_e4m3fn. Otherwise bfloat16 with W channels; 576
        without `indices`. float16 is refused: convert a cache when it is made.
    block_table : Tensor, shape [B, max_blocks], int32
        Blocks of each sequence. Not used with `indices`.
    cache_seqlens : Tensor, shape [B], int32
        Number of tokens of each sequence, including the new ones. Not used with `indices`.
    tile_scheduler_metadata, num_splits : any
        Not used.
    head_dim_v : int
        Must be 512.
    softmax_scale : float, optional
        Default: the number of channels to the power of -0.5.
    causal : bool
        Query j of s_q sees ``cache_seqlens[b] - s_q + j + 1`` tokens. Must be False with `indices`,
        which determine what a query sees.
    is_fp8_kvcache : bool
    indices : Tensor, shape [B, s_q, topk], int32, optional
        Slots: block times block_size plus the token's place in the block. Without them, queries
        attend to all tokens of a sequence, through `block_table` and `cache_seqlens`.
    attn_sink : Tensor, shape [H], float32, optional
    extra_k_cache : Tensor, optional
        A second cache in the same softmax, of the same kind.
    extra_indices_in_kvcache : Tensor, shape [B, s_q, extra_topk], int32, optional
    topk_length, extra_topk_length : Tensor, shape [B], int32, optional
        Number of indices of each sequence that count.

    Returns
    -------
    out : Tensor, shape [B, s_q, H, 512], bfloat16
    softmax_lse : Tensor, shape [B, H, s_q], float32
        Natural logarithm, without the sink; +inf for a query without a key, whose output is 0.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or an argument is not a tensor. Also if `causal`
        or `is_fp8_kvcache` is not a bool, which happens with the argument positions of another
        package's function of this name.
    ValueError
        If shapes do not match, `head_dim_v` is not 512, `causal` is given with `indices`, or an
        argument that belongs to `indices` is given without them.
    NotImplementedError
        If the number of heads is not supported.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat import flash_mla
    >>> cache = paddle.zeros([2, 64, 1, 656], "uint8")
    >>> metadata, _ = flash_mla.get_mla_metadata()
    >>> out, lse = flash_mla.flash_mla_with_kvcache(
    ...     paddle.ones([1, 1, 16, 576], "bfloat16"), cache, None, None, 512, metadata,
    ...     is_fp8_kvcache=True, indices=paddle.to_tensor([[[3, 70, -1, -1]]], "int32"),
    ... )
    >>> list(out.shape), list(lse.shape), round(float(lse[0, 0, 0]), 4)
    ([1, 1, 16, 512], [1, 16, 1], 0.6931)
    """
    op = "flash_mla_with_kvcache"
    for name, value in (("causal", causal), ("is_fp8_kvcache", is_fp8_kvcache)):
        if not isinstance(value, (bool, int)):  # sgl-kernel has descale_q and descale_k before them
            text = f"expected bool, got {type(value).__name__}"
            text += "; the packages' positions differ from here on, so pass arguments by name"
            _refuse(op, name, text, TypeError)
    if indices is None:
        if head_dim_v != _VALUE_DIM:
            _refuse(op, "head_dim_v", f"expected {_VALUE_DIM}, got {head_dim_v}")
        others = {
            "extra_k_cache": extra_k_cache,
            "extra_indices_in_kvcache": extra_indices_in_kvcache,
            "topk_length": topk_length,
            "extra_topk_length": extra_topk_length,
        }
        for name, tensor in others.items():
            if tensor is not None:
                _refuse(op, name, "expected None without indices, got a tensor")
        _check_no_half(op, k_cache=k_cache, q=q)
        lengths = block_table, cache_seqlens
        return _dense(op, q, k_cache, *lengths, attn_sink, softmax_scale, causal, is_fp8_kvcache)
    batch, s_q, heads, dim = _rank(op, "q", q, 4)
    if head_dim_v != _VALUE_DIM:
        _refuse(op, "head_dim_v", f"expected {_VALUE_DIM}, got {head_dim_v}")
    if causal:
        _refuse(op, "causal", "expected False with indices, got True")
    topk = _of_each(op, "indices", indices, batch, s_q)
    extra = extra_indices_in_kvcache
    if extra is not None:
        extra_topk = _of_each(op, "extra_indices_in_kvcache", extra, batch, s_q)
        if extra_topk == 0:  # no second cache
            extra = extra_k_cache = extra_topk_length = None
        else:
            extra = view(extra, [-1, extra_topk])
    out, lse, _ = call(
        (
            view(q, [-1, heads, dim]),
            _codes(k_cache, is_fp8_kvcache),
            view(indices, [-1, topk]),
            _of_each_query(op, "topk_length", topk_length, s_q),
            None,
        ),
        (
            _codes(extra_k_cache, is_fp8_kvcache),
            extra,
            _of_each_query(op, "extra_topk_length", extra_topk_length, s_q),
            None,
        ),
        (attn_sink, None),
        (_format(op, dim, is_fp8_kvcache), None),
        (None, None),
        softmax_scale,
        (True, False, True),
    )
    # The LSE of one query needs no copy.
    lse = view(lse, [batch, heads, 1] if s_q == 1 else [batch, s_q, heads])
    if s_q != 1:
        lse = lse.transpose([0, 2, 1])
    return view(out, [batch, s_q, heads, _VALUE_DIM]), lse


def _prefill_order(results: tuple[Tensor, Any, Any]) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, max_logits = results
    return out, max_logits, lse


@unified
def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = _VALUE_DIM,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashMLA's sparse prefill: each query attends to the rows of `kv` that its indices name.

    This is :func:`fastattn.functional.mla_sparse_attention` under FlashMLA's name.

    Parameters
    ----------
    q : Tensor, shape [s_q, H, 576 or 512], bfloat16
    kv : Tensor, shape [s_kv, 1, 576 or 512], bfloat16
        Any row stride.
    indices : Tensor, shape [s_q, 1, topk], int32
        Rows of `kv`. Indices outside it are skipped.
    sm_scale : float
    d_v : int
        Must be 512.
    attn_sink : Tensor, shape [H], float32, optional
    topk_length : Tensor, shape [s_q], int32, optional
        Number of indices of each query that count.

    Returns
    -------
    out : Tensor, shape [s_q, H, 512], bfloat16
    max_logits : Tensor, shape [s_q, H], float32
        The largest scaled logit; -inf for a query without a key, NaN if the LSE is NaN.
    lse : Tensor, shape [s_q, H], float32
        Natural logarithm, without the sink; +inf for a query without a key, whose output is 0.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or an argument is not a tensor.
    ValueError
        If shapes do not match, or `d_v` is not 512.
    NotImplementedError
        If the number of heads is not supported.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat import flash_mla
    >>> out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(
    ...     paddle.ones([1, 2, 576], "bfloat16"), paddle.ones([4, 1, 576], "bfloat16"),
    ...     paddle.to_tensor([[[3, 0, -1, 9]]], "int32"), 0.0625,
    ... )
    >>> out[0, :, 0].astype("float32").tolist(), max_logits.tolist(), round(float(lse[0, 0]), 4)
    ([1.0, 1.0], [[36.0, 36.0]], 36.6931)
    """
    op = "flash_mla_sparse_fwd"
    _rank(op, "q", q, 3)
    if d_v != _VALUE_DIM:
        _refuse(op, "d_v", f"expected {_VALUE_DIM}, got {d_v}")
    for name, tensor in (("kv", kv), ("indices", indices)):
        shape = _rank(op, name, tensor, 3)
        if shape[1] != 1:
            _refuse(op, name, f"expected one KV head, got shape {shape}")
    return _prefill_order(
        call(
            # The keys are pages of one token.
            (q, kv, view(indices, [-1, indices.shape[2]]), topk_length, None),
            (None,) * 4,
            (attn_sink, None),
            ("bf16", None),
            (None, None),
            sm_scale,
            (True, True, True),
        )
    )
