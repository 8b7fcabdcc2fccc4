"""A peer that README, goals, tables or plots name is the fastest of the same work."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks.core import plots
from benchmarks.core.report import Report
from benchmarks.core.rows import Row
from tests.support import ROOT
from tests.support import named_peers as named

MAKE = runpy.run_path(str(ROOT / "scripts" / "make_gpu_tables.py"))
DRAWN = MAKE["drawn"]
peers = runpy.run_path(str(ROOT / "scripts" / "gpu_tables" / "peers.py"))
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
GPU = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
PREFILL = "prefill cache_fp8 causal B 4 x 4096 H 16/16 D 128"


@pytest.fixture(scope="module")
def h100():
    return named.Rows(RESULTS, "h100-*.json")


@pytest.fixture(scope="module")
def h200():
    return named.Rows(RESULTS, "h200-*.json")


def test_the_readme_names_the_fastest_peers(h100):
    assert named.wrong_figures(README, h100) == []
    assert named.peers_in_prose(README) == []
    assert len(README.splitlines()) <= 120


def test_goals_name_the_fastest_peers(h100, h200):
    assert named.wrong_goals(GPU, h100, h200) == []


def test_kinds_of_calls_stand_beside_the_fastest_peers(h100):
    assert named.wrong_kinds(GPU, h100) == []


def test_every_peer_of_the_rows_is_declared():
    for path in RESULTS.glob("*.json"):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if row["peer"]:
                peers["declared"](row["op"], row["shape"], row["peer"])
    with pytest.raises(KeyError, match="does not say what 'another' does"):
        peers["declared"]("paged_attention", PREFILL, "another")


def test_the_corrections_stand_in_the_docs():
    """The empty kernel, and the kept kernels' ratios where both sides were launched alike."""
    section = MEASUREMENTS.partition("## Selection and logits of the indexer")[2]
    assert f"An empty kernel took {peers['EMPTY_US']} us in such a graph (measured once" in section
    page = (ROOT / "docs" / "experiments" / "merge_indexer.md").read_text(encoding="utf-8")
    lines = page.partition("### Pages again")[2].partition("\n### ")[0].splitlines()
    found = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if match := re.fullmatch(r"(\d+) x (\d+)k", cells[0]):
            batch, keys = int(match[1]), int(match[2])
            # "Steps of one sequence take no chunks": theirs is the column before
            found[batch, keys] = float(cells[2 if batch == 1 else 3])
    assert found == peers["ALIKE"] and "(**kept**)" in lines[2].split("|")[4]


# --- how a peer is chosen ------------------------------------------------------------------------


def row(op, shape, us, **times):
    times = {name.replace("_", " ") if name[0].isupper() else name: t for name, t in times.items()}
    corrected = {n: peers["corrected"](op, shape, n, t) for n, t in times.items()}
    kept = {n: t for n, t in corrected.items() if t is not None}
    return SimpleNamespace(op=op, shape=shape, us=us, peers=kept, as_measured=times)


def test_the_fastest_peer_is_chosen_with_its_caveats():
    found = row("paged_attention", PREFILL, 10.0, vllm_fa3_fp8_paged64=12.0, cudnn_fp8=9.0)
    rival = peers["fastest"](found)
    assert (rival.peer.label, rival.us, rival.ratio) == ("cuDNN FP8", 9.0, 0.9)
    assert peers["caveats"](found, rival.peer) == [
        "contiguous keys, ours in pages",
        "sums of FP8 products in one level, ours in two",
        "FP8 output, ours bf16",
    ]


def test_a_peer_of_other_work_is_not_chosen():
    codes = PREFILL.replace("cache_fp8", "bf16 q, cache_fp8")
    found = row("paged_attention", codes, 10.0, vllm_fa3_bf16_varlen=5.0)
    assert peers["fastest"](found) is None
    (other,) = peers["rivals"](found, other_work=True)
    assert peers["caveats"](found, other.peer)[0] == "other work: attends to bf16 keys"
    same = row("paged_attention", codes.replace("cache_fp8", "bf16"), 10.0, vllm_fa3_bf16_x=5.0)
    assert peers["fastest"](same).us == 5.0


def test_an_empty_kernel_is_taken_off():
    found = row("mla_attention", "16 heads, batch 1, 4k keys, bf16", 20.0, FlashMLA_BF16=22.0)
    rival = peers["fastest"](found)
    assert rival.us == pytest.approx(22.0 - peers["EMPTY_US"]) and rival.verdict_changed
    assert peers["shown"](rival, "{:.1f}".format) == "17.6 (22.0)"
    assert peers["shown_ratio"](rival) == "0.88 (1.10)"


def test_no_peer_is_named_beside_a_faster_one_whose_time_has_the_host_in_it():
    shape = "decode cache_fp8 B 1 ctx 1024 H 32/8 D 128"
    assert peers["fastest"](row("paged_attention", shape, 8.0, vllm_triton_fp8=109.0)).us == 109.0
    both = row("paged_attention", shape, 8.0, vllm_fa3_fp8=15.0, vllm_triton_fp8=109.0)
    assert peers["fastest"](both) is None and "vllm_fa3_fp8" not in both.peers


def test_peers_over_e4m3_keys_stand_beside_all_types_of_8_bits(tmp_path):
    shape = "decode {} B 64 ctx 32768 H 32/8 D 128"
    rows = [
        Row("paged_attention", shape.format(quant), us, 1.0, "GB/s", peer, peer_us).as_dict()
        for quant, us, peer, peer_us in (
            ("cache_fp8", 1400.0, "vllm_fa3_fp8(q fp8)", 1500.0),
            ("block_wise_int8", 1600.0, "vllm_triton_int8pth", 4000.0),
            ("block_wise_int4", 800.0, "reading as many bytes", 700.0),
        )
    ]
    (tmp_path / "h100-x.json").write_text(json.dumps({"machine": {}, "rows": rows}))
    results = MAKE["Results"].read(tmp_path)
    beside = results.get("paged_attention", shape.format("block_wise_int8"))
    rival = peers["fastest"](beside)
    assert (rival.peer.label, rival.ratio) == ("FlashAttention-3 FP8", 1500.0 / 1600.0)
    assert "e4m3 keys with one scale a head" in peers["caveats"](beside, rival.peer)
    narrow = results.get("paged_attention", shape.format("block_wise_int4"))
    assert peers["fastest"](narrow) is None


# --- plots ---------------------------------------------------------------------------------------


def drawn(name):
    """A chart of committed rows: its curves and the peers that it draws."""
    plot = MAKE["pages"].PLOTS[name]
    report = DRAWN.prepared(json.loads((RESULTS / f"{plot.source}.json").read_text()))
    rows = [Row(**{k: v for k, v in row.items() if k != "ratio"}) for row in report["rows"]]
    rows = [row for row in rows if not plot.op or row.op == plot.op]
    gpu = report["machine"]["gpu"]
    for chart in plots.CHARTS:
        found = plots.curves(chart, rows, gpu)
        if any(found.ours.values()) and chart.op == rows[0].op:
            return found, plots.fastest(chart, found)
    raise AssertionError(name)


CHARTS = ("h100-decode", "h100-prefill", "h100-mla-attention", "h100-mla-sparse",
          "h100-sparse-step", "h100-paged-logits", "h100-logits", "h100-topk")  # fmt: skip


def left_out(found, shown):
    """Points whose fastest peer is not drawn."""
    return [
        (label, point, min(times, key=times.get))
        for label, points in found.beside.items()
        if label
        for point, times in points.items()
        if min(times, key=times.get) not in shown
    ]


@pytest.mark.parametrize("name", CHARTS)
def test_a_plot_has_the_fastest_peer_at_every_point(name):
    found, shown = drawn(name)
    assert shown and left_out(found, shown) == []
    assert left_out(found, shown[1:]) != []


@pytest.mark.parametrize("name", ["h100-decode", "h100-mla-attention", "h100-paged-logits"])
def test_nothing_is_faster_than_the_memory(name):
    """Not ours, nor a peer that moves as many bytes."""
    found, _ = drawn(name)
    assert any(found.floors.values())
    for panel, floors in found.floors.items():
        for label, floor in floors.items():
            assert all(found.ours[panel][label][x] > us for x, us in floor.items())
            for (of, x), times in found.beside.get(label, {}).items():
                assert of != panel or min(times.values()) > floor[x]


def test_plots_are_of_committed_rows_only(tmp_path):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    path = tmp_path / "h100-x.json"
    path.write_text('{"rows": []}')
    git("init")
    with pytest.raises(ValueError, match="commit it first"):
        DRAWN.committed(path)
    git("add", path.name)
    git("commit", "-m", "rows")
    assert DRAWN.committed(path) == {"rows": []}
    path.write_text('{"rows": [1]}')
    with pytest.raises(ValueError, match="commit it first"):
        DRAWN.committed(path)


# --- the comparison can fail ---------------------------------------------------------------------


def test_a_slower_peer_in_the_readme_is_found(h100):
    slower = README.replace("793 (cuDNN FP8<", "490 (FlashAttention-3 FP8, page 64<")
    assert slower != README and "causal prefill" in named.wrong_figures(slower, h100)[0]
    same_name = README.replace("| 793 (", "| 773 (")
    assert len(named.wrong_figures(same_name, h100)) == 1
    uncorrected = README.replace("37 of 63 calls of latent", "26 of 63 calls of latent")
    assert "latent attention" in named.wrong_figures(uncorrected, h100)[0]
    assert named.peers_in_prose("cuDNN takes 5 us.\n\nFlashMLA would be ahead.") != []


def test_a_faster_peer_in_the_rows_is_found(tmp_path, h200):
    shutil.copytree(RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "h100-prefill.json"
    report = json.loads(path.read_text())
    for row in report["rows"]:
        if row["shape"] == PREFILL and row["peer"] == "vllm_fa3_fp8_paged64":
            row["peer_us"] = 300.0
    path.write_text(json.dumps(report))
    rows = named.Rows(tmp_path / "results", "h100-*.json")
    assert "FlashAttention-3 FP8, page 64" in named.wrong_figures(README, rows)[0]
    assert len(named.wrong_goals(GPU, rows, h200)) == 1
    assert named.wrong_goals(
        GPU.replace("peer: cuDNN FP8", "peer: FlashAttention-3 FP8"), rows, h200
    )


def test_a_count_by_uncorrected_times_is_found(h100):
    told = next(line for line in GPU.splitlines() if line.startswith("| `mla_attention` | 48"))
    wrong = GPU.replace(told, told.replace("33 (23 as measured)", "23"))
    assert wrong != GPU and len(named.wrong_kinds(wrong, h100)) == 1
    assert named.wrong_kinds(GPU.replace("| `topk_indices` | 16 ", "| `topk` | 16 "), h100) != []


def test_goals_that_name_a_peer_have_to_be_checked(h100, h200):
    line = "| decode over Triton, of a read | 88 % | 1-2 % | 1-2 % |\n"
    wrong = GPU.replace("| decode 16 x 8k, 8 bits", f"{line}| decode 16 x 8k, 8 bits")
    assert named.wrong_goals(wrong, h100, h200) == ["decode over Triton, of a read: names a peer"]


def test_a_report_is_drawn_without_what_no_peer_proves():
    """Other work, and times with the host in them, are no points of a plot."""
    codes = PREFILL.replace("cache_fp8", "bf16 q, cache_fp8")
    short = "decode cache_fp8 B 1 ctx 1024 H 32/8 D 128"
    rows = [
        Row("paged_attention", codes, 10.0, 500.0, "TFLOP/s", "cudnn_bf16(torch)", 9.0),
        Row("paged_attention", short, 8.0, 200.0, "GB/s", "vllm_fa3_fp8(q fp8)", 15.0),
        Row("paged_attention", short, 8.0, 200.0, "GB/s", "vllm_triton_fp8", 109.0),
        Row("paged_attention", PREFILL, 10.0, 500.0, "TFLOP/s", "cudnn_fp8", 9.0),
    ]
    report = Report({}, rows)
    prepared = DRAWN.prepared({"machine": {}, "rows": [row.as_dict() for row in report.rows]})
    assert [row["peer"] for row in prepared["rows"]] == [
        "", "", "", "cuDNN FP8 (contiguous, one level, FP8 output)",
    ]  # fmt: skip
