"""Signals in the order of a GPU's stream."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from tests.support.pd import (
    MODES,
    digest,
    fastdeploy,
    messages,
    prefill,
    prefill_worker,
    receive,
)
from tests.support.tensors import int32, to_numpy, to_paddle

__all__ = ["fastdeploy", "messages", "prefill", "receive"]  # fixtures


def busy(times):
    """Queue work on the GPU that takes a while: attention over and over."""
    tokens = 8192
    q, k, v = (to_paddle(np.zeros([tokens, 32, 128], np.float16), "gpu") for _ in "qkv")
    starts = int32([0, tokens], "gpu")
    for _ in range(times):
        F.flash_attention(q, k, v, starts, starts, tokens, tokens, causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("early", [False, True])
def test_the_order_of_the_stream(prefill, receive, place, mode, early):
    """A busy GPU: the host is far ahead, the signal comes when the layer is complete, not before.

    Sent ahead of the write (`early`), it finds other bytes: so the receiver does look in time.
    """
    if place != "gpu":
        pytest.skip("the order of a GPU's stream")
    seqs = 8
    worker = prefill_worker(mode, "block_wise_fp8", [500] * seqs, place)
    receiver = receive(worker, mode)
    new = [500] * seqs
    meta = worker.make_meta(worker.metadata(new, [True] * seqs, sum(new)))
    qkv = worker.on(worker.rank_qkv(0, new, 0))
    paddle.device.cuda.synchronize()
    worker.backend.init_attention_metadata(meta)
    layer = worker.layers[0]
    if early:
        worker.backend._signals.send(*worker.caches[:2], layer, meta)
    busy(200)
    layer.forward(qkv=qkv, forward_meta=meta)
    told = receiver.next()
    while told["layer"] != 0:
        told = receiver.next()
    paddle.device.cuda.synchronize()
    assert (told["digest"] == digest(worker, 0)) != early


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "block_wise_fp8"])
def test_eager_steps_signal_in_order(place, messages, kind):
    """Signals run beside the attention, and neither overtake each other nor the step's begin.

    The queue has room for two of them, and nobody takes any while the step runs.
    """
    if place != "gpu":
        pytest.skip("the order of a GPU's stream")
    worker = prefill_worker("per_chunk", kind, [150, 170, 40], place)
    for new in ([70, 0, 17], [60, 100, 3], [2, 70, 20]):
        meta = worker.make_meta(worker.metadata(new, [True] * 3, sum(new)))
        qkvs = [worker.on(worker.rank_qkv(i, new, 0)) for i in range(len(worker.layers))]
        busy(20)
        worker.backend.init_attention_metadata(meta)
        outs = [x(qkv=qkv, forward_meta=meta) for x, qkv in zip(worker.layers, qkvs)]
        for i, out in enumerate(outs):
            worker.check(i, new, to_numpy(out))
        of_step = [x for i, n in enumerate(new) if n for x in (i, worker.cached[i], n)]
        assert messages() == [[len(of_step) // 3, layer, *of_step] for layer in (0, 1)]
        worker.cached = [done + n for done, n in zip(worker.cached, new)]


@pytest.mark.gpu
def test_a_captured_step_signals_at_every_replay(place, messages):
    """Lengths of a replay come from init_attention_metadata, which the server calls before it."""
    if place != "gpu":
        pytest.skip("a graph is captured on a GPU")
    from tests.attention.test_gpu_graph import capture

    worker = prefill_worker("per_chunk", "float8_e4m3fn", [150, 170], place, layers=1)
    new = [20, 3]
    arrays = worker.metadata(new, [True, True], 23)
    held = worker.make_meta(arrays, step_use_cudagraph=True, is_dummy_or_profile_run=True)
    qkv = worker.on(worker.rank_qkv(0, new, 0))

    def run():
        return worker.layers[0].forward(qkv=qkv, forward_meta=held)

    worker.backend.init_attention_metadata(held)
    run()
    paddle.device.cuda.synchronize()
    with capture() as graph:
        run()
    graph.replay()
    paddle.device.cuda.synchronize()
    assert messages() == []  # warm-ups say nothing
    held.is_dummy_or_profile_run = False
    for step in range(3):
        worker.backend.init_attention_metadata(held)
        graph.replay()
        paddle.device.cuda.synchronize()
        assert messages() == [[2, 0, 0, 20 * step, 20, 1, 3 * step, 3]]
        worker.cached = [done + n for done, n in zip(worker.cached, new)]
        for name, array in worker.metadata(new, [True, True], 23).items():
            if name != "max_len_tensor_cpu":
                getattr(held, name).copy_(worker.on(np.asarray(array, np.int32)), True)
    graph.reset()
