"""The builder, on tiny projects of its own; the CUDA parts where nvcc is installed."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from custom_ops.builder import compile as building
from custom_ops.builder import instances, project, toolchain, wheel
from custom_ops.builder.compile import CompileError, Unit, compile_all
from fastattn import _ops, env
from fastattn.reference import layout
from fastattn.version import __version__
from tests.support import ROOT

CUSTOM_OPS = ROOT / "custom_ops"
needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
sys.path.insert(0, str(ROOT / "scripts"))
import check_wheel  # noqa: E402

CUDA = toolchain.find_cuda()
needs_nvcc = pytest.mark.skipif(CUDA is None, reason="no nvcc")


# --- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("90a;100a", ["90a", "100a"]),
        ("90", ["90a"]),
        ("[80, 90]", ["80", "90a"]),
        ('["80","90a"]', ["80", "90a"]),
        ("9.0a 8.9", ["90a", "89"]),
        ("sm_90a,compute_120f", ["90a", "120f"]),
        ("90a;90a;", ["90a"]),
        ("none", []),
    ],
)
def test_parse_archs(text, archs):
    assert toolchain.parse_archs(text, ["75"]) == archs


def test_default_archs():
    assert toolchain.parse_archs(None) == ["90a"]
    assert toolchain.parse_archs("  ", []) == ["90a"]
    assert toolchain.parse_archs("", ["89", "100a"]) == ["89", "100a"]


@pytest.mark.parametrize("text", ["hopper", "9", "90b", "90a;-O3", "9.0.1"])
def test_bad_archs_name_the_entry(text):
    with pytest.raises(toolchain.ToolchainError, match="FASTATTN_ARCHS"):
        toolchain.parse_archs(text)


@pytest.mark.parametrize(
    ("number", "arch"), [(90, "90a"), (100, "100a"), (120, "120a"), (89, "89")]
)
def test_specific_arch(number, arch):
    assert toolchain.specific_arch(number) == arch


def test_gencode_is_explicit():
    assert toolchain.gencode(["90a", "80"]) == [
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_80,code=sm_80"),
    ]


def test_detect_archs(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nprintf '9.0\\n9.0\\n8.9\\n'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert toolchain.detect_archs() == ["90a", "89"]
    fake.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert toolchain.detect_archs() == []


# --- flags and tools -----------------------------------------------------------------------------


def test_flags_of_the_library():
    cuda = toolchain.Cuda(Path("/c"), Path("/c/bin/nvcc"), (13, 0))
    plain = toolchain.cxx_flags()
    for flag in ("-O3", "-DNDEBUG", "-std=c++17", "-ffp-contract=off", "-DPADDLE_NO_PYTHON"):
        assert flag in plain
    assert not any(f.startswith("-march") for f in plain)
    assert "-DFASTATTN_WITH_CUDA" not in plain
    assert {"-DPADDLE_WITH_CUDA", "-DFASTATTN_WITH_CUDA"} <= set(toolchain.cxx_flags(True))
    device = toolchain.nvcc_flags(cuda, ["90a"], {})
    assert "-O3" in device and "arch=compute_90a,code=sm_90a" in device
    assert "-static-global-template-stub=false" in device
    older = toolchain.Cuda(Path("/c"), Path("/c/bin/nvcc"), (12, 4))
    assert "-static-global-template-stub=false" not in toolchain.nvcc_flags(older, ["90a"], {})
    assert not any("use_fast_math" in f for f in device)


def test_jobs():
    assert toolchain.jobs({}) == os.cpu_count()
    assert toolchain.jobs({"MAX_JOBS": "3"}) == 3
    with pytest.raises(toolchain.ToolchainError, match="MAX_JOBS"):
        toolchain.jobs({"MAX_JOBS": "many"})


def test_find_cuda_reads_the_toolkit_it_is_told(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.6, V12.6.20'\n")
    nvcc.chmod(0o755)
    found = toolchain.find_cuda({"CUDA_HOME": str(tmp_path)})
    assert found is not None and found.version == (12, 6)
    assert toolchain.find_cuda({"CUDA_HOME": str(tmp_path / "elsewhere")}) is None


def test_no_compiler():
    with pytest.raises(toolchain.ToolchainError, match=r"C\+\+ compiler"):
        toolchain.find_cxx({"PATH": "/nonexistent"})
    assert toolchain.find_cxx({"CXX": "clang++ -m64"}) == ["clang++", "-m64"]


# --- sources -------------------------------------------------------------------------------------


def make(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_discover(tmp_path):
    files = ["api/b.cc", "api/a.cc", "api/host_module.cc", "cpu/x.cc", "cpu/deep/y.cc", "cpu/x.h"]
    make(tmp_path, dict.fromkeys([*files, "cuda/merge/m.cu", "cuda/merge/k.cuh"], ""))
    cxx = ["api/a.cc", "api/b.cc", "cpu/deep/y.cc", "cpu/x.cc"]
    assert project.discover(tmp_path, with_cuda=False) == (cxx, [])
    assert project.discover(tmp_path, with_cuda=True) == (cxx, ["cuda/merge/m.cu"])


def test_operators_and_their_places(tmp_path):
    make(
        tmp_path,
        {
            "api/a.cc": '#include "cuda/a/launch.h"\nPD_BUILD_OP(fastattn_one)\n.Inputs()',
            "api/b.cc": "PD_BUILD_OP(fastattn_two)\nPD_BUILD_OP(fastattn_three)\n",
            "cuda/a/launch.cu": "",
        },
    )
    found = project.operators(tmp_path, with_cuda=True)
    assert found == {"one": ["cpu", "cuda"], "two": ["cpu"], "three": ["cpu"]}
    found = project.operators(tmp_path, with_cuda=False)
    assert set(map(tuple, found.values())) == {("cpu",)}


# --- compiling -----------------------------------------------------------------------------------


class Project:
    """A folder of C++ sources and what compiling it printed."""

    def __init__(self, folder, files):
        self.root, self.objects = folder / "src", folder / "objects"
        make(self.root, files)
        self.names = [name for name in files if name.endswith(".cc")]
        self.lines: list[str] = []

    def build(self, *flags, jobs=1, identity="", names=None):
        units = [
            Unit(n, n, self.objects / f"{n}.o", ("g++", "-I.", *flags)) for n in names or self.names
        ]
        self.lines.clear()
        say = self.lines.append
        return compile_all(units, self.root, self.objects, jobs, identity, say)


@pytest.fixture
def tiny(tmp_path):
    return Project(
        tmp_path,
        {
            "a.cc": '#include "sub/shared.h"\nint a() { return kShared; }\n',
            "b.cc": '#include "only b.h"\nint b() { return kOnly; }\n',
            "sub/shared.h": '#include "sub/deep.h"\n',
            "sub/deep.h": "constexpr int kShared = 1;\n",
            "only b.h": "constexpr int kOnly = 1;\n",
        },
    )


@needs_cxx
def test_progress_lines(tiny):
    seconds = tiny.build()
    assert len(tiny.lines) == 2
    for i, (line, name) in enumerate(zip(tiny.lines, ("a.cc", "b.cc"))):
        assert re.fullmatch(rf"\[{i + 1}/2\] +\d+ s  {re.escape(name)}", line)
    assert set(seconds) == {"a.cc", "b.cc"} and min(seconds.values()) > 0
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    assert all((tiny.objects / f"{n}.o").exists() for n in tiny.names)


@needs_cxx
def test_nothing_to_do(tiny):
    tiny.build()
    assert tiny.build() == {}
    assert tiny.lines == ["2 of 2 sources are up to date"]


@needs_cxx
def test_touched_header_rebuilds_what_includes_it(tiny):
    tiny.build()
    (tiny.root / "sub/deep.h").write_text("constexpr int kShared = 2;\n")
    assert set(tiny.build()) == {"a.cc"}
    (tiny.root / "only b.h").write_text("constexpr int kOnly = 2;\n")
    assert set(tiny.build()) == {"b.cc"}


@needs_cxx
def test_a_changed_header_from_the_past_rebuilds(tiny):
    """As an archive leaves it that is unpacked over an older tree."""
    tiny.build()
    header = tiny.root / "sub/deep.h"
    header.write_text("constexpr int kShared = 3;\n")
    os.utime(header, (1, 1))
    assert set(tiny.build()) == {"a.cc"}
    assert tiny.build() == {}


@needs_cxx
def test_changed_flags_rebuild_everything(tiny):
    tiny.build("-O1")
    assert set(tiny.build("-O2")) == {"a.cc", "b.cc"}
    assert set(tiny.build("-O2", identity="another compiler")) == {"a.cc", "b.cc"}


@needs_cxx
def test_lost_object_or_removed_header_rebuilds(tiny):
    tiny.build()
    (tiny.objects / "a.cc.o").unlink()
    assert set(tiny.build()) == {"a.cc"}
    (tiny.root / "only b.h").unlink()
    with pytest.raises(CompileError):
        tiny.build()


@needs_cxx
def test_a_touched_header_rebuilds_too(tiny):
    tiny.build()
    os.utime(tiny.root / "sub/deep.h")
    assert set(tiny.build()) == {"a.cc"}
    assert tiny.lines[0] == "1 of 2 sources are up to date"


@needs_cxx
def test_first_failure_stops_and_shows_the_message(tiny, capfd):
    make(tiny.root, {"bad.cc": "int broken( { }\n", "never.cc": "int never;\n"})
    with pytest.raises(CompileError, match=r"^bad\.cc did not compile$"):
        tiny.build(names=["a.cc", "bad.cc", "never.cc"])
    message = capfd.readouterr().err
    assert message.startswith("bad.cc:1:") and "error:" in message
    assert "int broken( { }" in message  # the quoted line: exactly what the compiler wrote
    assert message.splitlines()[-1].startswith("command: g++ -I. -MMD")
    assert tiny.lines[-1] == "bad.cc FAILED"
    assert not (tiny.objects / "never.cc.o").exists()
    assert set(tiny.build(names=["a.cc"])) == set()  # what was done stays done


@needs_cxx
def test_only_the_first_of_several_messages_is_shown(tiny, capfd):
    make(tiny.root, {f"bad{i}.cc": f"#error number {i}\n" for i in range(2)})
    with pytest.raises(CompileError, match=r"^bad\d\.cc did not compile$") as error:
        tiny.build(names=["bad0.cc", "bad1.cc"], jobs=2)
    first = str(error.value)[3]
    message = capfd.readouterr().err
    assert f"#error number {first}" in message and message.count("command: ") == 1
    assert len(re.findall(r"error: #error", message)) == 1


@needs_cxx
def test_warnings_are_shown(tiny, capfd):
    tiny.build('-DNOTE=_Pragma("message(\\"look here\\")")', names=["a.cc"])
    make(tiny.root, {"a.cc": "#warning look here\n"})
    tiny.build(names=["a.cc"])
    assert any("look here" in line for line in tiny.lines)


def test_a_missing_ninja_is_named(tiny, monkeypatch):
    monkeypatch.setattr(building, "find_ninja", lambda: None)
    with pytest.raises(
        toolchain.ToolchainError, match=r"ninja, .* is missing:\s+.* install ninja\n"
    ):
        tiny.build()


def test_a_source_that_is_missing_is_named(tiny):
    with pytest.raises(CompileError, match=r"none\.cc.*missing"):
        tiny.build(names=["none.cc"])


@needs_cxx
def test_folders_with_spaces(tmp_path):
    files = {"a b.cc": '#include "in $ it/c d.h"\n', "in $ it/c d.h": "int one;\n"}
    spaced = Project(tmp_path / "with a: space", files)
    assert set(spaced.build('-DTEXT="$x  y"')) == {"a b.cc"}
    assert spaced.build('-DTEXT="$x  y"') == {}
    (spaced.root / "in $ it/c d.h").write_text("int two;\n")
    assert set(spaced.build('-DTEXT="$x  y"')) == {"a b.cc"}


@needs_cxx
def test_parallel_build_counts_every_source(tmp_path):
    six = Project(tmp_path, {f"f{i}.cc": f"int f{i};\n" for i in range(6)})
    assert len(six.build(jobs=3)) == 6
    assert [line.split()[0] for line in six.lines] == [f"[{i}/6]" for i in range(1, 7)]


# --- wheels --------------------------------------------------------------------------------------

GOOD_WHEEL = [
    "fastattn/__init__.py",
    "fastattn/_ops.py",
    "fastattn/_build_info.py",
    "fastattn/_fastattn_ops.so",
    "fastattn/_host.cpython-311-x86_64-linux-gnu.so",
    "fastattn/functional/quantize.py",
    "fastattn/py.typed",
    "fastattn/demo/model.npz",
    "fastattn/demo/recipe.json",
    "fastattn/demo/held_out.txt",
    "fastattn-0.1.0.dist-info/METADATA",
    "fastattn-0.1.0.dist-info/licenses/LICENSE",
]


def test_good_wheel():
    assert check_wheel.problems(GOOD_WHEEL, "Root-Is-Purelib: false\n") == []


@pytest.mark.parametrize(
    "name",
    [
        "version.txt",
        "fastattn/version.txt",
        "fastattn/api/quantize.o",
        "build/temp/quantize.o",
        "fastattn/_fastattn_ops_pd_.so",
        "fastattn/_fastattn_ops.py",
        "fastattn/demo/demo-0123456789abcdef.npz",
        "fastattn/model.npz",
        "tests/tooling/test_build.py",
        "custom_ops/builder/wheel.py",
        "fastattn/__pycache__/env.cpython-311.pyc",
    ],
)
def test_wheel_with_something_else(name):
    assert check_wheel.problems([*GOOD_WHEEL, name]) == [f"must not be in the wheel: {name}"]


def test_wheel_without_its_library(tmp_path):
    names = [n for n in GOOD_WHEEL if n != "fastattn/_fastattn_ops.so"]
    assert check_wheel.problems(names) == ["missing: fastattn/_fastattn_ops.so"]
    path = tmp_path / "fastattn-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr("fastattn-0.1.0.dist-info/WHEEL", "Root-Is-Purelib: true\n")
    done = subprocess.run(
        [sys.executable, check_wheel.__file__, path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "missing: fastattn/_fastattn_ops.so" in done.stdout and "platform" in done.stdout


@pytest.mark.parametrize(
    ("paddle", "archs", "label"),
    [
        ("3.3.1", [], "paddle3.3.1.cpu"),
        ("2.6.2", ["90a"], "paddle2.6.2.sm90a"),
        ("3.4.0.dev20260101+Post-1", ["80", "100a"], "paddle3.4.0.dev20260101.post.1.sm80.sm100a"),
    ],
)
def test_local_version(paddle, archs, label):
    assert wheel.local_version(paddle, archs) == label
    assert re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", label)  # what a version may end in


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("0.1.0+paddle3.3.1.sm90a", []),
        ("0.1.0+paddle3.3.1.cpu", ["the version ends in +paddle3.3.1.cpu, not +paddle3.3.1.sm90a"]),
        ("0.1.0", ["the version ends in +, not +paddle3.3.1.sm90a"]),
    ],
)
def test_the_name_of_a_wheel_tells_its_build(tmp_path, name, wrong):
    path = tmp_path / f"fastattn-{name}-cp311-cp311-linux_x86_64.whl"
    info = project.build_info_text({"PADDLE_VERSION": "3.3.1", "ARCHS": ["90a"]})
    with zipfile.ZipFile(path, "w") as archive:
        for file in GOOD_WHEEL:
            archive.writestr(file, info if file.endswith("_build_info.py") else "")
        archive.writestr("fastattn-0.1.0.dist-info/WHEEL", "Root-Is-Purelib: false\n")
    assert check_wheel.check(path) == wrong


@needs_cxx
@pytest.mark.parametrize("commands", [["egg_info"], ["build_ext", "--cuda=off", "egg_info"]])
def test_the_version_of_a_build(tmp_path, commands):
    done = run_setup(tmp_path, *commands, "-e", str(tmp_path))
    if "fetching setuptools" in done.stdout:
        pytest.skip("setuptools is too old to build with")
    assert done.returncode == 0, done.stderr
    (info,) = tmp_path.glob("*.egg-info/PKG-INFO")
    label = wheel.local_version(toolchain.find_paddle().version, [])
    assert f"Version: {__version__}+{label}\n" in info.read_text()


def test_the_version_of_the_sources(tmp_path):
    code = "from custom_ops.builder import extension as e; import sys; " + (
        "d = e.BinaryDistribution({'name': 'fastattn', 'version': '0.1.0'}); "
        "d.commands = ['sdist']; c = e.EggInfo(d); c.egg_base = sys.argv[1]; "
        "c.finalize_options(); print(c.egg_version)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip().endswith("0.1.0"), done.stderr


def run_setup(folder, *arguments):
    return subprocess.run(
        [sys.executable, "setup_ops.py", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_build_info_is_python(tmp_path):
    info = {"COMMIT": "abc", "ARCHS": [], "OPERATORS": {"merge": ["cpu"]}, "NVCC": None}
    path = tmp_path / "_build_info.py"
    path.write_text(project.build_info_text(info))
    assert {k: v for k, v in runpy.run_path(str(path)).items() if k.isupper()} == info


# --- this package --------------------------------------------------------------------------------


def test_every_operator_of_the_library_is_discovered():
    built = {name[len("fastattn_") :] for name in _ops.load()}
    found = project.operators(CUSTOM_OPS, with_cuda=False)
    # A library named by FASTATTN_LIBRARY may be a part, as one compiles while working on a family.
    assert built <= set(found) if env.library() else built == set(found)


def test_head_dims_of_the_host_module_are_those_of_the_kernels():
    host = pytest.importorskip("fastattn._host")
    lists = set()
    for path in [*CUSTOM_OPS.glob("c*/**/*.*"), *CUSTOM_OPS.glob("api/*.cc")]:
        if path.suffix in (".cc", ".cu", ".h", ".cuh"):
            text = path.read_text(encoding="utf-8")
            lists |= set(re.findall(r"dispatch<([\d,\s]+)>\(\s*[\w.]*head_dim,", text))
    assert lists and {tuple(map(int, found.split(","))) for found in lists} == {
        tuple(host.head_dims())
    }
    for family in instances.FAMILIES:
        if "head_dim" in family.columns:
            column = list(family.columns).index("head_dim")
            assert {values[column] for values in family.arguments()} == set(host.head_dims())


def test_host_module_agrees_with_the_reference():
    host = pytest.importorskip("fastattn._host")
    assert host.block_size() == 64
    assert host.cache_types() == [
        *("none", "cache_int8", "cache_fp8", "block_wise_int8", "block_wise_fp8")
    ]
    assert host.token_slots() == layout.token_slot(np.arange(64)).tolist()


def test_kernels_include_no_paddle_header():
    for folder in ("cpu", "cuda", "params", "common"):
        for path in (CUSTOM_OPS / folder).rglob("*.*"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r'#include ["<](paddle|phi)/', text), path


def test_no_forbidden_words_in_custom_ops():
    for path in CUSTOM_OPS.rglob("*.*"):
        if path.suffix in (".cc", ".cu", ".h", ".cuh"):
            text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
            assert not re.search(r"\bconst_cast\b|\bgetenv\b|\b(exit|abort)\s*\(", text), path


@needs_nvcc
def test_dummy_kernel_compiles_for_its_architectures(tmp_path):
    make(tmp_path, {"cuda/k.cu": "__global__ void K(float* x) { x[0] += 1.0f; }\n"})
    flags = [
        f for f in toolchain.nvcc_flags(CUDA, ["90a"]) if f not in ("-Xfatbin", "-compress-all")
    ]
    command = (str(CUDA.nvcc), *flags)  # uncompressed, so that the architecture can be read
    unit = Unit("cuda/k.cu", "cuda/k.cu", tmp_path / "objects" / "k.o", command)
    lines: list[str] = []
    for expected in ({"cuda/k.cu"}, set()):
        done = compile_all([unit], tmp_path, tmp_path / "objects", say=lines.append)
        assert set(done) == expected, lines
    assert b"sm_90a" in unit.object.read_bytes()


@needs_nvcc
@pytest.mark.slow
def test_api_sources_compile_with_cuda(tmp_path):
    """As in a build with a CUDA Paddle of this version; needs only CUDA's headers."""
    build = project.Build("on", replace(toolchain.find_paddle(), with_cuda=True))
    build.objects = tmp_path
    for unit in build.units(build.extensions()[:1]):
        if unit.name.startswith("api/"):
            command = [*unit.compiler, "-fsyntax-only", unit.source]
            done = subprocess.run(command, cwd=CUSTOM_OPS, capture_output=True, text=True)
            assert done.returncode == 0, f"{unit.name}:\n{done.stderr}"
