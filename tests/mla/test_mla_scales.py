"""Scales and codes of latent caches, by exact arithmetic and over special values."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import fastattn.functional as F
from fastattn.reference import mla as model
from tests.support.compare import assert_same_bits
from tests.support.latent import KINDS, bits, scale_of, width
from tests.support.tensors import BF16, to_numpy, to_paddle

RNG = np.random.default_rng


def written(x, place, cache_format, rule="pow2", scale=None):
    """Row bytes and bytes of the scales' plane of the tokens `x` [T, latent], rope zero."""
    count = len(x)
    rope = np.zeros((count, 64), BF16)
    fmt = model.FORMATS[cache_format]
    pages = -(-count // 16)
    dtype = width(cache_format)[1]
    cache = to_paddle(np.zeros((pages, 16 * fmt.token_bytes), np.uint8).view(dtype), place)
    F.mla_write_cache(
        to_paddle(x, place),
        to_paddle(rope, place),
        cache,
        to_paddle(np.arange(count), place),
        cache_format=cache_format,
        scale_rule=rule,
        scale=None if scale is None else to_paddle(scale, place),
        page_size=16,
    )
    stored = to_numpy(cache).view(np.uint8)
    rows = stored[:, : 16 * fmt.row_bytes].reshape(pages * 16, fmt.row_bytes)[:count]
    plane = stored[:, 16 * fmt.row_bytes :].reshape(pages * 16, fmt.scale_plane_bytes)[:count]
    return rows, plane


def tiles_of_every_amax(tile, latent):
    """Tiles whose largest magnitude is each bf16 number once, infinity and NaN included."""
    patterns = np.arange(0x8000, dtype=np.uint16)
    patterns = np.concatenate([patterns, np.zeros(-len(patterns) % (latent // tile), np.uint16)])
    x = np.zeros((len(patterns), tile), np.uint16)
    x[:, 5] = patterns
    x[:, 17] = patterns | 0x8000
    return x.reshape(-1, latent).view(BF16)


@pytest.mark.parametrize(("cache_format", "rule"), KINDS[2:])
def test_every_amax(place, cache_format, rule):
    fmt = model.FORMATS[cache_format]
    x = tiles_of_every_amax(fmt.tile, fmt.latent)
    rows, plane = written(x, place, cache_format, rule)
    want = model.token_bytes(x, np.zeros((len(x), 64), BF16), cache_format, rule)
    assert_same_bits(rows, want[0])
    assert_same_bits(plane, want[1])


def exact_scale(amax, rule):
    """The rule in exact arithmetic, rounded once."""
    if rule == "amax":
        quotient = Fraction(float(amax)) / 448
        # A quotient in fp64 and then in fp32 is rounded twice, which bf16 numbers survive: the
        # exact one has its 25th bit and later ones from a division by 7.
        return max(np.float32(float(quotient)), np.finfo(np.float32).tiny)
    exponent, least = -149, max(Fraction(float(amax)), Fraction(float(np.float32(1e-4))))
    while Fraction(2) ** exponent * 448 < least:
        exponent += 1
    return np.float32(2.0**exponent)


@pytest.mark.parametrize("rule", ["pow2", "amax"])
def test_the_models_scales_by_exact_arithmetic(rule):
    values = np.arange(0, 0x7F80, 37).astype(np.uint16).view(BF16).astype(np.float32)
    edges = np.float32([1e-4, 0.0001001, 448, 449, 224, 1.75, 1.7578125, 2**-118, 3.38e38])
    for amax in [*values, *edges]:
        assert model.tile_scale(amax, rule) == exact_scale(amax, rule), amax


def test_codes_by_hand(place):
    """The largest magnitude is code 448 with "amax"; steps of e4m3 from there on."""
    x = np.zeros((1, 512), BF16)
    x[0, :4], x[0, 128:132] = [7, -3.5, 0.4375, -0.0], [7, -3.5, 0.4375, -0.0]
    rows, _ = written(x, place, "fp8_656", "amax")
    assert rows[0, :4].tolist() == [0x7E, 0xF6, 0x5E, 0x80]
    assert rows[0, 512:516].view(np.float32)[0] == np.float32(7) / np.float32(448)
    rows, _ = written(x, place, "fp8_656")
    assert rows[0, 512:528].view(np.float32).tolist() == [2**-6, 2**-6, 2**-22, 2**-22]
    assert rows[0, :4].tolist() == [0x7E, 0xF6, 0x5E, 0x80]


@pytest.mark.parametrize(("cache_format", "rule"), KINDS)
def test_special_values(place, cache_format, rule):
    """NaN stays in its tile, infinities saturate there, subnormals are not flushed."""
    fmt = model.FORMATS[cache_format]
    x = RNG(0).normal(size=(12, fmt.latent)).astype(BF16)
    bits16 = x.view(np.uint16)
    bits16[0, 3] = 0x7FC1  # NaN
    bits16[1, 70] = 0xFF83  # a signalling one with a sign
    x[2, 10], x[3, 447] = np.inf, -np.inf
    x[4, 5], x[4, 6] = np.inf, np.nan
    bits16[5, :64] = np.arange(64)  # subnormal
    bits16[6] = np.arange(fmt.latent) % 128 | 0x8000
    x[7], x[8], bits16[9] = 0, -0.0, 0x7F7F
    bits16[10] = 0x0080  # the least normal
    bits16[11] = 0x7F80 - np.arange(fmt.latent) * 64
    scale = scale_of(cache_format)
    rows, plane = written(x, place, cache_format, rule, scale)
    want = model.token_bytes(x, np.zeros((12, 64), BF16), cache_format, rule, scale)
    assert_same_bits(rows, want[0])
    assert_same_bits(plane, want[1])
    if cache_format == "bf16":
        return
    values = model.token_values(rows, plane, cache_format, scale).astype(np.float32)
    assert np.isnan(values[0, 3]) and np.isnan(values[1, 70])
    tile = fmt.tile or 1
    for token, channel in ((0, 3), (1, 70)):
        outside = np.arange(fmt.latent) // tile != channel // tile
        assert np.isfinite(values[token, : fmt.latent][outside]).all()
    assert not np.isnan(values[2]).any() and not np.isnan(values[3]).any()
    assert (values[7] == 0).all()


def test_the_quotient_is_a_division(place):
    """x / scale and x * (1 / scale) are not the same code; caches hold the former."""
    scales = np.float32(
        [*range(3, 64, 2), *np.exp2(RNG(1).uniform(-12, 4, 20))]
    )  # odd ones make ties
    x = np.arange(1 << 15, dtype=np.uint16).view(BF16).reshape(-1, 512)
    product_differs = 0
    for scale in scales:
        with np.errstate(all="ignore"):
            wide = x.astype(np.float32)
            quotient = np.clip(wide / scale, -448, 448)
            product = np.clip(wide * (np.float32(1) / scale), -448, 448)
            want = quotient.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            product_differs += int(
                (want != product.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)).sum()
            )
        rows, _ = written(x, place, "fp8", scale=np.array([scale]))
        numbers = ~np.isnan(wide)
        np.testing.assert_array_equal(rows[:, :512][numbers], want[numbers])
        assert (rows[:, :512][~numbers] == 0x7F).all()
    assert product_differs > 0


@pytest.mark.parametrize(
    "scale", [0.0, -0.0, -1.5, np.inf, np.nan, 1e-45, 1.2e-38, 3e38, 2.0**-64, 2.0**63]
)
def test_static_scales_of_every_kind(place, scale):
    """A static scale is divided by as it is, whatever it is."""
    patterns = np.arange(1 << 16, dtype=np.uint16).view(BF16).reshape(-1, 512)
    rows, _ = written(patterns, place, "fp8", scale=np.array([scale], np.float32))
    rope = np.zeros((len(patterns), 64), BF16)
    want, _ = model.token_bytes(patterns, rope, "fp8", scale=np.float32([scale]))
    assert_same_bits(rows, want)


@pytest.mark.parametrize("cache_format", ["fp8_656", "fp8_584"])
def test_every_code_with_scales_of_every_exponent(place, cache_format):
    """The reader's product, rounded once to bf16: overflow, subnormal results, NaN."""
    fmt = model.FORMATS[cache_format]
    count = 256
    rng = RNG(2)
    rows = rng.integers(0, 256, (count, fmt.row_bytes)).astype(np.uint8)
    if cache_format == "fp8_656":
        scales = rng.integers(0, 1 << 32, (count, 4), dtype=np.uint32)
        scales[:8] = [[0x7FC00000, 0x7F800000, 0, 0x80000000]] * 8
        rows[:, 512:528] = scales.view(np.uint8).reshape(count, 16)
        plane = np.zeros((count, 0), np.uint8)
    else:
        plane = np.arange(count * 8).reshape(count, 8).astype(np.uint8)
        plane[:, 0] = np.arange(256)
    cache = np.concatenate([rows.ravel(), plane.ravel()])[None]
    out = to_paddle(np.zeros((count, fmt.latent + 64), BF16), place)
    arrays = [np.array([[0]], np.int32), np.array([count], np.int32), np.array([0, count])]
    F.mla_gather_cache(
        to_paddle(cache, place),
        out,
        *(to_paddle(a.astype(np.int32), place) for a in arrays),
        cache_format=cache_format,
        page_size=count,
    )
    want = model.token_values(rows, plane, cache_format)
    assert_same_bits(bits(to_numpy(out)), bits(want))
