"""merge_attn_states against the NumPy model (bit by bit) and against fp64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.numerics import exp_non_positive, from_codes
from tests.support import ROOT
from tests.support.compare import assert_same_bits, assert_within
from tests.support.static import MODES, run_all_modes
from tests.support.tensors import DTYPES, EMPTY_OUTPUTS, to_numpy, to_paddle

INF = np.inf
SCALE = np.array([0.05], np.float32)


def sides(tokens, heads, dim, dtype="float32", empty=0.1, seed=0):
    """Outputs and LSE of both sides; each side is empty for about a tenth of the rows.

    The output of an empty side is NaN, its LSE -inf or +inf.
    """
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(2):
        output = rng.normal(size=(tokens, heads, dim)).astype(DTYPES[dtype])
        lse = (2 * rng.normal(size=(heads, tokens))).astype(np.float32)
        gone = rng.random((heads, tokens)) < empty
        lse[gone] = np.where(rng.random(gone.sum()) < 0.5, -INF, INF)
        output[gone.T] = np.nan
        result += [output, lse]
    return result


def merge(arrays, place, **kwargs):
    tensors = [to_paddle(a, place) for a in arrays]
    kwargs = {k: to_paddle(v, place) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
    return tuple(to_numpy(x) for x in F.merge_attn_states(*tensors, **kwargs))


def fp64_merge(prefix, p, suffix, s):
    """(merged, lse, size of the terms) by the textbook formula; both sides without keys give 0."""
    p, s = (np.where(np.isposinf(x), -INF, x.astype(np.float64)) for x in (p, s))
    lse = np.logaddexp(p, s)
    wp = np.exp(p - np.where(np.isneginf(lse), 0, lse)).T[:, :, None]
    ws = np.exp(s - np.where(np.isneginf(lse), 0, lse)).T[:, :, None]
    a = np.where(wp == 0, 0, prefix.astype(np.float64)) * wp
    b = np.where(ws == 0, 0, suffix.astype(np.float64)) * ws
    return a + b, lse, np.abs(a) + np.abs(b)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 48, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("tokens", "heads"), [(67, 5), (33, 48)])
def test_grid(place, tokens, heads, dim, dtype, fp8):
    arrays = sides(tokens, heads, dim, dtype)
    kwargs = {"output_scale": SCALE} if fp8 else {}
    output, lse = merge(arrays, place, **kwargs)
    expected, expected_lse = reference.merge_attn_states(*arrays, **kwargs)
    assert_same_bits(output, expected, "output")
    assert_within(lse, expected_lse, 2.0**-23 * np.abs(expected_lse) + 2.0**-23, "lse")
    if fp8:
        assert not (output == 0x7F).any()
    else:
        assert not np.isnan(output.astype(np.float32)).any()


# Half a step of each output dtype, relative, and its smallest step.
HALF_STEP = {
    "float32": (2.0**-24, 2.0**-149),
    "float16": (2.0**-11, 2.0**-24),
    "bfloat16": (2.0**-8, 2.0**-133),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_is_near_fp64(dtype):
    arrays = sides(300, 7, 24, dtype, seed=1)
    exact, exact_lse, size = fp64_merge(*arrays)
    output, lse = reference.merge_attn_states(*arrays)
    # fp32 roundings: p - m (of size |p - m| <= 20 here), exp (2 ulp), sum, ratio, product, sum.
    relative, smallest = HALF_STEP[dtype]
    bound = 2.0**-24 * (2 * 20 + 2 * 4 + 5) * size + relative * np.abs(exact) * 1.01 + smallest
    assert_within(output, exact, bound, "output")
    assert_within(lse, exact_lse, 2.0**-24 * (8 + np.abs(exact_lse)), "lse")


def test_fp8_codes_against_fp64(place):
    """Only a value on the edge between two codes may get the other one; few do."""
    arrays = sides(512, 16, 64, "bfloat16", seed=2)
    codes, _ = merge(arrays, place, output_scale=SCALE)
    exact = fp64_merge(*arrays)[0] / np.float64(SCALE[0])
    expected = reference.numerics.to_codes(exact.astype(np.float32), "e4m3")
    # Codes of one sign are ordered as their bits; +0 and -0 are neighbours.
    order = np.where(codes & 0x80, -(codes & 0x7F).astype(int), codes.astype(int))
    wanted = np.where(expected & 0x80, -(expected & 0x7F).astype(int), expected.astype(int))
    assert np.abs(order - wanted).max() <= 1
    assert np.count_nonzero(order != wanted) <= 2e-5 * codes.size


def test_exp_is_within_2_ulp():
    tiny = -np.logspace(-30, 1, 1000)
    x = np.concatenate([-np.linspace(0, 87, 400001), -(2.0 ** -np.arange(1, 40)), tiny, [0.0]])
    x = x.astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert_within(exp_non_positive(x), exact, 2 * np.spacing(exact.astype(np.float32)))
    special = exp_non_positive(np.array([0.0, -0.0, -87.5, -1e30, -INF, np.nan], np.float32))
    assert_same_bits(special, np.array([1.0, 1.0, 0.0, 0.0, 0.0, np.nan], np.float32))


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_special_values(place, fp8):
    nan = np.nan
    #       prefix, its LSE, suffix, its LSE -> output, LSE
    table = [
        (nan, -INF, nan, -INF, 0.0, -INF),
        (nan, INF, nan, -INF, 0.0, -INF),
        (7.0, INF, 9.0, INF, 0.0, -INF),
        (nan, -INF, 3.0, 0.5, 3.0, 0.5),
        (3.0, 0.5, nan, INF, 3.0, 0.5),
        (nan, 0.5, 3.0, 0.5, nan, 0.5 + np.log(2)),
        (3.0, 0.5, nan, -80.0, nan, 0.5),
        (3.0, nan, 3.0, 0.5, nan, nan),
        (3.0, 0.5, 3.0, nan, nan, nan),
        (3.0, nan, 3.0, -INF, nan, nan),
        (3.0, INF, 3.0, nan, nan, nan),
        (1.0, 0.0, 3.0, 0.0, 2.0, np.log(2)),
        (1.0, 1e30, 3.0, -1e30, 1.0, 1e30),
        (INF, 0.0, 3.0, 0.0, INF, np.log(2)),
        (INF, 0.0, -INF, 0.0, nan, np.log(2)),
        (-0.0, 0.5, nan, -INF, -0.0, 0.5),
    ]
    prefix, p, suffix, s, output, lse = np.array(table, np.float32).T
    arrays = [
        np.repeat(prefix[:, None, None], 8, -1),
        p[None],
        np.repeat(suffix[:, None, None], 8, -1),
        s[None],
    ]
    got, got_lse = merge(arrays, place, **({"output_scale": np.float32([1.0])} if fp8 else {}))
    expected = np.repeat(output[:, None, None], 8, -1)
    if fp8:
        codes = {0.0: 0x00, 3.0: 0x44, 2.0: 0x40, 1.0: 0x38, INF: 0x7E}
        expected = np.array([[[0x7F if np.isnan(v) else codes[abs(v)]]] for v in output], np.uint8)
        expected[np.signbit(output) & ~np.isnan(output)] |= 0x80
        expected = np.repeat(expected, 8, -1)
    assert_same_bits(got, expected, "output")
    assert_within(got_lse, lse[None], 1e-6, "lse")
    assert np.isneginf(got_lse[0, :3]).all()


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("merged", [0, 1, 12, 37])
def test_prefill_tokens_with_context(place, merged, fp8):
    arrays = sides(37, 3, 40, "bfloat16", seed=3)
    kwargs = {"output_scale": SCALE} if fp8 else {}
    output, lse = merge(arrays, place, prefill_tokens_with_context=merged, **kwargs)
    expected = reference.merge_attn_states(*arrays, **kwargs)[0]
    assert_same_bits(output[:merged], expected[:merged])
    # The rest is the suffix, 0 where that is empty; its LSE is copied, +inf as -inf.
    _, _, suffix, s = arrays
    empty = np.isinf(s)
    tail = np.where(empty.T[:, :, None], np.zeros_like(suffix), suffix)
    if fp8:
        tail = reference.numerics.quantize(tail, SCALE, "e4m3")
    assert_same_bits(output[merged:], tail[merged:])
    assert_same_bits(lse[:, merged:], np.where(empty, np.float32(-INF), s)[:, merged:])


@pytest.mark.parametrize("dim", [24, 96, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("over", ["prefix", "suffix", "crossed"])
def test_written_over_its_inputs(place, over, dtype, dim):
    arrays = sides(129, 5, dim, dtype, seed=4)
    expected = reference.merge_attn_states(*arrays)
    tensors = [to_paddle(a, place) for a in arrays]
    i, j = {"prefix": (0, 1), "suffix": (2, 3), "crossed": (0, 3)}[over]
    output, lse = F.merge_attn_states(*tensors, output=tensors[i], output_lse=tensors[j])
    for got in (output, tensors[i]):
        assert_same_bits(to_numpy(got), expected[0])
    for got in (lse, tensors[j]):
        assert_within(to_numpy(got), expected[1], 2.0**-23 * (1 + np.abs(expected[1])))
    for k in {0, 1, 2, 3} - {i, j}:
        assert_same_bits(to_numpy(tensors[k]), arrays[k], "an input that is no output")


@pytest.mark.parametrize(("tokens", "heads"), [(1, 4), (64, 32), (700, 9)])
def test_a_chain_of_merges_in_place(place, tokens, heads):
    """Each call reads what the one before it wrote: on a GPU they are launched under each other."""
    state = sides(tokens, heads, 128, "bfloat16", empty=0.0, seed=11)[:2]
    pieces = [sides(tokens, heads, 128, "bfloat16", empty=0.0, seed=i)[2:] for i in range(12, 20)]
    tensors = [to_paddle(a, place) for a in state]
    on_place = [[to_paddle(a, place) for a in piece] for piece in pieces]
    for piece in on_place * 4:
        F.merge_attn_states(*tensors, *piece, output=tensors[0], output_lse=tensors[1])
    for piece in pieces * 4:  # one by one: the host takes each result
        state = merge([*state, *piece], place)
    for got, expected in zip(tensors, state):
        assert_same_bits(to_numpy(got), expected)


@pytest.mark.parametrize("dtype", ["uint8", "float8_e4m3fn"])
def test_fp8_into_a_given_tensor(place, dtype):
    if dtype != "uint8" and not hasattr(paddle, "float8_e4m3fn"):
        pytest.skip("this Paddle has no FP8 dtype")
    arrays = sides(9, 2, 64, "bfloat16", seed=5)
    device = paddle.get_device()
    paddle.set_device(place)
    output = paddle.empty([9, 2, 64], dtype)
    paddle.set_device(device)
    tensors = [to_paddle(a, place) for a in arrays]
    returned, _ = F.merge_attn_states(*tensors, output=output, output_scale=to_paddle(SCALE, place))
    expected = reference.merge_attn_states(*arrays, output_scale=SCALE)[0]
    assert returned.dtype == output.dtype
    assert_same_bits(to_numpy(output).view(np.uint8), expected)
    assert_same_bits(to_numpy(returned).view(np.uint8), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dim", [6, 64, 80, 128])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 4), (67, 5), (256, 32)])
def test_fp32_states_rounded_to_16_bits(place, tokens, heads, dim, dtype):
    arrays = sides(tokens, heads, dim, seed=11)
    arrays[0][-1] *= np.float32(1e30)  # infinite in fp16
    merged, expected_lse = reference.merge_attn_states(*arrays)
    with np.errstate(over="ignore"):
        expected = merged.astype(DTYPES[dtype])
    output = to_paddle(np.zeros((tokens, heads, dim), DTYPES[dtype]), place)
    returned, lse = F.merge_attn_states(*(to_paddle(a, place) for a in arrays), output=output)
    assert_same_bits(to_numpy(output), expected, "output")
    assert_same_bits(to_numpy(returned), expected, "returned")
    assert_within(to_numpy(lse), expected_lse, 2.0**-23 * (1 + np.abs(expected_lse)), "lse")


@pytest.mark.parametrize(
    ("heads", "dim", "groups"), [(4, 96, 4), (4, 96, 3), (3, 256, 6), (4, 64, 2), (2, 80, 1)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_fp8(place, heads, dim, groups, dtype):
    """One scale a token and head, one for 128 channels (inside a head and across), one a token."""
    arrays = sides(50, heads, dim, dtype, seed=6)
    arrays[0] *= np.linspace(0.1, 9, dim).astype(DTYPES[dtype])
    arrays[2][7, 0, 3], arrays[3][0, 7] = np.nan, 1.0  # a NaN takes its group only
    scales = to_paddle(np.zeros((50, groups), np.float32), place)
    codes, _ = F.merge_attn_states(*(to_paddle(a, place) for a in arrays), output_scales=scales)
    expected = reference.merge_attn_states(*arrays, groups=groups)
    assert_same_bits(to_numpy(codes), expected[0], "codes")
    assert_same_bits(to_numpy(scales), expected[2], "scales")
    assert np.isnan(to_numpy(scales)).sum() == 1
    plain = reference.merge_attn_states(*(a.astype(np.float32) for a in arrays))[0]
    values = from_codes(to_numpy(codes), "e4m3").reshape(50, groups, -1)
    values = values * to_numpy(scales)[..., None]
    plain = plain.reshape(values.shape)
    bound = np.abs(plain) * 2.0**-4 + to_numpy(scales)[..., None] * 2.0**-10
    whole = ~np.isnan(to_numpy(scales))
    assert (np.abs(values - plain) <= bound)[whole].all()


@pytest.mark.parametrize("strided", ["lse", "outputs"])
def test_strided_inputs(strided):
    arrays = sides(11, 6, 32, seed=7)
    expected = reference.merge_attn_states(*arrays)
    prefix, p, suffix, s = (to_paddle(a) for a in arrays)
    if strided == "lse":  # [T, H] views, as some kernels give them
        p, s = to_paddle(arrays[1].T).t(), to_paddle(arrays[3].T).t()
        assert not p.is_contiguous()
    else:  # slices of wider tensors
        prefix = to_paddle(np.concatenate([arrays[0]] * 2, 2))[:, :, 32:]
        suffix = to_paddle(np.concatenate([arrays[2]] * 2, 1))[:, 6:]
        assert not prefix.is_contiguous()
    output, lse = F.merge_attn_states(prefix, p, suffix, s)
    assert_same_bits(to_numpy(output), expected[0])
    assert_within(to_numpy(lse), expected[1], 2.0**-23 * (1 + np.abs(expected[1])))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("over_prefix", [False, True])
def test_every_stride_of_the_kernel(tmp_path, over_prefix):
    """All six tensors with padding between heads and tokens, or with the two swapped."""
    library = tmp_path / "merge.so"
    custom_ops = ROOT / "custom_ops"
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC"]
    kernel = [custom_ops / "cpu" / name for name in ("merge.cc", "parallel.cc")]
    sources = [ROOT / "tests/support/merge.cc", *kernel]
    subprocess.run(["g++", *flags, f"-I{custom_ops}", "-o", library, *sources], check=True)
    arrays = sides(13, 3, 20, seed=10)
    expected = reference.merge_attn_states(*arrays)

    def spread(array, order, pad):
        """The same values in memory of axis order `order`, `pad` more elements on each axis."""
        memory = np.full([array.shape[i] + pad for i in order], np.nan, np.float32)
        view = memory.transpose(np.argsort(order))
        view = view[tuple(slice(0, n) for n in array.shape)]
        view[...] = array
        return view

    prefix, suffix = spread(arrays[0], (1, 0, 2), 3), spread(arrays[2], (0, 1, 2), 5)
    p, s = spread(arrays[1], (1, 0), 2), spread(arrays[3], (0, 1), 4)
    output = prefix if over_prefix else spread(np.zeros_like(arrays[0]), (0, 1, 2), 2)
    lse = p if over_prefix else spread(np.zeros_like(arrays[1]), (1, 0), 1)
    views = [prefix, p, suffix, s, output, lse]
    strides = [n // 4 for view in views for n in view.strides[:2]]
    int64s = [(ctypes.c_int64 * len(v))(*v) for v in ((13, 3, 20), strides)]
    pointers = [ctypes.c_void_p(v.ctypes.data) for v in views]
    ctypes.CDLL(str(library)).merge_strided(*pointers, *int64s)
    assert_same_bits(output, expected[0])
    assert_within(lse, expected[1], 2.0**-23 * (1 + np.abs(expected[1])))
    assert_same_bits(suffix, arrays[2])
    for view in views:  # the padding is untouched
        assert np.isnan(view.base).sum() == view.base.size - view.size + np.isnan(view).sum()


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="this Paddle has no empty outputs")
@pytest.mark.parametrize("shape", [(0, 4, 64), (3, 0, 64), (3, 4, 0)])
def test_empty(place, shape):
    arrays = sides(*shape, empty=0.0)
    output, lse = merge(arrays, place)
    assert output.shape == shape and lse.shape == (shape[1], shape[0])
    assert_within(lse, reference.merge_attn_states(*arrays)[1], 1e-5)
    if shape[0] == 0:
        merge(arrays, place, prefill_tokens_with_context=0, output_scale=SCALE)


def test_merging_pieces_is_attention_over_all_keys(place):
    """Three pieces of the keys of a softmax, merged two by two, give the whole softmax."""
    rng = np.random.default_rng(8)
    scores, values = 3 * rng.normal(size=(5, 2, 60)), rng.normal(size=(2, 60, 16))

    def piece(begin, end):
        s = scores[:, :, begin:end]
        lse = np.log(np.exp(s).sum(-1))
        output = np.einsum("thk,hkd->thd", np.exp(s - lse[..., None]), values[:, begin:end])
        return output.astype(np.float32), lse.T.astype(np.float32)

    merged = merge([*piece(0, 7), *piece(7, 40)], place)
    output, lse = merge([*merged, *piece(40, 60)], place)
    expected, expected_lse = piece(0, 60)
    assert_within(output, expected, 1e-6)
    assert_within(lse, expected_lse, 2e-6)


def plain(prefix, p, suffix, s):
    return F.merge_attn_states(prefix, p, suffix, s)


def static_fp8(prefix, p, suffix, s, scale):
    return F.merge_attn_states(
        prefix, p, suffix, s, output_scale=scale, prefill_tokens_with_context=3
    )


def in_place(prefix, p, suffix, s):
    return F.merge_attn_states(prefix, p, suffix, s, output=prefix, output_lse=s)


def in_place_output(prefix, p, suffix, s):
    return F.merge_attn_states(prefix, p, suffix, s, output=suffix)


def in_place_lse(prefix, p, suffix, s):
    return F.merge_attn_states(prefix, p, suffix, s, output_lse=p)


def rounded_fp32(prefix, p, suffix, s, output):
    return F.merge_attn_states(prefix, p, suffix, s, output=output)


def dynamic_fp8(prefix, p, suffix, s, scales):
    return F.merge_attn_states(prefix, p, suffix, s, output_scales=scales)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "any_tokens"])
@pytest.mark.parametrize(
    "function",
    [plain, static_fp8, in_place, in_place_output, in_place_lse, dynamic_fp8, rounded_fp32],
)
def test_modes(place, function, dynamic):
    more = {
        static_fp8: [SCALE],
        dynamic_fp8: [np.zeros((7, 3), np.float32)],
        rounded_fp32: [np.zeros((7, 3, 40), np.float16)],
    }.get(function, [])
    run_all_modes(function, [*sides(7, 3, 40, seed=9), *more], place, MODES, dynamic)


def good(**changes):
    """Arguments of a valid call (T 3, H 2, D 8), some of them changed."""
    arguments = {
        "prefix_output": paddle.ones([3, 2, 8]),
        "prefix_lse": paddle.zeros([2, 3]),
        "suffix_output": paddle.ones([3, 2, 8]),
        "suffix_lse": paddle.zeros([2, 3]),
        **changes,
    }
    return arguments


BAD_CALLS = [
    ("prefix_output", None, TypeError, "expected a tensor, got None"),
    ("prefix_lse", None, TypeError, "expected a tensor, got None"),
    ("suffix_output", None, TypeError, "expected a tensor, got None"),
    ("suffix_lse", None, TypeError, "expected a tensor, got None"),
    ("suffix_lse", [0.0], TypeError, "expected a tensor, got list"),
    ("output_scale", 0.5, TypeError, "expected a tensor, got float"),
    ("prefix_output", paddle.ones([3, 2, 8], "float64"), TypeError, "expected dtype float32"),
    ("prefix_output", paddle.ones([3, 16]), ValueError, "expected 3 dimensions"),
    ("prefix_output", paddle.ones([1]), ValueError, "expected 3 dimensions"),
    ("suffix_output", paddle.ones([3, 2, 8], "float16"), TypeError, "expected dtype float32"),
    ("suffix_output", paddle.ones([3, 2, 16]), ValueError, r"expected shape \[3, 2, 8\]"),
    ("suffix_output", paddle.ones([48]), ValueError, r"expected shape \[3, 2, 8\], got \[48\]"),
    ("prefix_lse", paddle.zeros([3, 2]), ValueError, r"expected shape \[2, 3\], got \[3, 2\]"),
    ("suffix_lse", paddle.zeros([2, 4]), ValueError, r"expected shape \[2, 3\], got \[2, 4\]"),
    ("suffix_lse", paddle.zeros([2, 3], "float16"), TypeError, "expected dtype float32"),
    ("output_scale", paddle.ones([2]), ValueError, r"expected shape \[1\], got \[2\]"),
    ("output_scale", paddle.ones([1], "float16"), TypeError, "expected dtype float32"),
    ("output_scale", paddle.zeros([1]), ValueError, "expected a finite positive scale, got 0"),
    ("output_scale", paddle.full([1], -1.0), ValueError, "expected a finite positive scale"),
    ("output_scale", paddle.full([1], float("nan")), ValueError, "expected a finite positive"),
    ("output_scale", paddle.full([1], float("inf")), ValueError, "expected a finite positive"),
    ("output", paddle.ones([3, 2, 4]), ValueError, r"expected shape \[3, 2, 8\]"),
    (
        "output",
        paddle.zeros([3, 2, 8], "uint8"),
        TypeError,
        "expected dtype float32, float16 or bfloat16, got uint8",
    ),
    ("output_lse", paddle.zeros([3, 2]), ValueError, r"expected shape \[2, 3\]"),
    ("output_lse", paddle.zeros([2, 3], "float16"), TypeError, "expected dtype float32"),
    ("output_scales", paddle.zeros([2, 2]), ValueError, r"expected shape \[3, groups\]"),
    ("output_scales", paddle.zeros([3, 5]), ValueError, "expected .* divides H [*] D = 16"),
    ("output_scales", paddle.zeros([6]), ValueError, r"expected shape \[3, groups\]"),
    ("output_scales", paddle.zeros([3, 2], "float16"), TypeError, "expected dtype float32"),
    ("prefill_tokens_with_context", 4, ValueError, "expected None or 0 to T = 3, got 4"),
    ("prefill_tokens_with_context", -2, ValueError, "expected None or 0 to T, got -2"),
    ("prefill_tokens_with_context", 1.5, TypeError, "expected int, got float"),
    ("prefill_tokens_with_context", True, TypeError, "expected int, got bool"),
]
if EMPTY_OUTPUTS:
    BAD_CALLS += [
        ("suffix_output", paddle.zeros([0, 2, 8]), ValueError, r"expected shape \[3, 2, 8\]"),
        ("suffix_lse", paddle.zeros([0]), ValueError, r"expected shape \[2, 3\], got \[0\]"),
    ]


def case_id(value):
    return value if isinstance(value, str) and value.isidentifier() else ""


@pytest.mark.parametrize(("name", "value", "error", "text"), BAD_CALLS, ids=case_id)
def test_errors_name_the_argument(name, value, error, text):
    with pytest.raises(error, match=f"merge_attn_states: {name}: {text}"):
        F.merge_attn_states(**good(**{name: value}))


def test_conflicting_arguments():
    with pytest.raises(ValueError, match="output_scales: expected None when output_scale is given"):
        F.merge_attn_states(
            **good(output_scale=paddle.ones([1]), output_scales=paddle.ones([3, 2]))
        )
    with pytest.raises(TypeError, match="output: expected dtype uint8 or float8_e4m3fn for FP8"):
        F.merge_attn_states(**good(output_scale=paddle.ones([1]), output=paddle.ones([3, 2, 8])))
    with pytest.raises(ValueError, match="output: expected stride 1 in the last dimension"):
        F.merge_attn_states(**good(output=paddle.ones([3, 8, 2]).transpose([0, 2, 1])))
    # Paddle drops an empty optional tensor: no scale at all would mean another output dtype.
    with pytest.raises(ValueError, match="output_scale: expected a tensor with elements"):
        F.merge_attn_states(**good(output_scale=paddle.zeros([0])))
    with pytest.raises(ValueError, match=r"prefill_tokens_with_context: .* got -1"):
        F.merge_attn_states(**good(prefill_tokens_with_context=-1))


# True is an int to the raw operator.
@pytest.mark.parametrize(
    ("name", "value"), [case[:2] for case in BAD_CALLS if case[1] is not True], ids=case_id
)
def test_the_raw_operator_refuses_them_too(name, value):
    arguments = good(**{name: value})
    attribute = arguments.pop("prefill_tokens_with_context", -1)
    optional = [arguments.get(k) for k in ("output_scale", "output", "output_lse", "output_scales")]
    run = paddle.base.core.eager._run_custom_op
    with pytest.raises((OSError, ValueError, TypeError, RuntimeError)):
        run("fastattn_merge_attn_states", *list(arguments.values())[:4], *optional, attribute)
