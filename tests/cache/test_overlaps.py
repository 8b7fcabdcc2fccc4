"""Tensors that are written while another argument lies in their memory, and sizes that overflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops, reference
from fastattn.functional._marker import unified
from tests.support.compare import assert_same_bits
from tests.support.operators import calls, run, zeros
from tests.support.strides import strided
from tests.support.tensors import to_numpy, to_paddle


def window(pool: paddle.Tensor, first: int, like: paddle.Tensor) -> paddle.Tensor:
    """View of a flat uint8 pool from byte `first` on, of another tensor's shape and dtype."""
    if paddle.__version__.startswith("2."):
        pytest.skip("Paddle 2.6 ends the process in a view of another dtype")
    size, start = int(np.prod(like.shape)), first // bytes_of(like)
    # The dtype first: Paddle's view of a slice as another dtype lies elsewhere.
    return pool.view(like.dtype)[start : start + size].view(list(like.shape))


def bytes_of(tensor: paddle.Tensor) -> int:
    return tensor.element_size()


FP16 = "float16"
#: Operator, the tensor that is written, the one that lies in its memory, and how many of the
#: latter's elements it is shifted by; tensors that the small call lacks.
SHIFTED = [
    ("flash_attention", "out", "q", 64, {}),
    ("flash_attention", "out", "q", 1, {}),
    ("flash_attention", "out", "sinks", 0, {"sinks": zeros(4)}),
    ("flash_attention", "out", "mask_offsets", 2, {"mask_offsets": zeros(2, 2, dtype="int32")}),
    ("flash_attention", "out", "cu_seqlens_k", 0, {}),
    ("paged_attention", "out", "q", 256, {}),
    ("paged_attention", "out", "sinks", 4, {"sinks": zeros(4)}),
    ("paged_attention", "out", "block_tables", 0, {}),
    ("paged_attention", "out", "seq_lens_decoder", 0, {}),
    ("merge_attn_states", "output", "prefix_output", 64, {}),
    ("merge_attn_states", "output", "suffix_output", 1, {}),
    ("merge_attn_states", "output", "suffix_lse", 0, {}),
    ("merge_attn_states", "output_lse", "prefix_lse", 1, {}),
    ("merge_attn_states", "output_lse", "suffix_lse", 2, {}),
    ("merge_attn_states", "output_lse", "suffix_output", 0, {}),
    ("merge_many_attn_states", "output", "outputs", 256, {}),
    ("merge_many_attn_states", "output", "lses", 2, {}),
    ("merge_many_attn_states", "output", "sinks", 0, {"sinks": zeros(4)}),
    ("append_cache_kv_c8", "key", "key_cache", 0, {}),
    ("append_cache_kv_c8", "value", "key_cache", 64, {}),
    ("append_cache_kv_c8", "key", "value_cache", 128, {}),
    ("append_cache_kv_c8", "value", "cache_v_scales", 0, {}),
    ("append_cache_kv_c8", "key", "cu_seqlens_k", 0, {}),
    ("indexer_kv_compress_insert", "kv_cache", "state_cache", 128, {}),
    ("indexer_kv_compress_insert", "kv_cache", "rms_norm_weight", 0, {}),
    ("indexer_kv_compress_insert", "kv_cache", "kv_slots", 1, {}),
    ("indexer_k_write_cache", "cache", "key", 4, {}),
    ("indexer_k_write_cache", "cache", "slot_mapping", 1, {}),
    ("indexer_k_gather", "out", "cache", 5, {"out_scales": zeros(6)}),
    ("indexer_k_gather", "out", "block_tables", 1, {"out_scales": zeros(6)}),
    ("indexer_topk", "out", "ends", 0, {}),
    ("paged_indexer_topk", "out", "block_tables", 0, {}),
    ("radix_topk_ragged_transform", "output", "input", 3, {}),
    ("radix_topk_ragged_transform", "output", "lengths", 1, {}),
    ("mla_write_cache", "cache", "latent", 40, {}),
    ("mla_write_cache", "cache", "slot_mapping", 0, {}),
    ("mla_gather_cache", "out", "cu_seqlens_k", 0, {}),
    *(
        ("mla_qkv_norm_rope_write", "cache", read, 8, {})
        for read in ("q", "kv", "slot_mapping", "positions", "cos_sin_cache")
    ),
    *(
        ("mla_qkv_norm_rope_write", "out", read, shift, {})
        for read, shift in (("q", 512), ("kv", 0), ("positions", 1), ("cos_sin_cache", 3))
    ),
    *(
        ("save_partial_states", "state_cache", read, 1, {})
        for read in ("kv_score", "ape", "positions", "state_slots")
    ),
    ("write_cache_kv", "key_cache", "cache_k_scales", 0, {}),
    ("write_cache_kv", "value_cache", "cache_k_scales", 0, {}),
    ("write_cache_kv", "key_cache", "key", 64, {}),
    ("write_cache_kv", "key_cache", "block_tables", 0, {}),
    ("write_cache_kv", "value_cache", "seq_lens_decoder", 3, {}),
    ("rope_write_cache_kv", "key_cache", "qkv", 64, {}),
    ("rope_write_cache_kv", "value_cache", "rotary_embs", 8, {}),
    ("rope_write_cache_kv", "key_cache", "cu_seqlens_q", 0, {}),
    ("rope_write_cache_kv", "value_cache", "seq_lens_this_time", 5, {}),
    ("gqa_rope_write_cache", "key_cache", "qkv", 64, {}),
    ("gqa_rope_write_cache", "value_cache", "seq_lens_encoder", 1, {}),
    ("gqa_rope_write_cache", "key_cache", "cu_seqlens_k", 0, {}),
    ("merge_prefill_decode_output", "encoder_res", "decoder_res", 64, {}),
    ("merge_prefill_decode_output", "encoder_res", "cu_seq_q", 0, {}),
    ("quantize_fp8", "output", "scale", 0, {"scale": zeros(1)}),
]


@pytest.mark.parametrize(("op", "written", "read", "shift", "more"), SHIFTED)
def test_what_is_written_lies_apart(op, written, read, shift, more):
    call = calls()[op].changed(**more)
    if op == "write_cache_kv" and "scales" in read:
        names = ("key_cache", "value_cache")
        call = call.changed(
            cache_quant_type="block_wise_fp8",
            **{name: zeros(3, 2, 64, 64, dtype="uint8") for name in names},
            **{name: zeros(3, 2, 64) for name in ("cache_k_scales", "cache_v_scales")},
        )
    outputs = {
        "out": zeros(2, 4, 64, dtype=FP16),
        "output": zeros(2, 4, 64, dtype=FP16),
        "output_lse": zeros(4, 2),
    }
    if op == "quantize_fp8":
        outputs["output"] = zeros(2, 64, dtype="uint8")
    if op == "mla_qkv_norm_rope_write":
        outputs["out"] = zeros(2, 4, 512, dtype="bfloat16")
    if op == "indexer_k_gather":
        outputs["out"] = zeros(6, 128, dtype="uint8")
    if op.endswith("indexer_topk"):
        outputs["out"] = zeros(2, call.attrs["k"], dtype="int32")
    first, second = call.inputs.get(written, outputs.get(written)), call.inputs[read]
    base = paddle.zeros([1 << 17], "uint8")
    call = call.changed(
        **{
            written: window(base, 0, first),
            read: window(base, shift * bytes_of(second), second),
        }
    )
    with pytest.raises(ValueError, match=f"^{op}: {written}: it is written and must .*{read}"):
        run(op, call.inputs, call.attrs)


#: Outputs that may have any strides: operator, output, shape, dtype, the dimension that repeats.
REPEATED = [
    ("append_cache_kv_c8", "key", (2, 2, 64), FP16, 0),
    ("append_cache_kv_c8", "value", (2, 2, 64), FP16, 0),
    ("merge_attn_states", "output", (2, 4, 64), FP16, 0),
    ("merge_attn_states", "output", (2, 4, 64), FP16, 1),
    ("merge_attn_states", "output_lse", (4, 2), "float32", 0),
    ("merge_attn_states", "output_lse", (4, 2), "float32", 1),
    ("merge_many_attn_states", "output", (2, 4, 64), FP16, 1),
    ("mla_gather_cache", "out", (3, 576), "bfloat16", 0),
    ("mqa_logits", "out", (2, 5), "float32", 0),
]


@pytest.mark.parametrize(("op", "written", "shape", "dtype", "dim"), REPEATED)
def test_what_is_written_does_not_repeat(op, written, shape, dtype, dim):
    """Each row of an expanded view would be written over the one before."""
    tensor = zeros(*shape, dtype=dtype)
    strides = list(tensor.strides)
    strides[dim] = 0
    call = calls()[op].changed(**{written: strided(tensor, shape, strides)})
    with pytest.raises(ValueError, match=f"^{op}: {written}: .* no two of its elements may share"):
        run(op, call.inputs, call.attrs)


@pytest.mark.parametrize("first", [1020, 1024])
def test_q_descale_under_the_output(first):
    """e4m3 queries: their scale in the output's last bytes, or right behind them."""
    pool = paddle.zeros([2048], "uint8")
    q = zeros(2, 4, 64, dtype="uint8")
    k = zeros(2, 2, 64, dtype="uint8")
    starts = to_paddle(np.array([0, 2], np.int32))
    descale = window(pool, first, zeros(1))
    out = window(pool, 0, zeros(2, 4, 64, dtype="bfloat16"))
    arguments = (q, k, k, starts, starts, 2, 2)
    if first == 1024:
        F.flash_attention(*arguments, q_descale=descale, out=out)
        return
    with pytest.raises(ValueError, match=r"out: it is written .* share memory with q_descale"):
        F.flash_attention(*arguments, q_descale=descale, out=out)


def test_an_output_that_is_an_input_stays_allowed():
    rng = np.random.default_rng(3)
    p, s = (rng.normal(size=(3, 2, 8)).astype(np.float32) for _ in range(2))
    lse_p, lse_s = (rng.normal(size=(2, 3)).astype(np.float32) for _ in range(2))
    expected = reference.merge_attn_states(p, lse_p, s, lse_s)
    tensors = [to_paddle(x.copy()) for x in (p, lse_p, s, lse_s)]
    F.merge_attn_states(*tensors, output=tensors[2], output_lse=tensors[1])
    assert_same_bits(to_numpy(tensors[2]), expected[0])
    np.testing.assert_allclose(to_numpy(tensors[1]), expected[1], rtol=1e-6)


def test_outputs_beside_inputs_in_one_buffer():
    """[T, 3, H, D]: every second span of memory is another's, and none is shared."""
    rng = np.random.default_rng(4)
    packed = rng.normal(size=(5, 3, 2, 8)).astype(np.float32)
    lse_p, lse_s = (rng.normal(size=(2, 5)).astype(np.float32) for _ in range(2))
    expected = reference.merge_attn_states(packed[:, 0], lse_p, packed[:, 2], lse_s)
    pool = to_paddle(packed.copy())
    given = [pool[:, i] for i in range(3)]
    out, _ = _merge_raw(given[0], to_paddle(lse_p), given[2], to_paddle(lse_s), given[2])
    assert_same_bits(to_numpy(pool)[:, 2], expected[0])
    assert_same_bits(to_numpy(pool)[:, :2], packed[:, :2])
    assert out is not None


def _merge_raw(*tensors: Any) -> Any:
    """Strided outputs: the merge takes them; so does the small view of a head."""
    try:
        return F.merge_attn_states(*tensors[:4], output=tensors[4])
    except ValueError as error:
        if "must be contiguous" in str(error):
            pytest.skip("strided outputs do not reach the operator")
        raise


@pytest.mark.parametrize("tokens", [2**57 + 5, 2**60, 2**62, 2**63 - 1])
def test_kv_token_num_whose_bytes_wrap(tokens):
    call = calls()["gqa_rope_write_cache"].changed(kv_token_num=tokens)
    text = f"^gqa_rope_write_cache: kv_token_num: expected sizes .* got {tokens} \\* 2 \\* 64 \\* 2"
    with pytest.raises(ValueError, match=text):
        run("gqa_rope_write_cache", call.inputs, call.attrs)


def test_a_view_of_more_bytes_than_fit():
    """It repeats 64 elements."""
    if not hasattr(_ops, "_load_direct"):
        pytest.skip("Paddle's registry copies a tensor that is not contiguous")
    q = paddle.as_strided(zeros(1, 1, 64, dtype=FP16), [2**31 - 1, 2**26, 64], [0, 0, 1])
    call = calls()["flash_attention"].changed(q=q)
    with pytest.raises(ValueError, match="q: expected sizes whose product fits 64 bits"):
        run("flash_attention", call.inputs, call.attrs)


@pytest.mark.parametrize("ways", ["direct", "registry"])
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("query_rows", "batch_ids"),
        ("paged_attention", "cu_seqlens_q"),
        ("quantize_fp8", "x"),
        ("write_cache_kv", "key"),
    ],
)
def test_a_view_of_more_bytes_than_fit_is_not_copied(op, name, ways, monkeypatch):
    """Paddle copies views that an operator does not take: of 2^62 int32s, 0 bytes."""
    if ways == "registry" and paddle.__version__.startswith("2."):
        pytest.skip("Paddle 2.6 copies slices on its way to here")
    call = calls()[op]
    tensor = call.inputs[name]
    shape = [2**62, *tensor.shape[1:]]
    call = call.changed(**{name: strided(tensor, shape, [0, *tensor.strides[1:]])})
    if ways == "registry":
        monkeypatch.setattr(_ops, "_load_direct", lambda: (None, {}))
    with pytest.raises(ValueError, match=f"^{op}: {name}: expected sizes whose product fits 64"):
        run(op, call.inputs, call.attrs)


def test_mxfp4_columns_that_wrap():
    """No elements, but a last dimension that doubles."""
    codes = paddle.empty([0, 2**62], "uint8")
    scales = paddle.empty([0, 2**58], "uint8")
    with pytest.raises(ValueError, match="codes: expected sizes whose product fits 64 bits"):
        F.mxfp4_dequantize(codes, scales)


@unified
def record(shapes: list[Any], outputs: list[Any]) -> None:
    """Shapes as the program knows them: in a traced function they would become tensors."""
    shapes.append([list(x.shape) for x in outputs])


@pytest.mark.parametrize("heads", [-1, 2])
def test_heads_of_an_unknown_cache_are_unknown(heads):
    """A program that is saved with any number of KV heads tells no number of query heads."""
    from paddle.static import InputSpec

    if paddle.__version__.startswith("2."):
        pytest.skip("Paddle 2.6 gives a custom operator's outputs no shape while tracing")
    call = calls()["gqa_rope_write_cache"]
    names = list(call.inputs)
    shapes = []

    def program(tensors):
        outputs = run("gqa_rope_write_cache", dict(zip(names, tensors)), call.attrs)
        record(shapes, outputs[:4])
        return outputs[0]

    specs = []
    for name in names:
        shape = list(call.inputs[name].shape)
        if name.endswith("_cache"):
            shape[1] = heads
        specs.append(InputSpec(shape, call.inputs[name].dtype, name=name))
    static = paddle.jit.to_static(program, input_spec=[specs], full_graph=True)
    static.eval()
    out = static([call.inputs[name] for name in names])
    assert list(out.shape) == [2, 4, 64]
    known = 4 if heads == 2 else -1
    assert shapes[-1] == [[2, known, 64], [2, heads, 64], [2, heads, 64], [2, 512]]
