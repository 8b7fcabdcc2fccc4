"""``forward_meta.attn_mask``: trees of drafts in a backend's steps, in FastDeploy's sense.

True hides a token from another one. The first new token, the root, is never hidden, and tokens of a
prompt see all that is before them, whatever the mask has for their sequence.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastattn.backends import AppendAttentionBackend, FlashAttentionBackend, step_masks
from fastattn.reference.attention import attention_mask, dense_attention
from tests.support.bounds import assert_error_ratio
from tests.support.holes import random_tree
from tests.support.serving import Model, Server
from tests.support.tensors import ONLY_COPIES_ON_GPU, int32, to_numpy, to_paddle

SIZE = 8


def hidden_of(rng, new: list[int]) -> np.ndarray:
    """FastDeploy's mask [B, SIZE, SIZE] of random trees; its first column is nonsense."""
    hidden = rng.random((len(new), SIZE, SIZE)) < 0.5
    for mask, count in zip(hidden, new):
        if 0 < count <= SIZE:
            mask[:count, :count] = ~random_tree(rng, count)
    hidden[:, :, 0] = rng.random((len(new), SIZE)) < 0.5
    return hidden


def check(server: Server, new: list[int], hidden: np.ndarray, outs: dict, prompts=()) -> None:
    model, start = server.model, 0
    dtype = "float16" if model.dtype == np.float16 else "bfloat16"
    for seq, n in enumerate(new):
        if n == 0:
            continue
        done = server.cached[seq]
        seen = np.tril(np.ones((n, n), bool))
        if n <= SIZE and seq not in prompts:
            seen &= ~hidden[seq, :n, :n]
            seen[:, :1] = True
        visible = attention_mask(n, done + n, causal=True, tree_mask=seen)
        for layer, out in outs.items():
            q, k, v = model.project(server.tokens[seq][layer, : done + n])
            exact, naive = (
                dense_attention(
                    q[done:], k, v, visible, softmax_scale=model.head_dim**-0.5, precision=precision
                )[0].reshape(n, -1)
                for precision in ("float64", dtype)
            )
            what = f"layer {layer}, sequence {seq}"
            assert_error_ratio(out[start : start + n], exact, naive, dtype, what)
        start += n


@pytest.fixture(autouse=True)
def may_compute(place):
    if place == "gpu" and ONLY_COPIES_ON_GPU:
        pytest.skip("a backend inverts the mask by Paddle's own kernels, which may not run there")


@pytest.mark.parametrize("backend", [FlashAttentionBackend, AppendAttentionBackend])
@pytest.mark.parametrize(
    "quant", ["none", "cache_int8", "block_wise_fp8", "block_wise_int4", "block_wise_k8v4"]
)
def test_steps_with_trees(place, quant, backend):
    rng = np.random.default_rng(3)
    server = Server(backend, Model(cache_quant_type=quant, num_layers=2), [100, 70, 90, 40], place)
    server.step([60, 33, 1, 5])
    for new in ([7, 5, 8, 1], [3, 8, 60, 2], [8, 0, 4, 8]):
        hidden = hidden_of(rng, new)
        outs = server.run(new, attn_mask=server.on(hidden))
        check(server, new, hidden, outs)
        server.step(new)  # the drafts are taken as they are: without a tree, the same cache


def test_a_prompt_beside_trees(place):
    """FastDeploy's mask has rows for it, which mean nothing."""
    rng = np.random.default_rng(4)
    server = Server(FlashAttentionBackend, Model(), [30, 6], place)
    server.step([20, 0])
    new = [6, 6]
    hidden = hidden_of(rng, new)
    meta = server.make_meta(new, attn_mask=server.on(hidden))
    assert to_numpy(meta.seq_lens_encoder).reshape(-1).tolist() == [0, 6]
    server.backend.init_attention_metadata(meta)
    qkv = server.on(server.inputs(0, new))
    out = server.backend.attend(qkv, server.layers[0], meta)
    check(server, new, hidden, {0: to_numpy(out)}, prompts=[1])


def test_a_step_makes_its_trees_once():
    made = []
    original = step_masks.visible_drafts

    def watched(*arguments):
        made.append(1)
        return original(*arguments)

    step_masks.visible_drafts = watched
    try:
        server = Server(FlashAttentionBackend, Model(num_layers=4), [40])
        server.step([30])
        hidden = server.on(hidden_of(np.random.default_rng(5), [6]))
        meta = server.make_meta([6], attn_mask=hidden)
        server.backend.init_attention_metadata(meta)

        def forward(layer):
            qkv = server.on(server.inputs(layer, [6]))
            return server.backend.attend(qkv, server.layers[layer], meta)

        outs = [forward(layer) for layer in range(4)]
        assert len(made) == 1
        again = forward(0)  # a CUDA graph is captured: it must contain the trees
        assert len(made) == 2
        np.testing.assert_array_equal(to_numpy(again), to_numpy(outs[0]))
        paddle.assign(paddle.zeros_like(hidden), hidden)  # a later replay's mask, in place
        forward(1)
        assert len(made) == 3
    finally:
        step_masks.visible_drafts = original


def test_masks_of_integers():
    mask = to_paddle(np.array([[[1, 1, 0], [0, 0, 5], [2, 0, 0]]], np.int32))
    seen = step_masks.visible_drafts(mask, None).numpy()
    np.testing.assert_array_equal(seen[0], [[1, 0, 1], [1, 1, 0], [1, 1, 1]])
    prompts = step_masks.visible_drafts(mask, int32([[3]])).numpy()
    assert prompts.all()


@pytest.mark.parametrize(
    ("model", "fields", "text"),
    [
        ({}, {"attn_mask_offsets": int32(np.zeros((5, 2)))}, "attn_mask beside attn_mask_offsets"),
        ({}, {"tbo_microbatch_id": 1}, "attn_mask beside tbo_microbatch_id"),
        ({"window": 9}, {}, "attn_mask is not supported for a layer with a window"),
    ],
)
def test_what_does_not_go_with_trees(model, fields, text):
    server = Server(FlashAttentionBackend, Model(**model), [20])
    server.step([10])
    mask = to_paddle(np.zeros((1, SIZE, SIZE), bool))
    with pytest.raises(NotImplementedError, match=rf"forward_meta\.{text}"):
        server.run([5], attn_mask=mask, **fields)


def test_refused_in_deterministic_mode():
    server = Server(FlashAttentionBackend, Model(), [20])
    server.step([10])
    server.backend.batch_invariant = True
    with pytest.raises(NotImplementedError, match=r"forward_meta\.attn_mask .*batch_invariant"):
        server.run([5], attn_mask=to_paddle(np.zeros((1, SIZE, SIZE), bool)))


@pytest.mark.parametrize("shape", [[1, 8], [1, 8, 7], [8]])
def test_wrong_masks(shape):
    server = Server(FlashAttentionBackend, Model(), [20])
    with pytest.raises(ValueError, match=r"attn_mask: expected shape \[S, N, N\]"):
        server.run([5], attn_mask=to_paddle(np.zeros(shape, bool)))
