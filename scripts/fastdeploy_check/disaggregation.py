"""Prefill and decode on different servers: signals of a worker, and agreements of its engine.

This process is both the worker and the receiver of its signals. In FastDeploy the receiver is the
cache messager, which waits for them and then moves bytes on GPUs. Nothing waits here: signals are
taken after each layer, so a queue never fills.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastdeploy_check.cases import NEOX, STEPS, Case, NotRun, environment
from fastdeploy_check.serving import Serving, Wrong, make_config

#: Variables that FastDeploy's engine sets for the workers of a server, by mode and by role.
MODES = {
    "per_chunk": "FLAGS_use_pd_disaggregation_per_chunk",
    "per_query": "FLAGS_use_pd_disaggregation",
}
SIGNALS = {"FLAGS_fmt_write_cache_completed_signal": "1"}

DAY = ("prefill", "chunk", "mixed", "decode", "drafts")
WORDS = 512 * 3 + 2
CONNECTOR = "fastdeploy.splitwise.splitwise_connector"
LIBC = ctypes.CDLL(None, use_errno=True)


class _Message(ctypes.Structure):
    _fields_ = (("mtype", ctypes.c_long), ("text", ctypes.c_int * WORDS))


def _key(rank: int) -> int:
    """Key of the queue, by the rule of ``custom_ftok.h`` in the tree's operators."""
    place, number = os.stat("/opt/"), int(os.environ["INFERENCE_MSG_QUEUE_ID"])
    key = (place.st_dev & 15) << 28 | (place.st_ino & 255) << 20 | number << (4 + rank) & 0xFFFFF
    return ctypes.c_int(key).value


class Queue:
    """The System V queue that a messager of the mode per_chunk reads."""

    def __init__(self) -> None:
        self.number = LIBC.msgget(_key(0), 0o1666)
        if self.number < 0:
            raise NotRun("this machine gives no System V queue")
        self.take()

    def take(self) -> list[list[int]]:
        """Take the messages from the queue."""
        found, message = [], _Message()
        size = ctypes.sizeof(message.text)
        no_wait = 0o4000
        while LIBC.msgrcv(self.number, ctypes.byref(message), size, 0, no_wait) >= 0:
            found.append(list(message.text[: 2 + 3 * message.text[0]]))
        return found

    def close(self) -> None:
        """Remove the queue."""
        LIBC.msgctl(self.number, 0, None)

    def expected(self, before: Any, layer: int, prefilled: list[list[int]]) -> list[list[int]]:
        """Expected signal of a layer: slot, cached and new tokens of each prefill sequence."""
        words = [word for sequence in prefilled for word in sequence]
        return [[len(prefilled), layer, *words]] if prefilled else []


class Integers:
    """FastDeploy's own signals in shared memory, as its messager makes them for per_query."""

    def __init__(self) -> None:
        signal = importlib.import_module("fastdeploy.inter_communicator").IPCSignal
        device = int(os.environ["CUDA_VISIBLE_DEVICES"])
        self.signals = [
            signal(
                name=f"splitwise_complete_prefilled_{what}_0",
                array=np.full(1, -1, np.int32),
                dtype=np.int32,
                suffix=device,
                create=True,
            )
            for what in ("step", "layer")
        ]
        for one in self.signals:
            one.value[0] = -1

    def take(self) -> list[list[int]]:
        """Return step and layer."""
        return [[int(one.value[0]) for one in self.signals]]

    def close(self) -> None:
        """Remove the signals."""
        for one in self.signals:
            one.clear()

    def expected(self, before: Any, layer: int, prefilled: list[list[int]]) -> list[list[int]]:
        """Number of the next step, and the layer if any sequence is in prefill."""
        return [[before[0][0] + 1, layer if prefilled else -1]]


@functools.cache
def _receiver(mode: str) -> Queue | Integers:
    """Receiver of a worker's signals, after the worker has set the number of its queue.

    A worker opens a queue only once, so all cases share one.
    """
    receiver = Queue() if mode == "per_chunk" else Integers()
    atexit.register(receiver.close)
    return receiver


def _worker(mode: str, role: str, kind: str | None) -> Serving:
    """A worker with a number of its own, so that no other server has its queue."""
    port = 1024 + os.getpid() % 60_000
    config = make_config(
        {},
        kind,
        splitwise_role=role,
        engine_worker_queue_port=str(port),
        cache_transfer_protocol="rdma",
    )
    found = config.parallel_config.pd_disaggregation_mode
    if found != mode:
        raise Wrong(f"FastDeploy's mode is {found}")
    return Serving(config, kind, **NEOX)


def _serve(mode: str, role: str, kind: str | None, silent: bool = False, **more: str) -> float:
    """Steps of a worker: its results, and its signals after each layer."""
    device = str(1_000_000 + os.getpid())
    with environment(
        **{MODES[mode]: "1", "CUDA_VISIBLE_DEVICES": device, "INFERENCE_MSG_QUEUE_ID": "", **more}
    ):
        server = _worker(mode, role, kind)
        return _day(server, _receiver(mode), silent)


def _day(server: Serving, receiver: Queue | Integers, silent: bool) -> float:
    worst = 0.0
    for name in DAY:
        new, prefill = STEPS[name]
        tokens = [[slot, server.cached[slot], n] for slot, n in enumerate(new) if prefill[slot] * n]
        before = receiver.take()

        def check(layer: int, before: Any = before, tokens: list[list[int]] = tokens) -> None:
            told = receiver.take()
            wanted = before if silent else receiver.expected(before, layer, tokens)
            if told != wanted:
                raise Wrong(f"layer {layer} signalled {told}, expected {wanted}")

        server.after_layer = check
        worst = max(worst, server.step(new, prefill))
    return worst


def _via_storage(mode: str) -> float:
    envs = importlib.import_module("fastdeploy.envs")
    name = "FD_PD_TRANSFER_VIA_STORAGE"
    if not hasattr(envs, name):
        raise NotRun(f"this FastDeploy has no {name}")
    return _serve(mode, "prefill", None, silent=True, **SIGNALS, **{name: "1"})


# ---- messages between engines ----


@contextlib.contextmanager
def _engine(kind: str | None, protocol: str, **more: Any) -> Iterator[tuple[Any, Any]]:
    """An engine's process: FastDeploy's connector unchanged, and as a backend modifies it."""
    module = importlib.import_module(CONNECTOR)
    plain = type("Plain", (), dict(vars(module.SplitwiseConnector)))
    try:
        config = make_config({}, kind, splitwise_role="prefill")
        for name, value in {"cache_transfer_protocol": protocol, **more}.items():
            setattr(config.cache_config, name, value)
        layers = importlib.import_module("fastdeploy.model_executor.layers.attention")
        with environment():
            layers.get_attention_backend()(config, 2, 4, 128)
        yield plain, module.SplitwiseConnector
    finally:
        del sys.modules[CONNECTOR]  # other cases are workers
        package = sys.modules.get("fastdeploy.splitwise")
        if hasattr(package, "splitwise_connector"):
            del package.splitwise_connector


def _request() -> Any:
    """FastDeploy's own request, as a prefill server sends it."""
    made = importlib.import_module("fastdeploy.engine.request").Request
    fields = {"request_id": "r", "prompt": "", "prompt_token_ids": [1], "messages": None,
              "prompt_token_ids_len": 1, "history": None, "tools": None, "system": None,
              "eos_token_ids": [1], "arrival_time": 0.0}  # fmt: skip
    asked = inspect.signature(made.__init__).parameters
    request = made.from_dict({name: value for name, value in fields.items() if name in asked})
    cache = {"rdma": {"ip": "p", "port": 7}}
    place = {"prefill_ip": "p", "prefill_connector_port": 7, "cache_info": cache}
    request.disaggregate_info = place
    return request


def _pass_on(sender: Any, receiver: Any, kind: str, payload: Any) -> tuple[str, Any]:
    """A message from one engine to another, as FastDeploy's bytes."""
    message = sender._serialize_message(kind, payload)
    return receiver._deserialize_message([b"", *message])  # the sender's name first


def _agree(kind: str | None, protocol: str = "rdma") -> float:
    """Requests between servers of fastattn, and with a server of FastDeploy's own backends."""
    with _engine(kind, protocol) as (plain, ours):
        sent: list[Any] = []
        here, there, foreign = (one.__new__(one) for one in (ours, ours, plain))
        there._send_message = lambda *message: sent.append(message)
        found, payload = _pass_on(here, there, "prefill", [_request()])
        if found != "prefill" or len(payload) != 1 or sent:
            raise Wrong(f"a request between servers of one kind became {found}: {sent}")
        found, payload = _pass_on(foreign, there, "prefill", [_request()])
        if (found == "prefill") != (kind is None) or bool(sent) != (kind is not None):
            raise Wrong(f"a request of FastDeploy's own server became {found}: {sent}")
        answer = [{"request_id": "r", "dest_block_ids": [1]}]
        for other in (there, foreign):
            _, (info,) = _pass_on(other, here, "cache_sync", answer)
            if ("error_msg" in info) != (other is foreign and kind is not None):
                raise Wrong(f"an answer became {info}")
    return 0.0


def _shared_pool(pool: str) -> float:
    """Names of blocks in a pool: with the layout, or refused."""
    with _pool_names() as names:
        plain = names.get_hash_str
        with _engine("int8", "rdma", kvcache_storage_backend=pool):
            if names.get_hash_str([1, 2]) == plain([1, 2]):
                raise Wrong("blocks of two layouts have one name")
    return 0.0


@contextlib.contextmanager
def _pool_names() -> Iterator[Any]:
    """FastDeploy's module that names blocks, for one case."""
    try:
        module = importlib.import_module("fastdeploy.cache_manager.prefix_cache_manager")
    except Exception as error:
        raise NotRun(f"{type(error).__name__}: {error}") from error
    before = getattr(module, "get_hash_str", None)
    if before is None:
        raise NotRun("this FastDeploy names blocks elsewhere")
    try:
        yield module
    finally:
        module.get_hash_str = before


def cases() -> Iterator[Case]:
    """Workers of both roles in both modes, and the messages that their engines accept."""
    found: dict[str, Callable[[], float]] = {}
    for mode in MODES:
        for kind in (None, "int8", "block_wise_fp8"):
            name = f"{mode}, {kind or 'none'}"
            found[f"prefill server, {name}"] = lambda m=mode, k=kind: _serve(
                m, "prefill", k, **SIGNALS
            )
        found[f"decode server, {mode}"] = lambda m=mode: _serve(m, "decode", None, silent=True)
        found[f"prefill server, {mode}, via storage"] = lambda m=mode: _via_storage(m)
    found["engines agree, none"] = lambda: _agree(None, "ipc,rdma")
    found["engines agree, int8"] = lambda: _agree("int8")
    found["engines agree, int8, ipc"] = lambda: _agree("int8", "ipc,rdma")
    for pool in ("mooncake", "attention_store"):
        found[f"pool {pool}, int8"] = lambda p=pool: _shared_pool(p)
    yield from found.items()
