"""Rows of an indexer's queries: how a ragged step becomes the batch of its paged operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import paddle

from fastattn.backends.forward_meta import sequences
from fastattn.backends.latent import TokenMaps

#: Queries of a sequence that a step with prefill puts into a row together. The kernels score two
#: at a time; more would only add padding.
TILE = 8


class QueryRows(NamedTuple):
    """A step's queries as rows of `next_n` queries of one sequence each.

    Attributes
    ----------
    lengths : Tensor, shape [rows, next_n], int32
        Keys that each query sees; 0 for what is no query.
    tables : Tensor, shape [rows, max_blocks], int32
        Blocks of each row's sequence.
    token_of_query : Tensor, shape [rows * next_n], int32, or None
        Which token each query is; None: query i is token i.
    query_of_token : Tensor, shape [T], int32, or None
        The way back.
    """

    lengths: Any
    tables: Any
    token_of_query: Any
    query_of_token: Any

    def gather(self, tokens: Any) -> Any:
        """What belongs to tokens [T, ...] as [rows, next_n, ...]."""
        queries = tokens
        if self.token_of_query is not None:
            queries = paddle.gather(tokens, self.token_of_query)
        return queries.reshape([*self.lengths.shape, *tokens.shape[1:]])

    def scatter(self, queries: Any) -> Any:
        """What belongs to queries [rows * next_n, ...] as [T, ...]."""
        if self.query_of_token is None:
            return queries
        return paddle.gather(queries, self.query_of_token)


def query_rows(forward_meta: Any, maps: TokenMaps, places: Any, *, tiled: bool) -> QueryRows:
    """Rows of a step's queries, made on the device from sizes that the host knows.

    Parameters
    ----------
    forward_meta : ForwardMeta
    maps : TokenMaps
    places : Tensor, int32
        0, 1, 2, ...
    tiled : bool
        Rows of :data:`TILE` consecutive tokens, for steps with prefill; otherwise of one token.
    """
    tables, starts, _, _ = sequences(forward_meta)
    tokens, count = maps.batch_ids.shape[0], starts.shape[0] - 1
    seqs = maps.batch_ids.clip(0, count - 1)
    owned = maps.batch_ids >= 0
    seen = paddle.where(owned, maps.positions + 1, paddle.zeros_like(maps.positions))
    if not tiled:
        return QueryRows(seen.reshape([-1, 1]), paddle.gather(tables, seqs), None, None)
    # A sequence's first row is behind those of all before it, whatever their lengths:
    # floor((s + n) / TILE) + 1 >= floor(s / TILE) + ceil(n / TILE).
    first = starts[:count] // TILE + places[:count]
    rows = tokens // TILE + count + 1  # the last is that of padding tokens
    query = places[:tokens] + paddle.gather(first * TILE - starts[:count], seqs)
    query = paddle.where(owned, query, paddle.full_like(query, rows * TILE - 1))

    def of_queries(values: Any) -> Any:
        return paddle.scatter(paddle.zeros([rows * TILE], "int32"), query, values)

    owner = of_queries(seqs).reshape([rows, TILE])[:, 0]
    return QueryRows(
        of_queries(seen).reshape([rows, TILE]),
        paddle.gather(tables, owner),
        of_queries(places[:tokens]),
        query,
    )
