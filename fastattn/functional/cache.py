"""Functions that write a paged KV cache, read it back and convert its byte layouts."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._cache_types import check_no_zero_points, operator_cache_type
from fastattn.functional._marker import unified

# Stands for the number of blocks, which a traced program may not know.
_ALL_BLOCKS = 2**63 - 1


@unified
def write_cache_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    *,
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
) -> tuple[Tensor, Tensor]:
    r"""Quantise the new tokens of a step and write them into a layer's paged cache, in place.

    .. math:: s = \max(\mathrm{amax}, 10^{-6}) / Q_{max}, \qquad
              c = \mathrm{round}(\mathrm{saturate}(x \cdot (1 / s)))

    :math:`Q_{max}` is 448 for e4m3, 57344 for e5m2 and 127 for int8. Dynamic types have one
    :math:`s` for each token and KV head (per-token scales); static types use the given :math:`s`. A
    dynamic scale that is stored as bfloat16 is rounded before its token is quantised.

    With `k_center` or `k_rotation` the x of K is :math:`H (k - m)`, in fp32: a constant is
    subtracted, then the result is multiplied by the normalised Hadamard matrix H. Both spread or
    remove outliers in the channels of K, so that the codes of the other channels keep more bits.
    The attention must be called with matching arguments.

    Sequence b has ``n = min(seq_lens_this_time[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b])`` new
    tokens. Its i-th new token is token ``cu_seqlens_q[b] + i`` of `key`. It goes to position
    ``p = seq_lens_decoder[b] + i``, which is slot ``p % 64`` of block ``block_tables[b, p // 64]``.
    Tokens of no sequence and tokens without an assigned block (an id outside ``[0, num_blocks)``)
    are skipped. All other slots keep their bytes.

    Parameters
    ----------
    key, value : Tensor, shape [T, KV, D], float32, float16 or bfloat16
        For type ``"none"`` the dtype of the caches, or float32, which is rounded to it. D is 128
        for `value` and its cache if it is 192 for `key` (unabsorbed MLA, after RoPE).
    key_cache : Tensor, shape [num_blocks, KV, 64, D]
        uint8 (or the int8 / float8 dtype of the codes); bfloat16 or float16 for ``"none"``. The
        last dimension must be contiguous. The other dimensions may have any strides, as may
        `value_cache` and dynamic scales: views of one pool and transposed views are written in
        place.
    value_cache : Tensor, shape [num_blocks, KV, D, 64]
        The 64 tokens of a channel are in the order of :func:`fastattn.reference.layout.token_slot`.
        Type ``"none"`` has the shape [num_blocks, KV, 64, D]. In both shapes, D is half of the head
        dimension for ``block_wise_int4`` and ``block_wise_mxfp4``: a byte holds two channels. For
        ``block_wise_k8v4`` and ``block_wise_kfp8v4`` that holds for V alone.
    block_tables : Tensor, shape [B, max_blocks] or [B, KV, max_blocks], int32
        Physical block of each group of 64 tokens of a sequence. `block_tables` and
        `seq_lens_decoder` may have more than B rows, for slots of a server that do not run. With
        three dimensions each KV head has a table of its own, as in :func:`paged_attention`. On a
        GPU this is for up to 65535 tokens, and a prompt is written token by token.
    cu_seqlens_q : Tensor, shape [B + 1], int32
        Index of the first token of each sequence in `key`.
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        Number of cached and of new tokens of each sequence.
    cache_k_scales, cache_v_scales : Tensor, float32, bfloat16 or uint8, optional
        Dequantisation multipliers (``x ~ code * scale``). Static types read them: [1], [KV] or, for
        ``cache_int8``, [KV * D]. Dynamic types write them: [num_blocks, KV, 64].
        ``block_wise_mxfp4`` writes uint8 [num_blocks, KV, 64, D / 32], the exponents of two plus
        127.
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
        Rotate K before it is quantised. Not supported for ``"none"`` and e5m2. If D is not a power
        of two, H has a block for each ``D & -D`` channels.
        4-bit types lose much without it (docs/quality.md). The attention needs the same
        `k_rotation` and `k_center`: the ``**cache.arguments`` of :func:`make_cache` give both to
        both calls.
    k_center : Tensor, shape [KV, D], float32, optional
        The constant that is subtracted from K before the rotation. Supported for the same types.
    k_feedback : Tensor, shape [KV, D, D], float32, optional
        Error feedback M: K is rounded in blocks of 8 channels, and errors e of a block are added to
        the channels after it as e M. With M from the second moment of a head's queries, scores have
        smaller errors with the same bytes (docs/quality.md). ``python -m fastattn calibrate``
        computes it for the layer's `k_rotation`; :func:`fastattn.reference.feedback.feedback_of`
        has the formula. Only elements to the right of the diagonal's 8 x 8 blocks are read. The
        attention has no such argument. Supported for types with one scale for a head or token: not
        for e5m2, ``block_wise_mxfp4`` and scales of channels.

    Returns
    -------
    key_cache, value_cache : Tensor
        The caches themselves. A traced static program must use these results: Paddle drops an
        operator from a saved program if none of its outputs is used.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes or places do not match, scales are missing or superfluous, a zero point
        is given, or `fp8_format` is unknown.
    NotImplementedError
        If `cache_quant_type` or the head dimension is not supported, `fp8_format` is not e4m3 for
        ``block_wise_fp8``, or the type takes no `k_rotation`, `k_center` or `k_feedback`.
        Supported head dimensions are 64, 96, 128, 192 and 256.

    See Also
    --------
    fastattn.reference.write_cache_kv : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import write_cache_kv
    >>> key = paddle.full([1, 1, 64], 3.0)
    >>> key_cache, value_cache = (paddle.zeros([1, 1, 64, 64], "uint8") for _ in range(2))
    >>> k_scales, v_scales = paddle.zeros([1, 1, 64]), paddle.zeros([1, 1, 64])
    >>> blocks, cu, cached, new = (paddle.to_tensor(x, "int32") for x in ([[0]], [0, 1], [2], [1]))
    >>> _ = write_cache_kv(key, key, key_cache, value_cache, blocks, cu, cached, new,
    ...                    cache_k_scales=k_scales, cache_v_scales=v_scales,
    ...                    cache_quant_type="block_wise_int8")
    >>> key_cache.numpy()[0, 0, 2, :3], round(float(k_scales[0, 0, 2]) * 127, 3)
    (array([127, 127, 127], dtype=uint8), 3.0)
    """
    if cache_k_zp is not None or cache_v_zp is not None:
        check_no_zero_points(
            "write_cache_kv", cache_quant_type, cache_k_zp=cache_k_zp, cache_v_zp=cache_v_zp
        )
    outputs = _ops.call(
        "write_cache_kv",
        (
            key,
            value,
            key_cache,
            value_cache,
            block_tables,
            cu_seqlens_q,
            seq_lens_decoder,
            seq_lens_this_time,
            cache_k_scales,
            cache_v_scales,
            batch_id_per_token,
            k_center,
            k_feedback,
        ),
        (operator_cache_type("write_cache_kv", cache_quant_type), fp8_format, k_rotation),
    )
    return outputs[0], outputs[1]


@unified
def append_cache_kv_c8(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    block_tables: Tensor,
    seq_lens_decoder: Tensor,
    cu_seqlens_k: Tensor,
    *,
    cache_k_scales: Tensor,
    cache_v_scales: Tensor,
    dynamic_quant: bool,
    cache_quant_type: str,
    cache_layout: str = "fastattn",
    fp8_format: str = "e4m3",
    cache_k_zp: Tensor | None = None,
    cache_v_zp: Tensor | None = None,
    k_rotation: str = "none",
    k_center: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Dequantise the cached tokens of each sequence into contiguous `key` and `value`, in place.

    .. math:: \mathrm{key}[\mathrm{cu\_seqlens\_k}[b] + i] = \mathrm{round}_T(c \cdot s), \qquad
              0 \le i < \mathrm{seq\_lens\_decoder}[b]

    c is the code and s the scale of position i of sequence b. The fp32 product is rounded to the
    dtype of `key`. A sequence gives at most ``cu_seqlens_k[b + 1] - cu_seqlens_k[b]`` tokens. All
    other tokens of `key` and `value` keep their contents, also tokens whose block is not assigned
    (an id outside ``[0, num_blocks)``).

    Parameters
    ----------
    key_cache : Tensor, shape [num_blocks, KV, 64, D], uint8
        Or the int8 / float8 dtype of the codes. Strides of the caches and of dynamic scales are as
        for ``write_cache_kv``. In layout ``"fastdeploy"`` the 64 * D codes of a block and head must
        be contiguous.
    value_cache : Tensor, shape [num_blocks, KV, D, 64], uint8
        [num_blocks, KV, 64, D] for ``cache_layout="fastdeploy"``. Types with 4-bit codes do not
        have this layout. Caches of 4-bit codes have half of D: K and V of ``block_wise_int4`` and
        ``block_wise_mxfp4``, and V of ``block_wise_k8v4`` and ``block_wise_kfp8v4``.
    key, value : Tensor, shape [sum k, KV, D], bfloat16 or float16
        Written in place. D is 128 for `value` if it is 192 for `key`.
    block_tables : Tensor, shape [B, max_blocks], int32
        Physical block of each group of 64 tokens of a sequence.
    seq_lens_decoder : Tensor, shape [B], int32
        Number of cached tokens of each sequence.
    cu_seqlens_k : Tensor, shape [B + 1], int32
        Index of the first token of each sequence in `key`.
    cache_k_scales, cache_v_scales : Tensor, float32, bfloat16 or uint8
        Dequantisation multipliers. Static types: [1], [KV] or, for ``cache_int8``, [KV * D].
        Dynamic types: [num_blocks, KV, 64] in token order; ``block_wise_mxfp4``: uint8 [num_blocks,
        KV, 64, D / 32].
    dynamic_quant : bool
        Whether the cache has per-token scales. It must agree with `cache_quant_type`.
    cache_quant_type : str
        ``cache_int8`` (or ``int8``), ``cache_fp8`` (or ``float8_e4m3fn``), ``block_wise_int8``,
        ``block_wise_fp8``, ``block_wise_int4``, ``block_wise_mxfp4``, ``block_wise_k8v4`` or
        ``block_wise_kfp8v4``.
    cache_layout : {"fastattn", "fastdeploy"}
        Byte layout of the caches. FastDeploy stores int8 codes plus 128.
    fp8_format : {"e4m3", "e5m2"}
        Format of the codes of ``cache_fp8``.
    cache_k_zp, cache_v_zp : None
        Zero points. Every supported type is symmetric and takes none.
    k_rotation : {"none", "hadamard"}
    k_center : Tensor, shape [KV, D], float32, optional
        The values that K was written with (:func:`write_cache_kv`). K is rotated back and the
        centre is added, both in fp32 before the rounding. Only supported in layout ``"fastattn"``.

    Returns
    -------
    key, value : Tensor
        The outputs themselves. A traced static program must use these results.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes or places do not match, `dynamic_quant` does not agree with
        `cache_quant_type`, a zero point is given, or `cache_layout` or `fp8_format` is unknown.
    NotImplementedError
        If `cache_quant_type`, `cache_layout` ("logical") or the head dimension is not supported,
        `fp8_format` is not e4m3 for ``block_wise_fp8``, or another argument does not go with
        `k_rotation` or `k_center`. Supported head dimensions are 64, 96, 128, 192 and 256.

    See Also
    --------
    fastattn.reference.append_cache_kv_c8 : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import append_cache_kv_c8
    >>> codes = paddle.full([1, 1, 64, 64], 3, "uint8")
    >>> scale = paddle.to_tensor([0.5])
    >>> key, value = paddle.zeros([2, 1, 64], "float16"), paddle.zeros([2, 1, 64], "float16")
    >>> blocks, cached, cu = (paddle.to_tensor(x, "int32") for x in ([[0]], [2], [0, 2]))
    >>> _ = append_cache_kv_c8(
    ...     codes, codes, key, value, blocks, cached, cu, cache_k_scales=scale,
    ...     cache_v_scales=scale, dynamic_quant=False, cache_quant_type="cache_int8",
    ... )
    >>> key.numpy()[:, 0, 0].tolist()
    [1.5, 1.5]
    """
    if cache_k_zp is not None or cache_v_zp is not None:
        check_no_zero_points(
            "append_cache_kv_c8", cache_quant_type, cache_k_zp=cache_k_zp, cache_v_zp=cache_v_zp
        )
    outputs = _ops.call(
        "append_cache_kv_c8",
        (
            key_cache,
            value_cache,
            key,
            value,
            block_tables,
            seq_lens_decoder,
            cu_seqlens_k,
            cache_k_scales,
            cache_v_scales,
            k_center,
        ),
        (
            dynamic_quant,
            operator_cache_type("append_cache_kv_c8", cache_quant_type),
            cache_layout,
            fp8_format,
            k_rotation,
        ),
    )
    return outputs[0], outputs[1]


@unified
def convert_cache_layout(
    cache: Tensor, *, kind: str, cache_quant_type: str, src: str, dst: str
) -> Tensor:
    """Copy a cache tensor into another byte layout; the values stay the same.

    Parameters
    ----------
    cache : Tensor, shape [num_blocks, KV, 64, D] or [num_blocks, KV, D, 64]
        uint8 (or the int8 / float8 dtype of the codes); bfloat16 or float16 for type ``"none"``.
        The second shape is for V in layout ``"fastattn"``. Blocks and heads may have any strides;
        the elements of a block and head must be contiguous.
    kind : {"k", "v"}
        Which of the two caches is given.
    cache_quant_type : str
        ``none``, ``cache_int8`` (or ``int8``), ``cache_fp8`` (or ``float8_e4m3fn``),
        ``block_wise_int8``, ``block_wise_fp8``, ``block_wise_int4``, ``block_wise_mxfp4``,
        ``block_wise_k8v4`` or ``block_wise_kfp8v4``. K and V of 4-bit codes have half of the head
        dimension as D; types with them have no layout ``"fastdeploy"``. For ``"none"`` all layouts
        are the same.
    src, dst : {"fastattn", "fastdeploy", "logical"}
        ``logical`` is [num_blocks, KV, 64, D] in token order. ``fastdeploy`` stores int8 codes plus
        128. ``fastattn.reference.layout`` has the formulas.

    Returns
    -------
    Tensor
        A new tensor with the dtype of `cache` and the shape of layout `dst`.

    Raises
    ------
    TypeError
        If `cache` is not a tensor or its dtype does not match `cache_quant_type`.
    ValueError
        If `kind`, `src` or `dst` is unknown or the shape does not match them.
    NotImplementedError
        If `cache_quant_type` or the head dimension is not supported. Supported are 64, 96, 128 and
        256, and 192 for K.

    See Also
    --------
    fastattn.reference.convert_cache_layout : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import convert_cache_layout
    >>> cache = paddle.arange(4096).reshape([1, 1, 64, 64]).astype("uint8")
    >>> moved = convert_cache_layout(
    ...     cache, kind="v", cache_quant_type="cache_fp8", src="logical", dst="fastattn"
    ... )
    >>> moved.numpy()[0, 0, 5, :4].tolist()  # channel 5 of tokens 0, 1, 8, 9
    [5, 69, 5, 69]
    """
    name = operator_cache_type("convert_cache_layout", cache_quant_type)
    outputs = _ops.call("convert_cache_layout", (cache,), (kind, name, src, dst))
    return outputs[0]


@unified
def convert_cache_blocks(
    cache: Tensor,
    *,
    kind: str,
    cache_quant_type: str,
    src: str,
    dst: str,
    begin: int = 0,
    end: int | None = None,
) -> Tensor:
    """Convert blocks of a cache tensor to another byte layout, in place.

    Unlike :func:`convert_cache_layout`, this needs no second cache: each block of a KV head is read
    completely before it is written. Blocks outside ``[begin, end)`` keep their bytes. Do not
    convert a block twice: its bytes would be read in layout `src` again.

    Parameters
    ----------
    cache : Tensor, shape [num_blocks, KV, 64, D] or [num_blocks, KV, D, 64]
        uint8 (or the int8 / float8 dtype of the codes). For type ``"none"``, bfloat16 or float16;
        nothing is done. A quantised V may have either shape in any layout, and keeps it. Strides as
        for ``convert_cache_layout``.
    kind : {"k", "v"}
        Which of the two caches is given.
    cache_quant_type : str
        ``none``, ``cache_int8`` (or ``int8``), ``cache_fp8`` (or ``float8_e4m3fn``),
        ``block_wise_int8``, ``block_wise_fp8``, ``block_wise_int4``, ``block_wise_mxfp4``,
        ``block_wise_k8v4`` or ``block_wise_kfp8v4``.
    src, dst : {"fastattn", "fastdeploy", "logical"}
        As for :func:`convert_cache_layout`.
    begin, end : int
        Range of blocks ``[begin, end)``. Default: all blocks.

    Returns
    -------
    Tensor
        `cache` itself.

    Raises
    ------
    TypeError
        If `cache` is not a tensor or its dtype does not match `cache_quant_type`.
    ValueError
        If `kind`, `src` or `dst` is unknown, the shape does not match them, or
        ``0 <= begin <= end <= num_blocks`` does not hold.
    NotImplementedError
        If `cache_quant_type` or the head dimension is not supported. Supported are 64, 96, 128 and
        256, and 192 for K.

    See Also
    --------
    fastattn.backends.convert_caches : all caches of a server.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import convert_cache_blocks
    >>> cache = paddle.full([3, 1, 64, 64], 129, "uint8")  # FastDeploy's byte of the int8 code 1
    >>> _ = convert_cache_blocks(
    ...     cache, kind="k", cache_quant_type="cache_int8", src="fastdeploy", dst="fastattn",
    ...     begin=1, end=2,
    ... )
    >>> cache[:, 0, 0, 0].numpy().tolist()
    [129, 1, 129]
    """
    last = _ALL_BLOCKS if end is None else end
    name = operator_cache_type("convert_cache_blocks", cache_quant_type)
    outputs = _ops.call("convert_cache_blocks", (cache,), (kind, name, src, dst, begin, last))
    return outputs[0]
