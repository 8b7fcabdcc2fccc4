"""NumPy model of the operators before and after the latent attention of a DeepSeek-V4 layer."""

from __future__ import annotations

import numpy as np

from fastattn.reference.indexer import fp8_block, rotate_last
from fastattn.reference.mla import ROPE_DIM, mla_write_cache
from fastattn.reference.numerics import Array, bfloat16, round_to
from fastattn.reference.rope import rms_norm

#: Number of channels of the attention's output that share a scale.
OUTPUT_BLOCK = 128
#: Smallest amax of such a block.
OUTPUT_AMAX_FLOOR = 1e-10


def _angles(cos_sin_cache: Array, positions: Array) -> Array:
    """Rows of the table, fp32 [T, 64], for positions that are clamped to it."""
    at = np.clip(np.asarray(positions, np.int64), 0, len(cos_sin_cache) - 1)
    return np.asarray(cos_sin_cache, np.float32)[at]


def inverse_rope_quantize_fp8(
    x: Array, positions: Array, cos_sin_cache: Array, *, num_groups: int = 1
) -> tuple[Array, Array]:
    """See :func:`fastattn.functional.inverse_rope_quantize_fp8`."""
    tokens, heads, dim = x.shape
    back = _angles(cos_sin_cache, positions) * np.repeat(np.array([1, -1], np.float32), 32)
    rotated = rotate_last(x, back[:, None])
    own = heads // num_groups * dim // OUTPUT_BLOCK  # blocks of a group
    blocks = rotated.reshape(tokens, num_groups, own, OUTPUT_BLOCK)
    codes, block_scales = fp8_block(blocks, OUTPUT_AMAX_FLOOR)
    by_group = codes.transpose(1, 0, 2, 3).reshape(num_groups, tokens, own * OUTPUT_BLOCK)
    scales = np.zeros((num_groups, own, -(-tokens // 4) * 4), np.float32)
    scales[..., :tokens] = block_scales.transpose(1, 2, 0)
    return by_group, scales


def _rounded(x: Array) -> Array:
    """Computed channels in bfloat16, with every NaN as 0x7FFF."""
    bits = round_to(x, bfloat16).astype(bfloat16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits).view(bfloat16)


def mla_qkv_norm_rope_write(
    q: Array,
    kv: Array,
    cache: Array,
    slot_mapping: Array,
    positions: Array,
    cos_sin_cache: Array,
    *,
    cache_format: str = "fp8_584",
    rms_norm_eps: float = 1e-6,
    padded_heads: int | None = None,
    page_size: int | None = None,
) -> tuple[Array, Array]:
    """See :func:`fastattn.functional.mla_qkv_norm_rope_write`; returns a new `cache` as well."""
    tokens, heads, dim = q.shape
    angles = _angles(cos_sin_cache, positions)
    result = np.zeros((tokens, heads if padded_heads is None else padded_heads, dim), bfloat16)
    with np.errstate(all="ignore"):
        normed = rms_norm(q.astype(np.float32), np.ones(dim, np.float32), rms_norm_eps)
        result[:, :heads] = _rounded(rotate_last(normed, angles[:, None]))
        rope = _rounded(rotate_last(kv.astype(np.float32), angles)[:, -ROPE_DIM:])
    written = mla_write_cache(
        kv[:, :-ROPE_DIM],
        rope,
        cache,
        slot_mapping,
        cache_format=cache_format,
        page_size=page_size,
    )
    return result, written
