"""Every environment variable that fastattn reads. docs/install.md has the variables of the build.

=========================  ========================================================================
variable                   meaning
=========================  ========================================================================
``FASTATTN_LIBRARY``       load this compiled library instead of the one inside the package
``FASTATTN_CACHE``         folder of the demo's trained model, default ``~/.cache/fastattn``
``FASTATTN_LOG``           0 (default): no log; 1: the first call of every configuration; 2: every
                           call with all its inputs, before its kernel starts; 3: and the kernels
                           that it takes. Read at import.
``FASTATTN_DUMP``          ``DIR[,every=N][,max=N][,mib=N][,op=NAME][,nan][,seed]``: write operator
                           calls into a folder (docs/debugging.md). Read at import.
``FASTATTN_PROFILE``       1: a range around every operator call, for ``paddle.profiler`` and NVTX.
                           Read at import.
``FASTATTN_CHECK``         1: refuse wrong block tables, lengths, slots and scales on the device,
                           before every operator call; ``partial``: tables may omit needed blocks
                           (docs/backends.md). Every call waits. Read at import.
``FASTATTN_CALIBRATION``   file of ``python -m fastattn calibrate`` whose rotations and centres
                           backends use (docs/calibrate.md). Read when a backend is made.
``FASTATTN_SAMPLES``       ``DIR[,texts=N][,tokens=N]``: backends write samples of prompts for
                           ``calibrate`` (docs/calibrate.md). Read when a backend is made.
``FASTATTN_IGNORED``       names, separated by commas, of FastDeploy's options and fields that
                           backends accept without knowing them, and of functions that the plug-in
                           replaces without knowing their source (docs/backends.md)
``FASTATTN_DEQUANTIZED_*`` ``MIB``: GPU memory that an attention call may use for K and V of long
                           sequences in bf16; ``FROM``: number of operations from which a call
                           uses it (docs/kernels/dequantize_kv.md). Read when the library is
                           loaded.
``FASTATTN_SIGNAL_MODE``   file mode, in octal, of the queues and the shared memory that this
                           process makes for a prefill server's signals; default 600, for this
                           user only. Read when the library is loaded.
``FASTATTN_BENCH_PEERS``   JSON with other libraries' times for ``bench`` (docs/benchmarks.md)
=========================  ========================================================================

FastDeploy's own, which it or its user sets for its processes. The backends read them.

==========================================  =======================================================
variable                                    meaning
==========================================  =======================================================
``FD_DETERMINISTIC_MODE``                   an int that is not 0 makes backends batch-invariant
                                            (docs/backends.md)
``FLAGS_fmt_write_cache_completed_signal``  ``1`` or ``true``: a prefill server's workers signal
                                            complete layers
``INFERENCE_MSG_QUEUE_ID``                  number of such a server's queue, default 1024
``ENABLE_EP_DP``, ``SHM_UUID``              ``1``, and what its shared memory is then named after
``CUDA_VISIBLE_DEVICES``                    GPUs of a worker, one of which its shared memory is
                                            named after
``AS_MODEL_VERSION``                        name of the caches in a pool of attention_store
==========================================  =======================================================

``python -m fastattn collect-env`` reports more variables, and obeys none of them.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

#: FastDeploy sets it for the workers of prefill servers.
KV_SIGNAL_SWITCH = "FLAGS_fmt_write_cache_completed_signal"


def library() -> str | None:
    """Path of a compiled library to load instead of the packaged one, or None."""
    return os.environ.get("FASTATTN_LIBRARY") or None


def cache_dir() -> Path:
    """Folder for files that can be regenerated, such as the demo's model."""
    override = os.environ.get("FASTATTN_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "fastattn"


def calibration() -> Path | None:
    """Calibration file for the layers' keys, or None."""
    path = os.environ.get("FASTATTN_CALIBRATION")
    return Path(path) if path else None


def ignored() -> list[str]:
    """Names of FastDeploy's options, fields and functions that backends need not know."""
    return os.environ.get("FASTATTN_IGNORED", "").replace(" ", "").split(",")


def log_level() -> int:
    """Log level, 0 to 3. Another value warns and counts as 0."""
    return _number("FASTATTN_LOG", ("0", "1", "2", "3"))


class DumpSettings(NamedTuple):
    """What ``FASTATTN_DUMP`` asks for."""

    folder: Path
    every: int = 1  # of the calls of an operator, the first and each N-th after it
    most: int = 100  # calls that a process writes
    mib: float = 4096.0  # and MiB
    op: str = "*"  # pattern of operators' names
    nan: bool = False  # only calls that gave a NaN or raised
    seed: bool = False  # shapes and integers; other contents come from a seed at the replay


def dump() -> DumpSettings | None:
    """Which calls are dumped, or None. Another text warns and counts as None."""
    text = os.environ.get("FASTATTN_DUMP")
    if not text:
        return None
    folder, *options = text.split(",")
    given: dict[str, Any] = {}
    kinds = {"every": int, "max": int, "mib": float, "op": str}
    try:
        for option in options:
            name, equals, value = option.partition("=")
            if name in ("nan", "seed") and not equals:
                given[name] = True
            else:
                given[{"max": "most"}.get(name, name)] = kinds[name](value)
        settings = DumpSettings(Path(folder), **given)
        if not folder or settings.every < 1 or settings.most < 1 or not settings.mib > 0:
            raise ValueError
        if settings.nan and settings.seed:  # contents from a seed would not show the NaN again
            raise ValueError
    except (KeyError, ValueError):
        warnings.warn(
            "FASTATTN_DUMP: expected DIR[,every=N][,max=N][,mib=N][,op=NAME][,nan][,seed], got "
            f"{text!r}: no call is dumped",
            stacklevel=2,
        )
        return None
    return settings


class SampleSettings(NamedTuple):
    """What ``FASTATTN_SAMPLES`` asks for."""

    folder: Path
    texts: int = 8  # that a process writes
    tokens: int = 512  # of a text, at most


def samples() -> SampleSettings | None:
    """Which samples backends write, or None. Another text warns and counts as None."""
    text = os.environ.get("FASTATTN_SAMPLES")
    if not text:
        return None
    folder, *options = text.split(",")
    try:
        given = dict(option.split("=") for option in options)
        settings = SampleSettings(Path(folder), **{k: int(v) for k, v in given.items()})
        if not folder or settings.texts < 1 or settings.tokens < 64:
            raise ValueError
    except (TypeError, ValueError):
        warnings.warn(
            f"FASTATTN_SAMPLES: expected DIR[,texts=N][,tokens=N], at least 64 tokens, got {text!r}"
            ": no samples are written",
            stacklevel=2,
        )
        return None
    return settings


def profile() -> bool:
    """Whether operator calls are profiler ranges. Values other than 0 and 1 warn and count as 0."""
    return _number("FASTATTN_PROFILE", ("0", "1")) == 1


def check() -> int:
    """Checks of tensor contents: 0 none, 1 all, 2 all except blocks that tables omit."""
    text = os.environ.get("FASTATTN_CHECK") or "0"
    if text not in ("0", "1", "partial"):
        warnings.warn(f"FASTATTN_CHECK: expected 0, 1 or partial, got {text!r}", stacklevel=2)
        return 0
    return 2 if text == "partial" else int(text)


def dequantized() -> tuple[float, float]:
    """MiB of 16-bit keys and values, and the minimum number of operations of a call that uses them.

    Negative values, and values that are not numbers, warn and count as the defaults.
    """
    return _amount("FASTATTN_DEQUANTIZED_MIB", 512), _amount("FASTATTN_DEQUANTIZED_FROM", 4e9)


def kv_signal_mode() -> int:
    """File mode of the queues and of the shared memory for signals.

    A value that is not a mode with read and write access for this user warns and counts as 600.
    """
    name = "FASTATTN_SIGNAL_MODE"
    text = os.environ.get(name) or "600"
    if re.fullmatch("0?[67][0-7][0-7]", text) is None:
        warnings.warn(f"{name}: expected 600 to 777 in octal, got {text!r}", stacklevel=2)
        return 0o600
    return int(text, 8)


def deterministic() -> bool:
    """Whether FastDeploy's deterministic mode is on, read as FastDeploy reads the variable.

    Raises
    ------
    ValueError
        If the variable is not an int.
    """
    text = os.environ.get("FD_DETERMINISTIC_MODE", "0")
    try:
        return bool(int(text))
    except ValueError:
        raise ValueError(f"FD_DETERMINISTIC_MODE: expected an int, got {text!r}") from None


def bench_peers() -> Path | None:
    """File with other libraries' times, or None."""
    path = os.environ.get("FASTATTN_BENCH_PEERS")
    return Path(path) if path else None


def kv_signals() -> bool:
    """Whether somebody waits for this worker's signals of complete layers."""
    return os.environ.get(KV_SIGNAL_SWITCH) in ("1", "true")


def message_queue() -> int:
    """Number of the server's queue of signals."""
    return int(os.environ.get("INFERENCE_MSG_QUEUE_ID", "1024"))


def shared_memory_id() -> str | None:
    """What names in shared memory end with; None: with the rank and its GPU."""
    return os.environ.get("SHM_UUID", "") if os.environ.get("ENABLE_EP_DP") == "1" else None


def visible_devices() -> list[str] | None:
    """Numbers of the GPUs that CUDA shows to this process; None: all of them."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if devices is None else devices.split(",")


def attention_store_version() -> str:
    """Name of the caches that attention_store keeps."""
    return os.environ.get("AS_MODEL_VERSION", "")


def _amount(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not amount >= 0:
        warnings.warn(f"{name}: expected a number from 0 on, got {text!r}", stacklevel=3)
        return default
    return amount


def _number(name: str, values: tuple[str, ...]) -> int:
    text = os.environ.get(name) or "0"
    if text not in values:
        expected = f"{', '.join(values[:-1])} or {values[-1]}"
        warnings.warn(f"{name}: expected {expected}, got {text!r}", stacklevel=3)
        return 0
    return int(text)
