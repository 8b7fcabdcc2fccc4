"""Which files make up the operator library."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: Python extension modules beside the library, and the source of each.
MODULES = {"_host": "api/host_module.cc", "_direct": "api/direct_module.cc"}

_OPERATOR = re.compile(r"^PD_BUILD_OP\(\s*fastattn_(\w+)\s*\)", re.M)


@dataclass(frozen=True)
class Sources:
    """Sources by compiler, as paths relative to ``custom_ops``."""

    cxx: tuple[str, ...]
    cuda: tuple[str, ...]
    modules: dict[str, str]


def discover(root: Path, with_cuda: bool) -> Sources:
    """List the sources under `root` (the ``custom_ops`` folder), sorted.

    ``api/*.cc`` and ``cpu/**/*.cc`` always belong to the library, ``cuda/**/*.cu`` with CUDA.
    """

    def find(pattern: str) -> tuple[str, ...]:
        return tuple(sorted(p.relative_to(root).as_posix() for p in root.glob(pattern)))

    library = find("api/*.cc") + find("cpu/**/*.cc")
    cxx = tuple(name for name in library if name not in MODULES.values())
    modules = {name: source for name, source in MODULES.items() if source in library}
    return Sources(cxx, find("cuda/**/*.cu") if with_cuda else (), modules)


def operators(root: Path, sources: Sources) -> dict[str, list[str]]:
    """Places that each operator has a kernel for, such as ``{"quantize_fp8": ["cpu"]}``.

    An operator registered in ``api/<family>.cc`` has a CUDA kernel when that file or another
    ``api/<family>_*.cc`` includes a header of ``cuda/`` in a build with CUDA sources.
    """
    found = {}
    for name in sources.cxx:
        if not name.startswith("api/"):
            continue
        text = (root / name).read_text(encoding="utf-8")
        family = [text]
        for other in sources.cxx:
            if other.startswith(name.removesuffix(".cc") + "_"):
                family.append((root / other).read_text(encoding="utf-8"))
        on_gpu = bool(sources.cuda) and any('#include "cuda/' in part for part in family)
        for operator in _OPERATOR.findall(text):
            found[operator] = ["cpu", "cuda"] if on_gpu else ["cpu"]
    return dict(sorted(found.items()))
