"""Checks of a calibration, for any kind of file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.calibrate.errors import CalibrationError
from fastattn.functional._cache_types import (
    CACHE_QUANT_TYPES,
    FEEDBACK_TYPES,
    HEAD_DIMS,
    STATIC_TYPES,
)
from fastattn.reference.numerics import Array

if TYPE_CHECKING:
    from fastattn.calibrate.calibration import LayerCalibration

#: Rotations of a layer's K. None means the default of the type.
ROTATIONS = (None, "none", "hadamard")

#: Static scales of a layer.
SCALES = ("cache_k_out_scale", "cache_v_out_scale")

#: Tensors of a layer, by the attribute that a backend reads.
TENSORS = (*SCALES, "cache_k_center", "cache_k_feedback")

_SHAPES = {1: "[1], [KV] or [KV * D]", 2: "[KV, D]", 3: "[KV, D, D]"}

_NUMBER = re.compile(r"(0|[1-9][0-9]{0,5})\Z")


def layer_number(text: Any) -> int:
    """The layer number in a name, of which only one spelling is valid.

    Raises
    ------
    CalibrationError
        If it is not a number, has leading zeros, or is beyond the layers of any model.
    """
    if not (isinstance(text, str) and _NUMBER.match(text)):
        raise CalibrationError(f"expected the number of a layer, such as 0 or 12, got {text!r:.40}")
    return int(text)


def check_layers(layers: Mapping[int, LayerCalibration]) -> None:
    """Refuse settings that no layer can use.

    Raises
    ------
    CalibrationError
        If there is no layer, or one has an unknown type or rotation, lacks scales that its type
        needs, has scales that it cannot use, or has numbers or shapes that no operator supports.
    """
    if not layers:
        raise CalibrationError("there is no layer")
    for number, layer in layers.items():
        layer_number(str(number))
        _check_layer(f"layer {number}", layer)


def _check_layer(name: str, layer: LayerCalibration) -> None:
    kind, rotation, center = layer.cache_quant_type, layer.cache_k_rotation, layer.cache_k_center
    if kind not in CACHE_QUANT_TYPES:
        raise CalibrationError(f"{name} has unknown type {kind!r:.40}")
    if rotation not in ROTATIONS:
        raise CalibrationError(f"{name} has unknown rotation {rotation!r:.40}")
    if kind == "none" and (center is not None or rotation == "hadamard"):
        raise CalibrationError(f"{name} has type none, whose K is neither rotated nor centred")
    for what in TENSORS:
        tensor = getattr(layer, what)
        if what in SCALES and (tensor is None) is (kind in STATIC_TYPES):
            has = "lacks" if tensor is None else "has"
            raise CalibrationError(f"{name} has type {kind} and {has} {what}")
        if tensor is not None:
            rank = {"cache_k_center": 2, "cache_k_feedback": 3}.get(what, 1)
            _check_tensor(f"{name}: {what}", tensor, rank)
    if center is not None:
        _check_heads(name, layer, "cache_k_center", center.shape)
    if layer.cache_k_feedback is not None:
        _check_feedback(name, layer, layer.cache_k_feedback)
    _check_errors(name, layer)


def _check_tensor(name: str, tensor: Any, rank: int) -> None:
    if not (isinstance(tensor, np.ndarray) and tensor.dtype == np.float32):
        raise CalibrationError(f"{name}: expected an array of float32")
    if tensor.ndim != rank or tensor.size == 0:
        raise CalibrationError(f"{name}: expected shape {_SHAPES[rank]}, got {list(tensor.shape)}")
    if not np.isfinite(tensor).all():
        raise CalibrationError(f"{name}: not all numbers are finite")
    if rank == 1 and not (tensor > 0).all():
        raise CalibrationError(f"{name}: expected positive numbers")


def _check_heads(name: str, layer: LayerCalibration, what: str, shape: tuple[int, ...]) -> None:
    heads, dim = shape[:2]
    check_head_dim(f"{name}: {what}", dim)
    if layer.cache_k_out_scale is not None:
        size = layer.cache_k_out_scale.size
        check_scales(f"{name}: cache_k_out_scale", size, (heads, dim), layer.cache_quant_type)


def _check_feedback(name: str, layer: LayerCalibration, feedback: Array) -> None:
    heads, rows, dim = feedback.shape
    if rows != dim:
        raise CalibrationError(
            f"{name}: cache_k_feedback: expected shape [KV, D, D], got {list(feedback.shape)}"
        )
    _check_heads(name, layer, "cache_k_feedback", (heads, dim))
    center, scales = layer.cache_k_center, layer.cache_k_out_scale
    if center is not None and center.shape != (heads, dim):
        raise CalibrationError(
            f"{name}: cache_k_feedback is of {heads} KV heads of {dim} channels, cache_k_center of "
            f"{center.shape[0]} of {center.shape[1]}"
        )
    if layer.cache_quant_type not in FEEDBACK_TYPES or (scales is not None and scales.size > heads):
        raise CalibrationError(
            f"{name}: cache_k_feedback: expected a type with one scale for a head or token: "
            f"{', '.join(FEEDBACK_TYPES)}"
        )


def _check_errors(name: str, layer: LayerCalibration) -> None:
    numbers = {"error": layer.error} if layer.error is not None else {}
    errors = layer.errors
    if not (isinstance(errors, dict) and all(isinstance(key, str) for key in errors)):
        raise CalibrationError(f"{name}: errors: expected numbers by the candidates' names")
    for what, number in {**numbers, **errors}.items():
        real = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not real or math.isnan(number) or number < 0:
            raise CalibrationError(
                f"{name}: {what}: expected a number from 0 on, got {number!r:.40}"
            )


def check_scales(name: str, count: int, shape: tuple[int, ...], cache_quant_type: str) -> None:
    """Refuse a number of static scales that does not match the KV heads and channels.

    Raises
    ------
    CalibrationError
    """
    heads, dim = shape
    sizes = [1, heads, *([heads * dim] if cache_quant_type == "cache_int8" else [])]
    if count not in sizes:
        raise CalibrationError(
            f"{name}: expected {' or '.join(map(str, sizes))} scales for {heads} KV heads of {dim} "
            f"channels, got {count}"
        )


def check_head_dim(name: str, head_dim: int) -> None:
    """Refuse head dimensions that no operator supports.

    Raises
    ------
    CalibrationError
    """
    if head_dim not in HEAD_DIMS:
        dims = " or ".join(map(str, HEAD_DIMS))
        raise CalibrationError(f"{name}: expected heads of {dims} channels, got {head_dim}")
