"""Checks of block tables against the tokens of a step, in NumPy on the host.

:class:`fastattn.backends.ForwardMeta` uses them for a scheduler's lists, and ``FASTATTN_CHECK`` for
the arguments of operators.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Positions = NDArray[np.int64]


def check_needed(
    where: str,
    tables: Ints,
    begin: Positions,
    end: Positions,
    *,
    block_size: int,
    num_blocks: int | None,
    partial: bool,
    hint: str,
    seqs: Positions | None = None,
) -> None:
    """Refuse tables that do not name a block of the cache for every needed position.

    Parameters
    ----------
    where : str
        ``operator: argument``, for messages.
    tables : array of int, shape [B, max_blocks]
    begin, end : array of int64, shape [B]
        Positions [begin, end) of each row are needed; none if end <= begin.
    block_size : int
        Tokens of a block.
    num_blocks : int or None
        Number of blocks of the cache. If None, any id that is not negative is accepted.
    partial : bool
        Whether a negative entry may replace a needed block, which is then elsewhere.
    hint : str
        How the caller can permit that, for messages.
    seqs : array of int, optional
        Sequence of each row. Default: the number of the row.

    Raises
    ------
    ValueError
        For the first wrong entry of the first wrong row.
    """
    count = np.where(end > begin, -(-end // block_size), 0)
    most = int(count.max(initial=0))
    width = tables.shape[1]
    if most > width:
        row = int(np.argmax(count > width))
        raise ValueError(
            f"{where}: expected at least {count[row]} entries for the {end[row]} tokens of "
            f"sequence {row if seqs is None else seqs[row]}, got {width}"
        )
    part = tables[:, :most]
    if num_blocks is None:
        wrong = part < 0 if not partial else None
    else:
        wrong = part >= num_blocks if partial else (part < 0) | (part >= num_blocks)
    if wrong is None or not wrong.any():
        return
    entries = np.arange(most)
    wrong &= (entries >= (begin // block_size)[:, None]) & (entries < count[:, None])
    if not wrong.any():
        return
    row, entry = (int(i) for i in np.argwhere(wrong)[0])
    first = max(int(begin[row]), entry * block_size)
    last = min(int(end[row]), (entry + 1) * block_size) - 1
    got = int(tables[row, entry])
    expected = "a block id" if num_blocks is None else f"a block in [0, {num_blocks})"
    raise ValueError(
        f"{where}: expected {expected} for tokens {first} to {last} of sequence "
        f"{row if seqs is None else seqs[row]}, got {got} at entry {entry}"
        + (f" ({hint})" if got < 0 and not partial else "")
    )


def check_writers(
    where: str, tables: Ints, begin: Positions, end: Positions, block_size: int
) -> None:
    """Refuse tables that write one block through two entries.

    Parameters
    ----------
    where, tables, begin, end, block_size
        As for :func:`check_needed`; positions [begin, end) are written.

    Raises
    ------
    ValueError
        The message names both entries.
    """
    first = begin // block_size
    stop = np.minimum(-(-end // block_size), tables.shape[1])
    count = np.where(end > begin, np.maximum(stop - first, 0), 0)
    rows = np.repeat(np.arange(len(tables)), count)
    before = np.cumsum(count) - count
    entries = np.arange(len(rows)) + np.repeat(first - before, count)
    ids = tables[rows, entries]
    ordered = np.sort(ids)
    if not ((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).any():
        return
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    at = int(np.argmax((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)))
    one, other = order[at], order[at + 1]
    raise ValueError(
        f"{where}: expected a block of its own for every entry that new tokens are written to, got "
        f"block {ids[one]} at entry {entries[one]} of sequence {rows[one]} and at entry "
        f"{entries[other]} of sequence {rows[other]}"
    )
