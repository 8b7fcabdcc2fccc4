"""mla_attention against NumPy in float64, on the dequantised cache."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from tests.support.compare import assert_same_bits
from tests.support.graph import capture
from tests.support.latent import SCALE, width
from tests.support.mla_dense import UNASSIGNED, Problem, assert_close, assert_outputs_close
from tests.support.static import run_all_modes
from tests.support.strides import strided
from tests.support.tensors import BF16, EMPTY_OUTPUTS, int32, to_numpy, to_paddle

FORMATS = ["bf16", "fp8", "fp8_656", "fp8_584", "fp8_528"]
# Decode, chunks, whole prompts, inactive and empty sequences.
MIXED = ([0, 130, 63, 0, 64, 517, 5], [1, 1, 2, 0, 70, 1, 3])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_mixed_batch(place, cache_format, causal):
    Problem(*MIXED, cache_format=cache_format, gap=2).check(place, causal=causal)


@pytest.mark.parametrize("heads", [1, 3, 8, 16, 24, 64, 100, 128])
def test_heads(place, heads):
    """No padding, whatever the number."""
    Problem([70, 0, 200], [2, 5, 1], heads=heads, seed=heads).check(place)


@pytest.mark.parametrize("page_size", [1, 7, 8, 16, 32, 64, 96, 128])
@pytest.mark.parametrize("cache_format", ["bf16", "fp8_656"])
def test_page_sizes(place, cache_format, page_size):
    Problem([3, 250, 64], [3, 1, 2], cache_format=cache_format, page_size=page_size).check(place)


@pytest.mark.parametrize(("page_size", "page_bytes"), [(2, 1728), (64, 37440), (256, 149760)])
def test_padded_pages(place, page_size, page_bytes):
    problem = Problem(
        [3, 250], [3, 1], cache_format="fp8_584", page_size=page_size, page_bytes=page_bytes
    )
    problem.check(place)


@pytest.mark.parametrize("rule", ["pow2", "amax"])
def test_scales_that_are_no_powers_of_two(place, rule):
    """Read exactly: a reader through bf16 scales is off by 2^-9."""
    Problem([300, 7], [1, 9], cache_format="fp8_656", rule=rule, q_std=3).check(place)


@pytest.mark.parametrize("cached", [0, 1, 62, 63, 64, 65, 127, 128, 129])
def test_tile_borders(place, cached):
    for new in (1, 2, 63, 64, 65):
        Problem([cached], [new], heads=2, seed=new).check(place)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_long_decode(place, cache_format):
    """Keys of one sequence that a GPU splits, beside short ones."""
    problem = Problem([4321, 3, 1500], [1, 1, 2], cache_format=cache_format, heads=8)
    problem.check(place)


@pytest.mark.parametrize("heads", [3, 70])
@pytest.mark.parametrize("cached", [500, 900, 1500, 2600, 6700, 13000])
def test_parts_of_one_sequence(place, cached, heads):
    """A GPU splits its keys among up to 68 groups of CTAs; how many decides how they are merged."""
    Problem([cached], [1], heads=heads, seed=cached).check(place)


@pytest.mark.parametrize("q_std", [0.0, 0.3, 2.0])
def test_score_ranges(place, q_std):
    Problem([500, 0], [4, 40], q_std=q_std, heads=5).check(place)


def test_values_of_mean_one(place):
    """Sums of 32k weights: what is lost in a product of low precision does not average out."""
    problem = Problem(
        [32767],
        [1],
        heads=2,
        q_std=0.2,
        latents=lambda rng, n, d: 1 + 0.05 * rng.normal(size=(n, d)),
    )
    problem.check(place)


@pytest.mark.parametrize("heads", [16, 60])
@pytest.mark.parametrize("cache_format", ["bf16", "fp8_656"])
def test_unassigned_pages(place, cache_format, heads):
    problem = Problem([300, 130, 64, 20], [3, 2, 1, 1], cache_format=cache_format, heads=heads)
    problem.tables[0, 1:3] = UNASSIGNED[0], len(problem.cache)
    problem.tables[1, 0] = UNASSIGNED[1]
    problem.tables[2, 1] = UNASSIGNED[2]
    problem.tables[3] = -1  # nothing at all
    problem.check(place)


def test_queries_without_keys(place):
    """Output 0 and LSE -inf, with a sink too."""
    problem = Problem([100, 20], [2, 1], heads=4)
    problem.tables[1] = -1
    sinks = np.array([0.5, np.inf, -np.inf, -3], np.float32)
    out, lse = problem.run(place, sinks=sinks)
    assert_close((out, lse), problem.want(sinks=sinks))
    assert (out[2] == 0).all() and np.isneginf(lse[:, 2]).all()


@pytest.mark.parametrize("heads", [4, 64])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_scores_of_minus_infinity_are_no_keys(place, cache_format, heads):
    """All scores of a head are -inf: 0 and -inf, with a sink too; heads and queries beside it."""

    def latents(rng, n, channels):
        x = rng.normal(size=(n, channels))
        x[:, 5] = -np.abs(x[:, 5]) - 0.5
        return x

    problem = Problem([700, 30], [2, 1], heads=heads, cache_format=cache_format, latents=latents)
    problem.q[0, :, 5] = np.inf
    problem.q[2, 3, 5] = np.inf
    for sinks in (None, np.resize(np.float32([0.5, np.inf, -np.inf, 30]), heads)):
        options = {} if sinks is None else {"sinks": sinks}
        out, lse = problem.run(place, **options)
        gone = np.isneginf(lse)
        assert gone[:, 0].all() and gone[3, 2] and gone.sum() == heads + 1
        assert not out[0].any() and not out[2, 3].any() and not np.isnan(out).any()
        problem.accept(place, (out, lse), **options)


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("heads", [3, 16, 128])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_fp32_output(place, cache_format, heads):
    """Not rounded: a CPU's is exact to fp32. Padding is 0, and in a given output stays."""
    problem = Problem(*MIXED, heads=heads, cache_format=cache_format, gap=2)
    sinks = np.linspace(-2, 3, heads).astype(np.float32)
    rounded, _ = problem.run(place, sinks=sinks)
    out, lse = problem.run(place, sinks=sinks, out_dtype="float32")
    want, want_lse = problem.want(sinks=sinks)
    assert out.dtype == np.float32
    assert_close((out, lse), (want, want_lse))
    if place == "cpu":
        assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()
        np.testing.assert_array_equal(out.astype(BF16), rounded)
    given = np.full(out.shape, 7, np.float32)
    kept, _ = problem.run(place, sinks=sinks, out_dtype="float32", out=given)
    gone = ~out.any(axis=(1, 2))
    assert gone.any() and (kept[gone] == 7).all()
    np.testing.assert_array_equal(kept[~gone], out[~gone])


def test_causal_queries_before_the_first_page(place):
    problem = Problem([0], [130], heads=2)
    problem.tables[0, 0] = -1
    problem.check(place)


@pytest.mark.parametrize("new", [5, 25])
def test_sinks(place, new):
    problem = Problem([100, 0, 700], [2, new, 1], heads=6)
    sinks = np.array([0, 2.5, -4, np.inf, -np.inf, 9], np.float32)
    out, lse = problem.run(place, sinks=sinks)
    assert_close((out, lse), problem.want(sinks=sinks))
    plain, plain_lse = problem.run(place)
    assert np.array_equal(lse, plain_lse)  # without the sink
    assert (out[:, 3] == 0).all() and np.array_equal(out[:, 4], plain[:, 4])


@pytest.mark.parametrize("heads", [3, 40])
def test_nan_of_a_query_or_a_key_stays_with_those_that_see_it(place, heads):
    problem = Problem([70, 30], [5, 3], heads=heads)
    problem.q[1, 2, 17] = np.nan
    page, row = problem.tables[0, 72 // 64], 72 % 64  # seen by the new tokens 2 to 4
    problem.cache[page, row, 40] = np.nan
    out, lse = problem.run(place)
    assert_close((out, lse), problem.want())
    nan = np.isnan(out.astype(np.float32)).all(axis=-1)
    expected = np.zeros((8, heads), bool)
    expected[1, 2] = expected[2:5] = True
    assert np.array_equal(nan, expected) and np.array_equal(np.isnan(lse.T), expected)


@pytest.mark.parametrize("heads", [1, 4])
def test_masked_keys_change_no_bit(place, heads):
    problem = Problem([70], [40], heads=heads)
    before = problem.run(place)
    page, row = problem.tables[0, 100 // 64], 100 % 64
    for value in (np.nan, np.inf, 3e38, -1.0):
        problem.cache[page, row] = value
        after = problem.run(place)
        for a, b in zip(before, after):
            view = np.uint16 if a.dtype == BF16 else np.uint32
            head_first = a.dtype != BF16
            a, b = (x.T if head_first else x for x in (a.view(view), b.view(view)))
            assert np.array_equal(a[:30], b[:30])


def test_lengths_are_cut(place):
    """Negative, beyond the table, offsets out of order and out of the tensor."""
    problem = Problem([5, 70, 9, 3], [2, 3, 4, 2], heads=3)
    tokens = len(problem.q)
    problem.cached[0] = -7
    problem.cached[1] = 2**31 - 1
    problem.new[2] = 99
    problem.starts[-1] = tokens + 50
    problem.new[3] = -3
    problem.cached = problem.cached.astype(np.int64)
    # The keys beyond the table are nowhere: the reference may leave them out.
    want_cached = problem.cached.copy()
    got = problem.run(place)
    problem.cached[1] = 10**6
    want = problem.want(causal=True)
    problem.cached = want_cached
    assert_close(got, want)


def test_offsets_out_of_order(place):
    problem = Problem([5, 70, 9], [2, 3, 4], heads=3)
    problem.starts[1] = -4
    problem.starts[2] = 400
    want = problem.want()
    assert_close(problem.run(place), want)


def test_out_keeps_padding(place):
    problem = Problem([5, 70], [2, 3], heads=3, gap=3)
    tokens = len(problem.q)
    out = to_paddle(np.full((tokens, 3, 512), 7, BF16), place)
    got, lse = problem.run(place, out=out)
    options = {"out": np.full((tokens, 3, 512), 7.0)}
    assert_close((got, lse), problem.want(**options))
    assert (to_numpy(out)[:3] == 7).all() and np.isneginf(lse[:, :3]).all()
    fresh, _ = problem.run(place)
    assert (fresh[:3] == 0).all() and np.array_equal(fresh[3:5], got[3:5])


@pytest.mark.parametrize("cache_format", ["bf16", "fp8", "fp8_656"])
def test_strided_cache_and_queries(place, cache_format):
    """A layer of a pool whose pages hold all layers, and a slice of wider queries."""
    problem = Problem([70, 5], [3, 2], heads=4, cache_format=cache_format)
    elements, dtype = width(cache_format)
    pages = len(problem.cache)
    pool = np.full((pages, 3, 64, elements * dtype.itemsize), 0xFF, np.uint8).view(dtype)
    pool[:, 1] = problem.cache
    memory = to_paddle(pool, place)
    plane = 64 * elements
    view = strided(memory, [pages, 64, elements], [3 * plane, elements, 1], plane * dtype.itemsize)
    tokens = len(problem.q)
    wide = np.full((tokens, 6, 640), np.nan, BF16)
    wide[:, 1:5, 32:608] = problem.q
    q = strided(to_paddle(wide, place), [tokens, 4, 576], [6 * 640, 640, 1], 2 * (640 + 32))
    problem.accept(place, problem.run(place, q=q, cache=view))


def test_slots_that_do_not_run(place):
    problem = Problem([70, 5, 9], [3, 2, 1], heads=2)
    q, cache = to_paddle(problem.q, place), to_paddle(problem.cache, place)
    tables, _, cached, _ = problem.seqs(place)
    out = F.mla_attention(
        q,
        cache,
        tables,
        int32(problem.starts[:3], place),
        cached,
        int32([3, 2], place),
        3,
        73,
        cache_format="bf16",
    )
    whole, _ = problem.run(place, softmax_scale=576**-0.5)
    out = to_numpy(out)
    assert np.array_equal(out[:5], whole[:5]) and (out[5:] == 0).all()


def test_nothing(place):
    if not EMPTY_OUTPUTS:
        pytest.skip("Paddle 2.6 returns no empty tensor")
    nobody = [int32(x, place) for x in (np.zeros((0, 1)), [0], [], [])]
    cache = to_paddle(np.zeros((2, 64, 576), BF16), place)
    q = to_paddle(np.zeros((0, 4, 576), BF16), place)
    out, lse = F.mla_attention(
        q, cache, *nobody, 0, 0, cache_format="bf16", return_softmax_lse=True
    )
    assert list(out.shape) == [0, 4, 512] and list(lse.shape) == [4, 0]


def test_no_sequence_no_page(place):
    """Tokens of no sequence, and a cache without a page."""
    q = to_paddle(np.full((3, 4, 576), np.nan, BF16), place)
    cache = to_paddle(np.zeros((2, 64, 576), BF16), place)
    nobody = [int32(x, place) for x in (np.zeros((0, 1)), [0], [], [])]
    options = {"cache_format": "bf16", "return_softmax_lse": True}
    out, lse = F.mla_attention(q, cache, *nobody, 1, 1, **options)
    assert (to_numpy(out) == 0).all() and np.isneginf(to_numpy(lse)).all()
    one = [int32(x, place) for x in ([[0]], [0, 3], [4], [3])]
    empty = to_paddle(np.zeros((0, 64, 576), BF16), place)
    out, lse = F.mla_attention(q, empty, *one, 3, 7, **options)
    assert (to_numpy(out) == 0).all() and np.isneginf(to_numpy(lse)).all()


def bf16_call(q, cache, tables, starts, cached, new):
    return F.mla_attention(
        q, cache, tables, starts, cached, new, 3, 80, cache_format="bf16", return_softmax_lse=True
    )


def written_call(q, cache, tables, starts, cached, new, scale, sinks, out):
    return F.mla_attention(
        q,
        cache,
        tables,
        starts,
        cached,
        new,
        3,
        80,
        cache_format="fp8",
        scale=scale,
        sinks=sinks,
        causal=False,
        out=out,
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_programs(place, dynamic):
    problem = Problem([70, 5], [3, 2], heads=4)
    seqs = problem.seq_arrays()
    (out, lse), _ = run_all_modes(
        bf16_call, [problem.q, problem.cache, *seqs], place, dynamic=dynamic
    )
    assert_close((out, lse), problem.want(softmax_scale=576**-0.5))


def test_programs_that_write(place):
    problem = Problem([70, 5], [3, 2], heads=4, cache_format="fp8")
    seqs = problem.seq_arrays()
    sinks, out = np.arange(4, dtype=np.float32), np.zeros((5, 4, 512), BF16)
    arrays = [problem.q, problem.cache, *seqs, SCALE, sinks, out]
    outputs, inputs = run_all_modes(written_call, arrays, place)
    options = {"softmax_scale": 576**-0.5, "sinks": sinks, "causal": False}
    want, _ = problem.want(rounded=problem.rounds_keys(place), **options)
    assert_outputs_close(outputs[0], want)
    assert_outputs_close(inputs[-1], want)


def zeros(*shape, dtype=BF16):
    return to_paddle(np.zeros(shape, dtype))


def good():
    return {
        "q": zeros(4, 2, 576),
        "cache": zeros(2, 64, 656, dtype=np.uint8),
        "block_tables": int32([[1]]),
        "cu_seqlens_q": int32([0, 4]),
        "seq_lens_decoder": int32([4]),
        "seq_lens_this_time": int32([4]),
        "max_seqlen_q": 4,
        "max_seqlen_k": 8,
        "cache_format": "fp8_656",
    }


REFUSED = [
    ({"cache_format": "fp4_288"}, NotImplementedError, "cache_format: 'fp4_288' is not supported"),
    ({"cache_format": "bf16"}, TypeError, "cache: expected dtype bfloat16, got uint8"),
    ({"cache": None}, TypeError, "cache: expected a tensor, got None"),
    ({"q": None}, TypeError, "q: expected a tensor, got None"),
    ({"q": ((4, 2, 512), BF16)}, ValueError, r"q: expected shape \[\?, \?, 576\]"),
    ({"q": ((8, 576), BF16)}, ValueError, "q: expected shape"),
    ({"q": ((4, 2, 576), np.float32)}, TypeError, "q: expected dtype bfloat16"),
    ({"q": ((4, 0, 576), BF16)}, NotImplementedError, "q: expected 1 to 128 heads, got shape"),
    ({"q": ((1, 129, 576), BF16)}, NotImplementedError, "q: expected 1 to 128 heads, got shape"),
    ({"scale": ((1,), np.float32)}, ValueError, "scale: expected None for fp8_656"),
    ({"sinks": ((3,), np.float32)}, ValueError, r"sinks: expected shape \[2\]"),
    ({"sinks": ((2,), BF16)}, TypeError, "sinks: expected dtype float32"),
    ({"block_tables": ((1,), np.int32)}, ValueError, "block_tables: expected 2 dimensions"),
    ({"block_tables": ((1, 1), np.int64)}, TypeError, "block_tables: expected dtype int32"),
    ({"cu_seqlens_q": ((3,), np.int32)}, ValueError, "cu_seqlens_q: expected shape"),
    ({"seq_lens_decoder": ((2,), np.int32)}, ValueError, "seq_lens_decoder: expected shape"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q: expected at least 0, got -1"),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected at least 0, got -1"),
    ({"max_seqlen_k": 2.5}, TypeError, "max_seqlen_k: expected int"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: expected a finite number"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected float"),
    ({"causal": 1}, TypeError, "causal: expected bool"),
    ({"out": ((4, 2, 576), BF16)}, ValueError, r"out: expected shape \[4, 2, 512\]"),
    ({"out": ((4, 2, 512), np.float32)}, TypeError, "out: expected dtype bfloat16"),
    (
        {"out": ((4, 2, 512), BF16), "out_dtype": "float32"},
        TypeError,
        "out: expected dtype float32",
    ),
    ({"out_dtype": "auto"}, ValueError, "out_dtype: expected bfloat16 or float32, got 'auto'"),
    ({"page_size": 32}, ValueError, "page_size: expected 64"),
]


@pytest.mark.parametrize(("changes", "error", "text"), REFUSED)
def test_refuses(changes, error, text):
    made = {k: zeros(*v[0], dtype=v[1]) if isinstance(v, tuple) else v for k, v in changes.items()}
    with pytest.raises(error, match=f"mla_attention: {text}"):
        F.mla_attention(**{**good(), **made})


def test_what_is_written_lies_apart():
    cache = zeros(4, 64, 576)
    out = strided(cache, [4, 2, 512], [1024, 512, 1], 0)
    call = {**good(), "cache_format": "bf16", "cache": cache}
    with pytest.raises(ValueError, match=r"out: .* share memory with cache"):
        F.mla_attention(**call, out=out)
    q = zeros(4, 2, 576)
    out = strided(q, [4, 2, 512], [1024, 512, 1], 0)
    with pytest.raises(ValueError, match=r"out: .* share memory with q"):
        F.mla_attention(**{**call, "q": q}, out=out)
    assert paddle.all(cache == 0) and paddle.all(q == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 128])
def test_same_bits_again(heads):
    """Whatever the order in which CTAs end."""
    problem = Problem([3000, 17, 900], [1, 130, 2], heads=heads)
    first = problem.run("gpu")
    for _ in range(5):
        for a, b in zip(first, problem.run("gpu")):
            assert np.array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(12))
def test_random_problems(seed):
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 12))
    problem = Problem(
        rng.integers(0, 700, batch) * rng.integers(0, 2, batch),
        rng.choice([0, 1, 1, 2, 5, 64, 130], batch),
        heads=int(rng.integers(1, 129)),
        cache_format=FORMATS[seed % 4],
        page_size=int(rng.choice([64, 64, 32, 128, 256, 16])),
        seed=seed,
        gap=int(rng.integers(0, 3)),
    )
    if len(problem.q):
        problem.check("gpu", causal=bool(rng.integers(0, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize(("cache_format", "heads"), [("bf16", 16), ("bf16", 128), ("fp8_656", 5)])
def test_lengths_change_between_replays_of_a_graph(cache_format, heads):

    most = np.array([900, 70, 3000, 0, 300])
    problem = Problem(most, [1, 3, 1, 2, 70], cache_format=cache_format, heads=heads)
    held = problem.seqs("gpu")
    q, cache = to_paddle(problem.q, "gpu"), to_paddle(problem.cache, "gpu")
    scale = None if problem.scale is None else to_paddle(problem.scale, "gpu")
    options = problem.options(scale=scale, return_softmax_lse=True)
    results = F.mla_attention(q, cache, *held, 70, 3001, **options)
    assert_close([to_numpy(x) for x in results], problem.want())
    with capture() as graph:
        results = F.mla_attention(q, cache, *held, 70, 3001, **options)
    rng = np.random.default_rng(0)
    new = problem.new.copy()
    for _ in range(4):
        problem.cached = rng.integers(0, most + 1)
        problem.new = rng.integers(0, new + 1)
        for tensor, other in zip(held, problem.seqs("gpu")):
            tensor.copy_(other, True)
        graph.replay()
        assert_close([to_numpy(x) for x in results], problem.want())
    graph.reset()


@pytest.mark.parametrize("change", ["head", "token", "channel", "lse", "lonely"])
def test_the_comparator_can_fail(change):
    problem = Problem([70, 0], [6, 2], heads=4)
    out, lse = problem.want()
    assert_close((out, lse), (out, lse))
    wrong, wrong_lse = out.copy(), lse.copy()
    if change == "head":
        wrong[:, 2] *= 1.009
    elif change == "token":
        wrong[3] *= 1.009
    elif change == "channel":
        wrong[1, 1, 7] += 2**-7 * np.abs(out).max()
    elif change == "lse":
        wrong_lse[1, 2] += 1e-4
    else:
        out[0, 0] = 0
    with pytest.raises(AssertionError):
        assert_close((wrong, wrong_lse), (out, lse))


@pytest.mark.parametrize("heads", [5, 16, 128])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_every_cut_gives_the_same_bits_on_a_cpu(cache_format, heads):
    """The prompt at once, in chunks, token by token: a query's bits follow from its keys alone."""
    tokens = 200
    problem = Problem([0], [tokens], heads=heads, cache_format=cache_format)
    q = problem.q
    whole_out, whole_lse = problem.run()
    for cuts in ([1] * tokens, [7] * 28 + [4], [64, 64, 72], [133, 1, 1, 1, 64]):
        at = 0
        for new in cuts:
            problem.q = q[at : at + new]
            problem.cached, problem.new = np.array([at]), np.array([new])
            problem.starts = np.array([0, new])
            out, lse = problem.run()
            assert_same_bits(out, whole_out[at : at + new], f"tokens {at} to {at + new}: out")
            assert_same_bits(lse, whole_lse[:, at : at + new], f"tokens {at} to {at + new}: lse")
            at += new
        assert at == tokens
