"""Layers against fp64: what they cache, what they select, what comes out."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from tests.support.deepseek.cuts import (
    BATCHES,
    CONFIGS,
    V4_CONFIGS,
    Problem,
    check_selections,
    decode,
    run,
)
from tests.support.deepseek.dense import make_dense
from tests.support.deepseek.v4 import output_values
from tests.support.mla_sparse import check_output
from tests.support.tensors import BF16, E4M3

#: The model norms and rotates in fp64 and the operators in fp32: a channel in a thousand, or fewer,
#: then has a neighbouring code.
OTHER_CODES = 1e-3


@functools.lru_cache(maxsize=4)
def served(name, batch, place):
    """A problem, its results after a chunk and decode steps, and the layer behind them."""
    problem = Problem(name, BATCHES[batch])
    layer = problem.layer(place)
    start = np.maximum(problem.lengths - 7, problem.lengths // 2)
    return problem, run(layer, [start, *decode(start, problem.lengths)]), layer


def seqs_of(batch):
    return range(len(BATCHES[batch]))


def latents(tokens, is_v4):
    """Values of the bytes [T, 656] or [T, 584] of cached tokens."""
    if is_v4:
        scales = np.exp2(tokens[:, 576:583].astype(np.float64) - 127).repeat(64, axis=1)
        codes, rope = tokens[:, :448], tokens[:, 448:576]
    else:
        scales = np.ascontiguousarray(tokens[:, 512:528]).view("<f4").repeat(128, axis=1)
        codes, rope = tokens[:, :512], tokens[:, 528:]
    values = np.ascontiguousarray(codes).view(E4M3).astype(np.float64) * scales
    return np.concatenate([values, np.ascontiguousarray(rope).view(BF16).astype(float)], axis=1)


def check_cached(got, want):
    """The same values, but for channels that lie between two codes."""
    assert got.shape == want.shape
    if not got.size:
        return
    other = got != want
    assert other.mean() <= OTHER_CODES, f"{other.mean():.1e} of the channels"
    # Steps of e4m3, and those below its least normal number where a tile has larger ones.
    size = np.abs(want) / 8 + np.abs(want).max(axis=1, keepdims=True) * 2.0**-16
    assert (np.abs(got - want) <= size).all()


BATCH = pytest.mark.parametrize("batch", BATCHES, scope="module")
ALL = pytest.mark.parametrize("name", CONFIGS, scope="module")


@BATCH
@ALL
def test_attention_of_the_selected_tokens(place, name, batch):
    problem, results, layer = served(name, batch, place)
    for seq in seqs_of(batch):
        dense, rows = problem.dense(seq), problem.of_seq(seq)
        mask = np.zeros((len(dense.x), 0), bool)
        if "indices" in results:
            mask = check_selections(problem, seq, results["indices"][rows], place)
        want = dense.attention(mask)
        check_output(results["attention"][rows], want)
        if problem.is_v4:
            # The codes' own noise: half a step of e4m3, which is 2^-4, over all channels.
            turned = dense.turned_back(results["attention"][rows].astype(np.float64))
            values = output_values(results["codes"][rows], results["scales"][rows])
            values = values.reshape(turned.shape)
            floor = np.abs(turned).max(axis=-1, keepdims=True) * 2.0**-17
            assert (np.abs(values - turned) <= np.abs(turned) * 2.0**-4 * 1.001 + floor).all()
            output, bound = dense.output(want), 0.035
        else:
            output, bound = dense.plain(mask), 8e-3  # whose queries are not absorbed, nor rounded
        got = layer.output({n: array[rows] for n, array in results.items()})
        error = np.linalg.norm(got - output) / np.linalg.norm(output)
        assert error <= bound, f"output of sequence {seq}: {error:.1e}"


@BATCH
@ALL
def test_caches(place, name, batch):
    problem, _, layer = served(name, batch, place)
    caches = layer.caches()
    for seq in seqs_of(batch):
        dense = problem.dense(seq)
        if not problem.is_v4:
            first, tokens = layer.latents.tokens(seq, len(dense.x))
            assert first == 0
            check_cached(latents(tokens, False), dense.cached())
            continue
        first, tokens = layer.window.tokens(seq, len(dense.x))
        assert len(dense.x) - first <= 128 + 64
        check_cached(latents(tokens, True), dense.window_keys[first:])
        if problem.config.ratio:
            pool, counts = caches["latent"]
            assert counts[seq] == len(dense.x) // problem.config.ratio == len(dense.entries)
            check_cached(latents(pool.tokens(seq, int(counts[seq]))[1], True), dense.entries)


@BATCH
@pytest.mark.parametrize("name", ["v32", "glm"])
def test_all_tokens_selected_are_plain_attention(place, name, batch):
    """With no more tokens than the top-k has: `mla_attention`, and heads with their own keys."""
    problem, results, layer = served(name, batch, place)
    check_output(results["attention"], layer.dense().astype(np.float64))
    for seq in seqs_of(batch):
        dense, rows = problem.dense(seq), problem.of_seq(seq)
        want = dense.plain(dense.visible)
        got = layer.output({"attention": results["attention"][rows]})
        assert np.linalg.norm(got - want) <= 8e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("name", ["v32_top48", "glm_top21", "flash_c4_top19"])
def test_selections_are_no_windows(place, name):
    """What is selected differs from token to token, lies apart, and changes the output."""
    problem, results, _ = served(name, "300", place)
    indices, k = results["indices"], problem.config.topk
    last = indices[-1]
    assert last[k - 1] - last[0] > 1.5 * k
    assert len({tuple(row) for row in indices}) > len(indices) // 5
    dense = problem.dense(0)
    mask = check_selections(problem, 0, indices, place)
    chosen, everything = dense.attention(mask), dense.attention(dense.visible)
    assert np.linalg.norm(chosen - everything) > 0.05 * np.linalg.norm(everything)


def _without(weights, name):
    return {**weights, name: np.zeros_like(weights[name])}


#: A model with a mistake: configuration and weights.
MISTAKES = {
    "window": ("flash_window", lambda c, w: (replace(c, window=129), w)),
    "sinks": ("flash_window", lambda c, w: (c, _without(w, "sinks"))),
    "theta": ("flash_c128", lambda c, w: (replace(c, ratio=0), w)),
    "position bias, 1 : 4": ("flash_c4", lambda c, w: (c, _without(w, "latent_ape"))),
    "position bias, 1 : 128": ("flash_c128", lambda c, w: (c, _without(w, "latent_ape"))),
    "norm of entries": (
        "flash_c4",
        lambda c, w: (c, {**w, "latent_norm": w["latent_norm"][::-1].copy()}),
    ),
    "indexer's rotation": ("v32_top48", lambda c, w: (replace(c, index_interleaved=True), w)),
    "scale": ("glm", lambda c, w: (replace(c, mscale=1.01), w)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_finds(mistake):
    """What this file compares differs from a model with one mistake."""
    name, change = MISTAKES[mistake]
    problem, results, _ = served(name, "300", "cpu")
    wrong = make_dense(*change(problem.config, problem.weights), problem.x)
    columns = wrong.visible.shape[1]
    indices = results.get("indices", np.zeros((300, 1), np.int32) - 1)
    mask = (indices[:, :, None] == np.arange(columns)).any(axis=1)
    if mistake == "indexer's rotation":
        problem = Problem(name, BATCHES["300"])
        problem.dense = lambda seq: wrong
        with pytest.raises(AssertionError, match="row"):
            check_selections(problem, 0, indices, "gpu")
        return
    with pytest.raises(AssertionError, match=r"relative RMS|element"):
        check_output(results["attention"], wrong.attention(mask))


def test_the_comparison_finds_one_entry_too_few():
    problem, results, _ = served("flash_c4_top19", "300", "cpu")
    dense = problem.dense(0)
    mask = check_selections(problem, 0, results["indices"], "cpu")
    mask[250, np.flatnonzero(mask[250])[0]] = False
    with pytest.raises(AssertionError):
        check_output(results["attention"], dense.attention(mask))
    indices = results["indices"].copy()
    indices[250, :19] = np.setdiff1d(np.arange(60), indices[250, 1:19])[:19]
    with pytest.raises(AssertionError, match="row 250"):
        check_selections(problem, 0, indices, "gpu")


def test_all_models_are_here():
    ratios = {(c.name, c.ratio) for c in V4_CONFIGS.values()}
    assert {("flash", 0), ("flash", 4), ("flash", 128), ("pro", 4), ("pro", 128)} <= ratios
