"""RoPE, qk-norm and the cache write of a step, from the fused projection."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import as_float
from fastattn.functional._cache_types import check_no_zero_points, operator_cache_type
from fastattn.functional._marker import unified


@unified
def rope_write_cache_kv(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rotary_embs: Tensor | None,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    rms_norm_eps: float = 1e-6,
    use_neox_rotary_style: bool = False,
    rotary_dim: int | None = None,
    qk_norm_before_rope: bool = False,
    qkv_bias: Tensor | None = None,
    q_quant: str = "none",
    q_scale: Tensor | None = None,
    cache_k_scales: Tensor | None = None,
    cache_v_scales: Tensor | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    batch_id_per_token: Tensor | None = None,
    cache_k_zp: Tensor | None = None,
    cache_v_zp: Tensor | None = None,
    k_rotation: str = "none",
    k_center: Tensor | None = None,
    k_feedback: Tensor | None = None,
    q_rotation: str = "none",
) -> tuple[Tensor, Tensor | None]:
    r"""Split a fused projection, rotate Q and K, and write K and V into the paged cache.

    A pair of channels :math:`(a, b)` at position :math:`p` is rotated with the table values
    :math:`c = \cos_p, s = \sin_p`:

    .. math:: a' = a c - b s, \qquad b' = a s + b c, \qquad
              y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \, w

    Bias, rotation and the RMSNorm :math:`y` of a head are computed in fp32 and rounded to the dtype
    of `qkv`. Then the head is quantised. The cache gets the same bytes as from a separate rotation
    and ``write_cache_kv``. Only the bias applies to V. `qkv` is not changed.

    Parameters
    ----------
    qkv : Tensor, shape [T, (H + 2 KV) * D], bfloat16 or float16
        Query heads, then key heads, then value heads. The first dimension may have any stride.
    key_cache, value_cache : Tensor
        Written in place. Shapes, dtypes and strides as for ``write_cache_kv``; the dtype of `qkv`
        for type ``"none"``.
    rotary_embs : Tensor, shape [2, 1, max_seq, 1, R / 2] or [..., R], float32, optional
        Cosines, then sines, of R = `rotary_dim` channels. [2, max_seq, columns] is accepted too.
        With R columns each angle is stored twice: as ``[a, b, .., a, b, ..]`` for neox, otherwise
        as ``[a, a, b, b, ..]``. Positions past the end use the last one. None means no rotation.
        With one more leading dimension, [S, 2, 1, max_seq, 1, columns] or [S, 2, max_seq, columns],
        there is one table per sequence (multimodal RoPE, FastDeploy's ``rope_3d``): sequence b uses
        table b. There may be more tables than sequences.
    block_tables : Tensor, shape [B, max_blocks] or [B, KV, max_blocks], int32
        Physical block of each group of 64 tokens of a sequence. `block_tables` and
        `seq_lens_decoder` may have more than B rows, for slots of a server that do not run. With
        three dimensions each KV head has a table of its own, as in :func:`paged_attention`. On a
        GPU this is for up to 65535 tokens, and a prompt is written token by token.
    cu_seqlens_q : Tensor, shape [B + 1], int32
        Index of the first token of each sequence in `qkv`.
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        Number of cached and of new tokens of each sequence. The i-th new token is at position
        ``seq_lens_decoder[b] + i``.
    num_heads, num_kv_heads : int
        Numbers H of query heads and KV of KV heads.
    q_norm_weight, k_norm_weight : Tensor, shape [D], float32, bfloat16 or float16, optional
        Weights of an RMSNorm over each head of Q and of K.
    rms_norm_eps : float
        :math:`\epsilon` of the RMSNorm.
    use_neox_rotary_style : bool
        Rotate the channel pairs (i, i + R / 2); otherwise (2i, 2i + 1).
        ``use_neox_rotary_style(architecture, file_format)`` says which a checkpoint needs.
    rotary_dim : int, optional
        Number of rotated channels, from the start of a head; even. Default: D.
    qk_norm_before_rope : bool
        Normalise before the rotation, as models like Qwen3 do. By default the norm follows the
        rotation, as in FastDeploy's operators.
    qkv_bias : Tensor, shape [(H + 2 KV) * D], float32, bfloat16 or float16, optional
    q_quant : {"none", "per_tensor", "per_token_head"}
        Return Q unquantised, as e4m3 with the given `q_scale`, or as e4m3 with a scale
        ``max(amax, 1e-6) / 448`` for each token and head.
    q_scale : Tensor, shape [1], float32, optional
        Dequantisation multiplier for ``"per_tensor"``.
    cache_k_scales, cache_v_scales : Tensor, optional
        As for ``write_cache_kv``; dynamic types write them.
    cache_quant_type : str
        ``none``, ``cache_int8`` (or ``int8``), ``cache_fp8`` (or ``float8_e4m3fn``),
        ``block_wise_int8``, ``block_wise_fp8``, ``block_wise_int4``, ``block_wise_mxfp4``,
        ``block_wise_k8v4`` or ``block_wise_kfp8v4``.
    fp8_format : {"e4m3", "e5m2"}
        Format of the codes of ``cache_fp8``.
    batch_id_per_token : Tensor, shape [T], int32, optional
        Sequence of each token. A token whose id is out of range (such as -1, the padding of a CUDA
        graph) is skipped.
    cache_k_zp, cache_v_zp : None
        Zero points. Every supported type is symmetric and takes none.
    k_rotation : {"none", "hadamard"}
    k_center : Tensor, shape [KV, D], float32, optional
        As for ``write_cache_kv``. K is first rounded to the dtype of `qkv`.
        :func:`make_cache` gives each type's value, the same for the attention.
    k_feedback : Tensor, shape [KV, D, D], float32, optional
        As for ``write_cache_kv``. The attention has no such argument.
    q_rotation : {"none", "hadamard"}
        ``"hadamard"`` requires `k_rotation` ``"hadamard"``: Q is returned rotated as K is, and
        rounded again before an optional quantisation. Then call the attention without `k_rotation`,
        and pass a `k_center` that is rotated (:func:`fastattn.reference.hadamard`), if there is
        one. This rotation costs nothing here; an attention that rotates Q launches a kernel for it.

    Returns
    -------
    q : Tensor, shape [T, H, D], the dtype of `qkv`, or uint8 (e4m3 codes)
        0 for skipped tokens and for tokens after the last sequence.
    q_descale : Tensor or None
        None, `q_scale`, or float32 [T, H]. A skipped token has the scale of an all-zero head.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes, places or options do not match, or a zero point is given.
    NotImplementedError
        If `cache_quant_type` or the head dimension is not supported, or a type takes no
        `k_rotation`, `k_center` or `k_feedback`.

    See Also
    --------
    attention_step : this and the attention in one call.
    fastattn.reference.rope_write_cache_kv : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import rope_write_cache_kv
    >>> qkv = paddle.ones([2, 3 * 64], "float16")
    >>> key_cache = paddle.zeros([1, 1, 64, 64], "float16")
    >>> value_cache = paddle.zeros([1, 1, 64, 64], "float16")
    >>> table = paddle.concat([paddle.zeros([1, 8, 32]), paddle.ones([1, 8, 32])])  # 90 degrees
    >>> blocks, cu, zero, two = (
    ...     paddle.to_tensor(x, "int32") for x in ([[0]], [0, 2], [0], [2])
    ... )
    >>> q, _ = rope_write_cache_kv(
    ...     qkv, key_cache, value_cache, table, blocks, cu, zero, two, num_heads=1, num_kv_heads=1
    ... )
    >>> q.numpy()[0, 0, :4].tolist(), key_cache.numpy()[0, 0, 1, :4].tolist()
    ([-1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, -1.0, 1.0])
    >>> value_cache.numpy()[0, 0, :3, 0].tolist()
    [1.0, 1.0, 0.0]
    """
    if cache_k_zp is not None or cache_v_zp is not None:
        check_no_zero_points(
            "rope_write_cache_kv", cache_quant_type, cache_k_zp=cache_k_zp, cache_v_zp=cache_v_zp
        )
    outputs = _ops.call(
        "rope_write_cache_kv",
        (
            qkv,
            key_cache,
            value_cache,
            rotary_embs,
            block_tables,
            cu_seqlens_q,
            seq_lens_decoder,
            seq_lens_this_time,
            q_norm_weight,
            k_norm_weight,
            qkv_bias,
            q_scale,
            k_center,
            k_feedback,
            cache_k_scales,
            cache_v_scales,
            batch_id_per_token,
        ),
        (
            num_heads,
            num_kv_heads,
            as_float("rope_write_cache_kv", "rms_norm_eps", rms_norm_eps),
            use_neox_rotary_style,
            -1 if rotary_dim is None else rotary_dim,
            qk_norm_before_rope,
            q_quant,
            operator_cache_type("rope_write_cache_kv", cache_quant_type),
            fp8_format,
            k_rotation,
            q_rotation,
        ),
    )
    if q_quant == "none":
        return outputs[0], None
    return outputs[0], q_scale if q_quant == "per_tensor" else outputs[1]
