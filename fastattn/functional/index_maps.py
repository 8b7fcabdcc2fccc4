"""Index maps between the indexer's top-k and sparse attention."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import block_count, check_int
from fastattn.functional._marker import unified


@unified
def topk_to_slots(
    indices: Tensor,
    block_tables: Tensor,
    batch_ids: Tensor | None = None,
    *,
    row_ids: Tensor | None = None,
    block_size: int = 64,
    block_stride: int | None = None,
    num_blocks: int | None = None,
    compact: bool = True,
    rank: int = 0,
    world_size: int = 1,
    interleave: int = 1,
) -> tuple[Tensor, Tensor]:
    """Slots of a paged cache for the tokens that a top-k selected in their sequences.

    Token i of sequence b is in slot
    ``block_tables[b, i // block_size] * block_stride + i % block_size``.

    Parameters
    ----------
    indices : Tensor, shape [rows, k], int32
        Any row stride. A negative index gives no slot.
    block_tables : Tensor, shape [B, max_blocks], int32
    batch_ids : Tensor, shape [rows], int32 or int64, optional
        Sequence of each row. An id outside [0, B) marks padding: a row without slots. Default: row
        i belongs to sequence i.
    row_ids : Tensor, shape [T], int32 or int64, optional
        Row i of the results, which have T rows, is made from row ``row_ids[i]`` of `indices`. An id
        outside [0, rows) marks padding. `batch_ids` then belong to the rows of the results.
        Default: all rows in order.
    block_size : int
        Tokens of a block; for a cache of compressed tokens, its entries.
    block_stride : int, optional
        Slots from the start of one block to the next. Default: `block_size`.
    num_blocks : int, optional
        A table entry outside [0, num_blocks) gives no slot. By default, only a negative entry gives
        none.
    compact : bool
        Move the slots of a row to its front, in order. Otherwise slots stay in their columns, and a
        column without a slot is -1.
    rank, world_size, interleave : int
        For decode context parallelism. Each of `world_size` ranks owns `interleave` tokens in turn
        and has tables of its own tokens. Tokens of other ranks give no slot.

    Returns
    -------
    slots : Tensor, shape [rows, k], int32
        -1 after the last slot of a row. A slot that does not fit int32 is also -1.
    lengths : Tensor, shape [rows], int32
        One more than the column of the last slot of each row; with `compact`, the number of slots.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a number is not an integer.
    ValueError
        If shapes do not match, or a number is out of range.

    See Also
    --------
    fastattn.reference.topk_to_slots : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import topk_to_slots
    >>> chosen = paddle.to_tensor([[1, 63, 64, 130, -1]], "int32")
    >>> tables = paddle.to_tensor([[7, 2, -1]], "int32")
    >>> slots, lengths = topk_to_slots(chosen, tables)
    >>> slots.tolist(), lengths.tolist()
    ([[449, 511, 128, -1, -1]], [3])
    """
    op = "topk_to_slots"
    size = check_int(op, "block_size", block_size, 1)
    stride = size if block_stride is None else check_int(op, "block_stride", block_stride, size)
    slots, lengths = _ops.call(
        op,
        (indices, block_tables, batch_ids, row_ids),
        (
            size,
            stride,
            block_count(op, num_blocks),
            compact,
            check_int(op, "rank", rank, 0),
            check_int(op, "world_size", world_size, 1),
            check_int(op, "interleave", interleave, 1),
        ),
    )
    return slots, lengths


@unified
def window_indices(
    positions: Tensor,
    batch_ids: Tensor | None = None,
    *,
    window: int = 128,
    block_tables: Tensor | None = None,
    starts: Tensor | None = None,
    block_size: int = 64,
    num_blocks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices of the last tokens up to each position, ascending: what a sliding window sees.

    Position p sees tokens ``max(p - window + 1, 0)`` to p. With `block_tables` the indices are
    slots of a paged cache. Otherwise they are positions, relative to the sequence's entry in
    `starts` if that is given.

    Parameters
    ----------
    positions : Tensor, shape [T], int32 or int64
        A position below 0, or of 2^31 and more, marks padding: a row without indices.
    batch_ids : Tensor, shape [T], int32 or int64, optional
        Sequence of each token. An id that is negative, or has no entry in `block_tables` or
        `starts`, marks padding. Default: token i belongs to sequence i.
    window : int
        Number of tokens that a position sees, including itself.
    block_tables : Tensor, shape [B, max_blocks], int32, optional
    starts : Tensor, shape [B], int32, optional
        First position of each sequence that a workspace holds; tokens before it give -1. Not
        allowed with `block_tables`.
    block_size : int
        Tokens of a block.
    num_blocks : int, optional
        A table entry outside [0, num_blocks) gives -1. By default, only a negative entry does.

    Returns
    -------
    indices : Tensor, shape [T, window], int32
        Column j holds token j of the window. Columns after the last token, and tokens without a
        slot, are -1.
    lengths : Tensor, shape [T], int32
        One more than the column of the last index of each row: ``min(p + 1, window)``, or 0 for
        padding.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a number is not an integer.
    ValueError
        If shapes do not match, a number is out of range, or both tables and starts are given.

    See Also
    --------
    fastattn.reference.window_indices : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import window_indices
    >>> tables = paddle.to_tensor([[5, 2], [9, -1]], "int32")
    >>> positions = paddle.to_tensor([65, 1])
    >>> indices, lengths = window_indices(positions, window=3, block_tables=tables)
    >>> indices.tolist(), lengths.tolist()
    ([[383, 128, 129], [576, 577, -1]], [3, 2])
    """
    op = "window_indices"
    indices, lengths = _ops.call(
        op,
        (positions, batch_ids, block_tables, starts),
        (
            check_int(op, "window", window, 1),
            check_int(op, "block_size", block_size, 1),
            block_count(op, num_blocks),
        ),
    )
    return indices, lengths


@unified
def short_context_indices(
    positions: Tensor, k: int, batch_ids: Tensor | None = None, *, compress_ratio: int = 1
) -> tuple[Tensor, Tensor]:
    """All entries of each position's context, as a top-k gives them if there are at most k.

    Row t is ``0, 1, ..., (positions[t] + 1) // compress_ratio - 1``, cut off at k. A step whose
    longest context has at most k entries needs neither logits nor a top-k.

    Parameters
    ----------
    positions : Tensor, shape [T], int32 or int64
        A position below 0, or of 2^31 and more, marks padding: a row without indices.
    k : int
        Number of columns.
    batch_ids : Tensor, shape [T], int32 or int64, optional
        A negative id marks padding.
    compress_ratio : int
        Number of tokens of an entry: 1 (V3.2), 4 or 128 (V4).

    Returns
    -------
    indices : Tensor, shape [T, k], int32
        -1 after the last entry.
    lengths : Tensor, shape [T], int32
        ``min((positions[t] + 1) // compress_ratio, k)``, or 0 for padding.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a number is not an integer.
    ValueError
        If shapes do not match, or a number is out of range.

    See Also
    --------
    fastattn.reference.short_context_indices : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import short_context_indices
    >>> indices, lengths = short_context_indices(paddle.to_tensor([2, 8]), 3, compress_ratio=4)
    >>> indices.tolist(), lengths.tolist()
    ([[-1, -1, -1], [0, 1, -1]], [0, 2])
    """
    op = "short_context_indices"
    indices, lengths = _ops.call(
        op,
        (positions, batch_ids),
        (
            check_int(op, "k", k, 1),
            check_int(op, "compress_ratio", compress_ratio, 1),
        ),
    )
    return indices, lengths


@unified
def combine_topk_window(
    topk: Tensor,
    window: Tensor,
    batch_ids: Tensor | None = None,
    *,
    topk_lengths: Tensor | None = None,
    window_lengths: Tensor | None = None,
    seq_stride: int = 0,
    window_offset: int = 0,
    multiple: int = 128,
) -> tuple[Tensor, Tensor]:
    """One index list per row, from its top-k and its window, for a workspace that holds both.

    The workspace has `seq_stride` rows for each sequence: compressed entries from its first row on,
    and the tokens of the window from row `window_offset` on. Index i of the top-k of sequence b
    becomes ``b * seq_stride + i``. Index i of its window becomes
    ``b * seq_stride + window_offset + i``. Negative indices are left out, and the list has no gaps.

    Parameters
    ----------
    topk : Tensor, shape [T, k], int32
    window : Tensor, shape [T, w], int32
        From :func:`window_indices` with `starts`. `topk` and `window` may have any row stride.
    batch_ids : Tensor, shape [T], int32 or int64, optional
        Sequence of each row. A negative id marks padding: a row without indices. Default: all rows
        belong to sequence 0.
    topk_lengths, window_lengths : Tensor, shape [T], int32, optional
        Number of columns of each row that count; later columns are ignored. Default: all.
    seq_stride, window_offset : int
        Numbers of rows of the workspace.
    multiple : int
        The result has ``k + w`` columns, rounded up to a multiple of this.

    Returns
    -------
    indices : Tensor, shape [T, columns], int32
        The indices of the top-k, then of the window, then -1.
    lengths : Tensor, shape [T], int32
        Number of indices of each row.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a number is not an integer.
    ValueError
        If shapes do not match, or a number is out of range.

    See Also
    --------
    fastattn.reference.combine_topk_window : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import combine_topk_window
    >>> topk = paddle.to_tensor([[0, 3, -1]], "int32")
    >>> window = paddle.to_tensor([[4, 5]], "int32")
    >>> indices, lengths = combine_topk_window(
    ...     topk, window, paddle.to_tensor([1]), seq_stride=100, window_offset=20, multiple=8
    ... )
    >>> indices.tolist(), lengths.tolist()
    ([[100, 103, 124, 125, -1, -1, -1, -1]], [4])
    """
    op = "combine_topk_window"
    indices, lengths = _ops.call(
        op,
        (topk, window, topk_lengths, window_lengths, batch_ids),
        (
            check_int(op, "seq_stride", seq_stride, 0),
            check_int(op, "window_offset", window_offset, 0),
            check_int(op, "multiple", multiple, 1),
        ),
    )
    return indices, lengths
