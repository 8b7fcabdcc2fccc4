"""Rounding of keys and values in FastDeploy's cache, so that a check sees only kernel errors.

This needs torch on any device, and neither FastDeploy nor a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FP8_MAX, INT8_MAX = 448.0, 127.0


class Scales(NamedTuple):
    """Scales of a static cache type, bf16 (kv,): multipliers for the write and for the read."""

    quant: torch.Tensor
    dequant: torch.Tensor


def dynamic_scales(x: torch.Tensor) -> Scales:
    """Scales (T, kv, 1) of block_wise_fp8 for (T, kv, D): per token and head, in bf16."""
    scale = (FP8_MAX / x.float().abs().amax(-1, keepdim=True)).bfloat16()
    return Scales(scale, (1 / scale.float()).bfloat16())


def stored(x: torch.Tensor, quant: str, scales: Scales | None = None) -> torch.Tensor:
    """Keys or values (T, kv, D) after a round trip through the cache, float64.

    The product with the scale is rounded to bf16, then to an integer (also for FP8), then to the
    cache's type.

    Parameters
    ----------
    x : torch.Tensor
        Keys are rotated. Values are taken as bf16.
    quant : str
        none, cache_int8, cache_fp8 or block_wise_fp8.
    scales : Scales or None
        For cache_int8 and cache_fp8, (kv,).
    """
    x = x.bfloat16()
    if quant == "none":
        return x.double()
    if quant == "block_wise_fp8":
        scales = dynamic_scales(x)
    elif scales is None:
        raise ValueError(f"{quant} has static scales")
    else:
        scales = Scales(*(scale[:, None] for scale in scales))
    codes = (x * scales.quant).float().round()
    if quant == "cache_int8":
        codes = codes.clamp(-INT8_MAX, INT8_MAX)
    else:
        codes = codes.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.double() * scales.dequant.double()
