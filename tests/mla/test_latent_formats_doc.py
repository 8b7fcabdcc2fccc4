"""docs/formats.md, section 9, against the package: packs by the page's formulas in plain loops."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference import mla as model
from tests.cache.test_formats_doc import DOC, encode, power_of_two, table
from tests.support.compare import assert_same_bits
from tests.support.latent import KINDS, SCALE, bits, scale_of, tokens, width
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

PAGE_SIZE, PAGES, PADDING = 3, 2, 16


def put(page, at, data):
    page[at : at + len(data)] = np.frombuffer(data, np.uint8)


def pack(page, row, latent, rope, cache_format, rule):
    """One token into the bytes of a page."""
    channels = np.concatenate([latent, rope])
    first = DOC["latent_row_byte"](row, PAGE_SIZE, cache_format)
    size = len(latent)
    tile = {"fp8_656": 128, "fp8_584": 64}.get(cache_format, 0)
    f = np.float32
    for c, value in enumerate(channels.astype(f)):
        at = first + DOC["latent_channel_byte"](c, cache_format)
        if cache_format == "bf16" or (tile and c >= size):
            put(page, at, channels[c].tobytes())
            continue
        if cache_format == "fp8":
            scale = SCALE[0]
        else:
            amax = max(abs(v) for v in latent[c // tile * tile : c // tile * tile + tile].astype(f))
            exponent = power_of_two(amax, 448, 1e-4)
            scale = f(2.0**exponent) if rule == "pow2" else max(amax / f(448), f(2.0**-126))
            at_scale = DOC["latent_scale_byte"](row, c, PAGE_SIZE, cache_format)
            data = scale.tobytes() if cache_format == "fp8_656" else bytes([exponent + 127])
            put(page, at_scale, data)
        put(page, at, bytes([encode(float(value / scale), "e4m3")]))
    if cache_format == "fp8_584":
        put(page, DOC["latent_scale_byte"](row, 447, PAGE_SIZE, cache_format) + 1, b"\0")


@pytest.mark.parametrize(("cache_format", "rule"), KINDS)
def test_bytes_by_the_page(place, cache_format, rule):
    rng = np.random.default_rng(0)
    latent, rope = tokens(rng, 4, cache_format)
    latent[2, :64], latent[3, 3] = 0, -0.0
    _, dtype = width(cache_format)
    page_bytes = PAGE_SIZE * model.FORMATS[cache_format].token_bytes
    page_bytes += PADDING - page_bytes % 16  # padding, and a multiple of 16
    want = np.full((PAGES, page_bytes), 0xA5, np.uint8)
    slots = [4, 0, 2, 5]
    for i, slot in enumerate(slots):
        page, row = divmod(slot, PAGE_SIZE)
        pack(want[page], row, latent[i], rope[i], cache_format, rule)
    cache = to_paddle(np.full((PAGES, page_bytes), 0xA5, np.uint8).view(dtype), place)
    scale = scale_of(cache_format)
    options = {"cache_format": cache_format, "page_size": PAGE_SIZE}
    F.mla_write_cache(
        to_paddle(latent, place),
        to_paddle(rope, place),
        cache,
        int32(slots, place),
        scale_rule=rule,
        scale=None if scale is None else to_paddle(scale, place),
        **options,
    )
    assert_same_bits(bits(to_numpy(cache)), want, cache_format)
    modelled = reference.mla_write_cache(
        latent,
        rope,
        np.full((PAGES, page_bytes), 0xA5, np.uint8).view(dtype),
        slots,
        scale_rule=rule,
        scale=scale,
        **options,
    )
    assert_same_bits(bits(modelled), want, "model")
    # The values of the token in page 1, row 1, by the page's formulas.
    out = to_paddle(np.zeros((2, len(latent[0]) + 64), BF16), place)
    F.mla_gather_cache(
        cache,
        out,
        int32([[1]], place),
        int32([2], place),
        int32([0, 2], place),
        scale=None if scale is None else to_paddle(scale, place),
        **options,
    )
    assert_same_bits(bits(to_numpy(out)[1]), bits(unpack(want[1], 1, cache_format)))


def unpack(page, row, cache_format):
    """Channels of a token, bf16."""
    size = DOC["LATENT"][cache_format]
    first = DOC["latent_row_byte"](row, PAGE_SIZE, cache_format)
    values = np.zeros(size + 64, BF16)
    for c in range(size + 64):
        at = first + DOC["latent_channel_byte"](c, cache_format)
        if cache_format == "bf16" or (cache_format in ("fp8_656", "fp8_584") and c >= size):
            values[c] = page[at : at + 2].view(BF16)[0]
            continue
        if cache_format == "fp8":
            scale = SCALE[0]
        else:
            at_scale = DOC["latent_scale_byte"](row, c, PAGE_SIZE, cache_format)
            scale = (
                page[at_scale : at_scale + 4].view(np.float32)[0]
                if cache_format == "fp8_656"
                else np.float32(DOC["ue8m0_value"](int(page[at_scale])))
            )
        values[c] = BF16.type(np.float32(DOC["e4m3_value"](int(page[at]))) * scale)
    return values


def test_a_v41_token_by_the_page(place):
    """528 bytes are only read: every byte may be a code or a scale, NaN among them."""
    rng = np.random.default_rng(2)
    page_bytes = PAGE_SIZE * 528 + PADDING
    cache = rng.integers(0, 256, (PAGES, page_bytes)).astype(np.uint8)
    scales = cache[:, PAGE_SIZE * 512 : PAGE_SIZE * 528]
    scales[:] = np.where(rng.random(scales.shape) < 0.8, scales % 40 + 107, scales)
    out = to_paddle(np.zeros((PAGE_SIZE, 512), BF16), place)
    F.mla_gather_cache(
        to_paddle(cache, place),
        out,
        int32([[1]], place),
        int32([PAGE_SIZE], place),
        int32([0, PAGE_SIZE], place),
        cache_format="fp8_528",
        page_size=PAGE_SIZE,
    )
    want = np.array([unpack(cache[1], row, "fp8_528") for row in range(PAGE_SIZE)])
    assert 0 < np.isnan(want.astype(np.float32)).sum() < want.size // 2
    assert_same_bits(to_numpy(out), want)


def test_table_of_formats():
    rows = table("`cache_format` | L")
    assert [row[0].strip("`") for row in rows] == list(model.FORMATS)
    for name, latent, _, _, together in rows:
        fmt = model.FORMATS[name.strip("`")]
        assert (int(latent), together) == (fmt.latent, f"{fmt.token_bytes} B")
        assert DOC["LATENT"][name.strip("`")] == fmt.latent
        assert DOC["ROW_BYTES"][name.strip("`")] == fmt.row_bytes


def test_codes_and_scales_of_the_output_by_the_page():
    rng = np.random.default_rng(1)
    tokens, heads, groups = 5, 6, 3
    x = rng.normal(size=(tokens, heads, 512)).astype(BF16)
    table = np.repeat(np.float32([[1, 0]]), 32, axis=1)  # rotates by nothing
    given = to_paddle(x), to_paddle(np.zeros(tokens, np.int64)), to_paddle(table)
    results = F.inverse_rope_quantize_fp8(*given, num_groups=groups)
    codes, scales = (to_numpy(a).ravel() for a in results)
    seen = np.zeros(len(scales), bool)
    for t in range(tokens):
        for h in range(heads):
            for c in range(512):
                block = x[t, h, c // 128 * 128 : c // 128 * 128 + 128].astype(np.float32)
                scale = 2.0 ** power_of_two(np.abs(block).max(), 448, 1e-10)
                at = DOC["output_scale"](t, h, c, tokens, heads, groups)
                seen[at] = True
                assert scales[at] == scale
                code = encode(float(x[t, h, c]) / scale, "e4m3")
                assert codes[DOC["output_code"](t, h, c, tokens, heads, groups)] == code
    assert (scales[~seen] == 0).all()
    assert scales.reshape(groups, 8, 8)[..., tokens:].any() == 0
