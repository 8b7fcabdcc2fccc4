"""What a shim refuses, it refuses with what to write instead; and what to write works."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import distributed
from fastattn.compat import deep_gemm, flash_attn, flashinfer
from fastattn.compat._flash_attn_checks import INSTEAD
from tests.support import ROOT
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

x = paddle.ones([2, 1, 4, 64], "bfloat16")
CACHE = paddle.zeros([2, 64, 2, 64], "bfloat16")
ROWS = paddle.ones([2, 4, 64], "bfloat16")
ONE = paddle.ones([1])


def varlen(**options):
    starts = int32([0, 1, 2])
    flash_attn.flash_attn_varlen_func(
        ROWS, CACHE, CACHE, starts, None, 1, 5, seqused_k=int32([5, 5]),
        block_table=int32([[0], [1]]), **options,
    )  # fmt: skip


def kvcache(**options):
    flash_attn.flash_attn_with_kvcache(x, CACHE, CACHE, cache_seqlens=5, **options)


def dense(**options):
    flash_attn.flash_attn_func(x, x, x, **options)


def plan(**options):
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(ONE)
    pages = int32([0, 1]), int32([0]), int32([5])
    wrapper.plan(*pages, 4, 2, 64, **{"page_size": 64, **options})


def decode(**options):
    flashinfer.single_decode_with_kv_cache(ROWS[0], ROWS, ROWS, **options)


def prefill(**options):
    flashinfer.single_prefill_with_kv_cache(ROWS, ROWS, ROWS, **options)


def logits(**options):
    keys = paddle.zeros([5, 64], "uint8"), paddle.ones([5])
    given = {"weights": paddle.ones([3, 8]), **options}
    bounds = int32([0, 0, 0]), int32([1, 2, 3])
    weights = given.pop("weights")
    return deep_gemm.fp8_mqa_logits(
        paddle.zeros([3, 8, 64], "uint8"), keys, weights, *bounds, **given
    )


def paged_logits(**options):
    given = {"weights": paddle.ones([2, 8]), **options}
    weights = given.pop("weights")
    return deep_gemm.fp8_paged_mqa_logits(
        paddle.zeros([2, 1, 8, 64], "uint8"), paddle.zeros([2, 64, 1, 68], "uint8"), weights,
        int32([1, 5]), int32([[0], [1]]), None, 64, **given,
    )  # fmt: skip


BIAS = "no operator here adds a bias to the logits; keep "
ROTATION = "fastattn.functional.rope_write_cache_kv"
CASES = [
    (varlen, {"dropout_p": 0.1}, "write dropout_p=0.0"),
    (varlen, {"alibi_slopes": ONE}, BIAS + "flash-attn"),
    (varlen, {"attention_chunk": 64}, "fastattn.functional.paged_attention with mask_offsets"),
    (varlen, {"cp_world_size": 2}, "fastattn.distributed.paged_attention_dcp"),
    (varlen, {"cp_rank": 1}, "fastattn.distributed.paged_attention_dcp"),
    (varlen, {"cp_tot_seqused_k": ONE}, "fastattn.distributed.paged_attention_dcp"),
    (varlen, {"qv": ONE}, "fastattn.functional.mla_attention"),
    (varlen, {"q_v": ONE}, "fastattn.functional.mla_attention"),
    (kvcache, {"rotary_cos": ONE}, ROTATION),
    (kvcache, {"rotary_sin": ONE}, ROTATION),
    (kvcache, {"rotary_seqlens": ONE}, ROTATION),
    (kvcache, {"cache_batch_idx": ONE}, "block_table=cache_batch_idx.unsqueeze(-1)"),
    (kvcache, {"cache_leftpad": ONE}, "fastattn.functional.paged_attention with mask_offsets"),
    (kvcache, {"alibi_slopes": ONE}, BIAS + "flash-attn"),
    (kvcache, {"qv": ONE}, "fastattn.functional.mla_attention"),
    (kvcache, {"cu_seqlens_q": ONE}, "fastattn.functional.write_cache_kv"),
    (kvcache, {"cu_seqlens_k_new": ONE}, "flash_attn_varlen_func(q, k_cache, v_cache, .."),
    (kvcache, {"attention_chunk": 64}, "fastattn.functional.paged_attention with mask_offsets"),
    (dense, {"dropout_p": 0.1}, "write dropout_p=0.0"),
    (dense, {"alibi_slopes": ONE}, BIAS + "flash-attn"),
    (plan, {"pos_encoding_mode": "ROPE_LLAMA"}, ROTATION),
    (plan, {"pos_encoding_mode": "ALIBI"}, BIAS + "FlashInfer"),
    (plan, {"page_size": 16}, "to_blocks of examples/convert_vllm_pages.py"),
    (decode, {"pos_encoding_mode": "ROPE_LLAMA"}, ROTATION),
    (decode, {"v_scale": 2.0}, "write the result * 2.0"),
    (decode, {"q_scale": ONE}, "write a float"),
    (prefill, {"pos_encoding_mode": "ALIBI"}, BIAS + "FlashInfer"),
    (prefill, {"scale_v": 0.5}, "write the result * 0.5"),
    (prefill, {"custom_mask": ONE}, "fastattn.functional.flash_attention with mask_offsets"),
    (prefill, {"packed_custom_mask": ONE}, "BatchPrefillWithPagedKVCacheWrapper.plan(custom_mask"),
    (prefill, {"o_dtype": "float32"}, "write the result's astype"),
    (logits, {"logits_dtype": paddle.bfloat16}, "write fp8_mqa_logits(..).astype('bfloat16')"),
    (logits, {"weights": paddle.ones([3, 8], "bfloat16")}, 'write weights.astype("float32")'),
    (paged_logits, {"logits_dtype": paddle.bfloat16}, ".astype('bfloat16')"),
    (paged_logits, {"weights": paddle.ones([2, 8], "bfloat16")}, 'weights.astype("float32")'),
]


def named(case):
    return "-".join(
        [case[0].__name__, *case[1], *(str(v) for v in case[1].values() if v is not ONE)]
    )


@pytest.mark.parametrize("case", CASES, ids=[named(case)[:60] for case in CASES])
def test_the_refusal_says_what_to_write(case):
    call, options, text = case
    (name,) = options
    call()  # without the option it is taken
    with pytest.raises((NotImplementedError, TypeError)) as error:
        call(**options)
    message = str(error.value)
    assert f": {name}: " in message and text in message, message


def test_every_argument_of_flash_attn_is_tried():
    tried = {name for call, options, _ in CASES if call in (varlen, kvcache) for name in options}
    assert tried == set(INSTEAD)


def test_what_is_named_exists():
    text = " ".join([*INSTEAD.values(), *(case[2] for case in CASES)])
    for word in re.findall(r"fastattn(?:\.\w+)+", text):
        home, _, name = word.rpartition(".")
        if home in ("fastattn.functional", "fastattn.distributed"):
            assert hasattr(F if home.endswith("functional") else distributed, name), word
    assert "def to_blocks(" in (ROOT / "examples" / "convert_vllm_pages.py").read_text()
    assert "### Rotation" in (ROOT / "docs" / "coming_from.md").read_text()


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("flash_attn_qkvpacked_func", 1, "flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], "),
        ("flash_attn_kvpacked_func", 2, "flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], ..)"),
        ("flash_attn_varlen_qkvpacked_func", 3, "qkv[:, 2], cu_seqlens, cu_seqlens, max_seqlen, "),
        ("flash_attn_varlen_kvpacked_func", 4, "flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], ..)"),
    ],
)
def test_packed_tensors(name, arguments, line):
    with pytest.raises(NotImplementedError) as error:
        getattr(flash_attn, name)(*[x] * arguments, dropout_p=0.0, causal=True)
    assert str(error.value).startswith(f"{name}: ") and line in str(error.value)


@pytest.mark.parametrize("size", [16, 32, 96])
def test_page_sizes_of_flash_attn(size):
    cache = paddle.zeros([2, size, 2, 64], "bfloat16")
    with pytest.raises(NotImplementedError, match=r"64, or copy it once: to_blocks of examples/"):
        flash_attn.flash_attn_with_kvcache(x, cache, cache, cache_seqlens=5)


def test_8_bit_values_in_another_layout():
    """The line in the message gives what the call takes."""
    codes = paddle.to_tensor(np.random.default_rng(0).integers(0, 100, (1, 64, 1, 128)), "uint8")
    q = paddle.ones([1, 1, 4, 128], "bfloat16")
    with pytest.raises(NotImplementedError) as error:
        flash_attn.flash_attn_with_kvcache(q, codes, codes, cache_seqlens=9)
    line = str(error.value).rpartition("write ")[2]
    assert line.startswith("convert_cache_layout(v, ")
    names = {"convert_cache_layout": F.convert_cache_layout, "v": codes.transpose([0, 2, 1, 3])}
    names["v"] = names["v"].contiguous()
    out = flash_attn.flash_attn_with_kvcache(q, codes, eval(line, names), cache_seqlens=9)
    known = to_numpy(codes)[0, :9, 0].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scores = known.sum(axis=1) / 128**0.5
    p = np.exp(scores - scores.max())
    expected = p @ known / p.sum()
    np.testing.assert_allclose(
        to_numpy(out)[0, 0, 0].astype(np.float64), expected, rtol=2e-2, atol=1e-2
    )


def test_rows_of_a_cache_as_pages():
    """What the refusal of `cache_batch_idx` says."""
    rng = np.random.default_rng(0)
    k, v = (to_paddle(rng.normal(size=(4, 128, 2, 64)).astype(BF16)) for _ in "kv")
    q = to_paddle(rng.normal(size=(2, 1, 4, 64)).astype(BF16))
    rows, lengths = int32([3, 1]), int32([100, 7])
    out = flash_attn.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, block_table=rows.unsqueeze(-1)
    )
    chosen = [to_paddle(to_numpy(cache)[[3, 1]]) for cache in (k, v)]
    same = flash_attn.flash_attn_with_kvcache(q, *chosen, cache_seqlens=lengths)
    assert to_numpy(out).astype(np.float32).any() and (to_numpy(out) == to_numpy(same)).all()


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_as_the_page_says(interleaved):
    """`rope_write_cache_kv`, then a call without new keys, against rows that NumPy has rotated."""
    rng = np.random.default_rng(0)
    q, k, v, old = (
        rng.normal(size=(2, n, heads, 64)).astype(BF16)
        for n, heads in ((3, 4), (3, 2), (3, 2), (64, 2))
    )
    cached = np.array([40, 7])
    angles = np.arange(64)[:, None] * 100.0 ** (-np.arange(32) / 32)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def rotated(rows):
        at = cached[:, None] + np.arange(3)
        c, s = cos[at][:, :, None], sin[at][:, :, None]
        wide = rows.astype(np.float32)
        pairs = (
            (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(32), slice(32, 64))
        )
        a, b = (wide[..., pair] for pair in pairs)
        turned = np.empty_like(wide)
        turned[..., pairs[0]], turned[..., pairs[1]] = a * c - b * s, b * c + a * s
        return turned.astype(BF16)

    def fresh():
        return to_paddle(old.copy()), to_paddle(old.copy())

    table, lengths = int32([[0], [1]]), int32(cached)
    plain = fresh()
    expected = flash_attn.flash_attn_with_kvcache(
        to_paddle(rotated(q)), *plain, to_paddle(rotated(k)), to_paddle(v),
        cache_seqlens=lengths, block_table=table, causal=True,
    )  # fmt: skip
    caches = fresh()
    qkv = to_paddle(np.concatenate([q, k, v], 2).reshape(6, 8 * 64))
    turned, _ = F.rope_write_cache_kv(
        qkv, *(cache.transpose([0, 2, 1, 3]) for cache in caches),
        to_paddle(np.stack([cos, sin]).reshape(2, 1, 64, 1, 32)),
        table, int32([0, 3, 6]), lengths, int32([3, 3]),
        num_heads=4, num_kv_heads=2, use_neox_rotary_style=not interleaved,
    )  # fmt: skip
    out = flash_attn.flash_attn_with_kvcache(
        turned.reshape([2, 3, 4, 64]), *caches,
        cache_seqlens=lengths + 3, block_table=table, causal=True,
    )  # fmt: skip
    a, b = (to_numpy(x).astype(np.float64) for x in (expected, out))
    assert np.abs(a).max() > 0.3
    np.testing.assert_allclose(a, b, atol=0.02)
    for mine, other in zip(caches, plain):
        np.testing.assert_allclose(
            to_numpy(mine).astype(np.float64), to_numpy(other).astype(np.float64), rtol=2**-7
        )
