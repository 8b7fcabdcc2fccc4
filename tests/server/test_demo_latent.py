"""The demo's latent model: gradients, serving from latent caches, the indexer, fidelity."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from fastattn.demo import evaluate, latent_evaluate, latent_gradient, latent_train, text, train
from fastattn.demo.latent_engine import Attention, LatentEngine
from fastattn.demo.latent_model import LatentConfig, LatentModel
from fastattn.demo.model import initial_weights, rotate
from fastattn.demo.scheduler import Request, Sampling
from tests.support import latent_model as reference

SMALL = LatentConfig(
    layers=2,
    hidden=48,
    heads=3,
    nope_dim=24,
    value_dim=40,
    query_rank=32,
    mlp=40,
    window=9,
    topk=14,
)
GREEDY = Sampling(temperature=0.0)
DENSE = Attention("dense", "bf16")
WINDOW = Attention("window", "bf16", 9)
SPARSE = Attention("sparse", "bf16", 9, 14)
FP8 = Attention("sparse", "fp8_656", 9, 14)
ATTENTIONS = (DENSE, WINDOW, SPARSE, FP8)


def name_of(attention):
    return f"{attention.keys}-{attention.cache_format}"


def small_weights():
    """Norms that are not 1, attention that is not flat, logits far enough apart to choose."""
    rng = np.random.default_rng(100)
    weights = {
        name: w * rng.uniform(0.5, 1.5, w.shape).astype(np.float32) if w.ndim == 1 else w
        for name, w in initial_weights(SMALL, 0).items()
    }
    weights["embedding"] *= np.float32(20)
    for i in range(SMALL.layers):
        weights[f"{i}.query_up"] *= np.float32(2)
        weights[f"{i}.attention_out"] *= np.float32(3)
    return weights


@pytest.fixture(scope="module")
def weights():
    return small_weights()


@pytest.fixture(scope="module")
def model(weights):
    return LatentModel(SMALL, weights)


@pytest.fixture(scope="module")
def corpus():
    return text.load()


@pytest.fixture(scope="module")
def windows(corpus):
    return evaluate.windows(corpus.held_out, SMALL.context, 3)


def place_of(place):
    return paddle.CPUPlace() if place == "cpu" else paddle.CUDAPlace(0)


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


# The model in NumPy


def test_the_numpy_model_is_the_one_written_out(weights, windows):
    trace = latent_gradient.forward(weights, SMALL, windows[:2, :-1])
    index = latent_gradient.index_logits(weights, SMALL, trace)
    logits = trace.logits.reshape(2, SMALL.context, -1)
    for b in range(2):
        expected, attention, index_expected = reference.run(weights, SMALL, windows[b, :-1])
        assert np.abs(logits[b] - expected).max() < 1e-4 * expected.std()
        for i, layer in enumerate(trace.layers):
            assert np.abs(layer.attention.p[b] - attention[i]).max() < 1e-4
            error = np.abs(index[i][b] - index_expected[i]).max()
            assert error < 1e-4 * index_expected[i].std()


def absorbed_loss(model, tokens, targets):
    """Cross entropy by Paddle with dense attention over latents, and the indexers' logits."""
    config, (batch, length) = model.config, tokens.shape
    hidden_keys = paddle.to_tensor(np.triu(np.full((length, length), -1e30, np.float32), 1))
    positions = np.arange(length)
    angles = positions[:, None, None] * 10000.0 ** (-np.arange(32) / 32)
    cos, sin = (paddle.to_tensor(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    loss, index = 0, []
    for b in range(batch):
        x = model.embed(tokens[b])
        index.append([])
        for i in range(config.layers):
            given = model.attention_inputs(i, x, positions)
            keys = paddle.concat([given.latent, given.rope], axis=1)
            scores = paddle.matmul(given.q.transpose([1, 0, 2]), keys, transpose_y=True)
            p = F.softmax(scores * config.softmax_scale + hidden_keys, axis=-1)
            index[-1].append((given, p))
            x = model.finish(i, x, paddle.matmul(p, given.latent).transpose([1, 0, 2]))
        loss = loss + F.cross_entropy(model.logits(x), model.tensor(targets[b])) / batch
    return loss, index, (cos, sin)


def by_name(model, name):
    """A weight's gradient in the layout of the weights that were given."""
    found = model.weights[name].grad.numpy()
    if name.endswith(".key_up"):
        return found.transpose(2, 0, 1).reshape(512, -1)
    return found.transpose(1, 0, 2).reshape(512, -1) if name.endswith(".value_up") else found


def check_gradients(model, gradients, names):
    assert set(gradients) == set(names)
    for name, gradient in gradients.items():
        expected = by_name(model, name)
        error = np.abs(gradient - expected).max() / np.abs(expected).max()
        assert error < 5e-5, name


@pytest.fixture
def trainable(weights):
    model = LatentModel(SMALL, weights)
    for weight in model.weights.values():
        weight.stop_gradient = False
    return model


def index_names(weights):
    return {name for name in weights if ".index_" in name}


def test_gradients_are_those_of_paddle(weights, trainable):
    tokens = np.random.default_rng(0).integers(0, SMALL.vocabulary, (3, 34))
    loss, gradients = latent_gradient.loss_and_gradients(
        weights, SMALL, tokens[:, :-1], tokens[:, 1:]
    )
    expected, _, _ = absorbed_loss(trainable, tokens[:, :-1], tokens[:, 1:])
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    check_gradients(trainable, gradients, set(weights) - index_names(weights))


def test_the_indexer_is_distilled_from_what_lies_before_the_window(weights, trainable):
    tokens = np.random.default_rng(1).integers(0, SMALL.vocabulary, (2, 29))
    loss, gradients = latent_gradient.distil(weights, SMALL, tokens)
    _, index, (cos, sin) = absorbed_loss(trainable, tokens, tokens)
    expected, count = 0, 0
    for layers in index:
        for given, p in layers:
            rope = rotate(given.index_q[..., 64:], cos, sin)
            q = paddle.concat([given.index_q[..., :64], rope], axis=-1).transpose([1, 0, 2])
            relu = F.relu(paddle.matmul(q, given.index_key, transpose_y=True))
            factors = given.index_weight.transpose([1, 0]).unsqueeze(-1)
            logits = (relu * factors).sum(0) / np.sqrt(128 * SMALL.index_heads)
            for t in range(SMALL.window, 29):
                seen = t - SMALL.window + 1
                target = p[:, t, :seen].sum(0).detach()
                target = target / target.sum()
                found = F.log_softmax(logits[t, :seen], axis=-1)
                expected = expected + (target * (paddle.log(target) - found)).sum()
                count += 1
    expected = expected / count
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-4)
    check_gradients(trainable, gradients, index_names(weights))


def schedule_of(steps):
    return latent_train.LatentSchedule(
        train.Schedule(steps=steps, tokens=512, warmup=4),
        train.Schedule(steps=steps, tokens=512, warmup=4, long_share=1.0, decay=0.0),
    )


def test_training_lowers_both_losses_and_repeats(corpus):
    config = LatentConfig(
        layers=1, hidden=32, heads=2, query_rank=16, mlp=32, context=64, window=4, topk=8
    )
    seen = []
    latent_train.train(corpus, config, schedule_of(16), lambda *step: seen.append(step))
    assert [step for step, _, _ in seen] == list(range(1, 33))
    assert {steps for _, steps, _ in seen} == {schedule_of(16).steps} == {32}
    losses = [loss for _, _, loss in seen]
    assert losses[15] < losses[0] - 0.3 and losses[-1] < 0.95 * losses[16]
    first, again = (latent_train.train(corpus, config, schedule_of(2)) for _ in range(2))
    start = initial_weights(config, 0)
    for name, weight in first.items():
        assert (weight != start[name]).any(), name
        np.testing.assert_allclose(again[name], weight, rtol=1e-3, atol=1e-4)


# Serving


def served(model, attention, windows, place="cpu", **options):
    """Logits of windows through the caches, and what the indexer chose for each query."""
    options = {**evaluate.scoring_options(model.config), **options}
    engine = LatentEngine(
        model, attention, place=place_of(place), keep_choices=attention.keys == "sparse", **options
    )
    scored, requests = evaluate.score_with(engine, windows)
    length = windows.shape[1] - 1
    chosen = np.zeros((len(windows), model.config.layers, length, length), bool)
    for request, position, layer, indices in engine.choices:
        kept = indices[indices >= 0]
        assert len(set(kept.tolist())) == len(kept)
        chosen[requests.index(request), layer, position, kept] = True
    return scored.logits, chosen


def visible(attention, chosen, config):
    """Keys that queries see, ``[layers, T, T]``."""
    length = chosen.shape[-1]
    causal = np.tri(length, dtype=bool)
    if attention.keys == "dense":
        return np.broadcast_to(causal, (config.layers, length, length))
    recent = causal & ~np.tri(length, k=-attention.window, dtype=bool)
    return recent | chosen


@pytest.mark.parametrize("attention", ATTENTIONS, ids=name_of)
def test_logits_are_those_of_the_model_written_out(place, model, weights, windows, attention):
    """Over the keys that the query sees; those of other keys or another format are not."""
    windows = windows[:2] if place == "cpu" else windows[:1]
    logits, chosen = served(model, attention, windows, place)
    for b, window in enumerate(windows):
        seen = visible(attention, chosen[b], SMALL)
        expected, _, _ = reference.run(weights, SMALL, window[:-1], seen, attention.cache_format)
        error = rms(logits[b] - expected)
        rounded = 5e-3 if attention.cache_format == "bf16" else 1e-2  # a code is a step of 1/16
        assert error < rounded * expected.std()
        assert np.abs(logits[b] - expected).max() < 10 * rounded * expected.std()
        if attention.keys != "dense":
            other, _, _ = reference.run(weights, SMALL, window[:-1], None, attention.cache_format)
            assert error < 0.1 * rms(logits[b] - other)
        if attention.cache_format == "fp8_656":
            other, _, _ = reference.run(weights, SMALL, window[:-1], seen, "bf16")
            assert error < 0.5 * rms(logits[b] - other)


@pytest.mark.parametrize("attention", [SPARSE, FP8], ids=name_of)
def test_the_indexer_chooses_the_keys_with_the_largest_logits(
    place, model, weights, windows, attention
):
    windows = windows[:1]
    _, chosen = served(model, attention, windows, place)
    seen = visible(attention, chosen[0], SMALL)
    _, _, index = reference.run(weights, SMALL, windows[0, :-1], seen, attention.cache_format)
    right = total = 0
    for layer in range(SMALL.layers):
        for t in range(SMALL.context):
            before = max(t + 1 - attention.window, 0)
            mine = chosen[0, layer, t]
            assert not mine[before:].any() and mine.sum() == min(before, attention.topk)
            if before <= attention.topk:
                continue
            logits = index[layer, t, :before]
            order = np.argsort(-logits)
            least = logits[order[attention.topk - 1]]
            assert logits[mine[:before]].min() > least - 0.25 * logits.std()  # FP8 operands
            right += mine[order[: attention.topk]].sum()
            total += attention.topk
    assert right > 0.93 * total


def test_an_indexer_that_chooses_everything_gives_dense_attention(model, windows):
    every = Attention("sparse", "bf16", 100, 156)
    sparse, _ = served(model, every, windows[:1])
    dense, _ = served(model, DENSE, windows[:1])
    assert rms(sparse - dense) < 5e-3 * dense.std()


@pytest.mark.parametrize("attention", ATTENTIONS, ids=name_of)
def test_chunks_of_any_length_and_decoding_give_the_same(place, model, windows, attention):
    """One query at a time is scored with its pages in place, chunks with gathered keys."""
    window = windows[1:2, :97]
    whole, chosen = served(model, attention, window, place, chunk=96, token_budget=96)
    for chunk in (1, 7, 64):
        logits, others = served(model, attention, window, place, chunk=chunk, token_budget=96)
        assert rms(logits - whole) < 2e-2 * whole.std()
        assert (others != chosen).sum() <= 0.02 * max(chosen.sum(), 1)  # ties after rounding


PROMPTS = (
    "The value of a name",
    "If",
    "A function is called with arguments, and each of them is bound to the name of a parameter in "
    "the local namespace of the call.",
)


def generate(model, attention, prompts, new=12, **options):
    engine = LatentEngine(model, attention, **{"num_blocks": 24, **options})
    requests = [engine.submit(Request(list(text.encode(p)), new, GREEDY)) for p in prompts]
    engine.run()
    assert engine.scheduler.pool.in_use == 0
    return [r.generated for r in requests], engine.statistics


@pytest.mark.parametrize("attention", ATTENTIONS, ids=name_of)
def test_a_batch_gives_what_each_request_gives_alone(model, attention):
    together, seen = generate(model, attention, PROMPTS, token_budget=40, chunk=33)
    assert seen.mixed_steps > 0 and seen.largest_batch == len(PROMPTS)
    for prompt, tokens in zip(PROMPTS, together):
        assert generate(model, attention, [prompt])[0] == [tokens]


def test_reused_prefixes_and_preemption_give_the_same_tokens(model):
    """Blocks are shared by latents and index keys alike."""
    prompts = [PROMPTS[2] + tail for tail in ("", " One", " Two")]
    options = {"max_seqs": 1, "token_budget": 50, "chunk": 50}
    reusing, seen = generate(model, FP8, prompts, **options)
    plain, _ = generate(model, FP8, prompts, reuse_prefixes=False, **options)
    assert reusing == plain and seen.reused_tokens == 2 * 64
    expected, _ = generate(model, FP8, PROMPTS, new=70)
    tight, seen = generate(model, FP8, PROMPTS, new=70, num_blocks=4)
    assert seen.preemptions > 0 and tight == expected


@pytest.mark.parametrize(
    ("attention", "expected"),
    [(DENSE, 2 * 1152), (WINDOW, 2 * 1152), (SPARSE, 2 * (1152 + 132)), (FP8, 2 * (656 + 132))],
    ids=map(name_of, ATTENTIONS),
)
def test_bytes_a_token(model, attention, expected):
    assert LatentEngine(model, attention).bytes_per_token == expected


# Fidelity


def test_recall_and_attention_that_is_seen_are_counted():
    rng = np.random.default_rng(0)
    length, attention = 20, Attention("sparse", "bf16", 3, 4)
    weights = rng.random((2, 2, length, length)) * np.tri(length)
    weights /= weights.sum(-1, keepdims=True)
    choices = np.full((2, 2, length, 4), -1)
    hits, seen, recent = [], [], []
    for b, i, t in np.ndindex(2, 2, length):
        before = max(t - 2, 0)
        mine = np.sort(rng.permutation(before)[:4])
        choices[b, i, t, : len(mine)] = mine
        if before <= 4:
            continue
        row = weights[b, i, t]
        wanted = set(np.argsort(-row[:before])[:4].tolist())
        hits.append(len(wanted & set(mine.tolist())) / 4)
        seen.append(row[mine].sum() + row[before:].sum())
        recent.append(row[max(t - 6, 0) :].sum())
    found = latent_evaluate.fidelity(weights, attention, choices)
    assert found.recall == pytest.approx(np.mean(hits))
    assert found.attention_seen == pytest.approx(np.mean(seen))
    window = latent_evaluate.fidelity(weights, Attention("window", "bf16", 7), None)
    assert window == (None, pytest.approx(np.mean(recent)))
    assert latent_evaluate.fidelity(weights, DENSE, None) == (None, 1.0)


def test_the_dense_attention_is_that_of_the_model_written_out(weights, windows):
    found = latent_evaluate.dense_attention(weights, SMALL, windows[:1])
    _, attention, _ = reference.run(weights, SMALL, windows[0, :-1])
    assert found.shape == (1, SMALL.layers, SMALL.context, SMALL.context)
    assert np.abs(found[0] - attention.mean(1)).max() < 1e-5
