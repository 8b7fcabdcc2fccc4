"""The table of the kernels' variants: what is written from it, and that dispatch agrees with it."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from custom_ops.builder import instances, toolchain

ROOT = Path(__file__).parents[2]
CUSTOM_OPS = ROOT / "custom_ops"
CUDA = toolchain.find_cuda()
FAMILIES = {family.folder: family for family in instances.FAMILIES}
needs_nvcc = pytest.mark.skipif(CUDA is None or shutil.which("nm") is None, reason="no nvcc or nm")


def written(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*.*"))}


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", instances.FAMILIES, ids=list(FAMILIES))
def test_every_instance_is_written_once(tmp_path, family):
    instances.write(tmp_path)
    found = []
    for path in (tmp_path / family.folder).glob("*.cu"):
        text = path.read_text()
        assert f'#include "{family.header(family.defined)}"' in text
        assert f"namespace {family.namespace} {{" in text
        found += re.findall(rf"template cudaError_t {family.launcher}<(.*)>\(", text)
    listed = (tmp_path / family.folder / "instances.h").read_text()
    expected = [family.spell(values) for values in family.arguments()]
    assert len(set(expected)) == len(expected)
    assert re.findall(r"  Instance<([^>]*)>", listed) == expected
    assert sorted(found) == sorted(expected)
    assert all(len(row) == len(family.columns) for row in family.rows)


def test_files_have_one_owner():
    names = instances.sources()
    assert len(names) == len(set(names))
    assert not any((CUSTOM_OPS / name).exists() for name in names)


def test_a_second_time_touches_nothing(tmp_path):
    instances.write(tmp_path)
    before = written(tmp_path)
    instances.write(tmp_path)
    assert written(tmp_path) == before
    assert len(list(tmp_path.rglob("*.cu"))) == len(instances.sources())


def test_a_row_changes_its_files_only(tmp_path, monkeypatch):
    instances.write(tmp_path)
    before = written(tmp_path)
    family = FAMILIES["cuda/attention/mma_sm80"]
    row = ("kE4M3", "kE4M3", 80, True, False, (8, 16, 64))
    changed = replace(family, rows=(*family.rows, row))
    families = [changed if each is family else each for each in instances.FAMILIES]
    monkeypatch.setattr(instances, "FAMILIES", families)
    instances.write(tmp_path)
    after = written(tmp_path)
    source, listed = (tmp_path / family.folder / n for n in ("e4m3_80_paged.cu", "instances.h"))
    assert set(after) - set(before) == {source}
    assert {path for path in before if before[path] != after[path]} == {listed}
    start = "LaunchAttentionVariant<DType::kE4M3, DType::kE4M3, 80, true, false, "
    assert source.read_text().count(start) == 3
    monkeypatch.undo()
    instances.write(tmp_path)
    assert set(written(tmp_path)) == set(before)  # what no row asks for is gone


def test_no_instance_is_written_by_hand():
    for path in CUSTOM_OPS.rglob("*.cu*"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^template (<>\s)?\s*cudaError_t", text, re.M), path


def test_columns_are_template_parameters_of_the_launcher():
    for family in instances.FAMILIES:
        for name in (family.header(family.declared), family.header(family.defined)):
            text = (CUSTOM_OPS / name).read_text(encoding="utf-8")
            found = re.search(rf"template <([^>]*)>\s+cudaError_t {family.launcher}\(", text)
            assert found, f"{name} has no {family.launcher}"
            kinds = [parameter.split()[0] for parameter in found[1].split(",")]
            assert kinds == list(family.columns.values())


# --- dispatch ------------------------------------------------------------------------------------

PROGRAM = """
#include <cstdio>
#include <tuple>

#include "common/instances.h"

using namespace fastattn;
using List = InstanceList<Instance<DType::kE4M3, 64, false>, Instance<DType::kE4M3, 128, false>,
                          Instance<DType::kInt8, 64, false>, Instance<DType::kInt8, 64, true>>;

void Try(DType code, int head_dim, bool dynamic) {
  const std::tuple wanted{Wanted{"code", code}, Wanted{"head_dim", head_dim},
                          Wanted{"dynamic", dynamic}};
  std::printf("%d ", IsCompiled(List{}, wanted));
  try {
    dispatch(List{}, wanted, [](auto c, auto d, auto q) {
      constexpr DType kCode = decltype(c)::value;
      constexpr int kDim = decltype(d)::value;
      constexpr bool kDynamic = decltype(q)::value;
      std::printf("%s %d %d\\n", NameOf(kCode), kDim, kDynamic);
    });
  } catch (const std::invalid_argument& error) {
    std::printf("%s\\n", error.what());
  }
}

int main() {
  Try(DType::kE4M3, 128, false);
  Try(DType::kInt8, 64, true);
  Try(DType::kE5M2, 64, false);
  Try(DType::kE4M3, 96, false);
  Try(DType::kE4M3, 64, true);
  Try(DType::kE5M2, 96, true);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_dispatch_takes_what_is_listed_and_says_what_is(tmp_path):
    (tmp_path / "program.cc").write_text(PROGRAM)
    command = [
        "g++",
        "-std=c++17",
        "-Wall",
        "-Werror",
        f"-I{CUSTOM_OPS}",
        "program.cc",
        "-oprogram",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(["./program"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "1 float8_e4m3fn 128 0",
        "1 int8 64 1",
        "0 code = float8_e5m2 is not supported; supported: float8_e4m3fn, int8",
        "0 head_dim = 96 is not supported; supported: 64, 128",
        "0 code = float8_e4m3fn is not supported; supported: int8",
        "0 code = float8_e5m2, head_dim = 96, dynamic = 1 is not supported together",
    ]


# --- object files --------------------------------------------------------------------------------


def enumerators(name):
    """Enumerators of a C++ enum, by their numbers."""
    for path in CUSTOM_OPS.rglob("*.h"):
        found = re.search(rf"enum class {name} : int {{(.*?)}}", path.read_text(), re.S)
        if found:
            return re.findall(
                r"^\s*(\w+),", re.sub(r"//.*", "", found[1]).replace(",", ",\n"), re.M
            )
    raise AssertionError(name)


def symbols(path, kind, family):
    """Template arguments of the family's launchers among an object's symbols."""
    text = subprocess.run(
        ["nm", "-C", str(path)], capture_output=True, text=True, check=True
    ).stdout
    name = f"{family.namespace}::{family.launcher}"
    found = re.findall(rf"^[0-9a-f]*\s+([A-Za-z]) .*?\b{name}<(.*?)>\(", text, re.M)
    return {spelled(match, family) for letter, match in found if letter in kind}


def spelled(demangled, family):
    values = []
    for text, kind in zip(demangled.split(", "), family.columns.values()):
        number = re.fullmatch(r"\([\w:]+\)(\d+)", text)
        values.append(f"{kind}::{enumerators(kind)[int(number[1])]}" if number else text)
    return ", ".join(values)


def compiled(source, target, *flags):
    cuda = toolchain.Cuda(CUDA, ["90a"])
    kept = [flag for flag in cuda.flags if flag != "-O3" or "-O0" not in flags]
    command = [cuda.nvcc, *kept, *flags]
    command += ["-c", str(source), "-o", str(target)]
    done = subprocess.run(command, cwd=CUSTOM_OPS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    """Compiles the file of a folder that dispatches, once for all families that it starts."""
    instances.write(CUSTOM_OPS / toolchain.GENERATED)

    @functools.cache
    def compile_launcher(folder):
        target = tmp_path_factory.mktemp("launch") / "launch.o"
        # Not optimised: a fifth of the time, and the same symbols.
        return compiled(f"{folder}/launch.cu", target, "-O0")

    return compile_launcher


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("family", instances.FAMILIES, ids=list(FAMILIES))
def test_launchers_need_what_is_listed(launcher, family):
    """Undefined symbols of the file that dispatches are the instances of the table."""
    folder = "cuda/attention" if "/mma_sm80" in family.folder else family.folder
    found = symbols(launcher(folder), "U", family)
    assert found == {family.spell(values) for values in family.arguments()}


def check_defined(family, name, path):
    rows = family.files()[name]
    assert symbols(path, "TW", family) == {family.spell(values) for values in rows}, path


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("family", instances.FAMILIES, ids=list(FAMILIES))
def test_sources_define_what_they_are_written_for(tmp_path, family):
    instances.write(CUSTOM_OPS / toolchain.GENERATED)
    name = next(iter(family.files()))
    path = compiled(f"{toolchain.GENERATED}/{name}", tmp_path / "instance.o")
    check_defined(family, name, path)


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("family", instances.FAMILIES, ids=list(FAMILIES))
def test_objects_of_the_last_build_define_the_table(family):
    """Where the CUDA part was built here."""
    checked = 0
    for name in family.files():
        source = CUSTOM_OPS / toolchain.GENERATED / name
        for path in (ROOT / "build" / "objects").glob(f"*/{name}.o"):
            if source.exists() and path.stat().st_mtime > source.stat().st_mtime:
                check_defined(family, name, path)
                checked += 1
    if not checked:
        pytest.skip("the CUDA part was not built here")
