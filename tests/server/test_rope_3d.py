"""Multimodal models: rotary tables of each sequence (rope_3d), masks that see all of an image."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastattn.backends.fastdeploy as plugin
from fastattn import _ops, backends
from fastattn.compat import fastdeploy as ops
from tests.support import fastdeploy as support
from tests.support.bounds import assert_error_ratio
from tests.support.compare import assert_same_bits
from tests.support.fastdeploy import KINDS, Worker, fastdeploy, make_model
from tests.support.fastdeploy_step import SEQS, TYPES, Step
from tests.support.serving import MAX_MODEL_LEN, taken
from tests.support.tensors import int32, skip_slices_on, to_numpy

__all__ = ["fastdeploy", "taken"]  # fixtures

each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
each_style = pytest.mark.parametrize("neox", [False, True], ids=["interleaved", "neox"])

#: What says that sequences have rotary tables of their own.
FLAGS = {"enable_rope_3d_runtime": True}


def own_tables(slots: int, dim: int, neox: bool) -> np.ndarray:
    """FastDeploy's tables [slots, 2, 1, max_model_len, 1, D / 2 or (neox) D], all unequal.

    Text counts on along all three axes; an image stands still along the first one.
    """
    rng = np.random.default_rng(3)
    pairs = np.arange(dim // 2)
    where = np.cumsum(rng.integers(0, 3, (slots, MAX_MODEL_LEN, 3)), axis=1)
    angles = where[..., pairs % 3] * 500.0 ** (-pairs / len(pairs))
    if neox:
        angles = np.concatenate([angles, angles], axis=-1)
    tables = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return tables[:, :, None, :, None]


class VisionWorker(Worker):
    """A worker whose slots have tables of their own, three slots more than block tables.

    Parameters
    ----------
    mask : (list of array, list of array), optional
        First and last key that each token of each sequence sees.
    """

    def __init__(self, model: Any, kind: Any, lengths: list[int], place: str = "cpu", **options):
        self.mask = options.pop("mask", None)
        super().__init__(model, kind, lengths, place, **options)
        self.own = own_tables(len(self.tables) + 3, model.head_dim, model.neox)
        self.rotary_embs = self.on(self.own)

    def swap(self, a: int, b: int) -> None:
        """Two slots change places, as FastDeploy's ``swap_states`` moves them."""
        for array in (self.own, self.tables):
            array[[a, b]] = array[[b, a]]
        for values in (self.tokens, self.cached):
            values[a], values[b] = values[b], values[a]
        self.rotary_embs = self.on(self.own)

    def check(self, layer: int, new: list[int], out: np.ndarray, padding: int = 0) -> None:
        model, start = dataclasses.replace(self.model), 0
        dtype = "float16" if model.dtype == np.float16 else "bfloat16"
        for seq, n in enumerate(new):
            done = self.cached[seq]
            model.table = self.own[seq]
            tokens = self.tokens[seq][layer, : done + n]
            mask = {}
            if self.mask is not None:
                first, last = (side[seq][done : done + n] for side in self.mask)
                offsets = np.stack([first, last + 1], 1)
                mask = {"causal": False, "window_size": (-1, -1), "mask_offsets": offsets}
            if n:
                exact, naive = (
                    model.attention(tokens, done, p, **mask) for p in ("float64", dtype)
                )
                part = out[start : start + n]
                assert_error_ratio(part, exact, naive, dtype, f"layer {layer}, sequence {seq}")
            start += n
        assert out.shape[0] == start + padding and not out[start:].any(), "padding tokens"


@pytest.fixture
def registered(fastdeploy, monkeypatch):
    """A process of FastDeploy with the plug-in, which serves a model with rope_3d."""
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "FLASH_ATTN")
    plugin.register()
    with_flags(monkeypatch, FLAGS)
    return fastdeploy


def with_flags(monkeypatch: Any, flags: dict[str, Any]) -> None:
    """Workers get configurations with these values; the runtime flag only if it is among them."""
    made = support.make_fd_config

    def make(*args: Any, **options: Any) -> SimpleNamespace:
        config = made(*args, **options)
        with contextlib.suppress(AttributeError):
            del config.enable_rope_3d_runtime
        for path, value in flags.items():
            *parent, name = path.split(".")
            setattr(getattr(config, parent[0]) if parent else config, name, value)
        return config

    monkeypatch.setattr(support, "make_fd_config", make)


# --- tables of each sequence ---------------------------------------------------------------------


@each_style
@each_kind
def test_a_server_with_images(registered, place, kind, neox):
    """Chunks, decode, drafts, rest and padding over fewer sequences than there are tables."""
    model = make_model(kind, neox=neox, norm=True)
    worker = VisionWorker(model, kind, [150, 90, 40, 70], place)
    worker.step([70, 40, 9, 0])
    worker.step([65, 1, 0, 66], prefill=[True, False, False, True], padding=3)
    worker.step([1, 3, 5, 1], prefill=[False] * 4, advance=[1, 2, 1, 1])
    worker.step([1, 1, 0, 1], padding=7)


@pytest.mark.parametrize("name", ["APPEND_ATTN", "FLASH_ATTN", "FLASH_MASK_ATTN"])
def test_every_backend(registered, monkeypatch, name):
    """The tables are whole heads' whatever ``partial_rotary_factor`` says."""
    monkeypatch.setenv("FD_ATTENTION_BACKEND", name)
    with_flags(monkeypatch, {**FLAGS, "model_config.partial_rotary_factor": 0.5})
    worker = VisionWorker(make_model("block_wise_fp8", neox=True), "block_wise_fp8", [40, 30])
    worker.step([30, 20])
    worker.step([1, 1])


def test_sequences_change_slots(registered, place):
    worker = VisionWorker(make_model(None), None, [150, 90, 40], place)
    worker.step([100, 40, 9])
    worker.swap(0, 2)
    worker.step([7, 1, 20])
    worker.swap(1, 2)
    worker.step([1, 1, 1])


def test_a_part_of_the_slots(registered, place):
    """FastDeploy's two-batch overlap cuts tables, block tables and lengths to some sequences."""
    skip_slices_on(place)
    worker = VisionWorker(make_model("int8"), "int8", [40, 60, 30], place)
    arrays = worker.metadata([0, 50, 20], [False, True, True], 70)
    meta = worker.make_meta(arrays)
    for name in ("block_tables", "seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time"):
        setattr(meta, name, int32(arrays[name][1:3], place))
    meta.cu_seqlens_q = int32([0, 50, 70], place)
    meta.batch_id_per_token = int32(np.repeat([0, 1], [50, 20]), place)
    meta.rotary_embs = worker.rotary_embs[1:3]
    worker.backend.init_attention_metadata(meta)
    qkv = worker.on(worker.rank_qkv(0, [0, 50, 20], 0))
    out = worker.backend.forward(None, None, None, qkv, None, None, worker.layers[0], meta)
    worker.check(0, [0, 50, 20], to_numpy(out))


def test_a_layers_step_is_one_call(registered, taken, monkeypatch):
    """The bound call takes such tables, with the result of the call through Python."""
    outputs, caches = [], []
    for fast in (True, False):
        worker = VisionWorker(make_model("block_wise_fp8"), "block_wise_fp8", [150, 90])
        if not fast:
            monkeypatch.setattr(_ops, "is_direct", lambda: False)
        worker.step([100, 30])
        meta = worker.make_meta(worker.metadata([9, 1], [True, False], 10))
        worker.backend.init_attention_metadata(meta)
        qkv = worker.on(worker.rank_qkv(0, [9, 1], 0))
        taken.clear()
        out = worker.backend.forward(None, None, None, qkv, None, None, worker.layers[0], meta)
        assert [x is not None for x in taken] == [True] * fast
        outputs.append(to_numpy(out))
        caches.append([to_numpy(x) for x in worker.caches])
    assert_same_bits(*outputs)
    for a, b in zip(*caches):
        assert_same_bits(a, b)


def test_draft_models_have_one_table(registered, monkeypatch):
    with_flags(monkeypatch, {**FLAGS, "speculative_config.model_type": "mtp"})
    model = make_model(None, neox=True, rotary_dim=32)
    worker = Worker(model, None, [40, 30])
    worker.step([30, 20])
    worker.step([1, 1])


def test_too_few_tables_are_refused(registered):
    worker = VisionWorker(make_model(None), None, [40, 30])
    worker.rotary_embs = worker.on(worker.own[:1])
    with pytest.raises(ValueError, match="rotary_embs: expected a table for each of the"):
        worker.step([30, 20])


def test_a_model_that_has_rotated_itself_needs_no_table(registered):
    worker = VisionWorker(make_model(None), None, [40])
    worker.own[:, 0], worker.own[:, 1] = 1, 0  # no rotation
    worker.step([40], rotary_embs=None, rope_already_applied=True)


# --- masks of images -----------------------------------------------------------------------------


def image_mask(lengths: list[int], images: list[list[tuple[int, int]]]) -> list[np.ndarray]:
    """Last key that every token sees: its own, or the last of its image."""
    last = [np.arange(n) for n in lengths]
    for seq, spans in enumerate(images):
        for begin, end in spans:
            last[seq][begin:end] = end - 1
    return last


def offsets_of(worker: VisionWorker, new: list[int]) -> np.ndarray:
    """``attn_mask_offsets`` [2 T] as FastDeploy makes it: start 0, and the first key not seen."""
    ends = [side[done : done + n] + 1 for side, done, n in zip(worker.mask[1], worker.cached, new)]
    flat = np.concatenate(ends)
    return np.stack([np.zeros_like(flat), flat], 1).reshape(-1).astype(np.int32)


@pytest.mark.parametrize("name", ["APPEND_ATTN", "FLASH_ATTN", "FLASH_MASK_ATTN"])
@each_kind
def test_tokens_of_an_image_see_each_other(registered, monkeypatch, place, kind, name):
    """Prompts with images, the second part of one, then decode; offsets in every step."""
    monkeypatch.setenv("FD_ATTENTION_BACKEND", name)
    lengths = [200, 120, 40]
    last = image_mask(lengths, [[(5, 69), (90, 154)], [(0, 16), (16, 80)], []])
    first = [np.zeros(n, int) for n in lengths]
    model = make_model(kind, neox=True)
    worker = VisionWorker(model, kind, lengths, place, mask=(first, last))
    for new in ([80, 16, 9], [80, 64, 20], [1, 1, 1], [3, 1, 0]):
        worker.step(new, attn_mask_offsets=worker.on(offsets_of(worker, new)))


@pytest.mark.parametrize("window", [1, 24, 64])
def test_a_window_counts_from_the_end_of_what_is_seen(registered, place, window):
    skip_slices_on(place)
    lengths = [200, 120]
    last = image_mask(lengths, [[(5, 69), (90, 154)], [(16, 80)]])
    first = [np.maximum(x + 1 - window, 0) for x in last]
    worker = VisionWorker(make_model("int8"), "int8", lengths, place, mask=(first, last))
    for layer in worker.layers:
        layer.sliding_window = window
    for new in ([80, 16], [80, 64], [1, 1]):
        worker.step(new, attn_mask_offsets=worker.on(offsets_of(worker, new)))


def test_the_servers_buffer_of_offsets(registered, place):
    """FastDeploy copies each step's offsets into one buffer, which takes their shape."""
    lengths = [60, 40]
    last = image_mask(lengths, [[(3, 35)], []])
    first = [np.zeros(n, int) for n in lengths]
    worker = VisionWorker(make_model(None), None, lengths, place, mask=(first, last))
    buffer = worker.on(np.full(1000, -1, np.int32))
    for new in ([40, 20], [1, 1], [7, 3]):
        buffer.copy_(worker.on(offsets_of(worker, new)), False)
        worker.step(new, attn_mask_offsets=buffer)


def test_a_masked_step_is_one_call(registered, taken):
    """Whether or not the layer has a window as well."""
    lengths = [60, 40]
    last = image_mask(lengths, [[(3, 35)], []])
    first = [np.zeros(n, int) for n in lengths]
    outputs = []
    for window in (0, 1000):
        worker = VisionWorker(make_model("int8"), "int8", lengths, mask=(first, last))
        worker.layers[0].sliding_window = window
        for new in ([40, 20], [9, 1]):
            meta = worker.make_meta(
                worker.metadata(new, [True, False], sum(new)),
                attn_mask_offsets=worker.on(offsets_of(worker, new)),
            )
            worker.backend.init_attention_metadata(meta)
            qkv = worker.on(worker.rank_qkv(0, new, 0))
            taken.clear()
            out = worker.backend.forward(None, None, None, qkv, None, None, worker.layers[0], meta)
            worker.cached = [a + b for a, b in zip(worker.cached, new)]
        outputs.append(to_numpy(out))
        assert [x is not None for x in taken] == [True]
    assert_same_bits(*outputs)  # the window is longer than any sequence


def test_offsets_of_another_length_are_refused(registered):
    last = image_mask([60], [[]])
    worker = VisionWorker(make_model(None), None, [60], mask=([np.zeros(60, int)], last))
    worker.step([9], attn_mask_offsets=worker.on(offsets_of(worker, [9])))
    with pytest.raises(ValueError, match=r"mask_offsets: expected shape \[5, 2\]"):
        worker.step([5], attn_mask_offsets=worker.on(offsets_of(worker, [9])))


# --- FastDeploy's operator -----------------------------------------------------------------------


@pytest.mark.parametrize("cache_quant_type", TYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("neox", "partial"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_gqa_rope_write_cache(place, dim, neox, partial, norm, cache_quant_type):
    """A table for each sequence, and slots without one; every sequence is at its own position."""
    Step(SEQS, cache_quant_type=cache_quant_type, blocks=12, dim=dim, neox=neox, partial=partial,
         norm=norm, rope_3d=True).run_and_check(place)  # fmt: skip


def test_the_flag_of_gqa_rope_write_cache_has_to_fit_the_table():
    own, shared = Step(SEQS, blocks=12, rope_3d=True), Step(SEQS, blocks=12)
    with pytest.raises(ValueError, match=r"rotary_embs: expected one table, .* without rope_3d"):
        ops.gqa_rope_write_cache(*own.arguments(rope_3d=False))
    with pytest.raises(ValueError, match="rotary_embs: expected a table for each sequence"):
        ops.gqa_rope_write_cache(*shared.arguments(rope_3d=True))
    own.table = own.table[: len(SEQS) - 1]
    with pytest.raises(ValueError, match=f"expected a table for each of the {len(SEQS)} sequences"):
        ops.gqa_rope_write_cache(*own.arguments())


def test_which_tables_have_angles_of_whole_heads():
    """The factor counts where the table is shared."""
    config = backends.make_config(max_model_len=512, partial_rotary_factor=0.5)
    config.enable_rope_3d_runtime = False
    assert backends.FlashAttentionBackend(config, 2, 4, 64).config.rotary_dim == 32
    config.enable_rope_3d_runtime = True
    assert backends.FlashAttentionBackend(config, 2, 4, 64).config.rotary_dim is None
    config.speculative_config.model_type = "mtp"
    assert backends.FlashAttentionBackend(config, 2, 4, 64).config.rotary_dim == 32
