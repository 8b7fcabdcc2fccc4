"""Backends without FastDeploy: where a step's tensors are, what is passed by name, ``attend``."""

from __future__ import annotations

import inspect

import numpy as np
import paddle
import pytest

from fastattn import backends
from fastattn.backends import (
    AttentionLayer,
    DSAAttentionBackend,
    FlashAttentionBackend,
    ForwardMeta,
    MLAAttentionBackend,
    forward_meta,
    make_config,
    make_latent_config,
)
from tests.support.tensors import to_numpy, to_paddle

TENSORS = ("seq_lens_decoder", "seq_lens_this_time", "cu_seqlens_q", "block_tables")
STEP = {"cached": [70, 3], "new": [2, 1], "block_tables": [[0, 1], [5, -1]]}


def test_a_step_is_where_the_caches_are(place):
    caches = [to_paddle(np.zeros([8, 1, 64, 64], np.uint16), place) for _ in "kv"]
    meta = ForwardMeta.for_step(**STEP, caches=caches)
    for name in TENSORS:
        assert getattr(meta, name).place.is_gpu_place() == (place == "gpu"), name
    assert meta.max_len_tensor_cpu.place.is_cpu_place()
    assert to_numpy(meta.block_tables).tolist() == STEP["block_tables"]


class Elsewhere:
    """A cache on a place that this machine need not have."""

    shape, place = [8, 1, 64, 64], object()


def test_the_place_of_the_first_cache_unless_one_is_given(monkeypatch):
    used = []

    def to_tensor(array, place):
        used.append(place)
        return array

    monkeypatch.setattr(forward_meta, "is_tensor", lambda x: isinstance(x, Elsewhere))
    monkeypatch.setattr(paddle, "to_tensor", to_tensor)
    ForwardMeta.for_step(**STEP, caches=[None, Elsewhere()])
    assert used.count(Elsewhere.place) == len(used) - 1 == 6  # lengths for the host stay there
    given = object()
    used.clear()
    ForwardMeta.for_step(**STEP, caches=[Elsewhere()], place=given)
    assert used.count(given) == 6 and Elsewhere.place not in used


def test_a_step_without_caches_is_on_the_cpu():
    meta = ForwardMeta.for_step(cached=[], new=[], block_tables=[], caches=[])
    assert meta.block_tables.place.is_cpu_place()


FASTDEPLOYS = ["fd_config", "kv_num_heads", "num_heads", "head_dim"]
FASTDEPLOYS += ["encoder_block_shape_q", "decoder_block_shape_q"]
CLASSES = [x for x in map(backends.__dict__.get, backends.__all__) if inspect.isclass(x)]


@pytest.mark.parametrize(
    "kind",
    [x for x in CLASSES if issubclass(x, backends.AttentionBackend)],
    ids=lambda x: x.__name__,
)
def test_only_what_fastdeploy_passes_is_positional(kind):
    if inspect.isabstract(kind):
        return
    positional = [
        p.name
        for p in inspect.signature(kind).parameters.values()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional == FASTDEPLOYS[: len(positional)]  # the latent ones pass some of them on
    order = [*inspect.signature(kind.forward_mixed).parameters][1:]
    assert order == ["q", "k", "v", "qkv", "compressed_kv", "k_pe", "layer", "forward_meta"]


@pytest.mark.parametrize(
    "made", [ForwardMeta, ForwardMeta.for_step, make_config, make_latent_config]
)
def test_nothing_is_positional(made):
    kinds = {p.kind for p in inspect.signature(made).parameters.values()}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


def bf16(*shape):
    return paddle.randn(shape).astype("bfloat16")


def both_ways(backend, caches, positional, arguments):
    """The bits of a step by `forward_mixed` and by `attend`, which write the same cache."""
    meta = ForwardMeta.for_step(**STEP, caches=caches, rope_already_applied=True)
    layer = AttentionLayer(layer_id=0)
    found = []
    for call, given in ((backend.forward_mixed, positional), (backend.attend, arguments)):
        backend.init_attention_metadata(meta)
        found.append(to_numpy(call(*given(meta), layer, meta)).view(np.uint16))
    return found


def test_attend_is_forward_mixed():
    qkv = bf16(3, 6 * 64)
    backend = FlashAttentionBackend(make_config(max_model_len=128), 1, 4, 64)
    caches = [bf16(8, 1, 64, 64), bf16(8, 1, 64, 64)]
    a, b = both_ways(
        backend, caches, lambda _: (None, None, None, qkv, None, None), lambda _: (qkv,)
    )
    assert a.any() and (a == b).all()


def test_attend_of_latent_backends():
    config = make_latent_config(
        max_model_len=128, qk_nope_head_dim=128, index_n_heads=8, index_topk=16
    )
    q, latent, rope = bf16(3, 4, 576), bf16(3, 512), bf16(3, 64)
    mla = MLAAttentionBackend(config, 1, 4, 576)
    a, b = both_ways(
        mla, [bf16(8, 1, 64, 576)],
        lambda _: (q, None, None, None, latent, rope), lambda _: (q, latent, rope),
    )  # fmt: skip
    assert a.any() and (a == b).all()
    dsa = DSAAttentionBackend(config, 1, 4, 576)
    shapes = dsa.get_kv_cache_shape(8, "uint8")
    caches = [paddle.zeros(shapes[0], "uint8"), paddle.zeros(shapes[2], "uint8")]
    index = bf16(3, 8, 128), bf16(3, 128), bf16(3, 8)

    def select(meta):
        return dsa.select(*index, 0, meta)

    a, b = both_ways(
        dsa, caches,
        lambda meta: (q, None, select(meta), None, latent, rope),
        lambda meta: (q, select(meta), latent, rope),
    )  # fmt: skip
    assert a.any() and (a == b).all()
