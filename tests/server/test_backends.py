"""The attention backends step by step against a dense fp64 model of a layer."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from fastattn import _ops, backends
from fastattn.backends import (
    AppendAttentionBackend,
    AttentionLayer,
    FlashAttentionBackend,
    FlashMaskAttentionBackend,
    ForwardMeta,
    ForwardMode,
    HeadShard,
    LayerCache,
    make_config,
)
from fastattn.backends.forward_meta import _LONG_SEQ, guess_new_tokens
from tests.support.compare import assert_same_bits
from tests.support.serving import Model, Server
from tests.support.tensors import BF16, EMPTY_OUTPUTS, int32, to_numpy, to_paddle

BACKENDS = (FlashAttentionBackend, FlashMaskAttentionBackend, AppendAttentionBackend)
TYPES = (
    ("none", "e4m3"),
    ("cache_int8", "e4m3"),
    ("cache_fp8", "e4m3"),
    ("cache_fp8", "e5m2"),
    ("block_wise_int8", "e4m3"),
    ("block_wise_fp8", "e4m3"),
    ("block_wise_int4", "e4m3"),
    ("block_wise_mxfp4", "e4m3"),
    ("block_wise_k8v4", "e4m3"),
    ("block_wise_kfp8v4", "e4m3"),
)
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__)
each_type = pytest.mark.parametrize("cache", TYPES, ids="-".join)


def some_tensor(shape: list[int]) -> paddle.Tensor:
    """On the CPU, whatever the default device is."""
    return to_paddle(np.ones(shape, np.float32))


def small(**options) -> tuple:
    """A backend's positional arguments, with a configuration of those options."""
    return make_config(max_model_len=512, **options), 2, 4, 64


@each_backend
@each_type
def test_a_day_of_serving(place, backend, cache):
    """Prefill in odd chunks, decode, speculative, mixed and stopped sequences, padding tokens."""
    server = Server(backend, Model(*cache), [140, 100, 70, 30], place)
    server.step([7, 65, 0, 1])
    server.step([63, 1, 64, 8])
    server.step([1, 1, 1, 5], padding=3)
    server.step([0, 33, 4, 0])
    server.step([69, 0, 1, 2], padding=1)


@each_type
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_every_option_of_a_layer_at_once(place, head_dim, cache):
    model = Model(
        *cache,
        head_dim=head_dim,
        heads=8,
        neox=True,
        rotary_dim=head_dim // 2,
        norm=True,
        bias=True,
        sinks=True,
        window=40,
        per_channel=cache[0] == "cache_int8",
    )
    server = Server(AppendAttentionBackend, model, [100, 70], place)
    server.step([66, 3])
    server.step([1, 40], padding=2)


@each_backend
@each_type
def test_chunked_prefill_equals_one_prefill(place, backend, cache):
    model = Model(*cache)
    whole = Server(backend, model, [150], place).run([150])[0]
    server, parts = Server(backend, model, [150], place), []
    for size in (5, 1, 58, 3, 64, 19):
        parts.append(server.step([size])[0])
    error = np.abs(np.concatenate(parts).astype(np.float64) - whole.astype(np.float64))
    # the same cache bytes: only the order of an fp32 sum may differ, by an output step
    assert (error <= 2.0**-6 * np.abs(whole.astype(np.float64)).max(-1, keepdims=True)).all()


@each_backend
@each_type
def test_a_shared_prefix(place, backend, cache):
    """Sequence 1 starts with two blocks that sequence 0 has written."""
    server = Server(backend, Model(*cache), [200, 170], place, shared=2)
    server.cached[1] = 0
    server.step([130, 0])
    server.cached[1] = 128
    server.step([1, 30])
    server.step([5, 1])
    server.step([64, 8])


@pytest.mark.parametrize("drafts", range(2, 9))
def test_speculative_seqs_overwrite_rejected_drafts(place, drafts):
    model = Model("block_wise_fp8")
    server = Server(AppendAttentionBackend, model, [120, 90], place)
    server.step([61, 30])
    for accepted in (1, drafts, 1):
        server.run([drafts, drafts])  # wrong drafts of the step before may lie there
        truth = [x.copy() for x in server.tokens]
        for x, done in zip(server.tokens, server.cached):
            x[:, done + accepted : done + drafts] = 9  # these will be rejected
        server.run([drafts, drafts])
        for x, old in zip(server.tokens, truth):
            x[:] = old
        server.step([accepted, accepted])


@pytest.mark.parametrize("q_quant", ["per_tensor", "per_token_head"])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
def test_quantised_queries(place, dtype, q_quant):
    model = Model("block_wise_fp8", dtype=dtype, norm=True, q_quant=q_quant)
    server = Server(FlashAttentionBackend, model, [90, 40], place)
    for new in ([70, 3], [1, 1]):
        assert server.step(new)[0].dtype == dtype


@each_type
def test_auto_quantises_queries_over_e4m3_caches(place, cache):
    e4m3 = cache in (("cache_fp8", "e4m3"), ("block_wise_fp8", "e4m3"))
    outputs = []
    for q_quant in ("auto", "per_token_head" if e4m3 else "none"):
        server = Server(FlashAttentionBackend, Model(*cache, q_quant=q_quant), [90, 40], place)
        outputs.append(server.run([70, 3])[0])
    assert_same_bits(*outputs)


def test_mask_offsets_are_the_whole_mask(place):
    """Start and end count, later keys may be visible, ends need not grow."""
    model = Model("block_wise_fp8")
    for flat in (False, True):
        server = Server(FlashMaskAttentionBackend, model, [100, 20], place)
        server.step([60, 0])
        rng = np.random.default_rng(3)
        start = rng.integers(0, 30, 60)
        offsets = np.stack([start, start + rng.integers(0, 70, 60)], 1)
        offsets[40:] = np.minimum(offsets[40:], 20)
        offsets[5] = (10, 10)  # nothing visible
        given = server.on(offsets.astype(np.int32).reshape(-1 if flat else (60, 2)))
        out = server.run([40, 20], attn_mask_offsets=given)[0]
        for seq, part, at in ((0, slice(0, 40), 60), (1, slice(40, 60), 0)):
            tokens = server.tokens[seq][0, : at + part.stop - part.start]
            exact = model.attention(
                tokens,
                at,
                "float64",
                causal=False,
                window_size=(-1, -1),
                mask_offsets=offsets[part],
            )
            error = np.abs(out[part].astype(np.float64) - exact)
            assert (error <= 0.02 * np.abs(exact).max()).all()
        assert not out[5].any()


def test_a_bidirectional_model(place):
    model = Model()
    server = Server(FlashAttentionBackend, model, [70], place, config={"causal": False})
    out = server.run([70])[0].astype(np.float64)
    exact = model.attention(server.tokens[0][0], 0, "float64", causal=False)
    assert np.abs(out - exact).max() <= 0.02 * np.abs(exact).max()


def test_a_window_counts_the_querys_own_key(place):
    model = Model(window=1)
    server = Server(AppendAttentionBackend, model, [9], place)
    out = server.step([9])[0].reshape(9, 4, 64)
    value = server.tokens[0][0].reshape(9, 8, 64)[:, 6:]
    assert_same_bits(out, np.repeat(value, 2, axis=1))
    layer_says = Server(AppendAttentionBackend, Model(), [9], place)
    layer_says.layers[0].sliding_window = 1
    assert_same_bits(layer_says.run([9])[0].reshape(9, 4, 64), out)


def test_rope_already_applied(place):
    model = Model()
    server = Server(FlashAttentionBackend, model, [20], place)
    out = server.run([20], rope_already_applied=True)[0]
    model.table[0], model.table[1] = 1, 0
    server.check(0, [20], out)


def test_a_model_that_has_normalised_before_the_rotation(place):
    """As in FastDeploy the layer's weights are then not applied again."""
    model = Model(norm=True)
    server = Server(FlashAttentionBackend, model, [20], place)
    server.layers[0].qk_norm_before_rope = True
    out = server.run([20])[0]
    model.q_norm_weight = model.k_norm_weight = None
    server.check(0, [20], out)


@pytest.mark.parametrize("lengths", [None, "graph", "zeros"])
def test_unknown_host_lengths_mean_upper_bounds(place, lengths):
    server = Server(FlashAttentionBackend, Model(), [70, 5], place)
    fields = {}
    if lengths == "graph":
        fields["step_use_cudagraph"] = True
    else:
        zeros = None if lengths is None else int32(np.zeros(9))
        fields["max_len_tensor_cpu"] = zeros
    server.step([64, 1], **fields)
    assert server.backend.get_attention_meta().host_lengths is None
    server.step([1, 4])
    assert server.backend.get_attention_meta().host_lengths == (4, 65)


@pytest.mark.parametrize("q_quant", ["none", "per_token_head"])
@pytest.mark.parametrize("said", [None, False, True])
def test_steps_of_which_the_host_knows_the_kind_at_most(place, said, q_quant):
    """Right whatever the server says: of prefill, of none though there is, or nothing."""
    model = Model("cache_fp8", q_quant=q_quant)
    server = Server(FlashAttentionBackend, model, [170, 90, 80], place)
    for new in ([100, 0, 7], [1, 1, 0], [1, 0, 1], [2, 70, 1], [1, 1, 1], [0, 3, 0], [60, 1, 1]):
        server.step(new, max_len_tensor_cpu=None, exist_prefill=said)
        assert server.backend.get_attention_meta().host_lengths is None


def test_guesses_know_the_length_from_which_sequences_are_long():
    host = pytest.importorskip("fastattn._host")
    assert host.LONG_SEQ == _LONG_SEQ


def test_guesses_of_the_longest_sequence():
    def guess(tokens, seqs, decode_tokens=1, prefills=False):
        return guess_new_tokens(tokens, seqs, decode_tokens, prefills)

    assert [guess(n, 64) for n in (1, 17, 64)] == [1, 1, 1]  # decode, in a captured step too
    assert [guess(n, 64, 4) for n in (1, 3, 256)] == [1, 3, 4]  # drafts of three tokens
    assert guess(2048 + 63, 64) == guess(2048 + 63, 64, prefills=True) == 2048  # a chunk beside
    assert guess(2048 + 63, 64, 4) == 2048 + 63  # any of them
    assert guess(20, 64, prefills=True) == 20
    assert guess(100, 1) == 100 and guess(65, 3) == 65 and guess(66, 3) == 64
    for tokens in (1, 2, 63, 64, 65, 3000):
        for seqs in (1, 2, 8, 64, 65, 512):
            for decode_tokens in (1, 2, 6):
                for prefills in (False, True):
                    assert 1 <= guess(tokens, seqs, decode_tokens, prefills) <= tokens


@pytest.mark.parametrize(
    ("method", "drafted", "tokens"), [(None, 5, 1), ("mtp", 3, 4), ("naive", 0, 1), ("ngram", 5, 6)]
)
def test_new_tokens_of_a_decoding_sequence(method, drafted, tokens):
    config = make_config(max_model_len=64)
    config.speculative_config.method = method
    config.speculative_config.num_speculative_tokens = drafted
    assert FlashAttentionBackend(config, 2, 4, 64).config.decode_tokens == tokens


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="this Paddle has no empty outputs")
def test_a_step_without_tokens(place):
    server = Server(FlashAttentionBackend, Model(), [70], place)
    assert server.run([0])[0].shape == (0, 256)


# Where a layer's tensors are.


@each_type
def test_a_step_touches_its_own_layer_only(place, cache):
    """Two tensors a layer, or four for the types with a scale a token."""
    model = Model(*cache, num_layers=3)
    server = Server(AppendAttentionBackend, model, [70, 9], place)
    per_layer = 4 if model.dynamic else 2
    assert len(server.caches) == 3 * per_layer
    before = [to_numpy(c).copy() for c in server.caches]
    server.run([66, 9], layers=[1])
    for i, (old, tensor) in enumerate(zip(before, server.caches)):
        changed = not np.array_equal(
            to_numpy(tensor).view(np.uint8), np.ascontiguousarray(old).view(np.uint8)
        )
        assert changed == (i // per_layer == 1), f"tensor {i}"
    server.step([66, 9])


@pytest.mark.parametrize("cache", [t[0] for t in TYPES if t[1] == "e4m3"])
def test_layer_cache_picks_by_index(cache):
    dynamic = cache.startswith("block_wise")
    tensors = [some_tensor([1, 2, 64, 64]) for i in range(8)]
    scale = some_tensor([2])
    layer = AttentionLayer(1, cache, cache_k_out_scale=scale, cache_v_out_scale=scale)
    picked = LayerCache.of(ForwardMeta(caches=tensors), layer)
    first = 4 if dynamic else 2
    assert (picked.key is tensors[first]) and (picked.value is tensors[first + 1])
    if dynamic:
        assert picked.k_scales is tensors[6] and picked.v_scales is tensors[7]
    elif cache == "none":
        assert picked.k_scales is None and picked.v_scales is None
    else:
        assert picked.k_scales is scale and picked.v_scales is scale
    assert picked.arguments()["cache_quant_type"] == cache


def test_channel_scales_of_values_are_as_many_as_their_channels():
    """Of 192 channels of K and 128 of V; this process holds the second half of 4 heads."""
    scales = {
        "cache_k_out_scale": some_tensor([4 * 192]),
        "cache_v_out_scale": some_tensor([4 * 128]),
    }
    meta = ForwardMeta(caches=[some_tensor([1, 2, 64, 192]), some_tensor([1, 2, 128, 64])])
    shard = HeadShard(rank=1, size=2, num_heads=4)
    picked = LayerCache.of(meta, AttentionLayer(0, "cache_int8", **scales), shard)
    assert list(picked.k_scales.shape) == [384] and list(picked.v_scales.shape) == [256]
    scales["cache_v_out_scale"] = scales["cache_k_out_scale"]
    with pytest.raises(ValueError, match=r"cache_v_out_scale: .* of 128 channels, got 768"):
        LayerCache.of(meta, AttentionLayer(0, "cache_int8", **scales), shard)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_static_scales_may_be_parameters(dtype):
    """FastDeploy's layers hold them as parameters of the model's dtype."""
    server = Server(FlashAttentionBackend, Model("cache_int8", scale_dtype=np.float16), [9])
    layer = server.layers[0]
    for name in ("cache_k_out_scale", "cache_v_out_scale"):
        values = to_numpy(getattr(layer, name)).astype(np.float32)
        parameter = to_paddle(values.astype(dtype))
        parameter.stop_gradient = False
        setattr(layer, name, parameter)
    server.step([5])


@pytest.mark.parametrize(
    ("layer", "count", "error", "text"),
    [
        (AttentionLayer(1), 3, ValueError, "needs 2 tensors a layer, at 2 to 3; the list has 3"),
        (AttentionLayer(1), 2, ValueError, "the list has 2"),
        (AttentionLayer(-1), 4, ValueError, "layer -1"),
        (AttentionLayer(0, "block_wise_fp8"), 2, ValueError, "needs 4 tensors a layer"),
        (AttentionLayer(0, "block_wise_fp8"), 6, ValueError, "needs 4 tensors a layer"),
        (AttentionLayer(0, "cache_fp8"), 2, ValueError, "layer.cache_k_out_scale: .*got None"),
        (
            AttentionLayer(0, "cache_int4_zp"),
            2,
            NotImplementedError,
            "'cache_int4_zp' is not supported; supported: none, cache_int8",
        ),
    ],
)
def test_layer_cache_refuses(layer, count, error, text):
    meta = ForwardMeta(caches=[some_tensor([1, 2, 64, 64])] * count)
    with pytest.raises(error, match=text):
        LayerCache.of(meta, layer)


def test_a_zero_point_is_refused():
    layer = AttentionLayer(0, "cache_int8")
    layer.cache_k_zp = some_tensor([2])
    with pytest.raises(ValueError, match=r"cache_k_zp: .*'cache_int8' is symmetric"):
        LayerCache.of(ForwardMeta(caches=[some_tensor([1, 2, 64, 64])] * 2), layer)


# The contract.


@each_backend
def test_the_constructor_needs_no_operator(backend, monkeypatch):
    monkeypatch.setattr(_ops, "load", lambda: pytest.fail("loaded the library"))
    made = backend(*small(), encoder_block_shape_q=64, decoder_block_shape_q=16)
    assert made.get_kv_cache_shape(9) == ([9, 2, 64, 64], [9, 2, 64, 64])
    assert isinstance(made, backends.AttentionBackend)
    assert backend.__infer_dynamic_dims_fields__ == ("attention_metadata",)


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        (None, False),
        ("none", False),
        ("int8", False),
        ("cache_int8", False),
        ("float8_e4m3fn", False),
        ("cache_fp8", False),
        ("block_wise_fp8", True),
        ("block_wise_int8", True),
        ("block_wise_int4", True),
        ("block_wise_mxfp4", True),
        ("block_wise_k8v4", True),
        ("block_wise_kfp8v4", True),
    ],
)
def test_shapes_of_every_type(name, scales):
    backend = FlashAttentionBackend(make_config(max_model_len=512), 2, 4, 128)
    key, value = backend.get_kv_cache_shape(5, name)
    plain = name in (None, "none")
    row = 64 if name in ("block_wise_int4", "block_wise_mxfp4") else 128
    value_row = 64 if str(name).endswith("4") else 128
    assert key == [5, 2, 64, row]
    assert value == ([5, 2, 64, 128] if plain else [5, 2, value_row, 64])
    expected = ([5, 2, 64], "float32") if scales else None
    if name == "block_wise_mxfp4":
        expected = ([5, 2, 64, 4], "uint8")
    assert backend.get_kv_cache_scale_shape(5, name) == expected


@pytest.mark.parametrize("dim", [96, 256])
def test_shapes_of_4_bit_heads(dim):
    backend = FlashAttentionBackend(make_config(max_model_len=512), 2, 4, dim)
    key, value = backend.get_kv_cache_shape(5, "block_wise_int4")
    assert key == [5, 2, 64, dim // 2] and value == [5, 2, dim // 2, 64]
    assert backend.get_kv_cache_shape(5, "block_wise_mxfp4") == (key, value)
    for name in ("block_wise_k8v4", "block_wise_kfp8v4"):
        assert backend.get_kv_cache_shape(5, name) == ([5, 2, 64, dim], value)
    scales = backend.get_kv_cache_scale_shape(5, "block_wise_mxfp4")
    assert scales == ([5, 2, 64, dim // 32], "uint8")


@pytest.mark.parametrize("name", ["int4_zp", "int8_zp", "float8_e4m3fn_zp", "fp4"])
def test_shapes_of_other_types_are_refused(name):
    with pytest.raises(NotImplementedError, match=f"'{name}' is not supported; supported: none"):
        FlashAttentionBackend(*small()).get_kv_cache_shape(5, name)


@each_backend
@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("parallel_config", "pd_disaggregation_mode", "per_layer"),
        ("cache_config", "block_size", 32),
    ],
)
def test_configurations_are_refused_by_name(backend, part, name, value):
    config, *rest = small()
    setattr(getattr(config, part), name, value)
    with pytest.raises(NotImplementedError, match=f"{backend.__name__}: .*{name}"):
        backend(config, *rest)


def test_head_dim_and_length_are_checked():
    for dim in (80, 192):  # heads of a fused projection are of one size
        with pytest.raises(NotImplementedError, match=f"head_dim = {dim} .*: 64, 96, 128, 256"):
            FlashAttentionBackend(make_config(max_model_len=512), 2, 4, dim)
    with pytest.raises(ValueError, match="max_model_len"):
        FlashAttentionBackend(SimpleNamespace(), 2, 4, 64)
    with pytest.raises(ValueError, match=r"q_quant: expected none, .* or auto, got 'fp8'"):
        FlashAttentionBackend(make_config(max_model_len=512), 2, 4, 64, q_quant="fp8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("linear_shift", some_tensor([1])),
        ("linear_smooth", some_tensor([1])),
        ("qkv_scale", some_tensor([1])),
        ("out_scale", 0.5),
    ],
)
def test_layers_are_refused_by_name(name, value):
    server = Server(FlashAttentionBackend, Model(), [5])
    setattr(server.layers[0], name, value)
    with pytest.raises(NotImplementedError, match=f"FlashAttentionBackend: layer.{name}"):
        server.run([5])


def test_mla_and_lengths_of_pre_caches_are_refused():
    server = Server(FlashAttentionBackend, Model(), [5])
    with pytest.raises(NotImplementedError, match=r"forward_meta\.pre_caches_length"):
        server.run([5], pre_caches_length=3)
    meta = server.make_meta([5])
    server.backend.init_attention_metadata(meta)
    qkv = to_paddle(server.inputs(0, [5]))
    some = some_tensor([1])
    for name, arguments in (("compressed_kv", (some, None)), ("k_pe", (None, some))):
        with pytest.raises(NotImplementedError, match=name):
            server.backend.forward(None, None, None, qkv, *arguments, server.layers[0], meta)


def test_forward_mixed_needs_a_prepared_step_and_qkv():
    server = Server(FlashAttentionBackend, Model(), [5])
    meta, layer = server.make_meta([5]), server.layers[0]
    qkv = to_paddle(server.inputs(0, [5]))
    with pytest.raises(ValueError, match="init_attention_metadata was not called"):
        server.backend.forward_mixed(None, None, None, qkv, None, None, layer, meta)
    server.backend.init_attention_metadata(meta)
    with pytest.raises(ValueError, match="qkv: expected a fused tensor, got None"):
        server.backend.forward_mixed(None, None, None, None, None, None, layer, meta)


@pytest.mark.parametrize("mode", [ForwardMode.MIXED, ForwardMode.DECODE, ForwardMode.EXTEND])
def test_every_mode_of_a_step_gives_the_same(place, mode):
    server = Server(FlashAttentionBackend, Model(), [5], place)
    server.step([5], forward_mode=mode)


def test_native_mode_is_refused():
    with pytest.raises(NotImplementedError, match="NATIVE"):
        Server(FlashAttentionBackend, Model(), [5]).run([5], forward_mode=ForwardMode.NATIVE)


def test_modes_answer_as_fastdeploys():
    asked = [(m.is_prefill(), m.is_decode(), m.is_mixed(), m.is_native()) for m in ForwardMode]
    assert np.array_equal(asked, np.eye(4, dtype=bool))


def test_forward_meta_answers_as_fastdeploys():
    meta = ForwardMeta(caches=[1])
    assert meta.caches == [1]
    assert meta.no_such_field is None
    assert "no_such_field" in vars(meta)
    assert copy.copy(meta).caches == [1]
    assert pickle.loads(pickle.dumps(meta)).caches == [1]


def test_a_steps_metadata():
    meta = ForwardMeta.for_step(
        cached=[3, 0, 64], new=[1, 5, 0], block_tables=[[0], [1], [2]], caches=[], num_tokens=8
    )
    assert meta.cu_seqlens_q.numpy().tolist() == [0, 1, 6, 6]
    assert meta.seq_lens_encoder.numpy().tolist() == [0, 5, 0]
    assert meta.batch_id_per_token.numpy().tolist() == [0, 1, 1, 1, 1, 1, -1, -1]
    assert meta.max_len_tensor_cpu.numpy().tolist() == [5, 5, 3, 5, 4, 5, 0, 0, 0]
