"""Which folders of custom_ops may include which, read from the sources: no compiler, no GPU."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

CUSTOM_OPS = Path(__file__).parents[2] / "custom_ops"
SUFFIXES = {".h", ".cuh", ".cc", ".cu"}

# Every folder below cuda/, and the folders or single headers that it may include besides its own,
# common/, formats/, params/ and plan/. A folder that is new needs a line here.
CACHE = ("cuda/common", "cuda/cache/shared")
WGMMA = ("cuda/common", "cuda/attention/shared", "cuda/attention/wgmma_sm90/common")
CUDA = {
    "cuda/common": (),
    "cuda/merge": ("cuda/common", "cuda/merge/shared"),
    "cuda/merge/shared": ("cuda/common",),
    "cuda/merge_many": ("cuda/common",),
    "cuda/cache/shared": ("cuda/common",),
    "cuda/cache/append": CACHE,
    "cuda/cache/convert": CACHE,
    "cuda/cache/rope_write": CACHE,
    "cuda/block_summaries": ("cuda/common",),
    "cuda/compact_tables": ("cuda/common",),
    "cuda/compat/gqa_rope": (*CACHE, "cuda/cache/append/launch.h"),
    "cuda/compat/merge_decode": CACHE,
    "cuda/attention": (
        "cuda/common",
        "cuda/attention/shared",
        "cuda/attention/mma_sm80/launch.h",
        "cuda/attention/split_kv/launch.h",
        "cuda/attention/wgmma_sm90/fp8/launch.h",
        "cuda/attention/wgmma_sm90/q16/launch.h",
    ),
    "cuda/attention/shared": ("cuda/common", "cuda/merge/shared"),
    "cuda/attention/split_kv": (
        "cuda/common",
        "cuda/merge/shared",
        "cuda/attention/shared",
        "cuda/attention/split_kv/shared",
    ),
    "cuda/attention/split_kv/shared": (
        "cuda/common",
        "cuda/merge/shared",
        "cuda/attention/shared",
    ),
    "cuda/attention/mma_sm80": (
        "cuda/common",
        "cuda/attention/shared",
        "cuda/attention/split_kv/shared",
    ),
    "cuda/attention/dequantize_kv": (
        "cuda/common",
        "cuda/attention/shared",
        "cuda/cache/append/launch.h",
    ),
    "cuda/attention/quantize_q": ("cuda/common",),
    "cuda/attention/query_transform": ("cuda/common",),
    "cuda/attention/wgmma_sm90/common": ("cuda/common", "cuda/attention/shared"),
    "cuda/attention/wgmma_sm90/fp8": WGMMA,
    "cuda/attention/wgmma_sm90/q16": WGMMA,
    "cuda/host_calls": (),
    "cuda/index_maps": ("cuda/common",),
    "cuda/indexer": ("cuda/common",),
    "cuda/indexer_topk": ("cuda/common",),
    "cuda/mqa_logits": ("cuda/common",),
    "cuda/mla/sparse_attention": ("cuda/common", "cuda/mla/sparse_attention/wgmma_sm90"),
    "cuda/mla/sparse_attention/wgmma_sm90": ("cuda/common",),
    "cuda/mla/cache": ("cuda/common",),
    "cuda/mla/attention": ("cuda/common",),
    "cuda/mla/output": ("cuda/common",),
    "cuda/mxfp4": ("cuda/common",),
    "cuda/quantize": ("cuda/common",),
    "cuda/sparse_attention": ("cuda/common", "cuda/attention/shared"),
    "cuda/topk": ("cuda/common",),
}
# The folders above the kernels.
HOST = {
    "formats": (),
    "common": ("formats",),
    "params": ("common", "formats"),
    "plan": ("common", "formats", "params"),
    "cpu": ("common", "formats", "params"),
}


# Operators of other packages, and the only sources beside cuda/compat itself that include it.
COMPAT = {"api/gqa_rope.cc", "api/merge_decode.cc"}


def includes() -> set[tuple[str, str]]:
    """Pairs (folder, included header), both relative to custom_ops."""
    found = set()
    for path in CUSTOM_OPS.rglob("*"):
        if path.suffix in SUFFIXES:
            folder = path.parent.relative_to(CUSTOM_OPS).as_posix()
            for header in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text("utf-8"), re.M):
                found.add((folder, header))
    return found


def folder_of(header: str) -> str:
    return Path(header).parent.as_posix()


def arrows() -> list[tuple[str, str]]:
    """Includes across folders."""
    return sorted(
        (folder, header)
        for folder, header in includes()
        if (CUSTOM_OPS / header).exists() and folder_of(header) != folder
    )


def test_every_include_names_its_header_from_custom_ops():
    for folder, header in includes():
        if not header.startswith("paddle/"):
            if header.endswith("/instances.h"):
                continue  # written by the build
            assert (CUSTOM_OPS / header).exists(), f'{folder} includes "{header}"'


def test_every_folder_of_kernels_is_in_the_table():
    folders = {
        path.parent.relative_to(CUSTOM_OPS).as_posix()
        for path in (CUSTOM_OPS / "cuda").rglob("*")
        if path.suffix in SUFFIXES
    }
    assert folders <= CUDA.keys()


def test_includes_follow_the_table():
    wrong = []
    for folder, header in arrows():
        if folder in CUDA:
            allowed = ("common", "formats", "params", "plan", *CUDA[folder])
        elif folder in HOST:
            allowed = HOST[folder]
        else:
            continue
        if header not in allowed and folder_of(header) not in allowed:
            wrong.append(f"{folder} -> {header}")
    assert not wrong


def test_headers_for_others_are_shared_or_launchers():
    """A kernel's own headers serve its own folder only."""
    wrong = [
        f"{folder} -> {header}"
        for folder, header in arrows()
        if header.startswith("cuda/")
        and Path(header).parent.name not in ("shared", "common")
        and Path(header).name != "launch.h"
    ]
    assert not wrong


def test_only_operators_of_other_packages_include_compat():
    found = set()
    for path in CUSTOM_OPS.rglob("*"):
        name = path.relative_to(CUSTOM_OPS).as_posix()
        if path.suffix in SUFFIXES and "/compat/" not in name:
            text = path.read_text("utf-8")
            if re.search(r'^\s*#\s*include "(?:[^"]*/)?compat/', text, re.M):
                found.add(name)
    assert found == COMPAT


def test_no_folder_includes_one_that_includes_it():
    graph = defaultdict(set)
    for folder, header in arrows():
        graph[folder].add(folder_of(header))

    def walk(folder: str, path: tuple[str, ...]) -> None:
        if folder in path:
            pytest.fail(" -> ".join((*path[path.index(folder) :], folder)))
        for other in sorted(graph[folder]):
            walk(other, (*path, folder))

    for folder in sorted(graph):
        walk(folder, ())
