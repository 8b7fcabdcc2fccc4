"""merge_many_attn_states against the NumPy model (bit by bit), fp64, and one attention of all."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from tests.support.compare import assert_same_bits, assert_within
from tests.support.static import MODES, run_all_modes
from tests.support.tensors import DTYPES, to_numpy, to_paddle

INF = np.inf
SCALE = np.array([0.05], np.float32)


def states(count, tokens, heads, dim, dtype="float32", empty=0.2, seed=0):
    """Outputs and LSEs; empty states have an output of NaN and an LSE of -inf or +inf."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(count, tokens, heads, dim)).astype(DTYPES[dtype])
    lses = (2 * rng.normal(size=(count, heads, tokens))).astype(np.float32)
    gone = rng.random(lses.shape) < empty
    lses[gone] = np.where(rng.random(gone.sum()) < 0.5, -INF, INF)
    outputs[gone.transpose(0, 2, 1)] = np.nan
    return outputs, lses


def sinks_of(heads):
    """Sinks of any size, of which one is absent."""
    sinks = (3 * np.random.default_rng(1).normal(size=heads)).astype(np.float32)
    sinks[0] = -INF
    return sinks


def merge(outputs, lses, place, **kwargs):
    kwargs = {k: to_paddle(v, place) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
    found = F.merge_many_attn_states(to_paddle(outputs, place), to_paddle(lses, place), **kwargs)
    return tuple(to_numpy(x) for x in found)


def fp64_merge(outputs, lses, sinks=None, in_lse=True):
    """(merged, lse, size of the terms) by the textbook formula."""
    lses = np.where(np.isposinf(lses), -INF, lses.astype(np.float64))
    any_keys = ~np.isneginf(lses).all(0)
    keys_lse = np.logaddexp.reduce(lses, axis=0)
    lse = keys_lse
    if sinks is not None:
        sinks = np.where(np.isposinf(sinks), -INF, sinks.astype(np.float64))
        lse = np.logaddexp(lse, sinks[:, None])
    weights = np.exp(lses - np.where(any_keys, lse, 0)).transpose(0, 2, 1)[..., None]
    terms = np.where(weights == 0, 0, outputs.astype(np.float64)) * weights
    lse = np.where(any_keys, lse if in_lse else keys_lse, -INF)
    return terms.sum(0), lse, np.abs(terms).sum(0)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(67, 5, 64), (3, 48, 129), (9, 7, 512)])
def test_grid(place, tokens, heads, dim, count, dtype, fp8):
    arrays = states(count, tokens, heads, dim, dtype, seed=count)
    kwargs = {"output_scale": SCALE} if fp8 else {}
    output, lse = merge(*arrays, place, **kwargs)
    expected, expected_lse = reference.merge_many_attn_states(*arrays, **kwargs)
    assert_same_bits(output, expected, "output")
    assert_within(lse, expected_lse, 2.0**-23 * np.abs(expected_lse) + 2.0**-23, "lse")
    values = output == 0x7F if fp8 else np.isnan(output.astype(np.float32))
    assert not values.any()


@pytest.mark.parametrize("in_lse", [False, True])
@pytest.mark.parametrize("sink_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 3])
def test_sinks(place, count, sink_dtype, in_lse):
    outputs, lses = states(count, 21, 6, 96, seed=3)
    sinks = sinks_of(6).astype(DTYPES[sink_dtype])
    output, lse = merge(outputs, lses, place, sinks=sinks, sinks_in_lse=in_lse)
    expected, expected_lse = reference.merge_many_attn_states(
        outputs, lses, sinks=sinks, sinks_in_lse=in_lse
    )
    assert_same_bits(output, expected, "output")
    assert_within(lse, expected_lse, 2.0**-23 * np.abs(expected_lse) + 2.0**-23, "lse")


@pytest.mark.parametrize("in_lse", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_model_is_near_fp64(count, sinks, in_lse):
    outputs, lses = states(count, 100, 7, 24, seed=4)
    sinks = sinks_of(7) if sinks else None
    exact, exact_lse, size = fp64_merge(outputs, lses, sinks, in_lse)
    output, lse = reference.merge_many_attn_states(outputs, lses, sinks=sinks, sinks_in_lse=in_lse)
    # fp32 roundings: lse - m (at most 25 here), exp (2 ulp), the sum, the ratio, product and sum.
    bound = 2.0**-24 * (2 * 25 + 4 + 2 * count + 4) * size + 2.0**-149
    assert_within(output, exact, bound, "output")
    assert_within(lse, exact_lse, 2.0**-24 * (2 * count + 8 + np.abs(exact_lse)), "lse")


def test_two_states_are_those_of_the_other_operator(place):
    """The model of :func:`merge_attn_states` is another formula's text."""
    outputs, lses = states(2, 40, 5, 64, "bfloat16", seed=5)
    output, _ = merge(outputs, lses, place)
    expected, _ = reference.merge_attn_states(outputs[0], lses[0], outputs[1], lses[1])
    assert_same_bits(output, expected, "output")


@pytest.mark.parametrize("into", ["float16", "bfloat16", "float32"])
def test_fp32_states_into_16_bits(place, into):
    outputs, lses = states(3, 10, 4, 64, seed=6)
    given = to_paddle(np.zeros((10, 4, 64), DTYPES[into]), place)
    tensors = to_paddle(outputs, place), to_paddle(lses, place)
    returned, _ = F.merge_many_attn_states(*tensors, output=given)
    expected, _ = reference.merge_many_attn_states(outputs, lses)
    assert returned.data_ptr() == given.data_ptr()
    assert_same_bits(to_numpy(given), expected.astype(DTYPES[into]), "output")


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_special_values(place, fp8):
    nan = np.nan
    #       three outputs, their LSEs -> output, LSE
    table = [
        (nan, nan, nan, -INF, INF, -INF, 0.0, -INF),
        (nan, 3.0, nan, -INF, 0.5, INF, 3.0, 0.5),
        (nan, 3.0, 3.0, 0.5, 0.5, 0.5, nan, 0.5 + np.log(3)),
        (3.0, 3.0, nan, 0.5, 0.5, -80.0, nan, 0.5 + np.log(2)),
        (3.0, 3.0, 3.0, nan, 0.5, 0.5, nan, nan),
        (3.0, 3.0, 3.0, 0.5, 0.5, nan, nan, nan),
        (3.0, nan, nan, nan, -INF, INF, nan, nan),
        (1.0, 3.0, 5.0, 0.0, 0.0, 0.0, 3.0, np.log(3)),
        (1.0, 3.0, 5.0, -1e30, 1e30, -1e30, 3.0, 1e30),
        (INF, 3.0, 1.0, 0.0, 0.0, -INF, INF, np.log(2)),
        (INF, -INF, 1.0, 0.0, 0.0, 0.0, nan, np.log(3)),
        (-0.0, nan, nan, 0.5, -INF, -INF, -0.0, 0.5),
    ]
    rows = np.array(table, np.float32)
    outputs = np.repeat(rows[:, :3].T.reshape(3, -1, 1, 1), 8, axis=3)
    lses = rows[:, 3:6].T.reshape(3, 1, -1).copy()
    kwargs = {"output_scale": np.array([1.0], np.float32)} if fp8 else {}
    output, lse = merge(outputs, lses, place, **kwargs)
    wanted = np.repeat(rows[:, 6].reshape(-1, 1, 1), 8, axis=2)
    wanted = reference.numerics.to_codes(wanted, "e4m3") if fp8 else wanted
    assert_same_bits(output, wanted, "output")
    assert_within(lse, rows[:, 7].reshape(1, -1), 1e-6 * np.abs(np.nan_to_num(rows[:, 7])), "lse")


@pytest.mark.parametrize(
    ("sink", "output", "lse", "keys_lse"),
    [
        (0.0, 1.0, np.log(3), np.log(2)),  # of values 1 and 2: 3 / 3
        (INF, 1.5, np.log(2), np.log(2)),
        (-INF, 1.5, np.log(2), np.log(2)),
        (200.0, 0.0, 200.0, np.log(2)),  # the keys' own LSE does not underflow
        (np.nan, np.nan, np.nan, np.log(2)),
    ],
)
def test_special_sinks(place, sink, output, lse, keys_lse):
    outputs = np.array([1, 2, np.nan], np.float32).reshape(3, 1, 1, 1)
    lses = np.array([0, 0, -INF], np.float32).reshape(3, 1, 1)
    sinks = np.array([sink], np.float32)
    for in_lse, wanted in ((True, lse), (False, keys_lse)):
        found, found_lse = merge(outputs, lses, place, sinks=sinks, sinks_in_lse=in_lse)
        np.testing.assert_allclose(found.item(), output, rtol=1e-6)
        np.testing.assert_allclose(found_lse.item(), wanted, rtol=1e-6)


def test_no_keys_but_a_sink(place):
    outputs = np.full((2, 1, 1, 4), np.nan, np.float32)
    lses = np.full((2, 1, 1), -INF, np.float32)
    output, lse = merge(outputs, lses, place, sinks=np.zeros(1, np.float32))
    assert_same_bits(output, np.zeros((1, 1, 4), np.float32), "output")
    assert_same_bits(lse, np.full((1, 1), -INF, np.float32), "lse")


def test_strided_states(place):
    """Slots of a buffer, as a collective fills it: outputs, their LSEs behind them, and a gap."""
    outputs, lses = states(4, 5, 3, 64, seed=7)
    slot = outputs[0].size + lses[0].size + 5
    memory = np.full((4, slot), np.nan, np.float32)
    memory[:, : outputs[0].size] = outputs.reshape(4, -1)
    memory[:, outputs[0].size : slot - 5] = lses.reshape(4, -1)
    buffer = to_paddle(memory.reshape(-1), place)
    views = (
        paddle.as_strided(buffer, [4, 5, 3, 64], [slot, 3 * 64, 64, 1]),
        paddle.as_strided(buffer, [4, 3, 5], [slot, 5, 1], 4 * outputs[0].size),
    )
    output, lse = F.merge_many_attn_states(*views)
    expected, expected_lse = reference.merge_many_attn_states(outputs, lses)
    assert_same_bits(to_numpy(output), expected, "output")
    assert_within(to_numpy(lse), expected_lse, 2.0**-22 * np.abs(expected_lse) + 2.0**-23, "lse")


def test_it_is_the_attention_over_all_keys():
    """Softmax over three disjoint sets of keys, each in fp64, against that of all of them."""
    rng = np.random.default_rng(8)
    q, k, v = (
        rng.normal(size=(6, 2, 32)),
        rng.normal(size=(30, 2, 32)),
        rng.normal(size=(30, 2, 32)),
    )

    def attention(keys):
        scores = np.einsum("thd,khd->htk", q, k[keys])
        lse = np.logaddexp.reduce(scores, axis=2)
        return np.einsum("htk,khd->thd", np.exp(scores - lse[..., None]), v[keys]), lse

    parts = [attention(slice(a, b)) for a, b in ((0, 7), (7, 8), (8, 30))]
    outputs = np.stack([x for x, _ in parts]).astype(np.float32)
    lses = np.stack([x for _, x in parts]).astype(np.float32)
    output, lse = merge(outputs, lses, "cpu")
    exact, exact_lse = attention(slice(0, 30))
    assert_within(output, exact, 2.0**-20, "output")
    assert_within(lse, exact_lse, 2.0**-19, "lse")


@pytest.mark.parametrize("shape", [(2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)])
def test_empty(place, shape):
    outputs = np.zeros(shape, np.float32)
    lses = np.zeros((shape[0], shape[2], shape[1]), np.float32)
    output, lse = merge(outputs, lses, place)
    assert output.shape == shape[1:] and lse.shape == lses.shape[1:]


def tensors(count=2, dtype="float32", **changes):
    outputs, lses = states(count, 3, 4, 8, dtype)
    return {"outputs": to_paddle(outputs), "lses": to_paddle(lses), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"outputs": [1]}, TypeError, "outputs: expected a tensor, got list"),
        ({"lses": None}, TypeError, "lses: expected a tensor, got None"),
        ({"outputs": paddle.zeros([3, 4, 8])}, ValueError, "outputs: expected 4 dimensions"),
        ({"outputs": paddle.zeros([0, 3, 4, 8])}, ValueError, "expected at least one state"),
        ({"outputs": paddle.zeros([2, 3, 4, 8], "float64")}, TypeError, "outputs: expected dtype"),
        ({"lses": paddle.zeros([2, 3, 4])}, ValueError, r"lses: expected shape \[2, 4, 3\]"),
        ({"lses": paddle.zeros([3, 4, 3])}, ValueError, r"lses: expected shape \[2, 4, 3\]"),
        ({"sinks": paddle.zeros([3])}, ValueError, r"sinks: expected shape \[4\]"),
        ({"sinks": paddle.zeros([4], "float16")}, TypeError, "sinks: expected dtype"),
        ({"output_scale": paddle.zeros([1])}, ValueError, "expected a finite positive scale"),
        ({"output_scale": paddle.ones([2])}, ValueError, r"output_scale: expected shape \[1\]"),
        ({"output": paddle.zeros([3, 4, 9])}, ValueError, r"output: expected shape \[3, 4, 8\]"),
        ({"output": paddle.zeros([3, 4, 8], "uint8")}, TypeError, "output: expected dtype float32"),
        (
            {"output": paddle.zeros([3, 4, 8]), "output_scale": paddle.ones([1])},
            TypeError,
            "output: expected dtype uint8 or float8_e4m3fn",
        ),
    ],
)
def test_errors(changes, error, text):
    given = tensors(**changes)
    with pytest.raises(error, match=f"merge_many_attn_states: .*{text}"):
        F.merge_many_attn_states(given.pop("outputs"), given.pop("lses"), **given)


def test_an_output_over_a_state_is_refused():
    given = tensors()
    with pytest.raises(ValueError, match=r"output: .* must not share memory with outputs"):
        F.merge_many_attn_states(**given, output=given["outputs"][0])


def test_codes_into_a_given_output(place):
    outputs, lses = states(2, 3, 4, 8, seed=9)
    output = to_paddle(np.zeros((3, 4, 8), np.uint8), place)
    scale = to_paddle(SCALE, place)
    F.merge_many_attn_states(
        to_paddle(outputs, place), to_paddle(lses, place), output_scale=scale, output=output
    )
    expected, _ = reference.merge_many_attn_states(outputs, lses, output_scale=SCALE)
    assert_same_bits(to_numpy(output), expected, "output")


def merged_with_sinks(outputs, lses, sinks, scale):
    return F.merge_many_attn_states(outputs, lses, sinks=sinks, output_scale=scale)


@pytest.mark.parametrize("dynamic", [False, True])
def test_in_programs(place, dynamic):
    outputs, lses = states(3, 5, 2, 40, "bfloat16", seed=10)
    arrays = [outputs, lses, sinks_of(2), SCALE]
    run_all_modes(merged_with_sinks, arrays, place, MODES, dynamic)
