"""Samples of a model's layers: ``.npz``, ``.safetensors`` and dumps of ``paddle.save``."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fastattn.calibrate.checks import layer_number
from fastattn.calibrate.errors import CalibrationError, reading
from fastattn.calibrate.tensor_files import read_npz, read_safetensors
from fastattn.functional._cache_types import value_dim
from fastattn.reference.numerics import Array

_NAME = re.compile(r"(?:^|\.)(?:layers\.)?([0-9]+)\.(key|value|query)$")
_EXPECTED = "expected arrays named layers.0.key, layers.0.value, layers.0.query, layers.1.key, .."


@dataclass
class LayerSamples:
    """Tokens of one sequence, as a layer's cache and attention receive them.

    Attributes
    ----------
    key, value : array of float32, shape [T, KV, D]
        K after bias, norm and rotation, as it is written to the cache. V as it is written. V has
        128 channels if K has 192.
    query : array of float32, shape [n, H, D], or None
        The last n queries of the sequence, rotated; n is at most T.
    window : int
        Keys that a query sees, its own included; 0 means all.
    """

    key: Array
    value: Array
    query: Array | None = None
    window: int = 0

    def check(self, name: str) -> LayerSamples:
        """Return these samples if their shapes match each other.

        Raises
        ------
        CalibrationError
            If they do not match, or a number is not finite.
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
        tokens, kv_heads, dim = self.key.shape
        if self.value.shape != (tokens, kv_heads, value_dim(dim)):
            raise CalibrationError(
                f"{name}: expected key and value of one shape (of K with 192 channels, V has 128), "
                f"got {list(self.key.shape)} and {list(self.value.shape)}"
            )
        if self.query is None:
            return self
        queries, heads, q_dim = self.query.shape
        if queries > tokens or heads % kv_heads or q_dim != dim:
            raise CalibrationError(
                f"{name}.query: expected at most {tokens} tokens, a multiple of {kv_heads} heads "
                f"and {dim} channels, got {list(self.query.shape)}"
            )
        return self


def _as_float32(path: Path, name: str, array: Any) -> Array:
    with reading(path, f"{name}: expected an array of numbers"):
        if hasattr(array, "numpy") and hasattr(array, "astype"):
            array = array.astype("float32").numpy()  # arrays of Paddle have no bfloat16
        array = np.asarray(array)
    if array.dtype == np.dtype("V2"):  # a file's form of NumPy's bfloat16
        array = array.view(ml_dtypes.bfloat16)
    if array.dtype == object or not (
        np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16
    ):
        raise CalibrationError(
            f"{path}: {name}: expected floating point numbers, got {array.dtype}"
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        below = _flat(value, path) if isinstance(value, Mapping) else {path: value}
        for twice in found.keys() & below.keys():
            raise ValueError(f"{twice} is there twice")
        found.update(below)
    return found


def _load(path: Path, allow_pickle: bool) -> Mapping[Any, Any]:
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if path.suffix == ".npz" or zipfile.is_zipfile(path):
        return read_npz(path)
    if not allow_pickle:
        raise CalibrationError(
            f"{path}: expected an .npz or .safetensors file. Dumps of Paddle are pickles, which "
            "can run any code: --allow-pickle (in Python allow_pickle=True) reads one, if you "
            "trust whoever made it"
        )
    import paddle

    with reading(path, "not a dump of Paddle"):
        loaded = paddle.load(str(path))
    if not isinstance(loaded, Mapping):
        raise CalibrationError(f"{path}: {_EXPECTED}, got a {type(loaded).__name__}")
    return loaded


def read_samples(path: str | Path, *, allow_pickle: bool = False) -> dict[int, LayerSamples]:
    """Samples in a file, by layer.

    Parameters
    ----------
    path : str or Path
        An ``.npz`` or ``.safetensors`` file, or a ``paddle.save`` file of a flat or nested dict.
        Each layer N has the arrays ``layers.N.key`` and ``layers.N.value``, [T, KV, D], and
        ``layers.N.query``, [n, H, D], of float32, float16 or bfloat16.
    allow_pickle : bool
        Whether to read dumps of Paddle, which are pickles and can run any code.

    Raises
    ------
    CalibrationError
        If the file is of another kind. The message says what is expected.
    """
    path = Path(path)
    found: dict[int, dict[str, Array]] = {}
    names: dict[tuple[int, str], str] = {}
    loaded = _load(path, allow_pickle)
    with reading(path):
        arrays = _flat(loaded)
    for name, array in arrays.items():
        match = _NAME.search(name)
        if match:
            try:
                layer, kind = layer_number(match[1]), match[2]
            except CalibrationError as error:
                raise CalibrationError(f"{path}: {name:.80}: {error}") from None
            first = names.setdefault((layer, kind), name)
            if first != name:
                raise CalibrationError(
                    f"{path}: both {first} and {name} are the {kind} of layer {layer}"
                )
            found.setdefault(layer, {})[kind] = _as_float32(path, name, array)
    if not found:
        raise CalibrationError(f"{path}: {_EXPECTED}, found none")
    samples = {}
    for layer, own in sorted(found.items()):
        name = f"{path}: layers.{layer}"
        for kind in ("key", "value"):
            if kind not in own:
                raise CalibrationError(f"{name}.{kind} is missing")
        samples[layer] = LayerSamples(own["key"], own["value"], own.get("query")).check(name)
    return samples
