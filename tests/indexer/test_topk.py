"""topk_indices against the NumPy model: every index, whatever values are equal."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from tests.attention.test_gpu_graph import capture
from tests.support.static import run_all_modes
from tests.support.tensors import int32, skip_slices_on, to_numpy, to_paddle

RNG = np.random.default_rng
#: Rows, columns, k: a CTA alone with all its keys, clusters, and columns that stream by.
SHAPES = [
    (1, 1, 1),
    (3, 100, 7),
    (5, 8192, 2048),
    (2, 12289, 512),
    (2, 24573, 512),
    (3, 65537, 2048),
    (1, 160001, 2048),
    (150, 26001, 1000),
    (1, 300007, 4096),
]


def normal(shape):
    return RNG(0).standard_normal(shape, np.float32)


def relu(shape):
    return np.maximum(normal(shape) - 1.5, 0)  # most of the k largest are zeros


def two_values(shape):
    return np.where(RNG(1).random(shape) < 0.004, np.float32(2.5), np.float32(-1.5))


def equal(shape):
    return np.full(shape, -3.25, np.float32)


def halves(shape):
    """Many equal values: images of fp16 that differ in a few bits."""
    return (1 + RNG(2).integers(0, 4, shape) / 1024).astype(np.float16).astype(np.float32)


def special(shape):
    values = normal(shape)
    kind = RNG(3).integers(0, 12, shape)
    for number, value in enumerate([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45]):
        values[kind == number] = value
    return values


def few_numbers(shape):
    """Fewer numbers than k: NaNs are chosen, the first of them."""
    values = np.full(shape, np.nan, np.float32)
    values[:, :: max(1, shape[1] // 9)] = -np.inf
    return values


def ascending(shape):
    """Each column beats all before it: a buffer of the largest fills over and over."""
    return np.broadcast_to(np.arange(shape[1], dtype=np.float32), shape).copy()


def descending(shape):
    return -ascending(shape)


def sawtooth(shape):
    return (np.arange(shape[1], dtype=np.float32) % 97) + np.zeros(shape, np.float32)


DISTRIBUTIONS = [
    *(normal, relu, two_values, equal, halves),
    *(special, few_numbers, ascending, descending, sawtooth),
]


def check(logits, lengths, k, place, starts=None, tensor=None):
    tensor = to_paddle(logits, place) if tensor is None else tensor
    got = F.topk_indices(
        tensor,
        int32(lengths, place),
        k,
        starts=None if starts is None else int32(starts, place),
    )
    np.testing.assert_array_equal(
        to_numpy(got), reference.topk_indices(logits, lengths, k, starts=starts)
    )
    return got


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_rows(place, shape, distribution):
    rows, columns, k = shape
    check(distribution((rows, columns)), [columns] * rows, k, place)


@pytest.mark.parametrize("columns", [4097, 40007, 120011])
@pytest.mark.parametrize("distribution", [normal, relu, special])
def test_ragged_ranges(place, columns, distribution):
    rows, k = 23, 600
    rng = RNG(4)
    starts = rng.integers(-50, columns + 50, rows)
    lengths = rng.integers(-50, columns + 50, rows)
    lengths[:6] = [0, k - 1, k, k + 1, 2**31 - 1, -(2**31)]
    starts[:6] = [5, 1, 2, 3, -(2**31), 2**31 - 1]
    check(distribution((rows, columns)), lengths, k, place, starts)


def test_what_lies_outside_a_range_is_not_seen(place):
    logits = normal((4, 30001))
    starts, lengths = np.array([1, 2, 3, 7]), np.array([25001, 1003, 8, 29990])
    check(logits, lengths, 256, place, starts)
    outside = (np.arange(30001) < starts[:, None]) | (
        np.arange(30001) >= (starts + lengths)[:, None]
    )
    for other in (np.nan, np.inf):
        changed = np.where(outside, np.float32(other), logits)
        got = F.topk_indices(
            to_paddle(changed, place), int32(lengths, place), 256, starts=int32(starts, place)
        )
        want = reference.topk_indices(logits, lengths, 256, starts=starts)
        np.testing.assert_array_equal(to_numpy(got), want)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5])
def test_rows_of_a_wider_tensor(place, offset):
    """Rows that begin at any address: a row stride that is no multiple of 4."""
    skip_slices_on(place)
    wide = normal((6, 20011))
    part = to_paddle(wide, place)[:, offset : offset + 17003]
    check(wide[:, offset : offset + 17003], [17003] * 6, 777, place, tensor=part)


def test_the_same_at_every_run(place):
    logits = relu((3, 140000))
    runs = [to_numpy(check(logits, [140000, 139999, 70001], 2048, place)) for _ in range(20)]
    assert all(np.array_equal(run, runs[0]) for run in runs)


def sampled(columns):
    """The columns of an aligned long row that its first guess looks at: 8 in each of 512 parts."""
    part = np.arange(512, dtype=np.uint64)
    place = (part << np.uint64(16)) + (
        ((part + np.uint64(1)) * np.uint64(0x9E3779B1) & np.uint64(0xFFFFFFFF)) >> np.uint64(16)
    )
    run = place * np.uint64(max((columns + 3) // 8, 1)) >> np.uint64(25)
    at = (run.astype(np.int64)[:, None] * 8 + np.arange(8)).ravel()
    return at[at < columns]


@pytest.mark.parametrize("greater", [False, True], ids=["sample_less", "sample_greater"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 65540), (3, 160004), (140, 30004)])
def test_samples_that_mislead(place, rows, columns, greater):
    """A guess far too low or too high: the threshold is counted out over the whole row."""
    logits = normal((rows, columns))
    logits[:, sampled(columns)] += 50 if greater else -50
    check(logits, [columns] * rows, 2048, place)
    logits[:] = np.round(logits)  # and many are equal
    check(logits, [columns - 1] * rows, 2048, place)


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", [normal, relu, equal, ascending])
@pytest.mark.parametrize("busy", [1, 140], ids=["cluster", "cta"])
def test_a_million_columns(distribution, busy):
    """A cluster's slices, and a CTA's windows: 140 rows, most of which are empty."""
    columns = 1 << 20
    logits = np.zeros((busy, columns), np.float32)
    logits[0] = distribution((1, columns))[0]
    lengths = np.zeros(busy, np.int64)
    lengths[0] = columns - 3
    for k in (1, 2048, 4096):
        check(logits, lengths, k, "gpu")


@pytest.mark.parametrize("k", [1, 33])
def test_many_small_rows(place, k):
    rows = 65536
    lengths = RNG(6).integers(0, 34, rows)
    check(relu((rows, 33)), lengths, k, place, RNG(7).integers(-2, 5, rows))


@pytest.mark.parametrize("distribution", [normal, relu, two_values])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 66, 67])
def test_odd_shares(place, rows, distribution):
    """Clusters of 8 to 1, whose slices begin and end within a vector of 4 or are empty."""
    columns = 33003
    starts = np.arange(rows) * 5 % 11
    lengths = columns - np.arange(rows) * 97 % 1009
    lengths[rows // 2 :] = 4097 + np.arange(rows - rows // 2)
    check(distribution((rows, columns)), lengths, 4096, place, starts)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-6, 1.0, 7e4, 1e37])
@pytest.mark.parametrize("rows", [2, 140])
def test_values_of_any_scale(place, rows, scale):
    """Short rows, whose bins are those of fp16: values that it rounds to 0 or to infinity."""
    logits = (np.clip(normal((rows, 8000)).astype(np.float64), -4, 4) * scale).astype(np.float32)
    check(logits, [8000] * rows, 2048, place)
    check(np.maximum(logits, np.float32(scale)), [7777] * rows, 2048, place)


@pytest.mark.parametrize("k", [1, 127, 128, 129, 2048, 4096])
def test_nearly_equal_values(place, k):
    """A bin of many values that differ in their last bits."""
    bits = np.float32(0.7).view(np.uint32) + RNG(8).integers(0, 500, (3, 8191)).astype(np.uint32)
    for sign in (1, -1):
        check(np.float32(sign) * bits.view(np.float32), [8191, 8190, 5001], k, place)


@pytest.mark.parametrize("value", [0.7, 0.0])
@pytest.mark.parametrize(
    ("equals", "taken"), [(1, 1), (5, 1), (5, 3), (5, 5), (200, 40), (200, 200)]
)
@pytest.mark.parametrize(("columns", "start"), [(8192, None), (7003, 2)])
def test_some_or_all_of_the_equal_ones(place, columns, start, equals, taken, value):
    """Short rows: a value, zeros of both signs for one, whose first columns are chosen, or all."""
    first, size = start or 0, columns - 701
    logits = normal((1, columns))
    at = first + RNG(10).permutation(size)[:equals]
    logits[0, at] = value
    logits[0, at[::2]] *= np.float32(-1 if value == 0 else 1)
    larger = int((logits[0, first : first + size] > np.float32(value)).sum())
    check(logits, [size], larger + taken, place, None if start is None else [start])


@pytest.mark.parametrize("numbers", [0, 100, 2047, 2048, 2049])
def test_numbers_run_out(place, numbers):
    logits = np.full((2, 8190), np.nan, np.float32)
    logits[:, RNG(9).permutation(8190)[:numbers]] = normal((2, numbers))
    check(logits, [8190, 6001], 2048, place, starts=[0, 3])


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [8192, 65540])
def test_lengths_change_between_replays(columns):
    logits = relu((5, columns))
    given = to_paddle(logits, "gpu")
    lengths = int32([columns] * 5, "gpu")
    out = int32(np.zeros((5, 512)), "gpu")
    F.topk_indices(given, lengths, 512, out=out)
    with capture() as graph:
        F.topk_indices(given, lengths, 512, out=out)
    for least in (0, 300, 511, 4000, columns - 4):
        now = least + np.arange(5)
        lengths.copy_(int32(now, "gpu"), True)
        graph.replay()
        paddle.device.cuda.synchronize()
        want = reference.topk_indices(logits, now, 512)
        np.testing.assert_array_equal(to_numpy(out), want)
    graph.reset()


def test_out_is_written(place):
    logits = halves((3, 5000))
    lengths = [5000, 40, 3000]
    out = int32(np.full((3, 64), 7), place)
    result = F.topk_indices(to_paddle(logits, place), int32(lengths, place), 64, out=out)
    want = reference.topk_indices(logits, lengths, 64)
    np.testing.assert_array_equal(to_numpy(out), want)
    np.testing.assert_array_equal(to_numpy(result), want)


def test_no_rows(place):
    out = int32(np.zeros((0, 5)), place)
    result = F.topk_indices(
        to_paddle(np.zeros((0, 9), np.float32), place), int32([], place), 5, out=out
    )
    assert result.shape == [0, 5]


def test_no_columns(place):
    result = F.topk_indices(
        to_paddle(np.zeros((3, 0), np.float32), place), int32([0, 4, 9], place), 5
    )
    assert (to_numpy(result) == -1).all()


def test_the_model_by_hand():
    logits = np.array([[0.0, -0.0, 1.0, np.nan, 1.0, -np.inf]], np.float32)
    expected = {1: [2], 2: [2, 4], 3: [0, 2, 4], 4: [0, 1, 2, 4], 5: [0, 1, 2, 4, 5]}
    for k, want in expected.items():
        assert reference.topk_indices(logits, [6], k)[0].tolist() == want
    assert reference.topk_indices(logits, [9], 7, starts=[2])[0].tolist() == [
        0,
        1,
        2,
        3,
        -1,
        -1,
        -1,
    ]


def select_twenty(logits, lengths):
    return F.topk_indices(logits, lengths, 20)


def select_into(logits, lengths, out):
    return F.topk_indices(logits, lengths, 20, out=out)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_and_saved(place, dynamic):
    logits, lengths = relu((4, 300)), np.array([300, 5, 200, 0], np.int32)
    want = reference.topk_indices(logits, lengths, 20)
    outputs, _ = run_all_modes(select_twenty, [logits, lengths], place, dynamic=dynamic)
    np.testing.assert_array_equal(outputs[0], want)
    given = [logits, lengths, np.full((4, 20), 3, np.int32)]
    outputs, inputs = run_all_modes(select_into, given, place, dynamic=dynamic)
    np.testing.assert_array_equal(outputs[0], want)
    np.testing.assert_array_equal(inputs[2], want)


GOOD = {
    "logits": paddle.zeros([2, 9]),
    "lengths": paddle.to_tensor([9, 9], "int32"),
    "k": 3,
}
WRONG = [
    ({"k": 0}, ValueError, "k: expected 1 to 4096, got 0"),
    ({"k": 4097}, ValueError, "k: expected 1 to 4096, got 4097"),
    ({"k": 2.0}, TypeError, "k: expected int, got float"),
    ({"logits": paddle.zeros([2, 9], "float16")}, TypeError, "logits: expected dtype float32"),
    ({"logits": paddle.zeros([18])}, ValueError, "logits: expected 2 dimensions"),
    ({"logits": paddle.zeros([9, 2]).t()}, ValueError, "logits: expected stride 1"),
    ({"lengths": paddle.zeros([3], "int32")}, ValueError, r"lengths: expected shape \[2\]"),
    ({"lengths": paddle.zeros([2], "int64")}, TypeError, "lengths: expected dtype int32"),
    ({"lengths": None}, TypeError, "lengths: expected a tensor, got None"),
    ({"starts": paddle.zeros([1], "int32")}, ValueError, r"starts: expected shape \[2\]"),
    ({"out": paddle.zeros([2, 4], "int32")}, ValueError, r"out: expected shape \[2, 3\]"),
    ({"out": paddle.zeros([2, 3])}, TypeError, "out: expected dtype int32"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG)
def test_wrong_arguments(change, error, text):
    with pytest.raises(error, match=f"topk_indices: {text}"):
        F.topk_indices(**{**GOOD, **change})


def test_out_apart_from_the_inputs():
    lengths = paddle.to_tensor([9, 9], "int32")
    with pytest.raises(ValueError, match=r"topk_indices: out: .* share memory with lengths"):
        F.topk_indices(paddle.zeros([2, 9]), lengths, 1, out=lengths.reshape([2, 1]))
