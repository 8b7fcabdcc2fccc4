"""What ForwardMeta.for_step refuses: lengths and tables that would give wrong results."""

import numpy as np
import paddle
import pytest

from fastattn.backends import AttentionLayer, FlashAttentionBackend, ForwardMeta, make_config
from fastattn.reference import make_rotary_embs
from tests.support.tensors import to_numpy

KV, H, D, BLOCKS = 2, 4, 64, 32


def cache(blocks: int = BLOCKS):
    return paddle.zeros([blocks, KV, 64, D], "bfloat16")


def step(**changes) -> ForwardMeta:
    given = {
        "cached": [70, 0, 64],
        "new": [1, 65, 0],
        "block_tables": [[3, 9], [4, 5], [-1, -1]],
        "caches": [cache(), cache()],
        "rotary_embs": paddle.to_tensor(make_rotary_embs(256, D)),
    }
    return ForwardMeta.for_step(**{**given, **changes})


def refusal(**changes) -> str:
    with pytest.raises(ValueError) as error:
        step(**changes)
    return str(error.value)


WHERE = "ForwardMeta.for_step: block_tables: expected "


def test_a_good_step_is_taken_and_inactive_sequences_need_no_blocks():
    assert to_numpy(step().block_tables).tolist() == [[3, 9], [4, 5], [-1, -1]]


def test_a_table_that_is_too_short():
    text = refusal(block_tables=[[3], [4], [0]])
    assert text == WHERE + "at least 2 entries for the 71 tokens of sequence 0, got 1"


def test_an_unassigned_block():
    text = refusal(block_tables=[[3, 9], [4, -1], [0, 0]])
    assert text == (
        WHERE + "a block in [0, 32) for tokens 64 to 64 of sequence 1, got -1 at entry 1 "
        "(partial_tables=True permits -1)"
    )
    text = refusal(block_tables=[[-1, 9], [4, 5], [0, 0]])  # of cached tokens alone
    assert "tokens 0 to 63 of sequence 0, got -1 at entry 0" in text


def test_a_block_outside_the_pool():
    text = refusal(block_tables=[[3, 9], [32, 5], [0, 0]])
    assert text == WHERE + "a block in [0, 32) for tokens 0 to 63 of sequence 1, got 32 at entry 0"
    text = refusal(block_tables=[[3, 9], [999, 5], [0, 0]], partial_tables=True)
    assert "got 999 at entry 0" in text


def test_entries_that_no_token_needs_may_hold_anything():
    step(block_tables=[[3, 9, 999], [4, 5, -1], [-7, 10**6, 0]])


def test_the_smallest_cache_is_the_pool():
    caches = [cache(), cache(), cache(5), cache(5)]
    assert "expected a block in [0, 5)" in refusal(caches=caches)
    step(caches=caches, num_blocks=10)
    assert "expected a block in [0, 8)" in refusal(num_blocks=8)


def test_without_caches_the_pool_is_unknown():
    step(caches=[], block_tables=[[3, 999], [4, 5], [0, 0]])
    text = refusal(caches=[], block_tables=[[3, -2], [4, 5], [0, 0]])
    assert "expected a block id for tokens 64 to 70 of sequence 0, got -2 at entry 1" in text


def test_two_sequences_that_write_one_block():
    text = refusal(block_tables=[[3, 4], [4, 5], [0, 0]])
    assert text == (
        WHERE + "a block of its own for every entry that new tokens are written to, got block 4 at "
        "entry 1 of sequence 0 and at entry 0 of sequence 1"
    )


def test_one_sequence_that_writes_one_block_twice():
    text = refusal(block_tables=[[3, 9], [4, 4], [0, 0]])
    assert "block 4 at entry 0 of sequence 1 and at entry 1 of sequence 1" in text


def test_a_prefix_may_be_shared_and_so_may_what_another_sequence_writes():
    step(cached=[64, 64, 64], new=[1, 1, 9], block_tables=[[7, 2], [7, 3], [7, 4]])
    step(cached=[64, 0, 0], new=[1, 64, 0], block_tables=[[4, 2], [4, -1], [0, 0]])


def test_positions_beyond_the_longest_sequence():
    tables = [list(range(5)), list(range(5, 10)), [0] * 5]
    text = refusal(cached=[256, 0, 0], block_tables=tables)
    assert text == (
        "ForwardMeta.for_step: cached: expected at most 256 tokens of a sequence, the rows of "
        "rotary_embs, got 256 and 1 new ones of sequence 0"
    )
    step(cached=[255, 0, 0], block_tables=tables)
    step(cached=[256, 0, 0], block_tables=tables, rope_already_applied=True)
    assert "at most 70 tokens of a sequence, max_model_len, got 70" in refusal(max_model_len=70)


@pytest.mark.parametrize(
    "shape", [[2, 90, 32], [2, 1, 90, 1, 32], [3, 2, 90, 32], [3, 2, 1, 90, 1, 32]]
)
def test_every_shape_of_a_rotary_table(shape):
    tables = [[0, 1], [2, 3], [4, 5]]
    table = paddle.zeros(shape)
    step(cached=[89, 0, 0], block_tables=tables, rotary_embs=table)
    assert "at most 90 tokens" in refusal(cached=[90, 0, 0], block_tables=tables, rotary_embs=table)


def test_pages_of_a_latent_cache():
    for shape in ([8, 16, 656], [8, 16, 1, 656], [8, 1, 16, 656]):
        caches = [paddle.zeros(shape, "uint8")]
        given = {"caches": caches, "cached": [30], "new": [3], "rotary_embs": None}
        step(**given, block_tables=[[0, 1, 2]])
        text = refusal(**given, block_tables=[[0, 1]])
        assert "expected at least 3 entries for the 33 tokens" in text


def test_a_rank_of_a_spread_cache():
    step(block_tables=[[-1, 9], [4, -1], [-1, -1]], partial_tables=True)
    text = refusal(block_tables=[[-1, 4], [4, -1], [-1, -1]], partial_tables=True)
    assert "block 4 at entry 1 of sequence 0 and at entry 0 of sequence 1" in text
    assert "at least 2 entries" in refusal(block_tables=[[-1]] * 3, partial_tables=True)


def test_rows_of_unequal_length():
    assert refusal(block_tables=[[3, 9], [4], []]) == (
        WHERE + "rows of one length, the short ones filled with -1, got 2 entries of sequence 0 "
        "and 1 of sequence 1"
    )


def test_an_empty_step():
    backend = FlashAttentionBackend(make_config(max_model_len=256), KV, H, D)
    meta = step(cached=[], new=[], block_tables=[])
    assert meta.block_tables.shape == [0, 0] and to_numpy(meta.cu_seqlens_q).tolist() == [0]
    backend.init_attention_metadata(meta)
    qkv = paddle.zeros([0, (H + 2 * KV) * D], "bfloat16")
    layer = AttentionLayer(0, "none")
    out = backend.forward_mixed(None, None, None, qkv, None, None, layer, meta)
    assert out.shape == [0, H * D]


def test_against_a_check_of_every_token():
    """Random steps: refused if and only if a walk over the tokens finds something wrong."""
    rng, pool = np.random.default_rng(3), cache(6)
    taken = 0
    for _ in range(300):
        batch, width = rng.integers(1, 4), rng.integers(1, 4)
        cached, new = rng.integers(0, 100, batch), rng.integers(0, 70, batch)
        tables = rng.permutation(12)[: batch * width].reshape(batch, width)
        tables = np.where(rng.random((batch, width)) < 0.8, tables % 7, -1)
        wrong, written = False, {}
        for seq in range(batch):
            for position in range(cached[seq] + new[seq] if new[seq] else 0):
                entry = position // 64
                block = tables[seq, entry] if entry < width else -1
                wrong |= not 0 <= block < 6
                if position >= cached[seq]:
                    wrong |= written.setdefault(block, (seq, entry)) != (seq, entry)
        given = {"cached": cached, "new": new, "block_tables": tables, "caches": [pool]}
        if wrong:
            refusal(**given)
        else:
            step(**given)
            taken += 1
    assert 10 < taken < 290
