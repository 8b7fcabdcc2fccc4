"""What FastDeploy's development branch of June and July 2026 has, emulated on the May interface.

A backend for each layer, windows with their own rotary table, KV heads that differ by layer, caches
that the backend makes, and options and fields that come later still.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from fastattn import backends
from fastattn.backends import known
from fastattn.reference.rope import make_rotary_embs
from tests.support import kv_receiver
from tests.support.fastdeploy import (
    KINDS,
    Worker,
    chosen,
    fastdeploy,
    make_fd_config,
    make_model,
    registered,
)
from tests.support.latent_serving import LatentServer
from tests.support.pd import configured, prefill, shared_names
from tests.support.serving import MAX_MODEL_LEN, taken
from tests.support.tensors import int32, to_numpy

__all__ = ["fastdeploy", "prefill", "registered", "taken"]  # fixtures

#: New tokens of the steps of a day: prefill, chunks, mixed, decode.
DAY = ([70, 9, 33], [40, 1, 1], [1, 25, 1], [1, 1, 0])


class Layerwise:
    """A worker with a backend for each layer, whose layers differ.

    Parameters
    ----------
    models : list of Model
        The model of each layer.
    kind : str or None
    size, rank : int
        Tensor-parallel ranks.
    **options
        Further options of the model.
    """

    def __init__(self, models, kind, *, size=1, rank=0, place="cpu", **options):
        count, lengths = len(models), [sum(step[i] for step in DAY) for i in range(3)]
        self.workers = [
            Worker(m, kind, lengths, place, size=size, rank=rank, layers=count) for m in models
        ]
        first = self.workers[0]
        config = make_fd_config(models[0], kind, size=size, rank=rank, layers=count)
        vars(config.model_config).update(options)
        self.backends, caches, each = [], [], len(first.caches) // count
        for index, worker in enumerate(self.workers):
            worker.tables = first.tables
            backend = chosen()(config, worker.kv_heads, worker.q_heads, worker.model.head_dim)
            backend.layer_id = index  # the runner sets it before it asks for shapes
            self.backends.append(backend)
            caches += worker.caches[each * index : each * (index + 1)]
        for worker in self.workers:
            worker.caches = caches

    def begin(self, new, **fields):
        """A step's metadata after all backends have prepared it."""
        first = self.workers[0]
        prefill = [n > 1 for n in new]
        meta = first.make_meta(
            first.metadata(new, prefill, sum(new)),
            attn_backend=self.backends[0],
            attn_backends=self.backends,
            **fields,
        )
        for backend in self.backends:
            backend.init_attention_metadata(meta)
        meta.exist_prefill = any(prefill)
        return meta

    def step(self, new, **fields):
        meta = self.begin(new, **fields)
        for index, (backend, worker) in enumerate(zip(self.backends, self.workers)):
            qkv = worker.on(worker.rank_qkv(index, new, 0))
            layer = worker.layers[index]
            out = backend.forward(None, None, None, qkv, None, None, layer, meta)
            worker.check(index, new, to_numpy(out))
        for worker in self.workers:
            worker.cached = [done + n for done, n in zip(worker.cached, new)]

    def day(self, **fields):
        for new in DAY:
            self.step(new, **fields)


# --- a backend for each layer --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_backend_for_each_layer(registered, place, kind):
    server = Layerwise([make_model(kind)] * 3, kind, place=place)
    server.day()
    shared = {id(backend.get_attention_meta()) for backend in server.backends}
    assert len(shared) == 1


def test_a_step_is_prepared_once(registered, monkeypatch):
    """By the first backend; a backend that begins again begins a new step."""
    server = Layerwise([make_model(None)] * 3, None)
    prepared, kind = [], type(server.backends[0])
    really = kind._prepare
    monkeypatch.setattr(kind, "_prepare", lambda self, m: prepared.append(self) or really(self, m))
    meta = server.begin([5, 3, 2])
    assert prepared == server.backends[:1]
    for backend in server.backends:
        backend.init_attention_metadata(meta)
    assert prepared == server.backends[:1] * 2
    again = type(meta)(**vars(meta))  # a copy is another step
    server.backends[2].init_attention_metadata(again)
    assert prepared[2:] == server.backends[2:]
    assert server.backends[2].get_attention_meta() is not server.backends[1].get_attention_meta()


def test_a_prepared_step_does_not_outlive_its_backends(registered):
    server = Layerwise([make_model(None)] * 2, None)
    meta = server.begin([5, 3, 2])
    for backend in server.backends:
        backend.attention_metadata = None
    late = chosen()(make_fd_config(make_model(None)), 2, 4, 64)
    late.init_attention_metadata(meta)
    assert late.get_attention_meta() is not None


def test_the_maps_of_latent_tokens_are_made_once(monkeypatch):
    server = LatentServer([40, 9], layers=3)
    layers = [server.backend, *(type(server.backend)(server.config, 1, 16, 576) for _ in "ab")]
    meta = server.meta([30, 5], None, 0, {})
    for backend in layers:
        backend.init_attention_metadata(meta)
    made = []
    real = backends.latent.token_maps
    monkeypatch.setattr(backends.latent, "token_maps", lambda *a: made.append(a) or real(*a))
    for index, backend in enumerate(layers):
        server.backend = backend
        out = to_numpy(server.run(index, [30, 5], 0, meta))
        server.check(index, [30, 5], out.reshape(len(out), 16, 512))
    assert len(made) == 1


def test_a_prefill_servers_steps_count_once(prefill):
    """``per_query``: the step's number advances by one, whatever the number of backends."""
    server = Layerwise([make_model(None)] * 4, None)
    for index, worker in enumerate(server.workers):
        config = configured(worker.fd_config, "per_query")
        server.backends[index] = chosen()(config, 2, 4, 64)
    step, layer = (kv_receiver.shared_integer(name) for name in shared_names(0, "0"))
    step[0] = -1
    for number, new in enumerate(DAY):
        server.step(new)
        assert (step[0], layer[0]) == (number, 3 if max(new) > 1 else -1)


# --- windows with their own rotary table ---------------------------------------------------------


def windowed_models(kind, **options):
    """Models of layers 0 and 2 with a window and another rotary table, and of layer 1."""
    plain = make_model(kind, **options)
    within = dataclasses.replace(plain, window=24)
    within.table = make_rotary_embs(MAX_MODEL_LEN, 64, theta=10000.0, neox=plain.neox)
    return [within, plain, within]


WINDOWS = {"window_size": 24, "window_attn_skip_freq": [1, 0, 1], "swa_rope_theta": 10000.0}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("neox", [False, True])
def test_windows_rotate_by_their_own_table(registered, place, kind, neox):
    models = windowed_models(kind, neox=neox)
    server = Layerwise(models, kind, place=place, **WINDOWS)
    plain, own = (worker.rotary_embs for worker in server.workers[1::-1])
    server.day(rotary_embs=plain, swa_rotary_embs=own)


def test_a_layer_with_its_own_table_takes_one_call(registered, taken):
    models = windowed_models(None)
    server = Layerwise(models, None, **WINDOWS)
    plain, own = (worker.rotary_embs for worker in server.workers[1::-1])
    server.day(rotary_embs=plain, swa_rotary_embs=own)
    assert [x is not None for x in taken] == [True] * 3 * len(DAY)


def test_that_the_wrong_table_is_noticed(registered):
    """The comparison of the test above fails where a layer rotates by the other table."""
    server = Layerwise(windowed_models(None), None, **WINDOWS)
    plain = server.workers[1].rotary_embs
    with pytest.raises(AssertionError, match="layer 0"):
        server.day(rotary_embs=plain, swa_rotary_embs=plain)


def test_a_window_without_its_table_is_refused(registered):
    models = windowed_models(None)
    server = Layerwise(models, None, **WINDOWS)
    with pytest.raises(ValueError, match="swa_rotary_embs: expected a value, got None"):
        server.step(DAY[0], rotary_embs=server.workers[1].rotary_embs)
    plain = Layerwise([make_model(None)] * 2, None)
    with pytest.raises(NotImplementedError, match="swa_rotary_embs is not supported without"):
        plain.step(DAY[0], swa_rotary_embs=plain.workers[0].rotary_embs)


@pytest.mark.parametrize("name", ["swa_rope_theta", "swa_num_key_value_heads"])
def test_which_layers_have_the_window_must_be_said(registered, name):
    config = make_fd_config(make_model(None))
    setattr(config.model_config, name, 2)
    with pytest.raises(NotImplementedError, match=f"skip_freq = None .* for model_config.{name}"):
        chosen()(config, 2, 4, 64)


# --- KV heads that differ by layer ---------------------------------------------------------------


def models_of(kind, heads, kv_heads):
    """A model for each layer. FastDeploy makes FP8 scales for as many heads as a layer has."""
    return [make_model(kind, heads=heads, kv_heads=count) for count in kv_heads]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1, {"num_key_value_heads_list": [4, 2, 8]}),
        (2, {"num_key_value_heads_list": [4, 2, 8]}),
        (4, {"num_key_value_heads_list": [4, 2, 8]}),
        (2, {"swa_num_key_value_heads": 2, "window_attn_skip_freq": [0, 1, 0]}),
    ],
    ids=["one rank", "2 ranks", "fewer heads than ranks", "in windows"],
)
def test_kv_heads_of_layers(registered, place, kind, size, options):
    """Every rank takes its own heads of each layer's scales."""
    counts = options.get("num_key_value_heads_list", [4, 2, 4])
    models = models_of(kind, 8, counts)
    for rank in range(size):
        Layerwise(models, kind, size=size, rank=rank, place=place, **options).day()


def test_heads_that_no_layer_has(registered):
    config = make_fd_config(make_model(None))
    config.model_config.num_key_value_heads_list = [2, 4]
    with pytest.raises(ValueError, match=r"kv_num_heads: .* cannot hold 3 of 2 KV heads"):
        chosen()(config, 3, 6, 64)


# --- caches that a backend makes -----------------------------------------------------------------


class MakesCaches:
    """Methods of FastDeploy's base class since #7787, in short."""

    def create_kv_cache(self, num_layers, num_blocks, cache_dtype, kind=None, layer_offset=0):
        key, value = self.get_kv_cache_shape(num_blocks, kind)
        made = {}
        for layer in range(layer_offset, layer_offset + num_layers):
            made["key", layer] = paddle.zeros(key, cache_dtype)
            if value:
                made["value", layer] = paddle.zeros(value, cache_dtype)
            if kind == "block_wise_fp8":
                made["key_scale", layer] = paddle.zeros(key[:3], "bfloat16")
                made["value_scale", layer] = paddle.zeros(key[:3], "bfloat16")
        return made

    def create_host_kv_cache(self, *args):
        return {}

    def free_host_kv_cache(self, caches):
        caches.clear()


@pytest.fixture
def making(registered):
    """A FastDeploy whose base class makes caches."""
    from fastdeploy.model_executor.layers.attention import AttentionBackend

    for name in ("create_kv_cache", "create_host_kv_cache", "free_host_kv_cache"):
        setattr(AttentionBackend, name, vars(MakesCaches)[name])
    return registered


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_caches_are_made_by_fastdeploys_base_class(making, kind):
    server = Layerwise([make_model(kind)] * 2, kind)
    blocks = server.workers[0].num_blocks
    caches = []
    for index, backend in enumerate(server.backends):
        dtype = "bfloat16" if kind is None else "uint8"
        made = backend.create_kv_cache(1, blocks, dtype, kind, layer_offset=index)
        roles = ("key", "value", "key_scale", "value_scale")
        caches += [made[role, index] for role in roles if (role, index) in made]
    for worker in server.workers:
        worker.caches = caches
    server.day()
    host = {"key": 1}
    server.backends[0].free_host_kv_cache(host)
    assert not host and server.backends[0].create_host_kv_cache(1, 2, 1) == {}


def test_caches_of_latent_backends(making, monkeypatch):
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "MLA_ATTN")
    config = backends.make_latent_config(
        max_model_len=128, qk_nope_head_dim=128, index_n_heads=64, index_topk=64
    )
    made = chosen()(config, 1, 16, 576).create_kv_cache(1, 3, "bfloat16", layer_offset=5)
    assert [(role, x.shape) for role, x in made.items()] == [(("key", 5), [3, 1, 64, 576])]
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "DSA_ATTN")
    backend = chosen()(config, 1, 16, 576)
    made = backend.create_kv_cache(
        num_layers=2, num_blocks=3, cache_dtype="bfloat16", kv_cache_quant_type=None, layer_offset=4
    )
    shapes = {"key": [3, 1, 64, 656], "indexer": [3, 64, 132]}
    assert {(r, i): x.shape for (r, i), x in made.items()} == {
        (role, layer): shape for layer in (4, 5) for role, shape in shapes.items()
    }
    assert {str(x.dtype) for x in made.values()} == {"paddle.uint8"}
    with pytest.raises(NotImplementedError, match=r"create_host_kv_cache, .* is not supported"):
        backend.create_host_kv_cache(2, 3, 1)


def test_a_proposer_asks_for_the_shape_of_scales(registered):
    """Without a type, and only for block_wise_fp8."""
    model = make_model("block_wise_fp8")
    backend = chosen()(make_fd_config(model, "block_wise_fp8"), 2, 4, 64)
    shape, dtype = backend.get_kv_cache_scale_shape(max_num_blocks=5)
    assert (shape, dtype) == ([5, 2, 64], paddle.get_default_dtype())
    assert backend.get_kv_cache_scale_shape(5, "block_wise_fp8") == ([5, 2, 64], "float32")
    assert chosen()(make_fd_config(make_model(None)), 2, 4, 64).get_kv_cache_scale_shape(5) is None


# --- other names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["", ".triton_mla_attention_backend"])
def test_the_triton_backend_is_ours(registered, module):
    from fastattn.backends import fastdeploy as plugin

    path = f"{plugin.PACKAGE}{module}.TritonMLAAttentionBackend"
    assert plugin._replacement(path) == "fastattn.backends.fastdeploy.MLAAttentionBackend"
    assert issubclass(plugin.MLAAttentionBackend, backends.MLAAttentionBackend)
    assert plugin._replacement("elsewhere.MLAAttentionBackend") == "elsewhere.MLAAttentionBackend"


# --- what is not known is refused ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model_config", "swa_head_dim", 192),
        ("model_config", "attn_logit_softcapping", 50.0),
        ("model_config", "rope_local_base_freq", 10000.0),
        ("model_config", "enable_head_wise_kv_cache", True),
        ("model_config", "attention_chunk_size", 8192),
        ("model_config", "use_alibi", True),
        ("parallel_config", "context_parallel_size", 2),
        ("cache_config", "head_wise_block_ratio", {"a": 1}),
    ],
)
@pytest.mark.parametrize("latent", [False, True])
def test_an_option_that_is_not_known(registered, monkeypatch, section, name, value, latent):
    if latent:
        monkeypatch.setenv("FD_ATTENTION_BACKEND", "MLA_ATTN")
        config, heads = make_latent(), (1, 16, 576)
    else:
        config, heads = make_fd_config(make_model(None)), (2, 4, 64)
    setattr(getattr(config, section), name, value)
    with pytest.raises(NotImplementedError, match=rf"Backend: {section}\.{name} = .* know it"):
        chosen()(config, *heads)
    monkeypatch.setenv("FASTATTN_IGNORED", f"other, {name}")
    assert chosen()(config, *heads)
    monkeypatch.delenv("FASTATTN_IGNORED")
    for unset in (None, False, 0, "", [], {}):
        setattr(getattr(config, section), name, unset)
        assert chosen()(config, *heads)


#: Names of the files of models that FastDeploy serves, as far as they have a part of known._WORDS.
MODEL_FILES = {
    "Qwen2.5": "attention_dropout max_window_layers num_attention_heads num_key_value_heads "
    "rope_theta sliding_window use_sliding_window use_mrope",
    "Qwen3": "attention_bias attention_dropout head_dim max_window_layers rope_scaling rope_theta "
    "sliding_window use_sliding_window",
    "ERNIE-4.5-VL": "attention_probs_dropout_prob rope_3d rope_theta sinkhorn_2gate sinkhorn_temp "
    "use_flash_attention fuse_rope fuse_softmax_mask use_recompute_attn fuse_attn_ffn",
    "GLM-4.5": "attention_bias attention_dropout head_dim partial_rotary_factor rope_scaling "
    "rope_theta",
    "gpt-oss": "attention_bias attention_dropout head_dim rope_scaling rope_theta sliding_window",
    "PaddleOCR-VL": "attention_probs_dropout_prob rope_is_neox_style rope_scaling rope_theta "
    "use_3d_rope use_flash_attention head_dim",
    "DeepSeek-V3.2": "attention_bias attention_dropout index_head_dim qk_nope_head_dim "
    "qk_rope_head_dim rope_scaling rope_theta v_head_dim",
    "GLM-5": "indexer_rope_interleave qk_head_dim rope_interleave rope_parameters index_head_dim",
}


@pytest.mark.parametrize("model", MODEL_FILES)
def test_names_of_models_that_are_served_are_known(model):
    names = MODEL_FILES[model].split()
    config = SimpleNamespace(model_config=SimpleNamespace(**dict.fromkeys(names, 3)))
    known.refuse_unknown_options(config, "Backend")
    config.model_config.rope_of_tomorrow = 3
    with pytest.raises(NotImplementedError, match=r"Backend: model_config\.rope_of_tomorrow = 3"):
        known.refuse_unknown_options(config, "Backend")


def make_latent():
    return backends.make_latent_config(max_model_len=128, qk_nope_head_dim=128)


@pytest.mark.parametrize(
    ("name", "value"),
    [("swa_rope_theta", 5.0), ("window_attn_skip_freq", [0, 1]), ("swa_num_key_value_heads", 1)],
)
def test_windows_of_latent_attention_are_refused(registered, monkeypatch, name, value):
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "MLA_ATTN")
    config = make_latent()
    config.model_config.window_attn_skip_freq = [0, 0]
    assert chosen()(config, 1, 16, 576)
    setattr(config.model_config, name, value)
    with pytest.raises(NotImplementedError, match=rf"{name} = .* latent attention has no window"):
        chosen()(config, 1, 16, 576)


def test_a_field_that_is_not_known(registered, monkeypatch):
    server = Layerwise([make_model(None)] * 2, None)
    block_tables_headwise = int32(np.zeros((3, 2, 4)))
    with pytest.raises(NotImplementedError, match=r"forward_meta\.block_tables_headwise is not"):
        server.step(DAY[0], block_tables_headwise=block_tables_headwise)
    with pytest.raises(NotImplementedError, match=r"forward_meta\.window = 3 is not supported"):
        server.step(DAY[0], window=3)
    server.step(DAY[0], window=0, mask=None)
    monkeypatch.setenv("FASTATTN_IGNORED", "block_tables_headwise")
    server.step(DAY[1], block_tables_headwise=block_tables_headwise)


def test_a_field_of_a_latent_step_that_is_not_known():
    server = LatentServer([20])
    with pytest.raises(NotImplementedError, match=r"MLAA.*: forward_meta\.tree_mask is not"):
        server.step([3], tree_mask=int32([1]))


def test_what_may_be_read_is_known():
    assert known.FIELDS <= known._KNOWN_FIELDS
