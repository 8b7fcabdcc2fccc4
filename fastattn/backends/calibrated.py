"""Transforms of K of a server's layers, from a file that an environment variable names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle

from fastattn import env
from fastattn.functional._cache_types import DYNAMIC_TYPES

if TYPE_CHECKING:
    from fastattn.calibrate import LayerCalibration


class Calibrated:
    """Calibration from a file, for layers that have none themselves.

    Raises
    ------
    ValueError
        If the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from fastattn.calibrate import Calibration  # few servers need this import

        self.path = path
        self._calibration = Calibration.read(path)

    @classmethod
    def from_env(cls) -> Calibrated | None:
        """The calibration of ``FASTATTN_CALIBRATION``, or None if it is not set."""
        path = env.calibration()
        return None if path is None else cls(path)

    def of(self, layer: Any, quant_type: str, place: Any) -> tuple[str | None, Any, Any]:
        """(rotation, centre or None, feedback or None) of a layer, tensors on `place`.

        Raises
        ------
        ValueError
            If the file does not match this layer and type. Also if the layer holds its scales:
            scales in the file are for transformed keys, and the layer's own are not.
        """
        found = self._calibration.layers.get(layer.layer_id)
        if found is None:
            raise ValueError(f"{self.path}: layer {layer.layer_id} was not calibrated")
        if quant_type not in DYNAMIC_TYPES:
            return self._of_static_type(layer, found, quant_type)
        if found.cache_quant_type != quant_type:
            raise ValueError(
                f"{self.path}: layer {layer.layer_id} was calibrated for type "
                f"{found.cache_quant_type}, and has {quant_type}"
            )
        on = [
            None if x is None else paddle.to_tensor(x, place=place)
            for x in (found.cache_k_center, found.cache_k_feedback)
        ]
        return found.cache_k_rotation, on[0], on[1]

    def _of_static_type(
        self, layer: Any, found: LayerCalibration, quant_type: str
    ) -> tuple[str, Any, Any]:
        if found.cache_quant_type == quant_type == "none":
            return "none", None, None
        raise ValueError(
            f"{self.path}: layer {layer.layer_id} has type {quant_type}, whose static scales come "
            "from the layer: give it all of a calibration by Calibration.apply"
        )


def digest() -> str:
    """Identifies the file with which caches were written; empty without a file."""
    path = env.calibration()
    if path is None:
        return ""
    return "-" + hashlib.sha256(path.read_bytes()).hexdigest()[:12]
