"""Functions that write and read the caches of multi-head latent attention (MLA)."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified


@unified
def mla_write_cache(
    latent: Tensor,
    rope: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    *,
    cache_format: str,
    scale_rule: str = "pow2",
    scale: Tensor | None = None,
    page_size: int | None = None,
) -> Tensor:
    r"""Write the latent and the rotated channels of new tokens into a latent cache, in place.

    ========= ===== ============================================================================
    format    bytes a token
    ========= ===== ============================================================================
    bf16      1152  latent and rope as they are
    fp8       576   :math:`\mathrm{e4m3}(x / \mathrm{scale})` of both
    fp8_656   656   512 e4m3 with a float32 scale for each 128 channels; rope as it is (V3.2)
    fp8_584   584   448 e4m3 with a UE8M0 scale for each 64 channels; rope as it is (V4)
    ========= ===== ============================================================================

    The scale of a tile of channels depends on its largest magnitude:

    .. math::
        \text{pow2:}\quad & 2^{\lceil\log_2(\max(\mathrm{amax}, 10^{-4}) / 448)\rceil} \\
        \text{amax:}\quad & \max(\mathrm{amax} / 448, 2^{-126})

    Codes are :math:`\mathrm{e4m3}(x / s)`, with one fp32 division. Infinities saturate. A tile with
    a NaN gets a NaN scale and NaN codes. Readers that round scales to bf16, such as FlashMLA, lose
    nothing with "pow2".

    Parameters
    ----------
    latent : Tensor, shape [T, 512] ("fp8_584": [T, 448]), bfloat16
        Channels that are not rotated, after their norm. Any token stride.
    rope : Tensor, shape [T, 64], bfloat16
        Channels that have been rotated. Any token stride.
    cache : Tensor, bfloat16 ("bf16") or uint8
        [num_pages, page_size, W], [num_pages, page_size, 1, W] or [num_pages, 1, page_size, W] with
        W = 576, 656 or 584. Pages may have any stride, so a view of padded pages is allowed.
        "fp8_584" keeps the scales of a page after its rows. The shape [num_pages, page_bytes]
        requires `page_size`; bytes after the tokens are padding. ``docs/formats.md`` describes the
        bytes.
    slot_mapping : Tensor, shape [n], int32 or int64
        Slots of the first n tokens, n <= T. Token i goes to row ``slot % page_size`` of page
        ``slot // page_size``. A token with a negative slot, or with a slot past the last page, is
        skipped. No two tokens may share a slot.
    cache_format : {"bf16", "fp8", "fp8_656", "fp8_584"}
    scale_rule : {"pow2", "amax"}
        "amax" is supported for "fp8_656" only.
    scale : Tensor, shape [1], float32, optional
        Dequantisation multiplier, for "fp8" only.
    page_size : int, optional
        Tokens of a page; needed for a `cache` of two dimensions.

    Returns
    -------
    Tensor
        `cache` itself.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype, or "fp8" has no `scale`.
    ValueError
        If shapes, places or strides do not match, `scale_rule` does not belong to the format, or
        `cache` shares memory with another argument. Also if rows, pages or tokens do not start at
        multiples of 16 bytes on a GPU.
    NotImplementedError
        If `cache_format` is not supported.

    See Also
    --------
    mla_gather_cache : the inverse.
    fastattn.reference.mla_write_cache : the same in NumPy, bit by bit.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import mla_write_cache
    >>> cache = paddle.zeros([2, 64, 656], "uint8")
    >>> latent, rope = paddle.ones([1, 512], "bfloat16"), paddle.ones([1, 64], "bfloat16")
    >>> slots = paddle.to_tensor([65])
    >>> _ = mla_write_cache(latent, rope, cache, slots, cache_format="fp8_656")
    >>> cache.numpy()[1, 1, [0, 511, 514, 515, 528, 529]].tolist()
    [120, 120, 128, 59, 128, 63]
    """
    (result,) = _ops.call(
        "mla_write_cache",
        (latent, rope, cache, slot_mapping, scale),
        (cache_format, scale_rule, 0 if page_size is None else page_size),
    )
    return result


@unified
def mla_gather_cache(
    cache: Tensor,
    out: Tensor,
    block_tables: Tensor,
    seq_lens_decoder: Tensor,
    cu_seqlens_k: Tensor,
    *,
    cache_format: str,
    scale: Tensor | None = None,
    page_size: int | None = None,
) -> Tensor:
    r"""Dequantise the cached tokens of each sequence into contiguous rows, in place.

    .. math::
        \mathrm{out}[\mathrm{cu\_seqlens\_k}_b + i] = \mathrm{bf16}(c_{b,i} \cdot s_{b,i})

    c is the code and s the scale of position i of sequence b. The fp32 product is rounded to bf16.
    Channels that the cache has in bf16 are copied. A sequence gives at most
    ``cu_seqlens_k[b + 1] - cu_seqlens_k[b]`` tokens. All other tokens of `out` keep their contents,
    also tokens whose page is not assigned (an id outside ``[0, num_pages)``).

    Parameters
    ----------
    cache : Tensor
        As for :func:`mla_write_cache`. "fp8_528" has W = 528, and also keeps the scales of a page
        after its rows.
    out : Tensor, shape [N, 576] ("fp8_584", "fp8_528": [N, 512]), bfloat16
        Latent, then rotated channels. Written in place; any token stride.
    block_tables : Tensor, shape [B, max_blocks], int32
        Pages of each sequence.
    seq_lens_decoder : Tensor, shape [B], int32
        Number of cached tokens of each sequence.
    cu_seqlens_k : Tensor, shape [B + 1], int32
        Index of the first token of each sequence in `out`, ascending.
    cache_format : {"bf16", "fp8", "fp8_656", "fp8_584", "fp8_528"}
        "fp8_528" is the format of DeepSeek-V4.1: 512 e4m3 codes, including rotated channels, with a
        UE8M0 scale for each 32.
    scale : Tensor, shape [1], float32, optional
        For "fp8" only.
    page_size : int, optional
        Tokens of a page; needed for a `cache` of two dimensions.

    Returns
    -------
    Tensor
        `out` itself.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype, or "fp8" has no `scale`.
    ValueError
        If shapes, places or strides do not match, or `out` shares memory with another argument.
        Also if rows, pages or tokens do not start at multiples of 16 bytes on a GPU.
    NotImplementedError
        If `cache_format` is not supported.

    See Also
    --------
    mla_write_cache : the writer.
    fastattn.reference.mla_gather_cache : the same in NumPy, bit by bit.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import mla_gather_cache
    >>> cache = paddle.full([1, 64, 576], 0x40, "uint8")
    >>> blocks, cached, cu = (paddle.to_tensor(x, "int32") for x in ([[0]], [2], [0, 2]))
    >>> out = mla_gather_cache(cache, paddle.zeros([3, 576], "bfloat16"), blocks, cached, cu,
    ...                        cache_format="fp8", scale=paddle.to_tensor([0.5]))
    >>> out.astype("float32").numpy()[:, 0].tolist()
    [1.0, 1.0, 0.0]
    """
    (result,) = _ops.call(
        "mla_gather_cache",
        (cache, out, block_tables, seq_lens_decoder, cu_seqlens_k, scale),
        (cache_format, 0 if page_size is None else page_size),
    )
    return result
