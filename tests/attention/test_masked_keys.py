"""A masked key moves no bit of a query, whatever lies there and whoever else sees it.

Some keys are overwritten with zeros and with garbage in turn. Every query that does not see them
must keep the bits of its output and of its LSE. What a query sees is found here, from the masks'
definition.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

from tests.support.attention import (
    CACHE_KINDS,
    GROUPED_KINDS,
    MIXED_KINDS,
    CacheKind,
    flash_problem,
    paged_problem,
)
from tests.support.compare import assert_same_bits
from tests.support.tensors import E5M2

#: Every type of cache and granularity; one dtype of scales is enough.
KINDS = [kind for kind in CACHE_KINDS if kind.scale_dtype == "float32"]
#: One of each type.
FEW = [
    CacheKind(),
    CacheKind("cache_int8", "channel"),
    CacheKind("cache_fp8", "head"),
    CacheKind("cache_fp8", "tensor", "e5m2"),
    CacheKind("block_wise_fp8"),
    CacheKind("block_wise_int8"),
    CacheKind("block_wise_int4"),
    *MIXED_KINDS,
    *GROUPED_KINDS,
]
GARBAGE = ("large", "huge", "nan", "inf")
#: Codes of the largest magnitude, NaN and infinity of each code; none: the nearest thing.
CODES = {
    "int8": {"large": 0x7F, "huge": 0x81, "nan": 0x80, "inf": 0x7F},
    "e4m3": {"large": 0x7E, "huge": 0xFE, "nan": 0x7F, "inf": 0xFF},
    "e5m2": {"large": 0x7B, "huge": 0xFB, "nan": 0x7E, "inf": 0x7C},
    "int4": {"large": 0xF, "huge": 0x0, "nan": 0xF, "inf": 0x0},
    "e2m1": {"large": 0x7, "huge": 0xF, "nan": 0x7, "inf": 0xF},
}
#: 16-bit values, and scales of tokens.
VALUES = {"zero": 0.0, "large": 1e4, "huge": 3e38, "nan": np.nan, "inf": np.inf}
SCALES = {"zero": 1e-6 / 448, "large": 1e4 / 448, "huge": 7e35, "nan": np.nan, "inf": np.inf}
#: The same of MXFP4 blocks: UE8M0 bytes.
BLOCK_SCALES = {"zero": 98, "large": 131, "huge": 246, "nan": 255, "inf": 254}

#: (cached, new) tokens: for the kernels of many queries, of a few, and of one.
LONG, SHORT = [(70, 200), (3, 77)], [(331, 5), (64, 3)]


def fill(elements: np.ndarray, scales, where, code: str | None, garbage: str) -> None:
    """Overwrite tokens of K or V."""
    if code is None:
        largest = float(np.finfo(np.float16).max) if elements.dtype == np.float16 else 3e38
        value = VALUES[garbage]
        elements[where] = value if not np.isfinite(value) else min(value, largest)
        return
    zero = 8 if code == "int4" else 0
    byte = zero if garbage == "zero" else CODES[code][garbage]
    elements.view(np.uint8)[where] = byte
    if scales is not None:
        scales[where] = (BLOCK_SCALES if code == "e2m1" else SCALES)[garbage]


def paged_with(problem, seq: int, positions, garbage: str):
    """The problem with these keys and values of a sequence overwritten."""
    other = copy.deepcopy(problem)
    blocks = other.block_tables[seq, np.asarray(positions) // 64]
    where = (blocks, slice(None), np.asarray(positions) % 64)
    for stored in (other.k, other.v):
        code = None if other.kind.quant_type == "none" else stored.code
        scales = stored.scales if other.kind.dynamic else None
        fill(stored.elements, scales, where, code, garbage)
    return other


def intervals(new: int, keys: int, options: dict, offsets=None) -> np.ndarray:
    """Keys [begin, end) that each query of a sequence sees, [new, 2]."""
    seen = np.empty((new, 2), np.int64)
    for i in range(new):
        position, begin, end = i + keys - new, 0, keys
        if options.get("causal", True):
            end = min(end, position + 1)
        left, right = options.get("window_size", (-1, -1))
        if left >= 0:
            begin = max(begin, position - left)
        if right >= 0:
            end = min(end, position + right + 1)
        if offsets is not None:
            begin, end = max(begin, offsets[i, 0]), min(end, offsets[i, 1])
        seen[i] = begin, end
    return seen


def assert_masked(place, problem, change, tokens, seen, positions) -> bool:
    """Hold the queries `tokens` that see none of `positions` to the bits of zeros there.

    False if there is no such query.
    """
    begin, end = seen[:, 0, None], seen[:, 1, None]
    blind = ~((positions >= begin) & (positions < end)).any(axis=1)
    queries = np.asarray(tokens)[blind]
    if queries.size == 0:
        return False
    # In fp32: a rounded output hides most moves.
    out, lse = change("zero").run(place, out_dtype="float32")
    for garbage in GARBAGE:
        other, other_lse = change(garbage).run(place, out_dtype="float32")
        assert_same_bits(other_lse[:, queries], lse[:, queries], f"lse, {garbage}")
        assert_same_bits(other[queries], out[queries], f"out, {garbage}")
    return True


def check_paged(place, problem, positions, seq: int = 0) -> bool:
    first, new = int(problem.cu_seqlens_q[seq]), int(problem.seq_lens_this_time[seq])
    keys = int(problem.seq_lens_decoder[seq]) + new
    tokens = np.arange(first, first + new)
    offsets = problem.options.get("mask_offsets")
    if offsets is not None:
        offsets = offsets[tokens]
    seen = intervals(new, keys, problem.options, offsets)
    positions = np.asarray(positions)

    def change(garbage):
        return paged_with(problem, seq, positions, garbage)

    return assert_masked(place, problem, change, tokens, seen, positions)


def query_types(kind: CacheKind) -> list[str | None]:
    """16-bit queries, and those that take the FP8 products."""
    fp8 = kind.quant_type != "none" and kind.code != "int8"
    return [None, "e4m3:token_head"] if fp8 else [None]


@pytest.mark.few_on_cpu("kind", "seqs")
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("seqs", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_keys_behind_a_query(place, kind, seqs, dim):
    prefix, new = seqs[0]
    for seed, q_type in enumerate(query_types(kind)):
        problem = paged_problem(seqs, kind=kind, dim=dim, q_type=q_type, seed=seed)
        for offset in (0, 1, 63, 64, 65, 100):
            query = min(offset, new - 2)
            assert check_paged(place, problem, np.arange(prefix + query + 1, prefix + new))


@pytest.mark.few_on_cpu("kind", "options")
@pytest.mark.parametrize("seqs", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("kind", FEW, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (40, -1)},
        {"causal": False, "window_size": (37, 20)},
        {"window_size": (2, -1), "softcap": 5.0},
        {"softcap": 5.0},
        {"sinks": np.array([0.3, -1.0, 4.0, 9.0], np.float32)},
    ],
    ids=lambda options: "-".join(options),
)
def test_keys_beside_a_window(place, kind, options, seqs):
    prefix, new = seqs[0]
    for seed, q_type in enumerate(query_types(kind)):
        problem = paged_problem(seqs, kind=kind, dim=128, q_type=q_type, seed=seed, **options)
        left = problem.options.get("window_size", (20, -1))[0]
        compared = [
            check_paged(place, problem, positions)
            for position in (prefix + 2 - left, prefix + new // 2, prefix + new - 1)
            for positions in ([position], np.arange(position, prefix + new))
        ]
        assert any(compared)


@pytest.mark.parametrize("seqs", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_keys_outside_of_mask_offsets(place, kind, seqs):
    rng = np.random.default_rng(5)
    tokens, (prefix, new) = sum(seq[1] for seq in seqs), seqs[0]
    start = rng.integers(0, prefix, tokens)
    length = rng.integers(1, prefix + new, tokens)
    offsets = np.stack([start, start + length], axis=1).astype(np.int32)
    offsets[0] = 3, prefix // 2
    for seed, q_type in enumerate(query_types(kind)):
        problem = paged_problem(
            seqs, kind=kind, dim=128, q_type=q_type, seed=seed, causal=False, mask_offsets=offsets
        )
        assert check_paged(place, problem, np.arange(prefix // 2 + 1, prefix + new))
        check_paged(place, problem, [prefix + new // 3])
        check_paged(place, problem, np.arange(3))


@pytest.mark.parametrize("kind", FEW, ids=str)
@pytest.mark.parametrize("seqs", [[(70, 200)], [(331, 5)], [(100, 1)]], ids=str)
def test_unwritten_keys_of_the_last_block(place, kind, seqs):
    (prefix, new), tokens = seqs[0], seqs[0][1]
    for seed, q_type in enumerate(query_types(kind)):
        for causal in (True, False):
            problem = paged_problem(
                seqs, kind=kind, dim=128, q_type=q_type, seed=seed, causal=causal
            )
            end = prefix + new
            positions = np.arange(end, (end + 63) // 64 * 64)
            seen = intervals(new, end, problem.options)

            def change(garbage, problem=problem, positions=positions):
                return paged_with(problem, 0, positions, garbage)

            assert assert_masked(place, problem, change, np.arange(tokens), seen, positions)


@pytest.mark.parametrize("kind", FEW[-2:], ids=str)
@pytest.mark.parametrize("seqs", [LONG, SHORT], ids=["long", "short"])
def test_a_large_token_scale_takes_no_precision_of_the_queries_that_do_not_see_it(
    place, kind, seqs
):
    """As before it was there, they are as near to fp64 as any."""
    prefix, new = seqs[0]
    for q_type in query_types(kind):
        problem = paged_problem(seqs, kind=kind, dim=128, q_type=q_type, v_mean=0.0)
        changed = paged_with(problem, 0, [prefix + new - 1], "huge")
        exact, exact_lse = problem.reference()
        out, lse = changed.run(place)
        blind = np.arange(new - 1)
        error = out[blind].astype(np.float64) - exact[blind]
        size = np.sqrt(np.mean(exact[blind] ** 2))
        # e4m3 probabilities on a GPU are the coarsest.
        assert np.sqrt(np.mean(error**2)) < 0.06 * size
        np.testing.assert_allclose(lse[:, blind], exact_lse[:, blind], atol=0.03)


FLASH_TYPES = [
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "e4m3"),
    ("bfloat16", "e5m2"),
    ("bfloat16", "int8"),
    ("e4m3:token_head", "e4m3"),
]


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    "seqs", [[(200, 270), (77, 80)], [(5, 333), (3, 9)]], ids=["long", "short"]
)
@pytest.mark.parametrize("q_type, kv_type", FLASH_TYPES)
def test_contiguous_keys(place, q_type, kv_type, seqs, dim):
    (new, keys), _ = seqs
    code = kv_type if kv_type in CODES else None
    for options in ({"causal": True}, {"causal": False, "window_size": (50, 0)}):
        problem = flash_problem(seqs, dim=dim, q_type=q_type, kv_type=kv_type, **options)
        seen = intervals(new, keys, options)
        # Behind queries of the first sequence, up to the end of the next sequence.
        for offset in (0, 1, 63, 64, 65, 100, new - 1):
            query = min(offset, new - 1)
            positions = np.arange(keys - new + query + 1, keys + seqs[1][1])

            def change(garbage, problem=problem, positions=positions):
                other = copy.deepcopy(problem)
                for x in (other.k, other.v):
                    raw = x.view(np.uint8) if x.dtype == E5M2 else x
                    fill(raw, None, positions, code, garbage)
                return other

            assert assert_masked(place, problem, change, np.arange(new), seen, positions)
