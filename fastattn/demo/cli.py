"""``python -m fastattn demo``.

Paddle is imported only after the first line of output, because its import takes seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastattn._formats import FORMATS

#: The same names as in ``fastattn.functional``, whose import would import Paddle.
CACHE_QUANT_TYPES = tuple(row.name for row in FORMATS)

#: Rotations of K to compare with, by type. Each gets its own row.
_OTHER_ROTATIONS = {row.name: ("none",) for row in FORMATS if row.bits == 4}

DEFAULT_PROMPT = "The following statement "
DEFAULT_NEW_TOKENS = 200

#: Kinds of attention: grouped queries, or latents with keys that an indexer selects.
ATTENTIONS = ("gqa", "mla-sparse")

#: Prompts of other users that run at the same time. Their common prefix is computed once.
_PREAMBLE = (
    "The value of an expression is computed when the statement is executed, and the names that it "
    "uses are looked up in the namespace of the enclosing function. "
)
_OTHER_PROMPTS = (
    "A class definition ",
    _PREAMBLE + "An exception ",
    "If the object is ",
    _PREAMBLE + "The method ",
    "When a function is called, ",
    _PREAMBLE + "Note that ",
)
_OTHER_NEW_TOKENS = 80

#: Number of prefill tokens that take as long as one decoded token.
_GENERATED_WEIGHT = 12


def add_parser(subparsers: Any) -> None:
    """Add the ``demo`` command to a command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="serve a model with every cache type",
        description="Serve a model from a paged cache of every type and compare them: a tiny GPT, "
        "which comes with the package or is trained here; one with latent attention (MLA) and an "
        "indexer; or a real one.",
    )
    parser.add_argument(
        "--model",
        default="toy",
        help="toy (default); smollm2, gemma3-270m, a .gguf file or a folder; auto is smollm2 if "
        "its package is installed, else the toy",
    )
    parser.add_argument(
        "--tokens", type=_positive, metavar="N", help="tokens of a real model's table; default 2048"
    )
    parser.add_argument(
        "--attention",
        choices=ATTENTIONS,
        default="gqa",
        help="mla-sparse: latent attention over keys that an indexer selects; default gqa",
    )
    parser.add_argument("--prompt", help="text to continue, or a question to a real model")
    parser.add_argument(
        "--cache-quant-type",
        choices=("all", *CACHE_QUANT_TYPES),
        default="all",
        help="gqa: compare only this type with the base type none; default all",
    )
    parser.add_argument("--json", metavar="FILE", help="write a report to this file; - is stdout")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--max-new-tokens", type=_positive, default=DEFAULT_NEW_TOKENS, metavar="N")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.5, help="0 is greedy; default 0.5"
    )
    parser.add_argument("--top-k", type=_positive, default=20)
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument(
        "--train",
        action="store_true",
        help=(
            "train a model on this machine, which takes minutes, and serve it; the model is "
            "kept in the cache folder for the next --train"
        ),
    )
    parser.add_argument(
        "--retrain",
        action="store_true",
        help="as --train, but train again even if a trained model exists",
    )
    parser.set_defaults(run=run)


def _int(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an int, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
    return value


def _positive(text: str) -> int:
    return _int(text, 1)


def _seed(text: str) -> int:
    return _int(text, 0)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text}")
    return value


def _calm_threads(toy: bool) -> None:
    """Make waiting threads sleep instead of spin, unless the user has chosen otherwise.

    The demo's matrix products are small, and libraries that spin after each leave no core to other
    programs. With both cores of a machine in use, the demo took 100 to 120 s with spinning threads
    and 25 s with sleeping ones.
    """
    if not toy:  # its products are worth all idle cores
        from fastattn.evaluate.cli import calm_threads

        calm_threads()
    elif "numpy" not in sys.modules:  # otherwise they have read these already
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def run(args: argparse.Namespace) -> int:
    """Run the demo; return the exit status."""
    toy_only = args.attention != "gqa" or args.train or args.retrain
    if toy_only and args.model not in ("toy", "auto"):
        print("fastattn demo: --model: --attention and --train are the toy's", file=sys.stderr)
        return 1
    if toy_only:
        args.model = "toy"
    _calm_threads(args.model == "toy")
    from fastattn.cli.outputs import problem_of_file
    from fastattn.demo.report import Console

    if args.json and args.json != "-":
        problem = problem_of_file(Path(args.json))
        if problem is not None:
            print(f"fastattn demo: --json: {args.json}: {problem}", file=sys.stderr)
            return 1

    console = Console(sys.stderr if args.json == "-" else sys.stdout)
    try:
        report = _real(args, console) or _demo(args, console)
    except (NotImplementedError, ValueError) as error:
        print(f"fastattn demo: {error}", file=sys.stderr)
        return 1
    document = json.dumps(report, indent=2)
    if args.json == "-":
        print(document)
    elif args.json:
        try:
            Path(args.json).write_text(document + "\n", encoding="utf-8")
        except OSError as error:
            print(f"fastattn demo: --json: {error}", file=sys.stderr)
            return 1
    return 0


def _real(args: argparse.Namespace, console: Any) -> dict[str, Any] | None:
    """With a real model; None if it is the toy's turn."""
    if args.model == "toy":
        return None
    from fastattn.demo import real

    model = real.find(args.model, console)
    return None if model is None else real.run(args, console, model)


def _demo(args: argparse.Namespace, console: Any) -> dict[str, Any]:
    args.prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    from fastattn.demo import report
    from fastattn.version import __version__

    with console.progress("loading", 4) as update:
        update(0, "Paddle")
        import paddle

        from fastattn.demo import kinds, place

        kind = kinds.find(args.attention)
        config = kind.config
        places = place.choose(args.device)
        if args.attention != "gqa" and args.cache_quant_type != "all":
            raise ValueError("--cache-quant-type: it is for --attention gqa")
        if not 1 <= len(args.prompt) <= config.context:
            raise ValueError(
                f"--prompt: expected 1 to {config.context} characters, got {len(args.prompt)}"
            )
        update(1, "operators")
        from fastattn import _ops

        _ops.prepare()
        update(2, "text")
        from fastattn.demo import text

        corpus = text.load()
        update(3, "model")
        weights, origin = _find_model(args, corpus, kind)
        update(4, "")
    console.line(
        f"fastattn {__version__}, Paddle {paddle.__version__}, attention on {args.device}"
        + (f" ({places.note})" if places.note else "")
    )
    if not corpus.complete:
        console.line(
            "this Python's text lacks some of the paragraphs to measure with: perplexities are of "
            f"{len(corpus.held_out)} characters"
        )
    if weights is None:
        weights, origin = _train(console, corpus, kind)
    else:
        console.line(f"model from {origin['path']}")
    model = kind.model(config, weights, places.model)
    compare = _compare if args.attention == "gqa" else _compare_latent
    results, serving = compare(args, console, corpus, model, weights, places.cache)
    console.line()
    console.line(
        "served {requests} requests in {steps} steps, {mixed_steps} of them with prefill and "
        "decode sequences, at most {largest_batch} sequences a step; {reused_tokens} prompt tokens "
        "came from shared blocks".format(**serving)
    )
    console.text(f"text ({results[-1].title}):", args.prompt, results[-1].text)
    console.table(results)
    return report.as_json(
        attention=args.attention,
        versions={
            "fastattn": __version__,
            "paddle": str(paddle.__version__),
            "python": platform.python_version(),
        },
        device={"requested": args.device, "note": places.note},
        model={"parameters": int(sum(w.size for w in weights.values())), **origin},
        text={
            "train_sha256": text.digest(corpus.train),
            "held_out_sha256": text.digest(corpus.held_out),
            "held_out_characters": len(corpus.held_out),
            "held_out_complete": corpus.complete,
        },
        prompt=args.prompt,
        serving=serving,
        results=results,
    )


def _find_model(args: argparse.Namespace, corpus: Any, kind: Any) -> tuple[Any, dict[str, Any]]:
    """Existing weights or None, and a note on their origin."""
    from fastattn import env
    from fastattn.demo import shipped, train

    origin = {"trained": False, "training_seconds": 0.0}
    if not (args.train or args.retrain):
        note = {"origin": "shipped", "path": str(kind.files.model), **origin}
        return shipped.load(kind.config, kind.files), note
    path = train.weights_path(env.cache_dir(), corpus, kind.config, kind.schedule)
    weights = None if args.retrain else train.load_weights(path, kind.config)
    return weights, {"origin": "cache", "path": str(path), **origin}


def _train(console: Any, corpus: Any, kind: Any) -> tuple[Any, dict[str, Any]]:
    """Train weights and keep them in the cache folder; also a note on their origin."""
    from fastattn import env
    from fastattn.demo import train

    path = train.weights_path(env.cache_dir(), corpus, kind.config, kind.schedule)
    start = time.perf_counter()
    title = f"training on {len(corpus.train) // 1000} kB of text"
    with console.progress(title, kind.schedule.steps) as update:

        def show(step: int, steps: int, loss: float) -> None:
            left = (time.perf_counter() - start) / step * (steps - step)
            update(step, f"loss {loss:.2f} nats a byte, {left:.0f} s left")

        weights = kind.train(corpus, kind.config, kind.schedule, show)
    seconds = round(time.perf_counter() - start, 1)
    try:
        train.save_weights(path, weights)
        console.line(f"model kept in {path}")
    except OSError as error:
        console.line(f"the model could not be kept in {path.parent}: {error}")
    return weights, {
        "origin": "trained",
        "path": str(path),
        "trained": True,
        "training_seconds": seconds,
    }


def _jobs(args: argparse.Namespace, context: int) -> list[tuple[str, int]]:
    """Prompts and the number of tokens to generate for each. The user's prompt is first."""
    jobs = [(args.prompt, args.max_new_tokens)]
    jobs += [(prompt, min(_OTHER_NEW_TOKENS, args.max_new_tokens)) for prompt in _OTHER_PROMPTS]
    return [(prompt, min(new, context + 1 - len(prompt))) for prompt, new in jobs]


def _compare(
    args: argparse.Namespace,
    console: Any,
    corpus: Any,
    model: Any,
    weights: Any,
    place: Any,
) -> tuple[list[Any], dict[str, int]]:
    """A result per cache type, and the serving statistics of the last type."""
    from dataclasses import asdict

    from fastattn.demo import evaluate, text
    from fastattn.demo.report import TypeResult
    from fastattn.demo.scheduler import Sampling

    config = model.config
    types = list(CACHE_QUANT_TYPES) if args.cache_quant_type == "all" else ["none"]
    if args.cache_quant_type not in ("all", "none"):
        types.append(args.cache_quant_type)
    held_out = evaluate.windows(corpus.held_out, config.context, evaluate.HELD_OUT_WINDOWS)
    jobs = _jobs(args, config.context)
    to_generate = sum(new for _, new in jobs)
    sampling = Sampling(args.temperature, args.top_k, args.seed)
    evaluate.warm_up(model, place=place)

    results: list[TypeResult] = []
    base = None
    rows = [(name, k) for name in types for k in (None, *_OTHER_ROTATIONS.get(name, ()))]
    for name, k_rotation in rows:
        label = name if k_rotation is None else f"{name},k_rotation={k_rotation}"
        to_measure = evaluate.calibration_tokens(config, corpus.train, name)
        total = to_measure + held_out[:, :-1].size + _GENERATED_WEIGHT * to_generate
        with console.progress(f"{label}: perplexity and serving", total) as update:
            count = _Counter(update, total)
            if to_measure:
                count.phase("static scales")
            scales = evaluate.static_scales(weights, config, corpus.train, name, progress=count)
            count.phase("perplexity")
            options = {"place": place, "progress": count, "k_rotation": k_rotation}
            scored = evaluate.score(model, name, scales, held_out, **options)
            count.phase("serving", _GENERATED_WEIGHT)
            served = evaluate.serve(model, name, scales, jobs, sampling, **options)
        base = base or scored
        results.append(
            TypeResult(
                cache_quant_type=label,
                bytes_per_token=served.bytes_per_token,
                perplexity=scored.perplexity,
                perplexity_ratio=scored.perplexity / base.perplexity,
                max_logit_error=evaluate.largest_difference(scored.logits, base.logits),
                tokens_per_second=served.tokens_per_second,
                text=text.decode(served.requests[0].generated),
            )
        )
    return results, {"requests": len(jobs), **asdict(served.statistics)}


def _compare_latent(
    args: argparse.Namespace,
    console: Any,
    corpus: Any,
    model: Any,
    weights: Any,
    place: Any,
) -> tuple[list[Any], dict[str, int]]:
    """A result per variant of the latent model, and the serving statistics of the last variant."""
    from dataclasses import asdict

    from fastattn.demo import evaluate, latent_evaluate, text
    from fastattn.demo.latent_engine import LatentEngine
    from fastattn.demo.report import LatentResult
    from fastattn.demo.scheduler import Sampling

    config = model.config
    held_out = evaluate.windows(corpus.held_out, config.context, evaluate.HELD_OUT_WINDOWS)
    jobs = _jobs(args, config.context)
    sampling = Sampling(args.temperature, args.top_k, args.seed)
    variants = latent_evaluate.variants(config)
    evaluate.warm_up_with(LatentEngine(model, variants[-1], num_blocks=4, place=place))
    with console.progress("attention to compare with", held_out[:, :-1].size) as update:
        count = _Counter(update, held_out[:, :-1].size)
        exact = latent_evaluate.dense_attention(weights, config, held_out, count)

    results: list[LatentResult] = []
    base = None
    total = held_out[:, :-1].size + _GENERATED_WEIGHT * sum(new for _, new in jobs)
    for variant in variants:
        title = f"{variant.keys}, {variant.cache_format}: perplexity and serving"
        with console.progress(title, total) as update:
            count = _Counter(update, total)
            count.phase("perplexity")
            scored, choices = latent_evaluate.score(
                model, variant, held_out, place=place, progress=count
            )
            count.phase("serving", _GENERATED_WEIGHT)
            engine = LatentEngine(model, variant, place=place, max_seqs=4)
            served = evaluate.serve_with(engine, jobs, sampling, count)
        base = base or scored
        found = latent_evaluate.fidelity(exact, variant, choices)
        results.append(
            LatentResult(
                keys=variant.keys,
                most_keys=latent_evaluate.most_keys(variant, config),
                cache_format=variant.cache_format,
                bytes_per_token=served.bytes_per_token,
                perplexity=scored.perplexity,
                perplexity_ratio=scored.perplexity / base.perplexity,
                rms_logit_error=latent_evaluate.rms_difference(scored.logits, base.logits),
                recall=found.recall,
                attention_seen=found.attention_seen,
                tokens_per_second=served.tokens_per_second,
                text=text.decode(served.requests[0].generated),
            )
        )
    return results, {"requests": len(jobs), **asdict(served.statistics)}


class _Counter:
    """Sums the tokens of steps for a progress bar, which also shows the phase."""

    def __init__(self, update: Callable[[int, str], None], total: int) -> None:
        self._update = update
        self._total = total
        self._done = 0
        self._phase = ""
        self._weight = 1

    def phase(self, name: str, weight: int = 1) -> None:
        self._phase, self._weight = name, weight
        self(0)

    def __call__(self, tokens: int) -> None:
        self._done += self._weight * tokens
        self._update(self._done, self._phase if self._done < self._total else "")
