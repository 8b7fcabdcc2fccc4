"""mqa_logits and paged_mqa_logits against the fp64 model on the dequantised operands."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.mqa_logits import index_values
from fastattn.reference.mxfp4 import mxfp4_dequantize
from tests.attention.test_gpu_graph import capture
from tests.support.mqa_logits import (
    Codes,
    Pages,
    check_logits,
    magnitude,
    paged_reference,
    poison,
    weights_of,
)
from tests.support.static import run_all_modes
from tests.support.tensors import E4M3, EMPTY_OUTPUTS, int32, skip_slices_on, to_numpy, to_paddle

RNG = np.random.default_rng
QUANTS = ("fp8", "mxfp4")
HEADS_AND_DIMS = [(8, 128), (16, 64), (24, 128), (32, 128), (40, 64), (64, 128), (64, 64)]
#: Sequences: cached and new tokens. Their keys lie one after the other.
SEQS = [(0, 37), (130, 5), (63, 66), (300, 1), (0, 1), (257, 40)]


def ranges(seqs):
    """Starts and ends of causal queries, and all keys."""
    starts, ends, at = [], [], 0
    for cached, new in seqs:
        starts += [at] * new
        ends += [at + cached + i + 1 for i in range(new)]
        at += cached + new
    return np.array(starts), np.array(ends), at


def ragged(q, keys, weights, starts, ends, quant, place, **options):
    options = {name: to_paddle(x, place) if name == "out" else x for name, x in options.items()}
    return F.mqa_logits(
        to_paddle(q.codes, place),
        to_paddle(keys.codes, place),
        to_paddle(weights, place),
        int32(starts, place),
        int32(ends, place),
        k_scales=to_paddle(keys.scales, place),
        q_scales=to_paddle(q.scales, place) if quant == "mxfp4" else None,
        quant=quant,
        **options,
    )


def ragged_model(q, keys, weights, starts, ends, quant, columns=None):
    return reference.mqa_logits(
        q.codes,
        keys.codes,
        weights,
        starts,
        ends,
        k_scales=keys.scales,
        q_scales=q.scales if quant == "mxfp4" else None,
        quant=quant,
        max_seqlen_k=columns,
    )


def ragged_size(q, keys, weights, quant):
    return magnitude(
        q.codes,
        q.scales,
        index_values(keys.codes, keys.scales, quant),
        keys.scales,
        weights,
        quant,
    )


def ragged_case(seed, heads, dim, quant, seqs=SEQS, spread=3):
    rng = RNG(seed)
    starts, ends, total = ranges(seqs)
    q = Codes(rng, (len(starts), heads), dim, quant, spread)
    keys = Codes(rng, (total,), dim, quant, spread)
    return q, keys, weights_of(rng, len(starts), heads), starts, ends


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
def test_prefill_chunks_and_cached_prefixes(place, heads, dim, quant):
    q, keys, weights, starts, ends = ragged_case(0, heads, dim, quant)
    got = to_numpy(ragged(q, keys, weights, starts, ends, quant, place))
    want = ragged_model(q, keys, weights, starts, ends, quant)
    check_logits(got, want, ragged_size(q, keys, weights, quant))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("columns", [1, 131, 341, 500])
def test_columns_from_the_start_of_a_range(place, quant, columns):
    q, keys, weights, starts, ends = ragged_case(1, 32, 128, quant)
    got = ragged(q, keys, weights, starts, ends, quant, place, max_seqlen_k=columns)
    want = ragged_model(q, keys, weights, starts, ends, quant, columns)
    check_logits(to_numpy(got), want)
    for row in range(0, len(starts), 7):  # the model itself: the same cells as without the option
        whole = ragged_model(q, keys, weights, starts, ends, quant)[row]
        count = min(columns, ends[row] - starts[row])
        np.testing.assert_array_equal(
            want[row, :count], whole[starts[row] : starts[row] + count], strict=True
        )


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("heads", [8, 24, 64])
def test_ranges_of_any_kind(place, quant, heads):
    """Empty, reversed, out of the tensor, in no order."""
    rng = RNG(2)
    rows, total = 45, 333
    q, keys = Codes(rng, (rows, heads), 128, quant), Codes(rng, (total,), 128, quant)
    starts, ends = rng.integers(-40, total + 40, rows), rng.integers(-40, total + 40, rows)
    starts[:7] = [0, 5, 70, -(2**31), 2**31 - 1, 332, 0]
    ends[:7] = [0, 5, 7, 2**31 - 1, -(2**31), 333, 1]
    weights = weights_of(rng, rows, heads)
    got = to_numpy(ragged(q, keys, weights, starts, ends, quant, place))
    check_logits(got, ragged_model(q, keys, weights, starts, ends, quant))
    got = ragged(q, keys, weights, starts, ends, quant, place, max_seqlen_k=100)
    check_logits(to_numpy(got), ragged_model(q, keys, weights, starts, ends, quant, 100))


@pytest.mark.parametrize("quant", QUANTS)
def test_keys_that_nobody_sees_are_not_seen(place, quant):
    rng = RNG(3)
    q, keys = Codes(rng, (9, 64), 128, quant), Codes(rng, (400,), 128, quant)
    poison(keys, np.r_[0:101, 203:209, 309:400])
    starts = np.array([101] * 4 + [209] * 5)
    ends = np.array([102, 150, 202, 203, 209, 210, 250, 308, 309])
    weights = weights_of(rng, 9, 64)
    got = to_numpy(ragged(q, keys, weights, starts, ends, quant, place))
    assert not np.isnan(got).any()
    check_logits(got, ragged_model(q, keys, weights, starts, ends, quant))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("heads", [8, 16, 24, 32, 64])
def test_a_nan_stays_where_it_is_seen(place, quant, heads):
    q, keys, weights, starts, ends = ragged_case(4, heads, 128, quant, [(0, 150)])
    poison(keys, np.array([77]))
    poison(q, (140, 3))
    got = to_numpy(ragged(q, keys, weights, starts, ends, quant, place))
    want = ragged_model(q, keys, weights, starts, ends, quant)
    nan = np.zeros(want.shape, bool)
    nan[77:, 77] = True
    nan[140, :141] = True
    np.testing.assert_array_equal(np.isnan(want), nan)
    check_logits(got, want)


@pytest.mark.parametrize("heads", [8, 32, 64])
@pytest.mark.parametrize("size", [0.02, 1.0, 160.0, 1e4])
@pytest.mark.parametrize("weight", [1e-30, 1e28])
def test_codes_and_weights_of_any_size(place, heads, size, weight):
    """From codes near the smallest to none but the largest: products up to 2^24.6."""
    rng = RNG(18)
    q, keys, weights, starts, ends = ragged_case(18, heads, 128, "fp8", [(150, 40), (0, 33)])
    for codes in (q, keys):
        values = rng.standard_normal((*codes.codes.shape[:-1], 128), np.float32)
        codes.codes = np.clip(values * size, -448, 448).astype(E4M3).view(np.uint8)
    weights *= np.float32(weight)
    got = to_numpy(ragged(q, keys, weights, starts, ends, "fp8", place))
    want = ragged_model(q, keys, weights, starts, ends, "fp8")
    check_logits(got / np.float32(weight), want / weight)
    check_logits(got, want, ragged_size(q, keys, weights, "fp8"))


def scale_word(*powers):
    """Scales of one head or key whose blocks have the scales 2^power."""
    return np.array([127 + power for power in powers], np.uint8).view("<i4")[0]


@pytest.mark.parametrize("spread", [13, 14, 15, 20, 60])
@pytest.mark.parametrize("heads", [24, 64])
def test_blocks_of_mxfp4_far_apart(place, heads, spread):
    """A head's blocks may differ by more than FP8 has exponents, and still meet in a product."""
    rng = RNG(5)
    q, keys, weights, starts, ends = ragged_case(5, heads, 128, "mxfp4", [(60, 70)], spread)
    # Large blocks of queries meet small ones of keys, whose products count as much as the others.
    q.scales[::3] = scale_word(spread, 0, 0, 0)
    keys.scales[1::2] = scale_word(0, 0, 0, spread)
    keys.scales[5::7] = scale_word(0, spread, 0, 0)
    q.scales[rng.integers(0, 70, 20), rng.integers(0, heads, 20)] = scale_word(0, 0, spread, 0)
    got = to_numpy(ragged(q, keys, weights, starts, ends, "mxfp4", place))
    want = ragged_model(q, keys, weights, starts, ends, "mxfp4")
    check_logits(got, want, ragged_size(q, keys, weights, "mxfp4"))


def test_mxfp4_zeros_and_exponents_at_both_ends(place):
    q, keys, weights, starts, ends = ragged_case(6, 16, 128, "mxfp4", [(90, 33)])
    keys.codes[7], keys.codes[9, 16:48] = 0, 0x80
    keys.scales[7] = 0x01010101  # as mxfp4_quantize leaves a row of zeros
    keys.scales[9] = 0x7F01017F
    keys.scales[10], q.scales[3] = 0, 0x00FE00FE
    keys.scales[20], q.scales[5, 2] = 0x20202020, 0x70707070
    q.codes[4, 1] = 0
    q.scales[4, 1] = 0x01010101
    got = to_numpy(ragged(q, keys, weights, starts, ends, "mxfp4", place))
    want = ragged_model(q, keys, weights, starts, ends, "mxfp4")
    others = np.r_[0:3, 4:33]
    check_logits(got[others], want[others])


def test_the_values_of_mxfp4_are_those_of_mxfp4_dequantize():
    keys = Codes(RNG(7), (50,), 128, "mxfp4")
    scales = keys.scales.view(np.uint8).reshape(50, 4)
    np.testing.assert_array_equal(
        index_values(keys.codes, keys.scales, "mxfp4"), mxfp4_dequantize(keys.codes, scales)
    )


# ---- pages -------------------------------------------------------------------------------------


def paged(q, pages, weights, lengths, columns, quant, place, cache=None, **options):
    return F.paged_mqa_logits(
        to_paddle(q.codes, place),
        to_paddle(pages.cache, place) if cache is None else cache,
        to_paddle(weights, place),
        int32(lengths, place),
        int32(pages.tables, place),
        columns,
        q_scales=to_paddle(q.scales, place) if quant == "mxfp4" else None,
        quant=quant,
        page_size=pages.page_size,
        **options,
    )


def check_paged(
    place, quant, heads, dim, next_n, lengths, per_row=False, seed=8, holes=False, **layout
):
    rng = RNG(seed)
    lengths = np.array(lengths)
    pages = Pages(rng, lengths, dim, quant, **layout)
    if holes:
        pages.tables[:, 1::5] = -1
    q = Codes(rng, (len(lengths), next_n, heads), dim, quant)
    weights = weights_of(rng, len(lengths) * next_n, heads)
    given = lengths
    if per_row:  # of any order, none above the sequence's
        given = np.maximum(lengths[:, None] - rng.integers(0, 90, (len(lengths), next_n)), -3)
    columns = max(int(lengths.max()) - 2, 1)
    got = to_numpy(paged(q, pages, weights, given, columns, quant, place))
    check_logits(got, paged_reference(q, pages, weights, given, columns, quant))
    return got


LENGTHS = [0, 1, 63, 64, 65, 130, 517, 2, 128]


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("next_n", [1, 2, 3, 5])
@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
def test_decode(place, heads, dim, quant, next_n):
    check_paged(place, quant, heads, dim, next_n, LENGTHS)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("heads", "next_n"), [(64, 1), (64, 2), (32, 4), (8, 3)])
def test_lengths_of_each_row(place, heads, quant, next_n):
    check_paged(place, quant, heads, 128, next_n, LENGTHS, per_row=True)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(
    ("page_size", "padding"),
    [(64, 0), (16, 0), (8, 16), (128, 64), (256, 4), (2, 312), (7, 0), (192, 0), (96, 0)],
)
def test_pages_of_any_size(place, quant, page_size, padding):
    layout = {"page_size": page_size, "padding": padding}
    check_paged(place, quant, 64, 128, 2, [300, 0, 129, 64, 1], **layout)
    check_paged(place, quant, 32, 64, 1, [300, 0, 129, 64, 1], **layout)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("heads", [24, 64])
@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_that_are_not_assigned(place, quant, heads, page_size):
    rng = RNG(9)
    lengths = np.array([400, 70, 256])
    pages = Pages(rng, lengths, 128, quant, page_size=page_size)
    total = len(pages.cache)
    pages.tables[0, [0, 2, 3]] = [-1, total, 2147483647]
    pages.tables[2, 1] = -(2**31)
    q, weights = Codes(rng, (3, 2, heads), 128, quant), weights_of(rng, 6, heads)
    columns = page_size * pages.tables.shape[1] + 9  # past the table's end as well
    lengths[2] = columns
    got = to_numpy(paged(q, pages, weights, lengths, columns, quant, place))
    want = paged_reference(q, pages, weights, lengths, columns, quant)
    assert np.isneginf(want[0, :page_size]).all() and np.isfinite(want[0, page_size])
    check_logits(got, want)


@pytest.mark.parametrize("quant", QUANTS)
def test_all_lengths_zero(place, quant):
    """As at the capture of a CUDA graph."""
    pages = Pages(RNG(10), [0] * 32, 128, quant)
    q, weights = Codes(RNG(10), (32, 1, 64), 128, quant), weights_of(RNG(10), 32, 64)
    got = to_numpy(paged(q, pages, weights, [0] * 32, 4000, quant, place))
    assert np.isneginf(got).all()


@pytest.mark.parametrize("quant", QUANTS)
def test_tables_in_another_order_give_the_same_bits(place, quant):
    rng = RNG(11)
    lengths = [700, 333]
    pages = Pages(rng, lengths, 128, quant)
    q, weights = Codes(rng, (2, 1, 64), 128, quant), weights_of(rng, 2, 64)
    first = to_numpy(paged(q, pages, weights, lengths, 700, quant, place))
    for _ in range(5):
        order = rng.permutation(len(pages.cache))
        pages.cache = pages.cache[order]
        inside = pages.tables < len(order)
        pages.tables[inside] = np.argsort(order)[pages.tables[inside]]
        again = to_numpy(paged(q, pages, weights, lengths, 700, quant, place))
        np.testing.assert_array_equal(again.view(np.uint32), first.view(np.uint32))


@pytest.mark.parametrize("quant", QUANTS)
def test_a_view_of_a_wider_pool(place, quant):
    """Pages that lie further apart than their own bytes, such as those of two layers in turn."""
    skip_slices_on(place)
    rng = RNG(13)
    lengths = [100, 200]
    pages = Pages(rng, lengths, 128, quant, padding=0)
    pool = np.full((len(pages.cache), 2, pages.cache.shape[1]), 0x7F, np.uint8)
    pool[:, 1] = pages.cache
    q, weights = Codes(rng, (2, 1, 64), 128, quant), weights_of(rng, 2, 64)
    cache = to_paddle(pool, place)[:, 1]
    got = to_numpy(paged(q, pages, weights, lengths, 200, quant, place, cache=cache))
    check_logits(got, paged_reference(q, pages, weights, lengths, 200, quant))


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTS)
def test_out_is_written_and_nothing_beside_it(place, quant):
    skip_slices_on(place)
    q, keys, weights, starts, ends = ragged_case(14, 64, 128, quant, [(10, 21), (0, 64)])
    want = to_numpy(ragged(q, keys, weights, starts, ends, quant, place))
    wide = to_paddle(np.full((85, 120), 7, np.float32), place)
    out = wide[:, 5:100]
    result = F.mqa_logits(
        to_paddle(q.codes, place),
        to_paddle(keys.codes, place),
        to_paddle(weights, place),
        int32(starts, place),
        int32(ends, place),
        k_scales=to_paddle(keys.scales, place),
        q_scales=to_paddle(q.scales, place) if quant == "mxfp4" else None,
        quant=quant,
        out=out,
    )
    np.testing.assert_array_equal(to_numpy(result), want)
    written = to_numpy(wide)
    np.testing.assert_array_equal(written[:, 5:100], want)
    assert (written[:, :5] == 7).all() and (written[:, 100:] == 7).all()


@pytest.mark.parametrize("quant", QUANTS)
def test_the_same_bits_at_every_run(place, quant):
    rng = RNG(15)
    q, keys, weights, starts, ends = ragged_case(15, 64, 128, quant, [(500, 60), (0, 100)])
    lengths = [900, 64, 300, 1]
    pages, step = Pages(rng, lengths, 128, quant), Codes(rng, (4, 2, 64), 128, quant)
    step_weights = weights_of(rng, 8, 64)
    first = None
    for _ in range(20):
        runs = [
            to_numpy(ragged(q, keys, weights, starts, ends, quant, place)),
            to_numpy(paged(step, pages, step_weights, lengths, 900, quant, place)),
        ]
        first = runs if first is None else first
        for a, b in zip(runs, first):
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("heads", "dim"), [(64, 128), (32, 128)])
def test_many_tiles(quant, heads, dim):
    """More work than the GPU has multiprocessors: their shares begin anywhere."""
    q, keys, weights, starts, ends = ragged_case(
        16, heads, dim, quant, [(700, 300), (0, 129), (3000, 77)]
    )
    got = to_numpy(ragged(q, keys, weights, starts, ends, quant, "gpu"))
    check_logits(got, ragged_model(q, keys, weights, starts, ends, quant))
    lengths = RNG(17).integers(0, 3000, 40)
    lengths[:4] = [9000, 0, 0, 64]
    check_paged("gpu", quant, heads, dim, 1, lengths)
    check_paged("gpu", quant, heads, dim, 2, lengths, per_row=True)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(
    ("page_size", "length"), [(64, 1), (64, 64), (64, 9000), (192, 9000), (8, 9000), (16, 40000)]
)
def test_one_sequence(quant, page_size, length):
    """All CTAs share its tiles."""
    check_paged("gpu", quant, 64, 128, 1, [length], page_size=page_size)
    check_paged("gpu", quant, 64, 128, 1, [length], holes=True, page_size=page_size)
    check_paged("gpu", quant, 32, 128, 3, [length], per_row=True, page_size=page_size)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(
    ("batch", "most"), [(1, 9000), (3, 2500), (40, 700), (128, 200), (130, 70)]
)
def test_steps_of_like_lengths(quant, batch, most):
    """Where lengths hardly differ, CTAs have tiles of one group each; a few empty ones or a short
    batch of long ones are shared out otherwise."""
    lengths = np.full(batch, most)
    check_paged("gpu", quant, 64, 128, 1, lengths)
    check_paged("gpu", quant, 32, 128, 5, lengths - np.arange(batch) % 7)
    lengths[:: 3 if batch > 3 else 2] = 0
    check_paged("gpu", quant, 64, 128, 1, lengths)
    lengths[-1] = 3 * most
    check_paged("gpu", quant, 64, 128, 2, lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("next_n", [1, 2])
def test_a_cache_larger_than_the_l2(quant, next_n):
    """Tiles arrive out of turn: a warpgroup must not take a stage's earlier phase for its own."""
    rng, heads = RNG(19), 32
    lengths = 8190 - 5 * np.arange(64)
    pages = Pages(rng, lengths, 128, quant)
    q = Codes(rng, (64, next_n, heads), 128, quant)
    weights = weights_of(rng, 64 * next_n, heads)
    caches = [to_paddle(pages.cache, "gpu") for _ in range(3)]
    want = paged_reference(q, pages, weights, lengths, 8190, quant)
    for cache in caches + caches:  # each has driven the others out
        got = paged(q, pages, weights, lengths, 8190, quant, "gpu", cache)
        check_logits(to_numpy(got), want)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
def test_a_graph_follows_lengths_on_the_device(quant):
    rng = RNG(18)
    lengths = np.array([500, 200, 64])
    pages = Pages(rng, lengths, 128, quant)
    q, weights = Codes(rng, (3, 1, 64), 128, quant), weights_of(rng, 3, 64)
    tensors = [to_paddle(x, "gpu") for x in (q.codes, pages.cache, weights)]
    scales = to_paddle(q.scales, "gpu") if quant == "mxfp4" else None
    given, tables = int32([0, 0, 0], "gpu"), int32(pages.tables, "gpu")
    out = to_paddle(np.zeros((3, 500), np.float32), "gpu")

    def step():
        F.paged_mqa_logits(
            *tensors, given, tables, 500, page_size=64, q_scales=scales, quant=quant, out=out
        )

    step()
    with capture() as graph:
        step()
    for now in (lengths, lengths // 2, np.zeros(3, np.int64), lengths - 5):
        given.copy_(int32(now, "gpu"), True)  # in place: the graph has the tensor's address
        graph.replay()
        paddle.device.cuda.synchronize()
        want = paged_reference(q, pages, weights, now, 500, quant)
        check_logits(to_numpy(out), want)
    graph.reset()


def test_no_rows_and_no_keys(place):
    for quant in QUANTS:
        rng = RNG(19)
        q, keys = Codes(rng, (3, 8), 128, quant), Codes(rng, (5,), 128, quant)
        none, weights = Codes(rng, (0, 8), 128, quant), weights_of(rng, 3, 8)
        got = ragged(q, keys, weights, [0] * 3, [0] * 3, quant, place, max_seqlen_k=4)
        assert np.isneginf(to_numpy(got)).all()
        empty = Codes(rng, (0,), 128, quant)
        got = ragged(q, empty, weights, [0] * 3, [9] * 3, quant, place, max_seqlen_k=4)
        assert np.isneginf(to_numpy(got)).all()
        if EMPTY_OUTPUTS:
            got = ragged(none, keys, weights[:0], [], [], quant, place)
            assert got.shape == [0, 5]


def trace_ragged(q, keys, weights, starts, ends, k_scales):
    return F.mqa_logits(q, keys, weights, starts, ends, k_scales=k_scales)


def trace_paged(q, cache, weights, lengths, tables, q_scales, out):
    return F.paged_mqa_logits(
        *(q, cache, weights, lengths, tables, 150),
        q_scales=q_scales,
        quant="mxfp4",
        page_size=64,
        out=out,
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_and_saved(place, dynamic):
    q, keys, weights, starts, ends = ragged_case(20, 16, 128, "fp8", [(9, 20)])
    given = [q.codes, keys.codes, weights, *(x.astype(np.int32) for x in (starts, ends))]
    outputs, _ = run_all_modes(trace_ragged, [*given, keys.scales], place, dynamic=dynamic)
    check_logits(outputs[0], ragged_model(q, keys, weights, starts, ends, "fp8"))
    rng, lengths = RNG(21), np.array([150, 3], np.int32)
    pages, q = Pages(rng, lengths, 128, "mxfp4"), Codes(rng, (2, 2, 8), 128, "mxfp4")
    weights = weights_of(rng, 4, 8)
    out = np.zeros((4, 150), np.float32)
    given = [q.codes, pages.cache, weights, lengths, pages.tables, q.scales, out]
    outputs, inputs = run_all_modes(trace_paged, given, place, dynamic=dynamic)
    check_logits(outputs[0], paged_reference(q, pages, weights, lengths, 150, "mxfp4"))
    np.testing.assert_array_equal(inputs[6], outputs[0])
