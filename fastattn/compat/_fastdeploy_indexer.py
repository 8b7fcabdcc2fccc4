"""FastDeploy's operators of DeepSeek's indexer, for :mod:`fastattn.compat.fastdeploy`."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn._foreign import not_a_tensor
from fastattn.functional._marker import unified
from fastattn.functional.indexer_keys import indexer_k_gather, indexer_k_write_cache

#: Number of channels that share a scale: a whole key.
_QUANT_BLOCK = 128


def _check_pages(op: str, kv_cache: Tensor) -> None:
    if _ops.is_tensor(kv_cache) and len(kv_cache.shape) != 3:
        raise ValueError(
            f"{op}: kv_cache: expected shape [num_blocks, block_size, 132], got "
            f"{list(kv_cache.shape)}"
        )


@unified
def indexer_k_quant_and_cache(
    k: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    quant_block_size: int,
    scale_fmt: str | None,
) -> Tensor:
    """Quantise index keys to e4m3 and write them into a paged cache, in place.

    This is :func:`fastattn.functional.indexer_k_write_cache` under FastDeploy's name. Differences
    from FastDeploy's operator: there may be fewer slots than keys. A slot past the last block is
    skipped. Blocks may have any stride. A NaN gives a NaN scale. Powers of two are computed from
    the bits of a number.

    Parameters
    ----------
    k : Tensor, shape [T, 128], bfloat16, float16 or float32
    kv_cache : Tensor, shape [num_blocks, block_size, 132], uint8
        A block holds the codes of its tokens, then their float32 scales. Written in place.
    slot_mapping : Tensor, shape [S], int64 or int32
        Slots of the first S keys, S <= T. A key with a negative slot is skipped.
    quant_block_size : int
        Must be 128.
    scale_fmt : {"ue8m0", "", None}
        "ue8m0": scales are powers of two. Otherwise scales are ``max(amax, 1e-4) / 448``, and codes
        are ``e4m3(x / scale)``.

    Returns
    -------
    Tensor
        `kv_cache`.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or an argument is not a tensor.
    ValueError
        If shapes do not match, or `scale_fmt` is unknown.
    NotImplementedError
        If `quant_block_size` is not 128.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.fastdeploy import indexer_k_quant_and_cache
    >>> cache = paddle.zeros([1, 64, 132], "uint8")
    >>> slots = paddle.to_tensor([1, -1])
    >>> _ = indexer_k_quant_and_cache(paddle.ones([2, 128]), cache, slots, 128, "ue8m0")
    >>> cache.reshape([-1]).numpy()[[127, 128, 255, 256]].tolist()
    [0, 120, 120, 0]
    """
    op = "indexer_k_quant_and_cache"
    if quant_block_size != _QUANT_BLOCK:
        raise NotImplementedError(
            f"{op}: quant_block_size: expected {_QUANT_BLOCK}, got {quant_block_size}"
        )
    if scale_fmt not in ("ue8m0", "", None):
        raise ValueError(f"{op}: scale_fmt: expected 'ue8m0', '' or None, got {scale_fmt!r}")
    _check_pages(op, kv_cache)
    rule = "pow2" if scale_fmt == "ue8m0" else "amax_div"
    return indexer_k_write_cache(k, kv_cache, slot_mapping, scale_rule=rule)


@unified
def cp_gather_indexer_k_quant_cache(
    kv_cache: Tensor,
    dst_k: Tensor,
    dst_scale: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gather the index keys of sequences from a paged cache, in place.

    Token j of sequence b goes to row ``cu_seq_lens[b] + j`` of `dst_k` and `dst_scale`. This is
    :func:`fastattn.functional.indexer_k_gather` under FastDeploy's name. Differences from
    FastDeploy's operator: rows of no sequence and rows of tokens without a block keep their
    contents. The table may have more rows than there are sequences.

    Parameters
    ----------
    kv_cache : Tensor, shape [num_blocks, block_size, 132], uint8
    dst_k : Tensor, shape [N, 128], uint8
        e4m3 codes, written in place.
    dst_scale : Tensor, shape [N, 4], uint8 or float32
        Written in place. The scale of row i is the i-th float32 of the tensor's bytes. So
        FastDeploy's float32 [N, 4] has its N scales at the front. float32 [N] is accepted too.
    block_table : Tensor, shape [>= B, max_blocks], int32
    cu_seq_lens : Tensor, shape [B + 1], int32

    Returns
    -------
    dst_k, dst_scale : Tensor

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or an argument is not a tensor.
    ValueError
        If shapes do not match, or a result shares memory with an input.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.fastdeploy import (
    ...     cp_gather_indexer_k_quant_cache, indexer_k_quant_and_cache
    ... )
    >>> cache = paddle.zeros([2, 64, 132], "uint8")
    >>> _ = indexer_k_quant_and_cache(
    ...     paddle.full([1, 128], 2.0), cache, paddle.to_tensor([64]), 128, "ue8m0"
    ... )
    >>> codes, scales = paddle.zeros([1, 128], "uint8"), paddle.zeros([1, 4], "float32")
    >>> table, cu_seq_lens = paddle.to_tensor([[1]], "int32"), paddle.to_tensor([0, 1], "int32")
    >>> _ = cp_gather_indexer_k_quant_cache(cache, codes, scales, table, cu_seq_lens)
    >>> int(codes[0, 0]), scales.tolist()
    (120, [[0.0078125, 0.0, 0.0, 0.0]])
    """
    op = "cp_gather_indexer_k_quant_cache"
    _check_pages(op, kv_cache)
    for name, tensor in (("dst_k", dst_k), ("dst_scale", dst_scale)):
        if not _ops.is_tensor(tensor):
            raise not_a_tensor(op, name, tensor)
    if len(dst_k.shape) != 2:
        raise ValueError(f"{op}: dst_k: expected shape [N, 128], got {list(dst_k.shape)}")
    rows = int(dst_k.shape[0])
    if rows == 0:
        return dst_k, dst_scale
    if rows < 0:
        raise NotImplementedError(f"{op}: dst_k: a program has to know its number of rows")
    return indexer_k_gather(
        kv_cache, block_table, cu_seq_lens, rows, out=dst_k, out_scales=dst_scale
    )


@unified
def radix_topk_ragged_transform(
    input: Tensor,
    output: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    seq_len_decoder: Tensor | None,
    batch_id_per_token: Tensor | None,
    block_tables: Tensor | None,
    buffer: Tensor | None,
    max_block_num: int,
    top_k: int,
    q_num_heads: int = 0,
    *,
    block_size: int = 64,
) -> Tensor:
    """Select the k largest logits of each row, as indices of keys or as slots of a cache, in place.

    Without `seq_len_decoder` (prefill) row i has ``lengths[i // q_num_heads]`` columns.
    ``offsets[i]`` is added to its indices, which go to row i of `output` in ascending order,
    followed by -1.

    With `seq_len_decoder` (decode) row i belongs to slot ``s = i // q_num_heads`` of the batch and
    has ``seq_len_decoder[s]`` columns. Its indices go to the row of the slot's only token. This is
    the first token that `batch_id_per_token` assigns to slot s, or token ``offsets[s]`` without it.
    With `block_tables` they become slots of the cache; otherwise ``offsets[i]`` is added. A slot
    with length 0 or without a token leaves `output` unchanged.

    Differences from FastDeploy's operator: it selects exactly the k largest logits, by the total
    order of :func:`fastattn.functional.topk_indices`. Ties and NaNs give the same result on every
    rank. Slots without a token do not shift or overwrite the rows of others. An unassigned block
    gives -1. k may be any number up to 4096.

    Parameters
    ----------
    input : Tensor, shape [rows, columns], float32 or bfloat16
        Logits. Any row stride.
    output : Tensor, shape [>= rows, top_k], int32
        Written in place.
    offsets : Tensor, shape [rows] or, in decode, [B + 1] (``cu_seqlens_q``), int32
    lengths : Tensor, shape [rows / q_num_heads], int32
        Not used in decode.
    seq_len_decoder : Tensor, shape [B], int32, optional
    batch_id_per_token : Tensor, shape [T], int32, optional
        Used in decode only.
    block_tables : Tensor, shape [B, max_blocks], int32, optional
        Used in decode only.
    buffer : any
    max_block_num : any
        Not used.
    top_k : int
        1 to 4096.
    q_num_heads : int
        Rows of a slot. 0 counts as 1.
    block_size : int
        Tokens of a block.

    Returns
    -------
    Tensor
        `output`.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes do not match, or `output` shares memory with an input.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.fastdeploy import radix_topk_ragged_transform
    >>> logits = paddle.to_tensor([[3.0, 9.0, 9.0], [9.0, 1.0, 2.0]])
    >>> output = paddle.full([2, 2], -1, "int32")
    >>> offsets = paddle.to_tensor([0, 5], "int32")
    >>> lengths = paddle.to_tensor([1, 3], "int32")
    >>> _ = radix_topk_ragged_transform(
    ...     logits, output, offsets, lengths, None, None, None, None, 0, 2, 1
    ... )
    >>> output.tolist()
    [[0, -1], [5, 7]]
    """
    op = "radix_topk_ragged_transform"
    if _ops.is_tensor(input) and "bfloat16" in str(input.dtype):
        input = input.astype("float32")
    (result,) = _ops.call(
        op,
        (input, output, offsets, lengths, seq_len_decoder, batch_id_per_token, block_tables),
        (top_k, q_num_heads, block_size),
    )
    return result
