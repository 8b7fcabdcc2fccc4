"""Steps of FlashInfer's wrappers: page tables, caches and what must come out."""

from __future__ import annotations

import numpy as np

from tests.support.shims import Sequence, gather, poison, values, visible_keys
from tests.support.tensors import int32, to_numpy, to_paddle

FP16 = np.dtype(np.float16)
H, KV, D = 4, 2, 64


def workspace(place):
    return to_paddle(np.zeros(16, np.uint8), place)


class Step:
    """Sequences of (queries, keys) in pages of a compressed table."""

    def __init__(self, seqs, *, page_size=64, dtype=FP16, heads=(H, KV), dim=D, seed=0):
        rng = np.random.default_rng(seed)
        self.dtype, self.page_size, self.dim = dtype, page_size, dim
        self.heads, self.kv = heads
        self.queries, self.keys = (np.array(x, np.int32) for x in zip(*seqs))
        self.starts = np.concatenate([[0], np.cumsum(self.queries)]).astype(np.int32)
        pages = -(-self.keys // page_size)
        self.indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
        count = int(pages.sum()) + 2
        self.indices = rng.permutation(count)[: pages.sum()].astype(np.int32)
        self.last = np.where(pages > 0, self.keys - (pages - 1) * page_size, 0).astype(np.int32)
        self.q = values(rng, (self.starts[-1], self.heads, dim), dtype)
        shape = (count, page_size, self.kv, dim)
        self.k, self.v = values(rng, shape, dtype), values(rng, shape, dtype, mean=0.7)
        poison((self.k, self.v), self.tables(), self.keys)

    def tables(self):
        return [self.indices[a:b] for a, b in zip(self.indptr, self.indptr[1:])]

    def sequences(self, *, causal=False, window_left=-1, masks=None):
        found = []
        for b, keys in enumerate(self.keys):
            mask = visible_keys(self.queries[b], keys, causal=causal, window=(window_left, -1))
            if masks is not None:
                mask &= masks[b]
            q = self.q[self.starts[b] : self.starts[b + 1]].astype(np.float64)
            if not keys:  # a key that nobody sees
                none = np.zeros((1, self.kv, self.dim))
                found.append(Sequence(q, none, none, np.zeros((len(q), 1), bool)))
                continue
            k, v = (gather(x, self.tables()[b], keys).astype(np.float64) for x in (self.k, self.v))
            found.append(Sequence(q, k, v, mask))
        return found

    def cache(self, place, kv_layout="NHD", pool=True):
        axes = (0, 1, 2, 3) if kv_layout == "NHD" else (0, 2, 1, 3)
        k, v = (x.transpose(axes) for x in (self.k, self.v))
        if pool:
            return to_paddle(np.stack([k, v], 1), place)
        return to_paddle(k, place), to_paddle(v, place)

    def pages(self, place="cpu"):
        return [int32(x, place) for x in (self.indptr, self.indices, self.last)]

    def sizes(self):
        return self.heads, self.kv, self.dim, self.page_size


def natural(lse):
    """FlashInfer's LSE [T, H], base 2, as [H, T], base e."""
    return (to_numpy(lse).astype(np.float64) * np.log(2)).T.astype(np.float32)


DECODE = [(1, n) for n in (129, 71, 64, 4, 200, 1, 128)]

PREFILL = [(33, 100), (11, 64), (1, 129), (11, 11), (44, 190)]
