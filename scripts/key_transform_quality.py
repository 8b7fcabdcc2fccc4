#!/usr/bin/env python3
"""Measure the benefit of rotated and centred K, for the tables of docs/demo.md.

    scripts/key_transform_quality.py [--windows N]

The script measures the perplexity of the demo's model, and of an equivalent model in which two
channels of K are 20 times as large. It also measures the error of attention outputs for synthetic K
with outliers. It takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastattn.calibrate import Calibration, LayerSamples
from fastattn.calibrate.choose import TRANSFORMS, Candidate, sampled_rows, try_candidate
from fastattn.demo import evaluate, shipped, text
from fastattn.demo.engine import Engine
from fastattn.demo.key_outliers import samples_of, with_large_keys
from fastattn.demo.model import Config, Model

FACTOR = 20.0
KINDS = [
    ("cache_int8", "head"),
    ("cache_int8", "channel"),
    ("block_wise_int8", "head"),
    ("cache_fp8", "head"),
    ("block_wise_fp8", "head"),
    ("block_wise_int4", "head"),
    ("block_wise_mxfp4", "head"),
]


def served(model, kind, calibration, held_out) -> float:
    """Perplexity through the paged cache."""
    engine = Engine(model, kind, **evaluate.scoring_options(model.config))
    for layer in engine.layers:
        if calibration is not None:
            calibration.apply(layer, place=engine.place)
    return evaluate.score_with(engine, held_out)[0].perplexity


def perplexities(windows: int) -> None:
    config = Config()
    corpus = text.load()
    held_out = evaluate.windows(corpus.held_out, config.context, windows)
    train = evaluate.windows(corpus.train, config.context, evaluate.CALIBRATION_WINDOWS)[:, :-1]
    own = shipped.load(config)
    for name, weights in (("as it is", own), ("K x 20", with_large_keys(own, config, FACTOR))):
        model = Model(config, weights)
        base = served(model, "none", None, held_out)
        print(f"{name:9} {'none':30} {base:.4f}", flush=True)
        samples = samples_of(weights, config, train)
        for kind, granularity in KINDS:
            for transform in TRANSFORMS:
                candidate = Candidate(kind, transform)
                found = {
                    i: try_candidate([layer], candidate, granularity, None)
                    for i, layer in samples.items()
                }
                value = served(model, kind, Calibration(found), held_out)
                shown = f"{kind} {granularity if kind == 'cache_int8' else ''} {transform}"
                print(f"{name:9} {shown:40} {value:.4f} {value / base - 1:+.3%}", flush=True)


def synthetic(kind: str) -> LayerSamples:
    """K of N(0, 1), D 128, 1024 tokens, with outliers of one kind."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1024, 8, 128))
    k = rng.normal(size=(1024, 2, 128))
    v = rng.normal(size=(1024, 2, 128))
    if kind == "one channel x 20":
        k[..., 17] *= FACTOR
        q[..., 17] /= FACTOR
    elif kind == "three channels + 40":
        k[..., [5, 60, 90]] += 40
    return LayerSamples(*(x.astype(np.float32) for x in (k, v, q)))


def errors() -> None:
    for outliers in ("none", "one channel x 20", "three channels + 40"):
        samples = synthetic(outliers)
        for kind, granularity in KINDS:
            for transform in TRANSFORMS:
                rows = sampled_rows([samples], 64)
                found = try_candidate([samples], Candidate(kind, transform), granularity, rows)
                shown = f"{kind} {granularity if kind == 'cache_int8' else ''} {transform}"
                print(f"{outliers:20} {shown:40} {found.error:.2e}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=evaluate.HELD_OUT_WINDOWS)
    arguments = parser.parse_args()
    errors()
    perplexities(arguments.windows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
