"""The table of kernel variants, and the sources that are generated from it.

A launcher is a function template, and its variants are compiled in separate files. A row of
`FAMILIES` lists variants. `write` generates from the rows

- the ``.cu`` files with their explicit instantiations, and
- a header ``instances.h`` for each family, the list from which ``dispatch`` chooses
  (``common/instances.h``),

so that the compiled variants are always the ones that can be chosen. CONTRIBUTING.md describes how
to add one.

    python custom_ops/builder/instances.py    # writes build/generated, as every build does
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Union

Value = Union[str, int, bool]
Cell = Union[Value, tuple[Value, ...]]

HEADER = "// Written by custom_ops/builder/instances.py.\n"

#: A cell with the value of the column before: K and V have the same codes.
SAME = "kSame"


@dataclass(frozen=True)
class Family:
    """A launcher and the template arguments with which it is compiled."""

    folder: str
    launcher: str  # a function template
    takes: str  # types of its parameters
    declared: str  # header, in `folder` unless it has slashes
    defined: str  # header, in `folder` unless it has slashes
    columns: dict[str, str]  # names and types of its template parameters
    rows: tuple[tuple[Cell, ...], ...]  # a cell with several values stands for one row per value
    namespace: str = "fastattn::cuda"
    together: str = ""  # the column whose values share a file

    @property
    def list_name(self) -> str:
        """Name of the list of instances."""
        return re.sub(r"^Launch|Variant$", "", self.launcher) + "Instances"

    def header(self, name: str) -> str:
        """Path of a header: in the folder, unless its name has slashes."""
        return name if "/" in name else f"{self.folder}/{name}"

    def arguments(self) -> list[tuple[Value, ...]]:
        """Template arguments of every instance, without the head dimensions that are left out."""
        left_out = set(ALL_HEAD_DIMS) - set(head_dims())
        cells = [[c if isinstance(c, tuple) else (c,) for c in row] for row in self.rows]
        every = [_resolved(values) for row in cells for values in itertools.product(*row)]
        if "head_dim" not in self.columns:
            return every
        at = [*self.columns].index("head_dim")
        return [values for values in every if values[at] not in left_out]

    def spell(self, values: tuple[Value, ...]) -> str:
        """Template arguments in C++ syntax."""
        return ", ".join(
            f"{kind}::{value}" if isinstance(value, str) else str(value).lower()
            for kind, value in zip(self.columns.values(), values)
        )

    def file_of(self, values: tuple[Value, ...]) -> str:
        """Source file that instantiates them, such as ``cuda/merge/bf16.cu``."""
        columns = [*self.columns]
        words = []
        for i, (name, value) in enumerate(zip(columns, values)):
            if name == self.together or (name == "value" and value == values[i - 1]):
                continue
            words.append(_word(name, value))
        return f"{self.folder}/{'_'.join(filter(None, words))}.cu"

    def files(self) -> dict[str, list[tuple[Value, ...]]]:
        """The instances in each source."""
        found: dict[str, list[tuple[Value, ...]]] = {}
        for values in self.arguments():
            found.setdefault(self.file_of(values), []).append(values)
        return found


def _resolved(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """Template arguments without `SAME`."""
    return tuple(values[i - 1] if value == SAME else value for i, value in enumerate(values))


_TYPES = {"kBFloat16": "bf16", "kFloat16": "fp16", "kFloat32": "fp32", "kFastDeploy": "fastdeploy"}


def _word(column: str, value: Value) -> str:
    """Part of a file name for a template argument."""
    if isinstance(value, bool):
        return column if value else ""
    if isinstance(value, int):
        return str(value)
    if value == "kStatic":
        return ""
    return _TYPES.get(value) or re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", value[1:]).lower()


def head_dims() -> tuple[int, ...]:
    """Head dimensions to compile, from ``FASTATTN_HEAD_DIMS`` ("64,128"), or all.

    Raises
    ------
    ValueError
        If an entry is not a number, or neither 64 nor 128 is included, which every kernel has.
    """
    names = re.findall(r"[^\s,;]+", os.environ.get("FASTATTN_HEAD_DIMS", ""))
    if not names:
        return ALL_HEAD_DIMS
    known = [str(dim) for dim in ALL_HEAD_DIMS]
    if not set(names) <= set(known) or not {"64", "128"} & set(names):
        raise ValueError(
            f"FASTATTN_HEAD_DIMS: expected some of {', '.join(known)}, and 64 or 128 among them, "
            f"got {', '.join(names)}"
        )
    return tuple(dim for dim in ALL_HEAD_DIMS if str(dim) in names)


def head_dim_bits() -> int:
    """The head dimensions in the form of ``common/head_dims.h``: one bit for each 32 channels."""
    return sum(1 << dim // 32 for dim in head_dims())


ALL_HEAD_DIMS = (64, 96, 128, 192, 256)  # of Q and K; V has 128 channels where they have 192
HALF = ("kBFloat16", "kFloat16")
FP8 = ("kE4M3", "kE5M2")
#: Codes of K whose V may be int4.
WIDER = ("kE4M3", "kInt8")
EITHER = (False, True)
INDEX_HEADS = (8, 16, 32, 64)
MLA_HEADS = (8, 16, 64)

FAMILIES = (
    Family(
        folder="cuda/attention/mma_sm80",
        launcher="LaunchAttentionVariant",
        takes="const AttentionParams&, const AttentionTask&, int, cudaStream_t",
        declared="launch.h",
        defined="kernel.cuh",
        columns={
            **{"element": "DType", "value": "DType", "head_dim": "int", "paged": "bool"},
            **{"scales": "Scales", "tile_rows": "int"},
        },
        together="tile_rows",
        rows=(
            ((*HALF, *FP8, "kInt8"), SAME, ALL_HEAD_DIMS, EITHER, "kStatic", (8, 16, 64)),
            (("kE4M3", "kInt8", "kInt4"), SAME, ALL_HEAD_DIMS, True, "kToken", (8, 16, 64)),
            (WIDER, "kInt4", ALL_HEAD_DIMS, True, "kToken", (8, 16, 64)),
            ("kE2M1", SAME, ALL_HEAD_DIMS, True, "kGroup32UE8M0", (8, 16, 64)),
        ),
    ),
    Family(
        folder="cuda/attention/mma_sm80/invariant",
        launcher="LaunchInvariantVariant",
        takes="const AttentionParams&, const InvariantTask&, int, cudaStream_t",
        declared="cuda/attention/mma_sm80/launch.h",
        defined="cuda/attention/mma_sm80/invariant_kernel.cuh",
        columns={
            "element": "DType",
            "value": "DType",
            "head_dim": "int",
            "scales": "Scales",
            "tile_rows": "int",
        },
        together="tile_rows",
        rows=(
            ((*HALF, *FP8, "kInt8"), SAME, ALL_HEAD_DIMS, "kStatic", (8, 16, 64)),
            (("kE4M3", "kInt8", "kInt4"), SAME, ALL_HEAD_DIMS, "kToken", (8, 16, 64)),
            (WIDER, "kInt4", ALL_HEAD_DIMS, "kToken", (8, 16, 64)),
            ("kE2M1", SAME, ALL_HEAD_DIMS, "kGroup32UE8M0", (8, 16, 64)),
        ),
    ),
    Family(
        folder="cuda/attention/mma_sm80/general",
        launcher="LaunchGeneralVariant",
        takes="const AttentionParams&, const AttentionTask&, int, cudaStream_t",
        declared="cuda/attention/mma_sm80/launch.h",
        defined="cuda/attention/mma_sm80/general_kernel.cuh",
        columns={
            "element": "DType",
            "value": "DType",
            "head_dim": "int",
            "scales": "Scales",
            "tile_rows": "int",
        },
        together="tile_rows",
        rows=(
            ((*HALF, *FP8, "kInt8"), SAME, ALL_HEAD_DIMS, "kStatic", (16, 64)),
            (("kE4M3", "kInt8", "kInt4"), SAME, ALL_HEAD_DIMS, "kToken", (16, 64)),
            (WIDER, "kInt4", ALL_HEAD_DIMS, "kToken", (16, 64)),
            ("kE2M1", SAME, ALL_HEAD_DIMS, "kGroup32UE8M0", (16, 64)),
        ),
    ),
    Family(
        folder="cuda/attention/wgmma_sm90/fp8",
        namespace="fastattn::cuda::wgmma_fp8",
        launcher="LaunchVariant",
        takes="const Arguments&, cudaStream_t",
        declared="variant.h",
        defined="kernel.cuh",
        columns={"head_dim": "int", "per_token_scales": "bool", "softcap": "bool", "code": "DType"},
        rows=(
            (ALL_HEAD_DIMS, False, EITHER, FP8),
            (ALL_HEAD_DIMS, True, EITHER, "kE4M3"),
        ),
    ),
    Family(
        folder="cuda/attention/wgmma_sm90/q16",
        namespace="fastattn::cuda::wgmma_q16",
        launcher="LaunchVariant",
        takes="const Arguments&, cudaStream_t",
        declared="variant.h",
        defined="kernel.cuh",
        columns={
            "operand": "DType",
            "head_dim": "int",
            "source": "Source",
            "per_token_scales": "bool",
        },
        rows=(
            (HALF, ALL_HEAD_DIMS, "k16Bit", False),
            (("kFloat16", "kE4M3", "kInt8"), (64, 128), "kRaggedCodes", False),
            (("kFloat16", "kE4M3", "kInt8"), (64, 96, 128), "kPagedCodes", EITHER),
            ("kFloat16", 256, "kPagedCodes", EITHER),
            ("kFloat16", (64, 96, 128, 256), "kPagedNibbles", True),
        ),
    ),
    Family(
        folder="cuda/cache/append",
        launcher="LaunchAppendCacheVariant",
        takes="const AppendCacheParams&, cudaStream_t",
        declared="launch.h",
        defined="kernel.cuh",
        columns={"code": "DType", "value": "DType", "scales": "Scales", "layout": "CacheLayout"},
        rows=(
            ((*FP8, "kInt8"), SAME, "kStatic", ("kFastattn", "kFastDeploy")),
            (WIDER, SAME, "kToken", ("kFastattn", "kFastDeploy")),
            ((*WIDER, "kInt4"), "kInt4", "kToken", "kFastattn"),
            ("kE2M1", SAME, "kGroup32UE8M0", "kFastattn"),
        ),
    ),
    Family(
        folder="cuda/cache/rope_write",
        launcher="LaunchStepVariant",
        takes="const TransformStepParams&, cudaStream_t",
        declared="launch.h",
        defined="kernel.cuh",
        columns={
            "input": "DType",
            "scales": "Scales",
            "code": "DType",
            "value": "DType",
            "transforms_key": "bool",
        },
        rows=(
            ("kBFloat16", "kStatic", "kBFloat16", SAME, False),
            ("kFloat16", "kStatic", "kFloat16", SAME, False),
            ("kFloat32", "kStatic", HALF, SAME, False),
            ((*HALF, "kFloat32"), ("kStatic", "kToken"), WIDER, SAME, EITHER),
            ((*HALF, "kFloat32"), "kToken", (*WIDER, "kInt4"), "kInt4", EITHER),
            ((*HALF, "kFloat32"), "kGroup32UE8M0", "kE2M1", SAME, True),
            ((*HALF, "kFloat32"), "kStatic", "kE5M2", SAME, False),
        ),
    ),
    Family(
        folder="cuda/compat/gqa_rope",
        launcher="LaunchGqaTokens",
        takes="const GqaRopeWriteCacheParams&, cudaStream_t",
        declared="launch.h",
        defined="kernel.cuh",
        columns={"input": "DType"},
        rows=((HALF,),),
    ),
    Family(
        folder="cuda/indexer",
        launcher="LaunchIndexerKey",
        takes="const IndexerKvParams&, cudaStream_t",
        declared="launch.h",
        defined="key.cuh",
        columns={"quant": "IndexerQuant"},
        rows=((("kFp8", "kMxfp4", "kFp8Wide"),),),
    ),
    Family(
        folder="cuda/mqa_logits",
        namespace="fastattn::cuda::mqa_logits",
        launcher="LaunchLogitsVariant",
        takes="const Arguments&, cudaStream_t",
        declared="variant.h",
        defined="wgmma_kernel.cuh",
        columns={"quant": "IndexerQuant", "paged": "bool", "heads": "int", "columns": "int"},
        together="columns",
        rows=(
            ("kFp8", False, INDEX_HEADS, 256),
            ("kMxfp4", False, INDEX_HEADS, 128),
            (("kFp8", "kMxfp4"), True, INDEX_HEADS, (64, 128)),
        ),
    ),
    Family(
        folder="cuda/mla/sparse_attention/wgmma_sm90",
        namespace="fastattn::cuda::mla_sparse_sm90",
        launcher="LaunchVariant",
        takes="const Arguments&, cudaStream_t",
        declared="variant.h",
        defined="kernels.cuh",
        columns={"format": "MlaFormat", "dim": "int", "heads": "int"},
        together="heads",
        rows=(
            (("kBf16", "kFp8"), (512, 576), MLA_HEADS),
            ("kFp8x656", 576, MLA_HEADS),
            ("kFp8x584", 512, MLA_HEADS),
        ),
    ),
    Family(
        folder="cuda/sparse_attention",
        launcher="LaunchSparseVariant",
        takes="const SparseAttentionParams&, cudaStream_t",
        declared="launch.h",
        defined="kernel.cuh",
        # kStatic: or scales of tokens
        columns={"code": "DType", "value": "DType", "scales": "Scales"},
        rows=(
            ((*HALF, *FP8, "kInt8", "kInt4"), SAME, "kStatic"),
            (WIDER, "kInt4", "kStatic"),
            ("kE2M1", SAME, "kGroup32UE8M0"),
        ),
    ),
    Family(
        folder="cuda/merge",
        launcher="LaunchMergeVariant",
        takes="const MergeParams&, cudaStream_t",
        declared="launch.h",
        defined="launch_variant.cuh",
        columns={"input": "DType"},
        rows=((("kFloat32", *HALF),),),
    ),
)


def _source(family: Family, instances: list[tuple[Value, ...]]) -> str:
    lines = [
        f"template cudaError_t {family.launcher}<{family.spell(values)}>(\n    {family.takes});\n"
        for values in instances
    ]
    return (
        f'{HEADER}#include "{family.header(family.defined)}"\n\n'
        f"namespace {family.namespace} {{\n\n{''.join(lines)}\n"
        f"}}  // namespace {family.namespace}\n"
    )


def _list(family: Family) -> str:
    declared = family.header(family.declared)
    rows = ",\n".join(f"    Instance<{family.spell(values)}>" for values in family.arguments())
    return (
        f'{HEADER}#pragma once\n\n#include "common/instances.h"\n#include "{declared}"\n\n'
        f"namespace {family.namespace} {{\n\n// {family.launcher}<{', '.join(family.columns)}>\n"
        f"using {family.list_name} = InstanceList<\n{rows}>;\n\n"
        f"}}  // namespace {family.namespace}\n"
    )


def _texts() -> Iterator[tuple[str, str]]:
    for family in FAMILIES:
        yield f"{family.folder}/instances.h", _list(family)
        for name, instances in family.files().items():
            yield name, _source(family, instances)


def sources() -> list[str]:
    """Names of the ``.cu`` files."""
    return sorted(name for family in FAMILIES for name in family.files())


def write(folder: Path) -> None:
    """Write the sources and lists into `folder`.

    A file with the same text is not written again. A file without a row is removed.
    """
    texts = dict(_texts())
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in [*folder.rglob("*.cu"), *folder.rglob("*.h")]:
        if path.relative_to(folder).as_posix() not in texts:
            path.unlink()


if __name__ == "__main__":
    target = Path(__file__).resolve().parents[2] / "build" / "generated"
    try:
        write(target)
    except ValueError as error:  # FASTATTN_HEAD_DIMS decides what there is to write
        sys.exit(f"error: {error}")
    print(f"{len(sources())} sources in {target}")
