"""What a user gets wrong on the command line ends in a line, and before the work."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import fastattn.calibrate.cli as calibrate_cli
import fastattn.demo.cli as demo_cli
from benchmarks.core.rows import Row
from fastattn.cli import main
from fastattn.cli.outputs import problem_of_file, problem_of_folder
from fastattn.demo import kinds, train
from tests.support import ROOT

ROW = dataclasses.asdict(Row("append", "small", 2.0, 1.0, "GB/s", "NumPy", 4.0, 1e-3))


def refused(capsys, *arguments) -> str:
    """What a command says that ends with another status than 0, and with no traceback."""
    try:
        status = main([str(x) for x in arguments])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    out, err = capsys.readouterr()
    return out + err


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.npz"
    x = np.random.default_rng(0).normal(size=(8, 1, 64)).astype(np.float32)
    np.savez(path, **{f"layers.0.{name}": x for name in ("key", "value", "query")})
    return path


# Where results cannot go.

PLACES = {
    "folder": ("dir", "it is a folder"),
    "no folder": ("none/a", "no such folder"),
    "below a file": ("file/a", "no such folder"),
    "too long": ("a" * 300, "File name too long"),
    "null": ("a\0", "null"),
}


@pytest.fixture
def unwritable(tmp_path):
    """A path that cannot be written, with `suffix`, and why not."""

    def make(name, suffix):
        at, text = PLACES[name]
        if name == "folder":
            (tmp_path / f"dir{suffix}").mkdir()
        (tmp_path / "file").touch()
        return tmp_path / (at + suffix), text

    return make


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".json"])
def test_outputs_of_calibrate(samples, unwritable, monkeypatch, capsys, name, suffix):
    path, text = unwritable(name, suffix)
    monkeypatch.setattr(calibrate_cli, "read_samples", lambda *_, **__: pytest.fail("worked"))
    options = ["--types", "cache_fp8", "--transforms", "none"]
    assert text in refused(capsys, "calibrate", samples, *options, "--output", path)


def test_suffixes_of_calibrate(samples, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate_cli, "read_samples", lambda *_, **__: pytest.fail("worked"))
    for name in ("a.txt", "a", "a.NPZ"):
        text = refused(capsys, "calibrate", samples, "--output", tmp_path / name)
        assert "expected .safetensors, .npz or .json, got" in text


@pytest.mark.parametrize("name", PLACES)
def test_outputs_of_demo(unwritable, monkeypatch, capsys, name):
    path, text = unwritable(name, ".json")
    monkeypatch.setattr(demo_cli, "_demo", lambda *_: pytest.fail("worked"))
    assert text in refused(capsys, "demo", "--json", path)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_outputs_of_bench(unwritable, monkeypatch, capsys, name, option):
    path, text = unwritable(name, ".png")
    monkeypatch.setattr("benchmarks.cli._run_benchmarks", lambda *_: pytest.fail("worked"))
    assert text in refused(capsys, "bench", option, path)


def test_other_outputs_of_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.cli._run_benchmarks", lambda *_: pytest.fail("worked"))
    assert "expected .png, .svg or .pdf" in refused(capsys, "bench", "--plot", tmp_path / "a.xyz")
    for folder in (tmp_path / "none", tmp_path / "a\0"):
        assert "cannot be written" in refused(capsys, "bench", "--json-dir", folder)
    monkeypatch.undo()
    report = tmp_path / "a.json"
    report.write_text(json.dumps({"rows": [ROW]}))
    if os.path.exists("/dev/full"):
        for option in ("--json", "--markdown"):
            text = refused(capsys, "bench", "--load", report, option, "/dev/full")
            assert "No space left" in text


def test_looking_changes_nothing(tmp_path):
    path = tmp_path / "a"
    assert problem_of_file(path) is None and problem_of_folder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    path.write_text("text")
    assert problem_of_file(path) is None and path.read_text() == "text"


# Options and files.


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seed", "-1"], "--seed: expected an int from 0 on, got '-1'"),
        (["--seed", "9" * 5000], "--seed: expected an int from 0 on"),
        (["--seed", "x"], "--seed: expected an int from 0 on, got 'x'"),
        (["--queries", "0"], "--queries: expected an int from 1 on, got '0'"),
    ],
)
def test_numbers_of_calibrate(samples, capsys, arguments, text):
    assert text in refused(capsys, "calibrate", samples, *arguments)


def test_heads_that_no_operator_takes(tmp_path, capsys):
    path = tmp_path / "samples.npz"
    x = np.ones((8, 1, 80), np.float32)
    np.savez(path, **{f"layers.0.{name}": x for name in ("key", "value", "query")})
    text = refused(capsys, "calibrate", path)
    assert "layer 0: K: expected heads of 64 or 96 or 128 or 192 or 256 channels, got 80" in text


def test_help_of_calibrate(capsys):
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    assert "--allow-pickle" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value", [None, "x", [], {}, -1, 0, float("nan"), float("inf"), True], ids=repr
)
@pytest.mark.parametrize("field", ROW)
@pytest.mark.parametrize("option", ["--load", "--baseline"])
def test_reports_that_are_wrong(tmp_path, capsys, option, field, value):
    """Every value of a row that the command cannot show is refused; none ends in a traceback."""
    good, path = tmp_path / "good.json", tmp_path / "a.json"
    good.write_text(json.dumps({"rows": [ROW]}))
    path.write_text(json.dumps({"rows": [{**ROW, field: value}]}))
    load = ["--load", path] if option == "--load" else ["--load", good, "--baseline", path]
    status = main(["bench", *map(str, load), "--markdown", str(tmp_path / "a.md")])
    kinds = str if isinstance(ROW[field], str) else (int, float)
    optional = field in ("rate", "peer_us", "error") and value is None
    fits = optional or isinstance(value, kinds)
    if field == "us":
        fits = fits and 0 < value < np.inf
    assert status == (0 if fits else 2)
    assert ("no report of this command" in capsys.readouterr().out) is not fits


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"", b"null", b"{}", b'{"rows": 1}'])
def test_files_that_are_no_reports(tmp_path, capsys, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert "no report of this command" in refused(capsys, "bench", "--load", path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench", "--op", "[/x]"], "--op [/x] is no benchmark"),
        (["bench", "--fail-below", "x"], "--fail-below: expected a positive number, got x"),
        (["show-config", "x"], "unrecognized arguments: x"),
        (["collect-env", "x"], "unrecognized arguments: x"),
        (["demo", "--prompt", ""], "--prompt: expected 1 to"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "required: command"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_other_options(capsys, arguments, text):
    assert text in refused(capsys, *arguments)


def test_a_trained_model_that_is_damaged_is_trained_again(tmp_path):
    kind = kinds.find("gqa")
    path, rng = tmp_path / "a.npz", np.random.default_rng(0)
    np.savez(path, **{name: np.zeros(2) for name in train.weight_shapes(kind.config)})
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=40):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        assert train.load_weights(path, kind.config) is None


def test_a_reader_that_has_seen_enough():
    """The installed command, too, ends quietly where its output's reader has gone."""
    assert 'fastattn = "fastattn.__main__:run"' in (ROOT / "pyproject.toml").read_text()
    code = (
        "import fastattn.__main__ as command\n"
        "command.main = lambda: print('x' * 100_000, flush=True) or 0\n"
        "raise SystemExit(command.run())"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=-1, cwd=ROOT)
    os.close(write)
    assert done.returncode == 0 and done.stderr == b""
