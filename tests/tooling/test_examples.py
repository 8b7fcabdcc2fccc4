"""The programs of examples/ run, in this process, and give what NumPy gives."""

from __future__ import annotations

import ast
import re
import runpy

import numpy as np
import paddle

from fastattn import models
from fastattn.calibrate import LayerCalibration
from fastattn.models import exact
from tests.support import ROOT
from tests.support.tensors import skip_slices_on, to_numpy

FOLDER = ROOT / "examples"
PROGRAMS = sorted(path.name for path in FOLDER.glob("*.py"))


def load(name: str) -> dict:
    return runpy.run_path(str(FOLDER / name))


def likely(model, tokens, start):
    """How far each token from `start` on is from the likeliest, in logits of fp32 without cache."""
    logits = model.dense.logits(exact.forward(model.dense, np.array(tokens[:-1])))[start - 1 :]
    return logits.max(axis=1) - logits[np.arange(len(logits)), tokens[start:]]


def test_a_server(place, capsys):
    options = ["--model", "toy", "--max-new-tokens", "12", "--device", place]
    example = load("serve_smollm2.py")
    found, shared = example["main"]([*options, "--cache-quant-type", "none"])
    model = models.load("toy")
    prompts = [example["prompt_of"](model.tokenizer, q) for q in example["QUESTIONS"]]
    shown = capsys.readouterr().out
    for question, prompt, tokens in zip(example["QUESTIONS"], prompts, found):
        assert tokens[: len(prompt)] == prompt and len(tokens) == len(prompt) + 12
        assert likely(model, tokens, len(prompt)).max() < 0.05
        assert f"> {question}\n\n{model.tokenizer.decode(tokens[len(prompt) :])}\n" in shown
    assert shared == 2 * 128  # two full blocks of the text that all prompts begin with
    assert "toy, cache none" in shown and "256 were shared" in shown


def test_a_server_with_few_blocks():
    """A prompt waits for blocks, and the blocks of a prefix are used again."""
    example = load("serve_smollm2.py")
    model = models.load("toy")
    prompts = [example["prompt_of"](model.tokenizer, q) for q in example["QUESTIONS"]]
    prompts.insert(1, model.tokenizer.encode("Another text, which has no such beginning. " * 3))
    layers = [LayerCalibration("none")] * model.config.layers
    server = example["Server"](model, layers, 4, paddle.CPUPlace())
    texts = [example["Sequence"](prompt, 5) for prompt in prompts]
    server.waiting = list(texts)
    together = 0
    while not all(s.done for s in texts):
        server.step()
        together = max(together, len(server.running))
        used = {block for s in server.running for block in s.blocks}
        assert used.isdisjoint(server.pool.free) and len(used) + len(server.pool.free) == 4
    assert together == 2  # of texts that share two of their three blocks
    assert [s.shared for s in texts] == [0, 0, 64, 128]  # the other text took the later block
    for prompt, s in zip(prompts, texts):
        assert likely(model, s.tokens, len(prompt)).max() < 0.05


def test_what_finds_a_wrong_token():
    model = models.load("toy")
    tokens = model.tokenizer.encode("The value of an expression zq")
    assert likely(model, tokens, len(tokens) - 2).max() > 1


def test_a_server_in_few_lines():
    text = (FOLDER / "serve_smollm2.py").read_text(encoding="utf-8")
    below = text.split('"""', 2)[2]
    assert sum(bool(line.strip()) for line in below.splitlines()) <= 150


def test_a_decode_step_that_stays_in_place(place, capsys):
    worst, captured = load("cuda_graph_decode.py")["main"](["--device", place])
    assert 0 < worst < 0.02 and captured == (place == "gpu")
    assert ("not captured" in capsys.readouterr().out) == (place == "cpu")


def test_a_calibrated_model(place, tmp_path, capsys):
    options = ["--model", "toy", "--tokens", "96", "--folder", str(tmp_path), "--device", place]
    losses, layer = load("calibrate_model.py")["main"](options)
    assert list(losses) == ["none", "cache_int8, K as it is", "cache_int8, calibrated"]
    assert losses["none"] == 0 and max(map(abs, losses.values())) < 1
    with np.load(tmp_path / "text0.npz") as samples:
        value = samples["layers.0.value"]
        assert samples["layers.3.key"].shape == (96, 2, 64)
    with np.load(tmp_path / "text1.npz") as samples:
        value = np.concatenate([value, samples["layers.0.value"]])
    largest = np.abs(value).max(axis=(0, 2)) / 127  # of each head of V
    assert np.allclose(to_numpy(layer.cache_v_out_scale), largest, rtol=1e-6)
    assert layer.cache_quant_type_str == "cache_int8"
    assert "layer 3: cache_int8" in capsys.readouterr().out


def test_pages_of_other_packages(place):
    skip_slices_on(place)  # Paddle's own gather and transpose
    example = load("convert_vllm_pages.py")
    results = example["main"](["--device", place])
    assert len(results) == 12
    assert all(same and error < 0.004 for same, error in results.values())


def test_pages_become_blocks_in_the_order_of_the_sequences():
    example = load("convert_vllm_pages.py")
    pages = np.random.default_rng(0).integers(0, 256, (9, 32, 2, 64)).astype(np.uint8)
    tables = np.array([[8, 2, 5, -1], [0, 1, 7, 3]])
    blocks = to_numpy(example["to_blocks"](paddle.to_tensor(pages), tables, "k", "cache_fp8"))
    logical = example["F"].convert_cache_layout(
        paddle.to_tensor(blocks), kind="k", cache_quant_type="cache_fp8",
        src="fastattn", dst="logical",
    ).numpy()  # fmt: skip
    for block, (a, b) in enumerate([(8, 2), (5, None), (0, 1), (7, 3)]):
        assert (logical[block][:, :32] == pages[a].transpose(1, 0, 2)).all()
        assert b is None or (logical[block][:, 32:] == pages[b].transpose(1, 0, 2)).all()
    empty = paddle.zeros(pages.shape, "uint8")
    back = example["to_pages"](paddle.to_tensor(blocks), empty, tables, "k", "cache_fp8").numpy()
    assert (back[[8, 2, 5, 0, 1, 7, 3]] == pages[[8, 2, 5, 0, 1, 7, 3]]).all()
    assert not back[[4, 6]].any()  # pages of no sequence


def test_layers_of_deepseek(place):
    results = load("deepseek_layer.py")["main"](["--device", place, "--topk", "32"])
    (dense, all_keys), (sparse, share) = results["DeepSeek-V3"], results["DeepSeek-V3.2"]
    assert 0 < dense < 0.01 and all_keys == 1
    assert dense < sparse < 0.05 and 0.9 < share <= 1  # e4m3 codes of latents and index keys


def test_each_says_how_to_run_it_on_a_gpu():
    assert len(PROGRAMS) == 5
    for name in PROGRAMS:
        text = (FOLDER / name).read_text(encoding="utf-8")
        head = ast.get_docstring(ast.parse(text))
        assert f"python examples/{name} " in head and f"{name} --device gpu" in head
        assert 'if __name__ == "__main__":\n    main()\n' in text


def test_the_page_names_all():
    names = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".md"))
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted([*re.findall(r"^\| \[([\w.]+)\]", page, re.M), "README.md"]) == names


def test_settings_of_fastdeploy_stand_on_its_page():
    page = (FOLDER / "fastdeploy.md").read_text(encoding="utf-8")
    known = "".join((ROOT / "docs" / name).read_text() for name in ("backends.md", "calibrate.md"))
    for row in re.findall(r"^\| (.*?) \|", page, re.M)[2:]:
        for name in re.findall(r"`(\w+)`", row):
            assert f"`{name}" in known or f"{name}=" in known or name in known, name
