"""Every conversion of custom_ops/common, compiled alone, against ml_dtypes and NumPy.

Every fp16, bfloat16 and 8-bit pattern, every tie between neighbouring codes with the fp32 values on
both sides of it, and random fp32 patterns.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from fastattn.reference import mxfp4, numerics
from tests.support import ROOT
from tests.support.compare import assert_same_bits

U16 = np.arange(65536, dtype=np.uint32).astype(np.uint16)
U8 = np.arange(256, dtype=np.uint32).astype(np.uint8)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("numerics") / "numerics.so"
    flags = ["-O3", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC"]
    source = ROOT / "tests/support/numerics.cc"
    include = f"-I{ROOT / 'custom_ops'}"
    subprocess.run(["g++", *flags, include, "-shared", "-o", path, source], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def convert(library):
    def run(name, x, dtype, *args):
        x = np.ascontiguousarray(x)
        y = np.empty(x.shape, dtype)
        pointers = (ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data))
        getattr(library, name)(*pointers, ctypes.c_int64(x.size), *map(ctypes.c_float, args))
        return y

    return run


def neighbours(x):
    x = np.asarray(x, np.float32)
    up, down = np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))
    return np.concatenate([x, up, down, -x, -up, -down])


def awkward_floats(codes):
    """fp32 values: finite `codes`, their ties and neighbours, specials, all bfloat16, random."""
    codes = np.unique(np.asarray(codes, np.float64))
    ties = (codes[1:] + codes[:-1]) / 2
    over = codes[-1] * np.array([1.0, 1.03125, 1.0625, 1.125, 2.0])
    with np.errstate(over="ignore"):
        near = neighbours(np.concatenate([codes, ties, over, [2.0**-149, 2.0**-126]]))
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan], np.float32)
    bf16 = (U16.astype(np.uint32) << 16).view(np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint64)
    return np.concatenate([near, special, bf16, random.astype(np.uint32).view(np.float32)])


def finite(values):
    values = values.astype(np.float64)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
def test_16_bit(convert, dtype):
    name = "bf16" if dtype is ml_dtypes.bfloat16 else "f16"
    values = U16.view(dtype)
    assert_same_bits(convert("from_" + name, U16, np.float32), values.astype(np.float32))
    x = awkward_floats(finite(values))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype)
    assert_same_bits(convert("to_" + name, x, np.uint16).view(dtype), expected)
    back = convert("to_" + name, convert("from_" + name, U16, np.float32), np.uint16)
    assert_same_bits(back.view(dtype), values)
    kept = ~np.isnan(values)
    assert_same_bits(back[kept], U16[kept])


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)]
)
def test_fp8(convert, name, dtype):
    values = U8.view(dtype)
    assert_same_bits(convert("from_" + name, U8, np.float32), values.astype(np.float32))
    for x in (awkward_floats(finite(values)), U16.view(np.float16).astype(np.float32)):
        got = convert("to_" + name, x, np.uint8)
        assert_same_bits(got, numerics.to_codes(x, name), name)
        # The model itself, against the library's cast where that neither overflows nor is NaN.
        inside = np.abs(x) <= numerics.QMAX[name]
        assert_same_bits(got[inside], x[inside].astype(dtype).view(np.uint8))
        limit = np.float32(numerics.QMAX[name]).astype(dtype).view(np.uint8)
        over = np.abs(x) > numerics.QMAX[name]
        assert (got[over] == np.where(x[over] > 0, limit, limit | 0x80)).all()
        assert (got[np.isnan(x)] == 0x7F).all()


def test_int8(convert):
    x = awkward_floats(np.arange(-127.0, 128.0))
    got = convert("to_int8", x, np.int8)
    assert_same_bits(got, numerics.to_codes(x, "int8").view(np.int8))
    with np.errstate(invalid="ignore"):
        exact = np.clip(np.rint(np.nan_to_num(x.astype(np.float64), nan=0.0)), -127, 127)
    assert_same_bits(got, exact.astype(np.int8))


@pytest.mark.parametrize("code", ["e4m3", "e5m2", "int8"])
def test_dynamic_scale(convert, code):
    amax = np.abs(awkward_floats(np.array([1e-10, 1e-6, 1.0, 448.0])))
    for floor in (1e-10, 1e-6):
        got = convert("dynamic_scale", amax, np.float32, floor, numerics.QMAX[code])
        assert_same_bits(got, numerics.dynamic_scale(amax, code, floor))
        assert (got[~np.isnan(amax)] > 0).all() and not np.isinf(got).any()


def test_e2m1(convert):
    codes = np.arange(16, dtype=np.uint8)
    assert_same_bits(convert("from_e2m1", codes, np.float32), numerics.from_e2m1(codes))
    library_values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert_same_bits(convert("from_e2m1", codes, np.float32), library_values)
    x = awkward_floats(numerics.E2M1_VALUES)
    got = convert("to_e2m1", x, np.uint8)
    assert_same_bits(got, numerics.to_e2m1(x))
    number = ~np.isnan(x)
    expected = x[number].astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert_same_bits(got[number], expected & 0xF)
    assert (got[~number] == 7).all()


def test_ue8m0(convert):
    scale = convert("from_ue8m0", U8, np.float32)
    assert_same_bits(scale, mxfp4.block_scale(U8))
    assert_same_bits(scale, U8.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    used = U8[1:254]
    inverse = convert("inverse_ue8m0", used, np.float32)
    assert_same_bits(inverse * scale[1:254], np.ones(253, np.float32))
    amax = np.abs(awkward_floats(np.float32(1.5) * 2.0 ** np.arange(-126, 127)))
    amax = amax[~np.isnan(amax)]
    got = convert("mx_scale_byte", amax, np.uint8)
    assert_same_bits(got, (mxfp4.block_exponent(amax) + 127).astype(np.uint8))


def test_exp(convert):
    x = -np.abs(awkward_floats(np.arange(0, 90, 0.25)))
    x = np.concatenate([x, np.random.default_rng(1).uniform(-90, 0, 1 << 18).astype(np.float32)])
    assert_same_bits(convert("exp_non_positive", x, np.float32), numerics.exp_non_positive(x))


@pytest.mark.slow
def test_e2m1_of_every_float(library):
    library.e2m1_mismatches.restype = ctypes.c_int64
    edges = np.linspace(0, 1 << 32, 65, dtype=np.int64).tolist()

    def piece(i):
        return library.e2m1_mismatches(ctypes.c_int64(edges[i]), ctypes.c_int64(edges[i + 1]))

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(piece, range(64))) == 0
