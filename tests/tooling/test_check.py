"""FASTATTN_CHECK: wrong tables, lengths, slots and scales are refused by name, and nothing else.

Each case of :data:`WRONG` is a call that the operator itself takes without a word.
"""

import os

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _check, _check_rules, _ops, env
from fastattn.backends import AttentionLayer, FlashAttentionBackend, ForwardMeta, make_config
from fastattn.reference import make_rotary_embs
from tests.support import fresh
from tests.support.calls import CALLS, make_call
from tests.support.tensors import int32, to_paddle

KV, H, D, BLOCKS = 2, 4, 64, 7
SEQS = {  # 70 + 1 and 3 + 5 tokens, and one that rests
    "block_tables": [[4, 0, 99], [1, -1, 99], [-1, -1, -1]],
    "cu_seqlens_q": [0, 1, 6, 6],
    "seq_lens_decoder": [70, 3, 500],
    "seq_lens_this_time": [1, 5, 0],
}


@pytest.fixture(autouse=True)
def checks():
    with _check.checking():
        yield


def floats(*shape):
    return paddle.ones(shape, "bfloat16")


def scales(values):
    return paddle.to_tensor(np.asarray(values, np.float32))


def dynamic():
    return paddle.ones([BLOCKS, KV, 64])


def paged(given, quant="none", **options):
    """Keyword arguments of a step, with changes."""
    seqs = {k: int32(v) for k, v in {**SEQS, **given}.items()}
    dtype = "bfloat16" if quant == "none" else "uint8"
    value = [BLOCKS, KV, 64, D] if quant == "none" else [BLOCKS, KV, D, 64]
    caches = {
        "key_cache": paddle.zeros([BLOCKS, KV, 64, D], dtype),
        "value_cache": paddle.zeros(value, dtype),
    }
    return {**caches, **seqs, "cache_quant_type": quant, **options}


def attend(given=None, quant="none", **options):
    lengths = {"max_seqlen_q": 8, "max_seqlen_k": 192}
    return F.paged_attention(floats(6, H, D), **lengths, **paged(given or {}, quant, **options))


def write(given=None, quant="none", **options):
    return F.write_cache_kv(
        floats(6, KV, D), floats(6, KV, D), **paged(given or {}, quant, **options)
    )


def rope(given=None, rows=200, **options):
    table = to_paddle(make_rotary_embs(rows, D), "cpu")
    qkv, heads = floats(6, (H + 2 * KV) * D), {"num_heads": H, "num_kv_heads": KV}
    return F.rope_write_cache_kv(qkv, rotary_embs=table, **heads, **paged(given or {}, **options))


def step(given=None, quant="none", rows=200, **options):
    table = to_paddle(make_rotary_embs(rows, D), "cpu")
    qkv, heads = floats(6, (H + 2 * KV) * D), {"num_heads": H, "num_kv_heads": KV}
    lengths = {"max_seqlen_q": 8, "max_seqlen_k": 192}
    given = paged(given or {}, quant, **options)
    return F.attention_step(qkv, rotary_embs=table, **heads, **lengths, **given)


def int8(name, values):
    pair = {"cache_k_scales": scales([1.0]), "cache_v_scales": scales([1.0])}
    return {"quant": "cache_int8", **pair, name: scales(values)}


def fp8(name, index, value, dtype="float32"):
    pair = {"cache_k_scales": dynamic(), "cache_v_scales": dynamic()}
    pair[name][index] = value
    pair = {side: tensor.astype(dtype) for side, tensor in pair.items()}
    return {"quant": "block_wise_fp8", **pair}


def latent(tables, cached):
    cache = paddle.ones([5, 16, 576], "bfloat16")
    seqs = [int32(x) for x in (tables, [0, 1], cached, [1])]
    return F.mla_attention(floats(1, 8, 576), cache, *seqs, 1, 64, cache_format="bf16")


def write_latents(slots, **options):
    cache = paddle.zeros([2, 64, 576], "bfloat16")
    n = len(slots)
    return F.mla_write_cache(
        floats(n, 512), floats(n, 64), cache, int32(slots), cache_format="bf16", **options
    )


def sparse(indices, length=None):
    cache = paddle.zeros([2, 64, 576], "bfloat16")
    length = None if length is None else int32(length)
    return F.mla_sparse_attention(
        floats(1, 8, 576), cache, int32(indices), cache_format="bf16", topk_length=length
    )


def write_keys(slots):
    cache = paddle.zeros([2, 64, 132], "uint8")
    return F.indexer_k_write_cache(floats(len(slots), 128), cache, int32(slots), quant="fp8")


def score(lengths, tables, longest=200):
    cache = paddle.zeros([3, 64, 132], "uint8")
    q = paddle.zeros([1, 1, 8, 128], "uint8")
    return F.paged_mqa_logits(q, cache, paddle.ones([1, 8]), int32(lengths), int32(tables), longest)


def maps(tables, num_blocks=9, **options):
    ids, starts, cached = int32([0, 1, 1, -1]), int32([0, 1, 3]), int32([65, 0])
    return F.token_maps(
        ids, int32(tables), starts, cached, num_tokens=4, num_blocks=num_blocks, **options
    )


def append(tables, starts):
    cache, out = paged({}, "block_wise_fp8"), [floats(70, KV, D) for _ in range(2)]
    pair = {"cache_k_scales": dynamic(), "cache_v_scales": dynamic(), "dynamic_quant": True}
    seqs = [int32(x) for x in (tables, [70], starts)]
    caches = cache["key_cache"], cache["value_cache"]
    return F.append_cache_kv_c8(*caches, *out, *seqs, cache_quant_type="block_wise_fp8", **pair)


def gather_keys(tables, starts):
    cache = paddle.zeros([3, 64, 132], "uint8")
    return F.indexer_k_gather(cache, int32(tables), int32(starts), 80)


def save_states(slots):
    states = paddle.zeros([2, 4, 512])
    x, ape = paddle.ones([2, 512]), paddle.ones([4, 256])
    return F.save_partial_states(x, ape, int32([0, 1]), states, int32(slots))


def compress(tables, slots):
    tokens = int32(np.arange(8))
    return F.indexer_kv_compress_insert(
        paddle.ones([2, 4, 512]),
        *(int32(tables), int32(np.zeros(8)), tokens, tokens, int32(slots)),
        *(paddle.ones([128]), paddle.ones([8, 64]), paddle.zeros([1, 132 * 16], "uint8")),
        compress_ratio=4,
        page_size=16,
    )


def logits(starts, ends):
    q, keys = paddle.zeros([1, 8, 64], "uint8"), paddle.zeros([3, 64], "uint8")
    ends = int32(starts), int32(ends)
    return F.mqa_logits(q, keys, paddle.ones([1, 8]), *ends, k_scales=scales([1, 1, 1]))


def flash(starts):
    x = paddle.ones([3, 1, 64])
    return F.flash_attention(x, x, x, int32([0, 3]), int32(starts), 3, 3)


#: Message and call.
WRONG = {
    "short": (
        "paged_attention: block_tables: expected at least 2 entries for the 71 tokens of sequence "
        "0, got 1",
        lambda: attend({"block_tables": [[4], [1], [0]]}),
    ),
    "unassigned": (
        "paged_attention: block_tables: expected a block in [0, 7) for tokens 0 to 63 of sequence "
        "0, got -1 at entry 0 (FASTATTN_CHECK=partial permits -1)",
        lambda: attend({"block_tables": [[-1, 0], [1, 0], [0, 0]]}),
    ),
    "beyond": (
        "paged_attention: block_tables: expected a block in [0, 7) for tokens 64 to 70 of sequence "
        "0, got 7 at entry 1",
        lambda: attend({"block_tables": [[0, 7], [1, 0], [0, 0]]}),
    ),
    "in a window": (
        "tokens 69 to 70 of sequence 0, got -1 at entry 1",
        lambda: attend({"block_tables": [[0, -1], [1, 0], [0, 0]]}, window_size=(1, 0)),
    ),
    "in a mask": (
        "tokens 64 to 64 of sequence 0, got -1 at entry 1",
        lambda: attend(
            {"block_tables": [[0, -1], [1, 0], [0, 0]]},
            mask_offsets=int32([[0, 65], *[[0, 8]] * 5]),
        ),
    ),
    "negative new": (
        "paged_attention: seq_lens_this_time: expected at least 0 for sequence 1, got -5",
        lambda: attend({"seq_lens_this_time": [1, -5, 0]}),
    ),
    "negative cached": (
        "paged_attention: seq_lens_decoder: expected at least 0 for sequence 1, got -3",
        lambda: attend({"seq_lens_decoder": [70, -3, 0]}),
    ),
    "negative start": (
        "paged_attention: cu_seqlens_q: expected a start in [0, 5] for sequence 0, got -1",
        lambda: attend({"cu_seqlens_q": [-1, 1, 6, 6]}),
    ),
    "past the tokens": (
        "paged_attention: cu_seqlens_q: expected a start in [1, 1] for sequence 1, got 2",
        lambda: attend({"cu_seqlens_q": [0, 2, 7, 7]}),
    ),
    "fewer tokens than new": (
        "paged_attention: cu_seqlens_q: expected 5 tokens from entry 1 to the next, "
        "seq_lens_this_time of sequence 1, got 1 and 4",
        lambda: attend({"cu_seqlens_q": [0, 1, 4, 4]}),
    ),
    "two writers": (
        "write_cache_kv: block_tables: expected a block of its own for every entry that new tokens "
        "are written to, got block 1 at entry 1 of sequence 0 and at entry 0 of sequence 1",
        lambda: write({"block_tables": [[4, 1], [1, 0], [0, 0]]}),
    ),
    "lost write": (
        "write_cache_kv: block_tables: expected a block in [0, 7) for tokens 70 to 70 of sequence "
        "0, got -1 at entry 1 (FASTATTN_CHECK=partial permits -1)",
        lambda: write({"block_tables": [[4, -1], [1, 0], [0, 0]]}),
    ),
    "rotary rows": (
        "rope_write_cache_kv: seq_lens_decoder: expected at most 70 tokens of a sequence, the rows "
        "of rotary_embs, got 70 and 1 new ones of sequence 0",
        lambda: rope(rows=70),
    ),
    "another sequence's token": (
        "rope_write_cache_kv: batch_id_per_token: expected 1 or -1 at token 2, got 0",
        lambda: rope(batch_id_per_token=int32([0, 1, 0, 1, 1, 1])),
    ),
    "a step's read": (
        "attention_step: block_tables: expected a block in [0, 7) for tokens 0 to 63 of sequence "
        "0, got -1 at entry 0 (FASTATTN_CHECK=partial permits -1)",
        lambda: step({"block_tables": [[-1, 0], [1, 9], [0, 0]]}),
    ),
    "a step's write": (
        "attention_step: block_tables: expected a block in [0, 7) for tokens 70 to 70 of sequence "
        "0, got -1 at entry 1 (FASTATTN_CHECK=partial permits -1)",
        lambda: step({"block_tables": [[4, -1], [1, 0], [0, 0]]}),
    ),
    "a step's rotary rows": (
        "attention_step: seq_lens_decoder: expected at most 70 tokens of a sequence, the rows of "
        "rotary_embs, got 70 and 1 new ones of sequence 0",
        lambda: step(rows=70),
    ),
    "a step's cached scale": (
        "attention_step: cache_v_scales: expected a finite scale other than 0 of token 69 of "
        "sequence 0, KV head 1, got nan in block 0",
        lambda: step(**fp8("cache_v_scales", (0, 1, 5), np.nan)),
    ),
    "static NaN": (
        "write_cache_kv: cache_v_scales: expected finite scales above 0, got nan at entry 0",
        lambda: write(**int8("cache_v_scales", [np.nan])),
    ),
    "static 0": (
        "paged_attention: cache_k_scales: expected finite scales above 0, got 0.0 at entry 1",
        lambda: attend(**int8("cache_k_scales", [1, 0])),
    ),
    "static inf": ("got inf at entry 1", lambda: attend(**int8("cache_k_scales", [1, np.inf]))),
    "static -1": ("got -1.0 at entry 0", lambda: attend(**int8("cache_k_scales", [-1.0]))),
    "dynamic NaN": (
        "paged_attention: cache_v_scales: expected a finite scale other than 0 of token 70 of "
        "sequence 0, KV head 1, got nan in block 0",
        lambda: attend(**fp8("cache_v_scales", (0, 1, 6), np.nan)),
    ),
    "never written": (
        "paged_attention: cache_k_scales: expected a finite scale other than 0 of token 7 of "
        "sequence 1, KV head 0, got 0.0 in block 1",
        lambda: attend(**fp8("cache_k_scales", (1, 0, 7), 0)),
    ),
    "dynamic bf16": (
        "cache_k_scales: expected a finite scale other than 0 of token 2 of sequence 1, KV head 0, "
        "got inf in block 1",
        lambda: attend(**fp8("cache_k_scales", (1, 0, 2), np.inf, "bfloat16")),
    ),
    "latent page": (
        "mla_attention: block_tables: expected a block in [0, 5) for tokens 16 to 31 of sequence "
        "0, got 5 at entry 1",
        lambda: latent([[0, 5, 1]], [40]),
    ),
    "latent table": (
        "mla_attention: block_tables: expected at least 3 entries for the 41 tokens of sequence 0",
        lambda: latent([[0, 1]], [40]),
    ),
    "gathered key": (
        "append_cache_kv_c8: block_tables: expected a block in [0, 7) for tokens 64 to 69 of "
        "sequence 0, got -1 at entry 1",
        lambda: append([[0, -1]], [0, 70]),
    ),
    "room for gathered keys": (
        "append_cache_kv_c8: cu_seqlens_k: expected at most 70 at entry 1, got 71",
        lambda: append([[0, 1]], [0, 71]),
    ),
    "gathered index key": (
        "indexer_k_gather: block_tables: expected at least 2 entries for the 70 tokens of sequence",
        lambda: gather_keys([[0]], [0, 70]),
    ),
    "starts of gathered keys": (
        "indexer_k_gather: cu_seqlens_k: expected at least 70 at entry 2, got 60",
        lambda: gather_keys([[0, 1], [1, 2]], [0, 70, 60]),
    ),
    "state slot": (
        "save_partial_states: state_slots: expected a slot below 8 for token 1, got 8",
        lambda: save_states([0, 8]),
    ),
    "state of a group": (
        "indexer_kv_compress_insert: block_tables: expected a block in [0, 2) for tokens 0 to 3 of "
        "sequence 0, got 2 at entry 0",
        lambda: compress([[2, 0]], np.arange(8) // 4),
    ),
    "compressed slot": (
        "indexer_kv_compress_insert: kv_slots: expected a slot below 16 for token 7, got 16",
        lambda: compress([[1, 0]], [0] * 4 + [16] * 4),
    ),
    "range of keys": (
        "mqa_logits: ends: expected 0 to 3 of query 0, got 4",
        lambda: logits([0], [4]),
    ),
    "latent slot": (
        "mla_write_cache: slot_mapping: expected a slot below 128 for token 1, got 128",
        lambda: write_latents([0, 128]),
    ),
    "latent slot twice": (
        "mla_write_cache: slot_mapping: expected a slot of its own for every token, got 5 for "
        "tokens 0 and 2",
        lambda: write_latents([5, -1, 5]),
    ),
    "index slot": (
        "indexer_k_write_cache: slot_mapping: expected a slot below 128 for token 0, got 200",
        lambda: write_keys([200]),
    ),
    "sparse slot": (
        "mla_sparse_attention: indices: expected a slot below 128 for query 0, got 128 at entry 1",
        lambda: sparse([[3, 128, -1]]),
    ),
    "sparse length": (
        "mla_sparse_attention: topk_length: expected 0 to 3 of query 0, got 4",
        lambda: sparse([[3, 12, -1]], [4]),
    ),
    "context too long": (
        "paged_mqa_logits: context_lens: expected at most 100 of row 0, query 0, got 130",
        lambda: score([130], [[0, 1, 2]], 100),
    ),
    "context without a page": (
        "paged_mqa_logits: block_tables: expected a block in [0, 3) for tokens 64 to 127 of "
        "sequence 0, got -1 at entry 1",
        lambda: score([130], [[0, -1, 2]]),
    ),
    "token without a slot": (
        "token_maps: block_tables: expected a block in [0, 9) for tokens 65 to 65 of sequence 0, "
        "got 9 at entry 1",
        lambda: maps([[5, 9], [1, -1]]),
    ),
    "chosen key without a block": (
        "topk_to_slots: block_tables: expected a block id for tokens 70 to 70 of sequence 0, got "
        "-1 at entry 1",
        lambda: F.topk_to_slots(int32([[3, 70]]), int32([[5, -1]])),
    ),
    "window without a block": (
        "window_indices: block_tables: expected a block id for tokens 55 to 63 of sequence 0, got "
        "-1 at entry 0",
        lambda: F.window_indices(int32([70]), window=16, block_tables=int32([[-1, 5]])),
    ),
    "contiguous keys": (
        "flash_attention: cu_seqlens_k: expected at most 3 at entry 1, got 4",
        lambda: flash([0, 4]),
    ),
    "logits": (
        "topk_indices: lengths: expected 0 to 5 of row 1, got 6",
        lambda: F.topk_indices(paddle.zeros([2, 5]), int32([5, 6]), 3),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name, monkeypatch):
    text, call = WRONG[name]
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)
    monkeypatch.setattr(_ops, "call", _ops.call.__wrapped__)
    call()  # the operator itself takes it


#: Calls of tests.support.calls that have a block outside the cache on purpose.
OUTSIDE = {"compact_block_tables": "got 9 at entry 1", "topk_to_slots": "got 7 at entry 2"}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_every_operator_are_taken(name):
    call = make_call(name, "cpu")
    if name not in OUTSIDE:
        call()
        return
    with pytest.raises(ValueError, match=OUTSIDE[name]):
        call()


def test_what_no_token_needs_may_be_anything():
    attend()
    write()
    rope(batch_id_per_token=int32([0, 1, 1, -1, 1, 77]))
    attend(**fp8("cache_k_scales", (1, 0, 8), np.nan))
    step(**fp8("cache_v_scales", (0, 1, 6), np.nan))  # the step writes the one of its own token
    step({"block_tables": [[-1, 0], [1, -1], [0, 0]]}, window_size=(6, 0))
    tables = {"block_tables": [[-1, 0], [1, -1], [0, 0]]}
    attend(tables, window_size=(6, 0))
    attend(tables, mask_offsets=int32([[64, 71], *[[0, 8]] * 5]))
    latent([[0, 1, 2, -1]], [40])
    write_latents([-1, 127, -1])
    sparse([[3, 12, 10**6]], [2])
    score([70], [[0, 1, -1]])
    maps([[5, 2], [1, -1]])
    F.topk_to_slots(int32([[3, 70]]), int32([[5, 1]]), int32([-1]))
    # Starts of slots that do not run are anywhere.
    attend({"cu_seqlens_q": [0, 1, 6, 2**30]})


def test_what_the_operator_refuses_is_left_to_it():
    with pytest.raises(TypeError, match="paged_attention: block_tables: expected"):
        attend({}, **{"window_size": (-1, -1)}, block_tables=scales([[0.0]]))
    with pytest.raises(ValueError, match="paged_attention: seq_lens_decoder: expected"):
        attend({"seq_lens_decoder": [1]})


def test_rules_are_of_operators():
    assert set(_check_rules._RULES) <= set(_ops.operators())


HEADS = {"block_tables": [[[4, 0, 9], [3, 6, 9]], [[1, -1, 9], [5, -1, 9]], [[-1] * 3] * 2]}


def test_tables_of_heads():
    """Each KV head has what its own queries see, and what they do not see it need not have."""
    attend(HEADS), write(HEADS)
    windows = int32([[-1, 0], [10, 3]])
    attend({**SEQS}, head_windows=windows)
    for changed, head in (([[-1, 0, 9], [3, 6, 9]], 0), ([[4, 0, 9], [-1, 6, 9]], 1)):
        tables = [changed, *HEADS["block_tables"][1:]]
        with pytest.raises(ValueError, match=r"block_tables: expected a block .*entry 0"):
            attend({"block_tables": tables})
        # 71 keys: a window of 10 keys ends in block 1, and its first tokens are in block 0.
        for first in (0, 3):
            call = {"head_windows": int32([[-1, 0], [5, first]])}
            if head == 1 and first == 0:
                attend({"block_tables": tables}, **call)
                continue
            with pytest.raises(ValueError, match=r"block_tables: expected a block .*entry 0"):
                attend({"block_tables": tables}, **call)
    twice = [[[4, 0, 9], [3, 6, 9]], [[1, -1, 9], [6, -1, 9]], [[-1] * 3] * 2]
    with pytest.raises(ValueError, match=r"a block of its own .*got block 6"):
        write({"block_tables": twice})


def test_a_pool_of_heads():
    """A cache of one head, whose blocks all heads share."""
    pool = {
        name: paddle.zeros([BLOCKS, 1, 64, D], "bfloat16") for name in ("key_cache", "value_cache")
    }
    tables = [[[4, 0, 9], [3, 6, 9]], [[1, -1, 9], [5, -1, 9]], [[-1] * 3] * 2]
    attend({"block_tables": tables}, **pool), write({"block_tables": tables}, **pool)
    tables[1][1][0] = 6
    with pytest.raises(ValueError, match=r"by sequence and KV head: .* got block 6"):
        write({"block_tables": tables}, **pool)
    tables[0][1][0] = -1
    with pytest.raises(ValueError, match=r"tokens 0 to 63 of sequence 0, got -1"):
        attend({"block_tables": tables}, **pool)


def test_scales_of_heads():
    broken = fp8("cache_k_scales", (3, 1, 5), 0.0)
    with pytest.raises(ValueError, match=r"token 5 of sequence 0, KV head 1"):
        attend(HEADS, **broken)
    attend(HEADS, **broken, head_windows=int32([[-1, 0], [5, 3]]))
    attend(HEADS, **fp8("cache_k_scales", (3, 0, 5), 0.0))  # block 3 is another head's


def test_partial_tables():
    tables = {"block_tables": [[-1, 0], [-1, 0], [0, 0]]}
    with _check.partial_tables():
        attend(tables)
        write(tables)
        with pytest.raises(ValueError, match="got 7 at entry 1"):
            attend({"block_tables": [[-1, 7], [1, 0], [0, 0]]})
    with pytest.raises(ValueError, match="got -1 at entry 0"):
        attend(tables)


def test_a_level_for_ranks_of_a_spread_cache(monkeypatch):
    monkeypatch.setattr(_ops, "call", _ops.call.__wrapped__)
    with _check.checking(_check.PARTIAL):
        write({"block_tables": [[-1, 0], [-1, 0], [0, 0]]})
        with pytest.raises(ValueError, match="expected at least 2 entries"):
            write({"block_tables": [[-1], [-1], [-1]]})


def test_a_prefix_shorter_than_the_new_tokens():
    tables, cached, new = [[0, 1, 2], [0, 3, 4]], [64, 64], [50, 50]
    plan = F.plan_cascade(tables, cached, new, 64)
    caches = [paddle.zeros([5, 1, 64, 64], "bfloat16") for _ in range(2)]
    out = F.cascade_attention(
        floats(100, 1, 64), *caches, plan, int32([0, 50, 100]), int32(new), 50, 114
    )
    assert out.shape == [100, 1, 64]


def test_a_backend_names_the_sequence():
    backend = FlashAttentionBackend(make_config(max_model_len=256), KV, H, D)
    caches = [paddle.zeros([BLOCKS, KV, 64, D], "bfloat16") for _ in range(2)]
    table = paddle.to_tensor(make_rotary_embs(256, D))
    meta = ForwardMeta.for_step(
        cached=[0], new=[80], block_tables=[[0, 1]], caches=caches, rotary_embs=table
    )
    layer, qkv = AttentionLayer(0, "none"), floats(80, (H + 2 * KV) * D)
    for tables, text in (([[0]], "at least 2 entries"), ([[0, -1]], "got -1 at entry 1")):
        meta.block_tables = int32(tables)
        backend.init_attention_metadata(meta)
        with pytest.raises(ValueError, match=f"attention_step: block_tables: .*{text}"):
            backend.forward_mixed(None, None, None, qkv, None, None, layer, meta)


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(paddle.base.core, "is_cuda_graph_capturing", lambda: True)
    attend({"block_tables": [[-1, 0], [1, 0], [0, 0]]})


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="Paddle 2.6 traces otherwise")
def test_traced_calls_are_not_checked():
    caches = [paddle.zeros([BLOCKS, KV, 64, D], "bfloat16") for _ in range(2)]

    def network(q, key, value, tables, starts, cached, new):
        seqs = tables, starts, cached, new
        return F.paged_attention(q, key, value, *seqs, 8, 192, softmax_scale=1.0)

    seqs = [int32(x) for x in ([[-1, -1]], [0, 6], [70], [6])]
    static = paddle.jit.to_static(network, full_graph=True)
    assert static(floats(6, H, D), *caches, *seqs).shape == [6, H, D]


def test_checks_are_not_nested():
    inner = _ops.call
    with _check.checking():
        assert _ops.call is inner
    assert _ops.call is inner


CODE = """
import paddle
import fastattn.functional as F
from fastattn import _ops
int32 = lambda x: paddle.to_tensor(x, dtype="int32")
cache = paddle.zeros([2, 1, 64, 64], "bfloat16")
x = paddle.ones([1, 1, 64], "bfloat16")
F.paged_attention(x, cache, cache, int32([[-1]]), int32([0, 1]), int32([4]), int32([1]), 1, 5)
assert _ops.is_direct() is not hasattr(_ops.call, "checks")
"""


def run(value, code=CODE):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
    environment["FASTATTN_CHECK"] = value
    return fresh.run(code, env=environment)


def test_the_variable():
    done = run("1")
    assert done.returncode == 1
    assert "ValueError: paged_attention: block_tables: expected a block in [0, 2)" in done.stderr
    for value in ("0", "", "partial"):
        done = run(value)
        assert done.returncode == 0, done.stderr


def test_other_values_warn_and_count_as_0(monkeypatch):
    for value, level in (("", 0), ("0", 0), ("1", 1), ("partial", 2)):
        monkeypatch.setenv("FASTATTN_CHECK", value)
        assert env.check() == level
    monkeypatch.setenv("FASTATTN_CHECK", "yes")
    with pytest.warns(UserWarning, match="FASTATTN_CHECK: expected 0, 1 or partial, got 'yes'"):
        assert env.check() == 0
