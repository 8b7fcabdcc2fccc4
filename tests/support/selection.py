"""Problems of update_block_summaries and select_key_blocks over ragged paged caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.block_selection import summary_shape
from tests.support.attention import CacheKind, PagedProblem, paged_problem
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, int32, to_numpy, to_paddle


@dataclasses.dataclass
class SelectionProblem(PagedProblem):
    """A paged problem with summaries of its keys."""

    granularity: int = 64
    kind_of_summary: str = "mean"
    weights: np.ndarray | None = None
    stored: Any = np.float32

    def start(self) -> np.ndarray:
        """Summaries that nobody wrote: NaN."""
        blocks, kv, _, dim = self.k.elements.shape
        shape = summary_shape(blocks, kv, dim, self.granularity, self.kind_of_summary)
        return np.full(shape, np.nan, self.stored)

    def transform(self) -> dict[str, Any]:
        return {n: self.options[n] for n in ("k_rotation", "k_center") if n in self.options}

    def seqs(self) -> list[np.ndarray]:
        return [
            self.block_tables,
            self.cu_seqlens_q,
            self.seq_lens_decoder,
            self.seq_lens_this_time,
        ]

    def update(self, summaries: np.ndarray, place: str = "cpu", seqs=None, **extra) -> np.ndarray:
        """The operator's summaries, as a new array."""
        tensor = to_paddle(summaries.copy(), place)
        options = {
            name: to_paddle(value, place) if isinstance(value, np.ndarray) else value
            for name, value in {
                "pool_weights": self.weights,
                "cache_k_scales": self.k.scales,
                "cache_v_scales": self.v.scales,
                **self.transform(),
            }.items()
        }
        returned = F.update_block_summaries(
            tensor,
            to_paddle(self.k.packed(), place),
            to_paddle(self.v.packed(), place),
            *(int32(x, place) for x in (self.seqs() if seqs is None else seqs)),
            granularity=self.granularity,
            kind=self.kind_of_summary,
            **self.cache_options(),
            **{**options, **extra},
        )
        assert_same_bits(to_numpy(returned), to_numpy(tensor), "returned")
        return to_numpy(tensor)

    def model_of_update(self, summaries: np.ndarray, seqs=None) -> np.ndarray:
        return reference.update_block_summaries(
            summaries,
            self.k.packed(),
            *(self.seqs() if seqs is None else seqs),
            granularity=self.granularity,
            kind=self.kind_of_summary,
            pool_weights=self.weights,
            cache_k_scales=self.k.scales,
            **self.cache_options(),
            **self.transform(),
        )

    def all_tokens(self) -> list[np.ndarray]:
        """The step in which all keys are new."""
        keys = np.maximum(self.seq_lens_decoder, 0) + np.maximum(self.seq_lens_this_time, 0)
        starts = np.concatenate([[0], np.cumsum(keys)]).astype(np.int32)
        return [self.block_tables, starts, np.zeros_like(keys), keys]

    def whole(self, place: str = "cpu") -> np.ndarray:
        """Summaries of all keys."""
        return self.update(self.start(), place, self.all_tokens())

    def select(self, summaries: np.ndarray, k: int, place: str = "cpu", **options) -> np.ndarray:
        return to_numpy(
            F.select_key_blocks(
                to_paddle(self.q, place),
                to_paddle(summaries, place),
                *(int32(x, place) for x in self.seqs()),
                k,
                granularity=self.granularity,
                kind=self.kind_of_summary,
                q_descale=None if self.q_descale is None else to_paddle(self.q_descale, place),
                **options,
            )
        )

    def model_of_select(self, summaries: np.ndarray, k: int, **options) -> np.ndarray:
        return reference.select_key_blocks(
            self.q,
            summaries,
            *self.seqs(),
            k,
            granularity=self.granularity,
            kind=self.kind_of_summary,
            q_descale=self.q_descale,
            **options,
        )


def selection_problem(
    seqs,
    *,
    granularity: int = 64,
    summary: str = "mean",
    stored: str = "float32",
    seed: int = 0,
    **options: Any,
) -> SelectionProblem:
    """A problem of :func:`tests.support.attention.paged_problem` with summaries."""
    paged = paged_problem(seqs, seed=seed, **options)
    problem = SelectionProblem(
        **{field.name: getattr(paged, field.name) for field in dataclasses.fields(paged)},
        granularity=granularity,
        kind_of_summary=summary,
        stored={"float32": np.float32, "bfloat16": BF16}[stored],
    )
    if summary == "pooled":
        shape = (paged.k.elements.shape[1], granularity, paged.k.elements.shape[3])
        rng = np.random.default_rng(100 + seed)
        problem.weights = rng.normal(0.3, 1.0, shape).astype(np.float32)
    return problem


__all__ = ["CacheKind", "SelectionProblem", "selection_problem"]
