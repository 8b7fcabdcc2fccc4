"""Paddle's ``block_multihead_attention``, built on the operators of this package.

A program that calls it changes one line::

    # from paddle.incubate.nn.functional import block_multihead_attention
    from fastattn.compat.paddle import block_multihead_attention
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from fastattn._views import view
from fastattn.compat._paged import (
    BLOCK_SIZE,
    dtype_name,
    progression,
    refuse,
    refuse_given,
    require_tensors,
)
from fastattn.functional import paged_attention, rope_write_cache_kv
from fastattn.functional._marker import unified

__all__ = ["block_multihead_attention"]

_OP = "block_multihead_attention"
_COMPUTE = {"fp16": "float16", "bf16": "bfloat16"}
_E4M3_MAX = 448.0


@unified
def block_multihead_attention(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seq_lens_encoder: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    padding_offsets: Tensor | None,
    cum_offsets: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    block_tables: Tensor,
    pre_key_cache: Tensor | None = None,
    pre_value_cache: Tensor | None = None,
    cache_k_quant_scales: Tensor | None = None,
    cache_v_quant_scales: Tensor | None = None,
    cache_k_dequant_scales: Tensor | None = None,
    cache_v_dequant_scales: Tensor | None = None,
    qkv_out_scale: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    out_shift: Tensor | None = None,
    out_smooth: Tensor | None = None,
    max_enc_len_this_time: Tensor | None = None,
    max_dec_len_this_time: Tensor | None = None,
    rope_emb: Tensor | None = None,
    mask: Tensor | None = None,
    tgt_mask: Tensor | None = None,
    max_seq_len: int = -1,
    block_size: int = 64,
    use_neox_style: bool = False,
    use_dynamic_cachekv_quant: bool = False,
    quant_round_type: int = 1,
    quant_max_bound: float = 127.0,
    quant_min_bound: float = -127.0,
    out_scale: float = -1,
    compute_dtype: str = "default",
    rope_theta: float = 10000.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split qkv, add its bias, rotate Q and K, write K and V into the cache, and attend.

    The arguments are Paddle's, in its order. Differences from its operator:

    - Prompts, chunks of prompts, and one or several tokens of decoding sequences are one case: the
      ``seq_lens_this_time[b]`` new tokens follow ``seq_lens_decoder[b]`` cached ones and attend to
      both, causally.
    - Nothing is copied to the host, and `qkv` is not changed.
    - `rope_emb` also rotates decoding sequences, for which Paddle computes angles from
      `rope_theta`.
    - Codes of an 8-bit cache have this package's layout (docs/formats.md), in tensors of Paddle's
      shape. Neither operator can read the other's codes. Scales are the dequantisation multipliers.
    - It also runs on the CPU.

    Parameters
    ----------
    qkv : Tensor, shape [T, (H + 2 KV) * D], bfloat16 or float16
        Query heads, then key heads, then value heads.
    key_cache, value_cache : Tensor, shape [num_blocks, KV, 64, D]
        The dtype of `qkv`, or uint8. Written in place. 8-bit caches must be contiguous.
    seq_lens_encoder : Tensor
        Not used.
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B] or [B, 1], int32
        Number of cached and of new tokens of each sequence.
    padding_offsets, cum_offsets, cu_seqlens_k : Tensor, optional
        Not used.
    cu_seqlens_q : Tensor, shape [B + 1] or [B + 1, 1], int32
        Index of the first token of each sequence in `qkv`.
    block_tables : Tensor, shape [B, max_blocks], int32
    pre_key_cache, pre_value_cache : None
    cache_k_quant_scales, cache_v_quant_scales : Tensor, optional
        Not used; they mean ``1 / dequant``.
    cache_k_dequant_scales, cache_v_dequant_scales : Tensor, shape [KV] or [1], float32, optional
        Multipliers of int8 codes. Required for uint8 caches, and refused for others.
    qkv_out_scale : None
        Must be None. An int32 `qkv` is refused as well.
    qkv_bias : Tensor, shape [(H + 2 KV) * D], optional
    out_shift, out_smooth : None
    max_enc_len_this_time, max_dec_len_this_time : Tensor, shape [1], int32, on the CPU, optional
        Maximum number of new tokens and of cached tokens of a sequence. 0 new tokens means one per
        sequence, if there are not more tokens than sequences. The values choose kernels and must
        not be too small. Without them, the number of tokens and the room of a block table are used.
        Leave them out if sequences decode several tokens at once.
    rope_emb : Tensor, shape [2, 1, max_seq, 1, D / 2], or [.., D] for neox, float32, optional
        Without it nothing is rotated.
    mask, tgt_mask : None
    max_seq_len : int
        Used during the trace of a program with any number of tokens.
    block_size : int
        Must be 64.
    use_neox_style : bool
        Rotate channels (i, i + D / 2); otherwise (2i, 2i + 1).
    use_dynamic_cachekv_quant : bool
        Must be False. The types ``block_wise_int8`` and ``block_wise_fp8`` of
        :func:`fastattn.functional.paged_attention` have dynamic scales.
    quant_round_type : int
        Must be 0 (ties to even) for 8-bit caches.
    quant_max_bound, quant_min_bound : float
        127 and -127 for 8-bit caches; 448 and -448 for an e4m3 output.
    out_scale : float
        With a bound of 448: store the output as e4m3 codes of ``448 * out_scale * out``. A value
        that is not positive means no quantisation.
    compute_dtype : {"default", "fp16", "bf16"}
        Must match the dtype of `qkv`.
    rope_theta : float
        Not used.

    Returns
    -------
    out : Tensor, shape [T, H * D]
        uint8 (e4m3 codes) if `out_scale` is given. 0 for tokens of no sequence.
    qkv, key_cache, value_cache : Tensor
        The arguments themselves.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes do not match, or scales are missing or superfluous.
    NotImplementedError
        For an argument that must be None or has only one supported value.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.paddle import block_multihead_attention
    >>> def int32(x):
    ...     return paddle.to_tensor(x, dtype="int32")
    >>> qkv = paddle.zeros([3, 3 * 64], "float16")  # a prompt of two tokens, a decoding sequence
    >>> caches = [paddle.full([2, 1, 64, 64], 6.0, "float16") for _ in range(2)]
    >>> encoder, decoder, this_time = int32([[2], [0]]), int32([[0], [2]]), int32([[2], [1]])
    >>> out, *_ = block_multihead_attention(
    ...     qkv, *caches, encoder, decoder, this_time, None, None, int32([0, 2, 3]), None,
    ...     int32([[0], [1]]),
    ... )
    >>> out[:, 0].tolist()  # the third is (6 + 6 + 0) / 3
    [0.0, 0.0, 4.0]
    """
    require_tensors(_OP, qkv=qkv, key_cache=key_cache, value_cache=value_cache)
    require_tensors(
        _OP,
        seq_lens_decoder=seq_lens_decoder,
        seq_lens_this_time=seq_lens_this_time,
        cu_seqlens_q=cu_seqlens_q,
        block_tables=block_tables,
    )
    given = {
        "cache_k_dequant_scales": cache_k_dequant_scales,
        "cache_v_dequant_scales": cache_v_dequant_scales,
    }
    require_tensors(_OP, **{name: x for name, x in given.items() if x is not None})
    refuse_given(
        _OP,
        pre_key_cache=pre_key_cache,
        pre_value_cache=pre_value_cache,
        qkv_out_scale=qkv_out_scale,
        out_shift=out_shift,
        out_smooth=out_smooth,
        mask=mask,
        tgt_mask=tgt_mask,
        use_dynamic_cachekv_quant=use_dynamic_cachekv_quant,
    )
    heads, kv_heads, head_dim = _sizes(qkv, key_cache, block_size)
    _check_dtypes(qkv, rope_emb, compute_dtype)
    scales: dict[str, Any] = {
        "cache_k_scales": _flat(cache_k_dequant_scales),
        "cache_v_scales": _flat(cache_v_dequant_scales),
    }
    key, value = key_cache, value_cache
    if dtype_name(key_cache.dtype) in ("uint8", "int8"):
        _check_rounding(quant_round_type, quant_max_bound, quant_min_bound)
        value = _packed(value_cache, [int(key_cache.shape[0]), kv_heads, head_dim])
        scales["cache_quant_type"] = "cache_int8"
    seqs = (
        block_tables,
        _flat(cu_seqlens_q),
        _flat(seq_lens_decoder),
        _flat(seq_lens_this_time),
    )
    # Arguments that they refuse are refused before the cache is written.
    longest = _longest(qkv, block_tables, max_enc_len_this_time, max_dec_len_this_time, max_seq_len)
    output_scale = _output_scale(qkv, out_scale, quant_max_bound, quant_min_bound)
    q, _ = rope_write_cache_kv(
        qkv,
        key,
        value,
        rope_emb,
        *seqs,
        num_heads=heads,
        num_kv_heads=kv_heads,
        use_neox_rotary_style=use_neox_style,
        qkv_bias=qkv_bias,
        **scales,
    )
    out = paged_attention(
        q,
        key,
        value,
        *seqs,
        *longest,
        out_scale=output_scale,
        **scales,
    )
    return view(out, [-1, heads * head_dim]), qkv, key_cache, value_cache


def _flat(tensor: Any) -> Any:
    """View [B, 1] as [B]."""
    return tensor if tensor is None or len(tensor.shape) == 1 else view(tensor, [-1])


def _sizes(qkv: Tensor, key_cache: Tensor, block_size: int) -> tuple[int, int, int]:
    """Numbers of query heads, KV heads and channels of a head."""
    if len(key_cache.shape) != 4:
        raise ValueError(
            f"{_OP}: key_cache: expected shape [num_blocks, KV, 64, D], got {list(key_cache.shape)}"
        )
    _, kv_heads, tokens, head_dim = (int(n) for n in key_cache.shape)
    if block_size != BLOCK_SIZE or tokens != BLOCK_SIZE:
        refuse(_OP, "block_size", f"{block_size}, caches of {tokens}; supported: {BLOCK_SIZE}")
    if head_dim == 0:
        raise ValueError(f"{_OP}: key_cache: expected channels, got shape {list(key_cache.shape)}")
    if len(qkv.shape) != 2 or qkv.shape[1] % head_dim or qkv.shape[1] // head_dim <= 2 * kv_heads:
        raise ValueError(
            f"{_OP}: qkv: expected shape [T, (H + 2 * {kv_heads}) * {head_dim}], got "
            f"{list(qkv.shape)}"
        )
    return int(qkv.shape[1]) // head_dim - 2 * kv_heads, kv_heads, head_dim


def _check_dtypes(qkv: Tensor, rope_emb: Any, compute_dtype: str) -> None:
    if dtype_name(qkv.dtype) == "int32":
        refuse(_OP, "qkv", "int32; dequantise it first")
    if compute_dtype != "default" and _COMPUTE.get(compute_dtype) != dtype_name(qkv.dtype):
        refuse(_OP, "compute_dtype", f"{compute_dtype} of a {dtype_name(qkv.dtype)} qkv")
    if rope_emb is not None:
        require_tensors(_OP, rope_emb=rope_emb)
        if len(rope_emb.shape) != 5 or rope_emb.shape[1] != 1:
            refuse(
                _OP, "rope_emb", f"shape {list(rope_emb.shape)}; supported: [2, 1, max_seq, 1, n]"
            )


def _check_rounding(quant_round_type: int, upper: float, lower: float) -> None:
    if quant_round_type != 0:
        refuse(_OP, "quant_round_type", f"{quant_round_type}; supported: 0, ties to even")
    if upper != 127 or lower != -127:
        refuse(_OP, "quant_max_bound", f"{lower} to {upper}; 8-bit caches have -127 to 127")


def _packed(value_cache: Tensor, sizes: list[int]) -> Tensor:
    """View an 8-bit value cache in this package's shape, over the same bytes."""
    blocks, kv_heads, head_dim = sizes
    wanted = [blocks, kv_heads, head_dim, BLOCK_SIZE]
    if list(value_cache.shape) == wanted:
        return value_cache
    if list(value_cache.shape) != [blocks, kv_heads, BLOCK_SIZE, head_dim]:
        raise ValueError(
            f"{_OP}: value_cache: expected the shape of key_cache, "
            f"{[blocks, kv_heads, BLOCK_SIZE, head_dim]}, got {list(value_cache.shape)}"
        )
    if not paddle.in_dynamic_mode():
        refuse(_OP, "value_cache", f"in a static program 8-bit values have shape {wanted}")
    if not value_cache.is_contiguous():
        refuse(_OP, "value_cache", "8 bits, and not contiguous")
    return value_cache.reshape(wanted)


def _output_scale(qkv: Tensor, out_scale: float, upper: float, lower: float) -> Tensor | None:
    if not isinstance(out_scale, numbers.Real):
        raise TypeError(f"{_OP}: out_scale: expected float, got {type(out_scale).__name__}")
    if out_scale <= 0:
        return None
    if upper != _E4M3_MAX or lower != -_E4M3_MAX:
        refuse(_OP, "out_scale", f"an output of {lower} to {upper}; supported: e4m3, -448 to 448")
    if not paddle.in_dynamic_mode():
        refuse(_OP, "out_scale", "not supported in a static program")
    with np.errstate(over="ignore", under="ignore"):
        # the value that the operator gets
        scale = float(np.float32(1.0 / (_E4M3_MAX * float(out_scale))))
    if not 0 < scale < math.inf:
        raise ValueError(
            f"{_OP}: out_scale: expected a number whose multiple by {_E4M3_MAX:g} has a reciprocal "
            f"in float32, got {out_scale:g}"
        )
    return progression(scale, 0, 1, "float32", qkv)


def _longest(
    qkv: Tensor, block_tables: Tensor, encoder: Any, decoder: Any, max_seq_len: int
) -> tuple[int, int]:
    """Upper bounds of the new tokens and of the keys of a sequence, without reading the device."""
    if len(block_tables.shape) != 2:
        raise ValueError(
            f"{_OP}: block_tables: expected shape [B, max_blocks], got {list(block_tables.shape)}"
        )
    tokens, room = int(qkv.shape[0]), int(block_tables.shape[1]) * BLOCK_SIZE
    if tokens < 0 or room < 0:  # a program with any number of tokens
        if max_seq_len < 1:
            refuse(_OP, "max_seq_len", "required where a program does not know its tokens")
        return max_seq_len, max_seq_len if room < 0 else room
    if not paddle.in_dynamic_mode():
        return tokens, room
    queries = tokens
    if encoder is not None:
        # More tokens than sequences: some sequences decode several tokens, which Paddle's arguments
        # cannot express.
        several = tokens > int(block_tables.shape[0])
        prompt = _host_int("max_enc_len_this_time", encoder)
        queries = min(tokens, prompt) if prompt > 0 else (tokens if several else min(tokens, 1))
    if decoder is not None:
        cached = _host_int("max_dec_len_this_time", decoder)
        if cached < 0:
            raise ValueError(f"{_OP}: max_dec_len_this_time: expected at least 0, got {cached}")
        room = min(room, cached + queries)
    return queries, room


def _host_int(name: str, tensor: Any) -> int:
    require_tensors(_OP, **{name: tensor})
    if not tensor.place.is_cpu_place():
        raise ValueError(f"{_OP}: {name}: expected a tensor on the CPU, got {tensor.place}")
    if 0 in tensor.shape:
        raise ValueError(f"{_OP}: {name}: expected a number, got shape {list(tensor.shape)}")
    return int(tensor.numpy().reshape(-1)[0])
