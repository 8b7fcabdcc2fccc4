"""A stand-alone script that makes a dumped call again, for a report."""

from __future__ import annotations

import base64
import zlib
from typing import Any

from fastattn.dump.files import Dump

_FLOATS = ("float32", "float16", "bfloat16", "float64")
#: Bytes of integers that a script holds as text.
_MOST_TEXT = 1 << 20


def _tensor_line(name: str, at: dict[str, Any], values: Any, place: str) -> list[str]:
    """Lines that make an input: integers as they were, others of random values."""
    dtype, shape = at["dtype"], at["shape"]
    where = "" if at["place"] == "cpu" or place == "cpu" else ", place=gpu"
    if values is not None and values.size <= 256 and dtype in ("int32", "int64"):
        return [f'{name} = paddle.to_tensor({values.tolist()}, "{dtype}"{where})']
    if values is not None and values.nbytes <= _MOST_TEXT and dtype in ("int32", "int64"):
        text = base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()
        return [
            f'{name} = np.frombuffer(zlib.decompress(base64.b64decode("{text}")), "{dtype}")',
            f"{name} = paddle.to_tensor({name}.reshape({shape}){where})",
        ]
    if dtype in _FLOATS:
        text = f"rng.standard_normal({shape})"
        if "scale" in name:
            text = f"rng.uniform(0.01, 0.05, {shape})"
        if dtype == "bfloat16":
            line = f'paddle.to_tensor({text}.astype("float32"){where}).astype("bfloat16")'
        else:
            line = f'paddle.to_tensor({text}.astype("{dtype}"){where})'
    elif dtype.startswith("float8"):
        line = f'paddle.to_tensor(rng.integers(0, 100, {shape}).astype("uint8"){where})'
        line += f'.view("{dtype}")'
    else:
        high = 2 if dtype in ("bool", "int32", "int64") else 100
        line = f'paddle.to_tensor(rng.integers(0, {high}, {shape}).astype("{dtype}"){where})'
    return [f"{name} = {line}"]


def _views(dump: Dump) -> list[str]:
    """What the script leaves out: strides, and memory that tensors share."""
    notes = []
    for name, at in dump.facts["inputs"].items():
        size = 1
        strides: list[int] = []
        for n in reversed(at["shape"]):
            strides.insert(0, size)
            size *= n
        if strides != at["strides"]:
            notes.append(f"# {name} had strides {at['strides']} (here it is contiguous)")
    return notes


def minimal(dump: Dump, arrays: dict[str, Any]) -> str:
    """Python that needs nothing but fastattn, Paddle and NumPy.

    Integers are the dumped ones: tables and lengths decide which way a call takes. Everything else
    is random, so that a report shows no one's data; the folder of the dump has the values.
    """
    facts = dump.facts
    gpu = facts["place"] != "cpu"
    lines = [
        f"# {facts['op']} on {facts['place']}: {facts['plan']['kernel']}",
        f"# fastattn {facts['machine']['fastattn']}, Paddle {facts['machine']['paddle']}",
        "import numpy as np",
        "import paddle",
        "",
        "from fastattn import _ops",
        "",
        "rng = np.random.default_rng(0)",
    ]
    lines += ["gpu = paddle.CUDAPlace(0)"] if gpu else ['paddle.set_device("cpu")']
    for name, at in facts["inputs"].items():
        lines += _tensor_line(name, at, arrays.get(name), "gpu" if gpu else "cpu")
    if any("b64decode" in line for line in lines):
        lines[2:2] = ["import base64", "import zlib", ""]
    lines += _views(dump)
    order = [name if name in facts["inputs"] else "None" for name in facts["order"]]
    attrs = ", ".join(repr(value) for value in facts["attrs"].values())
    comma = "," if len(facts["attrs"]) == 1 else ""
    lines += [
        *("inputs = (", *(f"    {name}," for name in order), ")"),
        f"# {', '.join(facts['attrs']) or 'no attributes'}",
        f"results = _ops.call({facts['op']!r}, inputs, ({attrs}{comma}))",
        f"for name, result in zip(_ops.signature({facts['op']!r}).outputs, results):",
        "    if result is not None:",
        '        largest = float(result.astype("float32").abs().max())',
        "        print(name, result.shape, result.dtype, largest)",
    ]
    return "\n".join(lines) + "\n"
