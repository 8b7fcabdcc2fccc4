"""Contents of tensors that a dump left out: from a seed, the same on every machine."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from fastattn.dump.files import DTYPES, Array, Stored


def _values(rng: np.random.Generator, name: str, dtype: str, count: int) -> Array:
    if DTYPES[dtype][1] == 1:
        return rng.integers(0, 100, count).astype(np.uint8)  # no code of them is a NaN
    values: Array = rng.standard_normal(count, np.float32)
    if "scale" in name:
        values = np.abs(values) * np.float32(0.02) + np.float32(0.01)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def made_up(name: str, at: dict[str, Any], seed: int = 0) -> Stored:
    """Contents of an input; `at` is what :func:`fastattn.dump.tensors.layout` told of it."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    shape = tuple(at["shape"])
    count = int(np.prod(shape, dtype=np.int64))
    data = _values(rng, name, at["dtype"], count).reshape(-1).view(np.uint8)
    return Stored(at["dtype"], shape, data)
