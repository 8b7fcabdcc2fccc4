"""The other end of a worker's signals: a process that waits for them and looks at the caches.

It stands for FastDeploy's cache messager: a System V queue is read with one ``msgrcv`` of 512
sequences' size, shared memory is polled. For every signal it prints a line of JSON: the layer, the
words of the message (or the step), and a digest of the layer's bytes as they are at that moment.
It imports neither Paddle nor fastattn; on a GPU it maps the caches through CUDA's driver.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import sys
import time
from typing import Any

WORDS = 512 * 3 + 2

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.process_vm_readv.restype = ctypes.c_ssize_t


class Message(ctypes.Structure):
    _fields_ = (("mtype", ctypes.c_long), ("text", ctypes.c_int * WORDS))


def receive(queue: int, wait: bool = True) -> list[int] | None:
    """Words of the next message; None if there is none and `wait` is false."""
    message = Message()
    flags = 0 if wait else 0o4000  # IPC_NOWAIT
    size = LIBC.msgrcv(queue, ctypes.byref(message), ctypes.sizeof(message.text), 0, flags)
    if size < 0:
        return None
    assert size == ctypes.sizeof(message.text) and message.mtype == 1
    return list(message.text[: 2 + 3 * message.text[0]])


class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("size", ctypes.c_size_t))


class Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


class Caches:
    """Bytes of each layer's tensors, in another process or on a GPU.

    Parameters
    ----------
    process : int or None
        Process whose memory they are in; None: they are on GPU 0.
    handles : list of list of int
        CUDA's handles of the allocations that they are in.
    layers : [layer][tensor] of [handle, offset, size]
        In a process the offset is the address.
    """

    def __init__(
        self, process: int | None, handles: list[list[int]], layers: list[list[list[int]]]
    ) -> None:
        self.process, self.layers, self.bases = process, layers, []
        if process is not None:
            return
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.check(self.driver.cuInit(0))
        context = ctypes.c_void_p()
        self.check(self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
        self.check(self.driver.cuCtxSetCurrent(context))
        opens = self.driver.cuIpcOpenMemHandle_v2
        opens.argtypes = [ctypes.c_void_p, Handle, ctypes.c_uint]
        for text in handles:
            handle, base = Handle(), ctypes.c_uint64()
            ctypes.memmove(ctypes.byref(handle), bytes(text), 64)
            self.check(opens(ctypes.byref(base), handle, 1))
            self.bases.append(base.value)

    @staticmethod
    def check(result: int) -> None:
        assert result == 0, f"CUDA driver: error {result}"

    def read(self, handle: int, offset: int, size: int) -> bytes:
        block = ctypes.create_string_buffer(size)
        if self.process is None:
            address = ctypes.c_uint64(self.bases[handle] + offset)
            self.check(self.driver.cuMemcpyDtoH_v2(block, address, ctypes.c_size_t(size)))
        else:
            here, there = Vector(ctypes.addressof(block), size), Vector(offset, size)
            one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
            done = LIBC.process_vm_readv(
                self.process, ctypes.byref(here), one, ctypes.byref(there), one, none
            )
            if done != size:
                raise PermissionError(ctypes.get_errno(), "process_vm_readv")
        return block.raw

    def digest(self, layer: int) -> str:
        found = hashlib.sha256()
        for handle, offset, size in self.layers[layer]:
            found.update(self.read(handle, offset, size))
        return found.hexdigest()


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def shared_integer(name: str) -> memoryview:
    """An integer in shared memory, made if there is none."""
    with open(f"/dev/shm/{name}", "a+b") as file:
        file.truncate(4)
        return memoryview(mmap.mmap(file.fileno(), 4)).cast("i")


def poll(step_name: str, layer_name: str, caches: Caches) -> None:
    """Tell every change of the two integers, until the parent ends this process."""
    values = [shared_integer(name) for name in (step_name, layer_name)]
    for value in values:
        value[0] = -1
    tell(ready=True)
    seen = (-1, -1)
    while True:
        layer = values[1][0]  # before the step, as the messager reads them
        now = (values[0][0], layer)
        if now == seen:
            time.sleep(0.0002)
            continue
        seen = now
        if layer >= 0:
            tell(layer=layer, step=now[0], digest=caches.digest(layer))
        else:
            tell(layer=-1, step=now[0])


def main() -> None:
    order = json.loads(sys.argv[1])
    caches = Caches(order["process"], order["handles"], order["layers"])
    try:
        caches.digest(0)
    except PermissionError as error:
        tell(refused=str(error))
        return
    if "names" in order:
        poll(*order["names"], caches)
        return
    queue = LIBC.msgget(order["key"], 0o1666)
    assert queue >= 0
    tell(ready=True)
    while True:
        text = receive(queue)
        if text is None:
            return
        tell(layer=text[1], text=text, digest=caches.digest(text[1]))


if __name__ == "__main__":
    main()
