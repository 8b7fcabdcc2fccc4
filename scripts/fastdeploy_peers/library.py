"""FastDeploy's operators from `scripts/build_fastdeploy_peers.py`, on torch tensors.

This needs torch with CUDA and no Paddle. Every call runs on torch's current stream.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

import torch

#: torch's types -> indices in the stand-in's phi::DataType.
_TYPES = {
    torch.uint8: 2,
    torch.int32: 3,
    torch.bfloat16: 6,
    torch.float32: 7,
    torch.float8_e4m3fn: 9,
}
#: Query rows per block in prefill and in decode, and tokens per chunk in decode, as FastDeploy's
#: runner and backend set them.
ENCODER_ROWS, DECODER_ROWS, PARTITION = 64, 16, 1024
BLOCK = 64


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("pointer", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("dims", ctypes.c_int64 * 6),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
    ]


class _Append(ctypes.Structure):
    _fields_ = [
        ("quant", ctypes.c_char_p),
        ("neox", ctypes.c_int),
        ("rope_3d", ctypes.c_int),
        ("max_model_len", ctypes.c_int),
        ("quant_max", ctypes.c_float),
        ("quant_min", ctypes.c_float),
        ("encoder_rows", ctypes.c_int),
        ("decoder_rows", ctypes.c_int),
        ("partition", ctypes.c_int),
    ]


class _Prefill(ctypes.Structure):
    _fields_ = [
        ("quant", ctypes.c_char_p),
        ("neox", ctypes.c_int),
        ("rope_3d", ctypes.c_int),
        ("max_model_len", ctypes.c_int),
        ("kv_tokens", ctypes.c_int),
    ]


class Shape(NamedTuple):
    """Heads of a layer, its cache type and its rotation."""

    heads: int
    kv: int
    dim: int
    quant: str
    neox: bool
    rope_3d: bool
    max_model_len: int


class Cache(NamedTuple):
    """A layer's cache [blocks, kv, 64, D] and scales.

    `quant_scales` multiply values at the write: (kv,) for static types. For block_wise_fp8 the
    writer stores them, (blocks, kv, 64). `dequant_scales` multiply codes at the read.
    """

    key: torch.Tensor
    value: torch.Tensor
    quant_scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    dequant_scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)


def _given(tensor: torch.Tensor | None) -> _Tensor:
    if tensor is None:
        return _Tensor(None, 0, 0)
    if not tensor.is_contiguous():
        raise ValueError("a tensor is not contiguous")
    dims = (ctypes.c_int64 * 6)(*tensor.shape)
    return _Tensor(tensor.data_ptr(), _TYPES[tensor.dtype], tensor.dim(), dims)


class Library:
    """The shared library, and the memory from which its operators allocate."""

    def __init__(self, path: Path) -> None:
        # ctypes binds all symbols at once, but the library leaves unused symbols undefined.
        loader = ctypes.CDLL(None).dlopen
        loader.restype, loader.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
        handle = loader(str(path.resolve()).encode(), os.RTLD_LAZY)
        if not handle:
            reason = ctypes.CDLL(None).dlerror
            reason.restype = ctypes.c_char_p
            raise OSError(f"cannot load {path}: {reason()}")
        self._library = ctypes.CDLL(str(path), handle=handle)
        for name in ("append_attention", "split_blocks", "gqa_rope_write_cache",
                     "merge_prefill_decode"):  # fmt: skip
            getattr(self._library, f"peer_{name}").restype = ctypes.c_char_p
        self._workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")

    def _call(self) -> _Call:
        stream = torch.cuda.current_stream().cuda_stream
        return _Call(stream, self._workspace.data_ptr(), self._workspace.numel())

    @staticmethod
    def _check(error: bytes | None) -> None:
        if error is not None:
            raise RuntimeError(error.decode())

    def split_blocks(self, step: Step, group_size: int) -> None:
        """Prepare a step for all of its layers: `get_block_shape_and_split_kv_block`."""
        tensors = (_Tensor * 15)(*map(_given, step.split))
        where = self._call()
        rows = ENCODER_ROWS, DECODER_ROWS, group_size
        self._check(self._library.peer_split_blocks(tensors, *rows, ctypes.byref(where)))

    def append_attention(
        self,
        step: Step,
        shape: Shape,
        qkv: torch.Tensor,
        cache: Cache,
        out: torch.Tensor,
        rotary: torch.Tensor,
        sinks: torch.Tensor | None = None,
        decode_only: bool = False,
    ) -> None:
        """Rotate (qkv too), write the cache and attend: `append_attention_with_output`.

        With `decode_only`, only for sequences that are not in prefill.
        """
        longest = step.longest_decode if decode_only else step.longest
        given: list[torch.Tensor | None] = [qkv, cache.key, cache.value, *step.append, longest, out]
        given += [rotary, None, None, None, *cache.quant_scales, *cache.dequant_scales]
        given += [None] * 8 + [sinks]
        tensors = (_Tensor * 37)(*map(_given, given))
        bound = 127.0 if shape.quant == "cache_int8" else 448.0
        attributes = _Append(
            shape.quant.encode(),
            int(shape.neox),
            int(shape.rope_3d),
            shape.max_model_len,
            bound,
            -bound,
            ENCODER_ROWS,
            DECODER_ROWS,
            PARTITION,
        )
        where = self._call()
        append = self._library.peer_append_attention
        self._check(append(tensors, ctypes.byref(attributes), ctypes.byref(where)))

    def gqa_rope_write_cache(
        self, step: Step, shape: Shape, qkv: torch.Tensor, cache: Cache, rotary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate, write the cache of prefill, and gather Q, K and V of the step, including
        prefixes.

        The results are (T, heads, D) and twice (K, kv, D), in memory where the next operator
        allocates.
        """
        lengths = step.this_time, step.encoder, step.decoder
        given: list[torch.Tensor | None] = [qkv, cache.key, cache.value, step.starts]
        given += [step.key_starts, rotary, *lengths, step.batch, step.tables, *step.kv]
        given += [*step.prefix, None, None, *cache.quant_scales, *cache.dequant_scales]
        # The operator reads the handle of zero points, which a cache does not have.
        given += [step.starts, step.starts, None]
        tensors = (_Tensor * 26)(*map(_given, given))
        attributes = _Prefill(
            shape.quant.encode(),
            int(shape.neox),
            int(shape.rope_3d),
            shape.max_model_len,
            step.kv_tokens,
        )
        made, where = (ctypes.c_void_p * 3)(), self._call()
        write = self._library.peer_gqa_rope_write_cache
        self._check(write(tensors, ctypes.byref(attributes), made, ctypes.byref(where)))
        heads = (step.tokens, shape.heads), *[(step.kv_tokens, shape.kv)] * 2
        q, k, v = (
            self._made(pointer, (*size, shape.dim)) for pointer, size in zip(made, heads)
        )  # fmt: skip
        return q, k, v

    def _made(self, pointer: int | None, size: tuple[int, int, int]) -> torch.Tensor:
        """A bf16 tensor that an operator left in the workspace."""
        begin = (pointer or 0) - self._workspace.data_ptr()
        bytes_of_it = 2 * size[0] * size[1] * size[2]
        return self._workspace[begin : begin + bytes_of_it].view(torch.bfloat16).view(size)

    def merge_prefill_decode(
        self, step: Step, shape: Shape, prefill: torch.Tensor, decode: torch.Tensor
    ) -> None:
        """Copy the rows of decoding sequences into the rows of prefill sequences (T, heads * D)."""
        lengths = step.encoder, step.decoder, step.this_time
        tensors = (_Tensor * 6)(*map(_given, (prefill, decode, *lengths, step.starts)))
        where, merge = self._call(), self._library.peer_merge_prefill_decode
        self._check(merge(tensors, shape.heads, shape.dim, ctypes.byref(where)))


class Step:
    """Metadata of a step, as FastDeploy's runner makes them.

    Parameters
    ----------
    sequences : list of (int, int, bool)
        Cached tokens, new tokens, and whether the sequence is in prefill.
    tables : torch.Tensor
        Blocks of each sequence (B, width), int32 on the GPU; -1 for no block.
    group_size, max_model_len : int
    """

    def __init__(
        self,
        sequences: list[tuple[int, int, bool]],
        tables: torch.Tensor,
        group_size: int,
        max_model_len: int,
    ) -> None:
        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cuda")

        def empty(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device="cuda")

        def on_host(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32).pin_memory()

        new = [n for _, n, _ in sequences]
        self.tokens = sum(new)
        self._longest_decode: torch.Tensor | None = None
        encoder = ints([n if prefill else 0 for _, n, prefill in sequences])
        decoder, this_time = ints([cached for cached, _, _ in sequences]), ints(new)
        starts = torch.zeros(len(new) + 1, dtype=torch.int32, device="cuda")
        starts[1:] = this_time.cumsum(0)
        rows = torch.arange(len(new), device="cuda", dtype=torch.int32)
        batch = rows.repeat_interleave(this_time.long())
        prefill_tiles = len(new) * (max_model_len * group_size // ENCODER_ROWS + 1)
        encoder_tiles = empty(prefill_tiles), empty(prefill_tiles), on_host(1)
        kv_tiles = len(new) * (max_model_len // BLOCK + 1)
        kv = empty(kv_tiles), empty(kv_tiles), on_host(1)
        decode = empty(1024 * len(new)), empty(1024 * len(new)), on_host(1)
        device_count, chunk, longest = empty(1), empty(1), on_host(9)
        lengths = encoder, decoder, this_time
        self.split = (
            *lengths, *decode, device_count, chunk, longest, *encoder_tiles, *kv
        )  # fmt: skip
        self.append = (
            *lengths, batch, starts, tables, *encoder_tiles, *kv, *decode
        )  # fmt: skip
        self.encoder, self.decoder, self.this_time = lengths
        self.starts, self.batch, self.tables, self.kv = starts, batch, tables, kv
        self.longest = longest
        # pre_cache_len_concat computes this once per step: cached tokens of sequences in prefill.
        prefixes = [cached if prefill else 0 for cached, _, prefill in sequences]
        keys = [n + prefix for n, prefix in zip(new, prefixes)]
        self.kv_tokens = sum(keys)
        self.key_starts = torch.zeros_like(starts)
        self.key_starts[1:] = ints(keys).cumsum(0)
        tiles = [(i, at) for i, prefix in enumerate(prefixes) for at in range(-(-prefix // BLOCK))]
        of_prefix = ints([i for i, _ in tiles] or [0]), ints([at for _, at in tiles] or [0])
        self.prefix = *of_prefix, torch.tensor([len(tiles)], dtype=torch.int32)
        #: Maximum numbers of queries and keys of a sequence, for the flash attention.
        self.longest_ragged = max(new), max(keys)

    @property
    def longest_decode(self) -> torch.Tensor:
        """The step's lengths on the host, as if no sequence were in prefill."""
        if self._longest_decode is None:
            self._longest_decode = self.longest.clone()
            self._longest_decode[1] = 0
        return self._longest_decode
