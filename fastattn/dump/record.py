"""Operator calls written to disk: ``FASTATTN_DUMP``.

The wrapper is bound when :mod:`fastattn._ops` is imported with the variable set, and not otherwise.
It copies tensors to the host, so a dumped call waits for everything that was queued before it. It
reads nothing while a CUDA graph is captured or a program is traced, and says so once an operator.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import itertools
import logging
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import paddle

from fastattn import _check, _plan
from fastattn.dump import files, tensors
from fastattn.env import DumpSettings
from fastattn.version import __version__

LOGGER = logging.getLogger("fastattn")

#: Settings that change what a call computes, or how.
_SETTINGS = ("FASTATTN_DEQUANTIZED_MIB", "FASTATTN_DEQUANTIZED_FROM", "OMP_NUM_THREADS")


def _plain_number(value: Any) -> Any:
    """An attribute as JSON takes it."""
    return value.item() if hasattr(value, "item") else value


def machine() -> dict[str, Any]:
    """What a result may depend on besides the arguments; no name of the machine."""
    facts: dict[str, Any] = {
        "fastattn": __version__,
        "paddle": paddle.__version__,
        "python": platform.python_version(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }
    with contextlib.suppress(Exception):
        facts["cpu_isa"] = _plan.host().cpu_isa()
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        with contextlib.suppress(Exception):
            facts["gpu"] = paddle.device.cuda.get_device_name()
    return facts


class _Budget:
    """How many calls and bytes a process may still write."""

    def __init__(self, settings: DumpSettings) -> None:
        self.calls = settings.most
        self.bytes = int(settings.mib * 2**20)

    def take(self, size: int) -> str | None:
        """Count a call; the reason why it may not be written, or None."""
        if self.calls <= 0:
            return "as many calls as max= allows were written; further ones are not"
        if size > self.bytes:
            return f"a call of {size >> 20} MiB exceeds what mib= leaves"
        self.calls -= 1
        self.bytes -= size
        return None


class Recorder:
    """Writes calls of one process.

    Parameters
    ----------
    settings : DumpSettings
    signature : function of :mod:`fastattn._ops`
    """

    def __init__(self, settings: DumpSettings, signature: Callable[[str], Any]) -> None:
        self._settings = settings
        self._signature = signature
        self._counts: Counter[str] = Counter()
        self._budget = _Budget(settings)
        self._numbers = itertools.count(1)
        self._told: set[Any] = set()
        self._lock = threading.Lock()

    def tell(self, key: Any, text: str) -> None:
        """Warn once for a key."""
        if key not in self._told:
            self._told.add(key)
            LOGGER.warning("FASTATTN_DUMP: %s", text)

    def wants(self, op: str) -> bool:
        """Whether a call of an operator is one of those to look at; counts it."""
        if not fnmatch.fnmatchcase(op, self._settings.op):
            return False
        with self._lock:
            turn = self._counts[op] % self._settings.every == 0
            self._counts[op] += 1
        if not turn or self._budget.calls <= 0:
            return False
        if not _check.readable():
            self.tell(
                (op, "unreadable"),
                f"{op}: not dumped while a CUDA graph is captured or a program is traced: its "
                "tensors cannot be read",
            )
            return False
        return True

    def run(
        self, call: Callable[..., Any], op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...]
    ) -> Any:
        """Make a call and write it."""
        try:
            dumped = _Call(self, self._settings, self._signature(op), inputs, attrs)
            dumped.before()
        except Exception as error:  # what cannot be dumped is still called
            self.tell((op, "before"), f"{op}: not dumped: {type(error).__name__}: {error}")
            return call(op, inputs, attrs)
        try:
            results = call(op, inputs, attrs)
        except Exception as error:
            with self._guarded(op):
                dumped.after(None, error)
            raise
        with self._guarded(op):
            dumped.after(results, None)
        return results

    @contextlib.contextmanager
    def _guarded(self, op: str) -> Any:
        try:
            yield
        except Exception as error:
            self.tell((op, "after"), f"{op}: dump unfinished: {type(error).__name__}: {error}")

    def new_folder(self, op: str, size: int) -> Path | None:
        """Folder for a call of so many bytes; None, and a word in the log, beyond the bounds."""
        with self._lock:
            refused = self._budget.take(size)
            number = next(self._numbers) if refused is None else 0
        if refused is not None:
            self.tell(refused[:9], f"{op}: {refused}")
            return None
        root = self._settings.folder
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for again in itertools.count():  # processes of two containers may have the same number
            name = f"{number:06d}-{op}-p{os.getpid()}" + (f".{again}" if again else "")
            with contextlib.suppress(FileExistsError):
                (root / name).mkdir(mode=0o700)
                return root / name
        return None

    def charge(self, size: int) -> None:
        """Count bytes that a call wrote besides its inputs."""
        with self._lock:
            self._budget.bytes -= size


class _Call:
    """One call: its tensors before it, the files, its results."""

    def __init__(
        self,
        recorder: Recorder,
        settings: DumpSettings,
        sig: Any,
        inputs: tuple[Any, ...],
        attrs: tuple[Any, ...],
    ) -> None:
        self._recorder = recorder
        self._settings = settings
        self._sig = sig
        self._tensors = {n: t for n, t in zip(sig.inputs, inputs) if t is not None}
        foreign = [
            name
            for name, value in self._tensors.items()
            if not isinstance(value, paddle.base.core.eager.Tensor) or not value.is_dense()
        ]
        if foreign or len(inputs) != len(sig.inputs) or len(attrs) != len(sig.attrs):
            raise TypeError(
                f"not arguments of dense tensors: {', '.join(foreign) or 'other names'}"
            )
        self._attrs = {n: _plain_number(v) for n, v in zip(sig.attr_names, attrs)}
        self._layout = tensors.layout(self._tensors)
        self._values: dict[str, files.Stored] = {}
        self._folder: Path | None = None
        self._facts: dict[str, Any] = {}

    def _written(self) -> set[str]:
        """Inputs that the call may change: those written in place, and what shares their memory."""
        named = {self._sig.inputs[i] for i in self._sig.inplace.values()} & self._layout.keys()
        buffers = {self._layout[name]["buffer"] for name in named}
        return {name for name, at in self._layout.items() if at["buffer"] in buffers}

    def _read(self, names: Any) -> None:
        for name in names:
            if name not in self._values and not self._is_made_up(name):
                self._values[name] = tensors.stored(self._tensors[name])

    def _is_made_up(self, name: str) -> bool:
        """Whether a tensor's contents come from a seed at the replay."""
        kept = ("bool", "int16", "int32", "int64")  # tables, lengths, slots: they make the work
        return self._settings.seed and self._layout[name]["dtype"] not in kept

    def _may_show_nan(self) -> bool:
        """Whether a result can hold a NaN: an operator that writes only codes has none."""
        written = [self._sig.inputs[i] for i in self._sig.inplace.values()]
        floats = [n for n in written if self._layout.get(n, {}).get("dtype", "").find("float") >= 0]
        return bool(floats) or len(self._sig.inplace) < len(self._sig.outputs)

    def before(self) -> None:
        """Read what the call may change and, unless only NaN are wanted, write the inputs."""
        if self._settings.nan:
            if self._may_show_nan():
                self._read(self._written())
            return
        self._read(self._tensors)
        self._write_inputs()

    def _write_inputs(self) -> None:
        size = sum(value.data.size for value in self._values.values())
        self._folder = self._recorder.new_folder(self._sig.name, size)
        if self._folder is None:
            return
        digest = files.write_tensors(self._folder / files.INPUTS, self._values)
        place = next((at["place"] for at in self._layout.values() if at["place"] != "cpu"), "cpu")
        shapes = {n: (at["dtype"], at["shape"]) for n, at in self._layout.items()}
        self._facts = {
            "format": files.FORMAT,
            "op": self._sig.name,
            "status": "started",
            "inputs": self._layout,
            "made_up": [n for n in self._layout if self._is_made_up(n)],
            "order": list(self._sig.inputs),  # those that are not in `inputs` were None
            "attrs": self._attrs,
            "place": place,
            "plan": _plan.facts_of(self._sig.name, shapes, self._attrs, _plan.device_of(place)),
            "nan": {n: tensors.nans(v) for n, v in self._values.items() if tensors.nans(v)},
            "machine": machine(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": {files.INPUTS: digest},
        }
        files.write_facts(self._folder, self._facts)

    def after(self, results: Any, error: Exception | None) -> None:
        """Write what the call returned, if it is one to be written."""
        # With contents from a seed a replay has other results.
        keeps = results is not None and not self._settings.seed
        values = self._results(results) if keeps and (self._folder or self._settings.nan) else {}
        if self._settings.nan:
            if error is None and not self._has_new_nan(values):
                return
            self._read(self._tensors)
            self._write_inputs()
        if self._folder is None:
            return
        if error is not None:
            self._facts.update(status="raised", error=[type(error).__name__, str(error)])
        else:
            if keeps:
                digest = files.write_tensors(self._folder / files.RESULTS, values)
                self._facts["files"][files.RESULTS] = digest
                self._recorder.charge(sum(value.data.size for value in values.values()))
            found = {n: tensors.nans(v) for n, v in values.items() if tensors.nans(v)}
            self._facts.update(status="returned", nan={**self._facts["nan"], **found})
        files.write_facts(self._folder, self._facts)
        LOGGER.debug("FASTATTN_DUMP: %s: %s", self._facts["status"], self._folder)

    def _results(self, results: Any) -> dict[str, files.Stored]:
        """Results by name."""
        named = dict(zip(self._sig.outputs, results))
        return {name: tensors.stored(t) for name, t in named.items() if t is not None}

    def _has_new_nan(self, values: Mapping[str, files.Stored]) -> bool:
        """Whether a result has more NaN than the tensor in which it was written had before."""
        source = {self._sig.outputs[o]: self._sig.inputs[i] for o, i in self._sig.inplace.items()}
        for name, value in values.items():
            before = self._values.get(source.get(name, ""))
            if tensors.nans(value) > (0 if before is None else tensors.nans(before)):
                return True
        return False


def recorded(
    call: Callable[..., Any], signature: Callable[[str], Any], settings: DumpSettings
) -> Callable[..., Any]:
    """`_ops.call` that writes calls to disk.

    Parameters
    ----------
    call, signature : functions of :mod:`fastattn._ops`
    settings : DumpSettings
    """
    recorder = Recorder(settings, signature)
    LOGGER.info("FASTATTN_DUMP: calls are written to %s", settings.folder)

    @functools.wraps(call)
    def wrapper(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> Any:
        if not recorder.wants(op):
            return call(op, inputs, attrs)
        return recorder.run(call, op, inputs, attrs)

    return wrapper
