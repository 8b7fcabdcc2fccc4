"""mla_write_cache and mla_gather_cache: every byte of the memory around a cache, and of outputs."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference import mla as model
from tests.support.compare import assert_same_bits
from tests.support.indexer import slots_for
from tests.support.latent import KINDS, bits, random_cache, scale_of, tokens, width
from tests.support.static import run_all_modes
from tests.support.strides import default_place, strided
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

RNG = np.random.default_rng
FORMATS = list(model.FORMATS)


def optional(array, place):
    return None if array is None else to_paddle(array, place)


def write(arrays, cache, slots, place, cache_format, scale_rule="pow2", page_size=None):
    latent, rope = (x if isinstance(x, paddle.Tensor) else to_paddle(x, place) for x in arrays)
    result = F.mla_write_cache(
        latent,
        rope,
        cache,
        to_paddle(slots, place),
        cache_format=cache_format,
        scale_rule=scale_rule,
        scale=optional(scale_of(cache_format), place),
        page_size=page_size,
    )
    assert result is cache
    return result


def modelled(arrays, cache, slots, cache_format, scale_rule="pow2", page_size=None):
    return reference.mla_write_cache(
        *arrays,
        cache,
        slots,
        cache_format=cache_format,
        scale_rule=scale_rule,
        scale=scale_of(cache_format),
        page_size=page_size,
    )


@pytest.mark.parametrize("page_size", [1, 2, 64, 256])
@pytest.mark.parametrize(("cache_format", "rule"), KINDS)
def test_bytes(place, cache_format, rule, page_size):
    rng = RNG(0)
    pages = 300 // page_size + 2
    x = tokens(rng, 243, cache_format)
    x[0][3] = 0
    x[0][4] = -0.0
    cache = random_cache(rng, (2 * pages, page_size), cache_format)
    if page_size == 1 and cache_format == "fp8_584":
        pytest.skip("584 bytes a page are no multiple of 16, which a GPU wants: padded pages")
    slots = slots_for(rng, 243, len(cache) * page_size)
    memory = to_paddle(cache.copy(), place)
    write(x, memory, slots, place, cache_format, rule)
    assert_same_bits(
        bits(to_numpy(memory)), bits(modelled(x, cache, slots, cache_format, rule)), cache_format
    )


@pytest.mark.parametrize("slot_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("shape", [(5, 64), (5, 64, 1), (5, 1, 64), (3, 1, 1)])
@pytest.mark.parametrize("cache_format", ["bf16", "fp8", "fp8_656"])
def test_shapes_and_slots(place, cache_format, shape, slot_dtype):
    rng = RNG(1)
    x = tokens(rng, 20, cache_format)
    cache = random_cache(rng, shape, cache_format)
    slots = slots_for(rng, 13, int(np.prod(shape))).astype(slot_dtype)  # fewer than tokens
    tensor = to_paddle(cache.copy(), place)
    write(x, tensor, slots, place, cache_format)
    want = modelled(x, cache, slots, cache_format)
    assert_same_bits(bits(to_numpy(tensor)), bits(want), cache_format)


@pytest.mark.parametrize(
    ("page_size", "page_bytes"), [(1, 592), (2, 1728), (61, 36288), (64, 37440), (256, 149760)]
)
@pytest.mark.parametrize("as_pages", [False, True])
def test_padded_pages(place, page_size, page_bytes, as_pages):
    """DeepSeek-V4 pages: the padding is neither written nor read."""
    rng = RNG(2)
    pages = 600 // page_size + 1
    x = tokens(rng, 211, "fp8_584")
    slots = slots_for(rng, 211, pages * page_size)
    before = np.full((pages, page_bytes), 0xFF, np.uint8)  # codes, scales and bf16 that are NaN
    memory = to_paddle(before.copy(), place)
    if as_pages:
        cache, size = memory, page_size
    else:
        cache = strided(memory, [pages, page_size, 1, 584], [page_bytes, 584, 584, 1])
        size = None
    write(x, cache, slots, place, "fp8_584", page_size=size)
    want = modelled(x, before, slots, "fp8_584", page_size=page_size)
    assert_same_bits(to_numpy(memory), want)
    assert (want[:, page_size * 584 :] == 0xFF).all()
    # And back.
    blocks = rng.permutation(pages)[None]
    count = pages * page_size
    out = to_paddle(np.full((count + 3, 512), 7, BF16), place)
    lengths = [blocks.astype(np.int32), np.array([count], np.int32), np.array([2, count + 2])]
    F.mla_gather_cache(
        cache, out, *(int32(a, place) for a in lengths), cache_format="fp8_584", page_size=size
    )
    back = reference.mla_gather_cache(
        want,
        np.full((count + 3, 512), 7, BF16),
        *lengths,
        cache_format="fp8_584",
        page_size=page_size,
    )
    assert_same_bits(bits(to_numpy(out)), bits(back))


@pytest.mark.parametrize(("cache_format", "rule"), KINDS[:4])
def test_strided_pools(place, cache_format, rule):
    """A layer of a pool whose pages hold all layers; tokens that are parts of wider rows."""
    rng = RNG(3)
    elements, dtype = width(cache_format)
    pool = random_cache(rng, (6, 3, 64), cache_format)
    memory = to_paddle(pool.copy(), place)
    cache = strided(
        memory,
        [6, 64, elements],
        [3 * 64 * elements, elements, 1],
        64 * elements * dtype.itemsize,
    )
    latent, rope = tokens(rng, 75, cache_format)
    rows = np.full((75, 640), np.nan, BF16)
    rows[:, 8:520], rows[:, 528:592] = latent, rope
    wide = to_paddle(rows, place)
    parts = strided(wide, [75, 512], [640, 1], 16), strided(wide, [75, 64], [640, 1], 1056)
    slots = slots_for(rng, 75, 6 * 64)
    write(parts, cache, slots, place, cache_format, rule)
    want = pool.copy()
    want[:, 1] = modelled((latent, rope), pool[:, 1], slots, cache_format, rule)
    assert_same_bits(bits(to_numpy(memory)), bits(want))


@pytest.mark.parametrize("cache_format", ["bf16", "fp8", "fp8_656"])
def test_rows_with_gaps(place, cache_format):
    """Tokens ahead of the layers: ``[pages, page_size, layers, W]``."""
    rng = RNG(4)
    elements, dtype = width(cache_format)
    pool = random_cache(rng, (4, 32, 2), cache_format)
    memory = to_paddle(pool.copy(), place)
    strides = [64 * elements, 2 * elements, 1]
    cache = strided(memory, [4, 32, elements], strides, elements * dtype.itemsize)
    x = tokens(rng, 40, cache_format)
    slots = slots_for(rng, 40, 4 * 32)
    write(x, cache, slots, place, cache_format)
    want = pool.copy()
    want[:, :, 1] = modelled(x, np.ascontiguousarray(pool[:, :, 1]), slots, cache_format)
    assert_same_bits(bits(to_numpy(memory)), bits(want))
    lengths = [np.array([[3, 1]], np.int32), np.array([45], np.int32), np.array([0, 45])]
    out = to_paddle(np.zeros((45, 576), BF16), place)
    scale = scale_of(cache_format)
    F.mla_gather_cache(
        cache,
        out,
        *(int32(a, place) for a in lengths),
        cache_format=cache_format,
        scale=optional(scale, place),
    )
    back = reference.mla_gather_cache(
        np.ascontiguousarray(want[:, :, 1]),
        np.zeros((45, 576), BF16),
        *lengths,
        cache_format=cache_format,
        scale=scale,
    )
    assert_same_bits(bits(to_numpy(out)), bits(back))


SEQS = {
    "block_tables": np.array(
        [[3, 1, 7, -1], [0, -1, 5, 2], [6, 4, 2**31 - 1, 9], [8, 8, 8, 8], [2, 0, 1, 3]], np.int32
    ),
    # Longer than its place, with a page that is not assigned; empty; past its table; negative.
    "seq_lens_decoder": np.array([70, 190, 0, 2**31 - 1, -4], np.int32),
    "cu_seqlens_k": np.array([2, 71, 265, 265, 600, 640], np.int32),
}


@pytest.mark.parametrize("cache_format", FORMATS)
def test_gather(place, cache_format):
    """Random bytes in every page: codes, scales and bf16 that are NaN and infinite, too."""
    rng = RNG(5)
    cache = random_cache(rng, (10, 64), cache_format)
    channels = model.FORMATS[cache_format].latent + 64
    before = rng.normal(size=(620, channels)).astype(BF16)
    out = to_paddle(before.copy(), place)
    scale = scale_of(cache_format)
    result = F.mla_gather_cache(
        to_paddle(cache, place),
        out,
        *(int32(a, place) for a in SEQS.values()),
        cache_format=cache_format,
        scale=optional(scale, place),
    )
    want = reference.mla_gather_cache(
        cache, before, *SEQS.values(), cache_format=cache_format, scale=scale
    )
    assert result is out
    assert_same_bits(bits(to_numpy(out)), bits(want), cache_format)
    same = (bits(want) == bits(before)).all(axis=1)
    assert same[:2].all() and same[71 + 64 : 71 + 128].all() and same[521:].all()
    assert not same[2:71].any() and not same[265:521].any()


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 1100])
def test_gather_of_many_sequences(place, batch):
    """A token's sequence is found whatever the number of sequences, empty ones among them."""
    rng = RNG(6)
    cache = random_cache(rng, (40, 4), "fp8_656")
    lengths = rng.integers(0, 9, batch) * rng.integers(0, 2, batch)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tables = rng.integers(-1, 41, (batch, 2))
    before = np.full((int(starts[-1]) + 1, 576), 3, BF16)
    out = to_paddle(before.copy(), place)
    arrays = [tables, lengths, starts]
    F.mla_gather_cache(
        to_paddle(cache, place), out, *(int32(a, place) for a in arrays), cache_format="fp8_656"
    )
    want = reference.mla_gather_cache(cache, before, *arrays, cache_format="fp8_656")
    assert_same_bits(bits(to_numpy(out)), bits(want))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_gather_reads_only_the_tokens(place, cache_format):
    """NaN in tokens that are not cached, in other pages and behind the tables is not seen."""
    rng = RNG(7)
    x = tokens(rng, 100, cache_format)
    nan = np.full_like(random_cache(rng, (6, 64), cache_format).view(np.uint8), 0xFF)
    cache = nan.view(width(cache_format)[1])
    table, count = [4, 1], 100
    slots = np.array([table[i // 64] * 64 + i % 64 for i in range(count)])
    if cache_format == "fp8_528":  # which no operator writes
        tensor = to_paddle(modelled(x, cache, slots, cache_format), place)
    else:
        tensor = to_paddle(cache.copy(), place)
        write(x, tensor, slots, place, cache_format)
    out = to_paddle(np.zeros((count, x[0].shape[1] + 64), BF16), place)
    F.mla_gather_cache(
        tensor,
        out,
        int32([[*table, 0]], place),
        int32([count], place),
        int32([0, count], place),
        cache_format=cache_format,
        scale=optional(scale_of(cache_format), place),
    )
    got = to_numpy(out).astype(np.float64)
    assert np.isfinite(got).all()
    values = np.concatenate(x, axis=1).astype(np.float64)
    if cache_format == "bf16":
        np.testing.assert_array_equal(got, values)
    elif cache_format != "fp8":
        coded = 512 if cache_format == "fp8_528" else model.FORMATS[cache_format].latent
        np.testing.assert_array_equal(got[:, coded:], values[:, coded:])
        pieces = values[:, :coded].reshape(count, -1, model.FORMATS[cache_format].tile)
        error = np.abs(got[:, :coded].reshape(pieces.shape) - pieces)
        # Half a step of e4m3 next to the largest code, and one of the smallest that there are.
        amax = np.abs(pieces).max(axis=-1, keepdims=True)
        assert (error <= np.maximum(amax, 1e-4) / 14).all()


def test_a_v4_token_is_the_indexers(place):
    """584 bytes: those that indexer_kv_compress_insert stores for the same channels."""
    rng = RNG(8)
    latent, rope = tokens(rng, 65, "fp8_584")
    latent[5], latent[6] = 0, 1e-6
    cache = to_paddle(np.zeros((2, 64, 584), np.uint8), place)
    write((latent, rope), cache, np.arange(65), place, "fp8_584")
    pages = to_numpy(cache).reshape(2, -1)
    for i in range(65):
        channels = np.concatenate([latent[i], rope[i]]).astype(np.float32)
        codes, scales = reference.indexer.token_bytes(channels, "fp8_512")
        page, row = divmod(i, 64)
        assert_same_bits(pages[page, row * 576 : row * 576 + 576], codes, f"token {i}")
        at = 64 * 576 + row * 8
        assert_same_bits(pages[page, at : at + 8], scales, f"scales of token {i}")


@pytest.mark.parametrize("at_end", [False, True])
def test_pools_of_more_than_two_gib(place, at_end):
    """Offsets of 64 bits, in the slot and in the page."""
    rng = RNG(9)
    pages = 2**31 // (64 * 656) + 3
    with default_place(place):
        cache = paddle.empty([pages, 64, 656], dtype="uint8")
    slots = np.arange(64) + ((pages - 1) * 64 if at_end else 0)
    x = tokens(rng, 64, "fp8_656")
    write(x, cache, slots, place, "fp8_656")
    last = strided(cache, [64, 656], [656, 1], int(slots[0]) * 656)
    rows, _ = model.token_bytes(*x, "fp8_656")
    if not (place == "gpu" and paddle.__version__.startswith("2.")):
        assert_same_bits(to_numpy(last.clone()), rows)
    out = to_paddle(np.zeros((64, 576), BF16), place)
    table = [[pages - 1 if at_end else 0]]
    F.mla_gather_cache(
        cache,
        out,
        int32(table, place),
        int32([64], place),
        int32([0, 64], place),
        cache_format="fp8_656",
    )
    want = model.token_values(rows, np.zeros((64, 0), np.uint8), "fp8_656")
    assert_same_bits(bits(to_numpy(out)), bits(want))


def test_nothing_to_do(place):
    empty = to_paddle(np.zeros((0, 512), BF16), place), to_paddle(np.zeros((0, 64), BF16), place)
    cache = to_paddle(np.full((2, 64, 656), 9, np.uint8), place)
    write(empty, cache, np.zeros(0, np.int64), place, "fp8_656")
    x = tokens(RNG(10), 4, "fp8_656")
    write(x, cache, np.zeros(0, np.int32), place, "fp8_656")
    write(x, to_paddle(np.zeros((0, 64, 656), np.uint8), place), np.arange(4), place, "fp8_656")
    assert (to_numpy(cache) == 9).all()
    nobody = int32(np.zeros((0, 3)), place), int32([], place), int32([0], place)
    out = to_paddle(np.full((2, 576), 5, BF16), place)
    F.mla_gather_cache(cache, out, *nobody, cache_format="fp8_656")
    nothing = to_paddle(np.zeros((0, 576), BF16), place)
    one = int32([[0]], place), int32([4], place), int32([0, 4], place)
    F.mla_gather_cache(cache, nothing, *one, cache_format="fp8_656")
    assert (to_numpy(out) == 5).all()


@pytest.mark.parametrize(("cache_format", "rule"), KINDS)
def test_models_of_nothing(place, cache_format, rule):
    """No token, no slot and no page, and a cache without one, as the operators take them."""
    rng = RNG(3)
    x = tokens(rng, 2, cache_format)
    nothing = tuple(part[:0] for part in x)
    for pages, slots, arrays in ((2, 0, nothing), (2, 0, x), (0, 2, x), (0, 0, nothing)):
        cache = random_cache(rng, (pages, 4), cache_format)
        mapping = np.arange(slots)
        want = modelled(arrays, cache, mapping, cache_format, rule)
        assert_same_bits(bits(want), bits(cache), "untouched")
        memory = to_paddle(cache, place)
        if slots:
            write(arrays, memory, mapping, place, cache_format, rule)
        assert_same_bits(bits(to_numpy(memory)), bits(cache), "untouched")
    out = np.ones((3, x[0].shape[1] + 64), BF16)
    table, length, starts = (np.array(a, np.int32) for a in ([[0]], [3], [0, 3]))
    options = {"cache_format": cache_format, "scale": scale_of(cache_format)}
    got = reference.mla_gather_cache(cache, out, table, length, starts, **options)
    assert_same_bits(bits(got), bits(out), "untouched")


def write_656(latent, rope, cache, slots):
    return F.mla_write_cache(latent, rope, cache, slots, cache_format="fp8_656", scale_rule="amax")


def write_pages(latent, rope, cache, slots):
    return F.mla_write_cache(latent, rope, cache, slots, cache_format="fp8_584", page_size=8)


def write_fp8(latent, rope, cache, slots, scale):
    return F.mla_write_cache(latent, rope, cache, slots, cache_format="fp8", scale=scale)


def gather_584(cache, out, tables, lengths, starts):
    return F.mla_gather_cache(cache, out, tables, lengths, starts, cache_format="fp8_584")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [write_656, write_pages, write_fp8])
def test_traced_and_saved(place, function, dynamic):
    rng = RNG(11)
    name = {write_656: "fp8_656", write_pages: "fp8_584", write_fp8: "fp8"}[function]
    x, slots = tokens(rng, 9, name), slots_for(rng, 9, 24)
    options = {"cache_format": name, "scale_rule": "amax" if name == "fp8_656" else "pow2"}
    cache = random_cache(rng, (3, 8), name)
    if function is write_pages:
        cache, options["page_size"] = rng.integers(0, 256, (3, 4736)).astype(np.uint8), 8
    given = [*x, cache, slots]
    if name == "fp8":
        options["scale"] = scale_of(name)
        given.append(scale_of(name))
    outputs, inputs = run_all_modes(function, given, place, dynamic=dynamic)
    want = reference.mla_write_cache(*given[:4], **options)
    assert_same_bits(outputs[0], want)
    assert_same_bits(inputs[2], want)


def test_gather_traced_and_saved(place):
    rng = RNG(12)
    given = [
        random_cache(rng, (3, 8), "fp8_584"),
        rng.normal(size=(20, 512)).astype(BF16),
        np.array([[2, 0], [1, -1]], np.int32),
        np.array([11, 8], np.int32),
        np.array([0, 11, 19], np.int32),
    ]
    want = reference.mla_gather_cache(*given, cache_format="fp8_584")
    outputs, inputs = run_all_modes(gather_584, given, place)
    assert_same_bits(outputs[0], want)
    assert_same_bits(inputs[1], want)
