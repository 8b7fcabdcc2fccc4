"""Block tables without the entries that name no block."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import check_int
from fastattn.functional._marker import unified
from fastattn.functional.attention import as_window


@unified
def compact_block_tables(
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    *,
    num_tokens: int,
    num_blocks: int,
    block_size: int = 64,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    mask_offsets: Tensor | None = None,
    want_masks: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tables of the blocks that are there, and what queries see of them.

    Attention skips or masks a block that a table does not name, but only after it has come to it. A
    rank of :func:`fastattn.distributed.paged_attention_dcp` has every other block or fewer: with
    its table compacted, it works on as many keys as it has.

    A *local* position counts the sequence's keys in blocks that the table names. Sequence b has the
    keys [0, k) with ``k = seq_lens_decoder[b] + seq_lens_this_time[b]``, those behind the table's
    last entry left out.

    Parameters
    ----------
    block_tables : Tensor, shape [B, max_blocks], int32
        Block of each `block_size` tokens of a sequence. An entry outside [0, num_blocks) names
        none. It and `seq_lens_decoder` may both have more sequences than run.
    cu_seqlens_q : Tensor, shape [B + 1], int32
        First new token of each sequence.
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        Cached and new tokens of each sequence.
    num_tokens : int
        T: new tokens of the step, padding included.
    num_blocks : int
        Blocks of the cache.
    block_size : int
        Tokens of a block.
    causal, window_size
        As of :func:`paged_attention`, for global positions. Blocks before the window of a
        sequence's first new token are left out: none of its queries sees them.
    mask_offsets : Tensor, shape [T, 2], int32, optional
        Query t sees at most keys ``[start, end)`` of its sequence, in global positions.
    want_masks : bool
        Whether masks are returned. Where a sequence has one new token at most, no window and no
        `mask_offsets`, its query sees all local keys, and none are needed.

    Returns
    -------
    tables : Tensor, shape [B, max_blocks], int32
        A sequence's blocks that are there and hold keys of it, in their order, then -1.
    seq_lens : Tensor, shape [B], int32
        To be used in place of `seq_lens_decoder`: local keys without the new tokens, but at
        least 0.
    masks : Tensor, shape [T, 2], int32, or None
        Local keys [begin, end) that each query sees; (0, 0) for tokens of no sequence. To be used
        as `mask_offsets` with ``causal=False`` and no window.

    Raises
    ------
    TypeError
        If a dtype is not int32, or a number is no integer.
    ValueError
        If shapes do not match or a number is out of range, or for `mask_offsets` without
        `want_masks`.

    Notes
    -----
    Lengths on the device are cut as in :func:`paged_attention`. Attention over the results sees
    the same keys in the same order, so that its output is the same within rounding.

    See Also
    --------
    fastattn.distributed.dcp_local_keys : for the calls of a step's layers.
    fastattn.reference.compact_block_tables : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import compact_block_tables
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> seqs = int32([[-1, 7, -1, 3]]), int32([0, 2]), int32([200]), int32([2])
    >>> tables, seq_lens, masks = compact_block_tables(*seqs, num_tokens=2, num_blocks=9)
    >>> tables.tolist(), seq_lens.tolist(), masks.tolist()
    ([[7, 3, -1, -1]], [72], [[0, 73], [0, 74]])
    """
    op = "compact_block_tables"
    tables, seq_lens, masks = _ops.call(
        op,
        (block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time, mask_offsets),
        (
            check_int(op, "num_tokens", num_tokens, 0),
            check_int(op, "num_blocks", num_blocks, 0),
            check_int(op, "block_size", block_size, 1),
            causal,
            *as_window(op, window_size),
            want_masks,
        ),
    )
    return tables, seq_lens, masks if want_masks else None
