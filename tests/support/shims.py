"""What another package documents of its attention, in NumPy, and how close a shim has to come."""

from __future__ import annotations

import dataclasses

import numpy as np

from fastattn.reference.attention import dense_attention
from tests.support.bounds import assert_error_ratio, assert_lse
from tests.support.tensors import BF16


def visible_keys(queries, keys, *, causal=False, window=(-1, -1)):
    """Mask [queries, keys] of the packages' words: aligned to the last query and the last key."""
    mask = np.zeros((queries, keys), bool)
    for i in range(queries):
        position = i + keys - queries
        for j in range(keys):
            mask[i, j] = (
                (not causal or j <= position)
                and (window[0] < 0 or j >= position - window[0])
                and (window[1] < 0 or j <= position + window[1])
            )
    return mask


@dataclasses.dataclass
class Sequence:
    """Values of a sequence: q [n, H, D], k and v [m, KV, D], and the mask [n, m]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    visible: np.ndarray


def attend(seqs, precision="float64", *, scale=None, softcap=0.0, sinks=None):
    """Outputs [T, H, D] and natural LSE [H, T] of sequences one after the other."""
    results = [
        dense_attention(
            s.q,
            s.k,
            s.v,
            s.visible,
            softmax_scale=s.q.shape[-1] ** -0.5 if scale is None else scale,
            softcap=softcap,
            sinks=sinks,
            precision=precision,
        )
        for s in seqs
    ]
    return np.concatenate([r[0] for r in results]), np.concatenate([r[1] for r in results], axis=1)


def check(seqs, out, lse, place, dtype=BF16, **options):
    """Hold results to the error-ratio rule. `lse` is natural, [H, T], or None."""
    name = np.dtype(dtype).name
    naive_type = "float32" if place == "cpu" else "bfloat16"  # a GPU multiplies in 16 bits
    exact, exact_lse = attend(seqs, **options)
    naive, naive_lse = attend(seqs, naive_type, **options)
    assert out.dtype == dtype
    assert_error_ratio(out, exact, naive, name)
    if lse is not None:
        assert_lse(lse, exact_lse, naive_lse)


def values(rng, shape, dtype=BF16, mean=0.0):
    """Values whose tokens differ in size, rounded to `dtype`."""
    size = np.exp(rng.normal(0.0, 0.4, (*shape[:-1], 1)))
    return ((rng.normal(0.0, 1.0, shape) + mean) * size).astype(dtype)


def page_tables(rng, lengths, page_size):
    """Page tables [B, n] of sequences with pages in random order, and the number of pages.

    Entries that no sequence needs are -1.
    """
    needed = [-(-int(n) // page_size) for n in lengths]
    count = sum(needed) + 3
    order = rng.permutation(count).tolist()
    tables = np.full((len(needed), max([*needed, 1]) + 1), -1, np.int32)
    for seq, pages in enumerate(needed):
        tables[seq, :pages] = [order.pop() for _ in range(pages)]
    return tables, count


def gather(cache, table, keys):
    """Tokens [keys, KV, D] of a sequence from pages [pages, page_size, KV, D], one by one."""
    page_size = cache.shape[1]
    return np.stack(
        [cache[table[t // page_size], t % page_size] for t in range(keys)]
        or [np.zeros(cache.shape[2:], cache.dtype)]
    )[:keys]


def poison(caches, tables, lengths):
    """NaN in every slot of pages [pages, page_size, KV, D] that no sequence may read."""
    page_size = caches[0].shape[1]
    written = np.zeros(caches[0].shape[:2], bool)
    for table, length in zip(tables, lengths):
        for t in range(int(length)):
            written[table[t // page_size], t % page_size] = True
    for cache in caches:
        cache[~written] = np.nan
