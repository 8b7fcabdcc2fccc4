"""``FASTATTN_SAMPLES``: a server's prompts become samples for ``calibrate``."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastattn import env
from fastattn.backends import FlashAttentionBackend, samples
from fastattn.calibrate import read_samples
from fastattn.cli import main
from tests.support.serving import Model, Server
from tests.support.tensors import BF16


@pytest.fixture(autouse=True)
def one_writer():
    samples.writer.cache_clear()
    yield
    samples.writer.cache_clear()


def expected(server: Server, seq: int, layer: int, count: int) -> list[np.ndarray]:
    """Q, K and V of a sequence's first tokens, as the model rounds them."""
    model = server.model
    arrays = model.rotated(server.tokens[seq][layer, :count], np.arange(count))
    return [x.astype(model.dtype).astype(np.float32) for x in arrays]


@pytest.mark.parametrize("quant", ["none", "block_wise_int4", "cache_fp8"])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
def test_texts_are_what_the_caches_would_get(place, tmp_path, monkeypatch, quant, dtype):
    """Before rotation, centre and codes of the cache's type, of odd lengths, beside others."""
    monkeypatch.setenv("FASTATTN_SAMPLES", f"{tmp_path / 'texts'},texts=2,tokens=150")
    model = Model(
        cache_quant_type=quant, num_layers=3, norm=True, bias=True, dtype=dtype, neox=True,
        k_rotation=None if quant == "cache_fp8" else "hadamard" if quant != "none" else None,
    )  # fmt: skip
    server = Server(FlashAttentionBackend, model, [150, 300, 77, 90], place)
    outs = server.step([40, 200, 0, 0])  # 40 tokens are too few, and 150 of 200 are kept
    server.step([1, 1, 70, 0])
    server.step([1, 1, 1, 90])  # a third text, which is too many
    server.step([1, 1, 1, 0])
    assert sorted(path.name for path in (tmp_path / "texts").iterdir()) == [
        "text0.npz",
        "text1.npz",
    ]
    for number, (seq, count) in enumerate([(1, 150), (2, 70)]):
        layers = read_samples(tmp_path / "texts" / f"text{number}.npz")
        assert [*layers] == [0, 1, 2]
        for layer, found in layers.items():
            q, k, v = expected(server, seq, layer, count)
            np.testing.assert_array_equal(found.key, k)
            np.testing.assert_array_equal(found.value, v)
            np.testing.assert_array_equal(found.query, q[-128:])
    # The step is the same as without.
    monkeypatch.delenv("FASTATTN_SAMPLES")
    samples.writer.cache_clear()
    other = Server(FlashAttentionBackend, model, [150, 300, 77, 90], place)
    for layer, out in other.step([40, 200, 0, 0]).items():
        np.testing.assert_array_equal(out, outs[layer])


def test_steps_that_give_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_SAMPLES", str(tmp_path / "texts"))
    server = Server(FlashAttentionBackend, Model(), [300], "cpu")
    server.run([100], step_use_cudagraph=True)
    server.step([63])
    server.step([100])  # goes on from cached tokens
    samples.writer(0).flush()
    assert not (tmp_path / "texts").exists()


def test_a_step_that_runs_again_gives_another_text(tmp_path, monkeypatch):
    """As of a server that reuses its ForwardMeta."""
    monkeypatch.setenv("FASTATTN_SAMPLES", str(tmp_path))
    server = Server(FlashAttentionBackend, Model(num_layers=2), [100], "cpu")
    meta = server.make_meta([100])
    for _ in range(3):
        server.backend.init_attention_metadata(meta)
        for layer in range(2):
            qkv = server.on(server.inputs(layer, [100]))
            server.backend.attend(qkv, server.layers[layer], meta)
    samples.writer(0).flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"text{i}.npz" for i in range(3)]
    texts = [read_samples(path) for path in tmp_path.iterdir()]
    for text in texts[1:]:
        np.testing.assert_array_equal(text[1].key, texts[0][1].key)


def test_a_step_without_a_text_may_be_followed_by_one(tmp_path, monkeypatch):
    """In the same ForwardMeta and buffer of QKV, which a server fills again."""
    monkeypatch.setenv("FASTATTN_SAMPLES", str(tmp_path))
    server = Server(FlashAttentionBackend, Model(num_layers=2), [100], "cpu")
    meta = server.make_meta([100])
    lens, buffer = meta.seq_lens_this_time.clone(), server.on(server.inputs(0, [100]))
    for count in (5, 100):
        meta.seq_lens_this_time.copy_(paddle.full_like(lens, count), True)
        server.backend.init_attention_metadata(meta)
        for layer in range(2):
            buffer.copy_(server.on(server.inputs(layer, [100])), True)
            server.backend.attend(buffer, server.layers[layer], meta)
    samples.writer(0).flush()
    found = read_samples(tmp_path / "text0.npz")
    for layer in range(2):
        np.testing.assert_array_equal(found[layer].value, expected(server, 0, layer, 100)[2])


def test_texts_of_another_process_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_SAMPLES", f"{tmp_path},texts=1")
    for _ in range(2):
        samples.writer.cache_clear()
        Server(FlashAttentionBackend, Model(), [100], "cpu").run([100])
        samples.writer(0).flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text0.npz", "text1.npz"]


def test_a_folder_that_cannot_be_written_stops_no_server(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_SAMPLES", str(tmp_path / "file" / "texts"))
    server = Server(FlashAttentionBackend, Model(), [100, 100], "cpu")
    server.step([100, 0])
    server.step([0, 100])
    server.step([0, 0])
    assert "no more samples are written" in caplog.text and samples.writer(0).written == 8


def test_a_profile_run_gives_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_SAMPLES", str(tmp_path / "texts"))
    server = Server(FlashAttentionBackend, Model(), [100], "cpu")
    server.run([100], is_dummy_or_profile_run=True)
    samples.writer(0).flush()
    assert not (tmp_path / "texts").exists()


def test_ranks_write_their_own_heads(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_SAMPLES", str(tmp_path))
    config = {"tensor_parallel_size": 2, "tensor_parallel_rank": 1}
    model = Model(kv_heads=1, heads=2)
    server = Server(FlashAttentionBackend, model, [100], "cpu", config=config)
    server.config.model_config.num_key_value_heads = 2
    server.run([100])
    samples.writer(1).flush()
    assert [path.name for path in tmp_path.iterdir()] == ["text0-rank1.npz"]


def test_calibrate_reads_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTATTN_SAMPLES", f"{tmp_path},texts=2")
    server = Server(FlashAttentionBackend, Model(num_layers=2), [100, 100], "cpu")
    server.step([100, 0])
    server.step([0, 100])
    samples.writer(0).flush()
    texts = [str(path) for path in sorted(tmp_path.glob("text*.npz"))]
    output = tmp_path / "int4.safetensors"
    arguments = ["calibrate", *texts, "--types", "block_wise_int4", "--output", str(output)]
    assert len(texts) == 2 and main(arguments) == 0
    assert output.exists() and "block_wise_int4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["dir,texts=0", "dir,tokens=63", "dir,tokens=x", ",texts=1", "dir,text=1", "dir,texts"]
)
def test_another_text_warns(monkeypatch, text):
    monkeypatch.setenv("FASTATTN_SAMPLES", text)
    with pytest.warns(UserWarning, match="no samples are written"):
        assert env.samples() is None


def test_without_the_variable(monkeypatch):
    monkeypatch.delenv("FASTATTN_SAMPLES", raising=False)
    assert env.samples() is None and samples.writer(0) is None
