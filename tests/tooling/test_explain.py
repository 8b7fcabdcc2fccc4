"""``python -m fastattn explain``: the operators' own decisions, and reasons that hold."""

from __future__ import annotations

import json
import re

import pytest

from fastattn import _plan, cli
from fastattn.cli import explain
from tests.support import ROOT, operators

pytest.importorskip("fastattn._host")

DECODE = _plan.AttentionCall(
    *("paged_attention", "bfloat16", "float8_e4m3fn", "block_wise_fp8"),
    *(32, 32, 32, 8, 128, 1, 4096),
)
H100 = _plan.Device("sm_90", 9, 132)


def told(capsys, *arguments):
    assert cli.main(["explain", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, kernels",
    [
        ((), ["mma_sm80"]),
        (("--shape", "seqs=32,keys=4096"), ["mma_sm80", "merge of partial results"]),
        (("--shape", "new=4096", "keys=4096"), ["dequantize_kv", "wgmma_q16"]),
        (("--shape", "new=2048", "--q-dtype", "e4m3"), ["wgmma_fp8"]),
        (("--shape", "new=2048", "--arch", "sm_80"), ["mma_sm80"]),
        (("--shape", "new=2048", "--cache-quant-type", "none"), ["wgmma_q16"]),
        (("--op", "flash_attention", "--shape", "new=2048", "--k-dtype", "e5m2"), ["wgmma_q16"]),
    ],
)
def test_kernels(arguments, kernels, capsys):
    facts = told(capsys, *arguments)
    assert facts["kernels"] == kernels
    assert {*facts["kernels"], *facts["why_not"]} == {*explain.kernels_of_attention()}


def test_kernels_are_those_of_the_plan_functions(capsys):
    facts = told(capsys, "--shape", "seqs=32", "keys=4096")
    wanted = _plan.host().decide_attention(*DECODE[1:11], compute_major=9, num_sms=132)
    assert facts["launches"] == wanted[2] and facts["workspace"] == 4 * wanted[1]
    assert facts["call"] == DECODE._asdict()


@pytest.mark.parametrize("kind", _plan.host().cache_types())
@pytest.mark.parametrize("new", [1, 40, 2048])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_reasons_hold(kind, new, arch):
    """What a reason names brings the kernel: the changes are made here once more."""
    device = H100._replace(name=arch, major=int(arch[3]), processors=132)
    key = _plan.key_dtype(kind, "bfloat16", "e4m3")
    call = DECODE._replace(
        cache_type=kind, k_dtype=key, num_tokens=32 * new, max_seqlen_q=new, max_seqlen_k=4096
    )
    for kernel, reason in explain.why_not(call, device).items():
        changes = reason.removeprefix("taken ").split(" and ")
        if not reason.startswith("taken "):
            continue
        now, on = call, device
        for change in changes:
            now, on = next((c, d) for text, c, d in explain._changes(now, on) if text == change)
        assert kernel in _plan.decision(now, on)["kernels"], (kernel, reason)
        assert (now, on) != (call, device)


@pytest.mark.parametrize(
    "kind", ["none", "cache_int8", "block_wise_fp8", "block_wise_mxfp4", "block_wise_k8v4"]
)
def test_the_least_number_of_new_tokens(kind):
    key = _plan.key_dtype(kind, "bfloat16", "e4m3")
    call = DECODE._replace(cache_type=kind, k_dtype=key)
    least = explain.least_new_tokens(call, H100, "wgmma_q16")
    takes = [
        "wgmma_q16"
        in _plan.decision(
            call._replace(num_tokens=32 * n, max_seqlen_q=n, max_seqlen_k=4096), H100
        )["kernels"]
        for n in range(1, 1000)
    ]
    assert takes == [n >= least for n in range(1, 1000)]


def test_the_prediction_by_hand():
    """A decode step: 32 sequences of 4096 keys, 8 heads, K and V of 128 codes and a scale each."""
    keys = 32 * 4096 * 8 * 2 * (128 + 4)
    rest = 32 * 32 * 128 * (2 + 2)
    found = explain.predict(DECODE, ["mma_sm80"], explain.PEAKS["sm_90"], True)
    assert found.moved == keys + rest and found.limited_by == "bytes"
    assert found.us == pytest.approx((keys + rest) / 3.35e12 * 1e6)
    assert found.operations == 32 * 32 * 4096 * 4 * 128


def test_the_prediction_of_a_prompt_by_hand():
    call = DECODE._replace(num_tokens=4096, batch=1, max_seqlen_q=4096)
    pairs = 4096 * 4097 // 2  # of a triangle with its diagonal
    found = explain.predict(call, ["wgmma_fp8"], explain.PEAKS["sm_90"], True)
    assert found.operations == pairs * 32 * 4 * 128
    assert found.us == pytest.approx(found.operations / 1979e12 * 1e6)
    whole = explain.predict(call, ["wgmma_q16"], explain.PEAKS["sm_90"], False)
    assert whole.operations == 4096 * 4096 * 32 * 4 * 128
    assert whole.us == pytest.approx(whole.operations / 989e12 * 1e6)


def test_text(capsys):
    assert cli.main(["explain", "--shape", "seqs=32", "keys=4096"]) == 0
    out = capsys.readouterr().out
    assert "kernels: mma_sm80, merge of partial results" in out
    lacks = "not wgmma_q16: no sequence is long enough for whole tiles; "
    assert lacks + "taken with 64 new tokens a sequence; from " in out
    assert "predicted (not measured): at least " in out and "peaks of H100 SXM" in out


@pytest.mark.parametrize("kind", ["none", "cache_int8", "block_wise_fp8", "block_wise_mxfp4"])
@pytest.mark.parametrize("q_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("new", [1, 40, 2048])
@pytest.mark.parametrize("major", [8, 9, 10])
def test_every_kernel_is_taken_or_says_what_it_lacks(kind, q_dtype, new, major):
    key = _plan.key_dtype(kind, "bfloat16", "e4m3")
    call = DECODE._replace(
        q_dtype=q_dtype, k_dtype=key, cache_type=kind, num_tokens=32 * new, max_seqlen_q=new
    )
    found = _plan.decision(call, _plan.Device(f"sm_{major}0", major, 132))
    kernels = {*explain.kernels_of_attention()} - {"merge of partial results"}
    assert {*found["kernels"], *found["reasons"]} - {"merge of partial results"} == kernels
    assert not {*found["kernels"]} & {*found["reasons"]}
    assert all(len(text.split()) > 2 for text in found["reasons"].values())


@pytest.mark.parametrize("op", ["mla_attention", "quantize_fp8"])
def test_other_operators(op, capsys):
    assert "kernel" in told(capsys, "--op", op)
    assert "OpenMP" in told(capsys, "--op", op, "--arch", "cpu")["kernel"]


@pytest.mark.parametrize("shape", ["seqs", "seqs=x", "rows=3", "heads=5", "seqs=0"])
def test_shapes_that_are_none(shape, capsys):
    assert cli.main(["explain", "--shape", shape]) == 1
    assert "explain: --shape: expected " in capsys.readouterr().err


def test_an_operator_that_does_not_exist(capsys):
    assert cli.main(["explain", "--op", "attend"]) == 1
    assert "explain: --op: " in capsys.readouterr().err


SHAPES = (
    r"(?P<what>decode) (?P<kind>\w+) B (?P<seqs>\d+) ctx (?P<keys>\d+) H (?P<heads>\d+)/"
    r"(?P<kv>\d+) D (?P<dim>\d+)",
    r"(?P<what>prefill) (?P<kind>\w+) causal B (?P<seqs>\d+) x (?P<keys>\d+) H (?P<heads>\d+)/"
    r"(?P<kv>\d+) D (?P<dim>\d+)",
)


def measured():
    """(decode or prefill, microseconds, predicted ones) of committed measurements on an H100."""
    for name in ("decode", "prefill"):
        rows = json.loads((ROOT / "benchmarks" / "results" / f"h100-{name}.json").read_text())
        for row in rows["rows"]:
            match = next(filter(None, (re.fullmatch(s, row["shape"]) for s in SHAPES)), None)
            if match is None or row["op"] != "paged_attention":
                continue
            seqs, keys, heads, kv, dim = (int(x) for x in match.groups()[2:])
            new = 1 if match["what"] == "decode" else keys
            key = _plan.key_dtype(match["kind"], "bfloat16", "e4m3")
            q_dtype = "bfloat16" if new == 1 else "float8_e4m3fn"
            call = _plan.AttentionCall(
                *("paged_attention", q_dtype, key, match["kind"], seqs * new, seqs),
                *(heads, kv, dim, new, keys),
            )
            kernels = explain._kernels(call, H100)
            found = explain.predict(call, kernels, explain.PEAKS["sm_90"], True)
            yield match["what"], row["us"], found.us


def test_measured_calls_take_longer_than_predicted():
    """The prediction is a lower bound, and near enough to tell an expected time from a fault."""
    rows = list(measured())
    assert len([r for r in rows if r[0] == "decode"]) > 100
    assert len([r for r in rows if r[0] == "prefill"]) > 10
    for what, us, predicted in rows:
        assert us >= predicted
        if predicted > 50:
            assert us <= (1.5 if what == "decode" else 4.5) * predicted


@pytest.mark.parametrize("op", sorted(_plan.TABLES))
@pytest.mark.parametrize("major", [8, 9])
def test_a_call_of_another_operator_is_told_its_kernel(op, major):
    """The tables are asked with a real call's shapes, as logs and dumps ask them."""
    call = operators.calls()[op]
    shapes = {
        name: (str(tensor.dtype).rpartition(".")[2], list(tensor.shape))
        for name, tensor in call.inputs.items()
    }
    device = _plan.Device(f"sm_{major}0", major, 132)
    found = _plan.facts_of(op, shapes, call.attrs, device)
    rows = _plan.rows_of(op, device)
    assert found["kernel"].partition(",")[0] in rows
    assert {found["kernel"].partition(",")[0], *found["reasons"]} >= {*rows}
    assert found["kernel"].endswith(", topk") == ("topk" in op)
