"""What was found for a model's layers, and its files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.calibrate.errors import CalibrationError
from fastattn.calibrate.fastdeploy import read_scales, write_scales
from fastattn.calibrate.tensor_files import read_tensors, write_tensors
from fastattn.functional._cache_types import CACHE_QUANT_TYPES, STATIC_TYPES
from fastattn.reference.numerics import Array

#: First thing that a reader looks for.
FORMAT = "fastattn-calibration-1"

#: Tensors of a layer, by the attribute that a backend reads.
_TENSORS = ("cache_k_out_scale", "cache_v_out_scale", "cache_k_center")

#: Of a layer's K; null leaves it to the type.
ROTATIONS = (None, "none", "hadamard")


@dataclass
class LayerCalibration:
    """What a layer is to be run with.

    Attributes
    ----------
    cache_quant_type : str
    cache_k_out_scale, cache_v_out_scale : array of float32, shape [1], [KV] or [KV * D], or None
        Dequantisation multipliers of the static types.
    cache_k_rotation : str
    cache_k_center : array of float32, shape [KV, D], or None
    error : float or None
        Relative error of attention outputs; None if there were no queries.
    errors : dict
        That of every candidate that was tried.
    """

    cache_quant_type: str
    cache_k_out_scale: Array | None = None
    cache_v_out_scale: Array | None = None
    cache_k_rotation: str = "none"
    cache_k_center: Array | None = None
    error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The candidate: type and transforms."""
        parts = [self.cache_quant_type]
        if self.cache_k_center is not None:
            parts.append("center")
        if self.cache_k_rotation != "none":
            parts.append(self.cache_k_rotation)
        return "+".join(parts)


@dataclass
class Calibration:
    """Layers by their number."""

    layers: dict[int, LayerCalibration]

    def write(self, path: str | Path, *, fastdeploy_prefix: str = "ernie.layers") -> None:
        """Write ``.safetensors``, ``.npz`` or, for FastDeploy, ``.json``.

        Parameters
        ----------
        path : str or Path
        fastdeploy_prefix : str
            What stands before a layer's number in FastDeploy's names.

        Raises
        ------
        CalibrationError
            If the suffix is another one, or FastDeploy's file has no place for what was found.
        """
        path = Path(path)
        if path.suffix == ".json":
            write_scales(path, self._static_scales(path), fastdeploy_prefix)
            return
        tensors: dict[str, Array] = {}
        about: dict[str, Any] = {}
        for number, layer in self.layers.items():
            about[str(number)] = {
                "cache_quant_type": layer.cache_quant_type,
                "cache_k_rotation": layer.cache_k_rotation,
                "error": layer.error,
                "errors": layer.errors,
            }
            for name in _TENSORS:
                tensor = getattr(layer, name)
                if tensor is not None:
                    tensors[f"layers.{number}.{name}"] = np.asarray(tensor, np.float32)
        write_tensors(path, tensors, {"format": FORMAT, "layers": json.dumps(about)})

    def _static_scales(self, path: Path) -> dict[int, tuple[str, Array, Array]]:
        found = {}
        for number, layer in self.layers.items():
            k_scales, v_scales = layer.cache_k_out_scale, layer.cache_v_out_scale
            if layer.cache_quant_type not in STATIC_TYPES or k_scales is None or v_scales is None:
                raise CalibrationError(
                    f"{path}: FastDeploy's file holds static scales; layer {number} has type "
                    f"{layer.cache_quant_type}"
                )
            if layer.cache_k_rotation != "none" or layer.cache_k_center is not None:
                raise CalibrationError(
                    f"{path}: FastDeploy's file has no place for a rotation or a centre, which "
                    f"layer {number} has"
                )
            found[number] = (layer.cache_quant_type, k_scales, v_scales)
        return found

    @classmethod
    def read(cls, path: str | Path, *, cache_quant_type: str | None = None) -> Calibration:
        """Read a file that :meth:`write` wrote, or FastDeploy's ``kv_cache_scale.json``.

        Parameters
        ----------
        path : str or Path
        cache_quant_type : {"cache_int8", "cache_fp8"}, optional
            What FastDeploy's file is for, which it does not tell.

        Raises
        ------
        CalibrationError
            If it is something else.
        """
        path = Path(path)
        if path.suffix == ".json":
            if cache_quant_type not in STATIC_TYPES:
                raise CalibrationError(
                    f"{path}: whose scales are these? expected {' or '.join(STATIC_TYPES)}, got "
                    f"{cache_quant_type}"
                )
            scales = read_scales(path, cache_quant_type)
            return cls(
                {n: LayerCalibration(cache_quant_type, k, v) for n, (k, v) in scales.items()}
            )
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise CalibrationError(f"{path}: not written by `python -m fastattn calibrate`")
        layers = {}
        try:
            for number, about in json.loads(metadata["layers"]).items():
                kind = about["cache_quant_type"]
                if kind not in CACHE_QUANT_TYPES:
                    raise CalibrationError(f"{path}: layer {number} has unknown type {kind!r}")
                if about["cache_k_rotation"] not in ROTATIONS:
                    raise CalibrationError(
                        f"{path}: layer {number} has unknown rotation {about['cache_k_rotation']!r}"
                    )
                layers[int(number)] = LayerCalibration(
                    kind,
                    cache_k_rotation=about["cache_k_rotation"],
                    error=about["error"],
                    errors=about["errors"],
                    **{name: tensors.get(f"layers.{number}.{name}") for name in _TENSORS},
                )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(f"{path}: damaged: {error}") from None
        return cls(layers)

    def apply(self, layer: Any, *, place: Any = None) -> None:
        """Give a layer its type, scales, rotation and centre.

        Parameters
        ----------
        layer : object
            With a ``layer_id``: an :class:`fastattn.backends.AttentionLayer`, or FastDeploy's. Make
            its cache of the type that it has then.
        place : paddle.Place, optional
            Of the tensors; the current one by default.

        Raises
        ------
        CalibrationError
            If there is no such layer.
        """
        import paddle

        found = self.layers.get(layer.layer_id)
        if found is None:
            raise CalibrationError(f"layer {layer.layer_id} was not calibrated")
        layer.cache_quant_type_str = found.cache_quant_type
        layer.cache_k_rotation = found.cache_k_rotation
        for name in _TENSORS:
            tensor = getattr(found, name)
            on = None if tensor is None else paddle.to_tensor(tensor, place=place)
            setattr(layer, name, on)
