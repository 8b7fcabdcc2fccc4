"""Serving of a model through an attention backend: a paged cache of one type, and a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from fastattn.backends import (
    AttentionLayer,
    FlashAttentionBackend,
    ForwardMeta,
    make_config,
)
from fastattn.backends.config import BLOCK_SIZE
from fastattn.demo.blocks import BlockPool
from fastattn.demo.model import Config, Model, Trunk, rotary_table, to_bfloat16
from fastattn.demo.scheduler import Request, ScheduledTokens, Scheduler
from fastattn.reference.numerics import Array

#: Static dequantisation scales of a layer, ``(k, v)``, fp32.
LayerScales = tuple[Array, Array]


@dataclass
class Statistics:
    """Counters of an engine."""

    steps: int = 0
    mixed_steps: int = 0  # steps with prefill and decoding requests
    tokens: int = 0
    largest_batch: int = 0
    peak_blocks: int = 0
    reused_tokens: int = 0
    preemptions: int = 0


class Server:
    """Common base of engines for any attention and cache: steps of requests.

    Parameters
    ----------
    model : Trunk
    num_blocks : int
        Number of blocks of 64 tokens in the cache.
    max_seqs, token_budget, chunk, reuse_prefixes
        See :class:`fastattn.demo.scheduler.Scheduler`.
    place : optional
        Place of the cache and the attention. Default: the place of the model. The engine moves
        tensors between the two.
    """

    def __init__(
        self,
        model: Trunk,
        *,
        num_blocks: int = 64,
        max_seqs: int = 8,
        token_budget: int = 96,
        chunk: int = 64,
        reuse_prefixes: bool = True,
        place: Any = None,
    ) -> None:
        self.model = model
        self.place = model.place if place is None else place
        self.statistics = Statistics()
        self.scheduler = Scheduler(
            BlockPool(num_blocks),
            max_seqs=max_seqs,
            token_budget=token_budget,
            chunk=chunk,
            reuse_prefixes=reuse_prefixes,
        )
        self._cache_bytes = 0  # for all layers
        self._max_blocks = -(-model.config.context // BLOCK_SIZE)

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token in the caches of all layers, including scales."""
        return self._cache_bytes / (self.scheduler.pool.num_blocks * BLOCK_SIZE)

    def submit(self, request: Request) -> Request:
        """Queue a request.

        Raises
        ------
        ValueError
            If it is longer than the model's context or than the whole cache.
        """
        longest = len(request.prompt) + max(request.max_new_tokens - 1, 0)
        if longest > self.model.config.context:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones "
                f"exceed the model's context of {self.model.config.context}"
            )
        self.scheduler.add(request)
        return request

    def run(self, progress: Callable[[int], None] | None = None) -> None:
        """Step until every request is done; `progress` receives each step's number of tokens."""
        while tokens := self.step():
            if progress is not None:
                progress(tokens)

    def step(self) -> int:
        """Run one step and return its number of tokens; 0 if there was nothing to do."""
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return 0
        self._count(scheduled)
        logits = self._forward(scheduled)
        position = 0
        for run in scheduled:
            request = run.request
            own = logits[position : position + run.count]
            position += run.count
            if request.keep_logits:
                request.logits.append(own)
            self.scheduler.commit(run)
            if run.is_last and len(request.generated) < request.max_new_tokens:
                request.tokens.append(request.sample(own[-1]))
            if request.done:
                self.scheduler.finish(request)
                self.statistics.reused_tokens += request.reused
                self.statistics.preemptions += request.preemptions
        return position

    def _forward(self, scheduled: list[ScheduledTokens]) -> Array:
        """Logits of all tokens of a step, fp32 ``[T, vocabulary]``."""
        raise NotImplementedError

    def _tables(self, scheduled: list[ScheduledTokens]) -> Array:
        """Block tables of a step's sequences, int32 ``[B, max_blocks]``."""
        tables = np.full((len(scheduled), self._max_blocks), -1, np.int32)
        for table, run in zip(tables, scheduled):
            table[: len(run.request.blocks)] = run.request.blocks
        return tables

    def _count(self, scheduled: list[ScheduledTokens]) -> None:
        prefill = [run.is_prefill for run in scheduled]
        seen = self.statistics
        seen.steps += 1
        seen.mixed_steps += any(prefill) and not all(prefill)
        seen.tokens += sum(run.count for run in scheduled)
        seen.largest_batch = max(seen.largest_batch, len(scheduled))
        seen.peak_blocks = max(seen.peak_blocks, self.scheduler.pool.in_use)

    def _tensor(self, array: Array) -> Any:
        return paddle.to_tensor(np.ascontiguousarray(array), place=self.place)

    @staticmethod
    def _move(tensor: Any, place: Any) -> Any:
        gpu = isinstance(place, paddle.CUDAPlace)
        if tensor.place.is_gpu_place() == gpu:
            return tensor
        return tensor.cuda() if gpu else tensor.cpu()


class Engine(Server):
    """Serves requests of the grouped-query model with one cache type.

    Parameters
    ----------
    model : Model
    cache_quant_type : str
    scales : sequence of (k, v), optional
        Scales per layer, for the static types.
    num_blocks : int
        Number of blocks of 64 tokens in the cache.
    backend_class : type
        One of the classes of :mod:`fastattn.backends`.
    k_rotation : {"none", "hadamard"}, optional
        Rotation of K before it is quantised. Default: the rotation of the type.
    **options
        See :class:`Server`.
    """

    model: Model

    def __init__(
        self,
        model: Model,
        cache_quant_type: str = "none",
        *,
        scales: Sequence[LayerScales] | None = None,
        num_blocks: int = 64,
        backend_class: type[FlashAttentionBackend] = FlashAttentionBackend,
        k_rotation: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, num_blocks=num_blocks, **options)
        config = model.config
        self.backend = backend_class(
            make_config(max_model_len=config.context, num_key_value_heads=config.kv_heads),
            config.kv_heads,
            config.heads,
            config.head_dim,
        )
        self.layers = self._layers(config, cache_quant_type, scales)
        for layer in self.layers:
            layer.cache_k_rotation = k_rotation
        self.caches = self._caches(config, cache_quant_type, num_blocks)
        self._rotary = self._tensor(rotary_table(config))

    def _forward(self, scheduled: list[ScheduledTokens]) -> Array:
        tokens = [t for run in scheduled for t in run.tokens]
        meta = ForwardMeta.for_step(
            cached=[run.start for run in scheduled],
            new=[run.count for run in scheduled],
            prefill=[run.is_prefill for run in scheduled],
            block_tables=self._tables(scheduled),
            caches=self.caches,
            rotary_embs=self._rotary,
            place=self.place,
        )
        with paddle.no_grad():
            self.backend.init_attention_metadata(meta)
            x = self.model.embed(np.asarray(tokens, np.int64))
            for i, layer in enumerate(self.layers):
                qkv = self._move(to_bfloat16(self.model.qkv(i, x)), self.place)
                out = self.backend.attend(qkv, layer, meta)
                out = self._move(out, self.model.place).astype("float32")
                x = self.model.finish(i, x, out)
            logits: Array = self.model.logits(x).numpy()
        return logits

    def _layers(
        self, config: Config, cache_quant_type: str, scales: Sequence[LayerScales] | None
    ) -> list[AttentionLayer]:
        layers = [AttentionLayer(i, cache_quant_type) for i in range(config.layers)]
        for layer, (k, v) in zip(layers, scales or ()):
            layer.cache_k_out_scale = self._tensor(k)
            layer.cache_v_out_scale = self._tensor(v)
        return layers

    def _caches(self, config: Config, cache_quant_type: str, num_blocks: int) -> list[Any]:
        shapes = self.backend.get_kv_cache_shape(num_blocks, cache_quant_type)
        # Paddle's NumPy type of bfloat16 is uint16.
        dtype = np.uint16 if cache_quant_type == "none" else np.uint8
        arrays = [np.zeros(shape, dtype) for shape in shapes]
        scales = self.backend.get_kv_cache_scale_shape(num_blocks, cache_quant_type)
        if scales is not None:
            arrays += [np.zeros(*scales) for _ in range(2)]
        self._cache_bytes = config.layers * sum(array.nbytes for array in arrays)
        return [self._tensor(array) for _ in range(config.layers) for array in arrays]
