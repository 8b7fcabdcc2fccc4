#!/usr/bin/env python3
"""Build FastDeploy's attention operators without Paddle, to time them against fastattn's.

    scripts/build_fastdeploy_peers.py --tree FASTDEPLOY --out DIR [--arch sm_90a] [--jobs 2]

FASTDEPLOY is a source tree of FastDeploy 2.6. Its files are compiled unchanged, against a small
stand-in for Paddle's extension header (`scripts/fastdeploy_peers/include`). Only a copy of the
decode writer's file is cut before the instantiations that nothing here calls. DIR gets
`libfastdeploy_peers.so` and `build.json`, which lists what the library has and lacks; the compiled
files stay in `objects`. The build needs no GPU. `scripts/fastdeploy_peers/time_step.py` runs the
library on one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent / "fastdeploy_peers"
#: Query heads per KV head, and head dimension, of the models of `bench --op step`.
SHAPES = {
    (4, 128): "Qwen3-8B",
    (8, 128): "ERNIE-4.5-300B TP8, PaddleOCR-VL",
    (8, 64): "gpt-oss-120b",
}
#: Cache type -> bytes of an element, whether FP8, whether there are scales per token.
QUANTS = {
    "none": (2, False, False),
    "cache_int8": (1, False, False),
    "cache_fp8": (1, True, False),
    "block_wise_fp8": (1, True, True),
}
#: Headers that FastDeploy's files include but do not need, because `paddle/extension.h` has
#: everything.
EMPTY = (
    "glog/logging.h",
    "paddle/phi/backends/context_pool.h",
    "paddle/phi/backends/gpu/cuda/cuda_graph_with_memory_pool.h",
    "paddle/phi/backends/gpu/gpu_info.h",
    "paddle/phi/core/allocator.h",
    "paddle/phi/core/cuda_stream.h",
    "paddle/phi/core/dense_tensor.h",
    "paddle/phi/core/memory/memcpy.h",
)
#: Headers of which only one or two names are used.
SMALL = {
    "nvml.h": "#pragma once\n",
    "nlohmann/json.hpp": (
        "#pragma once\n#include <istream>\n#include <string>\nnamespace nlohmann {\n"
        "struct json {\n  bool contains(const std::string&) const { return false; }\n"
        "  const json& at(const std::string&) const { return *this; }\n"
        "  template <typename T> operator T() const { return T(); }\n};\n"
        "inline std::istream& operator>>(std::istream& from, json&) { return from; }\n}\n"
    ),
    "cute/tensor.hpp": (
        "#pragma once\nnamespace cute {\n"
        "inline __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }\n}\n"
    ),
}
#: The file of the decode writer, and the line of its first instantiation.
WRITER = "append_attn/decoder_write_cache_with_rope_kernel.cu"
CUT = "\ntemplate void DecoderWriteCacheWithRoPEKernel<"


class Unit(NamedTuple):
    """A file to compile, its purpose, and the macros that it needs."""

    name: str
    holds: str
    source: Path
    macros: tuple[str, ...] = ()


def cut_writer(text: str) -> str:
    """The decode writer's file with one instantiation, bf16, instead of its own ones."""
    before, found, after = text.partition(CUT)
    if not found:
        raise ValueError(f"no instantiation in {WRITER}: not a tree of FastDeploy 2.6")
    arguments = after[after.index("(") : after.index(";") + 1]
    kept = "paddle::bfloat16, paddle::bfloat16, false>"
    return f"{before}{CUT}{kept}{arguments}\n"


def instances_missing(tree: Path, group: int, dim: int, quant: str) -> str:
    """Reason why FastDeploy's own list does not instantiate a kernel; empty if it does."""
    listed = json.loads((tree / "append_attn" / "template_config.json").read_text())
    kernel = "multiquery_attention_c16" if quant == "none" else "multiquery_attention_c8"
    has = listed[kernel]["dispatch_params"]
    for name, value in (("GROUP_SIZE", group), ("HEAD_DIM", dim)):
        if value not in has[name]:
            return f"FastDeploy instantiates {kernel} for {name} {has[name]} only"
    return ""


def units(tree: Path, scratch: Path) -> tuple[list[Unit], dict[str, str]]:
    """All files of the library (the cut one is written to `scratch`), and what FastDeploy lacks."""
    writer = scratch / "writer.cu"
    writer.write_text(cut_writer((tree / WRITER).read_text()))
    made = [
        Unit("append", "append_attention_with_output, encoder writers", SOURCES / "append.cu"),
        Unit("writer", "decoder writers", writer),
        Unit(
            "prefill",
            "gqa_rope_write_cache, merge_prefill_decode_output",
            SOURCES / "prefill.cu",
        ),
        Unit("split", "get_block_shape_and_split_kv_block", SOURCES / "split.cu"),
    ]
    lacking = {}
    for (group, dim), model in SHAPES.items():
        for quant, (width, fp8, dynamic) in QUANTS.items():
            macros = (
                f"PEER_GROUP={group}",
                f"PEER_DIM={dim}",
                f"PEER_BYTES={width}",
                f"PEER_FP8={str(fp8).lower()}",
                f"PEER_DYNAMIC={str(dynamic).lower()}",
            )
            name = f"attention_{group}_{dim}_{quant}"
            holds = f"{quant}, {group} query heads per KV head of {dim} ({model})"
            why = instances_missing(tree, group, dim, quant)
            if why:
                lacking[holds] = why
            else:
                made.append(Unit(name, holds, SOURCES / "attention.cu", macros))
    return made, lacking


def write_headers(folder: Path) -> None:
    """Headers that stand in for the libraries that FastDeploy's files include."""
    for name, text in {**dict.fromkeys(EMPTY, "#pragma once\n"), **SMALL}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def compile_unit(unit: Unit, nvcc: str, tree: Path, scratch: Path, arch: str) -> str:
    """Compile a file to an object; return the compiler's output if it failed, else nothing."""
    folders = (SOURCES / "include", scratch / "include", SOURCES, tree, tree / "append_attn")
    options = ["-O3", "-std=c++17", f"-arch={arch}", "--expt-relaxed-constexpr", "-DNDEBUG"]
    options += ["--expt-extended-lambda", "-Xcompiler", "-fPIC", "-w"]
    options += ["-static-global-template-stub=false", "-DPADDLE_ON_INFERENCE", "-DENABLE_BF16"]
    options += [f"-D{macro}" for macro in unit.macros]
    options += [part for folder in folders for part in ("-I", str(folder))]
    target = scratch / f"{unit.name}.o"
    since = max(path.stat().st_mtime for path in (unit.source, *SOURCES.glob("include/*/*")))
    if target.exists() and target.stat().st_mtime > since and unit.source.parent == SOURCES:
        return ""
    command = [nvcc, *options, "-c", str(unit.source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    return "" if result.returncode == 0 else (result.stderr or result.stdout)


def first_error(text: str) -> str:
    """The first error in a compiler's output."""
    return next((line for line in text.splitlines() if "error" in line), text[:300])


def build(tree: Path, out: Path, nvcc: str, arch: str, jobs: int) -> dict[str, str]:
    """Compile and link all files that compile; return what the library lacks -> the reason."""
    operators = tree / "custom_ops" / "gpu_ops"
    scratch = out / "objects"
    write_headers(scratch / "include")
    todo, left_out = units(operators, scratch)
    built = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        said = pool.map(lambda u: compile_unit(u, nvcc, operators, scratch, arch), todo)
        for unit, text in zip(todo, said):
            print(f"{unit.name}: {'failed' if text else 'built'}", flush=True)
            if text:
                left_out[unit.holds] = first_error(text)
                (scratch / f"{unit.name}.log").write_text(text)
            else:
                built.append(unit)
    # Lazy binding: symbols that nothing here calls (fp16, INT4, speculation) stay undefined.
    link = [nvcc, "-shared", f"-arch={arch}", "-Xlinker", "-z,lazy"]
    link += [str(scratch / f"{unit.name}.o") for unit in built]
    subprocess.run([*link, "-o", str(out / "libfastdeploy_peers.so")], check=True)
    report = {"arch": arch, "built": {u.name: u.holds for u in built}, "left_out": left_out}
    (out / "build.json").write_text(json.dumps(report, indent=1) + "\n")
    return left_out


def main() -> None:
    """Build from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, required=True, help="FastDeploy's source tree")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--arch", default="sm_90a", help="GPU architecture, default: sm_90a")
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of files compiled at once, default: 2"
    )
    arguments = parser.parse_args()
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else "nvcc"
    tree, out = arguments.tree.resolve(), arguments.out.resolve()
    for holds, why in build(tree, out, nvcc, arguments.arch, arguments.jobs).items():
        print(f"not in the library: {holds}: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
