"""Maps of a step of latent attention: tokens to slots, ragged queries to rows."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import block_count, check_int
from fastattn.functional._marker import unified


@unified
def token_maps(
    batch_ids: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    position_ids: Tensor | None = None,
    *,
    num_tokens: int,
    block_size: int = 64,
    num_blocks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Position of each token of a step in its sequence, and its slot of a paged cache.

    Token t of sequence b has position ``seq_lens_decoder[b] + t - cu_seqlens_q[b]``, or that of
    `position_ids`, and slot ``block_tables[b, p // block_size] * block_size + p % block_size``.
    Buffers of a server may have any shape and more elements than the step has tokens or sequences:
    the first ones count.

    Parameters
    ----------
    batch_ids : Tensor, at least `num_tokens` elements, int32 or int64
        Sequence of each token; outside [0, B) = padding.
    block_tables : Tensor, shape [B or more, max_blocks], int32
    cu_seqlens_q : Tensor, shape [B + 1], int32
        First token of each sequence.
    seq_lens_decoder : Tensor, at least B elements, int32
        Tokens of each sequence that are cached.
    position_ids : Tensor, at least `num_tokens` elements, int32 or int64, optional
        Positions that the server knows.
    num_tokens : int
        T, tokens of the step.
    block_size : int
        Tokens of a block.
    num_blocks : int, optional
        A table entry outside [0, num_blocks) gives no slot. Default: only a negative one.

    Returns
    -------
    seqs : Tensor, shape [T], int32
        Sequence of each token; -1 for padding.
    positions : Tensor, shape [T], int32
        -1 for padding, and where a position is negative or does not fit int32.
    slots : Tensor, shape [T], int32
        -1 where there is no position or no block, and for a slot that does not fit int32.

    Raises
    ------
    TypeError
        If a dtype is not one of those above, or a number is no integer.
    ValueError
        If a buffer has too few elements, or a number is out of range.

    See Also
    --------
    fastattn.reference.token_maps : the same in NumPy.
    query_rows : rows for the indexer's queries.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import token_maps
    >>> ids = paddle.to_tensor([0, 1, 1, -1], "int32")
    >>> tables = paddle.to_tensor([[5, 2], [9, -1]], "int32")
    >>> starts, cached = (paddle.to_tensor(x, "int32") for x in ([0, 1, 3], [65, 0]))
    >>> seqs, positions, slots = token_maps(ids, tables, starts, cached, num_tokens=4)
    >>> positions.tolist(), slots.tolist()
    ([65, 0, 1, -1], [129, 576, 577, -1])
    """
    op = "token_maps"
    seqs, positions, slots = _ops.call(
        op,
        (batch_ids, block_tables, cu_seqlens_q, seq_lens_decoder, position_ids),
        (
            check_int(op, "num_tokens", num_tokens, 0),
            check_int(op, "block_size", block_size, 1),
            block_count(op, num_blocks),
        ),
    )
    return seqs, positions, slots


@unified
def query_rows(
    batch_ids: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    *,
    tile: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of a step in rows of `tile`, each row of one sequence, for a paged top-k.

    :func:`paged_indexer_topk` takes a batch of as many queries each. With a `tile` of 1, row t is
    token t. Else each sequence begins a row: row ``cu_seqlens_q[b] // tile + b``, which is behind
    those of the sequences before it whatever their lengths are, so that the number of rows follows
    from sizes that the host knows.

    Parameters
    ----------
    batch_ids : Tensor, at least T elements, int32 or int64
        Sequence of each token; outside [0, B) = padding.
    positions : Tensor, shape [T], int32
        Of :func:`token_maps`.
    block_tables : Tensor, shape [B or more, max_blocks], int32
    cu_seqlens_q : Tensor, shape [B + 1], int32
        First token of each sequence, ascending.
    tile : int
        Queries of a row, 1 to 64.

    Returns
    -------
    lengths : Tensor, shape [rows, tile], int32
        Keys that each query sees, its position and one; 0 for what is no query. There are T rows
        for a `tile` of 1, else ``T // tile + max(B, 1)``.
    row_tables : Tensor, shape [rows, max_blocks], int32
        Blocks of each row's sequence; -1 where a row has none.
    token_of_query : Tensor, shape [rows * tile], int32
        -1 for what is no query.
    query_of_token : Tensor, shape [T], int32
        The way back; -1 for padding.

    Raises
    ------
    TypeError
        If a dtype is not one of those above, or `tile` is no integer.
    ValueError
        If shapes do not match, or `tile` is out of range.

    See Also
    --------
    fastattn.reference.query_rows : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import query_rows
    >>> ids, positions, starts = (
    ...     paddle.to_tensor(x, "int32") for x in ([0, 0, 0, 1], [4, 5, 6, 9], [0, 3, 4])
    ... )
    >>> tables = paddle.to_tensor([[5], [2]], "int32")
    >>> lengths, rows, tokens, queries = query_rows(ids, positions, tables, starts, tile=2)
    >>> lengths.tolist(), rows.tolist()
    ([[5, 6], [7, 0], [10, 0], [0, 0]], [[5], [5], [2], [2]])
    >>> tokens.tolist(), queries.tolist()
    ([0, 1, 2, -1, 3, -1, -1, -1], [0, 1, 2, 4])
    """
    op = "query_rows"
    lengths, row_tables, token_of_query, query_of_token = _ops.call(
        op,
        (batch_ids, positions, block_tables, cu_seqlens_q),
        (check_int(op, "tile", tile, 1, 64),),
    )
    return lengths, row_tables, token_of_query, query_of_token
