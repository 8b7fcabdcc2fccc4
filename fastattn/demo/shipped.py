"""The trained models in the package, each with a recipe that describes how it was made.

``model.npz`` and ``recipe.json`` belong to the model with grouped queries, ``mla_sparse.npz`` and
``mla_sparse.json`` to the model with latent attention.

Matrices are int8 with one fp32 scale per channel; vectors are fp32. scripts/make_demo_model.py
writes the files. docs/demo.md compares int8 with 16 bits.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastattn.demo.model import Sizes, Weights, weight_shapes
from fastattn.reference.numerics import Array

MODEL_FILE = Path(__file__).with_name("model.npz")
RECIPE_FILE = Path(__file__).with_name("recipe.json")


class Files(NamedTuple):
    """Files of a model."""

    model: Path
    recipe: Path


LATENT = Files(MODEL_FILE.with_name("mla_sparse.npz"), MODEL_FILE.with_name("mla_sparse.json"))

_SCALE = ".scale"
_LARGEST = 127


def pack(weights: Weights) -> dict[str, Array]:
    """Arrays to store: int8 ``name`` and fp32 ``name.scale`` for a matrix; a vector is unchanged.

    A matrix ``[in, out]`` has one scale per column, ``[1, out]``. The embedding has one per row,
    ``[vocabulary, 1]``, because its rows are the columns of the tied output layer.
    """
    arrays: dict[str, Array] = {}
    for name, weight in weights.items():
        if weight.ndim == 1:
            arrays[name] = weight.astype(np.float32)
            continue
        largest = np.abs(weight).max(axis=1 if name == "embedding" else 0, keepdims=True)
        scale = np.maximum(largest, np.float32(1e-12)) / np.float32(_LARGEST)
        arrays[name] = np.rint(weight / scale).clip(-_LARGEST, _LARGEST).astype(np.int8)
        arrays[name + _SCALE] = scale.astype(np.float32)
    return arrays


def unpack(arrays: dict[str, Array]) -> Weights:
    """fp32 weights from the arrays of :func:`pack`."""
    return {
        name: array.astype(np.float32) * arrays[name + _SCALE] if array.ndim == 2 else array
        for name, array in arrays.items()
        if not name.endswith(_SCALE)
    }


def default_files() -> Files:
    """Files of the model with grouped queries."""
    return Files(MODEL_FILE, RECIPE_FILE)


def save(weights: Weights, recipe: dict[str, Any], files: Files | None = None) -> None:
    """Write both files. The recipe contains the digest of the other file."""
    files = files or default_files()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **pack(weights))  # type: ignore[arg-type]
    files.model.write_bytes(buffer.getvalue())
    recipe = {**recipe, "model_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    files.recipe.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def recipe(files: Files | None = None) -> dict[str, Any]:
    """Origin of a shipped model: sizes, schedule, text, versions and perplexities.

    Raises
    ------
    ValueError
        If the file is missing or damaged.
    """
    path = (files or default_files()).recipe
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(_damaged(path, str(error))) from None
    if not isinstance(found, dict):
        raise ValueError(_damaged(path, "it is not an object"))
    return found


def load(config: Sizes, files: Files | None = None) -> Weights:
    """fp32 weights of a shipped model.

    Parameters
    ----------
    config : Config or LatentConfig
        Sizes that the weights must have.
    files : Files, optional
        Default: the files of the model with grouped queries.

    Raises
    ------
    ValueError
        If the file is missing, does not match its recipe, or has other sizes.
    """
    files = files or default_files()
    path, expected = files.model, recipe(files).get("model_sha256")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(_damaged(path, str(error))) from None
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ValueError(_damaged(path, f"expected SHA-256 {expected}, got {found}"))
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            weights = unpack({name: file[name] for name in file.files})
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(_damaged(path, str(error))) from None
    shapes = {name: weight.shape for name, weight in weights.items()}
    if shapes != weight_shapes(config):
        raise ValueError(_damaged(path, f"its sizes do not match {config}"))
    return weights


def _damaged(path: Path, problem: str) -> str:
    return (
        f"the shipped model cannot be used: {path}: {problem}; install fastattn again, or train "
        "one with --train"
    )
