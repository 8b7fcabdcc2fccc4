"""Common base of FlashInfer's decode and prefill wrappers: a planned step, and its launch."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from fastattn.compat._flashinfer_plan import Step, block_tables, room_of
from fastattn.compat._paged import (
    BLOCK_SIZE,
    Blocks,
    dtype_name,
    hnd_blocks,
    nhd_blocks,
    pool_blocks,
    progression,
    refuse,
    refuse_given,
    require_tensors,
)
from fastattn.functional import paged_attention

LN2 = math.log(2.0)


def check_layout(op: str, kv_layout: str) -> None:
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f"{op}: kv_layout: expected NHD or HND, got {kv_layout!r}")


def caches_as_blocks(op: str, cache: Any, kv_layout: str) -> Blocks:
    if isinstance(cache, (tuple, list)):
        if len(cache) != 2:
            raise ValueError(f"{op}: paged_kv_cache: expected (k, v), got {len(cache)} tensors")
        names = ("paged_kv_cache[0]", "paged_kv_cache[1]")
        return (nhd_blocks if kv_layout == "NHD" else hnd_blocks)(op, cache[0], cache[1], names)
    return pool_blocks(op, "paged_kv_cache", cache, kv_layout)


class PagedWrapper:
    """Common base of the decode and the prefill wrapper: a planned step, and its launch."""

    _name = ""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        buffers: dict[str, Any],
        jit_args: Any,
    ) -> None:
        op = self._name
        require_tensors(op, float_workspace_buffer=float_workspace_buffer)
        check_layout(op, kv_layout)
        refuse_given(op, jit_args=jit_args)
        self._layout = kv_layout
        self._like = float_workspace_buffer
        self._graph = bool(use_cuda_graph)
        if self._graph:
            require_tensors(op, **buffers)
            *_, indices, last = buffers.values()
            self._batch, self._pages = int(last.shape[0]), int(indices.shape[0])
        self._step: Step | None = None
        self._window = -1
        self._held: dict[str | int, Tensor] = {}  # block tables by page stride
        self._longest = 0, 0  # upper bounds for launches: queries and keys of a sequence

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor
    ) -> None:
        """Do nothing: operators allocate what they need."""

    def _plan(
        self,
        step: Step,
        sizes: tuple[int, int, int, int],
        softmax_scale: float | None,
        window_left: int,
        logits_soft_cap: float | None,
        causal: bool,
        o_data_type: Any,
        batch_invariant: bool,
        decoded: int = 0,
    ) -> None:
        """Keep a step. `decoded` is the number of queries of each sequence if all have the same
        number.
        """
        op = f"{self._name}.plan"
        batch = len(step.keys)
        if self._graph:
            if batch != self._batch:
                raise ValueError(f"{op}: expected {self._batch} sequences, got {batch}")
            if len(step.indices) > self._pages:
                raise ValueError(
                    f"{op}: {len(step.indices)} pages do not fit the buffer's {self._pages}"
                )
            longest_q = decoded or int(step.starts[-1])
            if self._longest[0] and longest_q > self._longest[0]:
                raise ValueError(
                    f"{op}: {longest_q} queries after a first plan of {self._longest[0]}"
                )
            room = room_of(self._pages, sizes[3]) * BLOCK_SIZE
            self._longest = self._longest[0] or longest_q, room
        else:
            longest_k = int(np.maximum(step.keys, step.queries).max(initial=0))
            self._longest = int(step.queries.max(initial=0)), longest_k
        self._step = step
        self._planned = int(step.starts[-1])
        self._sizes = sizes
        self._scale = sizes[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
        self._window = window_left
        self._softcap = 0.0 if logits_soft_cap is None else max(float(logits_soft_cap), 0.0)
        self._causal = causal
        self._out_dtype = "auto" if o_data_type is None else dtype_name(o_data_type)
        self._batch_invariant = batch_invariant
        self._hold("starts", step.starts)
        # A sequence without keys is inactive: output 0, LSE -inf.
        self._hold("new", np.where(step.keys > 0, step.queries, 0))
        self._hold("cached", np.maximum(step.keys - step.queries, 0))
        if step.offsets is not None:
            self._hold("offsets", step.offsets)
        if step.trees is not None:  # without CUDA graphs
            self._held["trees"] = paddle.to_tensor(step.trees, place=self._like.place)
        per_page = sizes[3] // BLOCK_SIZE
        columns = room_of(self._pages, sizes[3]) if self._graph else None
        # strides of a tuple and of a pool
        for stride in (per_page, 2 * per_page) if per_page > 1 else (1,):
            self._hold(stride, block_tables(step, per_page, stride, columns))

    def _hold(self, key: str | int, array: Any) -> None:
        """Put an array on the device; with CUDA graphs, at its previous address."""
        tensor = paddle.to_tensor(np.ascontiguousarray(array, np.int32), place=self._like.place)
        held = self._held.get(key)
        if self._graph and held is not None:
            held.copy_(tensor, True)
        else:
            self._held[key] = tensor

    def _check_run(self, op: str, q: Tensor, blocks: Blocks) -> None:
        heads, kv_heads, head_dim, page_size = self._sizes
        if blocks.per_page * BLOCK_SIZE != page_size:
            raise ValueError(
                f"{op}: paged_kv_cache: expected pages of {page_size} tokens as planned, got "
                f"{blocks.per_page * BLOCK_SIZE}"
            )
        expected = [heads, head_dim]
        if len(q.shape) != 3 or list(q.shape[1:]) != expected:
            raise ValueError(f"{op}: q: expected shape [T, {heads}, {head_dim}], got {q.shape}")
        if blocks.key.shape[1] != kv_heads:
            raise ValueError(
                f"{op}: paged_kv_cache: expected {kv_heads} KV heads as planned, got "
                f"{blocks.key.shape[1]}"
            )
        planned = self._planned
        if q.shape[0] != planned and not (self._graph and q.shape[0] > planned):
            raise ValueError(f"{op}: q: expected {planned} queries as planned, got {q.shape[0]}")

    def _scales(self, op: str, q: Tensor, blocks: Blocks, scales: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``paged_attention`` for FlashInfer's multipliers of Q, K and V."""
        found: dict[str, Any] = {"softmax_scale": self._scale}
        quantized = blocks.quant_type != "none"
        for name, value in scales.items():
            number = isinstance(value, numbers.Real)
            if quantized and name != "q_scale":
                if value is None or number:
                    factor = 1.0 if value is None else float(value)
                    value = progression(factor, 0, 1, "float32", q)
                found[f"cache_{name}s"] = value
            elif value is None:
                continue
            elif name == "v_scale":
                if not number or value != 1:
                    refuse(op, name, "the cache has 16 bits")
            elif number:
                found["softmax_scale"] *= float(value)
            elif name == "q_scale":
                found["q_descale"] = value
            else:
                refuse(op, name, "a tensor for a 16-bit cache; give a float")
        return found

    def _run(
        self,
        q: Tensor,
        paged_kv_cache: Any,
        extra: tuple[Any, ...],
        scales: dict[str, Any],
        out: Tensor | None,
        return_lse: bool,
        window_left: int,
        sinks: Tensor | None,
        **refused: Any,
    ) -> Any:
        op = f"{self._name}.run"
        if self._step is None:
            raise RuntimeError(f"{op}: plan() comes first")
        if extra:
            refuse(op, "*args", "arguments of custom kernels")
        refuse_given(op, **refused)
        require_tensors(op, q=q)
        blocks = caches_as_blocks(op, paged_kv_cache, self._layout)
        self._check_run(op, q, blocks)
        step = self._step
        result = paged_attention(
            q,
            blocks.key,
            blocks.value,
            self._held[blocks.stride],
            self._held["starts"],
            self._held["cached"],
            self._held["new"],
            self._longest[0],
            self._longest[1],
            causal=self._causal and not step.explicit,
            window_size=(-1 if step.explicit else window_left, -1),
            softcap=self._softcap,
            sinks=sinks,
            mask_offsets=self._held["offsets"] if step.offsets is not None else None,
            tree_mask=self._held["trees"] if step.trees is not None else None,
            return_softmax_lse=return_lse,
            out=out,
            out_dtype=self._out_dtype,
            batch_invariant=self._batch_invariant,
            **self._scales(op, q, blocks, scales),
            **blocks.options(),
        )
        if not return_lse:
            return result
        return result[0], result[1].transpose([1, 0]) * (1 / LN2)


def check_position(op: str, pos_encoding_mode: str) -> None:
    """Refuse positions inside the attention, and say where they are applied."""
    if pos_encoding_mode == "NONE":
        return
    why = "write fastattn.functional.rope_write_cache_kv, which rotates as it writes the cache"
    if pos_encoding_mode == "ALIBI":
        why = "no operator here adds a bias to the logits; keep FlashInfer for such layers"
    refuse(op, "pos_encoding_mode", f"{pos_encoding_mode}; {why}")
