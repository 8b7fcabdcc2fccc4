"""The bench command runs, compares and reports; nothing here looks at a time."""

from __future__ import annotations

import json

import paddle
import pytest

import fastattn.functional as F
from fastattn.bench import common
from fastattn.bench.common import REGISTRY, Row
from fastattn.bench.report import Baseline, Report, ReportError, markdown
from fastattn.cli import main

pytest.importorskip("rich")


def test_overhead_writes_a_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["bench", "--op", "overhead", "--quick", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    measured = " ".join(f"{row['op']} {row['shape']}" for row in report["rows"])
    assert "paged_attention" in measured and "write_cache_kv" in measured
    assert report["machine"]["cores"] >= 1
    assert "overhead" in REGISTRY


def test_an_unknown_operator_is_named(capsys):
    assert main(["bench", "--op", "gemm"]) == 2
    assert "gemm" in capsys.readouterr().out


@pytest.mark.parametrize(("us", "peer", "ratio"), [(2.0, 4.0, 2.0), (4.0, 1.0, 0.25)])
def test_ratio_above_1_is_faster(us, peer, ratio):
    assert Row("op", "shape", us, peer_us=peer).ratio == ratio


def test_benchmarks_may_share_a_name(monkeypatch):
    monkeypatch.setattr(common, "REGISTRY", {})
    for us in (1.0, 2.0):
        common.register("op")(lambda quick, us=us: iter([Row("op", f"quick {quick}", us)]))
    rows = list(common.REGISTRY["op"](True))
    assert [(row.us, row.shape) for row in rows] == [(1.0, "quick True"), (2.0, "quick True")]


def _bytes(*tensors) -> int:
    return sum(x.size * x.element_size() for x in tensors)


@pytest.mark.parametrize("quant", ["none", "cache_int8", "block_wise_fp8"])
def test_bytes_of_a_step_are_what_it_reads_and_writes(quant):
    from fastattn.bench.compat_cpu import PLACE
    from fastattn.bench.compat_steps import DIM, KV, describe, gqa_calls

    rows = [(6, 70, 6), (0, 130, 1), (0, 9, 1)]
    assert describe(rows).startswith("1 x 6 prefill after 70, 1 x 1 decode, 1 x 1 decode, H 32")
    (call, _), moved = gqa_calls(PLACE, quant, rows, lambda _: 2)
    q, k, v, qkv_out = call()
    assert k.shape == v.shape == [6 + 70 + 2, KV, DIM]
    of_token = {"none": 2 * DIM, "cache_int8": DIM, "block_wise_fp8": DIM + 4}[quant]
    angles = 8 * DIM * 4
    cached = 2 * KV * of_token * (70 + 6)  # of prefill sequences: read, and written
    assert moved == _bytes(qkv_out, q, k, v, qkv_out) + angles + cached


def test_bytes_of_merged_outputs_are_those_of_decode_seqs():
    from fastattn.bench.compat_cpu import PLACE
    from fastattn.bench.compat_steps import DIM, HEADS, merge_calls

    (call,), moved = merge_calls(PLACE, [(6, 70, 6), (0, 130, 3)], lambda _: 1)
    assert call().shape == [9, HEADS * DIM]
    assert moved == 2 * 3 * HEADS * DIM * 2


@pytest.mark.parametrize(("quant", "fp8_queries"), [("none", False), ("cache_fp8", True)])
def test_a_mixed_call_has_the_rows_of_its_parts(quant, fp8_queries):
    from fastattn.bench.compat_cpu import PLACE
    from fastattn.bench.compat_steps import DIM, HEADS
    from fastattn.bench.mixed_steps import attention, describe

    parts = [(1, 70, 66), (2, 128, 1), (1, 9, 4)]
    assert describe(parts).startswith("1 x 66 behind 70 + 2 x 1 behind 128 + 1 x 4 behind 9, H 32")
    outs = [attention(PLACE, quant, fp8_queries, x)() for x in (parts, *([p] for p in parts))]
    assert [out.shape for out in outs] == [[n, HEADS, DIM] for n in (72, 66, 2, 4)]


# --- reports -------------------------------------------------------------------------------------

MACHINE = {"cpu": "A", "cores": 2, "paddle": "3.3.1", "commit": "abc", "date": "today"}
ROWS = [
    Row("append", "small", 10.0, 2.5, "GB/s", "copy", 5.0),
    Row("append", "large | wide", 100.0, error=1e-3),
    Row("merge, fused", "small", 3.0, peer="unfused", peer_us=6.0),
]


@pytest.fixture
def write(tmp_path):
    """Writes a report of ROWS with other times; gives its path."""

    def function(name, *times, machine=MACHINE, rows=ROWS):
        times = times or [row.us for row in rows]
        changed = [Row(**{**row.__dict__, "us": us}) for row, us in zip(rows, times)]
        path = tmp_path / name
        Report(machine, changed).write(path)
        return str(path)

    return function


def test_a_report_survives_its_file(write, tmp_path):
    report = Report.read(tmp_path / write("a.json"))
    assert report.machine == MACHINE and report.rows == ROWS


def test_load_measures_nothing(write, monkeypatch, capsys):
    monkeypatch.setattr("fastattn.bench.cli._run_benchmarks", None)
    assert main(["bench", "--load", write("a.json")]) == 0
    out = capsys.readouterr().out
    assert "append" in out and "merge, fused" in out and "0.50x" in out and "2.00x" in out
    assert main(["bench", "--load", write("a.json"), "--op", "merge"]) == 0
    out = capsys.readouterr().out
    assert "append" not in out and "merge, fused" in out


@pytest.mark.parametrize(
    ("times", "bound", "status"),
    [
        ((10.0, 100.0, 3.0), "0.95", 0),
        ((10.0, 120.0, 3.0), "0.9", 1),
        ((10.0, 120.0, 3.0), "0.8", 0),
        ((5.0, 50.0, 1.0), "1.5", 0),
    ],
)
def test_fail_below(write, capsys, times, bound, status):
    arguments = ["--baseline", write("old.json"), "--fail-below", bound]
    assert main(["bench", "--load", write("new.json", *times), *arguments]) == status
    out = capsys.readouterr().out
    assert "3 of 3 rows are in the baseline: geometric mean" in out
    assert (f"below {bound}: append: large | wide: 0.83x" in out) == bool(status)


def test_the_baseline_alone_never_fails(write, capsys):
    new = write("new.json", 1000.0, 1000.0, 1000.0)
    assert main(["bench", "--load", new, "--baseline", write("old.json")]) == 0
    assert "slowest 0.00x (merge, fused: small)" in capsys.readouterr().out


def test_another_machine_is_named(write, capsys):
    old = write("old.json", machine={**MACHINE, "cpu": "B", "gpu": "H"})
    assert main(["bench", "--load", write("new.json"), "--baseline", old]) == 0
    out = capsys.readouterr().out
    assert "another machine: cpu: B then, A now" in out and "gpu: H then, None now" in out


def test_no_common_row(write, capsys):
    old = write("old.json", rows=[Row("other", "shape", 1.0)])
    new = write("new.json")
    assert main(["bench", "--load", new, "--baseline", old]) == 0
    assert "no row of this run is in the baseline" in capsys.readouterr().out
    assert main(["bench", "--load", new, "--baseline", old, "--fail-below", "0.5"]) == 1


def test_new_rows_and_times_of_zero_have_no_ratio():
    baseline = Baseline(Report({}, [Row("a", "s", 0.0), Row("b", "s", 2.0), Row("b", "s", 9.0)]))
    assert baseline.ratio(Row("a", "s", 1.0)) is None
    assert baseline.ratio(Row("c", "s", 1.0)) is None
    assert baseline.ratio(Row("b", "s", -0.1)) is None
    assert baseline.ratio(Row("b", "s", 1.0)) == 2.0  # the first of the same measurement


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"rows": [{"op": "a"}]}', '{"rows": [{"op": 1, "shape": 2, "us": "x"}]}'],
)
def test_what_is_no_report(tmp_path, content, capsys):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ReportError, match="no report of this command"):
        Report.read(path)
    assert main(["bench", "--load", str(path)]) == 2
    assert main(["bench", "--op", "overhead", "--quick", "--baseline", str(tmp_path / "no")]) == 2


def test_unknown_fields_of_a_later_version_are_ignored(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"rows": [{"op": "a", "shape": "s", "us": 1, "new": 2, "ratio": null}]}')
    assert Report.read(path).rows == [Row("a", "s", 1)]


@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_where_results_cannot_go(write, tmp_path, capsys, option):
    for path in (tmp_path, tmp_path / "none" / "file.png"):
        assert main(["bench", "--op", "overhead", option, str(path)]) == 2
        assert "cannot be written" in capsys.readouterr().out


def test_no_matplotlib(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--op", "overhead", "--plot", str(tmp_path / "a.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().out


def test_wrong_arguments(write, capsys):
    assert main(["bench", "--load", write("a.json"), "--fail-below", "0.9"]) == 2
    for value in ("-1", "0", "nan", "x"):
        with pytest.raises(SystemExit):
            main(["bench", "--fail-below", value])


def test_markdown(write, tmp_path):
    path = tmp_path / "table.md"
    assert main(["bench", "--load", write("a.json"), "--markdown", str(path)]) == 0
    lines = path.read_text().splitlines()
    assert lines[0] == "A, 2 cores; Paddle 3.3.1; commit abc, today. Ratio: the peer's time / ours."
    assert lines[2].startswith("| operator | shape | us |")
    assert lines[5] == "| append | large \\| wide | 100.0 |  |  |  | 1.0e-03 |  |"
    report = Report(MACHINE, ROWS)
    assert "baseline" in markdown(report, Baseline(report)).splitlines()[2]
    assert "error" not in markdown(Report(MACHINE, ROWS[:1])).splitlines()[2]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(write, tmp_path, many, suffix):
    pytest.importorskip("matplotlib")
    rows = ROWS * 30 if many else ROWS
    path = tmp_path / f"a.{suffix}"
    load = write("a.json", rows=rows)
    assert main(["bench", "--load", load, "--plot", str(path)]) == 0
    assert path.stat().st_size > 1000
    if suffix == "svg":  # the same rows, the same bytes
        again = tmp_path / f"b.{suffix}"
        assert main(["bench", "--load", load, "--plot", str(again)]) == 0
        assert again.read_bytes() == path.read_bytes()
    compared = ["--baseline", write("old.json", *[1.0] * len(rows), rows=rows)]
    assert main(["bench", "--load", load, "--plot", str(path), *compared]) == 0


def test_nothing_to_plot(write, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    load = write("a.json", rows=[Row("a", "s", 1.0)])
    assert main(["bench", "--load", load, "--plot", str(tmp_path / "a.png")]) == 2
    assert "no row has a ratio" in capsys.readouterr().out


@pytest.mark.skipif(
    paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0,
    reason="a GPU's rows take long",
)
def test_every_operator_has_rows(tmp_path):
    path = tmp_path / "report.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 0
    measured = {row.op for row in Report.read(path).rows}
    assert measured >= set(F.__all__) - {"plan_cascade"}  # no operator
    assert all(row.us > 0 or row.op == "overhead" for row in Report.read(path).rows)


def test_list_names_the_benchmarks(capsys):
    assert main(["bench", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert {"overhead", "paged_attention", "merge_attn_states"} <= set(names)
