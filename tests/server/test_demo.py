"""The demo: text, gradients, blocks, scheduling, serving with every cache type, report."""

from __future__ import annotations

import argparse
import io
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from fastattn.demo import cli, evaluate, gradient, place, report, text, train
from fastattn.demo.blocks import BlockPool, block_keys
from fastattn.demo.engine import Engine
from fastattn.demo.model import Config, Model, initial_weights
from fastattn.demo.scheduler import Request, Sampling, Scheduler
from fastattn.functional._cache_types import CACHE_QUANT_TYPES, STATIC_TYPES

SMALL = Config(layers=2, hidden=32, heads=4, kv_heads=2, head_dim=64, mlp=48, context=256)
GREEDY = Sampling(temperature=0.0)


def small_weights(config=SMALL):
    weights = initial_weights(config, 0)
    weights["embedding"] *= np.float32(20)  # logits far enough apart for a greedy choice
    return weights


@pytest.fixture(scope="module")
def weights():
    return small_weights()


@pytest.fixture(scope="module")
def model(weights):
    return Model(SMALL, weights)


@pytest.fixture(scope="module")
def corpus():
    return text.load()


@pytest.fixture(scope="module")
def scales(weights, corpus):
    return {
        name: evaluate.static_scales(weights, SMALL, corpus.train, name)
        for name in CACHE_QUANT_TYPES
    }


# Text


def test_the_text_is_prose(corpus):
    letters = sum(c.isalpha() or c == " " for c in corpus.train)
    assert letters / len(corpus.train) > 0.9
    assert corpus.train.count(" the ") > 1000


def test_paragraphs_lose_code_and_markup():
    source = (
        "* The *name* of a class is bound in the local namespace, which is a dictionary\n"
        "  of its own.\n\n   x = {1: [2, 3], 4: (5, 6)}\n\nShort."
    )
    assert text.paragraphs(source) == [
        "The name of a class is bound in the local namespace, which is a dictionary of its own."
    ]


def test_encoding_round_trips_and_replaces_what_has_no_token():
    assert text.decode(text.encode("a b\n\u201cc\u201d \u00df")) == 'a b\n"c" ?'
    assert text.encode("\u4e2d").max() < text.VOCABULARY


# Model and training


def test_gradients_are_those_of_paddle():
    config = Config(layers=2, hidden=32, mlp=48, context=64)
    weights = small_weights(config)
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, (3, 33))
    loss, gradients = gradient.loss_and_gradients(weights, config, tokens[:, :-1], tokens[:, 1:])
    model = Model(config, weights)
    for weight in model.weights.values():
        weight.stop_gradient = False
    logits = model.forward(tokens[:, :-1]).reshape([-1, config.vocabulary])
    expected = F.cross_entropy(logits, model.tensor(tokens[:, 1:].reshape(-1)))
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert set(gradients) == set(weights)
    for name, weight in model.weights.items():
        reference = weight.grad.numpy()
        error = np.abs(gradients[name] - reference).max() / np.abs(reference).max()
        assert error < 2e-5, name


def test_training_lowers_the_loss_and_repeats(corpus):
    config = Config(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, context=64)
    schedule = train.Schedule(steps=16, tokens=512, warmup=4)
    losses = []
    weights = train.train(corpus, config, schedule, lambda step, steps, loss: losses.append(loss))
    assert len(losses) == 16 and losses[-1] < losses[0] - 0.3
    again = train.train(corpus, config, schedule)
    for name, weight in weights.items():
        np.testing.assert_allclose(again[name], weight, rtol=1e-3, atol=1e-4)


def test_the_two_halves_of_a_step_give_the_gradients_of_the_whole():
    config = Config(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, context=64)
    weights = small_weights(config)
    windows = np.random.default_rng(1).integers(0, config.vocabulary, (5, 18))  # 3 and 2
    expected_loss, expected = gradient.loss_and_gradients(
        weights, config, windows[:, :-1], windows[:, 1:]
    )
    with ThreadPoolExecutor(2) as pool:
        loss, gradients = train._gradients(pool, weights, config, windows)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert set(gradients) == set(expected)
    for name, reference in expected.items():
        error = np.abs(gradients[name] - reference).max() / np.abs(reference).max()
        assert error < 2e-5, name


def test_weights_survive_a_file_and_a_broken_one_is_ignored(tmp_path, weights):
    path = tmp_path / "folder" / "demo.npz"
    assert train.load_weights(path, SMALL) is None
    train.save_weights(path, weights)
    loaded = train.load_weights(path, SMALL)
    assert all((loaded[name] == weight).all() for name, weight in weights.items())
    assert train.load_weights(path, Config()) is None
    assert [p.name for p in path.parent.iterdir()] == ["demo.npz"]
    path.write_bytes(path.read_bytes()[:1000])
    assert train.load_weights(path, SMALL) is None
    path.write_bytes(b"")
    assert train.load_weights(path, SMALL) is None


def test_the_file_name_depends_on_config_text_and_schedule(tmp_path, corpus):
    def name(corpus=corpus, config=SMALL, steps=100):
        return train.weights_path(tmp_path, corpus, config, train.Schedule(steps))

    other_text = text.Corpus(corpus.train + " ", corpus.held_out)
    names = {name(), name(other_text), name(config=Config()), name(steps=1)}
    assert len(names) == 4 and name() == name()


# Blocks


def test_keys_cover_full_blocks_and_everything_before_them():
    tokens = list(range(200))
    keys = block_keys(tokens)
    assert len(keys) == 3 and len(block_keys(tokens[:63])) == 0
    assert block_keys(tokens[:128]) == keys[:2]
    other = block_keys([99, *tokens[1:]])
    assert not set(other) & set(keys)


def test_shared_blocks_are_counted_and_kept_for_later():
    pool = BlockPool(3)
    keys = block_keys(list(range(128)))
    first = [pool.allocate(), pool.allocate()]
    assert pool.acquire_prefix(keys) == []
    for block, key in zip(first, keys):
        pool.publish(block, key)
    assert pool.acquire_prefix(keys) == first
    assert [pool.references(b) for b in first] == [2, 2]
    pool.release(first)
    assert pool.in_use == 2
    pool.release(first)
    assert pool.in_use == 0 and pool.available == 3
    with pytest.raises(ValueError, match="not in use"):
        pool.release(first)
    assert pool.acquire_prefix(keys) == first  # idle, not forgotten
    pool.release(first)
    taken = [pool.allocate(), pool.allocate()]  # the free one, then the end of the prefix
    assert first[0] not in taken and pool.acquire_prefix(keys) == first[:1]
    with pytest.raises(RuntimeError, match="in use"):
        pool.allocate()


def test_random_use_of_the_pool_loses_no_block():
    rng = random.Random(0)
    pool = BlockPool(12)
    held: list[list[int]] = []
    for _ in range(2000):
        if held and (pool.available < 4 or rng.random() < 0.4):
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            keys = block_keys([rng.randrange(2) for _ in range(1)] * (64 * rng.randint(1, 4)))
            blocks = pool.acquire_prefix(keys)
            while len(blocks) < len(keys):
                blocks.append(pool.allocate())
                pool.publish(blocks[-1], keys[len(blocks) - 1])
            held.append(blocks)
        used = {b for blocks in held for b in blocks}
        assert pool.in_use == len(used)
        for block in used:
            assert pool.references(block) == sum(block in blocks for blocks in held)


# Scheduling


def drain(scheduler):
    """Run a scheduler without a model; returns the steps as lists of (start, count, prefill)."""
    steps = []
    while rows := scheduler.schedule():
        steps.append([(row.start, row.count, row.is_prefill) for row in rows])
        used = [b for r in scheduler.running for b in r.blocks]
        for row in rows:
            assert len(row.request.blocks) * 64 >= row.start + row.count
        writable = [r.blocks[row.start // 64] for row in rows for r in [row.request]]
        assert all(used.count(b) == 1 for b in writable)  # nobody writes a shared block
        for row in rows:
            scheduler.commit(row)
            if row.is_last and len(row.request.generated) < row.request.max_new_tokens:
                row.request.tokens.append(1)
            if row.request.done:
                scheduler.finish(row.request)
    return steps


def test_a_step_mixes_decode_rows_and_prefill_chunks_under_the_budget():
    scheduler = Scheduler(BlockPool(20), max_seqs=4, token_budget=40, chunk=32)
    scheduler.add(Request(range(10), 8))
    scheduler.add(Request(range(100), 2))
    steps = drain(scheduler)
    assert steps[0] == [(0, 10, True), (0, 30, True)]
    assert steps[1] == [(10, 1, False), (30, 32, True)]
    assert steps[2] == [(11, 1, False), (62, 32, True)]
    assert steps[3] == [(12, 1, False), (94, 6, True)]
    assert all(sum(count for _, count, _ in step) <= 40 for step in steps)
    assert scheduler.pool.in_use == 0


def test_waiting_requests_join_when_others_leave():
    scheduler = Scheduler(BlockPool(20), max_seqs=2, token_budget=64, chunk=64)
    requests = [Request([i], i + 1) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    steps = drain(scheduler)
    assert max(len(step) for step in steps) == 2
    assert [len(r.generated) for r in requests] == [1, 2, 3, 4, 5]
    assert len(steps) < 15


def test_a_prefix_in_the_cache_is_not_computed_again():
    scheduler = Scheduler(BlockPool(20), max_seqs=2, token_budget=256, chunk=256)
    prompt = list(range(128))
    for tokens in (prompt, prompt, [*prompt, 5], [*prompt[:64], 77, *prompt[65:]]):
        scheduler.add(Request(tokens, 1))
        drain(scheduler)
    for tokens, expected in ((prompt, 64), ([*prompt, 5], 128), ([*prompt[:64], 9], 64)):
        scheduler.add(request := Request(tokens, 1))
        steps = drain(scheduler)
        assert request.reused == expected and steps[0][0][0] == expected
    assert scheduler.pool.in_use == 0


def test_the_youngest_makes_room_when_blocks_run_out():
    scheduler = Scheduler(
        BlockPool(3), max_seqs=2, token_budget=256, chunk=256, reuse_prefixes=False
    )
    old, young = Request(range(60), 100), Request(range(100, 160), 60)
    scheduler.add(old)
    scheduler.add(young)
    drain(scheduler)
    assert old.preemptions == 0 and young.preemptions > 0
    assert (len(old.generated), len(young.generated)) == (100, 60)
    assert scheduler.pool.in_use == 0


def test_impossible_requests_are_refused(model):
    scheduler = Scheduler(BlockPool(2), max_seqs=1, token_budget=8, chunk=8)
    with pytest.raises(ValueError, match="needs 3 cache blocks, there are 2"):
        scheduler.add(Request(range(100), 30))
    with pytest.raises(ValueError, match="at least one token"):
        Request([], 3)
    with pytest.raises(ValueError, match="chunk"):
        Scheduler(BlockPool(2), max_seqs=1, token_budget=8, chunk=0)
    with pytest.raises(ValueError, match="context of 256"):
        Engine(model).submit(Request(range(100), 158))


def test_sampling_follows_its_seed_and_its_limits():
    logits = np.array([0.0, 3.0, 1.0, 2.9], np.float32)
    assert Request([1], 1, GREEDY).sample(logits) == 1
    drawn = [Request([1], 1, Sampling(1.0, 2, seed)).sample(logits) for seed in range(50)]
    assert set(drawn) == {1, 3}
    assert drawn == [Request([1], 1, Sampling(1.0, 2, seed)).sample(logits) for seed in range(50)]


# Serving


PROMPTS = (
    "The value of a name",
    "If",
    "A function is called with arguments, and each of them is bound to the name of a parameter in "
    "the local namespace of the call.",
)


def serve(model, name, scales, prompts, new=12, **options):
    engine = Engine(model, name, scales=scales[name], **{"num_blocks": 24, **options})
    requests = [engine.submit(Request(list(text.encode(p)), new, GREEDY)) for p in prompts]
    engine.run()
    assert engine.scheduler.pool.in_use == 0
    return [r.generated for r in requests], engine.statistics


def test_paged_logits_are_those_of_the_dense_model(model, corpus, scales):
    held_out = evaluate.windows(corpus.held_out, SMALL.context, 3)
    scored = evaluate.score(model, "none", None, held_out)
    exact = model.forward(held_out[:, :-1], bfloat16=True).numpy()
    spread = exact.std()
    assert np.abs(scored.logits - exact).max() < 2e-3 * spread
    fp32 = model.forward(held_out[:, :-1]).numpy()
    assert np.abs(scored.logits - fp32).max() < 2e-2 * spread
    assert scored.perplexity > 1


@pytest.mark.parametrize("name", CACHE_QUANT_TYPES)
def test_a_batch_gives_what_each_request_gives_alone(model, scales, name):
    together, seen = serve(model, name, scales, PROMPTS, token_budget=40, chunk=33)
    assert seen.mixed_steps > 0 and seen.largest_batch == len(PROMPTS)
    for prompt, tokens in zip(PROMPTS, together):
        alone, _ = serve(model, name, scales, [prompt])
        assert alone == [tokens]


@pytest.mark.parametrize("name", CACHE_QUANT_TYPES)
def test_reused_prefixes_give_the_same_tokens(model, scales, name):
    prompts = [PROMPTS[2] + tail for tail in ("", " One", " Two")]
    options = {"max_seqs": 1, "token_budget": 50, "chunk": 50}
    reusing, seen = serve(model, name, scales, prompts, **options)
    plain, other = serve(model, name, scales, prompts, reuse_prefixes=False, **options)
    assert reusing == plain
    assert seen.reused_tokens == 2 * 64 and other.reused_tokens == 0
    assert seen.tokens == other.tokens - seen.reused_tokens


def test_preempted_requests_give_the_same_tokens(model, scales):
    expected, _ = serve(model, "block_wise_int8", scales, PROMPTS, new=70)
    tight, seen = serve(model, "block_wise_int8", scales, PROMPTS, new=70, num_blocks=4)
    assert seen.preemptions > 0 and tight == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", 2 * 2 * 2 * 64 * 2),
        ("cache_int8", 2 * 2 * 2 * 64),
        ("cache_fp8", 2 * 2 * 2 * 64),
        ("block_wise_fp8", 2 * 2 * 2 * (64 + 4)),
        ("block_wise_int8", 2 * 2 * 2 * (64 + 4)),
        ("block_wise_int4", 2 * 2 * 2 * (32 + 4)),
        ("block_wise_mxfp4", 2 * 2 * 2 * (32 + 2)),
        ("block_wise_k8v4", 2 * 2 * (64 + 32 + 2 * 4)),
        ("block_wise_kfp8v4", 2 * 2 * (64 + 32 + 2 * 4)),
    ],
)
def test_bytes_a_token(model, scales, name, expected):
    assert Engine(model, name, scales=scales[name]).bytes_per_token == expected


def test_quantised_caches_stay_near_the_plain_one(model, corpus, scales):
    held_out = evaluate.windows(corpus.held_out, SMALL.context, 2)
    base = evaluate.score(model, "none", None, held_out)
    for name in CACHE_QUANT_TYPES[1:]:
        scored = evaluate.score(model, name, scales[name], held_out)
        spread = base.logits.std()
        difference = scored.logits - base.logits
        loss = 8 if name.endswith("4") else 1  # half of the bits
        assert 0 < np.sqrt((difference**2).mean()) < loss * 0.02 * spread, name
        largest = evaluate.largest_difference(scored.logits, base.logits)
        assert largest == np.abs(difference).max() < loss * 0.3 * spread, name
        assert scored.perplexity == pytest.approx(base.perplexity, rel=loss * 0.02), name


def test_static_scales_do_not_depend_on_how_many_windows_run_at_once(
    monkeypatch, weights, corpus, scales
):
    monkeypatch.setattr(evaluate, "_CALIBRATION_BATCH", evaluate.CALIBRATION_WINDOWS)
    tokens = []
    for name in STATIC_TYPES:
        found = evaluate.static_scales(weights, SMALL, corpus.train, name, progress=tokens.append)
        for pair, expected in zip(found, scales[name]):
            for array, reference in zip(pair, expected):
                np.testing.assert_allclose(array, reference, rtol=1e-5)
        assert tokens == [evaluate.calibration_tokens(SMALL, corpus.train, name)]
        tokens.clear()
    assert evaluate.calibration_tokens(SMALL, corpus.train, "none") == 0


def test_static_scales_cover_the_text_they_were_measured_on(weights, corpus, scales):
    tokens = evaluate.windows(corpus.train, SMALL.context, evaluate.CALIBRATION_WINDOWS)[:, :-1]
    layer = gradient.forward(weights, SMALL, tokens).layers[1].attention
    k_int8, v_int8 = scales["cache_int8"][1]
    k_fp8, v_fp8 = scales["cache_fp8"][1]
    assert k_int8.shape == v_int8.shape == (128,) and k_fp8.shape == v_fp8.shape == (2,)
    assert np.abs(layer.k[:, 1, :, 5]).max() == pytest.approx(127 * k_int8[64 + 5], rel=1e-6)
    assert np.abs(layer.v[:, 0]).max() == pytest.approx(448 * v_fp8[0], rel=1e-6)
    assert len(set(k_int8)) > 100 and scales["none"] is None


# Command


def parse(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *arguments])


def test_the_command_tells_what_is_wrong(capsys):
    arguments = parse("--prompt", "x" * 300)
    assert arguments.run(arguments) == 1
    assert "--prompt: expected 1 to 256 characters, got 300" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--cache-quant-type", "cache_int4_zp")
    assert "cache_int4_zp" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--max-new-tokens", "0")


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
    with pytest.raises(place.DeviceError, match="CPU build"):
        place.choose("gpu")
    arguments = parse("--device", "gpu")
    assert arguments.run(arguments) == 1
    assert "CPU build" in capsys.readouterr().err


def test_progress_without_a_terminal_is_plain_lines():
    stream = io.StringIO()
    console = report.Console(stream)
    with console.progress("training", 100) as update:
        for step in range(100):
            update(step + 1, f"loss {step}")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training ..." and lines[-1].startswith("training  100 %")
    assert len(lines) == 2 and "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--temperature", "nan", "expected a finite number of at least 0, got nan"),
        ("--temperature", "-1", "expected a finite number of at least 0, got -1"),
        ("--temperature", "warm", "expected a finite number of at least 0, got warm"),
        ("--seed", "-1", "expected at least 0, got -1"),
        ("--top-k", "x", "expected an int, got 'x'"),
        ("--max-new-tokens", "0", "expected at least 1, got 0"),
    ],
)
def test_numbers_are_refused_before_training(capsys, option, value, text):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["demo", f"{option}={value}"])
    assert f"argument {option}: {text}" in capsys.readouterr().err
