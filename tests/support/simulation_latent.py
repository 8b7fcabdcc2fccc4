"""Latent attention of the simulated server: dense, and sparse with an indexer."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastattn.functional as F
from fastattn import _views, backends
from fastattn.reference import attention, mla
from tests.support.latent import SCALE
from tests.support.latent_serving import INDEX, pow2_codes
from tests.support.mla_dense import assert_outputs_close
from tests.support.serving import MAX_MODEL_LEN
from tests.support.simulation_kind import Kind, Step, noise
from tests.support.tensors import BF16, E4M3, to_numpy, to_paddle


class Parts:
    """Tensors that a step's rows are cut into: a GPU's slices would be copies by Paddle."""

    def __init__(self, tensors: list[Any]) -> None:
        self.tensors = tensors

    def copy_(self, other: Parts, blocking: bool) -> None:
        for mine, its in zip(self.tensors, other.tensors):
            mine.copy_(its, blocking)


class Latent(Kind):
    """Dense latent attention over a cache of one format, by MLAAttentionBackend or operators.

    Parameters
    ----------
    name : str
        Format of the cache; "backend": bf16, by the backend.
    place : str
    heads : int
    rule : {"pow2", "amax"}
        How scales are chosen.
    """

    most_tokens = 150
    most_chunk = 40
    #: Whether a CPU rounds products of codes and scales to bf16; on a GPU some kernels do.
    rounds_keys = True

    def __init__(self, name: str, place: str, *, heads: int, rule: str = "pow2") -> None:
        super().__init__(place)
        self.heads, self.rule = heads, rule
        self.format = "bf16" if name == "backend" else name
        self.latent = mla.FORMATS[self.format].latent
        self.width = self.latent + mla.ROPE_DIM  # of a query and of a token
        self.scale = SCALE * 2 if self.format == "fp8" else None
        self.scale_tensor = self.on(self.scale)
        self.softmax_scale = (128 + mla.ROPE_DIM) ** -0.5
        if name == "backend":
            config = backends.make_latent_config(max_model_len=MAX_MODEL_LEN, qk_nope_head_dim=128)
            self.backend = backends.MLAAttentionBackend(config, 1, heads, 576)
            self.layer = backends.AttentionLayer(layer_id=0)

    @property
    def widths(self) -> list[int]:
        """Channels of a row: queries of all heads, the latent and the rotated channels."""
        return [self.heads * self.width, self.latent, mla.ROPE_DIM]

    def arrays(self, num_blocks: int) -> list[np.ndarray]:
        size = mla.FORMATS[self.format].token_bytes
        if self.format == "bf16":
            middle = [1] if self.backend is not None else []
            return [np.zeros([num_blocks, *middle, 64, size // 2], BF16)]
        return [np.zeros([num_blocks, 64, size], np.uint8)]

    def tokens(self, rng: np.random.Generator, count: int) -> np.ndarray:
        rows = noise(rng, count, sum(self.widths))
        rows[:, self.widths[0] :] *= np.exp(rng.normal(0, 0.4, (count, 1)))
        return rows.astype(BF16)

    def _split(self, rows: np.ndarray) -> list[np.ndarray]:
        return np.split(rows, np.cumsum(self.widths)[:-1], axis=1)

    def project(self, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        q, latent, rope, *_ = self._split(rows)
        coded = mla.token_bytes(latent, rope, self.format, self.rule, self.scale)
        values = mla.exact_values(*coded, self.format, self.scale)
        q = q.reshape(len(q), self.heads, self.width).astype(np.float64)
        return q, values, values[:, :512]

    def meta(self, step: Step) -> Any:
        made = super().meta(step)
        made.exist_prefill = any(step.prefill)
        return made

    def on(self, array: Any) -> Any:
        if isinstance(array, np.ndarray) and array.shape[-1] == sum(self.widths):
            return Parts([to_paddle(np.array(part), self.place) for part in self._split(array)])
        return super().on(array)

    def forward(self, meta: Any, rows: Any) -> Any:
        q, latent, rope = rows.tensors
        if self.backend is not None:
            return self.backend.forward(q, None, None, None, latent, rope, self.layer, meta)
        tokens, (cache,) = latent.shape[0], self.caches
        maps = F.token_maps(
            meta.batch_id_per_token,
            meta.block_tables,
            meta.cu_seqlens_q,
            meta.seq_lens_decoder,
            None,
            num_tokens=tokens,
            block_size=64,
            num_blocks=cache.shape[0],
        )
        F.mla_write_cache(
            latent,
            rope,
            cache,
            maps[2],
            cache_format=self.format,
            scale_rule=self.rule,
            scale=self.scale_tensor,
        )
        return F.mla_attention(
            _views.view(q, [tokens, self.heads, self.width]),
            cache,
            meta.block_tables,
            meta.cu_seqlens_q,
            meta.seq_lens_decoder,
            meta.seq_lens_this_time,
            *meta._bounds,
            cache_format=self.format,
            scale=self.scale_tensor,
            softmax_scale=self.softmax_scale,
        )

    def visible(self, queries: int, keys: int) -> np.ndarray:
        return attention.attention_mask(queries, keys, causal=True)

    def check(self, out: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        ways = [self.rounds_keys] if self.place == "cpu" else [True, False]
        failures = []
        for rounded in ways:
            keys, values = (x.astype(BF16).astype(np.float64) if rounded else x for x in (k, v))
            exact, _ = attention.dense_attention(
                q,
                keys[:, None],
                values[:, None],
                self.visible(len(q), len(k)),
                softmax_scale=self.softmax_scale,
            )
            try:
                return self._assert_close(out.reshape(exact.shape), exact)
            except AssertionError as failure:
                failures.append(failure)
        raise failures[0]

    def _assert_close(self, out: np.ndarray, exact: np.ndarray) -> None:
        if self.place == "cpu" or exact[..., 0].size >= 64:
            return assert_outputs_close(out, exact)
        # Weights of 8 bits average out over many rows, which a decoding sequence has not.
        error = np.abs(out.astype(np.float64) - exact)
        allowed = 2 / 128 * np.abs(exact) + 2**-8 * np.abs(exact).max()
        assert (error <= allowed).all(), f"a channel is off by {error.max():.2e}"
        rms = np.linalg.norm(error, axis=-1) / np.linalg.norm(exact, axis=-1)
        assert (rms <= 1e-2).all(), f"a row's relative RMS is {rms.max():.2e}"


class Sparse(Latent):
    """Sparse latent attention by DSAAttentionBackend: an indexer chooses `topk` keys of a query."""

    index_heads = 8
    rounds_keys = False

    def __init__(self, place: str, *, heads: int, rule: str, topk: int) -> None:
        self.topk = topk
        super().__init__("fp8_656", place, heads=heads, rule=rule)
        config = backends.make_latent_config(
            max_model_len=MAX_MODEL_LEN,
            qk_nope_head_dim=128,
            index_n_heads=self.index_heads,
            index_topk=topk,
        )
        self.backend = backends.DSAAttentionBackend(config, 1, heads, 576, scale_rule=rule)
        self.layer = backends.AttentionLayer(layer_id=0)
        self.slots: Any = None  # of the keys of each row of the step
        self.held_slots: Any = None  # those of a graph
        self.chosen = np.zeros((0, 0), bool)  # keys of the queries that are checked

    @property
    def widths(self) -> list[int]:
        """And queries, the key and the weights of the indexer."""
        return [*super().widths, self.index_heads * INDEX, INDEX, self.index_heads]

    def arrays(self, num_blocks: int) -> list[np.ndarray]:
        latents, _, keys = self.backend.get_kv_cache_shape(num_blocks, "uint8")
        return [np.zeros(shape, np.uint8) for shape in (latents, keys)]

    def project(self, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Queries and keys have the indexer's as further channels."""
        q, keys, values = super().project(rows, positions)
        index_q, index_k, weights = self._split(rows)[3:]
        index_q = index_q.reshape(len(rows), self.index_heads, INDEX).astype(np.float32)
        scale = np.abs(index_q).max(-1, keepdims=True) / np.float32(448)
        codes = np.clip(index_q * (np.float32(1) / scale), -448, 448).astype(E4M3)
        index_q = codes.astype(np.float64) * scale * weights.astype(np.float64)[..., None]
        # A weight's sign stays apart: it counts after the ReLU.
        signs = np.where(weights.astype(np.float64) < 0, -1.0, 1.0)[..., None]
        index_q = np.concatenate([index_q * signs, signs], -1).reshape(len(rows), -1)
        flat = np.concatenate([q.reshape(len(rows), -1), index_q], -1)
        return flat, np.concatenate([keys, pow2_codes(index_k, INDEX)], -1), values

    def forward(self, meta: Any, rows: Any) -> Any:
        q, latent, rope, *index = rows.tensors
        tokens = latent.shape[0]
        index[0] = _views.view(index[0], [tokens, self.index_heads, INDEX])
        self.slots = self.backend.select(*index, 0, meta)
        return self.backend.forward(q, None, self.slots, None, latent, rope, self.layer, meta)

    def run(self, step: Step) -> np.ndarray:
        out = super().run(step)
        if step.captured and self.held_slots is None:
            self.held_slots = self.slots
        self._host_slots = to_numpy(self.held_slots if step.captured else self.slots)
        return out

    def _split_query(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = self.heads * self.width
        index = q[:, at:].reshape(len(q), self.index_heads, INDEX + 1)
        return q[:, :at].reshape(len(q), self.heads, self.width), index

    def check_choice(self, rows: slice, blocks: list[int], q: np.ndarray, k: np.ndarray) -> None:
        """Slots are in the order of positions, and no key left out has a larger logit."""
        _, index = self._split_query(q)
        keys = k[:, self.width :]
        slots = np.repeat(blocks, 64)[: len(k)] * 64 + np.arange(len(k)) % 64
        position_of = {int(slot): i for i, slot in enumerate(slots)}
        self.chosen = np.zeros((len(q), len(k)), bool)
        for i, own in enumerate(self._host_slots[rows]):
            seen = len(k) - len(q) + i + 1
            count = min(self.topk, seen)
            assert (own[count:] == -1).all(), "slots behind the last key: out of bound"
            picked = [position_of.get(int(slot), seen) for slot in own[:count]]
            assert (np.diff([-1, *picked, seen]) > 0).all(), "slots of other keys: out of bound"
            self.chosen[i, picked] = True
            if count < seen:
                scores = np.maximum(index[i, :, :-1] @ keys[:seen].T, 0)
                logits = (scores * index[i, :, -1:]).sum(0)
                left = logits[~self.chosen[i, :seen]].max()
                assert logits[picked].min() >= left - 1e-4 * np.abs(logits).max(), (
                    "a key that was left out is better: out of bound"
                )

    def visible(self, queries: int, keys: int) -> np.ndarray:
        return self.chosen

    def check(self, out: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        super().check(out, self._split_query(q)[0], k[:, : self.width], v)
