"""The files of a dumped call: tensors as safetensors, all else as JSON, with checksums.

A call is a folder::

    000017-paged_attention-p4242/
        call.json            arguments, shapes, strides, kernel, machine, checksums
        inputs.safetensors   what the tensors held before the call
        results.safetensors  what the call returned or wrote in place, if it came back

``call.json`` is written after the files that it names, so that a folder without it was left
unfinished. It is written once more when the call returns: a process that died in the call leaves
the inputs and ``"status": "started"``. Every file is written under another name, flushed to the
disk and renamed. Only the user may read it: tensors hold what users of a server typed.

Nothing that is read can run code. The checksums find files that were damaged or changed by
accident; they do not prove who wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray

Array = NDArray[Any]

FORMAT = 1
CALL, INPUTS, RESULTS = "call.json", "inputs.safetensors", "results.safetensors"

#: Paddle's name of a dtype -> the name in safetensors, bytes of an element.
DTYPES = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "int16": ("I16", 2),
    "int32": ("I32", 4),
    "int64": ("I64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
}
_NAMES = {theirs: ours for ours, (theirs, _) in DTYPES.items()}


class DumpError(ValueError):
    """A dump that cannot be read: damaged, changed, unfinished or of another format."""


class Stored(NamedTuple):
    """Elements of a tensor in C order, as bytes."""

    dtype: str  # Paddle's name
    shape: tuple[int, ...]
    data: Array  # uint8, flat


class Dump(NamedTuple):
    """A call as it was read."""

    folder: Path
    facts: dict[str, Any]
    inputs: dict[str, Stored]
    results: dict[str, Stored]


def _safetensors_header(tensors: Mapping[str, Stored]) -> bytes:
    """Header of a file; the package would want copies of all tensors to write one."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": DTYPES[dtype][0],
            "shape": list(shape),
            "data_offsets": [at, at + data.size],
        }
        at += data.size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_atomically(path: Path, parts: list[Any]) -> str:
    """Write a file of mode 0600 that is there whole or not at all.

    Returns
    -------
    str
        SHA-256 of its bytes.
    """
    digest = hashlib.sha256()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Stored]) -> str:
    """Write a safetensors file; returns its SHA-256."""
    header = _safetensors_header(tensors)
    parts: list[Any] = [len(header).to_bytes(8, "little"), header]
    # hashlib and files take buffers, but no empty ones of NumPy.
    parts += [t.data.data for t in tensors.values() if t.data.size]
    return write_atomically(path, parts)


def _own_digest(facts: Mapping[str, Any]) -> str:
    """SHA-256 of a call's facts without the field that holds it."""
    text = json.dumps({k: v for k, v in facts.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``call.json``; NaN and infinities, which JSON lacks, are Python's words for them."""
    plain = json.loads(json.dumps(facts))  # tuples become lists before the digest is taken
    text = json.dumps({**plain, "sha256": _own_digest(plain)}, indent=1)
    write_atomically(folder / CALL, [text.encode() + b"\n"])


def _read_bytes(path: Path, expected: Any) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DumpError(f"{path}: {error.strerror or error}") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise DumpError(f"{path}: {CALL} has another SHA-256: the file was changed")
    return data


def _names_in_header(data: bytes) -> list[str]:
    """Names of the tensors of a valid safetensors file, in the order of its header."""
    size = int.from_bytes(data[:8], "little")
    return [name for name in json.loads(data[8 : 8 + size]) if name != "__metadata__"]


def read_tensors(path: Path, expected: Any) -> dict[str, Stored]:
    """Tensors of a safetensors file whose SHA-256 is `expected`."""
    data = _read_bytes(path, expected)
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise DumpError(f"{path}: not a safetensors file: {error}") from None
    # safetensors returns the tensors in an order of its own, a new one each time.
    entries = dict(found)
    tensors = {}
    for name in _names_in_header(data):
        entry = entries[name]
        if entry["dtype"] not in _NAMES:
            raise DumpError(f"{path}: {name}: dtype {entry['dtype']} is not one of a call")
        values = np.frombuffer(entry["data"], np.uint8)
        tensors[name] = Stored(_NAMES[entry["dtype"]], tuple(entry["shape"]), values)
    return tensors


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``call.json`` says, after a check of its own checksum.

    Raises
    ------
    DumpError
    """
    path = folder / CALL
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DumpError(f"{path}: missing: the dump was left unfinished") from None
    except (OSError, ValueError) as error:
        raise DumpError(f"{path}: {error}") from None
    if not isinstance(facts, dict) or facts.get("sha256") != _own_digest(facts):
        raise DumpError(f"{path}: its content does not fit its checksum: it was changed")
    if facts.get("format") != FORMAT:
        raise DumpError(f"{path}: format {facts.get('format')!r}; this fastattn reads {FORMAT}")
    return facts


def read_call(folder: Path) -> Dump:
    """A dumped call, after a check of every checksum.

    Raises
    ------
    DumpError
    """
    facts = read_facts(folder)
    files = facts["files"]
    inputs = read_tensors(folder / INPUTS, files[INPUTS])
    results = read_tensors(folder / RESULTS, files[RESULTS]) if RESULTS in files else {}
    return Dump(folder, facts, inputs, results)


def calls_in(folder: Path) -> list[Path]:
    """Folders of the dumped calls in a folder, in the order of the calls; itself if it is one."""
    if (folder / CALL).exists():
        return [folder]
    found = [p for p in folder.iterdir() if p.is_dir() and p.name[:1].isdigit()]
    return sorted(found, key=lambda p: (p.name.rpartition("-p")[2], p.name))
