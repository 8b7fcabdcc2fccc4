"""A model whose attention is a backend's, as the program that FastDeploy makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from fastattn.backends import FlashAttentionBackend, make_config
from tests.support.compare import assert_same_bits
from tests.support.fastdeploy import (  # noqa: F401 (fixtures)
    KINDS,
    Worker,
    fastdeploy,
    make_fd_config,
    make_model,
    registered,
)
from tests.support.graph_optimization import (  # noqa: F401 (fixture)
    Broken,
    Optimized,
    forget_translations,
    operators_run,
    sot_of_fastdeploy,
)
from tests.support.tensors import int32, to_numpy

pytestmark = pytest.mark.usefixtures("registered", "sot_of_fastdeploy")

#: Steps of a server: new tokens of each sequence, and whether it is in prefill.
WARM_UP = [([9, 7, 5], True), ([1, 1, 1], False), ([64, 1], True)]
LATER = [([1, 1, 0], False), ([30], True), ([2, 3, 1], False), ([1], False)]


class Model(paddle.nn.Layer):
    """Layers of attention whose fused projections are given."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = paddle.nn.LayerList(layers)

    def forward(self, fused, forward_meta):
        return [
            layer(qkv=fused[index], forward_meta=forward_meta)
            for index, layer in enumerate(self.layers)
        ]


def make_worker(
    monkeypatch: pytest.MonkeyPatch,
    kind: str | None,
    level: int = 1,
    *,
    graphs: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Worker:
    def with_level(*args: Any, **given: Any) -> SimpleNamespace:
        made = make_fd_config(*args, **given)
        made.graph_opt_config = SimpleNamespace(graph_opt_level=level, **(graphs or {}))
        vars(made.model_config).update(config or {})
        return made

    monkeypatch.setattr("tests.support.fastdeploy.make_fd_config", with_level)
    return Worker(make_model(kind, **(model or {})), kind, [150, 90, 40], **options)


def offsets_of(worker: Worker, new: list[int]) -> Any:
    """Causal masks as offsets, one dimension as FastDeploy has it."""
    parts = [done + np.arange(n) + 1 for done, n in zip(worker.cached, new)]
    ends = np.concatenate(parts)
    return int32(np.stack([np.zeros_like(ends), ends], 1).reshape(-1), "cpu")


def inputs_of(worker: Worker, new: list[int], prefill: bool, masked: bool, padding: int) -> Any:
    """Arguments of the model for a step that has begun."""
    flags = [prefill and n > 1 for n in new]
    fields = {"attn_mask_offsets": offsets_of(worker, new)} if masked else {}
    meta = worker.make_meta(worker.metadata(new, flags, sum(new) + padding), **fields)
    worker.backend.init_attention_metadata(meta)
    meta.__dict__["exist_prefill"] = any(flags)
    fused = [worker.on(worker.rank_qkv(i, new, padding)) for i in range(len(worker.layers))]
    return fused, meta


def serve(plain: Worker, other: Worker, level: int = 1, masked: bool = False) -> Optimized:
    """Run a day on two servers; the second one runs a program. Both are checked."""
    models = [Model(worker.layers) for worker in (plain, other)]
    program = Optimized(models[1], level)
    for step, (new, prefill) in enumerate([*WARM_UP, *LATER]):
        padding = 0 if masked else step % 2
        run = program.warm_up if step < len(WARM_UP) else program
        with paddle.no_grad():
            expected = models[0].forward(*inputs_of(plain, new, prefill, masked, padding))
            got = run(*inputs_of(other, new, prefill, masked, padding))
        for index, (ours, theirs) in enumerate(zip(got, expected)):
            assert_same_bits(to_numpy(ours), to_numpy(theirs), f"step {step}, layer {index}")
            other.check(index, new, to_numpy(ours), padding)
        for worker in (plain, other):
            worker.cached = [a + b for a, b in zip(worker.cached, [*new, 0, 0])]
    for index, (ours, theirs) in enumerate(zip(other.caches, plain.caches)):
        assert_same_bits(to_numpy(ours), to_numpy(theirs), f"cache {index}")
    return program


def both(monkeypatch: pytest.MonkeyPatch, kind: str | None, **options: Any) -> list[Worker]:
    level = options.pop("level", 1)
    return [make_worker(monkeypatch, kind, x, **options) for x in (0, level)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "offsets"])
def test_a_program_has_the_bits_of_dygraph(monkeypatch, kind, masked):
    serve(*both(monkeypatch, kind), masked=masked)


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"neox": True}},
        {"model": {"norm": True}},
        {"size": 2, "rank": 1},
        {"passed": "all"},
        {"shared": 1},
        {"graphs": {"use_cudagraph": True, "full_cuda_graph": True}},
    ],
    ids=["neox", "norm", "tensor-parallel", "all-slots", "prefix", "decode-only"],
)
def test_a_program_of_other_servers(monkeypatch, options):
    serve(*both(monkeypatch, "float8_e4m3fn", **options))


def test_level_2(monkeypatch):
    """CINN, or without CINN in this Paddle the same program as for level 1."""
    serve(*both(monkeypatch, "block_wise_fp8", level=2), level=2)


class Layerwise(Model):
    """The same with a backend for each layer, as FastDeploy's branch of June 2026 has it."""

    def forward(self, fused, forward_meta):
        return [
            forward_meta.attn_backends[index].forward(
                None, None, None, fused[index], None, None, layer, forward_meta
            )
            for index, layer in enumerate(self.layers)
        ]


def test_a_backend_for_each_layer(monkeypatch):
    plain, other = both(monkeypatch, "int8")
    backends = [other.backend, type(other.backend)(other.fd_config, 2, 4, 64)]
    model = Layerwise(other.layers)
    program = Optimized(model)
    for step, new in enumerate(([9, 7, 5], [20, 1, 4], [1, 1, 1], [2])):
        fused, meta = inputs_of(other, new, True, False, 0)
        meta.attn_backends = backends
        backends[1].init_attention_metadata(meta)
        with paddle.no_grad():
            got = (program.warm_up if step < 2 else program)(fused, meta)
            expected = Model(plain.layers).forward(*inputs_of(plain, new, True, False, 0))
        for index, (ours, theirs) in enumerate(zip(got, expected)):
            assert_same_bits(to_numpy(ours), to_numpy(theirs), f"step {step}, layer {index}")
        for worker in (plain, other):
            worker.cached = [a + b for a, b in zip(worker.cached, [*new, 0, 0])]
    assert [sorted(x._programs.layers) for x in backends] == [[0], [1]]


def test_tokens_past_those_of_the_step(monkeypatch):
    """A graph of a part of a program was captured for more tokens than a later step has."""
    plain, other = both(monkeypatch, "block_wise_fp8")
    program = Optimized(Model(other.layers))
    for step, (new, captured) in enumerate((([9, 7, 5], 24), ([20, 1], 24), ([1, 1, 1], 4))):
        padding = captured - sum(new)
        args = [inputs_of(worker, new, True, False, padding) for worker in (plain, other)]
        args[1][1].batch_id_per_token = args[1][1].batch_id_per_token[: sum(new)]
        with paddle.no_grad():
            expected = Model(plain.layers).forward(*args[0])
            got = (program if step == 2 else program.warm_up)(*args[1])
        for index, (ours, theirs) in enumerate(zip(got, expected)):
            assert_same_bits(to_numpy(ours), to_numpy(theirs), f"step {step}, layer {index}")
            other.check(index, new, to_numpy(ours), padding)
        for worker in (plain, other):
            worker.cached = [a + b for a, b in zip(worker.cached, [*new, 0, 0])]
    for index, (ours, theirs) in enumerate(zip(other.caches, plain.caches)):
        assert_same_bits(to_numpy(ours), to_numpy(theirs), f"cache {index}")


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "offsets"])
def test_layers_with_a_window(monkeypatch, masked):
    config = {"window_size": 24, "window_attn_skip_freq": [1, 1]}
    workers = both(monkeypatch, "int8", config=config, model={"window": 24})
    serve(*workers, masked=masked)


def test_the_operators_of_a_program_can_be_left_out_of_graphs(monkeypatch):
    """FastDeploy's graphs of parts of a program leave out the operators on Paddle's list."""
    flag = "FLAGS_cuda_graph_blacklist"
    flags = {flag: "pd_op.matmul"}
    graphs = {"use_cudagraph": True, "full_cuda_graph": False}
    with monkeypatch.context() as patched:
        patched.setattr(paddle, "get_flags", lambda name: {name: flags[name]})
        patched.setattr(paddle, "set_flags", flags.update)
        worker = make_worker(monkeypatch, "block_wise_fp8", graphs=graphs)
    program = Optimized(Model(worker.layers))
    called: set[str] = set()
    with paddle.no_grad(), operators_run(called):
        program.warm_up(*inputs_of(worker, [9, 7, 5], True, False, 0))
    assert {name.rstrip("_") for name in called} == {"custom_op.fastattn_attention_step"}
    assert called <= set(flags[flag].split(","))


def test_the_wrapper_refuses_what_breaks_off(monkeypatch):
    """A backend of a server without programs reads what differs between steps."""
    worker = make_worker(monkeypatch, None, 0)
    program = Optimized(Model(worker.layers))
    with paddle.no_grad(), pytest.raises(Broken):
        for new, prefill in WARM_UP:
            program.warm_up(*inputs_of(worker, new, prefill, False, 0))


def test_a_comparison_with_other_keys_fails(monkeypatch):
    """The comparison of two servers is not trivially true."""
    plain, other = both(monkeypatch, None)
    other.caches[0].set_value(other.caches[0] + 1)
    other.tokens = [x + x.dtype.type(1) for x in other.tokens]
    with pytest.raises(AssertionError, match="step 0, layer 0"):
        serve(plain, other)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"attn_mask_offsets": "offsets"}, "attn_mask_offsets = a tensor of rank 1: .* None"),
        ({"rotary_embs": None}, "rotary_embs = None: .* a tensor of rank 5"),
        ({"rope_already_applied": True}, "rope_already_applied = True: .* False"),
        ({"cascade_plan": ()}, "cascade_plan is not supported with"),
    ],
)
def test_a_step_for_which_programs_were_not_made_is_refused(monkeypatch, fields, text):
    worker = make_worker(monkeypatch, None)
    program = Optimized(Model(worker.layers))
    with paddle.no_grad():
        program.warm_up(*inputs_of(worker, [9, 7, 5], True, False, 0))
    meta = inputs_of(worker, [1, 1, 1], False, False, 0)[1]
    given = {k: offsets_of(worker, [1, 1, 1]) if v == "offsets" else v for k, v in fields.items()}
    meta.__dict__.update(given)
    with pytest.raises(NotImplementedError, match=rf"forward_meta\.{text}"):
        worker.backend.init_attention_metadata(meta)


@pytest.mark.parametrize(
    ("level", "options", "text"),
    [
        (3, {}, "graph_opt_level = 3 is not supported; supported: 0, 1, 2"),
        (1, {"q_quant": "auto"}, "q_quant = 'auto' is not supported; .* = 1: none"),
    ],
)
def test_what_no_program_has_is_refused(level, options, text):
    config = make_config(max_model_len=512)
    config.graph_opt_config = SimpleNamespace(graph_opt_level=level)
    with pytest.raises(NotImplementedError, match=text):
        FlashAttentionBackend(config, 2, 4, 64, **options)


def test_a_prefill_server_that_signals_is_refused(monkeypatch):
    monkeypatch.setenv("FLAGS_fmt_write_cache_completed_signal", "1")
    config = make_config(max_model_len=512)
    config.graph_opt_config = SimpleNamespace(graph_opt_level=1)
    config.parallel_config = SimpleNamespace(pd_disaggregation_mode="per_query")
    with pytest.raises(NotImplementedError, match=r"graph_opt_level = 1 .* signals"):
        FlashAttentionBackend(config, 2, 4, 64)


@pytest.mark.parametrize("kind", ["int8", "block_wise_fp8"])
def test_without_programs_sot_runs_the_backend_itself(monkeypatch, kind):
    """SOT breaks off at a backend of a server without programs, and keeps its guards."""
    plain, other = both(monkeypatch, kind, level=0)
    forget_translations()
    traced = paddle.jit.to_static(Model(other.layers), full_graph=False)
    for new in ([9, 7, 5], [1, 1, 1], [20, 1]):
        with paddle.no_grad():
            expected = Model(plain.layers).forward(*inputs_of(plain, new, True, False, 0))
            got = traced(*inputs_of(other, new, True, False, 0))
        for index, (ours, theirs) in enumerate(zip(got, expected)):
            assert_same_bits(to_numpy(ours), to_numpy(theirs), f"{new}, layer {index}")
        for worker in (plain, other):
            worker.cached = [a + b for a, b in zip(worker.cached, [*new, 0, 0])]
    assert other.backend._programs is None
