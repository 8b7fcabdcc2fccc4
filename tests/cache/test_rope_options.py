"""Every combination of what rope_write_cache_kv does to a head, in prompts and decode steps.

On a GPU each is a kernel of its own (bias, norm, both, rotations of at most half a head, and one
for all others), for steps of up to 8 tokens a sequence and for prompts. All against the NumPy
model, bit by bit.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import fastattn.functional as F
from fastattn.reference.rope import rms_norm
from tests.support.cache import make_values
from tests.support.compare import assert_same_bits
from tests.support.rope import CACHES, QUANTS, Case, check, expected, make_case, many_seqs
from tests.support.tensors import BF16, DTYPES, skip_slices_on, to_numpy, to_paddle

#: What each sequence has cached, and its new tokens. Heads and sequences end inside of a warp's,
#: and tiles begin and end inside of blocks and of groups of 16 tokens.
STEPS = {
    "decode": ([0, 63, 64, 5, 200], [1, 1, 1, 0, 1]),
    "speculative": ([61, 0, 127], [4, 8, 2]),
    "prompts": ([0, 63, 5, 130, 64, 0, 77], [65, 1, 0, 47, 33, 16, 100]),
}
OPTIONS = {
    "plain": {},
    "norm": {"norm": True},
    "norm first": {"norm": True, "norm_first": True},
    "bias": {"bias": True},
    "both": {"norm": True, "bias": True},
    "both, norm first": {"norm": True, "bias": True, "norm_first": True},
    "half rotated": {"rotary_dim": 32, "neox": True},
    "half rotated, both": {"rotary_dim": 32, "neox": True, "norm": True, "bias": True},
}
#: Channels that are rotated: powers of 2 within a lane's reach and below, and what is neither.
ROTARY_DIMS = {
    64: (64, 32, 16, 8, 4, 2, 6, 48, 62),
    96: (96, 64, 48, 32, 16, 2, 6, 40, 94),
    128: (128, 64, 32, 16, 2, 48, 40, 96, 126),
    256: (256, 128, 64, 32, 2, 48, 40, 192, 254),
}


@pytest.mark.few_on_cpu("option", "step")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_with_every_cache(place, option, cache, head_dim, step):
    options = {**OPTIONS[option], "head_dim": head_dim, "heads": 6, "kv_heads": 3}
    for i, q_quant in enumerate(QUANTS):
        dtype = DTYPES["float16" if i == 1 else "bfloat16"]
        case = make_case(*STEPS[step], cache=cache, q_quant=q_quant, dtype=dtype, seed=i, **options)
        check(case, place)


@pytest.mark.few_on_cpu("neox", "step")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("index", range(9))
def test_every_rotary_dim(place, index, head_dim, neox, step):
    for norm, norm_first, bias in [(False, False, False), (True, False, True), (True, True, False)]:
        case = make_case(
            *STEPS[step],
            cache=CACHES[-1],
            head_dim=head_dim,
            neox=neox,
            rotary_dim=ROTARY_DIMS[head_dim][index],
            norm=norm,
            norm_first=norm_first,
            bias=bias,
        )
        check(case, place)
        # A table with a column for every channel: interleaved, each angle stands twice.
        repeat = np.concatenate if neox else np.stack
        table = case.rotary_embs[..., : ROTARY_DIMS[head_dim][index] // 2]
        wide = repeat([table, table], -1).reshape(*table.shape[:-1], -1)
        check(dataclasses.replace(case, rotary_embs=wide), place)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("only", ["q_norm_weight", "k_norm_weight"])
def test_one_norm_alone(place, only, step):
    for option in ("norm first", "both", "half rotated, both"):
        case = make_case(*STEPS[step], cache=CACHES[-1], head_dim=128, **OPTIONS[option])
        for name in ("q_norm_weight", "k_norm_weight"):
            if name != only:
                case.tensors[name] = None
        check(case, place)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("option", ["norm", "bias", "both", "half rotated, both"])
def test_types_of_the_parameters(place, option, dtype, step):
    case = make_case(*STEPS[step], head_dim=128, **OPTIONS[option])
    for name in ("qkv_bias", "q_norm_weight", "k_norm_weight"):
        if case.tensors.get(name) is not None:
            case.tensors[name] = case.tensors[name].astype(DTYPES[dtype])
    check(case, place)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (7, 7), (20, 5), (64, 4)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_numbers_of_heads(place, head_dim, heads, step):
    """The last of a warp's heads may be none, or lie in the next kind's bias."""
    case = make_case(
        *STEPS[step],
        cache=CACHES[-1],
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim,
        **OPTIONS["both, norm first"],
    )
    check(case, place)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cache", [CACHES[0], CACHES[2], CACHES[-1]], ids="-".join)
def test_padding_inside_and_behind_prompts(place, cache, option):
    case = make_case(*STEPS["prompts"], cache=cache, q_quant="per_token_head", **OPTIONS[option])
    tokens = case.step.num_tokens
    extra = make_values((9, case.qkv.shape[1]), BF16, 9)
    ids = np.repeat(np.arange(7), STEPS["prompts"][1]).astype(np.int32)
    ids[[0, 1, 17, 18, 19, 64, 65, tokens - 1]] = -1
    ids[40], ids[-20] = 6, 0  # not their own
    case.tensors["batch_id_per_token"] = np.concatenate([ids, np.full(9, -1, np.int32)])
    q, _, _ = check(dataclasses.replace(case, qkv=np.concatenate([case.qkv, extra])), place)
    assert not q[-9:].any() and not q[[0, 17, 40]].any()


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("option", ["norm", "bias", "both", "half rotated, both"])
@pytest.mark.parametrize(("seqs", "most"), [(300, 1), (70, 4), (50, 30)])
def test_many_sequences(place, seqs, most, option, with_ids):
    options = {"cache": CACHES[-1], **OPTIONS[option]}
    check(many_seqs(seqs, most, with_ids=with_ids, **options), place)


@pytest.mark.parametrize("tokens", [8, 300])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_norm_adds_its_squares_in_the_defined_order(place, norm_first, head_dim, tokens):
    """Another order moves some sums by an ulp, and with many channels some results."""
    case = make_case(
        [0], [tokens], head_dim=head_dim, dtype=DTYPES["float16"], norm=True, norm_first=norm_first
    )
    magnitudes = np.exp(np.random.default_rng(0).normal(size=case.qkv.shape))
    case.qkv[:] = (case.qkv.astype(np.float32) * magnitudes).astype(np.float16)
    check(case, place)


def test_the_order_of_squares_is_defined_for_halves():
    with pytest.raises(ValueError, match="expected an even number of channels, got 95"):
        rms_norm(np.ones((2, 95)), np.ones(95), 1e-6)
    # Three channels a half: (0 + 1) + 2, and the other half's 1 is not lost beside 2^24 twice.
    x = np.array([1, 1, 2.0**12, 0, 1, 1], np.float32)
    np.testing.assert_array_equal(
        rms_norm(x, np.ones(6), 0.0),
        x * (np.float32(1) / np.sqrt(np.float32(2.0**24 + 4) / np.float32(6))),
        strict=True,
    )
    # One after the other the squares of 1 would all be lost beside 2^24.
    x = np.array([2.0**12, 0, 1, 1, 1, 1, 1, 1], np.float32)
    norm, lost = (np.float32(1) / np.sqrt(np.float32((2.0**24 + n) / 8)) for n in (6, 0))
    assert norm != lost
    np.testing.assert_array_equal(rms_norm(x, np.ones(8), 0.0), x * norm, strict=True)


@pytest.mark.parametrize("tokens", [8, 40])
@pytest.mark.parametrize("eps", [0.0, 1e-38, 1e-6])
def test_norms_of_every_magnitude(place, eps, tokens):
    """Sums of squares that are 0, subnormal, tiny, large and infinite, and a NaN."""
    case = make_case([0], [tokens], norm=True, head_dim=128)
    exponents = np.tile([-126, -75, -70, -63, -51, -50, -20, 40, 60, 63, 64, 100], 4)[:tokens]
    wide = case.qkv.astype(np.float64) * np.exp2(exponents.astype(np.float64))[:, None]
    case.qkv[:] = wide.astype(np.float32).astype(BF16)
    case.qkv[1, ::3] = 0
    case.qkv[2] = 0
    case.qkv[3, 5] = np.nan
    case.options["rms_norm_eps"] = eps
    check(case, place)


def _behind(array: np.ndarray, elements: int, place: str):
    """The array, `elements` after the start of a buffer that has an aligned address."""
    pool = np.zeros(array.size + elements, array.dtype)
    pool[elements:] = array.reshape(-1)
    return to_paddle(pool, place)[elements:].reshape(list(array.shape))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("option", ["plain", "norm", "bias", "both", "half rotated, both"])
@pytest.mark.parametrize("shifted", ["qkv_bias", "q_norm_weight", "k_norm_weight", "rotary_embs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_at_any_address(place, dtype, shifted, option, step):
    skip_slices_on(place)
    case = make_case(*STEPS[step], head_dim=128, **OPTIONS[option])
    for name in ("qkv_bias", "q_norm_weight", "k_norm_weight"):
        if case.tensors.get(name) is not None:
            case.tensors[name] = case.tensors[name].astype(DTYPES[dtype])
    if shifted != "rotary_embs" and case.tensors.get(shifted) is None:
        return
    _check_call(case, place, shifted, row=case.qkv.shape[1])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("more", [8, 24, 64])
def test_strided_projections(place, more, option, step):
    skip_slices_on(place)
    case = make_case(*STEPS[step], head_dim=64, **OPTIONS[option])
    _check_call(case, place, "", row=case.qkv.shape[1] + more)


def _check_call(case: Case, place: str, shifted: str, row: int) -> None:
    """One call whose `shifted` parameter lies after others, qkv's tokens `row` elements apart."""

    def on(name: str, array: np.ndarray | None):
        if array is None:
            return None
        return _behind(array, 1, place) if name == shifted else to_paddle(array.copy(), place)

    tokens, width = case.qkv.shape
    pool = np.ones((tokens, row), case.qkv.dtype)
    pool[:, :width] = case.qkv
    cache = case.cache.copy()
    tensors = {name: to_paddle(getattr(cache, name), place) for name in ("key", "value")}
    qkv = to_paddle(pool, place)
    q, _ = F.rope_write_cache_kv(
        qkv[:, :width] if row > width else qkv,
        *tensors.values(),
        on("rotary_embs", case.rotary_embs),
        *(to_paddle(a, place) for a in case.step.arrays),
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        **{name: on(name, array) for name, array in case.tensors.items()},
        **case.options,
    )
    wanted, _, after = expected(case)
    assert_same_bits(to_numpy(q), wanted, "q")
    assert_same_bits(to_numpy(tensors["key"]), after.key, "key")
    assert_same_bits(to_numpy(tensors["value"]), after.value, "value")
    assert_same_bits(to_numpy(qkv), pool, "qkv")


@pytest.mark.parametrize("cache", CACHES, ids="-".join)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_writing_fp32(place, head_dim, step, cache):
    """write_cache_kv of fp32 is what it is of the same values in any type that holds them."""
    case = make_case(*STEPS[step], cache=cache, head_dim=head_dim, heads=3, kv_heads=3)
    tokens = case.step.num_tokens
    kv = case.qkv.reshape(tokens, 9, head_dim)
    outputs = []
    for dtype in (BF16, np.dtype(np.float32)):
        at = case.cache.copy()
        arrays = {n: getattr(at, n) for n in ("key", "value", "k_scales", "v_scales")}
        on = {n: None if a is None else to_paddle(a, place) for n, a in arrays.items()}
        F.write_cache_kv(
            to_paddle(np.ascontiguousarray(kv[:, 3:6]).astype(dtype), place),
            to_paddle(np.ascontiguousarray(kv[:, 6:]).astype(dtype), place),
            on["key"],
            on["value"],
            *(to_paddle(a, place) for a in case.step.arrays),
            cache_k_scales=on["k_scales"],
            cache_v_scales=on["v_scales"],
            **at.options,
        )
        outputs.append({n: to_numpy(t) for n, t in on.items() if t is not None})
    for n, array in outputs[0].items():
        assert_same_bits(outputs[1][n], array, n)
