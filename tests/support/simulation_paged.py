"""Grouped-query attention of the simulated server."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import fastattn.functional as F
from fastattn import backends
from fastattn.reference import attention
from fastattn.reference.hadamard import hadamard, hadamard_matrix, transform_key
from fastattn.reference.rope import quantize_q
from tests.support.bounds import assert_error_ratio
from tests.support.serving import MAX_MODEL_LEN, Model
from tests.support.simulation_kind import Kind, Step, noise
from tests.support.tensors import to_numpy


@functools.lru_cache(maxsize=4)
def _matrix(head_dim: int) -> np.ndarray:
    return hadamard_matrix(head_dim)


class Paged(Kind):
    """Grouped-query attention over a cache of one type, by a backend or by the two operators.

    Parameters
    ----------
    model : Model
    place : str
    softcap : float
        Only the operators have it, so that a value above 0 means them.
    batch_invariant, split_invariant : bool
    part : float
        ``head_wise_swa_ratio``, the part of the heads that have the model's window; 0 means all.
    first : int
        ``sink_size``, the first tokens that stay visible beside the window.
    tree_size : int
        Tokens of the trees that drafts are; 0 means that there are none.
    backend_class : type
    """

    def __init__(
        self,
        model: Model,
        place: str,
        *,
        softcap: float = 0.0,
        batch_invariant: bool = False,
        split_invariant: bool = False,
        part: float = 0.0,
        first: int = 0,
        tree_size: int = 0,
        backend_class: type = backends.FlashAttentionBackend,
    ) -> None:
        super().__init__(place)
        self.model, self.dtype, self.softcap = model, model.dtype, softcap
        self.invariant = {"batch_invariant": batch_invariant, "split_invariant": split_invariant}
        self.tree_size = tree_size
        self.rotary = self.on(model.table)
        self.has_cascade = not (softcap or batch_invariant or model.window or tree_size)
        # Of each KV head: the keys before a query that it sees, and the first ones.
        whole = round((1 - part) * model.kv_heads) if part else 0
        self.windows = [(-1, 0)] * whole
        self.windows += [(model.window - 1, first)] * (model.kv_heads - whole)
        self.apart = bool(model.window and (part or first))
        config = backends.make_config(
            max_model_len=MAX_MODEL_LEN,
            num_key_value_heads=model.kv_heads,
            window_size=model.window,
            partial_rotary_factor=(model.rotary_dim or model.head_dim) / model.head_dim,
        )
        config.model_config.head_wise_swa_ratio, config.model_config.sink_size = part, first
        self._shapes = backend_class(
            config,
            model.kv_heads,
            model.heads,
            model.head_dim,
            q_quant=model.q_quant,
            **self.invariant,
        )
        self.backend = None if softcap else self._shapes
        self.tensors = {
            name: self.on(getattr(model, name))
            for name in (
                "k_scales",
                "v_scales",
                "k_center",
                "qkv_bias",
                "q_norm_weight",
                "k_norm_weight",
                "sink_logits",
                "q_scale",
                "k_feedback",
            )
        }
        self.tensors["windows"] = self.on(np.array(self.windows, np.int32)) if self.apart else None
        self.layer = self._make_layer()

    def _make_layer(self) -> backends.AttentionLayer:
        model, tensors = self.model, self.tensors
        return backends.AttentionLayer(
            layer_id=0,
            cache_quant_type_str=model.cache_quant_type,
            cache_fp8_format=model.fp8_format,
            cache_k_out_scale=tensors["k_scales"],
            cache_v_out_scale=tensors["v_scales"],
            cache_k_rotation=model.k_rotation,
            cache_k_center=tensors["k_center"],
            cache_k_feedback=tensors["k_feedback"],
            use_neox_rotary_style=model.neox,
            qkv_bias=tensors["qkv_bias"],
            q_norm_weight=tensors["q_norm_weight"],
            k_norm_weight=tensors["k_norm_weight"],
            sinks=tensors["sink_logits"],
            q_scale=tensors["q_scale"],
        )

    def arrays(self, num_blocks: int) -> list[np.ndarray]:
        model = self.model
        quant = None if model.cache_quant_type == "none" else model.cache_quant_type
        shapes = self._shapes.get_kv_cache_shape(num_blocks, quant)
        arrays = [np.zeros(shape, model.dtype if quant is None else np.uint8) for shape in shapes]
        scales = self._shapes.get_kv_cache_scale_shape(num_blocks, quant)
        if scales is not None:
            dtype = np.uint8 if scales[1] == "uint8" else model.scale_dtype
            arrays += [np.zeros(scales[0], dtype) for _ in "kv"]
        return arrays

    def tokens(self, rng: np.random.Generator, count: int) -> np.ndarray:
        sizes = np.exp(rng.normal(0, 0.4, (count, 1)))
        rows = noise(rng, count, self.model.width) * sizes.astype(np.float32)
        return rows.astype(self.dtype)

    def project(self, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        model = self.model
        q, k, v = model.rotated(rows, positions)
        written = transform_key(k, model.rotation, model.k_center)
        keys = model.stored("k", written, model.k_scales, model.k_feedback)
        center = model.k_center
        if model.rotation != "none":  # scores are those of rotated queries and keys
            q = hadamard(q).astype(self.dtype)
            if center is not None:
                center = center.astype(np.float64) @ _matrix(model.head_dim)
        if center is not None:
            keys = keys + center
        q, descale = quantize_q(q, model.q_quant, model.q_scale)
        q = attention.as_values(q).astype(np.float64)
        if descale is not None:
            q = q * (descale if descale.ndim == 1 else descale[..., None]).astype(np.float64)
        return q, keys, model.stored("v", v, model.v_scales)

    def mask(self, step: Step) -> dict[str, Any]:
        """As FastDeploy has it: true hides. Rows of a prompt, and the first column, say nothing."""
        if step.trees is None:
            return {}
        hidden = ~step.trees
        garbage = np.random.default_rng(int(step.new.sum())).random(hidden.shape) < 0.5
        hidden[:, :, 0] = garbage[:, :, 0]
        prompts = np.flatnonzero(np.array(step.prefill, bool))
        hidden[prompts] = garbage[prompts]
        return {"attn_mask": self.on(hidden)}

    def forward(self, meta: Any, rows: Any) -> Any:
        if self.backend is not None:
            return self.backend.forward_mixed(None, None, None, rows, None, None, self.layer, meta)
        model, tensors = self.model, self.tensors
        key, value, *scales = self.caches
        k_scales, v_scales = scales or (tensors["k_scales"], tensors["v_scales"])
        types = {
            "cache_k_scales": k_scales,
            "cache_v_scales": v_scales,
            "cache_quant_type": model.cache_quant_type,
            "fp8_format": model.fp8_format,
        }
        seqs = (
            meta.block_tables,
            meta.cu_seqlens_q,
            meta.seq_lens_decoder,
            meta.seq_lens_this_time,
        )
        # The writer rotates queries that it quantises, else the attention does.
        quantises = model.q_quant != "none"
        q, descale = F.rope_write_cache_kv(
            rows,
            key,
            value,
            self.rotary,
            *seqs,
            num_heads=model.heads,
            num_kv_heads=model.kv_heads,
            q_norm_weight=tensors["q_norm_weight"],
            k_norm_weight=tensors["k_norm_weight"],
            use_neox_rotary_style=model.neox,
            rotary_dim=model.rotary_dim,
            qkv_bias=tensors["qkv_bias"],
            q_quant=model.q_quant,
            q_scale=tensors["q_scale"],
            batch_id_per_token=meta.batch_id_per_token,
            k_rotation=model.rotation,
            k_center=tensors["k_center"],
            k_feedback=tensors["k_feedback"],
            q_rotation=model.rotation if quantises else "none",
            **types,
        )
        options = {"out_dtype": "float16" if self.dtype == np.float16 else "bfloat16"}
        return F.paged_attention(
            q,
            key,
            value,
            *seqs,
            *meta._bounds,
            q_descale=descale,
            window_size=(-1 if self.apart else model.window - 1, -1),
            head_windows=tensors["windows"],
            tree_mask=self._tree_mask(meta),
            softcap=self.softcap,
            sinks=tensors["sink_logits"],
            **self.invariant,
            k_rotation="none" if quantises else model.rotation,
            k_center=None if quantises else tensors["k_center"],
            **types,
            **(options if quantises else {}),
        )

    def _tree_mask(self, meta: Any) -> Any:
        """The operator's mask: what a token sees, and all of it for a prompt."""
        given = getattr(meta, "attn_mask", None)
        if given is None:
            return None
        sees = ~to_numpy(given)
        sees[:, :, 0] = True
        sees[to_numpy(meta.seq_lens_encoder).reshape(-1)[: len(sees)] > 0] = True
        return self.on(sees)

    def _dense(self, head: int, q, k, v, tree, precision: str) -> np.ndarray:
        """Attention of a KV head's queries, [n, H / KV, D]."""
        model, group = self.model, self.model.heads // self.model.kv_heads
        own, queries = slice(head, head + 1), slice(head * group, (head + 1) * group)
        visible = attention.attention_mask(
            len(q), len(k), causal=True, head_window=self.windows[head], tree_mask=tree
        )
        out, _ = attention.dense_attention(
            q[:, queries],
            k[:, own],
            v[:, own],
            visible,
            softmax_scale=model.head_dim**-0.5,
            softcap=self.softcap,
            sinks=None if model.sink_logits is None else model.sink_logits[queries],
            precision=precision,
        )
        return out

    def check(
        self,
        out: np.ndarray,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        tree: np.ndarray | None = None,
    ) -> None:
        model = self.model
        dtype = "float16" if self.dtype == np.float16 else "bfloat16"
        exact, naive = (
            np.concatenate(
                [self._dense(head, q, k, v, tree, precision) for head in range(model.kv_heads)], 1
            )
            for precision in ("float64", dtype)
        )
        out = out.reshape(exact.shape)
        if self.place != "cpu" and model.multiplies_fp8():
            _assert_fp8_products(out, exact)
        else:
            assert_error_ratio(out, exact, naive, dtype)

    def convert(self, index: int, blocks: np.ndarray, src: str, dst: str) -> np.ndarray:
        quantised = self.model.cache_quant_type != "none"
        if index > 1 or not quantised or self.model.code_of("v") in ("int4", "e2m1"):
            return blocks
        made = F.convert_cache_layout(
            self.on(blocks),
            kind="kv"[index],
            cache_quant_type=self.model.cache_quant_type,
            src=src,
            dst=dst,
        )
        return np.array(to_numpy(made))


def _assert_fp8_products(out: np.ndarray, exact: np.ndarray) -> None:
    """Probabilities of a GPU's FP8 products are e4m3, within 2^-4 of what they should be.

    A row is off by 0.25 of its size nowhere and by 0.07 typically; a wrong scale is seen.
    """
    error = np.asarray(out, np.float64) - exact
    size = np.sqrt(np.mean(np.square(exact), axis=-1, keepdims=True))
    assert (np.abs(error) <= 0.25 * size + 2**-8 * np.abs(exact)).all(), "a channel is off"
    typical = np.sqrt(np.mean(np.square(error), axis=-1, keepdims=True))
    assert (typical <= 0.07 * size).all(), f"a row is off by {(typical / size).max():.3f}"
