"""``python -m fastattn calibrate``: scales, centres and types of a model's layers from samples."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

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
from fastattn.cli.outputs import problem_of_file
from fastattn.functional._cache_types import CACHE_QUANT_TYPES, DYNAMIC_TYPES, STATIC_TYPES

_EPILOG = """\
Samples hold, for each layer N, layers.N.key and layers.N.value [tokens, KV heads, channels] of one
sequence, as they are written to a cache (K rotated by its position), and layers.N.query [queries,
heads, channels] of its last tokens: an .npz or .safetensors file or, with --allow-pickle, what
paddle.save wrote of a dict with these names. Such a dump is a pickle, which can run any code when
it is read. Layers with static scales (cache_int8, cache_fp8, none) and with dynamic ones
(block_wise_*) have lists of caches of different lengths: name types of one kind only.

Examples:
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


def _int_from(least: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an int from {least} on, got {text!r:.40}")
        return value

    return parse


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
        "samples", nargs="?", type=Path, help="samples of the layers, .npz or .safetensors"
    )
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
        default=0.02,
        help="upper bound of the relative error of attention outputs; default 0.02",
    )
    parser.add_argument(
        "--types",
        type=_list_of(CACHE_QUANT_TYPES),
        metavar="TYPE,..",
        help="cache types, the preferred one first; default cache_int8,cache_fp8,none",
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
        "--queries", type=_int_from(1), default=64, metavar="N", help="queries a layer; default 64"
    )
    parser.add_argument("--seed", type=_int_from(0), default=0, help="which queries; default 0")
    parser.set_defaults(run=run)


def _check_output(path: Path) -> None:
    """Check before the work starts that its result can be written.

    Raises
    ------
    CalibrationError
    """
    check_suffix(path)
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
    if arguments.samples is None and not given:
        raise CalibrationError("expected a file of samples, or --scales")
    if given and arguments.scales.suffix != ".json":
        raise CalibrationError(
            f"--scales: expected FastDeploy's kv_cache_scale.json, got {arguments.scales}"
        )
    if given and arguments.granularity is not None:
        raise CalibrationError("--granularity: scales from --scales have their own")
    if arguments.types is None:
        arguments.types = ["cache_fp8"] if fastdeploy or given else [*STATIC_TYPES, "none"]
    types = arguments.types
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


def calibrate(arguments: argparse.Namespace) -> tuple[Calibration, dict[int, LayerSamples]]:
    """Read the samples and choose settings; returns the result and the samples."""
    _settle(arguments)
    kind = arguments.types[0]
    start = None
    if arguments.scales is not None:
        start = Calibration.read(arguments.scales, cache_quant_type=kind)
    if arguments.samples is None:
        assert start is not None
        return start, {}
    samples = read_samples(arguments.samples, allow_pickle=arguments.allow_pickle)
    if start is not None and set(start.layers) != set(samples):
        raise CalibrationError(
            f"{arguments.scales}: has layers {sorted(start.layers)}, the samples {sorted(samples)}"
        )
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
                arguments.types,
                bound=arguments.bound,
                transforms=arguments.transforms,
                granularity=arguments.granularity,
                queries=arguments.queries,
                seed=arguments.seed,
                scales=scales,
            )
        except CalibrationError as error:
            raise CalibrationError(f"layer {number}: {error}") from None
    return Calibration(layers), samples


def _rows(
    calibration: Calibration, samples: dict[int, LayerSamples], bound: float
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for number, layer in calibration.layers.items():
        error = "-" if layer.error is None else f"{layer.error:.1e}"
        if layer.error is not None and layer.error > bound:
            error += " > bound"
        first = next(iter(layer.errors.values()), None)
        far = outlier_channels(samples[number].key) if number in samples else []
        tried = "-" if first is None else f"{first:.1e}"
        rows.append((str(number), layer.name, error, tried, str(len(far)) if samples else "-"))
    return rows


#: "error" is the error of the chosen type, "first" the error of the first type without transforms,
#: "outliers" the channels of K that are far larger than most.
_COLUMNS = ("layer", "type", "error", "first", "outliers")


def _show(rows: list[tuple[str, ...]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("  ".join(_COLUMNS))
        for row in rows:
            print("  ".join(row))
        return
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand; return 1 if a file is wrong, or a layer has no type within the bound."""
    try:
        calibration, samples = calibrate(arguments)
        _show(_rows(calibration, samples, arguments.bound))
        if arguments.output is not None:
            calibration.write(arguments.output, fastdeploy_prefix=arguments.fastdeploy_prefix)
            print(f"wrote {arguments.output}")
    except (CalibrationError, OSError) as error:
        print(f"fastattn calibrate: {error}", file=sys.stderr)
        return 1
    far = [
        number
        for number, layer in calibration.layers.items()
        if layer.error is not None and layer.error > arguments.bound
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
