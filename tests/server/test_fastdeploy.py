"""The backends in FastDeploy's interface: registered by its plug-ins, driven as by its runner."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import numpy as np
import paddle
import pytest

from fastattn import _ops, backends
from fastattn.backends import fastdeploy as plugin
from tests.support import ROOT, fresh
from tests.support.fastdeploy import (
    BACKENDS,
    KINDS,
    LATENT,
    PASSED,
    STAND_IN,
    STUB,
    Worker,
    chosen,
    fastdeploy,
    make_fd_config,
    make_model,
    registered,
)
from tests.support.tensors import EMPTY_OUTPUTS, int32, to_numpy

__all__ = ["fastdeploy", "registered"]  # fixtures

#: FastDeploy's types, and two that it passes to a backend without knowing them.
each_kind = pytest.mark.parametrize(
    "kind", [*KINDS, "block_wise_k8v4", "block_wise_kfp8v4"], ids=str
)
each_backend = pytest.mark.parametrize("name", BACKENDS)


# --- registration --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", {**BACKENDS, **LATENT})
def test_the_backends_are_ours(fastdeploy, monkeypatch, name):
    monkeypatch.setenv("FD_ATTENTION_BACKEND", name)
    plugin.register()
    assert issubclass(chosen(), getattr(backends, {**BACKENDS, **LATENT}[name]))


def test_other_backends_stay_fastdeploys(registered, monkeypatch):
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "PLAS_ATTN")
    assert chosen().__module__ == plugin.PACKAGE
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "NO_ATTN")
    with pytest.raises(ValueError, match="Invalid attention backend"):
        chosen()


def test_without_the_plug_in_nothing_changes(fastdeploy):
    assert chosen().__module__ == plugin.PACKAGE


def test_a_backend_of_ours_is_one_of_theirs(registered):
    backend = chosen()(make_fd_config(make_model(None)), 2, 4, 64)
    from fastdeploy.model_executor.layers.attention import AttentionBackend

    assert isinstance(backend, AttentionBackend)


@pytest.mark.parametrize("name", LATENT)
def test_backends_of_latent_caches_are_instances_of_theirs(registered, monkeypatch, name):
    """FastDeploy's runner makes positions of tokens only for instances of these classes."""
    monkeypatch.setenv("FD_ATTENTION_BACKEND", name)
    from fastdeploy.model_executor.layers import attention

    assert issubclass(chosen(), getattr(attention, LATENT[name]))
    assert not issubclass(chosen(), attention.FlashAttentionBackend)


def test_registering_again_does_nothing(registered):
    from fastdeploy.platforms import CUDAPlatform

    before = CUDAPlatform.get_attention_backend_cls
    chosen()
    plugin.register()  # not too late: it is in place
    assert CUDAPlatform.get_attention_backend_cls == before


@pytest.mark.parametrize("outer", [False, True])
def test_too_late_is_said(fastdeploy, monkeypatch, outer):
    from fastdeploy.model_executor.layers.attention import attention_selecter

    chosen()
    if outer:  # versions differ in which function keeps the choice
        attention_selecter._get_attn_backend.cache_clear()
        kept = functools.cache(attention_selecter.get_attention_backend)
        monkeypatch.setattr(attention_selecter, "get_attention_backend", kept)
        kept()
        attention_selecter._get_attn_backend.cache_clear()
    with pytest.raises(RuntimeError, match="has chosen its attention backend already"):
        plugin.register()


def test_other_platforms_are_refused(fastdeploy, monkeypatch):
    import fastdeploy.platforms as platforms

    monkeypatch.setattr(platforms, "current_platform", platforms.CPUPlatform())
    with pytest.raises(NotImplementedError, match="platform 'cpu' is not supported"):
        plugin.register()


def test_without_fastdeploy(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdeploy", None)
    monkeypatch.setitem(sys.modules, "fastdeploy.platforms", None)
    with pytest.raises(ImportError, match=r"FastDeploy 2\.6 is needed"):
        plugin.register()


def test_a_fastdeploy_without_the_hook(fastdeploy, monkeypatch):
    from fastdeploy.platforms import CUDAPlatform

    monkeypatch.delattr(CUDAPlatform, "get_attention_backend_cls")
    with pytest.raises(RuntimeError, match="CUDAPlatform has no class method"):
        plugin.register()


def test_missing_operators_are_said_at_the_start(fastdeploy, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(ImportError, match=r"operators are missing .*nothing\.so"):
        plugin.register()


def test_operators_built_for_something_else(fastdeploy, monkeypatch, tmp_path):
    library = tmp_path / "_fastattn_ops.so"
    library.touch()
    monkeypatch.setenv("FASTATTN_LIBRARY", str(library))
    record = tmp_path / "_build_info.py"
    record.write_text("PADDLE_VERSION = '0.0.1'\nWITH_CUDA = True\n")
    with pytest.raises(ImportError, match=r"built for Paddle 0\.0\.1"):
        plugin.register()
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    record.write_text(f"PADDLE_VERSION = {paddle.__version__!r}\nWITH_CUDA = False\n")
    with pytest.raises(NotImplementedError, match="was built without CUDA"):
        plugin.register()
    record.write_text(f"PADDLE_VERSION = {paddle.__version__!r}\nWITH_CUDA = True\n")
    plugin.register()


# --- processes -----------------------------------------------------------------------------------

_PROCESSES = {
    # A worker imports the models before it makes a backend, and its draft model asks once more.
    "worker": """
import fastdeploy.model_executor.models
from fastdeploy.model_executor.layers.attention import get_attention_backend
print(get_attention_backend().__module__, get_attention_backend().__name__)
""",
    # The engine loads the plug-ins, then its cache manager asks for shapes.
    "engine": """
from fastdeploy.plugins import load_model_register_plugins
load_model_register_plugins()
load_model_register_plugins()
import fastattn._ops, sys
assert not any("layers.attention" in name for name in sys.modules), "imported by the plug-in"
from fastdeploy.model_executor.layers.attention import get_attention_backend
from types import SimpleNamespace as N
config = N(model_config=N(max_model_len=512, num_key_value_heads=2),
           parallel_config=N(tensor_parallel_size=4))
backend = get_attention_backend()(config, kv_num_heads=1, num_heads=4, head_dim=128,
                                  encoder_block_shape_q=64, decoder_block_shape_q=16)
key, value = backend.get_kv_cache_shape(max_num_blocks=7, kv_cache_quant_type="block_wise_fp8")
assert (key, value) == ([7, 1, 64, 128], [7, 1, 128, 64])
assert fastattn._ops.load.cache_info().currsize == 0, "loaded the operators"
print(type(backend).__module__, type(backend).__name__)
""",
}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """A folder with the metadata that `setup_ops.py install` and `pip install .` install."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("the build needs setuptools 77")
    folder = tmp_path_factory.mktemp("metadata")
    source = tmp_path_factory.mktemp("source")
    # Beside the sources it would leave a folder, which other tests run at the same time see.
    for name in ("pyproject.toml", "setup_ops.py", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    for name in ("custom_ops", "fastattn"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "setup_ops.py", "dist_info", "--output-dir", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("names", "told"), [("fastattn", "all there"), ("fastatn,fastattn", "{'fastatn'}")]
)
def test_the_page_tells_how_to_see_a_misspelt_name(metadata, names, told):
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    (code,) = re.findall(r'^python -c "(import os, importlib\.metadata.*)"$', page, re.M)
    env = {**os.environ, "FD_PLUGINS": names, "PYTHONPATH": str(metadata)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == told, done.stderr


def test_an_installed_package_has_the_entry_point(metadata):
    (entries,) = metadata.glob("*.dist-info/entry_points.txt")
    text = entries.read_text(encoding="utf-8")
    assert "[fastdeploy.model_register_plugins]" in text
    assert "fastattn = fastattn._plugin:register" in text


@pytest.mark.parametrize(
    ("process", "plugins"),
    [("worker", "fastattn"), ("engine", "other,fastattn"), ("worker", "other"), ("worker", None)],
)
def test_every_process_loads_it_where_it_is_named(metadata, process, plugins):
    env = {name: value for name, value in os.environ.items() if name != "FD_PLUGINS"}
    env |= {"FD_ATTENTION_BACKEND": "FLASH_MASK_ATTN", "FASTATTN_IGNORED": STAND_IN}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (STUB, metadata, ROOT)))
    if plugins is not None:
        env["FD_PLUGINS"] = plugins
    done = fresh.run(_PROCESSES[process], env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    ours = "fastattn.backends.fastdeploy FlashMaskAttentionBackend"
    theirs = f"{plugin.PACKAGE} FlashMaskAttentionBackend"
    assert done.stdout.split("\n")[-2] == (ours if plugins and "fastattn" in plugins else theirs)


# --- refused at the start ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("cache_config.block_size", 32, "supported: 64"),
        ("graph_opt_config.graph_opt_level", 3, "supported: 0, 1, 2"),
        ("quant_config.kv_cache_quant_type", "int4_zp", "supported: none, int8, float8_e4m3fn"),
        (
            "quant_config.kv_cache_quant_type",
            "float8_e4m3fn_zp",
            "supported: none, int8, float8_e4m3fn",
        ),
    ],
)
@each_backend
def test_the_reason_is_told_when_the_backend_is_made(
    registered, monkeypatch, name, path, value, text
):
    monkeypatch.setenv("FD_ATTENTION_BACKEND", name)
    config = make_fd_config(make_model(None), "int8")
    *parents, last = path.split(".")
    target = getattr(config, parents[0]) if parents else config
    setattr(target, last, value)
    with pytest.raises(NotImplementedError, match=f"{BACKENDS[name]}: {path} = .*{text}"):
        chosen()(config, kv_num_heads=2, num_heads=4, head_dim=64)


def test_a_quantisation_type_may_be_an_enum(registered):
    import enum

    class Types(str, enum.Enum):
        INT8 = "int8"
        INT4 = "int4_zp"

    config = make_fd_config(make_model(None), Types.INT8)
    assert chosen()(config, 2, 4, 64).get_kv_cache_shape(3, Types.INT8)[1] == [3, 2, 64, 64]
    config.quant_config.kv_cache_quant_type = Types.INT4
    with pytest.raises(NotImplementedError, match="kv_cache_quant_type = 'int4_zp'"):
        chosen()(config, 2, 4, 64)


@pytest.mark.parametrize(
    ("size", "kv_heads", "text"),
    [
        (4, 2, "rank 0 of 4 cannot hold 2 of 2 KV heads"),
        (2, 2, "rank 0 of 2 cannot hold 2 of 2 KV heads"),
        (1, 3, "num_heads: expected a multiple of kv_num_heads = 3, got 4"),
        (1, 0, "num_heads: expected a multiple of kv_num_heads = 0, got 4"),
        (0, 1, "tensor parallel"),
    ],
)
def test_heads_that_do_not_fit_the_ranks(registered, size, kv_heads, text):
    config = make_fd_config(make_model(None), size=size)
    with pytest.raises(ValueError, match=f"FlashAttentionBackend: .*{text}"):
        chosen()(config, kv_heads, 4, 64)


def test_a_missing_configuration(registered):
    with pytest.raises(ValueError, match="fd_config: expected a configuration, got None"):
        chosen()(None, 2, 4, 64)


# --- steps ---------------------------------------------------------------------------------------


@each_kind
@each_backend
def test_a_day_of_a_worker(registered, monkeypatch, place, name, kind):
    """Prefill, chunked prefill, prefix cache, decode, speculative, padded and empty steps."""
    monkeypatch.setenv("FD_ATTENTION_BACKEND", name)
    worker = Worker(make_model(kind, norm=True), kind, [150, 170, 40], place, shared=1)
    assert isinstance(worker.backend, getattr(backends, BACKENDS[name]))
    worker.step([70, 0, 17])  # prefill; sequence 1 waits
    worker.cached[1] = 64  # it finds its first block in the prefix cache
    worker.step([40, 9, 1])  # chunked prefill beside prefill over a cached prefix and decode
    worker.step([1, 55, 1], padding=3)  # its chunks are not multiples of anything
    worker.step([1, 1, 1])
    worker.step([3, 3, 3], prefill=[False] * 3, advance=[1, 3, 2])  # drafts, some rejected
    worker.step([2, 2, 0], prefill=[False] * 3, padding=2)
    worker.step([1, 1, 1], forward_mode=worker.modes.DECODE)
    worker.step([1, 1, 0], step_use_cudagraph=True, padding=5)


@each_kind
@pytest.mark.parametrize("filled", [False, True], ids=["no_host_lengths", "host_lengths"])
@pytest.mark.parametrize("passed", PASSED)
def test_fewer_seqs_than_slots(registered, place, passed, filled, kind):
    """Block tables and cached lengths may be of all slots."""
    worker = Worker(make_model(kind), kind, [150, 90, 40], place, passed=passed)
    worker.step([70, 64, 17], host_lengths=filled)
    assert (worker.backend.get_attention_meta().host_lengths is None) != filled
    worker.step([40, 9, 1], host_lengths=filled)
    worker.step([1, 1, 1], host_lengths=filled, after_init={"step_use_cudagraph": True})
    worker.step([3, 1, 0], prefill=[False] * 3, padding=2, host_lengths=filled)


def attend_traced(qkv, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time, block_tables):
    """A program over the first layer of the worker in `traced_worker`."""
    worker = traced_worker[0]
    meta = worker.meta_class(
        cu_seqlens_q=cu_seqlens_q,
        seq_lens_decoder=seq_lens_decoder,
        seq_lens_this_time=seq_lens_this_time,
        block_tables=block_tables,
        caches=worker.caches,
        rotary_embs=worker.rotary_embs,
        attn_backend=worker.backend,
    )
    return worker.layers[0](qkv=qkv, forward_meta=meta)


traced_worker: list = []


@pytest.mark.skipif(
    paddle.__version__.startswith("2."), reason="Paddle 2.6 traces no layer of this kind"
)
@pytest.mark.parametrize("passed", PASSED)
@pytest.mark.parametrize("bounded", [True, False])
def test_a_traced_step_of_fewer_seqs_than_slots(registered, passed, bounded):
    """One program, its sizes unknown when it is traced, for steps of two and of three sequences.

    Without bounds from the host the program takes none from its unknown number of tokens.
    """
    worker = Worker(make_model("int8"), "int8", [90, 40, 20], passed=passed, layers=1)
    traced_worker[:] = [worker]
    names = ("cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time", "block_tables")
    lengths = [-1] * worker.length_rank
    program = paddle.jit.to_static(
        attend_traced,
        input_spec=[
            paddle.static.InputSpec([-1, worker.model.width], "bfloat16"),
            paddle.static.InputSpec([-1], "int32"),
            paddle.static.InputSpec(lengths, "int32"),
            paddle.static.InputSpec(lengths, "int32"),
            paddle.static.InputSpec([-1, worker.tables.shape[1]], "int32"),
        ],
        full_graph=True,
    )
    longest = int32(np.full(9, 128), "cpu") if bounded else None  # a bound of every step
    first = worker.make_meta(worker.metadata([70, 17], [True] * 2, 87), max_len_tensor_cpu=longest)
    worker.backend.init_attention_metadata(first)
    for new in ([70, 17], [9, 1, 15], [1, 1]):
        arrays = worker.metadata(new, [n > 1 for n in new], sum(new))
        tensors = [int32(arrays[name]) for name in names]
        with paddle.no_grad():
            out = program(worker.on(worker.rank_qkv(0, new, 0)), *tensors)
        worker.check(0, new, to_numpy(out))
        worker.cached = [d + n for d, n in zip(worker.cached, [*new, 0])]


@each_kind
def test_one_chunk_or_many(registered, place, kind):
    """The same cache bytes, whatever the chunks were."""
    whole, parts = (Worker(make_model(kind), kind, [150], place) for _ in range(2))
    whole.step([150])
    for size in (1, 63, 2, 64, 20):
        parts.step([size], prefill=[True])
    used = whole.tables[0, :3]
    for a, b in zip(whole.caches, parts.caches):
        a, b = (to_numpy(x)[used].view(np.uint8) for x in (a, b))
        assert np.array_equal(a, b)


def test_flash_mask_offsets_of_a_causal_step(registered, monkeypatch, place):
    """FastDeploy gives int [2 T] with start 0 in every step of a model with such masks."""
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "FLASH_MASK_ATTN")
    worker = Worker(make_model("block_wise_fp8"), "block_wise_fp8", [80, 30], place)
    for new in ([60, 7], [1, 20]):
        ends = np.concatenate([np.arange(n) + done + 1 for n, done in zip(new, worker.cached)])
        offsets = np.stack([np.zeros_like(ends), ends], 1).reshape(-1).astype(np.int32)
        worker.step(new, attn_mask_offsets=worker.on(offsets))


def test_a_step_knows_only_what_was_set(registered):
    """A field that nobody set is None: of the ones that a step needs, the name is told."""
    worker = Worker(make_model(None), None, [9])
    for name in ("cu_seqlens_q", "block_tables", "seq_lens_decoder", "caches", "rotary_embs"):
        meta = worker.make_meta(worker.metadata([5], [True], 5), **{name: None})
        worker.backend.init_attention_metadata(meta)
        qkv = worker.on(worker.rank_qkv(0, [5], 0))
        with pytest.raises(ValueError, match=rf"forward_meta\.{name}: expected a value, got None"):
            worker.layers[0](qkv=qkv, forward_meta=meta)
    worker.step([5], max_len_tensor_cpu=None, batch_id_per_token=None)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_config.max_model_len", None),
        ("model_config.max_model_len", 0),
        ("model_config.max_model_len", "many"),
        ("model_config.window_size", -3),
        ("model_config.window_size", (8, 0)),
    ],
)
def test_numbers_that_are_none(registered, path, value):
    config = make_fd_config(make_model(None))
    part, name = path.split(".")
    setattr(getattr(config, part), name, value)
    with pytest.raises(ValueError, match=f"FlashAttentionBackend: fd_config.{path}: expected"):
        chosen()(config, 2, 4, 64)


@pytest.mark.parametrize("kind", [None, "int8", "block_wise_fp8"])
def test_hostile_steps(registered, kind):
    """Tensors that are missing or of another kind are named, and nothing crashes."""
    worker = Worker(make_model(kind), kind, [9], layers=1)
    for index in range(len(worker.caches)):
        caches = list(worker.caches)
        caches[index] = None
        with pytest.raises(ValueError, match=rf"caches\[{index}\]: expected a tensor, got None"):
            worker.step([5], caches=caches)
        caches[index] = worker.on(np.zeros((3, 3), np.float64))
        with pytest.raises((ValueError, TypeError), match="cache"):
            worker.step([5], caches=caches)
    with pytest.raises(ValueError, match=r"the list has 1$"):
        worker.step([5], caches=worker.caches[:1])
    with pytest.raises(TypeError, match="int32"):
        worker.step([5], seq_lens_decoder=worker.on(np.zeros((2, 1), np.int64)))
    with pytest.raises(ValueError, match="max_len_tensor_cpu: expected shape"):
        worker.step([5], max_len_tensor_cpu=worker.on(np.zeros(3, np.int32)))
    with pytest.raises(ValueError, match="attn_mask_offsets: expected shape"):
        worker.step([5], attn_mask_offsets=worker.on(np.zeros(9, np.int32)))
    with pytest.raises(ValueError, match="mask_offsets"):
        worker.step([5], attn_mask_offsets=worker.on(np.zeros(8, np.int32)))
    meta = worker.make_meta(worker.metadata([5], [True], 5))
    worker.backend.init_attention_metadata(meta)
    for dtype in (np.float32, np.float16, np.int32):
        qkv = worker.on(np.zeros((5, 512), dtype))
        if kind is None or dtype != np.float16:
            with pytest.raises(TypeError, match="qkv: expected"):
                worker.layers[0](qkv=qkv, forward_meta=meta)
    with pytest.raises(ValueError, match="qkv: expected"):
        worker.layers[0](qkv=worker.on(np.zeros((5, 500), np.float16)), forward_meta=meta)
    worker.step([5])


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="this Paddle has no empty outputs")
def test_a_step_of_stopped_seqs(registered, place):
    worker = Worker(make_model("block_wise_fp8"), "block_wise_fp8", [9, 5], place)
    worker.step([5, 5])
    worker.step([0, 0])
    worker.step([0, 0], padding=4)


@pytest.mark.parametrize("fields", [{"pre_caches_length": 3}])
def test_a_step_with_something_else_is_refused(registered, fields):
    worker = Worker(make_model(None), None, [9])
    with pytest.raises(NotImplementedError, match=next(iter(fields))):
        worker.step([5], **fields)


def test_windows_of_some_layers(registered, place):
    """``window_attn_skip_freq`` lists the layers with the window, whatever the layer says."""
    model = make_model(None)
    worker = Worker(model, None, [30], place)
    config = worker.fd_config
    config.model_config.window_size = 8
    config.model_config.window_attn_skip_freq = [1, 0]
    worker.backend = chosen()(config, 2, 4, 64)
    arrays = worker.metadata([30], [True], 30)
    meta = worker.make_meta(arrays)
    worker.backend.init_attention_metadata(meta)
    for i, window in enumerate((8, 0)):
        model.window = window
        out = worker.layers[i](qkv=worker.on(worker.rank_qkv(i, [30], 0)), forward_meta=meta)
        worker.check(i, [30], to_numpy(out))
    worker.layers[0].layer_id = 2
    worker.caches += worker.caches[:2]
    with pytest.raises(ValueError, match="window_attn_skip_freq has 2 entries, got layer 2"):
        worker.layers[0](qkv=worker.on(worker.rank_qkv(0, [30], 0)), forward_meta=meta)
    config.model_config.window_attn_skip_freq = 4
    with pytest.raises(NotImplementedError, match="window_attn_skip_freq = 4"):
        chosen()(config, 2, 4, 64)


# --- tensor parallel heads -----------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 4, 2), (8, 2, 4), (8, 1, 8), (8, 8, 8)]
)
def test_bug15_every_rank_gives_its_heads(registered, kind, heads, kv_heads, size):
    """Unequal scales a head, given for the whole model (FP8) or for the rank's channels (INT8)."""
    model = make_model(kind, heads=heads, kv_heads=kv_heads)
    for rank in range(size):
        worker = Worker(model, kind, [70, 9], size=size, rank=rank, layers=1)
        worker.step([66, 3])
        worker.step([1, 5])


# --- CUDA graph ----------------------------------------------------------------------------------


@pytest.mark.gpu
@each_kind
def test_a_captured_decode_step(registered, place, kind):
    """Captured once; replayed for sequences that grow, rest and end, with padding tokens."""
    if place != "gpu":
        pytest.skip("a graph is captured on a GPU")
    from tests.attention.test_gpu_graph import capture

    worker = Worker(make_model(kind), kind, [200, 70, 90], place, layers=1)
    worker.step([120, 5, 63])
    tokens, new = 6, [1, 1, 1]
    held = worker.make_meta(worker.metadata(new, [False] * 3, tokens), step_use_cudagraph=True)
    qkv = worker.on(worker.rank_qkv(0, new, tokens - sum(new)))

    def run():
        worker.backend.init_attention_metadata(held)
        return worker.layers[0](qkv=qkv, forward_meta=held)

    run()
    with capture() as graph:
        out = run()
    for new in ([1, 1, 1], [3, 0, 1], [1, 4, 1], [0, 1, 0], [1, 1, 1]):
        arrays = worker.metadata(new, [False] * 3, tokens)
        for name, array in arrays.items():
            if name != "max_len_tensor_cpu":  # not refreshed for a replay
                getattr(held, name).copy_(worker.on(np.asarray(array, np.int32)), True)
        qkv.copy_(worker.on(worker.rank_qkv(0, new, tokens - sum(new))), True)
        graph.replay()
        worker.check(0, new, to_numpy(out), tokens - sum(new))
        worker.cached = [done + n for done, n in zip(worker.cached, new)]
    graph.reset()


def test_the_operators_are_loaded_in_this_process():
    assert _ops.load()
