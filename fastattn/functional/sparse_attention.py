"""Attention of chosen keys over a paged, quantised cache."""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import as_float, scale_of
from fastattn.functional._cache_types import operator_cache_type
from fastattn.functional._marker import unified


@unified
def sparse_paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    selected: Tensor,
    *,
    granularity: int,
    selected_lens: Tensor | None = None,
    window: int = 0,
    sink_tokens: int = 0,
    cache_k_scales: Tensor | None = None,
    cache_v_scales: Tensor | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    q_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    out_scale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "auto",
    k_rotation: str = "none",
    k_center: Tensor | None = None,
    k_feedback: Tensor | None = None,
) -> Any:
    r"""Attention of a step's new tokens over chosen keys of a layer's paged cache.

    Each query has a list of the keys that it sees, of all KV heads or of each. So top-k attention
    with an indexer, and attention of chosen blocks, read only what they chose. The caches, the
    steps and the formula are the same as in :func:`paged_attention`; prefill, chunks, decoding and
    drafts are the same call.

    The query at position p of its sequence sees the key at position j <= p if

    - an entry i of its list has ``i * granularity <= j < (i + 1) * granularity``, or
    - j is one of the last `window` keys, ``j > p - window``, or
    - j is one of the first `sink_tokens` keys, ``j < sink_tokens``.

    A key that several of these name counts once. Later keys are never seen: entries past the query
    see nothing, and the entry that contains it is cut. A query that sees no key has an output of 0
    and an LSE of -inf.

    Parameters
    ----------
    q : Tensor, shape [T, H, D], float32, float16, bfloat16, or uint8 / float8_e4m3fn (e4m3 codes)
        As in :func:`paged_attention`. float32 runs on the CPU only.
    key_cache : Tensor, shape [num_blocks, KV, 64, D]
    value_cache : Tensor, shape [num_blocks, KV, D, 64]
        The caches of :func:`paged_attention`, of every type and with any strides.
    block_tables : Tensor, shape [B, max_blocks], int32
    cu_seqlens_q : Tensor, shape [B + 1], int32
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
    max_seqlen_q, max_seqlen_k : int
        As in :func:`paged_attention`.
    selected : Tensor, shape [T, groups, width], int32
        Entries of each query's list, in any order. `groups` is 1, one list for all KV heads, or KV.
        An entry counts groups of `granularity` tokens from the start of the query's own sequence; a
        negative entry is a hole. The entries of a list must be distinct: keys of one that stands
        twice count twice. The last dimension must be contiguous.
    granularity : {1, 4, 16, 32, 64, 128}
        Tokens that an entry stands for.
    selected_lens : Tensor, shape [T, groups], int32, optional
        Entries of each list. Those from there on are not read. Default: `width`.
    window : int
        Last keys that a query sees in any case, its own included.
    sink_tokens : int
        First keys of a sequence that every query sees (attention-sink tokens, which have values;
        `sinks` are logits without).
    cache_k_scales, cache_v_scales : Tensor, float32, bfloat16 or uint8, optional
        Dequantisation multipliers, as in :func:`paged_attention`.
    cache_quant_type : str
        ``none``, ``cache_int8`` (or ``int8``), ``cache_fp8`` (or ``float8_e4m3fn``),
        ``block_wise_int8``, ``block_wise_fp8``, ``block_wise_int4``, ``block_wise_mxfp4``,
        ``block_wise_k8v4`` or ``block_wise_kfp8v4``.
    fp8_format : {"e4m3", "e5m2"}
        Format of the codes of ``cache_fp8``.
    q_descale : Tensor, shape [1], [B, KV] or [T, H], float32 or bfloat16, optional
        Dequantisation multipliers of e4m3 queries. Default: 1.
    softmax_scale : float, optional
        Default: ``D ** -0.5``.
    softcap : float
        Bound of the logits, ``cap * tanh(s / cap)``; 0 means none.
    sinks : Tensor, shape [H], float32 or bfloat16, optional
        A logit for each head. It counts in the denominator and in the LSE, but has no value.
    out_scale : Tensor, shape [1], float32, optional
        Return the output as e4m3 codes of ``out * (1 / out_scale)``.
    return_softmax_lse : bool
        Also return the LSE, the logarithm of the softmax's denominator.
    out : Tensor, shape [T, H, D] ([T, H, 128] where D is 192), optional
        Written in place and returned. Tokens that belong to no sequence (padding) keep their
        contents in a given `out`, and are 0 in a new one. It may not share memory with an input.
    out_dtype : {"auto", "float32", "float16", "bfloat16"}
        Dtype of the output, as in :func:`paged_attention`.
    k_rotation : {"none", "hadamard"}
    k_center : Tensor, shape [KV, D], float32, optional
        What was done to K before it was stored, as in :func:`paged_attention`.
    k_feedback : Tensor, optional
        Not read. It is here so that the writer and this call take the same ``arguments`` of
        :func:`make_cache`.

    Returns
    -------
    out : Tensor, shape [T, H, D]
        uint8 (e4m3 codes) if `out_scale` is given.
    softmax_lse : Tensor, shape [H, T], float32
        Natural logarithm, -inf for tokens of no sequence. Only with `return_softmax_lse`.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes or places do not match, scales are missing or superfluous, or an option is out of
        range.
    NotImplementedError
        If `cache_quant_type` or the head dimension is not supported, or another argument does not
        go with `k_rotation` or `k_center`. Supported head dimensions are 64, 96, 128, 192 and 256.

    Notes
    -----
    Nothing of a list is trusted: an entry past the sequence, or one whose block is not assigned,
    reads no memory. ``FASTATTN_CHECK=1`` refuses lists with an entry twice.

    A query's bits follow from the query, its list and the keys that it sees, in every batch and at
    every number of threads. Another order of the same entries may give other bits.

    See Also
    --------
    paged_attention : over all keys.
    mla_sparse_attention : the same of latent caches.
    paged_indexer_topk, topk_indices : choose keys.
    fastattn.reference.sparse_paged_attention : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import sparse_paged_attention, write_cache_kv
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> caches = [paddle.zeros([1, 1, 64, 64], "bfloat16") for _ in range(2)]
    >>> x = paddle.arange(8).astype("bfloat16").reshape([8, 1, 1]).expand([8, 1, 64])
    >>> tables, cu_seqlens = int32([[0]]), int32([0, 8])
    >>> _ = write_cache_kv(0 * x, x, *caches, tables, cu_seqlens, int32([0]), int32([8]))
    >>> decode = tables, int32([0, 1]), int32([7]), int32([1])
    >>> lists = int32([[[0, -1, 1]]])  # keys 0 to 3 and 4 to 7
    >>> q = paddle.ones([1, 1, 64], "bfloat16")
    >>> for choice in (lists, lists[:, :, :1]):
    ...     out = sparse_paged_attention(q, *caches, *decode, 1, 8, choice, granularity=4)
    ...     print(out[0, 0, 0].item())
    3.5
    1.5
    """
    inputs = (
        q,
        key_cache,
        value_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        selected,
        selected_lens,
        cache_k_scales,
        cache_v_scales,
        q_descale,
        sinks,
        out_scale,
        out,
        k_center,
    )
    attrs = (
        max_seqlen_q,
        max_seqlen_k,
        granularity,
        window,
        sink_tokens,
        scale_of("sparse_paged_attention", softmax_scale),
        as_float("sparse_paged_attention", "softcap", softcap),
        return_softmax_lse,
        out_dtype,
        operator_cache_type("sparse_paged_attention", cache_quant_type),
        fp8_format,
        k_rotation,
    )
    result, lse, *_ = _ops.call("sparse_paged_attention", inputs, attrs)
    return (result, lse) if return_softmax_lse else result
