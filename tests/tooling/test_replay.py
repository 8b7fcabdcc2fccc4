"""``python -m fastattn replay``: dumped calls give their bits again, and a difference is found."""

from __future__ import annotations

import json
import os

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops, _views, cli
from fastattn.dump import compare, files, model, record, replay, script, tensors
from fastattn.env import DumpSettings
from fastattn.reference import numerics
from tests.support import calls, fresh, operators
from tests.support.calls import CALLS, make_call
from tests.support.tensors import BF16, int32, to_paddle

#: Calls of every operator that may be made again; more than one of some.
REPLAYED = [name for name in CALLS if name not in model.NOT_REPLAYED]
MODELLED = [name for name in REPLAYED if name.partition(",")[0] in model.MODELS]


def command(*arguments):
    """The command in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
    return fresh.run_module("fastattn", "replay", *map(str, arguments), env=environment)


@pytest.fixture
def dumping(tmp_path, monkeypatch):
    """Folder into which the test's calls are dumped."""
    call = record.recorded(_ops.call, _ops.signature, DumpSettings(tmp_path / "d", most=1000))
    monkeypatch.setattr(_ops, "call", call)
    return tmp_path / "d"


def last(folder):
    return files.read_call(files.calls_in(folder)[-1])


def again(dump, **options):
    return replay.replay(replay.Call(dump, **options), timed=False)


def changed(dump, inputs=None, results=None, **facts):
    """The dump with other contents and checksums that fit them."""
    new = {**dump.facts, **facts, "files": dict(dump.facts["files"])}
    for name, values in ((files.INPUTS, inputs), (files.RESULTS, results)):
        if values is not None:
            new["files"][name] = files.write_tensors(dump.folder / name, values)
    files.write_facts(dump.folder, new)
    return files.read_call(dump.folder)


def test_every_operator_in_a_fresh_process(dumping):
    for op, call in operators.calls().items():
        if op not in model.NOT_REPLAYED:
            operators.run(op, call.inputs, call.attrs)
    for name in REPLAYED:
        make_call(name, "cpu")()
    done = command(dumping, "--json", "--no-time")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, [row for row in rows if not row["fits"]]
    assert {row["op"] for row in rows} == {*_ops.operators()} - {*model.NOT_REPLAYED}
    for row in rows:
        assert all(text == "the same bits" for _, text in row["again"].values()), row
        compared = [*row["dumped"].values(), *row["replayed"].values()]
        assert all(fits for fits, _ in compared) or row["op"] in model.WITHOUT_MODEL, row


#: On a GPU no bound holds for their random bits: fp32 sums of such latents overflow, and the tensor
#: cores add products of such e4m3 queries and keys in 14 bits (docs/debugging.md).
BEYOND_BOUNDS = ("mla_attention", "paged_attention, e4m3 queries")


@pytest.mark.parametrize("name", REPLAYED)
def test_calls_of_a_place_replay_there_and_on_a_cpu(name, place, dumping):
    make_call(name, place)()
    dump = last(dumping)
    assert dump.facts["place"].partition(":")[0] == place
    assert "unknown" not in dump.facts["plan"]["kernel"]
    bounded = place == "cpu" or name not in BEYOND_BOUNDS
    found = again(dump)
    assert all(v.fits for v in found.again.values()), found
    assert found.fits or not bounded, found
    assert again(dump, place="cpu").fits or not bounded
    if place == "gpu" and bounded:  # and a CPU's dump on a GPU
        make_call(name, "cpu")()
        found = again(last(dumping), place="gpu")
        assert all(v.fits is not False for v in found.replayed.values()), found


def test_every_operator_has_a_model_or_a_reason():
    known = {*model.MODELS, *model.WITHOUT_MODEL, *model.NOT_REPLAYED}
    assert known == {*_ops.operators()}


def test_signals_are_not_sent_again(dumping, monkeypatch):
    call = operators.calls()["send_kv_signal"]
    operators.run("send_kv_signal", call.inputs, call.attrs)
    dump = last(dumping)
    monkeypatch.setattr(replay.Call, "run", lambda *_: pytest.fail("the signal was sent"))
    assert again(dump).replayed["-"].fits is None


NAN = """
import numpy as np, paddle, fastattn.functional as F
paddle.set_device("cpu")
rng = np.random.default_rng(3)
for poison in (False, True):
    k, v = (rng.normal(size=(40, 2, 64)).astype("float32") for _ in range(2))
    if poison:
        v[7, 1, 5] = np.nan
    q = rng.normal(size=(40, 4, 64)).astype("float32")
    q, k, v = (paddle.to_tensor(x).astype("bfloat16") for x in (q, k, v))
    cu = paddle.to_tensor([0, 40], "int32")
    F.flash_attention(q, k, v, cu, cu, 40, 40, causal=True)
"""


def test_a_call_that_gave_nan_replays_in_a_fresh_process(tmp_path):
    environment = {**os.environ, "FASTATTN_DUMP": f"{tmp_path},nan"}
    assert fresh.run(NAN, env=environment).returncode == 0
    (folder,) = files.calls_in(tmp_path)  # one of the two calls
    facts = files.read_facts(folder)
    assert facts["nan"] == {"v": 1, "result": 2 * 33}  # two heads of the queries 7 to 39
    done = command(tmp_path, "--script")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NaN when dumped: v 1, result 66" in done.stdout
    assert "replay against dump: result: ok: the same bits" in done.stdout
    assert "us a call (median" in done.stdout and "1 of 1 calls ok" in done.stdout


def test_an_error_comes_again(dumping):
    with pytest.raises(ValueError, match="granularity"):
        _ops.call("quantize_fp8", (to_paddle(np.ones((2, 32), np.float32)), None, None), ("x", 1))
    dump = last(dumping)
    found = again(dump)
    assert found.fits and "granularity" in found.error
    other = changed(dump, error=["ValueError", "another"])
    assert not again(other).fits
    attrs = {"granularity": "token", "group_size": 1}
    assert not again(changed(dump, attrs=attrs)).fits  # it returns now


def test_changed_files_are_refused(dumping, capsys):
    F.quantize_fp8(to_paddle(np.ones((2, 64), np.float32)))
    F.quantize_fp8(to_paddle(np.ones((3, 64), np.float32)))
    path = files.calls_in(dumping)[0] / files.INPUTS
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert cli.main(["replay", str(dumping), "--no-time"]) == 1
    out = capsys.readouterr().out
    assert "000001" in out and "REFUSED" in out and "call.json has another SHA-256" in out
    assert "1 of 2 calls ok" in out


def test_folders_that_hold_no_dump(tmp_path, capsys):
    assert cli.main(["replay", str(tmp_path)]) == 1
    assert cli.main(["replay", str(tmp_path / "none")]) == 1
    err = capsys.readouterr().err
    assert "no dumped call in it" in err and "no such folder" in err


def test_a_dump_of_another_fastattn_is_refused(dumping):
    F.quantize_fp8(to_paddle(np.ones((2, 64), np.float32)))
    dump = last(dumping)
    with pytest.raises(files.DumpError, match="'quantize_fp9' is not in this build"):
        replay.Call(changed(dump, op="quantize_fp9"))
    with pytest.raises(files.DumpError, match="other arguments in this fastattn"):
        replay.Call(changed(dump, order=["scale", "x"]))


def _wrong(value):
    """Results that are off by what a wrong scale, or one wrong element, does."""
    data = value.data.copy()
    if value.dtype in ("bfloat16", "float32"):
        floats = tensors.array_of(value).astype(np.float32) * np.float32(1.02)
        kind = BF16 if value.dtype == "bfloat16" else np.float32
        data = floats.astype(kind).reshape(-1).view(np.uint8)
    elif value.dtype == "int32":
        data.view(np.int32)[0] += 1
    else:
        data[len(data) // 2] ^= 1
    return value._replace(data=np.ascontiguousarray(data))


@pytest.mark.parametrize("name", MODELLED)
def test_the_comparison_finds_wrong_results(name, dumping):
    make_call(name, "cpu")()
    dump = next(d for d in map(files.read_call, files.calls_in(dumping)) if d.results)
    op = dump.facts["op"]
    right = again(dump).dumped
    assert right and all(v.fits for v in right.values()), right
    call = replay.Call(dump)
    for result in right:  # each by itself
        values = {**dump.results, result: _wrong(dump.results[result])}
        arrays = {n: tensors.array_of(v) for n, v in values.items()}
        wrong = model.verdicts(op, call.given(), arrays, on_gpu=False)
        assert wrong[result].fits is False, (result, wrong[result].text)
        others = [v.fits for n, v in wrong.items() if n != result]
        assert all(others)


def test_a_wrong_dump_ends_with_status_1(dumping, capsys):
    make_call("paged_attention", "cpu")()
    dump = last(dumping)
    results = {**dump.results, "result": _wrong(dump.results["result"])}
    changed(dump, results=results)
    assert cli.main(["replay", str(dump.folder), "--no-time"]) == 1
    out = capsys.readouterr().out
    assert "dump against model: result: DIFFERS" in out
    assert "replay against model: result: ok" in out  # the kernel is right here


@pytest.mark.parametrize("dtype", ["e4m3", "bfloat16"])
@pytest.mark.parametrize("coded", [False, True])
def test_results_of_a_gpu_that_multiplies_fp8(dtype, coded, dumping):
    """A CPU's results are within the wider bounds of a GPU, and a wrong scale is not."""
    options = {} if dtype == "e4m3" else {"quantize_q": True}
    if coded:
        options["out_scale"] = to_paddle(np.asarray([0.5], np.float32))
    calls._paged(calls._Inputs("cpu"), BF16 if dtype == "bfloat16" else dtype, **options)()
    dump = last(dumping)
    call = replay.Call(dump)
    for factor, fits in ((1.0, True), (1.25, False)):
        arrays = {n: tensors.array_of(v) for n, v in dump.results.items()}
        if coded:
            wide = numerics.from_codes(arrays["result"], "e4m3").astype(np.float32) * factor
            arrays["result"] = numerics.to_codes(wide, "e4m3")
        else:
            wide = arrays["result"].astype(np.float32) * np.float32(factor)
            arrays["result"] = wide.astype(BF16)
        found = model.verdicts(call.op, call.given(), arrays, on_gpu=True)
        assert found["result"].fits is fits, found
        assert found["softmax_lse"].fits


@pytest.mark.skipif(
    paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0,
    reason="replays there",
)
def test_a_dump_of_a_gpu_replays_on_a_cpu(dumping):
    make_call("paged_attention", "cpu")()
    dump = last(dumping)
    layout = {name: {**at, "place": "gpu:3"} for name, at in dump.facts["inputs"].items()}
    moved = {**dump.facts, "place": "gpu:3", "inputs": layout}
    files.write_facts(dump.folder, moved)
    call = replay.Call(files.read_call(dump.folder))
    assert call.place == "cpu" and replay.replay(call, timed=False).fits


@pytest.mark.parametrize("contiguous", [False, True])
def test_views_of_a_pool(contiguous, dumping):
    rng = np.random.default_rng(5)
    pool = to_paddle(rng.normal(size=(3, 2, 2, 64, 64)).astype(BF16))  # K and V of a block together
    shape, strides = [3, 2, 64, 64], [16384, 4096, 64, 1]
    key, value = (_views.strided_view(pool, shape, strides, first) for first in (0, 8192))
    new = [to_paddle(rng.normal(size=(5, 2, 64)).astype(BF16)) for _ in range(2)]
    tables = [int32(x) for x in ([[2, 0]], [0, 5], [62], [5])]
    F.write_cache_kv(*new, key, value, *tables)
    dump = last(dumping)
    found = again(dump, contiguous=contiguous)
    assert found.fits and all(v.text == "the same bits" for v in found.again.values()), found
    call = replay.Call(dump, contiguous=contiguous)
    made = dict(zip(call.sig.inputs, call.inputs()))
    assert list(made["key_cache"].strides) == (shape_strides(shape) if contiguous else strides)


def shape_strides(shape):
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def test_padding_of_a_given_output_keeps_its_contents(dumping):
    rng = np.random.default_rng(5)
    q, k, v = (to_paddle(rng.normal(size=(9, 2, 64)).astype(BF16)) for _ in range(3))
    out = to_paddle(np.full((9, 2, 64), 7, BF16))
    cu = int32([0, 6])
    F.flash_attention(q, k, v, cu, cu, 6, 6, out=out, return_softmax_lse=True)
    assert again(last(dumping)).fits


@pytest.mark.parametrize("name", REPLAYED)
def test_scripts_run_by_themselves(name, dumping, monkeypatch, capsys):
    make_call(name, "cpu")()
    dump = last(dumping)
    arrays = {n: tensors.array_of(value) for n, value in dump.inputs.items()}
    text = script.minimal(dump, arrays)
    assert str(dump.folder) not in text
    exec(compile(text, "script", "exec"), {"__name__": "script"})
    assert capsys.readouterr().out.startswith(tuple(dump.results))


def test_scripts_keep_the_tables(dumping):
    indices = np.random.default_rng(0).integers(0, 4, (40, 20)).astype(np.int32)
    F.topk_to_slots(int32(indices), int32(np.arange(160).reshape(40, 4)), num_blocks=160)
    dump = last(dumping)
    namespace = {}
    arrays = {n: tensors.array_of(value) for n, value in dump.inputs.items()}
    exec(script.minimal(dump, arrays), namespace)
    assert np.array_equal(namespace["indices"].numpy(), indices)


def test_work_that_would_take_minutes_is_left_out(dumping, monkeypatch):
    make_call("paged_attention", "cpu")()
    monkeypatch.setattr(model, "MOST_WORK", 1e3)
    dump = last(dumping)
    assert again(dump).replayed["-"].fits is None
    call = replay.Call(dump)
    assert replay.replay(call, with_model="always", timed=False).replayed["result"].fits
    assert replay.replay(call, with_model="never", timed=False).replayed == {}


def test_contents_from_a_seed_are_compared(tmp_path, monkeypatch):
    settings = DumpSettings(tmp_path, seed=True)
    monkeypatch.setattr(_ops, "call", record.recorded(_ops.call, _ops.signature, settings))
    make_call("paged_attention", "cpu")()
    dump = last(tmp_path)
    assert {"q", "key_cache", "cache_k_scales"} <= {*dump.facts["made_up"]}
    found = again(dump, seed=4)
    assert found.fits and found.replayed["result"].fits and not found.dumped


@pytest.mark.parametrize(
    "got, want, fits",
    [
        ([1.0, np.nan], [1.0, np.nan], True),
        ([1.0, 2.0], [1.0, np.nan], False),
        ([np.inf, 2.0], [np.inf, 2.0], True),
        ([-np.inf, 2.0], [np.inf, 2.0], False),
        ([1.0, 2.11], [1.0, 2.0], False),
        ([1.0, 2.09], [1.0, 2.0], True),
    ],
)
def test_bounds(got, want, fits):
    assert compare.within(np.array(got), np.array(want), 0.1).fits is fits


def test_bits():
    nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert compare.same_bits(nan[:1], nan[1:]).fits
    zero = np.array([0.0], np.float32)
    assert not compare.same_bits(zero, -zero).fits
    assert not compare.same_bits(zero, zero.astype(np.float64)).fits
    assert not compare.same_bits(zero, np.zeros(2, np.float32)).fits


def test_a_place_that_is_not_here(dumping):
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        pytest.skip("there is a GPU")
    F.quantize_fp8(to_paddle(np.ones((2, 64), np.float32)))
    with pytest.raises(files.DumpError, match="no GPU here"):
        replay.Call(last(dumping), place="gpu")
