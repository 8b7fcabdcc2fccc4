"""The indexer's operators against the NumPy model, bit by bit, and the model against fp64."""

from __future__ import annotations

import itertools

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference import indexer as model
from tests.support.compare import assert_same_bits, assert_within
from tests.support.indexer import cos_sin, key_case
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, DTYPES, E4M3, EMPTY_OUTPUTS, to_numpy, to_paddle

RNG = np.random.default_rng
SMALL = paddle.__version__.startswith("2.")
SOFTMAX_SCALE, HEAD_SCALE = 128**-0.5, 0.3


# ---- the model ---------------------------------------------------------------------------------


def test_power_of_two_scale_is_the_smallest_that_fits_for_every_bf16_amax():
    amax = np.arange(0x7F80, dtype=np.uint16).view(BF16).astype(np.float32)
    scale = model.power_of_two_scale(amax).astype(np.float64)
    floored = np.maximum(amax, np.float32(1e-4)).astype(np.float64)
    assert (448 * scale >= floored).all()
    assert (448 * scale / 2 < floored).all()
    assert (np.frexp(scale)[0] == 0.5).all()
    assert model.power_of_two_scale(np.float32(np.inf)) == 2.0**120
    assert np.isnan(model.power_of_two_scale(np.float32(np.nan)))
    assert model.ue8m0_byte(np.float32([1, 2.0**-22, np.nan])).tolist() == [127, 105, 255]


def naive_key(kv, score, weight, rotation, eps):
    """Softmax, RMSNorm and rotation of one group in fp64, element by element."""
    kv, score = kv.astype(np.float64), score.astype(np.float64)
    head = kv.shape[1]
    x = np.zeros(head)
    for d in range(head):
        e = np.exp(score[:, d] - score[:, d].max())
        x[d] = (e / e.sum() * kv[:, d]).sum()
    x = x / np.sqrt((x * x).mean() + eps) * weight.astype(np.float64)
    for i in range(32):
        c, s = float(rotation[i]), float(rotation[32 + i])
        e, o = x[head - 64 + 2 * i], x[head - 63 + 2 * i]
        x[head - 64 + 2 * i], x[head - 63 + 2 * i] = e * c - o * s, o * c + e * s
    return x


@pytest.mark.parametrize(("rows", "head"), [(8, 128), (128, 128), (8, 512), (128, 512)])
def test_model_of_the_key_agrees_with_fp64(rows, head):
    rng = RNG(rows + head)
    kv = rng.normal(size=(rows, head)).astype(np.float32)
    score = (3 * rng.normal(size=(rows, head))).astype(np.float32)
    kv[:2], score[:2] = 0, -np.inf
    weight = rng.uniform(0.5, 2, head).astype(np.float32)
    rotation = cos_sin(50)[37]
    x = model.rms_norm(model.compress_group(kv, score), weight, 1e-5)
    exact = naive_key(kv, score, weight, rotation, 1e-5)
    assert_within(model.rotate_last(x, rotation), exact, 3e-6 * np.abs(exact).max())


def test_model_quantises_a_query_as_its_definition_says():
    rng = RNG(2)
    q = rng.normal(size=(3, 2, 128)).astype(BF16)
    table, weights = cos_sin(9), rng.normal(size=(3, 2)).astype(np.float32)
    codes, scales, folded = model.indexer_q_rope_quant(
        np.array([0, 4, 8]), q, table, weights, SOFTMAX_SCALE, HEAD_SCALE
    )
    for t, h in itertools.product(range(3), range(2)):
        x = q[t, h].astype(np.float64)
        for i in range(32):
            c, s = table[[0, 4, 8][t], [i, 32 + i]].astype(np.float64)
            e, o = x[64 + 2 * i], x[65 + 2 * i]
            x[64 + 2 * i], x[65 + 2 * i] = e * c - o * s, o * c + e * s
        s = 2.0 ** np.ceil(np.log2(max(np.abs(x).max(), 1e-4) / 448))
        assert scales[t, h] == s
        # bf16 rounding 2^-9, e4m3 rounding 2^-4, half a subnormal step.
        bound = np.abs(x) * (2.0**-9 + 2.0**-4) * 1.01 + s * 2.0**-10
        assert_within(codes[t, h].view(E4M3).astype(np.float64) * s, x, bound)
        exact = float(weights[t, h]) * s * SOFTMAX_SCALE * HEAD_SCALE
        assert_within(folded[t, h], exact, abs(exact) * 3e-7)


# ---- indexer_q_rope_quant ----------------------------------------------------------------------


def check_query(place, positions, q, table, weights, quant):
    args = [to_paddle(x, place) for x in (positions, q, table, weights)]
    got = F.indexer_q_rope_quant(*args, SOFTMAX_SCALE, HEAD_SCALE, quant=quant)
    expected = reference.indexer_q_rope_quant(
        positions, q, table, weights, SOFTMAX_SCALE, HEAD_SCALE, quant=quant
    )
    for name, a, b in zip(("codes", "scales", "weights"), got, expected):
        assert_same_bits(to_numpy(a), b, name)
    return expected


QUERY_DTYPES = [("float32", "bfloat16", np.int64), ("bfloat16", "float32", np.int32)]
QUERY_CASES = list(
    itertools.product(
        [1, 7, 32, 257] if SMALL else [0, 1, 7, 32, 257],
        [32, 64],
        ["fp8", "mxfp4"],
        QUERY_DTYPES,
    )
) + [  # many tokens: every kind once
    (tokens, heads, quant, QUERY_DTYPES[(i + j + k) % 2])
    for i, tokens in enumerate([1023, 4096])
    for j, heads in enumerate([32, 64])
    for k, quant in enumerate(["fp8", "mxfp4"])
]


@pytest.mark.parametrize(("tokens", "heads", "quant", "dtypes"), QUERY_CASES)
def test_query_has_the_models_bits(place, tokens, heads, quant, dtypes):
    rng = RNG(tokens + heads)
    size = np.exp(2 * rng.normal(size=(tokens, heads, 1))).astype(np.float32)
    values = rng.normal(size=min(tokens * heads * 128, 1 << 20) + 5).astype(np.float32)
    q = (np.resize(values, (tokens, heads, 128)) * size).astype(BF16)
    weights = rng.normal(size=(tokens, heads)).astype(DTYPES[dtypes[1]])
    positions = rng.integers(0, 1000, tokens).astype(dtypes[2])
    check_query(place, positions, q, cos_sin(1000, DTYPES[dtypes[0]]), weights, quant)


@pytest.mark.parametrize("heads", [1, 3, 9, 33])
@pytest.mark.parametrize("quant", ["fp8", "mxfp4"])
def test_query_of_any_number_of_heads(place, heads, quant):
    rng = RNG(heads)
    q = rng.normal(size=(11, heads, 128)).astype(BF16)
    weights = rng.normal(size=(11, heads)).astype(np.float32)
    check_query(place, rng.integers(0, 50, 11), q, cos_sin(50), weights, quant)


@pytest.mark.parametrize("quant", ["fp8", "mxfp4"])
def test_query_of_every_bf16(place, quant):
    """All bit patterns, in blocks whose scale they set and in blocks whose scale a 6 sets."""
    bits = np.arange(65536, dtype=np.uint16)
    sixes = np.full((2115, 32), np.array(6, BF16).view(np.uint16))
    sixes[:, 1:] = np.resize(bits, (2115, 31))
    blocks = np.resize(np.concatenate([bits.reshape(-1, 32), sixes]), (4192, 32))
    q = blocks.reshape(131, 8, 128).view(BF16)
    still = np.repeat(np.float32([[1.0, 0.0]]), 32, axis=1)
    check_query(place, np.zeros(131, np.int64), q, still, np.ones((131, 8), np.float32), quant)


@pytest.mark.parametrize("quant", ["fp8", "mxfp4"])
def test_query_with_ties_zeros_infinities_and_nan(place, quant):
    q = np.zeros((1, 7, 128), np.float32)
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], np.float32)
    q[0, 0] = np.tile(np.concatenate([ties, -ties]), 8)
    q[0, 1] = -0.0
    q[0, 2, ::2] = np.nan
    q[0, 3, 5] = -np.inf
    q[0, 4] = 1e-30
    q[0, 5] = np.arange(128) / 1024 + 1  # ties of bf16 and of e4m3
    q[0, 6, 127] = 3e38
    positions, weights = np.array([3]), np.ones((1, 7), np.float32)
    for table in (cos_sin(5), np.repeat(np.float32([[1.0, 0.0]]), 32, axis=1).repeat(5, axis=0)):
        codes, scales, folded = check_query(place, positions, q.astype(BF16), table, weights, quant)
    # The last table turns nothing.
    if quant == "mxfp4":
        assert codes[0, 0, :8].tolist() == [0x20, 0x42, 0x64, 0x76, 0xA8, 0xCA, 0xEC, 0xFE]
        assert (codes[0, 1, :32] == 0x88).all()
        assert scales[0, 0] == 0x7F7F7F7F
        assert np.isfinite(folded).all()
    else:
        assert codes[0, 1, :3].tolist() == [0x80] * 3
        assert scales[0, 1] == 2.0**-22  # the floor 1e-4 / 448, rounded up
        assert (codes[0, 2] == 0x7F).all()
        assert np.isnan(scales[0, 2]) and np.isnan(folded[0, 2])
        assert codes[0, 3, 5] == 0xFE and scales[0, 3] == 2.0**120


def test_query_positions_are_clamped(place):
    rng = RNG(5)
    q = rng.normal(size=(4, 32, 128)).astype(BF16)
    weights = rng.normal(size=(4, 32)).astype(np.float32)
    table = cos_sin(6)
    far = np.array([-1, -(2**60), 6, 2**60])
    expected = check_query(place, far, q, table, weights, "fp8")
    inside = check_query(place, np.array([0, 0, 5, 5]), q, table, weights, "fp8")
    for a, b in zip(expected, inside):
        assert_same_bits(a, b)


def test_query_may_be_a_slice_of_a_wider_tensor(place):
    if place == "gpu" and not EMPTY_OUTPUTS:
        pytest.skip("Paddle 2.6 has no kernel for recent GPUs that makes a slice contiguous")
    rng = RNG(6)
    wide = rng.normal(size=(5, 2, 3, 192)).astype(BF16)
    weights, positions = rng.normal(size=(5, 3)).astype(np.float32), np.arange(5)
    tensor = to_paddle(wide, place)[:, 1, :, 64:]
    got = F.indexer_q_rope_quant(
        to_paddle(positions, place),
        tensor,
        to_paddle(cos_sin(9), place),
        to_paddle(weights, place),
        SOFTMAX_SCALE,
        HEAD_SCALE,
    )
    expected = reference.indexer_q_rope_quant(
        positions, wide[:, 1, :, 64:], cos_sin(9), weights, SOFTMAX_SCALE, HEAD_SCALE
    )
    for a, b in zip(got, expected):
        assert_same_bits(to_numpy(a), b)


# ---- indexer_kv_compress_insert ----------------------------------------------------------------


def run_key(place, case):
    """The cache after the operator; checked against the model."""
    cache = to_paddle(case["kv_cache"].copy(), place)
    args = {k: to_paddle(v, place) if isinstance(v, np.ndarray) else v for k, v in case.items()}
    result = F.indexer_kv_compress_insert(**{**args, "kv_cache": cache})
    expected = reference.indexer_kv_compress_insert(**case)
    assert_same_bits(to_numpy(cache), expected, "cache")
    assert_same_bits(to_numpy(result), expected, "result")
    return expected


def written(case, cache):
    """Slots whose bytes are no longer all 0xA5."""
    layout = model.PAGE_FORMATS[case["quant"]]
    n = case["page_size"]
    pages = cache.reshape(len(cache), -1)
    codes = pages[:, : n * layout.code_bytes].reshape(-1, layout.code_bytes)
    scales = pages[:, n * layout.code_bytes : n * (layout.code_bytes + layout.scale_bytes)]
    scales = scales.reshape(-1, layout.scale_bytes)
    assert (pages[:, n * (layout.code_bytes + layout.scale_bytes) :] == 0xA5).all()
    touched = (codes != 0xA5).any(axis=1)
    assert (touched | (scales == 0xA5).all(axis=1)).all()
    return sorted(np.flatnonzero(touched).tolist())


FIRST_TYPES = {"padding": 12}
SECOND_TYPES = {
    "state_dtype": BF16,
    "index_dtype": np.int32,
    "weight_dtype": BF16,
    "table_dtype": BF16,
}


@pytest.mark.parametrize("quant", model.PAGE_FORMATS)
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("options", [FIRST_TYPES, SECOND_TYPES], ids=["fp32", "bf16"])
def test_key_has_the_models_bytes(place, quant, ratio, options):
    # A chunk that starts at 0 (overlap with missing rows), one in the middle, one decode token.
    positions = [
        np.arange(0, 3 * ratio + 1),
        np.arange(2 * ratio - 3, 4 * ratio),
        np.array([5 * ratio - 1]),
    ]
    if ratio == 128:
        positions[0] = np.array([0, 100, 127])
    total = sum(len(p) for p in positions)
    case = key_case(
        RNG(ratio), quant, ratio, positions, pages=total // 16 + 2,
        state_block=4 if ratio == 4 else 8, **options,
    )  # fmt: skip
    cache = run_key(place, case)
    done = (case["positions"] + 1) % ratio == 0
    assert done.sum() >= 3
    assert written(case, cache) == sorted(case["kv_slots"][done].tolist())


KEY_CASES = [
    (tokens, page_size, quant)
    for tokens in [1, 7, 32, 257, 1023, 4096] + [0] * (not SMALL)
    for page_size in ([1, 16, 64] if tokens < 1000 else [64])
    for quant in model.PAGE_FORMATS
]


@pytest.mark.parametrize(("tokens", "page_size", "quant"), KEY_CASES)
def test_key_over_many_tokens_and_page_sizes(place, tokens, page_size, quant):
    pages = max(tokens, 260) // page_size + 1
    case = key_case(RNG(tokens), quant, 4, [np.arange(max(tokens, 1))], page_size, 3, pages)
    for name in ("batch_id_per_token", "positions", "state_slots", "kv_slots"):
        case[name] = case[name][:tokens]
    cache = run_key(place, case)
    assert len(written(case, cache)) == tokens // 4


def test_key_pages_may_have_more_dimensions_and_slots_lie_at_page_ends(place):
    case = key_case(RNG(3), "fp8", 4, [np.array([3, 7, 11, 15])], page_size=8)
    case["kv_slots"] = np.array([7, 8, 23, 0])
    case["kv_cache"] = case["kv_cache"].reshape(3, 8, 132)
    assert written(case, run_key(place, case)) == [0, 7, 8, 23]


SKIPPED = {
    "state slot": ("state_slots", -1),
    "kv slot": ("kv_slots", -1),
    "kv slot past the pages": ("kv_slots", 48),
    "huge kv slot": ("kv_slots", 2**62),
    "negative position": ("positions", -1),
    "position past the table": ("positions", 2**62 - 1),
    "incomplete group": ("positions", 6),
    "request -1": ("batch_id_per_token", -1),
    "request past the batch": ("batch_id_per_token", 1),
}


@pytest.mark.parametrize("what", SKIPPED)
def test_key_skips(place, what):
    name, value = SKIPPED[what]
    case = key_case(RNG(4), "fp8", 4, [np.array([7])])
    assert len(written(case, run_key(place, case))) == 1
    case[name] = np.array([value], case[name].dtype)
    assert (run_key(place, case) == 0xA5).all()


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_key_needs_all_state_blocks_of_its_group(place, block, bad):
    case = key_case(RNG(5), "mxfp4", 4, [np.array([3, 7])])
    case["block_tables"][0, block] = bad
    # Position 3 needs block 0, position 7 needs both.
    expected = [] if block == 0 else [int(case["kv_slots"][0])]
    assert written(case, run_key(place, case)) == expected


def exact_case(quant):
    """A group whose key is its RMSNorm weight exactly: one visible row of 2, no rotation."""
    case = key_case(RNG(6), quant, 4, [np.array([7])], page_size=2, pages=1)
    head = model.PAGE_FORMATS[quant].head_dim
    state = np.full_like(case["state_cache"], np.nan)
    for p in range(8):
        row = state[case["block_tables"][0, p // 4], p % 4]
        row[:] = np.nan  # the slice that is not read
        half = head if p >= 4 else 0
        row[half : half + head] = 2.0 if p == 5 else 7.0
        row[2 * head + half : 2 * head + half + head] = 0.25 if p == 5 else -np.inf
    values = np.array([0, 0.5, -1, 1.5, -2, 3, -4, 6], np.float32)
    case.update(
        state_cache=state,
        rms_norm_weight=np.resize(values, head),
        cos_sin_cache=np.repeat(np.float32([[1.0, 0.0]]), 32, axis=1).repeat(8, axis=0),
        rms_norm_eps=0.0,
        kv_slots=np.array([1]),
    )
    return case


def test_key_of_an_exact_case_byte_by_byte(place):
    e4m3 = [(64 * v) for v in (0, 0.5, -1, 1.5, -2, 3, -4, 6)]  # 6 / 448 rounds up to 2^-6
    codes = np.array(e4m3, E4M3).view(np.uint8).tolist()
    page = run_key(place, exact_case("fp8"))[0]
    assert (page[:128] == 0xA5).all()
    assert page[128:256].tolist() == codes * 16
    assert page[256:260].tolist() == [0xA5] * 4
    assert page[260:264].view(np.float32)[0] == 2.0**-6

    page = run_key(place, exact_case("mxfp4"))[0]
    assert page[64:128].tolist() == [0x10, 0x3A, 0x5C, 0x7E] * 16
    assert page[128:].tolist() == [0xA5] * 4 + [127] * 4

    page = run_key(place, exact_case("fp8_512"))[0]
    assert page[576 : 576 + 448].tolist() == codes * 56
    rope = np.array([0, 0.5, -1, 1.5, -2, 3, -4, 6] * 8, BF16)
    assert_same_bits(page[576 + 448 : 1152].view(BF16), rope)
    assert page[1152:].tolist() == [0xA5] * 8 + [121] * 7 + [0]


@pytest.mark.parametrize("quant", model.PAGE_FORMATS)
def test_key_with_nan_infinities_and_no_visible_score(place, quant):
    head = model.PAGE_FORMATS[quant].head_dim
    for value in (np.nan, np.inf):
        for part in (0, 2 * head):  # a value, a score
            case = key_case(RNG(7), quant, 4, [np.array([3, 7]), np.array([7])])
            case["state_cache"][case["block_tables"][0, 1], 2, head + part + 5] = value
            cache = run_key(place, case)
            assert len(written(case, cache)) == 3
    case = key_case(RNG(8), quant, 4, [np.array([3])])
    case["state_cache"][:] = -np.inf
    cache = run_key(place, case)
    layout = model.PAGE_FORMATS[quant]
    page, row = divmod(int(case["kv_slots"][0]), 16)
    zero = cache[page, row * layout.code_bytes : (row + 1) * layout.code_bytes]
    assert not np.isin(zero, [0x7F, 0xFF]).any()


def test_key_overlapping_rows_below_position_0_count_for_nothing(place):
    case = key_case(RNG(9), "fp8", 4, [np.array([3])])
    before = run_key(place, case)
    # A group at position 3 reads the newer half of 4 rows only: the older half may hold anything.
    case["state_cache"][..., :128] = np.nan
    case["state_cache"][..., 256:384] = np.nan
    assert_same_bits(run_key(place, case), before)


@pytest.mark.parametrize("ratio", [4, 128])
def test_key_rounds_every_step_as_the_model_does(place, ratio):
    """bf16 hides an fp32 ulp, so the rotation is made to subtract two keys that differ by it.

    Channel pairs hold the same rows in two orders and are "rotated" by cos = sin = 1: their
    difference is the rounding error of the sums.
    """
    head, n = 512, 8 if ratio == 4 else 128
    width = head * (2 if ratio == 4 else 1)
    rng = RNG(14)
    noise = []
    for _ in range(8):
        case = key_case(rng, "fp8_512", ratio, [np.array([n - 1])])
        rows = rng.normal(size=(n, 2, 32)).astype(np.float32)
        for j in range(n):
            row = case["state_cache"][case["block_tables"][0, j // 4], j % 4]
            half = head if j >= ratio else 0
            for part, offset in enumerate((0, width)):
                even = offset + half + head - 64
                row[even : even + 64 : 2] = rows[j, part]
                row[even + 1 : even + 64 : 2] = rows[(j + 3) % n, part]
        case["cos_sin_cache"] = np.ones((n, 64), np.float32)
        case["rms_norm_weight"][-64:] = 1
        cache = run_key(place, case)
        page, row = divmod(int(case["kv_slots"][0]), 16)
        noise.append(cache[page, row * 576 + 448 : (row + 1) * 576].view(BF16)[::2])
    noise = np.concatenate(noise).astype(np.float32)
    assert 0 < np.abs(noise).max() < 1e-5
    assert np.count_nonzero(noise) > noise.size / 4


# ---- every mode --------------------------------------------------------------------


def query_fp8(positions, q, table, weights):
    return F.indexer_q_rope_quant(positions, q, table, weights, SOFTMAX_SCALE, HEAD_SCALE)


def query_mxfp4(positions, q, table, weights):
    return F.indexer_q_rope_quant(
        positions, q, table, weights, SOFTMAX_SCALE, HEAD_SCALE, quant="mxfp4"
    )


def insert_mxfp4(state, tables, batch_ids, positions, slots, kv_slots, weight, table, cache):
    return F.indexer_kv_compress_insert(
        state, tables, batch_ids, positions, slots, kv_slots, weight, table, cache,
        compress_ratio=4, page_size=16, rms_norm_eps=1e-5, quant="mxfp4",
    )  # fmt: skip


@pytest.mark.parametrize("function", [query_fp8, query_mxfp4])
def test_query_in_every_mode(place, function):
    rng = RNG(10)
    q = rng.normal(size=(5, 4, 128)).astype(BF16)
    weights = rng.normal(size=(5, 4)).astype(np.float32)
    run_all_modes(function, [np.arange(5), q, cos_sin(8), weights], place, dynamic=True)


def test_insert_in_every_mode(place):
    case = key_case(RNG(11), "mxfp4", 4, [np.arange(12)])
    arrays = [v for v in case.values() if isinstance(v, np.ndarray)]
    outputs, inputs = run_all_modes(insert_mxfp4, arrays, place, dynamic=True)
    expected = reference.indexer_kv_compress_insert(**case)
    assert_same_bits(inputs[-1], expected)
    assert_same_bits(outputs[0], expected)


def test_empty_dimensions(place):
    case = key_case(RNG(12), "fp8", 4, [np.array([3, 7])])
    case["block_tables"] = np.zeros((0, 2), np.int32)
    run_key(place, case)
    case["block_tables"] = np.zeros((1, 0), np.int32)
    run_key(place, case)
    if EMPTY_OUTPUTS:
        case["kv_cache"] = np.zeros((0, 2112), np.uint8)
        run_key(place, case)
        no_heads = (np.zeros((2, 0, 128), BF16), cos_sin(4), np.zeros((2, 0), np.float32))
        check_query(place, np.arange(2), *no_heads, "fp8")
