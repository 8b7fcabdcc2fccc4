"""NumPy model of the indexer's selection of keys: logits in fp64, then their top-k."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn.reference.mqa_logits import mqa_logits, paged_mqa_logits
from fastattn.reference.topk import topk_indices


def indexer_topk(
    q: ArrayLike,
    keys: ArrayLike,
    weights: ArrayLike,
    starts: ArrayLike,
    ends: ArrayLike,
    k: int,
    **options: Any,
) -> NDArray[np.int32]:
    """See :func:`fastattn.functional.indexer_topk`; :func:`mqa_logits` takes the `options`."""
    count = len(np.asarray(keys))
    first = np.clip(np.asarray(starts, np.int64), 0, count)
    last = np.clip(np.asarray(ends, np.int64), first, count)
    logits = mqa_logits(q, keys, weights, starts, ends, **options)
    relative = options.get("max_seqlen_k") is not None
    return topk_indices(logits, last - first, k, starts=None if relative else first)


def paged_indexer_topk(
    q: ArrayLike,
    cache: ArrayLike,
    weights: ArrayLike,
    context_lens: ArrayLike,
    block_tables: ArrayLike,
    max_context_len: int,
    k: int,
    **options: Any,
) -> NDArray[np.int32]:
    """See :func:`fastattn.functional.paged_indexer_topk`; the logits take the `options`."""
    lengths, next_n = np.asarray(context_lens, np.int64), np.asarray(q).shape[1]
    if lengths.ndim == 1:
        lengths = lengths[:, None] - next_n + 1 + np.arange(next_n)
    logits = paged_mqa_logits(
        q, cache, weights, context_lens, block_tables, max_context_len, **options
    )
    return topk_indices(logits, lengths.ravel(), k)
