"""F.make_cache: caches of every type, written and read with the arguments that it gives."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import backends
from fastattn.backends.layer_cache import cache_type_of
from fastattn.functional._cache_types import CACHE_QUANT_TYPES, DYNAMIC_TYPES, check_cache_type
from fastattn.reference.attention import dense_attention
from tests.support.tensors import to_numpy, to_paddle

TOKENS, HEADS, KV = 70, 4, 2

#: Relative error of outputs, from below and above, of N(0, 1) with one large channel of K.
ERRORS = {
    "none": (0, 1e-2),
    "cache_int8": (1e-3, 0.2),
    "cache_fp8": (1e-3, 0.1),
    "block_wise_int8": (1e-3, 2.5e-2),
    "block_wise_fp8": (1e-3, 0.1),
    "block_wise_int4": (1e-2, 0.3),
    "block_wise_mxfp4": (1e-2, 0.4),
    "block_wise_k8v4": (1e-2, 0.15),
    "block_wise_kfp8v4": (1e-2, 0.2),
}


def attended(cache, q, k, v):
    both = cache.key_cache, cache.value_cache
    seqs = [paddle.to_tensor(np.array(x, np.int32)) for x in ([[1, 0]], [0, TOKENS], [0], [TOKENS])]
    F.write_cache_kv(k, v, *both, *seqs, **cache.arguments)
    return F.paged_attention(q, *both, *seqs, TOKENS, TOKENS, **cache.arguments)


@pytest.mark.parametrize("kind", CACHE_QUANT_TYPES)
@pytest.mark.parametrize("dim", [64, 128, 192])
def test_written_and_read(kind, dim):
    rng = np.random.default_rng(0)
    v_dim = 128 if dim == 192 else dim
    q, k, v = (
        rng.normal(size=(TOKENS, h, d)).astype(np.float16)
        for h, d in ((HEADS, dim), (KV, dim), (KV, v_dim))
    )
    k[..., 5] *= 20
    q[..., 5] /= 20
    scales = {}
    if kind == "cache_int8":
        for name, x in (("cache_k_scales", k), ("cache_v_scales", v)):
            scales[name] = to_paddle((np.abs(x).max((0, 2)) / 127).astype(np.float32))
    cache = F.make_cache(2, KV, dim, kind, dtype="float16", **scales)
    out = to_numpy(attended(cache, *(to_paddle(x) for x in (q, k, v)))).astype(np.float64)
    seen = np.arange(TOKENS)[None] <= np.arange(TOKENS)[:, None]
    exact = dense_attention(
        *(x.astype(np.float64) for x in (q, k, v)), seen, softmax_scale=dim**-0.5
    )
    error = np.sqrt(((out - exact[0]) ** 2).sum() / (exact[0] ** 2).sum())
    least, most = ERRORS[kind]
    assert least <= error < most


@pytest.mark.parametrize("kind", CACHE_QUANT_TYPES)
def test_shapes_are_the_backends(kind):
    """The bytes of a token are the sum over all tensors."""
    backend = backends.FlashAttentionBackend(
        backends.make_config(max_model_len=128, num_key_value_heads=KV), KV, HEADS, 128
    )
    scales = {}
    if kind == "cache_int8":
        scales = {f"cache_{x}_scales": paddle.ones([1]) for x in "kv"}
    cache = F.make_cache(3, KV, 128, kind, **scales)
    shapes = [list(x.shape) for x in (cache.key_cache, cache.value_cache)]
    assert shapes == [list(s) for s in backend.get_kv_cache_shape(3, kind)]
    total = sum(x.numpy().nbytes for x in (cache.key_cache, cache.value_cache))
    found = backend.get_kv_cache_scale_shape(3, kind)
    assert (found is not None) == (kind in DYNAMIC_TYPES)
    if found is not None:
        shape, dtype = found
        for x in (cache.cache_k_scales, cache.cache_v_scales):
            assert list(x.shape) == list(shape) and x.numpy().dtype == np.dtype(dtype)
            total += x.numpy().nbytes
    assert cache.bytes_per_token == total / (3 * 64)


def test_rotation_by_type():
    rotated = {
        kind: F.make_cache(1, 1, 64, kind).k_rotation
        for kind in CACHE_QUANT_TYPES
        if kind != "cache_int8"
    }
    assert [kind for kind, r in rotated.items() if r == "hadamard"] == [
        "block_wise_int8",
        "block_wise_int4",
        "block_wise_mxfp4",
        "block_wise_k8v4",
        "block_wise_kfp8v4",
    ]
    for named in ("none", "hadamard"):
        assert F.make_cache(1, 1, 64, "block_wise_int4", k_rotation=named).k_rotation == named


def test_config_names_and_centres():
    center = paddle.zeros([1, 64])
    cache = F.make_cache(1, 1, 64, "float8_e4m3fn", k_center=center)
    assert cache.cache_quant_type == "cache_fp8" and cache.arguments["k_center"] is center
    assert cache.cache_k_scales.numpy().tolist() == [1.0]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((0, 1, 64), {}, ValueError, "num_blocks: expected 1"),
        ((1, 1.0, 64), {}, TypeError, "num_kv_heads: expected int"),
        ((1, 1, 80), {}, NotImplementedError, "64, 96, 128, 192, 256"),
        ((1, 1, 64, "int3"), {}, NotImplementedError, "'int3'"),
        ((1, 1, 64, "cache_int8"), {}, ValueError, "needs cache_k_scales"),
        ((1, 1, 64), {"dtype": "float32"}, ValueError, "bfloat16 or float16"),
        ((1, 1, 64), {"k_rotation": "fitted"}, ValueError, "auto, none or hadamard"),
        ((1, 1, 64, "block_wise_fp8"), {"cache_k_scales": 1}, ValueError, "no static scales"),
    ],
)
def test_what_is_refused(arguments, options, error, text):
    with pytest.raises(error, match=text):
        F.make_cache(*arguments, **options)


SHORT_NAMES = [
    ("int4", "block_wise_int4"),
    ("fp8", "cache_fp8 or block_wise_fp8"),
    ("mxfp4", "block_wise_mxfp4"),
    ("k8v4", "block_wise_k8v4"),
    ("kfp8v4", "block_wise_kfp8v4"),
    ("INT4", "block_wise_int4"),
    ("blockwise-int8", "block_wise_int8"),
]


@pytest.mark.parametrize(("name", "meant"), SHORT_NAMES)
def test_short_names_are_explained(name, meant):
    text = rf"cache_quant_type: '{name}' is not supported, did you mean {meant}\? supported: none, "
    with pytest.raises(NotImplementedError, match="make_cache: " + text):
        F.make_cache(1, 1, 64, name)
    cache = F.make_cache(2, 2, 64, "block_wise_int8")
    both = cache.key_cache, cache.value_cache
    seqs = [paddle.to_tensor(np.array(x, np.int32)) for x in ([[1, 0]], [0, 1], [0], [1])]
    key = paddle.zeros([1, 2, 64])
    with pytest.raises(NotImplementedError, match="write_cache_kv: " + text):
        F.write_cache_kv(key, key, *both, *seqs, cache_quant_type=name)
    with pytest.raises(NotImplementedError, match="paged_attention: " + text):
        F.paged_attention(key.astype("bfloat16"), *both, *seqs, 1, 1, cache_quant_type=name)
    with pytest.raises(NotImplementedError, match=f"did you mean {meant}"):
        cache_type_of(name)


@pytest.mark.parametrize("name", ["int3", "4", "", "wise_int4_zp", 4, None, ["int4"]])
def test_other_names_are_not_guessed(name):
    with pytest.raises((NotImplementedError, TypeError)) as raised:
        F.make_cache(1, 1, 64, name)
    assert "did you mean" not in str(raised.value)


def test_short_names_that_are_names():
    assert check_cache_type("test", "int8") == "cache_int8"
    assert check_cache_type("test", "float8_e4m3fn") == "cache_fp8"


def test_rotary_styles():
    """Checkpoints of both formats, as servers of these models have it."""
    neox = F.use_neox_rotary_style
    assert neox("llama", "hf") and not neox("llama", "gguf")
    for name in ("qwen2", "qwen3", "gemma3"):
        assert neox(name, "hf") and neox(name, "gguf")
    assert not neox("ernie4_5", "hf") and not neox("ernie4_5", "gguf")
    with pytest.raises(NotImplementedError, match="'rwkv'"):
        neox("rwkv", "gguf")
    with pytest.raises(ValueError, match="gguf or hf"):
        neox("llama", "onnx")
