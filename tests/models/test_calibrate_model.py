"""python -m fastattn calibrate --model: layers by what they cost a tiny model."""

from __future__ import annotations

import numpy as np
import pytest

from fastattn import models
from fastattn.calibrate import Calibration, LayerCalibration
from fastattn.calibrate.from_model import collect
from fastattn.calibrate.loss import (
    best_of_types,
    bytes_of,
    choose_types,
    head_divergences,
    joint_loss,
    layer_divergences,
)
from fastattn.cli import main
from fastattn.evaluate.measure import Measurement, Row
from fastattn.evaluate.variants import plans_of
from tests.support import tiny_models as tiny

TYPES = ["block_wise_int4", "block_wise_int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write_folder(path, "qwen3")
    return path


@pytest.fixture(scope="module")
def model(folder):
    return models.load(str(folder))


def test_divergence_of_one_layer(model):
    """What a pass says of a layer alone is what its cache costs when it is served."""
    tokens = np.random.default_rng(0).integers(0, 256, 120)
    probes = {n: LayerCalibration("block_wise_int4") for n in range(tiny.LAYERS)}
    found = layer_divergences(model, [tokens], probes)
    for n in range(tiny.LAYERS):
        kinds = ["block_wise_int4" if i == n else "none" for i in range(tiny.LAYERS)]
        plan = Calibration({i: LayerCalibration(kind) for i, kind in enumerate(kinds)})
        rows = [
            Row("fp32", None),
            Row("served", plans_of(plan, model.config)),
        ]
        Measurement(model, rows).perplexities([tokens])
        assert found[n] == pytest.approx(rows[1].summary(rows[0]).divergence, rel=0.1)


def test_bytes_of_types():
    assert bytes_of("none", 64) == 256 and bytes_of("cache_fp8", 192) == 192 + 128
    assert bytes_of("block_wise_int8", 64) == 136 and bytes_of("block_wise_int4", 64) == 72
    assert bytes_of("block_wise_mxfp4", 128) == 2 * (64 + 4)
    assert bytes_of("block_wise_k8v4", 128) == bytes_of("block_wise_kfp8v4", 128) == 200
    assert bytes_of("block_wise_k8v4", 192) == 192 + 64 + 8


def options_of(errors):
    """By layer: errors of int4 and int8."""
    return {
        n: {kind: LayerCalibration(kind, error=e) for kind, e in zip(TYPES, pair)}
        for n, pair in enumerate(errors)
    }


def test_the_budget_is_kept_with_the_fewest_bytes():
    """Layer 1 costs most with 4 bits, so it is the first with 8; then layer 2."""
    options = options_of([(0.1, 0.01), (0.1, 0.01), (0.2, 0.02)])
    probed = {n: (options[n]["block_wise_int4"], d) for n, d in enumerate((0.001, 0.01, 0.004))}
    for budget, eights in ((1.0, []), (0.006, [1]), (0.002, [1, 2]), (0.0002, [0, 1, 2])):
        choice = choose_types(options, probed, 64, most_loss=budget)
        kinds = {n: x.cache_quant_type for n, x in choice.calibration.layers.items()}
        assert [n for n, kind in kinds.items() if kind == "block_wise_int8"] == eights
        expected = sum(d / (100 if n in eights else 1) for n, d in enumerate((0.001, 0.01, 0.004)))
        assert choice.total == pytest.approx(expected)
        assert choice.total <= budget
    beyond = choose_types(options, probed, 64)  # nothing keeps it: the least
    assert {x.cache_quant_type for x in beyond.calibration.layers.values()} == {TYPES[1]}


def test_the_size_is_kept_with_the_least_loss():
    """Bytes of int4 and int8 are 72 and 136: room for none, one, two or three layers of 8 bits."""
    options = options_of([(0.1, 0.01), (0.1, 0.01), (0.2, 0.02)])
    probed = {n: (options[n]["block_wise_int4"], d) for n, d in enumerate((0.001, 0.01, 0.004))}
    wanted = ((72, []), (93, []), (94, [1]), (114, [1]), (115, [1, 2]), (136, [0, 1, 2]))
    for most, eights in wanted:
        choice = choose_types(options, probed, 64, most_bytes=most)
        kinds = {n: x.cache_quant_type for n, x in choice.calibration.layers.items()}
        assert [n for n, kind in kinds.items() if kind == "block_wise_int8"] == eights
        assert sum(bytes_of(kind, 64) for kind in kinds.values()) <= max(most, 72) * 3


def test_a_type_between_the_two(model):
    """K of 8 bits and V of 4 has 104 bytes, and is best where V costs little."""
    types = ["block_wise_int4", "block_wise_k8v4", "block_wise_int8"]
    errors = [(0.2, 0.02, 0.01), (0.2, 0.19, 0.01)]
    options = {
        n: {kind: LayerCalibration(kind, error=e) for kind, e in zip(types, row)}
        for n, row in enumerate(errors)
    }
    probed = {n: (options[n]["block_wise_int4"], 0.01) for n in options}
    for most, wanted in ((72, (0, 0)), (88, (1, 0)), (120, (1, 2)), (136, (2, 2))):
        choice = choose_types(options, probed, 64, most_bytes=most)
        kinds = [layer.cache_quant_type for layer in choice.calibration.layers.values()]
        assert kinds == [types[i] for i in wanted]


def test_divergence_of_heads(model):
    """All heads of a layer together are the layer; a head alone costs less."""
    tokens = np.random.default_rng(0).integers(0, 256, 120)
    probes = {n: LayerCalibration("block_wise_int4") for n in range(tiny.LAYERS)}
    heads = head_divergences(model, [tokens], probes)
    layers = layer_divergences(model, [tokens], probes)
    assert heads.shape == (tiny.LAYERS, tiny.KV) and (heads > 0).all()
    for n, row in enumerate(heads):
        assert row.max() < layers[n] and row.sum() == pytest.approx(layers[n], rel=0.5)


def test_divergence_of_all_layers(model):
    """What they cost together is what their caches cost when they are served."""
    tokens = np.random.default_rng(1).integers(0, 256, 120)
    plan = Calibration({n: LayerCalibration("block_wise_int4") for n in range(tiny.LAYERS)})
    rows = [Row("fp32", None), Row("served", plans_of(plan, model.config))]
    Measurement(model, rows).perplexities([tokens])
    divergence, rise = joint_loss(model, [tokens], plan)
    served = rows[1].summary(rows[0])
    assert divergence == pytest.approx(served.divergence, rel=0.1)
    assert rise == pytest.approx(np.log1p(served.loss_percent / 100), abs=0.2 * divergence)


def test_best_transform_of_each_type(model):
    samples = collect(model, [np.arange(100), np.arange(50, 150)])[1]
    for layer in samples:
        layer.key[..., 3] += 30
    found = best_of_types(samples, TYPES, ["none", "center"])
    assert all(found[kind].name == f"{kind}+center" for kind in TYPES)
    assert found["block_wise_int8"].error < found["block_wise_int4"].error
    assert set(found["block_wise_int4"].errors) == {"block_wise_int4", "block_wise_int4+center"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--max-loss", "0.5"],
        ["--max-bits", "7"],
        ["--max-bits", "6.6", "--types", "block_wise_k8v4,block_wise_kfp8v4"],
        ["--bound", "0.5"],
        ["--bound", "0.5", "--rotate-values"],
    ],
)
def test_command(folder, tmp_path, capsys, arguments):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i) % 26) for i in range(900)))
    output = tmp_path / "found.npz"
    options = ["--text", text, "--tokens", 200, "--check-tokens", 200, "--output", output]
    options = [*map(str, options), *arguments]
    assert main(["calibrate", "--model", str(folder), *options]) == 0
    shown = capsys.readouterr().out
    assert "as chosen" in shown and "+-" not in shown.split("as chosen")[0].split("none")[0]
    found = Calibration.read(output)
    assert found.rotated_values is ("--rotate-values" in arguments)
    assert sorted(found.layers) == list(range(tiny.LAYERS))
    kinds = {layer.cache_quant_type for layer in found.layers.values()}
    given = arguments[3].split(",") if "--types" in arguments else TYPES
    if arguments[:1] in (["--max-loss"], ["--max-bits"]):
        assert "expected loss of perplexity" in shown and "of all together" in shown.replace(
            "\n", " "
        )
        assert kinds <= set(given) and "KL" in shown.split("as chosen")[1]
    if arguments[:1] == ["--max-loss"]:
        assert "wanted at most 0.5 %" in shown
    elif arguments[:1] == ["--max-bits"]:
        sizes = [bytes_of(x.cache_quant_type, tiny.DIM) for x in found.layers.values()]
        assert np.mean(sizes) <= float(arguments[1]) * 2 * tiny.DIM / 8
        assert given != TYPES or kinds == set(TYPES)
    elif not arguments:
        assert all(layer.error == min(layer.errors.values()) for layer in found.layers.values())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "no-such"], "no-such: expected smollm2, gemma3-270m"),
        (["x.npz", "--max-loss", "1"], "--max-loss: it is for --model"),
        (["--model", "smollm2", "--max-loss", "1", "--bound", "1"], "without --bound"),
        (["x.npz", "--model", "smollm2"], "not both"),
        (["--model", "smollm2", "--max-loss", "1", "--max-bits", "6"], "or --max-bits"),
        (["--model", "smollm2", "--picture", "x.png"], "--picture: it is for --max-loss or"),
    ],
)
def test_command_refuses(capsys, arguments, text):
    assert main(["calibrate", *arguments]) == 1
    assert text in capsys.readouterr().err


def test_picture(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i) % 26) for i in range(900)))
    picture = tmp_path / "heads.png"
    options = ["--text", text, "--tokens", 200, "--check-tokens", 0, "--picture", picture]
    options = [*map(str, options), "--max-bits", "6"]
    assert main(["calibrate", "--model", str(folder), *options]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert f"wrote {picture}" in capsys.readouterr().out.replace("\n", "")
    missing = str(tmp_path / "no" / "heads.png")
    assert main(["calibrate", "--model", str(folder), "--max-bits", "6", "--picture", missing]) == 1
    assert "cannot be written" in capsys.readouterr().err
