"""The builder, on tiny projects of its own; the CUDA parts where nvcc is installed."""

from __future__ import annotations

import fcntl
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from custom_ops.builder import instances, project, toolchain
from custom_ops.builder.toolchain import BuildError
from fastattn import _ops, env
from fastattn.functional._cache_types import CACHE_QUANT_TYPES, HEAD_DIMS
from fastattn.reference import layout
from fastattn.version import __version__
from tests.support import ROOT
from tests.support.toolkit import make_toolkit

CUSTOM_OPS = ROOT / "custom_ops"
needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
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
        ("None", []),
    ],
)
def test_architectures_that_are_asked_for(monkeypatch, text, archs):
    monkeypatch.setenv("FASTATTN_ARCHS", text)
    assert toolchain.find_archs() == archs


@pytest.mark.parametrize("text", [None, "  "])
def test_architectures_of_the_gpus(monkeypatch, tmp_path, text):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("FASTATTN_ARCHS", raising=False)
    if text is not None:
        monkeypatch.setenv("FASTATTN_ARCHS", text)
    assert toolchain.find_archs() == ["90a"]  # no nvidia-smi
    fake = tmp_path / "nvidia-smi"
    for answer, archs in (
        ("printf '9.0\\n9.0\\n8.9\\n12.0\\n'", ["90a", "89", "120a"]),
        ("echo 'no driver'; exit 9", ["90a"]),
    ):
        fake.write_text(f"#!/bin/sh\n{answer}\n")
        fake.chmod(0o755)
        assert toolchain.find_archs() == archs


# --- flags and tools -----------------------------------------------------------------------------


def test_flags_of_the_library():
    for flag in ("-O3", "-DNDEBUG", "-std=c++17", "-ffp-contract=off", "-DPADDLE_NO_PYTHON"):
        assert flag in toolchain.CXX_FLAGS
    assert not any(f.startswith("-march") for f in toolchain.CXX_FLAGS)


def test_flags_of_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "g++-12 -m64")
    newer = toolchain.Cuda(make_toolkit(tmp_path / "13", "13.0"), ["90a", "80"])
    assert newer.version == "13.0" and newer.nvcc == f"{tmp_path}/13/bin/nvcc"
    assert "-static-global-template-stub=false" in newer.flags
    assert newer.flags[-4:] == [
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_80,code=sm_80"),
    ]
    older = toolchain.Cuda(make_toolkit(tmp_path / "12", "12.4"), ["90a"])
    assert "-static-global-template-stub=false" not in older.flags
    for flags in (newer.flags, older.flags):
        assert "-O3" in flags and "-DFASTATTN_WITH_CUDA" in flags
        assert flags[flags.index("-ccbin") + 1] == "g++-12"
        assert not any("use_fast_math" in f or "-lineinfo" in f for f in flags)  # 115 MB, not 40


def test_jobs(monkeypatch):
    monkeypatch.setenv("FASTATTN_ARCHS", "none")
    monkeypatch.setenv("MAX_JOBS", "")
    assert project.Build().jobs == str(os.cpu_count())
    monkeypatch.setenv("MAX_JOBS", " 3")
    assert project.Build().jobs == "3"
    for text in ("many", "0"):
        monkeypatch.setenv("MAX_JOBS", text)
        with pytest.raises(BuildError, match="MAX_JOBS: expected a number"):
            project.Build()


def test_find_cuda_takes_the_toolkit_it_is_told(tmp_path, monkeypatch):
    home = make_toolkit(tmp_path / "told", "12.6")
    monkeypatch.setenv("CUDA_PATH", make_toolkit(tmp_path / "other", "12.6"))
    monkeypatch.setenv("CUDA_HOME", home)
    assert toolchain.find_cuda() == home
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert toolchain.find_cuda() is None


def test_find_cuda_looks_for_headers_beside_nvcc(tmp_path, monkeypatch):
    """One in PATH may be a link into a toolkit, or a script that calls another one."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    home = make_toolkit(tmp_path / "toolkit", "12.6")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(f"{home}/bin/nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    assert toolchain.find_cuda() == home
    os.remove(f"{home}/include/cuda_runtime.h")
    assert toolchain.find_cuda() in (None, "/usr/local/cuda")


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -m64")
    assert toolchain.find_cxx() == ["g++", "-m64"]
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BuildError, match=r"C\+\+ compiler"):
        toolchain.find_cxx()


# --- sources -------------------------------------------------------------------------------------


def make(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_sources_of_this_package(monkeypatch):
    monkeypatch.setenv("FASTATTN_ARCHS", "none")
    with pytest.raises(BuildError, match="--only: other builds than --cuda=virtual"):
        project.Build(only="cuda/topk")
    build = project.Build()
    found = [path.relative_to(CUSTOM_OPS).as_posix() for path in CUSTOM_OPS.rglob("*.cc")]
    assert build.sources == sorted(set(found) - set(project.MODULES.values()))
    assert build.sources[0].startswith("api/") and build.sources[-1].startswith("cpu/")
    library, *modules = build.extensions()
    assert library.sources == [f"custom_ops/{source}" for source in build.sources]
    assert [m.name for m in modules] in ([], [*project.MODULES])  # without and with Python.h
    assert not library.runtime_library_dirs and "-w" not in library.extra_compile_args["cxx"]


# --- compiling -----------------------------------------------------------------------------------


class Project:
    """A folder of C++ sources, as an extension that a `Build` compiles."""

    def __init__(self, folder, files, monkeypatch):
        self.root, self.objects = folder / "custom_ops", folder / "objects"
        self.objects.mkdir(parents=True)
        make(self.root, files)
        monkeypatch.setattr(project, "CUSTOM_OPS", self.root)
        self.names = [name for name in files if name.endswith(".cc")]

    def build(self, *flags, jobs=1, compiler="g++ 12", names=None):
        """Names of what was compiled."""
        tools = SimpleNamespace(cxx=["g++", "-I."], cuda=None, cxx_version=compiler, paddle="3.3.1")
        tools.objects, tools.jobs, tools.object_of = self.objects, jobs, {}
        sources = [f"custom_ops/{name}" for name in names or self.names]
        extension = SimpleNamespace(sources=sources, include_dirs=[])
        extension.extra_compile_args = {"cxx": [*flags]}
        self.seconds = project.Build.compile(tools, [extension])
        paths = [f"{self.objects}/{name}.o" for name in names or self.names]
        assert list(tools.object_of.values()) == paths and all(map(os.path.exists, paths))
        return {name for _, name in self.seconds}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    files = {
        "a.cc": '#include "sub/shared.h"\nint a() { return kShared; }\n',
        "sub/b.cc": '#include "only b.h"\nint b() { return kOnly; }\n',
        "sub/shared.h": '#include "sub/deep.h"\n',
        "sub/deep.h": "constexpr int kShared = 1;\n",
        "only b.h": "constexpr int kOnly = 1;\n",
    }
    return Project(tmp_path, files, monkeypatch)


@needs_cxx
def test_progress_lines(tiny, capfd):
    assert tiny.build() == {"a.cc", "sub/b.cc"}
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    for i, (line, name) in enumerate(zip(lines, tiny.names)):
        assert re.fullmatch(rf"\[{i + 1}/2\] \d+\.\d+ s  {re.escape(name)}", line)
    assert min(tiny.seconds)[0] > 0 and tiny.seconds == sorted(tiny.seconds, reverse=True)


@needs_cxx
def test_nothing_to_do(tiny, capfd):
    tiny.build()
    capfd.readouterr()
    assert tiny.build() == set()
    assert capfd.readouterr().out == "ninja: no work to do.\n"


@needs_cxx
def test_touched_header_rebuilds_what_includes_it(tiny):
    tiny.build()
    (tiny.root / "sub/deep.h").write_text("constexpr int kShared = 2;\n")
    assert tiny.build() == {"a.cc"}
    (tiny.root / "only b.h").write_text("constexpr int kOnly = 2;\n")
    assert tiny.build() == {"sub/b.cc"}


@needs_cxx
def test_a_changed_header_from_the_past_rebuilds(tiny):
    """As an archive leaves it that is unpacked over an older tree."""
    tiny.build()
    header = tiny.root / "sub/deep.h"
    header.write_text("constexpr int kShared = 3;\n")
    os.utime(header, (1, 1))
    assert tiny.build() == {"a.cc"}
    assert tiny.build() == set()


@needs_cxx
def test_a_header_that_is_new_keeps_its_time(tiny):
    """Objects of another Paddle, which were made since, are not made again."""
    tiny.build()
    header = tiny.root / "sub/deep.h"
    header.write_text("constexpr int kShared = 3;\n")
    before = header.stat().st_mtime_ns
    tiny.build()
    assert header.stat().st_mtime_ns == before


@needs_cxx
def test_changed_commands_rebuild_everything(tiny):
    tiny.build("-O1")
    assert tiny.build("-O2") == {"a.cc", "sub/b.cc"}
    assert tiny.build("-O2", compiler="g++ 13") == {"a.cc", "sub/b.cc"}


@needs_cxx
def test_lost_object_or_removed_header_rebuilds(tiny):
    tiny.build()
    (tiny.objects / "a.cc.o").unlink()
    assert tiny.build() == {"a.cc"}
    (tiny.root / "only b.h").unlink()
    with pytest.raises(BuildError):
        tiny.build()


@needs_cxx
def test_a_touched_header_rebuilds_too(tiny):
    tiny.build()
    os.utime(tiny.root / "sub/deep.h")
    assert tiny.build() == {"a.cc"}


@needs_cxx
def test_first_failure_stops_and_shows_the_message(tiny, capfd):
    make(tiny.root, {"bad.cc": "int broken( { }\n", "never.cc": "int never;\n"})
    with pytest.raises(BuildError, match=r"a source does not compile; .* message is above"):
        tiny.build(names=["a.cc", "bad.cc", "never.cc"])
    lines = capfd.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAILED: "))
    assert lines[at].rstrip().endswith("bad.cc.o") and " -c bad.cc -o " in lines[at + 1]
    assert re.match(r"bad\.cc:1:.* error:", lines[at + 2])
    assert any("int broken( { }" in line for line in lines[at:])  # what the compiler quotes
    assert not (tiny.objects / "never.cc.o").exists()
    assert tiny.build(names=["a.cc"]) == set()  # what was done stays done


@needs_cxx
def test_only_the_first_of_several_messages_is_shown(tiny, capfd):
    make(tiny.root, {f"bad{i}.cc": f"#error number {i}\n" for i in range(2)})
    with pytest.raises(BuildError):
        tiny.build(names=["bad0.cc", "bad1.cc"], jobs=2)
    message = capfd.readouterr().out
    assert message.count("FAILED: ") == 1 and len(re.findall("error: #error number", message)) == 1


@needs_cxx
def test_warnings_are_shown(tiny, capfd):
    make(tiny.root, {"a.cc": "#warning look here\n"})
    tiny.build(names=["a.cc"])
    assert "look here" in capfd.readouterr().out


def test_a_source_that_is_missing_is_named(tiny, capfd):
    with pytest.raises(BuildError):
        tiny.build(names=["none.cc"])
    assert re.search(r"none\.cc.*missing", capfd.readouterr().err)


@needs_cxx
def test_folders_with_spaces(tmp_path, monkeypatch):
    files = {"a.cc": '#include "in $ it/c d.h"\n', "in $ it/c d.h": "int one;\n"}
    spaced = Project(tmp_path / "with a: space", files, monkeypatch)
    assert spaced.build('-DTEXT="$x  y"') == {"a.cc"}
    assert spaced.build('-DTEXT="$x  y"') == set()
    (spaced.root / "in $ it/c d.h").write_text("int two;\n")
    assert spaced.build('-DTEXT="$x  y"') == {"a.cc"}


@needs_cxx
def test_parallel_build_counts_every_source(tmp_path, monkeypatch, capfd):
    six = Project(tmp_path, {f"f{i}.cc": f"int f{i};\n" for i in range(6)}, monkeypatch)
    assert len(six.build(jobs=3)) == 6
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"[{i}/6]" for i in range(1, 7)]


# --- setuptools' commands -------------------------------------------------------------------------


@needs_cxx
@pytest.mark.parametrize("commands", [["dist_info"], ["--cuda=off", "dist_info"], ["egg_info"]])
def test_the_version_of_a_build(tmp_path, commands):
    """The sources, which `egg_info` alone is of, fit every Paddle."""
    folder = "-e" if "egg_info" in commands else "-o"
    done = run_setup(*commands, folder, str(tmp_path), FASTATTN_ARCHS="none")
    if "fetching setuptools" in done.stdout:
        pytest.skip("setuptools is too old to build with")
    assert done.returncode == 0, done.stderr
    info = next(path for path in tmp_path.rglob("*") if path.name in ("PKG-INFO", "METADATA"))
    label = project.local_version(paddle.__version__, [])
    version = __version__ if "egg_info" in commands else f"{__version__}+{label}"
    assert f"Version: {version}\n" in info.read_text()


def run_setup(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "setup_ops.py", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environ},
    )


@needs_cxx
def test_an_option_of_cuda_that_is_none(tmp_path):
    done = run_setup("build_ext", "--cuda=maybe", f"--build-lib={tmp_path}")
    if "fetching setuptools" in done.stdout:
        pytest.skip("setuptools is too old to build with")
    assert done.returncode != 0 and "argument --cuda: invalid choice: 'maybe'" in done.stderr


@needs_cxx
def test_a_second_build_waits(tmp_path, monkeypatch):
    extension = pytest.importorskip("custom_ops.builder.extension", reason="needs setuptools")
    monkeypatch.setenv("FASTATTN_ARCHS", "none")
    monkeypatch.setattr(project, "ROOT", tmp_path)  # objects are elsewhere
    folder = project.Build().objects
    folder.mkdir(parents=True)
    said, ran = threading.Event(), []
    monkeypatch.setattr(extension, "print", lambda *_, **__: said.set(), raising=False)
    monkeypatch.setattr(extension.setuptools, "setup", lambda **options: ran.append(options))
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=extension.run, args=(["build_ext"], True, False))
        second.start()
        assert said.wait(60) and not ran  # "another build is running"
    second.join()
    assert len(ran) == 1


def test_build_info_is_python(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_ARCHS", "none")
    path = tmp_path / "_build_info.py"
    path.write_text(project.Build().info())
    info = {k: v for k, v in runpy.run_path(str(path)).items() if k.isupper()}
    assert info["PADDLE_VERSION"] == paddle.__version__ and info["ARCHS"] == []
    assert info["WITH_CUDA"] is False and info["NVCC"] is None
    assert info["OPERATORS"]["quantize_fp8"] == ["cpu"]
    assert info["NUM_SOURCES"] > info["NUM_CUDA_SOURCES"] == 0
    assert "-ffp-contract=off" in info["FLAGS"] and info["CXX"] and info["PLATFORM"]


# --- this package --------------------------------------------------------------------------------


def test_every_operator_of_the_library_is_discovered():
    built = {name[len("fastattn_") :] for name in _ops.load()}
    found = project.operators()
    # A library named by FASTATTN_LIBRARY may be a part, as one compiles while working on a family.
    assert built <= set(found) if env.library() else built == set(found)


def test_head_dims_of_the_host_module_are_those_of_the_kernels():
    host = pytest.importorskip("fastattn._host")
    dims = set(host.head_dims())
    assert dims == set(HEAD_DIMS)
    for path in [*CUSTOM_OPS.glob("c*/**/*.*"), *CUSTOM_OPS.glob("api/*.cc")]:
        if path.suffix in (".cc", ".cu", ".h", ".cuh"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"dispatch<[\d,\s]+>\(\s*[\w.]*head_dim,", text), path
    support = (CUSTOM_OPS / "plan/wgmma_support.h").read_text(encoding="utf-8")

    def listed(name: str) -> set[int]:
        (found,) = re.findall(rf"using {name} = HeadDimList<([\d, ]+)>", support)
        return {int(dim) for dim in found.split(",")}

    attention = "cuda/attention"
    expected = {
        f"{attention}/mma_sm80": dims,
        f"{attention}/mma_sm80/invariant": dims,
        f"{attention}/mma_sm80/general": dims,
        f"{attention}/wgmma_sm90/fp8": listed("WgmmaFp8HeadDims"),
        f"{attention}/wgmma_sm90/q16": listed("Wgmma16BitHeadDims"),
    }
    for family in instances.FAMILIES:
        if "head_dim" in family.columns:
            column = list(family.columns).index("head_dim")
            assert {values[column] for values in family.arguments()} == expected.pop(family.folder)
    assert not expected


def test_a_build_may_be_limited_to_some_head_dims(monkeypatch):
    monkeypatch.setenv("FASTATTN_HEAD_DIMS", "64, 192")
    assert instances.head_dims() == (64, 192)
    assert instances.head_dim_bits() == 1 << 2 | 1 << 6
    compiled = {name for name in instances.sources() if "attention/mma_sm80/bf16_" in name}
    assert {int(re.search(r"bf16_(\d+)", name)[1]) for name in compiled} == {64, 192}
    # of no such dimension
    assert any("mla/sparse_attention" in name for name in instances.sources())
    for extension in project.Build("off").extensions():
        assert "-DFASTATTN_HEAD_DIM_BITS=68" in extension.extra_compile_args["cxx"], extension.name
    for names in ("96,256", "64,80", "wide"):
        monkeypatch.setenv("FASTATTN_HEAD_DIMS", names)
        with pytest.raises(ValueError, match="FASTATTN_HEAD_DIMS: expected some of 64, 96, 128"):
            instances.head_dims()
    monkeypatch.delenv("FASTATTN_HEAD_DIMS")
    assert instances.head_dims() == instances.ALL_HEAD_DIMS == (64, 96, 128, 192, 256)


def test_host_module_agrees_with_the_reference():
    host = pytest.importorskip("fastattn._host")
    assert host.block_size() == 64
    assert host.cache_types() == list(CACHE_QUANT_TYPES)
    assert host.token_slots() == layout.token_slot(np.arange(64)).tolist()


def test_kernels_include_no_paddle_header():
    for folder in ("cpu", "cuda", "params", "common", "formats"):
        for path in (CUSTOM_OPS / folder).rglob("*.*"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r'#include ["<](paddle|phi)/', text), path


def test_no_forbidden_words_in_custom_ops():
    for path in CUSTOM_OPS.rglob("*.*"):
        if path.suffix in (".cc", ".cu", ".h", ".cuh"):
            text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
            assert not re.search(r"\bconst_cast\b|\bgetenv\b|\b(exit|abort)\s*\(", text), path


def test_every_operator_has_a_kernel_for_gpus():
    """What ``_build_info.py`` says of a CUDA build: the family of each includes launchers.

    A file's family is what its name begins, and what it includes.
    """
    texts = {path.stem: path.read_text(encoding="utf-8") for path in CUSTOM_OPS.glob("api/*.cc")}
    for stem, text in texts.items():
        included = re.findall(r'#include "api/(\w+)\.h"', text)
        family = [
            other
            for name, other in texts.items()
            if (name + "_").startswith(stem + "_") or name in included
        ]
        if re.search(r"^FASTATTN_OPERATOR\(", text, re.M):
            assert any('#include "cuda/' in other for other in family), stem


@pytest.fixture
def cuda_build(monkeypatch):
    """As with a CUDA Paddle of this version; compiling needs only CUDA's headers."""
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setenv("FASTATTN_ARCHS", "90a")
    return project.Build("on")


@needs_nvcc
def test_dummy_kernel_compiles_for_its_architectures(tmp_path, monkeypatch, cuda_build):
    make(tmp_path, {"custom_ops/cuda/k.cu": "__global__ void K(float* x) { x[0] += 1.0f; }\n"})
    monkeypatch.setattr(project, "CUSTOM_OPS", tmp_path / "custom_ops")
    cuda_build.objects = tmp_path
    # Uncompressed, so that the architecture can be read.
    flags = [f for f in cuda_build.cuda.flags if f not in ("-Xfatbin", "-compress-all")]
    extension = SimpleNamespace(sources=["custom_ops/cuda/k.cu"], include_dirs=[])
    extension.extra_compile_args = {"cxx": [], "nvcc": flags}
    for expected in (["cuda/k.cu"], []):
        assert [name for _, name in cuda_build.compile([extension])] == expected
    assert b"sm_90a" in (tmp_path / "cuda/k.cu.o").read_bytes()


@needs_nvcc
@pytest.mark.slow
def test_api_sources_compile_with_cuda(tmp_path, cuda_build):
    cuda_build.objects = tmp_path
    library = cuda_build.extensions()[0]
    library.sources = [s for s in library.sources if s.startswith("custom_ops/api/")]
    cuda_build.compile([library])
