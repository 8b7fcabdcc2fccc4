"""Losses of tokens, and how far two models' next-token distributions are from each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastattn.reference.numerics import Array

#: Logits that are in memory at a time, of each model.
_LOGITS = 2**24


@dataclass(frozen=True)
class Scores:
    """Of the tokens of a window but the first one.

    Attributes
    ----------
    loss : array, float64 [T - 1]
        Negative log-likelihood in nats.
    divergence : array, float64 [T - 1]
        Kullback-Leibler divergence from the base's distribution, in nats.
    same : array of bool, [T - 1]
        Whether the most likely token is the base's.
    """

    loss: Array
    divergence: Array
    same: Array


def _distribution(logits: Array) -> tuple[Array, Array]:
    """Exponentials over the row's largest, and the log of the sum of exponentials."""
    largest = logits.max(axis=1)
    e = np.exp(logits - largest[:, None])
    total = e.sum(axis=1)
    e /= total[:, None]
    return e, largest.astype(np.float64) + np.log(total.astype(np.float64))


def score(base: Array, others: Iterable[Array], targets: Array) -> tuple[Scores, list[Scores]]:
    """Scores of a base's logits, and of others against it.

    Parameters
    ----------
    base, others : array, shape [n, vocabulary]
        The others may come one by one.
    targets : array of int, shape [n]
        The tokens that came.

    Returns
    -------
    base : Scores
        With divergences of 0.
    others : list of Scores
    """
    rows = np.arange(len(targets))
    p, total = _distribution(base)
    best = base.argmax(axis=1)
    zero = np.zeros(len(rows))
    own = Scores(total - base[rows, targets], zero, np.ones(len(rows), bool))
    found = []
    for logits in others:
        _, log_sum = _distribution(logits)
        # From differences of logits, which are small, and so is their rounding.
        mean = np.einsum("ij,ij->i", p, base - logits).astype(np.float64)
        found.append(
            Scores(
                log_sum - logits[rows, targets],
                mean - total + log_sum,
                logits.argmax(axis=1) == best,
            )
        )
    return own, found


def rows_at_a_time(vocabulary: int) -> int:
    """Rows of logits that :func:`score` is to be called with."""
    return max(8, min(256, _LOGITS // vocabulary))


def join(parts: Sequence[Scores]) -> Scores:
    """One after the other."""
    return Scores(*(np.concatenate([getattr(part, x) for part in parts]) for x in vars(parts[0])))


@dataclass(frozen=True)
class Summary:
    """A row of a table.

    Attributes
    ----------
    perplexity : float
    loss_percent : float
        Of the perplexity over the base's, less 1, in per cent.
    loss_error : float or None
        Standard error of that, from the differences of windows; None for less than two windows.
    divergence : float
        Mean, in nats a token.
    divergence_error : float or None
    top1_percent : float
        Share of tokens whose most likely next token is the base's.
    """

    perplexity: float
    loss_percent: float
    loss_error: float | None
    divergence: float
    divergence_error: float | None
    top1_percent: float


def _error_of_mean(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def summarise(windows: Sequence[Scores], base: Sequence[Scores]) -> Summary:
    """Mean over windows, each of which counts as much.

    Parameters
    ----------
    windows, base : sequence of Scores
        Of the same windows.
    """
    means = [float(w.loss.mean()) for w in windows]
    gaps = [mean - float(b.loss.mean()) for mean, b in zip(means, base)]
    divergences = [float(w.divergence.mean()) for w in windows]
    ratio = math.exp(sum(gaps) / len(gaps))
    spread = _error_of_mean(gaps)
    return Summary(
        perplexity=math.exp(sum(means) / len(means)),
        loss_percent=100 * (ratio - 1),
        loss_error=None if spread is None else 100 * ratio * spread,
        divergence=sum(divergences) / len(divergences),
        divergence_error=_error_of_mean(divergences),
        top1_percent=100 * float(np.mean([w.same.mean() for w in windows])),
    )
