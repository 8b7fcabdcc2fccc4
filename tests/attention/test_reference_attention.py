"""The attention model against three nested loops over Python floats, and against known answers."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from fastattn import reference
from fastattn.reference import layout, numerics
from fastattn.reference.attention import dense_attention, gather_seq

RNG = np.random.default_rng


def visible_by_definition(i, j, queries, keys, causal, window, offsets):
    position = i + keys - queries
    if causal and j > position:
        return False
    if window[0] >= 0 and j < position - window[0]:
        return False
    if window[1] >= 0 and j > position + window[1]:
        return False
    return offsets is None or offsets[i][0] <= j < offsets[i][1]


def loops(q, k, v, sees, scale, softcap=0.0, sinks=None):
    """Attention of one sequence from its definition, one float at a time."""
    tokens, heads, dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros(q.shape)
    lse = np.full((heads, tokens), -math.inf)
    for i in range(tokens):
        for h in range(heads):
            logits = {}
            for j in range(k.shape[0]):
                if sees(i, j):
                    s = scale * sum(
                        float(q[i, h, d]) * float(k[j, h // group, d]) for d in range(dim)
                    )
                    logits[j] = softcap * math.tanh(s / softcap) if softcap else s
            if not logits:
                continue
            total = sum(math.exp(s) for s in logits.values())
            if sinks is not None:
                total += math.exp(sinks[h])
            for d in range(dim):
                out[i, h, d] = (
                    sum(math.exp(s) * float(v[j, h // group, d]) for j, s in logits.items()) / total
                )
            lse[h, i] = math.log(total)
    return out, lse


MASKS = [
    {},
    {"causal": True},
    {"window_size": (3, -1)},
    {"window_size": (-1, 2)},
    {"window_size": (2, 1)},
    {"window_size": (0, 0)},
    {"causal": True, "window_size": (4, 3)},
    {"mask_offsets": np.array([[0, 9], [2, 5], [5, 2], [-3, 40], [0, 0]], np.int32)},
    {"causal": True, "mask_offsets": np.array([[4, 9], [0, 1], [3, 8], [0, 6], [8, 9]], np.int32)},
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keys", [0, 1, 3, 5, 9])
def test_mask_is_the_definition(mask, keys):
    actual = reference.attention_mask(5, keys, **mask)
    expected = [
        [
            visible_by_definition(
                i,
                j,
                5,
                keys,
                mask.get("causal", False),
                mask.get("window_size", (-1, -1)),
                mask.get("mask_offsets"),
            )
            for j in range(keys)
        ]
        for i in range(5)
    ]
    np.testing.assert_array_equal(actual, np.array(expected, bool).reshape(5, keys))


def test_causal_mask_is_aligned_to_the_end():
    mask = reference.attention_mask(2, 5, causal=True)
    assert mask.astype(int).tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    mask = reference.attention_mask(3, 1, causal=True)
    assert mask.astype(int).tolist() == [[0], [0], [1]]


@pytest.mark.parametrize(
    "extra", [{}, {"softcap": 1.5}, {"sinks": True}, {"softcap": 2.0, "sinks": True}]
)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_flash_attention_is_the_triple_loop(heads, mask, extra):
    rng = RNG(3)
    h, kv = heads
    q_lens, k_lens, dim = [5, 0, 5, 5], [9, 4, 0, 3], 4
    cu_q, cu_k = np.cumsum([0, *q_lens]), np.cumsum([0, *k_lens])
    q = rng.normal(size=(15, h, dim))
    k, v = rng.normal(size=(2, 16, kv, dim))
    sinks = rng.normal(size=h) if extra.get("sinks") else None
    descale = {"k_descale": rng.uniform(0.3, 2, (4, kv)), "v_descale": rng.uniform(0.3, 2, kv)}
    offsets = mask.get("mask_offsets")
    arguments = {**mask, **descale, "softmax_scale": 0.7, "softcap": extra.get("softcap", 0.0)}
    if offsets is not None:
        arguments["mask_offsets"] = np.tile(offsets, (3, 1))
    out, lse = reference.flash_attention(
        q, k, v, cu_q, cu_k, sinks=sinks, q_descale=np.array([0.6]), **arguments
    )
    for seq in range(4):
        at, keys = slice(cu_q[seq], cu_q[seq + 1]), slice(cu_k[seq], cu_k[seq + 1])

        def sees(i, j, seq=seq):
            return visible_by_definition(
                i,
                j,
                q_lens[seq],
                k_lens[seq],
                mask.get("causal", False),
                mask.get("window_size", (-1, -1)),
                offsets,
            )

        expected = loops(
            as_float32(q[at]) * 0.6,
            as_float32(k[keys]) * descale["k_descale"][seq][:, None],
            as_float32(v[keys]) * descale["v_descale"][:, None],
            sees,
            0.7,
            extra.get("softcap", 0.0),
            sinks,
        )
        np.testing.assert_allclose(out[at], expected[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(lse[:, at], expected[1], rtol=1e-12, atol=1e-12)


def as_float32(x):
    return x.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "float16"])
def test_known_answers(precision):
    rng = RNG(0)
    tolerance = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[precision]
    k, v = rng.normal(size=(2, 10, 1, 4))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q = rng.normal(size=(3, 1, 4))
    every = np.ones((3, 10), bool)
    causal = reference.attention_mask(3, 10, causal=True)

    def run(q=q, v=v, visible=every, **extra):
        return dense_attention(q, k, v, visible, softmax_scale=1.0, precision=precision, **extra)

    # Equal scores: the mean of the visible V, and the log of their count.
    out, lse = run(q=0 * q, visible=causal)
    for i, count in enumerate((8, 9, 10)):
        np.testing.assert_allclose(out[i, 0], v[:count, 0].mean(axis=0), atol=tolerance)
        np.testing.assert_allclose(lse[0, i], math.log(count), atol=tolerance)
    # V = 1 returns 1.
    np.testing.assert_allclose(run(v=np.ones_like(v))[0], 1.0, atol=tolerance)
    # One visible key: its V, and its score as the LSE.
    only = np.zeros((3, 10), bool)
    only[[0, 1, 2], [4, 9, 0]] = True
    out, lse = run(visible=only)
    np.testing.assert_allclose(out[:, 0], v[[4, 9, 0], 0], atol=2 * tolerance)
    # One key far above the others.
    out, _ = run(q=np.broadcast_to(1e3 * k[4], q.shape))
    np.testing.assert_allclose(out[:, 0], np.broadcast_to(v[4], (3, 4)), atol=2 * tolerance)
    # A sink equal to the other logits counts as one more key with V = 0.
    out, lse = run(q=0 * q, sinks=np.zeros(1))
    np.testing.assert_allclose(out[0, 0], v[:, 0].sum(axis=0) / 11, atol=tolerance)
    np.testing.assert_allclose(lse, math.log(11), atol=tolerance)
    # No visible key.
    out, lse = run(visible=np.zeros((3, 10), bool), sinks=np.ones(1))
    assert not out.any()
    assert np.isneginf(lse).all()


def test_nan_stays_in_the_seqs_and_channels_that_see_it():
    rng = RNG(1)
    q = rng.normal(size=(4, 2, 4))
    k, v = rng.normal(size=(2, 6, 1, 4))
    causal = reference.attention_mask(4, 6, causal=True)
    v[4, 0, 2] = np.nan
    out, lse = dense_attention(q, k, v, causal, softmax_scale=1.0)
    poisoned = np.zeros(out.shape, bool)
    poisoned[2:, :, 2] = True
    np.testing.assert_array_equal(np.isnan(out), poisoned)
    assert np.isfinite(lse).all()
    k[5, 0, 0] = np.nan
    out, lse = dense_attention(q, k, v, causal, softmax_scale=1.0)
    assert np.isnan(out[3]).all()
    assert not np.isnan(out[:2]).any()
    np.testing.assert_array_equal(np.isnan(lse), [[0, 0, 0, 1]] * 2)


def logical_bytes(cache, kind):
    return layout.pack(cache, kind, "fastattn", int8=False)


@pytest.mark.parametrize(
    ("quant_type", "scale_shape", "fp8_format"),
    [
        ("none", None, "e4m3"),
        ("cache_int8", (1,), "e4m3"),
        ("cache_int8", (2,), "e4m3"),
        ("cache_int8", (8,), "e4m3"),
        ("cache_fp8", (1,), "e4m3"),
        ("cache_fp8", (2,), "e5m2"),
        ("block_wise_fp8", (3, 2, 64), "e4m3"),
        ("block_wise_int8", (3, 2, 64), "e4m3"),
    ],
)
def test_gather_seq_is_one_loop_over_elements(quant_type, scale_shape, fp8_format):
    rng = RNG(5)
    blocks, kv, dim = 3, 2, 4
    table = np.array([2, 0, -1, 7, 1], np.int32)
    code = "int8" if quant_type.endswith("int8") else fp8_format
    if quant_type == "none":
        logical = rng.normal(size=(2, blocks, kv, 64, dim)).astype(ml_dtypes.bfloat16)
        caches = list(logical)
        scales = [None, None]
    else:
        logical = rng.integers(0, 120, (2, blocks, kv, 64, dim)).astype(np.uint8)
        caches = [logical_bytes(logical[0], "k"), logical_bytes(logical[1], "v")]
        scales = [rng.uniform(0.5, 2, scale_shape).astype(np.float32) for _ in range(2)]
    k, v, assigned = gather_seq(
        caches[0],
        caches[1],
        table,
        300,
        cache_k_scales=scales[0],
        cache_v_scales=scales[1],
        cache_quant_type=quant_type,
        fp8_format=fp8_format,
    )
    assert assigned.tolist() == [True] * 128 + [False] * 128 + [True] * 44
    for which, actual in enumerate((k, v)):
        for token in (0, 1, 8, 63, 64, 100, 127, 128, 255, 256, 271, 299):
            block = table[token // 64]
            for head in range(kv):
                for d in range(dim):
                    if not 0 <= block < blocks:
                        assert actual[token, head, d] == 0
                        continue
                    element = logical[which, block, head, token % 64, d]
                    if quant_type == "none":
                        expected = float(element)
                    else:
                        index = {
                            1: 0,
                            2: head,
                            8: head * dim + d,
                            384: (block * kv + head) * 64 + token % 64,
                        }[scales[which].size]
                        value = float(numerics.from_codes(np.array([element]), code)[0])
                        expected = value * float(scales[which].reshape(-1)[index])
                    assert actual[token, head, d] == expected


def test_paged_attention_is_flash_attention_of_the_gathered_seqs():
    rng = RNG(7)
    blocks, kv, h, dim = 9, 2, 4, 4
    prefix, new = [0, 70, 5, 3], [3, 2, 0, 4]
    tables = np.array([[4, 1], [0, 8], [5, 6], [2, 3]], np.int32)
    cache = rng.normal(size=(2, blocks, kv, 64, dim)).astype(np.float16)
    cu_q = np.cumsum([0, 3, 2, 1, 4])  # sequence 2 rests although a token is set aside for it
    q = rng.normal(size=(12, h, dim)).astype(np.float16)
    out, lse = reference.paged_attention(
        q, cache[0], cache[1], tables, cu_q, np.array(prefix), np.array(new), window_size=(9, -1)
    )
    for seq in range(4):
        keys = prefix[seq] + new[seq]
        at = slice(cu_q[seq], cu_q[seq] + new[seq])
        k, v = (
            c[tables[seq]].transpose(0, 2, 1, 3).reshape(128, kv, dim)[:keys].astype(np.float64)
            for c in cache
        )
        expected = loops(
            q[at].astype(np.float64),
            k,
            v,
            lambda i, j, seq=seq, keys=keys: visible_by_definition(
                i, j, new[seq], keys, True, (9, -1), None
            ),
            dim**-0.5,
        )
        np.testing.assert_allclose(out[at], expected[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(lse[:, at], expected[1], rtol=1e-12)
    for token in (5, 10, 11):
        assert not out[token].any()
        assert np.isneginf(lse[:, token]).all()


def test_lower_precisions_have_larger_errors():
    rng = RNG(9)
    q, k, v = (rng.normal(size=(n, 2, 64)) for n in (8, 300, 300))
    visible = np.ones((8, 300), bool)
    exact, _ = dense_attention(q, k, v, visible, softmax_scale=0.125)
    errors = [
        np.abs(dense_attention(q, k, v, visible, softmax_scale=0.125, precision=p)[0] - exact).max()
        for p in ("float32", "float16", "bfloat16")
    ]
    assert 0 < errors[0] < 1e-6 < errors[1] < errors[2] < 1e-2
    with pytest.raises(ValueError, match="precision: expected one of float64"):
        dense_attention(q, k, v, visible, softmax_scale=1.0, precision="int8")


def test_out_scale_gives_codes():
    rng = RNG(2)
    q, k, v = rng.normal(size=(3, 6, 1, 4))
    cu = np.array([0, 6])
    plain, _ = reference.flash_attention(q, k, v, cu, cu)
    codes, _ = reference.flash_attention(q, k, v, cu, cu, out_scale=np.array([0.013], np.float32))
    assert codes.dtype == np.uint8
    np.testing.assert_allclose(numerics.from_codes(codes, "e4m3") * 0.013, plain, rtol=0.07)
