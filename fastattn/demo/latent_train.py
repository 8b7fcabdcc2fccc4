"""Training of the latent model: first the dense attention, then the indexer from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastattn.demo import latent_gradient
from fastattn.demo.latent_model import LatentConfig
from fastattn.demo.model import Weights, initial_weights
from fastattn.demo.text import Corpus
from fastattn.demo.train import Progress, Schedule, optimise
from fastattn.reference.numerics import Array


@dataclass(frozen=True)
class LatentSchedule:
    """Training schedule: the model as in :class:`~fastattn.demo.train.Schedule`, then its indexer.

    The indexer is trained on whole contexts only, because short windows have few keys before the
    window.
    """

    model: Schedule = field(default_factory=Schedule)
    indexer: Schedule = field(
        default_factory=lambda: Schedule(steps=300, long_share=1.0, warmup=10, decay=0.0)
    )

    @property
    def steps(self) -> int:
        """Number of steps of both parts."""
        return self.model.steps + self.indexer.steps


def _distil(
    weights: Weights, config: LatentConfig, tokens: Array, _: Array
) -> tuple[float, Weights]:
    return latent_gradient.distil(weights, config, tokens)


def train(
    corpus: Corpus,
    config: LatentConfig,
    schedule: LatentSchedule,
    progress: Progress | None = None,
) -> Weights:
    """Train from scratch; the same arguments give the same weights on the same machine.

    `progress` receives the cross entropy, then the indexer's divergence.
    """
    weights = initial_weights(config, schedule.model.seed)

    def show(step: int, _: int, loss: float) -> None:
        if progress is not None:
            progress(step, schedule.steps, loss)

    objective = latent_gradient.loss_and_gradients
    optimise(weights, corpus, config, schedule.model, objective, show)
    distil_indexer(weights, corpus, config, schedule, progress)
    return weights


def distil_indexer(
    weights: Weights,
    corpus: Corpus,
    config: LatentConfig,
    schedule: LatentSchedule,
    progress: Progress | None = None,
) -> None:
    """Train the indexer of a trained model, in place."""

    def show(step: int, _: int, loss: float) -> None:
        if progress is not None:
            progress(schedule.model.steps + step, schedule.steps, loss)

    optimise(weights, corpus, config, schedule.indexer, _distil, show)
