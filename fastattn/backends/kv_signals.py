"""Signals from a prefill server's worker to FastDeploy's cache transfer process.

The transfer process sends a layer's new blocks to the decode server after the worker has signalled
that the layer is complete. In FastDeploy the operators that write the cache send the signal. Here
it is a separate operator in the same stream, between the write and the attention.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

from fastattn import _ops, env
from fastattn.backends.config import PD_MODES, fastdeploy_flag, read, tensor_parallel
from fastattn.backends.forward_meta import field, optional
from fastattn.functional._marker import unified


@dataclass(frozen=True)
class KvSignals:
    """State that a backend needs to signal its layers.

    Attributes
    ----------
    mode : {"per_chunk", "per_query"}
        FastDeploy's names: a System V message per layer and chunk, or two integers in shared
        memory.
    rank, device : int, str
        Index of the process on its node, and of its GPU there.
    first_layer : int
        Index of the backend's layer 0 among the layers of the main model and the draft model.
    begins_steps : bool
        Whether a step begins with this backend. The draft model's backend continues the step of the
        main model.
    """

    mode: str
    rank: int
    device: str
    first_layer: int
    begins_steps: bool

    @classmethod
    def of(cls, fd_config: Any) -> KvSignals | None:
        """The signals that a configuration and the environment of the process request, or None.

        No process waits for signals if caches are transferred through a storage.
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
        return cls(
            mode=mode,
            rank=rank,
            device=listed[rank % len(listed)].strip(),
            first_layer=int(read(fd_config, "model_config.start_layer_index", 0)),
            begins_steps=read(fd_config, "speculative_config.model_type", "main") != "mtp",
        )

    @functools.cached_property
    def channel(self) -> str:
        """The receiver, as operators name it. FastDeploy's worker sets the number of its queue."""
        if self.mode == "per_chunk":
            return f"queue:{queue_key(self.rank)}"
        step, layer = shared_names(self.rank, self.device)
        return f"shm:{layer}:{step}"

    def begin(self, forward_meta: Any) -> None:
        """Begin a step. Its prefill sequences have new tokens in ``seq_lens_encoder``."""
        if not self.begins_steps:
            return
        batch = int(field(forward_meta, "seq_lens_this_time").shape[0])
        tensors = (field(forward_meta, "seq_lens_encoder"), field(forward_meta, "seq_lens_decoder"))
        silent = bool(optional(forward_meta, "is_dummy_or_profile_run"))
        _ops.call("begin_kv_signals", tensors, (batch, silent, self.channel))

    def send(self, key: Any, value: Any, layer: Any, forward_meta: Any) -> None:
        """Signal a layer whose caches are written.

        If a step has two overlapping micro-batches, the last one completes the layer.
        """
        if optional(forward_meta, "tbo_microbatch_id") != 0:
            _send(key, value, self.first_layer + layer.layer_id, self.channel)


@unified
def _send(key: Any, value: Any, layer_id: int, channel: str) -> None:
    """Call the operator in a way that Paddle does not rewrite when it traces a backend."""
    _ops.call("send_kv_signal", (key, value), (layer_id, channel))


def queue_key(rank: int) -> int:
    """Key of the System V queue of a rank, as both ends compute it.

    It is C's ``ftok("/opt/", ..)`` with 20 bits of a number that is made of the server's
    ``INFERENCE_MSG_QUEUE_ID`` and the rank.
    """
    try:
        place = os.stat("/opt/")
    except OSError:
        return -1
    # FastDeploy means (id << 4) + rank, but C evaluates it as id << (4 + rank).
    number = env.message_queue() << (4 + rank) & 0xFFFFF
    key = (place.st_dev & 0xF) << 28 | (place.st_ino & 0xFF) << 20 | number
    return key - (1 << 32) if key >= 1 << 31 else key  # as an int of C


def shared_names(rank: int, device: str) -> tuple[str, str]:
    """Names in shared memory of the step's number and of its last complete layer."""
    number = env.shared_memory_id()
    place = f"{rank}.{device}" if number is None else f"tprank0_dprank{rank}_{number}"
    return f"splitwise_complete_prefilled_step_{place}", (
        f"splitwise_complete_prefilled_layer_{place}"
    )
