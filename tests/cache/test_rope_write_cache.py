"""rope_write_cache_kv against the NumPy model: Q, cache bytes and scales bit by bit."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import fastattn.functional as F
from fastattn.reference import rope as model
from fastattn.reference.numerics import quantize
from tests.support.cache import Step, make_values
from tests.support.compare import assert_same_bits, assert_within
from tests.support.rope import (
    CACHES,
    QUANTS,
    assert_same_cache,
    check,
    check_all_modes,
    expected,
    make_case,
    many_seqs,
    run,
)
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, DTYPES, EMPTY_OUTPUTS, to_numpy, to_paddle

# The model itself, against the definition in fp64.


@pytest.mark.parametrize("neox", [False, True])
def test_model_rotates_by_the_angle_of_the_position(neox):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 64)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 255])
    table = model.make_rotary_embs(256, 64, theta=1000.0, neox=neox)
    cos, sin = model.angles_of(table, positions, 64, neox=neox)
    pairs = x.reshape(5, 3, 2, 32).swapaxes(2, 3) if neox else x.reshape(5, 3, 32, 2)
    angle = positions[:, None, None] * 1000.0 ** (-np.arange(32) / 32)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    wanted = np.stack([turned.real, turned.imag], -1)
    wanted = wanted.swapaxes(2, 3) if neox else wanted
    assert_within(
        model.rotate(x, cos, sin, neox=neox), wanted.reshape(x.shape), 4e-6 * np.abs(x).max()
    )


def test_model_normalises_to_the_weight():
    x = np.random.default_rng(0).normal(size=(7, 128)).astype(np.float32) * 10
    weight = np.linspace(0.1, 2, 128)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight
    actual = model.rms_norm(x, weight.astype(np.float32), 1e-6)
    assert_within(actual, wanted, 2e-6 * np.abs(wanted))


# The operator.


@pytest.mark.parametrize("q_quant", QUANTS)
@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_ragged_seqs(place, head_dim, cache, q_quant):
    check(
        make_case(
            [0, 63, 5, 130, 64, 0],
            [65, 1, 0, 7, 3, 1],
            cache=cache,
            head_dim=head_dim,
            q_quant=q_quant,
            bias=True,
            norm=True,
        ),
        place,
    )


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 32, 2])
@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_styles_and_norms(place, dtype, neox, rotary_dim, norm, norm_first):
    case = make_case(
        [3, 0],
        [5, 9],
        dtype=DTYPES[dtype],
        neox=neox,
        rotary_dim=rotary_dim,
        norm=norm,
        norm_first=norm_first,
    )
    q, _, _ = check(case, place)
    if not norm and rotary_dim is not None:
        untouched = case.qkv.reshape(14, 8, 64)[:, :4, rotary_dim:]
        assert_same_bits(q[..., rotary_dim:], untouched, "channels past rotary_dim")


def test_the_norm_adds_its_squares_in_the_defined_order(place):
    """Another order moves some sums by an ulp, and with many channels some results."""
    case = make_case([0], [400], head_dim=128, dtype=DTYPES["float16"], norm=True)
    magnitudes = np.exp(np.random.default_rng(0).normal(size=case.qkv.shape))
    case.qkv[:] = (case.qkv.astype(np.float32) * magnitudes).astype(np.float16)
    check(case, place)


def test_the_two_orders_of_norm_and_rotation_differ(place):
    results = [
        run(make_case([9], [4], norm=True, norm_first=first), place)[0] for first in (False, True)
    ]
    assert (results[0] != results[1]).any()


@pytest.mark.parametrize("cache", CACHES[1:], ids="-".join)
@pytest.mark.parametrize("neox", [False, True])
def test_partial_rotary_works_with_every_quantised_cache(place, neox, cache):
    check(make_case([7, 70], [1, 2], cache=cache, neox=neox, rotary_dim=32, norm=True), place)


@pytest.mark.parametrize("cache", [c for c in CACHES if c[0].startswith("block_wise")])
def test_bf16_scales_are_rounded_before_use(place, cache):
    check(make_case([7, 70], [1, 2], cache=cache, scale_dtype=BF16), place)


@pytest.mark.parametrize("new", [1, 2, 5, 8])
@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_decode_and_speculative_seqs(place, cache, new):
    check(make_case([63, 1, 128, 61], [new] * 4, cache=cache, q_quant="per_token_head"), place)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("seqs", "most"), [(1100, 1), (90, 4), (50, 30)])
def test_many_seqs_of_which_some_rest(place, seqs, most, with_ids):
    """Sequences lie far from where their tokens' number would have them."""
    options = {"cache": CACHES[-1], "neox": True, "q_quant": "per_token_head"}
    check(many_seqs(seqs, most, with_ids=with_ids, **options), place)


@pytest.mark.parametrize("group", [1, 4, 8])
def test_group_sizes(place, group):
    check(make_case([60], [7], heads=2 * group, q_quant="per_token_head"), place)


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_fused_equals_rotating_then_writing(place, cache):
    """The cache holds exactly what write_cache_kv makes of the rounded K and V."""
    case = make_case([3, 64], [70, 4], cache=cache, norm=True, bias=True)
    _, _, fused = run(case, place)
    positions = np.concatenate([3 + np.arange(70), 64 + np.arange(4)])
    _, k, v = model.rope_qkv(
        case.qkv,
        positions,
        case.rotary_embs,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        qkv_bias=case.tensors["qkv_bias"],
        q_norm_weight=case.tensors["q_norm_weight"],
        k_norm_weight=case.tensors["k_norm_weight"],
        rms_norm_eps=1e-5,
    )
    cache_arrays = dataclasses.asdict(case.cache)
    on = {
        name: None if cache_arrays[name] is None else to_paddle(cache_arrays[name].copy(), place)
        for name in ("key", "value", "k_scales", "v_scales")
    }
    F.write_cache_kv(
        to_paddle(k, place),
        to_paddle(v, place),
        on["key"],
        on["value"],
        *(to_paddle(a, place) for a in case.step.arrays),
        cache_k_scales=on["k_scales"],
        cache_v_scales=on["v_scales"],
        **case.cache.options,
    )
    separate = {name: None if t is None else to_numpy(t) for name, t in on.items()}
    for name, array in separate.items():
        if array is not None:
            assert_same_bits(getattr(fused, name), array, name)


def test_quantised_q_is_the_quantised_rounded_q(place):
    plain, _, _ = run(make_case([3], [9]), place)
    codes, scales, _ = run(make_case([3], [9], q_quant="per_token_head"), place)
    assert_same_bits(codes, quantize(plain, scales[..., None], "e4m3"))
    amax = np.abs(plain.astype(np.float32)).max(-1)
    assert_same_bits(scales, np.maximum(amax, np.float32(1e-6)) / np.float32(448))
    codes, scale, _ = run(make_case([3], [9], q_quant="per_tensor"), place)
    assert_same_bits(codes, quantize(plain, scale, "e4m3"))


@pytest.mark.parametrize("cache", CACHES[1:], ids="-".join)
def test_chunks_over_a_recycled_block_give_the_bytes_of_a_fresh_cache(place, cache):
    """A chunk from the middle of a block ignores the stale bytes there (fault 11)."""
    whole = make_case([0], [150], cache=cache, norm=True)
    fresh, stale = whole.cache.copy(), whole.cache.copy()
    for target, byte in ((fresh, 0), (stale, 0x7E)):
        target.key[:], target.value[:] = byte, byte
    _, _, wanted = run(dataclasses.replace(whole, cache=fresh), place)
    q_whole, _, _ = run(whole, place)
    current, start = stale, 0
    for size in (5, 1, 58, 3, 64, 19):
        step = Step(
            whole.step.block_tables,
            np.array([0, size], np.int32),
            np.array([start], np.int32),
            np.array([size], np.int32),
        )
        part = dataclasses.replace(
            whole, qkv=whole.qkv[start : start + size], cache=current, step=step
        )
        q, _, current = run(part, place)
        assert_same_bits(q, q_whole[start : start + size], "q of a chunk")
        start += size
    assert start == 150
    written = expected(dataclasses.replace(whole, cache=stale))[2]
    assert_same_cache(current, written)
    changed = written.key != 0x7E
    assert_same_bits(np.where(changed, current.key, 0), np.where(changed, wanted.key, 0))


def test_padding_tokens_leave_the_cache_and_get_zero(place):
    case = make_case([3, 60], [4, 6], cache=CACHES[-1], q_quant="per_token_head", norm=True)
    ids = np.array([0, -1, 0, 0, 1, 1, 1, -1, -1, 0, -1, -1], np.int32)
    extra = make_values((2, case.qkv.shape[1]), BF16, 9)
    case = dataclasses.replace(case, qkv=np.concatenate([case.qkv, extra]))
    case.tensors["batch_id_per_token"] = ids
    q, descale, _ = check(case, place)
    skipped = [1, 7, 8, 9, 10, 11]  # 9 names a sequence that is not its own
    assert not q[skipped].any()
    assert_same_bits(
        descale[skipped], np.full((6, 4), np.float32(1e-6) / np.float32(448), np.float32)
    )


def test_all_padding_step_changes_nothing(place):
    case = make_case([3, 60], [4, 6], cache=CACHES[-1])
    case.tensors["batch_id_per_token"] = np.full(10, -1, np.int32)
    q, _, cache = check(case, place)
    assert not q.any()
    assert_same_cache(cache, case.cache)


@pytest.mark.parametrize("neox", [False, True])
def test_a_table_has_the_angles_of_its_theta(neox):
    """docs/backends.md: pair i at position p turns by p * theta^(-2 i / R)."""
    table = model.make_rotary_embs(5, 6, theta=500.0, neox=neox)
    assert table.shape == (2, 1, 5, 1, 6 if neox else 3)
    for p in range(5):
        for i in range(3):
            angle = p * 500.0 ** (-2 * i / 6)
            for column in (i, i + 3) if neox else (i,):
                found = table[:, 0, p, 0, column]
                np.testing.assert_allclose(found, [math.cos(angle), math.sin(angle)], atol=1e-7)


def test_positions_past_the_table_use_its_last(place):
    case = make_case([12, 30], [8, 3], max_seq=16)
    q, _, _ = check(case, place)
    last = dataclasses.replace(case, rotary_embs=case.rotary_embs.copy())
    last.rotary_embs[:, :, :15] = case.rotary_embs[:, :, 15:]
    assert_same_bits(run(last, place)[0][8:], q[8:], "row of positions 30..32")


@pytest.mark.parametrize("neox", [False, True])
def test_every_form_of_the_table_means_the_same(place, neox):
    case = make_case([5], [9], neox=neox)
    half = model.make_rotary_embs(512, 64, theta=500.0)
    wide = np.concatenate([half, half], -1) if neox else np.repeat(half, 2, -1)
    results = [
        run(dataclasses.replace(case, rotary_embs=table), place)[0]
        for table in (half, wide, half.reshape(2, 512, 32), wide.reshape(2, 512, 64))
    ]
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_no_table_rotates_nothing(place):
    case = dataclasses.replace(make_case([5], [9]), rotary_embs=None)
    q, _, _ = check(case, place)
    assert_same_bits(q, case.qkv.reshape(9, 8, 64)[:, :4])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_of_the_parameters(place, dtype):
    case = make_case([5], [9], norm=True, bias=True)
    for name in ("qkv_bias", "q_norm_weight", "k_norm_weight"):
        case.tensors[name] = case.tensors[name].astype(DTYPES[dtype])
    check(case, place)


@pytest.mark.parametrize("only", ["q_norm_weight", "k_norm_weight"])
def test_one_norm_alone(place, only):
    case = make_case([5], [9], norm=True)
    other = "k_norm_weight" if only == "q_norm_weight" else "q_norm_weight"
    case.tensors[other] = None
    check(case, place)


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_special_values(place, cache):
    """Zeros, infinities, NaN and values beyond every code's range."""
    case = make_case([62], [6], cache=cache, dtype=DTYPES["float16"], q_quant="per_token_head")
    x = case.qkv.reshape(6, 8, 64)
    x[0] = 0
    x[1, :, 3] = np.nan
    x[2, :, 4] = np.inf
    x[3] = -65504
    x[4, :, ::2] = 6e-8
    q, descale, _ = check(dataclasses.replace(case, rotary_embs=None), place)
    assert not q[0].any() and np.isfinite(descale[0]).all()
    assert np.isnan(descale[1]).all() and (q[1] == 0x7F).all()
    assert np.isfinite(descale[2:]).all()


def test_unassigned_blocks_are_skipped(place):
    case = make_case([0, 0], [130, 70], cache=CACHES[-1])
    case.step.block_tables[0, 1] = -1
    case.step.block_tables[1, 0] = 1 << 30
    check(case, place)


def test_a_seq_longer_than_its_block_table(place):
    case = make_case([0], [130], cache=CACHES[-1])
    case.step.block_tables = case.step.block_tables[:, :1].copy()
    check(case, place)


@pytest.mark.parametrize(
    ("cu", "cached", "new"),
    [
        ([0, 4, 8], [-5, 3], [4, -1]),
        ([0, 4, 100], [0, 3], [9, 50]),
        ([-3, 4, 8], [0, 3], [4, 4]),
        ([6, 2, 8], [0, 1 << 30], [4, 4]),
        ([0, 4, 8], [2147483647, 0], [4, 4]),
    ],
)
def test_senseless_lengths_touch_nothing_else(place, cu, cached, new):
    case = make_case([0, 0], [4, 4], cache=CACHES[-1])
    for name, value in (("cu_seqlens_q", cu), ("seq_lens_decoder", cached)):
        setattr(case.step, name, np.array(value, np.int32))
    case.step.seq_lens_this_time = np.array(new, np.int32)
    check(case, place)


def test_qkv_stays_as_it_is_and_may_be_strided():
    case = make_case([5], [9], bias=True, norm=True)
    wide = np.concatenate([case.qkv, case.qkv[:, :40]], axis=1)
    tensor = to_paddle(wide.copy())
    part = tensor[:, : case.qkv.shape[1]]
    cache = case.cache.copy()
    q, _ = F.rope_write_cache_kv(
        part,
        to_paddle(cache.key),
        to_paddle(cache.value),
        to_paddle(case.rotary_embs),
        *(to_paddle(a) for a in case.step.arrays),
        num_heads=4,
        num_kv_heads=2,
        rms_norm_eps=1e-5,
        **{k: None if a is None else to_paddle(a) for k, a in case.tensors.items()},
    )
    assert_same_bits(to_numpy(tensor), wide, "qkv")
    assert_same_bits(to_numpy(q), expected(case)[0], "q")


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="this Paddle has no empty outputs")
@pytest.mark.parametrize("cached", [[], [3, 5]])
def test_a_step_without_tokens(place, cached):
    q, descale, _ = check(make_case(cached, [0] * len(cached), q_quant="per_token_head"), place)
    assert q.shape == (0, 4, 64)
    assert descale.shape == (0, 4)


# Fault 17 of docs/faults.md: neox and qk-norm kernels that take no weights and no padding ids.


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_bug17_norm_weights_and_padding_count_in_every_style(place, cache, neox):
    case = make_case([0], [3], cache=cache, neox=neox)
    case.tensors["q_norm_weight"] = np.full(64, 2.0, np.float32)
    case.tensors["batch_id_per_token"] = np.array([0, 0, -1], np.int32)
    q, _, _ = check(case, place)
    rms = np.sqrt((q[:2].astype(np.float64) ** 2).mean(-1))
    assert_within(rms, np.full((2, 4), 2.0), 0.02)  # each head has the weight's magnitude
    assert not q[2].any()


# Static graphs. Paddle traces neither a lambda nor a nested function's free tensors.


def _static_plain_cache(qkv, key, value, table, blocks, cu, cached, new, weight):
    q, _ = F.rope_write_cache_kv(
        qkv,
        key,
        value,
        table,
        blocks,
        cu,
        cached,
        new,
        num_heads=4,
        num_kv_heads=2,
        q_norm_weight=weight,
        k_norm_weight=weight,
        use_neox_rotary_style=True,
    )
    return q


@pytest.mark.parametrize("dynamic", [False, True])
def test_static_graphs_with_a_dynamic_cache(place, dynamic):
    case = make_case([63, 0], [1, 9], cache=CACHES[-1], q_quant="per_token_head")
    check_all_modes(case, place, dynamic=dynamic)


def test_static_graphs_with_a_plain_cache(place):
    case = make_case([63, 0], [1, 9], neox=True)
    weight = np.linspace(0.5, 1.5, 64).astype(np.float32)
    case.tensors |= {"q_norm_weight": weight, "k_norm_weight": weight}
    case.options["rms_norm_eps"] = 1e-6
    arrays = [case.qkv, case.cache.key, case.cache.value, case.rotary_embs]
    outputs, inputs = run_all_modes(
        _static_plain_cache, [*arrays, *case.step.arrays, weight], place
    )
    q, _, after = expected(case)
    assert_same_bits(outputs[0], q, "q")
    assert_same_bits(inputs[1], after.key, "key_cache")
