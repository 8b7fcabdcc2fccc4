"""Files with named arrays and attributes: ``.safetensors`` and ``.npz``."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fastattn.calibrate.errors import CalibrationError, reading
from fastattn.reference.numerics import Array

_SUFFIXES = (".safetensors", ".npz", ".json")

#: Metadata entry with everything but the arrays, in JSON. There is only one entry, because
#: safetensors writes several in any order, and equal calibrations should have equal bytes.
_ENTRY = "fastattn-calibration"
_CHECKSUM = "sha256"

#: Entries in which version 1, which had no checksum, stored its format.
_OLD_ENTRIES = ("__metadata__", "format")

#: safetensors dtypes that can be read. Old versions of its own reader do not know bfloat16.
_DTYPES: dict[str, Any] = {
    **{f"F{8 * size}": f"<f{size}" for size in (2, 4, 8)},
    **{f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)},
    "BF16": ml_dtypes.bfloat16,
}


def parse_json(text: str | bytes) -> Any:
    """Value of a JSON text.

    Raises
    ------
    ValueError
        If it is not JSON, or an object has a name twice.
    RecursionError
        If it is nested too deeply.
    """

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name!r} is there twice")
            found[name] = value
        return found

    return json.loads(text, object_pairs_hook=unique)


def checksum(tensors: Mapping[str, Array], about: Mapping[str, Any]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of the arrays, and of the attributes."""
    shapes = {name: [x.dtype.name, list(x.shape)] for name, x in tensors.items()}
    rest = {name: value for name, value in about.items() if name != _CHECKSUM}
    digest = hashlib.sha256(json.dumps([rest, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        x = np.ascontiguousarray(tensors[name])
        digest.update(x.astype(x.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def check_suffix(path: Path) -> None:
    """Refuse a file that is neither the calibrator's nor FastDeploy's.

    Raises
    ------
    CalibrationError
    """
    if path.suffix not in _SUFFIXES:
        raise CalibrationError(
            f"{path}: expected {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}, got "
            f"{path.suffix or 'no suffix'}"
        )


def write_tensors(path: Path, tensors: Mapping[str, Array], about: Mapping[str, Any]) -> None:
    """Write float32 arrays and attributes with a checksum, in the format of the suffix."""
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    text = json.dumps({**about, _CHECKSUM: checksum(tensors, about)}, sort_keys=True)
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {_ENTRY: np.array(text), **tensors}
        with path.open("wb") as file:
            np.savez(file, **arrays)
        return
    from safetensors.numpy import save

    path.write_bytes(save(tensors, metadata={_ENTRY: text}))


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read arrays and attributes that :func:`write_tensors` wrote.

    Raises
    ------
    CalibrationError
        If the file is missing, damaged or of another kind, or its checksum does not match.
    """
    check_suffix(path)
    if path.suffix == ".npz":
        tensors = read_npz(path)
        text = tensors.pop(_ENTRY, None)
        old = any(name in tensors for name in _OLD_ENTRIES)
    else:
        tensors, metadata = read_safetensors(path)
        text = metadata.get(_ENTRY)
        old = any(name in metadata for name in _OLD_ENTRIES)
    if text is None and old:
        raise CalibrationError(
            f"{path}: cannot be read: it has no checksum, as an older version wrote it: calibrate "
            "again"
        )
    if text is None:
        raise CalibrationError(f"{path}: not written by `python -m fastattn calibrate`")
    with reading(path):
        about = parse_json(str(text))
    if not isinstance(about, dict) or not isinstance(about.get(_CHECKSUM), str):
        raise CalibrationError(f"{path}: cannot be read: it has no checksum")
    if about.pop(_CHECKSUM) != checksum(tensors, about):
        raise CalibrationError(f"{path}: damaged: its checksum does not match its content")
    return tensors, about


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays of an ``.npz`` file. Arrays of Python objects are refused, because they are
    pickles.
    """
    found: dict[str, Array] = {}
    with reading(path), zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            name, suffix = entry[:-4], entry[-4:]
            if suffix != ".npy":
                continue
            if name in found:
                raise ValueError(f"{name} is there twice")
            # NumPy's own reader stops at the end of the array according to its header. zipfile
            # checks the CRC of the whole entry only at the end of the entry.
            file = io.BytesIO(archive.read(entry))
            found[name] = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):
                raise ValueError(f"{name} is longer than its shape")
    return found


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """All arrays of plain numbers in a ``.safetensors`` file, and its metadata."""
    import safetensors

    with reading(path):
        data = path.read_bytes()
        # The package has checked the header and the ranges of the arrays. It gives the metadata
        # only to a second open of the file.
        entries = safetensors.deserialize(data)
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__") or {}
        tensors = {
            name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in entries
            if entry["dtype"] in _DTYPES
        }
    return tensors, metadata
