"""Steps of a backend that does not know its lengths: on a GPU the CTAs of the attention merge their
partial results themselves, counted by ints that the step's rope_write_cache_kv sets to 0."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn.backends import AttentionLayer, FlashAttentionBackend, ForwardMeta, make_config
from fastattn.reference.rope import make_rotary_embs
from tests.attention.test_gpu_graph import capture
from tests.support.attention import BLOCK_WISE_FP8, PLAIN, CacheKind, paged_problem
from tests.support.bounds import assert_error_ratio
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, to_numpy, to_paddle

MANY = 131072  # keys that the server allows a sequence


class Step:
    """A problem as a layer's step, which writes the new tokens' keys and values itself.

    Without scales and rotation those are the ones that are in the cache already.
    """

    def __init__(self, problem, place: str) -> None:
        self.problem, self.place = problem, place
        _, heads, dim = problem.q.shape
        kv = problem.k.elements.shape[1]
        kind = problem.kind
        (_, k, v, *lengths, _, _), keywords = problem.arguments(place)
        tables, starts, cached, new = lengths
        table = make_rotary_embs(64, dim)
        table[0], table[1] = 1, 0
        scales = [keywords["cache_k_scales"], keywords["cache_v_scales"]]
        static = dict(zip(("cache_k_out_scale", "cache_v_out_scale"), scales))
        plain = kind.dynamic or kind.quant_type == "none"
        self.layer = AttentionLayer(
            layer_id=0,
            cache_quant_type_str=kind.quant_type,
            cache_fp8_format=kind.fp8_format,
            **({} if plain else static),
        )
        self.meta = ForwardMeta(
            block_tables=tables,
            cu_seqlens_q=starts,
            seq_lens_decoder=cached,
            seq_lens_this_time=new,
            caches=[k, v, *(scales if kind.dynamic else [])],
            rotary_embs=to_paddle(table, place),
            exist_prefill=False,
            step_use_cudagraph=True,
        )
        config = make_config(max_model_len=MANY, num_key_value_heads=kv)
        self.backend = FlashAttentionBackend(config, kv, heads, dim)
        self.qkv = to_paddle(self._qkv(problem), place)
        self.scales, self.options = scales, problem.cache_options()

    @staticmethod
    def _qkv(problem) -> np.ndarray:
        tokens = len(problem.q)
        fresh = np.random.default_rng(1).normal(size=(tokens, 2, *problem.k.elements.shape[1::2]))
        if problem.kind.quant_type == "none":
            for seq, (first, new) in enumerate(
                zip(problem.cu_seqlens_q, problem.seq_lens_this_time)
            ):
                for i in range(new):
                    at = problem.slot(seq, int(problem.seq_lens_decoder[seq]) + i)
                    for j, stored in enumerate((problem.k, problem.v)):
                        fresh[first + i, j] = stored.elements[at[0], :, at[1]]
        parts = (problem.q, fresh[:, 0], fresh[:, 1])
        return np.concatenate([x.astype(BF16).reshape(tokens, -1) for x in parts], 1)

    def run(self):
        self.backend.init_attention_metadata(self.meta)
        return self.backend.forward_mixed(
            None, None, None, self.qkv, None, None, self.layer, self.meta
        )

    def alone(self, max_k: int) -> np.ndarray:
        """The operator by itself over what the step wrote."""
        meta = self.meta
        out = F.paged_attention(
            to_paddle(self.problem.q.astype(BF16), self.place),
            *meta.caches[:2],
            meta.block_tables,
            meta.cu_seqlens_q,
            meta.seq_lens_decoder,
            meta.seq_lens_this_time,
            1,
            max_k,
            cache_k_scales=self.scales[0],
            cache_v_scales=self.scales[1],
            **self.options,
        )
        return to_numpy(out).reshape(out.shape[0], -1)

    def check(self, out) -> None:
        problem = self.problem
        out = to_numpy(out).reshape(problem.q.shape)
        owned = problem.owned()
        assert not out[~owned].astype(np.float32).any()
        exact, naive = (problem.reference(precision)[0] for precision in ("float64", "bfloat16"))
        assert_error_ratio(out[owned], exact[owned], naive[owned], "bfloat16", "out")


def lengths_of(batch: int, longest: int, slots: int | None = None) -> list[tuple[int, int]]:
    """Ragged sequences, one of them with `longest` keys, among those without tokens."""
    slots = batch if slots is None else slots
    seqs = [(0, 0)] * slots
    for i in range(batch):
        seqs[i * slots // batch] = ((41 * i) % 300, 1)
    seqs[batch // 2 * slots // batch] = (longest - 1, 1)
    return seqs


@pytest.mark.parametrize("longest", [100, 4500, 9000])
@pytest.mark.parametrize("slots", [0, 64])
@pytest.mark.parametrize(
    "batch, heads",
    [
        *((1, (8, 2)), (2, (32, 8)), (3, (32, 8)), (5, (32, 8)), (16, (32, 8)), (33, (32, 8))),
        *((33, (4, 1)), (17, (8, 2)), (16, (16, 1))),
    ],
)
def test_steps_match_the_reference(place, batch, heads, slots, longest):
    if place == "cpu" and (longest > 4500 or batch > 5):
        pytest.skip("nothing is joined on a CPU")
    seqs = lengths_of(batch, longest, max(batch, slots))
    step = Step(paged_problem(seqs, heads=heads, seed=batch), place)
    for _ in range(2):  # the first step of a layer goes through Python
        step.check(step.run())


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kind", [PLAIN, CacheKind("cache_fp8"), BLOCK_WISE_FP8], ids=str)
def test_fifty_runs_give_the_same_bits(place, kind, dim):
    """Whichever CTA comes last: the order of a work tile's partial results is theirs."""
    problem = paged_problem(lengths_of(16, 9000), heads=(8, 2), dim=dim, kind=kind, seed=3)
    step = Step(problem, place)
    runs = 5 if place == "cpu" else 50
    first, *others = [to_numpy(step.run()) for _ in range(runs + 1)][1:]
    for i, out in enumerate(others):
        assert_same_bits(out, first, f"run {i}")
    for bound in (1, MANY):  # the first: clusters; the second: a kernel merges
        np.testing.assert_allclose(
            first.astype(np.float32),
            step.alone(bound).astype(np.float32),
            rtol=2**-6,
            atol=2**-9,
        )


@pytest.mark.parametrize("longest", [1, 4500, 40900, 41000, 50000])
@pytest.mark.parametrize("slots", [1, 64])
def test_one_sequence_with_scales_of_tokens(place, slots, longest):
    """Up to 40k keys clusters take it; the 32 splits of a longer one are joined in two groups."""
    if place == "cpu" and longest > 4500:
        pytest.skip("nothing is joined on a CPU")
    problem = paged_problem(
        lengths_of(1, longest, slots), heads=(32, 8), kind=BLOCK_WISE_FP8, seed=longest
    )
    step = Step(problem, place)
    _, first, again = (to_numpy(step.run()) for _ in range(3))  # _: a layer's first is in Python
    assert_same_bits(again, first, "another run")
    for bound in (1, MANY):  # the first: clusters; the second: a kernel merges
        np.testing.assert_allclose(
            first.astype(np.float32),
            step.alone(bound).astype(np.float32),
            rtol=2**-6,
            atol=2**-9,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 1), (8, 2), (32, 8)], ids=str)
@pytest.mark.parametrize("batch", [2, 16, 33])
def test_lengths_change_between_replays(batch, heads):
    """From clusters to shares that join, and back: counters are 0 at every replay."""
    step = Step(paged_problem(lengths_of(batch, 9000, 64), heads=heads, seed=batch), "gpu")
    step.run()
    full = step.problem.seq_lens_decoder
    held = step.meta.seq_lens_decoder
    with capture() as graph:
        outs = [step.run() for _ in range(3)]
    for most in (9000, 50, 5000, 9000, 300, 7777):
        cached = np.minimum(full, most).astype(np.int32)
        held.copy_(to_paddle(cached, "gpu"), True)
        graph.replay()
        paddle.device.cuda.synchronize()
        want = step.alone(1).astype(np.float32)
        for out in outs:
            got = to_numpy(out)
            assert_same_bits(got, to_numpy(outs[0]), f"{most} keys")
            np.testing.assert_allclose(got.astype(np.float32), want, rtol=2**-6, atol=2**-8)
    graph.reset()


@pytest.mark.gpu
def test_steps_in_turn_do_not_share_a_graphs_buffer():
    """A thread keeps its buffer for its next step, of whatever size; a graph has its own."""
    small, large = (
        Step(paged_problem(lengths_of(batch, longest), heads=(8, 2), seed=batch), "gpu")
        for batch, longest in ((2, 300), (33, 9000))
    )
    small.check(small.run())
    large.check(large.run())
    with capture() as graph:
        captured = small.run()
    for _ in range(3):
        small.check(small.run())
        graph.replay()
        large.check(large.run())
        large.check(large.run())
        paddle.device.cuda.synchronize()
        small.check(captured)
    graph.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("cached", [-(2**31), -1, 2**31 - 1, 2**30, 10**6])
def test_garbage_lengths_end(cached):
    """No step hangs, and the next one is right."""
    problem = paged_problem(lengths_of(16, 4500), heads=(8, 2), seed=1)
    step = Step(problem, "gpu")
    step.run()
    good = problem.seq_lens_decoder.astype(np.int32)
    bad = good.copy()
    bad[::5] = cached
    step.meta.seq_lens_decoder.copy_(to_paddle(bad, "gpu"), True)
    step.run()
    paddle.device.cuda.synchronize()
    step.meta.seq_lens_decoder.copy_(to_paddle(good, "gpu"), True)
    got = to_numpy(step.run()).astype(np.float32)
    np.testing.assert_allclose(got, step.alone(1).astype(np.float32), rtol=2**-6, atol=2**-8)
