"""NumPy model of :func:`fastattn.functional.merge_many_attn_states`."""

from __future__ import annotations

import numpy as np

from fastattn.reference.numerics import Array, exp_non_positive, quantize

_EMPTY = np.float32(-np.inf)


def merge_many_attn_states(
    outputs: Array,
    lses: Array,
    *,
    sinks: Array | None = None,
    output_scale: Array | None = None,
    sinks_in_lse: bool = True,
) -> tuple[Array, Array]:
    """Merge partial attentions; see :func:`fastattn.functional.merge_many_attn_states`.

    Every step is one fp32 operation, in the order of the states, with the sink last::

        m   = max(lse_0, lse_1, ..., sink)
        z   = exp(lse_0 - m) + exp(lse_1 - m) + ... + exp(sink - m)
        out = output_0 * (exp(lse_0 - m) / z) + output_1 * (exp(lse_1 - m) / z) + ...
        lse = log(z) + m

    States without keys are left out of the sums. exp and log are the same as in
    :func:`fastattn.reference.merge_attn_states`.

    Returns
    -------
    output : array, shape [T, H, D]
        Dtype of the states, or uint8 codes if `output_scale` is given.
    output_lse : array of float32, shape [H, T]
    """
    states = np.where(np.isposinf(lses), _EMPTY, np.asarray(lses, np.float32))
    heads = states.shape[1]
    sink = np.full(heads, _EMPTY) if sinks is None else np.asarray(sinks, np.float32)
    sink = np.where(np.isposinf(sink), _EMPTY, sink)[:, None]
    any_keys = (states != _EMPTY).any(0)
    largest, total = _total(states, sink)

    merged = np.zeros(np.asarray(outputs[0]).shape, np.float32)
    seen = np.zeros(any_keys.shape, bool)
    with np.errstate(all="ignore"):
        for output, lse in zip(outputs, states):
            weight = exp_non_positive(lse - largest) / total
            term = np.asarray(output, np.float32) * _per_channel(weight)
            there = lse != _EMPTY
            merged = np.where(_per_channel(there & ~seen), term, merged)
            merged = np.where(_per_channel(there & seen), merged + term, merged)
            seen |= there
        if not sinks_in_lse:
            largest, total = _total(states, np.full_like(sink, _EMPTY))
        lse = np.log(total.astype(np.float64)).astype(np.float32) + largest
    lse = np.where(any_keys, lse, _EMPTY)
    if output_scale is not None:
        return quantize(merged, output_scale, "e4m3"), lse
    with np.errstate(over="ignore"):
        return merged.astype(np.asarray(outputs).dtype), lse


def _total(states: Array, sink: Array) -> tuple[Array, Array]:
    """The largest LSE, ignoring NaN, and the sum of the exponentials relative to it."""
    largest = np.broadcast_to(
        np.fmax.reduce([*states, np.broadcast_to(sink, states[0].shape)]), states[0].shape
    )
    largest = np.where(np.isnan(largest), _EMPTY, largest)
    total = np.zeros(states[0].shape, np.float32)
    with np.errstate(all="ignore"):
        for lse in [*states, np.broadcast_to(sink, states[0].shape)]:
            total = np.where(lse == _EMPTY, total, total + exp_non_positive(lse - largest))
    return largest, total


def _per_channel(x: Array) -> Array:
    return x.T[:, :, None]
