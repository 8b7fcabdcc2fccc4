"""Paged caches and ragged steps for tests, as NumPy arrays, and the operators on them."""

from __future__ import annotations

import dataclasses

import numpy as np

import fastattn.functional as F
from fastattn._formats import FORMATS
from fastattn.functional._cache_types import codes_per_byte, token_scales
from fastattn.reference.layout import BLOCK_SIZE, cache_shape
from tests.support import draws
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, to_numpy, to_paddle, value_dim

#: (cache_quant_type, fp8_format) of every quantised cache.
QUANTISED = tuple(
    (row.name, fp8_format)
    for row in FORMATS
    if row.scheme != "none"
    for fp8_format in dict.fromkeys(("e4m3", row.other_code if row.code == "e4m3" else "e4m3"))
)


def is_dynamic(cache_quant_type: str) -> bool:
    return cache_quant_type.startswith("block_wise")


@dataclasses.dataclass
class Cache:
    """A layer's cache. Blocks hold arbitrary bytes (NaN codes among them) until written."""

    key: np.ndarray
    value: np.ndarray
    k_scales: np.ndarray | None
    v_scales: np.ndarray | None
    cache_quant_type: str
    fp8_format: str

    def copy(self) -> Cache:
        arrays = (self.key, self.value, self.k_scales, self.v_scales)
        return Cache(
            *(None if a is None else a.copy() for a in arrays),
            self.cache_quant_type,
            self.fp8_format,
        )

    @property
    def options(self) -> dict:
        return {"cache_quant_type": self.cache_quant_type, "fp8_format": self.fp8_format}


def make_cache(
    cache_quant_type: str,
    num_blocks: int,
    kv_heads: int,
    head_dim: int,
    *,
    fp8_format: str = "e4m3",
    dtype=BF16,
    scale_dtype=np.float32,
    granularity: str = "head",
    seed: int = 0,
) -> Cache:
    """Cache full of random bits; static scales are unequal and not 1.

    Parameters
    ----------
    granularity : {"tensor", "head", "channel"}
        Of static scales.
    """
    rng = np.random.default_rng(seed)
    dims = (head_dim, value_dim(head_dim))
    if cache_quant_type == "none":
        key, value = (
            rng.integers(0, 1 << 16, (num_blocks, kv_heads, BLOCK_SIZE, d), np.uint16).view(dtype)
            for d in dims
        )
        return Cache(key, value, None, None, "none", "e4m3")
    rows = [d // n for d, n in zip(dims, codes_per_byte(cache_quant_type))]
    key, value = (
        rng.integers(0, 256, cache_shape(kind, "fastattn", num_blocks, kv_heads, row), np.uint8)
        for kind, row in zip("kv", rows)
    )

    def sizes(dim: int) -> tuple[int, ...]:
        if is_dynamic(cache_quant_type):
            return (num_blocks, kv_heads, BLOCK_SIZE)
        return ({"tensor": 1, "head": kv_heads, "channel": kv_heads * dim}[granularity],)

    if token_scales(cache_quant_type, head_dim)[1] == "uint8":
        shapes = [(*sizes(d), *token_scales(cache_quant_type, d)[0]) for d in dims]
        k_scales, v_scales = (rng.integers(0, 256, shape, np.uint8) for shape in shapes)
        return Cache(key, value, k_scales, v_scales, cache_quant_type, fp8_format)
    k_scales, v_scales = (
        rng.uniform(0.5, 2.0, sizes(d)).astype(np.float32) * np.float32(factor)
        for d, factor in zip(dims, (0.02, 3))
    )
    return Cache(
        key,
        value,
        k_scales.astype(scale_dtype),
        v_scales.astype(scale_dtype),
        cache_quant_type,
        fp8_format,
    )


@dataclasses.dataclass
class Step:
    """Sequence metadata of one step."""

    block_tables: np.ndarray
    cu_seqlens_q: np.ndarray
    seq_lens_decoder: np.ndarray
    seq_lens_this_time: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return (
            self.block_tables,
            self.cu_seqlens_q,
            self.seq_lens_decoder,
            self.seq_lens_this_time,
        )

    @property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens_q[-1])


def make_step(
    cached: list[int], new: list[int], *, spare_blocks: int = 3, seed: int = 0
) -> tuple[Step, int]:
    """Sequences with `cached` and `new` tokens over shuffled blocks, and the number of blocks.

    Table entries past a sequence's last block are -1 or far out of range.
    """
    rng = np.random.default_rng(seed)
    needed = [-(-(c + n) // BLOCK_SIZE) for c, n in zip(cached, new)]
    num_blocks = sum(needed) + spare_blocks
    order = iter(rng.permutation(num_blocks))
    tables = np.where(rng.random((len(needed), max([*needed, 0]) + 1)) < 0.5, -1, num_blocks)
    for seq, count in enumerate(needed):
        for i in range(count):
            tables[seq, i] = next(order)
    return (
        Step(
            tables.astype(np.int32),
            np.cumsum([0, *new]).astype(np.int32),
            np.asarray(cached, np.int32),
            np.asarray(new, np.int32),
        ),
        num_blocks,
    )


def make_values(shape: tuple[int, ...], dtype, seed: int = 0) -> np.ndarray:
    """Normal values whose magnitude differs from row to row, so that no two scales agree."""
    rng = np.random.default_rng(seed)
    return draws.kept(_draw_values, rng, tuple(shape), np.dtype(dtype))


def _draw_values(rng, shape: tuple[int, ...], dtype) -> np.ndarray:
    rows = np.exp(rng.normal(size=(*shape[:-1], 1)))
    return (rng.normal(size=shape) * rows).astype(dtype)


def write(cache: Cache, key, value, step: Step, place: str, batch_id_per_token=None) -> Cache:
    """The operator's result, as a new cache."""
    arrays = [cache.key, cache.value, cache.k_scales, cache.v_scales]
    tensors = [None if a is None else to_paddle(a.copy(), place) for a in arrays]
    returned = F.write_cache_kv(
        to_paddle(key, place),
        to_paddle(value, place),
        tensors[0],
        tensors[1],
        *(to_paddle(a, place) for a in step.arrays),
        cache_k_scales=tensors[2],
        cache_v_scales=tensors[3],
        batch_id_per_token=(
            None if batch_id_per_token is None else to_paddle(batch_id_per_token, place)
        ),
        **cache.options,
    )
    for tensor, written in zip(returned, tensors):
        assert_same_bits(to_numpy(tensor), to_numpy(written), "returned")
    return Cache(*(None if t is None else to_numpy(t) for t in tensors), *cache.options.values())


def append(cache: Cache, key, value, tables, cached, cu, place: str, layout: str = "fastattn"):
    """The operator's (key, value)."""
    outputs = [to_paddle(a.copy(), place) for a in (key, value)]
    returned = F.append_cache_kv_c8(
        to_paddle(cache.key, place),
        to_paddle(cache.value, place),
        *outputs,
        to_paddle(tables, place),
        to_paddle(cached, place),
        to_paddle(cu, place),
        cache_k_scales=to_paddle(cache.k_scales, place),
        cache_v_scales=to_paddle(cache.v_scales, place),
        dynamic_quant=is_dynamic(cache.cache_quant_type),
        cache_layout=layout,
        **cache.options,
    )
    arrays = [to_numpy(t) for t in outputs]
    for tensor, array in zip(returned, arrays):
        assert_same_bits(to_numpy(tensor), array, "returned")
    return arrays


def assert_same_cache(actual: Cache, wanted: Cache) -> None:
    for name in ("key", "value", "k_scales", "v_scales"):
        if getattr(wanted, name) is not None:
            assert_same_bits(getattr(actual, name), getattr(wanted, name), name)
