"""Maps of a step of latent attention: from tokens to slots, and from ragged queries to rows."""

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

    Token t of sequence b has position ``seq_lens_decoder[b] + t - cu_seqlens_q[b]``, or its entry
    in `position_ids`. Its slot is
    ``block_tables[b, p // block_size] * block_size + p % block_size``. Buffers of a server may have
    any shape, and more elements than the step has tokens or sequences; only the first elements
    count.

    Parameters
    ----------
    batch_ids : Tensor, at least `num_tokens` elements, int32 or int64
        Sequence of each token. An id outside [0, B) marks padding.
    block_tables : Tensor, shape [B or more, max_blocks], int32
    cu_seqlens_q : Tensor, shape [B + 1], int32
        First token of each sequence.
    seq_lens_decoder : Tensor, at least B elements, int32
        Number of cached tokens of each sequence.
    position_ids : Tensor, at least `num_tokens` elements, int32 or int64, optional
        Positions that the server knows.
    num_tokens : int
        T, the number of tokens of the step.
    block_size : int
        Tokens of a block.
    num_blocks : int, optional
        A table entry outside [0, num_blocks) gives no slot. By default, only a negative entry gives
        none.

    Returns
    -------
    seqs : Tensor, shape [T], int32
        Sequence of each token; -1 for padding.
    positions : Tensor, shape [T], int32
        -1 for padding, and for a position that is negative or does not fit int32.
    slots : Tensor, shape [T], int32
        -1 for a token without a position or block, and for a slot that does not fit int32.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a number is not an integer.
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
    """Arrange the queries of a step in rows of `tile` for a paged top-k, each row from one
    sequence.

    :func:`paged_indexer_topk` takes the same number of queries in every row. With a `tile` of 1,
    row t is token t. Otherwise each sequence begins at row ``cu_seqlens_q[b] // tile + b``. This is
    after the rows of the sequences before it, whatever their lengths. So the number of rows follows
    from sizes that the host knows.

    Parameters
    ----------
    batch_ids : Tensor, at least T elements, int32 or int64
        Sequence of each token. An id outside [0, B) marks padding.
    positions : Tensor, shape [T], int32
        As :func:`token_maps` returns them.
    block_tables : Tensor, shape [B or more, max_blocks], int32
    cu_seqlens_q : Tensor, shape [B + 1], int32
        First token of each sequence, ascending.
    tile : int
        Number of queries of a row, 1 to 64.

    Returns
    -------
    lengths : Tensor, shape [rows, tile], int32
        Number of keys that each query sees: its position plus one; 0 for an element without a
        query. There are T rows for a `tile` of 1, otherwise ``T // tile + max(B, 1)``.
    row_tables : Tensor, shape [rows, max_blocks], int32
        Blocks of each row's sequence; -1 if a row has none.
    token_of_query : Tensor, shape [rows * tile], int32
        -1 for an element without a query.
    query_of_token : Tensor, shape [T], int32
        The inverse map; -1 for padding.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or `tile` is not an integer.
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
