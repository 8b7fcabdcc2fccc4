"""scripts/make_gpu_tables.py: pages say what the committed results say."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys

import pytest

from benchmarks.cases import batch_invariant, step
from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "make_gpu_tables.py"
MAKE = runpy.run_path(str(SCRIPT))
RESULTS = MAKE["Results"]
#: Has most of the tables.
MEASUREMENTS = "docs/measurements.md"
PAGES = tuple(dict.fromkeys((*MAKE["PAGES"], MEASUREMENTS)))


def check(root):
    command = [sys.executable, str(SCRIPT), "--check", "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    """Pages and results, to change."""
    for name in MAKE["PAGES"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    return tmp_path


def test_pages_are_up_to_date():
    done = check(ROOT)
    assert done.returncode == 0, done.stdout


def test_the_page_of_measurements_is_up_to_date():
    text = (ROOT / MEASUREMENTS).read_text(encoding="utf-8")
    results = RESULTS.read(ROOT / "benchmarks" / "results")
    assert MAKE["written"](text, results, "../") == text


def test_every_table_has_a_place_and_every_place_a_table():
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in PAGES)
    places = [match[2] for match in MAKE["_BLOCK"].finditer(text)]
    assert sorted(places) == sorted(MAKE["TABLES"])
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(places)


@pytest.mark.parametrize("page", MAKE["PAGES"])
def test_check_finds_a_changed_number(copy, page):
    path = copy / page
    text = path.read_text(encoding="utf-8")
    block = MAKE["_BLOCK"].search(text)
    at = next(i for i in range(block.end(1) + 200, block.end()) if text[i].isdigit())
    changed = "3" if text[at] != "3" else "4"
    path.write_text(text[:at] + changed + text[at + 1 :], encoding="utf-8")
    done = check(copy)
    assert done.returncode == 1 and f"{page}: out of date" in done.stdout


def test_check_finds_changed_results(copy):
    path = copy / "benchmarks" / "results" / "h100-decode.json"
    report = json.loads(path.read_text())
    for row in report["rows"]:
        row["us"] *= 1.5
    path.write_text(json.dumps(report))
    done = check(copy)
    assert done.returncode == 1 and "gpu.md: out of date" in done.stdout
    assert "host.md" not in done.stdout

    results = RESULTS.read(copy / "benchmarks" / "results")
    text = (ROOT / MEASUREMENTS).read_text(encoding="utf-8")
    assert MAKE["written"](text, results, "../") != text


def test_results_that_are_missing_are_dashes(copy):
    folder = copy / "benchmarks" / "results"
    for path in folder.glob("*.json"):
        path.unlink()
    results = RESULTS.read(folder)
    for name, table in MAKE["TABLES"].items():
        text = table(results)
        assert not any(x.isdigit() for x in text.rpartition("|")[2]), name
    assert "| Qwen3-8B, `none` | - | - | - | - | - |" in MAKE["TABLES"]["step"](results)
    (folder / "h100-decode.json").write_text(json.dumps({"machine": {}, "rows": [
        row("paged_attention", "decode none B 1 ctx 8192 H 32/8 D 128", 20.0)]}))  # fmt: skip
    assert "| 20 (- %) |" in MAKE["TABLES"]["decode"](RESULTS.read(folder))


def row(op, shape, us, peer="", peer_us=None, rate=None):
    return {"op": op, "shape": shape, "us": us, "rate": rate, "peer": peer, "peer_us": peer_us}


def write(folder, name, date, *rows, **machine):
    report = {"machine": {"date": date, "commit": "c", **machine}, "rows": rows}
    (folder / name).write_text(json.dumps(report))


def test_the_newest_row_counts_unless_it_lost_its_peers(tmp_path):
    copy_of = ("copy of as many bytes", 1.0)
    new = row("f", "x", 2.0, *copy_of), row("f", "y", 4.0, *copy_of)
    old = (
        row("f", "x", 3.0, *copy_of),
        row("f", "y", 5.0, *copy_of),
        row("f", "y", 5.0, "vLLM", 6.0),
    )
    write(tmp_path, "h100-a.json", "2026-01-02", *new)
    write(tmp_path, "h100-b.json", "2026-01-01", *old)
    results = RESULTS.read(tmp_path)
    assert results.get("f", "x").us == 2.0 and results.get("f", "x").file == "h100-a"
    beside = results.get("f", "y")
    assert (beside.us, beside.file) == (5.0, "h100-b")
    assert beside.ratio("vLLM") == pytest.approx(1.2) and beside.ratio("other") is None


def test_a_cell_of_a_step_has_the_ratios_of_both_peers(tmp_path):
    shape = "Qwen3-8B cache_fp8 decode 16 x 8k, graph"
    rows = [
        row("layer step", shape, 100.0, "exact lengths", 90.0),
        row("layer step", shape, 100.0, "vLLM rope + write + Q + FA3 FP8", 125.0),
        row("layer step", shape, 100.0, "FastDeploy 8k", 400.0),
        row("layer step", shape, 100.0, "FastDeploy 32k, other rope", 250.0),
        row("layer step", shape.replace("graph", "eager"), 50.0, "host", 40.0),
        row("layer step", shape.replace("graph", "eager"), 50.0, "exact lengths", 49.0),
        row("layer step", shape.replace("graph", "eager"), 50.0, "host, exact lengths", 39.0),
    ]
    write(tmp_path, "h100-step.json", "2026-01-01", *rows)
    line = MAKE["TABLES"]["step"](RESULTS.read(tmp_path)).splitlines()[2]
    assert line == "| Qwen3-8B, `cache_fp8` | - | 100 (1.25, 2.50r) | - | - | - |"
    ranges = MAKE["TABLES"]["step ranges"](RESULTS.read(tmp_path)).splitlines()[2]
    assert ranges == "| `cache_fp8` | 1.25 | 2.50 | - | - | - | 0.90 | 0.98 | 40 |"


def test_a_prefill_path_has_a_ratio_of_its_own(tmp_path):
    shape = "Qwen3-8B block_wise_fp8 2048 behind 6144 + 32 x 8k, graph"
    gathered = "FastDeploy + vLLM's FA3 32k"
    rows = [
        row("layer step", shape, 100.0, "FastDeploy 32k", 250.0),
        row("layer step", shape, 100.0, f"{gathered}, wrong output", 110.0),
        row("layer step", shape.replace("block_wise_fp8", "none"), 100.0, gathered, 120.0),
    ]
    write(tmp_path, "h100-step.json", "2026-01-01", *rows)
    tables = RESULTS.read(tmp_path)
    assert "| 100 (-, 2.50, 1.10w) |" in MAKE["TABLES"]["step"](tables)
    ranges = MAKE["TABLES"]["step ranges"](tables)
    assert "| `block_wise_fp8` | - | - | - | 2.50 | - |" in ranges
    assert "| `none` | - | - | - | - | 1.20 |" in ranges


def test_a_wrong_output_is_marked_and_in_no_range(tmp_path):
    shape = "PaddleOCR-VL none decode 16 x 8k, graph"
    wrong = row("layer step", shape, 100.0, "FastDeploy 32k, wrong output", 250.0)
    write(tmp_path, "h100-step.json", "2026-01-01", wrong)
    tables = RESULTS.read(tmp_path)
    assert "| 100 (-, 2.50w) |" in MAKE["TABLES"]["step"](tables)
    assert "2.50" not in MAKE["TABLES"]["step ranges"](tables)


def test_the_step_table_has_the_benchmarks_models_and_steps():
    from gpu_tables import attention

    assert tuple(step.MODELS) == attention._MODELS
    assert tuple(step.STEPS) == attention.STEPS
    assert sorted(attention.QUANTS) == sorted(step.QUANTS)


def test_a_cell_of_batch_invariance_has_the_default_first(tmp_path):
    op, of = "paged_attention, batch_invariant", " H 32/8 D 128"
    rows = [
        row(op, "none B 16 ctx 8192 new 1" + of, 12.0, "default", 10.0),
        row(op, "none B 1 ctx 8192 new 4" + of, 300.0, "default", 250.0),
        row(op, "cache_fp8 B 4 ctx 8192 new 16" + of, 91.0, "default", 65.0),
    ]
    write(tmp_path, "h100-batch-invariant.json", "2026-01-01", *rows)
    lines = MAKE["TABLES"]["batch invariant"](RESULTS.read(tmp_path)).splitlines()
    assert lines[2:4] == [
        "| `none`, 8k | - | 10.0 / 12.0 | - | - |",
        "| `none`, 8k, 4 new tokens | 250 / 300 | - | - | - |",
    ]
    assert lines[5] == "`cache_fp8`: 4 sequences of 8k with 16 new tokens 65.0 / 91.0."


def test_the_table_of_batch_invariance_has_the_benchmarks_shapes():
    from gpu_tables import attention

    measured = {
        (quant, context, new)
        for quant in batch_invariant.TYPES["gpu"]
        for _, context, new in batch_invariant.SHAPES["gpu"]
    }
    measured |= {("cache_fp8", context, new) for _, context, new in batch_invariant.MORE}
    shown = set(attention._INVARIANT_LINES)
    assert {x for x in measured if x[2] <= 4} <= shown
    of_more = {f"B {b} ctx {k} new {new}" for b, k, new in batch_invariant.MORE if new > 4}
    assert of_more <= {shape for _, shape in attention._INVARIANT_MORE}


def test_means_of_merge_are_geometric(tmp_path):
    rows = [
        row("merge_attn_states, fused", f"{n} tokens, H 4, D 128, bfloat16 to e4m3, {state}",
            1.0, "vllm_cuda_fused", us)
        for n, state, us in ((1, "warm", 2.0), (16, "warm", 8.0), (1, "cold", 3.0),
                             (16384, "cold", 12.0))
    ]  # fmt: skip
    write(tmp_path, "h100-merge.json", "2026-01-01", *rows)
    text = MAKE["TABLES"]["merge"](RESULTS.read(tmp_path))
    assert "| 2 | 4.00x / 6.00x | 4.00x / 3.00x | 2.000x |" in text


def test_fractions_of_a_copy_are_of_the_same_run(tmp_path):
    """Of the copy beside the row, if there is one; else of the machine's rate."""
    rows = [
        row("quantize_fp8", f"16384 x 8192 bf16, {name}", us, peer, peer_us, rate)
        for name, us, rate, peer, peer_us in (
            ("group", 100.0, 1500.0, "copy of as many bytes", 60.0),
            ("token", 2.0, 10.0, "empty kernel", 1.0),
            ("tensor", 50.0, 1600.0, "vLLM", 40.0),
        )
    ]
    write(tmp_path, "h100-quantize.json", "2026-01-01", *rows, copy_gbs=2000.0)
    text = MAKE["TABLES"]["operators"](RESULTS.read(tmp_path))
    line = next(x for x in text.splitlines() if "quantize_fp8" in x)
    assert line.endswith("| 100 / 2.00 / 50.0 | 60 / - / 80 |")


def test_queries_over_caches_of_other_head_dimensions(tmp_path):
    shape = "prefill bf16 q, {} causal B 4 x 4096 H {} D {}"
    rows = [
        row("paged_attention", shape.format(*where), 1.0, rate=rate)
        for *where, rate in (("none", "32/32", 96, 471.6), ("block_wise_int4", "32/2", 256, 327.1))
    ]
    write(tmp_path, "h100-head-dims.json", "2026-01-01", *rows)
    text = MAKE["TABLES"]["head_dims"](RESULTS.read(tmp_path))
    assert "| 96, 32/32 | 472 | - | - | - | - | - |" in text
    assert "| 256, 32/2 | - | - | - | - | - | 327 |" in text
