"""Training with Muon for the matrices and Adam for the rest, on windows of the corpus.

Muon (Jordan et al. 2024) applies momentum that is orthogonalised by a Newton-Schulz iteration. On
this model it reached the loss of 200 AdamW steps (with one learning rate) in 100 steps. Each step
took a tenth more time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.demo.gradient import loss_and_gradients
from fastattn.demo.model import Config, Sizes, Weights, initial_weights, weight_shapes
from fastattn.demo.text import Corpus, encode
from fastattn.reference.numerics import Array
from fastattn.version import __version__

#: Called with the number of finished steps, the number of all steps and the smoothed loss.
Progress = Callable[[int, int, float], None]

#: Loss and gradients of weights and a configuration, for tokens and targets ``[B, T]``.
Objective = Callable[[Weights, Any, Array, Array], tuple[float, Weights]]


@dataclass(frozen=True)
class Schedule:
    """Training schedule.

    Most steps use short windows, which cost less attention. The last steps use whole contexts.
    """

    steps: int = 330
    tokens: int = 2048
    short_window: int = 64
    long_share: float = 0.3
    warmup: int = 20
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    decay: float = 0.1
    seed: int = 0

    def window(self, step: int, context: int) -> int:
        """Number of tokens of a window at a step."""
        short = step < self.steps * (1 - self.long_share)
        return min(self.short_window if short else context, context)

    def rate(self, step: int) -> float:
        """Factor of the learning rates: linear warm-up, then a cosine down to 2 %."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine)


class Optimizer:
    """State of Muon and Adam; it updates the weights in place."""

    def __init__(self, weights: Weights, schedule: Schedule) -> None:
        self.weights = weights
        self.schedule = schedule
        self._momentum = {k: np.zeros_like(v) for k, v in weights.items()}
        self._square = {k: np.zeros_like(v) for k, v in weights.items() if not _is_matrix(k, v)}
        self._step = 0

    def step(self, gradients: Weights) -> None:
        """One update."""
        rate = self.schedule.rate(self._step)
        self._step += 1
        for name, gradient in gradients.items():
            if name in self._square:
                self._adam(name, gradient, rate * self.schedule.other_rate)
            else:
                self._muon(name, gradient, rate * self.schedule.matrix_rate)

    def _muon(self, name: str, gradient: Array, rate: float) -> None:
        weight, momentum = self.weights[name], self._momentum[name]
        momentum *= np.float32(0.95)
        momentum += gradient
        update = _orthogonal(gradient + np.float32(0.95) * momentum)
        rate *= math.sqrt(max(1.0, weight.shape[1] / weight.shape[0]))
        weight *= np.float32(1 - rate * self.schedule.decay)
        weight -= np.float32(rate) * update

    def _adam(self, name: str, gradient: Array, rate: float) -> None:
        mean, square = self._momentum[name], self._square[name]
        mean += np.float32(0.1) * (gradient - mean)
        square += np.float32(0.05) * (gradient * gradient - square)
        corrected = mean / np.float32(1 - 0.9**self._step)
        deviation = np.sqrt(square / np.float32(1 - 0.95**self._step)) + np.float32(1e-8)
        self.weights[name] -= np.float32(rate) * corrected / deviation


def _is_matrix(name: str, weight: Array) -> bool:
    return weight.ndim == 2 and name != "embedding"


def _orthogonal(matrix: Array) -> Array:
    """Nearly orthogonal matrix with the same singular vectors: five quintic iterations."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (np.linalg.norm(x) + np.float32(1e-7))
    for _ in range(5):
        gram = x @ x.T
        polynomial = np.float32(-4.7750) * gram + np.float32(2.0315) * (gram @ gram)
        x = np.float32(3.4445) * x + polynomial @ x
    return x.T if tall else x


def _gradients(
    pool: ThreadPoolExecutor,
    weights: Weights,
    config: Any,
    windows: Array,
    objective: Objective = loss_and_gradients,
) -> tuple[float, Weights]:
    """Mean loss and gradients of windows ``[n, T + 1]``; each of two threads takes half of them.

    NumPy lets other threads run while it computes. The halves are the same on every machine, so the
    number of cores does not change any bit.
    """
    halves = np.array_split(windows, 2)
    jobs = [pool.submit(objective, weights, config, half[:, :-1], half[:, 1:]) for half in halves]
    shares = [len(half) / len(windows) for half in halves]
    (loss, gradients), (other_loss, others) = (job.result() for job in jobs)
    for name, gradient in gradients.items():
        gradient *= np.float32(shares[0])
        gradient += np.float32(shares[1]) * others[name]
    return shares[0] * loss + shares[1] * other_loss, gradients


def train(
    corpus: Corpus, config: Config, schedule: Schedule, progress: Progress | None = None
) -> Weights:
    """Train from scratch; the same arguments give the same weights on the same machine."""
    weights = initial_weights(config, schedule.seed)
    optimise(weights, corpus, config, schedule, loss_and_gradients, progress)
    return weights


def optimise(
    weights: Weights,
    corpus: Corpus,
    config: Sizes,
    schedule: Schedule,
    objective: Objective,
    progress: Progress | None = None,
) -> None:
    """Train weights in place. Weights without a gradient do not change."""
    data = encode(corpus.train)
    rng = np.random.default_rng(schedule.seed)
    optimizer = Optimizer(weights, schedule)
    smoothed: float | None = None
    with ThreadPoolExecutor(2) as pool:
        for step in range(schedule.steps):
            length = schedule.window(step, config.context)
            starts = rng.integers(0, len(data) - length - 1, schedule.tokens // length)
            windows = np.stack([data[s : s + length + 1] for s in starts])
            loss, gradients = _gradients(pool, weights, config, windows, objective)
            optimizer.step(gradients)
            smoothed = loss if smoothed is None else smoothed + 0.1 * (loss - smoothed)
            if progress is not None:
                progress(step + 1, schedule.steps, smoothed)


def weights_path(folder: Path, corpus: Corpus, config: Any, schedule: Any) -> Path:
    """File of a trained model, named after everything that determines it."""
    key = json.dumps(
        [__version__, asdict(config), asdict(schedule), corpus.train], sort_keys=True
    ).encode()
    return folder / f"demo-{hashlib.sha256(key).hexdigest()[:16]}.npz"


def save_weights(path: Path, weights: Weights) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.npz")
    try:
        with part.open("wb") as file:
            np.savez(file, **weights)  # type: ignore[arg-type]
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_weights(path: Path, config: Sizes) -> Weights | None:
    """Weights from a file; None if it is missing or not a whole model of these sizes."""
    shapes = weight_shapes(config)
    try:
        with np.load(path) as file:
            weights = {name: file[name] for name in shapes}
    except Exception:  # for a damaged file, NumPy and zipfile may raise any exception
        return None
    fits = all(weights[name].shape == shape for name, shape in shapes.items())
    return weights if fits else None
