"""FlashInfer's helpers around page tables, and its merge of many states, against plain NumPy."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from fastattn.compat import _paged, flashinfer
from tests.support.compare import assert_within
from tests.support.shims import values
from tests.support.tensors import EMPTY_OUTPUTS, int32, skip_slices_on, to_numpy, to_paddle


def test_positions_of_arguments_are_flashinfers():
    orders = {
        flashinfer.get_seq_lens: "kv_indptr kv_last_page_len page_size",
        flashinfer.get_batch_indices_positions: (
            "append_indptr seq_lens nnz batch_indices positions"
        ),
        flashinfer.merge_states: "v s",
    }
    for function, order in orders.items():
        assert list(inspect.signature(function).parameters) == order.split(), function


@pytest.mark.parametrize("page_size", [64, 128, 16])
def test_lengths_of_a_page_table(place, page_size):
    skip_slices_on(place)
    pages, last = np.array([2, 1, 0, 5]), np.array([3, page_size, 0, 1])
    starts = np.r_[0, np.cumsum(pages)]
    lengths = flashinfer.get_seq_lens(int32(starts, place), int32(last, place), page_size)
    assert "int32" in str(lengths.dtype)
    wanted = [(n - 1) * page_size + m if n else m for n, m in zip(pages, last)]
    assert to_numpy(lengths).tolist() == wanted


def listed(new, lengths, size):
    """Sequence and position of each new token, by a loop."""
    rows = [(b, lengths[b] - n + j) for b, n in enumerate(new) for j in range(n)]
    rows += [(-1, 0)] * (size - len(rows))
    return [list(column) for column in zip(*rows)]


@pytest.mark.parametrize("more", [0, 1, 70])
@pytest.mark.parametrize(
    ("new", "lengths"),
    [
        ([1, 2, 3, 4], [5, 5, 5, 5]),
        ([0, 3, 0, 0, 1, 130, 0], [7, 3, 0, 9, 64, 131, 2]),
        ([1], [1]),
        ([0, 0], [4, 0]),
    ],
)
def test_sequences_and_positions_of_tokens(place, new, lengths, more):
    """Sequences without new tokens, in front, between and behind; tokens of no sequence."""
    skip_slices_on(place)
    size = sum(new) + more
    if size == 0:
        pytest.skip("no token")
    starts = int32(np.r_[0, np.cumsum(new)], place)
    found = flashinfer.get_batch_indices_positions(starts, int32(lengths, place), size)
    assert all("int32" in str(x.dtype) for x in found)
    wanted = listed(new, lengths, size)
    assert [to_numpy(x).tolist() for x in found] == wanted
    room = [paddle.full([size], 99, "int32") for _ in range(2)]
    room = [int32(to_numpy(x), place) for x in room]
    again = flashinfer.get_batch_indices_positions(starts, int32(lengths, place), size, *room)
    assert again[0] is room[0] and again[1] is room[1]
    assert [to_numpy(x).tolist() for x in room] == wanted


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="Paddle 2.6 has no tensors of size 0")
def test_no_tokens_and_no_sequences():
    none, starts = int32([], "cpu"), int32([0], "cpu")
    found = flashinfer.get_batch_indices_positions(int32([0, 0], "cpu"), int32([4], "cpu"), 0)
    assert [x.shape for x in found] == [[0], [0]]
    found = flashinfer.get_batch_indices_positions(starts, none, 3)
    assert [x.tolist() for x in found] == [[-1] * 3, [0] * 3]


def test_positions_are_those_that_the_writer_takes():
    """A prompt's chunk and a decoded token: written where a gather of the pages finds them."""
    pool = paddle.full([5, 2, 64, 1, 64], 9.0, "float16")
    new, lengths = [5, 1], [67, 129]
    tables = [[4, 0], [1, 3, 2]]
    starts, pages = int32(np.r_[0, np.cumsum(new)], "cpu"), int32([0, 2, 5], "cpu")
    last, chosen = int32([3, 1], "cpu"), int32([*tables[0], *tables[1]], "cpu")
    assert flashinfer.get_seq_lens(pages, last, 64).tolist() == lengths
    rows = values(np.random.default_rng(2), (6, 1, 64), np.dtype("float16"))
    where = flashinfer.get_batch_indices_positions(
        starts, flashinfer.get_seq_lens(pages, last, 64), 6
    )
    flashinfer.append_paged_kv_cache(
        to_paddle(rows), to_paddle(-rows), *where, pool, chosen, pages, last
    )
    stored = pool.numpy()
    sequence, position = listed(new, lengths, 6)
    for row, b, t in zip(rows, sequence, position):
        for half, sign in ((0, 1), (1, -1)):
            np.testing.assert_array_equal(stored[tables[b][t // 64], half, t % 64], sign * row)
    assert (stored != 9).sum() == 2 * rows.size


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("states", [1, 2, 5])
def test_many_states(place, dtype, states):
    """Base 2; an LSE of -inf leaves a state out, whatever its values are."""
    skip_slices_on(place)
    rng, shape = np.random.default_rng(states), (7, states, 6, 64)
    v = values(rng, shape, np.dtype(dtype))
    s = rng.uniform(-9, 9, shape[:3]).astype(np.float32)
    if states > 1:
        s[2, 0], v[2, 0] = -np.inf, np.nan
        s[3] = -np.inf
    merged, lse = flashinfer.merge_states(to_paddle(v, place), to_paddle(s, place))
    weights = np.exp2(s.astype(np.float64))
    total = weights.sum(1)
    values_ = np.where(weights[..., None] > 0, v.astype(np.float64), 0)
    exact = (weights[..., None] * values_).sum(1) / np.maximum(total, 1e-300)[..., None]
    eps = 4e-6 if dtype == "float32" else 2.0**-11
    assert_within(to_numpy(merged), exact, eps * np.abs(values_).sum(1) + 1e-7)
    lse = to_numpy(lse)
    assert lse.shape == (7, 6) and to_numpy(merged).dtype == np.dtype(dtype)
    empty = total == 0
    assert np.isneginf(lse[empty]).all()
    assert_within(lse[~empty], np.log2(total[~empty]), 4e-6)


def test_what_a_cuda_graph_reads_is_kept(monkeypatch):
    """The graph knows an address, and steps of other sizes would have the tensor forgotten."""
    place = SimpleNamespace(is_gpu_place=lambda: True, gpu_device_id=lambda: 0)
    make = functools.lru_cache(maxsize=1)(lambda *_: paddle.zeros([1]))
    captured: dict = {}
    monkeypatch.setattr(_paged, "_made", make)
    monkeypatch.setattr(_paged, "_CAPTURED", captured)
    for number, capturing in enumerate((False, True, True, False)):
        monkeypatch.setattr(_paged, "capturing", lambda now=capturing: now)
        _paged.progression(0, 1, number, "int32", SimpleNamespace(place=place))
    assert len(captured) == 2
    monkeypatch.undo()
    assert _paged.capturing() is False


def test_wrong_arguments():
    starts, lengths = int32([0, 2], "cpu"), int32([2], "cpu")
    with pytest.raises(TypeError, match="get_batch_indices_positions: nnz: expected int, got flo"):
        flashinfer.get_batch_indices_positions(starts, lengths, 2.0)
    with pytest.raises(ValueError, match="get_batch_indices_positions: nnz: expected 0 or more"):
        flashinfer.get_batch_indices_positions(starts, lengths, -1)
    for wrong in (int32([[2]], "cpu"), int32([2, 2], "cpu")):
        with pytest.raises(ValueError, match=r"seq_lens: expected shape \[B\] beside"):
            flashinfer.get_batch_indices_positions(starts, wrong, 2)
    for name in ("batch_indices", "positions"):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \[2\], got \[3\]"):
            flashinfer.get_batch_indices_positions(
                starts, lengths, 2, **{name: paddle.zeros([3], "int32")}
            )
    with pytest.raises(TypeError, match="get_seq_lens: kv_last_page_len: expected a tensor"):
        flashinfer.get_seq_lens(starts, [2], 64)
    with pytest.raises(ValueError, match=r"merge_states: v: expected 4 dimensions, got \[2, 1, 6"):
        flashinfer.merge_states(paddle.ones([2, 1, 64]), paddle.ones([2, 1]))
    with pytest.raises(ValueError, match=r"merge_states: s: expected 3 dimensions, got \[2, 1\]"):
        flashinfer.merge_states(paddle.ones([2, 1, 1, 64]), paddle.ones([2, 1]))
