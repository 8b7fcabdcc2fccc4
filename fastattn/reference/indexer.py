"""NumPy model of the DeepSeek-V4 indexer operators.

The fp32 operations are the same as in the kernels, in the same order. So codes, scales and weights
agree bit by bit: sums are trees of a fixed shape, and exp is a polynomial.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastattn.reference.mxfp4 import mxfp4_quantize
from fastattn.reference.numerics import (
    Array,
    amax,
    bfloat16,
    exp_non_positive,
    round_to,
    to_codes,
)
from fastattn.reference.quantize import quantize_fp8

ROPE_DIM = 64
#: Smallest amax of an FP8 block.
FP8_AMAX_FLOOR = 1e-4
#: Channels that share one UE8M0 scale in the "fp8_512" page.
WIDE_BLOCK = 64


class PageFormat(NamedTuple):
    """Layout of a page of n tokens: n * `code_bytes` bytes of codes, then n * `scale_bytes` of
    scales.
    """

    head_dim: int
    code_bytes: int
    scale_bytes: int


PAGE_FORMATS = {
    "fp8": PageFormat(128, 128, 4),
    "mxfp4": PageFormat(128, 64, 4),
    "fp8_512": PageFormat(512, 576, 8),
}


def power_of_two_scale(block_amax: Array, floor: float = FP8_AMAX_FLOOR) -> Array:
    """Smallest power of two that is at least ``max(amax, floor) / 448``, fp32.

    The exponent comes from the bits of the quotient, without a logarithm. An infinite amax counts
    as the largest fp32 value. NaN stays NaN.
    """
    block_amax = np.asarray(block_amax, np.float32)
    finite = np.where(np.isinf(block_amax), np.finfo(np.float32).max, block_amax)
    quotient = np.maximum(finite, np.float32(floor)) / np.float32(448)
    mantissa, exponent = np.frexp(quotient)  # quotient = mantissa * 2^exponent, mantissa < 1
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    scale = np.ldexp(np.float32(1), np.where(np.isnan(quotient), 0, exponent))
    return np.where(np.isnan(quotient), np.float32(np.nan), scale).astype(np.float32)


def ue8m0_byte(scale: Array) -> Array:
    """Biased exponent of a power-of-two scale; 255 for NaN."""
    bits = np.ascontiguousarray(scale, np.float32).view(np.uint32)
    return ((bits >> 23) & 0xFF).astype(np.uint8)


def rotate_last(x: Array, cos_sin: Array) -> Array:
    """GPT-J (interleaved) rotation of the last 64 channels; `cos_sin` [..., 64] broadcasts."""
    x, cos_sin = np.array(x, np.float32), np.asarray(cos_sin, np.float32)
    cos, sin = cos_sin[..., :32], cos_sin[..., 32:]
    even, odd = x[..., -ROPE_DIM::2].copy(), x[..., -ROPE_DIM + 1 :: 2].copy()
    with np.errstate(all="ignore"):
        x[..., -ROPE_DIM::2] = even * cos - odd * sin
        x[..., -ROPE_DIM + 1 :: 2] = odd * cos + even * sin
    return x


def tree_sum(x: Array) -> Array:
    """Sum of a power of two of elements of the last axis: neighbours first, then pairs of pairs."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def fp8_block(x: Array, floor: float = FP8_AMAX_FLOOR) -> tuple[Array, Array]:
    """e4m3 codes of the last axis and their power-of-two scale."""
    scale = power_of_two_scale(amax(x, axis=-1), floor)
    with np.errstate(all="ignore"):
        return to_codes(x / scale[..., None], "e4m3"), scale


def indexer_q_quant(
    q: Array, weights: Array, factor: float = 1.0, *, token_of_query: Array | None = None
) -> tuple[Array, Array]:
    """See :func:`fastattn.functional.indexer_q_quant`.

    Returns
    -------
    codes : array of uint8, shape [N, H, 128]
    weights : array of float32, shape [N, H]
    """
    codes, scales = quantize_fp8(q, granularity="token")
    with np.errstate(all="ignore"):
        factors = scales[..., 0] * np.float32(factor)
        folded = np.asarray(weights, np.float32) * factors
    if token_of_query is None:
        return codes, folded
    tokens = np.asarray(token_of_query)
    known = (tokens >= 0) & (tokens < len(codes))
    rows = np.zeros((len(tokens), *codes.shape[1:]), np.uint8)
    rows[known] = codes[tokens[known]]
    row_weights = np.zeros((len(tokens), *folded.shape[1:]), np.float32)
    row_weights[known] = folded[tokens[known]]
    return rows, row_weights


def indexer_q_rope_quant(
    positions: Array,
    q: Array,
    cos_sin_cache: Array,
    weights: Array,
    softmax_scale: float,
    head_scale: float,
    *,
    quant: str = "fp8",
) -> tuple[Array, Array, Array]:
    """See :func:`fastattn.functional.indexer_q_rope_quant`."""
    at = np.clip(np.asarray(positions, np.int64), 0, len(cos_sin_cache) - 1)
    x = round_to(rotate_last(q, cos_sin_cache[at][:, None]), bfloat16)
    weights = np.asarray(weights, np.float32)
    with np.errstate(all="ignore"):
        if quant == "mxfp4":
            codes, block_scales = mxfp4_quantize(x)
            scales = np.ascontiguousarray(block_scales).view("<i4")[..., 0]
        else:
            codes, scales = fp8_block(x)
            weights = weights * scales
        return codes, scales, weights * np.float32(softmax_scale) * np.float32(head_scale)


def compress_group(kv: Array, score: Array) -> Array:
    """Average of `kv` over the states of a group, weighted by a softmax of `score` per channel.

    Parameters
    ----------
    kv, score : array of float32, shape [n, HEAD]
        n is a multiple of 8. A missing state has score -inf and kv 0.

    Returns
    -------
    array of float32, shape [HEAD]
        0 if all scores are -inf. States are summed one by one in 8 segments, then pairwise.
    """
    with np.errstate(all="ignore"):
        # a NaN score makes its own weight NaN in the next lines
        maximum = np.fmax.reduce(score, axis=0)
        maximum = np.where(np.isneginf(maximum), np.float32(0), maximum)
        weight = exp_non_positive(score - maximum)
        shape = (8, score.shape[0] // 8, score.shape[1])
        products, weights = (weight * kv).reshape(shape), weight.reshape(shape)
        numerator, denominator = np.zeros((2, shape[0], shape[2]), np.float32)
        for i in range(shape[1]):
            numerator = numerator + products[:, i]
            denominator = denominator + weights[:, i]
        numerator, denominator = tree_sum(numerator.T), tree_sum(denominator.T)
        return np.where(denominator == 0, np.float32(0), numerator / denominator)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """``(x * (1 / sqrt(mean(x^2) + eps))) * weight`` in fp32."""
    with np.errstate(all="ignore"):
        mean = tree_sum(x * x) * np.float32(1 / x.shape[-1])
        inverse = np.float32(1) / np.sqrt(mean + np.float32(eps))
        return x * inverse * np.asarray(weight, np.float32)


def _gather(
    state_cache: Array, table: Array, position: int, compress_ratio: int
) -> tuple[Array, Array] | None:
    """Values and scores [n, HEAD] of the states up to `position`; None if one has no block."""
    overlap = 1 if compress_ratio == 4 else 0
    num_blocks, state_block, width = state_cache.shape
    head = width // 2 // (1 + overlap)
    n = (1 + overlap) * compress_ratio
    kv = np.zeros((n, head), np.float32)
    score = np.full((n, head), -np.inf, np.float32)
    for j in range(n):
        p = position - n + 1 + j
        if p < 0:
            continue
        if p // state_block >= len(table) or not 0 <= table[p // state_block] < num_blocks:
            return None
        state = state_cache[table[p // state_block], p % state_block].astype(np.float32)
        offset = head if j >= compress_ratio else 0
        kv[j] = state[offset : offset + head]
        score[j] = state[width // 2 + offset : width // 2 + offset + head]
    return kv, score


def token_bytes(x: Array, quant: str) -> tuple[Array, Array]:
    """Code bytes and scale bytes of one token, from its bf16-rounded channels."""
    if quant == "fp8":
        codes, scale = fp8_block(x)
        return codes, np.asarray([scale], "<f4").view(np.uint8)
    if quant == "mxfp4":
        return mxfp4_quantize(x)
    plain = len(x) - ROPE_DIM
    codes, scales = fp8_block(x[:plain].reshape(-1, WIDE_BLOCK))
    rope = x[plain:].astype(bfloat16).view(np.uint16)
    rope = np.where(np.isnan(x[plain:]), np.uint16(0x7FFF), rope).view(np.uint8)
    return np.concatenate([codes.ravel(), rope]), np.append(ue8m0_byte(scales), np.uint8(0))


def indexer_kv_compress_insert(
    state_cache: Array,
    block_tables: Array,
    batch_id_per_token: Array,
    positions: Array,
    state_slots: Array,
    kv_slots: Array,
    rms_norm_weight: Array,
    cos_sin_cache: Array,
    kv_cache: Array,
    *,
    compress_ratio: int,
    page_size: int,
    rms_norm_eps: float = 1e-6,
    quant: str = "fp8",
) -> Array:
    """See :func:`fastattn.functional.indexer_kv_compress_insert`; returns a new `kv_cache`."""
    layout = PAGE_FORMATS[quant]
    result = np.array(kv_cache)
    pages = result.reshape(len(result), math.prod(result.shape[1:]))
    for request, position, state_slot, kv_slot in zip(
        batch_id_per_token.tolist(), positions.tolist(), state_slots.tolist(), kv_slots.tolist()
    ):
        page, entry = divmod(kv_slot, page_size)
        if position < 0 or (position + 1) % compress_ratio != 0:
            continue  # the group is not complete
        if state_slot < 0 or kv_slot < 0 or page >= len(pages):
            continue
        if not 0 <= request < len(block_tables):
            continue
        states = _gather(state_cache, block_tables[request], position, compress_ratio)
        if states is None:
            continue
        x = rms_norm(compress_group(*states), rms_norm_weight, rms_norm_eps)
        first = min(position // compress_ratio * compress_ratio, len(cos_sin_cache) - 1)
        x = round_to(rotate_last(x, cos_sin_cache[first]), bfloat16)
        codes, scales = token_bytes(x, quant)
        at = entry * layout.code_bytes
        pages[page, at : at + layout.code_bytes] = codes
        at = page_size * layout.code_bytes + entry * layout.scale_bytes
        pages[page, at : at + layout.scale_bytes] = scales
    return result


def save_partial_states(
    kv_score: Array, ape: Array, positions: Array, state_cache: Array, state_slots: Array
) -> Array:
    """See :func:`fastattn.functional.save_partial_states`; returns a new `state_cache`."""
    result = np.array(state_cache)
    ratio, width = ape.shape
    blocks, rows, _ = result.shape
    for i, slot in enumerate(np.asarray(state_slots).tolist()):
        position = int(positions[i])
        if slot < 0 or slot >= blocks * rows or position < 0:
            continue
        row, token = result[slot // rows, slot % rows], kv_score[i]
        row[:width] = token[:width]
        with np.errstate(all="ignore"):
            score = np.float32(token[width:]) + np.float32(ape[position % ratio])
            row[width:] = score.astype(np.float32)
    return result
