"""A plan of FlashInfer's wrappers on the host: pages, lengths and masks of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import _ops
from fastattn._foreign import is_torch, not_a_tensor
from fastattn.compat._paged import BLOCK_SIZE, refuse

Ints = NDArray[np.int64]


class Step(NamedTuple):
    """The sequences of a step.

    Attributes
    ----------
    starts : array of int, shape [B + 1]
        Index of the first query of each sequence, then the number of queries.
    keys : array of int, shape [B]
        Number of keys of each sequence, including the keys of its queries.
    indptr, indices : array of int
        Pages of sequence b: ``indices[indptr[b] : indptr[b + 1]]``.
    offsets : array of int, shape [T, 2], or None
        Interval of keys to which each query is limited.
    explicit : bool
        Whether `offsets` are the whole mask.
    trees : array of bool, shape [B, N, N], or None
        Queries of each sequence that see each other, within `offsets`; N is the largest number.
    """

    starts: Ints
    keys: Ints
    indptr: Ints
    indices: Ints
    offsets: Ints | None = None
    explicit: bool = False
    trees: NDArray[np.bool_] | None = None

    @property
    def queries(self) -> Ints:
        return np.diff(self.starts)


def _array(op: str, name: str, values: Any) -> NDArray[Any]:
    """NumPy array of a tensor on any place, or of any array_like."""
    if is_torch(values):
        raise not_a_tensor(op, name, values)
    return np.asarray(values.numpy() if _ops.is_tensor(values) else values)


def on_host(op: str, name: str, values: Any) -> Ints:
    """Integers of a tensor on any place, or of an array_like."""
    array = _array(op, name, values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{op}: {name}: expected integers in one dimension, got {array.shape}")
    return array.astype(np.int64)


def _check_indptr(op: str, name: str, indptr: Ints, size: int | None) -> None:
    if not indptr.size or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(f"{op}: {name}: expected ascending values from 0 on")
    if size is not None and indptr[-1] > size:
        raise ValueError(f"{op}: {name}: ends at {indptr[-1]}, but there are {size} page indices")


def plan_step(
    op: str,
    names: tuple[str, str, str],
    indptr: Any,
    indices: Any,
    last_page_len: Any,
    page_size: int,
    starts: Ints,
) -> Step:
    """Read the page table of a step. `names` are the names of its three arguments in messages."""
    indptr, indices, last = (
        on_host(op, name, x) for name, x in zip(names, (indptr, indices, last_page_len))
    )
    _check_indptr(op, names[0], indptr, len(indices))
    pages = np.diff(indptr)
    for name, count in ((names[2], len(last)), ("qo_indptr", len(starts) - 1)):
        if count != len(pages):
            raise ValueError(f"{op}: {name}: expected {len(pages)} sequences, got {count}")
    wrong = (pages > 0) & ((last < 1) | (last > page_size))
    if wrong.any():
        b = int(np.argmax(wrong))
        raise ValueError(
            f"{op}: {names[2]}: expected 1 to {page_size}, got {last[b]} in sequence {b}"
        )
    keys = np.where(pages > 0, (pages - 1) * page_size + last, 0)
    return Step(starts, keys, indptr, indices)


def query_starts(op: str, qo_indptr: Any) -> Ints:
    starts = on_host(op, "qo_indptr", qo_indptr)
    _check_indptr(op, "qo_indptr", starts, None)
    return starts


def block_tables(
    step: Step, per_page: int, stride: int, columns: int | None = None
) -> NDArray[np.int32]:
    """Table [B, columns] of the blocks of each sequence; -1 after its last block."""
    pages = np.diff(step.indptr)
    width = max(int(pages.max(initial=0)) * per_page, 1) if columns is None else columns
    tables = np.full((len(pages), width), -1, np.int32)
    for b, count in enumerate(pages):
        of_seq = step.indices[step.indptr[b] : step.indptr[b] + count, None].astype(np.int64)
        blocks = (of_seq * stride + np.arange(per_page)).reshape(-1)
        fits = (of_seq >= 0) & (of_seq < 2**31 // stride - 1)
        tables[b, : count * per_page] = np.where(fits.repeat(per_page), blocks, -1)
    return tables


def dense_block_tables(indptr: ArrayLike, indices: ArrayLike) -> NDArray[np.int32]:
    """Convert FlashInfer's compressed page table to a dense block table, for pages of 64 tokens.

    Parameters
    ----------
    indptr : array_like or Tensor of int, shape [B + 1]
    indices : array_like or Tensor of int, shape [>= indptr[-1]]

    Returns
    -------
    array of int32, shape [B, max_blocks]
        -1 after the last block of each sequence.

    Raises
    ------
    ValueError
        If `indptr` does not ascend from 0, or ends past `indices`.

    Examples
    --------
    >>> from fastattn.compat.flashinfer import dense_block_tables
    >>> dense_block_tables([0, 1, 3], [5, 2, 7]).tolist()
    [[5, -1], [2, 7]]
    """
    op = "dense_block_tables"
    pointers, pages = on_host(op, "indptr", indptr), on_host(op, "indices", indices)
    _check_indptr(op, "indptr", pointers, len(pages))
    unused = np.zeros(len(pointers) - 1, np.int64)
    return block_tables(Step(pointers, unused, pointers, pages), 1, 1)


def parts_of_mask(op: str, step: Step, mask: Any) -> tuple[Ints, NDArray[np.bool_] | None]:
    """A flattened boolean mask as `offsets` and `trees` of a step.

    Returns
    -------
    offsets : array of int, shape [T, 2]
        Keys ``[first, last + 1)`` of those that each query sees.
    trees : array of bool, shape [B, N, N], or None
        None if each query sees all keys of its interval.

    Raises
    ------
    NotImplementedError
        If a query sees several intervals of the keys before the queries, or one that ends there
        and keys of queries.
    ValueError
        If the mask has another number of elements.
    """
    flat = _array(op, "custom_mask", mask).reshape(-1).astype(bool)
    sizes = step.queries * step.keys
    if flat.size != sizes.sum():
        raise ValueError(f"{op}: custom_mask: expected {sizes.sum()} elements, got {flat.size}")
    offsets = np.zeros((int(step.starts[-1]), 2), np.int64)
    ends = np.cumsum(sizes)
    most = int(step.queries.max(initial=0))
    trees, plain = np.ones((len(step.keys), most, most), bool), True
    for b, (queries, keys) in enumerate(zip(step.queries, step.keys)):
        if not queries or not keys:
            continue
        rows = flat[ends[b] - sizes[b] : ends[b]].reshape(queries, keys)
        count = rows.sum(axis=1)
        first = np.where(count > 0, rows.argmax(axis=1), 0)
        end = np.where(count > 0, keys - rows[:, ::-1].argmax(axis=1), 0)
        offsets[step.starts[b] : step.starts[b + 1]] = np.stack([first, end], axis=1)
        plain &= bool((end - first == count).all())
        # A tree hides keys of queries alone. Those of all its queries it may hide in any case.
        own = max(keys - queries, 0)
        wrong = (np.minimum(end, own) - np.minimum(first, own)) != rows[:, :own].sum(axis=1)
        if keys < queries:
            wrong = end - first != count
        if wrong.any():
            i = int(np.argmax(wrong))
            refuse(
                op,
                "custom_mask",
                f"query {i} of sequence {b} sees more than one interval of the keys before the "
                "queries, or not the last of these beside keys of queries",
            )
        if keys >= queries:
            trees[b, :queries, :queries] = rows[:, own:]
    return offsets, None if plain else trees


def explicit_offsets(step: Step, causal: bool, window_left: int) -> Ints:
    """The whole mask as intervals, for steps in which a sequence has more queries than keys.

    ``paged_attention`` counts keys from the queries on. Such a sequence would see slots after its
    last key, and its queries would have other positions.
    """
    parts = [np.zeros((0, 2), np.int64)]
    for b, (queries, keys) in enumerate(zip(step.queries, step.keys)):
        position = np.arange(queries) + keys - queries
        end = np.minimum(position + 1, keys) if causal else np.full(queries, keys)
        first = np.maximum(position - window_left, 0) if window_left >= 0 else 0 * position
        end = np.maximum(end, 0)
        own = np.stack([np.minimum(first, end), end], axis=1)
        if step.offsets is not None:
            given = step.offsets[step.starts[b] : step.starts[b + 1]]
            own = np.stack(
                [np.maximum(own[:, 0], given[:, 0]), np.minimum(own[:, 1], given[:, 1])], axis=1
            )
        parts.append(own)
    return np.concatenate(parts)


def room_of(pages: int, page_size: int) -> int:
    """Number of blocks of a table that fits any sequence of `pages` pages."""
    return max(pages * (page_size // BLOCK_SIZE), 1)
