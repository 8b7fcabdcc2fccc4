"""Attention over contiguous keys and over a paged, quantised cache."""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._cache_types import check_no_zero_points
from fastattn.functional._marker import unified


def _softmax_scale(q: Any, softmax_scale: float | None) -> float:
    if softmax_scale is not None:
        return softmax_scale
    shape = getattr(q, "shape", None)  # the operator says what is wrong with a q that has none
    return float(shape[-1] ** -0.5) if shape and shape[-1] > 0 else 1.0


def _window(op: str, window_size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"{op}: window_size: expected (left, right), got {window_size!r}")
    left, right = window_size
    if type(left) is not int or type(right) is not int:
        raise TypeError(f"{op}: window_size: expected two ints, got {window_size!r}")
    return left, right


@unified
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mask_offsets: Tensor | None = None,
    out_scale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "auto",
    kv_dtype: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Doc."""
    inputs = (
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        q_descale,
        k_descale,
        v_descale,
        sinks,
        mask_offsets,
        out_scale,
        out,
    )
    attrs = (
        max_seqlen_q,
        max_seqlen_k,
        _softmax_scale(q, softmax_scale),
        causal,
        *_window("flash_attention", window_size),
        softcap,
        return_softmax_lse,
        out_dtype,
        kv_dtype,
    )
    result, lse, *_ = _ops.call("flash_attention", inputs, attrs)
    return (result, lse) if return_softmax_lse else result


@unified
def paged_attention(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Doc."""
    check_no_zero_points(
        "paged_attention", cache_quant_type, cache_k_zp=cache_k_zp, cache_v_zp=cache_v_zp
    )
    inputs = (
        q,
        key_cache,
        value_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        cache_k_scales,
        cache_v_scales,
        q_descale,
        sinks,
        mask_offsets,
        out_scale,
        out,
    )
    attrs = (
        max_seqlen_q,
        max_seqlen_k,
        _softmax_scale(q, softmax_scale),
        causal,
        *_window("paged_attention", window_size),
        softcap,
        return_softmax_lse,
        out_dtype,
        cache_quant_type,
        fp8_format,
    )
    result, lse, *_ = _ops.call("paged_attention", inputs, attrs)
    return (result, lse) if return_softmax_lse else result
