"""A model whose K and V are in paged caches: RoPE, cache writes and attention by the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import paddle

import fastattn.functional as F
from fastattn.functional._cache_types import BLOCK_SIZE
from fastattn.functional.kv_cache import KVCache
from fastattn.models.config import ModelConfig, rotary_angles
from fastattn.models.dense import Dense
from fastattn.reference.numerics import Array


@dataclass(frozen=True)
class LayerPlan:
    """How a layer's K and V are stored.

    Attributes
    ----------
    cache_quant_type : str
    k_rotation : {"auto", "none", "hadamard"}
    k_scales, v_scales : array of float32, optional
        Of static types.
    k_center : array of float32, shape [KV, D], optional
    k_feedback : array of float32, shape [KV, D, D], optional
    """

    cache_quant_type: str = "none"
    k_rotation: str = "auto"
    k_scales: Array | None = None
    v_scales: Array | None = None
    k_center: Array | None = None
    k_feedback: Array | None = None


class Session:
    """Sequences of one length in caches of their own.

    Parameters
    ----------
    dense : Dense
    plans : sequence of LayerPlan
        One a layer.
    length : int
        Tokens that a sequence may have.
    sequences : int
    place : paddle.Place, optional
        Of caches and attention; the CPU by default.
    quantize_q : bool
        Whether layers of e4m3 codes get e4m3 queries.
    """

    def __init__(
        self,
        dense: Dense,
        plans: Sequence[LayerPlan],
        *,
        length: int,
        sequences: int = 1,
        place: Any = None,
        quantize_q: bool = False,
    ) -> None:
        self.dense, self.config = dense, dense.config
        self.place = paddle.CPUPlace() if place is None else place
        self.length, self.sequences = length, sequences
        self.quantize_q = quantize_q
        self.cached = 0
        blocks = -(-length // BLOCK_SIZE)
        self.caches = [self._cache(plan, sequences * blocks) for plan in plans]
        # As a server's: no sequence has its blocks in order.
        tables = np.random.default_rng(0).permutation(sequences * blocks).astype(np.int32)
        self._tables = self._tensor(tables.reshape(sequences, blocks))
        factors = dense.weights.rope_factors
        self._rotary = {
            full: self._table(rotary_angles(self.config, length, full=full, factors=factors))
            for full in set(self.config.full)
        }
        self._norms = [
            tuple(self._weight(x) for x in (w.q_norm, w.k_norm)) for w in dense.weights.layers
        ]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a token in the caches of all layers, dynamic scales included."""
        return sum(cache.bytes_per_token for cache in self.caches)

    def _tensor(self, array: Array) -> Any:
        return paddle.to_tensor(np.ascontiguousarray(array), place=self.place)

    def _weight(self, x: Any) -> Any:
        if x is None or not isinstance(x, np.ndarray):
            return x  # a tensor beside the model's weights
        return self._tensor(x)

    def _table(self, angles: Array) -> Any:
        table = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
        return self._tensor(table[:, None, :, None])

    def _cache(self, plan: LayerPlan, blocks: int) -> KVCache:
        given = (plan.k_scales, plan.v_scales, plan.k_center, plan.k_feedback)
        k_scales, v_scales, center, feedback = (
            None if x is None else self._tensor(x) for x in given
        )
        return F.make_cache(
            blocks,
            self.config.kv_heads,
            self.config.head_dim,
            plan.cache_quant_type,
            cache_k_scales=k_scales,
            cache_v_scales=v_scales,
            k_rotation=plan.k_rotation,
            k_center=center,
            k_feedback=feedback,
            place=self.place,
        )

    def rewind(self, tokens: int) -> None:
        """Forget what comes after the first tokens of every sequence; they are written over."""
        if not 0 <= tokens <= self.cached:
            raise ValueError(f"expected 0 to {self.cached} tokens, got {tokens}")
        self.cached = tokens

    def forward(self, tokens: Array) -> Any:
        """Hidden states of new tokens, which :meth:`Dense.logits` takes.

        Parameters
        ----------
        tokens : array of int, shape [sequences, T]

        Returns
        -------
        array or Tensor, shape [sequences * T, hidden]
        """
        count, new = tokens.shape
        if count != self.sequences or self.cached + new > self.length:
            raise ValueError(
                f"{count} sequences of {self.cached + new} tokens; expected {self.sequences} of "
                f"at most {self.length}"
            )
        step = _Step(self, new)
        x = self.dense.embed(tokens.reshape(-1))
        with paddle.no_grad():
            for n in range(self.config.layers):
                x = self.dense.finish(n, x, step.attend(n, self.dense.project(n, x)))
        self.cached += new
        return self.dense.last(x)


class _Step:
    """The arguments that all layers of a step share."""

    def __init__(self, session: Session, new: int) -> None:
        self._session, self._config = session, session.config
        count = session.sequences

        def int32(values: Array) -> Any:
            return session._tensor(np.asarray(values, np.int32))

        self._lengths = (
            session._tables,
            int32(np.arange(count + 1) * new),
            int32(np.full(count, session.cached)),
            int32(np.full(count, new)),
        )
        self._bounds = new, session.cached + new

    def attend(self, layer: int, qkv: Any) -> Any:
        """Attention ``[T, H * D]`` of a layer's fused projection, whose K and V are written."""
        session, config = self._session, self._config
        cache = session.caches[layer]
        both = cache.key_cache, cache.value_cache
        q_norm, k_norm = session._norms[layer]
        q, _ = F.rope_write_cache_kv(
            self._to_bfloat16(qkv),
            *both,
            session._rotary[config.full[layer]],
            *self._lengths,
            num_heads=config.heads,
            num_kv_heads=config.kv_heads,
            q_norm_weight=q_norm,
            k_norm_weight=k_norm,
            rms_norm_eps=config.norm_eps,
            use_neox_rotary_style=config.neox,
            qk_norm_before_rope=True,
            **cache.arguments,
        )
        window = config.window_of(layer)
        out = F.paged_attention(
            q,
            *both,
            *self._lengths,
            *self._bounds,
            softmax_scale=config.softmax_scale,
            window_size=(window - 1, -1) if window else (-1, -1),
            quantize_q=session.quantize_q and cache.cache_quant_type.endswith("fp8"),
            **cache.arguments,
        )
        return self._to_dense(out)

    def _to_bfloat16(self, x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return self._session._tensor(x.astype(ml_dtypes.bfloat16).view(np.uint16))
        return x.astype("bfloat16")

    def _to_dense(self, out: Any) -> Any:
        rows = out.shape[0]
        if isinstance(self._session.dense.weights.embedding, np.ndarray):
            values = out.numpy().view(ml_dtypes.bfloat16).astype(np.float32)
            return values.reshape(rows, -1)
        return out.astype("float32").reshape([rows, -1])


def greedy(
    session: Session,
    tokens: Sequence[int],
    new: int,
    *,
    stop: int | None = None,
    choose: Callable[[Array], int] | None = None,
) -> Iterator[int]:
    """Continue a text token by token: with the most likely one, or as `choose` says.

    Parameters
    ----------
    session : Session
        Of one sequence.
    tokens : sequence of int
        What the session does not have yet.
    new : int
        Tokens to generate.
    stop : int, optional
        Token that ends a text.
    choose : callable, optional
        Gives a token of logits ``[vocabulary]``.

    Yields
    ------
    int
        A token.
    """
    step = np.asarray(tokens, np.int64)[None]
    for _ in range(new):
        hidden = session.forward(step)[-1:]
        logits = session.dense.logits(hidden)[0]
        token = int(logits.argmax()) if choose is None else choose(logits)
        if token == stop:
            return
        yield token
        step = np.array([[token]])


def same_plan(config: ModelConfig, plan: LayerPlan) -> list[LayerPlan]:
    """The same plan for every layer."""
    return [plan] * config.layers
