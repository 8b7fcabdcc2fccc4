"""Rows of an indexer's queries, which turn a ragged step into the batch of its paged operator."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastattn import functional
from fastattn.backends.forward_meta import sequences
from fastattn.backends.latent import TokenMaps

#: Number of queries of a sequence in one row, for steps with prefill. The kernels score two at a
#: time; more would only add padding.
TILE = 8


class QueryRows(NamedTuple):
    """A step's queries in rows, each with `next_n` queries of one sequence.

    Attributes
    ----------
    lengths : Tensor, shape [rows, next_n], int32
        Number of keys that each query sees; 0 for an element without a query.
    tables : Tensor, shape [rows, max_blocks], int32
        Blocks of each row's sequence.
    token_of_query : Tensor, shape [rows * next_n], int32, or None
        Token of each query; None means that query i is token i.
    query_of_token : Tensor, shape [T], int32, or None
        The inverse map.
    """

    lengths: Any
    tables: Any
    token_of_query: Any
    query_of_token: Any


def query_rows(forward_meta: Any, maps: TokenMaps, *, tiled: bool) -> QueryRows:
    """Rows of a step's queries, made on the device from sizes that the host knows.

    Parameters
    ----------
    forward_meta : ForwardMeta
    maps : TokenMaps
    tiled : bool
        Use rows of :data:`TILE` consecutive tokens, for steps with prefill; otherwise of one token.
    """
    tables, starts, _, _ = sequences(forward_meta)
    made = functional.query_rows(
        maps.batch_ids, maps.positions, tables, starts, tile=TILE if tiled else 1
    )
    return QueryRows(*made) if tiled else QueryRows(*made[:2], None, None)
