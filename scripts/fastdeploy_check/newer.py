"""What FastDeploy's branch has after May 2026, brought into the runner of an older tree."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import paddle

from fastdeploy_check.serving import MAX_LEN, MODEL, Serving, Wrong, make_config, tolerable

NEOX = {"use_neox_rotary_style": True}
#: New tokens of each sequence: prefill, chunks, mixed, decode.
DAY = ([70, 20, 5, 64], [40, 9, 60, 1], [1, 17, 0, 1], [1, 1, 1, 1])


def cases() -> Any:
    """The cases, by their names."""
    yield "newer: an option that is not known", _unknown_option
    yield "newer: a field that is not known", _unknown_field
    yield "newer: swa_rope_theta", _own_tables
    for kind in (None, "int8", "float8_e4m3fn", "block_wise_fp8"):
        yield f"newer: a backend for each layer, {kind or 'none'}", lambda k=kind: _layerwise(k)


def _refused(run: Callable[[], Any], name: str) -> float:
    """Whether something is refused by its name."""
    try:
        run()
    except NotImplementedError as error:
        if name not in str(error):
            raise Wrong(f"{name} is not in the message: {error}") from None
        return 0.0
    raise Wrong(f"{name} was accepted")


def _unknown_option() -> float:
    for name in ("swa_head_dim", "attn_logit_softcapping", "enable_head_wise_kv_cache"):
        _refused(lambda name=name: Serving(make_config({name: 7}), None, **NEOX), name)
    return 0.0


def _unknown_field() -> float:
    server = Serving(make_config({}), None, **NEOX)
    server.step(DAY[0])
    meta = server.prepare(DAY[1], [n > 1 for n in DAY[1]])
    meta.block_tables_headwise = meta.block_tables
    backend = server.runner.attn_backends[0]
    return _refused(lambda: backend.init_attention_metadata(meta), "block_tables_headwise")


def _own_tables() -> float:
    """Layer 1 has a window and rotates by another table."""
    model = {"window_size": 24, "window_attn_skip_freq": [0, 1], "swa_rope_theta": 500000.0}
    config = make_config(model)
    server = Serving(config, None, **NEOX)
    rotary = importlib.import_module("fastdeploy.model_executor.layers.rotary_embedding")
    table = rotary.get_rope(
        rotary_dim=MODEL["head_dim"],
        position_ids=paddle.arange(MAX_LEN).reshape((1, -1)),
        base=500000.0,
        model_config=config.model_config,
        partial_rotary_factor=1.0,
    )
    server.models[0].window, server.models[1].table = 0, table.numpy()
    prepare = server.prepare

    def with_table(new: list[int], prefill: list[bool]) -> Any:
        meta = prepare(new, prefill)
        meta.swa_rotary_embs = table
        return meta

    server.prepare = with_table
    return max(server.step(new) for new in DAY)


def _layerwise(kind: str | None) -> float:
    """The runner makes one backend; here each layer has one, which the runner prepares."""
    config = make_config({}, kind)
    server = Serving(config, kind, **NEOX)
    first, layer = server.runner.attn_backends[0], server.layers[0]
    other = type(first)(config, layer.kv_num_heads, layer.num_heads, layer.head_dim, 64, 16)
    backends = [first, other]
    server.runner.attn_backends[:] = backends
    worst = 0.0
    for new in DAY:
        meta = server.prepare(new, [n > 1 for n in new])
        if first.get_attention_meta() is not other.get_attention_meta():
            raise Wrong("the backends prepared the step twice")
        for index, layer in enumerate(server.layers):
            meta.attn_backend = backends[index]
            with paddle.no_grad():
                out = layer(qkv=server.fused(index, new), forward_meta=meta)
            worst = max(worst, server.check(index, out, new))
        for slot, n in enumerate(new):
            server.cached[slot] += n
    return tolerable(worst)
