"""flash-attn's functions as its callers and vLLM's call them, against their documents in fp64."""

from __future__ import annotations

import doctest
import inspect

import numpy as np
import paddle
import pytest

from fastattn.compat import _paged, flash_attn
from fastattn.compat.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from fastattn.reference import layout, numerics
from tests.support.compare import assert_same_bits
from tests.support.shims import (
    Sequence,
    check,
    gather,
    page_tables,
    poison,
    values,
    visible_keys,
)
from tests.support.tensors import BF16, int32, skip_slices_on, to_numpy, to_paddle

FP16 = np.dtype(np.float16)
H, KV, D = 4, 2, 64


class Step:
    """Sequences of (queries, keys) over a paged cache [pages, page_size, KV, D]."""

    def __init__(self, seqs, *, page_size=64, dtype=BF16, heads=(H, KV), dim=D, seed=0):
        rng = np.random.default_rng(seed)
        self.dtype, (self.heads, self.kv) = dtype, heads
        self.queries, self.keys = (np.array(x, np.int32) for x in zip(*seqs))
        self.starts = np.concatenate([[0], np.cumsum(self.queries)]).astype(np.int32)
        self.tables, pages = page_tables(rng, self.keys, page_size)
        self.q = values(rng, (self.starts[-1], self.heads, dim), dtype)
        shape = (pages, page_size, self.kv, dim)
        self.k, self.v = values(rng, shape, dtype), values(rng, shape, dtype, mean=0.7)
        poison((self.k, self.v), self.tables, self.keys)

    def sequences(self, *, causal=False, window=(-1, -1)):
        return [
            Sequence(
                self.q[self.starts[b] : self.starts[b + 1]].astype(np.float64),
                gather(self.k, self.tables[b], keys).astype(np.float64),
                gather(self.v, self.tables[b], keys).astype(np.float64),
                visible_keys(self.queries[b], keys, causal=causal, window=window),
            )
            for b, keys in enumerate(self.keys)
        ]

    def tensors(self, place):
        return [to_paddle(x, place) for x in (self.q, self.k, self.v)]

    def arguments(self, place, **more):
        """vLLM's keywords for a step."""
        return {
            "max_seqlen_q": int(self.queries.max()),
            "cu_seqlens_q": int32(self.starts, place),
            "max_seqlen_k": int(self.keys.max()),
            "seqused_k": int32(self.keys, place),
            "block_table": int32(self.tables, place),
            "seq_lens_decoder": int32(self.keys - self.queries, place),
            **more,
        }


SEQS = [(37, 127), (1, 200), (5, 5), (1, 64), (70, 129)]


def outputs(result):
    return [to_numpy(x) for x in result]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {},
        {"causal": True, "window_size": [40, -1], "softcap": 7.0, "softmax_scale": 0.21},
        {"window_size": (30, 3)},
        {"causal": True, "window_size": None, "s_aux": True},
    ],
    ids=str,
)
def test_paged_as_vllm_calls_it(place, dtype, dim, options):
    step = Step(SEQS, dtype=dtype, dim=dim)
    sinks = np.array([0.5, -1.0, 2.0, 0.0], np.float32) if "s_aux" in options else None
    passed = dict(options)
    if sinks is not None:
        passed["s_aux"] = to_paddle(sinks, place)
    out, lse = outputs(
        flash_attn_varlen_func(
            *step.tensors(place),
            **step.arguments(place),
            **passed,
            return_softmax_lse=True,
            fa_version=3,
            num_splits=0,
            scheduler_metadata=None,
        )
    )
    window = tuple(options.get("window_size") or (-1, -1))
    seqs = step.sequences(causal=options.get("causal", False), window=window)
    check(
        seqs,
        out,
        lse,
        place,
        dtype,
        scale=options.get("softmax_scale"),
        softcap=options.get("softcap", 0.0),
        sinks=sinks,
    )


def test_lengths_come_from_seqused_k(place):
    skip_slices_on(place)
    step = Step(SEQS)
    arguments = step.arguments(place)
    del arguments["seq_lens_decoder"]
    tensors = step.tensors(place)
    out = to_numpy(flash_attn_varlen_func(*tensors, **arguments, causal=True))
    check(step.sequences(causal=True), out, None, place)
    # flash-attn 2 has the keys' lengths in cu_seqlens_k, and its arguments by position.
    cu_keys = np.concatenate([[0], np.cumsum(step.keys)])
    three = flash_attn_varlen_func(
        *tensors, arguments["cu_seqlens_q"], int32(cu_keys, place), 70, 200, 0.0, None, True,
        (-1, -1), 0.0, None, False, True, arguments["block_table"],
    )  # fmt: skip
    assert len(three) == 3 and three[2] is None
    assert_same_bits(to_numpy(three[0]), out)
    # vLLM's first positions.
    result = flash_attn_varlen_func(
        *tensors, 70, arguments["cu_seqlens_q"], 200, seqused_k=arguments["seqused_k"],
        block_table=arguments["block_table"], causal=True,
    )  # fmt: skip
    assert_same_bits(to_numpy(result), out)


@pytest.mark.parametrize("page_size", [128, 256])
def test_large_pages_of_flash_attn_2(place, page_size):
    skip_slices_on(place)
    step = Step([(37, 327), (1, 128), (3, 130)], page_size=page_size)
    out = flash_attn_varlen_func(*step.tensors(place), **step.arguments(place), causal=True)
    check(step.sequences(causal=True), to_numpy(out), None, place)


@pytest.mark.parametrize("order", ["halves", "interleaved"])
def test_caches_in_one_pool_are_read_in_place(place, order):
    skip_slices_on(place)
    step = Step(SEQS)
    pool = to_paddle(np.stack([step.k, step.v], 0 if order == "halves" else 1), place)
    k, v = (pool[i] if order == "halves" else pool[:, i] for i in range(2))
    blocks = _paged.nhd_blocks("test", k, v, ("k", "v"))
    assert blocks.key.data_ptr() == k.data_ptr() and blocks.value.data_ptr() == v.data_ptr()
    q = to_paddle(step.q, place)
    out = flash_attn_varlen_func(q, k, v, **step.arguments(place), causal=True)
    check(step.sequences(causal=True), to_numpy(out), None, place)


@pytest.mark.parametrize("code", ["e4m3", "e5m2", "int8"])
@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_8_bit_caches(place, code, granularity):
    """Codes with a scale for each KV head; V as this package stores it."""
    if code == "e5m2" and not hasattr(paddle, "float8_e5m2"):
        pytest.skip("this Paddle has no float8_e5m2")
    step = Step(SEQS)
    rng = np.random.default_rng(3)
    size = KV if granularity == "head" else 1
    base = {"int8": 0.031, "e4m3": 0.0113, "e5m2": 0.0147}[code]
    scales = [(base * f * rng.uniform(0.5, 2, size)).astype(np.float32) for f in (1.1, 1.7)]
    tensors = []
    for name, scale in zip("kv", scales):
        old = getattr(step, name)
        unread = np.isnan(old.astype(np.float32))
        codes = numerics.quantize(
            np.where(unread, 0, old.astype(np.float32)), scale[:, None], code
        ).view(np.uint8)
        codes[unread] = 0x80 if code == "int8" else 0x7F
        value = numerics.from_codes(codes, code).astype(np.float64) * scale[:, None]
        setattr(step, name, value)  # [pages, 64, KV, D]
        if name == "v":
            codes = layout.pack(codes.transpose(0, 2, 1, 3), "v", "fastattn", int8=code == "int8")
        tensor = to_paddle(codes, place)
        if code != "e4m3":
            tensor = tensor.view("int8" if code == "int8" else "float8_e5m2")
        tensors.append(tensor)
    descales = {
        name: to_paddle(scale if granularity == "head" else scale[None], place)
        for name, scale in zip(("k_descale", "v_descale"), scales)
    }
    out, lse = outputs(
        flash_attn_varlen_func(
            to_paddle(step.q, place),
            *tensors,
            **step.arguments(place),
            **descales,
            causal=True,
            return_softmax_lse=True,
        )
    )
    check(step.sequences(causal=True), out, lse, place)


@pytest.mark.parametrize("code", ["e4m3", "int8"])
def test_8_bit_caches_without_descales(place, code):
    """Their codes are the values. A GPU rounds scores of such integers: it gives the bits of 1."""
    step = Step(SEQS)
    rng = np.random.default_rng(3)
    tensors = []
    for name in "kv":
        codes = numerics.quantize(
            rng.normal(size=step.k.shape).astype(np.float32), np.float32(0.02), code
        ).view(np.uint8)
        setattr(step, name, numerics.from_codes(codes, code).astype(np.float64))
        if name == "v":
            codes = layout.pack(codes.transpose(0, 2, 1, 3), "v", "fastattn", int8=code == "int8")
        tensor = to_paddle(codes, place)
        tensors.append(tensor if code == "e4m3" else tensor.view("int8"))
    one = to_paddle(np.ones(1, np.float32), place)
    results = [
        outputs(
            flash_attn_varlen_func(
                to_paddle(step.q, place),
                *tensors,
                **step.arguments(place),
                **descales,
                softmax_scale=0.003,
                causal=True,
                return_softmax_lse=True,
            )
        )
        for descales in ({}, {"k_descale": one, "v_descale": one})
    ]
    for without, explicit in zip(*results):
        assert_same_bits(without, explicit)
    if place == "cpu":
        check(step.sequences(causal=True), *results[0], place, scale=0.003)


def test_fp8_queries():
    """FlashAttention-3's FP8: e4m3 queries with a descale for each sequence and KV head."""
    step = Step(SEQS)
    rng = np.random.default_rng(4)
    descale = (0.0173 * rng.uniform(0.5, 2, (len(SEQS), KV))).astype(np.float32)
    of_token = np.repeat(np.repeat(descale, step.queries, 0), H // KV, 1)[..., None]
    codes = numerics.quantize(step.q.astype(np.float32), of_token, "e4m3")
    step.q = numerics.from_codes(codes, "e4m3").astype(np.float64) * of_token
    caches = []
    for name in "kv":
        old = getattr(step, name).astype(np.float32)
        unread = np.isnan(old)
        cache = numerics.quantize(np.where(unread, 0, old), np.float32(0.02), "e4m3")
        cache[unread] = 0x7F
        setattr(step, name, numerics.from_codes(cache, "e4m3").astype(np.float64) * 0.02)
        caches.append(cache)
    caches[1] = layout.pack(caches[1].transpose(0, 2, 1, 3), "v", "fastattn", int8=False)
    scale = to_paddle(np.array([0.02], np.float32))
    out = flash_attn_varlen_func(
        *(to_paddle(x) for x in (codes, *caches)),
        **step.arguments("cpu"),
        causal=True,
        q_descale=to_paddle(descale),
        k_descale=scale,
        v_descale=scale,
    )
    check(step.sequences(causal=True), to_numpy(out), None, "cpu")


def test_seqused_q_leaves_queries_out(place):
    skip_slices_on(place)
    step = Step(SEQS)
    used = np.array([20, 1, 0, 1, 70], np.int32)
    arguments = step.arguments(place, seqused_q=int32(used, place))
    del arguments["seq_lens_decoder"]
    out = to_numpy(flash_attn_varlen_func(*step.tensors(place), **arguments, causal=True))
    seqs = []
    kept = np.zeros(len(out), bool)
    for b, keys in enumerate(step.keys):
        first = step.starts[b]
        kept[first : first + used[b]] = True
        if used[b]:
            full = step.sequences()[b]
            mask = visible_keys(used[b], keys, causal=True)
            seqs.append(Sequence(full.q[: used[b]], full.k, full.v, mask))
    check(seqs, out[kept], None, place)
    assert not out[~kept].astype(np.float32).any()


def test_out_is_written(place):
    step = Step(SEQS)
    buffer = to_paddle(np.zeros_like(step.q), place)
    result = flash_attn_varlen_func(*step.tensors(place), **step.arguments(place), out=buffer)
    assert result.data_ptr() == buffer.data_ptr()
    check(step.sequences(), to_numpy(buffer), None, place)


@pytest.mark.parametrize(
    ("queries", "keys", "mask"),
    [(2, 5, [[1, 1, 1, 1, 0], [1] * 5]), (5, 2, [[0, 0]] * 3 + [[1, 0], [1, 1]])],
)
def test_masks_of_the_documentation(place, queries, keys, mask):
    """The two causal masks that flash-attn's docstring draws; an empty row gives 0."""
    rng = np.random.default_rng(5)
    q, k, v = (values(rng, (n, h, D)) for n, h in ((queries, H), (keys, KV), (keys, KV)))
    result = flash_attn_varlen_func(
        *(to_paddle(x, place) for x in (q, k, v)),
        cu_seqlens_q=int32([0, queries], place),
        cu_seqlens_k=int32([0, keys], place),
        max_seqlen_q=queries,
        max_seqlen_k=keys,
        causal=True,
        return_softmax_lse=True,
    )
    seqs = [Sequence(*(x.astype(np.float64) for x in (q, k, v)), np.array(mask, bool))]
    out, lse = outputs(result)
    check(seqs, out, lse, place)
    empty = ~np.array(mask, bool).any(axis=1)
    assert not out[empty].astype(np.float32).any() and np.isneginf(lse[:, empty]).all()


def test_contiguous_8_bit_keys_with_scales_of_sequences(place):
    rng = np.random.default_rng(6)
    lengths = [(3, 70), (40, 40)]
    starts, key_starts = (np.cumsum([0, *(s[i] for s in lengths)]) for i in range(2))
    q = values(rng, (43, H, D))
    scales = [(0.02 * rng.uniform(0.5, 2, (2, KV))).astype(np.float32) for _ in "kv"]
    codes, exact = [], []
    for scale in scales:
        of_token = np.repeat(scale, [70, 40], 0)[..., None]
        code = numerics.quantize(values(rng, (110, KV, D), np.float32), of_token, "e4m3")
        codes.append(code)
        exact.append(numerics.from_codes(code, "e4m3").astype(np.float64) * of_token)
    out = flash_attn_varlen_func(
        *(to_paddle(x, place) for x in (q, *codes)),
        *(int32(x, place) for x in (starts, key_starts)),
        40,
        70,
        causal=True,
        k_descale=to_paddle(scales[0], place),
        v_descale=to_paddle(scales[1], place),
    )
    seqs = [
        Sequence(
            q[starts[b] : starts[b + 1]].astype(np.float64),
            *(x[key_starts[b] : key_starts[b + 1]] for x in exact),
            visible_keys(*lengths[b], causal=True),
        )
        for b in range(2)
    ]
    check(seqs, to_numpy(out), None, place)


class TestWithKvcache:
    """A decode loop as flash-attn's README shows it: the call adds K and V and attends."""

    @pytest.mark.parametrize("paged", [True, False])
    @pytest.mark.parametrize("new", [1, 3])
    def test_loop(self, place, paged, new):
        skip_slices_on(place)
        rng = np.random.default_rng(7)
        lengths = np.array([0, 62, 130], np.int32)
        tables, pages = page_tables(rng, lengths + 3 * new, 64)
        if not paged:
            pages, tables = 3 * 4, np.arange(12, dtype=np.int32).reshape(3, 4)
        caches = [values(rng, (pages, 64, KV, D)) for _ in "kv"]
        poison(caches, tables, lengths)
        shape = (pages, 64, KV, D) if paged else (3, 256, KV, D)
        held = [to_paddle(x.reshape(shape), place) for x in caches]
        addresses = [x.data_ptr() for x in held]
        for _ in range(3):
            q, k, v = (values(rng, (3, new, h, D)) for h in (H, KV, KV))
            out, lse = flash_attn_with_kvcache(
                *(to_paddle(x, place) for x in (q,)),
                *held,
                *(to_paddle(x, place) for x in (k, v)),
                cache_seqlens=int32(lengths, place),
                block_table=int32(tables, place) if paged else None,
                causal=True,
                return_softmax_lse=True,
            )
            for b, length in enumerate(lengths):
                for cache, fresh in zip(caches, (k, v)):
                    for i in range(new):
                        t = length + i
                        cache[tables[b, t // 64], t % 64] = fresh[b, i]
            lengths = lengths + new
            seqs = [
                Sequence(
                    q[b].astype(np.float64),
                    *(gather(x, tables[b], lengths[b]).astype(np.float64) for x in caches),
                    visible_keys(new, lengths[b], causal=True),
                )
                for b in range(3)
            ]
            assert lse.shape == [3, H, new]
            natural = to_numpy(lse).transpose(1, 0, 2).reshape(H, 3 * new)
            check(seqs, to_numpy(out).reshape(3 * new, H, D), natural, place)
        for tensor, cache, address in zip(held, caches, addresses):
            assert tensor.data_ptr() == address
            assert_same_bits(to_numpy(tensor).reshape(cache.shape), cache)

    def test_reads_what_is_there(self, place):
        """Without new keys; an int of all sequences, and the whole cache without one."""
        rng = np.random.default_rng(8)
        q = values(rng, (2, 2, H, D))
        caches = [values(rng, (2, 128, KV, D), FP16) for _ in "kv"]
        q = q.astype(FP16)
        for length in (100, None):
            out = flash_attn_with_kvcache(
                *(to_paddle(x, place) for x in (q, *caches)), cache_seqlens=length, softcap=5.0
            )
            seqs = [
                Sequence(
                    *(x[b][: length if x is not q else None].astype(np.float64)
                      for x in (q, *caches)),
                    visible_keys(2, length or 128),
                )
                for b in range(2)
            ]  # fmt: skip
            check(seqs, to_numpy(out).reshape(4, H, D), None, place, FP16, softcap=5.0)

    def test_output_is_written_in_place(self, place):
        caches = [to_paddle(np.ones((1, 64, KV, D), FP16), place) for _ in "kv"]
        q = to_paddle(np.ones((1, 1, H, D), FP16), place)
        out = to_paddle(np.zeros((1, 1, H, D), FP16), place)
        assert flash_attn_with_kvcache(q, *caches, cache_seqlens=5, out=out) is out
        assert (to_numpy(out) == 1).all()

    @pytest.mark.parametrize(
        "name",
        ["rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad", "alibi_slopes", "qv",
         "cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens"],
    )  # fmt: skip
    def test_refused(self, name):
        q, cache = paddle.zeros([1, 1, H, D], "float16"), paddle.zeros([1, 64, KV, D], "float16")
        with pytest.raises(NotImplementedError, match=f"flash_attn_with_kvcache: {name}"):
            flash_attn_with_kvcache(q, cache, cache, cache_seqlens=1, **{name: int32([0])})

    def test_wrong_arguments(self):
        q, cache = paddle.zeros([2, 1, H, D], "float16"), paddle.zeros([1, 64, KV, D], "float16")
        with pytest.raises(ValueError, match="k_cache: expected at least 2 rows, got 1"):
            flash_attn_with_kvcache(q, cache, cache, cache_seqlens=1)
        with pytest.raises(TypeError, match="cache_seqlens: expected int or a tensor"):
            flash_attn_with_kvcache(q[:1], cache, cache, cache_seqlens=1.5)
        with pytest.raises(NotImplementedError, match="k_cache: pages of 48 tokens"):
            flash_attn_with_kvcache(q[:1], cache[:, :48], cache[:, :48], cache_seqlens=1)
        with pytest.raises(ValueError, match=r"k: expected shape \[1, M, KV, D\]"):
            flash_attn_with_kvcache(q[:1], cache, cache, q[0], q[0], cache_seqlens=1)
        with pytest.raises(NotImplementedError, match="out: not contiguous"):
            out = paddle.zeros([1, H, 1, D], "float16").transpose([0, 2, 1, 3])
            strided = paddle.zeros([2, H, 2, D], "float16").transpose([0, 2, 1, 3])[:1, :1]
            assert out.shape == strided.shape
            flash_attn_with_kvcache(q[:1], cache, cache, cache_seqlens=1, out=strided)


def call(step, **changes):
    arguments = step.arguments("cpu")
    arguments.update(changes)
    return flash_attn_varlen_func(*step.tensors("cpu"), **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alibi_slopes", 1),
        ("q_v", 1),
        ("qv", 1),
        ("cp_tot_seqused_k", 1),
        ("attention_chunk", 64),
        ("cp_world_size", 2),
        ("dropout_p", 0.1),
    ],
)
def test_refused_by_name(name, value):
    if name in ("alibi_slopes", "q_v", "qv", "cp_tot_seqused_k"):
        value = paddle.ones([H])
    with pytest.raises(NotImplementedError, match=f"flash_attn_varlen_func: {name}: "):
        call(Step([(1, 5)]), **{name: value})


@pytest.mark.parametrize("page_size", [16, 32, 48, 96])
def test_pages_that_cannot_be_read_in_place(page_size):
    with pytest.raises(NotImplementedError, match=f"k: pages of {page_size} tokens cannot be read"):
        call(Step([(1, 70)], page_size=page_size))


def test_caches_that_would_have_to_be_copied():
    step = Step([(1, 70)], page_size=128)
    pool = to_paddle(np.stack([step.k, step.v], 1))
    q = to_paddle(step.q)
    with pytest.raises(NotImplementedError, match="k: pages of 128 tokens that are not contiguous"):
        flash_attn_varlen_func(q, pool[:, 0], pool[:, 1], **step.arguments("cpu"))
    small = Step([(1, 70)])
    codes = paddle.zeros(small.k.shape, "uint8")
    with pytest.raises(NotImplementedError, match=r"v: 8-bit values of shape .*read in place"):
        flash_attn_varlen_func(q, codes, codes, **small.arguments("cpu"))
    packed = paddle.zeros([small.k.shape[0], KV, D, 64], "uint8")
    with pytest.raises(NotImplementedError, match=r"k_descale: scales \[3, 2\] of each sequence"):
        flash_attn_varlen_func(
            q, codes, packed, **small.arguments("cpu"), k_descale=paddle.ones([3, 2])
        )


def test_arguments_of_another_packages_positions():
    step = Step([(1, 5)])
    q, k, v = step.tensors("cpu")
    starts = int32(step.starts)
    with pytest.raises(TypeError, match=r"dropout_p: expected a number, got .*by name"):
        flash_attn_varlen_func(q, k, v, starts, starts, 1, 5, int32([1]), int32([5]))
    with pytest.raises(TypeError, match="causal: expected bool, got float; pass arguments by name"):
        flash_attn_varlen_func(q, k, v, starts, starts, 1, 5, 0, None, 0.1)
    with pytest.raises(TypeError, match="softmax_scale: expected float"):
        flash_attn_varlen_func(q, k, v, starts, starts, 1, 5, 0, int32([5]))


def test_wrong_lengths():
    with pytest.raises(ValueError, match="seqused_k: required with block_table"):
        call(Step([(1, 5)]), seqused_k=None)
    with pytest.raises(ValueError, match="cu_seqlens_k: given together with seqused_k"):
        call(Step([(1, 5)]), cu_seqlens_k=int32([0, 5]))
    table = int32([0, 1])
    with pytest.raises(ValueError, match="func: block_table: expected shape"):
        call(Step([(1, 5)], page_size=128), block_table=table)
    q, cache = paddle.ones([1, 1, H, D]), paddle.ones([2, 64, KV, D])
    with pytest.raises(ValueError, match="kvcache: block_table: expected shape"):
        flash_attn_with_kvcache(q, cache, cache, cache_seqlens=1, block_table=table)
    with pytest.raises(NotImplementedError, match="seqused_k: contiguous keys"):
        call(Step([(1, 5)]), block_table=None)
    with pytest.raises(ValueError, match="cu_seqlens_k: required without block_table"):
        call(Step([(1, 5)]), block_table=None, seqused_k=None)


def test_a_program_does_not_copy_the_cache():
    step = Step([(1, 5)])

    def program(q, k, v, starts, keys, table):
        return flash_attn_varlen_func(
            q, k, v, starts, None, 1, 5, block_table=table, seqused_k=keys
        )

    traced = paddle.jit.to_static(program, full_graph=True)
    with pytest.raises(NotImplementedError, match="a static program would copy a cache"):
        traced(*step.tensors("cpu"), int32(step.starts), int32(step.keys), int32(step.tables))


@pytest.mark.parametrize("function", [flash_attn_varlen_func, flash_attn_with_kvcache])
def test_docstring_names_every_argument(function):
    text = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert name in text, name


def test_examples():
    result = doctest.testmod(flash_attn)
    assert result.attempted and not result.failed
