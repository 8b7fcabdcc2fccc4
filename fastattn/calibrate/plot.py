"""Which layers and heads cost a model most, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastattn.reference.numerics import Array


def draw(path: Path, title: str, layers: Sequence[int], divergences: Array) -> None:
    """Write a picture of divergences by layer and KV head.

    Parameters
    ----------
    path : Path
    title : str
    layers : sequence of int
        Numbers of the layers.
    divergences : array, shape [layers, KV]
        In nats a token, as :func:`fastattn.calibrate.loss.head_divergences` gives them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    least = max(float(divergences.max()) * 1e-3, 1e-9)  # the scale has three decades
    shown = np.maximum(divergences, least).T
    width = min(4 + 0.3 * len(layers), 30)
    figure, (bars, cells) = plt.subplots(
        2,
        1,
        figsize=(width, 5),
        layout="constrained",
        sharex=True,
        gridspec_kw={"height_ratios": [2, max(shown.shape[0] / 3, 1)]},
    )
    bars.bar(range(len(layers)), divergences.sum(axis=1), color="tab:gray")
    bars.set_ylabel("sum of the heads, nats a token")
    bars.set_title(title)
    bars.grid(axis="y", alpha=0.3)
    image = cells.imshow(shown, aspect="auto", norm=LogNorm(least, max(shown.max(), 2 * least)))
    cells.set_xticks(range(len(layers)), [str(n) for n in layers], fontsize=7)
    cells.set_yticks(range(shown.shape[0]))
    cells.set_xlabel("layer")
    cells.set_ylabel("KV head")
    figure.colorbar(image, ax=cells, label="KL, nats a token")
    figure.savefig(path, dpi=120)
    plt.close(figure)
