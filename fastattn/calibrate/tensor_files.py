"""Named float32 arrays and strings in a file: ``.safetensors`` and ``.npz``."""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.calibrate.errors import CalibrationError
from fastattn.reference.numerics import Array

_SUFFIXES = "expected .safetensors, .npz or .json"
_METADATA = "__metadata__"

#: What NumPy, its archives and JSON raise for a file that is damaged.
DAMAGED = (
    *(OSError, ValueError, EOFError, RuntimeError, OverflowError, SyntaxError, MemoryError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)


def write_tensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays and strings; the suffix decides.

    A safetensors file is the length of its header in 8 bytes, the header in JSON, and the arrays.
    """
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {_METADATA: np.array(json.dumps(dict(metadata))), **tensors}
        with path.open("wb") as file:
            np.savez(file, **arrays)
        return
    if path.suffix != ".safetensors":
        raise CalibrationError(f"{path}: {_SUFFIXES}")
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.size
        shape = list(tensor.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, "<f4").tobytes())


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """What :func:`write_tensors` wrote.

    Raises
    ------
    CalibrationError
        If the file is missing, damaged or of another kind.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise CalibrationError(f"{path}: {_SUFFIXES}")
    try:
        if path.suffix == ".npz":
            tensors, about = _read_npz(path)
        else:
            tensors, about = _read_safetensors(path.read_bytes())
    except (*DAMAGED, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(f"{path}: cannot be read: {error}") from None
    if not isinstance(about, dict):
        raise CalibrationError(f"{path}: cannot be read: {_METADATA} is no object")
    return tensors, about


def _read_npz(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    with np.load(path) as file:
        tensors = {name: file[name] for name in file.files if name != _METADATA}
        about = json.loads(str(file[_METADATA])) if _METADATA in file.files else {}
    return tensors, about


def _read_safetensors(data: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("no safetensors file")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop(_METADATA, {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        if entry["dtype"] != "F32" or end - begin != 4 * math.prod(shape):
            raise ValueError(f"{name}: expected float32 of shape {shape}")
        body = data[8 + length + begin : 8 + length + end]
        tensors[name] = np.frombuffer(body, "<f4").reshape(shape)
    return tensors, metadata
