"""Other libraries' layer steps: merge of their rows, what the bench and the docs make of them.

Needs neither a GPU nor a tree of FastDeploy; tests of the rounding need torch.
"""

from __future__ import annotations

import io
import json
import runpy
import sys
import types

import numpy as np
import pytest

from benchmarks.cases import layers as bench_layers
from benchmarks.cases import step as bench_step
from benchmarks.core import peers as bench_peers
from benchmarks.core.plots import plot
from benchmarks.core.report import Report
from benchmarks.core.tables import WIDTH, markdown, table
from tests.support import ROOT

FOLDER = ROOT / "scripts" / "fastdeploy_peers"
report = types.SimpleNamespace(**runpy.run_path(str(FOLDER / "report.py")))
build = types.SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "build_fastdeploy_peers.py")))

EIGHT_BITS = ["cache_fp8", "block_wise_fp8"]
MODEL, STEP = "PaddleOCR-VL", "decode 16 x 8k"


def rows_of_both():
    """vLLM's row of two cache types, FastDeploy's of one: right at 8k, wrong at 32k."""
    wrong = report.fastdeploy_name(32768, True, "reads another table")
    right = report.fastdeploy_name(8192, False, "")
    step_row = report.step_row
    return [
        step_row(MODEL, STEP, EIGHT_BITS, "vLLM rope + write + Q + FA3 FP8", 40.0),
        step_row(MODEL, STEP, ["cache_fp8"], wrong, 80.0, wrong="reads another table"),
        step_row(MODEL, STEP, ["cache_fp8"], right, 20.0),
    ]


def test_names_say_the_limit_and_what_differs():
    assert report.fastdeploy_name(32768, True, "") == "FastDeploy 32k"
    assert report.fastdeploy_name(8192, False, "") == "FastDeploy 8k, other rope"
    assert report.fastdeploy_name(8192, True, "", gathers=True) == "FastDeploy + vLLM's FA3 8k"
    marked = "FastDeploy 8k, other rope, wrong output"
    assert report.fastdeploy_name(8192, False, "relative error 0.4") == marked


def test_a_run_replaces_its_own_rows_alone(tmp_path):
    path = tmp_path / "peers.json"
    vllm, *fastdeploy = rows_of_both()
    others = [
        {"section": "decode", "peer": "vLLM FA3", "us": 1.0},
        {"section": "step", "peer": "FlashInfer", "us": 2.0, "quants": []},
    ]
    path.write_text(json.dumps({"meta": {"gpu": "x"}, "rows": [*others, vllm]}))
    once = {"section": "step preparation", "peer": "FastDeploy split", "us": None}
    for facts in ({"left_out": {"a": "b"}}, {"left_out": {}}):
        report.write_merged(path, report.FASTDEPLOY, [*fastdeploy, once], facts)
    merged = json.loads(path.read_text())
    assert merged["rows"] == [*others, vllm, *fastdeploy, once]
    assert merged["meta"] == {"gpu": "x"} and merged["fastdeploy"] == {"left_out": {}}
    faster = {**vllm, "us": 1.0}
    report.write_merged(path, report.VLLM, [faster], {})
    assert json.loads(path.read_text())["rows"] == [*others, *fastdeploy, once, faster]


def test_a_file_that_does_not_exist_is_made(tmp_path):
    path = tmp_path / "peers.json"
    report.write_merged(path, report.VLLM, rows_of_both()[:1], {"left_out": {}})
    assert json.loads(path.read_text()) == {"rows": rows_of_both()[:1], "vllm": {"left_out": {}}}


def test_a_section_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "peers.json"
    row = {"section": "sparse_step", "peer": "vLLM", "us": 1.0}
    other = {"section": "mla_writers", "peer": "vLLM", "us": 2.0}
    step = rows_of_both()[0]
    report.write_section(path, "sparse_step", [row, row], {"left_out": {"a": "b"}})
    report.write_section(path, "mla_writers", [other], {"left_out": {}})
    report.write_merged(path, report.VLLM, [step], {})  # a library's steps: not these
    report.write_section(path, "sparse_step", [{**row, "us": 3.0}], {"left_out": {}})
    written = json.loads(path.read_text())
    assert written["rows"] == [other, step, {**row, "us": 3.0}]
    assert written["sparse_step"] == {"left_out": {}}


def test_a_row_is_replaced_by_one_of_its_kernel_and_shape():
    def logits(b, us, **more):
        return {"section": "logits", "peer": "x", "b": b, "us": us, **more}

    theirs = {"meta": 1, "rows": [logits(1, 5.0, rate=2.0), logits(64, 7.0), {"section": "host"}]}
    found = report.replaced(theirs, [logits(64, 8.0), logits(128, 9.0)])
    assert found["meta"] == 1
    assert found["rows"] == [*theirs["rows"][::2], logits(64, 8.0), logits(128, 9.0)]


def test_a_narrow_table_marks_what_is_wrong():
    (line,) = report.compact(rows_of_both(), report.FASTDEPLOY)
    assert line.split() == [MODEL, "cache_fp8", "decode", "16:", "80.0!/20.0"]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Rows as the step benchmark yields them on a GPU, beside the peers of a file."""
    path = tmp_path / "peers.json"
    path.write_text(json.dumps({"rows": rows_of_both()}))
    monkeypatch.setenv("FASTATTN_BENCH_PEERS", str(path))
    bench_peers._rows.cache_clear()
    yield list(bench_rows())
    bench_peers._rows.cache_clear()


def bench_rows():
    class Layers:
        def __init__(self, device, model, quant, name):
            self.what = quant

        def calls(self, exact):
            return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_step, "Layers", Layers)
        patch.setattr(bench_step, "eager_us", lambda *ways: [(60.0, 50.0), (58.0, 49.0)])
        patch.setattr(bench_step, "_QUICK", ((MODEL,), ("cache_fp8", "block_wise_fp8"), (STEP,)))
        device = types.SimpleNamespace(quick=True, us=lambda calls: 32.0)
        yield from bench_step.step(device)


def test_the_bench_shows_each_peer_beside_its_cache_types(measured):
    beside = {}
    for row in measured:
        if row.shape.endswith("graph"):
            beside.setdefault(row.shape.split()[1], {})[row.peer] = row.ratio
    vllm = "vLLM rope + write + Q + FA3 FP8"
    assert beside == {
        "cache_fp8": {
            "exact lengths": 1.0,
            vllm: 1.25,
            "FastDeploy 32k, wrong output": 2.5,
            "FastDeploy 8k, other rope": 0.625,
        },
        "block_wise_fp8": {"exact lengths": 1.0, vllm: 1.25},
    }


MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "paddle": "3.3.1", "commit": "a"}


def test_tables_name_them(measured):
    from rich.console import Console

    shown = Report(MACHINE, measured)
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(table(shown))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "FastDeploy 32k, wrong" in text and "vLLM FP8, 4 kernels" in text and "…" not in text
    assert "| FastDeploy 8k, other rope |" in markdown(shown)


def test_plots_name_them(measured, tmp_path):
    pytest.importorskip("matplotlib")
    plot(Report(MACHINE, measured), tmp_path / "a.svg", None)
    assert "FastDeploy 32k, wrong output" in (tmp_path / "a.svg").read_text()


def test_models_and_steps_are_the_benchmarks(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    steps = types.SimpleNamespace(**runpy.run_path(str(FOLDER / "steps.py")))
    assert list(steps.MODELS) == list(bench_step.MODELS)
    for name, model in bench_step.MODELS.items():
        theirs = steps.MODELS[name]
        assert theirs[:5] == (model.heads, model.kv, model.dim, model.neox, model.sinks)
        assert theirs.rope_3d == model.table_per_seq
    theirs = {name: [s[:2] for s in sequences] for name, sequences in steps.STEPS.items()}
    assert theirs == bench_step.STEPS
    assert (steps.CONTEXT, steps.MAX_MODEL_LEN) == (bench_step.CONTEXT, bench_layers.MAX_MODEL_LEN)
    for of_layer in (10**6, 10**8, 10**10):
        expected = int(np.clip(bench_layers._LAYER_BYTES / of_layer, 1, bench_layers._MOST_LAYERS))
        assert steps.layer_count(of_layer) == expected
    prefill = [new > 1 for sequences in steps.STEPS.values() for _, new, _ in sequences]
    assert prefill == [s[2] for sequences in steps.STEPS.values() for s in sequences]


WRITER = """#include "writer.h"
template <typename T, typename Q, bool R>
void DecoderWriteCacheWithRoPEKernel(const A& meta, int n) { run<T>(n); }

template void DecoderWriteCacheWithRoPEKernel<paddle::bfloat16, int>(
    const A& meta,  // of a step
    int n);

template void DecoderWriteCacheWithRoPEKernel<paddle::float16, int>(
    const A& meta, int n);
"""


def test_the_writers_file_keeps_one_instantiation():
    text = build.cut_writer(WRITER)
    definition = WRITER[: WRITER.index("\ntemplate void")]
    assert text.startswith(definition) and text.count("template void") == 1
    kept = text[len(definition) :].split()
    assert (
        "".join(kept[:4])
        == "templatevoidDecoderWriteCacheWithRoPEKernel<paddle::bfloat16,paddle::bfloat16,"
    )
    assert "// of a step" in text and text.endswith("int n);\n")
    with pytest.raises(ValueError, match="not a tree of FastDeploy"):
        build.cut_writer("void Other();")


def test_what_fastdeploy_does_not_instantiate_is_said(tmp_path):
    folder = tmp_path / "append_attn"
    folder.mkdir()
    c8 = {"dispatch_params": {"GROUP_SIZE": [4, 8], "HEAD_DIM": [128]}}
    c16 = {"dispatch_params": {"GROUP_SIZE": [4, 8], "HEAD_DIM": [64, 128]}}
    config = {"multiquery_attention_c8": c8, "multiquery_attention_c16": c16}
    (folder / "template_config.json").write_text(json.dumps(config))
    (tmp_path / build.WRITER).write_text(WRITER)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    made, lacking = build.units(tmp_path, scratch)
    assert len(lacking) == 3 and all("gpt-oss" in what for what in lacking)
    assert all("HEAD_DIM [128] only" in why for why in lacking.values())
    names = [unit.name for unit in made]
    assert "attention_8_64_none" in names and "attention_8_64_cache_fp8" not in names
    assert (scratch / "writer.cu").read_text() == build.cut_writer(WRITER)


def rounding():
    pytest.importorskip("torch")
    return types.SimpleNamespace(**runpy.run_path(str(FOLDER / "rounding.py")))


@pytest.mark.parametrize("quant", ["cache_int8", "cache_fp8", "block_wise_fp8"])
def test_what_the_cache_makes_of_numbers(quant):
    """Held to NumPy, with scales that differ by head and numbers beyond the type's range."""
    model = rounding()
    import ml_dtypes
    import torch

    bf16 = ml_dtypes.bfloat16
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((40, 3, 128)) * [[[0.5], [3], [20]]]).astype(bf16)
    limit = 127 if quant == "cache_int8" else 448
    if quant == "block_wise_fp8":
        scale = (np.float32(448) / np.abs(x).max(-1, keepdims=True).astype("f4")).astype(bf16)
        back, scales = (1 / scale.astype("f4")).astype(bf16), None
    else:
        scale = np.array([limit / 2, limit / 6, limit / 90], bf16)  # the first clips
        back = (1 / scale.astype("f4")).astype(bf16)
        scales = model.Scales(*(torch.tensor(s.astype("f4")).bfloat16() for s in (scale, back)))
        scale, back = scale[:, None], back[:, None]
    product = (x.astype("f4") * scale.astype("f4")).astype(bf16).astype("f4")
    codes = np.clip(np.rint(product), -limit, limit)
    if quant != "cache_int8":
        codes = codes.astype(ml_dtypes.float8_e4m3fn)
    expected = codes.astype("f8") * back.astype("f8")
    got = model.stored(torch.tensor(x.astype("f8")), quant, scales).numpy()
    np.testing.assert_array_equal(got, expected)
    relative = np.sqrt(
        ((got - x.astype("f8"))[:, 1:] ** 2).mean() / (x[:, 1:].astype("f8") ** 2).mean()
    )
    assert 0.002 < relative < 0.05


def test_static_types_ask_for_scales():
    model = rounding()
    import torch

    with pytest.raises(ValueError, match="static scales"):
        model.stored(torch.zeros(1, 1, 8), "cache_fp8")
    assert model.stored(torch.full((1, 1, 2), 1 / 3), "none").dtype == torch.float64
