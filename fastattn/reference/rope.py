"""NumPy model of :func:`fastattn.functional.rope_write_cache_kv`.

Bias, rotation and RMSNorm of a head are fp32. The result is rounded to the dtype of ``qkv`` and
then quantised. Each fp32 operation of this module is one IEEE rounding in the written order, so the
codes of every implementation are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn.reference.cache import new_tokens, write_cache_kv
from fastattn.reference.hadamard import rotate_keys
from fastattn.reference.numerics import Array, amax, dynamic_scale, quantize, round_to


def make_rotary_embs(
    max_positions: int, rotary_dim: int, *, theta: float = 10000.0, neox: bool = False
) -> Array:
    """Rotary table of FastDeploy's shape: cosines, then sines, of ``position * theta^(-2i/R)``.

    Returns
    -------
    array of float32, shape [2, 1, max_positions, 1, R / 2], or [..., R] for `neox`
        The second half of a neox table repeats the first.
    """
    frequencies = float(theta) ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    angles = np.arange(max_positions)[:, None] * frequencies
    if neox:
        angles = np.concatenate([angles, angles], axis=-1)
    table = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    return table[:, None, :, None, :]


def rotate(x: Array, cos: Array, sin: Array, *, neox: bool) -> Array:
    """Rotate the pairs of the last dimension by angles given as cos and sin.

    Parameters
    ----------
    x : array of float32, shape [..., R]
    cos, sin : array of float32, shape [..., R / 2] (broadcast)
    neox : bool
        Pairs are (i, i + R / 2); otherwise (2i, 2i + 1).
    """
    half = x.shape[-1] // 2
    a, b = (x[..., :half], x[..., half:]) if neox else (x[..., 0::2], x[..., 1::2])
    first = a * cos - b * sin
    second = a * sin + b * cos
    if neox:
        return np.concatenate([first, second], axis=-1)
    return np.stack([first, second], axis=-1).reshape(x.shape)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm over the last dimension in fp32: ``(x * (1 / sqrt(mean(x^2) + eps))) * weight``.

    The squares of each half are summed as a balanced binary tree of neighbours, (0 + 1) + (2 + 3) +
    ..., padded with zeros to a power of two. Then the two sums are added.

    Raises
    ------
    ValueError
        If the last dimension is odd, because it has no halves.
    """
    x = np.asarray(x, np.float32)
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even number of channels, got {x.shape[-1]}")
    half = x.shape[-1] // 2
    leaves = 1 << (half - 1).bit_length() if half else 0
    total = np.zeros((*x.shape[:-1], 2, leaves), np.float32)
    total[..., :half] = (x * x).reshape(*x.shape[:-1], 2, half)
    total = total.reshape(*x.shape[:-1], 2 * leaves)
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    mean = total / np.float32(x.shape[-1])
    inverse = np.float32(1.0) / np.sqrt(mean + np.float32(eps))
    return (x * inverse) * np.asarray(weight).astype(np.float32)


def angles_of(
    rotary_embs: Array,
    positions: Array,
    rotary_dim: int,
    *,
    neox: bool,
    batch_ids: Array | None = None,
) -> tuple[Array, Array]:
    """Cosines and sines [T, 1, R / 2] of each token. Positions are clamped to the table.

    A table with one column per channel holds each angle twice: as ``[a, b, .., a, b, ..]`` for
    neox, otherwise as ``[a, a, b, b, ..]``. An array of 4 or 6 dimensions has one table per
    sequence; a token uses the table that its entry of `batch_ids` names.
    """
    tables = np.asarray(rotary_embs, np.float32)
    own = tables.ndim in (4, 6)
    assert not own or batch_ids is not None, "whose table?"
    tables = tables.reshape(len(tables) if own else 1, 2, -1, tables.shape[-1])
    half = rotary_dim // 2
    if tables.shape[-1] == rotary_dim:
        tables = tables[..., :half] if neox else tables[..., 0::2]
    at = np.clip(positions, 0, tables.shape[2] - 1)
    which = batch_ids if own else np.zeros_like(at)
    return tables[which, 0, at][:, None], tables[which, 1, at][:, None]


def rope_qkv(
    qkv: Array,
    positions: Array,
    rotary_embs: Array | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm_weight: Array | None = None,
    k_norm_weight: Array | None = None,
    rms_norm_eps: float = 1e-6,
    use_neox_rotary_style: bool = False,
    rotary_dim: int | None = None,
    qkv_bias: Array | None = None,
    qk_norm_before_rope: bool = False,
    batch_ids: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Split the fused projection and apply bias, rotation and qk-norm.

    Parameters
    ----------
    qkv : array of bfloat16 or float16, shape [T, (H + 2 KV) * D]
    positions : array of int, shape [T]
    batch_ids : array of int, shape [T], optional
        Sequence of each token, if `rotary_embs` has one table per sequence.

    Returns
    -------
    q, k, v : array of the dtype of `qkv`, shapes [T, H, D], [T, KV, D], [T, KV, D]
    """
    dtype: Any = qkv.dtype
    tokens = qkv.shape[0]
    heads = num_heads + 2 * num_kv_heads
    head_dim = qkv.shape[1] // heads
    x = qkv.astype(np.float32)
    if qkv_bias is not None:
        x = x + np.asarray(qkv_bias).astype(np.float32)
    x = x.reshape(tokens, heads, head_dim)
    rotated = head_dim if rotary_dim is None else rotary_dim

    def rope(y: Array) -> Array:
        if rotary_embs is None:
            return y
        neox = use_neox_rotary_style
        cos, sin = angles_of(rotary_embs, positions, rotated, neox=neox, batch_ids=batch_ids)
        rotary = rotate(y[..., :rotated], cos, sin, neox=neox)
        return np.concatenate([rotary, y[..., rotated:]], axis=-1)

    def norm(y: Array, weight: Array | None) -> Array:
        return y if weight is None else rms_norm(y, weight, rms_norm_eps)

    def transform(y: Array, weight: Array | None) -> Array:
        with np.errstate(all="ignore"):
            y = rope(norm(y, weight)) if qk_norm_before_rope else norm(rope(y), weight)
        return round_to(y, dtype).astype(dtype)

    q = transform(x[:, :num_heads], q_norm_weight)
    k = transform(x[:, num_heads : num_heads + num_kv_heads], k_norm_weight)
    v = round_to(x[:, num_heads + num_kv_heads :], dtype).astype(dtype)
    return q, k, v


def quantize_q(q: Array, q_quant: str, q_scale: Array | None) -> tuple[Array, Array | None]:
    """Quantise queries [T, H, D] to e4m3 codes (uint8) and their dequantisation scales."""
    if q_quant == "none":
        return q, None
    if q_quant == "per_tensor":
        assert q_scale is not None
        return quantize(q, q_scale, "e4m3"), np.asarray(q_scale, np.float32)
    scales = dynamic_scale(amax(q, axis=-1), "e4m3")
    return quantize(q, scales[..., None], "e4m3"), scales


def rope_write_cache_kv(
    qkv: Array,
    key_cache: Array,
    value_cache: Array,
    rotary_embs: Array | None,
    block_tables: Array,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm_weight: Array | None = None,
    k_norm_weight: Array | None = None,
    rms_norm_eps: float = 1e-6,
    use_neox_rotary_style: bool = False,
    rotary_dim: int | None = None,
    qk_norm_before_rope: bool = False,
    qkv_bias: Array | None = None,
    q_quant: str = "none",
    q_scale: Array | None = None,
    cache_k_scales: Array | None = None,
    cache_v_scales: Array | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    batch_id_per_token: Array | None = None,
    k_rotation: str = "none",
    k_center: Array | None = None,
    k_feedback: Array | None = None,
    q_rotation: str = "none",
) -> tuple[Array, Array | None]:
    """Rotate, normalise and write; see :func:`fastattn.functional.rope_write_cache_kv`.

    The caches and dynamic scales change in place.

    Returns
    -------
    q : array, shape [T, H, D], the dtype of `qkv`, or uint8 e4m3 codes
        0 for tokens of no sequence and for skipped tokens.
    q_descale : array or None
    """
    positions, batch_ids = np.zeros((2, len(qkv)), np.int64)
    written = np.zeros(len(qkv), bool)
    for token, batch_idx, position in new_tokens(
        len(qkv), cu_seqlens_q, seq_lens_decoder, seq_lens_this_time, batch_id_per_token
    ):
        positions[token], batch_ids[token], written[token] = position, batch_idx, True
    q, k, v = rope_qkv(
        qkv,
        positions,
        rotary_embs,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        rms_norm_eps=rms_norm_eps,
        use_neox_rotary_style=use_neox_rotary_style,
        rotary_dim=rotary_dim,
        qk_norm_before_rope=qk_norm_before_rope,
        qkv_bias=qkv_bias,
        batch_ids=batch_ids,
    )
    q[~written] = 0
    write_cache_kv(
        k,
        v,
        key_cache,
        value_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        cache_k_scales=cache_k_scales,
        cache_v_scales=cache_v_scales,
        cache_quant_type=cache_quant_type,
        fp8_format=fp8_format,
        batch_id_per_token=batch_id_per_token,
        k_rotation=k_rotation,
        k_center=k_center,
        k_feedback=k_feedback,
    )
    if q_rotation != "none":
        q = round_to(rotate_keys(q, q_rotation), qkv.dtype).astype(qkv.dtype)
    return quantize_q(q, q_quant, q_scale)
