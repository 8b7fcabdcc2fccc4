"""rope_write_cache_kv with a rotary table for each sequence (FastDeploy's rope_3d)."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from benchmarks.core import cuda
from fastattn.reference.layout import BLOCK_SIZE
from tests.support.cache import Step
from tests.support.compare import assert_same_bits, assert_within
from tests.support.rope import (
    CACHES,
    QUANTS,
    Case,
    assert_same_cache,
    check,
    check_all_modes,
    make_case,
    many_seqs,
    own_angles,
    run,
    tables_of,
    with_own_tables,
)
from tests.support.tensors import BF16, DTYPES, int32, skip_slices_on, to_numpy, to_paddle

#: Cached and new tokens: a chunk at an odd offset, decode, rest, a prompt, drafts, a block's end.
CACHED, NEW = [37, 63, 5, 0, 130, 64], [65, 1, 0, 90, 7, 1]


def exact(case: Case, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q [T, H, D] and K [T, KV, D] in fp64, each token turned by its sequence's angles."""
    heads = case.heads + 2 * case.kv_heads
    x = case.qkv.astype(np.float64).reshape(len(case.qkv), heads, case.head_dim)
    if case.tensors["qkv_bias"] is not None:
        x = x + case.tensors["qkv_bias"].astype(np.float64).reshape(heads, case.head_dim)
    rotated = case.options["rotary_dim"] or case.head_dim
    step = case.step

    def turn(head: np.ndarray, angle: np.ndarray) -> np.ndarray:
        pairs = head[..., :rotated].reshape(-1, 2, rotated // 2)
        if not case.options["use_neox_rotary_style"]:
            pairs = head[..., :rotated].reshape(-1, rotated // 2, 2).swapaxes(1, 2)
        turned = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(1j * angle)
        out = np.stack([turned.real, turned.imag], 1)
        if not case.options["use_neox_rotary_style"]:
            out = out.swapaxes(1, 2)
        return np.concatenate([out.reshape(len(head), rotated), head[:, rotated:]], axis=1)

    def normalise(head: np.ndarray, name: str) -> np.ndarray:
        weight = case.tensors.get(name)
        if weight is None:
            return head
        mean = (head**2).mean(-1, keepdims=True) + case.options["rms_norm_eps"]
        return head / np.sqrt(mean) * weight.astype(np.float64)

    q, k = x[:, : case.heads], x[:, case.heads : case.heads + case.kv_heads]
    for seq, (first, count) in enumerate(zip(step.cu_seqlens_q, step.seq_lens_this_time)):
        for i in range(count):
            position = min(step.seq_lens_decoder[seq] + i, angles.shape[1] - 1)
            for part, name in ((q, "q_norm_weight"), (k, "k_norm_weight")):
                head, angle = part[first + i], angles[seq, position]
                if case.options["qk_norm_before_rope"]:
                    part[first + i] = turn(normalise(head, name), angle)
                else:
                    part[first + i] = normalise(turn(head, angle), name)
    return q, k


def cached_keys(case: Case, key: np.ndarray) -> np.ndarray:
    """K [T, KV, D] of the step's tokens out of a cache that is not quantised."""
    step, out = case.step, []
    for seq, count in enumerate(step.seq_lens_this_time):
        for position in step.seq_lens_decoder[seq] + np.arange(count):
            block = step.block_tables[seq, position // BLOCK_SIZE]
            out.append(key[block, :, position % BLOCK_SIZE])
    return np.array(out)


def assert_turned(case: Case, angles: np.ndarray, q: np.ndarray, key: np.ndarray) -> None:
    """One rounding to bfloat16, and fp32 sums of a few terms of the heads' size."""
    for actual, wanted in zip((q, cached_keys(case, key)), exact(case, angles)):
        size = np.abs(wanted).max(axis=-1, keepdims=True)
        assert_within(actual, wanted, 2.0**-8 * np.abs(wanted) + 4e-6 * size)


@pytest.mark.parametrize("new", [NEW, [1, 1, 1, 1, 1, 1], [2, 3, 0, 1, 2, 5]], ids=str)
@pytest.mark.parametrize("norm", [None, "before", "after"])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 32, 24])
@pytest.mark.parametrize("neox", [False, True])
def test_every_sequence_turns_by_its_own_angles(place, neox, rotary_dim, doubled, short, norm, new):
    """Against fp64. The tables end at position 120, which one sequence is past."""
    options = {"norm": norm is not None, "norm_first": norm == "before", "bias": norm is None}
    case = make_case(CACHED, new, neox=neox, rotary_dim=rotary_dim, **options)
    angles = own_angles(case, 8, 120)
    tables = tables_of(angles, neox=neox, doubled=doubled, short=short)
    case = dataclasses.replace(case, rotary_embs=tables)
    q, _, cache = run(case, place)
    assert_turned(case, angles, q, cache.key)


@pytest.mark.parametrize("q_quant", QUANTS)
@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("new", [NEW, [1, 4, 0, 1, 2, 1]], ids=["prompts", "decode"])
def test_every_cache_and_query_type(place, new, head_dim, cache, q_quant):
    options = {"head_dim": head_dim, "cache": cache, "q_quant": q_quant, "neox": True}
    check(with_own_tables(make_case(CACHED, new, **options)), place)


@pytest.mark.parametrize("cache", [CACHES[0], CACHES[-1]], ids="-".join)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 64, 40])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("new", [NEW, [1, 4, 0, 1, 2, 1]], ids=["prompts", "decode"])
def test_options(place, new, dtype, rotary_dim, norm, bias, cache):
    for neox in (False, True):
        case = make_case(CACHED, new, cache=cache, head_dim=128, dtype=DTYPES[dtype], neox=neox,
                         rotary_dim=rotary_dim, norm=norm, norm_first=True, bias=bias)  # fmt: skip
        check(with_own_tables(case), place)


@pytest.mark.parametrize(
    "cached_new", [(CACHED, NEW), (CACHED, [1] * 6)], ids=["prompts", "decode"]
)
@pytest.mark.parametrize("cache", [CACHES[0], CACHES[-1]], ids="-".join)
def test_equal_tables_are_the_shared_one(place, cache, cached_new):
    case = make_case(*cached_new, cache=cache, q_quant="per_token_head", norm=True)
    shared = run(case, place)
    tables = np.stack([case.rotary_embs] * 7)
    own = run(dataclasses.replace(case, rotary_embs=tables), place)
    assert_same_bits(own[0], shared[0], "q")
    assert_same_bits(own[1], shared[1], "q_descale")
    assert_same_cache(own[2], shared[2])


def test_slots_in_another_order(place):
    """Tables, block tables and lengths move together: so do the results, and the cache stays."""
    case = with_own_tables(make_case(CACHED, NEW, cache=CACHES[-1]), spare=0)
    order = [4, 2, 5, 0, 3, 1]
    step = case.step
    starts = step.cu_seqlens_q
    tokens = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in order])
    moved = Step(
        step.block_tables[order],
        np.cumsum([0, *(NEW[b] for b in order)]).astype(np.int32),
        step.seq_lens_decoder[order],
        step.seq_lens_this_time[order],
    )
    q, _, cache = run(case, place)
    other = dataclasses.replace(
        case, qkv=case.qkv[tokens], step=moved, rotary_embs=case.rotary_embs[order]
    )
    q_moved, _, cache_moved = run(other, place)
    assert_same_bits(q_moved, q[tokens], "q")
    assert_same_cache(cache_moved, cache)
    # The tables matter: with those of other sequences every token turns by another angle.
    wrong, _, _ = run(dataclasses.replace(other, rotary_embs=case.rotary_embs), place)
    moves = [i for i, b in enumerate(order) if i != b and NEW[b]]
    for i in moves:
        part = slice(moved.cu_seqlens_q[i], moved.cu_seqlens_q[i + 1])
        assert (wrong[part] != q_moved[part]).any()


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("seqs", "most"), [(300, 1), (90, 4), (40, 30)])
def test_many_seqs_of_which_some_rest(place, seqs, most, with_ids):
    case = many_seqs(seqs, most, with_ids=with_ids, neox=True)
    check(with_own_tables(case, spare=3), place)


@pytest.mark.parametrize("new", [[3, 40], [1, 1]], ids=str)
def test_positions_past_a_table_use_its_own_last_one(place, new):
    """Not the next sequence's first, and not the sines: all else is NaN."""
    case = make_case([30, 8], new)
    angles = own_angles(case, 2, 16)
    tables = tables_of(angles, neox=False, doubled=False)
    case = dataclasses.replace(case, rotary_embs=np.full_like(tables, np.nan))
    case.rotary_embs[:, :, :, 8:] = tables[:, :, :, 8:]
    q, _, cache = run(case, place)
    assert_turned(case, angles, q, cache.key)


def put(tables, seq, own):
    """Write one sequence's table where it lies: no kernel of Paddle's may run on this GPU."""
    own = np.ascontiguousarray(own, np.float32)
    target = tables.data_ptr() + seq * own.nbytes
    if tables.place.is_gpu_place():
        source = ctypes.c_void_p(own.ctypes.data)
        size = ctypes.c_size_t(own.nbytes)
        cuda.driver_call("cuMemcpyHtoD_v2", ctypes.c_uint64(target), source, size)
    else:
        ctypes.memmove(target, own.ctypes.data, own.nbytes)


def test_tables_of_more_than_2_to_the_31_elements(place):
    """1025 slots of 16384 positions, 8.6 GB, of which three sequences' tables are ever touched."""
    slots, positions, columns = 1025, 1 << 14, 64
    assert slots * 2 * positions * columns > 1 << 31
    paddle.set_device(place)
    try:
        tables = paddle.empty([slots, 2, 1, positions, 1, columns], "float32")
    finally:
        paddle.set_device("cpu")
    cached, new = np.zeros(slots, int), np.zeros(slots, int)
    for seq, length in ((0, 5), (1023, positions - 2), (1024, positions - 1)):
        cached[seq], new[seq] = length, 1 if seq else 20
    case = make_case([5, positions - 2, positions - 1], [20, 1, 1], head_dim=128)
    angles = own_angles(case, 3, positions)
    step = Step(
        np.full((slots, case.step.block_tables.shape[1]), -1, np.int32),
        np.cumsum([0, *new]).astype(np.int32),
        cached.astype(np.int32),
        new.astype(np.int32),
    )
    for i, seq in enumerate((0, 1023, 1024)):
        put(tables, seq, tables_of(angles[i : i + 1], neox=False, doubled=False))
        step.block_tables[seq] = case.step.block_tables[i]
    caches = [to_paddle(x.copy(), place) for x in (case.cache.key, case.cache.value)]
    q, _ = F.rope_write_cache_kv(
        to_paddle(case.qkv, place),
        *caches,
        tables,
        *(to_paddle(x, place) for x in step.arrays),
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
    )
    assert_turned(case, angles, to_numpy(q), to_numpy(caches[0]))


def test_traced_and_saved(place):
    case = with_own_tables(make_case([3, 0], [5, 9], cache=CACHES[-1], q_quant="per_token_head"))
    check_all_modes(case, place)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([1, 2, 1, 8, 1, 32], r"expected a table for each of the 2 sequences of the step, got"),
        ([1, 2, 8, 32], r"expected a table for each of the 2 sequences of the step, got"),
        ([2, 3, 1, 8, 1, 32], r"expected shape .* or for tables of their own \[sequences, 2, 1"),
        ([2, 2, 2, 8, 1, 32], "expected shape"),
        ([2, 2, 1, 8, 2, 32], "expected shape"),
        ([2, 8, 2, 32], "expected shape"),
        ([2, 1, 2, 1, 8, 1, 32], "expected shape"),
        ([2, 32], "expected shape"),
        ([2, 2, 1, 8, 1, 16], "expected 32 or 64 columns"),
    ],
    ids=str,
)
def test_wrong_shapes_are_refused_by_name(shape, text):
    case = make_case([0, 3], [2, 1], dtype=BF16)
    case = dataclasses.replace(case, rotary_embs=np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=f"rope_write_cache_kv: rotary_embs: {text}"):
        run(case, "cpu")


def test_tables_of_every_second_slot(place):
    """A view with gaps is copied first."""
    skip_slices_on(place)
    case = with_own_tables(make_case([0, 3], [2, 1]), spare=4)
    q, _, _ = run(dataclasses.replace(case, rotary_embs=case.rotary_embs[::2]), place)
    tables = to_paddle(case.rotary_embs, place)[::2]
    other, _ = F.rope_write_cache_kv(
        to_paddle(case.qkv, place),
        to_paddle(case.cache.key.copy(), place),
        to_paddle(case.cache.value.copy(), place),
        tables,
        *(int32(x, place) for x in case.step.arrays),
        num_heads=4,
        num_kv_heads=2,
    )
    assert_same_bits(to_numpy(other), q, "q")
