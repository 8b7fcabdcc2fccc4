"""NumPy model of :func:`fastattn.functional.quantize_fp8`."""

from __future__ import annotations

import numpy as np

from fastattn.reference.numerics import Array, amax, dynamic_scale, quantize

#: Smallest amax of a dynamically quantised group of activations.
AMAX_FLOOR = 1e-10


def quantize_fp8(
    x: Array,
    scale: Array | None = None,
    *,
    granularity: str = "tensor",
    group_size: int = 128,
) -> tuple[Array, Array]:
    """Quantise to e4m3; see :func:`fastattn.functional.quantize_fp8`.

    Returns
    -------
    codes : array of uint8, the shape of `x`
    scales : array of float32
    """
    x = np.asarray(x, np.float32)
    if scale is not None:
        return quantize(x, scale, "e4m3"), np.asarray(scale, np.float32)
    if granularity == "tensor":
        scales = dynamic_scale(amax(x).reshape(1), "e4m3", AMAX_FLOOR)
        return quantize(x, scales, "e4m3"), scales
    if granularity == "token":
        scales = dynamic_scale(amax(x, axis=-1)[..., None], "e4m3", AMAX_FLOOR)
        return quantize(x, scales, "e4m3"), scales
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    scales = dynamic_scale(amax(groups, axis=-1), "e4m3", AMAX_FLOOR)
    return quantize(groups, scales[..., None], "e4m3").reshape(x.shape), scales


def quantize_query(q: Array) -> tuple[Array, Array]:
    """Queries as e4m3 codes with one scale for each token and head.

    This is `quantize_q` of the attention operators, and ``q_quant="per_token_head"`` of
    :func:`fastattn.functional.rope_write_cache_kv`: ``scale = max(amax, 1e-6) / 448``.

    Parameters
    ----------
    q : array, shape [T, H, D]

    Returns
    -------
    codes : array of uint8, shape [T, H, D]
    descale : array of float32, shape [T, H]
    """
    q = np.asarray(q, np.float32)
    descale = dynamic_scale(amax(q, axis=-1), "e4m3")
    return quantize(q, descale[..., None], "e4m3"), descale
