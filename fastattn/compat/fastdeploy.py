"""Some of FastDeploy's operators under their own names and with their own positional arguments.

A program that calls them changes one line::

    # from fastdeploy.model_executor.ops.gpu import merge_prefill_decode_output
    from fastattn.compat.fastdeploy import gqa_rope_write_cache, merge_prefill_decode_output

The two operators of this import read and write caches in FastDeploy's byte layout, which its
``append_attention`` reads. The backends of :mod:`fastattn.backends` need neither, because they
attend to the quantised cache itself. The other operators belong to DeepSeek's indexer and its
latent cache.
"""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from fastattn import _ops
from fastattn.backends.scales import HeadShard, local_scales
from fastattn.compat._fastdeploy_indexer import (
    cp_gather_indexer_k_quant_cache,
    indexer_k_quant_and_cache,
    radix_topk_ragged_transform,
)
from fastattn.compat._fastdeploy_mla import dsk_attn_write_cache
from fastattn.functional._attributes import as_float
from fastattn.functional._cache_types import (
    DYNAMIC_TYPES,
    STATIC_TYPES,
    check_cache_type,
    check_no_zero_points,
)
from fastattn.functional._marker import unified

__all__ = [
    "cp_gather_indexer_k_quant_cache",
    "dsk_attn_write_cache",
    "gqa_rope_write_cache",
    "indexer_k_quant_and_cache",
    "merge_prefill_decode_output",
    "radix_topk_ragged_transform",
]

_OP = "gqa_rope_write_cache"


@unified
def gqa_rope_write_cache(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rotary_embs: Tensor,
    seq_lens_this_time: Tensor,
    seq_lens_encoder: Tensor,
    seq_lens_decoder: Tensor,
    batch_id_per_token: Tensor | None,
    block_tables: Tensor,
    kv_batch_ids: Tensor | None,
    kv_tile_ids_per_batch: Tensor | None,
    kv_num_blocks: Tensor | None,
    cache_batch_ids: Tensor | None,
    cache_tile_ids_per_batch: Tensor | None,
    cache_num_blocks: Tensor | None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    cache_k_quant_scales: Tensor | None = None,
    cache_v_quant_scales: Tensor | None = None,
    cache_k_dequant_scales: Tensor | None = None,
    cache_v_dequant_scales: Tensor | None = None,
    cache_k_zp: Tensor | None = None,
    cache_v_zp: Tensor | None = None,
    kv_signal_data: Tensor | None = None,
    kv_token_num: int = 1,
    max_seq_len: int = 0,
    rms_norm_eps: float = 1e-6,
    use_neox_rotary_style: bool | str = False,
    cache_quant_type: str | bool = "none",
    rope_3d: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FastDeploy's operator for steps with prefill: rotate, gather K and V, write the cache.

    All new tokens are rotated, then normalised if weights are given. `k` and `v` hold the tokens of
    sequence b from ``cu_seqlens_k[b]`` on. For a prefill sequence (``seq_lens_encoder[b] > 0``)
    these are its ``seq_lens_decoder[b]`` cached tokens, dequantised, and then its new tokens, which
    are also written into the cache. For any other sequence these are only its new tokens, which
    ``append_attention`` writes later. Differences from FastDeploy's operator:

    - Each token of V is dequantised with its own dynamic scale, in every group of 16 tokens.
    - Codes are the same as from :func:`fastattn.functional.write_cache_kv`: FP8 values are not
      rounded to integers first, and an all-zero or tiny token gives finite codes and scales. Only
      the slots of new tokens change. FastDeploy's readers accept a mix of codes from both
      operators.
    - ``cache_int8`` scales with one entry per channel are applied per channel.
    - float16 and head dimension 64 are supported as well as bfloat16 and 128, and norms with neox
      style.

    Parameters
    ----------
    qkv : Tensor, shape [T, (H + 2 KV) * D], bfloat16 or float16
        Not changed.
    key_cache, value_cache : Tensor, shape [num_blocks, KV, 64, D]
        uint8 in FastDeploy's layout, or the dtype of `qkv` for type ``none``. Written in place.
    cu_seqlens_q, cu_seqlens_k : Tensor, shape [B + 1], int32
    rotary_embs : Tensor, shape [2, 1, max_seq, 1, columns], float32
        D / 2 columns. For neox D, or D / 4 if half of a head is rotated. With `rope_3d` [S, 2, 1,
        max_seq, 1, columns]: sequence b uses table b.
    seq_lens_this_time, seq_lens_encoder, seq_lens_decoder : Tensor, shape [B] or [B, 1], int32
    batch_id_per_token : Tensor, shape [T], int32
        Sequence of each token; -1 for the padding of a CUDA graph.
    block_tables : Tensor, shape [B, max_blocks], int32
        `block_tables`, `seq_lens_encoder` and `seq_lens_decoder` may have more than B rows:
        FastDeploy up to 2.5 passes the arrays of all slots.
    kv_batch_ids, kv_tile_ids_per_batch, kv_num_blocks : any
    cache_batch_ids, cache_tile_ids_per_batch, cache_num_blocks : any
        FastDeploy's lists of tiles. Not used; may be None.
    q_norm_weight, k_norm_weight : Tensor, shape [D], optional
        RMSNorm after the rotation.
    cache_k_quant_scales, cache_v_quant_scales : Tensor, optional
        ``block_wise_fp8``: the scales of the cache, [num_blocks, KV, 64], in token order; written
        in place. Other types do not use them, because the dequantisation multipliers define the
        codes.
    cache_k_dequant_scales, cache_v_dequant_scales : Tensor, optional
        ``cache_int8``, ``cache_fp8``: dequantisation multipliers of the heads in the cache, [1],
        [KV] or (int8) [KV * D]. Other types do not use them.
    cache_k_zp, cache_v_zp : None
        Zero points. No supported type has them.
    kv_signal_data : None
        PD disaggregation is not supported. ``FLAGS_use_pd_disaggregation_per_chunk`` also passes
        None here, and no signal is sent: do not use this operator with it.
    kv_token_num : int
        Number of tokens of `k` and `v`. Tokens that `cu_seqlens_k` puts beyond it are left out.
    max_seq_len : int
        Not used. Positions past the end of the table use its last position.
    rms_norm_eps : float
    use_neox_rotary_style : bool
    cache_quant_type : {"none", "cache_int8", "cache_fp8", "block_wise_fp8"}
        Also ``int8`` and ``float8_e4m3fn``, the names of the two static types in FastDeploy's
        configuration.
    rope_3d : bool
        Whether `rotary_embs` has one table per sequence. Older versions of FastDeploy pass
        (rms_norm_eps, cache_quant_type, rope_3d) by position. A str in the place of
        `use_neox_rotary_style` indicates this order.

    Returns
    -------
    q : Tensor, shape [T, H, D]
    k, v : Tensor, shape [kv_token_num, KV, D]
        Undefined for tokens of no sequence and for cached tokens without a block.
    qkv_out : Tensor, shape [T, (H + 2 KV) * D]
        0 for padding, like `q`.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes or places do not match (including the dimensions of `rotary_embs` and `rope_3d`),
        scales are missing, or a zero point is given.
    NotImplementedError
        If `cache_quant_type` or the head dimension is not supported, or `kv_signal_data` is given.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.fastdeploy import gqa_rope_write_cache
    >>> def int32(x):
    ...     return paddle.to_tensor(x, dtype="int32")
    >>> qkv = paddle.full([2, 3 * 64], 2.0, "float16")  # two new tokens
    >>> caches = [paddle.zeros([1, 1, 64, 64], "uint8") for _ in range(2)]
    >>> scales = [paddle.zeros([1, 1, 64], "float32") for _ in range(2)]
    >>> table = paddle.concat([paddle.ones([1, 1, 8, 1, 32]), paddle.zeros([1, 1, 8, 1, 32])])
    >>> cu_seqlens, lens, zero = int32([0, 2]), int32([2]), int32([0])
    >>> q, k, v, qkv_out = gqa_rope_write_cache(
    ...     qkv, *caches, cu_seqlens, cu_seqlens, table, lens, lens, zero, int32([0, 0]),
    ...     int32([[0]]), *8 * [None], *scales, *5 * [None], 2, 8, 1e-6, False,
    ...     "block_wise_fp8", False,
    ... )
    >>> list(k.shape), float(v[1, 0, 0]), round(float(scales[0][0, 0, 1]) * 448, 3)
    ([2, 1, 64], 2.0, 2.0)
    """
    if isinstance(use_neox_rotary_style, str):  # the older order
        rope_3d = bool(cache_quant_type) if isinstance(cache_quant_type, bool) else rope_3d
        use_neox_rotary_style, cache_quant_type = False, use_neox_rotary_style
    if not isinstance(cache_quant_type, str):
        raise TypeError(
            f"{_OP}: cache_quant_type: expected str, got {type(cache_quant_type).__name__}"
        )
    cache_quant_type = check_cache_type(_OP, cache_quant_type)
    check_no_zero_points(_OP, cache_quant_type, cache_k_zp=cache_k_zp, cache_v_zp=cache_v_zp)
    _check_rope_3d(rope_3d, rotary_embs)
    if kv_signal_data is not None:
        raise NotImplementedError(f"{_OP}: kv_signal_data: PD disaggregation is not supported")
    scales: list[Any] = [None, None]
    if cache_quant_type in DYNAMIC_TYPES:
        scales = [cache_k_quant_scales, cache_v_quant_scales]
    elif cache_quant_type in STATIC_TYPES:
        scales = [
            _static(cache_k_dequant_scales, "cache_k_dequant_scales", key_cache, cache_quant_type),
            _static(cache_v_dequant_scales, "cache_v_dequant_scales", key_cache, cache_quant_type),
        ]
    outputs = _ops.call(
        _OP,
        (
            qkv,
            key_cache,
            value_cache,
            cu_seqlens_q,
            cu_seqlens_k,
            rotary_embs,
            seq_lens_this_time,
            seq_lens_encoder,
            seq_lens_decoder,
            block_tables,
            batch_id_per_token,
            q_norm_weight,
            k_norm_weight,
            *scales,
        ),
        (
            kv_token_num,
            as_float(_OP, "rms_norm_eps", rms_norm_eps),
            use_neox_rotary_style,
            cache_quant_type,
        ),
    )
    return outputs[0], outputs[1], outputs[2], outputs[3]


def _check_rope_3d(rope_3d: bool, rotary_embs: Any) -> None:
    """Refuse a table whose dimensions contradict `rope_3d`; the operator goes by the dimensions."""
    rank = len(rotary_embs.shape) if _ops.is_tensor(rotary_embs) else None
    if rope_3d and rank in (3, 5):
        expected = "a table for each sequence, [S, 2, 1, max_seq, 1, columns], with rope_3d"
    elif not rope_3d and rank in (4, 6):
        expected = "one table, [2, 1, max_seq, 1, columns], without rope_3d"
    else:
        return
    raise ValueError(f"{_OP}: rotary_embs: expected {expected}, got {list(rotary_embs.shape)}")


def _static(scales: Any, name: str, key_cache: Any, cache_quant_type: str) -> Any:
    """Static scales for the operator, which itself refuses scales that are not tensors."""
    if not _ops.is_tensor(scales) or not _ops.is_tensor(key_cache) or len(key_cache.shape) != 4:
        return scales
    return local_scales(
        scales,
        name=f"{_OP}: {name}",
        kv_heads=int(key_cache.shape[1]),
        head_dim=int(key_cache.shape[3]),
        shard=HeadShard(),
        per_channel=cache_quant_type == "cache_int8",
    )


@unified
def merge_prefill_decode_output(
    encoder_res: Tensor,
    decoder_res: Tensor,
    seq_lens_encoder: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    cu_seq_q: Tensor,
    head_num: int,
    head_dim: int,
    max_token: int,
) -> Tensor:
    """Copy the outputs of decoding sequences into the outputs of prefill sequences, in place.

    A sequence is decoding if ``seq_lens_encoder[b] == 0`` and ``seq_lens_decoder[b] > 0``. Its
    tokens are ``cu_seq_q[b] + i`` for i below ``seq_lens_this_time[b]``. Unlike FastDeploy's
    operator, this one copies all of them, even past `max_token`, takes any head dimension, and
    raises for unsupported arguments.

    Parameters
    ----------
    encoder_res : Tensor, shape [T, head_num * head_dim] or [T, head_num, head_dim]
        float32, float16, bfloat16 or an 8-bit type. Written in place.
    decoder_res : Tensor
        The shape and dtype of `encoder_res`. T may differ: tokens that one of the two tensors lacks
        are left out.
    seq_lens_encoder, seq_lens_decoder, seq_lens_this_time : Tensor, shape [B] or [B, 1], int32
        The first two may have more than B elements, for all slots.
    cu_seq_q : Tensor, shape [B + 1], int32
    head_num, head_dim : int
    max_token : int
        Maximum number of new tokens of a decoding sequence. Not used.

    Returns
    -------
    Tensor
        `encoder_res`.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes or places do not match, or the results share memory.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.fastdeploy import merge_prefill_decode_output
    >>> prefill, decode = paddle.full([3, 4], 1.0), paddle.full([3, 4], 2.0)
    >>> lens = [paddle.to_tensor(x, dtype="int32") for x in ([2, 0], [0, 9], [2, 1], [0, 2, 3])]
    >>> _ = merge_prefill_decode_output(prefill, decode, *lens, 2, 2, 1)
    >>> prefill[:, 0].numpy().tolist()
    [1.0, 1.0, 2.0]
    """
    outputs = _ops.call(
        "merge_prefill_decode_output",
        (
            encoder_res,
            decoder_res,
            seq_lens_encoder,
            seq_lens_decoder,
            seq_lens_this_time,
            cu_seq_q,
        ),
        (head_num, head_dim, max_token),
    )
    return outputs[0]
