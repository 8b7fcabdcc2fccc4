"""Batch-invariant steps of the backends: what turns them on, and what carries the option."""

from __future__ import annotations

import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops
from fastattn.backends import FlashAttentionBackend, ForwardMeta, make_config
from fastattn.backends import paged as paged_backend
from tests.attention.test_batch_invariant import batch_of
from tests.server.test_backends import BACKENDS
from tests.support.attention import BLOCK_WISE_FP8, paged_problem
from tests.support.compare import assert_same_bits
from tests.support.serving import Model, Server
from tests.support.static import run_all_modes

VARIABLE = "FD_DETERMINISTIC_MODE"


def make(backend=FlashAttentionBackend, **options):
    return backend(make_config(max_model_len=512), 2, 4, 64, **options)


@pytest.fixture(autouse=True)
def _no_mode(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("mode, on", [(None, False), ("0", False), ("1", True), ("2", True)])
def test_fastdeploys_variable(monkeypatch, backend, mode, on):
    if mode is not None:
        monkeypatch.setenv(VARIABLE, mode)
    assert make(backend, encoder_block_shape_q=64, decoder_block_shape_q=16).batch_invariant is on


def test_a_variable_that_is_no_int(monkeypatch):
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"FD_DETERMINISTIC_MODE: expected an int, got 'yes'"):
        make()


@pytest.mark.parametrize("shape, on", [(-1, False), (16, False), (32, True), (1, True)])
def test_the_block_shape_of_fastdeploys_mode(shape, on):
    """FastDeploy passes 16 but in its mode, where it passes FD_DETERMINISTIC_SPLIT_KV_SIZE."""
    assert make(decoder_block_shape_q=shape).batch_invariant is on


def test_the_option_counts_more(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    assert make(batch_invariant=False, decoder_block_shape_q=32).batch_invariant is False
    monkeypatch.delenv(VARIABLE)
    assert make(batch_invariant=True).batch_invariant is True


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_every_step_carries_it(monkeypatch, on, direct):
    """In the attributes of a layer's bound call, and in those of a call without it."""
    seen = []
    if direct:
        if _ops.helpers() is None:
            pytest.skip("fastattn._direct was not built")
        bind = _ops.bound
        watch = lambda op, fixed, names: (  # noqa: E731
            seen.append(fixed["batch_invariant"]),
            bind(op, fixed, names),
        )[1]
        monkeypatch.setattr(_ops, "bound", watch)
    else:
        call, at = _ops.call, _ops.signature("attention_step").attr_names.index("batch_invariant")

        def watch(op, inputs, attrs=()):
            seen.append(attrs[at])
            return call(op, inputs, attrs)

        monkeypatch.setattr(_ops, "call", watch)
    if on:
        monkeypatch.setenv(VARIABLE, "1")
    server = Server(FlashAttentionBackend, Model("block_wise_fp8", "e4m3"), [40, 30])
    for new in ([30, 20], [1, 1], [1, 3]):
        server.step(new)
    assert seen and set(seen) == {on}


def test_a_shared_prefix_is_refused():
    backend = make(batch_invariant=True)
    meta = paged_backend.AttentionMetadata()
    meta.cascade_plan = object()
    with pytest.raises(NotImplementedError, match=r"cascade_plan is not supported with batch_inv"):
        backend.init_attention_metadata(meta)


def test_a_cascade_is_refused():
    plan = F.plan_cascade([[0, 1], [0, 2]], [64, 64], [1, 1], 64)
    caches = [paddle.zeros([3, 1, 64, 64], "bfloat16") for _ in "kv"]
    ints = [paddle.to_tensor(x, dtype="int32") for x in ([0, 1, 2], [1, 1])]
    q = paddle.ones([2, 1, 64], "bfloat16")
    with pytest.raises(NotImplementedError, match="cascade_attention: batch_invariant: True"):
        F.cascade_attention(q, *caches, plan, *ints, 1, 65, batch_invariant=True)


def invariant(q, key, value, tables, cu, decoder, this_time, k_scales, v_scales):
    return F.paged_attention(
        q,
        key,
        value,
        tables,
        cu,
        decoder,
        this_time,
        40,
        1024,
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        cache_quant_type="block_wise_fp8",
        return_softmax_lse=True,
        batch_invariant=True,
    )


def test_programs_carry_it(place):
    """Traced, compiled, saved and loaded, with the bits of dygraph and those of a lone sequence."""
    problem = paged_problem([(700, 1), (300, 5), (900, 1)], kind=BLOCK_WISE_FP8, seed=2)
    arrays = [problem.q, problem.k.packed(), problem.v.packed(), problem.block_tables]
    arrays += [problem.cu_seqlens_q, problem.seq_lens_decoder, problem.seq_lens_this_time]
    (out, _), _ = run_all_modes(invariant, [*arrays, problem.k.scales, problem.v.scales], place)
    alone = batch_of(problem, [2])
    assert_same_bits(alone.run(place, batch_invariant=True)[0], out[6:], "alone")


def test_no_guess_of_a_steps_kind():
    """A bound that is too small would choose other tiles for a sequence, by what is beside it."""
    tables = paddle.zeros([64, 8], "int32")
    seqs = (tables, paddle.zeros([65], "int32"), None, None)
    meta = ForwardMeta(exist_prefill=False)

    def guess(**options):
        known = paged_backend.PagedAttentionMetadata()
        found = [make(**options)._guess_lengths(60, seqs, meta, known) for _ in range(2)]
        assert found[0] is found[1]
        return found[0]

    assert guess() == (1, 512)
    assert guess(batch_invariant=True) == (60, 512)
