"""Loss of perplexity against bytes a token, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a picture of rows as :func:`fastattn.evaluate.report.row_as_json` gives them.

    A loss below a hundredth of a per cent is drawn there. Bars are two standard errors long.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    floor = 0.01
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for row in rows:
        if row["bytes_per_token"] is None or row["name"] == "none":
            continue
        loss, error = max(row["loss_percent"], floor), row["loss_error"] or 0.0
        below = min(error, loss - floor / 2)
        axes.errorbar(
            row["bytes_per_token"],
            loss,
            yerr=[[below], [error]],
            fmt="o" if row["default"] else ".",
            capsize=2,
        )
        axes.annotate(
            row["name"],
            (row["bytes_per_token"], loss),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_yscale("log")
    axes.set_xlabel("bytes a token, all layers")
    axes.set_ylabel("loss of perplexity against a 16-bit cache, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
