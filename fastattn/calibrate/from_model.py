"""Samples of a real model's layers, from texts that it is run over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastattn.calibrate.samples import LayerSamples
from fastattn.models import LanguageModel, exact
from fastattn.reference.numerics import Array

#: Queries that are kept of the end of each text.
QUERIES = 1024

Progress = Callable[[int], None]


def collect(
    model: LanguageModel, texts: Sequence[Array], progress: Progress | None = None
) -> dict[int, list[LayerSamples]]:
    """What each layer's cache and attention get while the model reads texts, in fp32.

    Parameters
    ----------
    model : LanguageModel
    texts : sequence of array of int, shape [T]
        Tokens.
    progress : callable, optional
        Gets the number of tokens of each text.

    Returns
    -------
    dict
        By layer, the samples of every text.
    """
    found: dict[int, list[LayerSamples]] = {n: [] for n in range(model.config.layers)}
    for tokens in texts:

        def watch(layer: int, q: Array, k: Array, v: Array) -> None:
            window = model.config.window_of(layer)
            found[layer].append(LayerSamples(k, v, q[-QUERIES:].copy(), window))

        exact.forward(model.dense, tokens, watch)
        if progress is not None:
            progress(len(tokens))
    return found
