"""Problems of sparse_paged_attention: paged problems with a list of keys for each query.

Lists have holes, entries past the query and past every sequence, and, beyond their lengths, garbage
that names keys which the query must not see.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.sparse_attention import selected_mask
from tests.support.attention import PagedProblem, paged_problem
from tests.support.tensors import int32, to_numpy

#: Entries that stand for no key of any sequence here.
_NOWHERE = (-1, -(2**31), 2**31 - 1, 2**24, -7)


@dataclasses.dataclass
class SparseProblem(PagedProblem):
    selected: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 1, 0), np.int32))
    selected_lens: np.ndarray | None = None
    granularity: int = 1
    window: int = 0
    sink_tokens: int = 0

    def lists(self) -> dict[str, Any]:
        """Arguments that tell which keys the queries see, but for `selected`."""
        return {
            "granularity": self.granularity,
            "window": self.window,
            "sink_tokens": self.sink_tokens,
        }

    def multiplies_fp8(self) -> bool:
        return False

    def run(self, place: str = "cpu", **extra):
        positional, keywords = self.arguments(place)
        if self.selected_lens is not None:
            keywords["selected_lens"] = int32(self.selected_lens, place)
        positional.append(int32(self.selected, place))
        keywords.update({**self.lists(), **extra})
        out, lse = F.sparse_paged_attention(*positional, return_softmax_lse=True, **keywords)
        return to_numpy(out), to_numpy(lse)

    def reference(self, precision: str = "float64", **extra):
        return reference.sparse_paged_attention(
            self.q,
            self.k.packed(),
            self.v.packed(),
            self.block_tables,
            self.cu_seqlens_q,
            self.seq_lens_decoder,
            self.seq_lens_this_time,
            self.selected,
            selected_lens=self.selected_lens,
            cache_k_scales=self.k.scales,
            cache_v_scales=self.v.scales,
            q_descale=self.q_descale,
            precision=precision,
            **{**self.lists(), **self.cache_options(), **self.options, **extra},
        )

    def queries(self) -> list[tuple[int, int, int]]:
        """(token, sequence, position) of the queries."""
        found = []
        for seq, (first, new) in enumerate(zip(self.cu_seqlens_q, self.seq_lens_this_time)):
            cached = int(self.seq_lens_decoder[seq])
            found += [(int(first) + i, seq, cached + i) for i in range(int(new))]
        return found

    def seen(self, token: int, group: int, position: int) -> np.ndarray:
        """Mask [position + 1] of the keys that a query sees."""
        count = self.selected.shape[2]
        if self.selected_lens is not None:
            count = int(np.clip(self.selected_lens[token, group], 0, count))
        return selected_mask(
            self.selected[token, group, :count],
            position,
            self.granularity,
            window=self.window,
            sink_tokens=self.sink_tokens,
        )

    def poison_unseen(self) -> int:
        """NaN in every K and V that no query sees; returns their number."""
        groups = self.selected.shape[1]
        kv = self.k.elements.shape[1]
        seen = np.zeros((*self.k.elements.shape[:2], 64), bool)
        for token, seq, position in self.queries():
            keys = np.arange(position + 1)
            blocks, rows = self.block_tables[seq, keys // 64], keys % 64
            for head in range(kv):
                mask = self.seen(token, head if groups > 1 else 0, position)
                seen[blocks[mask], head, rows[mask]] = True
        hidden = np.argwhere(~seen)
        for stored in (self.k, self.v):
            stored.poison((hidden[:, 0], hidden[:, 1], hidden[:, 2]))
        return len(hidden)


def draw_list(rng, position: int, granularity: int, width: int, length: int) -> np.ndarray:
    """A list of `width` entries, `length` of which count."""
    known = position // granularity + 1
    chosen = rng.permutation(known)[: max(length - 2, 1)]
    beyond = known + rng.permutation(50)[:1]  # past the query, maybe not past the sequence
    filled = np.concatenate([chosen, beyond, rng.permutation(_NOWHERE)])[:length]
    entries = np.full(width, -3, np.int64)
    entries[:length] = np.concatenate([filled, np.full(length - len(filled), -1)])
    entries[:length] = rng.permutation(entries[:length])
    # What nobody reads names real keys, some of them a second time.
    entries[length:] = rng.integers(0, known, width - length)
    return entries.astype(np.int32)


def sparse_problem(
    seqs,
    *,
    granularity: int = 1,
    groups: int = 1,
    width: int = 40,
    window: int = 0,
    sink_tokens: int = 0,
    lens: bool = True,
    seed: int = 0,
    **options: Any,
) -> SparseProblem:
    """A problem of :func:`tests.support.attention.paged_problem` with lists of random keys."""
    paged = paged_problem(seqs, seed=seed, **options)
    rng = np.random.default_rng(1000 + seed)
    shape = (len(paged.q), groups)
    lengths = rng.integers(0, width + 1, shape) if lens else np.full(shape, width)
    entries = rng.integers(-5, 10**9, (*shape, width)).astype(np.int32)  # of padding
    problem = SparseProblem(
        **{field.name: getattr(paged, field.name) for field in dataclasses.fields(paged)},
        selected=entries,
        granularity=granularity,
        window=window,
        sink_tokens=sink_tokens,
    )
    for token, _, position in problem.queries():
        for group in range(groups):
            length = int(lengths[token, group])
            entries[token, group] = draw_list(rng, position, granularity, width, length)
    if lens:
        # Lengths out of range count as the nearest.
        lengths = np.where((lengths == width) & (rng.random(shape) < 0.5), 10**9, lengths)
        lengths = np.where((lengths == 0) & (rng.random(shape) < 0.5), -5, lengths)
        problem.selected_lens = lengths.astype(np.int32)
    return problem
