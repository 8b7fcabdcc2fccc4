"""NumPy model of the indexer's logits, in fp64 on the dequantised operands."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.reference.mxfp4 import unpack_e2m1
from fastattn.reference.numerics import Array, from_codes, from_e2m1

_SCALE_BYTES = 4


def index_values(codes: Array, scales: ArrayLike | None, quant: str) -> NDArray[np.float64]:
    """Values of queries or keys: e4m3 codes without their scale, or E2M1 codes with their scale.

    Parameters
    ----------
    codes : array of uint8, shape [..., D] ("fp8") or [..., D / 2] ("mxfp4")
    scales : array of int32, shape [...]
        Scales of "mxfp4": byte b is the UE8M0 exponent of channels 32b .. 32b + 31.
    """
    codes = np.asarray(codes).view(np.uint8)
    if quant == "fp8":
        return from_codes(codes, "e4m3").astype(np.float64)
    values = from_e2m1(unpack_e2m1(codes)).astype(np.float64)
    exponents = np.ascontiguousarray(np.asarray(scales), "<i4").view(np.uint8)
    exponents = exponents.reshape(*values.shape[:-1], _SCALE_BYTES)[..., : values.shape[-1] // 32]
    scale = np.where(exponents == 255, np.nan, np.ldexp(1.0, exponents.astype(np.int32) - 127))
    return values * np.repeat(scale, 32, axis=-1)


def score(q: Array, keys: Array, weights: Array, k_scales: Array | None) -> NDArray[np.float64]:
    """``sum_h relu(q[h] . k) * weights[h]``, times the scales of the keys. NaN stays NaN."""
    with np.errstate(all="ignore"):
        result = np.asarray(weights, np.float64) @ np.maximum(q @ keys.T, 0.0)
        return result if k_scales is None else result * np.asarray(k_scales, np.float64)


def mqa_logits(
    q: ArrayLike,
    keys: ArrayLike,
    weights: ArrayLike,
    starts: ArrayLike,
    ends: ArrayLike,
    *,
    k_scales: ArrayLike,
    q_scales: ArrayLike | None = None,
    quant: str = "fp8",
    max_seqlen_k: int | None = None,
) -> NDArray[np.float32]:
    """See :func:`fastattn.functional.mqa_logits`."""
    k_scales = np.asarray(k_scales)
    queries = index_values(np.asarray(q), q_scales, quant)
    values = index_values(np.asarray(keys), k_scales, quant)
    first = np.clip(np.asarray(starts, np.int64), 0, len(values))
    last = np.clip(np.asarray(ends, np.int64), first, len(values))
    columns = len(values) if max_seqlen_k is None else max_seqlen_k
    out = np.full((len(queries), columns), -np.inf, np.float32)
    for row, (begin, end) in enumerate(zip(first.tolist(), last.tolist())):
        at = 0 if max_seqlen_k is not None else begin
        end = min(end, begin + columns - at)
        scales = k_scales[begin:end] if quant == "fp8" else None
        with np.errstate(over="ignore"):
            out[row, at : at + end - begin] = score(
                queries[row], values[begin:end], np.asarray(weights)[row], scales
            )
    return out


def paged_mqa_logits(
    q: ArrayLike,
    cache: ArrayLike,
    weights: ArrayLike,
    context_lens: ArrayLike,
    block_tables: ArrayLike,
    max_context_len: int,
    *,
    q_scales: ArrayLike | None = None,
    quant: str = "fp8",
    page_size: int | None = None,
) -> NDArray[np.float32]:
    """See :func:`fastattn.functional.paged_mqa_logits`."""
    queries = index_values(np.asarray(q), q_scales, quant)
    cache, lengths = np.asarray(cache), np.asarray(context_lens, np.int64)
    batch, next_n, heads, dim = queries.shape
    size = int(cache.shape[1]) if page_size is None else page_size
    code_bytes = dim if quant == "fp8" else dim // 2
    pages = cache.reshape(len(cache), math.prod(cache.shape[1:]))
    codes = pages[:, : size * code_bytes].reshape(-1, size, code_bytes)
    scales = pages[:, size * code_bytes : size * (code_bytes + _SCALE_BYTES)]
    scales = np.ascontiguousarray(scales).view("<f4" if quant == "fp8" else "<i4")
    if lengths.ndim == 1:
        lengths = lengths[:, None] - next_n + 1 + np.arange(next_n)
    weights = np.asarray(weights).reshape(batch, next_n, heads)
    out = np.full((batch, next_n, max_context_len), -np.inf, np.float32)
    for b, table in enumerate(np.asarray(block_tables)[:batch].tolist()):
        for block, page in enumerate(table):
            at = block * size
            if not 0 <= page < len(pages):
                continue
            values = index_values(codes[page], scales[page], quant)
            for i, length in enumerate(lengths[b].tolist()):
                count = min(length, max_context_len, at + size) - at
                if count <= 0:
                    continue
                factors = scales[page, :count] if quant == "fp8" else None
                with np.errstate(over="ignore"):
                    out[b, i, at : at + count] = score(
                        queries[b, i], values[:count], weights[b, i], factors
                    )
    return out.reshape(batch * next_n, max_context_len)
