"""Host time of a call: what the caller's thread spends, the device working behind.

A server's step calls an operator or two a layer, and no CUDA graph hides that in prefill and mixed
steps. Every operator is called as users call it, in dygraph: through ``fastattn._direct``, and
through Paddle's registry, whose calls get slower with every operator that a process registers.
Therefore both are measured beside 300 operators that do nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import paddle

import fastattn.functional as F
from benchmarks.cases.inputs import Cache, Step
from benchmarks.core.devices import Cpu, Device
from benchmarks.core.dummies import COUNT, register_dummies
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind, interleaved
from fastattn import _ops
from fastattn.backends import AttentionLayer, FlashAttentionBackend, ForwardMeta, make_config
from fastattn.reference.layout import BLOCK_SIZE
from fastattn.reference.rope import make_rotary_embs

QUANT = "block_wise_fp8"
#: Seconds of calls before the first one that counts: a host that rested is slow at first.
WARM_UP_SECONDS = 3.0
#: Medians of a case, of which the least disturbed counts.
PASSES = 3
#: Microseconds that the Python layer may add to a call.
BUDGET_US = 10.0

#: What of the peers' report stands beside an operator: the start of its name there.
_PEERS = {
    "paged_attention": "vllm fa3 paged fp8 decode",
    "flash_attention": "vllm fa3 varlen bf16",
    "write_cache_kv": "vllm reshape_and_cache_flash fp8",
    "rope_write_cache_kv": "vllm rope + reshape_and_cache fp8",
    "merge_attn_states": "merge, vllm_cuda_fused",
}


class _Size(NamedTuple):
    """Heads of a model; on a CPU so small that kernels take less time than calls."""

    heads: int
    kv: int
    dim: int
    seqs: int  # of a decode step, one new token each
    cached: int  # tokens of each


_SIZES = {"cpu": _Size(1, 1, 64, 1, 0), "gpu": _Size(32, 8, 128, 16, 1023)}
#: Steps of a backend's layer: sequences, cached tokens of each, new tokens of each.
_LAYER_STEPS = {
    "cpu": [("decode, batch 1", 1, 0, 1)],
    "gpu": [
        ("decode, batch 1", 1, 1023, 1),
        ("decode, batch 64", 64, 1023, 1),
        ("chunk of 512 tokens", 1, 512, 512),
    ],
    "gpu quick": [("decode, batch 1", 1, 1023, 1)],
}


def _operator_calls(device: Device, size: _Size) -> Iterator[tuple[str, str, Call]]:
    """Operator, shape and call, of a decode step."""
    h, kv, d, t, _ = size
    step = Step(device, [size.cached] * t, [1] * t)
    cache = Cache(device, QUANT, step.blocks, kv, d)
    kv_cache, meta, options = cache.tensors, step.meta, cache.options
    q, k, v = (device.random((t, n, d), "float16") for n in (h, kv, kv))
    qkv = device.random((t, (h + 2 * kv) * d), "float16")
    table = device.array(make_rotary_embs(step.longest, d))
    lse, scale, whole = device.uniform((h, t)), device.uniform((1,)), device.int32([0, t])
    seqs, tokens = f"{t} sequences, H {h}/{kv} D {d}", f"{t} tokens, H {h}/{kv} D {d}"
    heads = {"num_heads": h, "num_kv_heads": kv}
    attend = bind(F.paged_attention, q, *kv_cache, *meta, 1, step.longest, **options)
    yield "paged_attention", seqs, attend
    flash = bind(F.flash_attention, q, k, v, whole, whole, t, t, causal=True)
    yield "flash_attention", tokens, flash
    yield "write_cache_kv", seqs, bind(F.write_cache_kv, k, v, *kv_cache, *meta, **options)
    rope = bind(F.rope_write_cache_kv, qkv, *kv_cache, table, *meta, **heads, **options)
    yield "rope_write_cache_kv", seqs, rope
    whole_step = bind(
        F.attention_step, qkv, *kv_cache, table, *meta, 1, step.longest, **heads, **options
    )
    yield "attention_step", seqs, whole_step
    merge = bind(F.merge_attn_states, q, lse, q, lse, output_scale=scale)
    yield "merge_attn_states", f"{t} tokens, H {h} D {d}", merge
    yield "quantize_fp8", f"{t} tokens", bind(F.quantize_fp8, q, granularity="token")
    convert = bind(F.convert_cache_blocks, cache.key, kind="k", cache_quant_type=QUANT)
    yield "convert_cache_blocks", "1 block", bind(convert, src="fastattn", dst="logical", end=1)


def _layer_calls(device: Device, size: _Size) -> Iterator[tuple[str, str, Call]]:
    """The same of a backend's layer: decode steps, and a chunk of a prompt."""
    h, kv, d, _, _ = size
    backend = FlashAttentionBackend(make_config(max_model_len=4096), kv, h, d)
    table = device.array(make_rotary_embs(4096, d))
    layer = AttentionLayer(layer_id=0, cache_quant_type_str=QUANT)
    for name, seqs, cached, new in device.of(_LAYER_STEPS):
        pages = -(-(cached + new) // BLOCK_SIZE)
        cache = Cache(device, QUANT, seqs * pages, kv, d)
        meta = ForwardMeta.for_step(
            cached=[cached] * seqs,
            new=[new] * seqs,
            block_tables=np.arange(seqs * pages).reshape(seqs, pages),
            caches=[*cache.tensors, *cache.scales],
            rotary_embs=table,
            place=device.place,
        )
        qkv = device.random((seqs * new, (h + 2 * kv) * d), "float16")
        backend.init_attention_metadata(meta)

        def layer_step(
            meta: Any = meta, qkv: Any = qkv, metadata: Any = backend.attention_metadata
        ) -> Any:
            backend.attention_metadata = metadata
            return backend.forward_mixed(None, None, None, qkv, None, None, layer, meta)

        yield "layer step", f"{name}, H {h}/{kv} D {d}", layer_step


def _median_us(device: Device, call: Call) -> float:
    """Median microseconds of the host in one call, as the peers are timed."""
    for _ in range(20):
        call()
    device.wait()
    spent = []
    for i in range(200):
        start = time.perf_counter_ns()
        call()
        spent.append((time.perf_counter_ns() - start) / 1e3)
        if i % 50 == 49:
            device.wait()  # a full launch queue would make the host wait inside a call
    return statistics.median(spent)


def _warm_up(device: Device, calls: list[Call]) -> None:
    """Make the calls in turn for a while: a host that rested is slow in its first seconds."""
    end = time.monotonic() + (0.1 if device.quick else WARM_UP_SECONDS)
    while time.monotonic() < end:
        for call in calls:
            call()
        device.wait()


def _host_us(device: Device, calls: list[Call]) -> list[float]:
    """Microseconds of each call, after a warm-up: the best median of passes over all of them."""
    _warm_up(device, calls)
    passes = [[_median_us(device, call) for call in calls] for _ in range(PASSES)]
    return [min(medians) for medians in zip(*passes)]


@contextmanager
def _through_registry() -> Iterator[None]:
    direct = _ops.call
    _ops.call = _ops.call_registered
    try:
        yield
    finally:
        _ops.call = direct


@register("host")
def host(device: Device) -> Iterator[Row]:
    """Every operator and a backend's layer: direct, and through Paddle's registry."""
    size = device.of(_SIZES)
    cases = [*_operator_calls(device, size), *_layer_calls(device, size)]
    calls = [call for _, _, call in cases]
    alone = _host_us(device, calls)
    more = COUNT if register_dummies() else 0
    direct = _host_us(device, calls)
    _ops.load()
    with _through_registry():
        registered = _host_us(device, calls)
    for (op, shape, _), before, us, other in zip(cases, alone, direct, registered):
        row = Row("host", f"{op}, {shape}, {more} more operators", us)
        if more:
            yield row.beside("itself, nothing registered", before)
        yield row.beside("Paddle's registry", other)
        for peer in peers("host"):
            if op in _PEERS and peer["name"].startswith(_PEERS[op]):
                yield Row("host", f"{op}, {shape}", us, peer=peer["name"], peer_us=peer["us"])


def _bare_call(function: Call) -> Call:
    """The operator call, bare of the Python layer, that `function` makes."""
    made: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = []
    original = _ops.call

    def record(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> list[Any]:
        made.append((op, inputs, attrs))
        return original(op, inputs, attrs)

    _ops.call = record
    try:
        function()
    finally:
        _ops.call = original
    ((op, inputs, attrs),) = made
    run, operators = _ops._load_direct()
    if run is None:
        registered = paddle.base.core.eager._run_custom_op
        return lambda: registered(_ops.PREFIX + op, *inputs, *attrs)
    handle = operators[op].handle
    return lambda: run(handle, inputs, attrs, None)


@register("overhead")
def overhead(device: Device) -> Iterator[Row]:
    """Microseconds that the Python layer adds; the peer is the budget.

    At the smallest sensible shapes, on the CPU: the kernel's time hides nothing then.
    """
    known = _ops.operators()
    for op, _, call in _operator_calls(Cpu(device.quick), _SIZES["cpu"]):
        if op not in known:
            continue  # a library built for one family of operators
        rounds, calls = (10, 50) if device.quick else (30, 200)
        layered, bare = interleaved([call, _bare_call(call)], rounds, calls)
        # The least disturbed round of each: a sum of small host times has no other noise-free part.
        us = min(layered) - min(bare)
        yield Row("overhead", f"Python layer of {op}", us, peer="budget", peer_us=BUDGET_US)
