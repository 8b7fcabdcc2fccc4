"""``python -m fastattn calibrate --model``: samples of a real model, types by its loss, a check."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from typing import Any

from fastattn.calibrate.calibration import Calibration
from fastattn.calibrate.choose import TRANSFORMS
from fastattn.calibrate.errors import CalibrationError
from fastattn.functional._cache_types import value_dim

#: Types that ``--max-loss`` and ``--max-bits`` choose from: those that may be mixed, the smallest
#: to the best.
MIXED_TYPES = ("block_wise_int4", "block_wise_int8")

#: Tokens of each text that layers are probed over.
PROBE_TOKENS = 384

#: How often ``--max-loss`` chooses, each time with a smaller sum, until all layers together fit.
_MOST_CHOICES = 4


def open_model(arguments: argparse.Namespace, console: Any) -> tuple[Any, Any]:
    """The model, and samples of its layers by text.

    Raises
    ------
    CalibrationError
        If there is no such model, or a text is too short.
    """
    from fastattn import models
    from fastattn.evaluate import texts
    from fastattn.evaluate.cli import collect_samples

    try:
        with console.progress(f"loading {arguments.model}", 1) as update:
            model = models.load(arguments.model)
            if arguments.rotate_values:
                model = model.with_rotated_values()
            update(1, "")
        given = texts.from_files(arguments.text)
        return model, collect_samples(console, model, given, arguments.tokens)
    except (ValueError, OSError) as error:
        raise CalibrationError(str(error)) from None


def choose(
    arguments: argparse.Namespace, console: Any, model: Any, samples: Any
) -> tuple[Calibration, dict[int, float]]:
    """Types by ``--max-loss`` or ``--max-bits``, and each layer's expected divergence in nats."""
    from fastattn.calibrate.loss import best_of_types, bytes_of, layer_divergences
    from fastattn.evaluate import texts

    types = arguments.types or list(MIXED_TYPES)
    transforms = arguments.transforms or list(TRANSFORMS)
    granularity = arguments.granularity or "head"
    options = {}
    with console.progress("errors of candidates", len(samples)) as update:
        for done, (number, layer) in enumerate(samples.items()):
            options[number] = best_of_types(
                layer, types, transforms, granularity, arguments.queries, arguments.seed
            )
            update(done + 1, f"layer {number}")
    smallest = min(types, key=lambda kind: bytes_of(kind, model.config.head_dim))
    probes = {number: by_type[smallest] for number, by_type in options.items()}
    own = texts.from_files(arguments.text) or texts.calibration()
    windows = texts.windows(own, model.tokenizer, min(PROBE_TOKENS, arguments.tokens), 2)
    tokens = [window.tokens for window in windows]
    with _passes(console, f"layers with {smallest} alone", tokens, len(probes)) as progress:
        found = layer_divergences(model, tokens, probes, progress)
    if arguments.picture is not None:
        _draw(arguments, console, model, tokens, probes)
    probed = {number: (probes[number], found[number]) for number in probes}
    choice = _within(arguments, console, model, tokens, options, probed)
    return choice.calibration, choice.divergence


@contextlib.contextmanager
def _passes(console: Any, title: str, tokens: Any, passes: int) -> Iterator[Any]:
    """Progress over passes of the model, each over all texts."""
    with console.progress(title, passes * sum(map(len, tokens))) as update:
        done = 0

        def progress(count: float, note: str) -> None:
            nonlocal done
            done += int(count)
            update(done, note)

        yield progress


def _draw(
    arguments: argparse.Namespace, console: Any, model: Any, tokens: Any, probes: Any
) -> None:
    from fastattn.calibrate.loss import head_divergences
    from fastattn.calibrate.plot import draw

    kind = next(iter(probes.values())).cache_quant_type
    count = len(probes) * model.config.kv_heads
    with _passes(console, f"KV heads with {kind} alone", tokens, count) as progress:
        found = head_divergences(model, tokens, probes, progress)
    draw(arguments.picture, f"{arguments.model}: one KV head as {kind}", list(probes), found)
    console.line(f"wrote {arguments.picture}")


def _within(
    arguments: argparse.Namespace,
    console: Any,
    model: Any,
    tokens: Any,
    options: Any,
    probed: Any,
) -> Any:
    """The choice within the bound.

    The sum of the layers' divergences is an estimate. What all of them cost together is measured,
    as a divergence and as a rise of the texts' loss, and the choice is made again with a smaller
    sum where the larger of both is beyond the bound.
    """
    from fastattn.calibrate.loss import choose_types, joint_loss

    head_dim = model.config.head_dim
    if arguments.max_bits is not None:
        most = arguments.max_bits * (head_dim + value_dim(head_dim)) / 8
        choice = choose_types(options, probed, head_dim, most_bytes=most)
        _say(console, choice.total, *joint_loss(model, tokens, choice.calibration))
        return choice
    bound = budget = math.log1p(arguments.max_loss / 100)
    for _ in range(_MOST_CHOICES):
        choice = choose_types(options, probed, head_dim, most_loss=budget)
        divergence, rise = joint_loss(model, tokens, choice.calibration)
        _say(console, choice.total, divergence, rise)
        together = max(divergence, rise)
        if together <= bound or choice.total <= 0:
            break
        budget = min(budget, choice.total) * bound / together
    console.line(f"wanted at most {arguments.max_loss:g} %")
    return choice


def _say(console: Any, expected: float, divergence: float, rise: float) -> None:
    percents = [100 * math.expm1(x) for x in (expected, divergence, rise)]
    console.line(
        "expected loss of perplexity {:.2f} % by the KL of each layer, {:.2f} % by the KL of all "
        "together; in these texts it was {:.2f} %".format(*percents)
    )


def check(arguments: argparse.Namespace, console: Any, model: Any, calibration: Any) -> Any:
    """Perplexity of other text with what was chosen, against a 16-bit cache; shown as a table."""
    from fastattn.evaluate import texts
    from fastattn.evaluate.measure import Measurement, Row
    from fastattn.evaluate.report import Line
    from fastattn.evaluate.variants import Variant, plans_of

    length = min(512, model.config.context)
    count = -(-arguments.check_tokens // length)
    windows = [w.tokens for w in texts.windows(texts.evaluation(), model.tokenizer, length, count)]
    rows = [
        Row("none", Variant("none").plans(model.config, {})),
        Row("as chosen", plans_of(calibration, model.config)),
    ]
    total = 2 * len(rows) * sum(map(len, windows))
    with console.progress("perplexity of other text", total) as update:
        done = 0.0

        def progress(work: float, note: str) -> None:
            nonlocal done
            done += work
            update(int(done), note)

        Measurement(model, rows, progress=progress).perplexities(windows)
    console.table([Line(row, rows[0]) for row in rows])
    return rows[1].summary(rows[0])
