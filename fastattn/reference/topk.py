"""NumPy model of the selection of logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def topk_indices(
    logits: ArrayLike, lengths: ArrayLike, k: int, *, starts: ArrayLike | None = None
) -> NDArray[np.int32]:
    """Indices of the k largest logits of each row: by value, then by index; ascending, then -1.

    Parameters
    ----------
    logits : array_like of float32, shape [rows, columns]
    lengths, starts : array_like of int, shape [rows]
        Ranges, clamped to the row.
    k : int

    Returns
    -------
    array of int32, shape [rows, k]
        Relative to the start of the row's range.
    """
    values = np.asarray(logits, np.float32)
    rows, columns = values.shape
    first = np.clip(np.zeros(rows, np.int64) if starts is None else np.asarray(starts), 0, columns)
    sizes = np.clip(np.asarray(lengths), 0, columns - first)
    out = np.full((rows, k), -1, np.int32)
    for row, (begin, size) in enumerate(zip(first.tolist(), sizes.tolist())):
        part: NDArray[Any] = values[row, begin : begin + size]
        # The last sort key counts first. -x sorts -0 and +0 alike, and NaN is after every number.
        order = np.lexsort((np.arange(size), -part, np.isnan(part)))
        chosen = np.sort(order[:k])
        out[row, : len(chosen)] = chosen
    return out
