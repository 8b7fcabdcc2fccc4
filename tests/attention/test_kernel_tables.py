"""Which kernel of a table takes a call, against rules that are stated here once more."""

from __future__ import annotations

import itertools

import pytest

host = pytest.importorskip("fastattn._host")

FORMATS = ("bf16", "fp8", "fp8_656", "fp8_584", "fp8_528")
MAJORS = (8, 9, 10, 12)


def taken(found):
    """The only kernel that gives no reason."""
    (name,) = [name for name, reason in found if not reason]
    return name


def test_the_last_kernel_of_each_table_runs_on_every_gpu():
    last = {table: (first, most) for table, _, first, most in host.all_kernels()}
    assert set(last) == {
        *("attention, whole tiles", "attention, split tiles"),
        *("mla_attention", "mla_sparse_attention", "mqa_logits"),
    }
    assert all(first == 8 and most > 100 for first, most in last.values())


def test_names_of_kernels_are_unique_in_a_table():
    rows = [(table, name) for table, name, _, _ in host.all_kernels()]
    assert len(rows) == len({*rows})


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_mla_attention(cache_format, major):
    """docs/kernels/mla_attention.md: the narrow kernel up to 16 rows over fp8 and fp8_656."""
    for heads, new, page in itertools.product((1, 8, 16, 17, 128), (1, 2, 16, 4096), (64, 12, 8)):
        narrow = cache_format in ("fp8", "fp8_656") and heads * new <= 16
        lowest = page & -page  # a TMA box of bf16 tokens has 8 at least
        wgmma = cache_format != "fp8_528" and (cache_format != "bf16" or lowest >= 8)
        kernel = "narrow" if narrow else "wgmma" if wgmma else "mma"
        found = host.mla_attention_kernels(cache_format, heads, new, page, 100, major)
        assert taken(found) == f"mla/attention/{kernel if major == 9 else 'mma'}"


@pytest.mark.parametrize("major", MAJORS)
def test_mla_attention_over_an_empty_cache(major):
    for cache_format in FORMATS:
        found = host.mla_attention_kernels(cache_format, 16, 1, 64, 0, major)
        assert taken(found) == "mla/attention/mma"


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("extra", ("", *FORMATS))
@pytest.mark.parametrize("cache_format", FORMATS)
def test_mla_sparse_attention(cache_format, extra, major):
    """docs/kernels/mla_sparse_attention.md: one format in both caches, each with its heads."""
    dims = {"bf16": (512, 576), "fp8": (512, 576), "fp8_656": (576,), "fp8_584": (512,)}
    for dim, heads, page in itertools.product((512, 576), (1, 128), (64, 256)):
        for fp32, largest in itertools.product((False, True), repeat=2):
            fits = dim in dims.get(cache_format, ()) and extra in ("", cache_format)
            fits = fits and major == 9 and not (fp32 and largest)
            found = host.mla_sparse_attention_kernels(
                *(cache_format, extra, dim, heads, page, 100, fp32, largest, major)
            )
            kernel = "wgmma_sm90" if fits else "simple"
            assert taken(found) == f"mla/sparse_attention/{kernel}"


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("quant", ("fp8", "mxfp4"))
def test_logits(quant, major):
    """docs/architecture.md: 8, 16, 32 or 64 heads of 128 channels, certain sizes of pages."""
    pages = (0, 1, 8, 16, 24, 32, 48, 64, 96, 128)
    for dim, heads, page in itertools.product((64, 128), (8, 16, 24, 32, 64, 128), pages):
        fits = dim == 128 and heads in (8, 16, 32, 64) and major == 9
        if page:
            fits = fits and (page in (8, 16, 32) or page % 64 == 0)
        found = host.mqa_logits_kernels(quant, dim, heads, 4, 1, 1000, page, 100, major)
        assert taken(found) == f"mqa_logits/{'wgmma' if fits else 'mma'}"


def test_calls_that_are_too_large_for_32_bits():
    most = 2**31 // 4 - 64  # bytes of scales have coordinates of 32 bits
    for keys, kernel in ((most - 1, "wgmma"), (most, "mma")):
        found = host.mqa_logits_kernels("fp8", 128, 64, 1, 1, keys)
        assert taken(found) == f"mqa_logits/{kernel}"


def test_reasons_say_what_is_missing():
    """The words of some reasons, each for the only thing that is wrong with a call."""
    call = ["bfloat16", "bfloat16", "none", 4096, 1, 32, 8, 128, 4096, 4096]

    def reason(kernel, **changes):
        at = {"q_dtype": 0, "k_dtype": 1, "cache_type": 2, "head_dim": 7}
        args = list(call)
        for name in [*changes]:
            if name in at:
                args[at[name]] = changes.pop(name)
        found = host.attention_kernels(*args, **changes)
        (text,) = [why for name, role, why in found if (name, role) == (kernel, "whole tiles")]
        return text

    assert reason("wgmma_q16") == ""
    assert "e4m3" in reason("wgmma_fp8")
    assert "sm_90" in reason("wgmma_q16", compute_major=10)
    assert "different types" in reason("wgmma_q16", k_dtype="float16")
    groups = {"k_dtype": "e2m1", "cache_type": "block_wise_mxfp4"}
    assert "groups" in reason("wgmma_q16", **groups)
    two = {"k_dtype": "int8", "cache_type": "block_wise_k8v4"}
    assert "different codes" in reason("wgmma_q16", **two)
    two = {"k_dtype": "float8_e4m3fn", "cache_type": "block_wise_kfp8v4"}
    assert "different codes" in reason("wgmma_fp8", q_dtype="float8_e4m3fn", **two)
    int8 = {"k_dtype": "int8", "cache_type": "cache_int8"}
    assert "channels" in reason("wgmma_q16", head_dim=192, **int8)
    assert "bf16 or fp16" in reason("wgmma_q16", q_dtype="float8_e4m3fn", **int8)
    assert "before it" in reason("mma_sm80")
    assert "tree mask" in reason("wgmma_q16", general=True)
    assert reason("mma_sm80", general=True) == ""
    codes = ("bfloat16", "float8_e4m3fn", "cache_fp8", 4096, 1, 32, 8, 128, 4096, 4096)
    found = {name: why for name, _, why in host.attention_kernels(*codes, general=True)}
    assert "tree mask" in found["dequantize_kv"]
