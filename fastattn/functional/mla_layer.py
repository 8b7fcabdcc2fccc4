"""The operators before and after the latent attention of a DeepSeek-V4 layer."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import as_float
from fastattn.functional._marker import unified


@unified
def inverse_rope_quantize_fp8(
    x: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    *,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Rotate the output of DeepSeek-V4's attention back and quantise it for the output projection.

    V4 uses its keys as values, including rotated channels. So the last 64 channels of the output
    are rotated back by the query's position, in pairs (GPT-J style):
    :math:`e' = e\,c + o\,s,\ o' = o\,c - e\,s`. All arithmetic is fp32, without an intermediate
    rounding to bf16. Each group of 128 channels then gets a scale

    .. math:: s = 2^{\lceil\log_2(\max(\mathrm{amax}, 10^{-10}) / 448)\rceil}, \qquad
              c = \mathrm{e4m3}(x / s)

    Heads belong to groups, and each group has its own output projection. Codes and scales have the
    layout of the operand of a grouped FP8 product with scales of 1 x 128: the tokens of a group are
    contiguous, and in the scales the token is the fastest dimension.

    Parameters
    ----------
    x : Tensor, shape [T, H, 512], bfloat16
        Output of the attention. Tokens and heads may have any stride, so a view without padded
        heads is allowed.
    positions : Tensor, shape [T], int32 or int64
        Position of each query. Clamped to ``[0, max_positions)``.
    cos_sin_cache : Tensor, shape [max_positions, 64], float32 or bfloat16
        32 cosines, then 32 sines.
    num_groups : int
        Number G of groups, each of H / G neighbouring heads.

    Returns
    -------
    codes : Tensor, shape [G, T, H / G * 512], uint8
        e4m3 codes. Infinities saturate.
    scales : Tensor, shape [G, H / G * 4, T rounded up to a multiple of 4], float32
        Element ``[g, j, t]`` is the dequantisation multiplier of channels 128j .. 128j + 127 of
        token t, a power of two. It is 0 after the last token. A block with a NaN has a NaN scale
        and NaN codes.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype.
    ValueError
        If a shape is wrong, `cos_sin_cache` is empty, or `num_groups` does not divide the number of
        heads. Also if tokens or heads of `x` do not start at multiples of 16 bytes on a GPU.

    See Also
    --------
    mla_qkv_norm_rope_write : the rotation before the attention.
    fastattn.reference.inverse_rope_quantize_fp8 : the same in NumPy, bit by bit.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import inverse_rope_quantize_fp8
    >>> table = paddle.concat([paddle.zeros([4, 32]), paddle.ones([4, 32])], axis=1)  # 90 degrees
    >>> x = paddle.zeros([1, 2, 512], "bfloat16")
    >>> x[0, 0, 448:450] = paddle.to_tensor([1.0, 2.0], "bfloat16")
    >>> codes, scales = inverse_rope_quantize_fp8(x, paddle.to_tensor([3]), table, num_groups=2)
    >>> list(codes.shape), list(scales.shape), scales.numpy()[0, 3].tolist()
    ([2, 1, 512], [2, 4, 4], [0.0078125, 0.0, 0.0, 0.0])
    >>> codes.numpy()[0, 0, 448:450].tolist()  # 2 and -1
    [120, 240]
    """
    codes, scales = _ops.call(
        "inverse_rope_quantize_fp8", (x, positions, cos_sin_cache), (num_groups,)
    )
    return codes, scales


@unified
def mla_qkv_norm_rope_write(
    q: Tensor,
    kv: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    *,
    cache_format: str = "fp8_584",
    rms_norm_eps: float = 1e-6,
    padded_heads: int | None = None,
    page_size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Normalise and rotate the queries of a DeepSeek-V4 layer; rotate its keys and write them.

    The last 64 channels of each query head and of each key are rotated by the token's position, in
    pairs (GPT-J style): :math:`e' = e\,c - o\,s,\ o' = o\,c + e\,s`. One launch does both:

    - Queries: :math:`x \cdot (1 / \sqrt{\mathrm{mean}(x^2) + \epsilon})` over the 512 channels of a
      head, without a weight, then the rotation, then one rounding to bf16. The intermediate values
      are fp32.
    - Keys, which are normalised already: the rotation, a rounding to bf16, and the bytes of
      :func:`mla_write_cache`. These are 448 e4m3 codes with a power-of-two scale for each 64
      channels, and the 64 rotated channels in bf16.

    Parameters
    ----------
    q : Tensor, shape [T, H, 512], bfloat16
        Tokens and heads may have any stride.
    kv : Tensor, shape [T, 512], bfloat16
        Key of each token, which is also its value. Any token stride.
    cache : Tensor, uint8
        Written in place. As for :func:`mla_write_cache` with "fp8_584".
    slot_mapping : Tensor, shape [n], int32 or int64
        Slots of the first n keys, n <= T. Key i goes to row ``slot % page_size`` of page
        ``slot // page_size``. A key with a negative slot, or with a slot past the last page, is
        skipped. No two keys may share a slot. The queries of all T tokens are processed.
    positions : Tensor, shape [T], int32 or int64
        Clamped to ``[0, max_positions)``.
    cos_sin_cache : Tensor, shape [max_positions, 64], float32 or bfloat16
        32 cosines, then 32 sines.
    cache_format : {"fp8_584"}
    rms_norm_eps : float
        Finite and at least 0.
    padded_heads : int, optional
        Number of heads of the result, if an attention kernel needs more than H. The additional
        heads are 0.
    page_size : int, optional
        Tokens of a page; needed for a `cache` of two dimensions.
    out : Tensor, shape [T, H or more, 512], bfloat16, optional
        Written in place and returned. It may be `q`, or have `q` as its first heads.

    Returns
    -------
    Tensor, shape [T, H or padded_heads, 512], bfloat16
        The queries; `out` if it is given.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype.
    ValueError
        If shapes, places or strides do not match, `rms_norm_eps` is negative or not finite, or what
        is written shares memory with another argument. Also if heads, tokens, rows or pages do not
        start at multiples of 16 bytes on a GPU.
    NotImplementedError
        If `cache_format` is not supported.

    See Also
    --------
    inverse_rope_quantize_fp8 : the step after the attention.
    fastattn.reference.mla_qkv_norm_rope_write : the same in NumPy, bit by bit.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import mla_qkv_norm_rope_write
    >>> q, kv = paddle.full([1, 2, 512], 3.0, "bfloat16"), paddle.ones([1, 512], "bfloat16")
    >>> table = paddle.concat([paddle.zeros([4, 32]), paddle.ones([4, 32])], axis=1)  # 90 degrees
    >>> cache, slots = paddle.zeros([2, 64, 584], "uint8"), paddle.to_tensor([65])
    >>> rotated = mla_qkv_norm_rope_write(q, kv, cache, slots, paddle.to_tensor([3]), table)
    >>> rotated.astype("float32").numpy()[0, 1, [0, 447, 448, 449]].tolist()
    [1.0, 1.0, -1.0, 1.0]
    >>> page = cache.numpy()[1].ravel()  # -1 in bf16, and an exponent of 2^-8
    >>> page[576 + 448 : 576 + 450].tolist(), int(page[64 * 576 + 8])
    ([128, 191], 119)
    """
    op = "mla_qkv_norm_rope_write"
    results = _ops.call(
        op,
        (q, kv, cache, slot_mapping, positions, cos_sin_cache, out),
        (
            cache_format,
            0 if page_size is None else page_size,
            0 if padded_heads is None else padded_heads,
            as_float(op, "rms_norm_eps", rms_norm_eps),
        ),
    )
    return results[0]
