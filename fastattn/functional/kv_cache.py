"""A layer's paged cache of any type: its tensors, and the arguments that operators take of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from fastattn._foreign import not_a_tensor
from fastattn._ops import is_tensor
from fastattn.functional._attributes import check_int
from fastattn.functional._cache_types import (
    BLOCK_SIZE,
    DYNAMIC_TYPES,
    HEAD_DIMS,
    STATIC_TYPES,
    cache_shapes,
    check_cache_type,
    default_rotation,
    token_scales,
    value_dim,
)


@dataclass
class KVCache:
    """Tensors of a layer's cache, and how it is written and read.

    Attributes
    ----------
    key_cache, value_cache : Tensor
    cache_k_scales, cache_v_scales : Tensor or None
        Static scales, which writers read, or dynamic ones, which they write.
    cache_quant_type, fp8_format : str
    k_rotation : {"none", "hadamard"}
    k_center : Tensor or None
    k_feedback : Tensor or None
        Only the writer reads it.
    """

    key_cache: Tensor
    value_cache: Tensor
    cache_k_scales: Tensor | None
    cache_v_scales: Tensor | None
    cache_quant_type: str
    fp8_format: str
    k_rotation: str
    k_center: Tensor | None
    k_feedback: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the cache, the same for the writer and for the attention.

        ``write_cache_kv(key, value, c.key_cache, c.value_cache, .., **c.arguments)`` and
        ``paged_attention(q, c.key_cache, c.value_cache, .., **c.arguments)`` agree on the type,
        the scales, the rotation, the centre and the error feedback. Where the writer gets
        ``q_rotation="hadamard"`` too, the attention must not rotate Q again: give it
        ``k_rotation="none"`` then.
        """
        return {
            "cache_k_scales": self.cache_k_scales,
            "cache_v_scales": self.cache_v_scales,
            "cache_quant_type": self.cache_quant_type,
            "fp8_format": self.fp8_format,
            "k_rotation": self.k_rotation,
            "k_center": self.k_center,
            "k_feedback": self.k_feedback,
        }

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a token in this layer: codes of K and V, and dynamic scales."""
        tensors = [self.key_cache, self.value_cache]
        if self.cache_quant_type in DYNAMIC_TYPES:
            tensors += [x for x in (self.cache_k_scales, self.cache_v_scales) if x is not None]
        total = sum(int(np.prod(x.shape)) * x.element_size() for x in tensors)
        return total / (self.key_cache.shape[0] * BLOCK_SIZE)


def make_cache(
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    cache_quant_type: str = "none",
    *,
    dtype: str = "bfloat16",
    cache_k_scales: Tensor | None = None,
    cache_v_scales: Tensor | None = None,
    fp8_format: str = "e4m3",
    k_rotation: str = "auto",
    k_center: Tensor | None = None,
    k_feedback: Tensor | None = None,
    place: Any = None,
) -> KVCache:
    """Allocate a layer's paged cache of a type, with its scales, and settle how K is stored.

    Parameters
    ----------
    num_blocks : int
        Blocks of 64 tokens.
    num_kv_heads, head_dim : int
        KV and D. V has 128 channels where D is 192.
    cache_quant_type : str
        ``none``, ``cache_int8`` (or ``int8``), ``cache_fp8`` (or ``float8_e4m3fn``),
        ``block_wise_int8``, ``block_wise_fp8``, ``block_wise_int4``, ``block_wise_mxfp4``,
        ``block_wise_k8v4`` or ``block_wise_kfp8v4``.
    dtype : {"bfloat16", "float16"}
        Of a cache of type ``"none"``.
    cache_k_scales, cache_v_scales : Tensor, optional
        Static scales of ``cache_int8``, which needs them, and of ``cache_fp8``, whose scales are 1
        without them. Dynamic types get theirs here.
    fp8_format : {"e4m3", "e5m2"}
        Format of the codes of ``cache_fp8``.
    k_rotation : {"auto", "none", "hadamard"}
        How K is rotated before it is quantised. ``"auto"`` rotates where a type loses much
        without it: ``block_wise_int4``, ``block_wise_mxfp4``, ``block_wise_int8``,
        ``block_wise_k8v4`` and ``block_wise_kfp8v4`` (docs/quality.md). Types with static scales
        are not rotated by it, since their scales are of K as it was calibrated.
    k_center : Tensor, shape [KV, D], float32, optional
        What K is stored without.
    k_feedback : Tensor, shape [KV, D, D], float32, optional
        Error feedback of the writer, kept for :attr:`KVCache.arguments`.
    place : paddle.Place, optional
        Of the tensors; the current one by default.

    Returns
    -------
    KVCache
        ``key_cache``, ``value_cache`` and ``arguments``: keyword arguments that are the same for
        the writer and for the attention.

    Raises
    ------
    TypeError
        If a number is no int.
    ValueError
        If a number or a dtype is out of range, ``cache_int8`` has no scales, or another type has
        scales that it has no use for.
    NotImplementedError
        If the type or the head dimension is not supported.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import make_cache, paged_attention, write_cache_kv
    >>> cache = make_cache(1, 1, 64, "block_wise_int4")
    >>> cache.k_rotation, cache.bytes_per_token
    ('hadamard', 72.0)
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> seqs = int32([[0]]), int32([0, 2]), int32([0]), int32([2])  # one of two new tokens
    >>> x = paddle.ones([2, 1, 64], "float16")
    >>> both = cache.key_cache, cache.value_cache
    >>> _ = write_cache_kv(x, 3 * x, *both, *seqs, **cache.arguments)
    >>> paged_attention(x, *both, *seqs, 2, 2, **cache.arguments)[:, 0, 0].numpy().tolist()
    [3.0, 3.0]
    """
    op = "make_cache"
    kind = check_cache_type(op, cache_quant_type)
    check_int(op, "num_blocks", num_blocks, 1)
    check_int(op, "num_kv_heads", num_kv_heads, 1)
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"{op}: head_dim: {head_dim!r} is not supported; supported: "
            + ", ".join(map(str, HEAD_DIMS))
        )
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f"{op}: dtype: expected bfloat16 or float16, got {dtype!r}")
    if k_rotation not in ("auto", "none", "hadamard"):
        raise ValueError(f"{op}: k_rotation: expected auto, none or hadamard, got {k_rotation!r}")

    for name, x in (("k_center", k_center), ("k_feedback", k_feedback)):
        wanted = [num_kv_heads, head_dim] + [head_dim] * (name == "k_feedback")
        if x is not None and not is_tensor(x):
            raise not_a_tensor(op, name, x)
        if x is not None and list(x.shape) != wanted:
            raise ValueError(f"{op}: {name}: expected shape {wanted}, got {list(x.shape)}")

    def zeros(shape: list[int], code: Any) -> Tensor:
        return paddle.to_tensor(np.zeros(shape, code), place=place)

    code: Any = np.uint8
    if kind == "none":
        code = np.uint16 if dtype == "bfloat16" else np.float16  # Paddle's bfloat16 is uint16
    shapes = cache_shapes(kind, num_blocks, num_kv_heads, head_dim)
    key_cache, value_cache = (zeros(shape, code) for shape in shapes)
    scales: list[Tensor | None] = []
    for given, dim in ((cache_k_scales, head_dim), (cache_v_scales, value_dim(head_dim))):
        if given is not None and kind not in STATIC_TYPES:
            raise ValueError(f"{op}: {kind} has no static scales; leave them out")
        if given is None and kind == "cache_int8":
            raise ValueError(f"{op}: cache_int8 needs cache_k_scales and cache_v_scales")
        if given is None and kind == "cache_fp8":
            given = paddle.to_tensor(np.ones([1], np.float32), place=place)
        elif kind in DYNAMIC_TYPES:
            shape, name = token_scales(kind, dim)
            given = zeros([num_blocks, num_kv_heads, BLOCK_SIZE, *shape], np.dtype(name))
        scales.append(given)
    rotation = default_rotation(kind) if k_rotation == "auto" else k_rotation
    k_scales, v_scales = scales
    tensors = key_cache, value_cache, k_scales, v_scales
    return KVCache(*tensors, kind, fp8_format, rotation, k_center, k_feedback)
