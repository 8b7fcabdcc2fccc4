"""Inputs that several families share: a layer's cache, the metadata of a step, attention calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from numpy.typing import ArrayLike, NDArray

import fastattn.functional as F
from benchmarks.core.devices import Device
from benchmarks.core.timing import Call, bind
from fastattn.functional._cache_types import (
    TYPES,
    cache_shapes,
    codes_per_byte,
    token_scales,
    value_dim,
)
from fastattn.reference.layout import BLOCK_SIZE

HEADS, KV, DIM = 32, 8, 128
#: Bytes of an element: bf16, and a code with nothing else.
BF16, CODE = 2, 1


def is_dynamic(quant: str) -> bool:
    """Whether each token has scales of its own."""
    return quant.startswith("block_wise")


def token_bytes(quant: str, kv: int = KV, dim: int = DIM) -> int:
    """Bytes of K and V of a cached token, scales included where each token has its own."""
    values = sum(dim * (BF16 if quant == "none" else CODE) // n for n in codes_per_byte(quant))
    own, dtype = token_scales(quant, dim)
    scales = 4 if dtype == "float32" else own[0]
    return kv * (values + 2 * scales * is_dynamic(quant))


def starts_of(counts: ArrayLike) -> NDArray[np.int64]:
    """Where each of some ragged parts begins, and the end."""
    return np.concatenate([[0], np.cumsum(counts)])


class Cache:
    """A layer's cache with random codes."""

    def __init__(
        self, device: Device, quant: str, blocks: int, kv: int = KV, dim: int = DIM
    ) -> None:
        row = TYPES[quant]
        codes = [c if c in ("bfloat16", "e4m3") else "int8" for c in (row.code, row.value_code)]
        shapes = cache_shapes(quant, blocks, kv, dim)
        self.quant = quant
        self.blocks = blocks
        self.key = device.random(tuple(shapes[0]), codes[0], seed=1)
        self.value = device.random(tuple(shapes[1]), codes[1], seed=2)
        self.tensors = (self.key, self.value)
        self.scales: list[paddle.Tensor | None] = [None, None]
        if quant != "none":
            self.scales = [self._scales(device, kv, d) for d in (dim, value_dim(dim))]
        self.options: dict[str, Any] = {
            "cache_k_scales": self.scales[0],
            "cache_v_scales": self.scales[1],
            "cache_quant_type": quant,
        }

    def _scales(self, device: Device, kv: int, dim: int) -> paddle.Tensor:
        """Scales of K or of V, whose heads have so many channels."""
        own, dtype = token_scales(self.quant, dim)
        shape = (self.blocks, kv, BLOCK_SIZE, *own) if is_dynamic(self.quant) else (kv,)
        if dtype == "uint8":
            return device.array(np.random.default_rng(0).integers(121, 124, shape), np.uint8)
        unit = 1 / 16 if self.quant.endswith(("int8", "int4")) else 1.0
        return device.uniform(shape, 0.8 * unit, 1.2 * unit)


class Step:
    """Metadata of one step: sequences of `new` tokens each, behind `cached` ones."""

    def __init__(
        self, device: Device, cached: ArrayLike, new: ArrayLike, at_least: int = 0
    ) -> None:
        self.cached = np.asarray(cached, np.int64)
        self.new = np.asarray(new, np.int64)
        self.tokens = int(self.new.sum())
        self.longest = int((self.cached + self.new).max())
        pages = -(-(self.cached + self.new) // BLOCK_SIZE)
        #: Blocks of a cache that the sequences' are dealt out from, in random order.
        self.blocks = max(int(pages.sum()), at_least)
        ids = np.random.default_rng(4).permutation(self.blocks)[: pages.sum()]
        tables = np.full((len(pages), int(pages.max())), -1)
        tables[np.arange(pages.max()) < pages[:, None]] = ids
        #: Arguments of the operators that take a step.
        self.meta = (
            device.int32(tables),
            device.int32(starts_of(self.new)),
            device.int32(self.cached),
            device.int32(self.new),
        )


def paged_calls(
    device: Device,
    quant: str,
    step: Step,
    heads: int = HEADS,
    kv: int = KV,
    queries: str = "bfloat16",
    copies: int = 1,
    dim: int = DIM,
    **options: Any,
) -> list[Call]:
    """Calls of paged_attention for a step, each over a cache of its own."""
    shape = (step.tokens, heads, dim)
    options.update(max_seqlen_q=int(step.new.max()), max_seqlen_k=step.longest)
    calls: list[Call] = []
    for _ in range(copies):
        cache, q = Cache(device, quant, step.blocks, kv, dim), device.random(shape, queries)
        out = device.empty((step.tokens, heads, value_dim(dim)), "bfloat16")
        of_call = {**cache.options, **options, "out": out}
        calls.append(bind(F.paged_attention, q, *cache.tensors, *step.meta, **of_call))
    return calls


def write_calls(device: Device, cache: Cache, step: Step, copies: int) -> list[Call]:
    """Calls of write_cache_kv over keys and values of their own."""
    shape, rest = (step.tokens, KV, DIM), (*cache.tensors, *step.meta)
    pairs = [[device.random(shape, seed=seed) for seed in (1, 2)] for _ in range(copies)]
    return [bind(F.write_cache_kv, *pair, *rest, **cache.options) for pair in pairs]


def rope_write_calls(
    device: Device,
    cache: Cache,
    step: Step,
    angles: paddle.Tensor,
    copies: int,
    heads: int = HEADS,
    **options: Any,
) -> list[Call]:
    """Calls of rope_write_cache_kv over projections of their own."""
    shape, rest = (step.tokens, (heads + 2 * KV) * DIM), (*cache.tensors, angles, *step.meta)
    options.update(cache.options, num_heads=heads, num_kv_heads=KV)
    qkvs = [device.random(shape) for _ in range(copies)]
    return [bind(F.rope_write_cache_kv, qkv, *rest, **options) for qkv in qkvs]
