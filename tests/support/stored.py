"""K and V as a paged cache stores them: codes and scales, each of them unlike the others."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from fastattn.reference import layout, mxfp4, numerics
from tests.support.tensors import BF16, ue8m0_byte

if TYPE_CHECKING:
    from tests.support.attention import CacheKind

NUMPY_TYPES = {"bfloat16": BF16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


@dataclasses.dataclass
class CacheTensor:
    """K or V of a paged cache: logical codes (or values) [num_blocks, KV, 64, D] and scales."""

    kind: CacheKind
    letter: str  # k or v
    elements: np.ndarray
    scales: np.ndarray | None

    def packed(self) -> np.ndarray:
        if self.kind.quant_type == "none":
            return self.elements
        code = self.kind.code
        nibbles = code in numerics.NIBBLES
        return layout.pack(
            self.elements, self.letter, "fastattn", int8=code == "int8", nibbles=nibbles
        )

    def poison(self, where) -> None:
        """Plant NaN (or the last code, and NaN scales where a token has its own) at [.., r]."""
        if self.kind.quant_type == "none":
            self.elements[where] = np.nan
            return
        last = {"int8": 0x80, "int4": 0xF, "e2m1": 0xF}
        self.elements[where] = last.get(self.kind.code, 0x7F)
        if self.kind.dynamic:
            self.rescale(where, np.nan)

    def rescale(self, where, scale: float) -> None:
        """Set dynamic scales at [block, ..., r]: of MXFP4 blocks, to the nearest power of two."""
        self.scales[where] = ue8m0_byte(scale) if self.kind.code == "e2m1" else scale

    def grow(self, where, factor: float) -> None:
        """Multiply dynamic scales by a factor: those of MXFP4 blocks, by a power of two near it."""
        before = self.scales[where]
        exponents = self.kind.code == "e2m1"
        self.scales[where] = before + round(np.log2(factor)) if exponents else before * factor


def store(x: np.ndarray, kind: CacheKind, letter: str, rng) -> CacheTensor:
    """Quantise values [num_blocks, KV, 64, D]."""
    if kind.quant_type == "none":
        return CacheTensor(kind, letter, x.astype(NUMPY_TYPES[kind.dtype]), None)
    kv, dim = x.shape[1], x.shape[3]
    scale_type = NUMPY_TYPES[kind.scale_dtype]
    if kind.code == "e2m1":
        scales = mxfp4.block_scales(x)
        multiplier = mxfp4.spread_scales(scales)
    elif kind.dynamic:
        scales = numerics.group_scale(x, kind.code).astype(scale_type)
        multiplier = scales.astype(np.float32)[..., None]
    else:
        base = {"int8": 0.031, "e4m3": 0.0113, "e5m2": 0.0147}[kind.code]
        size = {"tensor": 1, "head": kv, "channel": kv * dim}[kind.granularity]
        spread = np.exp(rng.uniform(-0.7, 0.7, size)) if size > 1 else np.ones(1)
        scales = (base * (1.0 if letter == "k" else 1.7) * spread).astype(scale_type)
        multiplier = scales.astype(np.float32)
        if kind.granularity == "channel":
            multiplier = multiplier.reshape(kv, 1, dim)
        else:
            multiplier = multiplier.reshape(-1, 1, 1)
        x = x * np.float32(multiplier / base)  # unequal scales for unequal data
    return CacheTensor(kind, letter, numerics.quantize(x, multiplier, kind.code), scales)
