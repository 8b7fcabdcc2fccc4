"""Host time of a call: what the caller's thread spends, the device working behind.

A server's step calls two operators a layer, and no CUDA graph hides that in prefill and mixed
steps. Every operator is called as users call it, in dygraph: through ``fastattn._direct``, and
through Paddle's registry, whose calls get slower with every operator that a process registers.
Therefore both are measured beside 300 operators that do nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

import fastattn.functional as F
from fastattn import _ops
from fastattn.backends import AttentionLayer, FlashAttentionBackend, ForwardMeta, make_config
from fastattn.bench.common import Row, register
from fastattn.bench.dummies import COUNT, register_dummies
from fastattn.bench.peers import peers
from fastattn.reference.layout import BLOCK_SIZE
from fastattn.reference.rope import make_rotary_embs

Call = Callable[[], object]
QUANT = "block_wise_fp8"

#: What of the peers' report stands beside an operator: the start of its name there.
_PEERS = {
    "paged_attention": "vllm fa3 paged fp8 decode",
    "flash_attention": "vllm fa3 varlen bf16",
    "write_cache_kv": "vllm reshape_and_cache_flash fp8",
    "rope_write_cache_kv": "vllm rope + reshape_and_cache fp8",
    "merge_attn_states": "merge, vllm_cuda_fused",
}


@dataclass(frozen=True)
class _Size:
    """Heads of a model; on a CPU so small that kernels take less time than calls."""

    heads: int
    kv_heads: int
    dim: int
    tokens: int  # sequences of a decode step, one new token each
    cached: int  # tokens of each


class _Device:
    """Makes tensors on the place that is measured."""

    def __init__(self, on_gpu: bool) -> None:
        self.place = paddle.CUDAPlace(0) if on_gpu else paddle.CPUPlace()
        self._rng = np.random.default_rng(7)

    def array(self, values: Any, dtype: Any) -> paddle.Tensor:
        return paddle.to_tensor(np.ascontiguousarray(values, dtype), place=self.place)

    def int32(self, values: Any) -> paddle.Tensor:
        return self.array(values, np.int32)

    def float16(self, *shape: int) -> paddle.Tensor:
        return self.array(self._rng.normal(size=shape), np.float16)

    def float32(self, *shape: int) -> paddle.Tensor:
        return self.array(self._rng.uniform(0.5, 1.0, size=shape), np.float32)

    def codes(self, *shape: int) -> paddle.Tensor:
        return self.array(self._rng.integers(0, 100, size=shape), np.uint8)

    def caches(self, blocks: int, size: _Size) -> list[paddle.Tensor]:
        return [
            self.codes(blocks, size.kv_heads, BLOCK_SIZE, size.dim),
            self.codes(blocks, size.kv_heads, size.dim, BLOCK_SIZE),
            self.float32(blocks, size.kv_heads, BLOCK_SIZE),
            self.float32(blocks, size.kv_heads, BLOCK_SIZE),
        ]

    def wait(self) -> None:
        if isinstance(self.place, paddle.CUDAPlace):
            paddle.device.cuda.synchronize()


def _operator_calls(device: _Device, size: _Size) -> Iterator[tuple[str, str, Call]]:
    """Operator, shape and call, of a decode step."""
    t, h, kv, d = size.tokens, size.heads, size.kv_heads, size.dim
    pages = size.cached // BLOCK_SIZE + 1
    key_cache, value_cache, k_scales, v_scales = device.caches(t * pages, size)
    cache = {"cache_k_scales": k_scales, "cache_v_scales": v_scales, "cache_quant_type": QUANT}
    seqs = (
        device.int32(np.arange(t * pages).reshape(t, pages)),
        device.int32(np.arange(t + 1)),
        device.int32(np.full(t, size.cached)),
        device.int32(np.ones(t)),
    )
    q, k, v = device.float16(t, h, d), device.float16(t, kv, d), device.float16(t, kv, d)
    qkv = device.float16(t, (h + 2 * kv) * d)
    table = device.array(make_rotary_embs(size.cached + 1, d), np.float32)
    lse, scale = device.float32(h, t), device.float32(1)
    whole = device.int32([0, t])
    shape = f"{t} sequences, H {h}/{kv} D {d}"
    longest = size.cached + 1
    yield (
        "paged_attention",
        shape,
        lambda: F.paged_attention(q, key_cache, value_cache, *seqs, 1, longest, **cache),
    )
    yield (
        "flash_attention",
        f"{t} tokens, H {h}/{kv} D {d}",
        lambda: F.flash_attention(q, k, v, whole, whole, t, t, causal=True),
    )
    yield (
        "write_cache_kv",
        shape,
        lambda: F.write_cache_kv(k, v, key_cache, value_cache, *seqs, **cache),
    )
    yield (
        "rope_write_cache_kv",
        shape,
        lambda: F.rope_write_cache_kv(
            qkv, key_cache, value_cache, table, *seqs, num_heads=h, num_kv_heads=kv, **cache
        ),
    )
    yield (
        "merge_attn_states",
        f"{t} tokens, H {h} D {d}",
        lambda: F.merge_attn_states(q, lse, q, lse, output_scale=scale),
    )
    yield "quantize_fp8", f"{t} tokens", lambda: F.quantize_fp8(q, granularity="token")
    yield (
        "convert_cache_blocks",
        "1 block",
        lambda: F.convert_cache_blocks(
            key_cache, kind="k", cache_quant_type=QUANT, src="fastattn", dst="logical", end=1
        ),
    )


def _layer_calls(device: _Device, size: _Size, quick: bool) -> Iterator[tuple[str, Call]]:
    """Shape and call of a backend's layer: decode steps, and a chunk of a prompt."""
    steps = [("decode, batch 1", [size.cached], [1])]
    if not quick and size.tokens > 1:
        steps.append(("decode, batch 64", [size.cached] * 64, [1] * 64))
        steps.append(("chunk of 512 tokens", [512], [512]))
    backend = FlashAttentionBackend(
        make_config(max_model_len=4096), size.kv_heads, size.heads, size.dim
    )
    table = device.array(make_rotary_embs(4096, size.dim), np.float32)
    layer = AttentionLayer(layer_id=0, cache_quant_type_str=QUANT)
    for name, cached, new in steps:
        pages = -(-(cached[0] + new[0]) // BLOCK_SIZE)
        meta = ForwardMeta.for_step(
            cached=cached,
            new=new,
            block_tables=np.arange(len(new) * pages).reshape(len(new), pages),
            caches=device.caches(len(new) * pages, size),
            rotary_embs=table,
            place=device.place,
        )
        qkv = device.float16(sum(new), (size.heads + 2 * size.kv_heads) * size.dim)
        backend.init_attention_metadata(meta)
        metadata = backend.attention_metadata

        def layer_step(meta: Any = meta, qkv: Any = qkv, metadata: Any = metadata) -> Any:
            backend.attention_metadata = metadata
            return backend.forward_mixed(None, None, None, qkv, None, None, layer, meta)

        yield f"{name}, H {size.heads}/{size.kv_heads} D {size.dim}", layer_step


def _host_us(device: _Device, call: Call, calls: int = 200) -> float:
    """Median microseconds of the host in one call, as the peers are timed."""
    for _ in range(20):
        call()
    device.wait()
    spent = []
    for i in range(calls):
        start = time.perf_counter_ns()
        call()
        spent.append((time.perf_counter_ns() - start) / 1e3)
        if i % 50 == 49:
            device.wait()  # a full launch queue would make the host wait inside a call
    return statistics.median(spent)


def _warm_up(device: _Device, call: Call, seconds: float = 0.5) -> None:
    """Call for a while: a processor that rested is slow at first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        call()
        device.wait()


@contextmanager
def _through_registry() -> Iterator[None]:
    direct = _ops.call
    _ops.call = _ops.call_registered
    try:
        yield
    finally:
        _ops.call = direct


def _beside(op: str, shape: str, us: float) -> Iterator[Row]:
    """Rows of the other libraries' functions that do an operator's work."""
    for other in peers("host"):
        if op in _PEERS and other["name"].startswith(_PEERS[op]):
            yield Row("host", f"{op}, {shape}", us, peer=other["name"], peer_us=other["us"])


@register("host")
def host_rows(quick: bool) -> Iterator[Row]:
    """Every operator and a backend's layer: direct, and through Paddle's registry."""
    on_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    device = _Device(on_gpu)
    size = _Size(32, 8, 128, 16, 1023) if on_gpu else _Size(1, 1, 64, 1, 0)
    calls = list(_operator_calls(device, size))
    calls += [("layer step", shape, call) for shape, call in _layer_calls(device, size, quick)]
    _warm_up(device, calls[0][2])
    alone = [_host_us(device, call) for _, _, call in calls]
    more = COUNT if register_dummies() else 0
    beside = f"{more} more operators"
    direct = [_host_us(device, call) for _, _, call in calls]
    _ops.load()
    with _through_registry():
        registered = [_host_us(device, call) for _, _, call in calls]
    for (op, shape, _), before, us, other in zip(calls, alone, direct, registered):
        if more:
            text = "itself, nothing registered"
            yield Row("host", f"{op}, {shape}, {beside}", us, peer=text, peer_us=before)
        yield Row("host", f"{op}, {shape}, {beside}", us, peer="Paddle's registry", peer_us=other)
        yield from _beside(op, shape, us)
