"""Rows of an indexer's queries: how a ragged step becomes the batch of its paged operator."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastattn import functional
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


def query_rows(forward_meta: Any, maps: TokenMaps, *, tiled: bool) -> QueryRows:
    """Rows of a step's queries, made on the device from sizes that the host knows.

    Parameters
    ----------
    forward_meta : ForwardMeta
    maps : TokenMaps
    tiled : bool
        Rows of :data:`TILE` consecutive tokens, for steps with prefill; otherwise of one token.
    """
    tables, starts, _, _ = sequences(forward_meta)
    made = functional.query_rows(
        maps.batch_ids, maps.positions, tables, starts, tile=TILE if tiled else 1
    )
    return QueryRows(*made) if tiled else QueryRows(*made[:2], None, None)
