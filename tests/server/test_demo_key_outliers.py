"""The calibrator and the demo's model, end to end: samples, file, layers, served logits."""

from __future__ import annotations

import numpy as np
import pytest

from fastattn.calibrate import Calibration
from fastattn.cli import main
from fastattn.demo import evaluate, shipped, text
from fastattn.demo.engine import Engine
from fastattn.demo.gradient import forward
from fastattn.demo.key_outliers import samples_of, with_large_keys
from fastattn.demo.model import Config, Model


@pytest.fixture(scope="module")
def config():
    return Config()


@pytest.fixture(scope="module")
def weights(config):
    return with_large_keys(shipped.load(config), config, 20.0)


@pytest.fixture(scope="module")
def corpus():
    return text.load()


def test_the_changed_model_computes_the_same(config, weights, corpus):
    tokens = evaluate.windows(corpus.held_out, config.context, 1)[:, :-1]
    own = forward(shipped.load(config), config, tokens)
    changed = forward(weights, config, tokens)
    np.testing.assert_allclose(changed.logits, own.logits, atol=2e-3)
    ratio = np.abs(changed.layers[0].attention.k).max((0, 1, 2)) / np.abs(
        own.layers[0].attention.k
    ).max((0, 1, 2))
    np.testing.assert_allclose(np.delete(ratio, [10, 11]), 1, rtol=1e-4)
    np.testing.assert_allclose(ratio[[10, 11]], 20, rtol=1e-4)


def test_samples_are_those_of_attention(config, weights, corpus):
    tokens = evaluate.windows(corpus.train, config.context, 1)[:, :-1]
    samples = samples_of(weights, config, tokens)
    assert sorted(samples) == list(range(config.layers))
    found = samples[1]
    layer = forward(weights, config, tokens).layers[1]
    group = config.heads // config.kv_heads
    scores = found.query[:, group] @ found.key[:, 1].T / np.sqrt(config.head_dim)
    scores = np.where(np.tril(np.ones(scores.shape, bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out = p / p.sum(-1, keepdims=True) @ found.value[:, 1]
    np.testing.assert_allclose(out, layer.attention.out[0, 1, : len(out)], atol=1e-4)


def logits(model, kind, calibration, held_out, place):
    import paddle

    on = paddle.CPUPlace() if place == "cpu" else paddle.CUDAPlace(0)
    engine = Engine(model, kind, place=on, **evaluate.scoring_options(model.config))
    for layer in engine.layers:
        if calibration is not None:
            calibration.apply(layer, place=on)
    return evaluate.score_with(engine, held_out)[0]


def test_what_the_command_found_is_served(place, tmp_path, config, weights, corpus):
    """The rotation takes most of the error of K's large channels, and the calibrator finds it."""
    tokens = evaluate.windows(corpus.train, config.context, 1)[:, :-1]
    arrays = {}
    for number, samples in samples_of(weights, config, tokens).items():
        for name in ("key", "value", "query"):
            arrays[f"layers.{number}.{name}"] = getattr(samples, name)
    np.savez(tmp_path / "samples.npz", **arrays)
    held_out = evaluate.windows(corpus.held_out, config.context, 2)
    model = Model(config, weights)
    base = logits(model, "none", None, held_out, place)
    errors = {}
    for transform in ("none", "hadamard"):
        output = tmp_path / f"{transform}.safetensors"
        options = ["--types", "block_wise_int8", "--bound", "9", "--transforms", transform]
        arguments = ["calibrate", str(tmp_path / "samples.npz"), *options, "--output", str(output)]
        assert main(arguments) == 0
        calibration = Calibration.read(output)
        found = logits(model, "block_wise_int8", calibration, held_out, place)
        errors[transform] = float(np.sqrt(np.mean((found.logits - base.logits) ** 2)))
        assert abs(found.perplexity / base.perplexity - 1) < 0.01
    assert errors["hadamard"] < 0.6 * errors["none"], errors
    output = tmp_path / "chosen.safetensors"
    options = ["--types", "block_wise_int8", "--bound", "0.02", "--output", str(output)]
    assert main(["calibrate", str(tmp_path / "samples.npz"), *options]) == 0
    names = [layer.name for layer in Calibration.read(output).layers.values()]
    assert all("hadamard" in name for name in names), names
