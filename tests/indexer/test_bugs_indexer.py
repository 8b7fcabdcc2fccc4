"""Faults of other indexers, by the numbers of docs/faults.md: the smallest inputs.

FastDeploy's operators are called as its models call them, by position.
"""

from __future__ import annotations

import inspect

import numpy as np
import paddle
import pytest

from fastattn import reference
from fastattn.compat.fastdeploy import (
    cp_gather_indexer_k_quant_cache,
    indexer_k_quant_and_cache,
    radix_topk_ragged_transform,
)
from tests.support.compare import assert_same_bits
from tests.support.indexer_keys import CANARY, empty_pages, keys, row_of
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, E4M3, int32, to_numpy, to_paddle

RNG = np.random.default_rng


def prefill(place, logits, offsets, lengths, k, heads=1):
    """Output of a step of prefill, as canaries before it."""
    output = int32(np.full((len(logits), k), 77), place)
    result = radix_topk_ragged_transform(
        to_paddle(logits, place), output, int32(offsets, place), int32(lengths, place),
        None, None, None, None, 0, k, heads,
    )  # fmt: skip
    assert_same_bits(to_numpy(result), to_numpy(output))
    return to_numpy(output)


def decode(place, logits, offsets, lengths, batch_ids, tables, k, rows):
    """Output [rows, k] of a step of decode, 77 where nothing was written."""
    output = int32(np.full((rows, k), 77), place)
    radix_topk_ragged_transform(
        to_paddle(logits, place),
        output,
        int32(offsets, place),
        int32(np.zeros(4096), place),  # FastDeploy's unused lengths
        int32(lengths, place),
        None if batch_ids is None else int32(batch_ids, place),
        None if tables is None else int32(tables, place),
        None,
        0 if tables is None else tables.shape[1],
        k,
        1,
    )
    return to_numpy(output)


def rows_of(logits, lengths, k):
    return reference.topk_indices(logits, lengths, k)


# ---- the top-k ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [4, 16, 64])
def test_bug24_a_short_causal_row_does_not_list_its_successor(place, k):
    """Query i of a prompt sees keys 0 .. i, at most."""
    tokens = 40
    logits = np.tile(np.arange(tokens, dtype=np.float32), (tokens, 1))  # later keys are larger
    output = prefill(place, logits, np.zeros(tokens), np.arange(tokens) + 1, k)
    for i in range(tokens):
        want = list(range(max(i + 1 - k, 0), i + 1))
        assert output[i].tolist() == want + [-1] * (k - len(want))


@pytest.mark.parametrize("k", [3, 32])
def test_bug25_the_second_sequence_has_its_own_keys(place, k):
    """Two prompts in a step; column j of a row is key ks + j, and indices are of all keys."""
    lengths = [11, 17]
    ks = np.repeat([0, 11], lengths).astype(np.int32)
    ke = np.concatenate([np.arange(1, 12), 11 + np.arange(1, 18)]).astype(np.int32)
    logits = RNG(0).standard_normal((28, 17)).astype(np.float32)
    output = prefill(place, logits, ks, ke - ks, k)
    want = rows_of(logits, ke - ks, k)
    assert_same_bits(output, np.where(want < 0, -1, want + ks[:, None]).astype(np.int32))
    assert (output[11:][output[11:] >= 0] >= 11).all()


def test_bug26_a_cached_prefix_is_gathered(place):
    """Keys of a sequence are those before this step, too: chunks, and a prefix of another step."""
    key, table = keys(RNG(1), 150, BF16), np.array([[3, 0, 5], [1, 4, 2]], np.int32)
    cache = to_paddle(empty_pages(6, 64, "fp8").reshape(6, 64, 132), place)
    whole = reference.indexer_k_write_cache(
        key, empty_pages(3, 64, "fp8"), np.arange(150), page_size=64
    )
    for begin, end in ((0, 100), (100, 110), (110, 150)):
        at = np.arange(begin, end)
        slots = table[0, at // 64].astype(np.int64) * 64 + at % 64
        indexer_k_quant_and_cache(
            to_paddle(key[begin:end], place), cache, to_paddle(slots, place), 128, "ue8m0"
        )
        codes = to_paddle(np.zeros((end, 128), np.uint8), place)
        scales = to_paddle(np.zeros((end, 4), np.float32), place)
        cp_gather_indexer_k_quant_cache(
            cache, codes, scales, int32(table, place), int32([0, end, end], place)
        )
        for token in range(end):
            want = row_of(whole, token // 64, token % 64, 64, "fp8")
            assert_same_bits(to_numpy(codes)[token], want[0])
            assert to_numpy(scales).reshape(-1)[token] == want[1].view(np.float32)[0]


@pytest.mark.parametrize("tell", ["batch ids", "starts"])
def test_bug27_decode_rows_belong_to_slots(place, tell):
    """Slots 0 and 3 are empty, 1 prefills, 2 and 4 decode: rows are by slot, outputs by token."""
    k, columns, tables = 5, 200, np.arange(20, dtype=np.int32).reshape(5, 4)[:, ::-1]
    logits = RNG(2).standard_normal((5, columns)).astype(np.float32)
    cu_seqlens_q = np.array([0, 0, 3, 4, 4, 5])
    batch_ids = np.array([1, 1, 1, 2, 4, -1, -1]) if tell == "batch ids" else None
    # FastDeploy up to 2.6 passes zeros for offsets and says which token is whose.
    offsets = np.zeros(4096) if tell == "batch ids" else cu_seqlens_q
    tables = np.ascontiguousarray(tables)
    output = decode(place, logits, offsets, [0, 0, 130, 0, 3], batch_ids, tables, k, rows=7)
    want = np.full((7, k), 77, np.int32)
    for slot, row, length in ((2, 3, 130), (4, 4, 3)):
        picked = rows_of(logits[slot : slot + 1], [length], k)[0]
        want[row] = [-1 if i < 0 else tables[slot, i // 64] * 64 + i % 64 for i in picked]
    assert_same_bits(output, want)


def test_bug27_a_slot_without_a_token_overwrites_nobody(place):
    """A finished slot still has a length; the row at its start is the next slot's."""
    logits = RNG(3).standard_normal((3, 90)).astype(np.float32)
    tables = np.array([[0, 1], [2, 3], [4, 5]], np.int32)
    output = decode(place, logits, np.zeros(99), [80, 70, 60], [0, 2], tables, 4, rows=2)
    want = rows_of(logits[[0, 2]], [80, 60], 4)
    assert_same_bits(output, (want + np.array([[0], [256]])).astype(np.int32))


PLATEAUS = {
    "all equal": lambda shape: np.full(shape, 0.25),
    "zeros of a ReLU": lambda shape: np.maximum(RNG(4).standard_normal(shape) - 2, 0),
    "two values": lambda shape: np.where(RNG(5).random(shape) < 0.01, 2.0, -1.0),
    "equal as fp16": lambda shape: 1 + RNG(6).random(shape) * 2.0**-12,
}


@pytest.mark.parametrize("values", PLATEAUS)
def test_bug28_no_candidate_is_dropped(place, values):
    """Thousands of equal values around the threshold: exactly k indices, the same at every run."""
    logits = PLATEAUS[values]((2, 20011)).astype(np.float32)
    want = rows_of(logits, [20011, 20000], 2048) + np.array([[0], [7]])
    for _ in range(3):
        output = prefill(place, logits, [0, 7], [20011, 20000], 2048)
        assert_same_bits(output, want.astype(np.int32))


@pytest.mark.parametrize("columns", [50, 9000])
def test_bug29_nan_logits_give_indices_of_the_row(place, columns):
    logits = np.full((3, columns), np.nan, np.float32)
    logits[1, ::2] = 1.0
    logits[2, :] = -np.inf
    lengths = np.array([columns, columns - 1, 40])
    output = prefill(place, logits, [0, 0, 0], lengths, 60)
    for row, length in zip(output, lengths):
        real = row[row >= 0]
        assert len(real) == min(length, 60) and (real < length).all()
        assert len(set(real.tolist())) == len(real)
    assert_same_bits(output, rows_of(logits, lengths, 60))


# ---- the cache ---------------------------------------------------------------------------------


def test_bug30_a_page_has_its_codes_first(place):
    """Bytes of a page by hand: 3 tokens of 128 codes, then 3 scales."""
    values = np.array([0, 0.5, -1, 1.5, -2, 3, -4, 7], np.float32)
    key = np.tile(values, (3, 16)) * np.array([[1], [64], [0.5]], np.float32)
    cache = to_paddle(empty_pages(2, 3, "fp8").reshape(2, 3, 132), place)
    slots = np.array([5, 3, -1])
    indexer_k_quant_and_cache(to_paddle(key, place), cache, to_paddle(slots, place), 128, "ue8m0")
    page = to_numpy(cache).reshape(2, 396)
    assert (page[0] == CANARY).all()
    codes = (values * 64).astype(E4M3).view(np.uint8)  # 7 / 448 is 2^-6
    assert_same_bits(page[1, :128], np.tile(codes, 16))
    assert (page[1, 128:256] == CANARY).all()
    assert_same_bits(page[1, 256:384], np.tile(codes, 16))
    words = page[1, 384:].view(np.float32)
    assert words[0] == 1.0 and words[2] == 2.0**-6  # 64 * 7 / 448, 7 / 448
    assert (page[1, 388:392] == CANARY).all()


def test_bug31_offsets_in_a_large_pool_have_64_bits(place):
    """A block whose first byte is past 2^31, under FastDeploy's names."""
    blocks = 2**31 // 8448 + 5
    with paddle.base.dygraph.guard(paddle.CPUPlace() if place == "cpu" else paddle.CUDAPlace(0)):
        cache = paddle.empty([blocks, 64, 132], "uint8")
    key, slots = keys(RNG(7), 2, BF16), np.array([64 * (blocks - 1) + 63, 5])
    indexer_k_quant_and_cache(to_paddle(key, place), cache, to_paddle(slots, place), 128, "")
    want = reference.indexer_k_write_cache(
        key, empty_pages(1, 2, "fp8"), [0, 1], scale_rule="amax_div", page_size=2
    )
    codes = to_paddle(np.zeros((70, 128), np.uint8), place)
    scales = to_paddle(np.zeros(70, np.float32), place)
    cp_gather_indexer_k_quant_cache(
        cache, codes, scales, int32([[blocks - 1], [0]], place), int32([0, 64, 70], place)
    )
    for row, token in ((63, 0), (69, 1)):
        part = row_of(want, 0, token, 2, "fp8")
        assert_same_bits(to_numpy(codes)[row], part[0])
        assert_same_bits(to_numpy(scales)[row : row + 1].view(np.uint8), part[1])


@pytest.mark.parametrize("rows", [7, 40, 300])
def test_bug32_rows_of_no_sequence_are_left_alone(place, rows):
    """A buffer longer than the step's keys, as in a CUDA graph; garbage behind the tables."""
    cache = RNG(8).integers(0, 256, (6, 64, 132)).astype(np.uint8)
    tables = np.full((2, 4), 2147480000, np.int32)
    tables[0, 0], tables[1, 0] = 5, 2
    codes = to_paddle(np.full((rows, 128), CANARY, np.uint8), place)
    scales = to_paddle(np.full((rows, 4), CANARY, np.uint8), place)
    cp_gather_indexer_k_quant_cache(
        to_paddle(cache, place), codes, scales, int32(tables, place), int32([0, 3, 7], place)
    )
    pages = cache.reshape(6, -1)
    for row in range(7):
        page, at = (5, row) if row < 3 else (2, row - 3)
        want = row_of(pages, page, at, 64, "fp8")
        assert_same_bits(to_numpy(codes)[row], want[0])
        assert_same_bits(to_numpy(scales)[row], want[1])
    assert (to_numpy(codes)[7:] == CANARY).all() and (to_numpy(scales)[7:] == CANARY).all()


def test_bug33_powers_of_two_are_exact(place):
    """The least power of two at or above amax / 448, at every exponent and beside each."""
    exponents = np.arange(-22, 120)
    exact = (448.0 * 2.0**exponents).astype(np.float32)
    above, below = np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))
    largest = np.concatenate([exact, above, below])
    key = np.zeros((len(largest), 128), np.float32)
    key[:, 77] = -largest
    pages = -(-len(largest) // 64)
    cache = to_paddle(empty_pages(pages, 64, "fp8").reshape(pages, 64, 132), place)
    slots = np.arange(len(largest))
    indexer_k_quant_and_cache(to_paddle(key, place), cache, to_paddle(slots, place), 128, "ue8m0")
    flat = to_numpy(cache).reshape(pages, -1)
    got = [row_of(flat, i // 64, i % 64, 64, "fp8")[1].view(np.float32)[0] for i in slots]
    want = 2.0 ** np.concatenate([exponents, exponents + 1, exponents])
    # At 2^-22 the floor of 1e-4 decides.
    want = np.maximum(want, 2.0**-22)
    assert_same_bits(np.array(got), want.astype(np.float32))


def test_bug34_as_many_keys_are_written_as_there_are_slots(place):
    """Keys of a graph's padding have no slots; nothing is read behind the last slot."""
    key = keys(RNG(9), 8, BF16)
    key[3:] = np.nan
    cache = to_paddle(empty_pages(2, 4, "fp8").reshape(2, 4, 132), place)
    slots = to_paddle(np.array([6, -1, 0]), place)
    indexer_k_quant_and_cache(to_paddle(key, place), cache, slots, 128, None)
    want = reference.indexer_k_write_cache(
        key[:3], empty_pages(2, 4, "fp8"), [6, -1, 0], scale_rule="amax_div", page_size=4
    )
    assert_same_bits(to_numpy(cache).reshape(2, -1), want)


# ---- FastDeploy's signatures -------------------------------------------------------------------


def test_positions_of_arguments_are_fastdeploys():
    orders = {
        indexer_k_quant_and_cache: "k kv_cache slot_mapping quant_block_size scale_fmt",
        cp_gather_indexer_k_quant_cache: "kv_cache dst_k dst_scale block_table cu_seq_lens",
        radix_topk_ragged_transform: (
            "input output offsets lengths seq_len_decoder batch_id_per_token block_tables buffer "
            "max_block_num top_k q_num_heads"
        ),
    }
    for function, order in orders.items():
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert names == order.split(), function
    assert inspect.signature(radix_topk_ragged_transform).parameters["q_num_heads"].default == 0


@pytest.mark.parametrize("heads", [0, 1, 4])
def test_rows_of_several_heads_share_a_length(place, heads):
    rows, step = 8, max(heads, 1)
    logits = RNG(10).standard_normal((rows, 256)).astype(np.float32)
    lengths = RNG(11).integers(1, 256, rows // step)
    output = prefill(place, logits, np.arange(rows), lengths, 8, heads)
    want = rows_of(logits, np.repeat(lengths, step), 8)
    assert_same_bits(
        output, np.where(want < 0, -1, want + np.arange(rows)[:, None]).astype(np.int32)
    )


def test_heads_of_a_slot_in_decode(place):
    logits = RNG(12).standard_normal((6, 70)).astype(np.float32)
    output = int32(np.full((5, 3), 77), place)
    radix_topk_ragged_transform(
        to_paddle(logits, place), output, int32([0, 0, 1, 2], place), int32([], place),
        int32([0, 70, 66], place), None, int32([[0, 1], [2, -1], [4, 5]], place), None, 2, 3, 2,
    )  # fmt: skip
    want = np.full((5, 3), 77, np.int64)
    for row, out_row, table in ((2, 0, [2, -1]), (3, 1, [2, -1]), (4, 2, [4, 5]), (5, 3, [4, 5])):
        picked = rows_of(logits[row : row + 1], [70 if row < 4 else 66], 3)[0]
        want[out_row] = [table[i // 64] * 64 + i % 64 if table[i // 64] >= 0 else -1
                         for i in picked]  # fmt: skip
    assert_same_bits(to_numpy(output), want.astype(np.int32))


def test_decode_without_tables_adds_offsets(place):
    logits = RNG(13).standard_normal((2, 100)).astype(np.float32)
    output = decode(place, logits, [0, 1, 2], [90, 3], None, None, 5, rows=2)
    want = rows_of(logits, [90, 3], 5)
    assert_same_bits(output, np.where(want < 0, -1, want + np.arange(2)[:, None]).astype(np.int32))


def test_output_rows_past_the_end_are_not_written(place):
    logits = np.zeros((3, 9), np.float32)
    for offsets in ([2, 5, -1], [2**31 - 1, -(2**31), 2]):
        output = decode(place, logits, offsets, [9, 9, 9], None, None, 2, rows=3)
        assert (output[:2] == 77).all() and (output[2] != 77).all()


def test_bfloat16_logits():
    logits = RNG(14).standard_normal((3, 300)).astype(BF16)
    output = prefill("cpu", logits, [0, 1, 2], [300, 200, 3], 7)
    want = rows_of(logits.astype(np.float32), [300, 200, 3], 7)
    assert_same_bits(output, np.where(want < 0, -1, want + np.arange(3)[:, None]).astype(np.int32))


def write_step(k, cache, slots):
    return indexer_k_quant_and_cache(k, cache, slots, 128, "ue8m0")


def gather_step(cache, codes, scales, table, cu_seq_lens):
    return cp_gather_indexer_k_quant_cache(cache, codes, scales, table, cu_seq_lens)


def decode_step(logits, output, offsets, lengths, seq_lens, batch_ids, tables):
    return radix_topk_ragged_transform(
        logits, output, offsets, lengths, seq_lens, batch_ids, tables, None, 2, 6, 1
    )


def test_traced_and_saved(place):
    key, cache = keys(RNG(15), 5, BF16), empty_pages(2, 64, "fp8").reshape(2, 64, 132)
    slots = np.array([7, 100, -1, 2, 5])
    outputs, inputs = run_all_modes(write_step, [key, cache, slots], place)
    want = reference.indexer_k_write_cache(key, cache, slots)
    assert_same_bits(outputs[0], want)
    assert_same_bits(inputs[1], want)
    codes, scales = np.zeros((9, 128), np.uint8), np.zeros((9, 4), np.float32)
    table, cu_seq_lens = np.array([[1], [0]], np.int32), np.array([0, 3, 9], np.int32)
    outputs, inputs = run_all_modes(gather_step, [want, codes, scales, table, cu_seq_lens], place)
    expected = reference.indexer_k_gather(want, table, cu_seq_lens, 9, out=codes, out_scales=scales)
    for i in range(2):
        assert_same_bits(outputs[i], expected[i])
        assert_same_bits(inputs[1 + i], expected[i])
    logits = RNG(16).standard_normal((3, 128)).astype(np.float32)
    arrays = [logits, np.full((4, 6), -1), np.zeros(9), np.zeros(3), [99, 0, 70], [0, 2, -1, -1],
              [[1, 0], [2, 3], [5, 4]]]  # fmt: skip
    arrays = [logits, *(np.array(x, np.int32) for x in arrays[1:])]
    outputs, inputs = run_all_modes(decode_step, arrays, place)
    picked = rows_of(logits[[0, 2]], [99, 70], 6)
    want = np.full((4, 6), -1, np.int32)
    for row, slot in ((0, 0), (1, 2)):
        tables = arrays[6][slot]
        want[row] = [tables[i // 64] * 64 + i % 64 for i in picked[row]]
    assert_same_bits(outputs[0], want)
    assert_same_bits(inputs[1], want)


def zeros(*shape, dtype="int32"):
    return paddle.zeros(shape, dtype)


def test_wrong_arguments():
    k, cache = zeros(2, 128, dtype="float32"), zeros(2, 64, 132, dtype="uint8")
    slots = zeros(2, dtype="int64")
    with pytest.raises(NotImplementedError, match="quant_block_size: expected 128, got 64"):
        indexer_k_quant_and_cache(k, cache, slots, 64, "ue8m0")
    with pytest.raises(ValueError, match="scale_fmt: expected 'ue8m0', '' or None, got 'e8m0'"):
        indexer_k_quant_and_cache(k, cache, slots, 128, "e8m0")
    with pytest.raises(ValueError, match="kv_cache: expected shape"):
        indexer_k_quant_and_cache(k, cache.reshape([2, -1]), slots, 128, "ue8m0")
    with pytest.raises(ValueError, match="dst_k: expected shape"):
        cp_gather_indexer_k_quant_cache(cache, zeros(9, dtype="uint8"), slots, slots, slots)
    with pytest.raises(TypeError, match="dst_scale: expected a tensor, got NoneType"):
        cp_gather_indexer_k_quant_cache(cache, zeros(9, dtype="uint8"), None, slots, slots)
    good = [zeros(4, 9, dtype="float32"), zeros(4, 3), zeros(4), zeros(4)]
    wrong = [
        ({0: zeros(4, 9, dtype="float16")}, TypeError, "input: expected dtype float32"),
        ({1: zeros(4, 2)}, ValueError, r"output: expected shape \[\?, 3\]"),
        ({1: zeros(3, 3)}, ValueError, "output: expected at least 4 rows"),
        ({2: zeros(3)}, ValueError, "offsets: expected at least 4 rows"),
        ({3: zeros(3)}, ValueError, "lengths: expected at least 4 elements, got 3"),
        ({4: zeros(3)}, ValueError, "seq_len_decoder: expected at least 4 elements"),
        ({6: zeros(3)}, ValueError, "block_tables: expected 2 dimensions"),
        ({9: 0}, ValueError, "top_k: expected 1 to 4096, got 0"),
        ({10: 3}, ValueError, "q_num_heads: expected 0 or a divisor of 4 rows, got 3"),
    ]
    for change, error, text in wrong:
        arguments = [*good, None, None, None, None, 0, 3, 1]
        for position, value in change.items():
            arguments[position] = value
        with pytest.raises(error, match=f"radix_topk_ragged_transform: {text}"):
            radix_topk_ragged_transform(*arguments)
