"""Faults of other backends of latent caches, by the numbers of docs/faults.md."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import paddle
import pytest

from fastattn import functional
from fastattn._plugin import patches
from fastattn._plugin.patches import KEY_NORM
from fastattn.backends import fastdeploy_models, latent
from tests.support.latent_serving import LatentServer, SparseServer
from tests.support.tensors import EMPTY_OUTPUTS, int32, to_numpy, to_paddle

SERVERS = pytest.mark.parametrize("kind", [LatentServer, SparseServer])


def pages_of(slots, server):
    return set((slots[slots >= 0] // server.page_size).tolist())


@SERVERS
def test_bug13_more_tokens_than_the_host_was_told(kind):
    """5 new tokens of a decoding sequence beside a prefill; the host was told of 1, and 26 keys."""
    server = kind([30, 80], 8, drafts=4)
    server.step([20, 0])
    told = int32([1, 0, 20, 21, 21, 21, 0, 0, 0], "cpu")
    server.step([5, 70], prefill=[False, True], max_len_tensor_cpu=told)
    server.step([5, 1], prefill=[False, False], max_len_tensor_cpu=told)


@pytest.mark.parametrize("topk", [9, 16, 64])
def test_bug24_a_short_row_lists_itself_last(topk):
    """Token i of a prompt of 9 chooses 0 to i, and not its successor, whose key is written too."""
    server = SparseServer([9], 8, topk=topk)
    server.step([9])
    own = server.slots(0, np.arange(9))
    for i, row in enumerate(server.chosen[0]):
        np.testing.assert_array_equal(row[row >= 0], own[: i + 1])


@pytest.mark.parametrize("topk", [4, 64])
def test_bug25_each_sequence_chooses_among_its_own_keys(topk):
    server = SparseServer([40, 70, 30], 8, topk=topk)
    server.step([30, 66, 21])
    starts = [0, 30, 96, 117]
    for seq in range(3):
        rows = server.chosen[0][starts[seq] : starts[seq + 1]]
        assert pages_of(rows, server) <= set(server.tables[seq].tolist()) - {-1}


@pytest.mark.parametrize("first", [[100], [64, 36], [33, 1, 66]], ids=str)
def test_bug26_a_chunk_chooses_keys_of_the_cached_prefix(first):
    """Keys 5 and 70 of the prefix are the best ones of all later queries."""
    server = SparseServer([130], 8, topk=8)
    mine = server.tokens[0]
    mine["index_q"][...] = np.abs(mine["index_q"])
    mine["weights"][...] = np.abs(mine["weights"])
    mine["index_k"][:, [5, 70]] = 50
    for n in first:
        server.step([n])
    server.step([20])  # a chunk, then decode
    server.step([1], prefill=[False])
    for rows in server.chosen[-2:]:
        assert np.isin(server.slots(0, np.array([5, 70])), rows).all()
        assert all(np.isin(server.slots(0, np.array([5, 70])), row).all() for row in rows)


@pytest.mark.parametrize("new", [[0, 1, 0, 1], [0, 1, 9, 1], [1, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("padding", [0, 3])
@SERVERS
def test_bug27_empty_slots_shift_no_tables(kind, new, padding):
    server = kind([70, 90, 80, 66], 8)
    server.step([60, 80, 65, 40])
    server.step(new, padding=padding)


def test_bug28_a_plateau_of_logits_is_cut_by_position():
    """300 equal keys: every query takes the first 64, in every run and in every order of pages."""
    chosen = []
    for seed in range(3):
        server = SparseServer([320], 8, topk=64, seed=seed)
        server.tokens[0]["index_k"][...] = 1
        server.step([300])
        server.step([1])
        for rows, first in ((server.chosen[0], 0), (server.chosen[1], 300)):
            for i, row in enumerate(rows):
                count = min(64, first + i + 1)
                np.testing.assert_array_equal(row[:count], server.slots(0, np.arange(count)))
        chosen.append(server.chosen[1])
    assert len({x.tobytes() for x in chosen}) > 1, "pages lie in the same order"


@SERVERS
def test_bug39_lengths_of_either_form(kind):
    """Lengths [B, 1] of all slots, as of FastDeploy 2.4, or [B]."""
    for shape in ((-1, 1), (-1,)):
        server = kind([90, 80], 8, drafts=1)
        server.step([60, 10])
        fields = {
            "seq_lens_decoder": int32(np.array([60, 10, 77]).reshape(shape)),
            "seq_lens_this_time": int32(np.array([2, 1]).reshape(shape)),
            "block_tables": int32(np.concatenate([server.tables, server.tables[:1]])),
        }
        server.step([2, 1], prefill=[False, False], **fields)


@SERVERS
@pytest.mark.parametrize("new", [[1, 1], [20, 1]], ids=["decode", "mixed"])
def test_bug45_the_pool_is_read_where_it_lies(monkeypatch, kind, new):
    """What operators get are the server's caches themselves, not copies."""
    server = kind([90, 80], 8)
    server.step([60, 10])
    seen = []
    names = ("mla_write_cache", "mla_attention", "mla_sparse_attention", "paged_indexer_topk")
    for name in names:
        own = getattr(functional, name)

        def watched(*args, own=own, **kwargs):
            seen.extend(x.data_ptr() for x in args if x is not None and hasattr(x, "data_ptr"))
            return own(*args, **kwargs)

        monkeypatch.setattr(functional, name, watched)
    server.step(new)
    pools = [cache.data_ptr() for cache in server.caches]
    assert all(
        seen.count(pool) >= (2 if kind is LatentServer or i == 0 else 1)
        for i, pool in enumerate(pools)
    )


@SERVERS
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_bug46_a_rank_computes_its_own_heads_and_no_others(monkeypatch, kind, size):
    """128 heads over `size` ranks: queries as they are, results those of the whole model's."""
    name = "mla_attention" if kind is LatentServer else "mla_sparse_attention"
    own, heads = getattr(functional, name), []

    def watched(q, *args, **kwargs):
        heads.append(q.shape[1])
        return own(q, *args, **kwargs)

    monkeypatch.setattr(functional, name, watched)
    server = kind([30, 20], 128 // size)
    server.step([20, 9])
    server.step([1, 1])
    assert set(heads) == {128 // size}


@SERVERS
@pytest.mark.parametrize("drafts", [1, 3])
def test_bug47_every_draft_of_a_decoding_sequence_is_computed(kind, drafts):
    """s_q 2 and 4, rejected drafts, and a number of keys that 128 does not divide."""
    options = {} if kind is LatentServer else {"topk": 37}
    server = kind([90, 80, 70], 16, drafts=drafts, **options)
    server.step([60, 10, 63])
    n = drafts + 1
    server.step([n] * 3, prefill=[False] * 3, advance=[1, n, 2])
    server.step([n, 1, n], prefill=[False] * 3, padding=2)


# --- 48: the model's indexer ---------------------------------------------------------------------

HEADS, DIM, ROTATED, HIDDEN, RANK = 8, 128, 64, 48, 32


class RMSNorm:
    """FastDeploy 2.6's norm of keys, by its name."""

    def __call__(self, keys):
        return keys, None


class LayerNorm(paddle.nn.LayerNorm):
    """That of its development branch."""

    def __init__(self):
        super().__init__(DIM, epsilon=1e-6)


def linear(rng, rows, columns):
    weight = rng.normal(size=(rows, columns)).astype(np.float32) / rows**0.5
    return weight, lambda x: paddle.matmul(x, to_paddle(weight))


def rotate_pairs(positions, q, k):
    """The model's rotation of neighbouring channels, in float32."""

    def rotated(x):
        angles = positions.astype("float32").reshape([-1, 1, 1]) * to_paddle(frequencies())
        cos, sin = paddle.cos(angles), paddle.sin(angles)
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = paddle.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        return pairs.reshape(x.shape)

    return rotated(q), rotated(k)


def frequencies():
    return (10000.0 ** (-np.arange(0, ROTATED, 2) / ROTATED)).astype(np.float32)


def make_indexer(monkeypatch, norm):
    """FastDeploy's module of models, with an ``Indexer`` that must not be run as it is."""

    class Indexer:
        def __init__(self, fd_config, layer_id, prefix=""):
            rng = np.random.default_rng(2)
            self.index_n_heads, self.index_head_dim, self.rope_dim = HEADS, DIM, ROTATED
            self.layer_id = layer_id
            self.weights = {}
            for name, rows, columns in (
                ("wq_b", RANK, HEADS * DIM),
                ("wk", HIDDEN, DIM),
                ("weights_proj", HIDDEN, HEADS),
            ):
                self.weights[name], call = linear(rng, rows, columns)
                setattr(self, name, call)
            self.k_norm = norm()

        def forward(self, forward_meta, hidden_states, qr, rotary_emb=None):
            return "FastDeploy's own"

    module = ModuleType(fastdeploy_models.MODELS)
    module.Indexer = Indexer
    ignored = "Indexer.forward" + (", Indexer.__init__" if norm is RMSNorm else "")
    monkeypatch.setenv("FASTATTN_IGNORED", ignored)
    if norm is LayerNorm:  # of the development branch, whose constructor is right
        right = dataclasses.replace(KEY_NORM, right=(patches.source_hash(Indexer.__init__),))
        monkeypatch.setattr(patches, "KEY_NORM", right)
    monkeypatch.setitem(sys.modules, fastdeploy_models.MODELS, module)
    return module


def selected(monkeypatch, module, interleaved, indexer=None):
    """What a patched ``Indexer`` gives to ``select``, and its inputs."""
    fastdeploy_models.take_indexer()
    indexer = module.Indexer(None, 3) if indexer is None else indexer
    norm = indexer.k_norm
    rng = np.random.default_rng(4)
    for name in ("weight", "bias"):
        values = rng.uniform(0.5, 2, DIM).astype(np.float32)
        getattr(norm, name).set_value(to_paddle(values))
    x, qr = (rng.normal(size=(5, n)).astype(np.float32) for n in (HIDDEN, RANK))
    given = []
    backend = SimpleNamespace(
        indexer=SimpleNamespace(interleaved=interleaved),
        select=lambda *args: given.extend(args) or "slots",
    )
    positions = np.array([0, 1, 7, 200, 90])
    meta = SimpleNamespace(attn_backend=backend, position_ids=int32(positions))
    args = (to_paddle(x), to_paddle(qr))
    assert indexer.forward(meta, *args, rotary_emb=rotate_pairs) == "slots"
    want = {name: getattr(norm, name).numpy().astype(np.float64) for name in ("weight", "bias")}
    return given, (x, qr, positions), indexer.weights, want


def v32_rotation(x, positions, interleaved):
    """Rotation of the first 64 channels [T, H, 128] in fp64, by V3.2's pairs or GLM's."""
    angles = positions[:, None, None] * frequencies().astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    index = np.arange(ROTATED // 2)
    first, second = (2 * index, 2 * index + 1) if interleaved else (index, ROTATED // 2 + index)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def hadamard(n):
    return np.ones((1, 1)) if n == 1 else np.kron(hadamard(n // 2), [[1, 1], [1, -1]])


@pytest.mark.parametrize("interleaved", [False, True], ids=["V3.2", "GLM"])
def test_bug48_an_indexer_as_the_model_was_trained(monkeypatch, interleaved):
    """LayerNorm with a bias, the model's pairs, and the logits of V3.2's Hadamard transform."""
    module = make_indexer(monkeypatch, LayerNorm)
    given, (x, qr, positions), weights, norm = selected(monkeypatch, module, interleaved)
    query, key = (qr @ weights["wq_b"]).reshape(5, HEADS, DIM), x @ weights["wk"]
    key = key.astype(np.float64)
    key = (key - key.mean(-1, keepdims=True)) / np.sqrt(key.var(-1, keepdims=True) + 1e-6)
    key = (key * norm["weight"] + norm["bias"])[:, None]
    query = v32_rotation(query.astype(np.float64), positions, interleaved)
    key = v32_rotation(key, positions, interleaved)
    np.testing.assert_allclose(given[0].numpy(), query, atol=2e-4)
    np.testing.assert_allclose(given[1].numpy(), key, atol=2e-4)
    np.testing.assert_allclose(given[2].numpy(), x @ weights["weights_proj"], atol=1e-5)
    assert given[3] == 3
    matrix = hadamard(DIM) / DIM**0.5
    np.testing.assert_allclose(
        np.einsum("thd,td->th", query @ matrix, (key @ matrix)[:, 0]),
        np.einsum("thd,td->th", query, key[:, 0]),
        atol=1e-9,
    )


def test_bug48_keys_of_release_2_6_get_their_bias(monkeypatch):
    """Its RMSNorm has no bias to load; a model made after the registration has a LayerNorm."""
    norms = ModuleType("fastdeploy.model_executor.layers.normalization")

    def layer_norm(fd_config, size, eps, *, prefix, with_bias):
        assert (size, eps, prefix, with_bias) == (DIM, 1e-6, ".k_norm", True)
        return LayerNorm()

    norms.LayerNorm = layer_norm
    monkeypatch.setitem(sys.modules, norms.__name__, norms)
    module = make_indexer(monkeypatch, RMSNorm)
    early = module.Indexer(None, 3)
    given, (x, *_), weights, norm = selected(monkeypatch, module, True)
    key = (x @ weights["wk"]).astype(np.float64)
    key = (key - key.mean(-1, keepdims=True)) / np.sqrt(key.var(-1, keepdims=True) + 1e-6)
    want = key[0] * norm["weight"] + norm["bias"]  # at position 0
    np.testing.assert_allclose(given[1].numpy()[0, 0], want, atol=2e-4)
    names = dict(module.Indexer(None, 3).k_norm.named_parameters())
    assert sorted(names) == ["bias", "weight"]
    meta = SimpleNamespace(attn_backend=SimpleNamespace(select=None))
    with pytest.raises(NotImplementedError, match=r"Indexer\.k_norm has no bias"):
        early.forward(meta, None, None)


def test_an_indexer_with_other_parameters_is_refused(monkeypatch):
    module = make_indexer(monkeypatch, LayerNorm)
    module.Indexer.forward = lambda self, meta, states, latents: None
    with pytest.raises(NotImplementedError, match=r"Indexer\.forward \(self, meta, states, lat"):
        fastdeploy_models.take_indexer()


def test_bug48_an_indexer_of_another_backend_stays(monkeypatch):
    module = make_indexer(monkeypatch, LayerNorm)
    for _ in range(2):
        fastdeploy_models.take_indexer()
    meta = SimpleNamespace(attn_backend=object())
    assert module.Indexer(None, 3).forward(meta, None, None) == "FastDeploy's own"


# --- 49, 50 --------------------------------------------------------------------------------------


@SERVERS
@pytest.mark.parametrize("new", [[1, 1], [2, 1], [20, 1]], ids=["decode", "drafts", "mixed"])
def test_bug49_nothing_waits_for_the_device(monkeypatch, kind, new):
    """No value of a tensor of the step reaches Python, but the host's own lengths."""
    server = kind([90, 80], 8, drafts=1)
    server.step([60, 10])
    meta = server.meta(new, [n > 2 for n in new], 3, {})
    tensors = [server.of_step(name, 0, new, 3) for name in server.tokens[0]]

    def read(self, *args):
        raise AssertionError("a value was read")

    with monkeypatch.context() as patch:
        patch.setattr(server, "of_step", lambda *args: tensors.pop(0))
        patch.setattr("tests.support.latent_serving.to_numpy", lambda x: np.zeros((1, 1)))
        names = ("numpy", "item", "tolist", "__int__", "__float__", "__bool__", "__index__")
        for name in names:
            patch.setattr(paddle.Tensor, name, read)
        meta.max_len_tensor_cpu = None
        server.backend.init_attention_metadata(meta)
        for name in ("arange", "cumsum", "nonzero", "to_tensor", "unique"):
            patch.setattr(paddle, name, read)  # they wait, or copy from the host
        server.run(0, new, 3, meta)


@SERVERS
@pytest.mark.parametrize("new", [[1, 1], [2, 1], [40, 3]], ids=str)
def test_bug49_a_step_computes_in_operators_alone(monkeypatch, kind, new):
    """Paddle makes tensors and views of them: a release may lack kernels for the GPU."""
    server = kind([120, 80], 8, drafts=1)
    server.step([60, 10])
    meta = server.meta(new, [n > 2 for n in new], 3, {})
    tensors = [server.of_step(name, 0, new, 3) for name in server.tokens[0]]

    def compute(self, *args):
        raise AssertionError("Paddle computes")

    with monkeypatch.context() as patch:
        patch.setattr(server, "of_step", lambda *args: tensors.pop(0))
        patch.setattr("tests.support.latent_serving.to_numpy", lambda x: np.zeros((1, 1)))
        operators = [f"__{x}__" for x in ("add", "sub", "mul", "getitem", "setitem", "ge", "gt")]
        for name in (*operators, "astype", "cast", "clip", "gather", "fill_", "contiguous"):
            patch.setattr(paddle.Tensor, name, compute)
        made = ("arange", "cumsum", "full", "full_like", "to_tensor", "zeros", "zeros_like")
        for name in (*made, "gather", "scatter", "where", "concat"):
            patch.setattr(paddle, name, compute)
        server.backend.init_attention_metadata(meta)
        server.run(0, new, 3, meta)


@SERVERS
@pytest.mark.parametrize("padding", [0, 3, 20])
@pytest.mark.parametrize("slots", [0, 2])
def test_a_step_of_no_sequences(place, kind, padding, slots):
    """Nothing but padding, with tables of no sequence or of a server's slots: nothing is done."""
    if not (EMPTY_OUTPUTS or padding):
        pytest.skip("Paddle 2.6 has no empty outputs")
    server = kind([70, 30], 8, place)
    server.step([66, 20])
    before = [to_numpy(cache).view(np.uint8).copy() for cache in server.caches]
    meta = server.meta([0, 0], None, padding, {})
    meta.block_tables = int32(server.tables[:slots], place)
    meta.cu_seqlens_q = int32(np.zeros(1), place)
    meta.seq_lens_decoder = int32(np.full(slots, 9), place)
    meta.seq_lens_this_time = int32(np.zeros(0), place)
    parts = {name: server.of_step(name, 0, [0, 0], padding) for name in server.tokens[0]}
    server.of_step = lambda name, *_: parts[name]
    server.backend.init_attention_metadata(meta)
    out = to_numpy(server.run(0, [], padding, meta))
    assert out.shape[0] == padding and not out.any()
    assert all((chosen == -1).all() for chosen in getattr(server, "chosen", [[]])[1:])
    for old, cache in zip(before, server.caches):
        np.testing.assert_array_equal(old, to_numpy(cache).view(np.uint8))


@SERVERS
def test_bug49_maps_are_made_once_a_step_and_again_for_a_graph(monkeypatch, kind):
    """Layers share them; the first layer makes them anew when the step is run once more."""
    made = []
    own = latent.token_maps
    monkeypatch.setattr(latent, "token_maps", lambda *args: made.append(1) or own(*args))
    server = kind([90, 80], 8, layers=3)
    server.step([60, 10])
    assert len(made) == 1
    meta = server.meta([1, 1], None, 0, {})
    server.backend.init_attention_metadata(meta)
    for _ in range(2):
        for layer in range(3):
            server.run(layer, [1, 1], 0, meta)
    assert len(made) == 3


@SERVERS
def test_bug49_a_replay_follows_lengths_and_tables(kind):
    """What a captured step reads are the buffers of its ForwardMeta, written between replays."""
    server = kind([90, 130], 8)
    server.step([60, 10])
    meta = server.meta([1, 1], None, 0, {})
    server.backend.init_attention_metadata(meta)
    for _ in range(4):
        out = to_numpy(server.run(0, [1, 1], 0, meta))
        server.check(0, [1, 1], out.reshape(2, 8, 512))
        server.cached = [done + 1 for done in server.cached]
        meta.seq_lens_decoder.set_value(int32(server.cached))
    server.tables[[0, 1]] = server.tables[[1, 0]]
    server.tokens.reverse()
    server.cached.reverse()
    meta.block_tables.set_value(int32(server.tables))
    meta.seq_lens_decoder.set_value(int32(server.cached))
    out = to_numpy(server.run(0, [1, 1], 0, meta))
    server.check(0, [1, 1], out.reshape(2, 8, 512))


@SERVERS
@pytest.mark.parametrize("positions", [False, True])
def test_bug50_padding_tokens_write_into_no_block(kind, positions):
    """FastDeploy gives them slots of the last sequence; positions of theirs are anything."""
    server = kind([70, 90], 8)
    server.step([60, 80])
    fields = {}
    if positions:
        fields = {"position_ids": to_paddle(np.array([60, 80, 5, 79, 81], np.int64))}
        fields["slot_mapping"] = to_paddle(np.full(5, server.slots(1, np.array(3)), np.int64))
    server.step([1, 1], padding=3, **fields)


def test_layers_that_give_one_token_a_sequence_are_refused():
    """FastDeploy's development branch cuts queries down where it would call another kernel.

    Before it calls a backend it then sets ``forward_meta.cache_seqlens``.
    """
    server = LatentServer([20], 8)
    server.step([3])
    with pytest.raises(NotImplementedError, match=r"MLA.*: forward_meta\.cache_seqlens.* 9\.x"):
        server.step([1], cache_seqlens=to_paddle(np.array([4], np.int32)))
