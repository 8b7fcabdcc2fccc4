"""scripts/compare_sass.py on made-up disassemblies: what it ignores, and that it can fail.

In place of cuobjdump a script prints the "library", which is the disassembly itself.
"""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest

from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "compare_sass.py"
main = runpy.run_path(str(SCRIPT))["main"]

LOAD = ("LDC R1, c[0x0][0x28]", "0x00000a00ff017b82", "0x000ff00000000800")
ADD = ("IADD3 R2, R1, 0x1, RZ", "0x0000000101027810", "0x000fca0007ffe0ff")
BRANCH = ("@P0 BRA 0x30", "0xfffffff000000947", "0x000fea000383ffff")
CALL = ("CALL.REL.NOINC `($_Z3addv$__internal_0_$__cuda_sm20_div_u64)", "0x1", "0x2")
MOVE = ("MOV R20, 32@lo((_Z3addv + .L_x_1@srel))", "0x3", "0x4")
EXIT = ("EXIT", "0x000000000000794d", "0x000fea0003800000")
ADDER = (LOAD, ADD, BRANCH, EXIT)
STORER = (LOAD, EXIT)
ADD_NAME = "_ZN8fastattn3AddILi64EEEvPfi"
STORE_NAME = "_ZN8fastattn5StoreILb1EEEvPfi"


def function(name, instructions, base=0):
    lines = [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for index, (text, low, high) in enumerate(instructions):
        address = f"        /*{base + 16 * index:04x}*/                   "
        lines.append(f"{address}{text} ;".ljust(87) + f"/* {low} */")
        lines.append(" " * 87 + f"/* {high} */")
    return "\n".join([*lines, "\t\t..........", ""])


def disassembly(*functions, arch="sm_90a", source="cuda/add.cu"):
    head = f"\nFatbin elf code:\n================\narch = {arch}\nidentifier = {source}\n\n"
    return head + f"\tcode for {arch}\n\t.target\t{arch}\n\n" + "\n\n".join(functions)


BASE = disassembly(function(ADD_NAME, ADDER), function(STORE_NAME, STORER))


@pytest.fixture
def compare(tmp_path, capsys):
    program = tmp_path / "cuobjdump"
    program.write_text('#!/bin/sh\n[ "$1" = -sass ] && cat "$2"\n')
    program.chmod(0o755)

    def run(a, b):
        for name, text in (("a.so", a), ("b.so", b)):
            (tmp_path / name).write_text(text)
        paths = [str(tmp_path / name) for name in ("a.so", "b.so")]
        status = main([*paths, "--cuobjdump", str(program)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_a_build_is_the_same_as_itself(compare):
    status, text = compare(BASE, BASE)
    assert status == 0
    assert "A: 2 kernels for sm_90a, 6 instructions" in text and "the same: 2\n" in text
    assert "different" not in text and "only in" not in text and "another name" not in text


def test_names_addresses_order_and_files_are_ignored(compare):
    moved = "".join(
        disassembly(function(name, instructions, 0x40), source=f"cuda/elsewhere/{name}.cu")
        for name, instructions in (("_Z1fv", STORER), (ADD_NAME, ADDER))
    )
    status, text = compare(BASE, moved)
    assert status == 0 and "the same: 2, 1 of them by another name" in text


@pytest.mark.parametrize("instruction", [CALL, MOVE], ids=["call", "move"])
def test_names_in_operands_are_ignored(compare, instruction):
    text, *_ = instruction
    other = (text.replace("_Z3addv", "_Z3subILi3EEvT_"), "0x5", "0x6")
    a, b = (disassembly(function(ADD_NAME, (LOAD, x, EXIT))) for x in (instruction, other))
    assert compare(a, b)[0] == 0
    opcode = (text.replace("CALL.REL", "CALL.ABS").replace("R20", "R21"), "0x1", "0x2")
    assert compare(a, disassembly(function(ADD_NAME, (LOAD, opcode, EXIT))))[0] == 1


CHANGED = {
    "instruction": (LOAD, ("IADD3 R2, R1, 0x2, RZ", *ADD[1:]), BRANCH, EXIT),
    "constant_bank_offset": (("LDC R1, c[0x0][0x2c]", *LOAD[1:]), ADD, BRANCH, EXIT),
    "encoding": (LOAD, (ADD[0], "0x0000000101027811", ADD[2]), BRANCH, EXIT),
    "scheduling": (LOAD, (*ADD[:2], "0x000fda0007ffe0ff"), BRANCH, EXIT),
    "branch_target": (LOAD, ADD, ("@P0 BRA 0x40", *BRANCH[1:]), EXIT),
    "order": (ADD, LOAD, BRANCH, EXIT),
    "one_less": (LOAD, BRANCH, EXIT),
    "one_more": (LOAD, ADD, BRANCH, EXIT, EXIT),
}


@pytest.mark.parametrize("name", [ADD_NAME, "_ZN8fastattn3AddILi64EEEvPfj"], ids=["", "renamed"])
@pytest.mark.parametrize("change", CHANGED)
def test_a_change_is_found(compare, change, name):
    other = disassembly(function(STORE_NAME, STORER), function(name, CHANGED[change]))
    status, text = compare(BASE, other)
    assert status == 1
    assert "the same: 1\n" in text and "different: 1\n" in text and "only in" not in text
    index = {"constant_bank_offset": 0, "order": 0, "branch_target": 2, "one_more": 4}
    assert f"instruction {index.get(change, 1)}:" in text
    assert "Add" in text and "Store" not in text


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_saved_disassembly_is_read(tmp_path, capsys, side):
    program = tmp_path / "cuobjdump"
    program.write_text('#!/bin/sh\ncat "$2"\n')
    program.chmod(0o755)
    (tmp_path / "a.sass").write_text(BASE)
    (tmp_path / "b.so").write_text(BASE.replace("R2, R1, 0x1", "R2, R1, 0x3"))
    paths = [str(tmp_path / name) for name in ("a.sass", "b.so")]
    arguments = ["--cuobjdump", str(program)]
    assert main([*(paths if side == "A" else paths[::-1]), *arguments]) == 1
    assert "instruction 1:" in capsys.readouterr().out


def test_no_cuobjdump(tmp_path, capsys, monkeypatch):
    """It is needed for libraries, and not for saved disassemblies."""
    monkeypatch.setitem(main.__globals__, "find_cuobjdump", lambda: None)
    for name, status in (("a.sass", 0), ("a.so", 2)):
        (tmp_path / name).write_text(BASE)
        assert main([str(tmp_path / name)] * 2) == status
    assert "error: no cuobjdump: set CUDA_HOME" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_missing_kernel_is_found(compare, side):
    less = disassembly(function(ADD_NAME, ADDER))
    status, text = compare(*((BASE, less) if side == "A" else (less, BASE)))
    assert status == 1
    assert f"only in {side}: 1\n" in text and "Store" in text and "(sm_90a), 2 instr" in text


def test_equal_kernels_are_counted(compare):
    twice = disassembly(*(function(f"_ZN8fastattn{name}Ev", ADDER) for name in ("1a", "1b")))
    once = disassembly(function("_ZN8fastattn1aEv", ADDER))
    status, text = compare(twice, once)
    assert status == 1
    assert "the same: 1\n" in text and "only in A: 1\n  fastattn::b() " in text.replace(
        "_ZN8fastattn1bEv", "fastattn::b()"
    )


def test_architectures_are_compared_apart(compare):
    both = BASE + disassembly(function(ADD_NAME, ADDER), arch="sm_80")
    assert compare(both, both)[0] == 0
    status, text = compare(both, BASE)
    assert status == 1 and "only in A: 1\n" in text and "(sm_80), 4 instructions" in text
    status, _ = compare(BASE, disassembly(function(ADD_NAME, ADDER), arch="sm_80"))
    assert status == 1


def test_changed_kernels_are_paired_by_their_names(compare):
    """Four kernels whose arguments stay and whose template is renamed, all with another body."""
    sizes = (32, 64, 96, 128)
    a, b = (
        disassembly(*(function(f"_ZN8fastattn{name}ILi{n}EEEvPfi", body) for n in order))
        for name, body, order in (("3Add", ADDER, sizes), ("3Sum", STORER, sizes[::-1]))
    )
    status, text = compare(a, b)
    assert status == 1 and "different: 4\n" in text and "only in" not in text
    lines = [line for line in text.splitlines() if "Add" in line or "Sum" in line]
    for n, (ours, theirs) in zip(sizes, zip(lines[::2], lines[1::2])):
        assert str(n) in ours and str(n) in theirs


def test_what_cannot_be_compared(compare):
    for a, message in (
        ("Fatbin ptx code:\n", "a.so: no kernels"),
        (disassembly(function(ADD_NAME, ())), f"no instructions were found in {ADD_NAME}"),
    ):
        status, text = compare(a, BASE)
        assert status == 2 and message in text


def test_trouble_is_no_equality(tmp_path):
    library = tmp_path / "a.so"
    library.write_text(BASE)
    program = tmp_path / "cuobjdump"

    def run(*paths):
        command = [sys.executable, str(SCRIPT), *map(str, paths), "--cuobjdump", str(program)]
        return subprocess.run(command, capture_output=True, text=True)

    done = run(library, library)
    assert done.returncode == 2 and "No such file" in done.stderr
    program.write_text('#!/bin/sh\ncat "$2"; echo "nvdisasm is missing" >&2; exit 3\n')
    program.chmod(0o755)
    done = run(library, library)
    assert done.returncode == 2
    assert "a.so: cuobjdump ended with status 3: nvdisasm is missing" in done.stderr
    done = run(tmp_path / "b.so", library)
    assert done.returncode == 2 and "b.so: no such file" in done.stderr
