"""Masks that come as offsets, of layers with and without windows: made once a step."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastattn.backends import FlashMaskAttentionBackend, step_masks
from tests.support.serving import Model, Server, taken  # noqa: F401
from tests.support.tensors import ONLY_COPIES_ON_GPU, to_numpy, to_paddle

#: Windows of the layers; 0: none.
WINDOWS = (0, 20, 7, 20, 0, 7, 20)


def without_arithmetic(tensor: paddle.Tensor) -> bool:
    """Whether Paddle has no code for where it lies."""
    return ONLY_COPIES_ON_GPU and tensor.place.is_gpu_place()


def last_keys_of_numpy(mask: paddle.Tensor, window: int) -> paddle.Tensor:
    """What ``step_masks.last_keys`` gives, by the host."""
    start, end = to_numpy(mask).T
    return to_paddle(np.stack([np.maximum(start, end - window), end], 1), "gpu")


def write(tensor: paddle.Tensor, values: paddle.Tensor) -> None:
    """In place, and counted by Paddle as a write."""
    if without_arithmetic(tensor):
        tensor.copy_(values, True)
        tensor._bump_inplace_version()
    else:
        tensor[:] = values


@pytest.fixture
def made(monkeypatch):
    """Windows of the masks that were made, in their order."""
    windows = []
    make = step_masks.last_keys

    def watched(mask, window):
        windows.append(window)
        return (last_keys_of_numpy if without_arithmetic(mask) else make)(mask, window)

    monkeypatch.setattr(step_masks, "last_keys", watched)
    return windows


def make_server(place: str, lengths: list[int]) -> Server:
    model = Model("block_wise_fp8", num_layers=len(WINDOWS))
    server = Server(FlashMaskAttentionBackend, model, lengths, place)
    for layer, window in zip(server.layers, WINDOWS):
        layer.sliding_window = window
    return server


def some_offsets(server: Server, new: list[int], seed: int = 0) -> np.ndarray:
    """Intervals of keys that are there; one of them empty."""
    rng = np.random.default_rng(seed)
    keys = np.repeat([done + n for done, n in zip(server.cached, new)], new)
    start = rng.integers(0, keys)
    offsets = np.stack([start, rng.integers(start, keys) + 1], 1).astype(np.int32)
    offsets[3, 0] = offsets[3, 1]
    return offsets


def check(server: Server, layer: int, new: list[int], offsets: np.ndarray, out: np.ndarray) -> None:
    """Hold a layer's output to attention over the last keys of each interval, in fp64."""
    begin, window = 0, WINDOWS[layer]
    seen = offsets.astype(np.int64)
    if window:
        seen = np.stack([np.maximum(seen[:, 0], seen[:, 1] - window), seen[:, 1]], 1)
    for seq, n in enumerate(new):
        done, end = server.cached[seq], begin + n
        exact = server.model.attention(
            server.tokens[seq][layer, : done + n],
            done,
            "float64",
            causal=False,
            window_size=(-1, -1),
            mask_offsets=seen[begin:end].astype(np.int32),
        )
        error = np.abs(out[begin:end].astype(np.float64) - exact)
        assert (error <= 0.02 * np.abs(exact).max()).all(), (layer, seq)
        begin = end
    assert not out[3].any()


def forward(server: Server, layer: int, new: list[int], meta) -> np.ndarray:
    qkv = server.on(server.inputs(layer, new))
    out = server.backend.forward(None, None, None, qkv, None, None, server.layers[layer], meta)
    return to_numpy(out)


@pytest.mark.parametrize("flat", [False, True])
def test_each_window_has_one_mask_a_step(place, made, flat):
    server = make_server(place, [90, 60])
    for new in ([40, 30], [9, 1], [5, 20]):
        offsets = some_offsets(server, new, seed=new[0])
        given = server.on(offsets.reshape(-1) if flat else offsets)
        outs = server.run(new, attn_mask_offsets=given)
        for layer, out in outs.items():
            check(server, layer, new, offsets, out)
        server.cached = [done + n for done, n in zip(server.cached, new)]
        assert made == [20, 7]
        made.clear()


def test_windows_beside_offsets_take_one_call(place, made, taken):  # noqa: F811
    server = make_server(place, [90, 60])
    for new in ([40, 30], [9, 1]):
        offsets = some_offsets(server, new)
        outs = server.run(new, attn_mask_offsets=server.on(offsets))
        for layer, out in outs.items():
            check(server, layer, new, offsets, out)
        server.cached = [done + n for done, n in zip(server.cached, new)]
    assert len(taken) == len(WINDOWS)  # the first step is checked
    assert all(step is not None for step in taken)


def test_a_step_without_tokens_has_nothing_to_cut(made):
    """A rank of data parallelism that has no sequences runs its layers all the same."""
    server, nothing = make_server("cpu", [40, 30]), np.zeros([0, 2], np.int32)
    offsets = some_offsets(server, [40, 30])
    server.run([40, 30], attn_mask_offsets=server.on(offsets))
    made.clear()
    meta = server.make_meta([40, 30], attn_mask_offsets=server.on(nothing))
    server.backend.init_attention_metadata(meta)
    for layer in range(len(WINDOWS)):
        qkv = server.on(server.inputs(layer, [40, 30])[:0])
        out = server.backend.forward(None, None, None, qkv, None, None, server.layers[layer], meta)
        assert out.shape[0] == 0
    assert made == []


def test_a_step_that_begins_again_makes_its_masks_anew(place, made):
    """As in the capture of a CUDA graph, behind a run of the same step."""
    server, new = make_server(place, [40, 30]), [40, 30]
    offsets = some_offsets(server, new)
    meta = server.make_meta(new, attn_mask_offsets=server.on(offsets))
    server.backend.init_attention_metadata(meta)
    for _ in range(3):
        for layer in range(len(WINDOWS)):
            check(server, layer, new, offsets, forward(server, layer, new, meta))
    assert made == [20, 7] * 3


def test_a_write_to_the_offsets_counts_at_once(place, made):
    server, new = make_server(place, [40, 30]), [40, 30]
    offsets = some_offsets(server, new)
    meta = server.make_meta(new, attn_mask_offsets=server.on(offsets))
    server.backend.init_attention_metadata(meta)
    check(server, 1, new, offsets, forward(server, 1, new, meta))
    other = some_offsets(server, new, seed=5)
    write(meta.attn_mask_offsets, server.on(other))
    check(server, 3, new, other, forward(server, 3, new, meta))
    check(server, 6, new, other, forward(server, 6, new, meta))
    assert made == [20, 20]


def test_micro_batches_have_masks_of_their_own(place, made):
    """Whose layers take turns; more of them than are remembered are made again."""
    server, new = make_server(place, [40, 30]), [40, 30]
    batches = [some_offsets(server, new, seed) for seed in range(3)]
    metas = [server.make_meta(new, attn_mask_offsets=server.on(x)) for x in batches]
    server.backend.init_attention_metadata(metas[0])
    for count, expected in ((2, [20, 20, 7, 7]), (3, [])):
        for layer in (1, 2, 3, 5, 6):
            for meta, offsets in list(zip(metas, batches))[:count]:
                check(server, layer, new, offsets, forward(server, layer, new, meta))
        assert not expected or made == expected
        assert len(server.backend.attention_metadata.windowed) <= 4
    # Layer 6 has made some of them by now; the step begins again with layer 1.
    made.clear()
    for meta in metas:
        forward(server, 1, new, meta)
    assert made == [20] * 3
