"""Real language models, served from paged caches by this package's operators.

Llama (and what has its layers), Qwen2, Qwen3 and Gemma 3, from GGUF files or from folders with
safetensors. They are for measuring what a cache type costs a model and for small demonstrations,
not for serving: everything but the attention runs in fp32.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.models.config import ModelConfig, ModelError
from fastattn.models.dense import Dense, PaddleDense
from fastattn.models.find import KNOWN, find
from fastattn.models.rotate_values import rotate_values
from fastattn.models.tokenizer import Tokenizer
from fastattn.models.weights import Weights

__all__ = ["KNOWN", "LanguageModel", "ModelConfig", "ModelError", "Tokenizer", "load"]


@dataclass
class LanguageModel:
    """A model that was read.

    Attributes
    ----------
    name : str
    path : Path
    config : ModelConfig
    weights : Weights
    tokenizer : Tokenizer
    dense : Dense
        All but the attention, by NumPy.
    rotated_values : bool
        Whether the weights rotate V.
    """

    name: str
    path: Path
    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    rotated_values: bool = False

    def __post_init__(self) -> None:
        self.dense = Dense(self.config, self.weights)

    def with_rotated_values(self) -> LanguageModel:
        """The same model, whose V is rotated (:mod:`fastattn.models.rotate_values`)."""
        if self.rotated_values:  # a second rotation would be the way back
            return self
        weights = rotate_values(self.weights, self.config)
        return LanguageModel(self.name, self.path, self.config, weights, self.tokenizer, True)

    def on(self, place: Any) -> Dense:
        """The model's dense layers in Paddle, on a place."""
        return PaddleDense(self.config, self.weights, place)


def load(name: str) -> LanguageModel:
    """Read a model.

    Parameters
    ----------
    name : str
        ``smollm2``, ``gemma3-270m``, a ``.gguf`` file, or a folder with ``config.json``. ``toy`` is
        the model of the demo, which comes with this package. ``auto`` is ``smollm2`` if its package
        is installed, else ``toy``; the result's `name` says which.

    Raises
    ------
    ModelError
        If there is none, or it is one that this package does not run.
    """
    if name == "auto":
        with contextlib.suppress(ModelError):
            return load("smollm2")
        name = "toy"
    if name == "toy":
        from fastattn.demo.shipped import MODEL_FILE
        from fastattn.models.toy import read_toy

        return LanguageModel(name, MODEL_FILE, *read_toy())
    path = find(name)
    if path.is_dir():
        from fastattn.models.hf_folder import read_hf_folder

        return LanguageModel(name, path, *read_hf_folder(path))
    from fastattn.models.gguf_file import read_gguf

    return LanguageModel(name, path, *read_gguf(path))
