"""Operators in a CUDA graph: captured once, replayed after their inputs changed in place."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.numerics import from_codes
from tests.support.attention import BLOCK_WISE_FP8, CacheKind, paged_problem
from tests.support.compare import assert_same_bits
from tests.support.graph import capture
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

pytestmark = pytest.mark.gpu

KV, DIM, BLOCKS = 2, 128, 9


class Inputs:
    """Tensors of one step that keep their addresses while their contents change."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        # Sequences of every kind: prefill in the middle of a block, decode, and one that rests.
        self.cached = rng.integers(1, 70, 4)
        self.new = np.array([70, 1, 0, 5])[rng.permutation(4)]
        self.tables = rng.permutation(BLOCKS)[:8].reshape(4, 2)
        self.cu = np.concatenate([[0], np.cumsum(self.new)])
        self.qkv = rng.normal(size=(76, (4 + 2 * KV) * DIM)).astype(BF16)
        self.key = rng.integers(0, 127, (BLOCKS, KV, 64, DIM), np.uint8)
        self.value = rng.integers(0, 127, (BLOCKS, KV, DIM, 64), np.uint8)
        self.k_scales = rng.uniform(0.5, 2, (BLOCKS, KV, 64)).astype(np.float32)
        self.v_scales = rng.uniform(0.5, 2, (BLOCKS, KV, 64)).astype(np.float32)
        self.k_start = np.concatenate([[0], np.cumsum(self.cached)])
        self.out = np.full((2, 280, KV, DIM), 3, BF16)

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            name: np.asarray(value, np.int32) if value.dtype == np.int64 else value
            for name, value in vars(self).items()
        }


def _write(t: dict, **options) -> paddle.Tensor:
    q, _ = F.rope_write_cache_kv(
        t["qkv"],
        t["key"],
        t["value"],
        None,
        t["tables"],
        t["cu"],
        t["cached"],
        t["new"],
        num_heads=4,
        num_kv_heads=KV,
        cache_k_scales=t["k_scales"],
        cache_v_scales=t["v_scales"],
        cache_quant_type="block_wise_fp8",
        **options,
    )
    return q


def _append(t: dict) -> None:
    F.append_cache_kv_c8(
        t["key"],
        t["value"],
        t["out_k"],
        t["out_v"],
        t["tables"],
        t["cached"],
        t["k_start"],
        cache_k_scales=t["k_scales"],
        cache_v_scales=t["v_scales"],
        dynamic_quant=True,
        cache_quant_type="block_wise_fp8",
    )


def test_lengths_and_contents_may_change_between_replays():
    def tensors(inputs: Inputs) -> dict:
        arrays = inputs.arrays()
        arrays["out_k"], arrays["out_v"] = arrays.pop("out")
        return {name: to_paddle(array, "gpu") for name, array in arrays.items()}

    def expected(inputs: Inputs) -> dict[str, np.ndarray]:
        """The same two operators, each called by itself on fresh tensors."""
        fresh = tensors(inputs)
        q = _write(fresh)
        _append(fresh)
        names = ("key", "value", "k_scales", "v_scales", "out_k", "out_v")
        return {"q": to_numpy(q), **{name: to_numpy(fresh[name]) for name in names}}

    held = tensors(Inputs(0))
    _write(held)
    _append(held)
    with capture() as graph:
        q = _write(held)
        _append(held)
    for seed in range(1, 5):
        inputs = Inputs(seed)
        for name, tensor in tensors(inputs).items():
            held[name].copy_(tensor, True)
        graph.replay()
        want = expected(inputs)
        assert_same_bits(to_numpy(q), want.pop("q"), f"replay {seed}: q")
        for name, array in want.items():
            assert_same_bits(to_numpy(held[name]), array, f"replay {seed}: {name}")
    graph.reset()


def _attend(q, t: dict, **options) -> tuple:
    scales = {"cache_k_scales": t["k_scales"], "cache_v_scales": t["v_scales"]}
    return F.paged_attention(
        q,
        t["key"],
        t["value"],
        t["tables"],
        t["cu"],
        t["cached"],
        t["new"],
        70,
        140,
        cache_quant_type="block_wise_fp8",
        return_softmax_lse=True,
        **scales,
        **options,
    )


@pytest.mark.parametrize("quantize_q", [False, True])
def test_attention_follows_lengths_that_change_between_replays(quantize_q):
    """One graph of the write and the attention; sequences decode, prefill and rest in turn."""

    def tensors(inputs: Inputs) -> dict:
        arrays = {name: x for name, x in inputs.arrays().items() if name != "out"}
        return {name: to_paddle(array, "gpu") for name, array in arrays.items()}

    held = tensors(Inputs(0))
    _attend(_write(held), held, quantize_q=quantize_q)
    with capture() as graph:
        out, lse = _attend(_write(held), held, quantize_q=quantize_q)
    for seed in range(1, 6):
        inputs = Inputs(seed)
        for name, tensor in tensors(inputs).items():
            held[name].copy_(tensor, True)
        graph.replay()
        fresh = tensors(inputs)
        want, want_lse = _attend(_write(fresh), fresh, quantize_q=quantize_q)
        assert np.isfinite(to_numpy(lse)).all()
        assert_same_bits(to_numpy(out), to_numpy(want), f"replay {seed}: out")
        assert_same_bits(to_numpy(lse), to_numpy(want_lse), f"replay {seed}: lse")
    del out, lse
    graph.reset()


@pytest.mark.parametrize("sinks", [False, True])
def test_transformed_keys(sinks):
    """Queries that are rotated ahead of the attention, LSE and sinks that are put right behind."""
    center = np.random.default_rng(1).normal(size=(KV, DIM)).astype(np.float32)
    keys = {"k_rotation": "hadamard", "k_center": to_paddle(center, "gpu")}
    options = dict(keys)
    if sinks:
        options["sinks"] = to_paddle(np.array([1.0, 0.0, -2.0, 3.0], np.float32), "gpu")

    def tensors(inputs: Inputs) -> dict:
        arrays = {name: x for name, x in inputs.arrays().items() if name != "out"}
        return {name: to_paddle(array, "gpu") for name, array in arrays.items()}

    held = tensors(Inputs(0))
    _attend(_write(held, **keys), held, **options)
    with capture() as graph:
        out, lse = _attend(_write(held, **keys), held, **options)
    for seed in range(1, 4):
        inputs = Inputs(seed)
        for name, tensor in tensors(inputs).items():
            held[name].copy_(tensor, True)
        graph.replay()
        fresh = tensors(inputs)
        want, want_lse = _attend(_write(fresh, **keys), fresh, **options)
        assert np.isfinite(to_numpy(lse)).all()
        assert_same_bits(to_numpy(out), to_numpy(want), f"replay {seed}: out")
        assert_same_bits(to_numpy(lse), to_numpy(want_lse), f"replay {seed}: lse")
    del out, lse
    graph.reset()


class HeldStep:
    """A problem's step on the GPU, whose tensors may take another step's values."""

    LONGEST = (130, 3072)  # bounds of new tokens and of keys

    def __init__(self, problem) -> None:
        self.problem = problem
        positional, self.options = problem.arguments("gpu")
        self.inputs = positional[:7]

    def attend(self) -> tuple:
        longest, options = self.LONGEST, self.options
        return F.paged_attention(*self.inputs, *longest, return_softmax_lse=True, **options)

    def become(self, other: HeldStep) -> None:
        """Take another step's values in place."""
        for mine, its in zip(self.inputs, other.inputs):
            mine.copy_(its, True)
        for name, value in other.options.items():
            if isinstance(value, paddle.Tensor):
                self.options[name].copy_(value, True)

    def check_replays(self, steps, times: int = 1, check=lambda *_: None) -> None:
        """Capture the attention, then replay it with the values of each of `steps`.

        `check` gets the step, and what the last replay gave.
        """
        self.attend()
        with capture() as graph:
            out, lse = self.attend()
        for number, step in enumerate(steps, 1):
            step.problem.check("gpu", f"step {number}")
            self.become(step)
            for again in range(times):
                graph.replay()
                want, want_lse = step.attend()
                assert_same_bits(to_numpy(out), to_numpy(want), f"replay {number}.{again}: out")
                assert_same_bits(to_numpy(lse), to_numpy(want_lse), f"replay {number}.{again}: lse")
            check(step, to_numpy(out), to_numpy(lse))
        del out, lse
        graph.reset()


def check_that_the_next_waits(q, attend) -> None:
    """Two calls in a graph: the second one's first kernel quantises what the first call gives."""
    first, zeros = (to_paddle(np.zeros(q.shape, BF16), "gpu") for _ in range(2))

    def both():
        attend(q, out=first)
        return attend(first, quantize_q=True)

    both()
    paddle.device.cuda.synchronize()
    want = to_numpy(attend(first, quantize_q=True))
    with capture() as graph:
        out = both()
    for i in range(5):
        first.copy_(zeros, True)
        graph.replay()
        assert_same_bits(to_numpy(out), want, f"replay {i}")
    del out
    graph.reset()


class MixedStep(HeldStep):
    """A step whose sequences rest, decode, speculate and prefill in turn."""

    NEW = (0, 1, 1, 4, 63, 64, 130, 17, 2)
    KEYS = (3072, 896, 192, 192, 512, 320, 192, 2048, 256)

    def __init__(self, seed: int, kind: CacheKind, q_type: str) -> None:
        rng = np.random.default_rng(seed)
        new = rng.permutation(self.NEW)
        # As many blocks in every step.
        keys = rng.permutation(self.KEYS) - rng.integers(0, 63, len(new))
        seqs = list(zip(keys - new, new))
        super().__init__(
            paged_problem(seqs, kind=kind, q_type=q_type, dim=DIM, seed=seed, padding=3)
        )


@pytest.mark.parametrize(
    "kind, q_type",
    [
        *((CacheKind(), "bfloat16"), (CacheKind("block_wise_int8"), "bfloat16")),
        *((CacheKind("cache_fp8", "head"), "e4m3:tensor"), (BLOCK_WISE_FP8, "e4m3:token_head")),
    ],
    ids=str,
)
def test_seqs_move_between_launches_between_replays(kind, q_type):
    """Decoding, speculative and long sequences are launches of their own, found on the device."""
    steps = (MixedStep(seed, kind, q_type) for seed in range(1, 5))
    MixedStep(0, kind, q_type).check_replays(steps)


@pytest.mark.parametrize("kind", [CacheKind("cache_fp8", "head"), BLOCK_WISE_FP8], ids=str)
@pytest.mark.parametrize("seqs", [[(300, 1), (40, 1800), (77, 4)], [(3, 1800), (4000, 9)]], ids=str)
def test_what_follows_waits_for_every_launch(kind, seqs):
    """The launches of short sequences end long before that of the long one, which starts first."""
    problem = paged_problem(seqs, kind=kind, dim=DIM, seed=2)
    (q, *others), options = problem.arguments("gpu")
    check_that_the_next_waits(q, lambda q, **o: F.paged_attention(q, *others, **options, **o))


class UniformStep(HeldStep):
    """A step whose tensors are those of four sequences of 70 new tokens, whatever it holds."""

    LONGEST = (70, 512)
    KEYS = (512, 320, 192, 256)

    def __init__(self, new, kind: CacheKind, q_type: str, seed: int) -> None:
        seqs = [(keys - n, n) for keys, n in zip(self.KEYS, new)]
        super().__init__(
            paged_problem(
                seqs, kind=kind, q_type=q_type, dim=DIM, seed=seed, padding=280 - sum(new)
            )
        )


@pytest.mark.parametrize(
    "kind, q_type",
    [
        *((CacheKind(), "bfloat16"), (BLOCK_WISE_FP8, "bfloat16")),
        *((CacheKind("cache_fp8", "head"), "e4m3:tensor"), (BLOCK_WISE_FP8, "e4m3:token_head")),
    ],
    ids=str,
)
def test_long_sequences_alone_become_short_ones(kind, q_type):
    """The launch of whole tiles takes any length, and padding is cleared beside it."""
    orders = [(70, 70, 70, 70), (1, 70, 0, 5), (0, 0, 1, 0), (69, 33, 64, 2)]
    steps = (UniformStep(new, kind, q_type, seed) for seed, new in enumerate(orders, 1))

    def check_padding(step, out, lse):
        tokens = int(step.problem.cu_seqlens_q[-1])
        assert (out[tokens:].astype(np.float32) == 0).all()
        assert np.isneginf(lse[:, tokens:]).all()

    UniformStep((70, 70, 70, 70), kind, q_type, 0).check_replays(steps, check=check_padding)


class DecodeStep(HeldStep):
    """A step of up to 60 decoding sequences, of which the host knows the number of slots only."""

    LONGEST = (1, 1 << 20)
    SLOTS, BLOCKS, WIDTH = 60, 240, 64

    def __init__(
        self, longest: int, working: int, kind: CacheKind, seed: int, tokens: int = 61
    ) -> None:
        rng = np.random.default_rng(seed)
        blocks = np.full(self.SLOTS, 1)
        blocks[7] = longest
        while blocks.sum() < self.BLOCKS:  # as many blocks in every step
            seq = rng.integers(self.SLOTS)
            blocks[seq] += blocks[seq] < 16
        new = np.zeros(self.SLOTS, int)
        new[rng.permutation(self.SLOTS)[: min(working, tokens) - 1]] = 1
        new[7] = 1
        keys = 64 * blocks - rng.integers(0, 63, self.SLOTS)
        problem = paged_problem(
            list(zip(keys - new, new)),
            kind=kind,
            dim=DIM,
            seed=seed,
            padding=tokens - new.sum(),
        )
        tables = problem.block_tables
        problem.block_tables = np.pad(
            tables, ((0, 0), (0, self.WIDTH - tables.shape[1])), constant_values=-1
        )
        super().__init__(problem)


@pytest.mark.parametrize("kind", [CacheKind(), BLOCK_WISE_FP8], ids=str)
@pytest.mark.parametrize("tokens", [61, 20, 3])
def test_the_device_chooses_anew_in_every_replay(kind, tokens):
    """Few keys: clusters; many: equal shares and a second kernel, which otherwise does nothing."""
    days = [(50, 60), (4, 9), (4, 60), (60, 1), (17, 60)]
    steps = (DecodeStep(*sizes, kind, seed, tokens) for seed, sizes in enumerate(days, 1))
    DecodeStep(4, 60, kind, 0, tokens).check_replays(steps, times=2)


@pytest.mark.parametrize("longest", [4, 60])
def test_what_follows_a_choice_waits_for_it(longest):
    """In either mode the next call begins when the attention has ended, not the second kernel."""
    step = DecodeStep(longest, 60, BLOCK_WISE_FP8, 3)
    q, *others = *step.inputs, *step.LONGEST
    check_that_the_next_waits(q, lambda q, **o: F.paged_attention(q, *others, **step.options, **o))


class SharedPrefix:
    """A step of sequences that share their first 128 tokens, and its plan, on the GPU."""

    TOKENS, BLOCKS = 128, 14

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        new = np.array([30, 1, 0, 5])[rng.permutation(4)]
        cached = self.TOKENS + rng.integers(0, 100, 4)
        blocks = rng.permutation(self.BLOCKS)
        tables = np.concatenate([np.tile(blocks[:2], (4, 1)), blocks[2:].reshape(4, 3)], axis=1)
        self.plan = F.plan_cascade(tables, cached, new, self.TOKENS, place=paddle.CUDAPlace(0))
        codes = rng.integers(0, 127, (2, self.BLOCKS, KV, 64 * DIM), np.uint8)
        scales = rng.uniform(0.005, 0.02, (2, self.BLOCKS, KV, 64)).astype(np.float32)
        arrays = {
            "q": rng.normal(size=(40, 4, DIM)).astype(BF16),  # the last 4 are padding
            "key": codes[0].reshape(self.BLOCKS, KV, 64, DIM),
            "value": codes[1].reshape(self.BLOCKS, KV, DIM, 64),
            "cu": np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
            "new": new.astype(np.int32),
            "cache_k_scales": scales[0],
            "cache_v_scales": scales[1],
            "out_scale": rng.uniform(0.01, 0.03, 1).astype(np.float32),
        }
        self.tensors = {name: to_paddle(array, "gpu") for name, array in arrays.items()}

    def attend(self, fp8: bool) -> tuple:
        t = self.tensors
        scales = {name: t[name] for name in ("cache_k_scales", "cache_v_scales")}
        return F.cascade_attention(
            t["q"],
            t["key"],
            t["value"],
            self.plan,
            t["cu"],
            t["new"],
            30,
            320,
            cache_quant_type="block_wise_fp8",
            out_scale=t["out_scale"] if fp8 else None,
            return_softmax_lse=True,
            **scales,
        )

    def become(self, other: SharedPrefix) -> None:
        """Take another step's values in place."""
        for name, tensor in other.tensors.items():
            self.tensors[name].copy_(tensor, True)
        for mine, its in zip(self.plan[1:], other.plan[1:]):
            mine.copy_(its, True)


@pytest.mark.parametrize("fp8", [False, True])
def test_cascade_follows_plans_that_change_between_replays(fp8):
    """One graph of both sides and the merge; prefixes, lengths and contents change in place."""
    held = SharedPrefix(0)
    held.attend(fp8)
    with capture() as graph:
        out, lse = held.attend(fp8)
    for seed in range(1, 5):
        step = SharedPrefix(seed)
        held.become(step)
        graph.replay()
        want, want_lse = step.attend(fp8)
        assert np.isfinite(to_numpy(lse)[:, :36]).all()
        assert np.isneginf(to_numpy(lse)[:, 36:]).all()
        assert_same_bits(to_numpy(out), to_numpy(want), f"replay {seed}: out")
        assert_same_bits(to_numpy(lse), to_numpy(want_lse), f"replay {seed}: lse")
    del out, lse
    graph.reset()


def test_quantise_and_convert_in_a_graph():
    rng = np.random.default_rng(0)
    x = to_paddle(rng.normal(size=(33, 256)).astype(BF16), "gpu")
    cache = to_paddle(rng.integers(0, 256, (3, KV, DIM, 64)).astype(np.uint8), "gpu")
    arguments = {"kind": "v", "cache_quant_type": "cache_int8", "src": "fastattn"}
    for granularity in ("tensor", "token", "group"):
        F.quantize_fp8(x, granularity=granularity)
        F.convert_cache_layout(cache, dst="logical", **arguments)
        with capture() as graph:
            codes, scales = F.quantize_fp8(x, granularity=granularity)
            logical = F.convert_cache_layout(cache, dst="logical", **arguments)
        new = (rng.normal(size=(33, 256)) * 7).astype(BF16)
        bytes_ = rng.integers(0, 256, (3, KV, DIM, 64)).astype(np.uint8)
        x.copy_(to_paddle(new, "gpu"), True)
        cache.copy_(to_paddle(bytes_, "gpu"), True)
        graph.replay()
        want_codes, want_scales = reference.quantize_fp8(new, granularity=granularity)
        assert_same_bits(to_numpy(codes), want_codes, granularity)
        assert_same_bits(to_numpy(scales), want_scales, granularity)
        want = reference.convert_cache_layout(bytes_, dst="logical", **arguments)
        assert_same_bits(to_numpy(logical), want)
        del codes, scales, logical  # memory of a graph must not be freed while another is captured
        graph.reset()


def test_a_cache_of_more_than_2_to_the_31_bytes():
    """Offsets are 64 bits wide: blocks at both ends of a 2.5 GiB cache, written and read back."""
    kv, dim = 8, 128
    blocks = (5 << 29) // (kv * 64 * dim)
    assert blocks * kv * 64 * dim > 1 << 31
    rng = np.random.default_rng(0)
    # Nothing fills these: only the blocks used below are ever written.
    paddle.set_device("gpu")
    key = paddle.empty([blocks, kv, 64, dim], "uint8")
    value = paddle.empty([blocks, kv, dim, 64], "uint8")
    k_scales, v_scales = (paddle.empty([blocks, kv, 64], "float32") for _ in range(2))
    paddle.set_device("cpu")
    tables = np.array([[0, blocks - 1], [blocks - 2, 1]])
    new = rng.normal(size=(2, 200, kv, dim)).astype(BF16)
    lengths = int32([100, 100], "gpu")
    cu = int32([0, 100, 200], "gpu")
    keywords = {
        "cache_k_scales": k_scales,
        "cache_v_scales": v_scales,
        "cache_quant_type": "block_wise_fp8",
    }
    F.write_cache_kv(
        *(to_paddle(x, "gpu") for x in new),
        key,
        value,
        int32(tables, "gpu"),
        cu,
        int32([0, 0], "gpu"),
        lengths,
        **keywords,
    )
    out = [to_paddle(np.zeros((200, kv, dim), BF16), "gpu") for _ in range(2)]
    F.append_cache_kv_c8(
        key, value, *out, int32(tables, "gpu"), lengths, cu, dynamic_quant=True, **keywords
    )
    for got, x in zip(out, new):
        codes, scales = reference.quantize_fp8(x, granularity="token")
        # One token and head a scale; the cache's floor only matters for tokens near 0.
        want = from_codes(codes, "e4m3") * scales
        assert_same_bits(to_numpy(got), want.astype(BF16))
