"""Rows of a benchmark, and the registry of benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass
class Row:
    """One measurement: an operator at one shape, beside a peer or a floor of the same run."""

    op: str
    shape: str
    us: float
    rate: float | None = None
    unit: str = ""  # of the rate: GB/s, GFLOP/s or TFLOP/s
    peer: str = ""
    peer_us: float | None = None
    error: float | None = None  # largest |ours - peer's| / largest |peer's|

    @property
    def ratio(self) -> float | None:
        """Speed relative to the peer: above 1 is faster."""
        return None if self.peer_us is None else self.peer_us / self.us

    def beside(self, peer: str, peer_us: float) -> Row:
        """The same measurement beside another peer."""
        return dataclasses.replace(self, peer=peer, peer_us=peer_us)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


#: A benchmark yields rows of what it measures on a device of :mod:`benchmarks.core.devices`.
Bench = Callable[[Any], Iterator[Row]]

#: Name -> kind of device -> benchmark, in the order of the table.
REGISTRY: dict[str, dict[str, Bench]] = {}


def register(name: str, *kinds: str) -> Callable[[Bench], Bench]:
    """Register a benchmark under the name that ``--op`` takes, for kinds of device (or all)."""

    def add(bench: Bench) -> Bench:
        REGISTRY.setdefault(name, {}).update(dict.fromkeys(kinds or ("cpu", "gpu"), bench))
        return bench

    return add


def benchmarks(kind: str) -> dict[str, Bench]:
    """Name -> benchmark, of those that a kind of device has."""
    return {name: of_kind[kind] for name, of_kind in REGISTRY.items() if kind in of_kind}


def family(bench: Bench) -> str:
    """Name of the module that a benchmark is in."""
    return bench.__module__.rpartition(".")[2]


def is_of(name: str, wanted: str) -> bool:
    """Whether ``--op wanted`` chooses a benchmark: its name, or the part before a slash."""
    return name == wanted or name.startswith(f"{wanted}/")
