"""FASTATTN_DUMP: which calls are written, what the files hold, that off costs nothing."""

from __future__ import annotations

import json
import os
import re
import stat

import ml_dtypes
import numpy as np
import paddle
import pytest

from fastattn import _ops, _views, env
from fastattn.dump import files, record, seeds, tensors
from fastattn.env import DumpSettings
from tests.support import fresh
from tests.support.tensors import to_numpy, to_paddle

QUANTIZE = "import paddle, fastattn.functional as F\npaddle.set_device('cpu')\n"


def run(code, dump=None, **environ):
    others = ("FASTATTN_LOG", "FASTATTN_DUMP", "FASTATTN_CHECK", "FASTATTN_PROFILE")
    environment = {k: v for k, v in os.environ.items() if k not in others}
    if dump is not None:
        environment["FASTATTN_DUMP"] = str(dump)
    return fresh.run(code, env={**environment, **environ})


def recorder(folder, **settings):
    """`_ops.call` as the variable binds it."""
    return record.recorded(_ops.call, _ops.signature, DumpSettings(folder, **settings))


def quantize(call, values, **changes):
    x = values if isinstance(values, paddle.Tensor) else to_paddle(np.asarray(values, np.float32))
    attrs = {"granularity": "token", "group_size": 128, **changes}
    return call("quantize_fp8", (x, None, None), tuple(attrs.values()))


def names(folder):
    return [path.name.partition("-p")[0] for path in files.calls_in(folder)]


def test_nothing_is_wrapped_or_imported_when_it_is_off():
    code = QUANTIZE + (
        "from fastattn import _ops\nimport sys\nF.quantize_fp8(paddle.ones([2, 64]))\n"
        "assert not hasattr(_ops.call, '__wrapped__')\n"
        "assert not [m for m in sys.modules if m.startswith('fastattn.dump')]\n"
        "assert _ops.is_direct()\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_process_writes_its_calls(tmp_path):
    code = QUANTIZE + "F.quantize_fp8(paddle.ones([2, 64]))\n"
    done = run(code, tmp_path / "new" / "dumps")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "new" / "dumps") == ["000001-quantize_fp8"]
    assert f"calls are written to {tmp_path}" in done.stderr


@pytest.mark.parametrize(
    "text", [",nan", "d,every=0", "d,max=x", "d,nan=1", "d,often", "d,mib=0", "d,nan,seed"]
)
def test_what_is_no_setting_warns_and_is_off(text, monkeypatch):
    monkeypatch.setenv("FASTATTN_DUMP", text)
    with pytest.warns(UserWarning, match=rf"FASTATTN_DUMP: expected DIR.* got '{re.escape(text)}'"):
        assert env.dump() is None


def test_settings(monkeypatch):
    monkeypatch.delenv("FASTATTN_DUMP", raising=False)
    assert env.dump() is None
    monkeypatch.setenv("FASTATTN_DUMP", "a/b,every=10,max=7,mib=0.5,op=mla_*,nan")
    found = env.dump()
    assert found == DumpSettings(found.folder, 10, 7, 0.5, "mla_*", True, False)
    assert str(found.folder) == "a/b"


def test_every_and_max(tmp_path, caplog):
    call = recorder(tmp_path, every=2, most=2)
    for i in range(9):
        quantize(call, np.full((1, 32), i + 1))
    first = [files.read_call(path).inputs["x"] for path in files.calls_in(tmp_path)]
    assert [tensors.array_of(x)[0, 0] for x in first] == [1, 3]


def test_bytes_are_bound(tmp_path, caplog):
    call = recorder(tmp_path, mib=0.02)
    for _ in range(3):
        quantize(call, np.ones((100, 32)))  # 12.5 KiB, and 3.5 of results
    assert len(names(tmp_path)) == 1
    assert "exceeds what mib= leaves" in caplog.text
    assert caplog.text.count("mib=") == 1  # and not at every call


def test_only_operators_of_a_pattern(tmp_path):
    call = recorder(tmp_path, op="mxfp4_*")
    quantize(call, np.ones((1, 32)))
    call("mxfp4_quantize", (to_paddle(np.ones((1, 32), np.float32)),), ())
    assert names(tmp_path) == ["000001-mxfp4_quantize"]


def test_files_are_private_whole_and_no_pickle(tmp_path):
    from safetensors import deserialize

    quantize(recorder(tmp_path / "d"), np.ones((2, 32)))
    (folder,) = files.calls_in(tmp_path / "d")
    assert sorted(p.name for p in folder.iterdir()) == [files.CALL, files.INPUTS, files.RESULTS]
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    json.loads((folder / files.CALL).read_text())
    (entry,) = deserialize((folder / files.INPUTS).read_bytes())  # another reader takes them
    assert entry[0] == "x" and entry[1]["dtype"] == "F32" and entry[1]["shape"] == [2, 32]


def test_facts_of_a_call(tmp_path):
    quantize(recorder(tmp_path), np.ones((2, 32)))
    facts = files.read_facts(files.calls_in(tmp_path)[0])
    assert facts["op"] == "quantize_fp8" and facts["status"] == "returned"
    assert facts["place"] == "cpu" and facts["plan"]["kernel"] == "C++ and OpenMP"
    assert facts["attrs"] == {"granularity": "token", "group_size": 128}
    assert facts["inputs"]["x"]["strides"] == [32, 1]
    assert facts["order"] == ["x", "scale", "output"]  # the last two are None
    text = json.dumps(facts)
    assert str(tmp_path) not in text and os.uname().nodename not in text


def test_only_calls_that_gave_nan(tmp_path):
    call = recorder(tmp_path, nan=True)
    x = np.ones((3, 32), np.float32)
    quantize(call, x)
    x[1, 4] = np.nan
    quantize(call, x)
    (folder,) = files.calls_in(tmp_path)
    dump = files.read_call(folder)
    assert dump.facts["nan"] == {"x": 1, "scales": 1}
    assert np.array_equal(tensors.array_of(dump.inputs["x"]), x, equal_nan=True)


def test_a_call_that_raises_is_dumped(tmp_path):
    for nan in (False, True):
        folder = tmp_path / str(nan)
        with pytest.raises(ValueError, match="granularity"):
            quantize(recorder(folder, nan=nan), np.ones((2, 32)), granularity="row")
        facts = files.read_facts(files.calls_in(folder)[0])
        assert facts["status"] == "raised" and facts["error"][0] == "ValueError"
        assert "granularity" in facts["error"][1]


def test_a_process_that_dies_in_the_call_leaves_its_inputs(tmp_path):
    code = QUANTIZE + (
        "import os\nfrom fastattn import _ops\nrun, operators = _ops._load_direct()\n"
        "_ops._load_direct = lambda: (lambda *a: os.kill(os.getpid(), 9), operators)\n"
        "F.quantize_fp8(paddle.ones([2, 64]))\n"
    )
    assert run(code, tmp_path).returncode == -9
    dump = files.read_call(files.calls_in(tmp_path)[0])
    assert dump.facts["status"] == "started" and [*dump.inputs] == ["x"] and not dump.results


def test_what_a_call_writes_is_dumped_as_it_was_before(tmp_path):
    for nan in (False, True):
        cache = to_paddle(np.full((2, 4, 64), np.nan if nan else 7, np.float32))
        before = to_numpy(cache).copy()
        score = np.ones((2, 64), np.float32)
        score[1, 3] = np.nan
        inputs = [to_paddle(a) for a in (score, np.ones((4, 32), np.float32))]
        slots = [to_paddle(np.asarray(a, np.int32)) for a in ([3, 4], [5, 1])]
        call = recorder(tmp_path / str(nan), nan=nan)
        call("save_partial_states", (*inputs, slots[0], cache, slots[1]), ())
        assert not np.array_equal(to_numpy(cache), before, equal_nan=True)
        found = files.calls_in(tmp_path / str(nan)) if (tmp_path / str(nan)).exists() else []
        if nan:  # the cache had more NaN before than after: the call made none
            assert found == []
            continue
        dump = files.read_call(found[0])
        assert np.array_equal(tensors.array_of(dump.inputs["state_cache"]), before)
        after = tensors.array_of(dump.results["state_cache_out"])
        assert np.array_equal(after, to_numpy(cache), equal_nan=True)


def test_a_traced_program_is_told_and_runs(tmp_path):
    (tmp_path / "traced.py").write_text(
        "import paddle\nimport fastattn.functional as F\n"
        "@paddle.jit.to_static(full_graph=True)\n"
        "def f(x):\n    return F.quantize_fp8(x, granularity='token')\n"
        "f.eval()\nprint(f(paddle.ones([2, 64]))[1].shape)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("import traced", tmp_path / "d", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "quantize_fp8: not dumped while a CUDA graph is captured or a program is traced" in (
        done.stderr
    )
    assert not (tmp_path / "d").exists()


def test_while_a_graph_is_captured_nothing_is_read(tmp_path, monkeypatch, caplog):
    core = paddle.base.core
    monkeypatch.setattr(core, "is_cuda_graph_capturing", lambda: True, raising=False)
    monkeypatch.setattr(tensors, "stored", lambda tensor: pytest.fail("a tensor was read"))
    quantize(recorder(tmp_path / "d"), np.ones((2, 32)))
    assert not (tmp_path / "d").exists() and "CUDA graph is captured" in caplog.text


def test_a_folder_that_cannot_be_written_stops_no_call(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    codes = quantize(recorder(tmp_path / "file"), np.ones((2, 32)))[0]
    assert codes.shape == [2, 32] and "quantize_fp8: not dumped: " in caplog.text


def test_the_log_and_the_dump_together(tmp_path):
    done = run(
        QUANTIZE + "F.quantize_fp8(paddle.ones([2, 64]))\n", f"{tmp_path},max=5", FASTATTN_LOG="3"
    )
    assert done.returncode == 0, done.stderr
    assert "call 1: quantize_fp8: kernel C++ and OpenMP" in done.stderr
    assert "FASTATTN_DUMP: returned: " in done.stderr and len(names(tmp_path)) == 1


DTYPES = {
    "bool": np.array([[True, False, True]]),
    "uint8": np.array([[0, 200, 255]], np.uint8),
    "int8": np.array([[-128, 0, 127]], np.int8),
    "int32": np.array([[-(2**31), 0, 2**31 - 1]], np.int32),
    "int64": np.array([[-(2**63), 0, 2**63 - 1]], np.int64),
    "bfloat16": np.array([[1.5, np.nan, -np.inf]], ml_dtypes.bfloat16),
    "float16": np.array([[1.5, np.nan, -np.inf]], np.float16),
    "float32": np.array([[1.5, np.nan, -np.inf]], np.float32),
    "float64": np.array([[1.5, np.nan, -np.inf]], np.float64),
    "float8_e4m3fn": np.array([[0x38, 0x7F, 0x80]], np.uint8),
    "float8_e5m2": np.array([[0x38, 0x7E, 0x7C]], np.uint8),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back(dtype, tmp_path):
    tensor = to_paddle(DTYPES[dtype])
    if dtype.startswith("float8"):
        if not hasattr(paddle, dtype):
            pytest.skip("this Paddle has no FP8")
        tensor = tensor.view(dtype)
    layout = tensors.layout({"x": tensor})
    digest = files.write_tensors(tmp_path / "x", {"x": tensors.stored(tensor)})
    values = files.read_tensors(tmp_path / "x", digest)
    again = tensors.rebuilt(layout, values, "cpu")["x"]
    assert str(again.dtype) == f"paddle.{dtype}" and again.shape == tensor.shape
    assert to_numpy(again).tobytes() == DTYPES[dtype].tobytes()
    assert tensors.nans(values["x"]) == (1 if "float" in dtype else 0)


def test_views_come_back_with_their_strides_and_shared_memory():
    rng = np.random.default_rng(0)
    pool = to_paddle(rng.integers(0, 255, (3, 2, 4, 16)).astype(np.uint8))
    views = [_views.strided_view(pool, [3, 4, 16], [128, 16, 1], first) for first in (0, 64)]
    plain = to_paddle(rng.normal(size=(4, 8)).astype(np.float32))
    given = {"k": views[0], "v": views[1], "x": plain, "again": plain}
    given["slice"] = _views.strided_view(plain, [4, 2], [8, 1], 3)
    given["empty"] = paddle.zeros([0, 5])
    values = {name: tensors.stored(t) for name, t in given.items()}
    made = tensors.rebuilt(tensors.layout(given), values, "cpu")
    for name, tensor in given.items():
        assert np.array_equal(to_numpy(made[name]), to_numpy(tensor)), name
        assert list(made[name].strides) == list(tensor.strides), name
    assert made["v"].data_ptr() - made["k"].data_ptr() == 64
    assert made["again"].data_ptr() == made["x"].data_ptr()
    assert made["slice"].data_ptr() - made["x"].data_ptr() == 12
    for name, tensor in given.items():
        assert made[name].data_ptr() % 64 == tensor.data_ptr() % 64 or name == "empty"
    apart = tensors.rebuilt(tensors.layout(given), values, "cpu", contiguous=True)
    assert all(t.is_contiguous() for t in apart.values())
    assert np.array_equal(to_numpy(apart["slice"]), to_numpy(given["slice"]))


def test_gaps_of_gigabytes_are_refused_by_name():
    at = {"dtype": "uint8", "shape": [2, 4], "strides": [1 << 40, 1], "place": "cpu"}
    values = {"cache": files.Stored("uint8", (2, 4), np.zeros(8, np.uint8))}
    with pytest.raises(files.DumpError, match=r"cache: .* --contiguous"):
        tensors.rebuilt({"cache": {**at, "buffer": 0, "offset": 0}}, values, "cpu")


def test_contents_from_a_seed(tmp_path):
    tables = to_paddle(np.asarray([[0, 3, -1], [5, -1, -1]], np.int32))
    rest = to_paddle(np.asarray([[4, 2], [1, 0]], np.int32))
    call = recorder(tmp_path, seed=True)
    call("topk_to_slots", (tables, rest, None, None), (4, 5, 5, True, 0, 1, 1))
    quantize(call, np.full((2, 32), 3.0))
    first, second = (files.read_call(path) for path in files.calls_in(tmp_path))
    assert first.facts["made_up"] == [] and [*first.inputs] == ["indices", "block_tables"]
    assert second.facts["made_up"] == ["x"] and not second.inputs and not second.results
    made = [seeds.made_up("x", second.facts["inputs"]["x"], seed) for seed in (0, 0, 1)]
    assert made[0].data.tobytes() == made[1].data.tobytes() != made[2].data.tobytes()


@pytest.mark.parametrize("damage", ["tensor", "facts", "cut", "unfinished", "format"])
def test_what_was_changed_is_refused(damage, tmp_path):
    quantize(recorder(tmp_path), np.ones((2, 32)))
    (folder,) = files.calls_in(tmp_path)
    inputs, facts = folder / files.INPUTS, folder / files.CALL
    if damage == "tensor":
        data = bytearray(inputs.read_bytes())
        data[-1] ^= 1
        inputs.write_bytes(bytes(data))
    elif damage == "facts":
        facts.write_text(facts.read_text().replace('"token"', '"group"'))
    elif damage == "cut":
        inputs.write_bytes(inputs.read_bytes()[:-4])
    elif damage == "unfinished":
        facts.unlink()
    else:
        read = {**json.loads(facts.read_text()), "format": 9}
        files.write_facts(folder, read)
    with pytest.raises(files.DumpError, match=files.CALL if damage != "format" else "format 9"):
        files.read_call(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_headers_that_are_none_are_refused(header, tmp_path):
    path = tmp_path / "x"
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    digest = files.write_atomically(path, [data])
    with pytest.raises(files.DumpError):
        files.read_tensors(path, digest)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        files.write_atomically(tmp_path / "x", [b"abc", 3])
    assert list(tmp_path.iterdir()) == []


def test_codes_and_scales_in_one_memory():
    """Tensors of different dtypes over the same bytes, as planar pages have them."""
    if paddle.__version__.startswith("2."):
        pytest.skip("Paddle 2.6 has no such views")
    pool = to_paddle(np.random.default_rng(0).integers(0, 64, 512).astype(np.uint8))
    scales = _views.strided_view(pool.view(paddle.float32), [3, 2], [32, 1], 30)
    codes = _views.strided_view(pool, [3, 120], [128, 1])
    given = {"codes": codes, "scales": scales}
    values = {name: tensors.stored(t) for name, t in given.items()}
    made = tensors.rebuilt(tensors.layout(given), values, "cpu")
    assert made["scales"].data_ptr() - made["codes"].data_ptr() == 120
    for name, tensor in given.items():
        assert to_numpy(made[name]).tobytes() == to_numpy(tensor).tobytes()
