"""NumPy model of :func:`fastattn.functional.merge_attn_states`."""

from __future__ import annotations

import numpy as np

from fastattn.reference.numerics import Array, exp_non_positive, quantize
from fastattn.reference.quantize import quantize_fp8

_EMPTY = np.float32(-np.inf)


def merge_attn_states(
    prefix_output: Array,
    prefix_lse: Array,
    suffix_output: Array,
    suffix_lse: Array,
    *,
    output_scale: Array | None = None,
    prefill_tokens_with_context: int | None = None,
    groups: int | None = None,
) -> tuple[Array, ...]:
    """Merge two partial attentions; see :func:`fastattn.functional.merge_attn_states`.

    Every step is one fp32 operation, in this order, for each token and head::

        m  = max(p, s)
        wp = exp(p - m);  ws = exp(s - m);  z = wp + ws
        out = prefix * (wp / z) + suffix * (ws / z)
        lse = log(z) + m

    exp is :func:`fastattn.reference.numerics.exp_non_positive`, so the output has the same bits on
    every platform. log is rounded from fp64. An empty side is left out of the sum.

    Parameters
    ----------
    groups : int, optional
        Number of dynamic FP8 scales per token, the last dimension of `output_scales`.

    Returns
    -------
    output : array, shape [T, H, D]
        Dtype of the inputs, or uint8 codes.
    output_lse : array of float32, shape [H, T]
    output_scales : array of float32, shape [T, groups], with `groups` only
    """
    p = np.where(np.isposinf(prefix_lse), _EMPTY, np.asarray(prefix_lse, np.float32))
    s = np.where(np.isposinf(suffix_lse), _EMPTY, np.asarray(suffix_lse, np.float32))
    if prefill_tokens_with_context is not None:
        p[:, prefill_tokens_with_context:] = _EMPTY  # these tokens have no prefix
    with np.errstate(all="ignore"):
        m = np.maximum(p, s)
        wp, ws = exp_non_positive(p - m), exp_non_positive(s - m)
        z = wp + ws
        lse = np.log(z.astype(np.float64)).astype(np.float32) + m
        from_prefix = np.asarray(prefix_output, np.float32) * _per_channel(wp / z)
        from_suffix = np.asarray(suffix_output, np.float32) * _per_channel(ws / z)
        merged = from_prefix + from_suffix
    no_prefix, no_suffix = p == _EMPTY, s == _EMPTY
    merged = np.where(_per_channel(no_prefix), from_suffix, merged)
    merged = np.where(_per_channel(no_suffix), from_prefix, merged)
    merged = np.where(_per_channel(no_prefix & no_suffix), np.float32(0), merged)
    lse = np.where(no_prefix & no_suffix, _EMPTY, lse)

    if groups is not None:
        tokens, heads, dim = merged.shape
        size = heads * dim // groups
        codes, scales = quantize_fp8(
            merged.reshape(tokens, heads * dim), granularity="group", group_size=size
        )
        return codes.reshape(merged.shape), lse, scales
    if output_scale is not None:
        return quantize(merged, output_scale, "e4m3"), lse
    with np.errstate(over="ignore"):
        return merged.astype(np.asarray(prefix_output).dtype), lse


def _per_channel(x: Array) -> Array:
    return x.T[:, :, None]
