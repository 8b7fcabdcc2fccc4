"""What a simulated server asks of a layer, and how every layer takes a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import paddle

from fastattn import backends
from tests.support.graph import capture
from tests.support.serving import MAX_MODEL_LEN
from tests.support.tensors import BF16, to_numpy, to_paddle

#: Tensors of a step that a captured graph reads, by their names in ForwardMeta.
_OF_STEP = (
    "seq_lens_encoder",
    "seq_lens_decoder",
    "seq_lens_this_time",
    "cu_seqlens_q",
    "batch_id_per_token",
    "block_tables",
)


@dataclasses.dataclass
class Step:
    """What a scheduler gives a layer."""

    cached: np.ndarray  # tokens of each sequence in the cache
    new: np.ndarray
    prefill: list[bool]
    tables: np.ndarray
    rows: np.ndarray  # of all tokens, padding included
    padding: int = 0
    shared_prefix: int = 0  # tokens that all sequences read in the same blocks
    tells_lengths: bool = True  # the host's lengths
    captured: bool = False  # of the shape that a graph has
    trees: np.ndarray | None = None  # [slots, N, N]: the new tokens that each of them sees


#: Numbers that tokens are cut from: drawing each anew takes longer than attending to them.
_NOISE = np.random.default_rng(0).standard_normal(1 << 18, np.float32)


def noise(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Rows [count, width] of normal numbers."""
    begin = rng.integers(0, len(_NOISE) - width, count)
    return _NOISE[begin[:, None] + np.arange(width)]


class Kind:
    """A layer with its cache."""

    dtype = BF16
    most_tokens = 230  # of a request
    most_chunk = 80
    has_cascade = False
    tree_size = 0  # of the trees of drafts that a step has; 0: none

    def __init__(self, place: str) -> None:
        self.place = place
        self.caches: list[Any] = []
        self.backend: Any = None
        self.layer: Any = None
        self.rotary: Any = None
        self._graph: Any = None

    # what a kind says

    def arrays(self, num_blocks: int) -> list[np.ndarray]:
        """Empty caches; the first dimension counts blocks."""
        raise NotImplementedError

    def tokens(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Rows [count, width] as a model's projection would give them."""
        raise NotImplementedError

    def project(self, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Q, and K and V as the cache gives them back, of tokens at some positions."""
        raise NotImplementedError

    def forward(self, meta: Any, rows: Any) -> Any:
        raise NotImplementedError

    def check(
        self,
        out: np.ndarray,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        tree: np.ndarray | None = None,
    ) -> None:
        """Hold outputs of a sequence's last tokens to attention over its keys."""
        raise NotImplementedError

    def mask(self, step: Step) -> dict[str, Any]:
        """Fields of ForwardMeta for the step's trees of drafts."""
        return {}

    def check_choice(self, rows: slice, blocks: list[int], q: np.ndarray, k: np.ndarray) -> None:
        """Hold what an indexer chose for these rows of the step, if there is one."""

    def convert(self, index: int, blocks: np.ndarray, src: str, dst: str) -> np.ndarray:
        """Blocks of a cache tensor in another layout, where the type has one."""
        return blocks

    # what all kinds do

    def on(self, array: Any) -> Any:
        return None if array is None else to_paddle(np.array(array), self.place)

    def read(self) -> list[np.ndarray]:
        """Copies of the caches on the host."""
        return [np.array(to_numpy(cache)) for cache in self.caches]

    def write(self, arrays: list[np.ndarray]) -> None:
        """Overwrite the caches where they are: a captured graph has their addresses."""
        if not self.caches:
            self.caches = [self.on(array) for array in arrays]
            return
        for cache, array in zip(self.caches, arrays):
            cache.copy_(self.on(array), True)

    def meta(self, step: Step) -> Any:
        made = backends.ForwardMeta.for_step(
            cached=step.cached,
            new=step.new,
            prefill=step.prefill,
            block_tables=step.tables,
            caches=self.caches,
            rotary_embs=self.rotary,
            num_tokens=len(step.rows),
            shared_prefix_tokens=step.shared_prefix,
            place=paddle.CPUPlace() if self.place == "cpu" else paddle.CUDAPlace(0),
            attn_backend=self.backend,
            step_use_cudagraph=step.captured,
            **self.mask(step),
        )
        made._bounds = self._bounds(step)
        if not step.tells_lengths:
            made.max_len_tensor_cpu = None
        return made

    @staticmethod
    def _bounds(step: Step) -> tuple[int, int]:
        """Bounds of the new tokens and of the keys of a sequence, for calls of operators."""
        if step.captured or not step.tells_lengths:
            return len(step.rows), min(64 * step.tables.shape[1], MAX_MODEL_LEN)
        keys = np.where(step.new > 0, step.cached + step.new, 0)
        return int(step.new.max(initial=0)), int(keys.max(initial=0))

    def run(self, step: Step) -> np.ndarray:
        """Outputs [T, ...] of a step."""
        if step.captured:
            return self._replay(step)
        out = self.eager(self.meta(step), self.on(step.rows))
        return np.array(to_numpy(out)).reshape(len(step.rows), -1)

    def eager(self, meta: Any, rows: Any) -> Any:
        if self.backend is not None:
            self.backend.init_attention_metadata(meta)
        return self.forward(meta, rows)

    def _replay(self, step: Step) -> np.ndarray:
        """A step by a graph, which the first such step captures: later ones fill its tensors."""
        now, rows = self.meta(step), self.on(step.rows)
        if self._graph is None:
            self.eager(now, rows)
            self._graph = self.capture(now, rows), now, rows
        (graph, out), held, held_rows = self._graph
        if held is not now:
            for name in _OF_STEP:
                getattr(held, name).copy_(getattr(now, name), True)
            held_rows.copy_(rows, True)
        graph.replay()
        return np.array(to_numpy(out)).reshape(len(step.rows), -1)

    def capture(self, meta: Any, rows: Any) -> tuple[Any, Any]:
        """A graph of a step, and the output that its replays write."""
        with capture() as graph:
            out = self.eager(meta, rows)
        return graph, out

    def close(self) -> None:
        if self._graph is not None:
            self._graph[0][0].reset()
            self._graph = None
