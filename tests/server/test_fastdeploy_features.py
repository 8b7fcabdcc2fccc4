"""What FastDeploy's models and releases ask of a backend, one by one, through its stand-in."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import paddle
import pytest

from fastattn import _plugin, backends, functional
from fastattn.backends import fastdeploy as plugin
from fastattn.backends.stale_starts import NOWHERE, StaleStarts
from fastattn.reference.rope import make_rotary_embs
from tests.support.fastdeploy import (
    BACKENDS,
    DECODE_UNIFIED,
    KINDS,
    LATENT,
    Worker,
    chosen,
    fastdeploy,
    make_fd_config,
    make_model,
    registered,
)
from tests.support.serving import MAX_MODEL_LEN
from tests.support.tensors import int32, to_numpy

__all__ = ["fastdeploy", "registered"]  # fixtures


# --- registration --------------------------------------------------------------------------------


def test_decode_unified_is_ours(registered, monkeypatch):
    """A name of FastDeploy's development branch, which would pass the plug-in by."""
    name, ours = DECODE_UNIFIED
    monkeypatch.setenv("FD_ATTENTION_BACKEND", name)
    assert issubclass(chosen(), getattr(backends, ours))


def fail_to_register(patch):
    """Register with a library that cannot be loaded."""
    patch.setattr(plugin, "_check_library", lambda: (_ for _ in ()).throw(OSError("no file")))
    with pytest.raises(OSError, match="no file"):
        _plugin.register()


@pytest.mark.parametrize("name", [*BACKENDS, *LATENT, DECODE_UNIFIED[0]])
def test_a_failed_registration_is_loud_where_a_backend_is_chosen(fastdeploy, monkeypatch, name):
    """FastDeploy may have swallowed or only logged the error."""
    fail_to_register(monkeypatch)
    monkeypatch.setenv("FD_ATTENTION_BACKEND", name)
    with pytest.raises(RuntimeError, match="registering failed, OSError: no file; unset FD_PLUG"):
        chosen()
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "PLAS_ATTN")
    assert chosen().__module__ == plugin.PACKAGE  # it was never ours


def test_a_registration_after_a_failed_one_counts(fastdeploy, monkeypatch):
    with monkeypatch.context() as patch:
        fail_to_register(patch)
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "FLASH_ATTN")
    _plugin.register()
    assert issubclass(chosen(), backends.FlashAttentionBackend)


def test_the_entry_points_module_imports_nothing_that_can_fail():
    """FastDeploy logs an error of importing a plug-in and serves without it."""
    code = (
        "import sys; import fastattn._plugin; "
        "print([n for n in ('paddle', 'numpy', 'fastattn.backends') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_registering_without_fastdeploy_raises_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdeploy", None)
    monkeypatch.setitem(sys.modules, "fastdeploy.platforms", None)
    with pytest.raises(ImportError, match=r"FastDeploy 2\.6 is needed"):
        _plugin.register()


# --- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
def test_parts_of_graphs_leave_the_attention_out(registered, monkeypatch, full):
    flags = {"FLAGS_cuda_graph_blacklist": "custom_op.theirs_"}
    monkeypatch.setattr(paddle, "get_flags", lambda name: {name: flags[name]})
    monkeypatch.setattr(paddle, "set_flags", flags.update)
    config = make_fd_config(make_model(None))
    config.graph_opt_config.full_cuda_graph = full
    for _ in range(2):
        chosen()(config, 2, 4, 64)
    names = flags["FLAGS_cuda_graph_blacklist"].split(",")
    assert len(set(names)) == len(names) and names[0] == "custom_op.theirs_"
    # The names that traced programs have (tests trace them elsewhere): writers end in "_".
    ours = {f"custom_op.fastattn_{x}_" for x in ("rope_write_cache_kv", "paged_attention")}
    assert (ours <= set(names)) != full
    assert len(names) == 1 or not full


def test_a_paddle_without_that_list_is_fine(registered):
    config = make_fd_config(make_model(None))
    config.graph_opt_config.full_cuda_graph = False
    chosen()(config, 2, 4, 64)


def test_starts_that_no_longer_run_are_out_of_a_graphs_way(registered):
    """A graph reads the starts of all slots; a step writes those that run into the same buffer."""
    worker = Worker(make_model("int8"), "int8", [90, 40, 20, 20, 20], layers=1)
    worker.fd_config.graph_opt_config.use_cudagraph = True
    worker.backend = chosen()(worker.fd_config, 2, 4, 64)
    buffer = int32(np.zeros(6))
    captured = buffer.view([6])  # of its own shape, which stays

    def step(new):
        arrays = worker.metadata(new, [n > 1 for n in new], sum(new))
        buffer.copy_(int32(arrays["cu_seqlens_q"]), True)  # it shrinks, its memory stays
        meta = worker.make_meta(arrays, cu_seqlens_q=buffer)
        worker.backend.init_attention_metadata(meta)
        out = worker.layers[0](qkv=worker.on(worker.rank_qkv(0, new, 0)), forward_meta=meta)
        worker.check(0, new, to_numpy(out))
        worker.cached = [d + n for d, n in zip(worker.cached, [*new, *[0] * 5])]

    for new in ([9, 4, 3, 0, 1], [20, 1], [1, 1, 1, 1], [2], [1, 0, 1, 0, 1], [1, 1], [1]):
        step(new)
        starts = captured.numpy()
        assert starts[: len(new) + 1].tolist() == np.cumsum([0, *new]).tolist()
        assert (np.diff(starts) >= 0).all(), "a kernel looks sequences up among them"
        assert (starts[len(new) + 1 :] >= sum(new)).all()


def test_few_buffers_of_starts_are_remembered():
    stale = StaleStarts()
    for _ in range(20):
        stale.settle(int32(np.zeros(9)))
    assert len(stale._buffers) <= 4


@pytest.mark.parametrize("steps", range(1, 9))
def test_a_buffer_in_use_is_not_forgotten(steps):
    """Steps with starts of their own come between those of the buffer that a graph reads."""
    stale, buffer, others = StaleStarts(), int32(np.arange(9)), []
    for _ in range(steps):
        stale.settle(buffer)
        others.append(int32(np.arange(5)))  # kept: a new tensor has an address of its own
        stale.settle(others[-1])
    stale.settle(buffer[:3])
    assert (buffer.numpy()[3:] == NOWHERE).all() and buffer.numpy()[:3].tolist() == [0, 1, 2]


# --- rotation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "neox", "rotary_dim", "columns"),
    [
        ("Ernie4_5ForCausalLM", False, None, 32),  # positions / factor, the whole head
        ("Qwen2ForCausalLM", True, None, 64),  # the factor is not used
        ("Glm4MoeForCausalLM", True, 32, 16),  # half of the head
    ],
)
def test_partial_rotary_factor_is_the_tables_affair(
    registered, place, architecture, neox, rotary_dim, columns
):
    model = make_model(None, neox=neox, rotary_dim=rotary_dim)
    whole = make_rotary_embs(2 * MAX_MODEL_LEN, rotary_dim or 64, theta=500.0, neox=neox)
    if architecture.startswith("Ernie"):  # a position counts twice
        model.table = np.ascontiguousarray(whole[:, :, ::2])
    assert model.table.shape[-1] in (columns, 2 * columns)
    model.table = np.ascontiguousarray(model.table[..., :columns])
    worker = Worker(model, None, [80, 30], place)
    worker.fd_config.model_config.architectures = [architecture]
    worker.fd_config.model_config.partial_rotary_factor = 0.5
    worker.backend = chosen()(worker.fd_config, 2, 4, 64)
    worker.step([70, 17])
    worker.step([1, 9])


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"enable_rope_3d_runtime": True}, True),
        ({"enable_rope_3d_runtime": False, "rope_3d": True}, False),
    ],
)
def test_an_mrope_section_alone_is_not_3d_rope(registered, options, whole):
    """A model's file may have a section for three axes, and the server one table for all."""
    config = make_fd_config(make_model(None))
    config.enable_rope_3d_runtime = options["enable_rope_3d_runtime"]
    names = {k: v for k, v in options.items() if k != "enable_rope_3d_runtime"}
    config.model_config.__dict__.update(names, partial_rotary_factor=0.5)
    assert chosen()(config, 2, 4, 64).config.rotary_dim == (None if whole else 32)


# --- micro-batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2])
def test_micro_batches_have_their_own_masks(registered, place, columns):
    """FastDeploy's two-batch overlap prepares a step, then gives forward a half of it each time."""
    worker = Worker(make_model("int8"), "int8", [90, 40], place, layers=1)
    new, model = [90, 40], worker.model
    whole = worker.make_meta(worker.metadata(new, [True, True], 130))
    ends = [np.minimum(np.arange(n) // 16 * 16 + 16, n) for n in new]
    pairs = np.stack([np.zeros(130), np.concatenate(ends)], 1).astype(np.int32)
    whole.attn_mask_offsets = worker.on(pairs.reshape(-1) if columns == 1 else pairs)
    worker.backend.init_attention_metadata(whole)
    outs, qkv = [], worker.rank_qkv(0, new, 0)
    # The second half starts within the first sequence.
    for start, (slot, lens, cached) in zip((0, 64), ((0, [64], [0]), (0, [26, 40], [64, 0]))):
        worker.cached = cached
        part = worker.make_meta(worker.metadata(lens, [True] * len(lens), sum(lens)))
        part.block_tables = whole.block_tables[slot : slot + len(lens)]
        mine = pairs[start : start + sum(lens)]
        part.attn_mask_offsets = worker.on(mine.reshape(-1) if columns == 1 else mine)
        tokens = worker.on(qkv[start : start + sum(lens)])
        outs.append(to_numpy(worker.layers[0](qkv=tokens, forward_meta=part)))
    out, start = np.concatenate(outs).astype(np.float64), 0
    for seq, n in enumerate(new):
        mask = {"causal": False, "window_size": (-1, -1)}
        masked = np.stack([np.zeros(n), ends[seq]], 1).astype(np.int32)
        tokens = worker.tokens[seq][0, :n]
        exact = model.attention(tokens, 0, "float64", mask_offsets=masked, **mask)
        # In the first half keys of the second are not there yet: its last group of 16 is whole.
        error = out[start : start + n] - exact
        assert np.sqrt(np.mean(error**2)) < 0.01 * np.sqrt(np.mean(exact**2)), seq
        start += n


@pytest.mark.parametrize("halves", [[(0, 1), (1, 2)], [(0, 2)]], ids=["halves", "whole"])
def test_micro_batches_leave_the_steps_cascade_plan_alone(registered, monkeypatch, place, halves):
    """A plan is for all sequences of a step: those of a half share nothing that it knows of."""
    worker = Worker(make_model("int8"), "int8", [200, 170], place, layers=1, shared=2)
    worker.step([150, 0])
    worker.cached[1] = 128  # the prefix
    planned, cascade = [], functional.cascade_attention
    watch = lambda *args, **options: (planned.append(args), cascade(*args, **options))[1]  # noqa: E731
    monkeypatch.setattr(functional, "cascade_attention", watch)
    new, cached = [20, 30], worker.cached
    held = worker.caches[0].place
    plan = functional.plan_cascade(worker.tables[:2], cached, new, 128, place=held)
    whole = worker.make_meta(worker.metadata(new, [True, True], 50), cascade_plan=plan)
    worker.backend.init_attention_metadata(whole)
    qkv, outs = worker.rank_qkv(0, new, 0), []
    for first, last in halves:
        part = whole
        if last - first < 2:
            worker.cached = cached[first:last]
            part = worker.make_meta(worker.metadata(new[first:last], [True], new[first]))
            part.block_tables = whole.block_tables[first:last]
        tokens = worker.on(qkv[sum(new[:first]) : sum(new[:last])])
        outs.append(to_numpy(worker.layers[0](qkv=tokens, forward_meta=part)))
    worker.cached = cached
    worker.check(0, new, np.concatenate(outs))
    assert len(planned) == (len(halves) == 1)


def test_an_empty_micro_batch_has_no_fields(registered, place):
    """A small step is not split: the other half has caches and nothing else."""
    worker = Worker(make_model("int8"), "int8", [9], place, layers=1)
    worker.step([5])
    empty = worker.meta_class(caches=worker.caches, attn_backend=worker.backend)
    qkv = worker.on(worker.rank_qkv(0, [0], 0))
    out = worker.layers[0](qkv=qkv, forward_meta=empty)
    assert list(out.shape) == [0, 4 * 64]


# --- names of cache types ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_functions_know_fastdeploys_names(kind):
    """``kv_cache_quant_type`` of its configuration, as ``cache_quant_type``."""
    rng = np.random.default_rng(0)
    x = paddle.to_tensor(rng.normal(size=(3, 2, 64)).astype(np.float32)).astype("bfloat16")
    scales = {f"cache_{n}_scales": paddle.to_tensor([0.02 * (n == "k") + 0.03]) for n in "kv"}
    seqs = (int32([[1]]), int32([0, 3]), int32([0]), int32([3]))
    results = []
    for name in (kind, KINDS[kind]):
        caches = [paddle.zeros([2, 2, 64, 64], "uint8") for _ in "kv"]
        options = {**scales, "cache_quant_type": name}
        functional.write_cache_kv(x, x, *caches, *seqs, **options)
        out = functional.paged_attention(x, *caches, *seqs, 3, 3, **options)
        layout = {"cache_quant_type": name, "src": "fastattn", "dst": "fastdeploy"}
        turned = functional.convert_cache_layout(caches[1], kind="v", **layout)
        results.append([to_numpy(y) for y in (*caches, out.cast("float32"), turned)])
    for ours, theirs in zip(*results):
        assert np.array_equal(ours, theirs)
    assert results[0][0].any()


def test_other_names_of_fastdeploy_are_refused():
    x = paddle.zeros([1, 2, 64])
    caches = [paddle.zeros([1, 2, 64, 64], "uint8") for _ in "kv"]
    seqs = (int32([[0]]), int32([0, 1]), int32([0]), int32([1]))
    for name in ("int4_zp", "int8_zp", "float8_e4m3fn_zp", "float8_e4m3"):
        with pytest.raises(NotImplementedError, match=f"'{name}' is not supported; supported"):
            functional.write_cache_kv(x, x, *caches, *seqs, cache_quant_type=name)
