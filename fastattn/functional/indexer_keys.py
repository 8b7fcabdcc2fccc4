"""Index keys of DeepSeek-V3.2 and GLM-DSA: quantise them into a paged cache, and gather them."""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified

_QUANTS = ("fp8", "mxfp4")


def _page_size(op: str, cache: Any, page_size: int | None) -> int:
    """Tokens of a page: the given number, or the second dimension of a cache of three or more."""
    if page_size is not None:
        if type(page_size) is not int:
            raise TypeError(f"{op}: page_size: expected int, got {type(page_size).__name__}")
        return page_size
    if not _ops.is_tensor(cache):
        return 1  # the operator raises an error for the cache
    shape = cache.shape
    if len(shape) < 3:
        raise ValueError(
            f"{op}: page_size: a cache of shape {list(shape)} does not tell it, got None"
        )
    if not isinstance(shape[1], int) or shape[1] < 0:  # in a traced program
        raise ValueError(f"{op}: page_size: the program does not know it; give it, got None")
    return int(shape[1])


@unified
def indexer_k_write_cache(
    key: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    *,
    quant: str = "fp8",
    scale_rule: str = "pow2",
    page_size: int | None = None,
) -> Tensor:
    r"""Quantise index keys and write them into a paged cache, in place.

    A page holds the codes of its tokens, then their scales (``docs/formats.md`` describes the
    bytes). A key is quantised as it is: the caller applies norm, rotation and rounding before.

    .. math::
        \text{pow2:}\quad & s = 2^{\lceil\log_2(\max(\mathrm{amax}, 10^{-4}) / 448)\rceil} \\
        \text{amax, amax\_div:}\quad & s = \max(\mathrm{amax}, 10^{-4}) / 448 \\
        \text{pow2, amax:}\quad & \mathrm{codes} = \mathrm{e4m3}(x \cdot (1 / s)) \\
        \text{amax\_div:}\quad & \mathrm{codes} = \mathrm{e4m3}(x / s)

    "mxfp4" has E2M1 codes with one UE8M0 exponent per 32 channels.

    Parameters
    ----------
    key : Tensor, shape [T, 128], bfloat16, float16 or float32
        The last dimension must be contiguous; tokens may have any stride.
    cache : Tensor, shape [num_pages, page_bytes], uint8
        Written in place. Further dimensions are allowed (for example [num_pages, 64, 132] or
        [num_pages, 64, 1, 132]). Pages hold at least 132 bytes ("fp8") or 68 ("mxfp4") per token.
        They may have any larger stride, and bytes after the scales are never written.
    slot_mapping : Tensor, shape [S], int64 or int32
        Slots of the first S keys, S <= T; further keys are not written. A slot is row
        ``slot % page_size`` of page ``slot // page_size``. A key with a negative slot, or with a
        slot past the last page, is skipped.
    quant : {"fp8", "mxfp4"}
    scale_rule : {"pow2", "amax", "amax_div"}
        Scale of "fp8". "pow2" is ``scale_fmt="ue8m0"`` of FastDeploy and vLLM; "amax_div" gives
        their float32 scales.
    page_size : int, optional
        Tokens of a page. Default: the second dimension of a cache that has at least three.

    Returns
    -------
    Tensor
        `cache` itself.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype.
    ValueError
        If shapes do not match, pages are too small, or a name is unknown.

    See Also
    --------
    fastattn.reference.indexer_k_write_cache : the same in NumPy, bit by bit.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import indexer_k_write_cache
    >>> cache = paddle.zeros([1, 64, 132], "uint8")
    >>> key = paddle.ones([1, 128], "bfloat16")
    >>> _ = indexer_k_write_cache(key, cache, paddle.to_tensor([3]))
    >>> cache.reshape([-1]).numpy()[[383, 384, 511, 512]].tolist()
    [0, 120, 120, 0]
    """
    op = "indexer_k_write_cache"
    (result,) = _ops.call(
        op, (key, cache, slot_mapping), (_page_size(op, cache, page_size), quant, scale_rule)
    )
    return result


@unified
def indexer_k_gather(
    cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_k: Tensor,
    num_tokens: int,
    *,
    quant: str = "fp8",
    page_size: int | None = None,
    out: Tensor | None = None,
    out_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the index keys of sequences from a paged cache, byte for byte.

    Token j of sequence b goes to row ``cu_seqlens_k[b] + j``. These are all keys of the sequence,
    including a cached prefix, if `cu_seqlens_k` counts them.

    Parameters
    ----------
    cache : Tensor, shape [num_pages, page_bytes], uint8
        As for :func:`indexer_k_write_cache`.
    block_tables : Tensor, shape [>= B, max_blocks], int32
        Pages of each sequence.
    cu_seqlens_k : Tensor, shape [B + 1], int32
        First row of each sequence, ascending.
    num_tokens : int
        Number N of rows of the results. It may exceed ``cu_seqlens_k[B]``, as in a CUDA graph. A
        sequence that reaches past it is cut.
    quant : {"fp8", "mxfp4"}
    page_size : int, optional
        Tokens of a page. Default: the second dimension of a cache that has at least three.
    out : Tensor, shape [N, 128] or [N, 64], uint8, contiguous, optional
        Codes, written in place and returned. Requires `out_scales`.
    out_scales : Tensor, shape [N], contiguous, optional
        float32, int32 or uint8, written in place and returned. Any shape of at least 4 N bytes is
        allowed; row i has bytes 4 i .. 4 i + 3.

    Returns
    -------
    codes : Tensor, uint8
        e4m3 codes [N, 128], or pairs of E2M1 codes [N, 64]. The even channel is in the low nibble.
    scales : Tensor, shape [N]
        "fp8": float32. "mxfp4": int32, whose byte b (little endian) is the UE8M0 exponent of
        channels 32b .. 32b + 31. Rows of no sequence, and rows of a token without a page (an id
        outside [0, num_pages), or past `max_blocks`), keep the contents of `out` and `out_scales`.
        In new tensors their contents are undefined.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype.
    ValueError
        If shapes do not match, pages are too small, or a result shares memory with an input.

    See Also
    --------
    fastattn.reference.indexer_k_gather : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import indexer_k_gather, indexer_k_write_cache
    >>> cache = paddle.zeros([2, 64, 132], "uint8")
    >>> keys = paddle.full([2, 128], 2.0, "bfloat16")
    >>> _ = indexer_k_write_cache(keys, cache, paddle.to_tensor([64, 65]))
    >>> codes, scales = indexer_k_gather(
    ...     cache, paddle.to_tensor([[1]], "int32"), paddle.to_tensor([0, 2], "int32"), 2
    ... )
    >>> codes[:, 0].tolist(), scales.tolist()
    ([120, 120], [0.0078125, 0.0078125])
    """
    op = "indexer_k_gather"
    # A traced program needs these checks before the operator runs, because they determine the
    # shapes of the results.
    if type(num_tokens) is not int:
        raise TypeError(f"{op}: num_tokens: expected int, got {type(num_tokens).__name__}")
    if num_tokens < 0:
        raise ValueError(f"{op}: num_tokens: expected at least 0, got {num_tokens}")
    if quant not in _QUANTS:
        raise ValueError(f"{op}: quant: expected fp8 or mxfp4, got {quant!r}")
    results = _ops.call(
        op,
        (cache, block_tables, cu_seqlens_k, out, out_scales),
        (num_tokens, _page_size(op, cache, page_size), quant),
    )
    return results[0], results[1]
