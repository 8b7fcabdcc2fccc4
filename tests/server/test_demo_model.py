"""The demo's model as the package ships it: held-out text, file, recipe, command."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from fastattn import _ops
from fastattn.demo import cli, evaluate, report, shipped, text, train
from fastattn.demo.model import Config, Model, initial_weights, weight_shapes
from fastattn.functional._cache_types import CACHE_QUANT_TYPES, NIBBLE_TYPES
from tests.support import ROOT

RUN = text.LONGEST_SHARED_RUN


@pytest.fixture(scope="module")
def corpus():
    return text.load()


@pytest.fixture(scope="module")
def recipe():
    return shipped.recipe()


@pytest.fixture(scope="module")
def held_out(corpus):
    return evaluate.windows(corpus.held_out, Config().context, evaluate.HELD_OUT_WINDOWS)


# Held-out text


def runs(string):
    return {string[i : i + RUN] for i in range(len(string) - RUN + 1)}


def test_the_split_repeats_and_its_parts_share_no_long_run(corpus):
    assert text.load() == corpus
    seen = set().union(*map(runs, corpus.train.split("\n")))
    for paragraph in corpus.held_out.split("\n"):
        assert seen.isdisjoint(runs(paragraph)), paragraph
    assert len(corpus.train) > 150_000 and len(corpus.held_out) > 15_000


def test_the_pythons_that_the_list_was_made_for_have_all_of_it(corpus, recipe):
    digests = text.held_out_digests()
    assert len(set(digests)) == len(digests) > 80
    found = [hashlib.sha256(p.encode()).hexdigest()[:16] for p in corpus.held_out.split("\n")]
    assert found == [d for d in digests if d in set(found)]
    if sys.version_info < (3, 14):
        assert corpus.complete and len(found) == len(digests)
        assert text.digest(corpus.held_out) == recipe["text"]["held_out_sha256"]


WORDS = (
    *("name", "value", "class", "module", "method", "object", "scope", "string", "number"),
    *("the", "is", "bound", "calls", "gives", "with", "of", "an", "every", "raises", "keeps"),
)


def prose(seed):
    return " ".join(np.random.default_rng(seed).choice(WORDS, 24)) + "."


def test_no_release_measures_with_text_that_another_one_trains_on():
    """Releases add, drop, move and edit paragraphs; by position they would all change sides."""
    first = [prose(i) for i in range(120)]
    second = [prose(1000), *first[3:70], *first[90:], *(prose(2000 + i) for i in range(9))]
    second[5] = first[8].replace("the", "this", 1)
    second.reverse()
    digests = text.choose_held_out([first, second])
    assert len(digests) == len(set(first) & set(second)) // 6
    later = [p for p in second if p != first[40]][2:]
    later += [p[: len(p) // 2] + " " + prose(3000 + i) for i, p in enumerate(first)]  # rewritten
    corpora = [text.split(release, digests) for release in (first, second, later)]
    assert corpora[0].held_out == corpora[1].held_out and corpora[0].complete
    for measured in corpora:
        assert len(measured.held_out.split("\n")) >= len(digests) - 3
        parts = set().union(*map(runs, measured.held_out.split("\n")))
        for trained in corpora:
            for paragraph in trained.train.split("\n"):
                assert parts.isdisjoint(runs(paragraph))
    assert not corpora[2].complete or set(digests) <= {text.digest(p) for p in later}


def test_a_split_that_lacks_a_paragraph_says_so():
    lines = [prose(i) for i in range(12)]
    digests = text.choose_held_out([lines])
    assert digests == [text.digest(lines[5]), text.digest(lines[11])]
    lacking = text.split(lines[:11], digests)
    assert lacking.held_out == lines[5] and not lacking.complete


def test_a_python_without_the_held_out_text_is_an_error(monkeypatch):
    monkeypatch.setattr(text, "held_out_digests", lambda: ("0" * 16,))
    with pytest.raises(ValueError, match=r"expected at least 2000 characters of them.* has 0"):
        text.load()


# File and recipe


def test_the_recipe_is_that_of_the_code(recipe):
    assert recipe["config"] == asdict(Config())
    assert recipe["schedule"] == asdict(train.Schedule())
    assert set(recipe["versions"]) == {"python", "numpy", "fastattn"}
    assert recipe["text"]["held_out_windows"] == evaluate.HELD_OUT_WINDOWS
    assert recipe["model_sha256"] == hashlib.sha256(shipped.MODEL_FILE.read_bytes()).hexdigest()


def test_the_file_is_small_and_holds_plain_arrays():
    assert shipped.MODEL_FILE.stat().st_size < 1_000_000
    shapes = weight_shapes(Config())
    with np.load(shipped.MODEL_FILE, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for name, shape in shapes.items():
        array = arrays.pop(name)
        assert array.shape == shape
        assert array.dtype == (np.float32 if len(shape) == 1 else np.int8)
        if len(shape) == 2:
            scale = arrays.pop(f"{name}.scale")
            channels = (shape[0], 1) if name == "embedding" else (1, shape[1])
            assert scale.shape == channels and scale.dtype == np.float32 and (scale > 0).all()
    assert not arrays


def test_the_file_reaches_its_recorded_perplexity(recipe, corpus, held_out):
    weights = shipped.load(Config())
    recorded = recipe["perplexity"]["int8"]
    found = evaluate.perplexity(weights, Config(), held_out)
    assert found == pytest.approx(recorded, rel=1e-4 if corpus.complete else 0.1)
    few = held_out[::8]  # the same by Paddle
    with paddle.no_grad():
        logits = Model(Config(), weights).forward(few[:, :-1]).reshape([-1, 128])
        loss = float(F.cross_entropy(logits, paddle.to_tensor(few[:, 1:].reshape(-1))))
    assert evaluate.perplexity(weights, Config(), few) == pytest.approx(math.exp(loss), rel=1e-4)


def test_eight_bits_cost_what_the_page_says(recipe):
    perplexity = recipe["perplexity"]
    cost = 100 * (perplexity["int8"] / perplexity["float32"] - 1)
    assert abs(cost) < 0.1
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    for name in ("float32", "float16", "bfloat16", "int8"):
        assert f"| {perplexity[name]:.5f} |" in page, name


def test_packing_rounds_to_the_nearest_step_of_each_channel():
    config = Config(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, context=64)
    weights = initial_weights(config)
    weights["0.qkv"] *= np.float32(10) ** np.linspace(-6, 3, config.qkv_width, dtype=np.float32)
    weights["0.down"][:, 5] = 0
    weights["embedding"] *= np.linspace(0.1, 90, config.vocabulary, dtype=np.float32)[:, None]
    found = shipped.unpack(shipped.pack(weights))
    assert set(found) == set(weights)
    for name, weight in weights.items():
        assert found[name].dtype == np.float32
        if weight.ndim == 1:
            assert (found[name] == weight).all()
            continue
        exact = weight.astype(np.float64)
        step = np.abs(exact).max(axis=1 if name == "embedding" else 0, keepdims=True) / 127
        assert (np.abs(found[name] - exact) <= step * 0.5001).all(), name
    assert not found["0.down"][:, 5].any()


@pytest.fixture
def copy(monkeypatch, tmp_path):
    """The shipped files in a folder where they can be damaged."""
    for name in ("MODEL_FILE", "RECIPE_FILE"):
        source = getattr(shipped, name)
        target = tmp_path / source.name
        target.write_bytes(source.read_bytes())
        monkeypatch.setattr(shipped, name, target)
    return tmp_path


def test_a_damaged_file_is_named(copy):
    shipped.load(Config())
    data = bytearray(shipped.MODEL_FILE.read_bytes())
    data[len(data) // 2] ^= 1
    shipped.MODEL_FILE.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.npz: expected SHA-256 \w+, got \w+; install"):
        shipped.load(Config())
    shipped.MODEL_FILE.unlink()
    with pytest.raises(ValueError, match=r"model\.npz.*No such file.*--train"):
        shipped.load(Config())
    for damaged in ("{", "[]"):
        shipped.RECIPE_FILE.write_text(damaged)
        with pytest.raises(ValueError, match=r"recipe\.json"):
            shipped.load(Config())


def test_a_file_of_other_sizes_is_refused(copy):
    config = Config(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, context=64)
    shipped.save(initial_weights(config), {"made_by": "a test"})
    assert shipped.recipe()["made_by"] == "a test"
    assert set(shipped.load(config)) == set(weight_shapes(config))
    with pytest.raises(ValueError, match="its sizes do not match Config"):
        shipped.load(Config())


def test_a_pickle_is_not_read(copy):
    buffer = io.BytesIO()
    np.savez(buffer, embedding=np.array([{"a": 1}], dtype=object))
    shipped.MODEL_FILE.write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    shipped.RECIPE_FILE.write_text(json.dumps({"model_sha256": digest}))
    with pytest.raises(ValueError, match="allow_pickle"):
        shipped.load(Config())


@pytest.mark.slow
def test_the_recipe_reaches_the_recorded_perplexity(recipe, corpus, held_out):
    weights = train.train(corpus, Config(), train.Schedule(**recipe["schedule"]))
    assert evaluate.perplexity(weights, Config(), held_out) == pytest.approx(
        recipe["perplexity"]["float32"], rel=0.01
    )


# Command

RESULT_KEYS = {
    "cache_quant_type",
    "bytes_per_token",
    "perplexity",
    "perplexity_ratio",
    "max_logit_error",
    "tokens_per_second",
    "text",
}


def parse(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *arguments])


@pytest.fixture
def few_windows(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastattn.demo.evaluate.HELD_OUT_WINDOWS", 2)
    return tmp_path / "cache"


@pytest.fixture
def tiny_demo(monkeypatch, few_windows):
    """The command with a model that trains in a moment."""
    config = Config(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, context=256)
    monkeypatch.setattr("fastattn.demo.model.Config", lambda: config)
    schedule = train.Schedule(steps=3, tokens=512)
    monkeypatch.setattr("fastattn.demo.train.Schedule", lambda: schedule)
    return few_windows


def check_report(found, types):
    assert set(found) == {
        *("schema", "attention", "versions", "device", "model", "text", "prompt", "serving"),
        "cache_types",
    }
    assert found["schema"] == report.SCHEMA
    assert set(found["versions"]) == {"fastattn", "paddle", "python"}
    assert set(found["model"]) == {"parameters", "origin", "path", "trained", "training_seconds"}
    assert found["serving"]["requests"] > 1 and found["serving"]["mixed_steps"] > 0
    assert [r["cache_quant_type"] for r in found["cache_types"]] == list(types)
    for result in found["cache_types"]:
        assert set(result) == RESULT_KEYS
        assert all(isinstance(v, (int, float, str)) for v in result.values())
        assert result["perplexity"] > 1 and result["tokens_per_second"] > 0
    base = found["cache_types"][0]
    assert base["perplexity_ratio"] == 1 and base["max_logit_error"] == 0


def demo(capsys, *arguments):
    """Run the command; its report and what it showed."""
    parsed = parse("--json", "-", "--max-new-tokens", "5", *arguments)
    assert parsed.run(parsed) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_the_command_serves_the_shipped_model_at_once(few_windows, corpus, tmp_path, capsys):
    found, shown = demo(capsys)
    rows = []  # types of 4 bits come with and without a rotation
    for name in CACHE_QUANT_TYPES:
        rows += [name, f"{name},k_rotation=none"] if name in NIBBLE_TYPES else [name]
    check_report(found, rows)
    assert found["model"]["origin"] == "shipped" and not found["model"]["trained"]
    assert Path(found["model"]["path"]) == shipped.MODEL_FILE
    assert found["text"]["held_out_characters"] == len(corpus.held_out)
    assert found["text"]["held_out_complete"] == corpus.complete
    for name in CACHE_QUANT_TYPES:
        assert f"\n{name} " in shown
    assert "training" not in shown and not few_windows.exists()
    assert found["serving"]["reused_tokens"] > 0
    file = tmp_path / "report.json"
    arguments = parse("--json", str(file), "--cache-quant-type", "cache_fp8")
    arguments.max_new_tokens = 5
    assert arguments.run(arguments) == 0
    assert "perplexity" in capsys.readouterr().out
    second = json.loads(file.read_text())
    check_report(second, ("none", "cache_fp8"))
    assert second["cache_types"][1]["text"] == found["cache_types"][2]["text"]


def test_train_trains_once_and_keeps_the_model(tiny_demo, capsys):
    one_type = ("--cache-quant-type", "none")
    first, shown = demo(capsys, "--train", *one_type)
    check_report(first, ("none",))
    assert first["model"]["origin"] == "trained" and first["model"]["trained"]
    assert "training on" in shown and "model kept in" in shown
    assert [str(p) for p in tiny_demo.iterdir()] == [first["model"]["path"]]
    second, shown = demo(capsys, "--train", *one_type)
    assert second["model"]["origin"] == "cache" and "training on" not in shown
    assert second["model"]["path"] == first["model"]["path"]
    assert second["cache_types"][0]["text"] == first["cache_types"][0]["text"]
    third, shown = demo(capsys, "--retrain", *one_type)
    assert third["model"]["origin"] == "trained" and "training on" in shown


def test_training_goes_on_where_nothing_can_be_kept(tiny_demo, capsys):
    tiny_demo.write_text("a file where the folder would be")
    found, shown = demo(capsys, "--train", "--cache-quant-type", "none")
    assert found["model"]["trained"] and "the model could not be kept in" in shown


def test_a_damaged_model_is_told_in_one_line(copy, few_windows, capsys):
    shipped.MODEL_FILE.write_bytes(b"PK")
    arguments = parse()
    assert arguments.run(arguments) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("fastattn demo: the shipped model cannot be used") and "--train" in error
    )


def test_the_names_of_the_cache_types_are_those_of_the_operators():
    assert cli.CACHE_QUANT_TYPES == CACHE_QUANT_TYPES


def test_help_and_the_first_line_wait_for_no_paddle():
    code = (
        "import sys; from fastattn.demo import cli, report; "
        "assert not {'paddle', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Progress


def test_every_phase_moves_the_bar(few_windows, monkeypatch):
    bars = []

    @contextlib.contextmanager
    def progress(self, title, total):
        seen = []
        bars.append((title, total, seen))
        yield lambda done, note="": seen.append((done, note))

    monkeypatch.setattr(report.Console, "progress", progress)
    types = ("none", "cache_int8")
    arguments = parse("--max-new-tokens", "20", "--cache-quant-type", types[-1])
    arguments.json = os.devnull
    assert arguments.run(arguments) == 0
    (title, total, seen), *rest = bars
    assert title == "loading" and [done for done, _ in seen] == list(range(total + 1))
    assert [title.split(":")[0] for title, _, _ in rest] == list(types)
    for title, total, seen in rest:
        counts = [done for done, _ in seen]
        assert counts == sorted(counts) and counts[-1] == total
        assert counts[-2] > 0.98 * total  # no jump at the end
        assert [count for count in counts if count == total] == [total]
        phases = list(dict.fromkeys(note for _, note in seen if note))
        static = title.startswith("cache_")
        assert phases == (["static scales"] if static else []) + ["perplexity", "serving"]
        for phase in phases:
            assert len({done for done, note in seen if note == phase}) >= 4, (title, phase)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_drawn_again_and_again(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with report.Console(stream).progress("serving", 200) as update:
        for step in range(200):
            update(step + 1, f"step {step}")
    shown = stream.getvalue()
    assert "\x1b[" in shown and "100 %" in shown and "serving" in shown


def test_the_command_in_a_process_of_its_own(tmp_path):
    """No terminal, no network, warnings that are errors; nothing is left in the home folder."""
    code = (
        "import runpy, socket, sys\n"
        "def refuse(*arguments): raise OSError('no network here')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "sys.argv[1:] = ['demo', '--max-new-tokens', '3', '--cache-quant-type', 'cache_int8']\n"
        "runpy.run_module('fastattn', run_name='__main__')\n"
    )
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONWARNINGS": "error::DeprecationWarning"}
    env.pop("FASTATTN_CACHE", None)
    library = Path(_ops.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=library, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "loading ..." and lines[1].startswith("loading  100 %")
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    assert sum("perplexity and serving" in line for line in lines) < 20
    assert lines[-1].startswith("cache_int8")
    assert not (tmp_path / ".cache" / "fastattn").exists()
