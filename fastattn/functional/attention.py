"""Attention over contiguous keys and over a paged, quantised cache."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import as_float, scale_of
from fastattn.functional._cache_types import check_no_zero_points, operator_cache_type
from fastattn.functional._marker import unified


def as_window(op: str, window_size: tuple[int, int]) -> tuple[int, int]:
    """The two sides of a window. Raises TypeError if it is not a pair of ints."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"{op}: window_size: expected (left, right), got {window_size!r}")
    left, right = window_size
    if type(left) is not int or type(right) is not int:
        raise TypeError(f"{op}: window_size: expected two ints, got {window_size!r}")
    return left, right


@unified
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mask_offsets: Tensor | None = None,
    out_scale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "auto",
    kv_dtype: str = "auto",
    quantize_q: bool = False,
) -> Any:
    r"""Attention of ragged (variable-length) sequences over contiguous keys and values.

    Query i of a sequence with q queries and k keys has key position ``i + k - q``. Its output is

    .. math:: s_{ij} = \mathrm{cap} \tanh(\lambda q_i k_j / \mathrm{cap}), \qquad
              o_i = \frac{\sum_j e^{s_{ij}} v_j}{e^{\mathrm{sink}} + \sum_j e^{s_{ij}}}

    over the visible keys j, in fp32 by an online softmax [1]_. Masked keys and values never affect
    a result, even if they are NaN. A query that sees no key has an output of 0 and an LSE of -inf.
    A NaN in a query, or in a key or value that it sees, makes the output of this query NaN, and of
    no other query.

    Parameters
    ----------
    q : Tensor, shape [T, H, D], float32, float16, bfloat16, or uint8 / float8_e4m3fn (e4m3 codes)
        D is 64, 96, 128, 256, or 192 with values of 128 channels. The last dimension of `q`, `k`
        and `v` must be contiguous; the others may have any strides.
    k, v : Tensor, shape [sum k, KV, D]
        If D is 192, `v` has the shape [sum k, KV, 128]. Dtype of `q`, or 8-bit codes: uint8 (see
        `kv_dtype`), float8_e4m3fn, float8_e5m2, int8. KV divides H. Query head h reads KV head
        ``h // (H / KV)``.
    cu_seqlens_q, cu_seqlens_k : Tensor, shape [B + 1], int32
        Index of the first query and of the first key token of each sequence. The last entry is the
        end of the last sequence.
    max_seqlen_q, max_seqlen_k : int
        Upper bounds of the sequence lengths. They mask nothing.
    q_descale : Tensor, shape [1], [B, KV] or [T, H], float32 or bfloat16, optional
        Dequantisation multipliers of e4m3 queries (``q ~ code * q_descale``). Default: 1. If T = B
        and H = KV, the shape means [T, H]. Any strides.
    k_descale, v_descale : Tensor, shape [1], [KV] or [B, KV], float32 or bfloat16, optional
        Dequantisation multipliers of 8-bit keys and values. Default: 1. Any strides, also of
        expanded views.
    softmax_scale : float, optional
        :math:`\lambda`. Default: ``D ** -0.5``.
    causal : bool
        Mask the keys after a query's position.
    window_size : (int, int)
        Number of keys before and after a query's position that stay visible; -1 means unlimited. A
        window of 512 keys that counts the query's own is (511, -1).
    softcap : float
        Bound of the logits, ``cap * tanh(s / cap)``; 0 means none.
    sinks : Tensor, shape [H], float32 or bfloat16, optional
        A logit for each head. It counts in the denominator and in the LSE, but has no value.
    mask_offsets : Tensor, shape [T, 2], int32, optional
        Query t sees at most keys ``[start, end)`` of its sequence. The other masks apply as well.
    out_scale : Tensor, shape [1], float32, optional
        Return the output as e4m3 codes of ``out * (1 / out_scale)``.
    return_softmax_lse : bool
        Also return the LSE, the logarithm of the softmax's denominator.
    out : Tensor, shape [T, H, D] ([T, H, 128] where D is 192), optional
        Written in place and returned. Tokens that belong to no sequence (padding) keep their
        contents in a given `out`, and are 0 in a new one.
    out_dtype : {"auto", "float32", "float16", "bfloat16"}
        Dtype of the output. "auto" is the dtype of `q`; for e4m3 queries it is the dtype of `out`,
        or bfloat16 without `out`. Queries that are not e4m3 allow only their own dtype and float32
        (for partial results).
    kv_dtype : {"auto", "e4m3", "e5m2", "int8"}
        Format of the codes in uint8 keys and values; "auto" is e4m3.
    quantize_q : bool
        Quantise float16 or bfloat16 queries to e4m3 first, with a scale ``max(amax, 1e-6) / 448``
        for each token and head. Only for e4m3 keys and values. Long sequences then run on the FP8
        tensor cores of a Hopper GPU, with the rounding error of e4m3 queries (see
        docs/numerics.md). The output keeps the dtype of `q`.

    Returns
    -------
    out : Tensor, shape [T, H, D]
        uint8 (e4m3 codes) if `out_scale` is given.
    softmax_lse : Tensor, shape [H, T], float32
        Natural logarithm, -inf for tokens of no sequence. Only with `return_softmax_lse`.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes or does not match the others, or if a required
        argument is not a tensor.
    ValueError
        If shapes or places do not match, a descale is given for 16- or 32-bit values, or an option
        is out of range. Also if `quantize_q` is set for queries that do not have 16 bits, with
        `q_descale`, or for keys that are not e4m3.
    NotImplementedError
        If D is not 64, 96, 128, 192 or 256.

    See Also
    --------
    fastattn.reference.flash_attention : the same in NumPy.

    References
    ----------
    .. [1] Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
       https://arxiv.org/abs/2307.08691

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import flash_attention
    >>> x = paddle.ones([3, 1, 64])
    >>> cu_seqlens = paddle.to_tensor([0, 3], dtype="int32")  # one sequence of three tokens
    >>> out = flash_attention(0 * x, x, 2 * x, cu_seqlens, cu_seqlens, 3, 3, causal=True)
    >>> out[:, 0, 0].numpy().tolist()
    [2.0, 2.0, 2.0]
    """
    inputs = (
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        q_descale,
        k_descale,
        v_descale,
        sinks,
        mask_offsets,
        out_scale,
        out,
    )
    attrs = (
        max_seqlen_q,
        max_seqlen_k,
        scale_of("flash_attention", softmax_scale),
        causal,
        *as_window("flash_attention", window_size),
        as_float("flash_attention", "softcap", softcap),
        return_softmax_lse,
        out_dtype,
        kv_dtype,
        quantize_q,
    )
    result, lse, *_ = _ops.call("flash_attention", inputs, attrs)
    return (result, lse) if return_softmax_lse else result


def _as_bytes(mask: Any) -> Any:
    """A mask of integers of 32 or 64 bits as bool; others are left to the operator."""
    if mask is not None and getattr(mask, "dtype", None) in (paddle.int32, paddle.int64):
        return mask.astype("bool")
    return mask


@unified
def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    cache_k_scales: Tensor | None = None,
    cache_v_scales: Tensor | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    q_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mask_offsets: Tensor | None = None,
    out_scale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "auto",
    cache_k_zp: Tensor | None = None,
    cache_v_zp: Tensor | None = None,
    quantize_q: bool = False,
    batch_invariant: bool = False,
    split_invariant: bool = False,
    k_rotation: str = "none",
    k_center: Tensor | None = None,
    tree_mask: Tensor | None = None,
    head_windows: Tensor | None = None,
    k_feedback: Tensor | None = None,
) -> Any:
    r"""Attention of a step's new tokens over a layer's paged cache.

    The new tokens' K and V must be in the cache already. One call serves prefill, chunked prefill,
    decoding and inactive sequences in any order. The formula, the masks and the treatment of NaN
    are the same as in :func:`flash_attention`. Codes are dequantised as ``code * scale``.

    Sequence b has ``n = min(seq_lens_this_time[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b])`` new
    tokens, which start at token ``cu_seqlens_q[b]`` of `q`. It has ``seq_lens_decoder[b] + n``
    keys. The key at position p is in slot ``p % 64`` of block ``block_tables[b, p // 64]``. The key
    is masked if this block id is outside ``[0, num_blocks)``.

    Parameters
    ----------
    q : Tensor, shape [T, H, D], float32, float16, bfloat16, or uint8 / float8_e4m3fn (e4m3 codes)
        D is 64, 96, 128, 256, or 192 with values of 128 channels. For type ``"none"``, `q` must
        have the dtype of the caches. The last dimension must be contiguous; the others may have any
        strides.
    key_cache : Tensor, shape [num_blocks, KV, 64, D]
        uint8 (or the int8 / float8 dtype of the codes); bfloat16 or float16 for ``"none"``. KV
        divides H. The last dimension must be contiguous. The other dimensions may have any strides,
        as may `value_cache` and dynamic scales: a cache may be a transposed
        ``[num_blocks, 64, KV, D]`` or half of a pool that holds K and V. No cache is ever copied.
    value_cache : Tensor, shape [num_blocks, KV, D, 64]
        The 64 tokens of a channel are in the order of :func:`fastattn.reference.layout.token_slot`.
        Type ``"none"`` has the shape [num_blocks, KV, 64, D]. In both shapes, D is half of the head
        dimension for ``block_wise_int4`` and ``block_wise_mxfp4``: a byte holds two channels. For
        ``block_wise_k8v4`` and ``block_wise_kfp8v4`` that holds for V alone. V has 128 channels if
        K has 192, otherwise as many as K.
    block_tables : Tensor, shape [B, max_blocks] or [B, KV, max_blocks], int32
        Physical block of each group of 64 tokens of a sequence. `block_tables` and
        `seq_lens_decoder` may have more than B rows, for slots of a server that do not run. With
        three dimensions each KV head has blocks of its own: the key of head h at position p is in
        slot ``p % 64`` of head h of block ``block_tables[b, h, p // 64]``. Caches [num_blocks, 1,
        ...] of one head are then a pool whose blocks all KV heads share.
    cu_seqlens_q : Tensor, shape [B + 1], int32
        Index of the first token of each sequence in `q`.
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        Number of tokens cached before this step, and of new tokens (0 for an inactive sequence).
    max_seqlen_q, max_seqlen_k : int
        Upper bounds of the new tokens and of the keys of a sequence. They mask nothing.
    cache_k_scales, cache_v_scales : Tensor, float32, bfloat16 or uint8, optional
        Dequantisation multipliers. Static types: [1], [KV] or, for ``cache_int8``, [KV * D].
        Dynamic types: [num_blocks, KV, 64]; ``block_wise_mxfp4``: uint8 [num_blocks, KV, 64, D /
        32].
    cache_quant_type : str
        ``none``, ``cache_int8`` (or ``int8``), ``cache_fp8`` (or ``float8_e4m3fn``),
        ``block_wise_int8``, ``block_wise_fp8``, ``block_wise_int4``, ``block_wise_mxfp4``,
        ``block_wise_k8v4`` or ``block_wise_kfp8v4``.
    fp8_format : {"e4m3", "e5m2"}
        Format of the codes of ``cache_fp8``.
    q_descale : Tensor, shape [1], [B, KV] or [T, H], float32 or bfloat16, optional
        Dequantisation multipliers of e4m3 queries, as :func:`rope_write_cache_kv` returns them.
        Default: 1.
    softmax_scale : float, optional
        Default: ``D ** -0.5``.
    causal : bool
        Mask the keys after a query's position.
    window_size : (int, int)
        Number of keys before and after a query's position that stay visible; -1 means unlimited. A
        window of 512 keys that counts the query's own is (511, -1).
    softcap : float
        Bound of the logits, ``cap * tanh(s / cap)``; 0 means none.
    sinks : Tensor, shape [H], float32 or bfloat16, optional
        A logit for each head. It counts in the denominator and in the LSE, but has no value.
    mask_offsets : Tensor, shape [T, 2], int32, optional
        Query t sees at most keys ``[start, end)`` of its sequence. The other masks apply as well.
    out_scale : Tensor, shape [1], float32, optional
        Return the output as e4m3 codes of ``out * (1 / out_scale)``.
    return_softmax_lse : bool
        Also return the LSE, the logarithm of the softmax's denominator.
    out : Tensor, shape [T, H, D] ([T, H, 128] where D is 192), optional
        Written in place and returned. Tokens that belong to no sequence (padding) keep their
        contents in a given `out`, and are 0 in a new one.
    out_dtype : {"auto", "float32", "float16", "bfloat16"}
        Dtype of the output. "auto" is the dtype of `q`; for e4m3 queries it is the dtype of `out`,
        or bfloat16 without `out`. Queries that are not e4m3 allow only their own dtype and float32
        (for partial results).
    cache_k_zp, cache_v_zp : None
        Zero points. Every supported type is symmetric and takes none.
    quantize_q : bool
        Quantise float16 or bfloat16 queries to e4m3 first, with a scale ``max(amax, 1e-6) / 448``
        for each token and head. Only for e4m3 caches. Long sequences then run on the FP8 tensor
        cores of a Hopper GPU, with the rounding error of e4m3 queries (see docs/numerics.md). The
        output keeps the dtype of `q`.
    batch_invariant : bool
        A sequence's output and LSE have the same bits in every batch: alone or with others, in any
        order, with any sufficient `max_seqlen_q` and `max_seqlen_k`, in any slots and blocks,
        eagerly and in a CUDA graph. docs/numerics.md says what else they depend on, and what this
        costs. On the CPU this always holds.
    split_invariant : bool
        Also, a token's output and LSE have the same bits however its sequence was cut into steps:
        a whole prompt, chunks of any sizes, a cached prefix, single tokens and drafts. All lengths
        then run on one kernel, so long prompts take five to six times as long (docs/numerics.md).
        On the CPU this always holds.
    k_rotation : {"none", "hadamard"}
        Rotation of K at the time of writing. `q` is rotated alike, in fp32, and rounded to its
        dtype again. Use ``"none"`` if the writer has already rotated the queries (`q_rotation` of
        :func:`rope_write_cache_kv`); this saves a kernel. Not supported for e4m3 queries.
        The ``arguments`` of :func:`make_cache` give the writer and this call the same value.
    k_center : Tensor, shape [KV, D], float32, optional
        The constant that was subtracted from K before the cache write; rotated if `q` is already
        rotated. All scores of a query then lack the same number. The output needs no correction for
        this; the LSE and the sinks get one. So e4m3 queries are not supported with an LSE or sinks.
        `softcap`, and `sinks` together with `out`, are never supported.
    tree_mask : Tensor, shape [B, N, N], bool, uint8, int8, int32 or int64, optional
        A tree of drafts, or any other mask among the new tokens of a sequence: new token i sees new
        token j only if ``tree_mask[b, i, j]`` is not 0. Earlier keys are not concerned, nor are
        sequences with more than N new tokens. The other masks apply as well: with `causal` no token
        sees a later one, and `window_size` counts slots, not steps from the root. A bool or 8-bit
        mask is read as it is; others are converted first. The first dimension may have more than B
        entries.
    head_windows : Tensor, shape [KV, 2], int32, optional
        A pair (left, first) for each KV head, on top of the other masks. Its queries see the last
        `left` keys before their position, and the first `first` keys of the sequence. A negative
        `left` is unlimited. Blocks that no query sees then need no entry in a table of three
        dimensions: -1 frees them.
    k_feedback : Tensor, optional
        Not read: it changes only how the writer rounds K. It is here so that the writer and this
        call take the same ``arguments`` of :func:`make_cache`.

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
        If shapes or places do not match, scales are missing or superfluous, a zero point is given,
        or an option is out of range. Also if `quantize_q` is set for queries that do not have 16
        bits, with `q_descale`, or for a cache that is not e4m3.
    NotImplementedError
        If `cache_quant_type` or the head dimension is not supported, or another argument does not
        go with `k_rotation` or `k_center`. Supported head dimensions are 64, 96, 128, 192 and 256.
        Also for `batch_invariant` or `split_invariant` with `tree_mask`, `head_windows`, or a table
        for each KV head.

    Notes
    -----
    On the CPU the softmax weights stay in fp32. A query's bits follow from the keys that it sees,
    whatever the number of threads and however its sequence was cut into steps (docs/numerics.md).

    On a GPU calls with `tree_mask`, `head_windows` or a table for each KV head run on the kernel
    that every GPU has, whatever their lengths. A block that is not assigned costs no traffic; the
    plan of the work counts its keys all the same.

    See Also
    --------
    write_cache_kv, rope_write_cache_kv : fill the cache.
    attention_step : fill it and attend in one call.
    fastattn.reference.paged_attention : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import paged_attention, write_cache_kv
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> caches = [paddle.zeros([1, 1, 64, 64], "bfloat16") for _ in range(2)]
    >>> seqs = int32([[0]]), int32([0, 2]), int32([0]), int32([2])  # one of two new tokens
    >>> x = paddle.ones([2, 1, 64], "bfloat16")
    >>> _ = write_cache_kv(x, 3 * x, *caches, *seqs)
    >>> paged_attention(x, *caches, *seqs, 2, 2)[:, 0, 0].cast("float32").numpy().tolist()
    [3.0, 3.0]
    """
    if cache_k_zp is not None or cache_v_zp is not None:
        check_no_zero_points(
            "paged_attention", cache_quant_type, cache_k_zp=cache_k_zp, cache_v_zp=cache_v_zp
        )
    inputs = (
        q,
        key_cache,
        value_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        cache_k_scales,
        cache_v_scales,
        q_descale,
        sinks,
        mask_offsets,
        out_scale,
        out,
        k_center,
        _as_bytes(tree_mask),
        head_windows,
    )
    attrs = (
        max_seqlen_q,
        max_seqlen_k,
        scale_of("paged_attention", softmax_scale),
        causal,
        *as_window("paged_attention", window_size),
        as_float("paged_attention", "softcap", softcap),
        return_softmax_lse,
        out_dtype,
        operator_cache_type("paged_attention", cache_quant_type),
        fp8_format,
        quantize_q,
        batch_invariant,
        k_rotation,
        split_invariant,
    )
    result, lse, *_ = _ops.call("paged_attention", inputs, attrs)
    return (result, lse) if return_softmax_lse else result
