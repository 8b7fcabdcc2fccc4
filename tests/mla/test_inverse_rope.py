"""inverse_rope_quantize_fp8: against the model bit by bit, and exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference import mla_layer as model
from fastattn.reference.indexer import power_of_two_scale, rotate_last
from fastattn.reference.numerics import from_codes
from tests.support.compare import assert_same_bits
from tests.support.indexer import cos_sin
from tests.support.static import run_all_modes
from tests.support.strides import strided
from tests.support.tensors import BF16, EMPTY_OUTPUTS, to_numpy, to_paddle

RNG = np.random.default_rng


def outputs_of_attention(rng, tokens, heads):
    """Heads whose blocks of 128 channels differ in magnitude."""
    size = np.exp2(rng.integers(-30, 10, (tokens, heads, 4, 1)))
    return (
        (rng.normal(size=(tokens, heads, 4, 128)) * size).reshape(tokens, heads, 512).astype(BF16)
    )


def run(x, positions, table, place, groups):
    codes, scales = F.inverse_rope_quantize_fp8(
        x if isinstance(x, paddle.Tensor) else to_paddle(x, place),
        to_paddle(positions, place),
        to_paddle(table, place),
        num_groups=groups,
    )
    return to_numpy(codes), to_numpy(scales)


def assert_same(got, want):
    assert_same_bits(got[0], want[0], "codes")
    # Bytes, so that one NaN is not another: a product's operand is the same on every device.
    assert_same_bits(got[1].view(np.uint32), want[1].view(np.uint32), "scales")


@pytest.mark.parametrize("table_dtype", [np.float32, BF16])
@pytest.mark.parametrize("position_dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("tokens", "heads", "groups"),
    [(1, 1, 1), (2, 8, 1), (3, 8, 8), (4, 16, 2), (5, 64, 8), (63, 3, 3), (130, 6, 2)],
)
def test_bits(place, tokens, heads, groups, position_dtype, table_dtype):
    rng = RNG(tokens + heads)
    x = outputs_of_attention(rng, tokens, heads)
    positions = rng.integers(-3, 60, tokens).astype(position_dtype)  # some outside the table
    table = cos_sin(50, table_dtype)
    want = reference.inverse_rope_quantize_fp8(x, positions, table, num_groups=groups)
    assert want[0].shape == (groups, tokens, heads // groups * 512)
    assert want[1].shape == (groups, heads // groups * 4, -(-tokens // 4) * 4)
    assert_same(run(x, positions, table, place, groups), want)
    assert (want[1][..., tokens:] == 0).all()


def test_values_are_those_of_a_rotation_back_in_fp64(place):
    """Independent of the model: angles, pairs, the places of codes and scales, in plain loops."""
    rng = RNG(1)
    tokens, heads, groups = 6, 4, 2
    x = outputs_of_attention(rng, tokens, heads)
    positions, table = rng.integers(0, 4000, tokens), cos_sin(4000)
    codes, scales = run(x, positions, table, place, groups)
    values = from_codes(codes, "e4m3").astype(np.float64)
    for t in range(tokens):
        for h in range(heads):
            exact = x[t, h].astype(np.float64)
            for i in range(32):
                angle = positions[t] * 10000.0 ** (-i / 32)
                c, s = np.cos(angle), np.sin(angle)
                e, o = exact[448 + 2 * i], exact[449 + 2 * i]
                exact[448 + 2 * i], exact[449 + 2 * i] = e * c + o * s, o * c - e * s
            group, own = divmod(h, heads // groups)
            for b in range(4):
                scale = float(scales[group, own * 4 + b, t])
                block = exact[128 * b : 128 * b + 128]
                got = values[group, t, own * 512 + 128 * b : own * 512 + 128 * b + 128] * scale
                amax = np.abs(block).max()
                # Half a step of e4m3: 2^-4 of a value, and 2^-10 of a scale near 0.
                assert (np.abs(got - block) <= np.abs(block) / 16 * 1.001 + scale / 1024).all()
                assert amax / 448 * 0.9999 <= scale < 2 * 1.0001 * max(amax, 1e-10) / 448


def test_the_rotation_of_the_layer_and_back(place):
    """What was rotated by a position and comes back has the codes of what was never rotated."""
    rng = RNG(2)
    x = rng.integers(-8, 9, (9, 2, 512)).astype(np.float32)  # far from ties of codes
    positions, table = rng.integers(0, 300, 9), cos_sin(300)
    rotated = rotate_last(x, table[positions][:, None])
    back = rotate_last(rotated, (table * np.repeat(np.float32([1, -1]), 32))[positions][:, None])
    np.testing.assert_allclose(back, x, atol=4e-6)
    # Position 0 rotates by nothing.
    codes, _ = run(x.astype(BF16), np.zeros(9, np.int64), table, place, 1)
    scale = power_of_two_scale(np.float32(8))
    np.testing.assert_array_equal(from_codes(codes, "e4m3").reshape(9, 2, 512) * scale, x)


def test_scales_by_exact_arithmetic():
    """Every bf16 magnitude, and fp32 ones around the floor and around powers of two."""
    magnitudes = np.arange(0x7F80, dtype=np.uint16)[::37].view(BF16).astype(np.float32)
    floor = np.float32(1e-10)
    edges = [
        floor,
        np.nextafter(floor, 1),
        np.nextafter(floor, 0),
        *(448 * 2.0 ** np.arange(-40, 9)),
    ]
    near = [np.nextafter(np.float32(e), np.float32(d)) for e in edges for d in (0, 1e38)]
    for amax in np.float32([*magnitudes, *edges, *near]):
        least = max(Fraction(float(amax)), Fraction(float(floor))) / 448
        scale = Fraction(float(power_of_two_scale(amax, model.OUTPUT_AMAX_FLOOR)))
        assert scale / 2 < least <= scale


@pytest.mark.parametrize("heads", [1, 7])
def test_special_values(place, heads):
    """NaN keeps to its block of its head, infinities saturate, subnormals count."""
    rng = RNG(3)
    x = outputs_of_attention(rng, 10, heads)
    bits = x.view(np.uint16)
    bits[0, 0, 5] = 0x7FC1  # NaN
    bits[1, 0, 130] = 0xFF83  # a signalling one with a sign
    bits[2, 0, 449] = 0xFFC0  # a rotated one: its pair has it, too
    x[3, 0, 200], x[3, 0, 450] = np.inf, -np.inf
    x[4], x[5] = 0, -0.0
    bits[6, :, :] = np.arange(512) % 128  # subnormal
    bits[7] = 0x7F7F  # the largest, whose rotation overflows
    x[8, :, 448:] = 0
    table = cos_sin(80)
    table[79] = np.nan
    positions = np.array([*range(70, 79), 79])
    with np.errstate(all="ignore"):
        want = reference.inverse_rope_quantize_fp8(x, positions, table)
    assert_same(run(x, positions, table, place, 1), want)
    codes = want[0].reshape(10, heads, 4, 128)
    scales = want[1].reshape(heads, 4, 12)
    nan = np.zeros((10, heads, 4), bool)
    nan[0, 0, 0] = nan[1, 0, 1] = nan[2, 0, 3] = True
    nan[9, :, 3] = True
    np.testing.assert_array_equal(np.isnan(scales[..., :10]).transpose(2, 0, 1), nan)
    assert (codes[nan] == 0x7F).all() and not (codes[~nan] == 0x7F).any()
    assert codes[3, 0, 1, 200 - 128] == 0x7E
    assert (scales[:, :, 4] == np.float32(2.0**-42)).all()


def test_heads_of_a_wider_output(place):
    """A view without padded heads; tokens that are parts of wider rows."""
    rng = RNG(4)
    wide = outputs_of_attention(rng, 21, 16)
    wide[:, 5:] = np.nan
    memory = to_paddle(wide, place)
    view = strided(memory, [21, 5, 512], [16 * 512, 512, 1])
    positions, table = rng.integers(0, 50, 21), cos_sin(50)
    want = reference.inverse_rope_quantize_fp8(wide[:, :5], positions, table, num_groups=5)
    assert_same(run(view, positions, table, place, 5), want)
    # Heads ahead of tokens.
    heads_first = np.ascontiguousarray(wide[:, :5].transpose(1, 0, 2))
    view = strided(to_paddle(heads_first, place), [21, 5, 512], [512, 21 * 512, 1])
    assert_same(run(view, positions, table, place, 5), want)


def test_more_than_2_gib(place):
    """Offsets of 64 bits: x of 2.1 GiB on a GPU. The CPU takes a view that repeats a token."""
    heads, tokens = 128, 2**31 // (2 * 128 * 512) + 9
    rng = RNG(5)
    if place == "cpu":
        tokens = 40
        rows = outputs_of_attention(rng, 2, heads)
        memory = paddle.empty([2**30 + 2 * heads * 512], "bfloat16")
        far = strided(memory, [2, heads, 512], [2**30, 512, 1])
        for t in range(2):
            strided(memory, [heads, 512], [512, 1], 2 * t * 2**30).copy_(to_paddle(rows[t]), True)
        positions, table = rng.integers(0, 50, 2), cos_sin(50)
        want = reference.inverse_rope_quantize_fp8(rows, positions, table, num_groups=8)
        assert_same(run(far, positions, table, place, 8), want)
        return
    block = outputs_of_attention(rng, 64, heads)
    x = np.tile(block, (-(-tokens // 64), 1, 1))[:tokens]
    positions, table = np.arange(tokens) % 64, cos_sin(64)
    codes, scales = run(x, positions, table, place, 8)
    want = reference.inverse_rope_quantize_fp8(block, np.arange(64), table, num_groups=8)
    for first in (0, tokens // 64 * 64 - 64):
        part = codes[:, first : first + 64], scales[..., first : first + 64]
        assert_same([np.ascontiguousarray(a) for a in part], want)
    rest = tokens % 64
    assert_same_bits(codes[:, tokens - rest :], want[0][:, :rest])


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="this Paddle refuses empty outputs")
def test_nothing_to_do(place):
    table = cos_sin(4)
    for tokens, heads, groups in ((0, 8, 2), (3, 0, 1)):
        x = np.zeros((tokens, heads, 512), BF16)
        got = run(x, np.zeros(tokens, np.int64), table, place, groups)
        want = reference.inverse_rope_quantize_fp8(
            x, np.zeros(tokens, np.int64), table, num_groups=groups
        )
        assert_same(got, want)


def two_groups(x, positions, table):
    return F.inverse_rope_quantize_fp8(x, positions, table, num_groups=2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_and_saved(place, dynamic):
    rng = RNG(6)
    x, positions, table = outputs_of_attention(rng, 7, 4), np.arange(7), cos_sin(20)
    got, _ = run_all_modes(two_groups, [x, positions, table], place, dynamic=dynamic)
    assert_same(got, reference.inverse_rope_quantize_fp8(x, positions, table, num_groups=2))


def good():
    return {
        "x": to_paddle(np.zeros((3, 4, 512), BF16)),
        "positions": to_paddle(np.arange(3)),
        "cos_sin_cache": to_paddle(cos_sin(4)),
    }


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": None}, TypeError, "x: expected a tensor, got None"),
        ({"x": np.zeros((3, 4, 512), np.float32)}, TypeError, "x: expected dtype bfloat16"),
        ({"x": np.zeros((3, 4, 576), BF16)}, ValueError, r"x: expected shape \[\?, \?, 512\]"),
        ({"x": np.zeros((3, 2048), BF16)}, ValueError, "x: expected shape"),
        ({"positions": np.arange(4)}, ValueError, r"positions: expected shape \[3\], got \[4\]"),
        ({"positions": np.zeros(3, np.float32)}, TypeError, "positions: expected dtype int32"),
        ({"cos_sin_cache": cos_sin(4)[:, :32]}, ValueError, r"expected shape \[\?, 64\]"),
        ({"cos_sin_cache": cos_sin(0)}, ValueError, "expected at least 1 position"),
        ({"cos_sin_cache": cos_sin(4, np.float16)}, TypeError, "cos_sin_cache: expected dtype"),
        ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of the 4 heads, got 3"),
        ({"num_groups": 0}, ValueError, "num_groups: expected a divisor of the 4 heads, got 0"),
        ({"num_groups": -2}, ValueError, "num_groups: expected a divisor"),
        ({"num_groups": 2.0}, TypeError, "num_groups: expected int"),
    ],
)
def test_wrong_arguments(change, error, text):
    given = {k: to_paddle(v) if isinstance(v, np.ndarray) else v for k, v in change.items()}
    with pytest.raises(error, match=f"inverse_rope_quantize_fp8: .*{text}"):
        F.inverse_rope_quantize_fp8(**{**good(), **given})
