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
    """Block tables without unassigned entries, and the masks of queries over them.

    Attention skips or masks an unassigned table entry, but only when it reaches it. A rank of
    :func:`fastattn.distributed.paged_attention_dcp` has at most every second block. With a
    compacted table, its work is proportional to its own keys.

    A *local* position counts only the keys of a sequence in blocks that the table names. Sequence b
    has the keys [0, k) with ``k = seq_lens_decoder[b] + seq_lens_this_time[b]``. Keys past the last
    entry of the table are left out.

    Parameters
    ----------
    block_tables : Tensor, shape [B, max_blocks], int32
        Block of each group of `block_size` tokens of a sequence. An entry outside [0, num_blocks)
        is unassigned. `block_tables` and `seq_lens_decoder` may have rows for sequences that do not
        run.
    cu_seqlens_q : Tensor, shape [B + 1], int32
        Index of the first new token of each sequence.
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        Number of cached and of new tokens of each sequence.
    num_tokens : int
        T, the number of new tokens of the step, including padding.
    num_blocks : int
        Blocks of the cache.
    block_size : int
        Tokens of a block.
    causal, window_size
        As for :func:`paged_attention`, in global positions. Blocks before the window of a
        sequence's first new token are left out, because none of its queries sees them.
    mask_offsets : Tensor, shape [T, 2], int32, optional
        Query t sees at most keys ``[start, end)`` of its sequence, in global positions.
    want_masks : bool
        Whether to return masks. No masks are needed if every sequence has at most one new token and
        there is no window and no `mask_offsets`: the query then sees all local keys.

    Returns
    -------
    tables : Tensor, shape [B, max_blocks], int32
        The assigned blocks of a sequence that hold keys, in order, then -1.
    seq_lens : Tensor, shape [B], int32
        Replaces `seq_lens_decoder`: the number of local keys minus the new tokens, but at least 0.
    masks : Tensor, shape [T, 2], int32, or None
        Local keys [begin, end) that each query sees; (0, 0) for tokens of no sequence. Use them as
        `mask_offsets` with ``causal=False`` and no window.

    Raises
    ------
    TypeError
        If a dtype is not int32, or a number is not an integer.
    ValueError
        If shapes do not match, a number is out of range, or `mask_offsets` are given without
        `want_masks`.

    Notes
    -----
    Lengths on the device are clamped as in :func:`paged_attention`. Attention over the results sees
    the same keys in the same order, so its output is the same within rounding.

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
