"""Backends of layers whose keys are stored rotated or less a centre."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import backends
from fastattn.backends import AppendAttentionBackend, AttentionLayer, FlashAttentionBackend
from fastattn.backends.peers import LAYOUT, layout
from fastattn.calibrate import Calibration, LayerCalibration
from fastattn.functional._cache_types import CACHE_QUANT_TYPES
from tests.support.serving import ROTATED, Model, Server, taken  # noqa: F401
from tests.support.tensors import to_paddle

TYPES = ("cache_int8", "block_wise_int8", "cache_fp8", "block_wise_fp8")
TRANSFORMS = [("hadamard", False), ("none", True), ("hadamard", True)]


@pytest.mark.parametrize("kind", CACHE_QUANT_TYPES)
def test_a_layer_has_the_rotation_of_make_cache(kind):
    """FastDeploy's own types keep K as FastDeploy has it; the others do as `make_cache` does."""
    backend = FlashAttentionBackend(backends.make_config(max_model_len=512), 2, 4, 64)
    scales = {}
    if kind == "cache_int8":
        scales = dict.fromkeys(("cache_k_scales", "cache_v_scales"), paddle.ones([2]))
    made = F.make_cache(1, 2, 64, kind, **scales)
    cache = SimpleNamespace(quant_type=kind, key=made.key_cache)
    layer = AttentionLayer(0, kind)
    shard = backend.config.shard_of(2, 0)
    found = backend._key_transform(layer, cache, shard)["k_rotation"]
    assert found == made.k_rotation == ("hadamard" if kind in ROTATED else "none")
    for named in ("none", "hadamard"):
        layer.cache_k_rotation = named
        assert backend._key_transform(layer, cache, shard)["k_rotation"] == named


@pytest.mark.parametrize(("rotation", "other"), [(None, "none"), ("hadamard", None)])
def test_the_default_of_int8_in_the_cache(rotation, other):
    """Codes of K that a layer without a word writes are those of a rotation, and not of none."""
    stored = []
    for named in (rotation, other):
        server = Server(FlashAttentionBackend, Model("block_wise_int8", k_rotation=named), [60])
        server.run([50])
        stored.append(server.caches[0].numpy())
    assert stored[0].any()
    assert (stored[0] == stored[1]).all() == ({rotation, other} == {None, "hadamard"})


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("rotation", "centred"), TRANSFORMS)
@pytest.mark.parametrize("kind", TYPES)
def test_a_day_of_serving(place, kind, rotation, centred, sinks):
    model = Model(kind, k_rotation=rotation, centred=centred, sinks=sinks, norm=True, bias=True)
    server = Server(FlashAttentionBackend, model, [140, 100, 70, 30], place)
    server.step([7, 65, 0, 1])
    server.step([63, 1, 64, 8])
    server.step([1, 1, 1, 5], padding=3)
    server.step([69, 0, 1, 2], padding=1)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    "kind", [*TYPES, "block_wise_int4", "block_wise_k8v4", "block_wise_kfp8v4"]
)
def test_error_feedback(place, kind, centred):
    model = Model(kind, k_rotation="hadamard", centred=centred, fed_back=True, norm=True)
    server = Server(FlashAttentionBackend, model, [140, 100, 70], place)
    server.step([7, 65, 0])
    server.step([63, 1, 64])
    server.step([1, 1, 1], padding=3)


@pytest.mark.parametrize("fed_back", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_steps_are_one_call(taken, kind, fed_back):  # noqa: F811
    model = Model(
        kind, k_rotation="hadamard", centred=True, sinks=True, head_dim=128, fed_back=fed_back
    )
    server = Server(AppendAttentionBackend, model, [90, 40])
    server.step([50, 20])
    server.step([1, 1])
    server.step([3, 1])
    assert len([x for x in taken if x is not None]) == 1  # the other two are checked


def test_queries_that_are_quantised(place):
    """The writer rotates first; without a centre nothing else is needed."""
    model = Model("block_wise_int8", k_rotation="hadamard", q_quant="per_token_head")
    server = Server(FlashAttentionBackend, model, [90, 40], place)
    outputs = []
    for new in ([70, 3], [1, 1]):
        outputs.append((server.run(new)[0], list(new)))
        server.cached = [done + n for done, n in zip(server.cached, new)]
    plain = Server(
        FlashAttentionBackend, Model("block_wise_int8", k_rotation="hadamard"), [90, 40], place
    )
    for out, new in outputs:
        exact = plain.step(new)[0].astype(np.float64)
        error = np.sqrt(np.mean((out.astype(np.float64) - exact) ** 2) / np.mean(exact**2))
        assert 0 < error < 0.06


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_sinks_beside_a_centre_take_queries_of_16_bits(place, rotation):
    """With "auto" they do; what asks for codes is refused ahead of any write."""
    model = Model("cache_fp8", k_rotation=rotation, centred=True, sinks=True)
    plain, auto = (
        Server(FlashAttentionBackend, dataclasses.replace(model, q_quant=q_quant), [90, 40], place)
        for q_quant in ("none", "auto")
    )
    for new in ([70, 3], [1, 1]):
        out = plain.step(new)[0]
        assert auto.run(new)[0].tobytes() == out.tobytes()
        auto.cached = list(plain.cached)
    codes = Server(FlashAttentionBackend, dataclasses.replace(model, q_quant="per_token_head"), [9])
    with pytest.raises(NotImplementedError, match="q_quant 'per_token_head' is not supported for"):
        codes.run([5])


def test_a_layer_that_changes_its_centre():
    model = Model("block_wise_int8", centred=True, sinks=True)
    server = Server(FlashAttentionBackend, model, [60])
    server.step([20])
    model.k_center = model.k_center + 1
    server.layers[0].cache_k_center = to_paddle(model.k_center, "cpu")
    server.cached = [0]
    server.step([30])


def test_a_centre_of_all_ranks():
    """A rank takes its own heads' rows, of a feedback too; another dtype becomes float32."""
    config = backends.make_config(
        max_model_len=512, num_key_value_heads=4, tensor_parallel_size=2, tensor_parallel_rank=1
    )
    backend = FlashAttentionBackend(config, 2, 4, 64)
    whole = np.arange(4 * 64).reshape(4, 64).astype(np.float32)
    layer = AttentionLayer(0, "block_wise_int8", cache_k_center=paddle.to_tensor(whole))
    cache = SimpleNamespace(quant_type="block_wise_int8", key=layer.cache_k_center)
    shard = backend.config.shard_of(2, 0)
    own = backend._key_transform(layer, cache, shard)["k_center"]
    np.testing.assert_array_equal(own.numpy(), whole[2:])
    layer.cache_k_center = paddle.to_tensor(whole[2:]).astype("float16")
    assert backend._key_transform(layer, cache, shard)["k_center"].dtype == paddle.float32
    matrices = np.arange(4 * 64 * 64).reshape(4, 64, 64).astype(np.float32)
    layer.cache_k_feedback = paddle.to_tensor(matrices)
    own = backend._key_transform(layer, cache, shard)["k_feedback"]
    np.testing.assert_array_equal(own.numpy(), matrices[2:])
    layer.cache_k_feedback = paddle.to_tensor(matrices[:3])
    with pytest.raises(ValueError, match=r"layer.cache_k_feedback: expected shape \[2, 64, 64\]"):
        backend._key_transform(layer, cache, shard)
    layer.cache_k_feedback = None
    layer.cache_k_center = paddle.to_tensor(whole[:3])
    with pytest.raises(ValueError, match=r"layer.cache_k_center: expected shape \[2, 64\] or \[4"):
        backend._key_transform(layer, cache, shard)


def calibration_of(tmp_path, kind, model, **fields):
    path = tmp_path / "calibration.npz"
    found = LayerCalibration(kind, None, None, model.k_rotation, model.k_center)
    Calibration({0: dataclasses.replace(found, **fields)}).write(path)
    return path


@pytest.mark.parametrize("kind", ["block_wise_int8", "block_wise_fp8"])
def test_a_file_that_the_environment_names(place, tmp_path, monkeypatch, kind):
    """Layers that a server made know nothing of it."""
    model = Model(kind, k_rotation="hadamard", centred=True, sinks=True, fed_back=True)
    path = calibration_of(tmp_path, kind, model, cache_k_feedback=model.k_feedback)
    monkeypatch.setenv("FASTATTN_CALIBRATION", str(path))
    server = Server(FlashAttentionBackend, model, [90, 40], place)
    server.layers[0].cache_k_rotation, server.layers[0].cache_k_center = "none", None
    server.layers[0].cache_k_feedback = None
    server.step([70, 3])
    server.step([1, 1])


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        ("block_wise_fp8", {"cache_quant_type": "block_wise_int8"}, "was calibrated for type"),
        (
            "cache_int8",
            dict.fromkeys(("cache_k_out_scale", "cache_v_out_scale"), np.ones(1, np.float32)),
            "static scales come from the layer",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path, monkeypatch, kind, fields, text):
    model = Model(kind)
    monkeypatch.setenv("FASTATTN_CALIBRATION", str(calibration_of(tmp_path, kind, model, **fields)))
    with pytest.raises(ValueError, match=text):
        Server(FlashAttentionBackend, model, [60]).step([5])


def test_files_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_CALIBRATION", str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match="cannot be read"):
        Server(FlashAttentionBackend, Model("block_wise_int8"), [60])
    path = calibration_of(tmp_path, "block_wise_int8", Model())
    monkeypatch.setenv("FASTATTN_CALIBRATION", str(path))
    server = Server(FlashAttentionBackend, Model("block_wise_int8", num_layers=2), [60])
    with pytest.raises(ValueError, match="layer 1 was not calibrated"):
        server.run([5], layers=[1])


def test_caches_of_other_files_are_other_bytes(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTATTN_CALIBRATION", raising=False)
    assert layout() == LAYOUT == "fastattn-2"  # 1 had K of block_wise_int8 as it is
    names = set()
    for rotation in ("none", "hadamard"):
        path = calibration_of(tmp_path, "block_wise_int8", Model(), cache_k_rotation=rotation)
        monkeypatch.setenv("FASTATTN_CALIBRATION", str(path))
        names.add(layout())
    assert len(names) == 2 and all(name.startswith(f"{LAYOUT}-") for name in names)


def test_other_types_are_refused():
    server = Server(FlashAttentionBackend, Model("none"), [60])
    server.layers[0].cache_k_rotation = "hadamard"
    with pytest.raises(NotImplementedError, match=r"k_rotation.*block_wise_int8"):
        server.run([5])
