"""What a choice of keys costs a real model, from reports of ``scripts/sparse_quality.py``."""

from __future__ import annotations

from typing import Any

from gpu_tables.quality import link, loss, read
from gpu_tables.results import NONE, Results, grid

_HEAD = (
    *("keys", "blocks of", "summary", "first, last blocks"),
    *("loss of perplexity, %", "KL, nats", "same top-1, %"),
)


def _about(report: dict[str, Any], name: str) -> str:
    count = len(report["windows"])
    windows = f"{count} windows" if count > 1 else "1 window"
    return (
        f"{report['model']}, {windows} of {report['length']} tokens; perplexity with all keys "
        f"{report['perplexity']:.3f}. The file with its command: {link(name)}."
    )


def _is_last_only(row: dict[str, Any]) -> bool:
    return row["first_blocks"] + row["last_blocks"] == row["budget"] // row["granularity"]


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        str(row["budget"]),
        str(row["granularity"]),
        "none: nothing to choose" if _is_last_only(row) else f"`{row['kind']}`",
        f"{row['first_blocks']}, {row['last_blocks']}",
        loss(row),
        f"{row['divergence']:.1e}",
        f"{row['top1_percent']:.1f}",
    ]


def _table(results: Results, name: str, share: str, title: str) -> str:
    head = (*_HEAD, title)
    report = read(results, name)
    if report is None:
        return grid(head, [[NONE] * len(head)])
    rows = sorted(
        report["rows"],
        key=lambda row: (
            *(row["budget"], _is_last_only(row), row["granularity"], row["kind"]),
            -row["first_blocks"],
        ),
    )
    unique = {tuple(_cells(row)[:4]): row for row in reversed(rows)}  # a row may stand twice
    lines = [[*_cells(row), f"{row[share]:.1f}"] for row in reversed(list(unique.values()))]
    return _about(report, name) + "\n\n" + grid(head, lines)


def short(results: Results) -> str:
    """Contexts of 2048 tokens."""
    return _table(results, "smollm2-sparse-2048", "recall_percent", "weight of the keys, %")


def long(results: Results) -> str:
    """Contexts of 4096 tokens."""
    return _table(results, "smollm2-sparse-4096", "recall_percent", "weight of the keys, %")


def operators(results: Results) -> str:
    """The operators beside the simulation, on the same windows."""
    head = ("by", "loss of perplexity, %", "KL, nats", "the same blocks, %")
    name = "smollm2-sparse-operators"
    report = read(results, name)
    if report is None:
        return grid(head, [[NONE] * len(head)])
    lines = []
    for row in report["rows"]:
        quant = row.get("cache_quant_type")
        lines.append(
            [
                "NumPy, fp32" if quant is None else f"the operators, `{quant}`",
                loss(row),
                f"{row['divergence']:.1e}",
                NONE if quant is None else f"{row['same_blocks_percent']:.1f}",
            ]
        )
    return _about(report, name) + "\n\n" + grid(head, lines)
