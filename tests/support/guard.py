"""Tensors that end where the memory does: who reads or writes behind one ends the process.

Run as a module, it makes the calls that tests/tooling/test_guard.py checks.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import paddle

import fastattn.functional as F
from fastattn import _ops
from tests.support.calls import CALLS, make_call
from tests.support.compare import assert_same_bits
from tests.support.tensors import int32, to_numpy, to_paddle

_STORED = {2: np.int16, 4: np.int32, 8: np.int64, 1: np.uint8}


def guarded(tensor: paddle.Tensor) -> paddle.Tensor:
    """A contiguous copy whose last byte is the last before a page that nobody may touch."""
    array = np.ascontiguousarray(to_numpy(tensor))
    if array.size == 0:
        return tensor
    stored = array.view(_STORED[array.itemsize])
    pages = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    placed = np.frombuffer(memory, stored.dtype, stored.size, pages - array.nbytes)
    placed = placed.reshape(array.shape)
    placed[...] = stored
    result = paddle.utils.dlpack.from_dlpack(placed).view(tensor.dtype)
    assert result.data_ptr() == placed.ctypes.data, "DLPack made a copy"
    return result


def heads_of_192() -> dict[str, list[paddle.Tensor]]:
    """V has fewer channels than K, and prompts are decoded a block at a time."""
    rng = np.random.default_rng(3)
    q, k = (to_paddle(rng.normal(size=(70, h, 192)).astype(np.float16)) for h in (4, 2))
    v = to_paddle(rng.normal(size=(70, 2, 128)).astype(np.float16))
    cu, table = int32([0, 70]), int32([[0, 1]])
    key, value = (paddle.zeros([2, 2, 64, dim], "float16") for dim in (192, 128))
    seqs = table, cu, int32([0]), int32([70])
    F.write_cache_kv(k, v, key, value, *seqs)
    key, value = guarded(key), guarded(value)
    return {
        "flash_attention": [F.flash_attention(q, k, v, cu, cu, 70, 70, causal=True)],
        "paged_attention": [F.paged_attention(q, key, value, *seqs, 70, 70)],
    }


def main() -> None:
    """Make every call with plain tensors and with guarded ones; print its name before."""
    paddle.set_device("cpu")
    call = _ops.call

    def guarded_call(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> Any:
        taken = tuple(None if x is None else guarded(x) for x in inputs)
        outputs = call(op, taken, attrs)
        for given, copy in zip(inputs, taken):
            if copy is not None and copy is not given:
                paddle.assign(copy, given)
        return outputs

    for name in (*CALLS, "heads of 192 channels"):
        print(name, flush=True)
        results = []
        for function in (call, guarded_call):
            _ops.call = function
            made = heads_of_192() if name not in CALLS else {name: make_call(name, "cpu")()}
            results.append([to_numpy(x) for tensors in made.values() for x in tensors])
        for i, (plain, placed) in enumerate(zip(*results, strict=True)):
            assert_same_bits(placed, plain, f"{name}: result {i}")
    print("done")


if __name__ == "__main__":
    if sys.argv[1:] == ["--touch"]:
        behind = guarded(paddle.ones([3, 5]))
        ctypes.string_at(behind.data_ptr(), 3 * 5 * 4 + 1)
    main()
