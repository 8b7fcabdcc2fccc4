"""NumPy models of ``write_cache_kv``, ``append_cache_kv_c8`` and ``convert_cache_layout``.

Quantised caches are arrays of uint8 (or of an 8-bit type with the same bits) in the layouts of
:mod:`fastattn.reference.layout`. Scales are always dequantisation multipliers: x ~ code * scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastattn._formats import FORMATS
from fastattn.reference.feedback import codes_with_feedback
from fastattn.reference.hadamard import restore_key, transform_key
from fastattn.reference.layout import (
    BLOCK_SIZE,
    key_offsets,
    pack,
    pack_nibbles,
    unpack,
    value_offsets,
)
from fastattn.reference.mxfp4 import block_amax, block_exponent, block_scale
from fastattn.reference.numerics import NIBBLES, Array, from_codes, group_scale, quantize

_TYPES = {row.name: row for row in FORMATS}

DYNAMIC_TYPES = tuple(row.name for row in FORMATS if row.scheme in ("token", "group"))

#: Scales of groups of channels, by their type: bytes [..., D / group] of fp32 values [..., D] and
#: the group's size; and multipliers of bytes.
GROUP_SCALES: dict[str, tuple[Callable[[Array, int], Array], Callable[[Array], Array]]] = {
    "ue8m0": (
        lambda x, group: (block_exponent(block_amax(x, group)) + 127).astype(np.uint8),
        block_scale,
    ),
}


def code_of(cache_quant_type: str, fp8_format: str = "e4m3", kind: str = "k") -> str:
    """Format of the codes of K ("k") or V ("v") of a quantised cache.

    Returns
    -------
    str
        "int8", "e4m3", "e5m2", "int4" or "e2m1".
    """
    row = _TYPES.get(cache_quant_type)
    if row is None or row.scheme == "none":
        raise NotImplementedError(f"cache_quant_type {cache_quant_type!r} stores no codes")
    if row.code != row.other_code:
        return fp8_format
    return row.code if kind == "k" else row.value_code


def static_scales(scales: Array, kv_heads: int, head_dim: int) -> Array:
    """Static scales [1], [KV] or [KV * D] as fp32, broadcast to [KV, D]."""
    scales = np.asarray(scales).astype(np.float32)
    if scales.size == kv_heads * head_dim:
        return scales.reshape(kv_heads, head_dim)
    return np.broadcast_to(scales.reshape(-1, 1), (kv_heads, head_dim))


def _row(cache: Array) -> int:
    """Elements of a token in K or V, in which either of the last two dimensions may be tokens."""
    return int(cache.shape[2]) * int(cache.shape[3]) // BLOCK_SIZE


def dynamic_scales(scales: Array, cache_quant_type: str) -> Array:
    """Dynamic scales as fp32, with another dimension for channels: of size 1, or D for groups.

    Parameters
    ----------
    scales : array, shape [..., 64], or uint8 [..., 64, D / group] for types with groups
    cache_quant_type : str
    """
    row = _TYPES[cache_quant_type]
    if row.group:
        return np.repeat(GROUP_SCALES[row.scale_type][1](scales), row.group, axis=-1)
    return np.asarray(scales).astype(np.float32)[..., None]


def written_scales(
    x: Array, cache_quant_type: str, dtype: Any = np.float32, kind: str = "k"
) -> Array:
    """Dynamic scales of fp32 values [..., D] of K ("k") or V ("v") as a cache stores them.

    Returns
    -------
    array of `dtype`, shape [...], or of uint8, shape [..., D / group]
    """
    row = _TYPES[cache_quant_type]
    if row.group:
        return GROUP_SCALES[row.scale_type][0](x, row.group)
    return group_scale(x, code_of(cache_quant_type, kind=kind)).astype(dtype)


def block_of(block_table: Array, position: int, num_blocks: int) -> int | None:
    """Physical block of a position of one sequence; None if no block is assigned."""
    if position < 0 or position // BLOCK_SIZE >= len(block_table):
        return None
    block = int(block_table[position // BLOCK_SIZE])
    return block if 0 <= block < num_blocks else None


def new_tokens(
    num_tokens: int,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    batch_id_per_token: Array | None,
) -> Iterator[tuple[int, int, int]]:
    """(token, batch index, position) of every token that the step writes."""
    for b in range(len(seq_lens_decoder)):
        first = int(cu_seqlens_q[b])
        if first < 0:
            continue
        count = min(int(seq_lens_this_time[b]), int(cu_seqlens_q[b + 1]) - first)
        for i in range(count):
            token = first + i
            if token >= num_tokens:
                break
            if batch_id_per_token is not None and batch_id_per_token[token] != b:
                continue
            yield token, b, max(int(seq_lens_decoder[b]), 0) + i


def quantize_token(
    x: Array,
    scales: Array,
    cache_quant_type: str,
    fp8_format: str = "e4m3",
    feedback: Array | None = None,
    kind: str = "k",
) -> tuple[Array, Array | None]:
    """Codes of the K or V of one or several tokens.

    Parameters
    ----------
    x : array, shape [..., KV, D]
    scales : array
        Static scales. For dynamic types, any array with the dtype of the stored scales.
    feedback : array, shape [KV, D, D], optional
        See :func:`fastattn.reference.feedback.codes_with_feedback`.
    kind : {"k", "v"}

    Returns
    -------
    codes : array of uint8, shape [..., KV, D], or [..., KV, D / 2] for two codes per byte
    token_scales : array, shape [..., KV] or [..., KV, D / group], or None
        For dynamic types, ``max(amax, 1e-6) / QMAX`` of each head (with a sign for int4), rounded
        to the dtype of `scales` before the token is quantised. For types with groups of channels,
        the byte of each group.
    """
    code = code_of(cache_quant_type, fp8_format, kind)
    x = np.asarray(x).astype(np.float32)
    stored = None
    if cache_quant_type in DYNAMIC_TYPES:
        stored = written_scales(x, cache_quant_type, scales.dtype, kind)
        multiplier = dynamic_scales(stored, cache_quant_type)
    else:
        multiplier = static_scales(scales, *x.shape[-2:])
    if feedback is None:
        codes = quantize(x, multiplier, code)
    else:
        with np.errstate(all="ignore"):
            codes = codes_with_feedback(x * (np.float32(1) / multiplier), feedback, code)
    return pack_nibbles(codes) if code in NIBBLES else codes, stored


def write_cache_kv(
    key: Array,
    value: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    *,
    cache_k_scales: Array | None = None,
    cache_v_scales: Array | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    batch_id_per_token: Array | None = None,
    k_rotation: str = "none",
    k_center: Array | None = None,
    k_feedback: Array | None = None,
) -> None:
    """Write new tokens into a paged cache; see :func:`fastattn.functional.write_cache_kv`.

    The caches and dynamic scales, C-contiguous arrays, change in place. `block_tables` may be
    [B, KV, max_blocks]: a table for each KV head. A cache of one head is then a pool that all heads
    share.
    """
    num_blocks, kv_heads = key_cache.shape[:2]
    pooled = key.shape[1] != kv_heads
    quantised = cache_quant_type != "none"
    value_layout = "fastattn" if quantised else "logical"
    if k_rotation != "none" or k_center is not None:
        key = transform_key(key, k_rotation, k_center)
    k_offsets = key_offsets("fastattn", _row(key_cache))
    v_offsets = value_offsets(value_layout, _row(value_cache))
    sides = (
        ("k", key, key_cache, cache_k_scales, k_offsets, k_feedback),
        ("v", value, value_cache, cache_v_scales, v_offsets, None),
    )
    found: list[tuple[int, int | slice, int, int]] = []  # token, heads, block, slot of every write
    for token, b, position in new_tokens(
        len(key), cu_seqlens_q, seq_lens_decoder, seq_lens_this_time, batch_id_per_token
    ):
        tables: list[tuple[int | slice, Array]] = [(slice(None), block_tables[b])]
        if np.ndim(block_tables) == 3:
            tables = list(enumerate(block_tables[b]))
        for head, table in tables:
            block = block_of(table, position, num_blocks)
            if block is not None:
                found.append((token, head, block, position % BLOCK_SIZE))
    tokens = [token for token, *_ in found]
    for kind, x, cache, scales, offsets, feedback in sides:
        flat = cache.reshape(num_blocks, kv_heads, offsets.size)
        token_scales = None
        if quantised:
            assert scales is not None
            written, token_scales = quantize_token(
                x[tokens], scales, cache_quant_type, fp8_format, feedback, kind
            )
            flat = flat.view(np.uint8)
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                written = x[tokens].astype(cache.dtype)
        for i, (_, head, block, slot) in enumerate(found):
            stored = 0 if pooled else head
            flat[block][stored, offsets[slot]] = written[i][head]
            if token_scales is not None and scales is not None:
                scales[block, stored, slot] = token_scales[i][head]


def append_cache_kv_c8(
    key_cache: Array,
    value_cache: Array,
    key: Array,
    value: Array,
    block_tables: Array,
    seq_lens_decoder: Array,
    cu_seqlens_k: Array,
    *,
    cache_k_scales: Array,
    cache_v_scales: Array,
    cache_quant_type: str,
    cache_layout: str = "fastattn",
    fp8_format: str = "e4m3",
    k_rotation: str = "none",
    k_center: Array | None = None,
) -> None:
    """Dequantise cached tokens; see :func:`fastattn.functional.append_cache_kv_c8`.

    `key` and `value` [sum k, KV, D] change in place. An element is ``code * scale``, one fp32
    product rounded to their dtype. Transformed K is restored before the rounding.
    """
    for kind, cache, scales, out in (
        ("k", key_cache, cache_k_scales, key),
        ("v", value_cache, cache_v_scales, value),
    ):
        code = code_of(cache_quant_type, fp8_format, kind)
        codes = unpack(cache, kind, cache_layout, int8=code == "int8", nibbles=code in NIBBLES)
        values = from_codes(codes, code)
        num_blocks, kv_heads, _, head_dim = values.shape
        with np.errstate(over="ignore", invalid="ignore"):
            if cache_quant_type in DYNAMIC_TYPES:
                values = values * dynamic_scales(scales, cache_quant_type)
            else:
                values = values * static_scales(scales, kv_heads, head_dim)[None, :, None]
            if kind == "k" and (k_rotation != "none" or k_center is not None):
                by_token = values.transpose(0, 2, 1, 3)
                values = restore_key(by_token, k_rotation, k_center).transpose(0, 2, 1, 3)
            rounded = values.astype(out.dtype)
        for b in range(len(seq_lens_decoder)):
            first = int(cu_seqlens_k[b])
            if first < 0:
                continue
            count = min(int(seq_lens_decoder[b]), int(cu_seqlens_k[b + 1]) - first)
            for i in range(min(count, len(out) - first)):
                block = block_of(block_tables[b], i, num_blocks)
                if block is not None:
                    out[first + i] = rounded[block, :, i % BLOCK_SIZE]


def convert_cache_layout(
    cache: Array, *, kind: str, cache_quant_type: str, src: str, dst: str
) -> Any:
    """Bytes of a cache in another layout; see :func:`fastattn.functional.convert_cache_layout`."""
    if cache_quant_type == "none":
        return cache.copy()
    int8 = code_of(cache_quant_type, kind=kind) == "int8"
    return pack(unpack(cache, kind, src, int8=int8), kind, dst, int8=int8).view(cache.dtype)
