"""Selection of the largest logits of a row, by one total order."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified

#: Upper limit of k.
MAX_K = 4096


@unified
def topk_indices(
    logits: Tensor,
    lengths: Tensor,
    k: int,
    *,
    starts: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Indices of the k largest logits of each row, in ascending order of index.

    One total order decides: the larger value first, then the smaller index. -0 equals +0, and NaN
    is below every number. So the result has the same bits on a CPU and a GPU, in every run and on
    every rank, however many values are equal.

    Parameters
    ----------
    logits : Tensor, shape [rows, columns], float32
        Any row stride; at most 2^30 columns.
    lengths : Tensor, shape [rows], int32
        Number of columns in each row's range, ``[start, start + length)``. Clamped to the row.
    k : int
        1 to 4096.
    starts : Tensor, shape [rows], int32, optional
        First column of each range. Default: 0. It is clamped to the row; the length does not
        change.
    out : Tensor, shape [rows, k], int32, contiguous, optional
        Written in place and returned.

    Returns
    -------
    Tensor, shape [rows, k], int32
        Columns relative to the (clamped) start. A range with fewer than k columns ends in -1.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or `k` is not an integer.
    ValueError
        If shapes do not match, `k` is out of range, or `out` shares memory with an input.

    See Also
    --------
    fastattn.reference.topk_indices : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import topk_indices
    >>> logits = paddle.to_tensor([[0.5, 2.0, 0.0, 2.0, 1.0]])
    >>> topk_indices(logits, paddle.to_tensor([5], "int32"), 3).tolist()
    [[1, 3, 4]]
    """
    if type(k) is not int:
        raise TypeError(f"topk_indices: k: expected int, got {type(k).__name__}")
    if not 1 <= k <= MAX_K:  # a traced program needs the shape before the operator runs
        raise ValueError(f"topk_indices: k: expected 1 to {MAX_K}, got {k}")
    # `indices` shares its memory with a given `out`.
    indices, _ = _ops.call("topk_indices", (logits, lengths, starts, out), (k,))
    return indices
