"""Attention of chosen key blocks in NumPy, over dense masks: what a choice costs a model.

The rule is the one of :func:`fastattn.functional.select_key_blocks`, and the model's K are as they
are, in fp32. This module computes the weights of all keys, so it also says how much of them the
chosen keys have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from fastattn.reference.block_selection import summary_shape
from fastattn.reference.layout import BLOCK_SIZE
from fastattn.reference.numerics import Array

_QUERIES = 256  # whose weights are in memory at a time


@dataclass(frozen=True)
class Choice:
    """How a query's keys are chosen.

    Attributes
    ----------
    budget : int
        Chosen keys of a query: blocks times their tokens.
    granularity : int
        Tokens of a block.
    kind : {"mean", "minmax"}
        Summary of a block.
    first_blocks, last_blocks : int
        Blocks that are taken in any case, at the start of the sequence and up to the query. They
        are part of the budget.
    """

    budget: int
    granularity: int
    kind: str
    first_blocks: int = 0
    last_blocks: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of a list."""
        return self.budget // self.granularity


def block_scores(q: Array, k: Array, granularity: int, kind: str) -> Array:
    """Scores of blocks, the largest of the query heads of a KV head.

    Parameters
    ----------
    q : array, shape [T, group, D]
        Query heads of one KV head.
    k : array, shape [S, D]
    granularity : int
    kind : {"mean", "minmax"}

    Returns
    -------
    array, shape [T, blocks]
    """
    starts = np.arange(0, len(k), granularity)
    if kind == "mean":
        counts = np.diff(np.append(starts, len(k)))
        means = np.add.reduceat(k, starts) / counts[:, None].astype(k.dtype)
        scores = q @ means.T
    elif kind == "minmax":
        # Of each channel, the larger product with the least and the largest key.
        low, high = np.minimum.reduceat(k, starts), np.maximum.reduceat(k, starts)
        scores = np.maximum(q, 0) @ high.T + np.minimum(q, 0) @ low.T
    else:
        raise ValueError(f"kind: expected 'mean' or 'minmax', got {kind!r}")
    result: Array = scores.max(axis=1)
    return result


def chosen_blocks(scores: Array, positions: Array, choice: Choice) -> Array:
    """Mask ``[T, blocks]`` of the blocks that the queries at these positions choose.

    Parameters
    ----------
    scores : array, shape [T, blocks]
    positions : array of int, shape [T]
    choice : Choice
    """
    own = (positions // choice.granularity)[:, None]
    block = np.arange(scores.shape[1])[None]
    seen = block <= own
    taken = seen & ((block < choice.first_blocks) | (block > own - choice.last_blocks))
    ranked = np.where(taken, np.inf, np.where(seen, scores, -np.inf))
    # Stable: of equal scores the earlier block is taken.
    order = np.argsort(-ranked, axis=1, kind="stable")[:, : choice.blocks]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask & seen


@dataclass
class SparseAttention:
    """An ``attention`` of :func:`fastattn.models.exact.forward`.

    Attributes
    ----------
    choice : Choice or None
        None takes all keys.
    softmax_scale : float
    recalls : list of float
        For each layer and call, the mean share of the softmax weight of all keys that the chosen
        ones have, over the query heads, and over the queries that see more keys than the budget.
    """

    choice: Choice | None
    softmax_scale: float
    recalls: list[float] = field(default_factory=list)

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Outputs ``[T, H, D]`` of a sequence's Q ``[T, H, D]``, K and V ``[T, KV, D]``."""
        out = np.empty((*q.shape[:2], v.shape[2]), np.float32)
        group = q.shape[1] // k.shape[1]
        shares: list[Array] = []
        for head in range(k.shape[1]):
            own = slice(head * group, (head + 1) * group)
            out[:, own] = self._head(q[:, own], k[:, head], v[:, head], shares)
        if any(map(len, shares)):
            self.recalls.append(float(np.concatenate(shares).mean()))
        return out

    def _head(self, q: Array, k: Array, v: Array, shares: list[Array]) -> Array:
        choice, tokens = self.choice, len(q)
        out = np.empty((*q.shape[:2], v.shape[1]), np.float32)
        scores = None
        if choice is not None:
            scores = block_scores(q, k, choice.granularity, choice.kind)
        for start in range(0, tokens, _QUERIES):
            end = min(start + _QUERIES, tokens)
            at = np.arange(start, end)
            later = np.arange(end)[None] > at[:, None]
            keys = None
            if choice is not None and scores is not None:
                blocks = chosen_blocks(scores[start:end], at, choice)
                keys = np.repeat(blocks, choice.granularity, axis=1)[:, :end]
            for h in range(q.shape[1]):
                weights = q[start:end, h] @ k[:end].T
                weights *= np.float32(self.softmax_scale)
                weights[later] = -np.inf
                weights -= weights.max(axis=1, keepdims=True)
                np.exp(weights, out=weights)
                if keys is not None and choice is not None:
                    total = weights.sum(axis=1)
                    weights *= keys
                    longer = at >= choice.budget
                    shares.append((weights.sum(axis=1) / total)[longer])
                out[start:end, h] = (weights @ v[:end]) / weights.sum(axis=1, keepdims=True)
        return out


@dataclass
class OperatorAttention:
    """The same by the operators, over a paged cache of the CPU, with queries in bfloat16.

    Attributes
    ----------
    choice : Choice
    cache_quant_type : str
        As :func:`fastattn.functional.make_cache` sets it up.
    softmax_scale : float
    same : list of float
        For each layer and call, the share of the chosen blocks that :func:`chosen_blocks` chooses,
        too, by K in fp32.
    """

    choice: Choice
    cache_quant_type: str
    softmax_scale: float
    same: list[float] = field(default_factory=list)

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Outputs ``[T, H, D]`` of a sequence's Q ``[T, H, D]``, K and V ``[T, KV, D]``."""
        import paddle

        import fastattn.functional as F

        def bf16(x: Array) -> Any:
            return paddle.to_tensor(x.astype(ml_dtypes.bfloat16).view(np.uint16))

        choice, (tokens, kv_heads, dim) = self.choice, k.shape
        blocks = -(-tokens // BLOCK_SIZE)
        tables = np.random.default_rng(layer).permutation(blocks).astype(np.int32)[None]
        sequences: dict[str, Any] = {
            "block_tables": paddle.to_tensor(tables),
            "cu_seqlens_q": paddle.to_tensor([0, tokens], "int32"),
            "seq_lens_decoder": paddle.to_tensor([0], "int32"),
            "seq_lens_this_time": paddle.to_tensor([tokens], "int32"),
        }
        cache = F.make_cache(blocks, kv_heads, dim, self.cache_quant_type)
        step: dict[str, Any] = {
            "key_cache": cache.key_cache,
            "value_cache": cache.value_cache,
            **sequences,
        }
        F.write_cache_kv(bf16(k), bf16(v), **step, **cache.arguments)
        shape = summary_shape(blocks, kv_heads, dim, choice.granularity, choice.kind)
        options: dict[str, Any] = {"granularity": choice.granularity, "kind": choice.kind}
        summaries = paddle.zeros(shape, "bfloat16")
        F.update_block_summaries(summaries, **step, **options, **cache.arguments)
        query = bf16(q)
        selected = F.select_key_blocks(
            query,
            summaries,
            **sequences,
            k=choice.blocks,
            first_blocks=choice.first_blocks,
            last_blocks=choice.last_blocks,
            **options,
        )
        self.same.append(self._same(selected.numpy(), q, k))
        out = F.sparse_paged_attention(
            query,
            **step,
            max_seqlen_q=tokens,
            max_seqlen_k=tokens,
            selected=selected,
            granularity=choice.granularity,
            softmax_scale=self.softmax_scale,
            **cache.arguments,
        )
        result: Array = out.numpy().view(ml_dtypes.bfloat16).astype(np.float32)
        return result

    def _same(self, selected: Array, q: Array, k: Array) -> float:
        group, at = q.shape[1] // k.shape[1], np.arange(len(q))
        full = at >= self.choice.budget
        shares = []
        for head in range(k.shape[1]):
            own = slice(head * group, (head + 1) * group)
            scores = block_scores(q[:, own], k[:, head], self.choice.granularity, self.choice.kind)
            wanted = chosen_blocks(scores, at, self.choice)[full]
            shares.append(np.take_along_axis(wanted, selected[full, head], axis=1).mean())
        return float(np.mean(shares))
