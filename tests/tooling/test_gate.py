"""``benchmarks/gate.py``: which rows of a run are slower than the newest committed ones."""

from __future__ import annotations

import pytest

from benchmarks import gate
from benchmarks.core.report import Report
from benchmarks.core.rows import Row
from tests.support import ROOT

GPU = "NVIDIA H100 80GB HBM3"


def report(times: dict[str, float], *, gpu=GPU, date="2026-11-25T00:00", commit="abc", op="decode"):
    rows = [Row(op, shape, us) for shape, us in times.items()]
    return Report({"gpu": gpu, "date": date, "commit": commit}, rows)


def compared(runs, base) -> dict[str, gate.Compared]:
    return {row.key[1]: row for row in gate.compare(runs, gate.committed_times(base, GPU))}


def test_the_newest_time_of_the_same_gpu_counts():
    base = [
        report({"a": 10, "b": 20}, date="2026-11-20T10:00"),
        report({"a": 12}, date="2026-11-24T09:00", commit="new"),
        report({"a": 5}, date="2026-11-25T09:00", gpu="NVIDIA H200"),
    ]
    found = gate.committed_times(base, GPU)
    assert found["decode", "a"] == (12, "2026-11-24T09:00", "new")
    assert found["decode", "b"].us == 20
    assert gate.committed_times(base[::-1], GPU) == found


@pytest.mark.parametrize(
    "times, slower",
    [
        ([101.9] * 5, False),
        ([102.1] * 5, True),
        ([99, 100, 104, 104, 110], False),  # the median is 104, the noise 4
        ([101, 104, 104, 105, 106], True),  # the median is 104, the noise 1
        ([101.9, 103.5, 103.5, 103.5, 103.7], True),
        ([80] * 5, False),
    ],
)
def test_two_per_cent_above_the_noise(times, slower):
    row = compared([report({"a": us}) for us in times], [report({"a": 100})])["a"]
    assert row.is_slower == slower


def test_rows_are_ordered_and_repeated_rows_count_once():
    runs = [report({"a": 100, "b": 150})]
    runs[0].rows.append(Row("decode", "a", 999.0))  # the same measurement beside another peer
    rows = gate.compare(runs, gate.committed_times([report({"a": 100, "b": 100})], GPU))
    assert [(row.key[1], row.us) for row in rows] == [("b", 150), ("a", 100)]


def test_one_noisy_run_hides_nothing():
    """The noise is the runs' median distance from their median."""
    row = compared([report({"a": us}) for us in (130, 130, 130, 130, 230)], [report({"a": 100})])
    assert row["a"].is_slower and row["a"].noise == 0


def test_rows_of_one_side_are_named():
    committed = gate.committed_times([report({"a": 1, "b": 1}), report({"c": 1}, op="x")], GPU)
    runs = [report({"a": 1, "new": 1}), report({"new": 1})]
    assert gate.lost(runs) == [("decode", "a")]
    assert gate.not_run(runs, committed) == 1
    assert gate.compare(runs, committed) == []


def write(tmp_path, *reports):
    tmp_path.mkdir(exist_ok=True)
    paths = [tmp_path / f"{i}.json" for i in range(len(reports))]
    for path, made in zip(paths, reports):
        made.write(path)
    return [str(path) for path in paths]


def test_exit_status(tmp_path, capsys):
    base, same, slow, other = write(
        tmp_path,
        report({"a": 100, "b": 7}),
        report({"a": 101, "b": 7}),
        report({"a": 130, "b": 7}),
        report({"a": 100}, gpu="NVIDIA H200"),
    )
    assert gate.main([same, "--baseline", base]) == 0
    assert "2 rows, 0 slower by more than 2 %" in capsys.readouterr().out
    assert gate.main([slow] * 5 + ["--baseline", base]) == 1
    out = capsys.readouterr().out
    assert "slower by 30.0 %: decode, a: 130.00 us +- 0.00, 100.00 at abc (2026-11-25)" in out
    assert "note" not in out
    assert gate.main([other, "--baseline", base]) == 2
    assert "no row of these runs has a committed time on NVIDIA H200" in capsys.readouterr().err
    assert gate.main([same, other, "--baseline", base]) == 2
    assert "expected runs of one GPU" in capsys.readouterr().err
    more = write(tmp_path / "more", report({"a": 100}), report({"a": 100, "b": 7}))
    assert gate.main([*more, "--baseline", base]) == 1
    assert "not in every run: decode, b" in capsys.readouterr().out
    early = report({"a": 100, "b": 7})
    early.failed["append"] = "out of memory"
    assert gate.main([*write(tmp_path / "early", early), "--baseline", base]) == 1
    assert "ended early: append: out of memory" in capsys.readouterr().out
    (tmp_path / "bad.json").write_text("{}")
    assert gate.main([str(tmp_path / "bad.json")]) == 2


def test_a_committed_file_is_as_fast_as_itself():
    """Over the project's own results: the newest rows of the decode file's GPU."""
    path = ROOT / "benchmarks" / "results" / "h100-decode.json"
    assert gate.main([str(path), "--baseline", str(path)]) == 0
