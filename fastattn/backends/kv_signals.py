"""Signals of a prefill server's worker to FastDeploy's process that transfers its caches.

That process sends a layer's new blocks to the decode server once the worker says that the layer is
complete. In FastDeploy the operators that write the cache say so; here it is an operator of its
own, in the same stream, between the write and the attention.
"""

from __future__ import annotations

import functools
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn import _ops, env
from fastattn.backends.config import PD_MODES, fastdeploy_flag, read, tensor_parallel
from fastattn.backends.forward_meta import field, optional
from fastattn.functional._marker import unified


@dataclass(frozen=True)
class KvSignals:
    """What a backend has to know to signal its layers.

    Attributes
    ----------
    mode : {"per_chunk", "per_query"}
        FastDeploy's names: a System V message a layer and chunk, or two integers in shared memory.
    rank, device : int, str
        Number of the process on its node, and of its GPU there.
    first_layer : int
        Number of the backend's layer 0 among those of the main model and the draft model.
    begins_steps : bool
        Whether a step begins with this backend; the draft model's goes on with the main model's.
    key_rule : {"rank", "number", "wide"}
        How the queue's key is made, see :func:`queue_key`.
    """

    mode: str
    rank: int
    device: str
    first_layer: int
    begins_steps: bool
    key_rule: str

    @classmethod
    def of(cls, fd_config: Any) -> KvSignals | None:
        """Signals that a configuration and the process's environment ask for, if any.

        Nobody waits for signals if caches go through a storage.
        """
        mode = read(fd_config, "parallel_config.pd_disaggregation_mode", "None")
        if mode not in PD_MODES or not env.kv_signals():
            return None
        if fastdeploy_flag("FD_PD_TRANSFER_VIA_STORAGE"):  # of release 2.6
            return None
        size, rank = tensor_parallel(fd_config)
        rank += size * int(read(fd_config, "parallel_config.local_data_parallel_id", 0))
        devices = env.visible_devices()
        listed = [str(rank)] if devices is None else devices
        parallel = getattr(fd_config, "parallel_config", None)
        return cls(
            mode=mode,
            rank=rank,
            device=listed[rank % len(listed)].strip(),
            first_layer=int(read(fd_config, "model_config.start_layer_index", 0)),
            begins_steps=read(fd_config, "speculative_config.model_type", "main") != "mtp",
            key_rule=_key_rule(parallel) if mode == "per_chunk" else "wide",
        )

    @functools.cached_property
    def channel(self) -> str:
        """The receiver, as the operators name it. FastDeploy's worker sets its queue's number."""
        if self.mode == "per_chunk":
            return f"queue:{queue_key(self.rank, self.key_rule)}"
        step, layer = shared_names(self.rank, self.device)
        return f"shm:{layer}:{step}"

    def begin(self, forward_meta: Any) -> None:
        """Begin a step: its prefill sequences are those with new tokens of ``seq_lens_encoder``."""
        if not self.begins_steps:
            return
        batch = int(field(forward_meta, "seq_lens_this_time").shape[0])
        tensors = (field(forward_meta, "seq_lens_encoder"), field(forward_meta, "seq_lens_decoder"))
        silent = bool(optional(forward_meta, "is_dummy_or_profile_run"))
        _ops.call("begin_kv_signals", tensors, (batch, silent, self.channel))

    def send(self, key: Any, value: Any, layer: Any, forward_meta: Any) -> None:
        """Signal a layer whose caches are written.

        Of the two micro-batches of a step with overlap, the last one completes the layer.
        """
        if optional(forward_meta, "tbo_microbatch_id") != 0:
            _send(key, value, self.first_layer + layer.layer_id, self.channel)


@unified
def _send(key: Any, value: Any, layer_id: int, channel: str) -> None:
    """The operator's call, which Paddle does not rewrite when it traces a backend."""
    _ops.call("send_kv_signal", (key, value), (layer_id, channel))


def _key_rule(parallel: Any) -> str:
    """The rule of the installed FastDeploy.

    The receiver's half is in its compiled operators, which have two rules under one Python: those
    of 2.5.0 took C's ``ftok``, of whose number 8 bits count, later builds have a function of their
    own. A queue that nobody reads would fill up and hold the worker.
    """
    if not hasattr(parallel, "local_engine_worker_queue_port"):
        return "rank"
    known = [_told_by(path) for path in _operator_libraries()]
    return "number" if "number" in known and "wide" not in known else "wide"


def _operator_libraries() -> Iterator[Path]:
    """FastDeploy's compiled operators for GPUs."""
    name = "fastdeploy.model_executor.ops.gpu"
    folders = [Path(path) for path in getattr(sys.modules.get(name), "__path__", None) or ()]
    for root in getattr(sys.modules.get("fastdeploy"), "__path__", None) or ():
        folders.append(Path(root, *name.split(".")[1:]))
    for folder in dict.fromkeys(folders):
        yield from sorted(folder.rglob("*.so"))


@functools.lru_cache(maxsize=16)
def _told_by(library: Path) -> str | None:
    """The rule that a library's strings tell: the newer function has a message of its own."""
    try:
        with library.open("rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # it cannot be read, or is empty
        return None
    with text:
        if text.find(b"[custom_ftok]") >= 0:
            return "wide"
        return "number" if text.find(b"INFERENCE_MSG_QUEUE_ID") >= 0 else None


def queue_key(rank: int, rule: str = "wide") -> int:
    """Key of the System V queue of a rank, as both ends compute it.

    Parameters
    ----------
    rank : int
    rule : {"rank", "number", "wide"}
        "rank": that of FastDeploy 2.4, C's ``ftok("/opt/", 1024 + rank)``, the same for all servers
        of a node. "number": that of 2.5.0, ``ftok("/opt/", id + rank)``, where id is the server's
        ``INFERENCE_MSG_QUEUE_ID``. "wide": that of later builds, with 20 bits of such a number.
    """
    try:
        place = os.stat("/opt/")
    except OSError:
        return -1
    # 2.4 takes 1024, of whose sum with the rank C's ftok has the lower 8 bits.
    number = 1024 if rule == "rank" else env.message_queue()
    if rule == "wide":
        # FastDeploy means (id << 4) + rank; C reads id << (4 + rank).
        number = number << (4 + rank) & 0xFFFFF
        key = (place.st_dev & 0xF) << 28 | (place.st_ino & 0xFF) << 20 | number
    else:
        number = number + rank & 0xFF
        key = number << 24 | (place.st_dev & 0xFF) << 16 | place.st_ino & 0xFFFF
    return key - (1 << 32) if key >= 1 << 31 else key  # as C's int


def shared_names(rank: int, device: str) -> tuple[str, str]:
    """Names in shared memory of the step's number and its last complete layer."""
    number = env.shared_memory_id()
    place = f"{rank}.{device}" if number is None else f"tprank0_dprank{rank}_{number}"
    return f"splitwise_complete_prefilled_step_{place}", (
        f"splitwise_complete_prefilled_layer_{place}"
    )
