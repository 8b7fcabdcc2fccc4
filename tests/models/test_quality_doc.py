"""The Python of docs/quality.md that needs no package of weights."""

from __future__ import annotations

import re

import numpy as np
import paddle

from fastattn.calibrate import read_samples
from tests.support import ROOT

BLOCKS = re.findall(
    r"^```python\n(.*?)^```",
    (ROOT / "docs" / "quality.md").read_text(encoding="utf-8"),
    re.S | re.M,
)


def block(word):
    (found,) = [text for text in BLOCKS if word in text]
    namespace: dict[str, object] = {}
    exec(compile(found, "quality.md", "exec"), namespace)
    return namespace


def test_caches_in_code():
    out = block("make_cache")["out"]
    np.testing.assert_allclose(out.numpy(), 1, rtol=0.05)


def test_samples_of_a_model(tmp_path):
    """Two layers that call Paddle's attention; their samples are what they gave it."""
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(1, 20, 2, 64)).astype("float32"))

    def model(tokens):
        attention = paddle.nn.functional.scaled_dot_product_attention
        for scale in (1, 2):
            attention(x, scale * x, x, is_causal=True)

    before = paddle.nn.functional.scaled_dot_product_attention
    block("write_samples")["write_samples"](model, None, tmp_path / "samples.npz")
    assert paddle.nn.functional.scaled_dot_product_attention is before
    samples = read_samples(tmp_path / "samples.npz")
    assert sorted(samples) == [0, 1]
    np.testing.assert_array_equal(samples[1].key, 2 * samples[0].key)
    np.testing.assert_array_equal(samples[1].query, x[0].numpy())
