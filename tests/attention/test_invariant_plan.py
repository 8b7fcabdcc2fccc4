"""The launches of a batch-invariant call on a GPU: what decides about a sequence is its own."""

from __future__ import annotations

import itertools

import pytest

host = pytest.importorskip("fastattn._host")

CALLS = {  # types of queries and keys, and of the cache
    "bf16": ("bfloat16", "bfloat16", "none"),
    "bf16 over fp8": ("bfloat16", "float8_e4m3fn", "cache_fp8"),
    "fp8": ("float8_e4m3fn", "float8_e4m3fn", "block_wise_fp8"),
}


def decide(call, batch, max_q, max_k, *, heads=(32, 8), dim=128, tokens=None, sms=132, major=9):
    return host.decide_attention(
        *CALLS[call],
        num_tokens=batch * max_q if tokens is None else tokens,
        batch=batch,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=dim,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        compute_major=major,
        num_sms=sms,
        batch_invariant=True,
    )


def taken_by(decision, new, group):
    """What computes a sequence of so many new tokens."""
    prefill, _, launches = decision
    found = [x for x in launches if x["min_packed_rows"] <= new * group <= x["max_packed_rows"]]
    assert len(found) == 1
    return "split" if found[0]["split"] else prefill, found[0]["tile_rows"]


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (40, 8), (16, 1), (17, 1), (128, 1)], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_new_tokens_choose_the_kernel(call, heads, major):
    group = heads[0] // heads[1]
    for new in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 500):
        found = set()
        for batch, longer, sms in itertools.product((1, 3, 40, 256), (0, 1, 30, 4000), (20, 132)):
            max_q = new + longer
            for tokens in {batch * new, batch * max_q, max_q + batch - 1, new + 3}:
                if tokens >= new:
                    sizes = dict(heads=heads, tokens=tokens, sms=sms, major=major)
                    found.add(taken_by(decide(call, batch, max_q, 9000, **sizes), new, group))
        assert len(found) == 1, (new, found)


def test_splits_follow_from_positions():
    """They cover the keys without a gap, each begins at a multiple of its quarter."""
    split, begin, keys = host.invariant_split(0)
    assert (split, begin, keys) == (0, 0, 1024)
    while begin + keys < 2**31 - 2**28:
        following, first, more = host.invariant_split(begin + keys)
        assert (following, first) == (split + 1, begin + keys) and more in (
            keys,
            2 * keys,
            4 * keys,
        )
        assert host.invariant_split(begin + keys - 1) == (split, begin, keys)
        split, begin, keys = following, first, more
    assert [host.invariant_split(k - 1)[0] + 1 for k in (8192, 2**15, 2**17, 2**20)] == [
        8,
        20,
        32,
        48,
    ]


def test_a_sequence_alone_has_many_ctas():
    """8 KV heads, 8k keys: 64 splits, each with a CTA of its own."""
    (launch,) = decide("bf16 over fp8", 1, 1, 8192)[2]
    assert (launch["grid"], launch["tile_rows"]) == (64, 8)


@pytest.mark.parametrize("max_k", [300, 1023, 1024, 1025, 9000, 1 << 17])
def test_a_looser_bound_of_the_keys_moves_no_split(max_k):
    """Room for splits, which the bound decides about, is enough for every sequence below it."""
    for tile_rows, max_q in ((8, 1), (16, 4), (64, 16)):
        launches = decide("bf16 over fp8", 4, max_q, max_k)[2]
        room = next(x["invariant_splits"] for x in launches if x["tile_rows"] == tile_rows)
        assert room == host.invariant_split(max_k - 1)[0] + 1


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("new", [1, 4, 40, 4096])
def test_one_kernel_where_cuts_must_not_matter(call, new, major):
    sizes = dict(num_tokens=4 * new, batch=4, num_heads=32, num_kv_heads=8, head_dim=128)
    sizes |= dict(max_seqlen_q=new, max_seqlen_k=9000, compute_major=major)
    prefill, _, launches = host.decide_attention(*CALLS[call], **sizes, split_invariant=True)
    assert prefill == "mma_sm80" and all(x["split"] for x in launches)
    assert launches[-1]["max_packed_rows"] == 2**31 - 1
    room = host.dequantize_plan(*CALLS[call], **sizes, split_invariant=True)
    assert room["blocks"] == 0


def test_workspace():
    """Bytes that docs/numerics.md tells of a step of 256 sequences of 32k keys."""
    megabytes = [
        decide(call, 256, max_q, 32768, heads=heads)[1] * 4 / 2**20
        for call, max_q, heads in (
            ("bf16 over fp8", 1, (32, 8)),
            ("bf16 over fp8", 1, (128, 8)),
            ("bf16 over fp8", 512, (32, 8)),
        )
    ]
    assert [round(x, 1) for x in megabytes] == [23.1, 46.1, 213.5]


@pytest.mark.parametrize(
    "batch, whole", [(1, False), (8, False), (13, True), (16, True), (40, False)]
)
def test_a_call_of_few_keys_is_not_cut(batch, whole):
    """One CTA for each work tile and no second kernel, where they fill most of the GPU."""
    (launch,) = decide("bf16 over fp8", batch, 1, 1024)[2]
    assert bool(launch["whole_tiles"]) == whole
    assert (launch["workspace"] == 0) == (whole or launch["invariant_splits"] == 1)


@pytest.mark.parametrize(
    "new, max_k, heads, whole",
    [
        (131072, 131072, (64, 8), True),
        (32768, 131072, (64, 8), True),
        (32000, 131072, (64, 8), False),
        (8192, 131072, (64, 8), False),
        (1 << 20, 1 << 20, (64, 8), True),
        (16, 1 << 30, (64, 8), True),
        (5, 1 << 20, (16, 1), False),
    ],
)
def test_costs_that_the_device_adds_up_fit(new, max_k, heads, whole):
    """A launch whose splits cost 2^29 or more has whole tiles, whose cost is 1 each.

    The device adds up in 32 bits. It leaves a sequence out whose cost is 2^30 or more.
    """
    sizes = dict(num_tokens=new, batch=1, num_heads=heads[0], num_kv_heads=heads[1], head_dim=128)
    sizes |= dict(max_seqlen_q=new, max_seqlen_k=max_k, num_sms=132)
    _, workspace, launches = host.decide_attention(*CALLS["bf16"], **sizes, split_invariant=True)
    launch = launches[-1]
    tile_rows, kv_tile = launch["tile_rows"], 32
    tiles = -(-new * (heads[0] // heads[1]) // tile_rows) * heads[1]
    cost = tiles * (4 * -(-max_k // kv_tile) + 24)
    assert bool(launch["whole_tiles"]) == whole == (cost >= 2**29)
    assert launch["grid"] <= 264 and workspace * 4 < 2**28
