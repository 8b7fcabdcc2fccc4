"""The attention layer of DeepSeek-V4: a window of raw tokens beside compressed ones."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastattn.functional as F
from tests.support.deepseek.pages import (
    COMPRESSED_584,
    INDEX_132_PADDED,
    WINDOW_584,
    Pool,
    state_format,
)
from tests.support.deepseek.select import MOST_DRAFTS, Selector
from tests.support.deepseek.step import Batch, Step
from tests.support.deepseek.weights import (
    HEADS,
    INDEX_DIM,
    LATENT,
    V4Config,
    Weights,
    project_v4,
    rotary_table,
)
from tests.support.tensors import BF16, E4M3, to_numpy, to_paddle

#: Entries that a token of a 1 : 128 layer may see: more than prompts here have.
MOST_ENTRIES = 64


class Compressor:
    """Groups of tokens to entries of a cache, by way of states.

    A state lives as long as a group that is not complete may need it: groups of 4 overlap, and need
    the group before; those of 128 do not. All other pages of states are given back.
    """

    def __init__(
        self, name: str, ratio: int, quant: str, entries: Pool, weights: Weights, seed: int
    ) -> None:
        self.name, self.ratio, self.quant, self.entries = name, ratio, quant, entries
        self.place = entries.place
        head = len(weights[f"{name}_norm"])
        self.ape = to_paddle(weights[f"{name}_ape"], self.place)
        self.norm = to_paddle(weights[f"{name}_norm"], self.place)
        self.head, self.seed = head, seed
        self.states: Pool | None = None

    def start(self, lengths: list[int]) -> None:
        """Pages for states of sequences of these lengths."""
        fmt = state_format(self.ratio, self.head)
        self.states = Pool(fmt, lengths, self.place, self.seed)

    def write(self, step: Step, kv_score: np.ndarray, table: Any) -> None:
        """Store the tokens' states, and the entries of the groups that they complete."""
        states, entries = self.states, self.entries
        assert states is not None
        states.grow(step.totals)
        entries.grow(step.totals // self.ratio)
        positions = step.longs(step.positions)
        slots = step.longs(states.slots(step.seqs, step.positions))
        F.save_partial_states(step.tensor(kv_score), self.ape, positions, states.tensor, slots)
        # Every token names the slot of its group's entry; only the last one of a group writes it.
        F.indexer_kv_compress_insert(
            states.tensor,
            step.ints(states.tables),
            step.ints(step.seqs),
            positions,
            slots,
            step.longs(entries.slots(step.seqs, step.positions // self.ratio)),
            self.norm,
            table,
            entries.tensor,
            compress_ratio=self.ratio,
            page_size=entries.format.tokens,
            quant=self.quant,
        )

    def release(self, totals: np.ndarray) -> None:
        """Give back the states that no group to come has."""
        assert self.states is not None
        group = totals // self.ratio - (1 if self.ratio == 4 else 0)
        self.states.release(group * self.ratio)


class V4Layer:
    """One layer over its caches; parameters as for :class:`V32Layer`.

    workspace : bool
        Steps that are not decoding gather what they see into bf16 rows first, of all sequences in
        one tensor, instead of reading both caches.
    """

    def __init__(
        self,
        config: V4Config,
        weights: Weights,
        batch: Batch,
        projected: dict[str, np.ndarray],
        place: str,
        *,
        heads: slice = slice(0, HEADS),
        seed: int = 0,
        workspace: bool = False,
        **options: Any,
    ) -> None:
        self.workspace = workspace
        self.config, self.weights, self.batch, self.place = config, weights, batch, place
        self.heads, self.projected = heads, projected
        self.counts = np.zeros_like(batch.lengths)
        self.table = to_paddle(rotary_table(config), place)
        self.sinks = to_paddle(weights["sinks"][heads], place)
        lengths = batch.lengths.tolist()
        self.window = Pool(WINDOW_584, lengths, place, seed)
        self.compressors: list[Compressor] = []
        ratio = config.ratio
        if ratio:
            entries = [n // ratio for n in lengths]
            self.latents = Pool(COMPRESSED_584[ratio], entries, place, seed + 1)
            self._compressor("latent", "fp8_512", self.latents, lengths, seed + 2)
        if ratio == 4:
            self.index_keys = Pool(INDEX_132_PADDED, entries, place, seed + 3)
            self._compressor("index", "fp8", self.index_keys, lengths, seed + 4)
            self.selector = Selector(config.topk, ratio, **options)

    def _compressor(
        self, name: str, quant: str, entries: Pool, lengths: list[int], seed: int
    ) -> None:
        made = Compressor(name, self.config.ratio, quant, entries, self.weights, seed)
        made.start(lengths)
        self.compressors.append(made)

    def step(self, new: Any) -> dict[str, np.ndarray]:
        """Attention of the next `new` tokens of each sequence.

        Returns
        -------
        rows, indices, attention
            As for :class:`V32Layer`; indices are of compressed entries.
        codes, scales
            Of :func:`inverse_rope_quantize_fp8`, [T, G, D] and [T, G, D / 128].
        """
        step = Step.of(self.batch, self.counts, new, self.place)
        q = self._write(step)
        indices = self._select(step)
        gathers = self.workspace and step.new.max() > MOST_DRAFTS
        out = (self._attend_workspace if gathers else self._attend)(step, q, indices)
        groups = self._groups()
        codes, scales = F.inverse_rope_quantize_fp8(
            out, step.longs(step.positions), self.table, num_groups=groups
        )
        self.counts = step.totals
        self._release(step.totals)
        token_codes = to_numpy(codes).transpose(1, 0, 2)
        token_scales = to_numpy(scales)[:, :, : len(step.rows)].transpose(2, 0, 1)
        made = {
            "rows": step.rows,
            "attention": to_numpy(out),
            "codes": token_codes,
            "scales": token_scales,
        }
        return made if indices is None else {**made, "indices": to_numpy(indices)}

    def _write(self, step: Step) -> Any:
        """Everything that the tokens leave in caches; their queries."""
        of = self.projected
        self.window.grow(step.totals)
        q = F.mla_qkv_norm_rope_write(
            step.tensor(of["q"][:, self.heads]),
            step.tensor(of["kv"]),
            self.window.tensor,
            step.longs(self.window.slots(step.seqs, step.positions)),
            step.longs(step.positions),
            self.table,
            page_size=self.window.format.tokens,
        )
        for compressor in self.compressors:
            compressor.write(step, of[f"{compressor.name}_kv_score"], self.table)
        return q

    def _select(self, step: Step) -> Any:
        """Compressed entries that each token sees; None in a layer without any."""
        if self.config.ratio == 0:
            return None
        if self.config.ratio == 128:
            positions = step.longs(step.positions)
            return F.short_context_indices(positions, MOST_ENTRIES, compress_ratio=128)[0]
        of = self.projected
        q, _, weights = F.indexer_q_rope_quant(
            step.longs(step.positions),
            step.tensor(of["index_q"]),
            self.table,
            step.tensor(of["index_w"]),
            INDEX_DIM**-0.5,
            self.config.index_heads**-0.5,
        )
        return self.selector(step, self.index_keys, q, weights)

    def _attend(self, step: Step, q: Any, indices: Any) -> Any:
        """One softmax over the window and the compressed entries."""
        seqs = step.ints(step.seqs)
        window, window_lengths = F.window_indices(
            step.longs(step.positions),
            seqs,
            window=self.config.window,
            block_tables=step.ints(self.window.tables),
            block_size=self.window.format.tokens,
            num_blocks=self.window.num_pages,
        )
        extra: dict[str, Any] = {}
        if indices is not None:
            slots, lengths = F.topk_to_slots(
                indices,
                step.ints(self.latents.tables),
                seqs,
                block_size=self.latents.format.tokens,
                num_blocks=self.latents.num_pages,
            )
            extra = {
                "extra_cache": self.latents.tensor,
                "extra_indices": slots,
                "extra_topk_length": lengths,
                "extra_page_size": self.latents.format.tokens,
            }
        return F.mla_sparse_attention(
            q,
            self.window.tensor,
            window,
            cache_format="fp8_584",
            topk_length=window_lengths,
            page_size=self.window.format.tokens,
            sinks=self.sinks,
            softmax_scale=self.config.softmax_scale,
            **extra,
        )

    def _attend_workspace(self, step: Step, q: Any, indices: Any) -> Any:
        """The same over gathered rows: a sequence's entries, then its tokens of the window.

        Those begin with a page, so that a part of the block table finds them.
        """
        fmt, seqs = self.window.format, step.ints(step.seqs)
        entries = step.totals // self.config.ratio if self.config.ratio else 0 * step.totals
        earliest = np.maximum(step.totals - step.new - self.config.window + 1, 0)
        starts = earliest // fmt.tokens * fmt.tokens
        offset = int(entries.max())
        stride = offset + int((step.totals - starts).max())
        firsts = np.arange(len(step.new) + 1) * stride
        rows = to_paddle(np.full((int(firsts[-1]), LATENT), np.nan, BF16), self.place)
        if indices is not None:
            self._gather(step, self.latents, self.latents.tables, entries, firsts, rows)
        tables = np.full_like(self.window.tables, -1)
        for own, table, page in zip(tables, self.window.tables, starts // fmt.tokens):
            own[: len(table) - page] = table[page:]
        self._gather(step, self.window, tables, step.totals - starts, firsts + offset, rows)
        window, window_lengths = F.window_indices(
            step.longs(step.positions),
            seqs,
            window=self.config.window,
            starts=step.ints(starts),
        )
        if indices is None:
            indices = step.ints(np.full((len(step.rows), 1), -1))
        combined, lengths = F.combine_topk_window(
            indices,
            window,
            seqs,
            window_lengths=window_lengths,
            seq_stride=stride,
            window_offset=offset,
        )
        return F.mla_sparse_attention(
            q,
            rows,
            combined,
            cache_format="bf16",
            topk_length=lengths,
            page_size=1,
            sinks=self.sinks,
            softmax_scale=self.config.softmax_scale,
        )

    def _gather(
        self, step: Step, pool: Pool, tables: Any, lengths: Any, firsts: Any, rows: Any
    ) -> None:
        F.mla_gather_cache(
            pool.tensor,
            rows,
            step.ints(tables),
            step.ints(lengths),
            step.ints(firsts),
            cache_format="fp8_584",
            page_size=pool.format.tokens,
        )

    def _release(self, totals: np.ndarray) -> None:
        self.window.release(totals - self.config.window + 1)
        for compressor in self.compressors:
            compressor.release(totals)

    def _groups(self) -> int:
        """Output groups that this rank's heads are."""
        heads = self.heads.stop - self.heads.start
        return heads * self.config.groups // HEADS

    def output(self, results: dict[str, np.ndarray]) -> np.ndarray:
        """Of the layer, this rank's share, fp64 [T, 256]: products with wo_a by group, and wo_b."""
        values = output_values(results["codes"], results["scales"])
        first = self.heads.start * self.config.groups // HEADS
        own = slice(first, first + self._groups())
        mixed = values.transpose(1, 0, 2) @ self.weights["wo_a"][own]
        columns = self.weights["wo_b"].reshape(self.config.groups, self.config.o_lora, -1)[own]
        return (mixed @ columns).sum(axis=0)

    def caches(self) -> dict[str, tuple[Pool, np.ndarray]]:
        """Caches, and how many tokens or entries of each sequence they have."""
        made = {"window": (self.window, self.counts)}
        for compressor in self.compressors:
            assert compressor.states is not None
            name = compressor.name
            made[name] = (compressor.entries, self.counts // self.config.ratio)
            made[f"{name} states"] = (compressor.states, self.counts)
        return made


def output_values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What e4m3 codes [T, G, D] and scales [T, G, D / 128] stand for."""
    values = codes.view(E4M3).astype(np.float64)
    return values * scales.astype(np.float64).repeat(128, axis=-1)


def make_v4(config: V4Config, weights: Weights, batch: Batch, x: np.ndarray) -> dict[str, Any]:
    """Arguments that all layers over one batch share."""
    projected = project_v4(config, weights, x)
    assert projected["kv"].shape[-1] == LATENT
    return {"config": config, "weights": weights, "batch": batch, "projected": projected}
