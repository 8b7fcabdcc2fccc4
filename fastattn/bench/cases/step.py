"""A layer's attention step as a server runs it: through a backend, rope and cache write included.

A server does not know lengths on the host, so the step's metadata have none, as FastDeploy's runner
leaves them; the same step with exact lengths stands beside it. Layers have caches of their own,
together several times the L2 cache. A step is replayed in a CUDA graph, and made eagerly, where the
host may take longer than the GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import paddle

from fastattn.backends import AttentionLayer, FlashAttentionBackend, ForwardMeta, make_config
from fastattn.bench.cases.inputs import Cache, Step, is_dynamic, token_bytes
from fastattn.bench.core import cuda
from fastattn.bench.core.devices import Gpu
from fastattn.bench.core.peers import peers
from fastattn.bench.core.rows import Row, register
from fastattn.bench.core.timing import Call, bind
from fastattn.reference.rope import make_rotary_embs


class _Model(NamedTuple):
    """What a rank has of a layer, and what the layer asks for."""

    heads: int
    kv: int
    dim: int
    neox: bool = False
    bias: bool = False
    sinks: bool = False
    table_per_seq: bool = False  # images give each sequence a rotary table of its own


MODELS = {
    "Qwen3-8B": _Model(32, 8, 128, neox=True),
    "ERNIE-4.5-300B TP8": _Model(8, 1, 128),
    "gpt-oss-120b": _Model(64, 8, 64, neox=True, bias=True, sinks=True),
    "PaddleOCR-VL": _Model(16, 2, 128, neox=True, table_per_seq=True),
}
QUANTS = ("cache_fp8", "block_wise_fp8", "cache_int8", "block_wise_int8", "none")
MAX_MODEL_LEN = 32768
CONTEXT = 8192
#: Name of a step -> cached tokens and new tokens of each sequence.
STEPS = {
    **{f"decode {batch} x 8k": [(CONTEXT - 1, 1)] * batch for batch in (1, 16, 64, 128)},
    "2048 behind 6144 + 32 x 8k": [(6144, 2048), *[(CONTEXT - 1, 1)] * 32],
}
_QUICK = ("Qwen3-8B",), ("block_wise_fp8",), ("decode 1 x 8k",)
_LAYER_BYTES, _MOST_LAYERS = 8e8, 48


class _Layers:
    """Layers of a model that hold a step's sequences, and the calls that run the step."""

    def __init__(self, device: Gpu, model: _Model, quant: str, name: str) -> None:
        self.device = device
        h, kv, d = model.heads, model.kv, model.dim
        cached, new = np.array(STEPS[name]).T
        self.step = Step(device, cached, new)
        of_layer = self.step.blocks * 64 * token_bytes(quant, kv, d)
        self.count = int(np.clip(_LAYER_BYTES / of_layer, 1, _MOST_LAYERS))
        caches = [Cache(device, quant, self.step.blocks, kv, d) for _ in range(self.count)]
        self.backend = FlashAttentionBackend(make_config(max_model_len=MAX_MODEL_LEN), kv, h, d)
        self.layers = [self._layer(device, i, model, cache) for i, cache in enumerate(caches)]
        angles = device.array(make_rotary_embs(MAX_MODEL_LEN, d, neox=model.neox))
        if model.table_per_seq:
            per_seq = (len(new), 2, 1, self.step.longest, 1, d // 2)
            angles = device.random(per_seq, "float32")  # as good as cosines here
        tables, starts, decoder, this_time = self.step.meta
        scales = is_dynamic(quant)
        self.fields: dict[str, Any] = {
            "block_tables": tables,
            "cu_seqlens_q": starts,
            "seq_lens_decoder": decoder,
            "seq_lens_this_time": this_time,
            "caches": [t for c in caches for t in (*c.tensors, *(c.scales if scales else ()))],
            "rotary_embs": angles,
            "exist_prefill": bool((new > 1).any()),
        }
        shape = (self.step.tokens, (h + 2 * kv) * d)
        self.qkv = [device.random(shape, seed=seed) for seed in range(4)]

    @staticmethod
    def _layer(device: Gpu, index: int, model: _Model, cache: Cache) -> AttentionLayer:
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

    def calls(self, exact: bool) -> list[Call]:
        """A call for each layer, of a step whose lengths the host knows exactly or not at all."""
        longest = np.zeros(9, np.int32)
        longest[[0, 3]] = int(self.step.new.max()), self.step.longest
        known = paddle.to_tensor(longest, place=paddle.CPUPlace()) if exact else None
        meta = ForwardMeta(**self.fields, max_len_tensor_cpu=known)
        self.backend.init_attention_metadata(meta)
        metadata = self.backend.attention_metadata

        def call(index: int) -> Any:
            self.backend.attention_metadata = metadata
            qkv, layer = self.qkv[index % len(self.qkv)], self.layers[index]
            return self.backend.forward_mixed(None, None, None, qkv, None, None, layer, meta)

        return [bind(call, index) for index in range(self.count)]

    def eager_us(self, calls: list[Call]) -> tuple[float, float]:
        """Microseconds of a layer without a graph: on the GPU's clock, and of the host alone."""
        calls = calls * max(1, -(-64 // len(calls)))
        for call in calls:
            call()
        self.device.wait()
        spent = []

        def run() -> None:
            begin = time.perf_counter_ns()
            for call in calls:
                call()
            spent.append((time.perf_counter_ns() - begin) / 1e3)

        us = cuda.median_event_us(run, times=5)
        return us / len(calls), statistics.median(spent) / len(calls)


@register("step", "gpu")
def step(device: Gpu) -> Iterator[Row]:
    """Layers of four models, every cache type: decode of 1 to 128 sequences, and a mixed step."""
    models, quants, steps = _QUICK if device.quick else (MODELS, QUANTS, STEPS)
    for model in models:
        for quant in quants:
            for name in steps:
                layers = _Layers(device, MODELS[model], quant, name)
                unknown, exact = layers.calls(exact=False), layers.calls(exact=True)
                us, shape = device.us(unknown), f"{model} {quant} {name}"
                row = Row("layer step", f"{shape}, graph", us)
                yield row.beside("exact lengths", device.us(exact))
                for other in peers("step", model=model, step=name):
                    if quant in other["quants"]:
                        yield row.beside(other["peer"], other["us"])
                eager, host = layers.eager_us(unknown)
                yield Row("layer step", f"{shape}, eager", eager, peer="host", peer_us=host)
                del layers, unknown, exact
