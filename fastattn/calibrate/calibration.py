"""Results of a calibration for a model's layers, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.calibrate.checks import TENSORS, check_layers, layer_number
from fastattn.calibrate.errors import CalibrationError
from fastattn.calibrate.fastdeploy import read_scales, write_scales
from fastattn.calibrate.tensor_files import check_suffix, read_tensors, write_tensors
from fastattn.functional._cache_types import STATIC_TYPES
from fastattn.reference.numerics import Array

#: Format name at the start of a file. Version 1 had no checksum.
FORMAT = "fastattn-calibration-2"

#: Name of the fact whether a file is for rotated values. A file need not have it.
_ROTATED = "rotated_values"

#: Attributes of a layer that are stored besides its tensors.
_ABOUT = ("cache_quant_type", "cache_k_rotation", "error", "errors")


@dataclass
class LayerCalibration:
    """Settings for a layer.

    Attributes
    ----------
    cache_quant_type : str
    cache_k_out_scale, cache_v_out_scale : array of float32, shape [1], [KV] or [KV * D], or None
        Dequantisation multipliers of the static types.
    cache_k_rotation : {"none", "hadamard"} or None
        None means the default of the type.
    cache_k_center : array of float32, shape [KV, D], or None
    error : float or None
        Relative error of attention outputs; None if there were no queries.
    errors : dict
        Relative error of every candidate that was tried.
    cache_k_feedback : array of float32, shape [KV, D, D], or None
        For keys of this rotation (:func:`fastattn.reference.feedback.feedback_of`).
    """

    cache_quant_type: str
    cache_k_out_scale: Array | None = None
    cache_v_out_scale: Array | None = None
    cache_k_rotation: str | None = "none"
    cache_k_center: Array | None = None
    error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    cache_k_feedback: Array | None = None

    @property
    def name(self) -> str:
        """Name of the candidate: its type and transforms."""
        parts = [self.cache_quant_type]
        if self.cache_k_center is not None:
            parts.append("center")
        if self.cache_k_rotation not in (None, "none"):
            parts.append(str(self.cache_k_rotation))
        if self.cache_k_feedback is not None:
            parts.append("feedback")
        return "+".join(parts)

    def make_cache(
        self,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: str = "bfloat16",
        place: Any = None,
    ) -> Any:
        """Allocate the layer's cache, for a server of one's own.

        Parameters
        ----------
        num_blocks, num_kv_heads, head_dim, dtype, place
            As for :func:`fastattn.functional.make_cache`.

        Returns
        -------
        KVCache
            Its ``arguments`` are for the writer and for the attention.
        """
        import paddle

        from fastattn import functional

        def tensor(x: Array | None) -> Any:
            return None if x is None else paddle.to_tensor(x, place=place)

        return functional.make_cache(
            num_blocks,
            num_kv_heads,
            head_dim,
            self.cache_quant_type,
            dtype=dtype,
            cache_k_scales=tensor(self.cache_k_out_scale),
            cache_v_scales=tensor(self.cache_v_out_scale),
            k_rotation=self.cache_k_rotation or "auto",
            k_center=tensor(self.cache_k_center),
            k_feedback=tensor(self.cache_k_feedback),
            place=place,
        )


@dataclass
class Calibration:
    """Calibrations of layers, by layer number.

    Attributes
    ----------
    layers : dict of LayerCalibration
    rotated_values : bool or None
        Whether it is for a model whose weights rotate V
        (:meth:`fastattn.models.LanguageModel.with_rotated_values`). None means that nobody knows:
        samples do not tell, and older files do not either.
    """

    layers: dict[int, LayerCalibration]
    rotated_values: bool | None = None

    def check_model(self, model: Any) -> None:
        """Refuse a model whose V is rotated where this is for one whose V is not, and vice versa.

        Scales, and what a type costs, belong to V as it is stored.

        Parameters
        ----------
        model : fastattn.models.LanguageModel

        Raises
        ------
        CalibrationError
            If they differ. A calibration that does not know is for any model.
        """
        if self.rotated_values is None or self.rotated_values == model.rotated_values:
            return
        words = {True: "rotated by the weights", False: "as they are"}
        raise CalibrationError(
            f"the calibration is for values {words[self.rotated_values]}, the model "
            f"{model.name} has values {words[model.rotated_values]}: --rotate-values, or "
            "with_rotated_values() of the model, must be the same for both"
        )

    def write(self, path: str | Path, *, fastdeploy_prefix: str = "ernie.layers") -> None:
        """Write ``.safetensors``, ``.npz`` or, for FastDeploy, ``.json``.

        Parameters
        ----------
        path : str or Path
        fastdeploy_prefix : str
            Prefix of a layer's number in FastDeploy's names.

        Raises
        ------
        CalibrationError
            If the suffix is unknown, a layer has settings that no operator supports, or
            FastDeploy's file cannot store the results.
        """
        path = Path(path)
        check_suffix(path)
        layers = {n: _with_float32(layer) for n, layer in sorted(self.layers.items())}
        _check(path, layers)
        if path.suffix == ".json":
            write_scales(path, self._static_scales(path), fastdeploy_prefix)
            return
        tensors: dict[str, Array] = {}
        about: dict[str, Any] = {}
        for number, layer in layers.items():
            about[str(number)] = {name: getattr(layer, name) for name in _ABOUT}
            for name in TENSORS:
                tensor = getattr(layer, name)
                if tensor is not None:
                    tensors[f"layers.{number}.{name}"] = tensor
        facts: dict[str, Any] = {"format": FORMAT, "layers": about}
        if self.rotated_values is not None:
            facts[_ROTATED] = self.rotated_values
        write_tensors(path, tensors, facts)

    def _static_scales(self, path: Path) -> dict[int, tuple[str, Array, Array]]:
        found = {}
        for number, layer in self.layers.items():
            k_scales, v_scales = layer.cache_k_out_scale, layer.cache_v_out_scale
            if layer.cache_quant_type not in STATIC_TYPES or k_scales is None or v_scales is None:
                raise CalibrationError(
                    f"{path}: FastDeploy's file holds static scales; layer {number} has type "
                    f"{layer.cache_quant_type}"
                )
            others = layer.cache_k_center, layer.cache_k_feedback
            if layer.cache_k_rotation == "hadamard" or any(x is not None for x in others):
                raise CalibrationError(
                    f"{path}: FastDeploy's file has no place for a rotation, a centre or a "
                    f"feedback, which layer {number} has"
                )
            found[number] = (layer.cache_quant_type, k_scales, v_scales)
        return found

    @classmethod
    def read(cls, path: str | Path, *, cache_quant_type: str | None = None) -> Calibration:
        """Read a file from :meth:`write`, or FastDeploy's ``kv_cache_scale.json``.

        Parameters
        ----------
        path : str or Path
        cache_quant_type : {"cache_int8", "cache_fp8"}, optional
            Type of FastDeploy's scales, which its file does not name.

        Raises
        ------
        CalibrationError
            If the file is of another kind or damaged, or has settings that no layer can use.
        """
        path = Path(path)
        rotated = None
        if path.suffix == ".json":
            if cache_quant_type not in STATIC_TYPES:
                raise CalibrationError(
                    f"{path}: cache_quant_type: FastDeploy's file does not name its type; "
                    f"expected {' or '.join(STATIC_TYPES)}, got {cache_quant_type}"
                )
            scales = read_scales(path, cache_quant_type)
            layers = {n: LayerCalibration(cache_quant_type, k, v) for n, (k, v) in scales.items()}
        else:
            tensors, about = read_tensors(path)
            rotated = _rotated_values(path, about)
            layers = _layers_of(path, tensors, about)
        _check(path, layers)
        return cls(layers, rotated)

    def apply(self, layer: Any, *, place: Any = None) -> None:
        """Set a layer's type, its scales and the transforms of K.

        Parameters
        ----------
        layer : object
            An :class:`fastattn.backends.AttentionLayer` or FastDeploy's layer, with a ``layer_id``.
            Make its cache afterwards, for its new type.
        place : paddle.Place, optional
            Place of the tensors. Default: the current place.

        Raises
        ------
        CalibrationError
            If the layer was not calibrated.
        """
        import paddle

        found = self.layers.get(layer.layer_id)
        if found is None:
            raise CalibrationError(f"layer {layer.layer_id} was not calibrated")
        layer.cache_quant_type_str = found.cache_quant_type
        layer.cache_k_rotation = found.cache_k_rotation
        for name in TENSORS:
            tensor = getattr(found, name)
            on = None if tensor is None else paddle.to_tensor(tensor, place=place)
            setattr(layer, name, on)


def _with_float32(layer: LayerCalibration) -> LayerCalibration:
    tensors: dict[str, Any] = {name: getattr(layer, name) for name in TENSORS}
    with np.errstate(over="ignore"):  # a value that is too large becomes infinite and is refused
        for name, x in tensors.items():
            tensors[name] = None if x is None else np.asarray(x, np.float32)
    return replace(layer, **tensors)


def _check(path: Path, layers: dict[int, LayerCalibration]) -> None:
    try:
        check_layers(layers)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from None


def _rotated_values(path: Path, about: Mapping[str, Any]) -> bool | None:
    rotated = about.get(_ROTATED)
    if _ROTATED in about and not isinstance(rotated, bool):
        raise CalibrationError(f"{path}: {_ROTATED}: expected true or false, got {rotated!r:.40}")
    return rotated


def _layers_of(
    path: Path, tensors: Mapping[str, Array], about: Mapping[str, Any]
) -> dict[int, LayerCalibration]:
    """Layers from a file's arrays and attributes; every array and attribute must belong to one."""
    if set(about) - {_ROTATED} != {"format", "layers"} or about["format"] != FORMAT:
        raise CalibrationError(
            f"{path}: expected format {FORMAT!r}, got {about.get('format', 'none')!r:.40}"
        )
    if not isinstance(about["layers"], dict):
        raise CalibrationError(f"{path}: expected layers by their number")
    left = dict(tensors)
    layers: dict[int, LayerCalibration] = {}
    for text, told in about["layers"].items():
        try:
            number = layer_number(text)
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from None
        if not (isinstance(told, dict) and set(told) == set(_ABOUT)):
            raise CalibrationError(f"{path}: layer {number}: expected {', '.join(_ABOUT)}")
        own: dict[str, Any] = {name: left.pop(f"layers.{number}.{name}", None) for name in TENSORS}
        layers[number] = LayerCalibration(**told, **own)
    if left:
        raise CalibrationError(f"{path}: {min(left)!r:.80} belongs to no layer")
    return layers
