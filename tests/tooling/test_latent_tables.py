"""Tables and charts of latent attention and of the indexer, from rows as the bench names them."""

from __future__ import annotations

import json
import runpy

import pytest

from benchmarks.cases import mla_attention, mla_sparse, mqa_logits, topk
from benchmarks.cases import sparse_models as facts
from benchmarks.core import plots
from benchmarks.core.rows import Row
from tests.support import ROOT

MAKE = runpy.run_path(str(ROOT / "scripts" / "make_gpu_tables.py"))
READ = "reading as many bytes"


@pytest.fixture
def lines(tmp_path):
    """Lines of a table of some rows, the head first."""

    def function(name, rows):
        report = {"machine": {"date": "2026-01-01"}, "rows": [row.as_dict() for row in rows]}
        (tmp_path / "h100-some.json").write_text(json.dumps(report))
        return MAKE["TABLES"][name](MAKE["Results"].read(tmp_path)).splitlines()

    return function


LATENT = ("sparse attention", "dense attention", "latent targets", "latent writers",
          "indexer topk", "sparse step", "sparse parts")  # fmt: skip


@pytest.mark.parametrize("name", LATENT)
def test_without_rows_there_is_a_word(lines, name):
    assert lines(name, []) == ["No row of these shapes is committed."]


def test_the_rows_that_are_asked_for_are_measured():
    """Sequences, queries, heads and keys: what other libraries are compared at."""
    v32 = {(b, q, h) for b, q, h, k in mla_sparse._V32["gpu"] if k == 2048}
    assert v32 == {(128, 1, 128), (128, 2, 128), (128, 1, 64), (128, 1, 16), (128, 1, 8),
                   (1, 1, 128), (8, 1, 128)}  # fmt: skip
    assert mla_sparse._V4["gpu"] == [(128, 1, 64, 512), (128, 1, 16, 512)]
    assert mla_sparse._PREFILL["gpu"] == [(4096, 128, 2048, k * 1024) for k in (8, 32, 64)]
    dense = {(16, 32, 128), (128, 32, 128), (16, 4, 1), (128, 4, 1)}
    assert dense <= set(mla_attention.STEPS["gpu"])
    assert set(mqa_logits.CHUNKS["gpu"]) == {(s, k) for s in (2048, 4096) for k in (4, 32, 64)}
    paged = {(b, k, 1) for b in (1, 16, 64, 128) for k in (8, 64)}
    assert paged <= set(mqa_logits.STEPS["gpu"])
    asked = {(1, 8), (1, 160), (64, 64), (4096, 64), (4096, 160)}
    assert asked <= set(topk.SHAPES["gpu"]) and 2048 in topk.KS["gpu"]


def test_sparse_attention(lines):
    op = "mla_sparse_attention"
    decode = Row(op, "decode 656 B, batch 128, 2 queries, H 16, top 2048", 80.0, 300.0, "TFLOP/s")
    v4 = Row(op, "decode 584 B, batch 128, 1 queries, H 64, top 512 + 128", 50.0, 200.0, "TFLOP/s")
    prefill = Row(op, "prefill fp8_656, 4096 x H 128, top 2048, 8192 keys", 4000.0, 598.6)
    gathered = prefill.beside(mla_sparse.GATHERED, 3700.0)
    found = lines("sparse attention", [
        decode.beside(READ, 60.0), decode.beside("FlashMLA, padded to 64 heads", 124.4), v4,
        prefill.beside("FlashMLA", 3000.0), prefill.beside("bf16 keys", 3600.0),
        gathered,
    ])  # fmt: skip
    assert "| 656 bytes, 128 x 2, 16 heads, 2048 keys | 80.0 | 300 | 75 | 120 | 1.50 |" in found
    assert "| 584 bytes, 128 x 1, 64 heads, 512 + 128 keys | 50.0 | 200 | - | - | - |" in found
    # FlashMLA's times are less the empty kernel's 4.4 us
    prompt = "| `fp8_656`, 4096 x 128 heads, 2048 of 8k keys | 4000 | 599 | 2996"
    assert f"{prompt} | 0.75<sup>2</sup> | 0.90 | 3700 |" in found


def test_dense_attention(lines):
    op = "mla_attention"
    row = Row(op, "16 heads, batch 128, 32k keys, bf16", 1648.0, 2900.0, "GB/s", READ, 1565.6)
    chunk = Row(op, "16 heads, 1 x 1024 new behind 8192 + 32 x 1 new behind 8191, bf16", 9.5, 70.0)
    found = lines("dense attention", [row, row.beside("FlashMLA BF16", 1650.0), chunk])
    dashes = "| - " * 11
    assert f"| `bf16`, 16 heads {dashes}| 1648 (95 %) |" in found
    # the empty kernel's 4.4 us decide who is faster
    assert f"| FlashMLA bf16<sup>1</sup>, 16 heads {dashes}| 1646 (1650) |" in found
    assert f"| `fp8_656`, 8 heads {dashes}| - |" in found
    mixed = "| 16 heads, 1 x 1024 new behind 8192 + 32 x 1 new behind 8191 | 9.50 | 70 |"
    assert mixed in found


def test_goals(lines):
    sparse, dense = "mla_sparse_attention", "mla_attention"
    decode = "decode 656 B, batch 128, {} queries, H {}, top 2048"
    prompt = Row(sparse, "prefill fp8_656, 4096 x H 128, top 2048, 8192 keys", 4000.0, 598.6)
    found = lines("latent targets", [
        Row(sparse, decode.format(1, 128), 215.0, 340.0),
        Row(sparse, decode.format(2, 128), 1.0, 350.0),
        Row(sparse, decode.format(1, 16), 86.0, 1.0), Row(sparse, decode.format(1, 8), 85.0, 1.0),
        prompt.beside("FlashMLA", 3000.0), prompt.beside("bf16 keys", 3600.0),
        Row(dense, "128 heads, batch 128, 32k keys, bf16", 2000.0, 2400.0, "GB/s"),
        Row("mla_write_cache", "T 8192, fp8", 5.0, 1.0, "GB/s", "copy of as many bytes", 4.5),
    ])  # fmt: skip
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in found if "|" in line}
    assert rows["656 bytes, 128 x 1 and 128 x 2, 128 heads, 2048 keys, TFLOP/s"] == [
        " 400 ",
        " 340-350 ",
    ]
    assert rows["16 and 8 heads"] == [" 75 us ", " 85.0-86.0 us "]
    assert rows["the same from 656 bytes, over ours of `bf16`"] == [" 0.95 ", " 0.90 "]
    assert rows["prompt of 4096 x 128 heads, `bf16`, over FlashMLA<sup>1</sup>"] == [
        " 1.05 ",
        " - ",
    ]
    # 2 * 128 heads * 128 sequences * 32768 keys * 1088 products in 2000 us
    assert rows["128 heads, TFLOP/s"] == [" 551 ", " 584 "]
    assert rows["`mla_write_cache`, 8192 tokens and more, of a copy"] == [" 90 % ", " 90 % "]


def test_goals_of_logits_have_every_cell(lines):
    """In the order that the line names, whatever that of the rows; a dash for a missing one."""

    def paged(batch, keys, queries, kind, us):
        shape = f"batch {batch}, {keys}k keys, {queries} queries, {kind}"
        return Row("paged_mqa_logits", shape, us)

    chunks = [
        Row("mqa_logits", f"4096 tokens, {k}k keys, fp8", 100.0).beside("DeepGEMM", us)
        for k, us in ((64, 103.0), (4, 110.0), (32, 99.0))
    ]
    found = lines("latent targets", [
        *chunks,
        paged(1, 64, 2, "fp8", 6.0).beside("DeepGEMM", 12.0),
        paged(128, 8, 2, "fp8", 50.0).beside("DeepGEMM", 45.0),
        paged(128, 64, 1, "fp8", 400.0), paged(128, 64, 1, "mxfp4", 250.0),
    ])  # fmt: skip
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in found if "|" in line}
    over, cells = "over DeepGEMM<sup>1</sup>", rows["the same, two queries a sequence"]
    # times less 4.4 us over ours
    ratios = rows[f"`mqa_logits`, FP8, 4096 x 4k / 32k / 64k, {over}"][1]
    assert ratios == " 1.06 / 0.95 / 0.99<sup>2</sup> "
    assert "<sup>2</sup> As measured: 1.10 / 0.99 / 1.03." in "\n".join(found)
    assert rows[f"`mqa_logits`, FP8, 2048 x 4k / 32k / 64k, {over}"] == [" 1.05 ", " - "]
    assert cells == [" 1.00 ", " - / - / - / 0.81 / 1.27 / - / - / - "]
    assert rows["`paged_mqa_logits`, MXFP4, 128 x 64k, of FP8's time"] == [" 0.62 ", " 0.62 "]


def test_writers_stand_in_the_table_of_a_peer_that_was_measured(lines):
    row = Row("mla_write_cache", "T 128, fp8_656, amax", 1.5, peer="vLLM", peer_us=2.0)
    alone = Row("mla_write_cache", "T 128, bf16", 1.0)
    found = lines("latent writers", [row, alone])
    label = "`mla_write_cache` fp8_656, scales of vLLM"
    assert f"| {label} | - | 1.50 | - | - | - | - | - |" in found
    assert "| vLLM | - | 2.00 | - | - | - | - | - |" in found
    assert not any("bf16" in line for line in found)


def test_the_indexer_in_one_call(lines):
    shape = "4096 tokens, 64k keys, k 2048"
    row = Row("indexer_topk", shape, 1000.0, peer="logits, then top-k", peer_us=1100.0)
    found = lines("indexer topk", [row, row.beside("DeepGEMM, then vLLM's top-k", 1500.0)])
    assert f"| `indexer_topk`, {shape} | 1000 | 1100 | 1496 |" in found


def test_steps_and_their_parts(lines):
    at, op = "V4-Flash TP8 decode 16 x 32k", "sparse step"
    shared = f"{at}, parts of vLLM"
    rows = [
        Row(op, f"{at}, graph", 100.0),
        Row(op, f"{at}, eager", 120.0, peer="host", peer_us=90.0),
        Row(op, f"{shared}, graph", 80.0, peer="vLLM", peer_us=88.0),
        Row(op, f"{shared}, eager", 85.0, peer="host", peer_us=60.0),
        Row(op, f"{shared}, eager", 85.0, peer="vLLM, eager", peer_us=100.0),
        Row(op, f"{shared}, eager", 85.0, peer="vLLM, host", peer_us=99.0),
        Row(op, f"{at}, index query", 8.0, peer="vLLM", peer_us=9.0),
        Row(op, f"{at}, output", 3.0),
    ]
    step = f"| {at} | 100 | 80.0 | 88.0 | 1.10 | 120 | 90.0 | 60.0 | 99.0 |"
    assert step in lines("sparse step", rows)
    parts = lines("sparse parts", rows)
    assert parts[0] == "| DeepSeek-V4-Flash TP8, us (vLLM) | decode 16 x 32k |"
    assert parts[2:4] == ["| index query | 8.0 (9.0) |", "| output | 3.0 |"]


# --- charts --------------------------------------------------------------------------------------


def chart(op):
    (found,) = (x for x in plots.CHARTS if x.op == op)
    return found


def test_a_chart_draws_its_operators_rows():
    op = "mla_attention"
    row = Row(op, "16 heads, batch 64, 32k keys, fp8", 10.0, 2000.0, "GB/s", READ, 8.0)
    other = Row("another", row.shape, 1.0, 1.0, "GB/s")
    wide = Row(op, "8 heads, batch 64, 32k keys, fp8", 1.0, 1.0, "GB/s")  # no panel of its own
    rows = [row, row.beside("FlashMLA FP8", 20.0), other, wide]
    found = plots.curves(chart(op), rows, "NVIDIA H100 80GB HBM3")
    assert found.ours == {"16": {"fastattn FP8": {64: 10.0}}, "128": {}}
    assert found.others == {"16": {"FlashMLA FP8": {64: 20.0}}, "128": {}}
    # 2000 GB/s in 10 us are 20 MB; the memory's pins move 2 * 2619e6 * 640 bytes a second
    least = 20e6 / (2 * 2619e6 * 640) * 1e6
    assert found.floors["16"]["fastattn FP8"][64] == pytest.approx(least, rel=1e-4)
    assert plots.curves(chart(op), rows, "another GPU").floors == {"16": {}, "128": {}}


def test_a_chart_of_rates_has_the_rates_of_peers():
    row = Row("mqa_logits", "2048 tokens, 4k keys, fp8", 10.0, 900.0, "TFLOP/s", "DeepGEMM", 20.0)
    found = plots.curves(chart("mqa_logits"), [row])
    assert found.ours["2048"] == {"fastattn FP8": {4096: 900.0}}
    assert found.others["2048"] == {"DeepGEMM": {4096: 450.0}} and not any(found.floors.values())


def test_a_chart_has_the_peers_that_are_the_fastest_somewhere():
    op, shapes = "topk_indices", ("1 x 8k", "1 x 160k", "64 x 8k", "64 x 64k")
    peers = {
        "vllm cooperative_topk": (5.0, 15.0),
        "vllm persistent_topk": (12.0, 23.0, 5.0, 33.0),
        "vllm top_k_per_row_prefill": (7.0, 70.0, 8.0, 40.0),
        "torch.topk": (38.0, 56.0, 50.0, 103.0),
    }
    rows = [
        Row(op, f"{shape}, k 2048, normal", 6.0, 1.0, "GB/s").beside(name, us)
        for name, times in peers.items()
        for shape, us in zip(shapes, times)
    ]
    found = plots.curves(chart(op), rows)
    assert found.ours["1"] == {"fastattn normal logits": {8192: 6.0, 163840: 6.0}}
    assert set(plots.fastest(chart(op), found)) == {"vLLM cooperative", "vLLM persistent"}


def test_a_peer_is_one_line_however_many_heads_it_pads_to():
    op = "mla_sparse_attention"
    rows = [
        Row(op, f"decode 656 B, batch 128, 1 queries, H {h}, top 2048", 50.0 + h).beside(name, us)
        for h, name, us in ((16, "FlashMLA, padded to 64 heads", 129.0), (64, "FlashMLA", 130.0))
    ]
    found = plots.curves(chart(op), rows)
    assert found.ours["656"] == {"fastattn": {16: 66.0, 64: 114.0}}
    assert found.others["656"] == {"FlashMLA": {16: 129.0, 64: 130.0}}


def test_every_chart_has_colours_and_markers_for_its_lines_and_a_plot():
    assert plots.MOST_PEERS <= len(plots._PEERS) <= len(plots._MARKERS) - len(plots._OURS)
    assert all(len(x.ours) <= len(plots._OURS) for x in plots.CHARTS)
    drawn = {x.op for x in plots.CHARTS}
    named = {p.op for p in MAKE["pages"].PLOTS.values() if p.op}
    assert named <= drawn


def test_the_steps_that_are_drawn_are_those_that_are_measured():
    found = chart("sparse step")
    assert set(found.panels) == set(facts.MODELS)
    decode = [x for x in facts.STEPS if x.startswith("decode")]
    shapes = [f"{m} {x}, parts of vLLM, graph" for m in facts.MODELS for x in decode]
    assert all(found.shape.match(shape) for shape in shapes)
