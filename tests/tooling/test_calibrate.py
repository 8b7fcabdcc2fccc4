"""python -m fastattn calibrate: data whose right answer is known, files of all kinds, backends."""

from __future__ import annotations

import json
import re

import numpy as np
import paddle
import pytest

from fastattn import backends
from fastattn.backends import AttentionLayer, FlashAttentionBackend, ForwardMeta
from fastattn.calibrate import Calibration, calibrate_layer, read_samples
from fastattn.calibrate.choose import (
    TRANSFORMS,
    candidates,
    centre_of,
    outlier_channels,
    scales_of,
    stored,
)
from fastattn.calibrate.errors import CalibrationError
from fastattn.calibrate.samples import LayerSamples
from fastattn.cli import main
from fastattn.reference.attention import dense_attention
from fastattn.reference.cache import quantize_token
from tests.support.tensors import BF16, to_numpy, to_paddle

TOKENS, HEADS, KV, DIM = 160, 4, 2, 64
STATIC = ["cache_int8", "cache_fp8", "none"]


def layer(kind: str = "plain", seed: int = 0) -> LayerSamples:
    """K whose outliers are of one kind."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(TOKENS, HEADS, DIM))
    k = rng.normal(size=(TOKENS, KV, DIM))
    v = rng.normal(size=(TOKENS, KV, DIM)) + 0.5
    if kind == "large channel":  # and queries that are small there, as a model's are
        k[..., 17] *= 20
        q[..., 17] /= 20
    elif kind == "offset":
        k[:, 0, 5] += 40
        k[:, 1, [9, 40]] -= 35
    return LayerSamples(*(x.astype(np.float32) for x in (k, v, q)))


def save(path, layers: dict[int, LayerSamples], **more) -> None:
    arrays = dict(more)
    for number, samples in layers.items():
        for name in ("key", "value", "query"):
            array = getattr(samples, name)
            if array is not None:
                arrays[f"layers.{number}.{name}"] = array
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", "cache_int8"),
        ("large channel", "cache_int8+hadamard"),
        ("offset", "cache_int8+center"),
    ],
)
def test_the_cheapest_that_keeps_the_bound(kind, expected):
    found = calibrate_layer(layer(kind), STATIC, bound=0.02)
    assert found.name == expected
    assert found.error is not None and found.error <= 0.02
    assert list(found.errors)[-1] == expected
    others = [error for name, error in found.errors.items() if name != expected]
    assert all(error > 0.02 for error in others)


def test_dynamic_types():
    kinds = ["block_wise_int8", "block_wise_fp8"]
    assert calibrate_layer(layer(), kinds, bound=0.02).name == "block_wise_int8"
    assert calibrate_layer(layer("large channel"), kinds, bound=0.012).name == (
        "block_wise_int8+hadamard"
    )
    nothing = calibrate_layer(layer(), kinds, bound=0.0)
    assert nothing.error == min(nothing.errors.values()) > 0


def test_four_bits():
    """Dequantised as the cache does it, and rotated where that helps."""
    kinds = ["block_wise_int4", "block_wise_int8"]
    found = calibrate_layer(layer("large channel"), kinds, bound=0.2)
    assert found.name == "block_wise_int4+hadamard"
    x = layer().value
    values = stored(x, "block_wise_int4", None)
    codes, scales = quantize_token(x[5], np.zeros(1, np.float32), "block_wise_int4")
    low_first = np.stack([codes & 15, codes >> 4], -1).reshape(KV, DIM).astype(int) - 8
    np.testing.assert_allclose(values[5], low_first * scales[:, None].astype(np.float64))
    assert 0.02 < np.sqrt(np.mean((values - x) ** 2)) < 0.2


@pytest.mark.parametrize("dim", [80, 160, 512])
@pytest.mark.parametrize("kind", ["none", "cache_int8", "block_wise_fp8", "block_wise_int4"])
def test_heads_that_no_operator_takes(kind, dim):
    samples = LayerSamples(*(np.ones((3, 2, dim), np.float32) for _ in range(3)))
    text = f"expected heads of 64 or 96 or 128 or 192 or 256 channels, got {dim}"
    with pytest.raises(CalibrationError, match=text):
        calibrate_layer(samples, [kind], bound=1)


def test_keys_of_192_channels():
    """Their values have 128, as in the caches."""
    rng = np.random.default_rng(3)
    q, k = (rng.normal(size=(40, heads, 192)).astype(np.float32) for heads in (HEADS, KV))
    v = rng.normal(size=(40, KV, 128)).astype(np.float32)
    samples = LayerSamples(k, v, q).check("layers.0")
    found = calibrate_layer(samples, ["cache_int8"], bound=0.05, granularity="channel")
    assert found.cache_k_out_scale.shape == (KV * 192,)
    np.testing.assert_allclose(
        found.cache_v_out_scale, np.abs(v).max(axis=0).ravel() / 127, rtol=1e-6
    )
    assert 0 < found.error < 0.05
    with pytest.raises(CalibrationError, match="of K with 192 channels, V has 128"):
        LayerSamples(k, k, q).check("layers.0")


def test_blocks_of_four_bits():
    x = layer().value
    values = stored(x, "block_wise_mxfp4", None)
    codes, scales = quantize_token(x[5], np.zeros(1, np.float32), "block_wise_mxfp4")
    assert scales.shape == (KV, DIM // 32) and scales.dtype == np.uint8
    low_first = np.stack([codes & 15, codes >> 4], -1).reshape(KV, DIM)
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    exact = np.where(low_first > 7, -1, 1) * sizes[low_first & 7]
    exact *= np.exp2(scales.astype(np.float64) - 127).repeat(32, -1)
    np.testing.assert_allclose(values[5], exact)
    found = calibrate_layer(layer("large channel"), ["block_wise_mxfp4"], bound=0.0)
    assert "hadamard" in found.name


def test_a_bound_that_only_16_bits_keep():
    assert calibrate_layer(layer(), STATIC, bound=1e-6).cache_quant_type == "none"


def test_candidates_in_their_order():
    names = [f"{c.cache_quant_type} {c.transform}" for c in candidates(STATIC, TRANSFORMS)]
    assert names == [
        *(
            f"{kind} {transform}"
            for kind in ("cache_int8", "cache_fp8")
            for transform in TRANSFORMS
        ),
        "none none",
    ]


def test_without_a_bound_the_least_error():
    """All candidates are tried, and no other has a smaller error."""
    kinds = ["block_wise_fp8", "block_wise_int8"]
    found = calibrate_layer(layer("offset"), kinds, bound=None)
    assert found.cache_quant_type == "block_wise_int8" and found.cache_k_center is not None
    assert len(found.errors) == 2 * len(TRANSFORMS)
    assert found.error == min(found.errors.values()) == found.errors[found.name]


def test_several_texts():
    """Scales and centres cover all of them; the error is that of all queries."""
    texts = [layer("offset", seed) for seed in range(3)]
    texts[1].key *= 2
    found = calibrate_layer(texts, ["cache_int8"], bound=1, transforms=["center"], queries=480)
    keys = np.concatenate([x.key for x in texts])
    np.testing.assert_allclose(found.cache_k_center, keys.mean(0, np.float64), rtol=1e-5, atol=1e-6)
    centred = np.abs(keys - found.cache_k_center).max((0, 2)) / 127
    np.testing.assert_allclose(found.cache_k_out_scale, centred, rtol=1e-5)
    error = size = 0
    for x in texts:
        k = stored(x.key - found.cache_k_center, "cache_int8", found.cache_k_out_scale)
        v = stored(x.value, "cache_int8", found.cache_v_out_scale)
        seen = np.tril(np.ones((TOKENS, TOKENS), bool))
        out, exact = (
            dense_attention(x.query, *kv, seen, softmax_scale=DIM**-0.5)[0]
            for kv in ((k + found.cache_k_center, v), (x.key, x.value))
        )
        error, size = error + ((out - exact) ** 2).sum((0, 2)), size + (exact**2).sum((0, 2))
    assert found.error == pytest.approx(np.sqrt(error / size).max(), rel=1e-4)


def test_windows_of_samples():
    """K that no query of the samples sees costs nothing."""
    samples = layer()
    samples.query = samples.query[-8:]
    samples.key[: TOKENS - 40, 0, 3] = 1e4  # would spoil a head's scale, but not a token's
    samples.window = 24
    near = calibrate_layer(samples, ["block_wise_int8"], bound=1, transforms=["none"])
    samples.window = 0
    far = calibrate_layer(samples, ["block_wise_int8"], bound=1, transforms=["none"])
    assert near.error < 0.02 < far.error


def test_scales_and_centres_by_hand():
    x = np.zeros((3, 2, 4), np.float32)
    x[1, 0, 2], x[2, 0, 3], x[0, 1, 0] = -6.35, 2.54, 12.7
    np.testing.assert_allclose(scales_of(x, "cache_int8", "tensor"), [0.1], rtol=1e-6)
    np.testing.assert_allclose(scales_of(x, "cache_int8", "head"), [0.05, 0.1], rtol=1e-6)
    wanted = np.full(8, 1e-6 / 127)
    wanted[[2, 3, 4]] = 0.05, 0.02, 0.1
    np.testing.assert_allclose(scales_of(x, "cache_int8", "channel"), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        scales_of(x, "cache_fp8", "channel"), [6.35 / 448, 12.7 / 448], rtol=1e-6
    )
    np.testing.assert_allclose(centre_of(x)[1, 0], 12.7 / 3, rtol=1e-6)
    assert outlier_channels(layer("offset").key, 4) == [(0, 5), (1, 9), (1, 40)]
    assert outlier_channels(layer().key) == []


def test_scales_are_those_of_what_is_stored():
    """Of K less its centre and rotated, not of K."""
    samples = layer("offset")
    found = calibrate_layer(samples, ["cache_int8"], bound=0, transforms=["center+hadamard"])
    rotated = (samples.key.astype(np.float64) - samples.key.mean(0)) @ _sylvester(DIM)
    wanted = np.abs(rotated).max(axis=(0, 2)) / 127
    np.testing.assert_allclose(found.cache_k_out_scale, wanted, rtol=1e-4)
    np.testing.assert_allclose(
        found.cache_v_out_scale, np.abs(samples.value).max(axis=(0, 2)) / 127, rtol=1e-6
    )


def _sylvester(dim: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(dim)


def test_without_queries_one_candidate():
    samples = layer()
    samples.query = None
    found = calibrate_layer(samples, ["cache_fp8"], bound=0.1, transforms=["none"])
    assert found.error is None and found.cache_k_out_scale.shape == (KV,)
    with pytest.raises(CalibrationError, match="queries"):
        calibrate_layer(samples, STATIC, bound=0.1)


def test_fewer_queries_are_the_last_ones():
    """An error of the first tokens' K must not depend on queries that do not see it."""
    samples = layer()
    samples.query = samples.query[-3:]
    few = calibrate_layer(samples, ["cache_int8"], bound=1, transforms=["none"])
    alone = LayerSamples(samples.key, samples.value, layer().query)
    from fastattn.calibrate.choose import attention_error

    k = stored(alone.key, "cache_int8", few.cache_k_out_scale)
    v = stored(alone.value, "cache_int8", few.cache_v_out_scale)
    rows = np.arange(TOKENS - 3, TOKENS)
    expected = attention_error([alone], [(k, v)], [rows])
    assert few.error == pytest.approx(expected, rel=1e-5)


# Files.


def run(*arguments) -> int:
    return main(["calibrate", *map(str, arguments)])


@pytest.fixture
def samples_file(tmp_path):
    path = tmp_path / "samples.npz"
    layers = {0: layer(), 1: layer("large channel", 1), 3: layer("offset", 2)}
    save(path, layers, unrelated=np.zeros(3))
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_command_and_its_file(samples_file, tmp_path, suffix, capsys):
    output = tmp_path / f"found{suffix}"
    assert run(samples_file, "--bound", 0.02, "--output", output) == 0
    text = capsys.readouterr().out
    assert "cache_int8+hadamard" in text and f"wrote {output}" in text.replace("\n", "")
    found = Calibration.read(output)
    assert {n: x.name for n, x in found.layers.items()} == {
        0: "cache_int8",
        1: "cache_int8+hadamard",
        3: "cache_int8+center",
    }
    direct = calibrate_layer(layer("offset", 2), STATIC, bound=0.02)
    for name in ("cache_k_out_scale", "cache_v_out_scale", "cache_k_center"):
        np.testing.assert_array_equal(getattr(found.layers[3], name), getattr(direct, name))
    assert found.layers[3].error == direct.error and found.layers[3].errors == direct.errors


def test_others_read_the_safetensors(samples_file, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    output = tmp_path / "found.safetensors"
    assert run(samples_file, "--bound", 0.02, "--output", output) == 0
    tensors = numpy.load_file(output)
    found = Calibration.read(output)
    np.testing.assert_array_equal(
        tensors["layers.3.cache_k_center"], found.layers[3].cache_k_center
    )
    assert set(tensors) == {
        *(f"layers.{n}.cache_{k}_out_scale" for n in (0, 1, 3) for k in "kv"),
        "layers.3.cache_k_center",
    }


def test_defaults_take_the_least_error(samples_file, tmp_path):
    """Of all types of 8 bits, in the kind whose layers may be mixed and loses less in all."""
    output = tmp_path / "found.npz"
    assert run(samples_file, "--output", output) == 0
    found = Calibration.read(output)
    types = ["block_wise_int8", "block_wise_fp8"]
    for number, kind in ((0, "plain"), (1, "large channel"), (3, "offset")):
        own = layer(kind, {0: 0, 1: 1, 3: 2}[number])
        assert found.layers[number].name == calibrate_layer(own, types, bound=None).name
        static = calibrate_layer(own, ["cache_int8", "cache_fp8"], bound=None)
        assert found.layers[number].error < static.error


def test_files_of_several_texts(samples_file, tmp_path, capsys):
    other = tmp_path / "other.npz"
    layers = {0: layer(seed=5), 1: layer("large channel", 6), 3: layer("offset", 7)}
    save(other, layers)
    output = tmp_path / "found.npz"
    options = "--types", "cache_int8", "--transforms", "center", "--output", output
    assert run(samples_file, other, *options) == 0
    both = [layer("offset", 2), layers[3]]
    direct = calibrate_layer(both, ["cache_int8"], bound=None, transforms=["center"])
    found = Calibration.read(output).layers[3]
    np.testing.assert_array_equal(found.cache_k_center, direct.cache_k_center)
    assert found.error == direct.error
    del layers[1]
    save(other, layers)
    assert run(samples_file, other, *options) == 1
    assert "has layers [0, 3], the first file [0, 1, 3]" in capsys.readouterr().err


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dumps_of_paddle(tmp_path, dtype, nested):
    path = tmp_path / "samples.pdparams"
    samples = layer()
    tensors = {
        name: paddle.to_tensor(getattr(samples, name)).astype(dtype)
        for name in ("key", "value", "query")
    }
    if nested:
        paddle.save({"layers": {2: tensors}}, str(path))
    else:
        paddle.save({f"model.layers.2.{name}": x for name, x in tensors.items()}, str(path))
    read = read_samples(path, allow_pickle=True)
    assert list(read) == [2]
    np.testing.assert_array_equal(read[2].value, tensors["value"].astype("float32").numpy())


def test_bfloat16_in_an_npz(tmp_path):
    samples = layer()
    path = tmp_path / "half.npz"
    np.savez(path, **{f"layers.0.{n}": getattr(samples, n).astype(BF16) for n in ("key", "value")})
    np.testing.assert_array_equal(
        read_samples(path)[0].key, samples.key.astype(BF16).astype(np.float32)
    )


@pytest.mark.parametrize(("kind", "bound"), [("cache_int8", 127.0), ("cache_fp8", 448.0)])
def test_fastdeploy_reads_the_json(samples_file, tmp_path, kind, bound):
    """Its arithmetic, of both of its loaders, on the numbers of the file."""
    output = tmp_path / "kv_cache_scale.json"
    assert run(samples_file, "--types", kind, "--bound", 9, "--output", output) == 0
    data = json.loads(output.read_text())
    name = "ernie.layers.3.self_attn.cachek_matmul.activation_scale"
    loaded = np.asarray(data[name], np.float64) * 448.0
    quant = bound / loaded
    key = layer("offset", 2).key
    channels = kind == "cache_int8"
    largest = np.abs(key).max(axis=(0,) if channels else (0, 2)).ravel()
    np.testing.assert_allclose(1 / quant, largest / bound, rtol=1e-6)
    assert len(data) == 6 and loaded.size == (KV * DIM if channels else KV)
    back = Calibration.read(output, cache_quant_type=kind)
    np.testing.assert_allclose(back.layers[3].cache_k_out_scale, largest / bound, rtol=1e-6)


def test_scales_of_fastdeploy_are_tried_and_kept(samples_file, tmp_path, capsys):
    json_file, output = tmp_path / "kv_cache_scale.json", tmp_path / "out.npz"
    names = "ernie.layers.{}.self_attn.cache{}_matmul.activation_scale"
    data = {names.format(n, k): [0.011, 0.017] for n in (0, 1, 3) for k in "kv"}
    json_file.write_text(json.dumps({**data, "other": 1}))
    assert run("--scales", json_file, "--output", output) == 0
    found = Calibration.read(output)
    np.testing.assert_allclose(found.layers[1].cache_v_out_scale, [0.011, 0.017], rtol=1e-6)
    assert "-" in capsys.readouterr().out
    assert run(samples_file, "--scales", json_file, "--bound", 1, "--output", output) == 0
    found = Calibration.read(output)
    np.testing.assert_allclose(found.layers[1].cache_v_out_scale, [0.011, 0.017], rtol=1e-6)
    assert found.layers[0].error > 0
    data.pop(names.format(3, "k")), data.pop(names.format(3, "v"))
    json_file.write_text(json.dumps(data))
    assert run(samples_file, "--scales", json_file) == 1
    assert "has layers [0, 1]" in capsys.readouterr().err


def test_a_bound_that_nothing_keeps(samples_file, tmp_path, capsys):
    output = tmp_path / "found.npz"
    assert run(samples_file, "--types", "cache_fp8", "--bound", 0, "--output", output) == 1
    assert "no type keeps the bound 0 in layers 0, 1, 3" in capsys.readouterr().err
    assert set(Calibration.read(output).layers) == {0, 1, 3}


def test_an_error_that_is_not_a_number_keeps_no_bound(tmp_path, capsys):
    """A rotation's sums of 3e38 are beyond fp32; the next candidate's error is one."""
    samples = layer()
    samples.key[:] = 3e38 * np.sign(samples.key)
    samples.key[0] = 3e38
    path = tmp_path / "huge.npz"
    save(path, {0: samples})
    options = "--types", "cache_int8", "--bound", 0.1, "--transforms"
    assert run(path, *options, "hadamard") == 1
    assert "no type keeps the bound 0.1 in layers 0" in capsys.readouterr().err
    found = calibrate_layer(samples, ["cache_int8"], bound=0, transforms=["hadamard", "none"])
    assert found.name == "cache_int8" and np.isfinite(found.error)


def wrong(tmp_path, name):
    path = tmp_path / "wrong.npz"
    good = layer()
    arrays = {"layers.0.key": good.key, "layers.0.value": good.value, "layers.0.query": good.query}
    if name == "text":
        path.write_text("no archive")
    elif name == "pickle":
        path = tmp_path / "wrong.pdparams"
        path.write_text("no dump")
    elif name == "missing":
        return tmp_path / "nothing.npz"
    else:
        changes = {
            "names": {"k": good.key},
            "value": {"layers.0.key": good.key},
            "rank": {**arrays, "layers.0.key": good.key[0]},
            "shapes": {**arrays, "layers.0.value": good.value[:5]},
            "heads": {**arrays, "layers.0.query": good.query[:, :3]},
            "nan": {**arrays, "layers.0.key": np.full_like(good.key, np.nan)},
            "twice": {**arrays, "decoder.layers.0.key": good.key},
            "ints": {**arrays, "layers.0.key": np.ones(good.key.shape, np.int32)},
        }
        np.savez(path, **changes[name])
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("text", "wrong.npz: cannot be read: File is not a zip file"),
        ("pickle", "expected an .npz or .safetensors file"),
        ("missing", "no such file"),
        ("names", "expected arrays named layers.0.key"),
        ("value", "layers.0.value is missing"),
        ("rank", "layers.0.key: expected shape [tokens, heads, channels]"),
        ("shapes", "expected key and value of one shape"),
        ("heads", "layers.0.query: expected at most 160 tokens, a multiple of 2 heads"),
        ("nan", "layers.0.key: not all numbers are finite"),
        ("twice", "both layers.0.key and decoder.layers.0.key are the key of layer 0"),
        ("ints", "expected floating point numbers, got int32"),
    ],
)
def test_wrong_samples(tmp_path, name, text, capsys):
    assert run(wrong(tmp_path, name)) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "expected a file of samples, --model, or --scales"),
        (["S", "--types", "block_wise_int8,none"], "four cache tensors"),
        (["S", "--output", "a.json", "--types", "block_wise_int8"], "FastDeploy's file is for"),
        (["S", "--output", "a.json", "--transforms", "center"], "has no place for them"),
        (["S", "--output", "a.txt"], "expected .safetensors, .npz or .json"),
        (["S", "--scales", "missing.json"], "missing.json: cannot be read"),
        (["S", "--scales", "a.npz"], "--scales: expected FastDeploy's kv_cache_scale.json"),
    ],
)
def test_wrong_options(samples_file, arguments, text, capsys):
    assert run(*(samples_file if x == "S" else x for x in arguments)) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--bound", "nan"], ["--types", "fp4"], ["--queries", "0"]])
def test_options_that_argparse_refuses(samples_file, arguments, capsys):
    with pytest.raises(SystemExit):
        run(samples_file, *arguments)
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.json", "{", "no JSON"),
        ("a.json", "[]", "found none"),
        ("a.json", '{"l.0.self_attn.cachek_matmul.activation_scale": [1]}', "no scales of V"),
        ("a.json", '{"l.0.self_attn.cachek_matmul.activation_scale": [-1]}', "positive, finite"),
        ("a.json", '{"l.0.self_attn.cachek_matmul.activation_scale": "x"}', "expected numbers"),
        ("a.json", '{"l.0.self_attn.cachek_matmul.activation_scale": 1e300}', "that fp32 holds"),
        ("a.json", '{"l.0.self_attn.cachek_matmul.activation_scale": 1e-300}', "that fp32 holds"),
        (
            "a.json",
            '{"l.0.self_attn.cachek_matmul.activation_scale": 1,'
            ' "m.0.self_attn.cachek_matmul.activation_scale": 2}',
            "under another prefix",
        ),
        ("a.safetensors", "short", "cannot be read"),
        ("a.npz", "short", "cannot be read"),
        ("a.bin", "short", "expected .safetensors"),
    ],
)
def test_wrong_files_of_scales(tmp_path, name, content, text):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CalibrationError, match=re.escape(text)):
        Calibration.read(path, cache_quant_type="cache_fp8")


def _safetensors(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npz", b""),
        ("a.json", b"[" * 100_000),
        ("a.safetensors", _safetensors("[" * 100_000)),
        ("a.safetensors", _safetensors('"a"')),
        ("a.safetensors", _safetensors("null")),
        ("a.safetensors", _safetensors('{"__metadata__": 1}')),
        ("a.safetensors", _safetensors('{"__metadata__": []}')),
    ],
    ids=str,
)
def test_damaged_files_of_scales(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"cannot be read|no JSON"):
        Calibration.read(path, cache_quant_type="cache_fp8")


def test_damaged_bytes_of_compressed_samples(tmp_path):
    """Whichever bytes are wrong, the message names the file, or the samples are those written."""
    path = tmp_path / "packed.npz"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 1, 8)).astype(np.float32)
    np.savez_compressed(path, **{"layers.0.key": x, "layers.0.value": x, "layers.0.query": x})
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes(b ^ 0x5A for b in whole[at : at + 4]) + whole[at + 4 :])
        try:
            read_samples(path)
        except CalibrationError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


def test_a_file_of_someone_else(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, a=np.zeros(3))
    with pytest.raises(CalibrationError, match="not written by"):
        Calibration.read(path)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("layers.N.key", "--bound", "kv_cache_scale.json"))


# Backends.


@pytest.mark.parametrize(
    ("kind", "types", "expected"),
    [
        ("plain", STATIC, "cache_int8"),
        ("large channel", STATIC, "cache_int8+hadamard"),
        ("offset", STATIC, "cache_int8+center"),
        ("offset", ["cache_fp8"], "cache_fp8"),
        ("large channel", ["block_wise_int8", "block_wise_fp8"], "block_wise_int8+hadamard"),
    ],
)
def test_a_backend_runs_what_was_found(place, tmp_path, kind, types, expected):
    """The measured error of the backend is about the one that was predicted."""
    samples = layer(kind)
    output = tmp_path / "found.safetensors"
    bound = 0.05 if types == ["cache_fp8"] else 0.012 if "block_wise_int8" in types else 0.02
    save(tmp_path / "samples.npz", {0: samples})
    options = ["--bound", bound, "--types", ",".join(types), "--output", output]
    assert run(tmp_path / "samples.npz", *options) == 0
    calibration = Calibration.read(output)
    attention = AttentionLayer(0)
    on = paddle.CPUPlace() if place == "cpu" else paddle.CUDAPlace(0)
    calibration.apply(attention, place=on)
    assert calibration.layers[0].name == expected
    assert attention.cache_quant_type_str == calibration.layers[0].cache_quant_type

    config = backends.make_config(max_model_len=512, num_key_value_heads=KV)
    backend = FlashAttentionBackend(config, KV, HEADS, DIM)
    blocks = -(-TOKENS // 64)
    kind_name = attention.cache_quant_type_str
    caches = [
        to_paddle(np.zeros(shape, np.uint8), place)
        for shape in backend.get_kv_cache_shape(blocks, kind_name)
    ]
    scales = backend.get_kv_cache_scale_shape(blocks, kind_name)
    if scales is not None:
        caches += [to_paddle(np.zeros(*scales), place) for _ in "kv"]
    meta = ForwardMeta.for_step(
        cached=[0],
        new=[TOKENS],
        block_tables=np.arange(blocks)[None],
        caches=caches,
        rotary_embs=None,
        place=on,
        num_tokens=TOKENS,
    )
    meta.rope_already_applied = True
    backend.init_attention_metadata(meta)
    parts = (samples.query, samples.key, samples.value)
    qkv = np.concatenate([x.reshape(TOKENS, -1) for x in parts], axis=1).astype(np.float16)
    out = backend.forward(None, None, None, to_paddle(qkv, place), None, None, attention, meta)
    out = to_numpy(out).astype(np.float64).reshape(TOKENS, HEADS, DIM)
    visible = np.tril(np.ones((TOKENS, TOKENS), bool))
    exact, _ = dense_attention(*parts, visible, softmax_scale=DIM**-0.5)
    error = np.sqrt(((out - exact) ** 2).sum((0, 2)) / (exact**2).sum((0, 2))).max()
    assert error <= 1.3 * bound
    with pytest.raises(CalibrationError, match="layer 7 was not calibrated"):
        calibration.apply(AttentionLayer(7))
