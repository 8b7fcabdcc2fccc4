"""Dense attention over a paged latent cache (MLA)."""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import scale_of
from fastattn.functional._marker import unified


@unified
def mla_attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    cache_format: str,
    scale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    sinks: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    page_size: int | None = None,
    out_dtype: str = "bfloat16",
) -> Any:
    r"""Attention of a step's new tokens over a paged latent cache. All heads share the keys.

    The new tokens must be in the cache already. One call serves prefill, chunked prefill, decoding
    and inactive sequences in any order. :math:`k_j` holds the dequantised channels of key j; the
    first 512 are its value:

    .. math:: s_{ij} = \lambda q_i k_j, \qquad
              o_i = \frac{\sum_j e^{s_{ij}} k_j[:512]}{e^{\mathrm{sink}} + \sum_j e^{s_{ij}}}

    over the visible keys j. Masked keys never affect a result, even if they are NaN. A query that
    sees no key has an output of 0 and an LSE of -inf. A NaN in a query, or in a key that it sees,
    makes the output of this query NaN, and of no other query.

    Sequence b has ``n = min(seq_lens_this_time[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b])`` new
    tokens, which start at token ``cu_seqlens_q[b]`` of `q`. It has ``seq_lens_decoder[b] + n``
    keys. The key at position p is in row ``p % page_size`` of page
    ``block_tables[b, p // page_size]``. The key is masked if this block id is outside
    ``[0, num_pages)``.

    Parameters
    ----------
    q : Tensor, shape [T, H, 576] ("fp8_584", "fp8_528": [T, H, 512]), bfloat16
        Absorbed queries: latent channels, then rotated ones. H is 1 to 128. The last dimension must
        be contiguous. The others may have any strides (multiples of 16 bytes on a GPU).
    cache : Tensor
        As for :func:`mla_gather_cache`. It is never copied.
    block_tables : Tensor, shape [B, max_blocks], int32
        Page of each group of `page_size` tokens of a sequence. `block_tables` and
        `seq_lens_decoder` may have more than B rows, for slots of a server that do not run.
    cu_seqlens_q : Tensor, shape [B + 1], int32
        Index of the first token of each sequence in `q`.
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        Number of tokens cached before this step, and of new tokens (0 for an inactive sequence).
    max_seqlen_q, max_seqlen_k : int
        Upper bounds of the new tokens and of the keys of a sequence, as for
        :func:`paged_attention`. They mask nothing. `max_seqlen_k` is not used yet.
    cache_format : {"bf16", "fp8", "fp8_656", "fp8_584", "fp8_528"}
        As for :func:`mla_gather_cache`.
    scale : Tensor, shape [1], float32, optional
        Dequantisation multiplier, for "fp8" only.
    softmax_scale : float, optional
        :math:`\lambda`. Default: the query channels to the power of -0.5. Models pass the scale of
        the unabsorbed head, such as ``192 ** -0.5``.
    causal : bool
        Mask the keys after a query's position.
    sinks : Tensor, shape [H], float32, optional
        A logit for each head. It counts in the denominator, but has no value.
    return_softmax_lse : bool
        Also return the LSE, the logarithm of the sum of exponentials without the sink.
    out : Tensor, shape [T, H, 512], optional
        Its dtype is `out_dtype`. Written in place and returned. Tokens that belong to no sequence
        (padding) keep their contents in a given `out`, and are 0 in a new one.
    page_size : int, optional
        Tokens of a page; needed for a `cache` of two dimensions.
    out_dtype : {"bfloat16", "float32"}
        "float32" does not round the output, for a later merge with results over other keys.

    Returns
    -------
    out : Tensor, shape [T, H, 512]
    softmax_lse : Tensor, shape [H, T], float32
        Natural logarithm, -inf for tokens of no sequence. Only with `return_softmax_lse`.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype, or "fp8" has no `scale`.
    ValueError
        If shapes, places or strides do not match, an upper bound is negative, `softmax_scale` is
        not finite, or `out` shares memory with another argument.
    NotImplementedError
        If `cache_format` or the number of heads is not supported.

    See Also
    --------
    mla_write_cache : fills the cache.
    fastattn.reference.mla_attention : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import mla_attention
    >>> q, cache = paddle.zeros([1, 16, 576], "bfloat16"), paddle.ones([2, 64, 576], "bfloat16")
    >>> table, starts = paddle.to_tensor([[1]], "int32"), paddle.to_tensor([0, 1], "int32")
    >>> cached, new = paddle.to_tensor([9], "int32"), paddle.to_tensor([1], "int32")
    >>> out = mla_attention(q, cache, table, starts, cached, new, 1, 10, cache_format="bf16")
    >>> list(out.shape), float(out[0, 0, 0])
    ([1, 16, 512], 1.0)
    """
    result, lse, *_ = _ops.call(
        "mla_attention",
        (
            *(q, cache, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time),
            *(scale, sinks, out),
        ),
        (
            max_seqlen_q,
            max_seqlen_k,
            scale_of("mla_attention", softmax_scale),
            causal,
            return_softmax_lse,
            cache_format,
            0 if page_size is None else page_size,
            out_dtype,
        ),
    )
    return (result, lse) if return_softmax_lse else result
