"""A small serving loop through a backend, and a dense model of what its layers must give."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import paddle
import pytest

from fastattn import _check, _ops, backends, reference
from fastattn.reference.cache import code_of, dynamic_scales, quantize_token, static_scales
from fastattn.reference.feedback import feedback_of
from fastattn.reference.hadamard import hadamard, hadamard_matrix, transform_key
from fastattn.reference.layout import BLOCK_SIZE, unpack_nibbles
from fastattn.reference.numerics import NIBBLES, from_codes
from fastattn.reference.rope import make_rotary_embs, quantize_q, rope_qkv
from tests.support.bounds import assert_error_ratio
from tests.support.tensors import BF16, to_numpy, to_paddle

MAX_MODEL_LEN = 512


@pytest.fixture
def taken(monkeypatch):
    """Results of the layers' bound calls (``_ops.bound``), None where one declined."""
    results: list[Any] = []
    if _ops.helpers() is None:
        pytest.skip("fastattn._direct was not built")
    bind = _ops.bound

    def bound(*args: Any) -> Any:
        run = bind(*args)

        def watched(*given: Any) -> Any:
            results.append(None)
            results[-1] = run(*given)
            return results[-1]

        return watched

    monkeypatch.setattr(_ops, "bound", bound)
    return results


#: Types whose K is rotated if a layer does not say how.
ROTATED = (
    *("block_wise_int8", "block_wise_int4", "block_wise_mxfp4"),
    *("block_wise_k8v4", "block_wise_kfp8v4"),
)


@dataclasses.dataclass
class Model:
    """Shape and parameters of an attention layer; every layer of a server has the same ones."""

    cache_quant_type: str = "none"
    fp8_format: str = "e4m3"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    dtype: np.dtype = BF16
    neox: bool = False
    rotary_dim: int | None = None
    norm: bool = False
    bias: bool = False
    sinks: bool = False
    window: int = 0
    num_layers: int = 1
    per_channel: bool = False
    scale_dtype: Any = np.float32
    q_quant: str = "none"
    k_rotation: str | None = None  # None: the default of the type
    centred: bool = False
    fed_back: bool = False

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)
        dim, width = self.head_dim, self.width
        self.q_norm_weight = rng.uniform(0.5, 2, dim).astype(np.float32) if self.norm else None
        self.k_norm_weight = rng.uniform(0.5, 2, dim).astype(np.float32) if self.norm else None
        self.qkv_bias = rng.normal(size=width).astype(self.dtype) if self.bias else None
        self.sink_logits = rng.normal(size=self.heads).astype(np.float32) if self.sinks else None
        self.table = make_rotary_embs(
            MAX_MODEL_LEN, self.rotary_dim or dim, theta=500.0, neox=self.neox
        )
        self.q_scale = np.array([8 / 448], np.float32) if self.q_quant == "per_tensor" else None
        self.k_center = None
        if self.centred:
            self.k_center = rng.normal(size=(self.kv_heads, dim)).astype(np.float32)
        self.k_feedback = None
        if self.fed_back:
            q = rng.normal(size=(200, self.kv_heads, dim)) + rng.normal(size=(self.kv_heads, dim))
            self.k_feedback = feedback_of(np.einsum("thi,thj->hij", q, q), self.rotation)
        self.k_scales = self.v_scales = None
        if self.cache_quant_type in ("cache_int8", "cache_fp8"):
            qmax = {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0}[self.code]
            count = self.kv_heads * (dim if self.per_channel else 1)
            self.k_scales, self.v_scales = (
                (rng.uniform(0.7, 1.5, count) * 5 / qmax).astype(self.scale_dtype) for _ in "kv"
            )

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def multiplies_fp8(self) -> bool:
        """Whether queries are e4m3, and keys and values FP8."""
        codes = {self.code_of("k"), self.code_of("v")}
        fp8 = codes <= {"e4m3", "e5m2"} and self.cache_quant_type != "none"
        return self.q_quant != "none" and fp8

    @property
    def code(self) -> str:
        """Format of K's codes."""
        return self.code_of("k")

    def code_of(self, kind: str) -> str:
        if self.cache_quant_type == "none":
            return self.fp8_format
        return code_of(self.cache_quant_type, self.fp8_format, kind)

    @property
    def rotation(self) -> str:
        return self.k_rotation or ("hadamard" if self.cache_quant_type in ROTATED else "none")

    @property
    def dynamic(self) -> bool:
        return self.cache_quant_type.startswith("block_wise")

    def rotated(
        self, qkv: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Q, K and V of tokens at some positions, with bias, norm and rotary embedding."""
        return rope_qkv(
            qkv,
            positions,
            self.table,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            q_norm_weight=self.q_norm_weight,
            k_norm_weight=self.k_norm_weight,
            use_neox_rotary_style=self.neox,
            rotary_dim=self.rotary_dim,
            qkv_bias=self.qkv_bias,
        )

    def project(self, qkv: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q (rounded) and K and V as a cache of this type gives them back, for a whole sequence."""
        q, k, v = self.rotated(qkv, np.arange(len(qkv)))
        written = transform_key(k, self.rotation, self.k_center)
        keys = self.stored("k", written, self.k_scales, self.k_feedback)
        if self.rotation != "none":
            matrix = hadamard_matrix(self.head_dim)
            keys = keys @ matrix
            q = hadamard(q).astype(self.dtype).astype(np.float64) @ matrix
        if self.k_center is not None:
            keys = keys + self.k_center
        return q, keys, self.stored("v", v, self.v_scales)

    def stored(
        self,
        kind: str,
        x: np.ndarray,
        scales: np.ndarray | None,
        feedback: np.ndarray | None = None,
    ) -> np.ndarray:
        """Values of K ("k") or V ("v") [n, KV, D] as the cache gives them back."""
        code = self.code_of(kind)
        if self.cache_quant_type == "none":
            return x.astype(np.float64)
        like = np.zeros(1, self.scale_dtype) if scales is None else scales
        codes, dynamic = quantize_token(
            x, like, self.cache_quant_type, self.fp8_format, feedback, kind
        )
        if dynamic is None:
            multiplier = static_scales(scales, *x.shape[1:])
        else:
            multiplier = dynamic_scales(dynamic, self.cache_quant_type)
        if code in NIBBLES:
            codes = unpack_nibbles(codes)
        return from_codes(codes, code).astype(np.float64) * multiplier

    def attention(self, qkv: np.ndarray, first: int, precision: str, **mask: Any) -> np.ndarray:
        """Outputs [n - first, H * D] of a sequence's tokens from `first` on."""
        q, k, v = self.project(qkv)
        new = len(qkv) - first
        options: dict[str, Any] = {"causal": True, "window_size": (self.window - 1, -1)}
        q, descale = quantize_q(q[first:], self.q_quant, self.q_scale)
        out, _ = reference.flash_attention(
            q,
            k,
            v,
            np.array([0, new]),
            np.array([0, len(qkv)]),
            q_descale=descale,
            sinks=self.sink_logits,
            precision=precision,
            **(options | mask),
        )
        return out.reshape(new, -1)


def assert_fp8_probabilities(actual, exact, what: str, rounding: float = 0.0) -> None:
    """Hold a sequence's tokens to the error that probabilities rounded to e4m3 (2^-4) make.

    Over many keys such errors are noise of the output's own size: a few per cent of it typically, a
    quarter of it nowhere. A wrong scale is neither. `rounding` is the largest relative error of
    what stores the output, if it counts beside that.
    """
    error = np.asarray(actual, np.float64) - exact
    size = np.sqrt(np.mean(np.square(exact), axis=-1, keepdims=True))
    assert (np.abs(error) <= 0.25 * size + rounding * np.abs(exact)).all(), what
    typical = 0.035 + rounding / 3
    assert np.sqrt(np.mean(error**2)) <= typical * np.sqrt(np.mean(np.square(exact))), what


class Server:
    """Sequences that grow step by step through one backend.

    Parameters
    ----------
    backend : type
    model : Model
    lengths : list of int
        Tokens that each sequence will have in the end.
    place : str
    shared : int
        Sequence 1 starts with the first `shared` blocks of sequence 0, already cached there.
    config : dict
        Options of :func:`fastattn.backends.make_config`.
    """

    def __init__(
        self,
        backend: type,
        model: Model,
        lengths: list[int],
        place: str = "cpu",
        *,
        shared: int = 0,
        config: dict[str, Any] | None = None,
    ) -> None:
        rng = np.random.default_rng(11)
        self.model, self.place = model, place
        self.tokens = [
            rng.normal(size=(model.num_layers, n, model.width)).astype(model.dtype) for n in lengths
        ]
        self.cached, self.runs = [0] * len(lengths), 0
        self.checks = True
        self.config = backends.make_config(
            max_model_len=MAX_MODEL_LEN,
            num_key_value_heads=model.kv_heads,
            window_size=model.window,
            partial_rotary_factor=(model.rotary_dim or model.head_dim) / model.head_dim,
            **(config or {}),
        )
        self.backend = backend(
            self.config, model.kv_heads, model.heads, model.head_dim, q_quant=model.q_quant
        )
        self.tables, num_blocks = self._make_tables(lengths, shared, rng)
        self.caches = self._make_caches(num_blocks, rng)
        self.layers = [self.make_layer(i) for i in range(model.num_layers)]
        self.table = self.on(model.table)

    def on(self, array: Any) -> Any:
        return None if array is None else to_paddle(np.array(array), self.place)

    def _make_tables(self, lengths, shared, rng) -> tuple[np.ndarray, int]:
        needed = [-(-n // BLOCK_SIZE) for n in lengths]
        order = rng.permutation(sum(needed) + 2)
        tables = np.full((len(lengths), max(needed) + 1), -1)
        start = 0
        for seq, count in enumerate(needed):
            tables[seq, :count] = order[start : start + count]
            start += count
        if shared:
            tables[1, :shared] = tables[0, :shared]
            self.tokens[1][:, : shared * BLOCK_SIZE] = self.tokens[0][:, : shared * BLOCK_SIZE]
            self.cached[1] = shared * BLOCK_SIZE
        return tables, len(order)

    def _make_caches(self, num_blocks: int, rng) -> list[Any]:
        """Tensors of every layer, full of NaN codes and stale scales."""
        model = self.model
        quant = None if model.cache_quant_type == "none" else model.cache_quant_type
        key, value = self.backend.get_kv_cache_shape(num_blocks, quant)
        scales = self.backend.get_kv_cache_scale_shape(num_blocks, quant)
        assert (scales is not None) == model.dynamic
        caches = []
        for _ in range(model.num_layers):
            for shape in (key, value):
                stale = np.full(shape, np.nan, model.dtype) if quant is None else None
                caches.append(np.full(shape, 0x7F, np.uint8) if stale is None else stale)
            if scales is not None:
                stale = 0xFF if scales[1] == "uint8" else np.nan
                caches += [np.full(scales[0], stale, scales[1]) for _ in "kv"]
        return [self.on(c) for c in caches]

    def make_layer(self, layer_id: int) -> backends.AttentionLayer:
        model = self.model
        return backends.AttentionLayer(
            layer_id=layer_id,
            cache_quant_type_str=model.cache_quant_type,
            cache_fp8_format=model.fp8_format,
            cache_k_out_scale=self.on(model.k_scales),
            cache_v_out_scale=self.on(model.v_scales),
            cache_k_rotation=model.k_rotation,
            cache_k_center=self.on(model.k_center),
            cache_k_feedback=self.on(model.k_feedback),
            use_neox_rotary_style=model.neox,
            qkv_bias=self.on(model.qkv_bias),
            q_norm_weight=self.on(model.q_norm_weight),
            k_norm_weight=self.on(model.k_norm_weight),
            sinks=self.on(model.sink_logits),
            q_scale=self.on(model.q_scale),
        )

    def make_meta(self, new: list[int], **fields: Any) -> backends.ForwardMeta:
        return backends.ForwardMeta.for_step(
            cached=self.cached,
            new=new,
            block_tables=self.tables,
            caches=self.caches,
            rotary_embs=self.table,
            place=paddle.CPUPlace() if self.place == "cpu" else paddle.CUDAPlace(0),
            **fields,
        )

    def inputs(self, layer: int, new: list[int], padding: int = 0) -> np.ndarray:
        parts = [x[layer, done : done + n] for x, done, n in zip(self.tokens, self.cached, new)]
        return np.concatenate([*parts, np.full((padding, self.model.width), 3, self.model.dtype)])

    def run(self, new: list[int], *, padding: int = 0, layers: Any = None, **fields) -> dict:
        """One step; outputs [T, H * D] of each layer. Sequences do not advance."""
        meta = self.make_meta(new, num_tokens=sum(new) + padding, **fields)
        self.backend.init_attention_metadata(meta)
        outputs = {}
        # Every other step has its tables and scales checked, which takes the operators one by one.
        self.runs += 1
        checks = self.checks and self.runs % 2 == 1
        with _check.checking() if checks else contextlib.nullcontext():
            for i in range(self.model.num_layers) if layers is None else layers:
                qkv = self.on(self.inputs(i, new, padding))
                out = self.backend.forward(None, None, None, qkv, None, None, self.layers[i], meta)
                outputs[i] = to_numpy(out)
        return outputs

    def step(self, new: list[int], *, padding: int = 0, **fields: Any) -> dict:
        """One step, checked against the dense model; sequences advance."""
        outputs = self.run(new, padding=padding, **fields)
        for layer, out in outputs.items():
            self.check(layer, new, out, padding)
        self.cached = [done + n for done, n in zip(self.cached, new)]
        return outputs

    def check(self, layer: int, new: list[int], out: np.ndarray, padding: int = 0) -> None:
        model, start = self.model, 0
        dtype = "float16" if model.dtype == np.float16 else "bfloat16"
        assert out.shape == (sum(new) + padding, model.heads * model.head_dim)
        for seq, n in enumerate(new):
            if n == 0:
                continue
            tokens = self.tokens[seq][layer, : self.cached[seq] + n]
            exact, naive = (
                model.attention(tokens, self.cached[seq], p) for p in ("float64", dtype)
            )
            part = out[start : start + n]
            start += n
            if self.place != "cpu" and model.multiplies_fp8():
                assert_fp8_probabilities(part, exact, f"layer {layer}, sequence {seq}")
            else:
                assert_error_ratio(part, exact, naive, dtype, f"layer {layer}, sequence {seq}")
        assert not out[start:].any(), "padding tokens"
