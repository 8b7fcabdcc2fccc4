"""docs/formats.md against the package: packs by the page's own formulas, in plain loops.

The page's Python blocks are executed as they stand there, so the page cannot drift away from them.
"""

from __future__ import annotations

import math
import re

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference import indexer, layout, mxfp4, numerics
from tests.support import ROOT
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, E4M3, E5M2, int32, to_numpy, to_paddle

PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
RNG = np.random.default_rng


def _page_formulas():
    namespace = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    assert len(blocks) >= 8
    for block in blocks:
        exec(compile(block, "docs/formats.md", "exec"), namespace)
    return namespace


DOC = _page_formulas()
LAYOUTS = ("fastattn", "fastdeploy", "logical")


def table(header):
    """Cells of the page's table whose first header cell is `header`, without its two head lines."""
    start = PAGE.index(f"| {header} |")
    lines = PAGE[start:].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- codes -------------------------------------------------------------------------------------


def nearest_code(x, values, is_even):
    """The code of a value by the page's rule, by trying all; `values` maps codes to numbers."""
    best = None
    for code, value in values.items():
        key = (abs(value - x), not is_even(code, value))
        if best is None or key < best[0]:
            best = key, code
    return best[1]


def finite(value_of, codes):
    return {c: value_of(c) for c in codes if math.isfinite(value_of(c))}


def code_even(code, value):
    return code % 2 == 0


def integer_even(code, value):
    return value % 2 == 0


CODES = {
    "e4m3": (finite(DOC["e4m3_value"], range(256)), code_even),
    "e5m2": (finite(DOC["e5m2_value"], range(256)), code_even),
    "int8": (finite(DOC["int8_value"], [c for c in range(256) if c != 128]), integer_even),
    "int4": (finite(DOC["int4_value"], range(16)), integer_even),
    "e2m1": (finite(DOC["e2m1_value"], range(16)), code_even),
}


def encode(x, code):
    """The page's code of a finite number: nearest, ties to even, saturating, the sign kept."""
    if math.isnan(x):
        return {"e4m3": 0x7F, "e5m2": 0x7F, "int8": 0, "int4": 8, "e2m1": 7}[code]
    values, is_even = CODES[code]
    if code == "int4":
        return nearest_code(max(-8, min(7, x)), values, is_even)
    top = max(values.values())
    x = max(-top, min(top, x))
    if code == "int8":
        return nearest_code(x, values, is_even)
    negative = math.copysign(1, x) < 0
    half = len(values) // 2
    assert half * 2 == len(values)
    side = {c: v for c, v in values.items() if (math.copysign(1, v) < 0) == negative}
    return nearest_code(x, side, is_even)


def test_values_of_all_codes():
    for code in range(256):
        byte = np.array([code], np.uint8)
        for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2), ("int8", np.int8)):
            value = DOC[f"{name}_value"](code)
            assert_same_bits(np.float32([value]), byte.view(dtype).astype(np.float32), name)
        with np.errstate(over="ignore"):
            expected = mxfp4.block_scale(byte).astype(np.float64)
        assert_same_bits(np.float64([DOC["ue8m0_value"](code)]), expected)
    for code in range(16):
        assert_same_bits(
            np.float32([DOC["e2m1_value"](code)]), numerics.from_e2m1(np.array([code], np.uint8))
        )


def test_code_table():
    for name, *_ in table("code"):
        assert name in ("e4m3", "e5m2", "int8", "int4", "E2M1", "UE8M0")
    assert DOC["e4m3_value"](0x7E) == 448 and DOC["e5m2_value"](0x7B) == 57344
    assert DOC["ue8m0_value"](0xFE) == 2.0**127 and DOC["e2m1_value"](7) == 6
    assert DOC["e5m2_value"](0x7C) == math.inf and DOC["e5m2_value"](0xFC) == -math.inf
    nan = [c for c in range(256) if math.isnan(DOC["e4m3_value"](c))]
    assert nan == [0x7F, 0xFF]
    nan = [c for c in range(256) if math.isnan(DOC["e5m2_value"](c))]
    assert nan == [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]


@pytest.mark.parametrize("code", CODES)
def test_rounding_to_codes(code):
    values = sorted(set(CODES[code][0].values()))
    ties = [(a + b) / 2 for a, b in zip(values, values[1:])]
    some = [v * (1 + e) for v in values[::5] for e in (-1e-6, 1e-6)]
    special = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e30, -1e30]
    numbers = np.float32(values + ties + some + special)
    to_codes = numerics.to_e2m1 if code == "e2m1" else (lambda x: numerics.to_codes(x, code))
    got = to_codes(numbers)
    for x, c in zip(numbers.tolist(), got.tolist()):
        assert encode(x, code) == c, (x, c)


# ---- caches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["k", "v"])
def test_offsets(kind, name, head_dim):
    expected = layout.offsets(kind, name, head_dim)
    seen = set()
    for r in range(64):
        for d in range(head_dim):
            offset = DOC[f"{name}_{kind}"](r, d, head_dim)
            assert offset == expected[r, d], (r, d)
            seen.add(offset)
    assert seen == set(range(64 * head_dim))


def test_example_table():
    rows = table("(r, d)")
    assert len(rows) == 10
    for where, *cells in rows:
        r, d = (int(x) for x in where.strip("()").split(","))
        want = [
            DOC[name](r, d, 128)
            for name in ("fastattn_k", "fastattn_v", "fastdeploy_k", "fastdeploy_v", "logical_k")
        ]
        assert [int(c) for c in cells] == want, where


def test_token_order_as_written():
    text = re.search(r"in the order ([\d,\s]+\d)", PAGE)[1]
    order = [int(x) for x in text.replace("\n", " ").split(",")]
    assert sorted(range(16), key=DOC["token_slot"]) == order


def pack_cache(codes, kind, name, int8):
    """Bytes of a cache from codes [num_blocks, KV, 64, D] by the page's rules."""
    blocks, heads, _, dim = codes.shape
    out = bytearray(codes.size)
    for block in range(blocks):
        for head in range(heads):
            for r in range(64):
                for d in range(dim):
                    code = int(codes[block, head, r, d])
                    if name == "fastdeploy" and int8:
                        code = DOC["fastdeploy_int8_byte"](code)
                    at = DOC["cache_byte"](
                        block, head, DOC[f"{name}_{kind}"](r, d, dim), heads, dim
                    )
                    out[at] = code
    return np.frombuffer(bytes(out), np.uint8)


@pytest.mark.parametrize("cache_quant_type", ["cache_int8", "cache_fp8"])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_convert_cache_layout(place, kind, cache_quant_type):
    codes = RNG(1).integers(0, 256, (2, 3, 64, 64)).astype(np.uint8)
    int8 = cache_quant_type == "cache_int8"
    packed = {name: pack_cache(codes, kind, name, int8) for name in LAYOUTS}
    for src in LAYOUTS:
        shape = layout.cache_shape(kind, src, 2, 3, 64)
        for dst in LAYOUTS:
            args = {"kind": kind, "cache_quant_type": cache_quant_type, "src": src, "dst": dst}
            cache = packed[src].reshape(shape)
            modelled = reference.convert_cache_layout(cache, **args)
            assert_same_bits(modelled.ravel(), packed[dst], f"model {src} -> {dst}")
            got = to_numpy(F.convert_cache_layout(to_paddle(cache, place), **args))
            assert got.shape == layout.cache_shape(kind, dst, 2, 3, 64)
            assert_same_bits(got.ravel(), packed[dst], f"{src} -> {dst}")


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_rotation_of_keys(head_dim):
    rows = np.random.default_rng(head_dim).normal(size=(5, head_dim)).astype(np.float32)
    page = [DOC["hadamard_rotate"](list(row)) for row in rows]
    assert_same_bits(np.array(page, np.float32), reference.hadamard(rows), "rotated")


#: Codes of K and V.
DYNAMIC = {
    "block_wise_int8": ("int8", "int8"),
    "block_wise_fp8": ("e4m3", "e4m3"),
    "block_wise_int4": ("int4", "int4"),
    "block_wise_mxfp4": ("e2m1", "e2m1"),
    "block_wise_k8v4": ("int8", "int4"),
    "block_wise_kfp8v4": ("e4m3", "int4"),
}
QMAX = {"int8": 127.0, "e4m3": 448.0, "int4": 8.0, "e2m1": 6.0}
NIBBLES = ("int4", "e2m1")


def put_code(target, kind, block, r, d, head, heads, dim, code, name):
    """Store a code of format `name` in a cache in layout fastattn, by the page's rules."""
    if name not in NIBBLES:
        at = DOC["cache_byte"](block, head, DOC[f"fastattn_{kind}"](r, d, dim), heads, dim)
        target[at] = code
        return
    row, byte, shift = dim // 2, DOC["nibble_byte"](d), DOC["nibble_shift"](d)
    at = DOC["cache_byte"](block, head, DOC[f"fastattn_{kind}"](r, byte, row), heads, row)
    target[at] = target[at] & ~(15 << shift) | code << shift


@pytest.mark.parametrize("cache_quant_type", DYNAMIC)
def test_write_cache_kv_with_dynamic_scales(place, cache_quant_type):
    code_of = dict(zip("kv", DYNAMIC[cache_quant_type]))
    heads, dim, cached = 2, 64, 62
    rng = RNG(2)
    new = {"k": rng.normal(size=(4, heads, dim)), "v": rng.normal(size=(4, heads, dim))}
    new = {kind: x.astype(np.float32) for kind, x in new.items()}
    new["v"][1, 0] = 0
    block_table = [2, 0]
    rows = {kind: dim // 2 if code in NIBBLES else dim for kind, code in code_of.items()}
    want = {kind: bytearray(b"\xa5" * (3 * heads * 64 * row)) for kind, row in rows.items()}
    mx = code_of["k"] == "e2m1"
    size = 3 * heads * 64 * (dim // 32 if mx else 1)
    scales = {kind: np.zeros(size, np.uint8 if mx else np.float32) for kind in "kv"}
    f = np.float32
    for kind, code in code_of.items():
        for i in range(4):
            block, r = block_table[(cached + i) // 64], (cached + i) % 64
            for head in range(heads):
                x = new[kind][i, head]
                scale = max(f(max(abs(v) for v in x)), f(1e-6)) / f(QMAX[code])
                if mx:
                    for c in range(dim // 32):
                        at = DOC["block_scale_index"](block, head, r, 32 * c, heads, dim)
                        amax = max(abs(v) for v in x[32 * c :][:32])
                        scales[kind][at] = 127 + power_of_two(amax, 6, 6 * 2.0**-126)
                        scale = DOC["ue8m0_value"](int(scales[kind][at]))
                        for d in range(32 * c, 32 * c + 32):
                            where = (block, r, d, head, heads, dim)
                            found = encode(float(x[d]) / scale, code)
                            put_code(want[kind], kind, *where, found, code)
                    continue
                if code == "int4":
                    scale = f(DOC["int4_scale"]([float(v) for v in x], float(f(1e-6))))
                scales[kind][DOC["dynamic_scale_index"](block, head, r, heads)] = scale
                for d in range(dim):
                    found = encode(float(x[d] * (f(1) / scale)), code)
                    where = (block, r, d, head, heads, dim)
                    put_code(want[kind], kind, *where, found, code)
    tensors = {
        "k": to_paddle(np.full((3, heads, 64, rows["k"]), 0xA5, np.uint8), place),
        "v": to_paddle(np.full((3, heads, rows["v"], 64), 0xA5, np.uint8), place),
    }
    shape = (3, heads, 64, dim // 32) if mx else (3, heads, 64)
    empty = np.zeros(shape, scales["k"].dtype)
    scale_tensors = {kind: to_paddle(empty, place) for kind in "kv"}
    F.write_cache_kv(
        to_paddle(new["k"], place),
        to_paddle(new["v"], place),
        tensors["k"],
        tensors["v"],
        int32([block_table], place),
        int32([0, 4], place),
        int32([cached], place),
        int32([4], place),
        cache_k_scales=scale_tensors["k"],
        cache_v_scales=scale_tensors["v"],
        cache_quant_type=cache_quant_type,
    )
    for kind in "kv":
        expected = np.frombuffer(bytes(want[kind]), np.uint8)
        assert_same_bits(to_numpy(tensors[kind]).ravel(), expected, kind)
        assert_same_bits(to_numpy(scale_tensors[kind]).ravel(), scales[kind], f"{kind} scales")


@pytest.mark.parametrize("name", ["fastattn", "fastdeploy"])
@pytest.mark.parametrize("cache_quant_type", ["cache_int8", "cache_fp8", *DYNAMIC])
def test_append_cache_kv_c8_reads_the_packed_bytes(place, cache_quant_type, name):
    static = ("int8" if "int8" in cache_quant_type else "e4m3",) * 2
    code_of = dict(zip("kv", DYNAMIC.get(cache_quant_type, static)))
    if name == "fastdeploy" and set(code_of.values()) & set(NIBBLES):
        pytest.skip("no such layout")
    mx = code_of["k"] == "e2m1"
    blocks, heads, dim, cached = 2, 2, 128, 70
    rng = RNG(7)
    values = {kind: CODES[code][0] for kind, code in code_of.items()}
    codes, caches, scales = {}, {}, {}
    for kind, code in code_of.items():
        codes[kind] = rng.choice(list(values[kind]), (blocks, heads, 64, dim)).astype(np.uint8)
        stored = codes[kind]
        if code in NIBBLES:
            stored = np.zeros((*stored.shape[:3], dim // 2), np.uint8)
            for d in range(dim):
                stored[..., DOC["nibble_byte"](d)] |= codes[kind][..., d] << DOC["nibble_shift"](d)
        packed = pack_cache(stored, kind, name, code == "int8")
        caches[kind] = packed.reshape(
            layout.cache_shape(kind, name, blocks, heads, stored.shape[3])
        )
        size = blocks * heads * 64 if cache_quant_type in DYNAMIC else heads
        scales[kind] = rng.uniform(0.5, 2, size).astype(np.float32)
        if mx:
            scales[kind] = rng.integers(110, 140, size * dim // 32).astype(np.uint8)
    shape = (blocks, heads, 64) if cache_quant_type in DYNAMIC else (heads,)
    if mx:
        shape = (*shape, dim // 32)
    out = {kind: to_paddle(np.zeros((cached, heads, dim), BF16), place) for kind in "kv"}
    F.append_cache_kv_c8(
        to_paddle(caches["k"], place),
        to_paddle(caches["v"], place),
        out["k"],
        out["v"],
        int32([[1, 0]], place),
        int32([cached], place),
        int32([0, cached], place),
        cache_k_scales=to_paddle(scales["k"].reshape(shape), place),
        cache_v_scales=to_paddle(scales["v"].reshape(shape), place),
        dynamic_quant=cache_quant_type in DYNAMIC,
        cache_quant_type=cache_quant_type,
        cache_layout=name,
    )
    for kind in "kv":
        want = np.zeros((cached, heads, dim), np.float32)
        for i in range(cached):
            block, r = [1, 0][i // 64], i % 64
            for head in range(heads):
                index = DOC["dynamic_scale_index"](block, head, r, heads)
                scale = scales[kind][index if cache_quant_type in DYNAMIC else head]
                for d in range(dim):
                    if mx:
                        at = DOC["block_scale_index"](block, head, r, d, heads, dim)
                        scale = np.float32(DOC["ue8m0_value"](int(scales[kind][at])))
                    value = values[kind][codes[kind][block, head, r, d]]
                    want[i, head, d] = scale * np.float32(value)
        assert_same_bits(to_numpy(out[kind]), want.astype(BF16), kind)


# ---- MXFP4 and the indexer ---------------------------------------------------------------------


def power_of_two(amax, qmax, floor):
    """Exponent of the smallest power of two p with ``p * qmax >= max(amax, floor)``."""
    amax = max(float(amax), float(np.float32(floor)))
    exponent = -140
    while 2.0**exponent * qmax < amax:
        exponent += 1
    return exponent


def pack_mxfp4(x):
    """Code bytes and scale bytes of a row of C channels."""
    codes, scales = bytearray(len(x) // 2), bytearray(len(x) // 32)
    for c, value in enumerate(x):
        block = c // 32 * 32
        exponent = power_of_two(max(abs(v) for v in x[block : block + 32]), 6, 6 * 2.0**-126)
        scales[DOC["mxfp4_scale_byte"](c)] = exponent + 127
        nibble = encode(float(value) * 2.0**-exponent, "e2m1")
        codes[DOC["mxfp4_code_byte"](c)] |= nibble << DOC["mxfp4_code_shift"](c)
        assert abs(float(value)) <= 6 * DOC["ue8m0_value"](exponent + 127)
    return bytes(codes), bytes(scales)


def pack_fp8(x):
    """Code bytes and the exponent of the power-of-two scale of a block."""
    exponent = power_of_two(max(abs(v) for v in x), 448, 1e-4)
    return bytes(encode(float(v) * 2.0**-exponent, "e4m3") for v in x), exponent


def some_rows(rows, channels, seed):
    rng = RNG(seed)
    x = rng.normal(size=(rows, channels)) * np.exp(2 * rng.normal(size=(rows, 1)))
    x[0, 0] = -0.0
    x[-1, :32] = 0
    return x.astype(BF16)


def test_mxfp4_tensor(place):
    x = some_rows(3, 128, 3)
    modelled = reference.mxfp4_quantize(x)
    stored = [to_numpy(t) for t in F.mxfp4_quantize(to_paddle(x, place))]
    for row in range(3):
        want = pack_mxfp4(x[row].astype(np.float32).tolist())
        for codes, scales in (modelled, stored):
            assert (codes[row].tobytes(), scales[row].tobytes()) == want


def identity_table(positions):
    return np.repeat(np.float32([[1.0, 0.0]]), 32, axis=1).repeat(positions, axis=0)


@pytest.mark.parametrize("quant", ["fp8", "mxfp4"])
def test_indexer_query(place, quant):
    x = some_rows(4, 128, 4)
    weights = RNG(5).normal(size=(2, 2)).astype(np.float32)
    codes, scales, folded = F.indexer_q_rope_quant(
        to_paddle(np.zeros(2, np.int64), place),
        to_paddle(x.reshape(2, 2, 128), place),
        to_paddle(identity_table(1), place),
        to_paddle(weights, place),
        0.3,
        0.7,
        quant=quant,
    )
    codes, scales, folded = (to_numpy(t) for t in (codes, scales, folded))
    f = np.float32
    for i in range(4):
        t, h = divmod(i, 2)
        values = x[i].astype(np.float32).tolist()
        if quant == "fp8":
            want, exponent = pack_fp8(values)
            assert scales.dtype == np.float32 and scales[t, h] == 2.0**exponent
            weight = ((weights[t, h] * scales[t, h]) * f(0.3)) * f(0.7)
        else:
            want, bytes_ = pack_mxfp4(values)
            assert scales.dtype == np.int32
            assert int(scales[t, h]).to_bytes(4, "little", signed=True) == bytes_
            weight = (weights[t, h] * f(0.3)) * f(0.7)
        assert codes[t, h].tobytes() == want
        assert folded[t, h] == weight


def test_page_table():
    for quant, head, codes, scales, together in table("`quant` | HEAD"):
        quant = quant.strip("`")
        code_bytes, scale_bytes = DOC["PAGE_BYTES"][quant]
        assert indexer.PAGE_FORMATS[quant] == (int(head), code_bytes, scale_bytes)
        assert codes.startswith(f"{code_bytes} B") and scales.startswith(f"{scale_bytes} B")
        assert together == f"{code_bytes + scale_bytes} B"


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("quant", list(DOC["PAGE_BYTES"]))
def test_indexer_page(place, quant, ratio):
    """One visible row a group, so that a key is known; the RMSNorm weight undoes the norm."""
    head = indexer.PAGE_FORMATS[quant].head_dim
    n, state_block = 3, 8
    keys = some_rows(2, head, 6).astype(np.float32)
    # Values of one magnitude, so that the norm is exact; the weight brings the key's channels.
    width = head * (2 if ratio == 4 else 1)
    positions = [ratio - 1, 2 * ratio - 1]
    blocks = 2 * ratio // state_block
    cache = np.full((2, n * sum(DOC["PAGE_BYTES"][quant]) + 8), 0xA5, np.uint8)
    want = cache.copy()
    slots = [2, 4]
    for position, slot, key in zip(positions, slots, keys):
        state = np.full((blocks, state_block, 2 * width), np.nan, np.float32)
        first = position - (2 * ratio if ratio == 4 else ratio) + 1
        for p in range(max(first, 0), position + 1):
            half = 1 if ratio == 4 and p > position - ratio else 0
            for d in range(head):
                value, score = DOC["state_element"](p, d, half, head, ratio)
                row = state[blocks - 1 - p // state_block, p % state_block]
                row[value] = 4.0 if p == position - 1 else 9.0
                row[score] = 0.5 if p == position - 1 else -np.inf
        result = F.indexer_kv_compress_insert(
            to_paddle(state, place),
            int32([list(range(blocks))[::-1]], place),
            int32([0], place),
            int32([position], place),
            int32([0], place),
            int32([slot], place),
            to_paddle(key, place),
            to_paddle(identity_table(300), place),
            to_paddle(cache, place),
            compress_ratio=ratio,
            page_size=n,
            rms_norm_eps=0.0,
            quant=quant,
        )
        cache = to_numpy(result).copy()
        codes, scales = page_token(key.astype(BF16).astype(np.float32).tolist(), quant)
        page, row = slot // n, slot % n
        at = DOC["page_code_byte"](row, n, quant)
        want[page, at : at + len(codes)] = np.frombuffer(codes, np.uint8)
        at = DOC["page_scale_byte"](row, n, quant)
        want[page, at : at + len(scales)] = np.frombuffer(scales, np.uint8)
        assert_same_bits(cache, want)


@pytest.mark.parametrize("rule", ["pow2", "amax", "amax_div"])
@pytest.mark.parametrize("quant", ["fp8", "mxfp4"])
def test_index_keys(place, quant, rule):
    """Pages of index keys by the page's formulas, and gathered again."""
    if quant == "mxfp4" and rule != "pow2":
        pytest.skip("MXFP4 has powers of two only")
    n, slots, f = 3, [4, 2, 0], np.float32
    keys = some_rows(3, 128, 8)
    cache = np.full((2, n * sum(DOC["PAGE_BYTES"][quant]) + 5), 0xA5, np.uint8)
    want, tokens = cache.copy(), []
    for slot, key in zip(slots, keys.astype(np.float32)):
        if rule == "pow2":
            codes, scales = page_token(key.tolist(), quant)
        else:
            scale = max(f(max(abs(v) for v in key)), f(1e-4)) / f(448)
            divides = rule == "amax_div"
            quotients = (v / scale if divides else v * (f(1) / scale) for v in key)
            codes = bytes(encode(float(v), "e4m3") for v in quotients)
            scales = np.array([scale], "<f4").tobytes()
        tokens.append((codes, scales))
        page, row = slot // n, slot % n
        at = DOC["page_code_byte"](row, n, quant)
        want[page, at : at + len(codes)] = np.frombuffer(codes, np.uint8)
        at = DOC["page_scale_byte"](row, n, quant)
        want[page, at : at + 4] = np.frombuffer(scales, np.uint8)
    tensor = to_paddle(cache, place)
    F.indexer_k_write_cache(
        to_paddle(keys, place), tensor, int32(slots, place),
        quant=quant, scale_rule=rule, page_size=n,
    )  # fmt: skip
    assert_same_bits(to_numpy(tensor), want)
    codes, scales = F.indexer_k_gather(
        tensor, int32([[1], [0]], place), int32([0, 2, 5], place), 5, quant=quant, page_size=n
    )
    assert scales.dtype == (paddle.float32 if quant == "fp8" else paddle.int32)
    for token, row in ((0, 1), (1, 4), (2, 2)):  # slots 4, 2 and 0
        assert to_numpy(codes)[row].tobytes() == tokens[token][0]
        assert to_numpy(scales)[row : row + 1].tobytes() == tokens[token][1]


def page_token(key, quant):
    """Code bytes and scale bytes of a bf16-rounded key."""
    if quant == "mxfp4":
        return pack_mxfp4(key)
    if quant == "fp8":
        codes, exponent = pack_fp8(key)
        return codes, np.array([2.0**exponent], "<f4").tobytes()
    codes, scales = b"", b""
    for b in range(7):
        block, exponent = pack_fp8(key[64 * b : 64 * b + 64])
        codes += block
        scales += bytes([exponent + 127])
    codes += np.array(key[448:], BF16).tobytes()
    return codes, scales + b"\0"


# ---- summaries of key blocks ---------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", ["mean", "minmax", "pooled"])
def test_summaries_of_key_blocks(granularity, kind, place):
    rng, tokens, kv, dim = RNG(3), 150, 2, 64
    key = rng.normal(0.5, 1, (tokens, kv, dim)).astype(BF16)
    table, step = [3, 0, 1], [[0, tokens], [0], [tokens]]
    seqs = [int32(x, place) for x in ([table], *step)]
    caches = [to_paddle(np.zeros((4, kv, 64, dim), BF16), place) for _ in range(2)]
    k = to_paddle(key, place)
    F.write_cache_kv(k, k, *caches, *seqs)
    weights = rng.normal(size=(kv, granularity, dim)).astype(np.float32)
    count = DOC["summary_bytes"](kv, dim, granularity, kind) // 4
    rows = 2 if kind == "minmax" else 1
    shape = (4, kv, max(64 // granularity, 1), rows, dim)
    assert count == int(np.prod(shape[1:]))
    summaries = to_paddle(np.zeros(shape, np.float32), place)
    F.update_block_summaries(
        *(summaries, *caches, *seqs),
        granularity=granularity,
        kind=kind,
        pool_weights=to_paddle(weights, place) if kind == "pooled" else None,
    )
    found = to_numpy(summaries).reshape(-1)
    size = min(granularity, 64)
    values = key.astype(np.float64)
    for begin in range(0, tokens, size):
        own = values[begin : begin + size]
        place_of = np.arange(begin, begin + len(own)) % granularity
        for head in range(kv):
            x = own[:, head]
            wanted = {
                "mean": [x.mean(0)],
                "minmax": [x.min(0), x.max(0)],
                "pooled": [(x * weights[head, place_of]).sum(0)],
            }[kind]
            for row, channels in enumerate(wanted):
                at = DOC["summary_index"](
                    *(table[begin // 64], head, begin % 64 // size, row, 0, kv, dim),
                    granularity,
                    kind,
                )
                np.testing.assert_allclose(found[at : at + dim], channels, atol=2e-5)
