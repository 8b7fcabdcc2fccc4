#!/usr/bin/env python3
"""Make the files that the demo ships: a model and its recipe, or the list of held-out text.

scripts/make_demo_model.py                 trains by the recipe and writes both files of the model
scripts/make_demo_model.py --attention mla-sparse
                                           the same for latent attention and its indexer
scripts/make_demo_model.py --weights FILE  the same with weights that --train has left in FILE
scripts/make_demo_model.py --held-out A/topics.py B/topics.py ...
                                           chooses the held-out text among the paragraphs that all
                                           these releases of pydoc_data have; train after it
"""

from __future__ import annotations

import argparse
import os
import platform
import runpy
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastattn.demo import evaluate, kinds, shipped, text, train  # noqa: E402
from fastattn.demo.cli import ATTENTIONS  # noqa: E402
from fastattn.demo.model import Weights  # noqa: E402
from fastattn.demo.report import Console  # noqa: E402
from fastattn.reference.numerics import bfloat16  # noqa: E402
from fastattn.version import __version__  # noqa: E402

HEADER = """\
# Paragraphs that the demo measures with and trains on nowhere: SHA-256, first 16 digits.
# scripts/make_demo_model.py --held-out chose them among those of {} releases of Python.
"""


def choose_held_out(files: list[Path]) -> None:
    releases = [text.all_paragraphs(runpy.run_path(str(file))["topics"]) for file in files]
    digests = text.choose_held_out(releases)
    text.HELD_OUT_FILE.write_text(
        HEADER.format(len(files)) + "\n".join(digests) + "\n", encoding="ascii"
    )
    print(f"{len(digests)} paragraphs in {text.HELD_OUT_FILE}")


def trained(kind: kinds.Kind, corpus: text.Corpus) -> Weights:
    with Console(sys.stdout).progress("training", kind.schedule.steps) as update:
        return kind.train(
            corpus,
            kind.config,
            kind.schedule,
            lambda step, steps, loss: update(step, f"loss {loss:.2f}"),
        )


def formats(weights: Weights) -> dict[str, Weights]:
    """The weights after a round trip through each format."""
    return {
        "float32": weights,
        "float16": {k: w.astype(np.float16).astype(np.float32) for k, w in weights.items()},
        "bfloat16": {k: w.astype(bfloat16).astype(np.float32) for k, w in weights.items()},
        "int8": shipped.unpack(shipped.pack(weights)),
    }


def make_model(kind: kinds.Kind, weights_file: Path | None) -> None:
    config, corpus = kind.config, text.load()
    if not corpus.complete:
        sys.exit("this Python does not have every held-out paragraph")
    start = time.perf_counter()
    weights = train.load_weights(weights_file, config) if weights_file else None
    if weights_file and weights is None:
        sys.exit(f"{weights_file} holds no model of these sizes")
    weights = weights or trained(kind, corpus)
    print(f"{time.perf_counter() - start:.0f} s")
    held_out = evaluate.windows(corpus.held_out, config.context, evaluate.HELD_OUT_WINDOWS)
    perplexity = {
        name: round(evaluate.perplexity(w, config, held_out, kind.forward), 5)
        for name, w in formats(weights).items()
    }
    recipe: dict[str, Any] = {
        "made_by": "scripts/make_demo_model.py",
        "config": asdict(config),
        "schedule": asdict(kind.schedule),
        "text": {
            "source": "pydoc_data.topics",
            "train_sha256": text.digest(corpus.train),
            "train_characters": len(corpus.train),
            "held_out_sha256": text.digest(corpus.held_out),
            "held_out_characters": len(corpus.held_out),
            "held_out_windows": int(held_out.shape[0]),
        },
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "fastattn": __version__,
        },
        "perplexity": perplexity,
    }
    shipped.save(weights, recipe, kind.files)
    for name, value in perplexity.items():
        print(f"{name:9} {value:.5f} {100 * (value / perplexity['float32'] - 1):+.4f} %")
    print(f"{os.path.getsize(kind.files.model)} bytes in {kind.files.model}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", choices=ATTENTIONS, default="gqa")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--weights", type=Path, metavar="FILE")
    group.add_argument("--held-out", type=Path, nargs="+", metavar="FILE")
    args = parser.parse_args()
    if args.held_out:
        choose_held_out(args.held_out)
    else:
        make_model(kinds.find(args.attention), args.weights)


if __name__ == "__main__":
    main()
