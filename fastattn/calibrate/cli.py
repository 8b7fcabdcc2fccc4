"""``python -m fastattn calibrate``: scales, centres and types of a model's layers from samples."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.calibrate.calibration import Calibration, LayerCalibration
from fastattn.calibrate.choose import (
    GRANULARITIES,
    TRANSFORMS,
    calibrate_layer,
    outlier_channels,
)
from fastattn.calibrate.errors import CalibrationError
from fastattn.calibrate.samples import LayerSamples, read_samples
from fastattn.calibrate.tensor_files import check_suffix
from fastattn.cli.arguments import int_from
from fastattn.cli.outputs import problem_of_file
from fastattn.functional._cache_types import CACHE_QUANT_TYPES, DYNAMIC_TYPES, STATIC_TYPES

#: What is tried without --types: two kinds, whose layers may not be mixed with each other's.
_FAMILIES = (STATIC_TYPES, ("block_wise_int8", "block_wise_fp8"))

_EPILOG = """\
Samples hold, for each layer N, layers.N.key and layers.N.value [tokens, KV heads, channels] of one
sequence, as they are written to a cache (K rotated by its position), and layers.N.query [queries,
heads, channels] of its last tokens: an .npz or .safetensors file or, with --allow-pickle, what
paddle.save wrote of a dict with these names. Such a dump is a pickle, which can run any code when
it is read. Several files are several texts. Layers with static scales (cache_int8, cache_fp8, none)
and with dynamic ones (block_wise_*) have lists of caches of different lengths: name types of one
kind only. Without --types both kinds of 8 bits are tried, and the one that loses less is taken;
with --bound the first one that keeps it, static scales first.

With --model the samples are those of a real model, read over texts that this Python carries or over
--text. --max-loss then takes the fewest bytes whose loss of perplexity is within a bound, layer by
layer, and --max-bits the least loss that a size allows. In any case the perplexity of other text is
measured with what was chosen.

Examples:
  python -m fastattn calibrate --model smollm2 --output scales.safetensors
  python -m fastattn calibrate --model smollm2 --max-loss 1 --output mixed.safetensors
  python -m fastattn calibrate --model smollm2 --max-bits 6 --picture heads.png
  python -m fastattn calibrate samples.npz --bound 0.02 --output scales.safetensors
  python -m fastattn calibrate samples.npz --types block_wise_int8 --output scales.npz
  python -m fastattn calibrate samples.npz --types cache_fp8 --output kv_cache_scale.json
  python -m fastattn calibrate --scales kv_cache_scale.json --types cache_fp8 --output scales.npz
"""


def _list_of(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        if not names:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}")
        return names

    return parse


def _bound(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text}")
    return value


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "calibrate",
        help="scales, centres and cache types from samples of Q, K and V",
        description="Find static scales, centres and, layer by layer, the first cache type whose "
        "attention outputs stay within a bound of the exact ones.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "samples", nargs="*", type=Path, help="samples of the layers, .npz or .safetensors"
    )
    _add_model_options(parser)
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read files of paddle.save; these are pickles, which can run any code",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write .safetensors, .npz or FastDeploy's .json"
    )
    parser.add_argument(
        "--bound",
        type=_bound,
        help="take the first type whose attention outputs have this relative error at most; "
        "default: the type with the least error",
    )
    parser.add_argument(
        "--types",
        type=_list_of(CACHE_QUANT_TYPES),
        metavar="TYPE,..",
        help="cache types, the preferred one first; default all of 8 bits",
    )
    parser.add_argument(
        "--transforms",
        type=_list_of(TRANSFORMS),
        metavar="NAME,..",
        help=f"transforms of K to try; default {','.join(TRANSFORMS)}",
    )
    parser.add_argument(
        "--granularity",
        choices=GRANULARITIES,
        help="granularity of static scales; default head, or channel for FastDeploy's int8",
    )
    parser.add_argument(
        "--scales", type=Path, metavar="FILE", help="FastDeploy's kv_cache_scale.json to start from"
    )
    parser.add_argument(
        "--fastdeploy-prefix",
        default="ernie.layers",
        metavar="NAME",
        help="prefix of a layer's number in FastDeploy's names; default ernie.layers",
    )
    parser.add_argument(
        "--queries", type=int_from(1), default=64, metavar="N", help="queries a layer; default 64"
    )
    parser.add_argument("--seed", type=int_from(0), default=0, help="which queries; default 0")
    parser.set_defaults(run=run)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="in place of samples: smollm2, gemma3-270m, a .gguf file, or a folder with "
        "config.json and safetensors",
    )
    parser.add_argument(
        "--rotate-values",
        action="store_true",
        help="with --model: fold a Hadamard rotation of V into its weights first",
    )
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="with --model: read this text; may be given again",
    )
    parser.add_argument(
        "--tokens",
        type=int_from(64),
        default=512,
        metavar="N",
        help="with --model: of each text; default 512",
    )
    parser.add_argument(
        "--max-loss",
        type=_bound,
        metavar="PERCENT",
        help="with --model: the fewest bytes whose loss of perplexity is at most this",
    )
    parser.add_argument(
        "--max-bits",
        type=_bound,
        metavar="BITS",
        help="with --model: the least loss of perplexity with at most as many bits a value, scales "
        "included, the mean over the layers",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="with --max-loss or --max-bits: draw what each KV head costs in the smallest type; "
        "needs matplotlib and a pass of the model for each head",
    )
    parser.add_argument(
        "--check-tokens",
        type=int_from(0),
        default=2048,
        metavar="N",
        help="with --model: measure the loss of perplexity over as many; default 2048, 0 not",
    )


def _check_output(path: Path) -> None:
    """Check before the work starts that its result can be written.

    Raises
    ------
    CalibrationError
    """
    check_suffix(path)
    _check_writable(path)


def _check_writable(path: Path) -> None:
    problem = problem_of_file(path)
    if problem is not None:
        raise CalibrationError(f"{path}: cannot be written: {problem}")


def _settle(arguments: argparse.Namespace) -> None:
    """Set defaults that depend on other options.

    Raises
    ------
    CalibrationError
        If the options contradict each other.
    """
    fastdeploy = arguments.output is not None and arguments.output.suffix == ".json"
    given = arguments.scales is not None
    if arguments.output is not None:
        _check_output(arguments.output)
    if not (arguments.samples or arguments.model or given):
        raise CalibrationError("expected a file of samples, --model, or --scales")
    if arguments.samples and arguments.model:
        raise CalibrationError("--model: name a model or files of samples, not both")
    budgets = [n for n in ("max_loss", "max_bits") if getattr(arguments, n) is not None]
    for name in budgets:
        if not arguments.model or arguments.bound is not None or len(budgets) > 1:
            option = name.replace("_", "-")
            other = "--max-bits" if name == "max_loss" else "--max-loss"
            raise CalibrationError(f"--{option}: it is for --model, without --bound or {other}")
    if arguments.picture is not None:
        if not budgets:
            raise CalibrationError("--picture: it is for --max-loss or --max-bits")
        if importlib.util.find_spec("matplotlib") is None:
            raise CalibrationError("--picture: pip install matplotlib")
        _check_writable(arguments.picture)
    if given and arguments.scales.suffix != ".json":
        raise CalibrationError(
            f"--scales: expected FastDeploy's kv_cache_scale.json, got {arguments.scales}"
        )
    if given and arguments.granularity is not None:
        raise CalibrationError("--granularity: scales from --scales have their own")
    if arguments.types is None and (fastdeploy or given):
        arguments.types = ["cache_fp8"]
    types = arguments.types or []
    if (fastdeploy or given) and (len(types) != 1 or types[0] not in STATIC_TYPES):
        raise CalibrationError(
            f"--types: FastDeploy's file is for one of {' or '.join(STATIC_TYPES)}, got "
            f"{','.join(types)}"
        )
    if {kind in DYNAMIC_TYPES for kind in types} == {True, False}:
        raise CalibrationError(
            "--types: layers with dynamic scales have four cache tensors, others two; got "
            + ",".join(types)
        )
    if arguments.transforms is None:
        arguments.transforms = ["none"] if fastdeploy or given else list(TRANSFORMS)
    elif (fastdeploy or given) and arguments.transforms != ["none"]:
        raise CalibrationError("--transforms: FastDeploy's file has no place for them")
    if arguments.granularity is None:
        channels = fastdeploy and types == ["cache_int8"]
        arguments.granularity = "channel" if channels else "head"


Samples = dict[int, list[LayerSamples]]


def _read(arguments: argparse.Namespace) -> Samples:
    """Samples of all files, by layer."""
    found: Samples = {}
    for path in arguments.samples:
        samples = read_samples(path, allow_pickle=arguments.allow_pickle)
        if found and set(found) != set(samples):
            raise CalibrationError(
                f"{path}: has layers {sorted(samples)}, the first file {sorted(found)}"
            )
        for number, layer in samples.items():
            found.setdefault(number, []).append(layer)
            first = found[number][0]
            if first.key.shape[1:] != layer.key.shape[1:]:
                raise CalibrationError(
                    f"{path}: layer {number} has heads of other sizes than the first file's"
                )
    return found


def _of_types(
    arguments: argparse.Namespace, samples: Samples, types: Sequence[str], start: Calibration | None
) -> Calibration:
    """All layers, with types of one kind."""
    layers: dict[int, LayerCalibration] = {}
    for number, layer in samples.items():
        scales = None
        if start is not None:
            found = start.layers[number]
            assert found.cache_k_out_scale is not None and found.cache_v_out_scale is not None
            scales = found.cache_k_out_scale, found.cache_v_out_scale
        try:
            layers[number] = calibrate_layer(
                layer,
                types,
                bound=arguments.bound,
                transforms=arguments.transforms,
                granularity=arguments.granularity,
                queries=arguments.queries,
                seed=arguments.seed,
                scales=scales,
            )
        except CalibrationError as error:
            raise CalibrationError(f"layer {number}: {error}") from None
    return Calibration(layers)


def _loses(calibration: Calibration, bound: float | None) -> float:
    """What a kind of types is judged by: layers beyond the bound, or the sum of squared errors."""
    errors = [layer.error or 0.0 for layer in calibration.layers.values()]
    if bound is None:
        return sum(error**2 for error in errors)
    return sum(error > bound for error in errors)


def calibrate(arguments: argparse.Namespace) -> tuple[Calibration, Samples]:
    """Read, choose; the result and the samples."""
    _settle(arguments)
    start = None
    if arguments.scales is not None:
        start = Calibration.read(arguments.scales, cache_quant_type=arguments.types[0])
    if not arguments.samples:
        assert start is not None
        return start, {}
    samples = _read(arguments)
    if start is not None and set(start.layers) != set(samples):
        raise CalibrationError(
            f"{arguments.scales}: has layers {sorted(start.layers)}, the samples {sorted(samples)}"
        )
    return _choose(arguments, samples, start), samples


def _choose(
    arguments: argparse.Namespace, samples: Samples, start: Calibration | None = None
) -> Calibration:
    if arguments.types is not None:
        return _of_types(arguments, samples, arguments.types, start)
    found = [_of_types(arguments, samples, types, start) for types in _FAMILIES]
    return min(found, key=lambda calibration: _loses(calibration, arguments.bound))


def calibrate_model(
    arguments: argparse.Namespace, console: Any
) -> tuple[Calibration, Samples, dict[int, float]]:
    """The same for a model's own samples; measures what was chosen on other text.

    The third is each layer's expected divergence, of ``--max-loss`` and ``--max-bits``.
    """
    from fastattn.calibrate import with_model

    _settle(arguments)
    model, samples = with_model.open_model(arguments, console)
    costs: dict[int, float] = {}
    if arguments.max_loss is None and arguments.max_bits is None:
        calibration = _choose(arguments, samples)
    else:
        calibration, costs = with_model.choose(arguments, console, model, samples)
    calibration.rotated_values = model.rotated_values
    if arguments.check_tokens:
        with_model.check(arguments, console, model, calibration)
    return calibration, samples, costs


def _rows(
    calibration: Calibration, samples: Samples, bound: float | None, costs: dict[int, float]
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for number, layer in calibration.layers.items():
        error = "-" if layer.error is None else f"{layer.error:.1e}"
        if layer.error is not None and bound is not None and layer.error > bound:
            error += " > bound"
        first = next(iter(layer.errors.values()), None)
        keys = [x.key for x in samples.get(number, [])]
        far = outlier_channels(np.concatenate(keys)) if keys else []
        tried = "-" if first is None else f"{first:.1e}"
        count = str(len(far)) if samples else "-"
        cost = [f"{costs[number]:.1e}"] if costs else []
        rows.append((str(number), layer.name, error, tried, count, *cost))
    return rows


#: "error" is the error of the chosen type, "first" the error of the first type without transforms,
#: "outliers" the channels of K that are far larger than most.
_COLUMNS = ("layer", "type", "error", "first", "outliers")

#: With ``--max-loss`` or ``--max-bits``: the divergence that the layer is expected to cost, in
#: nats a token.
_COST = "KL"


def _show(rows: list[tuple[str, ...]], costs: bool) -> None:
    columns = (*_COLUMNS, _COST) if costs else _COLUMNS
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("  ".join(columns))
        for row in rows:
            print("  ".join(row))
        return
    table = Table(*columns)
    table.columns[1].no_wrap = True  # the type and its transforms, never cut
    table.columns[1].overflow = "ignore"
    table.columns[1].min_width = max(len(row[1]) for row in rows) if rows else None
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand; return 1 if a file is wrong, or a layer has no type within the bound."""
    costs: dict[int, float] = {}
    try:
        if arguments.model is None:
            calibration, samples = calibrate(arguments)
        else:
            from fastattn.demo.report import Console

            calibration, samples, costs = calibrate_model(arguments, Console(sys.stdout))
        _show(_rows(calibration, samples, arguments.bound, costs), bool(costs))
        if arguments.output is not None:
            calibration.write(arguments.output, fastdeploy_prefix=arguments.fastdeploy_prefix)
            print(f"wrote {arguments.output}")
            if arguments.rotate_values:
                print(
                    "it is for the model with rotated values: models.load(..).with_rotated_values()"
                )
    except (CalibrationError, OSError) as error:
        print(f"fastattn calibrate: {error}", file=sys.stderr)
        return 1
    far = [
        number
        for number, layer in calibration.layers.items()
        if layer.error is not None and arguments.bound is not None and layer.error > arguments.bound
    ]
    if far:
        numbers = ", ".join(map(str, far))
        print(
            f"fastattn calibrate: no type keeps the bound {arguments.bound:g} in layers {numbers}; "
            "the one with the least error was taken",
            file=sys.stderr,
        )
        return 1
    return 0
