"""The indexer's logits and top-k of a step."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastattn.functional as F
from tests.support.deepseek.pages import Pool
from tests.support.deepseek.step import Step
from tests.support.deepseek.weights import INDEX_DIM
from tests.support.tensors import to_numpy, to_paddle

#: A step of no more tokens a sequence is decoding: its logits read keys in their pages.
MOST_DRAFTS = 2


class Selector:
    """Chooses entries of each token's own sequence.

    Parameters
    ----------
    ratio : int
        Tokens of an entry.
    form : {"auto", "gathered", "paged"}
        Where logits read keys: "auto" is a server's, pages for decoding and a gather for all else.
    fused : bool
        Logits and top-k in one call.
    short : bool
        Without logits where every context has at most `topk` entries.
    """

    def __init__(
        self, topk: int, ratio: int, form: str = "auto", fused: bool = False, short: bool = True
    ) -> None:
        self.topk, self.ratio, self.form = topk, ratio, form
        self.fused, self.short = fused, short

    def __call__(self, step: Step, pool: Pool, q: Any, weights: Any) -> Any:
        """Entries [T, topk], ascending, on the device; -1 behind the last.

        q is the codes [T, H, 128] of :func:`indexer_q_rope_quant`, weights [T, H] what it returns.
        """
        entries = (step.positions + 1) // self.ratio
        if self.short and entries.max(initial=0) <= self.topk:
            return F.short_context_indices(
                step.longs(step.positions), self.topk, compress_ratio=self.ratio
            )[0]
        drafts = step.new.max(initial=0)
        paged = drafts <= MOST_DRAFTS if self.form == "auto" else self.form == "paged"
        choose = self._paged if paged else self._gathered
        return choose(step, pool, q, weights, entries)

    def _gathered(self, step: Step, pool: Pool, q: Any, weights: Any, entries: np.ndarray) -> Any:
        cu = np.concatenate([[0], np.cumsum(step.totals // self.ratio)])
        keys, scales = F.indexer_k_gather(
            pool.tensor,
            step.ints(pool.tables),
            step.ints(cu),
            max(1, int(cu[-1])),
            page_size=pool.format.tokens,
        )
        starts, lengths = step.ints(cu[step.seqs]), step.ints(entries)
        inputs = q, keys, weights, starts, step.ints(cu[step.seqs] + entries)
        longest = max(1, int(entries.max(initial=0)))
        if self.fused:
            return F.indexer_topk(*inputs, self.topk, k_scales=scales, max_seqlen_k=longest)
        logits = F.mqa_logits(*inputs, k_scales=scales, max_seqlen_k=longest)
        return F.topk_indices(logits, lengths, self.topk)

    def _paged(self, step: Step, pool: Pool, q: Any, weights: Any, entries: np.ndarray) -> Any:
        """Each sequence has as many rows as the one with most; those without a token see nothing.

        Rows are moved on the host: a GPU that Paddle has no kernels for runs these layers, too.
        """
        seqs, new = len(step.new), int(step.new.max())
        rows = step.seqs * new + np.arange(len(step.seqs)) - step.starts[step.seqs]

        def spread(array: np.ndarray) -> np.ndarray:
            made = np.zeros((seqs * new, *array.shape[1:]), array.dtype)
            made[rows] = array
            return made

        codes = to_paddle(spread(to_numpy(q)).reshape(seqs, new, -1, INDEX_DIM), step.place)
        lengths = spread(entries)
        longest = max(1, int(entries.max(initial=0)))
        inputs = (
            codes,
            pool.tensor,
            to_paddle(spread(to_numpy(weights)), step.place),
            step.ints(lengths.reshape(seqs, new)),
            step.ints(pool.tables),
            longest,
        )
        options = {"page_size": pool.format.tokens}
        if self.fused:
            chosen = F.paged_indexer_topk(*inputs, self.topk, **options)
        else:
            logits = F.paged_mqa_logits(*inputs, **options)
            chosen = F.topk_indices(logits, step.ints(lengths), self.topk)
        return to_paddle(to_numpy(chosen)[rows], step.place)
