"""Programs write where they were asked to, or not at all: views, captured tensors, buffers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec

import fastattn.functional as F
from fastattn.backends import FlashAttentionBackend, ForwardMeta
from fastattn.backends.standalone import AttentionLayer, make_config
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

pytestmark = pytest.mark.skipif(
    paddle.__version__.startswith("2."), reason="Paddle 2.6 traces into another kind of program"
)
STRIDED = "it is written in place and must be contiguous"
VIEW = "must not be a view that the traced function made"


def tensors() -> tuple[paddle.Tensor, ...]:
    """Key cache of 2 pooled heads, value cache of one, key and value, and the sequences."""
    return (
        paddle.zeros([2, 2, 64, 64], "bfloat16"),
        paddle.zeros([2, 1, 64, 64], "bfloat16"),
        paddle.ones([2, 1, 64], "bfloat16"),
        int32([[1]]),
        int32([0, 2]),
        int32([3]),
        int32([2]),
    )


def total(tensor: paddle.Tensor) -> float:
    return float(tensor.astype("float32").sum())


def write(key_cache, value_cache, x, tables, cu, cached, new):
    return F.write_cache_kv(x, x, key_cache, value_cache, tables, cu, cached, new)


def write_and_more(key_cache, value_cache, x, tables, cu, cached, new):
    F.write_cache_kv(x, x, key_cache, value_cache, tables, cu, cached, new)
    return x * 1


def write_slice(pool, value_cache, x, tables, cu, cached, new):
    return F.write_cache_kv(x, x, pool[:, :1], value_cache, tables, cu, cached, new)


def write_block_slice(pool, value_cache, x, tables, cu, cached, new):
    return F.write_cache_kv(x, x, pool[1:], value_cache[1:], tables, cu, cached, new)


def write_reshaped(pool, value_cache, x, tables, cu, cached, new):
    caches = pool.reshape([4, 1, 64, 64])
    return F.write_cache_kv(x, x, caches, value_cache, tables, cu, cached, new)


def write_transposed(pool, value_cache, x, tables, cu, cached, new):
    caches = pool.transpose([1, 0, 2, 3])
    return F.write_cache_kv(x, x, caches, value_cache, tables, cu, cached, new)


def write_copy(pool, value_cache, x, tables, cu, cached, new):
    copy = paddle.assign(pool[:, :1])
    F.write_cache_kv(x, x, copy, value_cache, tables, cu, cached, new)
    return copy


def traced(function):
    static = paddle.jit.to_static(function, full_graph=True)
    static.eval()
    return static


@pytest.mark.parametrize("function", [write, write_and_more])
def test_a_strided_cache_is_refused(function):
    pool, *others = tensors()
    with pytest.raises(ValueError, match=f"write_cache_kv: key_cache: {STRIDED}"):
        traced(function)(pool[:, :1], *others)
    assert total(pool) == 0


def test_a_strided_cache_is_refused_by_a_program_that_is_there():
    pool, *others = tensors()
    static = traced(write_and_more)
    whole = pool[:, :1].contiguous()
    static(whole, *others)
    assert total(whole) == 128
    with pytest.raises(ValueError, match=f"write_cache_kv: key_cache: {STRIDED}"):
        static(pool[:, :1], *others)


def test_blocks_of_a_pool_are_written():
    """A contiguous view is no copy."""
    _, value, *others = tensors()
    blocks = paddle.zeros([5, 1, 64, 64], "bfloat16")
    traced(write_and_more)(blocks[2:4], value, *others)
    expected = np.zeros((5, 1, 64, 64), BF16)
    expected[3, 0, 3:5] = 1
    assert_same_bits(to_numpy(blocks), expected)
    assert_same_bits(to_numpy(value), expected[2:4])


@pytest.mark.parametrize(
    "function", [write_slice, write_block_slice, write_reshaped, write_transposed]
)
def test_a_view_that_the_function_makes_is_refused(function, monkeypatch):
    # Paddle's own check, which names no argument and can be switched off.
    monkeypatch.setenv("stride_in_no_check_dy2st_diff", "1")
    with pytest.raises(ValueError, match=f"write_cache_kv: (key|value)_cache: .*{VIEW}"):
        traced(function)(*tensors())


def test_a_copy_that_the_function_makes_is_written():
    pool, *others = tensors()
    copy = traced(write_copy)(pool, *others)
    assert total(copy) == 128 and total(pool) == 0


POOL, *_ = tensors()
CAPTURED = POOL[:, :1]
WHOLE = paddle.zeros([2, 1, 64, 64], "bfloat16")


def write_captured(x, tables, cu, cached, new):
    F.write_cache_kv(x, x, WHOLE, CAPTURED, tables, cu, cached, new)
    return x * 1


def test_a_captured_view_is_refused():
    with pytest.raises(ValueError, match=f"write_cache_kv: value_cache: {STRIDED}"):
        traced(write_captured)(*tensors()[2:])
    assert total(POOL) == 0


class Holder(paddle.nn.Layer):
    """Caches as buffers of a layer."""

    def __init__(self, strided: bool) -> None:
        super().__init__()
        self.pool = paddle.zeros([2, 2, 64, 64], "bfloat16")
        own = paddle.zeros([2, 1, 64, 64], "bfloat16")
        self.register_buffer("key_cache", self.pool[:, :1] if strided else own)
        self.register_buffer("value_cache", paddle.zeros([2, 1, 64, 64], "bfloat16"))

    def forward(self, x, tables, cu, cached, new):
        F.write_cache_kv(x, x, self.key_cache, self.value_cache, tables, cu, cached, new)
        return x * 1


@pytest.mark.parametrize("strided", [True, False])
def test_buffers(strided):
    layer = Holder(strided)
    static = paddle.jit.to_static(layer, full_graph=True)
    static.eval()
    if strided:
        with pytest.raises(ValueError, match=f"write_cache_kv: key_cache: {STRIDED}"):
            static(*tensors()[2:])
        assert total(layer.pool) == 0
    else:
        static(*tensors()[2:])
        assert total(layer.key_cache) == total(layer.value_cache) == 128


def convert(cache):
    return F.convert_cache_blocks(
        cache, kind="k", cache_quant_type="cache_fp8", src="fastattn", dst="fastdeploy"
    )


def test_a_strided_cache_is_not_converted():
    pool = to_paddle(np.arange(2 * 2 * 64 * 64, dtype=np.uint8).reshape(2, 2, 64, 64))
    with pytest.raises(ValueError, match=f"convert_cache_blocks: cache: {STRIDED}"):
        traced(convert)(pool[:, :1])


def attend(q, k, starts, out):
    return F.flash_attention(q, k, k, starts, starts, 2, 2, out=out)


def test_a_strided_output_is_refused():
    q, pool = paddle.ones([2, 1, 64], "bfloat16"), paddle.zeros([2, 2, 64], "bfloat16")
    with pytest.raises(ValueError, match=f"flash_attention: out: {STRIDED}"):
        traced(attend)(q, q, int32([0, 2]), pool[:, :1])
    assert total(pool) == 0


def merge(prefix, lse, suffix, suffix_lse, output):
    return F.merge_attn_states(prefix, lse, suffix, suffix_lse, output=output)


def quantize(x, output):
    return F.quantize_fp8(x, output=output)[0]


def test_every_other_output():
    x, lse = paddle.ones([2, 1, 64]), paddle.zeros([1, 2])
    with pytest.raises(ValueError, match=f"merge_attn_states: output: {STRIDED}"):
        traced(merge)(x, lse, x, lse, paddle.zeros([2, 2, 64])[:, :1])
    with pytest.raises(ValueError, match=f"quantize_fp8: output: {STRIDED}"):
        traced(quantize)(x, paddle.zeros([2, 2, 64], "uint8")[:, :1])


def rotate(qkv, key_cache, value_cache, table, tables, cu, cached, new):
    return F.rope_write_cache_kv(
        qkv, key_cache, value_cache, table, tables, cu, cached, new, num_heads=1, num_kv_heads=1
    )[0]


def save_and_load(function, specs):
    static = paddle.jit.to_static(function, input_spec=specs, full_graph=True)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model")
        paddle.jit.save(static, path)
        loaded = paddle.jit.load(path)
    loaded.eval()
    return loaded


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_loaded_program_refuses_a_strided_cache():
    pool, *others = tensors()
    given = (pool[:, :1].contiguous(), *others)
    specs = [InputSpec(list(x.shape), x.dtype, name=f"x{i}") for i, x in enumerate(given)]
    loaded = save_and_load(write, specs)
    loaded(*given)
    assert total(given[0]) == 128
    with pytest.raises(ValueError, match=f"write_cache_kv: key_cache: {STRIDED}"):
        loaded(pool[:, :1], *others)
    assert total(pool) == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_program_for_tables_of_any_length_refuses_an_empty_one():
    """The operator would go without a rotation."""
    _, value, _, *seqs = tensors()
    qkv, table = paddle.ones([2, 3 * 64], "bfloat16"), paddle.ones([2, 1, 8, 1, 32])
    given = (qkv, value, paddle.zeros_like(value), table, *seqs)
    specs = [InputSpec(list(x.shape), x.dtype, name=f"x{i}") for i, x in enumerate(given)]
    specs[3] = InputSpec([2, 1, -1, 1, 32], "float32", name="x3")
    loaded = save_and_load(rotate, specs)
    assert loaded(*given).shape == [2, 1, 64]
    with pytest.raises(ValueError, match="rotary_embs: expected a tensor with elements"):
        loaded(*given[:3], table[:, :, :0], *seqs)


class Attention(paddle.nn.Layer):
    """A layer that attends through a backend, as a server's does."""

    def __init__(self, backend, layer, meta) -> None:
        super().__init__()
        self.backend, self.layer, self.meta = backend, layer, meta

    def forward(self, qkv):
        return self.backend.forward(None, None, None, qkv, None, None, self.layer, self.meta)


@pytest.mark.parametrize("cache_quant_type", ["none", "cache_int8", "block_wise_fp8"])
def test_a_backend_in_a_program(cache_quant_type):
    rng = np.random.default_rng(5)
    backend = FlashAttentionBackend(make_config(max_model_len=512), 2, 4, 64)
    layer = AttentionLayer(0, cache_quant_type)
    if cache_quant_type == "cache_int8":
        layer.cache_k_out_scale = to_paddle(np.array([0.03, 0.05], np.float32))
        layer.cache_v_out_scale = to_paddle(np.array([0.04, 0.02], np.float32))
    qkv = to_paddle(rng.normal(size=(8, 8 * 64)).astype(BF16))
    table = to_paddle(rng.uniform(-1, 1, (2, 1, 512, 1, 32)).astype(np.float32))

    def step():
        dtype = "bfloat16" if cache_quant_type == "none" else "uint8"
        caches = [paddle.zeros(s, dtype) for s in backend.get_kv_cache_shape(4, cache_quant_type)]
        scales = backend.get_kv_cache_scale_shape(4, cache_quant_type)
        if scales is not None:
            caches += [paddle.zeros(*scales) for _ in "kv"]
        meta = ForwardMeta.for_step(
            cached=[0, 0],
            new=[5, 3],
            block_tables=[[0, 1], [2, 3]],
            caches=caches,
            rotary_embs=table,
        )
        backend.init_attention_metadata(meta)
        return meta, Attention(backend, layer, meta)

    expected, network = step()
    out = network(qkv)
    meta, network = step()
    static = paddle.jit.to_static(network, full_graph=True)
    static.eval()
    assert_same_bits(to_numpy(static(qkv)), to_numpy(out))
    assert to_numpy(out).any()
    for given, other in zip(meta.caches, expected.caches):
        assert_same_bits(to_numpy(given), to_numpy(other))
