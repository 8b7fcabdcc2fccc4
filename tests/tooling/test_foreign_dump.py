"""Dumps that another machine made: tests/tooling/dumps holds what ``step.py`` there wrote.

``FASTATTN_DUMP=DIR,op=paged_attention python tests/tooling/dumps/step.py`` makes them again, its
second and third call, where the operator's attributes change. Optional inputs that are newer than
the dumps were absent.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastattn.cli import main
from fastattn.dump import files, replay
from tests.support import ROOT

DUMPS = ROOT / "tests" / "tooling" / "dumps"


def test_a_call_that_gave_nan():
    """Its NaN are the model's, too, so the scales are to blame and not the kernel."""
    dump = files.read_call(DUMPS / "000001-nan")
    scales = np.frombuffer(dump.inputs["cache_k_scales"].data, np.float32).reshape(3, 64)
    assert np.isnan(scales[1]).all() and not np.isnan(scales[2, :3]).any()
    found = replay.replay(replay.Call(dump), timed=False)
    assert found.fits and found.dumped["result"].fits and found.replayed["result"].fits
    assert dump.facts["nan"]["result"] == 3 * 2 * 64


def test_a_call_that_raised():
    dump = files.read_call(DUMPS / "000002-raised")
    found = replay.replay(replay.Call(dump), timed=False)
    assert found.fits and found.error == ": ".join(dump.facts["error"])
    assert "cache_v_scales: expected shape [3, 1, 64], got [2, 1, 64]" in found.error


def test_command(capsys):
    assert main(["replay", str(DUMPS), "--no-time"]) == 0
    assert "2 of 2 calls ok" in capsys.readouterr().out


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_another_result_is_seen(tmp_path, capsys, value):
    """The same dump with one changed output, with sums that fit."""
    dump = files.read_call(DUMPS / "000001-nan")
    data = dump.results["result"].data.copy()
    data.view(np.uint16)[7] = 0x3F80 if value == 1.0 else 0x7FC0
    result = dump.results["result"]._replace(data=data)
    folder = tmp_path / "000001-changed"
    folder.mkdir()
    (folder / files.INPUTS).write_bytes((dump.folder / files.INPUTS).read_bytes())
    digest = files.write_tensors(folder / files.RESULTS, {"result": result})
    facts = {**dump.facts, "files": {**dump.facts["files"], files.RESULTS: digest}}
    files.write_facts(folder, {k: v for k, v in facts.items() if k != "sha256"})
    status = main(["replay", str(tmp_path), "--no-time"])
    assert status == (1 if value == 1.0 else 0)
    assert ("DIFFERS" in capsys.readouterr().out) == (value == 1.0)


def test_they_are_of_another_machine():
    """Nothing in them names a machine or a folder of one."""
    for folder in ("000001-nan", "000002-raised"):
        facts = json.loads((DUMPS / folder / files.CALL).read_text())
        told = facts["machine"]
        assert set(told) <= {"fastattn", "paddle", "python", "settings", "cpu_isa", "gpu"}
        assert "/" not in json.dumps(told)
