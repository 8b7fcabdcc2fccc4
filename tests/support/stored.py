"""K and V as a paged cache stores them: codes and scales, each of them unlike the others."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from fastattn.functional._cache_types import TYPES
from fastattn.reference import layout, numerics
from fastattn.reference.cache import dynamic_scales, written_scales
from tests.support.tensors import BF16, ue8m0_byte

if TYPE_CHECKING:
    from tests.support.attention import CacheKind

NUMPY_TYPES = {"bfloat16": BF16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}

#: The byte of a group's scale, by its type: the one whose value is nearest.
GROUP_BYTES = {"ue8m0": ue8m0_byte, "float32": None}


@dataclasses.dataclass
class CacheTensor:
    """K or V of a paged cache: logical codes (or values) [num_blocks, KV, 64, D] and scales."""

    kind: CacheKind
    letter: str  # k or v
    elements: np.ndarray
    scales: np.ndarray | None

    @property
    def code(self) -> str:
        """Format of these codes: K's and V's may differ."""
        return self.kind.code_of(self.letter)

    def packed(self) -> np.ndarray:
        if self.kind.quant_type == "none":
            return self.elements
        code = self.code
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
        self.elements[where] = last.get(self.code, 0x7F)
        if self.kind.dynamic:
            self.rescale(where, np.nan)

    def rescale(self, where, scale: float) -> None:
        """Set dynamic scales at [block, ..., r]: of groups, to the nearest byte."""
        byte_of = GROUP_BYTES[TYPES[self.kind.quant_type].scale_type]
        self.scales[where] = byte_of(scale) if self.kind.grouped else scale

    def grow(self, where, factor: float) -> None:
        """Multiply dynamic scales by a factor: those of groups, to the nearest byte."""
        before = dynamic_scales(self.scales, self.kind.quant_type)[where]
        if not self.kind.grouped:
            self.scales[where] = before[..., 0] * factor
            return
        group = TYPES[self.kind.quant_type].group
        byte_of = np.vectorize(GROUP_BYTES[TYPES[self.kind.quant_type].scale_type])
        self.scales[where] = byte_of(before[..., ::group] * factor)


def store(x: np.ndarray, kind: CacheKind, letter: str, rng) -> CacheTensor:
    """Quantise values [num_blocks, KV, 64, D]."""
    if kind.quant_type == "none":
        return CacheTensor(kind, letter, x.astype(NUMPY_TYPES[kind.dtype]), None)
    kv, dim = x.shape[1], x.shape[3]
    scale_type = NUMPY_TYPES[kind.scale_dtype]
    if kind.dynamic:
        scales = written_scales(x, kind.quant_type, scale_type, letter)
        multiplier = dynamic_scales(scales, kind.quant_type)
    else:
        base = {"int8": 0.031, "e4m3": 0.0113, "e5m2": 0.0147}[kind.code_of(letter)]
        size = {"tensor": 1, "head": kv, "channel": kv * dim}[kind.granularity]
        spread = np.exp(rng.uniform(-0.7, 0.7, size)) if size > 1 else np.ones(1)
        scales = (base * (1.0 if letter == "k" else 1.7) * spread).astype(scale_type)
        multiplier = scales.astype(np.float32)
        if kind.granularity == "channel":
            multiplier = multiplier.reshape(kv, 1, dim)
        else:
            multiplier = multiplier.reshape(-1, 1, 1)
        x = x * np.float32(multiplier / base)  # unequal scales for unequal data
    return CacheTensor(kind, letter, numerics.quantize(x, multiplier, kind.code_of(letter)), scales)
