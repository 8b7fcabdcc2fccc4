"""Signals of a prefill server's worker that a layer's cache is complete."""

from __future__ import annotations

import ctypes
import importlib
import os

import paddle
import pytest

from fastattn import _ops
from fastattn.backends.kv_signals import KvSignals, queue_key, shared_names
from fastattn.env import KV_SIGNAL_SWITCH
from tests.support import kv_receiver
from tests.support.fastdeploy import make_fd_config, make_model
from tests.support.pd import (
    MODES,
    chosen,
    configured,
    digest,
    fastdeploy,
    messages,
    prefill,
    prefill_worker,
    receive,
)
from tests.support.tensors import int32, to_numpy

__all__ = ["fastdeploy", "messages", "prefill", "receive"]  # fixtures

each_mode = pytest.mark.parametrize("mode", MODES)


def stop_after_signals(monkeypatch, receiver, seen):
    """Make the worker wait behind each signal until the receiver has looked at the layer.

    So what it saw is what was there when the signal was sent, not what came later.
    """
    send = KvSignals.send

    def send_and_wait(self, key, value, layer, forward_meta):
        send(self, key, value, layer, forward_meta)
        told = receiver.next()
        while told["layer"] != layer.layer_id:  # the integers' state between steps
            told = receiver.next()
        seen.append(told)

    monkeypatch.setattr(KvSignals, "send", send_and_wait)


# --- a layer is complete when its signal comes ---------------------------------------------------


@each_mode
@pytest.mark.parametrize("kind", [None, "block_wise_fp8", "int8"])
def test_a_receiver_finds_the_layer_complete(prefill, monkeypatch, receive, mode, kind):
    """In another process: the bytes at the signal are those that the step leaves."""
    worker = prefill_worker(mode, kind, [150, 170, 40])
    receiver, seen = receive(worker, mode), []
    stop_after_signals(monkeypatch, receiver, seen)
    for new in ([70, 0, 17], [1, 100, 1], [63, 2, 3]):
        before = [digest(worker, layer) for layer in (0, 1)]
        worker.step(new)
        after = [digest(worker, layer) for layer in (0, 1)]
        assert all(x != y for x, y in zip(before, after))
        assert [told["digest"] for told in seen] == after
        assert [told["layer"] for told in seen] == [0, 1]
        seen.clear()


@each_mode
def test_that_receiver_sees_a_layer_that_is_not_complete(prefill, receive, mode):
    """The control of the test above: a signal ahead of the write finds other bytes."""
    worker = prefill_worker(mode, None, [30])
    receiver = receive(worker, mode)
    meta = worker.make_meta(worker.metadata([30], [True], 30))
    worker.backend.init_attention_metadata(meta)
    worker.backend._signals.send(*worker.caches[:2], worker.layers[0], meta)
    told = receiver.next()
    while told["layer"] != 0:
        told = receiver.next()
    worker.layers[0].forward(qkv=worker.on(worker.rank_qkv(0, [30], 0)), forward_meta=meta)
    assert told["digest"] != digest(worker, 0)


# --- what a signal says --------------------------------------------------------------------------


def test_messages_of_a_chunk(messages):
    """Sequences, layer; then slot, cached and new tokens of every sequence that prefills."""
    worker = prefill_worker("per_chunk", "float8_e4m3fn", [150, 170, 40])
    worker.step([70, 0, 17])
    assert messages() == [[2, layer, 0, 0, 70, 2, 0, 17] for layer in (0, 1)]
    worker.step([1, 100, 1])  # slots 0 and 2 decode
    assert messages() == [[1, layer, 1, 0, 100] for layer in (0, 1)]
    worker.step([30, 70, 2])
    each = [0, 71, 30, 1, 100, 70, 2, 18, 2]
    assert messages() == [[3, layer, *each] for layer in (0, 1)]


def test_steps_that_say_nothing(messages):
    worker = prefill_worker("per_chunk", None, [150, 40])
    worker.step([5, 7], is_dummy_or_profile_run=True)
    worker.step([1, 1])
    worker.step([3, 3], prefill=[False, False])  # drafts
    worker.step([0, 4], tbo_microbatch_id=0)
    assert messages() == []
    worker.step([0, 4], tbo_microbatch_id=1)
    assert messages() == [[1, layer, 1, 15, 4] for layer in (0, 1)]


def test_a_draft_model_continues_the_step(messages):
    """Its layers follow the main model's; its later passes over the step's tokens say nothing."""
    worker = prefill_worker("per_chunk", None, [40])
    worker.step([20])
    assert [text[1] for text in messages()] == [0, 1]
    config = configured(
        make_fd_config(make_model(None)),
        "per_chunk",
        speculative_config__model_type="mtp",
        model_config__start_layer_index=2,
    )
    draft = chosen()(config, worker.kv_heads, worker.q_heads, worker.model.head_dim)
    for _ in range(2):
        meta = worker.make_meta(worker.metadata([3], [True], 3))
        draft.init_attention_metadata(meta)
        layer, qkv = worker.layers[0], worker.on(worker.rank_qkv(0, [3], 0))
        draft.forward(None, None, None, qkv, None, None, layer, meta)
    assert messages() == [[1, 2, 0, 0, 20]]


class Traced(paddle.nn.Layer):
    """A layer that attends through a backend, as a server's does."""

    def __init__(self, worker, meta):
        super().__init__()
        self.worker, self.meta = worker, meta

    def forward(self, qkv):
        layer, backend = self.worker.layers[0], self.worker.backend
        return backend.forward(None, None, None, qkv, None, None, layer, self.meta)


@pytest.mark.skipif(not hasattr(paddle, "pir"), reason="this Paddle traces no backend")
@pytest.mark.parametrize("kind", [None, "block_wise_fp8"])
def test_a_program_signals_at_every_run(messages, kind):
    worker = prefill_worker("per_chunk", kind, [40])
    meta = worker.make_meta(worker.metadata([20], [True], 20))
    qkv = worker.on(worker.rank_qkv(0, [20], 0))
    worker.backend.init_attention_metadata(meta)
    program = paddle.jit.to_static(Traced(worker, meta), full_graph=True)
    program.eval()
    for _ in range(2):
        worker.backend.init_attention_metadata(meta)
        worker.check(0, [20], to_numpy(program(qkv)))
        assert messages() == [[1, 0, 0, 0, 20]]


def test_the_two_integers(prefill):
    """Each step counts, warm-ups too, modulo 100003; layers count where a sequence prefills."""
    worker = prefill_worker("per_query", None, [150, 40])
    step, layer = (kv_receiver.shared_integer(name) for name in shared_names(0, "0"))
    step[0], layer[0] = -1, 7
    for new, expected in (([70, 0], (0, 1)), ([1, 1], (1, -1)), ([1, 30], (2, 1))):
        worker.step(new)
        assert (step[0], layer[0]) == expected
    worker.step([4, 4], is_dummy_or_profile_run=True)
    assert (step[0], layer[0]) == (3, -1)
    step[0] = 100002
    worker.step([4, 0])
    assert (step[0], layer[0]) == (0, 1)


@pytest.mark.parametrize("size", [1, 4])
def test_ranks_and_devices(prefill, monkeypatch, size):
    """A data-parallel group's ranks follow each other; devices come from CUDA_VISIBLE_DEVICES."""
    monkeypatch.delenv("ENABLE_EP_DP")
    config = configured(
        make_fd_config(make_model(None, heads=8, kv_heads=4), size=size), "per_query"
    )
    config.parallel_config.local_data_parallel_id = 2
    config.parallel_config.tensor_parallel_rank = size - 1
    rank = 2 * size + size - 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    name = "splitwise_complete_prefilled"
    assert (
        KvSignals.of(config).channel == f"shm:{name}_layer_{rank}.{rank}:{name}_step_{rank}.{rank}"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    device = [4, 5, 6, 7][rank % 4]
    assert KvSignals.of(config).channel.endswith(f"{name}_step_{rank}.{device}")


@pytest.mark.parametrize(("number", "rank"), [(None, 0), (65535, 7), (40001, 12)])
def test_the_key_of_the_queue(monkeypatch, number, rank):
    monkeypatch.delenv("INFERENCE_MSG_QUEUE_ID", raising=False)
    if number is not None:
        monkeypatch.setenv("INFERENCE_MSG_QUEUE_ID", str(number))
    place = os.stat("/opt/")
    low = ((1024 if number is None else number) << (4 + rank)) % 2**20
    key = place.st_dev % 16 << 28 | place.st_ino % 256 << 20 | low
    assert queue_key(rank) == ctypes.c_int(key).value


# --- when signals are sent -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["None", *MODES])
@pytest.mark.parametrize("role", ["mixed", "prefill", "decode"])
@pytest.mark.parametrize("flag", [None, "0", "1", "true"])
def test_who_signals(prefill, monkeypatch, mode, role, flag):
    """FastDeploy's variable decides, which it sets for prefill servers; every role is accepted."""
    monkeypatch.delenv(KV_SIGNAL_SWITCH)
    if flag is not None:
        monkeypatch.setenv(KV_SIGNAL_SWITCH, flag)
    config = configured(
        make_fd_config(make_model(None)), mode, scheduler_config__splitwise_role=role
    )
    signals = chosen()(config, 2, 4, 64)._signals
    assert (signals is not None) == (mode != "None" and flag in ("1", "true"))


@each_mode
def test_nobody_waits_where_caches_go_through_a_storage(prefill, monkeypatch, mode):
    envs = importlib.import_module("fastdeploy.envs")
    config = configured(make_fd_config(make_model(None)), mode)
    for value, expected in ((1, None), (0, KvSignals)):
        monkeypatch.setattr(envs, "FD_PD_TRANSFER_VIA_STORAGE", value, raising=False)
        signals = chosen()(config, 2, 4, 64)._signals
        assert signals is None if expected is None else isinstance(signals, expected)
    monkeypatch.delattr(envs, "FD_PD_TRANSFER_VIA_STORAGE")  # other releases do not have it
    monkeypatch.setenv("FD_PD_TRANSFER_VIA_STORAGE", "1")
    assert chosen()(config, 2, 4, 64)._signals is not None


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("parallel_config__pd_disaggregation_mode", "per_layer", "None, per_chunk, per_query"),
        ("scheduler_config__splitwise_role", "encode", "mixed, prefill, decode"),
        ("scheduler_config__max_num_seqs", 513, "512 sequences"),
    ],
)
def test_what_is_refused(prefill, path, value, text):
    config = configured(make_fd_config(make_model(None)), "per_chunk", **{path: value})
    name = path.replace("__", ".")
    with pytest.raises(NotImplementedError, match=f"FlashAttentionBackend: {name} = .*{text}"):
        chosen()(config, 2, 4, 64)


# --- the operators -------------------------------------------------------------------------------


def begin(batch=1, channel="", seqs=1):
    return _ops.call(
        "begin_kv_signals", (int32([4] * seqs), int32([0] * seqs)), (batch, False, channel)
    )


def send(layer_id=0, channel=""):
    caches = [paddle.zeros([2, 2, 64, 64]) for _ in "kv"]
    return _ops.call("send_kv_signal", tuple(caches), (layer_id, channel))


def test_no_channel():
    assert to_numpy(begin()[0]).tolist() == [0]
    send()


@pytest.mark.parametrize(
    "channel",
    [
        *("other", "queue", "queue:", "queue:x", "queue:1x", "queue:99999999999"),
        *("shm:a", "shm::b", "shm:a:", "shm:a:b:c", "shm:../a:b", "shm:a:b/c"),
    ],
)
def test_channels_that_are_none(channel):
    for call in (begin, send):
        with pytest.raises(ValueError, match="channel: expected '', queue:<key> or shm:"):
            call(channel=channel)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"batch: expected 0 to 512 sequences.*got 513"):
        begin(batch=513, seqs=513)
    with pytest.raises(ValueError, match=r"seq_lens_encoder: expected at least batch = 3"):
        begin(batch=3, seqs=2)
    with pytest.raises(ValueError, match=r"layer_id: expected at least 0, got -1"):
        send(layer_id=-1)


def test_a_channel_that_cannot_be_opened():
    with pytest.raises(RuntimeError, match=r"begin_kv_signals: channel: .*shm_open a+: "):
        begin(channel=f"shm:{'a' * 300}:b")


def test_a_queue_that_is_gone(prefill):
    """What a signal runs into is raised by the next call, as on a GPU."""
    channel = f"queue:{queue_key(0)}"
    assert to_numpy(begin(channel=channel)[0]).tolist() == [1]
    opened = kv_receiver.LIBC.msgget(queue_key(0), 0)
    kv_receiver.LIBC.msgctl(opened, 0, None)
    send(channel=channel)
    with pytest.raises(RuntimeError, match=r"channel: queue:.*msgsnd: "):
        send(1, channel)
