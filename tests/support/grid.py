"""Grids of parameters of which the CPU runs a diagonal: the mark ``few_on_cpu``.

On a GPU every case of such a grid may be a kernel or a launch of its own. On the CPU the parameters
choose their paths one by one, so that cases in which each value occurs are as good as all of them.
"""

from __future__ import annotations

MARK = "few_on_cpu"


def on_diagonal(place: list[int], sizes: list[int]) -> bool:
    """Whether a case belongs to a diagonal in which each value of each parameter occurs.

    `place` is which of the values the case has of each parameter, `sizes` how many there are.
    """
    longest = sizes.index(max(sizes))
    return all(at == place[longest] % size for at, size in zip(place, sizes))


def _same(a, b) -> bool:
    return a is b or (isinstance(a, (int, str)) and type(a) is type(b) and a == b)


def _axes(item, chosen: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Place and sizes of a case for each of its decorators that set a chosen parameter."""
    place, sizes = [], []
    for mark in item.iter_markers("parametrize"):
        names, rows = mark.args[0], list(mark.args[1])
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        if chosen and not set(chosen).intersection(names):
            continue
        mine = [item.callspec.params[name] for name in names]
        single = len(names) == 1
        rows = [r.values if hasattr(r, "marks") else (r,) if single else r for r in rows]
        place.append([all(map(_same, mine, row)) for row in rows].index(True))
        sizes.append(len(rows))
    return place, sizes


def left_out_on_cpu(items) -> list:
    """The cases on the CPU that the mark leaves to ``-m slow``.

    The mark's arguments name the parameters of the diagonal; without any it is all of them.
    """
    left_out = []
    for item in items:
        mark = item.get_closest_marker(MARK)
        if mark is not None and item.callspec.params.get("place") != "gpu":
            place, sizes = _axes(item, mark.args)
            if not on_diagonal(place, sizes):
                left_out.append(item)
    return left_out
