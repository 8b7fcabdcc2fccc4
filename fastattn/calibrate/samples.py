"""Samples of a model's layers: ``.npz`` files and dumps of ``paddle.save``."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fastattn.calibrate.errors import CalibrationError
from fastattn.calibrate.tensor_files import DAMAGED
from fastattn.reference.numerics import Array

_NAME = re.compile(r"(?:^|\.)(?:layers\.)?(\d+)\.(key|value|query)$")
_EXPECTED = "expected arrays named layers.0.key, layers.0.value, layers.0.query, layers.1.key, .."


@dataclass
class LayerSamples:
    """Tokens of one sequence, as a layer's cache and attention get them.

    Attributes
    ----------
    key, value : array of float32, shape [T, KV, D]
        K after bias, norm and rotation, as it is written; V as it is written.
    query : array of float32, shape [n, H, D], or None
        The sequence's last n queries, rotated; n is at most T.
    """

    key: Array
    value: Array
    query: Array | None = None

    def check(self, name: str) -> LayerSamples:
        """These samples, if their shapes fit each other.

        Raises
        ------
        CalibrationError
            If they do not, or a number is not finite.
        """
        arrays = {"key": self.key, "value": self.value}
        if self.query is not None:
            arrays["query"] = self.query
        for kind, array in arrays.items():
            if array.ndim != 3 or 0 in array.shape:
                raise CalibrationError(
                    f"{name}.{kind}: expected shape [tokens, heads, channels], got "
                    f"{list(array.shape)}"
                )
            if not np.isfinite(array).all():
                raise CalibrationError(f"{name}.{kind}: not all numbers are finite")
        if self.key.shape != self.value.shape:
            raise CalibrationError(
                f"{name}: expected key and value of one shape, got {list(self.key.shape)} and "
                f"{list(self.value.shape)}"
            )
        if self.query is None:
            return self
        tokens, kv_heads, dim = self.key.shape
        queries, heads, q_dim = self.query.shape
        if queries > tokens or heads % kv_heads or q_dim != dim:
            raise CalibrationError(
                f"{name}.query: expected at most {tokens} tokens, a multiple of {kv_heads} heads "
                f"and {dim} channels, got {list(self.query.shape)}"
            )
        return self


def _as_float32(name: str, array: Any) -> Array:
    if hasattr(array, "numpy") and hasattr(array, "astype") and not isinstance(array, np.ndarray):
        array = array.astype("float32").numpy()  # of Paddle: its NumPy arrays have no bfloat16
    array = np.asarray(array)
    if array.dtype == np.dtype("V2"):  # what a file makes of NumPy's bfloat16
        array = array.view(ml_dtypes.bfloat16)
    if array.dtype == object or not (
        np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16
    ):
        raise CalibrationError(f"{name}: expected floating point numbers, got {array.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            found.update(_flat(value, path))
        else:
            found[path] = value
    return found


def _load(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    if zipfile.is_zipfile(path):
        try:
            with np.load(path) as file:
                return {name: file[name] for name in file.files}
        except DAMAGED as error:
            raise CalibrationError(f"{path}: no .npz file: {error}") from None
    if path.suffix == ".npz":
        raise CalibrationError(f"{path}: no .npz file")
    import paddle

    try:
        loaded = paddle.load(str(path))
    except Exception as error:  # Paddle raises anything for a file that is not its own
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise CalibrationError(
            f"{path}: no .npz file, and no dump of Paddle: {reason[0]}"
        ) from None
    if not isinstance(loaded, Mapping):
        raise CalibrationError(f"{path}: {_EXPECTED}, got a {type(loaded).__name__}")
    return loaded


def read_samples(path: str | Path) -> dict[int, LayerSamples]:
    """Samples of a file, by layer.

    Parameters
    ----------
    path : str or Path
        An ``.npz`` file, or what ``paddle.save`` wrote of a dict, flat or of dicts, with arrays
        ``layers.N.key`` and ``layers.N.value``, [T, KV, D], and ``layers.N.query``, [n, H, D], of
        the layers N. float32, float16 or bfloat16. Read dumps only of whom you trust: they are
        pickles.

    Raises
    ------
    CalibrationError
        If the file is something else; the message says what is expected.
    """
    path = Path(path)
    found: dict[int, dict[str, Array]] = {}
    names: dict[tuple[int, str], str] = {}
    for name, array in _flat(_load(path)).items():
        match = _NAME.search(name)
        if match:
            layer, kind = int(match[1]), match[2]
            first = names.setdefault((layer, kind), name)
            if first != name:
                raise CalibrationError(
                    f"{path}: both {first} and {name} are the {kind} of layer {layer}"
                )
            found.setdefault(layer, {})[kind] = _as_float32(f"{path}: {name}", array)
    if not found:
        raise CalibrationError(f"{path}: {_EXPECTED}, found none")
    samples = {}
    for layer, arrays in sorted(found.items()):
        name = f"{path}: layers.{layer}"
        for kind in ("key", "value"):
            if kind not in arrays:
                raise CalibrationError(f"{name}.{kind} is missing")
        query = arrays.get("query")
        samples[layer] = LayerSamples(arrays["key"], arrays["value"], query).check(name)
    return samples
