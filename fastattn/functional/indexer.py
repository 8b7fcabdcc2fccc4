"""DeepSeek-V4 indexer: quantised queries, compressed keys and their partial states."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import as_float
from fastattn.functional._marker import unified


@unified
def indexer_q_rope_quant(
    positions: Tensor,
    q: Tensor,
    cos_sin_cache: Tensor,
    weights: Tensor,
    softmax_scale: float,
    head_scale: float,
    *,
    quant: str = "fp8",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Rotate, round to bf16 and quantise the indexer's queries; fold constants into the weights.

    The last 64 channels are rotated in fp32, in interleaved pairs (GPT-J style):
    :math:`e' = e\,c - o\,s,\ o' = o\,c + e\,s`. The whole head is rounded to bf16. Then

    .. math::
        \text{fp8:}\quad & s = 2^{\lceil\log_2(\max(\mathrm{amax}, 10^{-4}) / 448)\rceil},\quad
        \mathrm{codes} = \mathrm{e4m3}(x / s),\quad
        w' = w \cdot s \cdot \mathrm{softmax\_scale} \cdot \mathrm{head\_scale} \\
        \text{mxfp4:}\quad & \text{E2M1 with one UE8M0 exponent per 32 channels},\quad
        w' = w \cdot \mathrm{softmax\_scale} \cdot \mathrm{head\_scale}

    Products are rounded to fp32, from left to right.

    Parameters
    ----------
    positions : Tensor, shape [T], int32 or int64
        Clamped to ``[0, max_positions)``.
    q : Tensor, shape [T, H, 128], bfloat16
        The last dimension must be contiguous.
    cos_sin_cache : Tensor, shape [max_positions, 64], float32 or bfloat16
        32 cosines, then 32 sines.
    weights : Tensor, shape [T, H], float32 or bfloat16
        Weight w of each head in the indexer's score.
    softmax_scale, head_scale : float
        Constants to fold into the weights.
    quant : {"fp8", "mxfp4"}
        Format of the codes.

    Returns
    -------
    codes : Tensor, uint8
        e4m3 codes [T, H, 128], or pairs of E2M1 codes [T, H, 64]. The even channel is in the low
        nibble.
    scales : Tensor, shape [T, H]
        "fp8": float32 dequantisation multipliers. `weights_out` already includes them, so they are
        only needed to dequantise the queries. "mxfp4": int32, whose byte b (little endian) is the
        UE8M0 exponent of channels 32b .. 32b + 31.
    weights_out : Tensor, shape [T, H], float32
        The weights w' of the formula.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype.
    ValueError
        If a shape is wrong, `cos_sin_cache` is empty, or `quant` is unknown.

    See Also
    --------
    fastattn.reference.indexer_q_rope_quant : the same in NumPy, bit by bit.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import indexer_q_rope_quant
    >>> codes, scales, weights = indexer_q_rope_quant(
    ...     paddle.to_tensor([0]),
    ...     paddle.ones([1, 2, 128], "bfloat16"),
    ...     paddle.concat([paddle.ones([4, 32]), paddle.zeros([4, 32])], axis=1),
    ...     paddle.ones([1, 2]),
    ...     0.5,
    ...     0.25,
    ... )
    >>> list(codes.shape), scales.numpy().tolist(), weights.numpy().tolist()
    ([1, 2, 128], [[0.00390625, 0.00390625]], [[0.00048828125, 0.00048828125]])
    """
    # A traced program needs both checks before the operator runs.
    if quant not in ("fp8", "mxfp4"):
        raise ValueError(f"indexer_q_rope_quant: quant: expected fp8 or mxfp4, got {quant!r}")
    if _ops.is_tensor(q) and len(q.shape) != 3:
        raise ValueError(
            f"indexer_q_rope_quant: q: expected shape [?, ?, 128], got {list(q.shape)}"
        )
    codes, scales, weights_out = _ops.call(
        "indexer_q_rope_quant",
        (positions, q, cos_sin_cache, weights),
        (
            as_float("indexer_q_rope_quant", "softmax_scale", softmax_scale),
            as_float("indexer_q_rope_quant", "head_scale", head_scale),
            quant,
        ),
    )
    return codes, scales, weights_out


@unified
def indexer_q_quant(
    q: Tensor,
    weights: Tensor,
    factor: float = 1.0,
    *,
    token_of_query: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Quantise rotated queries of an indexer and fold their scales into the weights.

    For each token and head,

    .. math::
        s = \max(\mathrm{amax}, 10^{-10}) / 448,\quad
        \mathrm{codes} = \mathrm{e4m3}(q \cdot (1 / s)),\quad
        w' = w \cdot (s \cdot \mathrm{factor})

    in fp32, with each operation rounded. With `token_of_query` the results are in the order of the
    rows of a paged top-k, where a row holds several queries of a sequence.

    Parameters
    ----------
    q : Tensor, shape [T, H, 128], bfloat16
        Rotated queries. The last dimension must be contiguous.
    weights : Tensor, shape [T, H], float32 or bfloat16
        Weight w of each head in the indexer's score.
    factor : float
        A factor of all weights: the softmax scale and any other constant of the model.
    token_of_query : Tensor, shape [N], int32, optional
        Token of each result. An id outside [0, T) means no token: its codes and weights are 0.
        Default: all tokens in order.

    Returns
    -------
    codes : Tensor, shape [N, H, 128], uint8
        e4m3 codes.
    weights_out : Tensor, shape [N, H], float32
        The weights w' of the formula.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype.
    ValueError
        If a shape is wrong.

    See Also
    --------
    fastattn.reference.indexer_q_quant : the same in NumPy, bit by bit.
    indexer_q_rope_quant : rotates as well, with scales that are powers of two.
    query_rows : makes `token_of_query`.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import indexer_q_quant
    >>> q, weights = paddle.ones([1, 2, 128], "bfloat16"), paddle.full([1, 2], 448.0)
    >>> codes, folded = indexer_q_quant(q, weights, 0.5)
    >>> int(codes[0, 0, 0]), folded.tolist()  # 0x7E is 448
    (126, [[0.5, 0.5]])
    """
    codes, weights_out = _ops.call(
        "indexer_q_quant",
        (q, weights, token_of_query),
        (as_float("indexer_q_quant", "factor", factor),),
    )
    return codes, weights_out


@unified
def indexer_kv_compress_insert(
    state_cache: Tensor,
    block_tables: Tensor,
    batch_id_per_token: Tensor,
    positions: Tensor,
    state_slots: Tensor,
    kv_slots: Tensor,
    rms_norm_weight: Tensor,
    cos_sin_cache: Tensor,
    kv_cache: Tensor,
    *,
    compress_ratio: int,
    page_size: int,
    rms_norm_eps: float = 1e-6,
    quant: str = "fp8",
) -> Tensor:
    r"""Compress each completed group of tokens into one key and insert it, quantised, into a page.

    A token whose position completes a group of `compress_ratio` positions writes one compressed key
    into a page, in these steps:

    1. Gather the states of positions ``position - n + 1 .. position``. n is ``2 * compress_ratio``
       for ratio 4 (groups overlap) and ``compress_ratio`` for 128. Positions below 0 are left out.
    2. Compute :math:`x_d = \sum_j \mathrm{softmax}_j(\mathrm{score}_{jd})\,\mathrm{kv}_{jd}`, with
       a softmax per channel (0 if all scores are -inf).
    3. Normalise: :math:`x \cdot (1 / \sqrt{\mathrm{mean}(x^2) + \epsilon}) \cdot w`.
    4. Rotate the last 64 channels at the group's first position, as in
       :func:`indexer_q_rope_quant`.
    5. Round to bf16, quantise, insert.

    All arithmetic is fp32 in a fixed order, so the bytes are the same on every device.

    Parameters
    ----------
    state_cache : Tensor, shape [num_blocks, state_block, 2 * SW], float32 or bfloat16
        SW values of a position, then its SW scores (with the position embedding added). SW is HEAD,
        or 2 * HEAD for ratio 4: such a group reads its older half from the first HEAD channels and
        its newer half from the second.
    block_tables : Tensor, shape [B, max_blocks], int32
        State blocks of each sequence. Position p is entry ``p % state_block`` of block
        ``block_tables[b, p // state_block]``.
    batch_id_per_token : Tensor, shape [T], int32
        Sequence of each token. An id outside [0, B) marks padding.
    positions : Tensor, shape [T], int32 or int64
        Position of each token in its sequence.
    state_slots : Tensor, shape [T], int32 or int64
        Slot of the token's own state. A token with a negative slot is skipped. Only the sign is
        used.
    kv_slots : Tensor, shape [T], int32 or int64
        Slot to write: entry ``kv_slot % page_size`` of page ``kv_slot // page_size``. A token with
        a negative slot, or with a slot past the last page, is skipped.
    rms_norm_weight : Tensor, shape [HEAD], float32 or bfloat16
    cos_sin_cache : Tensor, shape [max_positions, 64], float32 or bfloat16
        32 cosines, then 32 sines. Positions are clamped to ``[0, max_positions)``.
    kv_cache : Tensor, shape [num_pages, page_bytes], uint8
        Written in place. Further dimensions are allowed (for example [num_pages, page_size, 132]).
        page_bytes is the product of all but the first. It is a multiple of 4 and holds `page_size`
        tokens. ``docs/formats.md`` describes the bytes.
    compress_ratio : {4, 128}
    page_size : int
        Number of compressed keys of a page.
    rms_norm_eps : float
    quant : {"fp8", "mxfp4", "fp8_512"}
        "fp8": HEAD 128, 132 bytes per key. "mxfp4": HEAD 128, 68 bytes. "fp8_512": HEAD 512, 584
        bytes, with the 64 rotated channels in bf16.

    Returns
    -------
    Tensor
        `kv_cache` itself. A token writes nothing if one of its state blocks is not assigned (an id
        outside [0, num_blocks), or a position past `max_blocks`).

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype.
    ValueError
        If shapes do not match, the pages are too small, or `quant` is unknown.
    NotImplementedError
        If `compress_ratio` is not supported.

    See Also
    --------
    fastattn.reference.indexer_kv_compress_insert : the same in NumPy, bit by bit.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import indexer_kv_compress_insert
    >>> pages = paddle.zeros([1, 132 * 16], "uint8")
    >>> zeros = paddle.zeros([4], "int32")
    >>> _ = indexer_kv_compress_insert(
    ...     paddle.ones([1, 4, 512]),
    ...     paddle.zeros([1, 1], "int32"),
    ...     zeros,
    ...     paddle.arange(4),
    ...     paddle.arange(4),
    ...     zeros,
    ...     paddle.ones([128]),
    ...     paddle.concat([paddle.ones([4, 32]), paddle.zeros([4, 32])], axis=1),
    ...     pages,
    ...     compress_ratio=4,
    ...     page_size=16,
    ... )
    >>> pages.numpy()[0, [0, 127, 128]].tolist()
    [120, 120, 0]
    """
    (result,) = _ops.call(
        "indexer_kv_compress_insert",
        (
            state_cache,
            block_tables,
            batch_id_per_token,
            positions,
            state_slots,
            kv_slots,
            rms_norm_weight,
            cos_sin_cache,
            kv_cache,
        ),
        (
            compress_ratio,
            page_size,
            as_float("indexer_kv_compress_insert", "rms_norm_eps", rms_norm_eps),
            quant,
        ),
    )
    return result


@unified
def save_partial_states(
    kv_score: Tensor,
    ape: Tensor,
    positions: Tensor,
    state_cache: Tensor,
    state_slots: Tensor,
) -> Tensor:
    r"""Store the partial states of new tokens for :func:`indexer_kv_compress_insert`.

    .. math::
        \mathrm{state}[\mathrm{slot}_i] =
        (\mathrm{kv}_i,\ \mathrm{score}_i + \mathrm{ape}[\mathrm{position}_i \bmod \mathrm{ratio}])

    Values are copied. A score and its bias are summed in fp32 and rounded to the dtype of the
    state. Every token is stored, whether or not its position completes a group, because the group
    of a later step may need it. The compression is a separate call, because a token's group
    includes rows that this call writes.

    Parameters
    ----------
    kv_score : Tensor, shape [T, 2 * SW], float32 or bfloat16
        SW values, then SW scores of each token. Any token stride.
    ape : Tensor, shape [ratio, SW], float32 or bfloat16
        Bias of each position in a group; `ratio` is the compression ratio. SW is a multiple of 8:
        HEAD, or 2 * HEAD for ratio 4.
    positions : Tensor, shape [T], int32 or int64
        A token with a negative position is skipped.
    state_cache : Tensor, shape [num_blocks, state_block, 2 * SW], float32 or bfloat16
        Written in place. Blocks and rows may have any stride.
    state_slots : Tensor, shape [n], int32 or int64
        n <= T. Token i goes to row ``slot % state_block`` of block ``slot // state_block``. A token
        with a negative slot, or with a slot past the last block, is skipped. No two tokens may
        share a slot.

    Returns
    -------
    Tensor
        `state_cache` itself.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype.
    ValueError
        If shapes or places do not match, `ape` is empty, or `state_cache` shares memory with
        another argument. Also if tokens, blocks or rows do not start at multiples of 16 bytes on a
        GPU.

    See Also
    --------
    indexer_kv_compress_insert : the compression of a group that is complete.
    fastattn.reference.save_partial_states : the same in NumPy, bit by bit.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import save_partial_states
    >>> state, ape = paddle.zeros([2, 4, 16]), paddle.full([4, 8], 0.5)
    >>> _ = save_partial_states(
    ...     paddle.arange(32, dtype="float32").reshape([2, 16]),
    ...     ape,
    ...     paddle.to_tensor([4, 5]),
    ...     state,
    ...     paddle.to_tensor([5, -1]),
    ... )
    >>> state.numpy()[1, 1, [0, 7, 8, 15]].tolist(), float(state.sum())
    ([0.0, 7.0, 8.5, 15.5], 124.0)
    """
    (result,) = _ops.call(
        "save_partial_states", (kv_score, ape, positions, state_cache, state_slots)
    )
    return result
