"""A layer's step in one operator: rotation, qk-norm, cache write and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import as_float, scale_of
from fastattn.functional._cache_types import cache_type_name
from fastattn.functional._marker import unified
from fastattn.functional.attention import as_window

_OP = "attention_step"


#: Arguments that belong to a step; the others belong to a layer.
_OF_STEP = [
    "qkv",
    "key_cache",
    "value_cache",
    "rotary_embs",
    "block_tables",
    "cu_seqlens_q",
    "seq_lens_decoder",
    "seq_lens_this_time",
    "max_seqlen_q",
    "max_seqlen_k",
    "batch_id_per_token",
    "cache_k_scales",
    "cache_v_scales",
    "mask_offsets",
]


class StepOptions(NamedTuple):
    """A layer's tensors and attributes of the operator, in its order.

    A server calls a layer in every step, and to name and convert two dozen options takes a third of
    the operator's time. So this is made once.
    """

    tensors: tuple[Any, ...]
    attrs: tuple[Any, ...]

    def bound(self) -> Callable[..., Any] | None:
        """The operator as a function of a step's arguments (:func:`fastattn._ops.bound`)."""
        sig = _ops.signature(_OP)
        names = [name for name in (*sig.inputs, *sig.attr_names) if name not in _OF_STEP]
        return _ops.bound(_OP, dict(zip(names, (*self.tensors, None, *self.attrs))), _OF_STEP)


def step_options(
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    rms_norm_eps: float = 1e-6,
    use_neox_rotary_style: bool = False,
    rotary_dim: int | None = None,
    qk_norm_before_rope: bool = False,
    qkv_bias: Tensor | None = None,
    q_quant: str = "none",
    q_scale: Tensor | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    k_rotation: str = "none",
    k_center: Tensor | None = None,
    k_feedback: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    out_scale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out_dtype: str = "auto",
    batch_invariant: bool = False,
) -> StepOptions:
    """Options for :func:`run_step`. Names and meanings are as for :func:`attention_step`."""
    return StepOptions(
        (
            q_norm_weight,
            k_norm_weight,
            qkv_bias,
            q_scale,
            k_center,
            k_feedback,
            sinks,
            out_scale,
        ),
        (
            causal,
            *as_window(_OP, window_size),
            num_heads,
            num_kv_heads,
            as_float(_OP, "rms_norm_eps", rms_norm_eps),
            use_neox_rotary_style,
            -1 if rotary_dim is None else rotary_dim,
            qk_norm_before_rope,
            q_quant,
            cache_type_name(cache_quant_type),
            fp8_format,
            k_rotation,
            scale_of(_OP, softmax_scale),
            as_float(_OP, "softcap", softcap),
            return_softmax_lse,
            out_dtype,
            batch_invariant,
        ),
    )


@unified
def run_step(
    options: StepOptions,
    bound: Callable[..., Any] | None,
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rotary_embs: Tensor | None,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    batch_id_per_token: Tensor | None,
    cache_k_scales: Tensor | None,
    cache_v_scales: Tensor | None,
    mask_offsets: Tensor | None,
) -> Any:
    """Run a step with options that were made before.

    Parameters
    ----------
    options, bound
        The layer's options, and what their `bound` returned; None for calls that it does not take.

    Returns
    -------
    Tensor, shape [T, H * D]
    """
    if bound is not None and _ops.is_direct():
        try:
            result = bound(
                qkv,
                key_cache,
                value_cache,
                rotary_embs,
                block_tables,
                cu_seqlens_q,
                seq_lens_decoder,
                seq_lens_this_time,
                max_seqlen_q,
                max_seqlen_k,
                batch_id_per_token,
                cache_k_scales,
                cache_v_scales,
                mask_offsets,
            )
        except RuntimeError as error:
            _ops.reraise_of(_ops.signature(_OP), error)
        if result is not None:
            return result
    tensors, attrs = options  # SOT passes a plain tuple
    inputs = (
        qkv,
        key_cache,
        value_cache,
        rotary_embs,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        batch_id_per_token,
        cache_k_scales,
        cache_v_scales,
        mask_offsets,
        *tensors,
        None,
    )
    return _ops.call(_OP, inputs, (max_seqlen_q, max_seqlen_k, *attrs))[0]


@unified
def attention_step(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rotary_embs: Tensor | None,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    rms_norm_eps: float = 1e-6,
    use_neox_rotary_style: bool = False,
    rotary_dim: int | None = None,
    qk_norm_before_rope: bool = False,
    qkv_bias: Tensor | None = None,
    q_quant: str = "none",
    q_scale: Tensor | None = None,
    cache_k_scales: Tensor | None = None,
    cache_v_scales: Tensor | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    batch_id_per_token: Tensor | None = None,
    k_rotation: str = "none",
    k_center: Tensor | None = None,
    k_feedback: Tensor | None = None,
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
    batch_invariant: bool = False,
) -> Any:
    r"""X."""
    options = step_options(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        rms_norm_eps=rms_norm_eps,
        use_neox_rotary_style=use_neox_rotary_style,
        rotary_dim=rotary_dim,
        qk_norm_before_rope=qk_norm_before_rope,
        qkv_bias=qkv_bias,
        q_quant=q_quant,
        q_scale=q_scale,
        cache_quant_type=cache_quant_type,
        fp8_format=fp8_format,
        k_rotation=k_rotation,
        k_center=k_center,
        k_feedback=k_feedback,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        out_scale=out_scale,
        return_softmax_lse=return_softmax_lse,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
    )
    inputs = (
        qkv,
        key_cache,
        value_cache,
        rotary_embs,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        batch_id_per_token,
        cache_k_scales,
        cache_v_scales,
        mask_offsets,
        *options.tensors,
        out,
    )
    result, lse, *_ = _ops.call(_OP, inputs, (max_seqlen_q, max_seqlen_k, *options.attrs))
    return (result, lse) if return_softmax_lse else result
