#!/usr/bin/env python3
"""Measure what a choice of keys costs a model, for the table of docs/kernels/sparse_attention.md.

    scripts/sparse_quality.py [--length N] [--windows N] [--operators TYPE ...] --output FILE

Perplexity of texts with attention of chosen key blocks, against attention of all keys, and the
share of the softmax weight that the chosen keys have. Forward passes are in fp32 by NumPy, over
dense masks (fastattn/evaluate/sparse.py). With --operators there is one choice, of 256 keys by
minmax of 16, and rows that choose and attend by the operators over paged caches of these types. The
file is written after each window.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastattn.evaluate import texts
from fastattn.evaluate.score import join, rows_at_a_time, score, summarise
from fastattn.evaluate.sparse import Choice, OperatorAttention, SparseAttention
from fastattn.models import exact, load


def choices(budgets: list[int], quick: bool) -> list[Choice]:
    """The rows. Blocks of 16 tokens always take two last ones, which are 17 to 32 tokens."""
    found = []
    for budget in budgets:
        for granularity in (16, 64):
            last = 2 if granularity == 16 else 1
            for kind in ("mean", "minmax"):
                found.append(Choice(budget, granularity, kind, 1, last))
                if budget == 256 and not quick:
                    found.append(Choice(budget, granularity, kind, 0, 1))
    return found


def last_only(budget: int) -> Choice:
    """The first 64 keys and the last ones: nothing is left to choose."""
    return Choice(budget, 64, "mean", 1, budget // 64 - 1)


class Run:
    """Rows, and what was found of them."""

    def __init__(self, model, rows: list[tuple[Choice, str | None]]) -> None:
        self.model, self.rows = model, rows  # a choice, and the type of the operators' cache
        self.base: list = []
        self.scores: list[list] = [[] for _ in rows]
        self.recalls: list[list[float]] = [[] for _ in rows]

    def _hidden(self, choice: Choice | None, quant: str | None, tokens):
        scale = self.model.config.softmax_scale
        if choice is not None and quant is not None:
            operators = OperatorAttention(choice, quant, scale)
            return exact.forward(self.model.dense, tokens, attention=operators), operators.same
        attention = SparseAttention(choice, scale)
        hidden = exact.forward(self.model.dense, tokens, attention=attention)
        return hidden, attention.recalls

    def window(self, tokens) -> None:
        """Measure every row over a window of tokens."""
        base, _ = self._hidden(None, None, tokens)
        others = []
        for i, (choice, quant) in enumerate(self.rows):
            start = time.perf_counter()
            hidden, recalls = self._hidden(choice, quant, tokens)
            others.append(hidden)
            self.recalls[i].append(float(np.mean(recalls)) if recalls else 1.0)
            print(f"  {choice} {quant or ''} {time.perf_counter() - start:.0f} s", flush=True)
        step, last = rows_at_a_time(self.model.config.vocabulary), len(tokens) - 1
        parts: list[list] = [[] for _ in range(len(others) + 1)]
        logits = self.model.dense.logits
        for at in range(0, last, step):
            end = min(at + step, last)
            own, found = score(
                logits(base[at:end]), (logits(h[at:end]) for h in others), tokens[at + 1 : end + 1]
            )
            for part, piece in zip(parts, [own, *found]):
                part.append(piece)
        self.base.append(join(parts[0]))
        for row, part in zip(self.scores, parts[1:]):
            row.append(join(part))

    def report(self) -> list[dict]:
        """The rows so far, for JSON."""
        rows = []
        for (choice, quant), scores, shares in zip(self.rows, self.scores, self.recalls):
            summary = summarise(scores, self.base)
            share = "recall_percent" if quant is None else "same_blocks_percent"
            rows.append(
                {
                    **vars(choice),
                    **({} if quant is None else {"cache_quant_type": quant}),
                    **{k: _rounded(v) for k, v in vars(summary).items()},
                    share: _rounded(100 * float(np.mean(shares))),
                }
            )
        return rows


def _rounded(value):
    return None if value is None else float(f"{value:.5g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--quick", action="store_true", help="only rows with always-taken blocks")
    parser.add_argument("--operators", nargs="+", metavar="TYPE", help="cache types of rows")
    parser.add_argument("--seconds", type=float, help="begin no window after so many, from two on")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    model = load(arguments.model)
    if arguments.operators:
        choice = Choice(256, 16, "minmax", 1, 2)
        rows = [(choice, None), *((choice, quant) for quant in arguments.operators)]
    else:
        found = choices(arguments.budgets, arguments.quick)
        found += [last_only(budget) for budget in arguments.budgets if budget > 128]
        rows = [(choice, None) for choice in found]
    taken = texts.windows(texts.evaluation(), model.tokenizer, arguments.length, arguments.windows)
    run, begin = Run(model, rows), time.perf_counter()
    for number, window in enumerate(taken):
        if (
            arguments.seconds is not None
            and number > 1
            and time.perf_counter() - begin > arguments.seconds
        ):
            break
        run.window(window.tokens)
        print(f"window {number + 1}: {time.perf_counter() - begin:.0f} s", flush=True)
        base = summarise(run.base, run.base)
        content = {
            "model": model.path.name,
            "command": "scripts/sparse_quality.py " + " ".join(_command()),
            "length": arguments.length,
            "windows": [
                {"source": w.source.name, "sha256": w.source.digest} for w in taken[: number + 1]
            ],
            "perplexity": _rounded(base.perplexity),
            "rows": run.report(),
        }
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _command() -> list[str]:
    """The arguments, without the folder of a path."""
    return [Path(word).name if "/" in word else word for word in sys.argv[1:]]


if __name__ == "__main__":
    sys.exit(main())
