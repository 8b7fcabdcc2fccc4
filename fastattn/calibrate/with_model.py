"""``python -m fastattn calibrate --model``: samples of a real model, types by its loss, a check."""

from __future__ import annotations

import argparse
import math
from typing import Any

from fastattn.calibrate.calibration import Calibration
from fastattn.calibrate.choose import TRANSFORMS
from fastattn.calibrate.errors import CalibrationError

#: Types that ``--max-loss`` chooses from: those that may be mixed, the smallest to the best.
MIXED_TYPES = ("block_wise_int4", "block_wise_int8")

#: Tokens of each text that layers are probed over.
PROBE_TOKENS = 384


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
    """Types by ``--max-loss``, and each layer's expected divergence in nats a token."""
    from fastattn.calibrate.loss import (
        best_of_types,
        bytes_of,
        choose_by_loss,
        layer_divergences,
    )
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
    total = len(probes) * sum(map(len, tokens))
    with console.progress(f"layers with {smallest} alone", total) as update:
        done = 0

        def progress(count: float, note: str) -> None:
            nonlocal done
            done += int(count)
            update(done, note)

        found = layer_divergences(model, tokens, probes, progress)
    probed = {number: (probes[number], found[number]) for number in probes}
    budget = math.log1p(arguments.max_loss / 100)
    choice = choose_by_loss(options, probed, model.config.head_dim, budget)
    percent = 100 * math.expm1(choice.total)
    console.line(
        f"expected loss of perplexity {percent:.2f} %, wanted at most {arguments.max_loss:g} %"
    )
    return choice.calibration, choice.divergence


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
