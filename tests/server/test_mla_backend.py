"""The MLA backend over a latent cache: every kind of step, every number of heads."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from fastattn import backends
from tests.server.test_pd import stop_after_signals
from tests.support.latent_serving import LatentServer, SparseServer
from tests.support.pd import MODES, configured, digest, fastdeploy, prefill, receive
from tests.support.tensors import int32, to_numpy

__all__ = ["fastdeploy", "prefill", "receive"]  # fixtures

#: Heads of a rank: DeepSeek-V3's 128 on 8 to 1 ranks, GLM's 64 on 8, and numbers that no tile has.
HEADS = (1, 3, 8, 16, 20, 32, 64, 128)


@pytest.mark.parametrize("heads", HEADS)
def test_a_day_of_steps(place, heads):
    """Prefill, chunks, a mixed step, drafts of which some are rejected, an idle sequence."""
    server = LatentServer([140, 75, 66], heads, place, drafts=1)
    server.step([70, 3, 0])
    server.step([50, 1, 65], prefill=[True, False, True])
    server.step([2, 2, 0], prefill=[False] * 3, advance=[1, 2, 0])
    server.step([2, 2, 1], prefill=[False] * 3)
    server.step([1, 1, 0], padding=5)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_block_sizes(place, page_size):
    server = LatentServer([150, 40], 8, place, page_size=page_size)
    server.step([100, 31])
    server.step([1, 1])


@pytest.mark.parametrize("splits", [[1] * 12, [5, 1, 6], [12], [3, 9]], ids=str)
def test_every_cut_gives_the_same_cache_and_outputs(splits):
    """Chunks at odd offsets: caches bit for bit the same, outputs checked against fp64."""
    whole, cut = (LatentServer([139], 16, layers=2) for _ in range(2))
    whole.step([127])
    cut.step([127])
    whole.step([12])
    for n in splits:
        cut.step([n])
    for a, b in zip(whole.caches, cut.caches):
        np.testing.assert_array_equal(a.view("int16").numpy(), b.view("int16").numpy())


def test_a_cached_prefix(place):
    server = LatentServer([150, 140], 16, place, shared=2)
    server.step([130, 0])
    server.cached[1] = 128  # blocks that sequence 0 wrote
    server.step([1, 12], prefill=[False, True])


def test_lengths_that_the_host_knows(place):
    server = LatentServer([150, 140], 16, place)
    lengths = np.zeros(9)
    lengths[[0, 3]] = 100, 100
    server.step([100, 30], max_len_tensor_cpu=int32(lengths, "cpu"))
    server.step([3, 1])


def test_tokens_without_positions_from_the_server():
    """FastDeploy 2.4 and 2.5 give none, and lengths of all slots in two dimensions."""
    server = LatentServer([90, 80, 70], 8)
    server.step([60, 10, 5])
    slots = np.concatenate([server.tables, np.full((2, server.tables.shape[1]), 1)])
    cached = np.array([[60], [10], [5], [77], [78]])
    fields = {"block_tables": int32(slots), "seq_lens_decoder": int32(cached)}
    server.step([1, 0, 30], prefill=[False, False, True], padding=3, **fields)


def test_models_are_told_to_absorb_all_queries():
    """FastDeploy's layers expand K and V if entry 1 is above 0, and absorb if entry 2 is."""
    server = LatentServer([40], 8)
    meta = server.meta([20], None, 0, {"max_len_tensor_cpu": int32([20] * 9, "cpu")})
    server.backend.init_attention_metadata(meta)
    lengths = meta.max_len_tensor_cpu
    assert lengths.place.is_cpu_place() and lengths.shape == [9]
    assert int(lengths[1]) == 0 and int(lengths[2]) > 0
    assert server.backend.get_attention_meta().host_lengths == (20, 20)


def test_an_empty_step():
    server = LatentServer([10], 4)
    server.step([5])
    meta = server.meta([0], None, 0, {})
    server.backend.init_attention_metadata(meta)
    nothing = paddle.zeros([0, 4 * 576], "bfloat16")
    latent, rope = paddle.zeros([0, 512], "bfloat16"), paddle.zeros([0, 1, 64], "bfloat16")
    out = server.backend.forward(nothing, None, None, None, latent, rope, server.layers[0], meta)
    assert out.shape == [0, 4 * 512]


def test_wrong_arguments_of_a_step():
    server = LatentServer([40], 8)
    q, latent, rope = (
        paddle.zeros(shape, "bfloat16") for shape in ([3, 8 * 576], [3, 512], [3, 1, 64])
    )
    layer = server.layers[0]
    run = server.backend.forward_mixed
    with pytest.raises(ValueError, match="init_attention_metadata was not called"):
        run(q, None, None, None, latent, rope, layer, server.meta([3], None, 0, {}))
    meta = server.meta([3], None, 0, {})
    server.backend.init_attention_metadata(meta)
    with pytest.raises(NotImplementedError, match="k, expanded keys or values"):
        run(q, q, q, None, latent, rope, layer, meta)
    with pytest.raises(ValueError, match=r"q: expected shape \[T, 4608\]"):
        run(q[:, :576], None, None, None, latent, rope, layer, meta)
    with pytest.raises(ValueError, match="q: expected the 3 tokens of compressed_kv, got 2"):
        run(q[:2], None, None, None, latent, rope, layer, meta)
    with pytest.raises(ValueError, match="compressed_kv: expected a tensor"):
        run(q, None, None, None, None, rope, layer, meta)
    wide = paddle.zeros([3, 1024], "bfloat16")
    with pytest.raises(ValueError, match=r"compressed_kv: expected shape \[3, 512\], got"):
        run(q, None, None, None, wide, rope, layer, meta)
    for wrong in (rope[:2], wide, None):
        with pytest.raises(ValueError, match=r"k_pe: expected shape \[3, 64\]"):
            run(q, None, None, None, latent, wrong, layer, meta)
    ids, meta.batch_id_per_token = meta.batch_id_per_token, meta.batch_id_per_token[:2]
    server.backend.init_attention_metadata(meta)
    with pytest.raises(ValueError, match="expected values of 3 tokens, got shape"):
        run(q, None, None, None, latent, rope, layer, meta)
    meta.batch_id_per_token = ids
    meta.seq_lens_decoder = meta.seq_lens_decoder[:0]
    server.backend.init_attention_metadata(meta)
    with pytest.raises(ValueError, match="seq_lens_decoder: expected values of 1 sequences"):
        run(q, None, None, None, latent, rope, layer, meta)
    layer.sliding_window = 5
    with pytest.raises(NotImplementedError, match="sliding_window"):
        run(q, None, None, None, latent, rope, layer, meta)
    for name in ("attn_mask", "attn_mask_offsets", "pre_caches_length"):
        with pytest.raises(NotImplementedError, match=f"forward_meta.{name}"):
            server.backend.init_attention_metadata(server.meta([3], None, 0, {name: q[0, :1] + 1}))


# --- a server that prefills for others -----------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_prefill_server_signals_complete_layers(prefill, monkeypatch, receive, mode):
    """In another process: the bytes at a layer's signal are those that the step leaves."""
    server = LatentServer([150, 40], 8, layers=2)
    server.config.scheduler_config = SimpleNamespace()
    server.backend = backends.MLAAttentionBackend(configured(server.config, mode), 1, 8, 576)
    receiver, seen = receive(server, mode), []
    stop_after_signals(monkeypatch, receiver, seen)
    for new in ([70, 17], [63, 3]):
        server.step(new)
        assert [told["layer"] for told in seen] == [0, 1]
        assert [told["digest"] for told in seen] == [digest(server, layer) for layer in (0, 1)]
        seen.clear()


# --- CUDA graph ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [LatentServer, SparseServer])
@pytest.mark.parametrize("given", [True, False], ids=["positions", "no positions"])
def test_a_captured_decode_step(place, kind, given):
    """Captured once; replayed for sequences that grow, rest and carry drafts, with padding."""
    if place != "gpu":
        pytest.skip("a graph is captured on a GPU")
    from tests.attention.test_gpu_graph import capture

    server = kind([200, 70, 90], 16, place, drafts=3, gives_positions=given)
    server.step([120, 5, 63])
    tokens, names = 6, list(server.tokens[0])
    held = server.meta([1, 1, 1], [False] * 3, 3, {"step_use_cudagraph": True})
    parts = {name: server.of_step(name, 0, [1, 1, 1], 3) for name in names}
    server.of_step = lambda name, *_: parts[name]

    def run():
        server.backend.init_attention_metadata(held)
        return server.run(0, [1, 1, 1], 3, held)

    server.chosen, server.keeps_tensors = [], True
    run()
    with capture() as graph:
        out = run()
    slots = server.chosen[-1:]
    fields = ("cu_seqlens_q", "seq_lens_this_time", "seq_lens_decoder", "batch_id_per_token")
    for new in ([1, 1, 1], [3, 0, 1], [1, 4, 1], [0, 1, 0], [1, 1, 1]):
        padding = tokens - sum(new)
        now = server.meta(new, [False] * 3, padding, {})
        for field in (*fields, "position_ids") if given else fields:
            getattr(held, field).copy_(getattr(now, field), True)
        for name, tensor in parts.items():
            tensor.copy_(type(server).of_step(server, name, 0, new, padding), True)
        graph.replay()
        server.chosen = [to_numpy(x) for x in slots]
        server.check(0, new, to_numpy(out).reshape(tokens, 16, 512))
        server.cached = [done + n for done, n in zip(server.cached, new)]
    graph.reset()
