"""A backend keeps what it made of a layer, for as long as it would make the same again."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops, _views
from fastattn.backends import (
    AttentionLayer,
    FlashAttentionBackend,
    FlashMaskAttentionBackend,
    ForwardMeta,
    make_config,
)
from fastattn.reference.rope import make_rotary_embs
from tests.support.compare import assert_same_bits
from tests.support.serving import taken
from tests.support.tensors import to_numpy

__all__ = ["taken"]  # the fixture

H, KV, D = 4, 2, 64
RNG = np.random.default_rng(5)


class ParameterLayer(paddle.nn.Layer):
    """Keeps its tensors as FastDeploy's layer does: as parameters, which want gradients."""

    def __init__(self, **values):
        super().__init__()
        self.layer_id = 0
        self.cache_quant_type_str = "cache_fp8"
        for name, value in values.items():
            setattr(self, name, value)


def parameter(values, dtype="float32"):
    values = np.asarray(values, np.float32)
    created = paddle.create_parameter(
        list(values.shape), dtype, default_initializer=paddle.nn.initializer.Assign(values)
    )
    return created


def tensor(values):
    return paddle.to_tensor(np.asarray(values, np.float32))


def make_caches(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ([3, KV, 64, D], [3, KV, D, 64])
    return [paddle.to_tensor(rng.integers(0, 100, s).astype(np.uint8)) for s in shapes]


def make_meta(caches):
    return ForwardMeta.for_step(
        cached=[70, 0],
        new=[1, 5],
        block_tables=[[2, 0], [1, -1]],
        caches=caches,
        rotary_embs=paddle.to_tensor(make_rotary_embs(200, D)),
    )


QKV = paddle.to_tensor(RNG.normal(size=(6, (H + 2 * KV) * D)).astype(np.float16))


def step(backend, layer, caches, meta=None):
    meta = make_meta(caches) if meta is None else meta
    backend.init_attention_metadata(meta)
    with paddle.no_grad():
        return to_numpy(backend.forward_mixed(None, None, None, QKV, None, None, layer, meta))


def backend():
    return FlashAttentionBackend(make_config(max_model_len=256), KV, H, D)


def fresh(layer, caches):
    """The step by a backend that has seen nothing yet, over copies of the caches."""
    return step(backend(), layer, [paddle.to_tensor(x.numpy()) for x in caches])


def scales(seed):
    rng = np.random.default_rng(seed)
    return {f"cache_{x}_out_scale": rng.uniform(0.01, 0.1, [KV]) for x in "kv"}


CHANGES = {
    "cache_k_out_scale": [0.3, 0.02],
    "cache_v_out_scale": [0.3, 0.02],
    "q_norm_weight": RNG.uniform(0.5, 2, D),
    "qkv_bias": RNG.normal(size=(H + 2 * KV) * D),
    "sinks": RNG.normal(size=H),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["tensor", "parameter"])
@pytest.mark.parametrize("how", ["replaced", "written"])
def test_a_changed_tensor_counts_in_the_next_step(name, kind, how):
    make = tensor if kind == "tensor" else parameter
    values = {n: make(v) for n, v in scales(1).items()}
    if how == "written" and name not in values:
        values[name] = make(np.ones_like(CHANGES[name]))
    if kind == "tensor":
        layer = AttentionLayer(layer_id=0, cache_quant_type_str="cache_fp8", **values)
    else:
        layer = ParameterLayer(**values)
    kept, caches = backend(), make_caches()
    before = step(kept, layer, caches)
    assert_same_bits(step(kept, layer, caches), before)
    if how == "replaced":
        setattr(layer, name, make(CHANGES[name]))
    else:
        getattr(layer, name).set_value(np.asarray(CHANGES[name], np.float32))
    after = step(kept, layer, caches)
    assert_same_bits(after, fresh(layer, caches))
    assert (after != before).any()


def test_a_written_scale_that_needs_a_cast_counts():
    layer = ParameterLayer(**{n: parameter(v, "float16") for n, v in scales(1).items()})
    kept, caches = backend(), make_caches()
    before = step(kept, layer, caches)
    layer.cache_v_out_scale.set_value(np.asarray([0.5, 0.25], np.float16))
    after = step(kept, layer, caches)
    assert_same_bits(after, fresh(layer, caches))
    assert (after != before).any()


def test_other_caches_and_other_settings_count():
    layer = AttentionLayer(
        layer_id=0, cache_quant_type_str="cache_fp8", **{n: tensor(v) for n, v in scales(1).items()}
    )
    kept, first, second = backend(), make_caches(1), make_caches(2)
    results = [step(kept, layer, first), step(kept, layer, second)]
    assert_same_bits(results[1], fresh(layer, second))
    layer.sliding_window = 3
    results.append(step(kept, layer, first))
    assert_same_bits(results[2], fresh(layer, first))
    layer.cache_quant_type_str = "cache_int8"
    results.append(step(kept, layer, make_caches(1)))
    assert all((a != b).any() for i, a in enumerate(results) for b in results[:i])


def test_a_layer_that_becomes_unsupported_is_refused():
    layer = ParameterLayer(**{n: tensor(v) for n, v in scales(1).items()})
    kept, caches = backend(), make_caches()
    step(kept, layer, caches)
    layer.linear_shift = tensor([1.0])
    with pytest.raises(NotImplementedError, match="linear_shift"):
        step(kept, layer, caches)


def test_attributes_that_a_class_computes_are_asked_for_every_time():
    class Computing:
        layer_id, cache_quant_type_str = 0, "cache_fp8"
        cache_k_out_scale = cache_v_out_scale = tensor([0.05])
        window = 3

        @property
        def sliding_window(self):
            return self.window

    layer, kept, caches = Computing(), backend(), make_caches()
    assert kept._facts_of(layer, make_meta(caches)).seen is None
    before = step(kept, layer, caches)
    layer.window = 60
    after = step(kept, layer, caches)
    assert_same_bits(after, fresh(layer, caches))
    assert (after != before).any()


class Forwarding:
    """A wrapper, as of a quantisation, that has what its inner layer has."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)


class Constant(ParameterLayer):
    sliding_window = 3


@pytest.mark.parametrize("kind", ["wrapper", "class"])
def test_attributes_that_lie_elsewhere_are_asked_for_every_time(kind, monkeypatch):
    values = {n: tensor(v) for n, v in scales(1).items()}
    inner = Constant(**values) if kind == "class" else ParameterLayer(**values, sliding_window=3)
    layer = inner if kind == "class" else Forwarding(inner)
    kept, caches = backend(), make_caches()
    before = step(kept, layer, caches)
    if kind == "class":
        monkeypatch.setattr(Constant, "sliding_window", 60)
    else:
        inner.sliding_window = 60
    after = step(kept, layer, caches)
    assert_same_bits(after, fresh(layer, caches))
    assert (after != before).any()


@pytest.mark.parametrize("kind", ["tensor", "parameter"])
def test_scales_that_change_their_dtype_in_place(kind):
    make = tensor if kind == "tensor" else parameter
    layer = ParameterLayer(**{n: make(v) for n, v in scales(1).items()})
    kept, caches = backend(), make_caches()
    step(kept, layer, caches)
    for name in scales(1):
        with paddle.no_grad():
            getattr(layer, name).cast_("float16")
    assert_same_bits(step(kept, layer, caches), fresh(layer, caches))


def test_a_backend_keeps_neither_caches_nor_layers():
    layer = ParameterLayer(**{n: tensor(v) for n, v in scales(1).items()})
    kept, caches = backend(), make_caches()
    step(kept, layer, caches)
    alive = [weakref.ref(x) for x in (layer, *caches)]
    kept.attention_metadata = None
    del layer, caches
    gc.collect()
    assert [x() is None for x in alive] == [True] * 3
    assert kept._known_layers._facts == {}


def test_facts_are_kept():
    layer = ParameterLayer(**{n: tensor(v) for n, v in scales(1).items()})
    kept, caches = backend(), make_caches()
    step(kept, layer, caches)
    first = kept._facts_of(layer, make_meta(caches))
    assert kept._facts_of(layer, make_meta(caches)) is first
    other = ParameterLayer(**{n: tensor(v) for n, v in scales(2).items()})
    assert kept._facts_of(other, make_meta(caches)) is not first
    assert kept._facts_of(layer, make_meta(caches)) is first


@pytest.mark.parametrize("built", [True, False], ids=["direct", "without"])
def test_facts_of_a_layer_among_many_are_kept(built, monkeypatch):
    """More than 256 tensors: Python makes a new number of their count every time."""
    if not built:
        monkeypatch.setattr(_ops, "helpers", lambda: None)
    layer = AttentionLayer(
        layer_id=0, cache_quant_type_str="cache_fp8", **{n: tensor(v) for n, v in scales(1).items()}
    )
    kept, caches = backend(), make_caches() * 200
    first = kept._facts_of(layer, make_meta(caches))
    assert kept._facts_of(layer, make_meta(list(caches))) is first
    assert kept._facts_of(layer, make_meta(caches[:-2])) is not first
    layer.qkv_bias = tensor(CHANGES["qkv_bias"])
    assert kept._facts_of(layer, make_meta(caches)).options["qkv_bias"] is layer.qkv_bias


def test_a_flat_view_shares_its_memory():
    x = tensor(RNG.normal(size=(5, 3, 64)))
    flat = _views.flat(x)
    assert list(flat.shape) == [5, 192] and flat.stop_gradient
    assert_same_bits(to_numpy(flat), to_numpy(x).reshape(5, 192))
    assert flat.data_ptr() == x.data_ptr()
    transposed = x.transpose([1, 0, 2])
    assert_same_bits(to_numpy(_views.flat(transposed)), to_numpy(transposed).reshape(3, 320))


def step_layer(kind):
    if kind == "cache_fp8":
        values = {n: tensor(v) for n, v in scales(3).items()}
        return AttentionLayer(layer_id=0, cache_quant_type_str=kind, **values), make_caches(3)
    layer = AttentionLayer(
        layer_id=0,
        cache_quant_type_str=kind,
        qkv_bias=tensor(CHANGES["qkv_bias"]),
        sinks=tensor(CHANGES["sinks"]),
    )
    if kind == "none":
        rng = np.random.default_rng(4)
        return layer, [
            paddle.to_tensor(rng.normal(size=[3, KV, 64, D]).astype(np.float16)) for _ in range(2)
        ]
    rng = np.random.default_rng(5)
    more = [rng.uniform(0.01, 0.1, [3, KV, 64]).astype(np.float32) for _ in range(2)]
    key, value = make_caches(5)
    if kind == "block_wise_k8v4":
        value = value[:, :, : D // 2].contiguous()
    return layer, [key, value] + [paddle.to_tensor(x) for x in more]


needs_direct = pytest.mark.skipif(_ops.helpers() is None, reason="fastattn._direct was not built")


@needs_direct
@pytest.mark.parametrize(
    "kind", ["none", "cache_fp8", "block_wise_fp8", "block_wise_int8", "block_wise_k8v4"]
)
def test_a_bound_step_is_the_step_through_python(kind, taken, monkeypatch):
    layer, caches = step_layer(kind)
    copies = [paddle.to_tensor(x.numpy()) for x in caches]
    kept = backend()
    bound = step(kept, layer, caches)
    assert len(taken) == 1 and taken[0] is not None and taken[0].shape == [6, H * D]
    monkeypatch.setattr(_ops, "is_direct", lambda: False)
    assert_same_bits(step(kept, layer, copies), bound)
    assert len(taken) == 1
    for ours, theirs in zip(caches, copies):
        assert_same_bits(to_numpy(ours), to_numpy(theirs))


@needs_direct
@pytest.mark.parametrize(
    "name, value, error, match",
    [
        ("cu_seqlens_q", None, ValueError, "forward_meta.cu_seqlens_q: expected a value"),
        ("rotary_embs", None, ValueError, "forward_meta.rotary_embs: expected a value"),
        ("seq_lens_decoder", "x", TypeError, "seq_lens_decoder: expected a tensor, got str"),
        ("caches", None, ValueError, "caches"),
        ("block_tables", [[0, 1]], TypeError, "block_tables: expected a tensor, got list"),
    ],
)
def test_a_bound_step_declines_what_is_wrong(name, value, error, match, taken):
    layer, caches = step_layer("block_wise_fp8")
    kept = backend()
    step(kept, layer, caches)
    meta = make_meta(caches)
    kept.init_attention_metadata(meta)
    setattr(meta, name, value)
    before = [x.numpy() for x in caches]
    taken.clear()
    with pytest.raises(error, match=match):
        kept.forward_mixed(None, None, None, QKV, None, None, layer, meta)
    assert not any(taken)
    for cache, was in zip(caches, before):
        assert_same_bits(cache.numpy(), was)


@needs_direct
def test_errors_of_a_bound_step_have_their_class_and_text(taken):
    layer, caches = step_layer("block_wise_fp8")
    kept = backend()
    step(kept, layer, caches)
    for columns, text in [(QKV.shape[1] - 1, "qkv"), (1, "qkv")]:
        bad = paddle.to_tensor(np.zeros([6, columns], np.float16))
        meta = make_meta(caches)
        kept.init_attention_metadata(meta)
        with pytest.raises(ValueError, match=f"^attention_step: {text}: expected"):
            kept.forward_mixed(None, None, None, bad, None, None, layer, meta)
    short = make_meta(caches)
    kept.init_attention_metadata(short)
    short.seq_lens_decoder = short.seq_lens_decoder[:1]
    with pytest.raises(ValueError, match=r"^attention_step: seq_lens_decoder: expected"):
        kept.forward_mixed(None, None, None, QKV, None, None, layer, short)
    assert len(taken) == 4


@needs_direct
def test_a_step_that_wants_gradients_warns(taken, monkeypatch):
    layer, caches = step_layer("block_wise_fp8")
    kept = backend()
    step(kept, layer, caches)
    monkeypatch.setattr(_ops, "_told_no_gradient", set())
    meta = make_meta(caches)
    kept.init_attention_metadata(meta)
    wanting = QKV.clone()
    wanting.stop_gradient = False
    with pytest.warns(RuntimeWarning, match="attention_step: qkv wants a gradient"):
        kept.forward_mixed(None, None, None, wanting, None, None, layer, meta)
    assert taken[1:] == [None]
    with paddle.no_grad():  # nobody asks for it
        kept.forward_mixed(None, None, None, wanting, None, None, layer, meta)
    assert taken[2] is not None


FIXED = {"scale": None, "output": None, "granularity": "group", "group_size": 32}


@needs_direct
@pytest.mark.parametrize(
    "fixed, names, match",
    [
        ({}, ["x"], "an argument is missing"),
        (FIXED, [], "an argument is missing"),
        ({**FIXED, "y": None}, ["x"], "no argument y"),
        (FIXED, ["x", "group_size"], "group_size is given twice"),
        (FIXED, ["x", "x"], "x is given twice"),
    ],
)
def test_a_call_is_bound_with_all_its_names(fixed, names, match):
    with pytest.raises(TypeError, match=match):
        _ops.bound("quantize_fp8", fixed, names)


@needs_direct
def test_a_bound_call_takes_its_open_arguments():
    x = tensor(RNG.normal(size=(2, 64)))
    run = _ops.bound("quantize_fp8", FIXED, ["x"])
    assert_same_bits(
        to_numpy(run(x)), to_numpy(F.quantize_fp8(x, granularity="group", group_size=32)[0])
    )
    for arguments in [(), (x, x)]:
        with pytest.raises(TypeError, match="expected 1 arguments, got"):
            run(*arguments)
    for declined in ("x", None, 1):
        assert run(declined) is None
    fixed = {"x": x, "scale": None, "output": None, "granularity": "group"}
    run = _ops.bound("quantize_fp8", fixed, ["group_size"])
    assert_same_bits(
        to_numpy(run(32)), to_numpy(F.quantize_fp8(x, granularity="group", group_size=32)[0])
    )
    for declined in ("x", None, 10**30, 32.0, True):
        assert run(declined) is None
    with pytest.raises(RuntimeError, match="group_size"):
        run(-3)


@needs_direct
def test_an_attribute_of_another_type_binds_nothing():
    assert _ops.bound("quantize_fp8", {**FIXED, "group_size": "x"}, ["x"]) is None


@needs_direct
def test_a_bound_call_keeps_what_it_was_given():
    x = tensor(RNG.normal(size=(2, 64)))
    want = to_numpy(F.quantize_fp8(x, granularity="group", group_size=32)[0])
    fixed = {"x": x, **{name: value for name, value in FIXED.items() if name != "granularity"}}
    run = _ops.bound("quantize_fp8", fixed, ["granularity"])
    alive = weakref.ref(x)
    del x, fixed
    gc.collect()
    assert_same_bits(to_numpy(run("".join(["gro", "up"]))), want)
    del run
    gc.collect()
    assert alive() is None


@needs_direct
def test_a_watched_call_is_not_passed_by(monkeypatch):
    assert _ops.is_direct()
    monkeypatch.setattr(_ops, "call", lambda *a: None)
    assert not _ops.is_direct()


@needs_direct
@pytest.mark.parametrize("replaced", [False, True])
def test_a_step_holds_its_caches_while_python_code_runs(replaced, taken):
    """A field that is a property may empty the list of caches, or fill it with others."""
    layer, caches = step_layer("block_wise_fp8")
    kept = backend()
    expected = step(kept, layer, caches)
    others = step_layer("none")[1] * 2

    class Meta(ForwardMeta):
        @property
        def rotary_embs(self):
            self.caches[:] = others if replaced else []
            gc.collect()
            return self.__dict__["rotary_embs"]

    meta = Meta()
    meta.__dict__.update(make_meta(list(caches)).__dict__)
    kept.init_attention_metadata(meta)
    with paddle.no_grad():
        out = kept.forward_mixed(None, None, None, QKV, None, None, layer, meta)
    assert taken[-1] is not None
    assert_same_bits(to_numpy(out), expected)


@needs_direct
@pytest.mark.parametrize("name", ["rope_already_applied", "batch_id_per_token", "rotary_embs"])
@pytest.mark.parametrize("error", [ValueError, RuntimeError, MemoryError, KeyboardInterrupt])
def test_what_a_field_raises_ends_the_step(name, error, taken):
    layer, caches = step_layer("block_wise_fp8")
    kept = backend()
    step(kept, layer, caches)

    def fail(self):
        raise error("asked for it")

    meta = make_meta(caches)
    kept.init_attention_metadata(meta)
    meta.__class__ = type("Meta", (ForwardMeta,), {name: property(fail)})
    before = [x.numpy() for x in caches]
    with pytest.raises(error, match="asked for it"):
        kept.forward_mixed(None, None, None, QKV, None, None, layer, meta)
    for cache, was in zip(caches, before):
        assert_same_bits(cache.numpy(), was)


@needs_direct
def test_a_tensor_that_is_deleted_counts_in_the_next_step(taken):
    layer = ParameterLayer(**{n: tensor(v) for n, v in scales(1).items()})
    layer.register_buffer("sinks", tensor(CHANGES["sinks"]))
    kept, caches = backend(), make_caches()
    first = step(kept, layer, caches)
    assert_same_bits(step(kept, layer, caches), first)
    del layer.sinks
    assert_same_bits(step(kept, layer, caches), fresh(layer, caches))


class Program(paddle.nn.Layer):
    """One layer's step, as a program."""

    def __init__(self, kept, layer, meta):
        super().__init__()
        self.kept, self.layer, self.meta = kept, layer, meta

    def forward(self, qkv):
        return self.kept.forward_mixed(None, None, None, qkv, None, None, self.layer, self.meta)


def test_a_backend_that_knows_a_layer_can_be_traced():
    layer, caches = step_layer("block_wise_fp8")
    kept = backend()
    expected = step(kept, layer, caches)
    meta = make_meta(caches)
    kept.init_attention_metadata(meta)
    program = Program(kept, layer, meta)
    with paddle.no_grad():
        traced = paddle.jit.to_static(program, full_graph=True)(QKV)
    assert_same_bits(to_numpy(traced), expected)


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="Paddle 2.6 has another SOT")
@pytest.mark.parametrize("full_graph", [True, False])
def test_a_step_with_offsets_can_be_traced(full_graph):
    layer, caches = step_layer("block_wise_fp8")
    kept = FlashMaskAttentionBackend(make_config(max_model_len=256), KV, H, D)
    meta = make_meta(caches)
    meta.attn_mask_offsets = paddle.to_tensor(
        [[3, 71], [0, 1], [0, 2], [1, 3], [0, 4], [2, 5]], "int32"
    )
    expected = step(kept, layer, caches, meta)
    plain = step(backend(), layer, caches)
    assert not np.array_equal(plain, expected)
    kept.init_attention_metadata(meta)
    program = Program(kept, layer, meta)
    with paddle.no_grad():
        traced = paddle.jit.to_static(program, full_graph=full_graph)
        for _ in range(2):  # SOT runs what it has translated
            assert_same_bits(to_numpy(traced(QKV)), expected)
