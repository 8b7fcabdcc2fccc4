"""What the attention operators refuse: by the Python functions and by the raw operators."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops
from tests.support.attention import BLOCK_WISE_FP8, PLAIN, CacheKind, flash_problem, paged_problem
from tests.support.tensors import EMPTY_OUTPUTS, int32, to_numpy, to_paddle

INT8 = CacheKind("cache_int8", "head")
FP8 = CacheKind("cache_fp8", "head")

PAGED_NAMES = (
    "q",
    "key_cache",
    "value_cache",
    "block_tables",
    "cu_seqlens_q",
    "seq_lens_decoder",
    "seq_lens_this_time",
    "max_seqlen_q",
    "max_seqlen_k",
)
FLASH_NAMES = (
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
)


def paged(place="cpu", kind=PLAIN, **changed):
    problem = paged_problem([(70, 3), (0, 2)], kind=kind)
    positional, keywords = problem.arguments(place)
    arguments = {**dict(zip(PAGED_NAMES, positional)), **keywords}
    return F.paged_attention(**{**arguments, **changed})


def flash(place="cpu", q_type="bfloat16", kv_type=None, **changed):
    problem = flash_problem([(3, 70), (2, 2)], q_type=q_type, kv_type=kv_type)
    positional, keywords = problem.arguments(place)
    arguments = {**dict(zip(FLASH_NAMES, positional)), **keywords}
    return F.flash_attention(**{**arguments, **changed})


def zeros(*shape, dtype="float32"):
    """Tensor of any dtype that NumPy has, or bfloat16."""
    if dtype == "bfloat16":
        return paddle.zeros(shape, "bfloat16")
    return to_paddle(np.zeros(shape, dtype))


TYPES = "none, cache_int8, cache_fp8, block_wise_int8, block_wise_fp8"

#: (call, its arguments, exception, part of the message)
CASES = {
    # None and no tensors
    "q_none": (paged, {"q": None}, TypeError, "paged_attention: q: expected a tensor, got None"),
    "k_none": (flash, {"k": None}, TypeError, "flash_attention: k: expected a tensor, got None"),
    "tables_none": (paged, {"block_tables": None}, TypeError, "block_tables: expected a tensor"),
    "list": (flash, {"cu_seqlens_k": [0, 3]}, TypeError, "cu_seqlens_k: expected a tensor.* list"),
    "array": (paged, {"q": np.zeros(3)}, TypeError, "q: expected a tensor, got numpy.ndarray"),
    # Queries
    "q_int": (paged, {"q": zeros(5, 4, 64, dtype="int32")}, TypeError, "q: dtype int32"),
    "q_int8": (flash, {"q": zeros(5, 4, 64, dtype="int8")}, TypeError, "q: expected dtype .*int8"),
    "q_rank": (paged, {"q": zeros(5, 256, dtype="bfloat16")}, ValueError, "q: expected 3 dim"),
    "q_other": (
        paged,
        {"q": zeros(5, 4, 64, dtype="float16")},
        TypeError,
        "q: expected dtype bfloat16 as the cache has, got float16",
    ),
    "q_dim": (
        paged,
        {"q": zeros(5, 4, 128, dtype="bfloat16")},
        ValueError,
        "key_cache: expected head_dim 128 as q has, got 64",
    ),
    "heads": (
        paged,
        {"q": zeros(5, 3, 64, dtype="bfloat16")},
        ValueError,
        "q: expected a multiple of the 2 KV heads, got 3",
    ),
    "flash_heads": (
        flash,
        {"q": zeros(5, 5, 64, dtype="bfloat16")},
        ValueError,
        "q: expected a multiple of the 2 KV heads, got 5",
    ),
    "head_dim": (
        flash,
        {name: zeros(n, 4, 80, dtype="bfloat16") for name, n in (("q", 5), ("k", 72), ("v", 72))},
        NotImplementedError,
        "flash_attention: q: head_dim 80 is not supported; supported: 64, 96, 128, 192, 256",
    ),
    "paged_head_dim": (
        paged,
        {
            "q": zeros(5, 4, 80, dtype="bfloat16"),
            "key_cache": zeros(7, 2, 64, 80, dtype="bfloat16"),
            "value_cache": zeros(7, 2, 64, 80, dtype="bfloat16"),
        },
        NotImplementedError,
        "head_dim 80 is not supported; supported: 64, 96, 128, 192, 256",
    ),
    # Keys and values
    "k_other": (flash, {"k": zeros(72, 2, 64)}, TypeError, "flash_attention: [kv]: expected dtype"),
    "v_other": (flash, {"v": zeros(72, 2, 64)}, TypeError, "v: expected dtype bfloat16"),
    "v_shape": (
        flash,
        {"v": zeros(71, 2, 64, dtype="bfloat16")},
        ValueError,
        r"v: expected shape \[72, 2, 64\], got \[71, 2, 64\]",
    ),
    "k_rank": (flash, {"k": zeros(72, 128, dtype="bfloat16")}, ValueError, "k: expected 3 dim"),
    "e4m3_q_bf16_k": (
        flash,
        {"q": zeros(5, 4, 64, dtype="uint8")},
        TypeError,
        "k: expected 8-bit codes or dtype float8_e4m3fn as q has, got bfloat16",
    ),
    "no_kv_heads": (
        flash,
        {name: zeros(72, 0, 64, dtype="bfloat16") for name in "kv"},
        ValueError,
        "q: expected a multiple of the 0 KV heads",
    ),
    "kv_dtype": (flash, {"kv_dtype": "int4"}, ValueError, "kv_dtype: expected auto, .* 'int4'"),
    "kv_dtype_of_values": (flash, {"kv_dtype": "int8"}, TypeError, "k: expected codes of kv_dtype"),
    "block_size": (
        paged,
        {name: zeros(7, 2, 32, 64, dtype="bfloat16") for name in ("key_cache", "value_cache")},
        ValueError,
        r"key_cache: expected blocks of 64 tokens, .* got \[7, 2, 32, 64\]",
    ),
    "cache_rank": (
        paged,
        {"key_cache": zeros(7, 2, 64, dtype="bfloat16")},
        ValueError,
        "key_cache: expected 4 dimensions",
    ),
    "value_shape": (
        paged,
        {"value_cache": zeros(3, 2, 64, 64, dtype="bfloat16")},
        ValueError,
        "value_cache: expected shape",
    ),
    "value_other": (
        paged,
        {"value_cache": zeros(6, 2, 64, 64, dtype="float16")},
        TypeError,
        "value_cache: expected dtype bfloat16",
    ),
    "fp8_in_a_float_cache": (
        lambda **changed: paged(kind=PLAIN, **changed),
        {"cache_quant_type": "block_wise_fp8", "cache_k_scales": zeros(1)},
        TypeError,
        "key_cache: expected dtype uint8 or float8_e4m3fn for block_wise_fp8, got bfloat16",
    ),
    # Cache types, scales, zero points
    "int4": (
        paged,
        {"cache_quant_type": "cache_int4_zp"},
        NotImplementedError,
        f"paged_attention: cache_quant_type: 'cache_int4_zp' is not supported; supported: {TYPES}",
    ),
    "int8_zp": (
        paged,
        {"cache_quant_type": "cache_int8_zp", "cache_k_zp": zeros(2)},
        NotImplementedError,
        "'cache_int8_zp' is not supported",
    ),
    "zero_point_k": (
        lambda **changed: paged(kind=INT8, **changed),
        {"cache_k_zp": zeros(2)},
        ValueError,
        "cache_k_zp: cache_quant_type 'cache_int8' is symmetric and takes no zero point",
    ),
    "zero_point_v": (
        lambda **changed: paged(kind=BLOCK_WISE_FP8, **changed),
        {"cache_v_zp": zeros(2)},
        ValueError,
        "cache_v_zp: .*symmetric",
    ),
    "no_scales": (
        lambda **changed: paged(kind=INT8, **changed),
        {"cache_v_scales": None},
        ValueError,
        "cache_v_scales: cache_quant_type 'cache_int8' needs scales, got None",
    ),
    "no_dynamic_scales": (
        lambda **changed: paged(kind=BLOCK_WISE_FP8, **changed),
        {"cache_k_scales": None},
        ValueError,
        "cache_k_scales: cache_quant_type 'block_wise_fp8' needs scales, got None",
    ),
    "needless_scales": (
        paged,
        {"cache_k_scales": zeros(1)},
        ValueError,
        "cache_k_scales: cache_quant_type 'none' takes no scales",
    ),
    "scale_shape": (
        lambda **changed: paged(kind=INT8, **changed),
        {"cache_k_scales": zeros(3)},
        ValueError,
        r"cache_k_scales: expected shape \[1\], \[2\] .* or \[128\] .* got \[3\]",
    ),
    "channels_of_fp8": (
        lambda **changed: paged(kind=FP8, **changed),
        {"cache_v_scales": zeros(128)},
        ValueError,
        r"cache_v_scales: expected shape \[1\] or \[2\]",
    ),
    "empty_scales": (
        lambda **changed: paged(kind=FP8, **changed),
        {"cache_k_scales": zeros(0)},  # Paddle passes an empty optional tensor as None
        ValueError,
        "cache_k_scales: (expected shape|.*needs scales)",
    ),
    "dynamic_scale_shape": (
        lambda **changed: paged(kind=BLOCK_WISE_FP8, **changed),
        {"cache_k_scales": zeros(2)},
        ValueError,
        r"cache_k_scales: expected shape \[\d+, 2, 64\], got \[2\]",
    ),
    "scale_dtype": (
        lambda **changed: paged(kind=FP8, **changed),
        {"cache_k_scales": zeros(2, dtype="float16")},
        TypeError,
        "cache_k_scales: expected dtype",
    ),
    "scale_dtypes_differ": (
        lambda **changed: paged(kind=FP8, **changed),
        {"cache_k_scales": zeros(2, dtype="bfloat16")},
        TypeError,
        "cache_v_scales: expected dtype bfloat16",
    ),
    "fp8_format": (paged, {"fp8_format": "e3m4"}, ValueError, "fp8_format: expected e4m3 or e5m2"),
    "dynamic_e5m2": (
        lambda **changed: paged(kind=BLOCK_WISE_FP8, **changed),
        {"fp8_format": "e5m2"},
        NotImplementedError,
        "fp8_format: block_wise_fp8 stores e4m3 only",
    ),
    # Descales
    "q_descale_of_values": (paged, {"q_descale": zeros(1)}, ValueError, "q_descale: expected None"),
    "k_descale_of_values": (flash, {"k_descale": zeros(1)}, ValueError, "k_descale: expected None"),
    "q_descale_shape": (
        lambda **changed: flash(q_type="e4m3:tensor", **changed),
        {"q_descale": zeros(3)},
        ValueError,
        r"q_descale: expected shape \[1\], .*\[5, 4\].* got \[3\]",
    ),
    "v_descale_shape": (
        lambda **changed: flash(kv_type="int8", **changed),
        {"v_descale": zeros(3)},
        ValueError,
        r"v_descale: expected shape \[1\], \[2\] .* or \[2, 2\] .* got \[3\]",
    ),
    "k_descale_dtype": (
        lambda **changed: flash(kv_type="int8", **changed),
        {"k_descale": zeros(2, dtype="int32")},
        TypeError,
        "k_descale: expected dtype",
    ),
    # Queries to be quantised
    "quantize_q_of_codes": (
        lambda **changed: flash(q_type="e4m3:tensor", q_descale=None, **changed),
        {"quantize_q": True},
        ValueError,
        "quantize_q: expected bfloat16 or float16 queries, got float8_e4m3fn",
    ),
    "quantize_q_of_fp32": (
        lambda **changed: paged(kind=FP8, **changed),
        {"quantize_q": True, "q": zeros(5, 4, 64)},
        ValueError,
        "paged_attention: quantize_q: expected bfloat16 or float16 queries, got float32",
    ),
    "quantize_q_and_descale": (
        lambda **changed: paged(kind=FP8, **changed),
        {"quantize_q": True, "q_descale": zeros(1)},
        ValueError,
        "quantize_q: expected no q_descale",
    ),
    **{
        f"quantize_q_over_{name}": (
            lambda call=call, option=option, **changed: call(**option, **changed),
            {"quantize_q": True},
            ValueError,
            f"quantize_q: expected e4m3 keys and values, got {name}",
        )
        for call, option, name in (
            (paged, {"kind": PLAIN}, "bfloat16"),
            (paged, {"kind": CacheKind("cache_fp8", "head", "e5m2")}, "float8_e5m2"),
            (flash, {"kv_type": "int8"}, "int8"),
        )
    },
    "quantize_q_type": (paged, {"quantize_q": "yes"}, TypeError, "quantize_q: expected bool"),
    # Sequences
    "tables_dtype": (
        paged,
        {"block_tables": zeros(2, 3, dtype="int64")},
        TypeError,
        "block_tables: expected dtype int32, got int64",
    ),
    "tables_rank": (
        paged,
        {"block_tables": zeros(6, dtype="int32")},
        ValueError,
        "block_tables: expected 2 dimensions",
    ),
    "cu_short": (
        paged,
        {"cu_seqlens_q": zeros(2, dtype="int32")},
        ValueError,
        r"cu_seqlens_q: expected shape \[3\]",
    ),
    "decoder_long": (
        paged,
        {"seq_lens_decoder": zeros(3, dtype="int32")},
        ValueError,
        r"seq_lens_decoder: expected shape \[2\]",
    ),
    "this_time_dtype": (
        paged,
        {"seq_lens_this_time": zeros(2)},
        TypeError,
        "seq_lens_this_time: expected dtype int32, got float32",
    ),
    "cu_k_dtype": (
        flash,
        {"cu_seqlens_k": zeros(3, dtype="int64")},
        TypeError,
        "cu_seqlens_k: expected dtype int32",
    ),
    "cu_k_length": (
        flash,
        {"cu_seqlens_k": zeros(4, dtype="int32")},
        ValueError,
        r"cu_seqlens_k: expected shape \[(rows|seqs|sequences|B) \+ 1\]",
    ),
    "cu_empty": (
        flash,
        {name: zeros(0, dtype="int32") for name in ("cu_seqlens_q", "cu_seqlens_k")},
        ValueError,
        r"cu_seqlens_q: expected shape \[(rows|seqs|sequences|B) \+ 1\]",
    ),
    "negative_q": (paged, {"max_seqlen_q": -1}, ValueError, "max_seqlen_q: expected at least 0"),
    "negative_k": (flash, {"max_seqlen_k": -5}, ValueError, "max_seqlen_k: .* got -5"),
    # Options
    "sinks_shape": (paged, {"sinks": zeros(2)}, ValueError, r"sinks: expected shape \[4\]"),
    "sinks_dtype": (paged, {"sinks": zeros(4, dtype="int32")}, TypeError, "sinks: expected dtype"),
    "sinks_empty": (paged, {"sinks": zeros(0)}, ValueError, "sinks: .*elements, got shape .0"),
    "out_empty": (
        flash,
        {"out": zeros(0, 4, 64, dtype="bfloat16")},
        ValueError,
        r"out: expected shape \[5, 4, 64\], got \[0, 4, 64\]",
    ),
    "out_scale_empty": (flash, {"out_scale": zeros(0)}, ValueError, "out_scale: .*elements"),
    "mask_empty": (
        paged,
        {"mask_offsets": zeros(0, 2, dtype="int32")},
        ValueError,
        r"mask_offsets: expected shape \[5, 2\], got \[0, 2\]",
    ),
    "k_descale_empty": (
        lambda **changed: flash(kv_type="int8", **changed),
        {"k_descale": zeros(0)},
        ValueError,
        r"k_descale: expected shape \[1\], .*got \[0\]",
    ),
    # Attributes of another type, which Paddle itself refuses
    "causal_int": (paged, {"causal": 1}, TypeError, "causal: expected bool, got int"),
    "max_float": (flash, {"max_seqlen_q": 3.0}, TypeError, "max_seqlen_q: expected int, got float"),
    "max_none": (paged, {"max_seqlen_k": None}, TypeError, "max_seqlen_k: expected int, got None"),
    "softcap_none": (flash, {"softcap": None}, TypeError, "softcap: expected float, got None"),
    "scale_text": (flash, {"softmax_scale": "1"}, TypeError, "softmax_scale: .*float, got str"),
    "mask_shape": (
        paged,
        {"mask_offsets": zeros(4, 2, dtype="int32")},
        ValueError,
        r"mask_offsets: expected shape \[5, 2\], got \[4, 2\]",
    ),
    "mask_flat": (
        flash,
        {"mask_offsets": zeros(10, dtype="int32")},
        ValueError,
        r"mask_offsets: expected shape \[5, 2\]",
    ),
    "mask_dtype": (
        flash,
        {"mask_offsets": zeros(5, 2, dtype="int64")},
        TypeError,
        "mask_offsets: expected dtype int32",
    ),
    "out_scale_shape": (paged, {"out_scale": zeros(4)}, ValueError, r"out_scale: expected .*\[1\]"),
    "out_scale_dtype": (
        paged,
        {"out_scale": zeros(1, dtype="bfloat16")},
        TypeError,
        "out_scale: expected dtype float32",
    ),
    "out_shape": (
        paged,
        {"out": zeros(5, 256, dtype="bfloat16")},
        ValueError,
        r"out: expected shape \[5, 4, 64\]",
    ),
    "out_dtype": (paged, {"out": zeros(5, 4, 64)}, TypeError, "out: expected dtype bfloat16"),
    "out_codes": (
        paged,
        {"out": zeros(5, 4, 64, dtype="bfloat16"), "out_scale": zeros(1)},
        TypeError,
        "out: expected dtype uint8 or float8_e4m3fn with out_scale",
    ),
    "window": (paged, {"window_size": (-2, 0)}, ValueError, "window_size: expected -1 .* got -2"),
    "window_int": (flash, {"window_size": 5}, TypeError, r"window_size: expected \(left, right\)"),
    "window_float": (flash, {"window_size": (1.5, 0)}, TypeError, "window_size: expected two ints"),
    "softcap": (paged, {"softcap": -1.0}, ValueError, "softcap: expected .* at least 0, got -1"),
    "softcap_nan": (flash, {"softcap": float("nan")}, ValueError, "softcap: expected a finite"),
    "scale_inf": (
        flash,
        {"softmax_scale": float("inf")},
        ValueError,
        "softmax_scale: expected a finite number",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_errors_name_operator_and_argument(case):
    call, changed, error, text = case
    with pytest.raises(error, match=text) as raised:
        call(**changed)
    assert "_attention: " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_unchanged_calls_work():
    for kind in (PLAIN, INT8, FP8, BLOCK_WISE_FP8):
        assert paged(kind=kind).shape == [5, 4, 64]
    for kv_type in (None, "int8", "e4m3"):
        assert flash(kv_type=kv_type).shape == [5, 4, 64]


def test_an_output_with_gaps_is_refused():
    wide = paddle.zeros([5, 8, 64], "bfloat16")
    strided = wide[:, :4]
    if strided.is_contiguous():
        pytest.skip("this Paddle copies slices")
    with pytest.raises(
        ValueError, match=r"out: expected a contiguous tensor, got shape .* with strides"
    ):
        paged(out=strided)


# The raw operators, as a direct caller reaches them: nothing may end the process.


def captured(monkeypatch, call, **changed):
    """Inputs and attributes that a Python call gives to the raw operator."""
    seen = []

    def capture(op, inputs, attrs=()):
        seen.append((op, list(inputs), list(attrs)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_ops, "call", capture)
        with pytest.raises(KeyboardInterrupt):
            call(**changed)
    return seen[0]


def raw(op, inputs, attrs):
    return paddle.base.core.eager._run_custom_op(_ops.PREFIX + op, *inputs, *attrs)


def mutations(tensor):
    """Misuses of one input: (what, tensor)."""
    yield "undefined", paddle.Tensor()
    yield "scalar", to_paddle(np.zeros((), np.float32))
    for shape in ([0], [1], [2, 0], [0, 4, 64], [1, 1, 1], [1, 2, 3, 4, 5], [7]):
        for dtype in ("float32", "int32", "uint8"):
            yield f"{dtype}{shape}", to_paddle(np.zeros(shape, dtype))
    if tensor is not None and tensor.ndim:
        array = to_numpy(tensor)
        yield "float64", to_paddle(np.zeros(array.shape, np.float64))
        yield "int64", to_paddle(np.zeros(array.shape, np.int64))
        yield "bool", to_paddle(np.zeros(array.shape, bool))
        yield "short", to_paddle(array[:-1])
        yield "empty", to_paddle(array[:0])
        yield "thin", to_paddle(array[..., :-1])
        yield "deep", to_paddle(array[None])


RAW_CALLS = {
    "paged": (paged, {}),
    "paged_int8": (paged, {"kind": CacheKind("cache_int8", "channel")}),
    "paged_fp8": (paged, {"kind": BLOCK_WISE_FP8}),
    "flash": (flash, {}),
    "flash_e4m3": (flash, {"q_type": "e4m3:token_head"}),
}


@pytest.mark.parametrize("name", RAW_CALLS)
def test_raw_misuse_raises(monkeypatch, name):
    """Every input in turn replaced by nonsense: an error, or a result of the right shape."""
    call, arguments = RAW_CALLS[name]
    op, inputs, attrs = captured(monkeypatch, call, **arguments)
    signature = _ops.signature(op)
    refused = 0
    for i, argument in enumerate(signature.inputs):
        for what, wrong in mutations(inputs[i]):
            changed = [*inputs[:i], wrong, *inputs[i + 1 :]]
            try:
                outputs = raw(op, changed, attrs)
            except (OSError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                refused += 1
                if "[" in str(error) and op in str(error):
                    assert argument in str(error) or "_cache" in argument or argument in "qkv"
                continue
            shape = list(outputs[0].shape)
            assert shape == list(changed[0].shape), f"{argument} {what}: {shape}"
    assert refused > 20 * 5


@pytest.mark.parametrize("name", RAW_CALLS)
def test_raw_none_raises_or_means_absent(monkeypatch, name):
    call, arguments = RAW_CALLS[name]
    op, inputs, attrs = captured(monkeypatch, call, **arguments)
    signature = _ops.signature(op)
    for i, optional in enumerate(signature.optional):
        changed = [*inputs[:i], None, *inputs[i + 1 :]]
        if not optional:
            with pytest.raises((OSError, RuntimeError, ValueError, TypeError)):
                raw(op, changed, attrs)
            continue
        try:
            raw(op, changed, attrs)
        except (OSError, RuntimeError, ValueError) as error:
            assert "needs scales" in str(error)


@pytest.mark.parametrize("name", RAW_CALLS)
def test_raw_attributes(monkeypatch, name):
    call, arguments = RAW_CALLS[name]
    op, inputs, attrs = captured(monkeypatch, call, **arguments)
    names = [a.split(":")[0] for a in _ops.signature(op).attrs]
    wrong = {
        "max_seqlen_q": (-1, -(2**31)),
        "max_seqlen_k": (-1,),
        "softmax_scale": (float("nan"), float("-inf")),
        "window_left": (-7,),
        "window_right": (-(2**31),),
        "softcap": (-0.5, float("inf")),
        "out_dtype": ("int8", ""),
        "cache_quant_type": ("", "cache_int4_zp"),
        "kv_dtype": ("e3m4", ""),
        "fp8_format": ("e3m4", ""),
    }
    for attribute, values in wrong.items():
        if attribute not in names:
            continue
        for value in values:
            changed = list(attrs)
            changed[names.index(attribute)] = value
            with pytest.raises((OSError, RuntimeError, ValueError), match=r"\[\w+Error\] .*: "):
                raw(op, inputs, changed)


@pytest.mark.gpu
def test_a_gpu_call_refuses_tensors_of_the_cpu():
    with pytest.raises(ValueError, match="expected a tensor on"):
        paged("gpu", block_tables=int32(np.zeros((2, 3)), "cpu"))


def test_empty_queries_with_every_option():
    if not EMPTY_OUTPUTS:
        pytest.skip("this Paddle has no empty outputs")
    out, lse = paged(
        q=zeros(0, 4, 64, dtype="bfloat16"),
        cu_seqlens_q=zeros(3, dtype="int32"),
        mask_offsets=zeros(0, 2, dtype="int32"),
        sinks=zeros(4),
        return_softmax_lse=True,
    )
    assert out.shape == [0, 4, 64]
    assert lse.shape == [4, 0]
