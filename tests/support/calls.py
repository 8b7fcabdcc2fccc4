"""A small call of every operator, whose tensors are all made before it is made."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

import fastattn.functional as F
from fastattn import _ops
from fastattn.compat import fastdeploy
from fastattn.compat.fastdeploy import gqa_rope_write_cache, merge_prefill_decode_output
from fastattn.reference.rope import make_rotary_embs
from tests.support.tensors import BF16, int32, to_paddle

HEADS, KV, DIM, BLOCKS = 4, 2, 64, 7
#: Sequences: cached and new tokens. A prompt that the Hopper prefill kernels take, and decode.
CACHED, NEW = (0, 70, 3), (130, 1, 5)
TOKENS = sum(NEW)

Call = Callable[[], list]


class _Inputs:
    """Tensors of one step on a place; the same values for the same place."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.rng = np.random.default_rng(11)

    def floats(self, *shape: int, dtype=BF16):
        return to_paddle(self.rng.normal(size=shape).astype(dtype), self.place)

    def codes(self, *shape: int):
        return to_paddle(self.rng.integers(0, 100, shape).astype(np.uint8), self.place)

    def scales(self, *shape: int):
        return to_paddle(self.rng.uniform(0.5, 2, shape).astype(np.float32), self.place)

    def int32(self, values):
        return int32(values, self.place)

    def cache(self) -> dict:
        return {
            "key_cache": self.codes(BLOCKS, KV, 64, DIM),
            "value_cache": self.codes(BLOCKS, KV, DIM, 64),
            "cache_k_scales": self.scales(BLOCKS, KV, 64),
            "cache_v_scales": self.scales(BLOCKS, KV, 64),
            "cache_quant_type": "block_wise_fp8",
        }

    def seqs(self) -> dict:
        return {
            "block_tables": self.int32([[4, 0, 6], [1, 5, -1], [2, -1, -1]]),
            "cu_seqlens_q": self.int32(np.concatenate([[0], np.cumsum(NEW)])),
            "seq_lens_decoder": self.int32(CACHED),
            "seq_lens_this_time": self.int32(NEW),
        }


def _with_cache(function, cache: dict, *args, **kwargs) -> Call:
    """A call whose results are those of the function and the cache that it may have written."""
    tensors = [cache[name] for name in cache if name != "cache_quant_type"]

    def call() -> list:
        result = function(*args, **cache, **kwargs)
        results = list(result) if isinstance(result, tuple) else [result]
        return [x for x in results if x is not None] + tensors

    return call


def _paged(t: _Inputs, dtype=BF16, **options) -> Call:
    q = t.codes(TOKENS, HEADS, DIM) if dtype == "e4m3" else t.floats(TOKENS, HEADS, DIM)
    if dtype == "e4m3":
        options["q_descale"] = t.scales(TOKENS, HEADS)
    lengths = {"max_seqlen_q": max(NEW), "max_seqlen_k": 130, "return_softmax_lse": True}
    return _with_cache(F.paged_attention, t.cache(), q, **t.seqs(), **lengths, **options)


def _sparse_paged(t: _Inputs) -> Call:
    q = t.floats(TOKENS, HEADS, DIM)
    lengths = {"max_seqlen_q": max(NEW), "max_seqlen_k": 130, "return_softmax_lse": True}
    selected = t.int32(np.argsort(t.rng.random((TOKENS, KV, 12)), -1) - 2)
    options = {"selected": selected, "granularity": 16, "window": 9, "sink_tokens": 3}
    return _with_cache(F.sparse_paged_attention, t.cache(), q, **t.seqs(), **lengths, **options)


def _update_summaries(t: _Inputs) -> Call:
    summaries = t.floats(BLOCKS, KV, 4, 2, DIM, dtype=np.float32)
    options = {"granularity": 16, "kind": "minmax"}
    return _with_cache(F.update_block_summaries, t.cache(), summaries, **t.seqs(), **options)


def _select_blocks(t: _Inputs) -> Call:
    q, seqs = t.floats(TOKENS, HEADS, DIM), t.seqs()
    summaries = t.floats(BLOCKS, KV, 4, 2, DIM, dtype=np.float32)
    options = {"granularity": 16, "kind": "minmax", "first_blocks": 1}
    return lambda: [F.select_key_blocks(q, summaries, k=4, **seqs, **options)]


def _flash(t: _Inputs) -> Call:
    q, k, v = t.floats(TOKENS, HEADS, DIM), t.floats(TOKENS, KV, DIM), t.floats(TOKENS, KV, DIM)
    cu = t.int32([0, 130, TOKENS])
    return lambda: list(
        F.flash_attention(q, k, v, cu, cu, 130, 130, causal=True, return_softmax_lse=True)
    )


def _rope(t: _Inputs) -> Call:
    qkv = t.floats(TOKENS, (HEADS + 2 * KV) * DIM)
    table = to_paddle(make_rotary_embs(200, DIM), t.place)
    options = {"num_heads": HEADS, "num_kv_heads": KV, "q_quant": "per_token_head"}
    return _with_cache(
        F.rope_write_cache_kv, t.cache(), qkv, rotary_embs=table, **t.seqs(), **options
    )


def _step(t: _Inputs) -> Call:
    qkv = t.floats(TOKENS, (HEADS + 2 * KV) * DIM)
    table = to_paddle(make_rotary_embs(200, DIM), t.place)
    options = {"num_heads": HEADS, "num_kv_heads": KV, "return_softmax_lse": True}
    lengths = {"max_seqlen_q": max(NEW), "max_seqlen_k": 130}
    return _with_cache(
        F.attention_step, t.cache(), qkv, rotary_embs=table, **t.seqs(), **lengths, **options
    )


def _write(t: _Inputs) -> Call:
    k, v = t.floats(TOKENS, KV, DIM), t.floats(TOKENS, KV, DIM)
    return _with_cache(F.write_cache_kv, t.cache(), k, v, **t.seqs())


def _append(t: _Inputs) -> Call:
    total = sum(CACHED)
    out = {name: t.floats(total, KV, DIM) for name in ("key", "value")}
    seqs = {name: x for name, x in t.seqs().items() if name in ("block_tables", "seq_lens_decoder")}
    cu = t.int32(np.concatenate([[0], np.cumsum(CACHED)]))
    call = _with_cache(
        F.append_cache_kv_c8, t.cache(), **out, **seqs, cu_seqlens_k=cu, dynamic_quant=True
    )
    return lambda: [*call(), *out.values()]


def _compact(t: _Inputs) -> Call:
    seqs = t.seqs()
    seqs["block_tables"] = t.int32([[-1, 0, 6], [1, 9, -1], [2, -1, -1]])
    return lambda: list(F.compact_block_tables(**seqs, num_tokens=TOKENS, num_blocks=BLOCKS))


def _merge(t: _Inputs) -> Call:
    sides = [(t.floats(9, HEADS, DIM), t.scales(HEADS, 9)) for _ in range(2)]
    scale = t.scales(1)
    return lambda: list(F.merge_attn_states(*sides[0], *sides[1], output_scale=scale))


def _merge_many(t: _Inputs) -> Call:
    states = t.floats(3, 9, HEADS, DIM), t.scales(3, HEADS, 9)
    sinks, scale = t.scales(HEADS), t.scales(1)
    return lambda: list(F.merge_many_attn_states(*states, sinks=sinks, output_scale=scale))


def _merge_decode(t: _Inputs) -> Call:
    outputs = [t.floats(TOKENS, HEADS * DIM) for _ in range(2)]
    encoder = t.int32([130, 0, 0])
    seqs = t.seqs()
    rest = (seqs["seq_lens_decoder"], seqs["seq_lens_this_time"], seqs["cu_seqlens_q"])
    return lambda: [merge_prefill_decode_output(*outputs, encoder, *rest, HEADS, DIM, 5)]


def _gqa(t: _Inputs) -> Call:
    qkv = t.floats(TOKENS, (HEADS + 2 * KV) * DIM)
    cache, seqs = t.cache(), t.seqs()
    # A prompt and two sequences that decode: only the prompt's keys are returned.
    arguments = (
        qkv,
        cache["key_cache"],
        cache["value_cache"],
        seqs["cu_seqlens_q"],
        t.int32([0, 130, 130, 130]),
        to_paddle(make_rotary_embs(200, DIM), t.place),
        seqs["seq_lens_this_time"],
        t.int32([130, 0, 0]),
        seqs["seq_lens_decoder"],
        t.int32(np.repeat(np.arange(3), NEW)),
        seqs["block_tables"],
        *[None] * 8,
        cache["cache_k_scales"],
        cache["cache_v_scales"],
        *[None] * 5,
        130,
        0,
        1e-6,
        False,
        "block_wise_fp8",
    )
    return lambda: [*gqa_rope_write_cache(*arguments), cache["key_cache"], cache["value_cache"]]


def _quantize(t: _Inputs) -> Call:
    x = t.floats(33, 256)
    return lambda: list(F.quantize_fp8(x, granularity="group", group_size=64))


def _mxfp4(t: _Inputs) -> Call:
    x = t.floats(33, 256)
    return lambda: list(F.mxfp4_quantize(x))


def _from_mxfp4(t: _Inputs) -> Call:
    codes, scales = t.codes(33, 128), t.codes(33, 8)
    return lambda: [F.mxfp4_dequantize(codes, scales)]


def _latent_sparse(t: _Inputs) -> Call:
    q, cache, scales = t.floats(9, 5, 512), t.codes(BLOCKS, 64, 584), t.scales(5)
    indices = t.int32(t.rng.integers(-20, 64 * BLOCKS, (9, 200)))
    options = {"cache_format": "fp8_584", "sinks": scales, "softmax_scale": 1e-9}
    return lambda: [F.mla_sparse_attention(q, cache, indices, **options)]


def _latent_write(t: _Inputs) -> Call:
    cache = t.codes(BLOCKS, 64, 656)
    inputs = t.floats(40, 512), t.floats(40, 64), cache, t.int32(np.arange(40) * 7 - 3)
    return lambda: [F.mla_write_cache(*inputs, cache_format="fp8_656")]


def _latent_gather(t: _Inputs) -> Call:
    seqs, out = t.seqs(), t.floats(80, 512)
    inputs = seqs["block_tables"], t.int32([9, 70, 0]), t.int32([0, 9, 79, 80])
    cache = t.codes(BLOCKS, 64, 584)
    return lambda: [F.mla_gather_cache(cache, out, *inputs, cache_format="fp8_584")]


def _inverse_rope(t: _Inputs) -> Call:
    x, table, positions = t.floats(9, 8, 512), t.scales(40, 64), t.int32(np.arange(9) * 4)
    return lambda: list(F.inverse_rope_quantize_fp8(x, positions, table, num_groups=2))


def _latent_qkv(t: _Inputs) -> Call:
    q, kv, cache = t.floats(9, 5, 512), t.floats(9, 512), t.codes(3, 8, 584)
    inputs = q, kv, cache, t.int32(np.arange(9) * 2 - 1), t.int32(np.arange(9)), t.scales(40, 64)
    return lambda: [F.mla_qkv_norm_rope_write(*inputs, padded_heads=8), cache]


def _latent_dense(t: _Inputs) -> Call:
    q, cache, sinks = t.floats(TOKENS, 5, 512), t.codes(BLOCKS, 64, 584), t.scales(5)
    options = {"cache_format": "fp8_584", "sinks": sinks, "softmax_scale": 1e-9}
    seqs, lengths = t.seqs(), (max(NEW), max(NEW) + max(CACHED))
    return lambda: [F.mla_attention(q, cache, *seqs.values(), *lengths, **options)]


def _topk(t: _Inputs) -> Call:
    logits, lengths = t.floats(9, 5000, dtype=np.float32), t.int32(4000 + 100 * np.arange(9))
    return lambda: [F.topk_indices(logits, lengths, 300)]


def _logits(t: _Inputs) -> Call:
    q, keys, weights = t.codes(9, 64, 128), t.codes(300, 128), t.scales(9, 64)
    starts, ends = t.int32(np.arange(9)), t.int32(300 - 20 * np.arange(9))
    scales = t.scales(300)
    return lambda: [F.mqa_logits(q, keys, weights, starts, ends, k_scales=scales)]


def _paged_logits(t: _Inputs) -> Call:
    q, cache, weights = t.codes(2, 2, 64, 64), t.codes(5, 64, 68), t.scales(4, 64)
    scales = t.int32(np.full((2, 2, 64), 0x7F7F7F7F))
    lengths, tables = t.int32([130, 7]), t.int32([[3, 0, 1], [2, -1, -1]])
    call = functools.partial(
        F.paged_mqa_logits, q, cache, weights, lengths, tables, 140, q_scales=scales, quant="mxfp4"
    )
    return lambda: [call()]


def _indexer_topk(t: _Inputs) -> Call:
    q, keys, weights = t.codes(40, 64, 128), t.codes(300, 128), t.scales(40, 64)
    starts, ends, scales = t.int32(np.arange(40)), t.int32(300 - 3 * np.arange(40)), t.scales(300)
    call = functools.partial(
        F.indexer_topk, q, keys, weights, starts, ends, 60, k_scales=scales, workspace_bytes=1
    )
    return lambda: [call()]


def _paged_indexer_topk(t: _Inputs) -> Call:
    q, cache, weights = t.codes(2, 2, 64, 64), t.codes(5, 64, 68), t.scales(4, 64)
    scales = t.int32(np.full((2, 2, 64), 0x7F7F7F7F))
    inputs = q, cache, weights, t.int32([130, 7]), t.int32([[3, 0, 1], [2, -1, -1]])
    return lambda: [F.paged_indexer_topk(*inputs, 140, 20, q_scales=scales, quant="mxfp4")]


def _indexer_q(t: _Inputs) -> Call:
    q, table, weights = t.floats(9, 32, 128), t.scales(40, 64), t.scales(9, 32)
    positions = t.int32(np.arange(9))
    return lambda: list(F.indexer_q_rope_quant(positions, q, table, weights, 0.1, 0.7))


def _indexer_q_rows(t: _Inputs) -> Call:
    q, weights, tokens = t.floats(9, 3, 128), t.scales(9, 3), t.int32([8, -1, 0, 3, 9])
    return lambda: list(F.indexer_q_quant(q, weights, 0.1, token_of_query=tokens))


def _indexer_k(t: _Inputs) -> Call:
    tokens = t.int32(np.arange(8))
    pages = t.codes(1, 132 * 16)
    call = functools.partial(
        F.indexer_kv_compress_insert,
        t.floats(2, 4, 512, dtype=np.float32),
        t.int32([[1, 0]]),
        t.int32(np.zeros(8)),
        tokens,
        tokens,
        t.int32(np.arange(8) // 4),
        t.scales(128),
        t.scales(8, 64),
        pages,
        compress_ratio=4,
        page_size=16,
    )
    return lambda: [call()]


def _save_states(t: _Inputs) -> Call:
    kv_score, ape, positions = t.floats(9, 512), t.scales(4, 256), t.int32(np.arange(9))
    state, slots = t.scales(5, 4, 512), t.int32(np.arange(9) * 2 - 1)
    return lambda: [F.save_partial_states(kv_score, ape, positions, state, slots)]


def _write_index_keys(t: _Inputs) -> Call:
    key, cache, slots = t.floats(9, 128), t.codes(3, 8, 132), t.int32(np.arange(9) * 2)
    return lambda: [F.indexer_k_write_cache(key, cache, slots, scale_rule="amax")]


def _gather_index_keys(t: _Inputs) -> Call:
    cache, tables, cu_seqlens = t.codes(3, 8, 68), t.int32([[2], [0]]), t.int32([0, 8, 13])
    return lambda: list(F.indexer_k_gather(cache, tables, cu_seqlens, 13, quant="mxfp4"))


def _to_slots(t: _Inputs) -> Call:
    chosen, tables = t.int32(np.arange(600).reshape(3, 200) % 150), t.int32([[4, 2, 7]] * 3)
    return lambda: list(F.topk_to_slots(chosen, tables, num_blocks=7))


def _token_maps(t: _Inputs) -> Call:
    seqs, tables = t.int32([0, 0, 1, -1]), t.int32([[4, 2], [7, 9]])
    starts, cached = t.int32([0, 2, 3]), t.int32([70, 5])
    return lambda: list(F.token_maps(seqs, tables, starts, cached, num_tokens=4, num_blocks=9))


def _query_rows(t: _Inputs) -> Call:
    seqs, tables, starts = t.int32([0, 0, 1, -1]), t.int32([[4, 2], [7, 9]]), t.int32([0, 2, 3])
    positions = t.int32([70, 71, 5, -1])
    return lambda: list(F.query_rows(seqs, positions, tables, starts, tile=8))


def _window(t: _Inputs) -> Call:
    positions, seqs = t.int32([3, 200, 77]), t.int32([1, 0, -1])
    tables = t.int32([[4, 2, 7, 9], [3, 1, -1, -1]])
    return lambda: list(F.window_indices(positions, seqs, block_tables=tables))


def _short_context(t: _Inputs) -> Call:
    positions = t.int32([3, 200, 77])
    return lambda: list(F.short_context_indices(positions, 40, compress_ratio=4))


def _combine(t: _Inputs) -> Call:
    topk, window = t.int32(np.arange(90).reshape(3, 30) % 41 - 1), t.int32([[1, 2, 3, -1]] * 3)
    seqs = t.int32([2, 0, -1])
    return lambda: list(F.combine_topk_window(topk, window, seqs, seq_stride=100, window_offset=50))


def _radix_topk(t: _Inputs) -> Call:
    logits, lengths = t.floats(9, 500, dtype=np.float32), t.int32(400 + 10 * np.arange(9))
    output, offsets = t.int32(np.full((9, 30), -1)), t.int32(np.arange(9))
    arguments = (logits, output, offsets, lengths, None, None, None, None, 0, 30, 1)
    return lambda: [fastdeploy.radix_topk_ragged_transform(*arguments)]


def _convert(t: _Inputs) -> Call:
    cache = t.codes(BLOCKS, KV, DIM, 64)
    kinds = {"kind": "v", "cache_quant_type": "cache_fp8", "src": "fastattn", "dst": "logical"}
    return lambda: [F.convert_cache_layout(cache, **kinds)]


def _convert_blocks(t: _Inputs) -> Call:
    cache = t.codes(BLOCKS, KV, 64, DIM)
    kinds = {"kind": "k", "cache_quant_type": "cache_fp8", "src": "fastdeploy", "dst": "fastattn"}
    done = []

    def call() -> list:
        if not done:  # a second conversion would start from the first one's result
            done.append(F.convert_cache_blocks(cache, **kinds, begin=1, end=5))
        return done

    return call


def _begin_signals(t: _Inputs) -> Call:
    lengths = (t.int32([3, 0]), t.int32([0, 9]))
    return lambda: _ops.call("begin_kv_signals", lengths, (2, False, ""))


def _send_signal(t: _Inputs) -> Call:
    caches = (t.codes(BLOCKS, KV, 64, DIM), t.codes(BLOCKS, KV, DIM, 64))

    def call() -> list:
        _ops.call("send_kv_signal", caches, (1, ""))
        return list(caches)

    return call


_MAKERS = {
    "append_cache_kv_c8": _append,
    "attention_step": _step,
    "begin_kv_signals": _begin_signals,
    "convert_cache_blocks": _convert_blocks,
    "combine_topk_window": _combine,
    "compact_block_tables": _compact,
    "convert_cache_layout": _convert,
    "flash_attention": _flash,
    "gqa_rope_write_cache": _gqa,
    "indexer_k_gather": _gather_index_keys,
    "indexer_k_write_cache": _write_index_keys,
    "indexer_kv_compress_insert": _indexer_k,
    "indexer_q_quant": _indexer_q_rows,
    "indexer_q_rope_quant": _indexer_q,
    "indexer_topk": _indexer_topk,
    "inverse_rope_quantize_fp8": _inverse_rope,
    "merge_attn_states": _merge,
    "merge_many_attn_states": _merge_many,
    "merge_prefill_decode_output": _merge_decode,
    "mla_attention": _latent_dense,
    "mla_gather_cache": _latent_gather,
    "mla_qkv_norm_rope_write": _latent_qkv,
    "mla_sparse_attention": _latent_sparse,
    "mla_write_cache": _latent_write,
    "mqa_logits": _logits,
    "mxfp4_dequantize": _from_mxfp4,
    "mxfp4_quantize": _mxfp4,
    "paged_attention": _paged,
    "paged_indexer_topk": _paged_indexer_topk,
    "paged_mqa_logits": _paged_logits,
    "quantize_fp8": _quantize,
    "rope_write_cache_kv": _rope,
    "save_partial_states": _save_states,
    "select_key_blocks": _select_blocks,
    "sparse_paged_attention": _sparse_paged,
    "update_block_summaries": _update_summaries,
    "send_kv_signal": _send_signal,
    "query_rows": _query_rows,
    "radix_topk_ragged_transform": _radix_topk,
    "short_context_indices": _short_context,
    "topk_indices": _topk,
    "token_maps": _token_maps,
    "topk_to_slots": _to_slots,
    "window_indices": _window,
    "write_cache_kv": _write,
}

#: Further ways through an operator.
_VARIANTS = {
    "paged_attention, e4m3 queries": functools.partial(_paged, dtype="e4m3"),
    "paged_attention, quantize_q": functools.partial(_paged, quantize_q=True),
}

OPERATORS = tuple(_MAKERS)
CALLS = (*_MAKERS, *_VARIANTS)


def make_call(name: str, place: str) -> Call:
    """A call (of `CALLS`) with tensors of its own; returns all tensors that it gave or wrote."""
    return {**_MAKERS, **_VARIANTS}[name](_Inputs(place))
