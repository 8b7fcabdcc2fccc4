"""One declaration an operator: what C++ tells, and the order of arguments in Python's calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import fastattn
from fastattn import _ops

PACKAGE = Path(fastattn.__file__).parent


class Given(NamedTuple):
    """An argument of a call of an operator that is a plain name."""

    op: str
    kind: str  # "inputs" or "attrs"
    position: int
    name: str


def flat(node: ast.expr) -> Iterator[ast.expr]:
    """Elements of a tuple that is written out; those of what it unpacks as well."""
    for element in node.elts if isinstance(node, ast.Tuple) else []:
        if isinstance(element, ast.Starred):
            if not isinstance(element.value, ast.Tuple):
                return  # nobody sees how many it has
            yield from flat(element.value)
        else:
            yield element


def given(source: str) -> Iterator[Given]:
    """What the calls of operators in `source` give by a plain name."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        values: dict[str, ast.expr] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                values[node.targets[0].id] = node.value
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "_ops.call":
                continue
            op, *tuples = [values.get(ast.unparse(arg), arg) for arg in node.args]
            if not isinstance(op, ast.Constant):
                continue
            for kind, elements in zip(("inputs", "attrs"), tuples):
                for i, element in enumerate(flat(elements)):
                    if isinstance(element, ast.Name):
                        yield Given(op.value, kind, i, element.id)


def misplaced(found: list[Given]) -> list[Given]:
    """Those that the operator has at another place."""
    wrong = []
    for argument in found:
        names = getattr(_ops.signature(argument.op), argument.kind)
        names = [name.split(":")[0] for name in names]
        if argument.name in names and names.index(argument.name) != argument.position:
            wrong.append(argument)
    return wrong


def test_python_gives_arguments_in_the_order_of_the_declarations():
    found = [x for path in sorted(PACKAGE.rglob("*.py")) for x in given(path.read_text("utf-8"))]
    assert misplaced(found) == []
    signatures = {op: _ops.signature(op) for op in {argument.op for argument in found}}
    named = [
        x for x in found if x.name in [a.split(":")[0] for a in getattr(signatures[x.op], x.kind)]
    ]
    assert len(signatures) > 30 and len(named) > 150


@pytest.mark.parametrize(
    ("call", "position"),
    [
        ('_ops.call("topk_indices", (lengths, logits, starts, out), (k,))', 0),
        ('op = "topk_indices"; _ops.call(op, (logits, *(lengths, out, starts)), (k,))', 2),
        ('_ops.call("quantize_fp8", (x, scale, output), (group_size, granularity))', 0),
    ],
)
def test_another_order_is_seen(call, position):
    wrong = misplaced(list(given(f"def f():\n    {call}\n")))
    assert len(wrong) == 2 and wrong[0].position == position


def test_what_is_written_in_place_is_an_output_after_the_results():
    for op in _ops.operators():
        sig = _ops.signature(op)
        written = [sig.outputs[output] for output in sorted(sig.inplace)]
        assert written == [f"{sig.inputs[sig.inplace[i]]}_out" for i in sorted(sig.inplace)], op
        assert sorted(sig.inplace) == list(
            range(len(sig.outputs) - len(sig.inplace), len(sig.outputs))
        ), op
