"""Attention calls whose rows are of several kinds, for a benchmark on any place."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

import fastattn.functional as F
from fastattn.bench.compat_steps import DIM, HEADS, KV, Call, Place
from fastattn.reference.layout import BLOCK_SIZE

#: Rows, the cached tokens of each, the new tokens of each.
Part = tuple[int, int, int]


def describe(parts: Sequence[Part]) -> str:
    """Name of a step, for a table."""
    texts = (f"{rows} x {new} behind {cached}" for rows, cached, new in parts)
    return f"{' + '.join(texts)}, H {HEADS}/{KV} D {DIM}"


def attention(place: Place, quant: str, fp8_queries: bool, parts: Sequence[Part]) -> Call:
    """One call of paged_attention for the rows of all parts.

    Parameters
    ----------
    quant : str
        ``"none"`` (bfloat16) or ``"cache_fp8"``.
    fp8_queries : bool
        Whether the queries are e4m3 codes, else bfloat16.
    """
    cached, new = (np.repeat([p[i] for p in parts], [p[0] for p in parts]) for i in (1, 2))
    pages = -(-(cached + new) // BLOCK_SIZE)
    blocks, tokens = int(pages.sum()), int(new.sum())
    order = np.random.default_rng(0).permutation(blocks)
    tables = np.full((len(pages), pages.max()), -1)
    tables[np.arange(pages.max()) < pages[:, None]] = order
    shape = (blocks, KV, BLOCK_SIZE, DIM)
    if quant == "none":
        key, value, scales = place.bfloat16(shape), place.bfloat16(shape), {}
    else:
        key, value = place.codes(shape), place.codes((blocks, KV, DIM, BLOCK_SIZE))
        ones = np.ones(KV, np.float32)
        scales = {name: place.array(ones) for name in ("cache_k_scales", "cache_v_scales")}
    return functools.partial(
        F.paged_attention,
        (place.codes if fp8_queries else place.bfloat16)((tokens, HEADS, DIM)),
        key,
        value,
        place.int32(tables),
        place.int32(np.concatenate([[0], np.cumsum(new)])),
        place.int32(cached),
        place.int32(new),
        max_seqlen_q=int(new.max()),
        max_seqlen_k=int((cached + new).max()),
        cache_quant_type=quant,
        out=place.bfloat16((tokens, HEADS, DIM)),
        **scales,
    )
