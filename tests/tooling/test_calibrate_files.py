"""Files of the calibrator: damaged ones are refused or say what was written; content is checked."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from fastattn.calibrate import Calibration, LayerCalibration, read_samples
from fastattn.calibrate.calibration import FORMAT
from fastattn.calibrate.errors import CalibrationError
from fastattn.calibrate.tensor_files import read_tensors, write_tensors
from fastattn.cli import main
from tests.support.tensors import BF16

pytest.importorskip("safetensors")
KV, DIM = 2, 64
FIELDS = [field.name for field in dataclasses.fields(LayerCalibration)]


def calibration() -> Calibration:
    """A layer with a centre and a feedback, and one with static scales."""
    rng = np.random.default_rng(5)
    feedback = rng.normal(size=(KV, DIM, DIM)).astype(np.float32)
    center = rng.normal(size=(KV, DIM)).astype(np.float32)
    scales = [rng.uniform(0.01, 0.1, KV).astype(np.float32) for _ in "kv"]
    return Calibration(
        {
            0: LayerCalibration(
                "block_wise_int4", None, None, "hadamard", center, 0.01, {"a": 0.01}, feedback
            ),
            3: LayerCalibration("cache_int8", *scales),
        }
    )


def same(first: Calibration, second: Calibration) -> bool:
    if set(first.layers) != set(second.layers):
        return False
    pairs = [
        (getattr(first.layers[n], name), getattr(second.layers[n], name))
        for n in first.layers
        for name in FIELDS
    ]
    return all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) and b is not None else a is b or a == b
        for a, b in pairs
    )


def mutated(whole: bytes, rng: np.random.Generator) -> bytes:
    """Cut, overwritten, lengthened or with a bit flipped near its start."""
    data, kind = bytearray(whole), rng.integers(4)
    at = int(rng.integers(len(data)))
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
    elif kind == 2:
        data[at:at] = rng.bytes(rng.integers(1, 9))
    else:
        data[at % 900] ^= 1 << int(rng.integers(8))
    return bytes(data)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_damaged_calibration_is_refused_or_the_same(tmp_path, suffix):
    path, found = tmp_path / f"a{suffix}", calibration()
    found.write(path)
    assert same(Calibration.read(path), found)
    whole, rng = path.read_bytes(), np.random.default_rng(11)
    refused = 0
    for _ in range(400):
        path.write_bytes(mutated(whole, rng))
        try:
            assert same(Calibration.read(path), found)
        except CalibrationError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 300


def arrays_of_samples(tokens: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {
        f"layers.0.{name}": rng.normal(size=(tokens, heads, DIM)).astype(np.float32)
        for name, heads in (("key", 1), ("value", 1), ("query", 2))
    }


def test_damaged_samples_are_refused_or_the_same(tmp_path):
    path, arrays = tmp_path / "a.npz", arrays_of_samples()
    np.savez(path, **arrays)
    whole, rng = path.read_bytes(), np.random.default_rng(12)
    refused = 0
    for _ in range(400):
        path.write_bytes(mutated(whole, rng))
        try:
            (samples,) = read_samples(path).values()
            for name in ("key", "value", "query"):
                found = getattr(samples, name)
                # A name may be lost. Only the query is not needed.
                if found is not None or name != "query":
                    np.testing.assert_array_equal(found, arrays[f"layers.0.{name}"])
        except CalibrationError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 300


def test_shapes_that_are_smaller_than_their_arrays(tmp_path):
    """NumPy's own reader stops before the end of an entry, where zipfile looks at the CRC."""
    path = tmp_path / "a.npz"
    np.savez(path, **arrays_of_samples(tokens=90))
    whole = path.read_bytes()
    smaller = whole.replace(b"(90, ", b"(10, ")
    assert sum(a != b for a, b in zip(smaller, whole)) == 3
    path.write_bytes(smaller)
    with pytest.raises(CalibrationError, match="cannot be read: Bad CRC-32"):
        read_samples(path)


def test_headers_that_numpy_cannot_tokenise(tmp_path, capsys):
    path = tmp_path / "a.npz"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (6, 1, 64, ("
    header = header.ljust(117) + b"\n"
    entry = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("layers.0.key.npy", entry)
    assert main(["calibrate", str(path)]) == 1
    assert f"{path}: cannot be read" in capsys.readouterr().err


# What stands in a whole file.


def written(path, layers, tensors=()):
    write_tensors(path, dict(tensors), {"format": FORMAT, "layers": layers})
    return path


def about(kind="block_wise_int8", rotation="none", error=None, errors=None):
    return {
        "cache_quant_type": kind,
        "cache_k_rotation": rotation,
        "error": error,
        "errors": errors or {},
    }


def array(*numbers):
    return np.array(numbers, np.float32)


CENTER = np.zeros((1, 64), np.float32)
PAIR = {"layers.0.cache_k_out_scale": array(0.5), "layers.0.cache_v_out_scale": array(0.5)}
WRONG = {
    "no layer": ({}, {}, "there is no layer"),
    "a list": ([about()], {}, "expected layers by their number"),
    "zeros in front": ({"01": about()}, {}, "expected the number of a layer"),
    "beyond": ({"1000000": about()}, {}, "expected the number of a layer"),
    "endless": ({"9" * 5000: about()}, {}, "expected the number of a layer"),
    "negative": ({"-1": about()}, {}, "expected the number of a layer"),
    "other digits": ({"\u0663": about()}, {}, "expected the number of a layer"),
    "type": ({"0": about("int2")}, {}, "layer 0 has unknown type 'int2'"),
    "type's type": ({"0": about(["none"])}, {}, "layer 0 has unknown type"),
    "rotation": ({"0": about(rotation="givens")}, {}, "layer 0 has unknown rotation 'givens'"),
    "rotation's type": ({"0": about(rotation={})}, {}, "layer 0 has unknown rotation"),
    "field": ({"0": {**about(), "more": 1}}, {}, "layer 0: expected cache_quant_type"),
    "no field": ({"0": {"cache_quant_type": "none"}}, {}, "layer 0: expected cache_quant_type"),
    "error": ({"0": about(error="small")}, {}, "error: expected a number from 0 on"),
    "NaN error": ({"0": about(error=float("nan"))}, {}, "error: expected a number from 0 on"),
    "errors": ({"0": about(errors=[1])}, {}, "errors: expected numbers by"),
    "errors' numbers": ({"0": about(errors={"a": -1})}, {}, "a: expected a number from 0 on"),
    "no scales": ({"0": about("cache_int8")}, {}, "has type cache_int8 and lacks cache_k_out"),
    "needless scales": ({"0": about()}, PAIR, "has type block_wise_int8 and has cache_k_out"),
    "rotated none": ({"0": about("none", "hadamard")}, {}, "is neither rotated nor centred"),
    "unknown tensor": (
        {"0": about()},
        {"layers.0.cache_k_centre": CENTER},
        "'layers.0.cache_k_centre' belongs to no layer",
    ),
    "tensor of no layer": (
        {"0": about()},
        {"layers.1.cache_k_center": CENTER},
        "'layers.1.cache_k_center' belongs to no layer",
    ),
    "NaN center": (
        {"0": about()},
        {"layers.0.cache_k_center": CENTER * np.nan},
        "layer 0: cache_k_center: not all numbers are finite",
    ),
    "flat center": (
        {"0": about()},
        {"layers.0.cache_k_center": CENTER[0]},
        "layer 0: cache_k_center: expected shape [KV, D], got [64]",
    ),
    "channels": (
        {"0": about()},
        {"layers.0.cache_k_center": np.zeros((1, 80), np.float32)},
        "layer 0: cache_k_center: expected heads of 64 or 96 or 128 or 192 or 256 channels, got 80",
    ),
    "number of scales": (
        {"0": about("cache_fp8")},
        {**PAIR, "layers.0.cache_k_out_scale": array(1, 2), "layers.0.cache_k_center": CENTER},
        "cache_k_out_scale: expected 1 or 1 scales for 1 KV heads",
    ),
    **{
        f"scale {scale}": (
            {"0": about("cache_fp8")},
            {**PAIR, "layers.0.cache_v_out_scale": array(scale)},
            f"layer 0: cache_v_out_scale: {text}",
        )
        for scale, text in (
            (0, "expected positive numbers"),
            (-1, "expected positive numbers"),
            (np.inf, "not all numbers are finite"),
        )
    },
}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("name", WRONG)
def test_content_that_no_layer_can_be_run_with(tmp_path, suffix, name):
    layers, tensors, text = WRONG[name]
    path = written(tmp_path / f"a{suffix}", layers, tensors)
    with pytest.raises(CalibrationError, match=re.escape(text)) as raised:
        Calibration.read(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cache_k_out_scale": None}, "lacks cache_k_out_scale"),
        ({"cache_v_out_scale": array(0, 1)}, "expected positive numbers"),
        ({"cache_k_out_scale": np.array([1e300])}, "not all numbers are finite"),
        ({"error": float("nan")}, "error: expected a number from 0 on"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".json"])
def test_nothing_else_is_written(tmp_path, suffix, change, text):
    path = tmp_path / f"a{suffix}"
    layer = dataclasses.replace(calibration().layers[3], **change)
    with pytest.raises(CalibrationError, match=text):
        Calibration({0: layer}).write(path)
    assert not path.exists()


def test_names_that_a_type_decides():
    """A rotation of None is written, read and named."""
    layer = LayerCalibration("block_wise_int4", cache_k_rotation=None, cache_k_center=CENTER)
    assert layer.name == "block_wise_int4+center"


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_the_same_calibration_is_the_same_bytes(tmp_path, suffix):
    """Servers tell their caches apart by the bytes of the file."""
    digests = set()
    for number in range(8):
        path = tmp_path / f"{number}{suffix}"
        calibration().write(path)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_the_checksum_covers_everything(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    calibration().write(path)
    tensors, told = read_tensors(path)
    center = tensors["layers.0.cache_k_center"]
    changes = [
        ({**tensors, "layers.0.cache_k_center": center[::-1]}, told),
        ({**tensors, "layers.0.cache_k_center": center.reshape(1, -1)}, told),
        ({**tensors, "layers.0.cache_v_center": tensors["layers.0.cache_k_center"]}, told),
        (tensors, {**told, "layers": {}}),
    ]
    sums = {stored_sum(path)}
    for number, (changed, about_it) in enumerate(changes):
        other = tmp_path / f"{number}{suffix}"
        write_tensors(other, changed, about_it)
        sums.add(stored_sum(other))
    assert len(sums) == 1 + len(changes)


def stored_sum(path) -> str:
    """The checksum in a file, found without the reader."""
    data = path.read_bytes()
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            text = archive.read("fastattn-calibration.npy")[8:].replace(b"\0", b"")
        return re.search(rb'"sha256": "([0-9a-f]{64})"', text)[1].decode()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["fastattn-calibration"])["sha256"]


# Files by other hands.


def safetensors(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "offsets", [(-8, 0), (0, 4), (8, 0), (1000, 1008), (4, 12)], ids=lambda x: f"{x[0]}..{x[1]}"
)
def test_offsets_outside_of_the_data(tmp_path, offsets):
    """[-8, 0] was the end of the header."""
    header = {"layers.0.key": entry("F32", [2], *offsets)}
    path = safetensors(tmp_path / "a.safetensors", header, bytes(8))
    for read in (Calibration.read, read_samples):
        with pytest.raises(CalibrationError, match="cannot be read"):
            read(path)


def test_files_without_a_checksum(tmp_path):
    """Those of the first version, and those of others."""
    layers = json.dumps({"0": about()})
    old = {"format": "fastattn-calibration-1", "layers": layers}
    path = safetensors(tmp_path / "old.safetensors", {"__metadata__": old})
    with pytest.raises(CalibrationError, match="it has no checksum, as an older version"):
        Calibration.read(path)
    np.savez(tmp_path / "old.npz", __metadata__=np.array(json.dumps(old)))
    with pytest.raises(CalibrationError, match="it has no checksum, as an older version"):
        Calibration.read(tmp_path / "old.npz")
    text = json.dumps({"format": FORMAT, "layers": {"0": about()}})
    header = {"__metadata__": {"fastattn-calibration": text}}
    with pytest.raises(CalibrationError, match="it has no checksum"):
        Calibration.read(safetensors(tmp_path / "no.safetensors", header))
    with pytest.raises(CalibrationError, match="not written by"):
        Calibration.read(safetensors(tmp_path / "weights.safetensors", {"__metadata__": {"a": ""}}))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"0": 1, "0": 1}', "{"], ids=["deep", "twice", "{"]
)
def test_json_that_is_damaged(tmp_path, text):
    header = {"__metadata__": {"fastattn-calibration": text}}
    for name in ("a.safetensors", "a.json"):
        path = tmp_path / name
        path.write_text(text) if name == "a.json" else safetensors(path, header)
        with pytest.raises(CalibrationError, match=r"cannot be read|no JSON"):
            Calibration.read(path, cache_quant_type="cache_fp8")


@pytest.mark.parametrize(
    ("number", "value", "text"),
    [
        ("01", [1], "expected the number of a layer"),
        ("9" * 5000, [1], "expected the number of a layer"),
        ("0", ["1"], "expected numbers"),
        ("0", [True], "expected numbers"),
        ("0", [[1], [1, 2]], "expected numbers"),
        ("0", [10**400], "expected numbers"),
        ("0", [float("nan")], "positive, finite"),
    ],
    ids=lambda x: f"{x!r:.12}",
)
def test_wrong_numbers_of_fastdeploy(tmp_path, number, value, text):
    path = tmp_path / "kv_cache_scale.json"
    name = f"ernie.layers.{number}.self_attn.cache{{}}_matmul.activation_scale"
    path.write_text(json.dumps({name.format("k"): value, name.format("v"): value}))
    with pytest.raises(CalibrationError, match=text):
        Calibration.read(path, cache_quant_type="cache_int8")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_samples_in_safetensors(tmp_path, dtype):
    """By another program: no checksum, other entries and other names in front."""
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": BF16}
    arrays = {n: x.astype(kinds[dtype]) for n, x in arrays_of_samples().items()}
    header, body = {"__metadata__": {"by": "another"}, "ids": entry("I64", [2], 0, 16)}, bytes(16)
    for name, x in arrays.items():
        end = len(body) + x.nbytes
        header[f"model.{name}"] = entry(dtype, list(x.shape), len(body), end)
        body += x.tobytes()
    (read,) = read_samples(safetensors(tmp_path / "a.safetensors", header, body)).values()
    for name in ("key", "value", "query"):
        expected = arrays[f"layers.0.{name}"].astype(np.float32)
        np.testing.assert_array_equal(getattr(read, name), expected)


def test_samples_named_twice(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            file = io.BytesIO()
            np.save(file, arrays_of_samples()["layers.0.key"])
            archive.writestr("layers.0.key.npy", file.getvalue())
    with pytest.raises(CalibrationError, match=r"layers\.0\.key is there twice"):
        read_samples(path)
    np.savez(path, **{f"layers.{n}.key": np.zeros((1, 1, 64), np.float32) for n in ("1", "01")})
    with pytest.raises(CalibrationError, match="expected the number of a layer"):
        read_samples(path)


def test_without_the_package(tmp_path, monkeypatch, capsys):
    """Only its own files need it."""
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "a.npz"
    calibration().write(path)
    assert same(Calibration.read(path), calibration())
    path = safetensors(tmp_path / "a.safetensors", {})
    assert main(["calibrate", str(path)]) == 1
    assert "safetensors" in capsys.readouterr().err


# Pickles.


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["a.pdparams", "a.npz", "a.safetensors", "a"])
def test_no_pickle_runs_unless_it_is_allowed(tmp_path, name, capsys):
    path, made = tmp_path / name, tmp_path / "made"
    path.write_bytes(pickle.dumps({"layers.0.key": Touch(made)}, protocol=2))
    assert main(["calibrate", str(path)]) == 1
    message = capsys.readouterr().err
    assert "--allow-pickle" in message or "cannot be read" in message
    with pytest.raises(CalibrationError):
        read_samples(path)
    assert not made.exists()


def test_no_pickle_runs_inside_of_an_npz(tmp_path, capsys):
    path, made = tmp_path / "a.npz", tmp_path / "made"
    np.savez(path, **{"layers.0.key": np.array([Touch(made)], object)})
    assert main(["calibrate", str(path), "--allow-pickle"]) == 1
    assert "Object arrays cannot be loaded" in capsys.readouterr().err
    assert not made.exists()


def test_allowed_pickles(tmp_path, capsys):
    path = tmp_path / "a.pdparams"
    tensors = {name: paddle.to_tensor(x) for name, x in arrays_of_samples().items()}
    paddle.save(tensors, str(path))
    assert main(["calibrate", str(path)]) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert main(["calibrate", str(path), "--allow-pickle", "--bound", "1"]) == 0
    path.write_text("no dump")
    assert main(["calibrate", str(path), "--allow-pickle"]) == 1
    assert "not a dump of Paddle" in capsys.readouterr().err


@pytest.mark.parametrize("value", [[[1], [1, 2]], "text", None, {1: {2: 3}}], ids=str)
def test_allowed_pickles_of_other_things(tmp_path, capsys, value):
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps({"layers.0.key": value}, protocol=2))
    assert main(["calibrate", str(path), "--allow-pickle"]) == 1
    assert f"{path}: " in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("rotated", [None, False, True])
def test_a_file_tells_whether_values_are_rotated(tmp_path, suffix, rotated):
    path = tmp_path / f"found{suffix}"
    found = calibration()
    found.rotated_values = rotated
    found.write(path)
    assert Calibration.read(path).rotated_values is rotated
    facts = read_tensors(path)[1]
    assert facts.get("rotated_values") is rotated
    assert ("rotated_values" in facts) is (rotated is not None)  # as older versions wrote it
    for has in (False, True):
        model = SimpleNamespace(name="tiny", rotated_values=has)
        if rotated in (None, has):
            found.check_model(model)
            continue
        with pytest.raises(CalibrationError, match=r"tiny has values .*--rotate-values"):
            found.check_model(model)


@pytest.mark.parametrize("wrong", [None, 1, "yes", []])
def test_what_is_no_answer_about_values(tmp_path, wrong):
    path = tmp_path / "found.npz"
    facts = {"format": FORMAT, "layers": {"0": about()}, "rotated_values": wrong}
    write_tensors(path, {}, facts)
    with pytest.raises(CalibrationError, match="rotated_values: expected true or false"):
        Calibration.read(path)


def test_a_layer_of_a_file_allocates_its_cache(tmp_path):
    """What the writer and the attention get is what the file holds."""
    rng = np.random.default_rng(0)
    center = rng.normal(size=(2, 64)).astype(np.float32)
    feedback = rng.normal(size=(2, 64, 64)).astype(np.float32)
    layers = {
        0: LayerCalibration(
            "block_wise_int4",
            cache_k_rotation="hadamard",
            cache_k_center=center,
            cache_k_feedback=feedback,
        ),
        1: LayerCalibration("block_wise_int8", cache_k_rotation=None),
    }
    Calibration(layers).write(tmp_path / "found.npz")
    read = Calibration.read(tmp_path / "found.npz").layers
    cache = read[0].make_cache(3, 2, 64)
    assert cache.key_cache.shape == [3, 2, 64, 32] and cache.k_rotation == "hadamard"
    np.testing.assert_array_equal(cache.arguments["k_center"].numpy(), center)
    np.testing.assert_array_equal(cache.arguments["k_feedback"].numpy(), feedback)
    assert read[1].make_cache(1, 2, 128).k_rotation == "hadamard"  # the type's default
    scaled = LayerCalibration("cache_fp8", *(np.full(2, x, np.float32) for x in (0.5, 0.25)))
    assert scaled.make_cache(1, 2, 64).arguments["cache_v_scales"].numpy().tolist() == [0.25, 0.25]
