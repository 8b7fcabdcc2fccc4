"""scripts/check_waits.py on made-up disassemblies: what comes ahead of a wait, and what may."""

from __future__ import annotations

import runpy

import pytest

from tests.support import ROOT
from tests.tooling.test_compare_sass import EXIT, function

main = runpy.run_path(str(ROOT / "scripts" / "check_waits.py"))["main"]

WAIT = ("ACQBULK", "0x1", "0x2")
CONSTANT = ("@!P0 LDG.E.128.CONSTANT R8, desc[UR6][R12.64]", "0x3", "0x4")
STORE = ("STG.E desc[UR6][R2.64], R0", "0x5", "0x6")
PREFETCH = ("@!P1 CCTL.E.PF2 [R4]", "0x7", "0x8")
PARAMETER = ("ULDC.64 UR4, c[0x0][0x260]", "0x9", "0xa")
SHARED = ("LDS.64 R2, [R4]", "0xb", "0xc")


def run(tmp_path, *kernels):
    path = tmp_path / "library.sass"
    path.write_text("code for sm_90a\n" + "".join(function(*kernel) for kernel in kernels))
    return main([str(path)])


@pytest.mark.parametrize("access", [CONSTANT, STORE], ids=["load", "store"])
def test_an_access_ahead_of_the_wait_is_found(tmp_path, capsys, access):
    good = ("_ZGood", (PARAMETER, WAIT, access, EXIT))
    assert run(tmp_path, good, ("_ZBad", (PARAMETER, access, WAIT, EXIT))) == 1
    out = capsys.readouterr().out
    assert "_ZBad (sm_90a): " + access[0] in out and "_ZGood" not in out
    assert "2 kernels, 1 that touch" in out


def test_what_may_come_ahead_of_a_wait(tmp_path, capsys):
    kernels = [
        ("_ZPrefetches", (PARAMETER, PREFETCH, SHARED, WAIT, CONSTANT, EXIT)),
        ("_ZNeverWaits", (CONSTANT, STORE, EXIT)),
        ("_Z19MergePartialsKernelILb0EE", (CONSTANT, WAIT, STORE, EXIT)),
    ]
    assert run(tmp_path, *kernels) == 0
    assert "3 kernels, 0 that touch" in capsys.readouterr().out


def test_what_is_no_library(tmp_path, capsys):
    assert main([str(tmp_path / "none.sass")]) == 2
    assert "no such file" in capsys.readouterr().err
