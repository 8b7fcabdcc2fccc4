"""The demo's latent model as the package ships it: file, recipe, figures, command."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fastattn import _ops
from fastattn.demo import (
    cli,
    evaluate,
    kinds,
    latent_evaluate,
    latent_gradient,
    latent_train,
    report,
    shipped,
    text,
    train,
)
from fastattn.demo.latent_model import LatentConfig, LatentModel
from fastattn.demo.model import weight_shapes
from tests.support import ROOT, fresh
from tests.support import latent_model as reference

CONFIG = LatentConfig()
PAGE = ROOT / "docs" / "demo.md"
FIGURES = ROOT / "benchmarks" / "results" / "experiments" / "demo.json"


@pytest.fixture(scope="module")
def corpus():
    return text.load()


@pytest.fixture(scope="module")
def recipe():
    return shipped.recipe(shipped.LATENT)


@pytest.fixture(scope="module")
def weights():
    return shipped.load(CONFIG, shipped.LATENT)


@pytest.fixture(scope="module")
def held_out(corpus):
    return evaluate.windows(corpus.held_out, CONFIG.context, evaluate.HELD_OUT_WINDOWS)


def recorded_table():
    """The page's table as its file has it, a dictionary a row."""
    sections = json.loads(FIGURES.read_text(encoding="utf-8"))["sections"]
    section = next(s for s in sections if s["heading"] == "Latent attention and an indexer")
    table = section["tables"][0]
    return [dict(zip(table["columns"], row)) for row in table["rows"]]


# File and recipe


def test_the_recipe_is_that_of_the_code(recipe):
    assert recipe["config"] == asdict(CONFIG)
    assert recipe["schedule"] == asdict(latent_train.LatentSchedule())
    assert recipe["schedule"]["model"] == shipped.recipe()["schedule"]
    assert recipe["text"] == shipped.recipe()["text"]
    digest = hashlib.sha256(shipped.LATENT.model.read_bytes()).hexdigest()
    assert recipe["model_sha256"] == digest


def test_the_file_is_small_and_whole(weights):
    assert shipped.LATENT.model.stat().st_size < 2_000_000
    assert {name: w.shape for name, w in weights.items()} == weight_shapes(CONFIG)
    with pytest.raises(ValueError, match="its sizes do not match LatentConfig"):
        shipped.load(LatentConfig(layers=3), shipped.LATENT)


def test_the_file_reaches_its_recorded_perplexity(recipe, corpus, held_out, weights):
    found = evaluate.perplexity(weights, CONFIG, held_out, latent_gradient.forward)
    recorded = recipe["perplexity"]["int8"]
    assert found == pytest.approx(recorded, rel=1e-4 if corpus.complete else 0.1)
    window = held_out[0]
    logits, _, _ = reference.run(weights, CONFIG, window[:-1])
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(logits)), window[1:]]
    one = evaluate.perplexity(weights, CONFIG, held_out[:1], latent_gradient.forward)
    assert one == pytest.approx(np.exp(losses.mean()), rel=1e-4)


def test_the_page_tells_what_the_recipe_has(recipe):
    page, perplexity = PAGE.read_text(encoding="utf-8"), recipe["perplexity"]
    assert abs(perplexity["int8"] / perplexity["float32"] - 1) < 1e-3
    assert f"{perplexity['float32']:.5f}" in page and f"{perplexity['int8']:.5f}" in page


def test_the_page_has_the_table_of_its_file():
    block = PAGE.read_text(encoding="utf-8").partition("## Latent attention and an indexer")[2]
    shown = [line.replace(" %", "").split() for line in block.split("```")[3].splitlines()[3:]]
    rows = recorded_table()
    assert len(shown) == len(rows) == 4
    for cells, row in zip(shown, rows):
        keys, most, cache, *numbers = cells
        assert [keys, float(most), cache] == list(row.values())[:3]
        assert [None if n == "-" else float(n) for n in numbers] == list(row.values())[3:]


def test_the_table_is_what_serving_gives(corpus, held_out, weights):
    """On a sixth of the windows: the recall, the share that is seen and the order of the errors."""
    held_out = held_out[::6]
    model = LatentModel(CONFIG, weights)
    exact = latent_evaluate.dense_attention(weights, CONFIG, held_out)
    base, errors = None, []
    for variant, row in zip(latent_evaluate.variants(CONFIG), recorded_table()):
        scored, choices = latent_evaluate.score(model, variant, held_out)
        base = base or scored
        found = latent_evaluate.fidelity(exact, variant, choices)
        assert [variant.keys, variant.cache_format] == [row["attention"], row["cache"]]
        assert 100 * found.attention_seen == pytest.approx(row["attention seen, %"], abs=1.5)
        if found.recall is not None:
            assert 100 * found.recall == pytest.approx(row["recall, %"], abs=2)
        ratio = 100 * (scored.perplexity / base.perplexity - 1)
        assert ratio == pytest.approx(row["against dense, %"], abs=0.5)
        errors.append(latent_evaluate.rms_difference(scored.logits, base.logits))
    dense, window, sparse, fp8 = errors
    assert dense == 0 and sparse < fp8 < 0.5 * window


@pytest.mark.slow
def test_the_recipe_reaches_the_recorded_perplexity_and_recall(recipe, corpus, held_out):
    kind = kinds.find("mla-sparse")
    weights = kind.train(corpus, kind.config, kind.schedule)
    found = evaluate.perplexity(weights, CONFIG, held_out, kind.forward)
    assert found == pytest.approx(recipe["perplexity"]["float32"], rel=0.01)
    sparse, few = latent_evaluate.variants(CONFIG)[2], held_out[::3]
    _, choices = latent_evaluate.score(LatentModel(CONFIG, weights), sparse, few)
    exact = latent_evaluate.dense_attention(weights, CONFIG, few)
    recall = latent_evaluate.fidelity(exact, sparse, choices).recall
    assert 100 * recall == pytest.approx(recorded_table()[2]["recall, %"], abs=3)


# Command

RESULT_KEYS = {
    "keys",
    "most_keys",
    "cache_format",
    "bytes_per_token",
    "perplexity",
    "perplexity_ratio",
    "rms_logit_error",
    "recall",
    "attention_seen",
    "tokens_per_second",
    "text",
}


def parse(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", "--attention", "mla-sparse", *arguments])


@pytest.fixture
def few_windows(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastattn.demo.evaluate.HELD_OUT_WINDOWS", 2)
    return tmp_path / "cache"


def demo(capsys, *arguments):
    """Run the command; its report and what it showed."""
    parsed = parse("--json", "-", "--max-new-tokens", "5", *arguments)
    assert parsed.run(parsed) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def check_variants(found, layers):
    assert found["schema"] == report.SCHEMA and found["attention"] == "mla-sparse"
    assert found["serving"]["requests"] > 1 and found["serving"]["mixed_steps"] > 0
    rows = [(r["keys"], r["cache_format"], r["bytes_per_token"]) for r in found["variants"]]
    assert rows == [
        ("dense", "bf16", layers * 1152),
        ("window", "bf16", layers * 1152),
        ("sparse", "bf16", layers * (1152 + 132)),
        ("sparse", "fp8_656", layers * (656 + 132)),
    ]
    for result in found["variants"]:
        assert set(result) == RESULT_KEYS
        assert result["perplexity"] > 1 and result["tokens_per_second"] > 0
        assert (result["recall"] is None) == (result["keys"] != "sparse")
        assert 0 < result["attention_seen"] <= 1
    base = found["variants"][0]
    assert base["perplexity_ratio"] == base["attention_seen"] == 1 and base["rms_logit_error"] == 0
    assert found["variants"][3]["most_keys"] == found["variants"][1]["most_keys"] < 256


def test_the_command_serves_the_shipped_model_at_once(few_windows, capsys):
    found, shown = demo(capsys)
    check_variants(found, CONFIG.layers)
    assert found["model"]["origin"] == "shipped"
    assert Path(found["model"]["path"]) == shipped.LATENT.model
    assert all(word in shown for word in ("recall", "fp8_656", "perplexity", "sparse attention"))
    assert "training" not in shown and not few_windows.exists()
    assert found["serving"]["reused_tokens"] > 0


def test_train_trains_once_and_keeps_the_model(few_windows, monkeypatch, capsys):
    config = LatentConfig(
        layers=1, hidden=32, heads=2, query_rank=16, mlp=32, window=8, topk=8, context=256
    )
    monkeypatch.setattr("fastattn.demo.latent_model.LatentConfig", lambda: config)
    schedule = latent_train.LatentSchedule(
        train.Schedule(steps=3, tokens=512), train.Schedule(steps=2, tokens=512, long_share=1.0)
    )
    monkeypatch.setattr("fastattn.demo.latent_train.LatentSchedule", lambda: schedule)
    first, shown = demo(capsys, "--train")
    check_variants(first, 1)
    assert first["model"]["origin"] == "trained" and "training on" in shown
    assert [str(p) for p in few_windows.iterdir()] == [first["model"]["path"]]
    second, shown = demo(capsys, "--train")
    assert second["model"]["origin"] == "cache" and "training on" not in shown
    assert second["variants"][3]["text"] == first["variants"][3]["text"]


def test_cache_types_are_for_grouped_queries(capsys):
    arguments = parse("--cache-quant-type", "cache_fp8")
    assert arguments.run(arguments) == 1
    assert "--cache-quant-type: it is for --attention gqa" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--attention", "mla")


def test_the_command_in_a_process_of_its_own():
    """Warnings are errors, and every phase ends at 100 %."""
    command = ["-m", "fastattn", "demo", "--attention", "mla-sparse", "--max-new-tokens", "3"]
    code = (
        "import runpy, sys, warnings; "
        "warnings.filterwarnings('error', category=DeprecationWarning); "
        "from fastattn.demo import evaluate; evaluate.HELD_OUT_WINDOWS = 2; "
        f"sys.argv[1:] = {command[2:]!r}; runpy.run_module('fastattn', run_name='__main__')"
    )
    done = fresh.run(code, cwd=Path(_ops.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    phases = [line for line in lines if line.endswith(" ...")]
    assert len(phases) == 6
    for phase in phases:
        assert any(line.startswith(f"{phase[:-4]}  100 %") for line in lines), phase
    assert lines[-1].startswith("sparse") and "\x1b" not in done.stdout
