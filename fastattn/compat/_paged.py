"""Common parts of the shims for paged attention: views of caches, and refusals."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
import paddle
from paddle import Tensor

from fastattn import _ops
from fastattn._foreign import not_a_tensor

BLOCK_SIZE = 64

_PLAIN = (paddle.bfloat16, paddle.float16, paddle.float32)
_FORMATS = {"uint8": "e4m3", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "int8": "e4m3"}


def refuse(op: str, name: str, why: str) -> NoReturn:
    """Raise NotImplementedError for an argument that no operator here supports."""
    raise NotImplementedError(f"{op}: {name}: {why}")


def refuse_given(op: str, instead: Mapping[str, str] | None = None, /, **arguments: Any) -> None:
    """Refuse each argument that is neither None nor False; `instead` says what to write for it."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            refuse(op, name, (instead or {}).get(name, "not supported"))


def require_tensors(op: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if not _ops.is_tensor(value):
            raise not_a_tensor(op, name, value)


def require_given(op: str, **arguments: Any) -> None:
    """Call :func:`require_tensors` for the arguments that are not None."""
    require_tensors(op, **{name: value for name, value in arguments.items() if value is not None})


def dtype_name(value: Any) -> str:
    """The name ``"bfloat16"`` of ``paddle.bfloat16``, of the string, or of a tensor's dtype."""
    return str(value).rpartition(".")[2]


class Blocks(NamedTuple):
    """Caches of another package, as :func:`fastattn.functional.paged_attention` takes them.

    Attributes
    ----------
    key, value : Tensor
        Views of the caller's caches, in blocks of 64 tokens. They share the caller's memory.
    quant_type, fp8_format : str
    per_page : int
        Blocks of a page: page p holds blocks ``p * stride`` to ``p * stride + per_page - 1``.
    stride : int
        Number of blocks from the start of one page to the next.
    """

    key: Tensor
    value: Tensor
    quant_type: str
    fp8_format: str
    per_page: int
    stride: int

    def options(self) -> dict[str, Any]:
        return {"cache_quant_type": self.quant_type, "fp8_format": self.fp8_format}


def _check_cache(op: str, name: str, cache: Any, rank: int, text: str) -> None:
    if not _ops.is_tensor(cache):
        raise not_a_tensor(op, name, cache)
    if len(cache.shape) != rank:
        raise ValueError(f"{op}: {name}: expected shape {text}, got {list(cache.shape)}")


def _transposed(op: str, name: str, cache: Tensor) -> Tensor:
    """View ``[blocks, KV, 64, D]`` of ``[blocks, 64, KV, D]``, without a copy."""
    if not paddle.in_dynamic_mode():
        refuse(op, name, "a static program would copy a cache of this layout; call in dygraph")
    view = cache.transpose([0, 2, 1, 3])
    if view.data_ptr() != cache.data_ptr():
        raise RuntimeError(f"{op}: {name}: Paddle copies transposed tensors here")
    return view


def check_page_size(op: str, name: str, page_size: int) -> None:
    """Refuse pages that do not consist of whole blocks of 64 tokens."""
    if page_size < BLOCK_SIZE or page_size % BLOCK_SIZE:
        refuse(
            op,
            name,
            f"pages of {page_size} tokens cannot be read in place, and no pool is copied; "
            f"supported: multiples of {BLOCK_SIZE}. Make the cache with pages of {BLOCK_SIZE}, or "
            "copy it once: to_blocks of examples/convert_vllm_pages.py",
        )


def _paged(op: str, name: str, cache: Tensor) -> Tensor:
    """View ``[pages, P, KV, D]`` as ``[pages * P / 64, 64, KV, D]`` over the same memory."""
    pages, page_size, kv_heads, head_dim = (int(n) for n in cache.shape)
    check_page_size(op, name, page_size)
    if page_size == BLOCK_SIZE:
        return cache
    if not cache.is_contiguous():
        refuse(op, name, f"pages of {page_size} tokens that are not contiguous; use pages of 64")
    return cache.reshape([pages * page_size // BLOCK_SIZE, BLOCK_SIZE, kv_heads, head_dim])


def nhd_blocks(op: str, k: Tensor, v: Tensor, names: tuple[str, str]) -> Blocks:
    """Views of caches ``[pages, page_size, KV, D]``.

    V of an 8-bit cache must have the layout of this package, ``[num_blocks, KV, D, 64]``. No other
    package has this byte order.
    """
    for name, cache in zip(names, (k, v)):
        _check_cache(op, name, cache, 4, "[num_blocks, page_size, KV, D]")
    shape = k.shape
    if shape[1] == BLOCK_SIZE and k.dtype in _PLAIN and v.shape == shape:  # the usual case
        views = _transposed(op, names[0], k), _transposed(op, names[1], v)
        return Blocks(*views, "none", "e4m3", 1, 1)
    pages, page_size, kv_heads, head_dim = (int(n) for n in shape)
    dtype = dtype_name(k.dtype)
    key = _transposed(op, names[0], _paged(op, names[0], k))
    per_page = page_size // BLOCK_SIZE
    if dtype not in _FORMATS:
        if list(v.shape) != list(k.shape):
            raise ValueError(f"{op}: {names[1]}: expected shape {k.shape}, got {list(v.shape)}")
        value = _transposed(op, names[1], _paged(op, names[1], v))
        return Blocks(key, value, "none", "e4m3", per_page, per_page)
    if page_size != BLOCK_SIZE:
        refuse(op, names[0], f"8-bit pages of {page_size} tokens; supported: {BLOCK_SIZE}")
    value = _packed_value(op, names[1], v, (pages, kv_heads, head_dim))
    quant_type = "cache_int8" if dtype == "int8" else "cache_fp8"
    return Blocks(key, value, quant_type, _FORMATS[dtype], 1, 1)


def _packed_value(op: str, name: str, v: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    pages, kv_heads, head_dim = sizes
    if list(v.shape) == [pages, kv_heads, head_dim, BLOCK_SIZE]:
        if [kv_heads, head_dim] != [BLOCK_SIZE, BLOCK_SIZE]:
            return v
        refuse(op, name, "64 KV heads of 64 channels in 8 bits, whose two layouts look the same")
    if list(v.shape) in (
        [pages, BLOCK_SIZE, kv_heads, head_dim],
        [pages, kv_heads, BLOCK_SIZE, head_dim],
    ):
        refuse(
            op,
            name,
            f"8-bit values of shape {list(v.shape)} cannot be read in place; expected "
            "[num_blocks, KV, D, 64], which write_cache_kv writes. Of [num_blocks, KV, 64, D] "
            'write convert_cache_layout(v, kind="v", cache_quant_type="cache_fp8", src="logical", '
            'dst="fastattn")',
        )
    raise ValueError(
        f"{op}: {name}: expected shape {[pages, kv_heads, head_dim, BLOCK_SIZE]} (8-bit values, "
        f"[num_blocks, KV, D, 64]), got {list(v.shape)}"
    )


def hnd_blocks(op: str, k: Tensor, v: Tensor, names: tuple[str, str]) -> Blocks:
    """Caches ``[num_blocks, KV, 64, D]``, which need no view. 8-bit V is as in `nhd_blocks`."""
    for name, cache in zip(names, (k, v)):
        _check_cache(op, name, cache, 4, "[num_blocks, KV, 64, D]")
    pages, kv_heads, page_size, head_dim = (int(n) for n in k.shape)
    if page_size != BLOCK_SIZE:
        check_page_size(op, names[0], page_size)
        refuse(op, names[0], f"HND pages of {page_size} tokens; supported: {BLOCK_SIZE}, or NHD")
    dtype = dtype_name(k.dtype)
    if dtype not in _FORMATS:
        return Blocks(k, v, "none", "e4m3", 1, 1)
    if head_dim == BLOCK_SIZE:
        refuse(op, names[1], "8-bit HND values of 64 channels, whose two layouts look the same")
    value = _packed_value(op, names[1], v, (pages, kv_heads, head_dim))
    quant_type = "cache_int8" if dtype == "int8" else "cache_fp8"
    return Blocks(k, value, quant_type, _FORMATS[dtype], 1, 1)


def pool_blocks(op: str, name: str, pool: Tensor, layout: str) -> Blocks:
    """Views of a pool ``[pages, 2, page_size, KV, D]`` (NHD) or ``[pages, 2, KV, 64, D]`` (HND)."""
    _check_cache(op, name, pool, 5, "[pages, 2, page_size, KV, D]")
    if pool.shape[1] != 2:
        raise ValueError(f"{op}: {name}: expected K and V, shape [pages, 2, ..], got {pool.shape}")
    names = (name, name)
    pages, _, page_size, kv_heads, head_dim = (int(n) for n in pool.shape)
    if layout == "HND":
        return hnd_blocks(op, pool[:, 0], pool[:, 1], names)
    if page_size <= BLOCK_SIZE or dtype_name(pool.dtype) in _FORMATS:
        return nhd_blocks(op, pool[:, 0], pool[:, 1], names)
    check_page_size(op, name, page_size)
    if not pool.is_contiguous():
        refuse(op, name, f"pages of {page_size} tokens that are not contiguous; use pages of 64")
    per_page = page_size // BLOCK_SIZE
    # All blocks of the pool. The blocks of V begin at the end of K's first page, so both have the
    # same ids.
    count = pages * 2 * per_page
    blocks = pool.reshape([count, BLOCK_SIZE, kv_heads, head_dim])
    key = _transposed(op, name, blocks[: count - per_page])
    value = _transposed(op, name, blocks[per_page:])
    return Blocks(key, value, "none", "e4m3", per_page, 2 * per_page)


#: Tensors of :func:`progression` that CUDA graphs read, by id.
_CAPTURED: dict[int, Tensor] = {}


@functools.lru_cache(maxsize=256)
def _made(start: float, step: float, count: int, dtype: str, place: str, index: int) -> Tensor:
    where = paddle.CUDAPlace(index) if place == "gpu" else paddle.CPUPlace()
    return paddle.to_tensor((start + step * np.arange(count)).astype(dtype), place=where)


def progression(start: float, step: float, count: int, dtype: str, like: Tensor) -> Tensor:
    """The tensor ``start + step * i`` for i below `count`, on the place of `like`.

    It is made once, and no call writes to it. A CUDA graph knows only the address, so a tensor that
    a graph captures is kept for ever.
    """
    place = like.place
    gpu = place.is_gpu_place()
    key = (start, step, count, dtype, "gpu" if gpu else "cpu", place.gpu_device_id() if gpu else 0)
    made = _made(*key)
    if gpu and capturing():
        _CAPTURED[id(made)] = made
    return made


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return bool(paddle.base.core.is_cuda_graph_capturing())


def blocks_of_pages(block_table: Tensor, per_page: int) -> Tensor:
    """Block table ``[B, n * per_page]`` of a page table ``[B, n]``. -1 stays negative."""
    if per_page == 1:
        return block_table
    offsets = progression(0, 1, per_page, "int32", block_table)
    rows, pages = (int(n) for n in block_table.shape)
    return (block_table.unsqueeze(-1) * per_page + offsets).reshape([rows, pages * per_page])
