"""FastDeploy's ``kv_cache_scale.json``: static scales with checkpoint names.

For every type, a value is the amax of a head (or of a channel, for int8) divided by 448. FastDeploy
multiplies it by 448 when it loads the file, and divides by the bound of the type's codes. So values
are dequantisation multipliers of e4m3 codes; multiplied by 448 / 127 they are multipliers of
int8 codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.calibrate.checks import layer_number
from fastattn.calibrate.errors import CalibrationError, reading
from fastattn.calibrate.tensor_files import parse_json
from fastattn.reference.numerics import QMAX, Array

_NAME = re.compile(r"(?:^|\.)([0-9]+)\.self_attn\.cache([kv])_matmul\.activation_scale$")


def _factor(cache_quant_type: str) -> float:
    """Dequantisation multiplier for a value of 1."""
    return QMAX["e4m3"] / QMAX["int8" if cache_quant_type == "cache_int8" else "e4m3"]


def _values(path: Path, name: str, value: Any) -> Array:
    try:
        array = np.asarray(value).reshape(-1)
    except ValueError:  # lists with different lengths, or too deep
        array = np.empty(0, object)
    if array.dtype.kind not in "iuf":
        raise CalibrationError(f"{path}: {name}: expected numbers")
    array = array.astype(np.float64)
    if array.size == 0 or not (np.isfinite(array).all() and (array > 0).all()):
        raise CalibrationError(f"{path}: {name}: expected positive, finite numbers")
    return array


def read_scales(path: Path, cache_quant_type: str) -> dict[int, tuple[Array, Array]]:
    """Dequantisation multipliers (K, V) by layer, float32 [1], [KV] or [KV * D]."""
    with reading(path):
        text = path.read_text(encoding="utf-8")
    with reading(path, "no JSON"):
        data = parse_json(text)
    found: dict[int, dict[str, Array]] = {}
    for name, value in data.items() if isinstance(data, dict) else ():
        match = _NAME.search(name)
        if match:
            scales = _values(path, name, value) * _factor(cache_quant_type)
            with np.errstate(over="ignore", under="ignore"):
                scales = scales.astype(np.float32)
            if not (np.isfinite(scales).all() and (scales > 0).all()):
                raise CalibrationError(f"{path}: {name}: expected numbers that fp32 holds")
            try:
                pair = found.setdefault(layer_number(match[1]), {})
            except CalibrationError as error:
                raise CalibrationError(f"{path}: {name:.80}: {error}") from None
            if match[2] in pair:
                raise CalibrationError(
                    f"{path}: {name}: layer {match[1]} also occurs under another prefix"
                )
            pair[match[2]] = scales
    if not found:
        raise CalibrationError(
            f"{path}: expected names such as ernie.layers.0.self_attn.cachek_matmul."
            "activation_scale, found none"
        )
    for layer, pair in found.items():
        for kind in "kv":
            if kind not in pair:
                raise CalibrationError(f"{path}: layer {layer} has no scales of {kind.upper()}")
    return {layer: (pair["k"], pair["v"]) for layer, pair in sorted(found.items())}


def write_scales(path: Path, layers: Mapping[int, tuple[str, Array, Array]], prefix: str) -> None:
    """Write the multipliers (type, K, V) of every layer; FastDeploy needs one type for all."""
    kinds = sorted({kind for kind, _, _ in layers.values()})
    if len(kinds) > 1:
        raise CalibrationError(f"{path}: FastDeploy's file is for one type, got {', '.join(kinds)}")
    data = {}
    for layer, (kind, *pair) in layers.items():
        for letter, scales in zip("kv", pair):
            values = np.asarray(scales, np.float64).reshape(-1) / _factor(kind)
            name = f"{prefix}.{layer}.self_attn.cache{letter}_matmul.activation_scale"
            data[name] = [float(np.float32(value)) for value in values]
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
