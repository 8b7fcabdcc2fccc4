"""What is refused while a program is traced, before it can run with wrong arguments.

Dygraph is what it is compared with. Both run the operator's C++ checks, a program without data.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops, _tracing
from tests.support.operators import OpCall, calls, run, zeros
from tests.support.tensors import EMPTY_OUTPUTS, int32, to_paddle

OPERATORS = sorted(calls())
PIR = hasattr(paddle, "pir") and not paddle.__version__.startswith("2.")


def error_of(function, *arguments) -> Exception | None:
    try:
        function(*arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        return error
    return None


def traced(op: str, call: OpCall) -> list[Any]:
    """The call inside a program of `paddle.jit.to_static`."""
    if not PIR:
        pytest.skip("Paddle 2.6 loses what a traced function closes over")
    attrs = call.attrs

    def program(tensors):
        return run(op, tensors, attrs)

    static = paddle.jit.to_static(program, full_graph=True)
    static.eval()
    return static(call.inputs)


def codes_cache() -> dict[str, Any]:
    return {name: zeros(3, 2, 64, 64, dtype="uint8") for name in ("key_cache", "value_cache")}


def scales(*shape: int) -> dict[str, Any]:
    return {name: zeros(*shape) for name in ("cache_k_scales", "cache_v_scales")}


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    # Names.
    "granularity": ("quantize_fp8", {"granularity": "row"}),
    "out_dtype": ("flash_attention", {"out_dtype": "int8"}),
    "out_dtype of other queries": ("paged_attention", {"out_dtype": "bfloat16"}),
    "kv_dtype": ("flash_attention", {"kv_dtype": "fp4"}),
    "q_quant": ("rope_write_cache_kv", {"q_quant": "per_head"}),
    "cache_quant_type": ("write_cache_kv", {"cache_quant_type": "cache_int4_zp"}),
    "cache_quant_type to read": ("paged_attention", {"cache_quant_type": "cache_int8_zp"}),
    "cache_quant_type to append": ("append_cache_kv_c8", {"cache_quant_type": "none"}),
    "cache_quant_type of FastDeploy": (
        "gqa_rope_write_cache",
        {"cache_quant_type": "block_wise_int8", **codes_cache(), **scales(3, 2, 64)},
    ),
    "dynamic_quant": ("append_cache_kv_c8", {"dynamic_quant": True}),
    "cache_layout": ("append_cache_kv_c8", {"cache_layout": "logical"}),
    "cache_layout unknown": ("append_cache_kv_c8", {"cache_layout": "vllm"}),
    "fp8_format": ("write_cache_kv", {"fp8_format": "e3m4"}),
    "fp8_format of dynamic scales": (
        "write_cache_kv",
        {
            "cache_quant_type": "block_wise_fp8",
            "fp8_format": "e5m2",
            **codes_cache(),
            **scales(3, 2, 64),
        },
    ),
    "kind": ("convert_cache_layout", {"kind": "q"}),
    "kind in place": ("convert_cache_blocks", {"kind": "kv"}),
    "src": ("convert_cache_layout", {"src": "vllm"}),
    "dst": ("convert_cache_blocks", {"dst": "Logical"}),
    "dtype": ("mxfp4_dequantize", {"dtype": "float64"}),
    "quant": ("indexer_q_rope_quant", {"quant": "fp8_512"}),
    "quant of a page": ("indexer_kv_compress_insert", {"quant": "int8"}),
    # Ranges.
    "window": ("flash_attention", {"window_left": -7}),
    "window of a cache": ("paged_attention", {"window_right": -2}),
    "max_seqlen": ("flash_attention", {"max_seqlen_k": -1}),
    "max_seqlen of a cache": ("paged_attention", {"max_seqlen_q": -(2**40)}),
    "softcap": ("flash_attention", {"softcap": -1.0}),
    "softcap inf": ("paged_attention", {"softcap": math.inf}),
    "softcap of fp64": ("paged_attention", {"softcap": 1e39}),
    "softmax_scale": ("flash_attention", {"softmax_scale": math.nan}),
    "softmax_scale inf": ("paged_attention", {"softmax_scale": -math.inf}),
    "num_heads": ("rope_write_cache_kv", {"num_heads": 0}),
    "num_heads no multiple": ("rope_write_cache_kv", {"num_heads": 3}),
    "num_kv_heads": ("rope_write_cache_kv", {"num_kv_heads": 4}),
    "num_kv_heads 0": ("rope_write_cache_kv", {"num_kv_heads": 0}),
    "rotary_dim": ("rope_write_cache_kv", {"rotary_dim": 7}),
    "rotary_dim of more than a head": ("rope_write_cache_kv", {"rotary_dim": 66}),
    "rms_norm_eps": ("rope_write_cache_kv", {"rms_norm_eps": -1e-6}),
    "rms_norm_eps nan": ("gqa_rope_write_cache", {"rms_norm_eps": math.nan}),
    "kv_token_num": ("gqa_rope_write_cache", {"kv_token_num": -1}),
    "kv_token_num that wraps": ("gqa_rope_write_cache", {"kv_token_num": 2**57 + 5}),
    "group_size": ("quantize_fp8", {"group_size": 7}),
    "group_size 0": ("quantize_fp8", {"group_size": 0}),
    "cache_format": ("mla_write_cache", {"cache_format": "fp4_288"}),
    "cache_format that is only read": ("mla_write_cache", {"cache_format": "fp8_528"}),
    "cache_format read": ("mla_gather_cache", {"cache_format": "FP8"}),
    "scale_rule": ("mla_write_cache", {"scale_rule": "ue8m0"}),
    "compress_ratio": ("indexer_kv_compress_insert", {"compress_ratio": 5}),
    "page_size": ("indexer_kv_compress_insert", {"page_size": 0}),
    "num_groups": ("inverse_rope_quantize_fp8", {"num_groups": 3}),
    "num_groups 0": ("inverse_rope_quantize_fp8", {"num_groups": 0}),
    "padded_heads": ("mla_qkv_norm_rope_write", {"padded_heads": 3}),
    "cache_format of queries": ("mla_qkv_norm_rope_write", {"cache_format": "fp8_656"}),
    "rms_norm_eps of queries": ("mla_qkv_norm_rope_write", {"rms_norm_eps": -1.0}),
    "begin": ("convert_cache_blocks", {"begin": 3}),
    "end": ("convert_cache_blocks", {"end": 4}),
    "prefill_tokens_with_context": ("merge_attn_states", {"prefill_tokens_with_context": 3}),
    "head_num": ("merge_prefill_decode_output", {"head_num": 0}),
    "max_token": ("merge_prefill_decode_output", {"max_token": -3}),
    "batch": ("begin_kv_signals", {"batch": 513}),
    "channel": ("begin_kv_signals", {"channel": "tcp:1"}),
    "channel to send": ("send_kv_signal", {"channel": "shm:one"}),
    "layer_id": ("send_kv_signal", {"layer_id": -1}),
    # Types.
    "int32 q": ("flash_attention", {"q": zeros(2, 4, 64, dtype="int32")}),
    "int8 q": ("paged_attention", {"q": zeros(2, 4, 64, dtype="int8")}),
    "int64 cu_seqlens": ("flash_attention", {"cu_seqlens_q": zeros(2, dtype="int64")}),
    "int64 lengths": ("paged_attention", {"seq_lens_decoder": zeros(1, dtype="int64")}),
    "fp16 states": ("save_partial_states", {"state_cache": zeros(2, 4, 64, dtype="float16")}),
    "float64 x": ("quantize_fp8", {"x": zeros(2, 64, dtype="float64")}),
    "k of another dtype": ("flash_attention", {"k": zeros(2, 2, 64, dtype="bfloat16")}),
    "v of another dtype": ("flash_attention", {"v": zeros(2, 2, 64, dtype="bfloat16")}),
    "qkv of another dtype": ("rope_write_cache_kv", {"qkv": zeros(2, 512, dtype="bfloat16")}),
    # What goes with a name.
    "scales of type none": ("write_cache_kv", scales(2)),
    "no scales": ("paged_attention", {"cache_quant_type": "cache_int8", **codes_cache()}),
    "amax of another format": (
        "mla_write_cache",
        {"cache_format": "fp8_584", "scale_rule": "amax"},
    ),
    "no scale of a latent cache": (
        "mla_write_cache",
        {"cache_format": "fp8", "cache": zeros(2, 64, 576, dtype="uint8")},
    ),
    "a scale of a latent cache": ("mla_gather_cache", {"scale": zeros(1)}),
    "bf16 in bytes": ("mla_gather_cache", {"cache_format": "bf16"}),
    "bytes in bf16": ("mla_write_cache", {"cache": zeros(2, 64, 656, dtype="bfloat16")}),
    "q_scale without q_quant": ("rope_write_cache_kv", {"q_scale": zeros(1)}),
    "q_quant without q_scale": ("rope_write_cache_kv", {"q_quant": "per_tensor"}),
    "q_descale of values": ("flash_attention", {"q_descale": zeros(1)}),
    "quantize_q of codes": (
        "flash_attention",
        {name: zeros(2, h, 64, dtype="uint8") for name, h in (("q", 4), ("k", 2), ("v", 2))}
        | {"quantize_q": True},
    ),
    # Paddle hands an empty optional tensor over as an absent one.
    "empty rotary_embs": ("rope_write_cache_kv", {"rotary_embs": zeros(2, 1, 0, 1, 32)}),
    "empty sinks": ("flash_attention", {"sinks": zeros(0)}),
    # Ints that do not fit.
    "group_size of 41 bits": ("quantize_fp8", {"group_size": 2**40}),
    "max_seqlen of 65 bits": ("flash_attention", {"max_seqlen_q": 2**64}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_program_is_refused_as_dygraph_is(name):
    op, changes = WRONG[name]
    call = calls()[op].changed(**changes)
    expected = error_of(run, op, call.inputs, call.attrs)
    assert expected is not None, "dygraph accepts it"
    error = error_of(traced, op, call)
    assert type(error) is type(expected), error
    assert str(expected) in str(error)
    assert str(expected).startswith(f"{op}: ")


def mutations(shape: list[int]) -> list[list[int]]:
    """Other shapes: one dimension fewer, an empty one, a larger one, a shorter first one."""
    changed = [shape[:-1], [*shape, 2]]
    for i, size in enumerate(shape):
        changed += [[*shape[:i], n, *shape[i + 1 :]] for n in (0, size + 1, size - 1) if n >= 0]
    return [s for s in changed if s and s != shape]


@pytest.mark.parametrize("op", OPERATORS)
def test_shapes_are_those_of_the_operator(op):
    """Every input in other shapes: a program refuses what dygraph refuses, with its text."""
    base, signature = calls()[op], _ops.signature(op)
    compared = 0
    for name, tensor in base.inputs.items():
        for shape in mutations(list(tensor.shape)):
            dtype = str(tensor.dtype).rpartition(".")[2]
            call = base.changed(**{name: zeros(*shape, dtype=dtype)})
            expected = error_of(run, op, call.inputs, call.attrs)
            inputs = tuple(call.inputs.get(n) for n in signature.inputs)
            attrs = tuple(call.attrs[n] for n in signature.attrs)
            error = error_of(_tracing.check, signature, inputs, attrs)
            if expected is not None and "expected a tensor with elements" in str(expected):
                continue  # _ops._check_inputs, which programs come through as well
            assert type(error) is type(expected), f"{name} {shape}: {expected} / {error}"
            assert str(error) == str(expected), f"{name} {shape}"
            compared += expected is not None
    assert compared or op in ("begin_kv_signals", "send_kv_signal")


@pytest.mark.parametrize("op", OPERATORS)
def test_what_is_right_passes(op):
    call = calls()[op]
    for output in traced(op, call):
        assert output is None or output.shape is not None
    assert error_of(run, op, call.inputs, call.attrs) is None


DTYPES = ("bool", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")


def with_dtype(tensor: paddle.Tensor, dtype: str) -> paddle.Tensor:
    return zeros(*tensor.shape, dtype=dtype)


@pytest.mark.parametrize("op", OPERATORS)
def test_dtypes_are_those_of_the_operator(op):
    """Every input with every dtype: refused by both with one text, or by neither."""
    base, signature = calls()[op], _ops.signature(op)
    optional = {
        "batch_id_per_token": int32([0, 0]),
        "q_norm_weight": zeros(64),
        "k_norm_weight": zeros(64),
        "qkv_bias": zeros(512),
        "sinks": zeros(4),
        "mask_offsets": zeros(2, 2, dtype="int32"),
        "out_scale": zeros(1),
        "out": zeros(2, 4, 64, dtype="float16"),
        "scale": to_paddle(np.ones(1, np.float32)),
        "output_lse": zeros(4, 2),
        "output_scale": to_paddle(np.ones(1, np.float32)),
        "output_scales": zeros(2, 4),
    }
    if op in ("merge_attn_states", "merge_many_attn_states"):
        optional["output"] = zeros(2, 4, 64, dtype="float16")
    if op == "quantize_fp8":
        optional["output"] = zeros(2, 64, dtype="uint8")
    compared = 0
    for name in signature.inputs:
        tensor = base.inputs.get(name, optional.get(name))
        if tensor is None:
            continue
        for dtype in DTYPES:
            call = base.changed(**{name: with_dtype(tensor, dtype)})
            expected = error_of(run, op, call.inputs, call.attrs)
            inputs = tuple(call.inputs.get(n) for n in signature.inputs)
            attrs = tuple(call.attrs[n] for n in signature.attrs)
            error = error_of(_tracing.check, signature, inputs, attrs)
            if isinstance(expected, TypeError) or error is not None:
                what = f"{name} {dtype}: {expected} / {error}"
                assert type(error) is type(expected) and str(error) == str(expected), what
                compared += 1
    assert compared > 5


INTS = [(op, name) for op in OPERATORS for name, x in calls()[op].attrs.items() if type(x) is int]


@pytest.mark.parametrize("value", [2**31, 2**32 + 64, 2**40, 2**63, 2**64 - 1, 2**70])
@pytest.mark.parametrize(("op", "name"), INTS)
def test_ints_that_do_not_fit(op, name, value):
    """A ValueError that names the argument; never another number, at either end."""
    signature = _ops.signature(op)
    bits = {0: 32, 9: 64}[signature.attr_types[signature.attrs.index(name)]]
    for given in (value, -value - 1):
        call = calls()[op].changed(**{name: given})
        if -(2 ** (bits - 1)) <= given < 2 ** (bits - 1):
            continue
        with pytest.raises(ValueError, match=f"^{op}: {name}: expected an int of {bits} bits"):
            run(op, call.inputs, call.attrs)


def test_an_empty_cache_may_have_empty_scales():
    """They are lost on the way, but there is nothing that they belong to."""
    call = calls()["write_cache_kv"].changed(
        cache_quant_type="block_wise_fp8",
        **{name: zeros(0, 2, 64, 64, dtype="uint8") for name in ("key_cache", "value_cache")},
        **scales(0, 2, 64),
    )
    run("write_cache_kv", call.inputs, call.attrs)
    if PIR:
        traced("write_cache_kv", call)


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="Paddle 2.6 returns no empty tensor")
@pytest.mark.parametrize("tokens", [0, 3])
def test_descales_of_no_sequences(place, tokens):
    """q_descale [B, KV] for B = 0: every token is padding."""
    q = zeros(tokens, 4, 64, dtype="uint8", place=place)
    k = zeros(0, 2, 64, dtype="uint8", place=place)
    descale = zeros(0, 2, place=place)
    starts = int32([0], place)
    out = F.flash_attention(
        q, k, k, starts, starts, 0, 0, q_descale=descale, k_descale=descale, v_descale=descale
    )
    assert out.shape == [tokens, 4, 64]
    assert not out.numpy().any()
    cache = zeros(2, 2, 64, 64, dtype="uint8", place=place)
    value = zeros(2, 2, 64, 64, dtype="uint8", place=place)
    one = to_paddle(np.ones(1, np.float32), place)
    out = F.paged_attention(
        q,
        cache,
        value,
        zeros(0, 1, dtype="int32", place=place),
        starts,
        zeros(0, dtype="int32", place=place),
        zeros(0, dtype="int32", place=place),
        0,
        0,
        cache_k_scales=one,
        cache_v_scales=one,
        cache_quant_type="cache_fp8",
        q_descale=descale,
    )
    assert out.shape == [tokens, 4, 64] and not out.numpy().any()


def test_descales_of_no_sequences_are_of_a_sequence_otherwise():
    with pytest.raises(ValueError, match="q_descale: expected shape"):
        F.flash_attention(
            zeros(2, 4, 64, dtype="uint8"),
            *[zeros(2, 2, 64, dtype="uint8")] * 2,
            *[int32([0, 2])] * 2,
            2,
            2,
            q_descale=zeros(0, 2),
        )
