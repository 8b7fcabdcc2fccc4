"""Every environment variable that fastattn obeys; docs/install.md has those of the build.

=========================  ========================================================================
variable                   meaning
=========================  ========================================================================
``FASTATTN_LIBRARY``       load this compiled library instead of the one inside the package
``FASTATTN_CACHE``         folder of the demo's trained model, default ``~/.cache/fastattn``
``FASTATTN_LOG``           0 (default): no log; 1: the first call of every configuration; 2: every
                           call with all its inputs, before its kernel starts. Read at import.
``FASTATTN_PROFILE``       1: a range around every operator call, for ``paddle.profiler`` and NVTX.
                           Read at import.
``FASTATTN_CHECK``         1: refuse wrong block tables, lengths, slots and scales on the device,
                           before every operator call; ``partial``: tables may leave out needed
                           blocks (docs/backends.md). Every call waits. Read at import.
``FASTATTN_CALIBRATION``   file of ``python -m fastattn calibrate`` whose rotations and centres
                           backends use (docs/calibrate.md). Read when a backend is made.
``FASTATTN_DEQUANTIZED_*`` ``MIB``: GPU memory that an attention call takes for K and V of long
                           sequences in bf16; ``FROM``: operations from which it does
                           (docs/kernels/dequantize_kv.md). Read when the library is loaded.
``FASTATTN_SIGNAL_MODE``   who may use the queues and the shared memory of a prefill server's
                           signals that this process makes: a file's mode in octal, default 600,
                           which is this user. Read when the library is loaded.
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
``USE_FLASH_MLA``                           an int that is not 0 is refused where FastDeploy would
                                            leave out tokens
==========================================  =======================================================

``python -m fastattn collect-env`` reports more variables, and obeys none of them.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

#: FastDeploy sets it for the workers of prefill servers.
KV_SIGNAL_SWITCH = "FLAGS_fmt_write_cache_completed_signal"


def library() -> str | None:
    """Path of a compiled library to load instead of the packaged one, or None."""
    return os.environ.get("FASTATTN_LIBRARY") or None


def cache_dir() -> Path:
    """Folder for files that may be made again, such as the demo's model."""
    override = os.environ.get("FASTATTN_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "fastattn"


def calibration() -> Path | None:
    """File of what the layers' keys are stored with, or None."""
    path = os.environ.get("FASTATTN_CALIBRATION")
    return Path(path) if path else None


def log_level() -> int:
    """How much is logged, 0 to 2; a value that is none of these warns and counts as 0."""
    return _number("FASTATTN_LOG", ("0", "1", "2"))


def profile() -> bool:
    """Whether operator calls are ranges of a profiler; values but 0 and 1 warn and count as 0."""
    return _number("FASTATTN_PROFILE", ("0", "1")) == 1


def check() -> int:
    """What is checked on the device: 0 nothing, 1 all, 2 all but blocks that tables leave out."""
    text = os.environ.get("FASTATTN_CHECK") or "0"
    if text not in ("0", "1", "partial"):
        warnings.warn(f"FASTATTN_CHECK: expected 0, 1 or partial, got {text!r}", stacklevel=2)
        return 0
    return 2 if text == "partial" else int(text)


def dequantized() -> tuple[float, float]:
    """MiB of 16-bit keys and values, and operations that a call must have for them.

    Values that are no numbers, or negative, warn and count as the defaults.
    """
    return _amount("FASTATTN_DEQUANTIZED_MIB", 512), _amount("FASTATTN_DEQUANTIZED_FROM", 4e9)


def kv_signal_mode() -> int:
    """Mode of the queues and the shared memory that signals go through.

    What is no mode that lets this user read and write warns and counts as 600.
    """
    name = "FASTATTN_SIGNAL_MODE"
    text = os.environ.get(name) or "600"
    if re.fullmatch("0?[67][0-7][0-7]", text) is None:
        warnings.warn(f"{name}: expected 600 to 777 in octal, got {text!r}", stacklevel=2)
        return 0o600
    return int(text, 8)


def deterministic() -> bool:
    """Whether FastDeploy's deterministic mode is on, as FastDeploy itself reads the variable.

    Raises
    ------
    ValueError
        If it is not an int.
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


def flash_mla() -> bool:
    """Whether FastDeploy takes FlashMLA's kernels."""
    return bool(int(os.environ.get("USE_FLASH_MLA", "0")))


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
