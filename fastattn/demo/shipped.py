"""The trained models that the package ships, each with a recipe that tells how it was made.

``model.npz`` and ``recipe.json`` are those of grouped queries, ``mla_sparse.npz`` and
``mla_sparse.json`` those of latent attention.

Matrices are int8 with one fp32 scale a channel, vectors fp32. scripts/make_demo_model.py writes
the files; docs/demo.md has what int8 costs beside 16 bits.
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
    """Of a model."""

    model: Path
    recipe: Path


LATENT = Files(MODEL_FILE.with_name("mla_sparse.npz"), MODEL_FILE.with_name("mla_sparse.json"))

_SCALE = ".scale"
_LARGEST = 127


def pack(weights: Weights) -> dict[str, Array]:
    """Arrays to store: int8 ``name`` and fp32 ``name.scale`` of a matrix, a vector as it is.

    A scale belongs to a column ``[1, out]`` of a matrix ``[in, out]``, and to a row
    ``[vocabulary, 1]`` of the embedding, whose rows are the columns of the tied output layer.
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
    """fp32 weights of the arrays that :func:`pack` gave."""
    return {
        name: array.astype(np.float32) * arrays[name + _SCALE] if array.ndim == 2 else array
        for name, array in arrays.items()
        if not name.endswith(_SCALE)
    }


def default_files() -> Files:
    """Those of the model with grouped queries."""
    return Files(MODEL_FILE, RECIPE_FILE)


def save(weights: Weights, recipe: dict[str, Any], files: Files | None = None) -> None:
    """Write both files; the recipe gets the digest of the other one."""
    files = files or default_files()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **pack(weights))  # type: ignore[arg-type]
    files.model.write_bytes(buffer.getvalue())
    recipe = {**recipe, "model_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    files.recipe.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def recipe(files: Files | None = None) -> dict[str, Any]:
    """How a shipped model was made: sizes, schedule, text, versions and perplexities.

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
        raise ValueError(_damaged(path, "it holds no object"))
    return found


def load(config: Sizes, files: Files | None = None) -> Weights:
    """fp32 weights of a shipped model.

    Parameters
    ----------
    config : Config or LatentConfig
        Sizes that the weights have to fit.
    files : Files, optional
        Default: those of the model with grouped queries.

    Raises
    ------
    ValueError
        If the file is missing, is not the one that the recipe tells of, or has other sizes.
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
