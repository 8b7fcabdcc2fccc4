"""The cases to run in FastDeploy's tree: functions that yield (name, run) and return an error."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle

from fastdeploy_check import architectures
from fastdeploy_check.serving import (
    BLOCKS,
    SLOTS,
    Serving,
    Wrong,
    load,
    make_config,
    make_layers,
    model_of,
    tolerable,
)

Case = tuple[str, Callable[[], float]]

KINDS = (None, "int8", "float8_e4m3fn", "block_wise_fp8")
OTHER_KINDS = ("int4_zp", "int8_zp", "float8_e4m3fn_zp", "float8_e4m3")
BACKENDS = ("APPEND_ATTN", "FLASH_ATTN", "FLASH_MASK_ATTN", "DECODE_UNIFIED_ATTN")
ERNIE = {"architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5"}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "neox D 128": ({}, {"use_neox_rotary_style": True}),
    "interleaved D 64": ({**ERNIE, "head_dim": 64, "num_attention_heads": 8}, {}),
}
#: Typical steps of a server: new tokens of each sequence, and which of them are in prefill.
STEPS: dict[str, tuple[list[int], list[bool]]] = {
    "prefill": ([70, 20, 5, 64, 1, 33, 9, 2], [True] * 8),
    "chunk": ([40, 9, 60, 1, 0, 0, 0, 0], [True, True, True, True, False, False, False, False]),
    "mixed": ([1, 17, 1, 0, 1, 30, 1, 1], [False, True, False, False, False, True, False, False]),
    "decode": ([1] * 8, [False] * 8),
    "drafts": ([3, 2, 3, 0, 1, 3, 3, 3], [False] * 8),
    "fewer sequences": ([1, 1, 1], [False] * 3),
    "fewer, mixed": ([1, 25, 0, 1, 1], [False, True, False, False, False]),
}


class NotRun(RuntimeError):
    """The case does not depend on the plug-in: this FastDeploy lacks it, or its model cannot be
    made here.
    """


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables, and reset FastDeploy's choice of a backend."""
    selecter = importlib.import_module(
        "fastdeploy.model_executor.layers.attention.attention_selecter"
    )
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    for name in ("_get_attn_backend", "get_attention_backend"):
        if hasattr(getattr(selecter, name, None), "cache_clear"):
            getattr(selecter, name).cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Later:
    """A server that the first of its cases makes and the others share."""

    def __init__(self, make: Callable[[], Serving]) -> None:
        self._make, self._made, self._error = make, None, None

    def get(self) -> Serving:
        """The server, or the error that its creation raised."""
        if self._error is not None:
            raise self._error
        if self._made is None:
            try:
                self._made = self._make()
            except Exception as error:
                self._error = error
                raise
        return self._made


def steps(label: str, make: Callable[[], Serving]) -> Iterator[Case]:
    """The steps as cases."""
    server = Later(make)
    for name, (new, prefill) in STEPS.items():
        yield f"{label}: {name}", lambda new=new, prefill=prefill: server.get().step(new, prefill)


def caches() -> Iterator[Case]:
    """All combinations of cache types, layouts and steps."""
    for label, (model, options) in LAYOUTS.items():
        for kind in KINDS:
            yield from steps(
                f"{kind or 'none'}, {label}",
                lambda m=model, o=options, k=kind: Serving(make_config(m, k), k, **o),
            )
    for kind in OTHER_KINDS:

        def other(kind: str = kind) -> float:
            return Serving(make_config({}, kind), kind).step(*STEPS["prefill"])

        yield f"{kind}, neox D 128: prefill", other


def backends() -> Iterator[Case]:
    """Every name of a backend."""
    for name in BACKENDS:

        def run(name: str = name) -> float:
            platforms = importlib.import_module("fastdeploy.platforms")
            if name not in platforms._Backend.__members__:
                raise NotRun("this FastDeploy has no such backend")
            with environment(FD_ATTENTION_BACKEND=name):
                server = Serving(make_config({}, "int8"), "int8", use_neox_rotary_style=True)
                module = type(server.runner.attn_backends[0]).__module__
                if not module.startswith("fastattn"):
                    raise Wrong(f"{name} is FastDeploy's own {module}")
                return max(server.step(*STEPS["prefill"]), server.step(*STEPS["decode"]))

        yield f"backend {name}", run


def _day(model: Any, kind: str | None = None, layer: Any = None, **options: Any) -> float:
    server = Serving(make_config(model, kind, **options), kind, **(layer or {}))
    return max(server.step(*STEPS[name]) for name in ("prefill", "chunk", "fewer, mixed"))


NEOX = {"use_neox_rotary_style": True}


def options() -> Iterator[Case]:
    """Features of models, layers and servers."""
    norm = {"use_qk_norm": True}
    half = {**ERNIE, "partial_rotary_factor": 0.5}
    spin = {"rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"}}
    cases: dict[str, Callable[[], float]] = {
        "q/k norm after the rotation": lambda: _day({}, "int8", {**NEOX, **norm}),
        "q/k norm before the rotation": lambda: _day(
            {}, "int8", {**NEOX, **norm, "qk_norm_before_rope": True}
        ),
        "sinks": lambda: _day({}, None, {**NEOX, "with_sinks": True}),
        "sliding_window of a layer": lambda: _day(architectures.GPT_OSS, None, NEOX),
        "window_size of the model": lambda: _day({"window_size": 24}, None, NEOX),
        "window_attn_skip_freq, a list": _window_of_some_layers,
        "head_wise_swa_ratio": lambda: _day(
            {"head_wise_swa_ratio": 0.5, "window_size": 24}, None, NEOX
        ),
        "sink_size": lambda: _day({"sink_size": 4, "window_size": 24}, None, NEOX),
        "head_wise_swa_ratio and sink_size": lambda: _day(
            {"head_wise_swa_ratio": 0.5, "sink_size": 4, "window_size": 24}, "int8", NEOX
        ),
        "attn_mask, trees of drafts": _trees,
        "not causal": lambda: _not_causal(),
        "partial rotary, ERNIE": lambda: _day(half),
        "partial rotary, GLM": lambda: _day(
            {**architectures.fields_of("Glm4MoeForCausalLM")}, None, NEOX
        ),
        "mrope_section of a text model": lambda: _day(spin, None, NEOX),
        "tensor parallel, rank 1 of 2": lambda: _day(
            {}, "float8_e4m3fn", NEOX, tensor_parallel_size=2, rank=1
        ),
        "tensor parallel, INT8": lambda: _day({}, "int8", NEOX, tensor_parallel_size=2, rank=1),
        "CUDA graphs": lambda: _day(
            {}, "int8", NEOX, graph_optimization_config={"use_cudagraph": True}
        ),
        "CUDA graph of all slots, fewer run": _replay,
        "full_cuda_graph false": _piecewise,
        "deterministic mode": _deterministic,
        "scales through the v1 loader": _second_loader,
        "two-batch overlap": _micro_batches,
        "attn_mask_offsets": lambda: _offsets(split=False),
        "attn_mask_offsets, two-batch overlap": lambda: _offsets(split=True),
        "block_size 32": lambda: _day({}, None, NEOX, block_size=32),
        "lengths that the host does not know": _unknown_lengths,
    }
    for kind in KINDS:
        cases[f"a rotary table for each slot, {kind or 'none'}"] = lambda k=kind: _day(
            architectures.fields_of("Qwen2_5_VLForConditionalGeneration"), k, NEOX
        )
    yield from cases.items()


def _window_of_some_layers() -> float:
    """FastDeploy keeps the list here and gives every layer the window."""
    model = {"window_size": 24, "window_attn_skip_freq": [0, 1]}
    server = Serving(make_config(model), None, **NEOX)
    server.models[0].window = 0
    return max(server.step(*STEPS[name]) for name in ("prefill", "chunk", "fewer, mixed"))


def _not_causal() -> float:
    config = make_config({})
    config.model_config.causal = False
    server = Serving(config, None, **NEOX)
    return server.step(*STEPS["prefill"])


def _replay() -> float:
    """The data that a captured graph reads in later steps: the same memory, with the shapes of the
    capture.
    """
    graphs = {"use_cudagraph": True}
    server = Serving(make_config({}, "int8", graph_optimization_config=graphs), "int8", **NEOX)
    names = ("cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time", "block_tables")
    captured = server.prepare([1] * SLOTS, [False] * SLOTS)
    tensors = {name: getattr(captured, name) for name in names}
    # FastDeploy reshapes its own tensors
    views = {name: x.view(x.shape) for name, x in tensors.items()}
    worst = 0.0
    for new in ([9, 30, 5, 2, 7, 1, 1, 1], [1, 1, 1], [3, 3], [0, 0, 0, 1, 1, 1], [1, 1]):
        meta = server.prepare(new, [n > 3 for n in new])
        meta.__dict__.update(views)
        starts = views["cu_seqlens_q"].numpy()
        if (np.diff(starts) < 0).any() or (starts[len(new) + 1 :] < sum(new)).any():
            raise Wrong(f"a replay would read stale starts: {starts.tolist()} for {new}")
        with paddle.no_grad():
            out = server.layers[0](qkv=server.fused(0, new), forward_meta=meta)
        worst = max(worst, server.check(0, out, new))
        for slot, n in enumerate(new):
            server.cached[slot] += n
    return tolerable(worst)


def _piecewise() -> float:
    graphs = {"use_cudagraph": True, "full_cuda_graph": False, "graph_opt_level": 0}
    error = _day({}, "int8", NEOX, graph_optimization_config=graphs)
    flag = "FLAGS_cuda_graph_blacklist"
    if "fastattn_attention_step" not in str(paddle.get_flags(flag)[flag]):
        raise Wrong("the operators are not on FLAGS_cuda_graph_blacklist")
    return error


def _deterministic() -> float:
    """The mode reaches the backend. A sequence has the same bits alone and among others."""
    found, worst = [], 0.0
    with environment(FD_DETERMINISTIC_MODE="1"):
        for count in (SLOTS, 1):
            server = Serving(make_config({}, "int8"), "int8", **NEOX)
            if not server.runner.attn_backends[0].batch_invariant:
                raise Wrong("the backend is not batch_invariant")
            worst = max(worst, server.step(STEPS["prefill"][0][:count], [True] * count))
            meta = server.prepare([1] * count, [False] * count)
            with paddle.no_grad():
                out = server.layers[0](qkv=server.fused(0, [1] * count), forward_meta=meta)
            found.append(out.numpy()[0])
    if (found[0] != found[1]).any():
        raise Wrong("the bits of a sequence depend on the batch")
    return worst


def _unknown_lengths() -> float:
    """FastDeploy's backends fill in lengths on the host; nobody does so for these."""
    server, worst = Serving(make_config({}, "int8"), "int8", **NEOX), 0.0
    for new, prefill in STEPS.values():
        worst = max(worst, server.step(new, prefill))
        if server.runner.attn_backends[0].attention_metadata.host_lengths is not None:
            raise Wrong("the host has lengths in this FastDeploy")
    return worst


def _second_loader() -> float:
    """Scales through the parameters' ``weight_loader``, then ``process_weights_after_loading``."""
    kind = "float8_e4m3fn"
    config = make_config({}, kind)
    layers = make_layers(config, **NEOX)
    rng = np.random.default_rng(17)
    for layer in layers:
        for name in ("cache_k_scale", "cache_v_scale"):
            parameter = getattr(layer, name)
            loaded = paddle.to_tensor(rng.uniform(3, 7, parameter.shape).astype(np.float32))
            layer.weight_loader(parameter, loaded)
        layer.quant_method.process_weights_after_loading(layer)
    server = Serving(config, kind, layers)
    return max(server.step(*STEPS["prefill"]), server.step(*STEPS["fewer, mixed"]))


def _split(server: Serving, meta: Any) -> list[Any]:
    """FastDeploy's own split of a step into two micro-batches."""
    tbo = importlib.import_module("fastdeploy.worker.tbo")
    runner = importlib.import_module("fastdeploy.worker.gpu_model_runner")
    buffers = getattr(runner, "GLOBAL_ATTN_BUFFERS", tbo.GLOBAL_ATTN_BUFFERS)
    buffers.update({0: {}, 1: {}})
    server.config.model_config.image_patch_id = -12345
    meta.hidden_states = paddle.zeros([sum_of(meta), 1])
    meta.decode_states = paddle.zeros([SLOTS, 1])
    parts = tbo.split_batch_decoder_layers(meta, server.config)
    if len(parts) != 2 or not all(map(sum_of, parts)):
        raise Wrong(f"FastDeploy made micro-batches of {[sum_of(x) for x in parts]} tokens")
    return parts


def _by_parts(server: Serving, index: int, new: list[int], parts: list[Any]) -> Any:
    fused, outs, start = server.fused(index, new), [], 0
    for part in parts:
        count = sum_of(part)
        with paddle.no_grad():
            outs.append(server.layers[index](qkv=fused[start : start + count], forward_meta=part))
        start += count
    return paddle.concat(outs)


def sum_of(meta: Any) -> int:
    """Number of tokens of a step."""
    return int(meta.ids_remove_padding.shape[0])


#: New tokens of a step that is split: the split requires 1024 or more.
LONG = [150, 130, 140, 120, 128, 150, 140, 130]


def _micro_batches() -> float:
    server = Serving(make_config({}, "int8"), "int8", **NEOX)
    server.step(*STEPS["chunk"])
    meta = server.prepare(LONG, [True] * SLOTS)
    worst = 0.0
    for index in range(len(server.layers)):
        out = _by_parts(server, index, LONG, _split(server, meta))
        worst = max(worst, server.check(index, out, LONG))
    return tolerable(worst)


def _offsets(split: bool) -> float:
    """Masks of image tokens: the tokens of a group of 4 see each other. No split cuts a group."""
    server = Serving(make_config({}, "int8"), "int8", **NEOX)
    new = LONG if split else [40, 20, 70]
    meta = server.prepare(new, [True] * len(new))
    ends = [np.minimum(np.arange(n) // 4 * 4 + 4, n) for n in new]
    pairs = np.stack([np.zeros(sum(new)), np.concatenate(ends)], 1).reshape(-1).astype(np.int32)
    meta.attn_mask_offsets = paddle.to_tensor(pairs)
    for backend in server.runner.attn_backends:
        backend.init_attention_metadata(meta)
    worst = 0.0
    for index in range(len(server.layers)):
        out = _by_parts(server, index, new, _split(server, meta) if split else [meta])
        worst = max(worst, server.check(index, out, new, ends))
    return tolerable(worst)


def _trees() -> float:
    """A step whose new tokens are branches of drafts: each sees one of the two before it."""
    server = Serving(make_config({}, "int8"), "int8", **NEOX)
    server.step(*STEPS["prefill"])
    new = [5, 1, 7, 4]
    size = 8
    seen = np.eye(size, dtype=bool)
    for token in range(1, size):
        seen[token] |= seen[max(token - 2, 0)]
    seen[:, 0] = True
    trees = np.repeat(seen[None], len(new), axis=0)
    meta = server.prepare(new, [False] * len(new))
    meta.attn_mask = paddle.to_tensor(~trees)
    for backend in server.runner.attn_backends:
        backend.init_attention_metadata(meta)
    worst = 0.0
    for index, layer in enumerate(server.layers):
        with paddle.no_grad():
            out = layer(qkv=server.fused(index, new), forward_meta=meta)
        worst = max(worst, server.check(index, out, new, trees=trees))
    return tolerable(worst)


def drafts() -> Iterator[Case]:
    """The proposer of multi-token prediction, with its own backend, caches and ForwardMeta."""
    for kind in KINDS:
        yield f"MTP, {kind or 'none'}", lambda kind=kind: _propose(kind)


def _propose(kind: str | None) -> float:
    module = importlib.import_module("fastdeploy.spec_decode.mtp")
    model = {**ERNIE, "num_nextn_predict_layers": 1}
    config = make_config(model, kind)
    folder = config.model_config.model
    config = make_config(
        model,
        kind,
        speculative_config={
            "method": "mtp",
            "num_speculative_tokens": 1,
            "num_model_steps": 1,
            "model": folder,
        },
    )
    server = Serving(config, kind)
    module.MTPProposer._load_model = lambda self: None
    server.runner.model = None
    server.runner._init_speculative_proposer()
    proposer = server.runner.proposer
    proposer.initialize_kv_cache(BLOCKS)
    inputs = proposer.model_inputs
    draft = make_layers(proposer.fd_config, 1)
    main = server.layers, server.models
    table = inputs["rope_emb"].numpy()
    models = [model_of(draft[0], proposer.fd_config, table, kind)]
    worst = 0.0
    for name in ("prefill", "mixed", "drafts", "fewer sequences"):
        new, prefill = STEPS[name]
        before = list(server.cached)
        meta = server.prepare(new, prefill)
        for field in ("seq_lens_this_time", "seq_lens_encoder", "seq_lens_decoder", "block_tables",
                      "cu_seqlens_q", "cu_seqlens_k", "batch_id_per_token",
                      "ids_remove_padding"):  # fmt: skip
            inputs[field] = getattr(meta, field)
        inputs["seq_lens_decoder"] = server.inputs["seq_lens_decoder"]
        inputs["block_tables"] = server.inputs["block_tables"]
        proposer._initialize_forward_meta()
        proposer.forward_meta.step_use_cudagraph = name == "drafts"  # MTP sets it after init
        server.layers, server.models = draft, models
        with paddle.no_grad():
            out = draft[0](qkv=server.fused(0, new), forward_meta=proposer.forward_meta)
        worst = max(worst, server.check(0, out, new))
        server.layers, server.models = main
        server.cached = [a + b for a, b in zip(before, [*new, *[0] * (SLOTS - len(new))])]
    return tolerable(worst)


def registered() -> Iterator[Case]:
    """Every architecture that FastDeploy registers, with layers from its own model."""
    for name in architectures.architectures():

        def run(name: str = name) -> float:
            fields = architectures.fields_of(name)
            mla = any(part in name for part in ("Deepseek", "Dsa", "Lite"))
            if mla:
                raise NotRun("latent attention: the group latent has it")
            try:
                config = make_config(fields)
                layers = architectures.attention_layers(name, config)
            except Exception as error:
                raise NotRun(f"{type(error).__name__}: {error}") from error
            if not layers:
                raise NotRun("its model makes no layer here")
            config.model_config.num_hidden_layers = max(x.layer_id for x in layers) + 1
            for layer in layers:
                load(layer)
            server = Serving(config, None, layers)
            return max(server.step(*STEPS[step]) for step in ("prefill", "fewer, mixed"))

        yield name, run


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "caches": caches,
    "backends": backends,
    "options": options,
    "drafts": drafts,
    "architectures": registered,
}
