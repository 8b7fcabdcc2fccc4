"""FlashMLA's functions and FastDeploy's writer: upstream's shapes, orders and conventions."""

from __future__ import annotations

import inspect

import numpy as np
import paddle
import pytest

from fastattn import reference
from fastattn.compat import flash_mla
from fastattn.compat.fastdeploy import dsk_attn_write_cache
from fastattn.reference.mla import token_values
from tests.support.compare import assert_same_bits
from tests.support.latent import random_cache, tokens
from tests.support.mla_sparse import (
    KINDS,
    Problem,
    check_lse,
    check_output,
    make_cache,
    make_indices,
    queries,
)
from tests.support.static import run_all_modes
from tests.support.strides import strided
from tests.support.tensors import BF16, int32, skip_slices_on, to_numpy, to_paddle

RNG = np.random.default_rng
#: Of upstream's tests: keys, indices and tokens a page, of the cache and of the second one.
SHAPES = [(512, 64, 61), (1024, 576, 2), (2046, 2048, 64), (512, 64, 576)]
EXTRA = [(512, 64, 69), (1024, 576, 2), (512, 64, 64), (1024, 576, 61)]


def finite_lse(lse):
    """FlashMLA's LSE with our sign for queries without a key."""
    assert not np.isneginf(lse).any()
    return np.where(np.isposinf(lse), -np.inf, lse)


class Decode:
    """A call of flash_mla_with_kvcache in upstream's shapes, and its fp64 result."""

    def __init__(self, seed, kind, heads, s_q, shape, *, extra=None, lengths=False, sink=False):
        rng, batch = RNG(seed), 4
        keys, topk, page_size = shape
        _, _, dim = KINDS[kind]
        padding = -page_size * 584 % 576 if kind == "fp8_584" else 0
        self.heads, self.s_q, self.batch = heads, s_q, batch
        self.q = queries(rng, batch * s_q, heads, dim)
        self.caches, self.indices, self.lengths = [], [], []
        for keys, topk, page_size in (shape, extra) if extra else (shape,):
            padding = -page_size * 584 % 576 if kind == "fp8_584" else 0
            cache = make_cache(rng, KINDS[kind], keys, page_size, padding=padding)
            given = rng.integers(0, topk + 1, batch) if lengths else None
            rows = None if given is None else given.repeat(s_q)
            indices = make_indices(rng, cache, batch * s_q, topk, rows)
            if given is not None and len(self.caches) == 0:
                given[1] = 0
            self.caches.append(cache)
            self.indices.append(indices.reshape(batch, s_q, topk))
            self.lengths.append(None if given is None else given.astype(np.int32))
        if extra and lengths:
            self.lengths[1][1] = 0  # a sequence without a key
        self.sink = rng.normal(size=heads).astype(np.float32) if sink else None
        self.kind = kind

    def view(self, cache, place):
        """[num_blocks, block_size, 1, W], as upstream makes it of padded pages."""
        tensor = to_paddle(cache.data, place)
        if cache.data.ndim == 3:
            return tensor.unsqueeze(2)
        pages, page = cache.data.shape
        size = cache.page_size
        return strided(tensor, [pages, size, 1, 584], [page, 584, 584, 1])

    def run(self, place, **options):
        if self.s_q > 1:
            skip_slices_on(place)  # Paddle orders the LSE of several queries
        more = {}
        if len(self.caches) > 1:
            more["extra_k_cache"] = self.view(self.caches[1], place)
            more["extra_indices_in_kvcache"] = int32(self.indices[1], place)
            if self.lengths[1] is not None:
                more["extra_topk_length"] = int32(self.lengths[1], place)
        if self.lengths[0] is not None:
            more["topk_length"] = int32(self.lengths[0], place)
        if self.sink is not None:
            more["attn_sink"] = to_paddle(self.sink, place)
        metadata, num_splits = flash_mla.get_mla_metadata()
        out, lse = flash_mla.flash_mla_with_kvcache(
            to_paddle(self.q.reshape(self.batch, self.s_q, self.heads, -1), place),
            self.view(self.caches[0], place),
            None,
            None,
            512,
            metadata,
            num_splits,
            softmax_scale=options.pop("softmax_scale", None),
            causal=False,
            is_fp8_kvcache=not self.kind.startswith("bf16"),
            indices=int32(self.indices[0], place),
            **more,
        )
        assert list(out.shape) == [self.batch, self.s_q, self.heads, 512]
        assert list(lse.shape) == [self.batch, self.heads, self.s_q]
        return to_numpy(out), to_numpy(lse)

    def want(self, **options):
        def rows(x):
            return None if x is None else x.repeat(self.s_q)

        named = {"topk_length": rows(self.lengths[0]), "sinks": self.sink, **options}
        if len(self.caches) > 1:
            named |= {
                "extra_cache": self.caches[1].data,
                "extra_indices": self.indices[1].reshape(len(self.q), -1),
                "extra_topk_length": rows(self.lengths[1]),
                "extra_page_size": self.caches[1].page_size,
            }
        out, lse, _ = reference.mla_sparse_attention(
            self.q,
            self.caches[0].data,
            self.indices[0].reshape(len(self.q), -1),
            cache_format=KINDS[self.kind][0],
            page_size=self.caches[0].page_size,
            **named,
        )
        lse = lse.reshape(self.heads, self.batch, self.s_q).transpose(1, 0, 2)
        return out.reshape(self.batch, self.s_q, self.heads, 512), lse

    def check(self, place, **options):
        (out, lse), (want, want_lse) = self.run(place, **options), self.want(**options)
        check_output(out, want)
        noise = 0.0
        if len(self.caches) == 1:
            lengths = None if self.lengths[0] is None else self.lengths[0].repeat(self.s_q)
            indices = self.indices[0].reshape(len(self.q), -1)
            problem = Problem(self.q, self.caches[0], indices, lengths, options=options)
            noise = np.broadcast_to(problem.noise(place), (self.heads, len(self.q)))
            noise = noise.reshape(self.heads, self.batch, self.s_q).transpose(1, 0, 2)
        check_lse(finite_lse(lse), want_lse, noise)
        return out, lse


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("s_q", [1, 3])
@pytest.mark.parametrize("heads", [64, 128, 16])
def test_decode_of_v32(place, heads, s_q, shape):
    Decode(0, "fp8_656_amax", heads, s_q, shape).check(place)


@pytest.mark.parametrize(("shape", "extra"), zip(SHAPES, EXTRA), ids=str)
@pytest.mark.parametrize("s_q", [1, 3])
@pytest.mark.parametrize("heads", [64, 128, 8])
def test_decode_of_v4(place, heads, s_q, shape, extra):
    """Sinks, lengths, a second cache with pages of another size, a sequence without a key."""
    call = Decode(1, "fp8_584", heads, s_q, shape, extra=extra, lengths=True, sink=True)
    out, lse = call.check(place)
    assert not out[1].any() and np.isposinf(lse[1]).all() and not np.isinf(lse[[0, 2, 3]]).all()


def test_decode_of_bf16(place):
    Decode(2, "bf16", 16, 2, (512, 64, 64), lengths=True).check(place, softmax_scale=0.05)


def test_the_default_scale_and_all_positions(place):
    """FastDeploy's call: every argument by position, an unsqueezed q and transposed blocks."""
    call = Decode(3, "fp8_656", 64, 1, (512, 64, 64))
    cache = np.expand_dims(call.caches[0].data, 1)  # FastDeploy's [blocks, 1, 64, 656]
    q = to_paddle(call.q, place)
    metadata, _ = flash_mla.get_mla_metadata()
    skip_slices_on(place)
    out, _ = flash_mla.flash_mla_with_kvcache(
        q.unsqueeze(1), to_paddle(cache, place).transpose([0, 2, 1, 3]), None, None, 512, metadata,
        None, 0.1, False, True, int32(call.indices[0], place), None, None, None, None, None,
    )  # fmt: skip
    check_output(to_numpy(out), call.want(softmax_scale=0.1)[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("kind", ["bf16", "fp8_656"])
def test_dense_decode(place, kind, s_q, causal):
    """Without indices: row j of s_q sees length - s_q + j + 1 keys, or all of them."""
    skip_slices_on(place)
    rng = RNG(10)
    lengths = np.array([5, 130, 0, 64, 1], np.int32)
    cache = make_cache(rng, KINDS[kind], 64 * 15, pages=15)
    tables = rng.permutation(15).reshape(5, 3).astype(np.int32)
    q, sinks = queries(rng, 5 * s_q, 16, 576), rng.standard_normal(16).astype(np.float32)
    out, lse = flash_mla.flash_mla_with_kvcache(
        to_paddle(q.reshape(5, s_q, 16, 576), place),
        to_paddle(cache.data[:, :, None], place),
        to_paddle(tables, place),
        to_paddle(lengths, place),
        512,
        *flash_mla.get_mla_metadata(),
        causal=causal,
        is_fp8_kvcache=kind != "bf16",
        attn_sink=to_paddle(sinks, place),
    )
    seen = lengths[:, None] - (np.arange(s_q)[::-1] if causal else 0) + np.zeros(s_q, np.int32)
    tokens_of = tables.repeat(64, axis=1) * 64 + np.tile(np.arange(64), 3)
    want, want_lse, _ = reference.mla_sparse_attention(
        q,
        cache.data,
        tokens_of.repeat(s_q, axis=0),
        cache_format=KINDS[kind][0],
        topk_length=seen.reshape(-1),
        sinks=sinks,
    )
    check_output(to_numpy(out).reshape(want.shape), want)
    lse = finite_lse(to_numpy(lse)).transpose(1, 0, 2)
    check_lse(lse.reshape(want_lse.shape), want_lse)


@pytest.mark.parametrize(
    "name", ["extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length"]
)
def test_what_belongs_to_indices_is_refused_without_them(name):
    q, cache = paddle.zeros([1, 1, 2, 576], "bfloat16"), paddle.zeros([1, 64, 1, 656], "uint8")
    table, lengths = paddle.zeros([1, 1], "int32"), paddle.ones([1], "int32")
    with pytest.raises(ValueError, match=f"{name}: expected None without indices"):
        flash_mla.flash_mla_with_kvcache(
            q, cache, table, lengths, 512, None, is_fp8_kvcache=True, **{name: lengths}
        )


def test_codes_as_int8(place):
    """What a server keeps as another type of a byte each."""
    skip_slices_on(place)
    call = Decode(9, "fp8_656", 8, 1, (128, 64, 64))
    metadata, _ = flash_mla.get_mla_metadata()
    cache = to_paddle(call.caches[0].data.view(np.int8)[:, :, None], place)
    out, _ = flash_mla.flash_mla_with_kvcache(
        to_paddle(call.q[:, None], place),
        *(cache, None, None, 512, metadata),
        is_fp8_kvcache=True,
        indices=int32(call.indices[0], place),
    )
    check_output(to_numpy(out), call.want()[0])


def test_metadata_of_any_call_goes_with_any_other(place):
    lengths = int32([3, 4], place)
    metadata, splits = flash_mla.get_mla_metadata(lengths, 64, 1, 64, True, topk=2048)
    assert isinstance(metadata, flash_mla.FlashMLASchedMeta) and splits is None
    cache = to_paddle(np.zeros((2, 64, 1, 656), np.uint8), place)
    for heads in (64, 3):
        out, lse = flash_mla.flash_mla_with_kvcache(
            to_paddle(np.zeros((2, 1, heads, 576), BF16), place),
            cache,
            None,
            lengths,
            512,
            metadata,
            is_fp8_kvcache=True,
            indices=int32(np.full((2, 1, 64), -1), place),
        )
        assert np.isposinf(to_numpy(lse)).all() and not to_numpy(out).any()


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("dim", [576, 512])
@pytest.mark.parametrize(
    ("s_q", "s_kv", "topk", "heads"),
    [(62, 128, 128, 64), (33, 256, 256, 128), (1, 592, 128, 128), (17, 1840, 512, 8)],
)
def test_prefill(place, s_q, s_kv, topk, heads, dim, sink):
    rng = RNG(4)
    kv = rng.normal(size=(s_kv, 1, dim)).astype(BF16)
    q = queries(rng, s_q, heads, dim)
    indices = rng.integers(0, s_kv, (s_q, topk)).astype(np.int32)
    indices[rng.random(indices.shape) < 0.1] = rng.choice([-1, s_kv, 2**31 - 1])
    lengths = rng.integers(0, topk + 1, s_q).astype(np.int32)
    lengths[s_q // 2] = 0
    sinks = rng.normal(size=heads).astype(np.float32) if sink else None
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(
        to_paddle(q, place),
        to_paddle(kv, place),
        int32(indices[:, None], place),
        0.06,
        512,
        None if sinks is None else to_paddle(sinks, place),
        int32(lengths, place),
    )
    want, want_lse, want_max = reference.mla_sparse_attention(
        q,
        kv.transpose(1, 0, 2),
        indices,
        cache_format="bf16",
        topk_length=lengths,
        sinks=sinks,
        softmax_scale=0.06,
    )
    check_output(to_numpy(out), want)
    check_lse(finite_lse(to_numpy(lse)).T, want_lse)
    check_lse(to_numpy(max_logits).T, want_max)


def test_prefill_of_part_of_a_wider_tensor(place):
    skip_slices_on(place)
    rng = RNG(5)
    wide = np.full((200, 1, 640), np.nan, BF16)
    wide[..., 64:] = rng.normal(size=(200, 1, 576))
    q, indices = queries(rng, 3, 4, 576), rng.integers(0, 200, (3, 1, 64)).astype(np.int32)
    kv = strided(to_paddle(wide, place), [200, 1, 576], [640, 640, 1], 128)
    out, *_ = flash_mla.flash_mla_sparse_fwd(
        to_paddle(q, place), kv, int32(indices, place), sm_scale=0.04
    )
    want, *_ = reference.mla_sparse_attention(
        q,
        np.ascontiguousarray(wide[:, 0, 64:])[None],
        indices[:, 0],
        cache_format="bf16",
        softmax_scale=0.04,
    )
    check_output(to_numpy(out), want)


def test_signatures_are_upstreams():
    orders = {
        flash_mla.flash_mla_with_kvcache: (
            "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits "
            "softmax_scale causal is_fp8_kvcache indices attn_sink extra_k_cache "
            "extra_indices_in_kvcache topk_length extra_topk_length"
        ),
        flash_mla.flash_mla_sparse_fwd: "q kv indices sm_scale d_v attn_sink topk_length",
        dsk_attn_write_cache: "kv_nope kv_pe kv_cache slot_mapping scale cache_quant_type_str",
    }
    for function, order in orders.items():
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters] == order.split(), function
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def good_decode():
    return {
        "q": to_paddle(np.zeros((2, 1, 64, 576), BF16)),
        "k_cache": to_paddle(np.zeros((2, 64, 1, 656), np.uint8)),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": None,
        "is_fp8_kvcache": True,
        "indices": int32(np.zeros((2, 1, 64))),
    }


WRONG = [
    ({"indices": None}, TypeError, "block_table: expected a tensor, got NoneType"),
    ({"causal": True}, ValueError, "causal: expected False with indices"),
    ({"head_dim_v": 576}, ValueError, "head_dim_v: expected 512, got 576"),
    ({"q": to_paddle(np.zeros((2, 64, 576), BF16))}, ValueError, "q: expected 4 dimensions"),
    ({"q": None}, TypeError, "q: expected a tensor, got NoneType"),
    ({"q": to_paddle(np.zeros((2, 1, 64, 640), BF16))}, ValueError, "q: expected 576 or 512"),
    ({"indices": int32(np.zeros((2, 64)))}, ValueError, "indices: expected 3 dimensions"),
    ({"is_fp8_kvcache": False}, TypeError, "cache: expected dtype bfloat16"),
    # Positions of a package that has scales of Q and K before `is_fp8_kvcache`.
    ({"is_fp8_kvcache": None}, TypeError, "is_fp8_kvcache: expected bool, got NoneType; the pack"),
    ({"is_fp8_kvcache": to_paddle(np.ones(1, np.float32))}, TypeError, "is_fp8_kvcache: expected"),
    ({"causal": None}, TypeError, "causal: expected bool, got NoneType"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG)
def test_wrong_decode(change, error, text):
    with pytest.raises(error, match=text):
        flash_mla.flash_mla_with_kvcache(**{**good_decode(), **change})


def test_wrong_prefill():
    q, kv = to_paddle(np.zeros((2, 64, 576), BF16)), to_paddle(np.zeros((9, 1, 576), BF16))
    indices = int32(np.zeros((2, 1, 128)))
    with pytest.raises(ValueError, match="kv: expected one KV head"):
        flash_mla.flash_mla_sparse_fwd(q, kv.expand([9, 2, 576]), indices, 1.0)
    with pytest.raises(ValueError, match="indices: expected 3 dimensions"):
        flash_mla.flash_mla_sparse_fwd(q, kv, indices[:, 0], 1.0)
    with pytest.raises(ValueError, match="d_v: expected 512, got 64"):
        flash_mla.flash_mla_sparse_fwd(q, kv, indices, 1.0, d_v=64)


def decode_v4(q, cache, indices, sink, extra, extra_indices, length):
    metadata, _ = flash_mla.get_mla_metadata()
    return flash_mla.flash_mla_with_kvcache(
        *(q, cache, None, None, 512, metadata),
        is_fp8_kvcache=True,
        indices=indices,
        attn_sink=sink,
        extra_k_cache=extra,
        extra_indices_in_kvcache=extra_indices,
        topk_length=length,
    )


def prefill(q, kv, indices):
    return flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.04)


def test_traced_and_saved(place):
    skip_slices_on(place)  # Paddle makes lengths of two queries a sequence
    rng = RNG(6)
    call = Decode(7, "fp8_584", 16, 2, (128, 64, 72), extra=(64, 64, 72))
    caches = [np.expand_dims(cache.data[:, : 72 * 584].reshape(-1, 72, 584), 2)
              for cache in call.caches]  # fmt: skip
    call.lengths[0] = np.array([3, 64, 0, 17], np.int32)
    call.sink = rng.normal(size=16).astype(np.float32)
    q = call.q.reshape(4, 2, 16, 512)
    given = [q, caches[0], call.indices[0], call.sink, caches[1], call.indices[1], call.lengths[0]]
    (out, lse), _ = run_all_modes(decode_v4, given, place)
    want, want_lse = call.want()
    check_output(out, want)
    check_lse(finite_lse(lse), want_lse)
    kv = rng.normal(size=(50, 1, 576)).astype(BF16)
    indices = rng.integers(-9, 60, (6, 1, 30)).astype(np.int32)
    run_all_modes(prefill, [queries(rng, 6, 3, 576), kv, indices], place)


# ---- FastDeploy's writer -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp8_ds_mla", "auto", "none"])
@pytest.mark.parametrize("heads", [True, False])
def test_dsk_attn_write_cache(place, kind, heads):
    """FastDeploy's shapes; its scales are amax / 448, exactly."""
    rng = RNG(8)
    cache_format = "fp8_656" if kind == "fp8_ds_mla" else "bf16"
    latent, rope = tokens(rng, 40, cache_format)
    before = random_cache(rng, (3, 1, 64), cache_format)
    slots = rng.permutation(192)[:40].astype(np.int64)
    slots[7] = -1
    cache = to_paddle(before.copy(), place)
    pe = rope[:, None] if heads else rope
    scale = to_paddle(np.ones((), np.float32), place)  # FastDeploy passes one, and uses none
    result = dsk_attn_write_cache(
        to_paddle(latent, place), to_paddle(pe, place), cache, to_paddle(slots, place), scale, kind
    )
    assert result is cache
    rule = "amax" if kind == "fp8_ds_mla" else "pow2"
    want = reference.mla_write_cache(
        latent, rope, before, slots, cache_format=cache_format, scale_rule=rule
    )
    assert_same_bits(to_numpy(cache).view(np.uint8), want.view(np.uint8))
    if kind == "fp8_ds_mla":
        row = want[slots[0] // 64, 0, slots[0] % 64]
        amax = np.abs(latent[0].astype(np.float32).reshape(4, 128)).max(axis=1)
        np.testing.assert_array_equal(row[512:528].view("<f4"), amax / np.float32(448))
        values = token_values(row[None], np.zeros((1, 0), np.uint8), "fp8_656")
        near = np.abs(values[0, :512].astype(np.float32) - latent[0].astype(np.float32))
        assert (near.reshape(4, 128) <= amax[:, None] / 24).all()


def test_dsk_attn_write_cache_refuses():
    cache = to_paddle(np.zeros((1, 1, 64, 656), np.uint8))
    given = [to_paddle(np.zeros((1, 512), BF16)), to_paddle(np.zeros((1, 64), BF16)), cache]
    slots = paddle.to_tensor([0])
    with pytest.raises(NotImplementedError, match="cache_quant_type_str: expected 'fp8_ds_mla'"):
        dsk_attn_write_cache(*given, slots, None, "fp8")
    with pytest.raises(ValueError, match=r"kv_cache: expected shape \[num_blocks, 1, block_size"):
        dsk_attn_write_cache(*given[:2], cache.reshape([1, 64, 656]), slots, None, "fp8_ds_mla")


def test_a_second_cache_without_indices(place):
    q = to_paddle(np.ones((2, 3, 4, 576), BF16), place)
    cache = to_paddle(np.zeros((2, 64, 1, 656), np.uint8), place)
    slots = int32(np.full((2, 3, 5), 7), place)
    plain = [q, cache, None, None, 512, None]
    given = {"is_fp8_kvcache": True, "indices": slots}
    want = flash_mla.flash_mla_with_kvcache(*plain, **given)
    got = flash_mla.flash_mla_with_kvcache(
        *plain,
        **given,
        extra_k_cache=cache,
        extra_indices_in_kvcache=int32(np.zeros((2, 3, 0)), place),
        extra_topk_length=int32([0, 0], place),
    )
    for a, b in zip(got, want):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


def test_empty_batches_and_shapes_that_only_multiply_to_the_same():
    cache, table = paddle.zeros([2, 64, 1, 656], "uint8"), paddle.zeros([0, 1], "int32")
    q = paddle.zeros([0, 1, 2, 576], "bfloat16")
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, cache, table, paddle.zeros([0], "int32"), 512, None, is_fp8_kvcache=True
    )
    assert out.shape == [0, 1, 2, 512] and lse.shape == [0, 2, 1]
    q, indices = paddle.zeros([2, 2, 4, 576], "bfloat16"), paddle.zeros([4, 1, 5], "int32")
    with pytest.raises(ValueError, match=r"indices: expected shape \[2, 2, topk\]"):
        flash_mla.flash_mla_with_kvcache(
            q, cache, None, None, 512, None, is_fp8_kvcache=True, indices=indices
        )
