"""The attention layer of DeepSeek-V3.2 and GLM-5."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastattn.functional as F
from tests.support.deepseek.pages import INDEX_132, LATENT_656, Pool
from tests.support.deepseek.select import Selector
from tests.support.deepseek.step import Batch, Step
from tests.support.deepseek.weights import (
    HEADS,
    INDEX_DIM,
    V32Config,
    Weights,
    project_v32,
    rotary_table,
)
from tests.support.tensors import to_numpy, to_paddle


class V32Layer:
    """One layer over its two caches: latents of 656 bytes, index keys of 132.

    Parameters
    ----------
    projected : dict
        Of :func:`project_v32` for the batch.
    heads : slice
        Those of this rank; indexer and caches are the same on every rank.
    seed : int
        Order of the pages.
    options
        Of :class:`Selector`.
    """

    def __init__(
        self,
        config: V32Config,
        weights: Weights,
        batch: Batch,
        projected: dict[str, np.ndarray],
        place: str,
        *,
        heads: slice = slice(0, HEADS),
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.config, self.weights, self.batch, self.place = config, weights, batch, place
        self.heads, self.projected = heads, projected
        self.counts = np.zeros_like(batch.lengths)
        self.table = to_paddle(rotary_table(config), place)
        lengths = batch.lengths.tolist()
        self.latents = Pool(LATENT_656, lengths, place, seed)
        self.index_keys = Pool(INDEX_132, lengths, place, seed + 1)
        self.selector = Selector(config.topk, 1, **options)

    def step(self, new: Any) -> dict[str, np.ndarray]:
        """Attention of the next `new` tokens of each sequence.

        Returns
        -------
        rows
            Of the batch.
        indices
            Tokens that each one attends to, [T, topk].
        attention
            Output of the operator, bfloat16 [T, H, 512].
        """
        step = Step.of(self.batch, self.counts, new, self.place)
        of = self.projected
        self._write(step)
        q, _, weights = F.indexer_q_rope_quant(
            step.ints(step.positions),
            step.tensor(of["index_q"]),
            self.table,
            step.tensor(of["index_w"]),
            INDEX_DIM**-0.5,
            self.config.index_heads**-0.5,
        )
        indices = self.selector(step, self.index_keys, q, weights)
        slots, lengths = F.topk_to_slots(
            indices,
            step.ints(self.latents.tables),
            step.ints(step.seqs),
            block_size=self.latents.format.tokens,
            num_blocks=self.latents.num_pages,
        )
        out = F.mla_sparse_attention(
            step.tensor(of["q"][:, self.heads]),
            self.latents.tensor,
            slots,
            cache_format="fp8_656",
            topk_length=lengths,
            softmax_scale=self.config.softmax_scale,
        )
        self.counts = step.totals
        return {"rows": step.rows, "indices": to_numpy(indices), "attention": to_numpy(out)}

    def _write(self, step: Step) -> None:
        of = self.projected
        for pool in (self.latents, self.index_keys):
            pool.grow(step.totals)
        slots = self.latents.slots(step.seqs, step.positions)
        F.mla_write_cache(
            step.tensor(of["latent"]),
            step.tensor(of["rope"]),
            self.latents.tensor,
            step.longs(slots),
            cache_format="fp8_656",
        )
        slots = self.index_keys.slots(step.seqs, step.positions)
        F.indexer_k_write_cache(
            step.tensor(of["index_k"]), self.index_keys.tensor, step.longs(slots)
        )

    def output(self, results: dict[str, np.ndarray]) -> np.ndarray:
        """Of the layer, this rank's share, fp64 [T, 256]: values of each head, and W_o."""
        by_head = results["attention"].astype(np.float64).transpose(1, 0, 2)
        columns = self.weights["o"].reshape(HEADS, self.config.v_dim, -1)[self.heads]
        return (by_head @ self.weights["uv"][self.heads] @ columns).sum(axis=0)

    def dense(self) -> np.ndarray:
        """`mla_attention` of all tokens up to now over the same cache, bfloat16 [sum, H, 512]."""
        step = Step.of(self.batch, np.zeros_like(self.counts), self.counts, self.place)
        out = F.mla_attention(
            step.tensor(self.projected["q"][:, self.heads]),
            self.latents.tensor,
            step.ints(self.latents.tables),
            step.ints(step.starts),
            step.ints(np.zeros_like(step.new)),
            step.ints(step.new),
            int(step.new.max()),
            int(step.totals.max()),
            cache_format="fp8_656",
            softmax_scale=self.config.softmax_scale,
        )
        return to_numpy(out)

    def caches(self) -> dict[str, tuple[Pool, np.ndarray]]:
        """Caches, and how many tokens of each sequence they have."""
        return {"latents": (self.latents, self.counts), "index": (self.index_keys, self.counts)}


def make_v32(config: V32Config, weights: Weights, batch: Batch, x: np.ndarray) -> dict[str, Any]:
    """Arguments that all layers over one batch share."""
    projected = project_v32(config, weights, x, batch.positions)
    return {"config": config, "weights": weights, "batch": batch, "projected": projected}
