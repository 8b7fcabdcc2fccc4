"""Distribution of a sequence's blocks over the ranks: pure host functions in NumPy.

The logical blocks of a sequence (tokens 0 to 63, 64 to 127, ...) are dealt to the ranks
round-robin, ``interleave`` at a time: logical block j belongs to rank
``(j // interleave) % world_size``. Long sequences therefore load all ranks equally, in decode and
in prefill.

Only these helpers need this convention. The operators need two things. Entry j of a sequence in a
rank's table is the block *of that rank's own cache* that holds logical block j, or -1 for a block
of another rank. Every logical block with tokens is on exactly one rank.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

UNASSIGNED = -1


def _int(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected int, got {type(value).__name__}") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
    return number


def _ranks(rank: Any, world_size: Any, interleave: Any = 1) -> tuple[int, int, int]:
    world_size = _int("world_size", world_size, 1)
    rank = _int("rank", rank, 0)
    if rank >= world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    return rank, world_size, _int("interleave", interleave, 1)


def _tables(block_tables: ArrayLike) -> NDArray[np.int32]:
    tables = np.asarray(block_tables)
    if tables.ndim != 2:
        raise ValueError(f"block_tables: expected shape [B, max_blocks], got {list(tables.shape)}")
    if tables.size and not np.issubdtype(tables.dtype, np.integer):
        raise TypeError(f"block_tables: expected integers, got {tables.dtype}")
    info = np.iinfo(np.int32)
    if tables.size and (tables.min() < info.min or tables.max() > info.max):
        raise ValueError("block_tables: expected ids that fit int32")
    return tables.astype(np.int32)


def dcp_local_block_tables(
    block_tables: ArrayLike, rank: int, world_size: int, *, interleave: int = 1
) -> NDArray[np.int32]:
    """A rank's block tables, from tables that list all blocks of each sequence.

    Parameters
    ----------
    block_tables : array_like of int, shape [B, max_blocks]
        Physical block of each logical block, in the cache of the rank that holds it; -1 for no
        block. The same id may occur on several ranks.
    rank, world_size : int
        This rank in its group, and the size of the group.
    interleave : int
        Number of consecutive logical blocks on the same rank.

    Returns
    -------
    array of int32, shape [B, max_blocks]
        The same entries, with -1 for the blocks of other ranks.

    Raises
    ------
    TypeError, ValueError
        If the tables are not two-dimensional or not int32 values, or a number is out of range.

    Examples
    --------
    >>> from fastattn.distributed import dcp_local_block_tables
    >>> dcp_local_block_tables([[4, 1, 7, 9, 2]], rank=1, world_size=2).tolist()
    [[-1, 1, -1, 9, -1]]
    """
    rank, world_size, interleave = _ranks(rank, world_size, interleave)
    tables = _tables(block_tables)
    owner = np.arange(tables.shape[1]) // interleave % world_size
    tables[:, owner != rank] = UNASSIGNED
    return tables


def dcp_stripe_block_tables(
    stripe_tables: ArrayLike, rank: int, world_size: int
) -> NDArray[np.int32]:
    """A rank's block tables, for a scheduler that allocates stripes of one block on every rank.

    Such a scheduler only needs another block size. It counts in stripes of ``64 * world_size``
    tokens, and an id names the same block in the caches of all ranks. The block of rank r holds the
    r-th group of 64 tokens of the stripe.

    Parameters
    ----------
    stripe_tables : array_like of int, shape [B, max_stripes]
        Ids of stripes; -1 for no stripe.
    rank, world_size : int
        This rank in its group, and the size of the group.

    Returns
    -------
    array of int32, shape [B, max_stripes * world_size]
        Entry ``s * world_size + rank`` is stripe s; every other entry is -1.

    Raises
    ------
    TypeError, ValueError
        As :func:`dcp_local_block_tables`.

    Examples
    --------
    >>> from fastattn.distributed import dcp_stripe_block_tables
    >>> dcp_stripe_block_tables([[5, 3]], rank=1, world_size=3).tolist()
    [[-1, 5, -1, -1, 3, -1]]
    """
    rank, world_size, _ = _ranks(rank, world_size)
    stripes = _tables(stripe_tables)
    batch, count = stripes.shape
    tables = np.full((batch, count, world_size), UNASSIGNED, np.int32)
    tables[:, :, rank] = stripes
    return tables.reshape(batch, count * world_size)


def dcp_num_local_blocks(
    num_tokens: int, rank: int, world_size: int, *, interleave: int = 1, block_size: int = 64
) -> int:
    """Number of blocks that a rank needs for a sequence of `num_tokens` tokens.

    Parameters
    ----------
    num_tokens : int
    rank, world_size : int
        This rank in its group, and the size of the group.
    interleave : int
        As in :func:`dcp_local_block_tables`.
    block_size : int

    Returns
    -------
    int
        The sum over all ranks is ``ceil(num_tokens / block_size)``.

    Raises
    ------
    TypeError, ValueError
        If a number is not an int or out of range.

    Examples
    --------
    >>> from fastattn.distributed import dcp_num_local_blocks
    >>> [dcp_num_local_blocks(300, rank, 4) for rank in range(4)]  # five blocks
    [2, 1, 1, 1]
    """
    rank, world_size, interleave = _ranks(rank, world_size, interleave)
    block_size = _int("block_size", block_size, 1)
    blocks = -(-_int("num_tokens", num_tokens, 0) // block_size)
    rounds, rest = divmod(blocks, interleave * world_size)
    return rounds * interleave + min(max(rest - rank * interleave, 0), interleave)
