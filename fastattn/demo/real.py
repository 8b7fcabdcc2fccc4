"""The demo with a real model: its text, token by token, then what every cache type costs it."""

from __future__ import annotations

import argparse
import time
from typing import Any

from fastattn.evaluate.cli import evaluate
from fastattn.models import LanguageModel, ModelError

#: The model of ``--model auto``.
DEFAULT_MODEL = "smollm2"

DEFAULT_PROMPT = "What is the key-value cache of a language model, and why store it in 8 bits?"

#: What the text is served from unless a type is named: the best of those without calibration.
TEXT_TYPE = "block_wise_int8"

#: The table: tokens, in windows of so many, and seconds after which no window is begun.
_TOKENS, _WINDOW, _SECONDS, _GREEDY = 2048, 512, 100, 24


def find(name: str, console: Any) -> LanguageModel | None:
    """The model; for ``auto`` None and a line why, if its package is missing.

    Raises
    ------
    ModelError
        If a model was named and is missing.
    """
    from fastattn import models

    wanted = DEFAULT_MODEL if name == "auto" else name
    try:
        with console.progress(f"loading {wanted}", 1) as update:
            model = models.load(wanted)
            update(1, "")
        return model
    except ModelError as error:
        if name != "auto":
            raise
        console.line(f"no real model, so a toy of 0.8 M parameters: {error}")
        return None


def _prompt(model: LanguageModel, text: str) -> list[int]:
    """Tokens of a prompt: a question to models that were taught to answer, else a text."""
    if "<|im_start|>" in model.tokenizer.ids:
        text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return model.tokenizer.encode(text, special=True)


def run(args: argparse.Namespace, console: Any, model: LanguageModel) -> dict[str, Any]:
    """Serve a text, then compare cache types; the report."""
    from fastattn.demo import place as places

    where = places.choose(args.device)
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    kind = TEXT_TYPE if args.cache_quant_type == "all" else args.cache_quant_type
    text, speed = _serve(args, console, model, where, kind, prompt)
    console.line()
    console.line(f"{speed:.1f} tokens/s, cache {kind}")
    types = "default" if args.cache_quant_type == "all" else args.cache_quant_type
    tokens = args.tokens or _TOKENS
    window = max(min(_WINDOW, model.config.context, tokens // 2), 16)  # two have a standard error
    options = argparse.Namespace(
        model=args.model,
        types=types,
        calibration=[],
        tokens=tokens,
        window=window,
        seconds=_SECONDS,
        text=[],
        greedy=_GREEDY,
        needles=[],
        exact=False,
        rotate_values=False,
        device=args.device,
        plot=None,
    )
    report = evaluate(options, console, model)
    return {**report, "prompt": prompt, "text_served": {"cache_quant_type": kind, "text": text}}


def _serve(
    args: argparse.Namespace,
    console: Any,
    model: LanguageModel,
    where: Any,
    kind: str,
    prompt: str,
) -> tuple[str, float]:
    """Show a text while it is made; the text, and its tokens a second."""
    import paddle

    from fastattn.calibrate.from_model import collect
    from fastattn.demo.scheduler import Request, Sampling
    from fastattn.evaluate import texts
    from fastattn.evaluate.variants import parse
    from fastattn.models.served import Session, greedy

    tokens = _prompt(model, prompt)
    new = min(args.max_new_tokens, model.config.context - len(tokens))
    if not prompt or new < 1:
        raise ValueError(
            f"--prompt: expected 1 to {model.config.context - 1} tokens, got {len(tokens)}"
        )
    variant = parse(kind)
    samples: Any = {}
    if variant.calibrated:
        windows = texts.windows(texts.calibration(), model.tokenizer, 256, 2)
        samples = collect(model, [window.tokens for window in windows])
    gpu = isinstance(where.model, paddle.CUDAPlace)
    session = Session(
        model.on(where.model) if gpu else model.dense,
        variant.plans(model.config, samples),
        length=len(tokens) + new,
        place=where.cache,
    )
    sampling = Sampling(args.temperature, args.top_k, args.seed)
    choose = Request([0], 1, sampling).sample
    console.line()
    console.line(f"> {prompt}")
    console.line()
    made: list[int] = []
    shown = ""
    start = time.perf_counter()
    for token in greedy(session, tokens, new, stop=model.tokenizer.eos, choose=choose):
        made.append(token)
        text = model.tokenizer.decode(made)
        if not text.endswith("\ufffd"):  # a character of which bytes are still missing
            console.write(text[len(shown) :])
            shown = text
    seconds = time.perf_counter() - start
    console.line()
    return model.tokenizer.decode(made), len(made) / seconds
