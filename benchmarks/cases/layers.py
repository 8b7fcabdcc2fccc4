"""Layers of a model as a server runs them: through a backend, rope and cache write included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import paddle

from benchmarks.cases.inputs import Cache, Step, is_dynamic, token_bytes
from benchmarks.core.devices import Device
from benchmarks.core.timing import Call, bind
from fastattn.backends import AttentionLayer, FlashAttentionBackend, ForwardMeta, make_config
from fastattn.reference.layout import BLOCK_SIZE
from fastattn.reference.rope import make_rotary_embs


class Model(NamedTuple):
    """What a rank has of a layer, and what the layer asks for."""

    heads: int
    kv: int
    dim: int
    neox: bool = False
    bias: bool = False
    sinks: bool = False
    table_per_seq: bool = False  # images give each sequence a rotary table of its own


MODELS = {
    "Qwen3-8B": Model(32, 8, 128, neox=True),
    "ERNIE-4.5-300B TP8": Model(8, 1, 128),
    "gpt-oss-120b": Model(64, 8, 64, neox=True, bias=True, sinks=True),
    "PaddleOCR-VL": Model(16, 2, 128, neox=True, table_per_seq=True),
}
MAX_MODEL_LEN = 32768
_LAYER_BYTES, _MOST_LAYERS = 8e8, 48


class Layers:
    """Layers that hold a step's sequences, each with a cache of its own.

    Parameters
    ----------
    device : Device
    model : Model
    quant : str
        Cache type.
    seqs : sequence of (int, int)
        Cached tokens and new tokens of each sequence.
    count : int, optional
        Number of layers; by default so many that their caches exceed the L2 cache.
    """

    def __init__(
        self,
        device: Device,
        model: Model,
        quant: str,
        seqs: Sequence[tuple[int, int]],
        count: int | None = None,
    ) -> None:
        self.model = model
        h, kv, d = model.heads, model.kv, model.dim
        cached, new = np.array(seqs).T
        self.step = Step(device, cached, new)
        of_layer = self.step.blocks * BLOCK_SIZE * token_bytes(quant, kv, d)
        if count is None:
            count = int(np.clip(_LAYER_BYTES / of_layer, 1, _MOST_LAYERS))
        caches = [Cache(device, quant, self.step.blocks, kv, d) for _ in range(count)]
        self.backend = self.backend_of(make_config(max_model_len=MAX_MODEL_LEN))
        self.layers = [self._layer(device, i, model, cache) for i, cache in enumerate(caches)]
        angles = device.array(make_rotary_embs(MAX_MODEL_LEN, d, neox=model.neox))
        if model.table_per_seq:
            per_seq = (len(new), 2, 1, self.step.longest, 1, d // 2)
            angles = device.random(per_seq, "float32")  # as good as cosines here
        tables, starts, decoder, this_time = self.step.meta
        # A server's tables have room for its longest sequence: their width tells no length.
        wide = np.full((len(new), MAX_MODEL_LEN // BLOCK_SIZE), -1)
        wide[:, : tables.shape[1]] = tables.numpy()
        scales = is_dynamic(quant)
        self.fields: dict[str, Any] = {
            "block_tables": device.int32(wide),
            "cu_seqlens_q": starts,
            "seq_lens_encoder": device.int32(np.where(new > 1, new, 0)),
            "seq_lens_decoder": decoder,
            "seq_lens_this_time": this_time,
            "caches": [t for c in caches for t in (*c.tensors, *(c.scales if scales else ()))],
            "rotary_embs": angles,
            "exist_prefill": bool((new > 1).any()),
        }
        shape = (self.step.tokens, (h + 2 * kv) * d)
        self.qkv = [device.random(shape, seed=seed) for seed in range(4)]

    @staticmethod
    def _layer(device: Device, index: int, model: Model, cache: Cache) -> AttentionLayer:
        static = cache.quant != "none" and not is_dynamic(cache.quant)
        key_scales, value_scales = cache.scales if static else (None, None)
        width = (model.heads + 2 * model.kv) * model.dim
        return AttentionLayer(
            layer_id=index,
            cache_quant_type_str=cache.quant,
            cache_k_out_scale=key_scales,
            cache_v_out_scale=value_scales,
            use_neox_rotary_style=model.neox,
            qkv_bias=device.random((width,)) if model.bias else None,
            sinks=device.uniform((model.heads,)) if model.sinks else None,
        )

    def backend_of(self, config: Any) -> FlashAttentionBackend:
        """A backend of the layers' heads."""
        return FlashAttentionBackend(config, self.model.kv, self.model.heads, self.model.dim)

    def meta(self, exact: bool) -> ForwardMeta:
        """Metadata of the step, whose lengths the host knows exactly or not at all."""
        longest = np.zeros(9, np.int32)
        longest[[0, 3]] = int(self.step.new.max()), self.step.longest
        known = paddle.to_tensor(longest, place=paddle.CPUPlace()) if exact else None
        return ForwardMeta(**self.fields, max_len_tensor_cpu=known)

    def forward(self, backend: FlashAttentionBackend, index: int, meta: ForwardMeta) -> Any:
        """One layer of a step that the backend has begun."""
        qkv, layer = self.qkv[index % len(self.qkv)], self.layers[index]
        return backend.forward_mixed(None, None, None, qkv, None, None, layer, meta)

    def calls(self, exact: bool) -> list[Call]:
        """A call for each layer, of a step that is begun here, once."""
        meta = self.meta(exact)
        self.backend.init_attention_metadata(meta)
        metadata = self.backend.attention_metadata

        def call(index: int) -> Any:
            self.backend.attention_metadata = metadata
            return self.forward(self.backend, index, meta)

        return [bind(call, index) for index in range(len(self.layers))]
