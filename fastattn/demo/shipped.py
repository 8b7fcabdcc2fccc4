"""The trained model that the package ships: ``model.npz``, and ``recipe.json`` that tells how.

Matrices are int8 with one fp32 scale a channel, vectors fp32. scripts/make_demo_model.py writes
both files; docs/demo.md has what int8 costs beside 16 bits.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.demo.model import Config, Weights, weight_shapes
from fastattn.reference.numerics import Array

MODEL_FILE = Path(__file__).with_name("model.npz")
RECIPE_FILE = Path(__file__).with_name("recipe.json")

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


def save(weights: Weights, recipe: dict[str, Any]) -> None:
    """Write both files; the recipe gets the digest of the other one."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **pack(weights))  # type: ignore[arg-type]
    MODEL_FILE.write_bytes(buffer.getvalue())
    recipe = {**recipe, "model_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    RECIPE_FILE.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def recipe() -> dict[str, Any]:
    """How the shipped model was made: sizes, schedule, text, versions and perplexities.

    Raises
    ------
    ValueError
        If the file is missing or damaged.
    """
    try:
        found = json.loads(RECIPE_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(_damaged(RECIPE_FILE, str(error))) from None
    if not isinstance(found, dict):
        raise ValueError(_damaged(RECIPE_FILE, "it holds no object"))
    return found


def load(config: Config) -> Weights:
    """fp32 weights of the shipped model.

    Parameters
    ----------
    config : Config
        Sizes that the weights have to fit.

    Raises
    ------
    ValueError
        If the file is missing, is not the one that the recipe tells of, or has other sizes.
    """
    expected = recipe().get("model_sha256")
    try:
        data = MODEL_FILE.read_bytes()
    except OSError as error:
        raise ValueError(_damaged(MODEL_FILE, str(error))) from None
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ValueError(_damaged(MODEL_FILE, f"expected SHA-256 {expected}, got {found}"))
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            weights = unpack({name: file[name] for name in file.files})
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(_damaged(MODEL_FILE, str(error))) from None
    shapes = {name: weight.shape for name, weight in weights.items()}
    if shapes != weight_shapes(config):
        raise ValueError(_damaged(MODEL_FILE, f"its sizes are not those of {config}"))
    return weights


def _damaged(path: Path, problem: str) -> str:
    return (
        f"the shipped model cannot be used: {path}: {problem}; install fastattn again, or train "
        "one with --train"
    )
