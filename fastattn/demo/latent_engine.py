"""Serving of the latent model, with 656-byte caches and keys that an indexer selects per query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import paddle

import fastattn.functional as F
from fastattn.backends.config import BLOCK_SIZE
from fastattn.demo.engine import Server
from fastattn.demo.latent_model import (
    INDEX_DIM,
    LATENT_DIM,
    ROPE_DIM,
    AttentionInputs,
    LatentModel,
    cos_sin_table,
)
from fastattn.demo.model import to_bfloat16
from fastattn.demo.scheduler import ScheduledTokens
from fastattn.reference.numerics import Array

_INDEX_KEY_BYTES = 132


@dataclass(frozen=True)
class Attention:
    """The keys that a query sees, and the format of the latent cache.

    Attributes
    ----------
    keys : {"dense", "window", "sparse"}
        All keys up to the query, the last keys, or the last keys and keys that the indexer selects.
    cache_format : {"bf16", "fp8_656"}
    window, topk : int
        Number of last keys, and of keys before them that the indexer selects.
    """

    keys: str
    cache_format: str
    window: int = 0
    topk: int = 0


class _Group(NamedTuple):
    """Tokens of a step that one call scores: of decoding sequences, or of chunks."""

    tokens: slice
    decodes: bool
    positions: Any  # int64 [T]
    batch_ids: Any  # int32 [T]
    block_tables: Any  # int32 [B, max_blocks]
    before_window: Any  # int32 [T]: number of keys before the window
    starts: Any  # int32 [T]: first gathered key of the token's sequence
    ends: Any  # int32 [T]
    cu_seqlens_k: Any  # int32 [B + 1]
    window: Any  # int32 [T, window]: slots of the last keys
    window_lengths: Any  # int32 [T]
    keys: int
    longest: int


class _Step(NamedTuple):
    """Tensors of a step, next to the cache, that all layers share."""

    positions: Array  # int64 [T], NumPy
    slots: Any  # int64 [T]
    block_tables: Any
    cu_seqlens_q: Any
    cached: Any
    new: Any
    longest_q: int
    longest_k: int
    groups: list[_Group]


class LatentEngine(Server):
    """Serves requests of the latent model.

    A step writes the latents and index keys of its new tokens, then attends. Decoding sequences are
    scored directly from their pages. The index keys of chunks, including cached ones, are gathered
    first.

    Parameters
    ----------
    model : LatentModel
    attention : Attention
    num_blocks : int
        Number of blocks of 64 tokens in the caches.
    keep_choices : bool
        Whether to keep the indexer's selections in :attr:`choices`.
    **options
        See :class:`~fastattn.demo.engine.Server`.

    Attributes
    ----------
    choices : list of (request, position, layer, indices)
        Positions in the sequence that the indexer selected for a query; -1 after the last one.
    """

    model: LatentModel

    def __init__(
        self,
        model: LatentModel,
        attention: Attention,
        *,
        num_blocks: int = 64,
        keep_choices: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, num_blocks=num_blocks, **options)
        self.attention = attention
        self.keep_choices = keep_choices
        self.choices: list[tuple[Any, int, int, Array]] = []
        layers = range(model.config.layers)
        fp8 = attention.cache_format == "fp8_656"
        latent = np.zeros(
            (num_blocks, BLOCK_SIZE, 656 if fp8 else LATENT_DIM + ROPE_DIM),
            np.uint8 if fp8 else np.uint16,  # Paddle's NumPy type of bfloat16
        )
        index = np.zeros((num_blocks, BLOCK_SIZE, _INDEX_KEY_BYTES), np.uint8)
        sparse = attention.keys == "sparse"
        self._cache_bytes = len(layers) * (latent.nbytes + sparse * index.nbytes)
        self.caches = [self._tensor(latent) for _ in layers]
        self.index_caches = [self._tensor(index) for _ in layers] if sparse else []
        self._cos_sin = self._tensor(cos_sin_table(model.config))

    def _forward(self, scheduled: list[ScheduledTokens]) -> Array:
        # Decoding sequences come first, so that both groups are contiguous.
        order = sorted(range(len(scheduled)), key=lambda i: scheduled[i].count > 1)
        runs = [scheduled[i] for i in order]
        step = self._prepare(runs)
        tokens = np.asarray([t for run in runs for t in run.tokens], np.int64)
        with paddle.no_grad():
            x = self.model.embed(tokens)
            for i in range(self.model.config.layers):
                inputs = self.model.attention_inputs(i, x, step.positions)
                x = self.model.finish(i, x, self._attend(i, inputs, step, runs))
            logits: Array = self.model.logits(x).numpy()
        parts = np.split(logits, np.cumsum([run.count for run in runs])[:-1])
        return np.concatenate([parts[order.index(i)] for i in range(len(runs))])

    def _prepare(self, runs: list[ScheduledTokens]) -> _Step:
        tables = self._tables(runs)
        counts = [run.count for run in runs]
        positions = np.concatenate([np.arange(r.start, r.start + r.count) for r in runs])
        owners = np.repeat(np.arange(len(runs)), counts)
        blocks = tables[owners, positions // BLOCK_SIZE].astype(np.int64)
        # number of sequences, which have one token each
        decoding = sum(count == 1 for count in counts)
        return _Step(
            positions=positions,
            slots=self._tensor(blocks * BLOCK_SIZE + positions % BLOCK_SIZE),
            block_tables=self._tensor(tables),
            cu_seqlens_q=self._tensor(np.cumsum([0, *counts]).astype(np.int32)),
            cached=self._tensor(np.asarray([run.start for run in runs], np.int32)),
            new=self._tensor(np.asarray(counts, np.int32)),
            longest_q=max(counts),
            longest_k=max(run.start + run.count for run in runs),
            groups=[
                self._group(runs[first:end], tables[first:end], first, decodes=decodes)
                for first, end, decodes in ((0, decoding, True), (decoding, len(runs), False))
                if first < end and self.attention.keys != "dense"
            ],
        )

    def _group(
        self, runs: list[ScheduledTokens], tables: Array, first: int, *, decodes: bool
    ) -> _Group:
        """Tensors of sequences whose tokens begin at token `first` of the step."""
        positions = np.concatenate([np.arange(r.start, r.start + r.count) for r in runs])
        owners = np.repeat(np.arange(len(runs)), [run.count for run in runs]).astype(np.int32)
        lengths = [run.start + run.count for run in runs]
        cu_seqlens_k = np.cumsum([0, *lengths]).astype(np.int32)
        before = np.maximum(positions + 1 - self.attention.window, 0).astype(np.int32)
        starts = cu_seqlens_k[owners]
        on_device = [self._tensor(array) for array in (positions, owners, tables)]
        window, window_lengths = F.window_indices(
            on_device[0],
            on_device[1],
            window=self.attention.window,
            block_tables=on_device[2],
        )
        return _Group(
            tokens=slice(first, first + len(positions)),
            decodes=decodes,
            positions=on_device[0],
            batch_ids=on_device[1],
            block_tables=on_device[2],
            before_window=self._tensor(before),
            starts=self._tensor(starts),
            ends=self._tensor(starts + before),
            cu_seqlens_k=self._tensor(cu_seqlens_k),
            window=window,
            window_lengths=window_lengths,
            keys=int(cu_seqlens_k[-1]),
            longest=max(lengths),
        )

    def _attend(
        self, layer: int, inputs: AttentionInputs, step: _Step, runs: list[ScheduledTokens]
    ) -> Any:
        """Output of a layer's attention, fp32 ``[T, H, 512]``, on the model's place."""
        cache = self.caches[layer]
        cache_format = self.attention.cache_format
        F.mla_write_cache(
            self._send(inputs.latent),
            self._send(inputs.rope),
            cache,
            step.slots,
            cache_format=cache_format,
        )
        if self.attention.keys == "dense":
            out = F.mla_attention(
                self._send(inputs.q),
                cache,
                step.block_tables,
                step.cu_seqlens_q,
                step.cached,
                step.new,
                step.longest_q,
                step.longest_k,
                cache_format=cache_format,
                softmax_scale=self.model.config.softmax_scale,
            )
            return self._receive(out)
        if self.attention.keys == "sparse":
            F.indexer_k_write_cache(
                self._send(inputs.index_key), self.index_caches[layer], step.slots
            )
        return paddle.concat([self._sparse(layer, inputs, group, runs) for group in step.groups])

    def _sparse(
        self, layer: int, inputs: AttentionInputs, group: _Group, runs: list[ScheduledTokens]
    ) -> Any:
        """Attention of a group's tokens over the keys that each token sees."""
        cache, config = self.caches[layer], self.model.config
        keys: dict[str, Any] = {"indices": group.window, "topk_length": group.window_lengths}
        if self.attention.keys == "sparse":
            indices = self._choose(layer, inputs, group)
            if self.keep_choices:
                self._keep(layer, indices, group, runs)
            slots, lengths = F.topk_to_slots(indices, group.block_tables, group.batch_ids)
            # The window is a second cache in the same softmax. No key is in both lists.
            keys = {
                "indices": slots,
                "topk_length": lengths,
                "extra_cache": cache,
                "extra_indices": group.window,
                "extra_topk_length": group.window_lengths,
            }
        out = F.mla_sparse_attention(
            self._send(inputs.q[group.tokens]),
            cache,
            cache_format=self.attention.cache_format,
            softmax_scale=config.softmax_scale,
            **keys,
        )
        return self._receive(out)

    def _choose(self, layer: int, inputs: AttentionInputs, group: _Group) -> Any:
        """Positions of the keys before the window with the largest logits, int32 ``[T, topk]``."""
        config, pages = self.model.config, self.index_caches[layer]
        q, _, weights = F.indexer_q_rope_quant(
            group.positions,
            self._send(inputs.index_q[group.tokens]),
            self._cos_sin,
            self._move(inputs.index_weight[group.tokens], self.place),
            INDEX_DIM**-0.5,
            config.index_heads**-0.5,
        )
        if group.decodes:
            logits = F.paged_mqa_logits(
                q.reshape_([q.shape[0], 1, config.index_heads, INDEX_DIM]),
                pages,
                weights,
                group.before_window,
                group.block_tables,
                group.longest,
            )
        else:
            keys, k_scales = F.indexer_k_gather(
                pages, group.block_tables, group.cu_seqlens_k, group.keys
            )
            logits = F.mqa_logits(
                q,
                keys,
                weights,
                group.starts,
                group.ends,
                k_scales=k_scales,
                max_seqlen_k=group.longest,
            )
        return F.topk_indices(logits, group.before_window, self.attention.topk)

    def _keep(self, layer: int, indices: Any, group: _Group, runs: list[ScheduledTokens]) -> None:
        tokens = [(run.request, run.start + j) for run in runs for j in range(run.count)]
        rows = indices.numpy()
        for (request, position), row in zip(tokens[group.tokens], rows):
            self.choices.append((request, position, layer, row))

    def _send(self, x: Any) -> Any:
        """Convert to bfloat16 on the cache's place."""
        return self._move(to_bfloat16(x), self.place)

    def _receive(self, out: Any) -> Any:
        """Convert to fp32 on the model's place."""
        return self._move(out, self.model.place).astype("float32")
