"""mla_qkv_norm_rope_write: against the model bit by bit, fp64, and the operators that it joins."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference import mla as model
from tests.support.compare import assert_same_bits
from tests.support.indexer import cos_sin, slots_for
from tests.support.static import run_all_modes
from tests.support.strides import default_place, strided
from tests.support.tensors import BF16, EMPTY_OUTPUTS, int32, skip_slices_on, to_numpy, to_paddle

RNG = np.random.default_rng


def heads_of(rng, *shape):
    """Heads of different magnitudes."""
    size = np.exp2(rng.integers(-12, 8, (*shape[:-1], 1)))
    return (rng.normal(size=shape) * size).astype(BF16)


def keys_of(rng, tokens):
    """Keys whose tiles of 64 channels differ in magnitude."""
    size = np.exp2(rng.integers(-20, 6, (tokens, 8, 1)))
    return (rng.normal(size=(tokens, 8, 64)) * size).reshape(tokens, 512).astype(BF16)


def random_pages(rng, pages, page_bytes):
    return rng.integers(0, 256, (pages, page_bytes)).astype(np.uint8)


def tensors(arrays, place):
    return [x if isinstance(x, paddle.Tensor) else to_paddle(x, place) for x in arrays]


def run(arrays, place, **options):
    """Bits of the queries and of the cache."""
    given = tensors(arrays, place)
    result = F.mla_qkv_norm_rope_write(*given, **options)
    return to_numpy(result), to_numpy(given[2])


def assert_same(got, want):
    assert_same_bits(got[0].view(np.uint16), want[0].view(np.uint16), "queries")
    assert_same_bits(got[1], want[1], "cache")


@pytest.mark.parametrize("table_dtype", [np.float32, BF16])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("tokens", "heads", "padded"),
    [(1, 1, None), (2, 8, None), (3, 8, 64), (5, 3, 7), (64, 16, None), (130, 6, 6), (7, 64, 128)],
)
def test_bits(place, tokens, heads, padded, index_dtype, table_dtype):
    rng = RNG(tokens + heads)
    cache = random_pages(rng, 5, 64 * 584).reshape(5, 64, 584)
    arrays = [
        heads_of(rng, tokens, heads, 512),
        keys_of(rng, tokens),
        cache,
        slots_for(rng, max(tokens - 1, 1), 5 * 64).astype(index_dtype),  # fewer than tokens
        rng.integers(-3, 60, tokens).astype(index_dtype),  # some outside the table
        cos_sin(50, table_dtype),
    ]
    options = {"padded_heads": padded, "rms_norm_eps": 3e-5}
    want = reference.mla_qkv_norm_rope_write(*arrays, **options)
    assert not (want[0][:, heads:] != 0).any()
    arrays[2] = cache.copy()
    assert_same(run(arrays, place, **options), want)


def test_queries_are_those_of_fp64(place):
    """Independent of the model: mean, root, angles and pairs in plain loops."""
    rng = RNG(1)
    tokens, heads, eps = 6, 3, 1e-2  # an eps that counts
    q = heads_of(rng, tokens, heads, 512)
    q[0, 0] = (rng.normal(size=512) * 1e-2).astype(BF16)
    positions = rng.integers(0, 4000, tokens)
    cache = np.zeros((1, 8, 584), np.uint8)
    slots = np.full(tokens, -1)
    arrays = [q, keys_of(rng, tokens), cache, slots, positions, cos_sin(4000)]
    got, untouched = run(arrays, place, rms_norm_eps=eps)
    assert not untouched.any()
    for t in range(tokens):
        for h in range(heads):
            x = q[t, h].astype(np.float64)
            exact = x / np.sqrt((x * x).mean() + eps)
            size = np.abs(exact)
            for i in range(32):
                angle = positions[t] * 10000.0 ** (-i / 32)
                c, s = np.cos(angle), np.sin(angle)
                e, o = exact[448 + 2 * i], exact[449 + 2 * i]
                exact[448 + 2 * i], exact[449 + 2 * i] = e * c - o * s, o * c + e * s
                size[448 + 2 * i : 450 + 2 * i] = abs(e) + abs(o)
            error = np.abs(got[t, h].astype(np.float64) - exact)
            assert (error <= np.abs(exact) * 2.0**-8 + size * 1e-5).all()


def test_keys_are_those_of_the_writer(place):
    """The rotation in fp64, rounded to bf16, and the bytes of mla_write_cache."""
    rng = RNG(2)
    tokens = 40
    kv, positions = keys_of(rng, tokens), rng.integers(0, 300, tokens)
    rope = kv[:, 448:].astype(np.float64)
    angle = positions[:, None] * 10000.0 ** (-np.arange(32) / 32)
    rotated = np.empty_like(rope)
    rotated[:, 0::2] = rope[:, 0::2] * np.cos(angle) - rope[:, 1::2] * np.sin(angle)
    rotated[:, 1::2] = rope[:, 1::2] * np.cos(angle) + rope[:, 0::2] * np.sin(angle)
    slots = rng.permutation(3 * 16)[:tokens]
    given = [heads_of(rng, tokens, 2, 512), kv, np.zeros((3, 16, 584), np.uint8), slots]
    _, pages = run([*given, positions, cos_sin(300)], place)
    want = to_paddle(np.zeros((3, 16, 584), np.uint8), place)
    latent = to_paddle(np.ascontiguousarray(kv[:, :448]), place)
    F.mla_write_cache(
        latent, to_paddle(rotated.astype(BF16), place), want, int32(slots, place),
        cache_format="fp8_584",
    )  # fmt: skip
    rows = [np.array(x).reshape(3, -1)[:, : 16 * 576] for x in (pages, to_numpy(want))]
    planes = [np.array(x).reshape(3, -1)[:, 16 * 576 :] for x in (pages, to_numpy(want))]
    assert_same_bits(planes[0], planes[1], "scales")
    codes = [x.reshape(48, 576)[:, :448] for x in rows]
    assert_same_bits(codes[0], codes[1], "codes")
    values = [x.reshape(48, 576)[:, 448:].copy().view(BF16).astype(np.float64) for x in rows]
    size = np.zeros((48, 64))
    size[slots] = np.repeat(np.abs(rope[:, 0::2]) + np.abs(rope[:, 1::2]), 2, axis=1)
    # Half a step of bf16 either side of the fp64 value, and the table's fp32.
    assert (np.abs(values[0] - values[1]) <= np.abs(values[1]) * 2.0**-7 + size * 1e-5).all()


@pytest.mark.parametrize(
    ("page_size", "page_bytes"), [(1, 592), (2, 1728), (61, 36288), (64, 37440)]
)
@pytest.mark.parametrize("as_pages", [False, True])
def test_padded_pages(place, page_size, page_bytes, as_pages):
    """The padding is neither written nor read."""
    rng = RNG(3)
    pages = 100 // page_size + 1
    before = np.full((pages, page_bytes), 0xFF, np.uint8)
    slots = slots_for(rng, 70, pages * page_size)
    first = [heads_of(rng, 75, 2, 512), keys_of(rng, 75)]
    rest = [slots, rng.integers(0, 50, 75), cos_sin(50)]
    memory = to_paddle(before.copy(), place)
    if as_pages:
        cache, size = memory, page_size
    else:
        cache = strided(memory, [pages, page_size, 1, 584], [page_bytes, 584, 584, 1])
        size = None
    F.mla_qkv_norm_rope_write(*tensors([*first, cache, *rest], place), page_size=size)
    want = reference.mla_qkv_norm_rope_write(*first, before, *rest, page_size=page_size)
    assert_same_bits(to_numpy(memory), want[1])
    assert (want[1][:, page_size * 584 :] == 0xFF).all()


def case(rng, tokens, heads):
    return [
        heads_of(rng, tokens, heads, 512),
        keys_of(rng, tokens),
        random_pages(rng, 3, 32 * 584).reshape(3, 32, 584),
        slots_for(rng, tokens, 96),
        rng.integers(0, 50, tokens),
        cos_sin(50),
    ]


def test_in_place(place):
    """`out` may be q, hold it as its first heads, or lie apart with any strides."""
    rng = RNG(4)
    arrays = case(rng, 11, 5)
    want, _ = reference.mla_qkv_norm_rope_write(*arrays)
    given = tensors([a.copy() for a in arrays], place)
    result = F.mla_qkv_norm_rope_write(*given, out=given[0])
    assert_same_bits(to_numpy(given[0]).view(np.uint16), want.view(np.uint16))
    assert result.data_ptr() == given[0].data_ptr()

    wide = np.full((11, 8, 512), np.nan, BF16)
    wide[:, :5] = arrays[0]
    memory = to_paddle(wide, place)
    given = tensors([a.copy() for a in arrays], place)
    given[0] = strided(memory, [11, 5, 512], [8 * 512, 512, 1])
    F.mla_qkv_norm_rope_write(*given, out=memory)
    padded = np.zeros((11, 8, 512), BF16)
    padded[:, :5] = want
    assert_same_bits(to_numpy(memory).view(np.uint16), padded.view(np.uint16))

    heads_first = to_paddle(np.full((6, 11, 512), np.nan, BF16), place)
    view = strided(heads_first, [11, 6, 512], [512, 11 * 512, 1])
    given = tensors([a.copy() for a in arrays], place)
    F.mla_qkv_norm_rope_write(*given, out=view, padded_heads=6)
    got = to_numpy(heads_first).transpose(1, 0, 2)
    assert_same_bits(got.view(np.uint16), padded[:, :6].view(np.uint16))
    assert_same_bits(to_numpy(given[0]).view(np.uint16), arrays[0].view(np.uint16), "q")


def test_parts_of_wider_rows(place):
    """Queries and keys that are columns of one projection."""
    rng = RNG(5)
    arrays = case(rng, 21, 3)
    rows = np.full((21, 8 + 3 * 512 + 16 + 512), np.nan, BF16)
    rows[:, 8 : 8 + 1536], rows[:, 1560:] = arrays[0].reshape(21, -1), arrays[1]
    memory, width = to_paddle(rows, place), rows.shape[1]
    parts = [
        strided(memory, [21, 3, 512], [width, 512, 1], 16),
        strided(memory, [21, 512], [width, 1], 1560 * 2),
    ]
    want = reference.mla_qkv_norm_rope_write(*arrays)
    assert_same(run([*parts, arrays[2].copy(), *arrays[3:]], place), want)


def test_special_values(place):
    """NaN and infinities stay in their head or tile; heads of zeros and subnormals."""
    rng = RNG(6)
    arrays = case(rng, 14, 2)
    q, kv = arrays[0].view(np.uint16), arrays[1].view(np.uint16)
    q[0, 0, 5], q[1, 1, 500] = 0x7FC1, 0xFF83  # NaN, the second signalling and rotated
    q[2, 0, 7], q[3, 0, 450] = 0x7F80, 0xFF80  # infinite
    q[4], q[5] = 0, 0x8000
    q[6] = np.arange(512) % 128  # subnormal: their squares vanish
    q[7] = 0x7F7F  # squares overflow: an infinite mean
    q[8] = 0x5F00  # squares near the largest
    q[9] = 0x1F80  # squares near the smallest
    kv[0, 3], kv[1, 70], kv[2, 447], kv[3, 448], kv[4, 500] = 0x7FC1, 0xFF83, 0x7F80, 0x7FC0, 0xFF80
    kv[5], kv[6], kv[7], kv[8] = 0, 0x8000, 0x7F7F, np.arange(512) % 128
    arrays[3] = rng.permutation(96)[:14]
    arrays[5] = arrays[5].copy()
    arrays[5][49] = np.nan
    arrays[4][13] = 49
    for eps in (1e-6, 0.0):
        want = reference.mla_qkv_norm_rope_write(*arrays, rms_norm_eps=eps)
        got = run([a.copy() for a in arrays], place, rms_norm_eps=eps)
        assert_same(got, want)
    nan = np.isnan(run([a.copy() for a in arrays], place)[0])
    assert nan[0, 0].all() and nan[1, 1].all() and not nan[0, 1].any() and not nan[1, 0].any()
    assert nan[13, :, 448:].all() and not nan[13, :, :448].any()
    assert not nan[4:13].any()


def test_means_of_every_exponent(place):
    """1 / sqrt of numbers from the smallest to the largest, rounded right."""
    exponents = np.arange(1, 255)
    rng = RNG(7)
    q = (rng.uniform(1, 2, (254, 3, 512))).astype(BF16).view(np.uint16)
    q = ((q & 0x7F) | (exponents << 7).astype(np.uint16)[:, None, None]).view(BF16)
    q[:, 1, 1:], q[:, 2, 2:] = 0, 0
    cache = np.zeros((1, 1, 592), np.uint8)[..., :584].copy()
    rest = [keys_of(rng, 254), cache, np.zeros(0, np.int64), np.arange(254), cos_sin(254)]
    for eps in (0.0, 1e-30):
        want = reference.mla_qkv_norm_rope_write(q, *rest, rms_norm_eps=eps)
        assert_same(run([q, *rest], place, rms_norm_eps=eps), want)


@pytest.mark.parametrize("at_end", [False, True])
def test_pools_of_more_than_two_gib(place, at_end):
    """Offsets of 64 bits, in the slot and in the page."""
    rng = RNG(8)
    pages = 2**31 // 37440 + 3
    with default_place(place):
        cache = paddle.empty([pages, 37440], dtype="uint8")
    slots = np.arange(64) + ((pages - 1) * 64 if at_end else 0)
    arrays = [heads_of(rng, 64, 1, 512), keys_of(rng, 64)]
    rest = [slots, np.arange(64), cos_sin(64)]
    F.mla_qkv_norm_rope_write(*tensors([*arrays, cache, *rest], place), page_size=64)
    skip_slices_on(place)
    page = strided(cache, [64 * 584], [1], int(slots[0]) // 64 * 37440)
    small = np.zeros((1, 64 * 584), np.uint8)
    rest[0] = np.arange(64)
    want = reference.mla_qkv_norm_rope_write(*arrays, small, *rest, page_size=64)
    assert_same_bits(to_numpy(page.clone())[None], want[1])


def test_the_layer_and_back(place):
    """A cache that the reader dequantises holds the rotated keys within half a step of a code."""
    rng = RNG(9)
    kv = keys_of(rng, 30)
    given = [heads_of(rng, 30, 1, 512), kv, np.zeros((1, 64, 584), np.uint8), np.arange(30)]
    _, pages = run([*given, np.zeros(30, np.int64), cos_sin(4)], place)
    rows = pages.reshape(-1)[: 30 * 576].reshape(30, 576)
    scales = pages.reshape(-1)[64 * 576 : 64 * 576 + 240].reshape(30, 8)
    values = model.token_values(rows, scales, "fp8_584").astype(np.float64).reshape(30, 8, 64)
    tiles = kv.astype(np.float64).reshape(30, 8, 64)
    assert_same_bits(values[:, 7], tiles[:, 7])  # position 0 rotates by nothing
    amax = np.maximum(np.abs(tiles).max(axis=-1, keepdims=True), 1e-4)
    assert (np.abs(values - tiles) <= amax / 14).all()


def test_nothing_to_do(place):
    rng = RNG(10)
    arrays = case(rng, 4, 2)
    if EMPTY_OUTPUTS:
        nothing = [a[:0] for a in arrays[:2]] + [arrays[2], *(a[:0] for a in arrays[3:5])]
        got = run([*nothing, arrays[5]], place, padded_heads=3)
        assert got[0].shape == (0, 3, 512)
        assert_same_bits(got[1], arrays[2])
        none = [arrays[0][:, :0], *arrays[1:]]
        want = reference.mla_qkv_norm_rope_write(*none)
        none[2] = none[2].copy()
        assert_same(run(none, place), want)
    for change in ({3: arrays[3][:0]}, {2: np.zeros((0, 32, 584), np.uint8)}):
        given = [change.get(i, a) for i, a in enumerate(arrays)]
        want = reference.mla_qkv_norm_rope_write(*given)
        assert_same_bits(want[1], given[2], "untouched")
        assert_same(run(given, place), want)


def padded(q, kv, cache, slots, positions, table):
    return F.mla_qkv_norm_rope_write(
        q, kv, cache, slots, positions, table, padded_heads=8, page_size=8
    )


def into_q(q, kv, cache, slots, positions, table):
    return F.mla_qkv_norm_rope_write(q, kv, cache, slots, positions, table, out=q)


def into_another(q, kv, cache, slots, positions, table, out):
    return F.mla_qkv_norm_rope_write(q, kv, cache, slots, positions, table, out=out)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [padded, into_q, into_another])
def test_traced_and_saved(place, function, dynamic):
    rng = RNG(11)
    arrays = case(rng, 9, 3)
    options = {}
    if function is padded:
        arrays[2], options = random_pages(rng, 12, 4736), {"page_size": 8, "padded_heads": 8}
    want = reference.mla_qkv_norm_rope_write(*arrays, **options)
    more = [np.zeros((9, 3, 512), BF16)] if function is into_another else []
    outputs, inputs = run_all_modes(function, [*arrays, *more], place, dynamic=dynamic)
    assert_same_bits(outputs[0], want[0])
    assert_same_bits(inputs[2], want[1])
    if function is not padded:
        assert_same_bits(inputs[0 if function is into_q else 6], want[0])


def good():
    return {
        "q": to_paddle(np.zeros((3, 4, 512), BF16)),
        "kv": to_paddle(np.zeros((3, 512), BF16)),
        "cache": to_paddle(np.zeros((2, 64, 584), np.uint8)),
        "slot_mapping": to_paddle(np.arange(3)),
        "positions": to_paddle(np.arange(3)),
        "cos_sin_cache": to_paddle(cos_sin(4)),
    }


def bf16(*shape):
    return np.zeros(shape, BF16)


WRONG = [
    ({"q": None}, TypeError, "q: expected a tensor, got None"),
    ({"q": np.zeros((3, 4, 512), np.float32)}, TypeError, "q: expected dtype bfloat16"),
    ({"q": bf16(3, 4, 576)}, ValueError, r"q: expected shape \[\?, \?, 512\]"),
    ({"q": bf16(3, 2048)}, ValueError, "q: expected shape"),
    ({"kv": bf16(3, 576)}, ValueError, r"kv: expected shape \[3, 512\]"),
    ({"kv": bf16(2, 512)}, ValueError, r"kv: expected shape \[3, 512\]"),
    ({"kv": np.zeros((3, 512), np.float16)}, TypeError, "kv: expected dtype bfloat16"),
    ({"cache": np.zeros((2, 64, 656), np.uint8)}, ValueError, r"cache: expected shape"),
    ({"cache": bf16(2, 64, 584)}, TypeError, "cache: expected dtype uint8"),
    ({"cache": np.zeros((2, 37376), np.uint8)}, ValueError, "page_size: a cache .* got 0"),
    ({"cache_format": "fp8_656"}, NotImplementedError, "'fp8_656' is not supported"),
    ({"slot_mapping": np.arange(4)}, ValueError, "expected at most 3 slots, .* got 4"),
    ({"slot_mapping": np.zeros(3, np.float32)}, TypeError, "slot_mapping: expected dtype"),
    ({"positions": np.arange(2)}, ValueError, r"positions: expected shape \[3\], got \[2\]"),
    ({"cos_sin_cache": cos_sin(0)}, ValueError, "expected at least 1 position"),
    ({"cos_sin_cache": cos_sin(4)[:, :32]}, ValueError, r"expected shape \[\?, 64\]"),
    ({"rms_norm_eps": -1e-6}, ValueError, "rms_norm_eps: expected a finite number"),
    ({"rms_norm_eps": float("nan")}, ValueError, "rms_norm_eps: expected a finite number"),
    ({"rms_norm_eps": "1e-6"}, TypeError, "rms_norm_eps: expected float, got str"),
    ({"padded_heads": 3}, ValueError, "padded_heads: expected at least the 4 heads of q, got 3"),
    ({"padded_heads": -1}, ValueError, "padded_heads: expected at least the 4 heads"),
    ({"padded_heads": 8.0}, TypeError, "padded_heads: expected int"),
    ({"out": bf16(3, 3, 512)}, ValueError, "out: expected at least 4 heads"),
    ({"out": bf16(3, 5, 512), "padded_heads": 8}, ValueError, "out: expected 8 heads"),
    ({"out": bf16(2, 4, 512)}, ValueError, r"out: expected shape \[3, \?, 512\]"),
    ({"out": np.zeros((3, 4, 512), np.float16)}, TypeError, "out: expected dtype bfloat16"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG)
def test_wrong_arguments(change, error, text):
    given = {k: to_paddle(v) if isinstance(v, np.ndarray) else v for k, v in change.items()}
    with pytest.raises(error, match=f"mla_qkv_norm_rope_write: .*{text}"):
        F.mla_qkv_norm_rope_write(**{**good(), **given})


def test_out_that_shares_a_part_of_the_queries():
    pool = to_paddle(bf16(4 * 4 * 512))
    q = strided(pool, [3, 4, 512], [2048, 512, 1])
    for out in (
        strided(pool, [3, 4, 512], [2048, 512, 1], 1024),  # a head further
        strided(pool, [3, 4, 512], [512, 3 * 512, 1]),  # the same bytes in another order
    ):
        with pytest.raises(ValueError, match="out: it is written and must be q itself or not"):
            F.mla_qkv_norm_rope_write(**{**good(), "q": q}, out=out)
    repeated = strided(pool, [3, 4, 512], [0, 512, 1])
    with pytest.raises(ValueError, match="no two of its elements may share memory"):
        F.mla_qkv_norm_rope_write(**good(), out=repeated)
