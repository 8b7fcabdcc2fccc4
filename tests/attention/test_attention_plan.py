"""How an attention call is shared out on a GPU: a pure function of ints that the host knows."""

from __future__ import annotations

import itertools

import pytest

from fastattn.functional._cache_types import CACHE_QUANT_TYPES, HEAD_DIMS
from tests.support import ROOT

host = pytest.importorskip("fastattn._host")

SMS = 132


def plan(
    batch,
    max_q,
    max_k,
    *,
    heads=32,
    kv_heads=8,
    head_dim=128,
    bytes_=1,
    tokens=None,
    cluster=1,
    long_seq=64,
    clusters=0,
):
    return host.plan_attention(
        num_tokens=batch * max_q if tokens is None else tokens,
        batch=batch,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        element_bytes=bytes_,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        num_sms=SMS,
        max_cluster=cluster,
        long_seq=long_seq,
        num_clusters=clusters,
    )


@pytest.mark.parametrize(
    "heads, kv_heads, max_q, tile_rows",
    [
        *((32, 8, 1, 8), (64, 8, 1, 8), (32, 8, 2, 8), (32, 8, 3, 16), (16, 1, 1, 16)),
        *((17, 1, 1, 64), (32, 8, 5, 64), (64, 8, 8, 64), (128, 1, 1, 64), (128, 1, 8, 64)),
    ],
)
def test_short_seqs_are_one_split_launch(heads, kv_heads, max_q, tile_rows):
    """All query heads of a KV head share a tile: the smallest that holds them, at most 64."""
    (launch,) = plan(4, max_q, 8192, heads=heads, kv_heads=kv_heads)
    assert launch["split"] == 1
    assert launch["tile_rows"] == tile_rows
    assert launch["min_packed_rows"] == 0 and launch["max_packed_rows"] >= 2**31 - 1


GROUPS = [(8, 8), (16, 8), (6, 2), (32, 8), (40, 8), (64, 8), (9, 1), (16, 1), (17, 1), (128, 1)]


@pytest.mark.parametrize("long_seq", [33, 64])
@pytest.mark.parametrize("heads, kv_heads", GROUPS)
def test_launches_of_a_mixed_call(heads, kv_heads, long_seq):
    """Sequences of a few tokens, speculative ones and long ones, each with tiles that they fill."""
    group = heads // kv_heads
    sizes = dict(heads=heads, kv_heads=kv_heads, long_seq=long_seq)
    decode, rest, long = plan(70, 2000, 8192, tokens=2200, **sizes)
    assert (decode["split"], rest["split"], long["split"]) == (1, 1, 0)
    assert decode["tile_rows"] == (16 if group <= 16 else 64)
    assert decode["max_packed_rows"] == max(decode["tile_rows"], group)
    assert rest["max_packed_rows"] == long_seq * group - 1
    assert (rest["tile_rows"], long["tile_rows"]) == (64, 64)
    assert long["workspace"] == 0


def test_a_chunk_beside_decode_has_tiles_for_one_token():
    decode, long = plan(33, 2048, 8192, tokens=2080)
    assert decode["tile_rows"] == 8 and not long["split"]


@pytest.mark.parametrize("batch, long", [(2, False), (3, True)])
def test_a_few_seqs_are_split_though_they_are_long(batch, long):
    """Their heads are too few for a kernel that splits no keys."""
    launches = plan(batch, 48, 8192, long_seq=33)
    assert [x["split"] for x in launches] == ([0] if long else [1, 1])


def _launches_of(launches, tokens, group):
    """How many launches take a sequence of so many new tokens, by each kernel's rule.

    Decode and whole tiles count packed rows; a prefill kernel counts tokens, from
    the fewest that the launch of whole tiles would take.
    """
    by_rows = [x["min_packed_rows"] <= tokens * group <= x["max_packed_rows"] for x in launches]
    by_tokens = [
        tokens >= -(-x["min_packed_rows"] // group) if not x["split"] else taken
        for x, taken in zip(launches, by_rows)
    ]
    return sum(by_rows), sum(by_tokens)


@pytest.mark.parametrize("heads, kv_heads", GROUPS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_every_seq_belongs_to_one_launch(heads, kv_heads, head_dim):
    """Sequences longer than the host was told, too."""
    lengths = [*range(1, 300), 1000, 4096, 10**6]
    sizes = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    seen = set()
    for max_q in (0, 1, 2, 7, 8, 9, 16, 17, 32, 33, 34, 63, 64, 65, 128, 5000):
        for batch, long_seq in itertools.product((1, 9, 600), (33, 64)):
            for tokens in {1, max_q, max_q + batch - 1, max_q + batch, batch * max_q, 3000} - {0}:
                launches = plan(batch, max_q, 8192, tokens=tokens, long_seq=long_seq, **sizes)
                limits = tuple(
                    (x["min_packed_rows"], x["max_packed_rows"], x["split"]) for x in launches
                )
                if limits in seen:
                    continue
                seen.add(limits)
                for n in lengths:
                    found = _launches_of(launches, n, heads // kv_heads)
                    assert found == (1, 1), (max_q, batch, tokens, long_seq, n, found)
    assert {len(limits) for limits in seen} == {1, 2, 3}


def _may_be_short(batch, max_q, tokens, long_seq):
    """Whether one of sequences of 1 .. max_q tokens can have 2 .. long_seq - 1; one has max_q."""
    sums = {0: False}  # of the sequences so far: whether a short one may be among them
    for _ in range(batch - 1):
        longer = {}
        for total, short in sums.items():
            for n in range(1, min(max_q, tokens - total) + 1):
                longer[total + n] = longer.get(total + n, False) or short or 2 <= n < long_seq
        sums = longer
    return sums.get(tokens - max_q, False)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("max_q, long_seq", [(64, 64), (65, 64), (64, 33), (130, 33)])
def test_short_seqs_have_a_launch_where_they_can_exist(batch, max_q, long_seq):
    sizes = dict(heads=128, kv_heads=8, long_seq=long_seq)
    for tokens in range(max_q + batch - 1, batch * max_q + 1):
        made = len(plan(batch, max_q, 8192, tokens=tokens, **sizes)) == 3
        assert made == _may_be_short(batch, max_q, tokens, long_seq), tokens


def test_a_chunk_beside_decode_pays_for_no_more():
    assert [x["split"] for x in plan(33, 2048, 8192, tokens=2080)] == [1, 0]


@pytest.mark.parametrize("batch, max_q", [(16, 1024), (1, 64), (4, 100)])
def test_pure_prefill_is_one_launch_without_a_workspace(batch, max_q):
    (launch,) = plan(batch, max_q, 8192, tokens=batch * max_q)
    assert not launch["split"] and launch["workspace"] == 0 and launch["min_packed_rows"] == 0
    assert len(plan(batch, max_q, 8192, tokens=batch * max_q + 1)) > 1  # the last one is padding


def test_grid_holds_every_tile_of_every_seq():
    """Sequences of 1 token and long ones, in the worst order: as many tiles as there can be."""
    lengths = [1, 2000, 1, 999, 17, 64, 65, 3000]
    *_, prefill = plan(len(lengths), 3000, 8192, tokens=sum(lengths))
    tiles = sum(-(-4 * n // prefill["tile_rows"]) for n in lengths)
    assert prefill["grid"] >= 8 * tiles


@pytest.mark.parametrize("batch", [1, 3, 64, 1000])
@pytest.mark.parametrize("max_k", [0, 1, 64, 1000, 32768, 1 << 20])
def test_small_calls_have_no_more_ctas_than_kv_tiles(batch, max_k):
    (launch,) = plan(batch, 1, max_k)
    kv_tiles = batch * 8 * (max(-(-max_k // 64), 1) + 1)
    assert 1 <= launch["grid"] <= min(kv_tiles, 2 * SMS)


def test_large_calls_fill_the_gpu_once():
    """Equal shares: CTAs that wait for others to end would only pay for another start."""
    (launch,) = plan(128, 1, 32768)
    assert launch["grid"] == 2 * SMS


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_workspace_holds_two_partial_results_of_every_cta(head_dim):
    (launch,) = plan(16, 1, 8192, head_dim=head_dim)
    value_dim = 128 if head_dim == 192 else head_dim
    assert launch["workspace"] >= launch["grid"] * 2 * launch["tile_rows"] * (value_dim + 2)


def test_workspace_does_not_grow_with_the_batch_or_the_context():
    """A server plans its memory once."""
    sizes = {plan(b, 1, k)[0]["workspace"] for b in (256, 512) for k in (1 << 17, 1 << 20)}
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "batch, kv_heads, max_k, cluster",
    [
        *((1, 8, 1024, 8), (1, 8, 1 << 20, 8), (2, 8, 8192, 8), (1, 1, 1024, 8)),
        *((4, 8, 4096, 4), (32, 1, 4096, 4), (16, 8, 1024, 2)),
    ],
)
def test_clusters_take_a_call_of_few_keys(batch, kv_heads, max_k, cluster):
    """All CTAs run at the same time, and nothing goes through memory between them."""
    (launch,) = plan(batch, 1, max_k, heads=4 * kv_heads, kv_heads=kv_heads, cluster=8)
    assert launch["cluster"] == cluster
    assert launch["grid"] == batch * kv_heads * cluster <= (2 if cluster == 2 else 1) * SMS
    assert launch["workspace"] == 0
    assert launch["cluster_kv_tiles"] == ANY and not launch["finds_seqs"]


ANY = 2**31 - 1  # KV tiles


@pytest.mark.parametrize(
    "batch, kv_heads, cluster, kv_tiles",
    [
        *((2, 8, 8, 264), (4, 8, 4, 132), (16, 8, 2, 33), (32, 1, 4, 132)),
        *((1, 1, 8, 32), (1, 2, 8, 64), (1, 16, 8, 264)),
    ],
)
@pytest.mark.parametrize("clusters, places", [(0, 264), (32, 256), (33, 264)])
def test_the_device_decides_where_the_bound_of_the_keys_is_loose(
    batch, kv_heads, cluster, kv_tiles, clusters, places
):
    """The launch has CTAs for both ways; the limit is that of calls whose lengths are known."""
    sizes = dict(heads=4 * kv_heads, kv_heads=kv_heads, cluster=8, clusters=clusters)
    (known,) = plan(batch, 1, 64 * kv_tiles, **sizes)
    assert known["cluster"] == cluster and not known["finds_seqs"]
    for max_k in (64 * kv_tiles + 1, 1 << 20):
        (launch,) = plan(batch, 1, max_k, **sizes)
        assert launch["finds_seqs"] and launch["cluster"] == cluster
        assert launch["cluster_kv_tiles"] == kv_tiles
        assert launch["grid"] % cluster == 0 and launch["grid"] >= known["grid"]
        assert 0 <= launch["grid"] - max(launch["shares"], known["grid"]) < cluster
        assert launch["shares"] <= (264 if cluster == 2 else places)
        assert launch["workspace"] >= launch["shares"] * 2 * launch["tile_rows"] * (128 + 2)


@pytest.mark.parametrize(
    "batch, kv_heads, max_k, merges",
    [
        *((2, 8, 1 << 17, True), (16, 8, 1 << 17, True), (32, 4, 1 << 17, True)),
        *((17, 1, 1 << 17, True), (15, 1, 1 << 17, False), (1, 1, 1 << 17, False)),
        *((1, 8, 1 << 17, False), (16, 8, 1024, False), (64, 8, 1 << 17, False)),
    ],
)
def test_ctas_join_partial_results_where_clusters_are_likely_and_splits_few(
    batch, kv_heads, max_k, merges
):
    """Up to 16 splits a work tile on average; never where the merge has always work, or none."""
    sizes = dict(heads=4 * kv_heads, kv_heads=kv_heads, cluster=8)
    (launch,) = plan(batch, 1, max_k, **sizes)
    assert bool(launch["merges_in_kernel"]) == merges
    if merges:
        assert launch["finds_seqs"] and launch["shares"] < 17 * batch * kv_heads
    alone = plan(batch, 1, max_k, **(sizes | {"cluster": 1}))
    assert not any(launch["merges_in_kernel"] for launch in alone)
    if 1 < batch <= 17 and max_k > 1024:
        (captured,) = plan(256, 1, max_k, tokens=batch, **sizes)
        assert bool(captured["merges_in_kernel"]) == merges


@pytest.mark.parametrize(
    "tokens, max_q, cluster, seqs", [(1, 1, 8, 1), (2, 1, 8, 2), (4, 4, 8, 4), (16, 1, 2, 16)]
)
def test_a_captured_step_has_seqs_without_tokens(tokens, max_q, cluster, seqs):
    """Clusters are as many as there are tokens, at most, and as large as fit as many sequences."""
    (launch,) = plan(256, max_q, 32768, tokens=tokens, heads=16, cluster=8)
    assert launch["finds_seqs"] and launch["cluster"] == cluster
    assert launch["grid"] >= seqs * 8 * cluster
    one = -(-tokens // max_q) == 1
    assert (launch["cluster_kv_tiles"] == ANY) == one
    assert (launch["workspace"] == 0) == one


@pytest.mark.parametrize(
    "batch, max_q, kv_heads, max_k",
    [
        *((64, 1, 8, 1024), (17, 1, 8, 1024)),  # more sequences and heads than clusters
        (1, 8, 8, 1024),  # tiles of 64 packed rows
        (1, 2000, 8, 2000),  # sequences of many tokens
    ],
)
def test_other_calls_are_shared_out_equally(batch, max_q, kv_heads, max_k):
    sizes = dict(heads=4 * kv_heads, kv_heads=kv_heads, tokens=batch * max_q)
    assert plan(batch, max_q, max_k, cluster=8, **sizes) == plan(batch, max_q, max_k, **sizes)


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_no_larger_cluster_than_the_device_has(cluster):
    (launch,) = plan(1, 1, 1024, cluster=cluster)
    assert launch["cluster"] == cluster


@pytest.mark.parametrize("batch, tokens", [(0, 0), (0, 5), (3, 0)])
def test_empty_calls_have_no_launch(batch, tokens):
    assert plan(batch, 1, 64, tokens=tokens) == []


def decide(
    q, k, cache_type, *, head_dim=128, tokens=4096, batch=2, max_q=4096, max_k=8192, major=9
):
    return host.decide_attention(
        q, k, cache_type, tokens, batch, 32, 8, head_dim, max_q, max_k, compute_major=major
    )


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("new", [1, 2, 7, 64, 4096])
@pytest.mark.parametrize("kind", ["none", "cache_fp8", "block_wise_fp8"])
def test_general_calls_have_kernels_of_16_and_64_packed_rows(kind, new, major):
    """With a tree mask, or windows or tables of heads: the kernel that every GPU has."""
    key = "bfloat16" if kind == "none" else "float8_e4m3fn"
    call = ("bfloat16", key, kind, 4 * new, 4, 8, 4, 128, new, 8192)
    prefill, workspace, launches = host.decide_attention(*call, compute_major=major, general=True)
    assert prefill == "mma_sm80" and launches
    assert {launch["tile_rows"] for launch in launches} <= {16, 64}
    assert host.dequantize_plan(*call, compute_major=major, general=True)["blocks"] == 0
    # Enough room for the partial results of the wider tiles.
    least = sum(
        launch["shares"] * 2 * launch["tile_rows"] * 130
        for launch in launches
        if launch["split"] and launch["shares"] > 1
    )
    assert workspace >= least
    plain = host.decide_attention(*call, compute_major=9)[2]
    if new == 1:
        assert plain[0]["tile_rows"] == 8


E4M3, E5M2, BF16, FP16 = "float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "q, k, cache_type, kernel",
    [
        (E4M3, E4M3, "cache_fp8", "wgmma_fp8"),
        (E4M3, E5M2, "cache_fp8", "wgmma_fp8"),
        (E4M3, E4M3, "block_wise_fp8", "wgmma_fp8"),
        (E4M3, E5M2, "block_wise_fp8", "mma_sm80"),
        (E4M3, E4M3, "ragged", "wgmma_fp8"),
        (E4M3, "int8", "cache_int8", "mma_sm80"),
        (E4M3, "int8", "block_wise_int8", "mma_sm80"),
        (BF16, BF16, "none", "wgmma_q16"),
        (FP16, FP16, "none", "wgmma_q16"),
        (FP16, BF16, "none", "mma_sm80"),
        (BF16, E4M3, "cache_fp8", "wgmma_q16"),
        (BF16, E5M2, "cache_fp8", "wgmma_q16"),
        (BF16, E4M3, "block_wise_fp8", "wgmma_q16"),
        (BF16, E5M2, "block_wise_fp8", "mma_sm80"),
        (FP16, "int8", "cache_int8", "wgmma_q16"),
        (BF16, "int8", "block_wise_int8", "wgmma_q16"),
        (BF16, "int8", "ragged", "wgmma_q16"),
        (BF16, FP16, "ragged", "mma_sm80"),
    ],
)
def test_kernel_of_long_sequences(q, k, cache_type, kernel, head_dim):
    """By the types of Q and of the cache, on a Hopper GPU; another one has mma_sm80 alone."""
    found, workspace, launches = decide(q, k, cache_type, head_dim=head_dim)
    assert found == kernel
    transposed = cache_type == "ragged" and kernel == "wgmma_fp8"
    splits = sum(launch["workspace"] for launch in launches)
    blocks = 2 * 8192 // 64 + 2  # of 64 tokens, and one more a sequence
    assert workspace == splits + (blocks * 8 * head_dim * 64 // 4 if transposed else 0)
    for major in (8, 10, 12):
        assert decide(q, k, cache_type, head_dim=head_dim, major=major)[0] == "mma_sm80"


@pytest.mark.parametrize("max_q, batch", [(1, 64), (8, 4), (2, 300)])
def test_a_call_without_long_sequences_takes_no_prefill_kernel(max_q, batch):
    found, _, launches = decide(
        E4M3, E4M3, "cache_fp8", tokens=max_q * batch, batch=batch, max_q=max_q
    )
    assert found == "mma_sm80" and all(launch["split"] for launch in launches)


@pytest.mark.parametrize(
    "q, k, cache_type",
    [(BF16, E4M3, "cache_fp8"), (E4M3, E4M3, "block_wise_fp8"), (BF16, BF16, "none")],
)
@pytest.mark.parametrize("chunk", [64, 512, 2048])
def test_a_loose_bound_of_the_keys_changes_nothing_of_a_mixed_step(q, k, cache_type, chunk):
    """A server that knows the step's longest chunk, but not the keys, gets the same launches."""
    exact, loose = (
        decide(q, k, cache_type, tokens=chunk + 63, batch=64, max_q=chunk, max_k=max_k)
        for max_k in (8192, 131072)
    )
    assert exact == loose and len(exact[2]) == 2


@pytest.mark.parametrize("max_k, clusters", [(8192, True), (40960, True), (41024, False)])
def test_one_long_sequence_with_scales_of_tokens_is_read_by_all(max_k, clusters):
    """Half of the multiprocessors would be busy with its scales."""
    one = dict(tokens=1, batch=1, max_q=1, max_k=max_k)
    (launch,) = decide(BF16, "int8", "block_wise_int8", **one)[2]
    assert launch["cluster"] == 8
    assert (launch["cluster_kv_tiles"] == ANY) == clusters
    assert bool(launch["merges_in_kernel"]) == (not clusters)
    (launch,) = decide(BF16, "int8", "cache_int8", **one)[2]
    assert launch["cluster_kv_tiles"] == ANY and not launch["merges_in_kernel"]


@pytest.mark.parametrize(
    "head_dim, q, k, cache_type, kernel",
    [
        (96, BF16, BF16, "none", "wgmma_q16"),
        (96, FP16, FP16, "ragged", "wgmma_q16"),
        (96, BF16, E4M3, "cache_fp8", "wgmma_q16"),
        (96, FP16, "int8", "block_wise_int8", "wgmma_q16"),
        (96, BF16, E4M3, "ragged", "mma_sm80"),
        (96, E4M3, E4M3, "cache_fp8", "wgmma_fp8"),
        (96, E4M3, E4M3, "block_wise_fp8", "wgmma_fp8"),
        (96, E4M3, E4M3, "ragged", "wgmma_fp8"),
        (192, BF16, BF16, "ragged", "wgmma_q16"),
        (192, FP16, FP16, "ragged", "wgmma_q16"),
        (192, E4M3, E4M3, "ragged", "wgmma_fp8"),
        (192, E4M3, E5M2, "ragged", "wgmma_fp8"),
        (192, BF16, E4M3, "ragged", "mma_sm80"),
        (192, BF16, BF16, "none", "wgmma_q16"),
        (192, E4M3, E4M3, "cache_fp8", "wgmma_fp8"),
        (192, E4M3, E4M3, "block_wise_fp8", "wgmma_fp8"),
        (192, BF16, E4M3, "block_wise_fp8", "mma_sm80"),
        (192, E4M3, "int8", "cache_int8", "mma_sm80"),
        (256, BF16, BF16, "none", "wgmma_q16"),
        (256, FP16, FP16, "ragged", "wgmma_q16"),
        (256, BF16, E4M3, "cache_fp8", "wgmma_q16"),
        (256, BF16, E4M3, "ragged", "mma_sm80"),
        (256, BF16, "int8", "block_wise_int8", "wgmma_q16"),
        (256, E4M3, E4M3, "block_wise_fp8", "wgmma_fp8"),
        (256, E4M3, E5M2, "ragged", "wgmma_fp8"),
    ],
)
def test_kernel_of_long_sequences_of_other_head_dims(head_dim, q, k, cache_type, kernel):
    found, workspace, launches = decide(q, k, cache_type, head_dim=head_dim)
    assert found == kernel
    splits = sum(launch["workspace"] for launch in launches)
    transposed = cache_type == "ragged" and kernel == "wgmma_fp8"
    blocks = 2 * 8192 // 64 + 2 if transposed else 0
    value_dim = 128 if head_dim == 192 else head_dim
    assert workspace == splits + blocks * 8 * value_dim * 64 // 4
    assert decide(q, k, cache_type, head_dim=head_dim, major=8)[0] == "mma_sm80"


#: Names of docs/architecture.md.
NAMES = {"bf16": BF16, "fp16": FP16, "e4m3": E4M3, "e5m2": E5M2, "int8": "int8"}
#: The rule tells caches of 4-bit codes by their type alone, so bytes stand for them here.
CODES = {
    "cache_fp8": ("e4m3", "e5m2"),
    "block_wise_fp8": ("e4m3",),
    "block_wise_kfp8v4": ("e4m3",),
}


def _kernels_in_docs():
    """Kernels of long sequences by keys, their codes, queries and head_dim: a page's table."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.split("### Long sequences on Hopper")[1].split("\n#")[0]
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    )
    assert [int(dim) for dim in head[2:]] == list(HEAD_DIMS)
    found = {}
    for keys, queries, *kernels in rows:
        cache, _, named = keys.replace("`", "").replace("contiguous,", "contiguous").partition(" ")
        own = cache == "none" or named == "16 bits"  # queries of the keys' type
        codes = named.split(", ") if named and not own else CODES.get(cache, ("int8",))
        for q, code, (dim, kernel) in itertools.product(
            queries.split(", "), codes, zip(HEAD_DIMS, kernels)
        ):
            case = (cache, q if own else code, q, dim)
            assert case not in found, case
            found[case] = kernel
    return found


def test_the_table_of_kernels():
    """Every combination that operators take, and nothing else, by the rule."""
    names = {"wgmma_q16": "q16", "wgmma_fp8": "fp8", "mma_sm80": "mma"}
    expected = {}
    for cache in (*CACHE_QUANT_TYPES, "contiguous"):
        codes = ("e4m3", "e5m2", "int8") if cache == "contiguous" else CODES.get(cache, ("int8",))
        pairs = [] if cache == "none" else list(itertools.product(codes, ("bf16", "fp16", "e4m3")))
        if cache in ("none", "contiguous"):
            pairs += [("bf16", "bf16"), ("fp16", "fp16")]
        for (k, q), dim in itertools.product(pairs, HEAD_DIMS):
            where = "ragged" if cache == "contiguous" else cache
            expected[cache, k, q, dim] = names[decide(NAMES[q], NAMES[k], where, head_dim=dim)[0]]
    assert _kernels_in_docs() == expected


def test_head_dims_without_a_kernel_are_left_to_the_checks():
    assert decide(E4M3, E4M3, "cache_fp8", head_dim=80)[0] == "mma_sm80"


def test_unknown_types_are_refused():
    with pytest.raises(ValueError, match="unknown type e4m3"):
        decide("e4m3", E4M3, "cache_fp8")
    with pytest.raises(ValueError, match="unknown cache type fp8"):
        decide(E4M3, E4M3, "fp8")
