"""Serving through the backends of latent caches, and what their layers must give, in fp64.

Nothing here calls the package's operators or its reference: tokens are quantised, scored and
attended to in plain NumPy. Pages begin as NaN, and bytes that no token owns must stay as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fastattn import _check, backends
from tests.support.mla_dense import assert_outputs_close
from tests.support.tensors import BF16, E4M3, int32, to_numpy, to_paddle

MAX_MODEL_LEN = 512
LATENT, ROPE, INDEX = 512, 64, 128
SOFTMAX_SCALE = (128 + ROPE) ** -0.5


def pow2_codes(x: np.ndarray, tile: int) -> np.ndarray:
    """Values [n, C] as e4m3 codes with a power of two for each tile of channels give them back."""
    tiles = x.astype(np.float64).reshape(len(x), x.shape[-1] // tile, tile)
    amax = np.maximum(np.abs(tiles).max(-1, keepdims=True), 1e-4)
    scale = np.exp2(np.ceil(np.log2(amax / 448)))
    return ((tiles / scale).astype(E4M3).astype(np.float64) * scale).reshape(x.shape)


def softmax_attention(q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Outputs [H, 512] of a token's heads [H, 576] over keys [n, 576]."""
    scores = q.astype(np.float64) @ keys.T * SOFTMAX_SCALE
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ keys[:, :LATENT]


class LatentServer:
    """Sequences of `lengths` tokens in the end, growing step by step through an MLA backend.

    Parameters
    ----------
    lengths : list of int
    heads : int
        Query heads of this process.
    place : str
    layers : int
    page_size : int
    shared : int
        Sequence 1 starts with the first `shared` blocks of sequence 0 (prefix cache).
    drafts : int
        Draft tokens of a sequence that decodes.
    gives_positions : bool
        Steps say the positions of their tokens, with others for padding.
    """

    backend_class: type = backends.MLAAttentionBackend

    def __init__(
        self,
        lengths: list[int],
        heads: int = 16,
        place: str = "cpu",
        *,
        layers: int = 1,
        page_size: int = 64,
        shared: int = 0,
        drafts: int = 0,
        gives_positions: bool = False,
        seed: int = 3,
        **model: Any,
    ) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.heads, self.place, self.page_size, self.count = heads, place, page_size, layers
        self.gives_positions = gives_positions
        self.config = backends.make_latent_config(
            qk_nope_head_dim=128,
            block_size=page_size,
            draft_tokens=drafts,
            **{"max_model_len": MAX_MODEL_LEN, **model},
        )
        self.backend = self.backend_class(self.config, 1, heads, 576)
        self.layers = [backends.AttentionLayer(layer_id=i) for i in range(layers)]
        self.cached = [0] * len(lengths)
        blocks = [-(-n // page_size) for n in lengths]
        self.num_blocks = sum(blocks) + 3
        order = rng.permutation(self.num_blocks)
        self.tables = np.full((len(lengths), max(blocks) + 1), -1)
        for seq, count in enumerate(blocks):
            self.tables[seq, :count] = order[sum(blocks[:seq]) :][:count]
        self.tokens = [self._tokens(n) for n in lengths]
        if shared:
            self.tables[1, :shared] = self.tables[0, :shared]
            for first, second in zip(self.tokens[0].values(), self.tokens[1].values()):
                second[:, : shared * page_size] = first[:, : shared * page_size]
        self.caches = [
            to_paddle(np.full(shape, 0xFF, np.uint8).view(dtype), place)
            for _ in range(layers)
            for shape, dtype in self._shapes()
        ]

    def _shapes(self) -> list[tuple[list[int], Any]]:
        """Bytes of a layer's caches, and the dtypes of their elements."""
        (shape, none) = self.backend.get_kv_cache_shape(self.num_blocks)
        assert shape == [self.num_blocks, 1, self.page_size, 576] and none == []
        return [([*shape[:-1], 1152], BF16)]

    def _tokens(self, length: int) -> dict[str, np.ndarray]:
        """Queries, latents and rotated channels [layers, n, ...] of a sequence."""
        normal = self.rng.normal
        sizes = np.exp2(self.rng.integers(-3, 2, (self.count, length, 4))).repeat(128, -1)
        return {
            "q": normal(size=(self.count, length, self.heads, 576)).astype(BF16),
            "latent": (normal(size=(self.count, length, LATENT)) * sizes).astype(BF16),
            "rope": normal(size=(self.count, length, ROPE)).astype(BF16),
        }

    def keys(self, layer: int, seq: int, end: int) -> np.ndarray:
        """What the cache gives back for a sequence's first `end` tokens."""
        mine = self.tokens[seq]
        parts = (mine["latent"][layer, :end], mine["rope"][layer, :end])
        return np.concatenate(parts, -1).astype(np.float64)

    def slots(self, seq: int, positions: np.ndarray) -> np.ndarray:
        return self.tables[seq, positions // self.page_size] * self.page_size + (
            positions % self.page_size
        )

    def of_step(self, name: str, layer: int, new: list[int], padding: int) -> Any:
        """A kind of the step's tokens, with NaN as padding."""
        parts = [
            mine[name][layer, done : done + n]
            for mine, done, n in zip(self.tokens, self.cached, new)
        ]
        shape = (padding, *parts[0].shape[1:])
        return to_paddle(np.concatenate([*parts, np.full(shape, np.nan, BF16)]), self.place)

    def positions(self, new: list[int]) -> np.ndarray:
        return np.concatenate([done + np.arange(n) for done, n in zip(self.cached, new)])

    def meta(self, new: list[int], prefill: list[bool] | None, padding: int, fields: Any) -> Any:
        """The step's ForwardMeta, as a server without lengths on the host would make it."""
        if self.gives_positions:
            ids = np.concatenate([self.positions(new), np.full(padding, 7)])
            fields = {"position_ids": int32(ids, self.place), **fields}
        unknown = int32(np.zeros(9), "cpu")
        meta = backends.ForwardMeta.for_step(
            cached=self.cached,
            new=new,
            block_tables=self.tables,
            caches=self.caches,
            prefill=prefill,
            num_tokens=sum(new) + padding,
            place=paddle.CPUPlace() if self.place == "cpu" else paddle.CUDAPlace(0),
            attn_backend=self.backend,
        )
        meta.__dict__.update({"max_len_tensor_cpu": unknown, **fields})
        meta.exist_prefill = any([n > 1 for n in new] if prefill is None else prefill)
        return meta

    def step(
        self,
        new: list[int],
        *,
        prefill: list[bool] | None = None,
        padding: int = 0,
        advance: list[int] | None = None,
        **fields: Any,
    ) -> None:
        """Run all layers and check outputs and caches; sequences advance by `new` or `advance`."""
        meta = self.meta(new, prefill, padding, fields)
        self.backend.init_attention_metadata(meta)
        before = [to_numpy(cache).view(np.uint8).copy() for cache in self.caches]
        for layer in range(self.count):
            with _check.checking():  # what the backend gives the operators
                out = to_numpy(self.run(layer, new, padding, meta))
            self.check(layer, new, out.reshape(len(out), self.heads, LATENT))
        self.check_bytes(before, new)
        grown = new if advance is None else advance
        self.cached = [done + n for done, n in zip(self.cached, grown)]

    def run(self, layer: int, new: list[int], padding: int, meta: Any) -> Any:
        q, latent, rope = (
            self.of_step(name, layer, new, padding) for name in ("q", "latent", "rope")
        )
        q, rope = q.reshape([q.shape[0], -1]), rope.reshape([-1, 1, ROPE])
        return self.backend.forward(q, None, None, None, latent, rope, self.layers[layer], meta)

    def check(self, layer: int, new: list[int], out: np.ndarray) -> None:
        start = 0
        for seq, n in enumerate(new):
            done = self.cached[seq]
            keys = self.keys(layer, seq, done + n)
            q = self.tokens[seq]["q"][layer]
            want = [softmax_attention(q[done + i], keys[: done + i + 1]) for i in range(n)]
            if n:
                assert_outputs_close(out[start : start + n], np.array(want))
            start += n
        assert not out[start:].any(), "padding tokens"

    def check_bytes(self, before: list[np.ndarray], new: list[int]) -> None:
        """Slots of other tokens than the step's keep their bytes."""
        written = [
            self.slots(seq, done + np.arange(n))
            for seq, (done, n) in enumerate(zip(self.cached, new))
        ]
        touched = np.zeros(self.num_blocks * self.page_size, bool)
        touched[np.concatenate(written).astype(int)] = True
        for index, (old, cache) in enumerate(zip(before, self.caches)):
            now = to_numpy(cache).view(np.uint8)
            rows = self.rows_of(index, old), self.rows_of(index, now)
            for a, b in zip(*rows):
                assert np.array_equal(a[~touched], b[~touched]), f"cache {index}"
                assert (a[touched] != b[touched]).any() or not touched.any()

    def rows_of(self, index: int, cache: np.ndarray) -> list[np.ndarray]:
        """Bytes of each slot of a cache, [slots, bytes]."""
        return [cache.reshape(self.num_blocks * self.page_size, -1)]


class SparseServer(LatentServer):
    """The same through a DSA backend: 656-byte latents, and an indexer of `index_heads` heads."""

    backend_class = backends.DSAAttentionBackend

    def __init__(self, *args: Any, index_heads: int = 8, topk: int = 64, **kwargs: Any) -> None:
        self.index_heads, self.topk = index_heads, topk
        super().__init__(*args, index_n_heads=index_heads, index_topk=topk, **kwargs)
        self.chosen: list[np.ndarray] = []
        self.keeps_tensors = False  # a capture may not copy choices to the host

    def _shapes(self) -> list[tuple[list[int], Any]]:
        latents, none, keys = self.backend.get_kv_cache_shape(self.num_blocks, "uint8")
        assert latents == [self.num_blocks, 1, self.page_size, 656] and none == []
        assert keys == [self.num_blocks, self.page_size, 132]
        return [(latents, np.uint8), (keys, np.uint8)]

    def _tokens(self, length: int) -> dict[str, np.ndarray]:
        normal, heads = self.rng.normal, self.index_heads
        sizes = np.exp(self.rng.normal(size=(self.count, length, 1)))
        weights = normal(size=(self.count, length, heads)) * np.arange(1, heads + 1)
        return {
            **super()._tokens(length),
            "index_q": normal(size=(self.count, length, heads, INDEX)).astype(BF16),
            "index_k": (normal(size=(self.count, length, INDEX)) * sizes).astype(BF16),
            "weights": weights.astype(BF16),
        }

    def keys(self, layer: int, seq: int, end: int) -> np.ndarray:
        mine = self.tokens[seq]
        latent = pow2_codes(mine["latent"][layer, :end], 128)
        return np.concatenate([latent, mine["rope"][layer, :end].astype(np.float64)], -1)

    def logits(self, layer: int, seq: int, position: int) -> np.ndarray:
        """The indexer's logits of a query for the keys that it sees, from quantised operands."""
        mine = self.tokens[seq]
        q = mine["index_q"][layer, position].astype(np.float32)  # docs/numerics.md: one multiplier
        scale = np.abs(q).max(-1, keepdims=True) / np.float32(448)
        codes = np.clip(q * (np.float32(1) / scale), -448, 448).astype(E4M3)
        q = codes.astype(np.float64) * scale
        k = pow2_codes(mine["index_k"][layer, : position + 1], INDEX)
        weights = mine["weights"][layer, position].astype(np.float64)
        factor = (INDEX * self.index_heads) ** -0.5
        return weights @ np.maximum(q @ k.T, 0) * factor

    def run(self, layer: int, new: list[int], padding: int, meta: Any) -> Any:
        names = ("q", "latent", "rope", "index_q", "index_k", "weights")
        q, latent, rope, *index = (self.of_step(name, layer, new, padding) for name in names)
        slots = self.backend.select(*index, layer, meta)
        self.chosen.append(slots if self.keeps_tensors else to_numpy(slots))
        return self.backend.forward(
            q,
            None,  # FastDeploy's models give the step's latents, which nobody needs
            slots.reshape([-1, 1, self.topk]),
            None,
            latent,
            rope.reshape([-1, 1, ROPE]),
            self.layers[layer],
            meta,
        )

    def check(self, layer: int, new: list[int], out: np.ndarray) -> None:
        start, slots = 0, self.chosen[-1]
        assert slots.shape == (len(out), self.topk)
        for seq, n in enumerate(new):
            done, want = self.cached[seq], []
            keys = self.keys(layer, seq, done + n)
            for i in range(n):
                picked = self._picked(layer, seq, done + i, slots[start + i])
                want.append(softmax_attention(self.tokens[seq]["q"][layer, done + i], keys[picked]))
            if n:
                assert_outputs_close(out[start : start + n], np.array(want))
            start += n
        assert not out[start:].any() and (slots[start:] == -1).all(), "padding tokens"

    def _picked(self, layer: int, seq: int, position: int, slots: np.ndarray) -> np.ndarray:
        """Positions that a query's slots mean, after a check that they are the best ones."""
        count = min(self.topk, position + 1)
        assert (slots[count:] == -1).all()
        all_slots = self.slots(seq, np.arange(position + 1))
        place_of = {slot: i for i, slot in enumerate(all_slots)}
        picked = np.array([place_of[slot] for slot in slots[:count]])
        assert (np.diff(picked) > 0).all(), "not in the order of positions"
        if count <= position:
            logits = self.logits(layer, seq, position)
            left = np.delete(logits, picked)
            assert logits[picked].min() >= left.max() - 1e-4 * np.abs(logits).max()
        return picked

    def rows_of(self, index: int, cache: np.ndarray) -> list[np.ndarray]:
        if index % 2 == 0:
            return super().rows_of(index, cache)
        pages = cache.reshape(self.num_blocks, -1)  # codes of a page, then its scales
        split = self.page_size * INDEX
        return [pages[:, :split].reshape(-1, INDEX), pages[:, split:].reshape(-1, 4)]
