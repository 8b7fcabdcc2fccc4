"""The demo's two models: grouped queries, and latent attention with an indexer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastattn.demo import (
    gradient,
    latent_gradient,
    latent_model,
    latent_train,
    model,
    shipped,
    train,
)
from fastattn.demo.model import Weights
from fastattn.reference.numerics import Array


class Kind(NamedTuple):
    """The components of one ``--attention``.

    Attributes
    ----------
    config, schedule : Config and Schedule, or LatentConfig and LatentSchedule
    model : type
        Takes a configuration, weights and a place.
    forward : callable
        The model in NumPy with dense attention. Takes weights, a configuration and tokens.
    train : callable
        Takes a corpus, a configuration, a schedule and optionally a progress callback.
    files : Files
        Files of the shipped model.
    """

    config: Any
    schedule: Any
    model: Any
    forward: Callable[[Weights, Any, Array], Any]
    train: Callable[..., Weights]
    files: shipped.Files


def find(attention: str) -> Kind:
    """The model of an ``--attention``: ``"gqa"`` or ``"mla-sparse"``."""
    if attention == "gqa":
        return Kind(
            model.Config(),
            train.Schedule(),
            model.Model,
            gradient.forward,
            train.train,
            shipped.default_files(),
        )
    return Kind(
        latent_model.LatentConfig(),
        latent_train.LatentSchedule(),
        latent_model.LatentModel,
        latent_gradient.forward,
        latent_train.train,
        shipped.LATENT,
    )
