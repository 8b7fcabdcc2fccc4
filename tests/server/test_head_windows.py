"""``head_wise_swa_ratio``, ``sink_size`` and block tables for each KV head in a backend."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastattn.backends import FlashAttentionBackend, make_config
from fastattn.backends.head_windows import head_windows
from fastattn.reference.attention import attention_mask, dense_attention
from tests.support.bounds import assert_error_ratio
from tests.support.serving import Model, Server
from tests.support.tensors import int32, to_numpy

WINDOW = 24


def make_server(place: str, part: float, first: int, **options) -> Server:
    model = Model(window=WINDOW, num_layers=2, **options)
    server = Server(FlashAttentionBackend, model, [150, 90], place)
    for name, value in (("head_wise_swa_ratio", part), ("sink_size", first)):
        setattr(server.config.model_config, name, value)
    server.backend = FlashAttentionBackend(server.config, model.kv_heads, model.heads, 64)
    return server


def check(server: Server, new: list[int], outs: dict, part: float, first: int) -> None:
    """Hold the outputs to fp64, head by head: the first ones see all."""
    model, start, group = server.model, 0, server.model.heads // server.model.kv_heads
    whole = round((1 - part) * model.heads) if part else 0
    for seq, n in enumerate(new):
        done = server.cached[seq]
        for layer, out in outs.items():
            q, k, v = model.project(server.tokens[seq][layer, : done + n])
            for head in range(model.heads):
                own = (-1, 0) if head < whole else (WINDOW - 1, first)
                visible = attention_mask(n, done + n, causal=True, head_window=own)
                kv = slice(head // group, head // group + 1)
                exact, naive = (
                    dense_attention(
                        q[done:, head : head + 1],
                        *(k[:, kv], v[:, kv], visible),
                        softmax_scale=0.125,
                        precision=precision,
                    )[0][:, 0]
                    for precision in ("float64", "bfloat16")
                )
                got = out[start : start + n].reshape(n, model.heads, 64)[:, head]
                assert_error_ratio(got, exact, naive, "bfloat16", f"layer {layer}, head {head}")
        start += n


@pytest.mark.parametrize(("part", "first"), [(0.5, 0), (0.5, 4), (0.0, 4), (1.0, 3)])
@pytest.mark.parametrize("quant", ["none", "block_wise_fp8"])
def test_steps(place, quant, part, first):
    server = make_server(place, part, first, cache_quant_type=quant)
    for new in ([70, 40], [1, 1], [5, 3], [20, 9]):
        outs = server.run(new)
        check(server, new, outs, part, first)
        again = server.run(new)  # by the layers' facts
        for layer in outs:
            np.testing.assert_array_equal(again[layer], outs[layer])
        server.cached = [done + n for done, n in zip(server.cached, new)]


def test_a_table_for_each_head(place):
    """Passed as ``block_tables`` [B, KV, max_blocks], to the writer and to the attention."""
    server = make_server(place, 0.5, 4, cache_quant_type="block_wise_fp8")
    for new in ([70, 40], [1, 1]):
        expected = server.run(new)
        meta = server.make_meta(new)
        tables = np.repeat(server.tables[:, None].astype(np.int32), 2, axis=1)
        meta.block_tables = int32(tables, place)
        server.backend.init_attention_metadata(meta)
        for layer in range(2):
            qkv = server.on(server.inputs(layer, new))
            out = server.backend.attend(qkv, server.layers[layer], meta)
            np.testing.assert_array_equal(to_numpy(out), expected[layer])
        server.cached = [done + n for done, n in zip(server.cached, new)]


def some_config(**model):
    config = make_config(max_model_len=512, num_key_value_heads=4, window_size=9)
    for name, value in model.items():
        setattr(config.model_config, name, value)
    return config


def pairs(heads: tuple[int, int, int], window: int = 9, **model) -> list:
    config = FlashAttentionBackend(some_config(**model), 4, 8, 64).config

    def refuse(what, more=""):
        raise NotImplementedError(what + more)

    return head_windows(config, window, heads, False, refuse)


def test_which_heads_have_the_window():
    assert pairs((8, 4, 64), head_wise_swa_ratio=0.75) == [(-1, 0), (8, 0), (8, 0), (8, 0)]
    assert pairs((8, 4, 64), head_wise_swa_ratio=0.25, sink_size=2) == [(-1, 0)] * 3 + [(8, 2)]
    assert pairs((8, 4, 64), sink_size=2) == [(8, 2)] * 4
    assert pairs((8, 4, 64)) == [] and pairs((8, 4, 64), 0, sink_size=2) == []
    with pytest.raises(NotImplementedError, match=r"head_wise_swa_ratio = 0\.4: its limit lies"):
        pairs((8, 4, 64), head_wise_swa_ratio=0.4)


@pytest.mark.parametrize("value", [-0.5, 1.5, "half", True])
def test_wrong_ratios(value):
    with pytest.raises(ValueError, match=r"head_wise_swa_ratio: expected a number from 0 to 1"):
        FlashAttentionBackend(some_config(head_wise_swa_ratio=value), 4, 8, 64)


def test_refused_together():
    server = make_server("cpu", 0.5, 0)
    offsets = int32(np.tile([[0, 5]], (10, 1)))
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"attn_mask_offsets .*windows of some heads"):
            server.run([5, 5], attn_mask_offsets=offsets)
        server.run([5, 5])
    mask = paddle.zeros([2, 8, 8], "bool")
    with pytest.raises(NotImplementedError, match=r"attn_mask .*for a layer with a window"):
        server.run([5, 5], attn_mask=mask)
    server = make_server("cpu", 0.5, 0)
    server.backend.batch_invariant = True
    with pytest.raises(NotImplementedError, match="batch_invariant"):
        server.run([5, 5])
