"""``python -m fastattn demo``."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastattn.functional._cache_types import CACHE_QUANT_TYPES

DEFAULT_PROMPT = "The following statement "
DEFAULT_NEW_TOKENS = 200

#: What other users ask for at the same time; the common beginning is computed once.
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


def add_parser(subparsers: Any) -> None:
    """Add the ``demo`` command to a command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="train a tiny GPT on this machine and serve it with every cache type",
        description="Train a tiny GPT (first run only, about a minute on two cores), then serve it "
        "from a paged cache of every type and compare them.",
    )
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="text to continue")
    parser.add_argument(
        "--cache-quant-type",
        choices=("all", *CACHE_QUANT_TYPES),
        default="all",
        help="compare this type only (with none, the base); default all",
    )
    parser.add_argument("--json", metavar="FILE", help="write a report there; - is stdout")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--max-new-tokens", type=_positive, default=DEFAULT_NEW_TOKENS, metavar="N")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.5, help="0 is greedy; default 0.5"
    )
    parser.add_argument("--top-k", type=_positive, default=20)
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--retrain", action="store_true", help="train even if a model is there")
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


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    from fastattn.demo.place import DeviceError
    from fastattn.demo.report import Console

    console = Console(sys.stderr if args.json == "-" else sys.stdout)
    try:
        report = _demo(args, console)
    except (DeviceError, ImportError, NotImplementedError, ValueError) as error:
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


def _demo(args: argparse.Namespace, console: Any) -> dict[str, Any]:
    import paddle

    from fastattn import _ops
    from fastattn.demo import place, report, text
    from fastattn.demo.model import Config, Model
    from fastattn.version import __version__

    config = Config()
    places = place.choose(args.device)
    if not 1 <= len(args.prompt) <= config.context:
        raise ValueError(
            f"--prompt: expected 1 to {config.context} characters, got {len(args.prompt)}"
        )
    _ops.load()  # a missing library is told before a minute of training
    corpus = text.load()
    console.line(
        f"fastattn {__version__}, Paddle {paddle.__version__}, attention on {args.device}"
        + (f" ({places.note})" if places.note else "")
    )
    weights, training = _trained(args, console, corpus, config)
    parameters = sum(w.size for w in weights.values())
    model = Model(config, weights, places.model)
    results, serving = _compare(args, console, corpus, model, weights, places.cache)
    console.line()
    console.line(
        "served {requests} requests in {steps} steps, {mixed_steps} of them with prefill and "
        "decode rows, at most {largest_batch} rows a step; {reused_tokens} prompt tokens came from "
        "shared blocks".format(**serving)
    )
    console.text(
        f"text (cache type {results[-1].cache_quant_type}):", args.prompt, results[-1].text
    )
    console.table(results)
    return report.as_json(
        versions={
            "fastattn": __version__,
            "paddle": str(paddle.__version__),
            "python": platform.python_version(),
        },
        device={"requested": args.device, "note": places.note},
        model={"parameters": int(parameters), **training},
        prompt=args.prompt,
        serving=serving,
        results=results,
    )


def _trained(args: argparse.Namespace, console: Any, corpus: Any, config: Any) -> tuple[Any, Any]:
    """Weights from the cache folder, or from training now; and how they came about."""
    from fastattn import env
    from fastattn.demo import train

    schedule = train.Schedule()
    path = train.weights_path(env.cache_dir(), corpus, config, schedule)
    weights = None if args.retrain else train.load_weights(path, config)
    if weights is not None:
        console.line(f"model from {path}")
        return weights, {"path": str(path), "trained": False, "training_seconds": 0.0}
    start = time.perf_counter()
    title = f"training on {len(corpus.train) // 1000} kB of text"
    with console.progress(title, schedule.steps) as update:
        weights = train.train(
            corpus,
            config,
            schedule,
            lambda step, steps, loss: update(step, f"loss {loss:.2f} nats a byte"),
        )
    seconds = round(time.perf_counter() - start, 1)
    try:
        train.save_weights(path, weights)
    except OSError as error:
        console.line(f"the model could not be kept in {path.parent}: {error}")
    return weights, {"path": str(path), "trained": True, "training_seconds": seconds}


def _compare(
    args: argparse.Namespace,
    console: Any,
    corpus: Any,
    model: Any,
    weights: Any,
    place: Any,
) -> tuple[list[Any], dict[str, int]]:
    """A result per cache type, and the statistics of the last one's serving."""
    from dataclasses import asdict

    from fastattn.demo import evaluate, text
    from fastattn.demo.report import TypeResult
    from fastattn.demo.scheduler import Sampling

    config = model.config
    types = list(CACHE_QUANT_TYPES) if args.cache_quant_type == "all" else ["none"]
    if args.cache_quant_type not in ("all", "none"):
        types.append(args.cache_quant_type)
    held_out = evaluate.windows(corpus.held_out, config.context, evaluate.HELD_OUT_WINDOWS)
    jobs = [(args.prompt, args.max_new_tokens)]
    jobs += [(prompt, min(_OTHER_NEW_TOKENS, args.max_new_tokens)) for prompt in _OTHER_PROMPTS]
    jobs = [(prompt, min(new, config.context + 1 - len(prompt))) for prompt, new in jobs]
    total = held_out.size + sum(len(prompt) + new for prompt, new in jobs)
    sampling = Sampling(args.temperature, args.top_k, args.seed)
    evaluate.warm_up(model, place=place)

    results: list[TypeResult] = []
    base = None
    for name in types:
        scales = evaluate.static_scales(weights, config, corpus.train, name)
        with console.progress(f"{name}: perplexity and serving", total) as update:
            count = _Counter(update)
            scored = evaluate.score(model, name, scales, held_out, place=place, progress=count)
            served = evaluate.serve(
                model, name, scales, jobs, sampling, place=place, progress=count
            )
            update(total, "")
        base = base or scored
        results.append(
            TypeResult(
                cache_quant_type=name,
                bytes_per_token=served.bytes_per_token,
                perplexity=scored.perplexity,
                perplexity_ratio=scored.perplexity / base.perplexity,
                max_logit_error=evaluate.largest_difference(scored.logits, base.logits),
                tokens_per_second=served.tokens_per_second,
                text=text.decode(served.requests[0].generated),
            )
        )
    return results, {"requests": len(jobs), **asdict(served.statistics)}


class _Counter:
    """Adds up the tokens of steps for a progress bar."""

    def __init__(self, update: Callable[[int, str], None]) -> None:
        self._update = update
        self._done = 0

    def __call__(self, tokens: int) -> None:
        self._done += tokens
        self._update(self._done, "")
