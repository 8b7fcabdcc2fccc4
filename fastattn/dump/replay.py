"""Dumped calls made again, compared with the NumPy model and with what was dumped."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import paddle

from fastattn import _ops
from fastattn.dump import compare, model, seeds, tensors
from fastattn.dump.compare import Verdict
from fastattn.dump.files import Dump, DumpError, Stored


class Replay(NamedTuple):
    """What a replay found."""

    dumped: dict[str, Verdict]  # the dumped results against the model
    replayed: dict[str, Verdict]  # the results of the replay against the model
    again: dict[str, Verdict]  # the replay against the dump, by bits
    error: str | None  # what the call raised
    us: float | None  # median time of a call
    fits: bool  # whether everything that could be compared is within its bound


def _values(dump: Dump, seed: int) -> dict[str, Stored]:
    """Contents of the inputs, those from a seed included."""
    made = {n: seeds.made_up(n, dump.facts["inputs"][n], seed) for n in dump.facts["made_up"]}
    missing = dump.facts["inputs"].keys() - made.keys() - dump.inputs.keys()
    if missing:
        raise DumpError(f"{dump.folder}: no contents of {', '.join(sorted(missing))}")
    return {n: made.get(n) or dump.inputs[n] for n in dump.facts["inputs"]}


class Call:
    """A dumped call on this machine.

    Parameters
    ----------
    dump : Dump
    place : {"auto", "cpu", "gpu"}
        "auto": where it was, or the CPU where there is no GPU. "gpu": the first one; all tensors
        of a call that was on a CPU go there.
    contiguous : bool
        Leave out the strides that the tensors had.
    seed : int
        Of contents that the dump left out.

    Raises
    ------
    DumpError
        If this fastattn has no such operator, or gives it other arguments.
    """

    def __init__(
        self, dump: Dump, *, place: str = "auto", contiguous: bool = False, seed: int = 0
    ) -> None:
        self.dump, self.op = dump, str(dump.facts["op"])
        if self.op not in _ops.operators():
            raise DumpError(f"{dump.folder}: operator {self.op!r} is not in this build")
        self.sig = _ops.signature(self.op)
        # An optional input that is newer than the dump was absent.
        order = [n for n in self.sig.inputs if n in dump.facts["order"]]
        needed = {n for n, optional in zip(self.sig.inputs, self.sig.optional) if not optional}
        known = order == dump.facts["order"] and needed <= {*order}
        if not known or [*dump.facts["attrs"]] != self.sig.attr_names:
            raise DumpError(f"{dump.folder}: {self.op} has other arguments in this fastattn")
        gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
        if place == "gpu" and not gpu:
            raise DumpError("no GPU here, or Paddle was built without CUDA; --place cpu")
        was_gpu = dump.facts["place"] != "cpu"
        self.place = place if place != "auto" else "gpu" if gpu and was_gpu else "cpu"
        self.values = _values(dump, seed)
        self.contiguous = contiguous

    def inputs(self) -> tuple[Any, ...]:
        """New tensors, as they were before the call."""
        facts = self.dump.facts["inputs"]
        if self.place == "gpu" and self.dump.facts["place"] == "cpu":
            facts = {name: {**at, "place": "gpu:0"} for name, at in facts.items()}
        made = tensors.rebuilt(facts, self.values, self.place, contiguous=self.contiguous)
        return tuple(made.get(name) for name in self.sig.inputs)

    def run(self, inputs: tuple[Any, ...]) -> list[Any]:
        """Make the call."""
        return _ops.call(self.op, inputs, tuple(self.dump.facts["attrs"].values()))

    def results(self) -> dict[str, Stored]:
        """Results by name."""
        named = zip(self.sig.outputs, self.run(self.inputs()))
        return {name: tensors.stored(t) for name, t in named if t is not None}

    def given(self) -> model.Given:
        """Arguments as the NumPy models take them."""
        arrays = {name: tensors.array_of(value) for name, value in self.values.items()}
        return {n: arrays.get(n) for n in self.sig.inputs} | dict(self.dump.facts["attrs"])

    def us(self, seconds: float = 0.5, most: int = 50) -> float:
        """Median microseconds of a call, waiting for its end; what it writes changes its input."""
        inputs = self.inputs()
        gpu = self.place == "gpu"
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while len(taken) < 3 or (time.perf_counter() < end and len(taken) < most):
            begin = time.perf_counter()
            self.run(inputs)
            if gpu:
                paddle.device.cuda.synchronize()
            taken.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(taken[1:])


def _against_model(
    call: Call, results: dict[str, Stored], on_gpu: bool, always: bool
) -> dict[str, Verdict]:
    given = call.given()
    work = model.work_of(call.op, given)
    if work > model.MOST_WORK and not always:
        text = f"{work:.1g} products are too many for NumPy; --model always waits for them"
        return {"-": Verdict(None, text)}
    arrays = {name: tensors.array_of(value) for name, value in results.items()}
    with np.errstate(all="ignore"):
        return model.verdicts(call.op, given, arrays, on_gpu=on_gpu)


def _raised(call: Call, error: Exception) -> Replay:
    """A call that raised: as it did when it was dumped, or not."""
    text = f"{type(error).__name__}: {error}"
    dumped = call.dump.facts.get("error")
    same = dumped is not None and text == ": ".join(dumped)
    again = {"error": Verdict(same, "the same error" if same else "the dumped call did not raise")}
    if dumped is not None and not same:
        again = {"error": Verdict(False, f"another error than {': '.join(dumped)}")}
    return Replay({}, {}, again, text, None, same)


def replay(call: Call, *, with_model: str = "auto", timed: bool = True) -> Replay:
    """Make a call again and compare.

    Parameters
    ----------
    call : Call
    with_model : {"auto", "always", "never"}
        "auto": where NumPy takes seconds.
    timed : bool
        Whether to time it, too.
    """
    if call.op in model.NOT_REPLAYED:
        why = Verdict(None, "it sends signals to other processes")
        return Replay({}, {"-": why}, {}, None, None, True)
    try:
        results = call.results()
    except Exception as error:
        return _raised(call, error)
    again = {
        name: compare.same_bits(tensors.array_of(results[name]), tensors.array_of(value))
        if name in results
        else Verdict(False, "no such result")
        for name, value in call.dump.results.items()
    }
    dumped: dict[str, Verdict] = {}
    replayed: dict[str, Verdict] = {}
    if with_model != "never":
        always, gpu = with_model == "always", call.place == "gpu"
        replayed = _against_model(call, results, gpu, always)
        was_gpu = call.dump.facts["place"] != "cpu"
        same = again.keys() == results.keys() and all(v.fits for v in again.values())
        if again and same and gpu == was_gpu:
            dumped = replayed  # of the same results, and the model may take seconds
        elif call.dump.results:
            dumped = _against_model(call, call.dump.results, was_gpu, always)
    fits = all(v.fits is not False for v in (*dumped.values(), *replayed.values()))
    if call.op in model.WITHOUT_MODEL:  # operators whose bits are promised on every place
        fits = all(v.fits for v in again.values())
    if call.dump.facts["status"] == "raised":
        told = ": ".join(call.dump.facts["error"])
        again["error"] = Verdict(False, f"the dumped call raised {told}")
        fits = False
    return Replay(dumped, replayed, again, None, call.us() if timed else None, fits)
