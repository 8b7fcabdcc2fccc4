"""The DSA backend: index keys, the choice of keys, and attention over 656-byte latents."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastattn import backends
from fastattn.backends.indexer import TILE
from tests.support.latent_serving import LatentServer, SparseServer, softmax_attention
from tests.support.mla_dense import assert_outputs_close
from tests.support.tensors import to_numpy

#: Heads of a rank: V3.2's 128 and GLM's 64 on 8 to 1 ranks.
HEADS = (8, 16, 32, 64, 128)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("given", [False, True], ids=["no positions", "positions"])
def test_a_day_of_steps(place, heads, given):
    """Prefill, chunks, a mixed step, drafts of which some are rejected, an idle sequence."""
    server = SparseServer([140, 75, 66], heads, place, drafts=1, gives_positions=given)
    server.step([70, 3, 0])
    server.step([50, 1, 65], prefill=[True, False, True])
    server.step([2, 2, 0], prefill=[False] * 3, advance=[1, 2, 0])
    server.step([2, 2, 1], prefill=[False] * 3)
    server.step([1, 1, 0], padding=5)


@pytest.mark.parametrize("topk", [1, 7, 100, 2048])
@pytest.mark.parametrize("index_heads", [8, 32, 64])
def test_numbers_of_keys_and_heads(index_heads, topk):
    server = SparseServer([130, 90], 8, index_heads=index_heads, topk=topk, drafts=1)
    server.step([120, 66], padding=2)
    server.step([2, 1])


@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_block_sizes(page_size):
    server = SparseServer([150, 40], 8, page_size=page_size)
    server.step([100, 31])
    server.step([1, 1])


@pytest.mark.parametrize("splits", [[1] * 12, [5, 1, 6], [12], [3, 9]], ids=str)
def test_every_cut_gives_the_same_caches_and_choices(splits):
    whole, cut = (SparseServer([139], 16, layers=2, drafts=1) for _ in range(2))
    for server in (whole, cut):
        server.step([127])
        server.chosen.clear()
    whole.step([12])
    for n in splits:
        cut.step([n])
    for a, b in zip(whole.caches, cut.caches):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    for layer in range(2):
        np.testing.assert_array_equal(
            np.concatenate(cut.chosen[layer::2]), np.concatenate(whole.chosen[layer::2])
        )


def test_a_cached_prefix(place):
    server = SparseServer([150, 140], 16, place, shared=2)
    server.step([130, 0])
    server.cached[1] = 128
    server.step([1, 12], prefill=[False, True])


@pytest.mark.parametrize("new", [[1, 1, 1], [9, 0, 1]], ids=["decode", "prefill"])
def test_a_top_k_of_the_whole_context_is_dense_attention(new):
    """Over the dequantised cache; the plain backend's server knows what that is for all keys."""
    server = SparseServer([100, 60, 61], 16, topk=128)
    server.step([90, 59, 60])
    meta = server.meta(new, None, 0, {})
    server.backend.init_attention_metadata(meta)
    out = to_numpy(server.run(0, new, 0, meta))
    want = [
        softmax_attention(mine["q"][0, done + i], server.keys(0, seq, done + i + 1))
        for seq, (mine, done, n) in enumerate(zip(server.tokens, server.cached, new))
        for i in range(n)
    ]
    assert_outputs_close(out, np.array(want))


@pytest.mark.parametrize("new", [[TILE - 1, TILE, TILE + 1, 0, 1], [1] * 5, [40, 0, 0, 0, 0]])
def test_tiles_of_queries(new):
    """Sequences that end before, at and behind a row of queries."""
    server = SparseServer([60] * 5, 8, topk=16)
    server.step([15, 3, 0, 9, 1])
    server.step(new, prefill=[True] * 5, padding=TILE + 1)


def test_both_ways_to_make_rows_choose_the_same():
    """A decode step is the same whether or not the server calls it prefill."""
    servers = [SparseServer([100, 90], 8, topk=16, drafts=1) for _ in range(2)]
    for server, prefill in zip(servers, (False, True)):
        server.step([80, 70])
        server.step([2, 1], prefill=[prefill] * 2, padding=1)
    np.testing.assert_array_equal(servers[0].chosen[-1], servers[1].chosen[-1])


def test_ranks_choose_the_same_keys():
    """4 ranks of 8 heads: each has its own queries, and all the same indexer."""
    chosen = []
    for _ in range(4):
        server = SparseServer([120, 70], 8, topk=32)
        server.step([100, 60])
        server.step([1, 1])
        chosen.append(np.concatenate(server.chosen))
    assert all(np.array_equal(x, chosen[0]) for x in chosen)


def test_scales_by_amax():
    server = SparseServer([30], 8)
    server.backend = backends.DSAAttentionBackend(server.config, 1, 8, 576, scale_rule="amax")
    latent = server.tokens[0]["latent"].astype(np.float64).reshape(-1, 4, 128)
    meta = server.meta([30], None, 0, {})
    server.backend.init_attention_metadata(meta)
    server.run(0, [30], 0, meta)
    rows = server.caches[0].numpy().reshape(-1, 656)[server.slots(0, np.arange(30))]
    scales = np.ascontiguousarray(rows[:, 512:528]).view(np.float32)
    np.testing.assert_allclose(scales, np.abs(latent).max(-1) / 448, rtol=1e-6)
    with pytest.raises(ValueError, match="scale_rule: expected pow2 or amax, got 'ue8m0'"):
        backends.DSAAttentionBackend(server.config, 1, 8, 576, scale_rule="ue8m0")


def test_indices_of_a_caller_need_no_select():
    """Without a choice of the backend all indices of the list count; -1 is skipped."""
    server = SparseServer([20], 8, topk=4)
    server.step([10])
    meta = server.meta([1], None, 0, {})
    server.backend.init_attention_metadata(meta)
    q, latent, rope = (server.of_step(name, 0, [1], 0) for name in ("q", "latent", "rope"))
    slots = paddle.to_tensor([[-1, *server.slots(0, np.array([10, 3])), -1]], "int32")
    out = server.backend.forward(q, None, slots, None, latent, rope, server.layers[0], meta)
    keys = server.keys(0, 0, 11)[[3, 10]]
    assert_outputs_close(to_numpy(out), softmax_attention(server.tokens[0]["q"][0, 10], keys)[None])


def test_an_empty_step_and_a_missing_choice():
    server = SparseServer([10], 4)
    meta = server.meta([0], None, 0, {})
    server.backend.init_attention_metadata(meta)
    assert server.run(0, [0], 0, meta).shape == [0, 4, 512]
    args = [server.of_step(name, 0, [0], 0) for name in ("latent", "rope")]
    q = server.of_step("q", 0, [0], 0)
    with pytest.raises(ValueError, match=r"v: expected indices of select\(\)"):
        server.backend.forward(q, None, None, None, *args, server.layers[0], meta)


@pytest.mark.parametrize("what", ["keys", "weights"])
def test_keys_and_weights_are_those_of_the_step(what):
    server = SparseServer([10], 4)
    meta = server.meta([3], None, 0, {})
    server.backend.init_attention_metadata(meta)
    heads = server.backend.indexer.heads
    given = {
        "queries": paddle.zeros([3, heads, 128], "bfloat16"),
        "keys": paddle.zeros([3, 128], "bfloat16"),
        "weights": paddle.zeros([3, heads]),
    }
    for shape in ([6, given[what].shape[1]], [3, 1], [3, 2 * given[what].shape[1]]):
        wrong = {**given, what: paddle.zeros(shape, given[what].dtype)}
        with pytest.raises(ValueError, match=rf"{what}: expected shape \[3, "):
            server.backend.select(*wrong.values(), 0, meta)


def test_drafts_behind_the_longest_sequence_see_their_keys():
    """A server's limit is of what it keeps; drafts of a step go beyond it."""
    server = SparseServer([66], 4, drafts=3, max_model_len=64)
    server.step([62])
    server.step([4], prefill=[False])


def test_the_bytes_of_a_token_are_fastdeploys():
    sparse, dense = SparseServer([10], 4), LatentServer([10], 4)
    assert sparse.backend.get_kv_cache_shape(9, "uint8") == ([9, 1, 64, 656], [], [9, 64, 132])
    assert sparse.backend.get_kv_cache_shape(9) == ([9, 1, 64, 656], [])  # what engines unpack
    assert dense.backend.get_kv_cache_shape(9) == ([9, 1, 64, 576], [])
