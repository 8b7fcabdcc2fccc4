"""Tensors that start in the middle of a vector, and what a failed launch leaves behind.

On a GPU an access of 16 bytes to another address ends the process's context: an operator refuses
such a tensor by name, or takes it with narrower accesses. A CPU takes any address. The attention
operators' own tests are in test_attention_errors.py.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops
from fastattn.functional._partial import empty
from tests.support.operators import OpCall, calls, run, zeros
from tests.support.tensors import int32, skip_slices_on, to_numpy, to_paddle

CACHES = ("key_cache", "value_cache")
#: Tensors that a GPU refuses unless they start at a multiple of 16 bytes, or of `REFUSED_BYTES`.
#: It takes every other.
REFUSED = {
    "write_cache_kv": ("key", "value", *CACHES),
    "rope_write_cache_kv": ("qkv", *CACHES),
    "attention_step": ("qkv", *CACHES),
    "gqa_rope_write_cache": ("qkv", *CACHES),
    "append_cache_kv_c8": ("key", "value", *CACHES),
    "convert_cache_layout": ("cache",),
    "mla_write_cache": ("latent", "rope", "cache"),
    "mla_gather_cache": ("cache", "out"),
    "inverse_rope_quantize_fp8": ("x",),
    "mla_qkv_norm_rope_write": ("q", "kv", "cache"),
    "save_partial_states": ("kv_score", "state_cache"),
    "convert_cache_blocks": ("cache",),
    "mqa_logits": ("q", "keys"),
    "paged_mqa_logits": ("q", "cache"),
    "indexer_topk": ("q", "keys"),
    "paged_indexer_topk": ("q", "cache"),
}
REFUSED_BYTES = dict.fromkeys(
    ("mqa_logits", "paged_mqa_logits", "indexer_topk", "paged_indexer_topk"), 4
)
#: Operators that take another kernel, with sums in another order, where vectors of 16 bytes do not
#: start at multiples; tests/indexer/test_mqa_logits.py holds both kernels to fp64.
OTHER_KERNEL = ("mqa_logits", "paged_mqa_logits", "indexer_topk", "paged_indexer_topk")


def codes(**more: Any) -> dict[str, Any]:
    return {name: zeros(3, 2, 64, 64, dtype="uint8") for name in CACHES} | more


def scales(*shape: int) -> dict[str, Any]:
    return {f"cache_{name}_scales": zeros(*shape) for name in "kv"}


def problems() -> dict[str, tuple[str, OpCall]]:
    """The small calls, and more of those with a kernel for each kind of cache."""
    base = {op: call for op, call in calls().items() if not op.endswith("attention")}
    found = {op: (op, call) for op, call in base.items()}
    write, rope = base["write_cache_kv"], base["rope_write_cache_kv"]
    norms = {"q_norm_weight": zeros(64), "k_norm_weight": zeros(64)}
    found["write fp32"] = (
        "write_cache_kv",
        write.changed(key=zeros(2, 2, 64), value=zeros(2, 2, 64)),
    )
    found["write static"] = (
        "write_cache_kv",
        write.changed(cache_quant_type="cache_int8", **codes(), **scales(128)),
    )
    found["write dynamic"] = (
        "write_cache_kv",
        write.changed(
            cache_quant_type="block_wise_fp8",
            **codes(batch_id_per_token=int32([0, 0])),
            **scales(3, 2, 64),
        ),
    )
    found["rope dynamic"] = (
        "rope_write_cache_kv",
        rope.changed(
            cache_quant_type="block_wise_int8",
            q_quant="per_tensor",
            **codes(q_scale=zeros(1), qkv_bias=zeros(512), **norms),
            **scales(3, 2, 64),
        ),
    )
    found["rope of every second column"] = (
        "rope_write_cache_kv",
        rope.changed(rotary_embs=zeros(2, 1, 8, 1, 64), cache_quant_type="cache_fp8").changed(
            **codes(), **scales(2)
        ),
    )
    found["gqa dynamic"] = (
        "gqa_rope_write_cache",
        base["gqa_rope_write_cache"].changed(
            cache_quant_type="block_wise_fp8", **codes(**norms), **scales(3, 2, 64)
        ),
    )
    found["append dynamic"] = (
        "append_cache_kv_c8",
        base["append_cache_kv_c8"].changed(
            cache_quant_type="block_wise_fp8", dynamic_quant=True, **scales(3, 2, 64)
        ),
    )
    for kind, dst in (("k", "fastdeploy"), ("v", "logical"), ("v", "fastdeploy")):
        found[f"convert {kind} to {dst}"] = (
            "convert_cache_layout",
            base["convert_cache_layout"].changed(kind=kind, dst=dst),
        )
    found["convert in place"] = (
        "convert_cache_blocks",
        base["convert_cache_blocks"].changed(kind="v", dst="fastdeploy"),
    )
    found["copy"] = (
        "convert_cache_layout",
        base["convert_cache_layout"].changed(
            cache_quant_type="none", cache=zeros(3, 2, 64, 64, dtype="float16")
        ),
    )
    found["merge into codes"] = (
        "merge_attn_states",
        base["merge_attn_states"].changed(
            output=zeros(2, 4, 64, dtype="uint8"),
            output_lse=zeros(4, 2),
            output_scales=zeros(2, 4),
        ),
    )
    found["merge into values"] = (
        "merge_attn_states",
        base["merge_attn_states"].changed(output=zeros(2, 4, 64, dtype="float16")),
    )
    found["quantize with a scale"] = (
        "quantize_fp8",
        base["quantize_fp8"].changed(scale=zeros(1), output=zeros(2, 64, dtype="uint8")),
    )
    found["quantize a tensor"] = (
        "quantize_fp8",
        base["quantize_fp8"].changed(granularity="tensor", x=zeros(2, 64, dtype="bfloat16")),
    )
    found["indexer query mxfp4"] = (
        "indexer_q_rope_quant",
        base["indexer_q_rope_quant"].changed(quant="mxfp4", cos_sin_cache=zeros(4, 64)),
    )
    found["indexer key mxfp4"] = (
        "indexer_kv_compress_insert",
        base["indexer_kv_compress_insert"].changed(
            quant="mxfp4",
            kv_cache=zeros(2, 4, 68, dtype="uint8"),
            state_cache=zeros(2, 4, 512, dtype="bfloat16"),
        ),
    )
    write = base["indexer_k_write_cache"]
    for dtype in ("float32", "float16"):
        found[f"index keys mxfp4 {dtype}"] = (
            "indexer_k_write_cache",
            write.changed(
                quant="mxfp4",
                key=zeros(2, 128, dtype=dtype),
                cache=zeros(2, 4, 68, dtype="uint8"),
            ),
        )
    found["index keys of small pages"] = (
        "indexer_k_write_cache",
        write.changed(scale_rule="amax", page_size=3, cache=zeros(2, 3, 133, dtype="uint8")),
    )
    for quant, width in (("fp8", 132), ("mxfp4", 68)):
        found[f"gather {quant}"] = (
            "indexer_k_gather",
            base["indexer_k_gather"].changed(
                quant=quant,
                cache=zeros(2, 4, width, dtype="uint8"),
                out=zeros(6, width - 4, dtype="uint8"),
                out_scales=zeros(6, 4, dtype="uint8"),
            ),
        )
    return found


def filled(name: str, tensor: paddle.Tensor) -> np.ndarray:
    """Values of an input: random, scales positive; integers stay."""
    array = to_numpy(tensor)
    rng = np.random.default_rng(len(name))
    if array.dtype == np.uint8:
        return rng.integers(0, 256, array.shape, np.uint8)
    if array.dtype in (np.int32, np.int64):
        return array
    values = rng.normal(size=array.shape)
    return (np.abs(values) + 0.1 if "scale" in name else values).astype(array.dtype)


def shifted(array: np.ndarray, place: str, elements: int) -> paddle.Tensor:
    """The array behind so many elements of a pool."""
    pool = np.zeros(array.size + elements + 16, array.dtype)
    pool[elements : elements + array.size] = array.reshape(-1)
    part = to_paddle(pool, place)[elements : elements + array.size]
    return paddle.view(part, list(array.shape)) if array.shape else part


def outcome(op: str, call: OpCall, place: str, shift: str = "", elements: int = 1) -> list[Any]:
    """Everything that a call returns and writes, one input shifted."""
    tensors = {
        name: shifted(filled(name, x), place, elements if name == shift else 0)
        for name, x in call.inputs.items()
    }
    signature = _ops.signature(op)
    outputs = dict(zip(signature.outputs, run(op, tensors, call.attrs)))
    outputs.pop("q_descale", None)  # holds nothing where queries keep their dtype
    inplace = [signature.inputs[i] for i in signature.inplace.values()]
    written = [tensors[name] for name in inplace if name in tensors]
    return [to_numpy(x) for x in [*outputs.values(), *written] if x is not None]


CASES = [(problem, name) for problem, (_, call) in problems().items() for name in call.inputs]


@pytest.mark.parametrize(("problem", "name"), CASES)
def test_a_shifted_tensor_is_taken_or_refused(place, problem, name):
    op, call = problems()[problem]
    expected = outcome(op, call, place)
    if place == "gpu" and name in REFUSED.get(op, ()):
        size = filled(name, call.inputs[name]).itemsize
        text = (
            f"{op}: {name}: expected an address of a multiple of {REFUSED_BYTES.get(op, 16)} bytes "
            f"on a GPU, got one {size} bytes past a multiple"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            outcome(op, call, place, name)
    else:
        for a, b in zip(outcome(op, call, place, name), expected):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    # So many bytes further is a multiple again, and the context is still there.
    for byte in {REFUSED_BYTES.get(op, 16), 16}:
        further = byte // filled(name, call.inputs[name]).itemsize
        for a, b in zip(outcome(op, call, place, name, further), expected):
            if byte < 16 and op in OTHER_KERNEL:
                np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
            else:
                np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


STRIDED = [
    *(("rope_write_cache_kv", "qkv"), ("write_cache_kv", "key"), ("write_cache_kv", "value")),
    *(("mla_write_cache", "latent"), ("mla_write_cache", "rope"), ("mla_gather_cache", "out")),
    ("inverse_rope_quantize_fp8", "x"),
    *(("mla_qkv_norm_rope_write", "q"), ("mla_qkv_norm_rope_write", "kv")),
]


@pytest.mark.parametrize(("op", "name"), STRIDED)
def test_strides_that_leave_the_multiples_are_refused(place, op, name):
    """Rows of one element more: the second starts in the middle of a vector."""
    if not hasattr(_ops, "_load_direct"):
        pytest.skip("Paddle's registry copies a tensor that is not contiguous")
    call = calls(place)[op]
    array = filled(name, calls()[op].inputs[name])
    rows, width = array.shape[0], int(array[0].size)
    pool = np.zeros((rows, width + 1), array.dtype)
    pool[:, :width] = array.reshape(rows, width)
    skip_slices_on(place)
    shape = list(array.shape)
    strides = [width + 1, array.shape[2], 1] if array.ndim == 3 else [width + 1, 1]
    part = paddle.as_strided(to_paddle(pool, place), shape, strides)
    call = call.changed(**{name: part})
    if place == "cpu":
        run(op, call.inputs, call.attrs)
        return
    text = f"{op}: {name}: expected strides of a multiple of 8 elements \\(16 bytes\\) on a GPU"
    with pytest.raises(ValueError, match=text):
        run(op, call.inputs, call.attrs)


def test_more_scales_than_a_grid_holds(place):
    """2**32 + 8 rows: the count was cut to 8, and the rest of the output stayed as it was."""
    if place == "cpu":
        pytest.skip("a grid is a GPU's")
    if paddle.device.cuda.get_device_properties().total_memory < 48 << 30:
        pytest.skip("this takes 30 GiB")
    x = empty([2**32 + 8, 1], paddle.bfloat16, paddle.CUDAPlace(0))
    with pytest.raises(NotImplementedError, match=r"quantize_fp8: .*4294967304 CTAs"):
        F.quantize_fp8(x, granularity="token")


def _runtimes() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if "libcudart" in line})


@pytest.mark.parametrize("op", [op for op in sorted(calls()) if "attention" not in op])
def test_an_error_of_somebody_else_is_not_reported(place, op):
    """A call of the runtime that failed, whose status nobody asked for."""
    if place == "cpu":
        pytest.skip("there is no CUDA call to fail")
    expected = outcome(op, calls()[op], place)
    for path in _runtimes():
        assert ctypes.CDLL(path).cudaSetDevice(999) != 0
    for a, b in zip(outcome(op, calls()[op], place), expected):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
