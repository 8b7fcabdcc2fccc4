"""A worker of a prefill server, and a process that receives its signals."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import uuid

import pytest

from fastattn.backends import fastdeploy as plugin
from fastattn.backends.kv_signals import queue_key, shared_names
from fastattn.env import KV_SIGNAL_SWITCH
from tests.support import kv_receiver
from tests.support.fastdeploy import Worker, chosen, fastdeploy, make_model
from tests.support.tensors import to_numpy

__all__ = ["chosen", "fastdeploy"]  # for the tests; the latter is a fixture

MODES = ("per_chunk", "per_query")


@pytest.fixture
def prefill(fastdeploy, monkeypatch):
    """A worker's process of a prefill server, whose signals nobody else receives."""
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "FLASH_ATTN")
    monkeypatch.setenv(KV_SIGNAL_SWITCH, "1")
    monkeypatch.setenv("ENABLE_EP_DP", "1")
    monkeypatch.setenv("SHM_UUID", uuid.uuid4().hex)
    # Of this number, the key has the lower 16 bits.
    monkeypatch.setenv("INFERENCE_MSG_QUEUE_ID", str(0x8000 | uuid.uuid4().int & 0x7FFF))
    plugin.register()
    yield fastdeploy
    opened = kv_receiver.LIBC.msgget(queue_key(0), 0)
    if opened >= 0:
        kv_receiver.LIBC.msgctl(opened, 0, None)  # IPC_RMID
    for name in shared_names(0, "0"):
        path = f"/dev/shm/{name}"
        if os.path.exists(path):
            os.unlink(path)


def configured(fd_config, mode, **changes):
    """The configuration of a worker of a prefill server."""
    fd_config.parallel_config.pd_disaggregation_mode = mode
    fd_config.parallel_config.local_engine_worker_queue_port = 1
    fd_config.parallel_config.local_data_parallel_id = 0
    fd_config.scheduler_config.splitwise_role = "prefill"
    for path, value in changes.items():
        part, name = path.split("__")
        setattr(getattr(fd_config, part), name, value)
    return fd_config


def prefill_worker(mode, kind, lengths, place="cpu", **options):
    worker = Worker(make_model(kind), kind, lengths, place, **options)
    configured(worker.fd_config, mode)
    heads = (worker.kv_heads, worker.q_heads, worker.model.head_dim)
    worker.backend = chosen()(worker.fd_config, *heads)
    return worker


class Receiver:
    """A process that receives a worker's signals and tells what it saw."""

    def __init__(self, worker, mode):
        per_layer = len(worker.caches) // len(worker.layers)
        sizes = [x.size * x.element_size() for x in worker.caches]
        if worker.place == "cpu":
            # Allow any process to read this one's memory: PR_SET_PTRACER, PR_SET_PTRACER_ANY.
            kv_receiver.LIBC.prctl(0x59616D61, ctypes.c_ulong(2**64 - 1), 0, 0, 0)
            handles, places = [], [[0, x.data_ptr()] for x in worker.caches]
        else:
            handles, places = gpu_places(worker.caches)
        tensors = [[*place, size] for place, size in zip(places, sizes)]
        order = {
            "process": os.getpid() if worker.place == "cpu" else None,
            "handles": handles,
            "layers": [tensors[i : i + per_layer] for i in range(0, len(tensors), per_layer)],
        }
        if mode == "per_chunk":
            order["key"] = queue_key(0)
        else:
            order["names"] = shared_names(0, "0")
        command = [sys.executable, kv_receiver.__file__, json.dumps(order)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
        self.told = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        first = self.next()
        if "refused" in first:
            self.process.kill()
            pytest.skip(f"a process may not read another's memory here: {first['refused']}")
        assert first == {"ready": True}

    def _listen(self):
        for line in self.process.stdout:
            self.told.put(json.loads(line))

    def next(self, seconds=60.0):
        """What it tells next; None if nothing comes in time."""
        try:
            return self.told.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def receive():
    """Starts receivers, and ends them."""
    started = []

    def start(worker, mode):
        started.append(Receiver(worker, mode))
        return started[-1]

    yield start
    for receiver in started:
        receiver.close()


@pytest.fixture
def messages(prefill):
    """The queue of the worker's rank, as its receiver opens it; gives all messages in it."""
    number = int(os.environ["INFERENCE_MSG_QUEUE_ID"])
    place = os.stat("/opt/")
    key = (place.st_dev & 0xF) << 28 | (place.st_ino & 0xFF) << 20 | (number << 4) & 0xFFFFF
    opened = kv_receiver.LIBC.msgget(ctypes.c_int(key), 0o1666)
    assert opened >= 0

    def take():
        found = []
        while (message := kv_receiver.receive(opened, wait=False)) is not None:
            found.append(message)
        return found

    return take


def digest(worker, layer):
    """Of a layer's tensors, as a receiver makes it."""
    per_layer = len(worker.caches) // len(worker.layers)
    found = hashlib.sha256()
    for tensor in worker.caches[layer * per_layer :][:per_layer]:
        found.update(to_numpy(tensor).tobytes())
    return found.hexdigest()


def gpu_places(caches):
    """CUDA's handles of the allocations of tensors, and (handle, offset) of each tensor."""
    driver = ctypes.CDLL("libcuda.so.1")
    handles, places = {}, []
    for tensor in caches:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        address = ctypes.c_uint64(tensor.data_ptr())
        found = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address)
        assert found == 0
        if base.value not in handles:
            text = ctypes.create_string_buffer(64)
            assert driver.cuIpcGetMemHandle(text, base) == 0
            handles[base.value] = list(text.raw)
        places.append([list(handles).index(base.value), tensor.data_ptr() - base.value])
    return list(handles.values()), places
