"""Paddle's block_multihead_attention by its own arguments, against its documents in fp64."""

from __future__ import annotations

import doctest
import inspect

import numpy as np
import paddle
import pytest

from fastattn.compat import paddle as compat
from fastattn.compat.paddle import block_multihead_attention
from fastattn.reference import layout, numerics
from tests.support.bounds import assert_codes
from tests.support.compare import assert_same_bits
from tests.support.shims import Sequence, attend, check, gather, page_tables, values, visible_keys
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

FP16 = np.dtype(np.float16)


def rotary_table(positions, dim, neox):
    """[2, 1, positions, 1, D / 2], for neox [.., D], as Paddle's kernels read it."""
    angles = np.arange(positions)[:, None] / 10000.0 ** (np.arange(0, dim, 2) / dim)
    if neox:
        angles = np.concatenate([angles, angles], axis=1)
    table = np.stack([np.cos(angles), np.sin(angles)])
    return table.reshape(2, 1, positions, 1, -1).astype(np.float32)


def rotated(x, positions, table, neox):
    """x [n, heads, D] in fp64."""
    dim = x.shape[-1]
    cos, sin = (table[i, 0, positions, 0, : dim // 2].astype(np.float64)[:, None] for i in range(2))
    first, second = np.split(x, 2, axis=-1) if neox else (x[..., ::2], x[..., 1::2])
    pair = first * cos - second * sin, first * sin + second * cos
    return np.concatenate(pair, -1) if neox else np.stack(pair, -1).reshape(x.shape)


class Step:
    """Sequences of (encoder, decoder, this time), as a server calls Paddle's operator."""

    def __init__(self, seqs, *, heads=8, kv=8, dim=64, dtype=FP16, neox=False, rope=False,
                 bias=False, padding=0, seed=0):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.heads, self.kv, self.dim, self.dtype, self.neox = heads, kv, dim, dtype, neox
        self.encoder, self.decoder, self.new = (np.array(x, np.int32) for x in zip(*seqs))
        self.keys = self.decoder + self.new
        self.starts = np.concatenate([[0], np.cumsum(self.new)]).astype(np.int32)
        self.tables, blocks = page_tables(rng, self.keys, 64)
        tokens = int(self.starts[-1]) + padding
        self.qkv = values(rng, (tokens, heads + 2 * kv, dim), dtype)
        self.caches = [values(rng, (blocks, 64, kv, dim), dtype, mean) for mean in (0.0, 0.7)]
        self.table = rotary_table(256, dim, neox) if rope else None
        self.bias = values(rng, (heads + 2 * kv, dim), dtype) if bias else None

    def rounded(self, x):
        return x.astype(np.float32).astype(self.dtype).astype(np.float64)

    def expected(self):
        """Sequences with their rotated values, and the caches [blocks, 64, KV, D] behind them."""
        caches = [x.astype(np.float64) for x in self.caches]
        seqs = []
        for b, keys in enumerate(self.keys):
            positions = np.arange(self.decoder[b], keys)
            x = self.qkv[self.starts[b] : self.starts[b + 1]].astype(np.float64)
            if self.bias is not None:
                x = x + self.bias.astype(np.float64)
            turned = x[:, : self.heads + self.kv]
            if self.table is not None:
                turned = rotated(turned, positions, self.table, self.neox)
            fresh = turned[:, self.heads :], x[:, self.heads + self.kv :]
            for cache, new in zip(caches, fresh):
                for i, t in enumerate(positions):
                    cache[self.tables[b, t // 64], t % 64] = self.rounded(new[i])
            if len(x):
                seqs.append(
                    Sequence(
                        self.rounded(turned[:, : self.heads]),
                        *(gather(cache, self.tables[b], keys) for cache in caches),
                        visible_keys(len(x), keys, causal=True),
                    )
                )
        return seqs, caches

    def arguments(self, place="cpu", **changes):
        """In Paddle's order, shapes as its documentation has them."""
        tokens = len(self.qkv)
        named = {
            "qkv": to_paddle(self.qkv.reshape(tokens, -1), place),
            **{
                name: to_paddle(cache.transpose(0, 2, 1, 3), place)
                for name, cache in zip(("key_cache", "value_cache"), self.caches)
            },
            "seq_lens_encoder": int32(self.encoder[:, None], place),
            "seq_lens_decoder": int32(self.decoder[:, None], place),
            "seq_lens_this_time": int32(self.new[:, None], place),
            "padding_offsets": int32(np.zeros(tokens), place),
            "cum_offsets": int32(np.zeros(len(self.new)), place),
            "cu_seqlens_q": int32(self.starts[:, None], place),
            "cu_seqlens_k": int32(self.starts[:, None], place),
            "block_tables": int32(self.tables, place),
        }
        options = {
            "rope_emb": None if self.table is None else to_paddle(self.table, place),
            "qkv_bias": None if self.bias is None else to_paddle(self.bias.reshape(-1), place),
            "use_neox_style": self.neox,
        }
        for name in list(changes):
            if name in named:
                named[name] = changes.pop(name)
        return list(named.values()), {**options, **changes}

    def run(self, place="cpu", **changes):
        positional, options = self.arguments(place, **changes)
        return positional, block_multihead_attention(*positional, **options)

    def check(self, place, **changes):
        positional, (out, qkv, *caches) = self.run(place, **changes)
        owned = int(self.starts[-1])
        seqs, expected = self.expected()
        shape = (len(self.qkv), self.heads, self.dim)
        result = to_numpy(out)
        assert result.shape == (shape[0], self.heads * self.dim)
        check(seqs, result.reshape(shape)[:owned], None, place, self.dtype)
        assert not result[owned:].any()
        assert_same_bits(to_numpy(qkv), self.qkv.reshape(shape[0], -1))
        for got, given, exact in zip(caches, positional[1:3], expected):
            assert got.data_ptr() == given.data_ptr()
            stored = to_numpy(got).transpose(0, 2, 1, 3)
            if self.bias is None and (got is caches[1] or self.table is None):
                assert_same_bits(stored, exact.astype(self.dtype))
            else:  # fp32 sums, rounded: one rounding step from the fp64 ones at most
                step = 2.0 ** (-10 if self.dtype == FP16 else -7)
                error = np.abs(stored.astype(np.float64) - exact)
                assert (error <= step * np.abs(exact) + 1e-6).all()
        return result


def test_example_of_the_documentation(place):
    """Two prompts of 64 tokens, 8 heads of 64 channels, float16; then their decode steps."""
    step = Step([(64, 0, 64), (64, 0, 64)])
    positional, (_, _, key_cache, value_cache) = step.run(place)
    step.check(place, max_seq_len=64, block_size=64)
    seqs, caches = step.expected()
    for past in (64, 65):
        more = Step([(0, past, 1), (0, past, 1)], seed=past)
        more.tables = np.concatenate([step.tables[:, :1], [[2], [3]]], axis=1).astype(np.int32)
        more.tables[:, 1] = [b for b in range(len(caches[0])) if b not in step.tables[:, 0]][:2]
        more.caches = [x.astype(FP16) for x in caches]
        positional, options = more.arguments(place, key_cache=key_cache, value_cache=value_cache)
        out, *_ = block_multihead_attention(*positional, **options)
        seqs, caches = more.expected()
        check(seqs, to_numpy(out).reshape(2, 8, 64), None, place, FP16)
        assert_same_bits(to_numpy(key_cache).transpose(0, 2, 1, 3), caches[0].astype(FP16))


SEQS = [(37, 0, 37), (0, 90, 1), (0, 0, 0), (0, 63, 1), (70, 0, 70)]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("heads", "kv", "dim"), [(4, 4, 64), (6, 2, 128)])
@pytest.mark.parametrize("neox", [False, True])
def test_mixed_step(place, dtype, heads, kv, dim, neox):
    """Prompts beside decoding sequences, rotated, with a bias, and padding behind them."""
    Step(SEQS, heads=heads, kv=kv, dim=dim, dtype=dtype, neox=neox, rope=True, padding=3).check(
        place, compute_dtype="bf16" if dtype == BF16 else "fp16"
    )


def test_bias(place):
    Step(SEQS, heads=4, kv=2, rope=True, bias=True).check(place)


def test_chunks_and_several_decoding_tokens(place):
    """More than Paddle's operator does: a chunk behind a prefix, and speculative tokens."""
    Step([(20, 100, 20), (0, 70, 3), (0, 5, 1)], heads=4, kv=2, rope=True).check(place)


@pytest.mark.parametrize("seqs", [SEQS, [(0, n, 1) for n in (90, 63, 64, 1)], [(0, 70, 3)]])
def test_lengths_on_the_host_change_nothing(place, seqs):
    step = Step(seqs, heads=4, kv=2)
    longest = {
        "max_enc_len_this_time": int32([step.encoder.max()]),
        "max_dec_len_this_time": int32([step.decoder.max()]),
    }
    step.check(place, **longest)
    if place == "cpu":
        assert_same_bits(step.check(place), step.check(place, **longest))


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("shape_here", [False, True])
def test_int8_cache(place, dim, shape_here):
    """Static scales of each KV head; codes lie as this package has them, in Paddle's tensors."""
    step = Step(SEQS, heads=4, kv=2, dim=dim)
    rng = np.random.default_rng(2)
    scales = [rng.uniform(0.01, 0.05, 2).astype(np.float32) for _ in "kv"]
    packed, logical = [], []
    for cache, scale, kind in zip(step.caches, scales, "kv"):
        codes = numerics.quantize(
            cache.transpose(0, 2, 1, 3).astype(np.float32), scale[:, None, None], "int8"
        )
        logical.append(codes)
        stored = layout.pack(codes, kind, "fastattn", int8=True)
        packed.append(stored if kind == "k" or shape_here else stored.reshape(codes.shape))
    seqs, _ = step.expected()
    exact = []
    for seq, b in zip(seqs, np.flatnonzero(step.new)):
        parts = []
        for x, codes, scale in zip((seq.k, seq.v), logical, scales):
            past = step.decoder[b]
            old = gather(codes.transpose(0, 2, 1, 3), step.tables[b], past).view(np.int8)
            new = numerics.quantize(x[past:].astype(np.float32), scale[:, None], "int8")
            both = np.concatenate([old, new.view(np.int8)]).astype(np.float64)
            parts.append(both * scale[:, None].astype(np.float64))
        exact.append(Sequence(seq.q, *parts, seq.visible))
    tensors = [to_paddle(x, place) for x in packed]
    addresses = [x.data_ptr() for x in tensors]
    dequant = [to_paddle(x, place) for x in scales]
    quant = [to_paddle((1 / (127 * x)).astype(np.float32), place) for x in scales]
    _, (out, _, *caches) = step.run(
        place,
        key_cache=tensors[0],
        value_cache=tensors[1],
        cache_k_quant_scales=quant[0],
        cache_v_quant_scales=quant[1],
        cache_k_dequant_scales=dequant[0],
        cache_v_dequant_scales=dequant[1],
        quant_round_type=0,
    )
    check(exact, to_numpy(out).reshape(-1, 4, dim), None, place, FP16)
    assert [x.data_ptr() for x in caches] == addresses
    assert [x.shape for x in caches] == [list(x.shape) for x in packed]


def test_e4m3_output():
    step = Step(SEQS, heads=4, kv=2)
    _, (out, *_) = step.run(quant_max_bound=448.0, quant_min_bound=-448.0, out_scale=0.21)
    seqs, _ = step.expected()
    exact, naive = attend(seqs)[0], attend(seqs, "float32")[0]
    scale = np.float32(1 / (448 * 0.21))
    assert_codes(to_numpy(out).reshape(exact.shape), exact, naive, scale)


def _traced(qkv, key_cache, value_cache, decoder, new, starts, tables, table):
    out, _, key_cache, value_cache = block_multihead_attention(
        qkv, key_cache, value_cache, new, decoder, new, None, None, starts, None, tables,
        rope_emb=table, max_seq_len=256,
    )  # fmt: skip
    return out, key_cache, value_cache


def test_all_modes(place):
    step = Step(SEQS, heads=4, kv=2, rope=True)
    positional, _ = step.arguments("cpu")
    arrays = [to_numpy(positional[i]) for i in (0, 1, 2, 4, 5, 8, 10)] + [step.table]
    outputs, _ = run_all_modes(_traced, arrays, place)
    check(step.expected()[0], outputs[0].reshape(-1, 4, 64), None, place, FP16)


@pytest.mark.parametrize(
    "name",
    ["pre_key_cache", "pre_value_cache", "qkv_out_scale", "out_shift", "out_smooth", "mask",
     "tgt_mask"],
)  # fmt: skip
def test_refused_tensors(name):
    with pytest.raises(NotImplementedError, match=f"block_multihead_attention: {name}: not supp"):
        Step(SEQS).run(**{name: paddle.ones([1])})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_dynamic_cachekv_quant": True}, "use_dynamic_cachekv_quant: not supported"),
        ({"block_size": 128}, "block_size: 128, caches of 64; supported: 64"),
        ({"compute_dtype": "bf16"}, "compute_dtype: bf16 of a float16 qkv"),
        ({"out_scale": 0.5}, "out_scale: an output of -127.0 to 127.0; supported: e4m3"),
        ({"rope_emb": paddle.ones([2, 5, 256, 1, 32])}, r"rope_emb: shape \[2, 5, 256, 1, 32\]"),
        ({"qkv": paddle.ones([109, 24 * 64], "int32")}, "qkv: int32"),
    ],
)
def test_refused_values(options, text):
    with pytest.raises(NotImplementedError, match=f"block_multihead_attention: {text}"):
        Step(SEQS).run(**options)


def test_refused_with_8_bit_caches():
    step = Step(SEQS, heads=4, kv=2, dim=128)
    blocks = len(step.caches[0])
    codes = paddle.zeros([blocks, 2, 64, 128], "uint8")
    caches = {"key_cache": codes, "value_cache": codes.clone()}
    with pytest.raises(NotImplementedError, match="quant_round_type: 1; supported: 0"):
        step.run(**caches)
    with pytest.raises(NotImplementedError, match=r"quant_max_bound: -128\.0 to 127"):
        step.run(**caches, quant_round_type=0, quant_min_bound=-128.0)
    with pytest.raises(ValueError, match="cache_k_scales"):
        step.run(**caches, quant_round_type=0)
    strided = paddle.zeros([blocks, 4, 64, 128], "uint8")[:, :2]
    with pytest.raises(NotImplementedError, match="value_cache: 8 bits, and not contiguous"):
        step.run(key_cache=codes, value_cache=strided, quant_round_type=0)


def test_wrong_arguments():
    step = Step(SEQS)
    with pytest.raises(ValueError, match=r"qkv: expected shape \[T, \(H \+ 2 \* 8\) \* 64\]"):
        step.run(qkv=paddle.ones([109, 16 * 64], "float16"))
    with pytest.raises(TypeError, match="seq_lens_decoder: expected a tensor, got NoneType"):
        step.run(seq_lens_decoder=None)
    with pytest.raises(ValueError, match="key_cache: expected shape"):
        step.run(key_cache=paddle.ones([3, 64, 64], "float16"))
    empty = paddle.ones([3, 8, 64, 0], "float16")
    with pytest.raises(ValueError, match="key_cache: expected channels, got shape"):
        step.run(key_cache=empty, value_cache=empty)
    with pytest.raises(ValueError, match=r"block_tables: expected shape .* got \[4\]"):
        step.run(block_tables=int32([0, 1, 2, 3]))
    with pytest.raises(TypeError, match="cache_v_dequant_scales: expected a tensor, got float"):
        step.run(cache_v_dequant_scales=0.5)
    for name in ("max_enc_len_this_time", "max_dec_len_this_time"):
        with pytest.raises(ValueError, match=rf"{name}: expected a number, got shape \[0\]"):
            step.run(**{name: int32([])})


def test_what_is_refused_leaves_the_caches_as_they_are():
    step = Step(SEQS)
    shape = [step.tables.max() + 1, 8, 64, 64]
    caches = [paddle.full(shape, x, "float16") for x in (3.0, 4.0)]
    with pytest.raises(NotImplementedError, match="out_scale: an output of -127"):
        step.run(key_cache=caches[0], value_cache=caches[1], out_scale=0.5)
    assert bool((caches[0] == 3).all()) and bool((caches[1] == 4).all())


@pytest.mark.gpu
def test_lengths_must_be_on_the_host():
    with pytest.raises(ValueError, match="max_enc_len_this_time: expected a tensor on the CPU"):
        Step(SEQS).run("gpu", max_enc_len_this_time=int32([70], "gpu"))


def test_arguments_are_those_of_paddle():
    """Order, names and defaults, as the installed Paddle has them."""
    theirs = paddle.incubate.nn.functional.block_multihead_attention
    if not hasattr(theirs, "__code__"):
        pytest.skip("a builtin")
    expected = inspect.signature(theirs).parameters
    ours = inspect.signature(block_multihead_attention).parameters
    shared = [name for name in ours if name in expected]
    assert shared == list(expected)[: len(shared)] and len(shared) == len(expected)
    for name in shared:
        assert ours[name].default == expected[name].default, name


def test_docstring_names_every_argument():
    text = inspect.getdoc(block_multihead_attention)
    for name in inspect.signature(block_multihead_attention).parameters:
        assert name in text, name


def test_example():
    result = doctest.testmod(compat)
    assert result.attempted and not result.failed
