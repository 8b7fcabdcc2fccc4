"""The bench command runs, compares and reports; nothing here looks at a time."""

from __future__ import annotations

import io
import json
import os
import re

import paddle
import pytest

import fastattn
import fastattn.functional as F
from benchmarks.core import rows as registry
from benchmarks.core.devices import Cpu
from benchmarks.core.peers import READ, public_name
from benchmarks.core.processes import python_path
from benchmarks.core.report import Baseline, Report, ReportError
from benchmarks.core.rows import REGISTRY, Row, benchmarks
from benchmarks.core.tables import WIDTH, markdown, table
from fastattn.backends.kv_signals import queue_key
from fastattn.cli import main
from tests.support import ROOT, fresh

pytest.importorskip("rich")


def test_overhead_writes_a_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["bench", "--op", "overhead", "--quick", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    measured = " ".join(f"{row['op']} {row['shape']}" for row in report["rows"])
    assert "paged_attention" in measured and "write_cache_kv" in measured
    assert report["machine"]["cores"] >= 1
    assert "overhead" in benchmarks("cpu") and "overhead" in benchmarks("gpu")


def test_without_the_source_tree_a_line_says_where_benchmarks_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastattn, "__file__", str(tmp_path / "fastattn" / "__init__.py"))
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--list"])
    (line,) = str(stop.value.code).splitlines()  # Python prints it, and the status is 1
    assert "benchmarks come with the source tree" in line and str(tmp_path) in line


def test_the_source_trees_folder_comes_before_the_working_directorys(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise ImportError('of another project')")
    env = {**os.environ, "PYTHONPATH": python_path()}
    done = fresh.run_module("fastattn", "bench", "--list", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "paged_attention" in done.stdout.split()


def test_the_package_needs_no_benchmarks():
    """A wheel has none; only the command's door names them."""
    door = ROOT / "fastattn" / "cli" / "bench.py"
    naming = {p for p in (ROOT / "fastattn").rglob("*.py") if '"benchmarks' in p.read_text("utf-8")}
    importing = re.compile(r"^\s*(from|import) benchmarks\b", re.M)
    assert naming == {door}
    for path in (ROOT / "fastattn").rglob("*.py"):
        assert not importing.search(path.read_text("utf-8")), path


def test_an_unknown_operator_is_named(capsys):
    assert main(["bench", "--op", "gemm"]) == 2
    assert "--op gemm is no benchmark" in capsys.readouterr().out


def test_a_benchmark_of_another_device_is_told_from_an_unknown_one(capsys, monkeypatch):
    monkeypatch.setitem(REGISTRY, "elsewhere", {"tpu": lambda device: iter(())})
    assert main(["bench", "--op", "elsewhere"]) == 2
    text = capsys.readouterr().out
    assert "--op elsewhere is not measured on a " in text and "paged_attention" in text


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fails(device):
        yield Row("bad", "first", 1.0)
        raise RuntimeError("out of\n  [memory]")

    monkeypatch.setattr("benchmarks.cli._import_cases", lambda: None)
    monkeypatch.setattr(registry, "REGISTRY", {})
    registry.register("bad")(fails)
    registry.register("good")(lambda device: iter([Row("good", "all", 2.0)]))
    path = tmp_path / "all.json"
    assert main(["bench", "--all", "--json", str(path), "--json-dir", str(tmp_path)]) == 1
    assert "failed: bad: RuntimeError: out of [memory]" in capsys.readouterr().out
    report = Report.read(path)
    assert [row.op for row in report.rows] == ["bad", "good"]
    assert report.failed == {"bad": "RuntimeError: out of [memory]"}
    assert Report.read(tmp_path / "cpu-test-bench.json") == report  # both are of this module
    assert main(["bench", "--load", str(path)]) == 0
    assert "failed: bad" in capsys.readouterr().out
    assert main(["bench", "--op", "good"]) == 0


def test_a_lost_device_leaves_the_others_to_another_process(tmp_path):
    from benchmarks.cli import _import_cases, _measure

    class Lost(Cpu):
        def recovered(self):
            return False

    def fails(device):
        raise RuntimeError("an illegal memory access")
        yield

    _import_cases()
    names = ("window_indices", "short_context_indices")  # of a family
    chosen = {"bad": fails, **{name: benchmarks("cpu")[name] for name in names}}
    report = _measure(chosen, Lost(quick=True), None, tmp_path)
    assert {row.op for row in report.rows} == set(names)
    assert list(report.failed) == ["bad"]
    file = Report.read(tmp_path / "cpu-index-maps.json")
    assert file.rows == report.rows and not file.failed


@pytest.mark.parametrize(("name", "wanted", "found"), [
    ("step", "step", True), ("step/sparse", "step", True), ("step/sparse", "step/sparse", True),
    ("step", "step/sparse", False), ("steps", "step", False),
])  # fmt: skip
def test_a_part_of_a_name_chooses_all_behind_it(name, wanted, found):
    assert registry.is_of(name, wanted) is found


@pytest.mark.parametrize(("us", "peer", "ratio"), [(2.0, 4.0, 2.0), (4.0, 1.0, 0.25)])
def test_ratio_above_1_is_faster(us, peer, ratio):
    assert Row("op", "shape", us, peer_us=peer).ratio == ratio


def test_a_name_may_have_a_benchmark_for_each_device(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", {})
    for us, kinds in ((1.0, ["cpu"]), (2.0, ["gpu"])):
        registry.register("op", *kinds)(lambda device, us=us: iter([Row("op", device, us)]))
    registry.register("both")(lambda device: iter([]))
    assert set(benchmarks("cpu")) == set(benchmarks("gpu")) == {"op", "both"}
    assert list(benchmarks("gpu")["op"]("here")) == [Row("op", "here", 2.0)]


def test_the_names_are_listed_without_registering_operators(tmp_path):
    code = (
        "from fastattn import _ops\n"
        "from fastattn.cli import main\n"
        "assert main(['bench', '--list']) == 0\n"
        "assert main(['bench', '--op', 'overhead', '--quick']) == 0\n"
        "direct = _ops.helpers() is not None\n"
        "assert not direct or _ops.load.cache_info().currsize == 0\n"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


def _bytes(*tensors) -> int:
    return sum(x.size * x.element_size() for x in tensors)


@pytest.mark.parametrize("quant", ["none", "cache_int8", "block_wise_fp8"])
def test_bytes_of_a_step_are_what_it_reads_and_writes(quant):
    from benchmarks.cases.compat import describe, gqa_calls
    from benchmarks.cases.inputs import DIM, KV

    seqs = [(6, 70, 6), (0, 130, 1), (0, 9, 1)]
    assert describe(seqs).startswith("1 x 6 prefill after 70, 1 x 1 decode, 1 x 1 decode, H 32")
    (call,), moved = gqa_calls(Cpu(quick=True), quant, seqs)
    q, k, v, qkv_out = call()
    assert k.shape == v.shape == [6 + 70 + 2, KV, DIM]
    of_token = {"none": 2 * DIM, "cache_int8": DIM, "block_wise_fp8": DIM + 4}[quant]
    angles = 8 * DIM * 4
    cached = 2 * KV * of_token * (70 + 6)  # a prompt's: read, and written
    assert moved == _bytes(qkv_out, q, k, v, qkv_out) + angles + cached


def test_bytes_of_merged_outputs_are_those_of_decoding_sequences():
    from benchmarks.cases.compat import merge_calls
    from benchmarks.cases.inputs import DIM, HEADS

    (call,), moved = merge_calls(Cpu(quick=True), [(6, 70, 6), (0, 130, 3)])
    assert call().shape == [9, HEADS * DIM]
    assert moved == 2 * 3 * HEADS * DIM * 2


@pytest.mark.parametrize(("quant", "queries"), [("none", "bfloat16"), ("cache_fp8", "e4m3")])
def test_a_mixed_call_has_the_sequences_of_its_parts(quant, queries):
    from benchmarks.cases.inputs import DIM, HEADS
    from benchmarks.cases.mixed import attention, describe

    parts = [(1, 70, 66), (2, 128, 1), (1, 9, 4)]
    assert describe(parts).startswith("1 x 66 behind 70 + 2 x 1 behind 128 + 1 x 4 behind 9, H 32")
    calls = [attention(Cpu(quick=True), quant, queries, x) for x in (parts, *([p] for p in parts))]
    assert [call().shape for call in calls] == [[n, HEADS, DIM] for n in (72, 66, 2, 4)]


@pytest.mark.parametrize("new", [1, 4])
def test_a_batch_invariant_call_stands_beside_the_same_call(new):
    from benchmarks.cases.batch_invariant import pair
    from benchmarks.cases.inputs import DIM, HEADS

    (invariant,), (plain,) = pair(Cpu(quick=True), "block_wise_fp8", [130, 70], new)
    assert invariant.keywords == {**plain.keywords, "batch_invariant": True}
    assert all(x is y for x, y in zip(invariant.args, plain.args))
    assert invariant().shape == plain().shape == [2 * new, HEADS, DIM]


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
    monkeypatch.setattr("benchmarks.cli._run_benchmarks", None)
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


@pytest.mark.parametrize("width", [WIDTH, 120])
def test_a_table_fits_its_terminal(width):
    from rich.console import Console

    shape = "decode block_wise_fp8 B {} ctx 131072 H 32/8 D 128"
    rows = [
        Row("paged_attention", shape.format(b), 12345.6, 3012.3, "GB/s", peer, 23456.7, 1.2e-3)
        for b in (1, 128)
        for peer in (READ, "vllm_triton_int8pth")
    ]
    rows += [
        Row("merge_attn_states, fused dynamic", "4096 tokens, warm", 1.0, peer=f"x [{'y' * 99}]")
    ]
    report = Report({**MACHINE, "gpu": "NVIDIA H100 80GB HBM3"}, rows)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(report, Baseline(report)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = "".join(lines)
    assert "paged_attention, H 32/8, D 128" in text  # once, not in every row
    assert text.count("D 128") == 1 and "…" not in text
    assert text.count("12,345.6") == 4 and text.count("3012.3") == 4
    assert "error" in text and "baseline" in text and "INT8" in text


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("vllm_fa3_fp8 (q fp8)", "vLLM FA3 FP8"),
        ("vllm_fa3_bf16_varlen", "vLLM FA3 BF16 ragged"),
        ("vllm rope + reshape_and_cache fp8 (2 kernels)", "vLLM, 2 kernels"),
        ("copy of as many bytes", "copy"),
        ("empty kernel", "empty kernel"),
    ],
)
def test_peers_have_short_public_names(peer, name):
    assert public_name(peer) == name


def test_a_file_of_each_family(tmp_path, capsys):
    arguments = ["bench", "--quick", "--json-dir", str(tmp_path)]
    assert main([*arguments, "--op", "overhead", "--op", "quantize_fp8"]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.partition("-")[2] for name in names] == ["host.json", "quantize.json"]
    assert {row.op for row in Report.read(tmp_path / names[0]).rows} == {"overhead"}
    assert main(["bench", "--json-dir", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().out
    for wrong in (["--all", "--op", "host"], ["--json-dir"]):
        with pytest.raises(SystemExit):
            main(["bench", *wrong])


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


def test_rows_of_decode_are_drawn_as_curves():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from benchmarks.core.plots import CHARTS, draw_curves

    rows = []
    for quant in ("cache_fp8", "none", "cache_int8"):
        for k in (1, 8, 32):
            shape = f"decode {quant} B 16 ctx {k * 1024} H 32/8 D 128"
            row = Row("paged_attention", shape, 10.0 * k, 1000.0 + k, "GB/s", READ, 3.0 * k)
            fastest = {"cache_fp8": "vllm_fa3_fp8", "none": "vllm_fa3_bf16"}.get(
                quant, "vllm_fa3_x"
            )
            others = {fastest: 12.0, "vllm_triton_fp8": 40.0}
            rows += [row, *(row.beside(peer, us * k) for peer, us in others.items())]
    figure = draw_curves(CHARTS[0], Report(MACHINE, rows), pyplot)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "fastattn FP8",
        "fastattn BF16",
        "vLLM FlashAttention-3 FP8",
        "vLLM FlashAttention-3 BF16",
    ]
    assert "us" in figure.axes[0].get_ylabel() and "tokens" in figure.axes[0].get_xlabel()
    pyplot.close(figure)
    assert draw_curves(CHARTS[1], Report(MACHINE, rows), pyplot) is None


def test_nothing_to_plot(write, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    load = write("a.json", rows=[Row("a", "s", 1.0)])
    assert main(["bench", "--load", load, "--plot", str(tmp_path / "a.png")]) == 2
    assert "no row has a ratio" in capsys.readouterr().out


@pytest.mark.skipif(
    paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0,
    reason="a GPU's rows take long",
)
@pytest.mark.slow
def test_every_operator_has_rows(tmp_path):
    path = tmp_path / "report.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 0
    measured = {row.op for row in Report.read(path).rows}
    assert measured >= set(F.__all__) - {"plan_cascade", "make_cache", "use_neox_rotary_style"}
    assert all(row.us > 0 or row.op == "overhead" for row in Report.read(path).rows)


def test_signals_leave_no_queue_behind(monkeypatch):
    """Each mode has a row, and the queue that another process empties is gone afterwards."""
    from benchmarks.cases import kv_signal
    from tests.support.kv_receiver import LIBC

    keys = []
    monkeypatch.setattr(
        kv_signal, "queue_key", lambda *a, **b: keys.append(queue_key(*a, **b)) or keys[-1]
    )
    rows = list(kv_signal.kv_signal(Cpu(quick=True)))
    assert [row.shape.split(",")[0] for row in rows] == ["per_chunk", "per_query"]
    assert all(row.us > 0 and row.peer == "no signal" for row in rows)
    assert [LIBC.msgget(key, 0) for key in keys] == [-1]


def test_list_names_the_benchmarks(capsys):
    assert main(["bench", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert {"overhead", "paged_attention", "merge_attn_states"} <= set(names)


@pytest.fixture
def peers_file(tmp_path, monkeypatch):
    """Writes rows to where benchmarks look for other libraries' times."""
    from benchmarks.core import peers

    def write(*rows):
        path = tmp_path / "peers.json"
        path.write_text(json.dumps({"rows": rows}))
        monkeypatch.setenv("FASTATTN_BENCH_PEERS", str(path))
        peers._rows.cache_clear()

    yield write
    monkeypatch.undo()
    peers._rows.cache_clear()


def test_peers_stand_beside_the_same_dtype_alone(peers_file):
    """A row without a dtype is of bf16, one without a format of FP8."""
    from benchmarks.cases import indexer, merge

    of_merge = {"section": "merge", "tokens": 2, "heads": 4, "us_warm": 5.0, "us_cold": 6.0}
    peers_file(
        {**of_merge, "peer": "vllm_cuda_fused"},
        {**of_merge, "peer": "half", "dtype": "float16"},
        {"section": "indexer", "peer": "q_rope_quant", "tokens": 32, "us": 7.0},
    )
    device = Cpu(quick=True)
    found = {
        dtype: {row.peer for row in merge._rows(device, 2, 4, dtype)}
        for dtype in ("bfloat16", "float16")
    }
    assert "vllm_cuda_fused" in found["bfloat16"] and "half" not in found["bfloat16"]
    assert "half" in found["float16"] and "vllm_cuda_fused" not in found["float16"]
    beside = [row.shape for row in indexer.queries(device) if row.peer == "q_rope_quant"]
    assert beside == ["T 32, H 64, fp8"]
