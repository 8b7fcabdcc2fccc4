"""The mark few_on_cpu: the diagonal that it leaves on the CPU has every value of each parameter."""

from __future__ import annotations

import itertools
import types

import pytest

from tests.support.grid import left_out_on_cpu, on_diagonal


@pytest.mark.parametrize("sizes", [(1,), (5,), (2, 2), (9, 5), (3, 4, 2), (2, 6, 3, 4)], ids=str)
def test_a_diagonal_has_every_value_and_no_more_cases_than_the_longest_axis(sizes):
    places = [list(p) for p in itertools.product(*map(range, sizes)) if on_diagonal(p, [*sizes])]
    assert len(places) == max(sizes)
    for axis, size in enumerate(sizes):
        assert {place[axis] for place in places} == set(range(size))


def cases(arguments=(), places=("cpu",)):
    """Items of a test of three parameters, two of which a decorator sets together."""
    kinds = [(object(), None), (object(), None), (object(), 300)]
    dims, steps = [64, 300], ["a", "b"]
    marks = [
        types.SimpleNamespace(args=("kind, q_type", kinds)),
        types.SimpleNamespace(args=("dim", dims)),
        types.SimpleNamespace(args=(["step"], [pytest.param(s) for s in steps])),
    ]
    mark = types.SimpleNamespace(args=arguments)
    return [
        types.SimpleNamespace(
            callspec=types.SimpleNamespace(
                params=dict(kind=kind, q_type=q_type, dim=dim, step=step, place=place)
            ),
            get_closest_marker=lambda name: mark,
            iter_markers=lambda name: marks,
        )
        for (kind, q_type), dim, step, place in itertools.product(kinds, dims, steps, places)
    ]


@pytest.mark.parametrize("arguments, kept", [((), 3), (("kind", "dim"), 6), (("q_type",), 12)])
def test_chosen_parameters_are_thinned_and_others_are_not(arguments, kept):
    items = cases(arguments)
    left = [item for item in items if all(item is not out for out in left_out_on_cpu(items))]
    assert len(items) == 12 and len(left) == kept
    for name in ("dim", "step"):
        assert len({item.callspec.params[name] for item in left}) == 2


def test_a_gpu_runs_all_of_them():
    items = cases(places=("cpu", "gpu"))
    assert {item.callspec.params["place"] for item in left_out_on_cpu(items)} == {"cpu"}
    assert len(left_out_on_cpu(items)) == 9


def test_tests_without_the_mark_are_left_alone():
    item = types.SimpleNamespace(get_closest_marker=lambda name: None)
    assert left_out_on_cpu([item]) == []
