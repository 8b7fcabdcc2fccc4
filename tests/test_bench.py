"""The bench command runs and reports; nothing here looks at a time."""

from __future__ import annotations

import json

import pytest

from fastattn.bench.common import REGISTRY, Row
from fastattn.cli import main


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
