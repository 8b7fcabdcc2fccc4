"""What it costs a prefill server to signal every layer's complete cache, beside the silent step.

A backend sends a signal between a layer's two operators, in the order of the stream: a System V
message (``per_chunk``) or integers in shared memory (``per_query``). On a GPU that is a call of the
host in the stream, which the layer's attention waits for. Another process takes the messages and
does nothing with them; a queue has room for two.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from unittest import mock

from benchmarks.cases.layers import MAX_MODEL_LEN, MODELS, Layers, Model
from benchmarks.core import cuda, timing
from benchmarks.core.devices import Device, Gpu
from benchmarks.core.rows import Row, register
from benchmarks.core.signal_receiver import receiver
from benchmarks.core.timing import Call, bind
from fastattn.backends import make_config
from fastattn.backends.kv_signals import queue_key, shared_names
from fastattn.env import KV_SIGNAL_SWITCH

MODES = ("None", "per_chunk", "per_query")
QUANT = "block_wise_fp8"
#: New tokens of the step's only sequence.
CHUNKS = {"gpu": (256, 2048, 8192), "gpu quick": (256,), "cpu": (64,)}
_MODELS = {"gpu": "Qwen3-8B", "cpu": ""}
_LAYERS = {"gpu": 16, "cpu": 4}
_SMALL = Model(2, 1, 64)


@contextlib.contextmanager
def _prefill_server() -> Iterator[None]:
    """The environment of a worker whose signals nobody but this benchmark receives."""
    names = {
        KV_SIGNAL_SWITCH: "1",
        "ENABLE_EP_DP": "1",
        "SHM_UUID": uuid.uuid4().hex,
        "INFERENCE_MSG_QUEUE_ID": str(0x8000 | uuid.uuid4().int & 0x7FFF),  # of 16 bits
    }
    with mock.patch.dict(os.environ, names), receiver(queue_key(0)):
        try:
            yield
        finally:
            for name in shared_names(0, "0"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"/dev/shm/{name}")


def _steps(layers: Layers) -> list[Call]:
    """A call of the whole step, for every mode."""

    def of_mode(mode: str) -> Call:
        config = make_config(max_model_len=MAX_MODEL_LEN)
        config.parallel_config.pd_disaggregation_mode = mode
        config.parallel_config.local_engine_worker_queue_port = 1  # as since FastDeploy 2.5
        backend, meta = layers.backend_of(config), layers.meta(exact=False)

        def step() -> None:
            backend.init_attention_metadata(meta)
            for index in range(len(layers.layers)):
                layers.forward(backend, index, meta)

        return step

    return [of_mode(mode) for mode in MODES]


def _rows(shape: str, how: str, us: list[float]) -> Iterator[Row]:
    silent, *signalled = us
    for mode, taken in zip(MODES[1:], signalled):
        yield Row("kv_signal", f"{mode}, {shape}, {how}", taken, peer="no signal", peer_us=silent)


@register("kv_signal")
def kv_signal(device: Device) -> Iterator[Row]:
    """A layer of a chunk of a prompt: eagerly, its host time, and in a CUDA graph."""
    model, count = MODELS.get(device.of(_MODELS), _SMALL), device.of(_LAYERS)
    with _prefill_server():
        for tokens in device.of(CHUNKS):
            layers = Layers(device, model, QUANT, [(0, tokens)], count)
            steps = _steps(layers)
            shape = f"chunk of {tokens}, H {model.heads}/{model.kv} D {model.dim}"
            if not isinstance(device, Gpu):
                us = timing.medians(steps, repeats=3 if device.quick else 30)
                yield from _rows(shape, "eager", [x / count for x in us])
                continue
            eager = cuda.median_eager_us([[step] for step in steps])
            yield from _rows(shape, "eager", [us / count for us, _ in eager])
            yield from _rows(shape, "host", [host / count for _, host in eager])
            graph = [device.us([bind(step)]) / count for step in steps]
            yield from _rows(shape, "graph", graph)
