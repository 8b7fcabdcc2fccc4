"""Programs whose sizes are not known while they are traced.

They give what dygraph gives, and an operator that refuses its arguments at a run raises there: no
error ends the process.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec

import fastattn.functional as F
from fastattn import _ops, _tracing
from fastattn.functional._attributes import DEFAULT_SCALE
from tests.support.operators import calls, run
from tests.support.tensors import int32, to_numpy, to_paddle

PIR = hasattr(paddle, "pir") and not paddle.__version__.startswith("2.")
pytestmark = pytest.mark.skipif(not PIR, reason="Paddle 2.6 traces another kind of program")


def spec(tensor: paddle.Tensor, name: str, known: tuple[int, ...] = ()) -> InputSpec:
    """A tensor of which only the sizes of the dimensions `known` are known."""
    shape = [n if i in known else None for i, n in enumerate(tensor.shape)]
    return InputSpec(shape, tensor.dtype, name)


def program_of(function: Any, tensors: dict[str, paddle.Tensor], **known: tuple[int, ...]) -> Any:
    def of_a_dict(tensors):
        return function(**tensors)

    specs = {name: spec(x, name, known.get(name, ())) for name, x in tensors.items()}
    static = paddle.jit.to_static(of_a_dict, full_graph=True, input_spec=[specs])
    static.eval()
    return static


def saved(program: Any, path: Path) -> Any:
    paddle.jit.save(program, str(path))
    return paddle.jit.load(str(path))


def in_order(tensors: dict[str, paddle.Tensor]) -> list[paddle.Tensor]:
    """As a loaded program takes them: sorted by name."""
    return [tensors[name] for name in sorted(tensors)]


@pytest.mark.parametrize("op", sorted(calls()))
def test_no_size_is_known(op):
    """A right call is not refused for sizes that a guess stands for."""
    call = calls()[op]
    program = program_of(lambda **tensors: run(op, tensors, call.attrs), call.inputs)
    got = program(call.inputs)
    expected = run(op, calls()[op].inputs, call.attrs)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected):
        if theirs is None:  # a result that nobody asked for
            continue
        assert np.array_equal(to_numpy(ours).view(np.uint8), to_numpy(theirs).view(np.uint8))


def test_a_wrong_size_at_a_run_raises(tmp_path):
    logits = to_paddle(np.arange(20, dtype=np.float32).reshape(2, 10))
    tensors = {"logits": logits, "lengths": int32([10, 5])}
    program = program_of(lambda logits, lengths: F.topk_indices(logits, lengths, 3), tensors)
    assert program(tensors).tolist() == [[7, 8, 9], [2, 3, 4]]
    with pytest.raises(ValueError, match=r"topk_indices: lengths: expected shape \[2\], got \[1\]"):
        program({**tensors, "lengths": int32([10])})
    loaded = saved(program, tmp_path / "program")
    with pytest.raises(ValueError, match=r"topk_indices: lengths: expected shape \[2\], got \[1\]"):
        loaded(int32([10]), logits)
    assert loaded(*in_order(tensors)).tolist() == [[7, 8, 9], [2, 3, 4]]


def test_what_is_wrong_for_every_size_is_refused_while_tracing():
    """A head dimension that no size of the other dimensions makes right."""
    signature = _ops.signature("topk_indices")

    class Value:
        def __init__(self, shape, dtype):
            self.shape, self.dtype = shape, f"paddle.{dtype}"

    def check(logits, lengths):
        inputs = {"logits": Value(logits, "float32"), "lengths": Value(lengths, "int32")}
        _tracing.check(signature, tuple(inputs.get(n) for n in signature.inputs), (3,))

    check([-1, 10], [-1])
    check([-1, 10], [7])
    check([7, -1], [-1])
    with pytest.raises(ValueError, match=r"lengths: expected shape \[4\], got \[3\]"):
        check([4, -1], [3])
    with pytest.raises(ValueError, match="logits: expected 2 dimensions"):
        check([4, 10, 1], [-1])


def reference_lse(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """LSE [H, T] of 16-bit queries [T, H, D] over keys [T, KV, D], causal, with 1 / sqrt(D)."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], 1)
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
    scores[:, np.triu_indices(len(q), 1)[0], np.triu_indices(len(q), 1)[1]] = -np.inf
    return np.log(np.exp(scores).sum(-1))


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_default_scale_of_attention_without_known_channels(tmp_path, head_dim):
    q, k = normal(5, 4, head_dim, seed=1), normal(5, 2, head_dim, seed=2)
    cache = np.zeros((2, 2, 64, head_dim), np.float16)
    cache[1, :, :5] = k.swapaxes(0, 1)
    starts = {"cu_seqlens_q": int32([0, 5])}
    flash = {"q": q, "k": k, "v": k}
    paged = {"q": q, "key_cache": cache, "value_cache": cache}

    def attend(q, k, v, cu_seqlens_q):
        return F.flash_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_q, 5, 5, causal=True, return_softmax_lse=True
        )[1]

    def attend_paged(q, key_cache, value_cache, block_tables, cached, new, cu_seqlens_q):
        return F.paged_attention(
            *(q, key_cache, value_cache, block_tables, cu_seqlens_q, cached, new, 5, 5),
            return_softmax_lse=True,
        )[1]

    lengths = {"block_tables": int32([[1]]), "cached": int32([0]), "new": int32([5])}
    for function, arrays, more in ((attend, flash, {}), (attend_paged, paged, lengths)):
        tensors = {n: to_paddle(x) for n, x in arrays.items()} | more | starts
        program = program_of(function, tensors)
        loaded = saved(program, tmp_path / function.__name__)
        for lse in (program(tensors), loaded(*in_order(tensors)), function(**tensors)):
            np.testing.assert_allclose(to_numpy(lse), reference_lse(q, k), atol=2e-3)


@pytest.mark.parametrize("operator", [F.mla_attention, F.mla_sparse_attention])
def test_the_default_scale_of_latent_attention_without_known_channels(operator):
    latent = normal(5, 576, seed=3).astype(np.float32)
    q = to_paddle(normal(5, 4, 576, seed=4).astype(np.float32)).astype("bfloat16")
    cache = np.zeros((1, 64, 576), np.float32)
    cache[0, :5] = latent
    tensors = {"q": q, "cache": to_paddle(cache).astype("bfloat16")}
    if operator is F.mla_attention:
        tensors |= {
            "block_tables": int32([[0]]),
            "cu_seqlens_q": int32([0, 5]),
            "seq_lens_decoder": int32([0]),
            "seq_lens_this_time": int32([5]),
        }
        options = {"max_seqlen_q": 5, "max_seqlen_k": 5}
    else:
        tensors["indices"] = int32([[j if j <= i else -1 for j in range(5)] for i in range(5)])
        options = {}

    def attend(**given):
        return operator(**given, **options, cache_format="bf16", return_softmax_lse=True)[1]

    rounded = to_numpy(tensors["cache"]).astype(np.float64)[0, :5, None]
    expected = reference_lse(to_numpy(q).astype(np.float64), rounded)
    for lse in (program_of(attend, tensors)(tensors), attend(**tensors)):
        np.testing.assert_allclose(to_numpy(lse), expected, atol=5e-3)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_the_default_scale_is_the_inverse_square_root(head_dim):
    """The bits of a call without a scale are those of a call with it."""
    q, k = normal(7, 2, head_dim, seed=5), normal(7, 1, head_dim, seed=6)
    v = k if head_dim != 192 else np.ascontiguousarray(k[..., :128])
    given = [to_paddle(x) for x in (q, k, v)] + [int32([0, 7])] * 2
    outs = [
        F.flash_attention(*given, 7, 7, softmax_scale=scale, return_softmax_lse=True)
        for scale in (None, head_dim**-0.5)
    ]
    for ours, theirs in zip(*outs):
        assert np.array_equal(to_numpy(ours), to_numpy(theirs))
    assert np.float32(DEFAULT_SCALE) == np.finfo(np.float32).min


def test_the_comparison_sees_another_scale():
    """The one that programs once took."""
    q, k = normal(5, 4, 64, seed=1), normal(5, 2, 64, seed=2)
    starts = int32([0, 5])
    _, lse = F.flash_attention(
        *(to_paddle(x) for x in (q, k, k)),
        *(starts, starts, 5, 5),
        causal=True,
        softmax_scale=1.0,
        return_softmax_lse=True,
    )
    assert np.abs(to_numpy(lse) - reference_lse(q, k)).max() > 0.5


def test_a_page_size_that_a_program_does_not_know_is_asked_for():
    cache = paddle.zeros([2, 64, 132], "uint8")
    tensors = {
        "cache": cache,
        "block_tables": int32([[1]]),
        "cu_seqlens_k": int32([0, 3]),
        "out": paddle.zeros([3, 128], "uint8"),
        "out_scales": paddle.zeros([3, 1], "float32"),
    }
    gather = partial(F.indexer_k_gather, num_tokens=3)
    with pytest.raises(ValueError, match="page_size: the program does not know"):
        program_of(gather, tensors).concrete_program  # noqa: B018
    program_of(gather, tensors, cache=(1, 2))(tensors)
