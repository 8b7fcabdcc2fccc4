"""FlashInfer's wrappers as its documentation uses them, against its words in fp64."""

from __future__ import annotations

import doctest
import inspect

import numpy as np
import paddle
import pytest

from fastattn.compat import (
    _flashinfer_pages,
    _flashinfer_plan,
    _flashinfer_single,
    _flashinfer_wrapper,
    flashinfer,
)
from fastattn.compat.flashinfer import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    append_paged_kv_cache,
    dense_block_tables,
    merge_state,
    merge_state_in_place,
)
from fastattn.reference import layout, numerics
from tests.support.bounds import assert_error_ratio
from tests.support.compare import assert_same_bits, assert_within
from tests.support.flashinfer import DECODE, FP16, KV, PREFILL, D, H, Step, natural, workspace
from tests.support.graph import capture
from tests.support.holes import random_tree
from tests.support.shims import attend, check, poison, values
from tests.support.tensors import BF16, EMPTY_OUTPUTS, int32, skip_slices_on, to_numpy, to_paddle


class TestDecode:
    @pytest.mark.parametrize("pool", [True, False], ids=["pool", "tuple"])
    @pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
    def test_example_of_the_documentation(self, place, kv_layout, pool):
        """Seven requests, several layers with one plan."""
        skip_slices_on(place)
        steps = [Step(DECODE, seed=layer) for layer in range(3)]
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(place), kv_layout)
        first = steps[0]
        wrapper.plan(
            *first.pages(place), *first.sizes(), pos_encoding_mode="NONE", data_type="float16"
        )
        for step in steps:
            step.indices = first.indices
            step.k, step.v = (np.nan_to_num(x, nan=9.0) for x in (step.k, step.v))
            poison((step.k, step.v), step.tables(), step.keys)
            out, lse = wrapper.run(
                to_paddle(step.q, place), step.cache(place, kv_layout, pool), return_lse=True
            )
            assert out.shape == [7, H, D] and lse.shape == [7, H]
            check(step.sequences(), to_numpy(out), natural(lse), place, FP16)

    @pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("dim", [64, 96, 128, 256])
    def test_options(self, place, dtype, dim):
        step = Step(DECODE, dtype=dtype, dim=dim)
        sinks = np.array([0.3, -2.0, 1.0, 0.0], np.float32)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(place))
        wrapper.plan(
            *step.pages(), *step.sizes(), window_left=50, logits_soft_cap=6.0, sm_scale=0.2
        )
        out = to_paddle(np.zeros_like(step.q), place)
        result = wrapper.run(
            to_paddle(step.q, place),
            step.cache(place, pool=False),
            q_scale=0.5,
            k_scale=1.5,
            out=out,
            window_left=50,
            sinks=to_paddle(sinks, place),
        )
        assert result.data_ptr() == out.data_ptr()
        check(
            step.sequences(window_left=50), to_numpy(out), None, place, dtype,
            scale=0.2 * 0.5 * 1.5, softcap=6.0, sinks=sinks,
        )  # fmt: skip

    @pytest.mark.parametrize("page_size", [128, 192])
    @pytest.mark.parametrize("pool", [True, False], ids=["pool", "tuple"])
    def test_large_pages(self, place, page_size, pool):
        if pool:
            skip_slices_on(place)
        step = Step([(1, 300), (1, 128), (1, 5)], page_size=page_size)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(place))
        wrapper.plan(*step.pages(), *step.sizes())
        out = wrapper.run(to_paddle(step.q, place), step.cache(place, pool=pool))
        check(step.sequences(), to_numpy(out), None, place, FP16)

    @pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
    def test_8_bit_cache_with_scales(self, place, kv_layout):
        step = Step(DECODE, dtype=BF16, dim=128)
        stored = []
        for name, scale in (("k", 0.0113), ("v", 0.0192)):
            old = getattr(step, name).astype(np.float32)
            unread = np.isnan(old)
            codes = numerics.quantize(np.where(unread, 0, old), np.float32(scale), "e4m3")
            codes[unread] = 0x7F
            value = numerics.from_codes(codes, "e4m3").astype(np.float64)
            setattr(step, name, value * np.float64(np.float32(scale)))
            stored.append(codes.transpose(0, 2, 1, 3))
        k = stored[0] if kv_layout == "HND" else stored[0].transpose(0, 2, 1, 3)
        v = layout.pack(stored[1], "v", "fastattn", int8=False)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(place), kv_layout)
        wrapper.plan(*step.pages(), *step.sizes(), q_data_type="bfloat16", kv_data_type="uint8")
        caches = (to_paddle(k, place), to_paddle(v, place))
        out = wrapper.run(to_paddle(step.q, place), caches, k_scale=0.0113, v_scale=0.0192)
        check(step.sequences(), to_numpy(out), None, place)

    def test_several_queries_of_a_request_are_causal(self, place):
        step = Step([(3, n) for n in (129, 3, 64)])
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(place))
        wrapper.plan(*step.pages(), *step.sizes(), q_len_per_req=3)
        out = wrapper.run(to_paddle(step.q, place), step.cache(place, pool=False))
        check(step.sequences(causal=True), to_numpy(out), None, place, FP16)

    def test_a_request_without_pages(self, place):
        skip_slices_on(place)
        step = Step([(1, 70), (1, 0), (1, 3)])
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(place))
        wrapper.plan(*step.pages(), *step.sizes())
        out, lse = wrapper.run_return_lse(to_paddle(step.q, place), step.cache(place, pool=False))
        assert np.isneginf(to_numpy(lse)[1]).all() and not to_numpy(out)[1].any()
        check(step.sequences(), to_numpy(out), natural(lse), place, FP16)

    def test_fixed_splits_ask_for_invariance(self, place, monkeypatch):
        step, asked = Step(DECODE), []

        def watched(*args, **options):
            asked.append(options["batch_invariant"])
            return attention(*args, **options)

        attention = _flashinfer_wrapper.paged_attention
        monkeypatch.setattr(_flashinfer_wrapper, "paged_attention", watched)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(place))
        wrapper.plan(*step.pages(), *step.sizes(), fixed_split_size=4, disable_split_kv=True)
        out = wrapper.run(to_paddle(step.q, place), step.cache(place, pool=False))
        check(step.sequences(), to_numpy(out), None, place, FP16)
        assert asked == [True]


def graph_buffers(place, batch, pages):
    return [int32(np.zeros(n), place) for n in (batch + 1, pages, batch)]


def test_plans_for_graphs_keep_their_memory(place):
    """A plan of another step is written where the first one lies; what run() passes stays."""
    steps = [Step(DECODE), Step([(1, n) for n in (3, 200, 1, 66, 65, 7, 140)], seed=1)]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace(place), "NHD", True, False, *graph_buffers(place, 7, 16)
    )
    addresses = []
    for step in steps:
        wrapper.plan(*step.pages(), *step.sizes())
        addresses.append({key: t.data_ptr() for key, t in wrapper._held.items()})
        out = wrapper.run(to_paddle(step.q, place), step.cache(place, pool=False))
        check(step.sequences(), to_numpy(out), None, place, FP16)
    assert addresses[0] == addresses[1]
    with pytest.raises(ValueError, match="expected 7 sequences, got 1"):
        wrapper.plan(*Step([(1, 5)]).pages(), *steps[0].sizes())
    assert wrapper._longest == (1, 16 * 64)  # launches of a decode step
    with pytest.raises(ValueError, match="2 queries after a first plan of 1"):
        wrapper.plan(*Step([(2, 5)] * 7).pages(), *steps[0].sizes(), q_len_per_req=2)
    with pytest.raises(ValueError, match="pages do not fit the buffer's 16"):
        wrapper.plan(*Step([(1, 300)] * 7).pages(), *steps[0].sizes())


@pytest.mark.gpu
def test_a_captured_graph_follows_the_plan():
    if paddle.__version__.startswith("2."):
        pytest.skip("Paddle 2.6 has no code for this GPU")

    steps = [Step(DECODE), Step([(1, n) for n in (3, 200, 1, 66, 65, 7, 140)], seed=1)]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace("gpu"), "NHD", True, False, *graph_buffers("gpu", 7, 16)
    )
    pages = max(len(s.k) for s in steps)
    caches = [to_paddle(np.zeros((pages, 64, KV, D), FP16), "gpu") for _ in "kv"]
    q = to_paddle(steps[0].q, "gpu")
    wrapper.plan(*steps[0].pages(), *steps[0].sizes())
    wrapper.run(q, tuple(caches))  # first calls allocate
    with capture() as graph:
        out = wrapper.run(q, tuple(caches))
    for step in steps[::-1]:
        wrapper.plan(*step.pages(), *step.sizes())
        q.copy_(to_paddle(step.q, "gpu"), True)
        for held, cache in zip(caches, (step.k, step.v)):
            full = np.full((pages, 64, KV, D), np.nan, FP16)
            full[: len(cache)] = cache
            held.copy_(to_paddle(full, "gpu"), True)
        graph.replay()
        check(step.sequences(), to_numpy(out), None, "gpu", FP16)


class TestPrefill:
    @pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
    def test_example_of_the_documentation(self, place, kv_layout):
        """Causal, and then the same by a custom mask that says the same."""
        skip_slices_on(place)
        step = Step(PREFILL)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace(place), kv_layout)
        starts = int32(step.starts, place)
        wrapper.plan(starts, *step.pages(place), *step.sizes(), causal=True)
        q, cache = to_paddle(step.q, place), step.cache(place, kv_layout)
        out, lse = wrapper.run(q, cache, return_lse=True)
        assert out.shape == [100, H, D] and lse.shape == [100, H]
        seqs = step.sequences(causal=True)
        check(seqs, to_numpy(out), natural(lse), place, FP16)
        mask = np.concatenate([s.visible.reshape(-1) for s in seqs])
        wrapper.plan(starts, *step.pages(place), *step.sizes(), custom_mask=to_paddle(mask, place))
        check(seqs, to_numpy(wrapper.run(q, cache)), None, place, FP16)

    @pytest.mark.parametrize("causal", [True, False])
    def test_options(self, place, causal):
        step = Step(PREFILL, dtype=BF16, dim=128)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace(place))
        wrapper.plan(
            int32(step.starts), *step.pages(), *step.sizes(), head_dim_vo=128, causal=causal,
            window_left=40, logits_soft_cap=9.0, sm_scale=0.1, o_data_type="float32",
        )  # fmt: skip
        q, cache = to_paddle(step.q, place), step.cache(place, pool=False)
        for window in (None, 20, -1):
            out = to_numpy(wrapper.run(q, cache, window_left=window))
            seqs = step.sequences(causal=causal, window_left=40 if window is None else window)
            options = {"scale": 0.1, "softcap": 9.0}
            assert out.dtype == np.float32
            check(seqs, out.astype(BF16), None, place, BF16, **options)
            if place == "cpu":
                exact, naive = (attend(seqs, p, **options)[0] for p in ("float64", "float32"))
                assert_error_ratio(out, exact, naive, "float32")

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("window", [-1, 3])
    def test_more_queries_than_keys(self, place, causal, window):
        skip_slices_on(place)
        step = Step([(9, 4), (33, 100), (70, 65), (5, 0), (2, 2)])
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace(place))
        wrapper.plan(
            int32(step.starts), *step.pages(), *step.sizes(), causal=causal, window_left=window
        )
        q, cache = to_paddle(step.q, place), step.cache(place, pool=False)
        out, lse = wrapper.run(q, cache, return_lse=True)
        seqs = step.sequences(causal=causal, window_left=window)
        check(seqs, to_numpy(out), natural(lse), place, FP16)
        with pytest.raises(NotImplementedError, match="window_left: another one than planned"):
            wrapper.run(q, cache, window_left=7)

    def test_custom_masks_of_intervals(self, place):
        """A mask that no other option says: a prefix that is skipped, an empty row, a window."""
        step = Step([(9, 80), (6, 6), (7, 3)])
        rng = np.random.default_rng(2)
        masks = []
        for queries, keys in zip(step.queries, step.keys):
            mask = np.zeros((queries, keys), bool)
            for i in range(queries):
                first, end = sorted(rng.integers(0, keys + 1, 2))
                mask[i, first:end] = True
            mask[0] = False
            masks.append(mask)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace(place))
        flat = paddle.to_tensor(np.concatenate([m.reshape(-1) for m in masks]), place="cpu")
        wrapper.plan(
            int32(step.starts), *step.pages(), *step.sizes(), custom_mask=flat, causal=True,
            window_left=30,
        )  # fmt: skip
        out = wrapper.run(to_paddle(step.q, place), step.cache(place, pool=False))
        seqs = step.sequences(window_left=30, masks=masks)
        check(seqs, to_numpy(out), None, place, FP16)

    @pytest.mark.parametrize("drafts", [True, False])
    def test_custom_masks_of_trees(self, place, drafts):
        """Beside a prompt that sees all of a window, and a query that sees no other query."""
        step = Step([(9, 80), (6, 6), (12, 70), (3, 65), (5, 3)])
        rng = np.random.default_rng(2)
        masks = []
        for queries, keys in zip(step.queries, step.keys):
            own = max(keys - queries, 0)
            mask = np.zeros((queries, keys), bool)
            mask[:, own // 3 : own] = True
            if keys >= queries:
                tree = random_tree(rng, queries) if drafts else rng.random((queries, queries)) < 0.4
                mask[:, own:] = tree
            mask[1, own:] = False
            masks.append(mask)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace(place))
        flat = paddle.to_tensor(np.concatenate([m.reshape(-1) for m in masks]), place="cpu")
        wrapper.plan(int32(step.starts), *step.pages(), *step.sizes(), custom_mask=flat)
        q, cache = to_paddle(step.q, place), step.cache(place, pool=False)
        seqs = step.sequences(masks=masks)
        if place == "cpu":  # Paddle 2.6 has no kernels for Hopper that convert an LSE
            out, lse = wrapper.run(q, cache, return_lse=True)
            check(seqs, to_numpy(out), natural(lse), place, FP16)
        else:
            check(seqs, to_numpy(wrapper.run(q, cache)), None, place, FP16)
        # A later step without a tree does not keep it.
        wrapper.plan(int32(step.starts), *step.pages(), *step.sizes(), causal=True)
        check(step.sequences(causal=True), to_numpy(wrapper.run(q, cache)), None, place, FP16)

    @pytest.mark.parametrize(
        "row", [[True, False, True, False, False], [True, True, False, True, False]]
    )
    def test_mask_that_is_not_an_interval(self, row):
        step = Step([(2, 5)])
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
        mask = paddle.to_tensor([True] * 5 + row)
        with pytest.raises(NotImplementedError, match="custom_mask: query 1 of sequence 0 sees"):
            wrapper.plan(int32(step.starts), *step.pages(), *step.sizes(), custom_mask=mask)
        with pytest.raises(ValueError, match="custom_mask: expected 10 elements, got 9"):
            wrapper.plan(int32(step.starts), *step.pages(), *step.sizes(), custom_mask=mask[:9])

    def test_plans_for_graphs(self, place):
        steps = [Step(PREFILL), Step([(3, 100), (1, 64), (50, 129), (0, 0), (4, 4)], seed=1)]
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            workspace(place), "NHD", True, int32(np.zeros(6), place), *graph_buffers(place, 5, 20)
        )
        for step in steps:
            wrapper.plan(int32(step.starts), *step.pages(), *step.sizes(), causal=True)
            q = np.zeros((100, H, D), FP16)
            q[: len(step.q)] = step.q
            out = to_numpy(wrapper.run(to_paddle(q, place), step.cache(place, pool=False)))
            seqs = [s for s in step.sequences(causal=True) if len(s.q)]
            check(seqs, out[: len(step.q)], None, place, FP16)
        with pytest.raises(ValueError, match="110 queries after a first plan of 100"):
            big = Step([(50, 100), (11, 64), (1, 129), (4, 11), (44, 190)])
            wrapper.plan(int32(big.starts), *big.pages(), *big.sizes())
        with pytest.raises(NotImplementedError, match="custom_mask: a mask with use_cuda_graph"):
            step = steps[0]
            mask = paddle.ones([int((step.queries * step.keys).sum())], "bool")
            wrapper.plan(int32(step.starts), *step.pages(), *step.sizes(), custom_mask=mask)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "tuple"])
def test_append_then_decode(place, kv_layout, pool):
    """Tokens in any order, across pages; one of no sequence."""
    skip_slices_on(place)
    step = Step([(1, 129), (1, 64), (1, 70)])
    exact = {name: getattr(step, name).copy() for name in "kv"}
    rng = np.random.default_rng(1)
    owners = np.array([0, 2, 0, -1, 1, 2], np.int32)
    positions = np.array([127, 69, 128, 5, 63, 0], np.int32)
    fresh = {name: values(rng, (6, KV, D), FP16) for name in "kv"}
    for name in "kv":
        stored = getattr(step, name)
        for i, (b, t) in enumerate(zip(owners, positions)):
            if b >= 0:
                page = step.tables()[b][t // 64]
                exact[name][page, t % 64] = fresh[name][i]
                stored[page, t % 64] = np.nan
    cache = step.cache(place, kv_layout, pool)
    indptr, indices, last = step.pages(place)
    append_paged_kv_cache(
        *(to_paddle(fresh[name], place) for name in "kv"),
        *(int32(x, place) for x in (owners, positions)),
        cache, indices, indptr, last, kv_layout,
    )  # fmt: skip
    step.k, step.v = exact["k"], exact["v"]
    wanted = step.cache("cpu", kv_layout, pool)
    for got, expected in [(cache, wanted)] if pool else zip(cache, wanted):
        assert_same_bits(to_numpy(got), to_numpy(expected))
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(place), kv_layout)
    wrapper.plan(*step.pages(), *step.sizes())
    out = wrapper.run(to_paddle(step.q, place), cache)
    check(step.sequences(), to_numpy(out), None, place, FP16)


def test_append_into_large_pages(place):
    skip_slices_on(place)
    step = Step([(1, 300)], page_size=128)
    cache = step.cache(place, pool=False)
    fresh = values(np.random.default_rng(1), (3, KV, D), FP16)
    positions = np.array([127, 128, 299], np.int32)
    indptr, indices, last = step.pages(place)
    append_paged_kv_cache(
        to_paddle(fresh, place), to_paddle(2 * fresh, place), int32([0] * 3, place),
        int32(positions, place), cache, indices, indptr, last,
    )  # fmt: skip
    for i, t in enumerate(positions):
        page = step.tables()[0][t // 128]
        step.k[page, t % 128], step.v[page, t % 128] = fresh[i], 2 * fresh[i]
    assert_same_bits(to_numpy(cache[0]), step.k)
    assert_same_bits(to_numpy(cache[1]), step.v)
    with pytest.raises(NotImplementedError, match="one pool with pages of more than 64 tokens"):
        one = int32([0], place)
        new = to_paddle(fresh[:1], place)
        append_paged_kv_cache(new, new, one, one, step.cache(place), indices, indptr, last)


def test_append_into_8_bits_is_refused():
    one, new = int32([0]), paddle.zeros([1, KV, 128], "float16")
    caches = paddle.zeros([2, 64, KV, 128], "uint8"), paddle.zeros([2, KV, 128, 64], "uint8")
    with pytest.raises(NotImplementedError, match="paged_kv_cache: 8 bits; write_cache_kv"):
        append_paged_kv_cache(new, new, one, one, caches, one, int32([0, 1]), one)


class TestMerge:
    """merge_state of two halves of the keys is the attention over all of them."""

    def parts(self, dtype, seed=0):
        rng = np.random.default_rng(seed)
        q, k, v = (values(rng, (n, h, D), np.float32) for n, h in ((5, H), (40, H), (40, H)))
        sides = []
        for keys in (slice(0, 23), slice(23, 40), slice(0, 40)):
            s = np.einsum("nhd,mhd->nhm", q.astype(np.float64), k[keys].astype(np.float64)) * 0.2
            p = np.exp2(s)  # base 2 throughout: the definition of S
            total = p.sum(-1)
            values_ = np.einsum("nhm,mhd->nhd", p / total[..., None], v[keys])
            sides.append((values_.astype(dtype), np.log2(total).astype(np.float32)))
        return sides

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_halves(self, place, dtype):
        skip_slices_on(place)
        (v_a, s_a), (v_b, s_b), _ = self.parts(np.dtype(dtype))
        tensors = [to_paddle(x, place) for x in (v_a, s_a, v_b, s_b)]
        v, s = merge_state(*tensors)
        weights = [np.exp2(x.astype(np.float64))[..., None] for x in (s_a, s_b)]
        total = weights[0] + weights[1]
        exact = (weights[0] * v_a + weights[1] * v_b) / total
        eps = 2e-6 if dtype == "float32" else 2.0**-11
        assert_within(to_numpy(v), exact, eps * (np.abs(v_a) + np.abs(v_b)).astype(np.float64))
        assert_within(to_numpy(s), np.log2(total[..., 0]), 4e-6)
        merge_state_in_place(*tensors)
        assert_same_bits(to_numpy(tensors[0]), to_numpy(v))
        assert_same_bits(to_numpy(tensors[1]), to_numpy(s))

    def test_whole(self):
        a, b, (whole, total) = self.parts(np.float32)
        v, s = merge_state(*(to_paddle(x) for x in (*a, *b)))
        assert_within(to_numpy(v), whole, 1e-5)
        assert_within(to_numpy(s), total, 1e-5)

    def test_empty_sides(self):
        one, none = paddle.ones([1, 1, D]), paddle.full([1, 1], -float("inf"))
        v, s = merge_state(one, paddle.full([1, 1], 3.0), 9 * one, none)
        assert float(v.max()) == 1 and abs(s.item() - 3) < 1e-6
        v, s = merge_state(one, none, one, none)
        assert float(v.max()) == 0 and np.isneginf(s.item())

    def test_mask_is_refused(self):
        v, s = paddle.ones([1, 1, D]), paddle.zeros([1, 1])
        with pytest.raises(NotImplementedError, match="merge_state_in_place: mask"):
            merge_state_in_place(v, s, v, s, paddle.ones([1], "bool"))


def test_dense_block_tables():
    tables = dense_block_tables(int32([0, 1, 1, 4]), np.array([5, 2, 7, 1, 9]))
    assert tables.dtype == np.int32 and tables.tolist() == [[5, -1, -1], [-1] * 3, [2, 7, 1]]
    with pytest.raises(ValueError, match="indptr: ends at 4, but there are 3 page indices"):
        dense_block_tables([0, 4], [1, 2, 3])
    with pytest.raises(ValueError, match="indptr: expected ascending values from 0 on"):
        dense_block_tables([0, 2, 1], [1, 2, 3])


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="Paddle 2.6 refuses outputs of size 0")
def test_a_step_without_queries():
    step = Step([(0, 70), (0, 3)])
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
    wrapper.plan(int32(step.starts), *step.pages(), *step.sizes())
    out = wrapper.run(paddle.zeros([0, H, D], "float16"), step.cache("cpu"))
    assert out.shape == [0, H, D]


@pytest.mark.parametrize(
    "function",
    [
        *(getattr(flashinfer, n) for n in flashinfer.__all__ if n[0] != "B"),
        *(getattr(cls, name)
          for cls in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper)
          for name in ("plan", "run")),
        BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper,
    ],
    ids=lambda f: f.__qualname__,
)  # fmt: skip
def test_docstring_names_every_argument(function):
    text = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        if name not in ("self", "args"):
            assert name in text, name


@pytest.mark.parametrize(
    "module",
    [
        _flashinfer_pages,
        _flashinfer_plan,
        _flashinfer_single,
        flashinfer.decode,
        flashinfer.prefill,
    ],
)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
