"""Rows of the table as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastattn.evaluate.measure import Row

#: Version of the JSON report; it grows when a key changes its meaning or goes away.
SCHEMA = 1


def _with_error(value: float, error: float | None, digits: int) -> str:
    if error is None:
        return f"{value:+.{digits}f} %"
    return f"{value:+.{digits}f} +- {error:.{digits}f} %"


@dataclass(frozen=True)
class Line:
    """A row of the table of types."""

    row: Row
    base: Row

    HEADERS = (
        "cache type",
        "bytes a token",
        "perplexity",
        "against none",
        "KL",
        "same top-1",
        "same greedy",
        "prefill tok/s",
        "decode tok/s",
    )

    def cells(self) -> tuple[str, ...]:
        """As text."""
        row, found = self.row, self.row.summary(self.base)
        served = row.plans is not None
        same = sum(row.same_tokens) / len(row.same_tokens) if row.same_tokens else None
        return (
            row.name + (" *" if row.default else ""),
            f"{row.bytes_per_token:.0f}" if served else "-",
            f"{found.perplexity:.4f}",
            _with_error(found.loss_percent, found.loss_error, 3),
            f"{found.divergence:.1e}",
            f"{found.top1_percent:.2f} %",
            "-" if same is None else f"{same:.0f}",
            f"{row.prefill_per_second:.0f}",
            f"{row.decode_per_second:.1f}" if row.decode_per_second else "-",
        )


@dataclass(frozen=True)
class NeedleLine:
    """A row of the table of needles."""

    row: Row
    length: int

    HEADERS = ("cache type", "tokens", "recalled", "loss of the answer")

    def cells(self) -> tuple[str, ...]:
        """As text."""
        found = self.row.needles[self.length]
        return (
            self.row.name + (" *" if self.row.default else ""),
            str(self.length),
            f"{100 * found.recalled:.0f} %",
            f"{found.loss:.3f}",
        )


def row_as_json(row: Row, base: Row) -> dict[str, Any]:
    """A row as plain values."""
    served = row.plans is not None
    return {
        "name": row.name,
        "default": row.default,
        "bytes_per_token": row.bytes_per_token if served else None,
        **asdict(row.summary(base)),
        "window_losses": [float(window.loss.mean()) for window in row.windows],
        "same_greedy_tokens": row.same_tokens,
        "prefill_tokens_per_second": round(row.prefill_per_second, 1),
        "decode_tokens_per_second": round(row.decode_per_second, 1),
        "needles": {str(n): asdict(found) for n, found in row.needles.items()},
    }
