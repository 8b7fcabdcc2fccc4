"""Signals in the order of a GPU's stream."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from tests.support.pd import (
    MODES,
    digest,
    fastdeploy,
    messages,
    prefill,
    prefill_worker,
    receive,
)

__all__ = ["fastdeploy", "messages", "prefill", "receive"]  # fixtures


def busy(worker, meta, times):
    """Queue work on the GPU that takes a while: attention over and over."""
    layer = worker.layers[1]
    qkv = worker.on(worker.rank_qkv(1, [4000], 0))
    signals, worker.backend._signals = worker.backend._signals, None
    for _ in range(times):
        worker.backend.forward(None, None, None, qkv, None, None, layer, meta)
    worker.backend._signals = signals


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("early", [False, True])
def test_the_order_of_the_stream(prefill, monkeypatch, receive, place, mode, early):
    """A busy GPU: the host is far ahead, the signal comes when the layer is complete, not before.

    Sent ahead of the write (`early`), it finds other bytes: so the receiver does look in time.
    """
    if place != "gpu":
        pytest.skip("the order of a GPU's stream")
    monkeypatch.setattr("tests.support.serving.MAX_MODEL_LEN", 4096)
    worker = prefill_worker(mode, "block_wise_fp8", [4000], place)
    receiver = receive(worker, mode)
    meta = worker.make_meta(worker.metadata([4000], [True], 4000))
    worker.backend.init_attention_metadata(meta)
    qkv = worker.on(worker.rank_qkv(0, [4000], 0))
    layer, caches = worker.layers[0], worker.caches[:2]
    if early:
        worker.backend._signals.send(*caches, layer, meta)
    busy(worker, meta, 200)
    if not early:
        assert not (receiver.next(0.0) or {}).get("layer", -1) >= 0
    worker.backend.forward(None, None, None, qkv, None, None, layer, meta)
    told = receiver.next()
    while told["layer"] != 0:
        told = receiver.next()
    paddle.device.cuda.synchronize()
    assert (told["digest"] == digest(worker, 0)) != early


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
        return worker.layers[0].forward(qkv, held)

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
