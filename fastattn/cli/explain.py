"""``python -m fastattn explain``: which kernels a call takes, why not others, a predicted time.

The kernels come from the functions that the operators ask, compiled into ``fastattn._host``; no GPU
is needed. What another kernel lacks for the call is told by its row in ``custom_ops/plan``; what
would bring it is found by asking again with one thing changed, or two. The time is predicted, not
measured: the larger of bytes over bandwidth and products over rate, both at the peaks of a data
sheet, so that a call takes longer (docs/debugging.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastattn import _plan
from fastattn._formats import value_dim
from fastattn._plan import AttentionCall, Device


class Peaks(NamedTuple):
    """A GPU of an architecture, by its data sheet; rates are dense."""

    gpu: str
    processors: int
    bytes: float  # a second
    half: float  # operations a second of 16-bit products
    fp8: float


PEAKS = {
    "sm_80": Peaks("A100 SXM 80 GB", 108, 2.039e12, 312e12, 312e12),
    "sm_89": Peaks("L40S", 142, 0.864e12, 362e12, 733e12),
    "sm_90": Peaks("H100 SXM", 132, 3.35e12, 989e12, 1979e12),
    "sm_100": Peaks("B200", 148, 8.0e12, 2250e12, 4500e12),
}

#: Tables of the kernels of attention operators, in the order in which `why_not` names them.
_ROLES = ("attention, split tiles", "attention, whole tiles")
_SHAPE = {"seqs": 1, "new": 1, "keys": 1024, "heads": 32, "kv_heads": 8, "head_dim": 128}


class Prediction(NamedTuple):
    """Predicted time of an attention call in microseconds, and what it is made of."""

    us: float
    moved: float  # bytes
    bytes_us: float
    operations: float
    operations_us: float
    limited_by: str


def predict(call: AttentionCall, kernels: list[str], peaks: Peaks, causal: bool) -> Prediction:
    """Least time of an attention call: every byte once, every product at the peak rate.

    All sequences are as long as the longest. Q, the output, the keys' and values' codes and their
    scales of tokens are read or written once. A query and a visible key cost two operations a
    channel of K and of V.
    """
    seqs, new = max(call.batch, 1), min(call.max_seqlen_q, call.num_tokens)
    keys = max(call.max_seqlen_k, new)
    if call.window_left >= 0:
        keys = min(keys, call.window_left + new)
    channels = call.head_dim + value_dim(call.head_dim)
    bits = 16 if call.k_dtype.endswith("16") else _plan.BITS.get(call.k_dtype, 8)
    moved = seqs * keys * call.num_kv_heads * channels * bits / 8
    row = _plan.TYPES.get(call.cache_type)
    if row is not None and row.scheme in ("token", "group"):
        a_token = channels / row.group if row.group else 8  # bytes of K's and V's scales
        moved += seqs * keys * call.num_kv_heads * a_token
    query = 1 if call.q_dtype == "float8_e4m3fn" else 2
    row_bytes = call.head_dim * query + 2 * value_dim(call.head_dim)  # of a head's Q and output
    moved += call.num_tokens * call.num_heads * row_bytes
    pairs = call.num_tokens * (keys - (new - 1) / 2 if causal else keys)
    operations = 2.0 * pairs * call.num_heads * channels
    rate = peaks.fp8 if kernels and kernels[0] == "wgmma_fp8" else peaks.half
    bytes_us, operations_us = moved / peaks.bytes * 1e6, operations / rate * 1e6
    return Prediction(
        max(bytes_us, operations_us),
        moved,
        bytes_us,
        operations,
        operations_us,
        "bytes" if bytes_us >= operations_us else "products",
    )


def _changes(call: AttentionCall, device: Device) -> Iterator[tuple[str, AttentionCall, Device]]:
    """The call with one thing changed, and what that is."""
    if device.major != 9:
        yield "on sm_90", call, Device("sm_90", 9, PEAKS["sm_90"].processors)
    for new in (64, 512, 4096):
        if new > call.max_seqlen_q:
            tokens, keys = new * max(call.batch, 1), max(call.max_seqlen_k, new)
            longer = call._replace(num_tokens=tokens, max_seqlen_q=new, max_seqlen_k=keys)
            yield f"with {new} new tokens a sequence", longer, device
    if call.max_seqlen_q > 1:
        one = call._replace(num_tokens=max(call.batch, 1), max_seqlen_q=1)
        yield "with 1 new token a sequence", one, device
    for q_dtype in ("bfloat16", "float16", "float8_e4m3fn"):
        if q_dtype != call.q_dtype:
            yield f"with {q_dtype} queries", call._replace(q_dtype=q_dtype), device
    if call.cache_type != "ragged":
        for kind in ("none", "cache_fp8", "block_wise_fp8", "block_wise_int8"):
            if kind != call.cache_type:
                stored = call.q_dtype if call.q_dtype.endswith("16") else "bfloat16"
                key = _plan.key_dtype(kind, stored, "e4m3")
                yield f"over a {kind} cache", call._replace(cache_type=kind, k_dtype=key), device
    for dim in (128, 64):
        if dim != call.head_dim:
            yield f"with {dim} channels a head", call._replace(head_dim=dim), device
    if call.window_left >= 0:
        yield "without a window", call._replace(window_left=-1), device
    if call.batch_invariant:
        yield "without batch_invariant", call._replace(batch_invariant=False), device


def _kernels(call: AttentionCall, device: Device) -> list[str]:
    kernels: list[str] = _plan.decision(call, device)["kernels"]
    return kernels


def kernels_of_attention() -> list[str]:
    """Every kernel that an attention call may take, and what runs before or after them."""
    table = _plan.host().all_kernels()
    names = [name for role in _ROLES for of, name, _, _ in table if of == role]
    return [*dict.fromkeys(names), "dequantize_kv", "merge of partial results"]


def why_not(call: AttentionCall, device: Device) -> dict[str, str]:
    """For each kernel that a call does not take, the smallest change with which it would."""
    taken = _kernels(call, device)
    missing = [name for name in kernels_of_attention() if name not in taken]
    single = list(_changes(call, device))
    found: dict[str, str] = {}
    for what, changed, on in single:
        for name in _kernels(changed, on):
            if name in missing:
                found.setdefault(name, f"taken {what}")
    for first, changed, on in single:
        if len(found) == len(missing):
            break
        for second, both, there in _changes(changed, on):
            for name in _kernels(both, there):
                if name in missing:
                    found.setdefault(name, f"taken {first} and {second}")
    rest = "no two of the changes that were tried bring it"
    return {name: found.get(name, rest) for name in missing}


def least_new_tokens(call: AttentionCall, device: Device, kernel: str) -> int | None:
    """New tokens a sequence from which a call takes a kernel, all else alike, or None.

    Found by bisection: a longer sequence never goes back to the kernel of short ones.
    """

    def takes(new: int) -> bool:
        longer = call._replace(
            num_tokens=new * max(call.batch, 1),
            max_seqlen_q=new,
            max_seqlen_k=max(call.max_seqlen_k, new),
        )
        return kernel in _kernels(longer, device)

    low, high = 0, 4096
    if not takes(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if takes(middle) else (middle, high)
    return high


def _shape(words: list[str]) -> dict[str, int]:
    """Sizes of ``--shape``."""
    shape = dict(_SHAPE)
    for word in itertools.chain.from_iterable(w.split(",") for w in words):
        name, equals, value = word.partition("=")
        if not equals or name not in (*_SHAPE, "tokens") or not value.isdigit():
            names = ", ".join((*_SHAPE, "tokens"))
            raise ValueError(f"--shape: expected NAME=NUMBER with a name of {names}, got {word!r}")
        shape[name] = int(value)
    if min(shape.values()) < 1 or shape["heads"] % shape["kv_heads"]:
        raise ValueError("--shape: expected sizes from 1 on, and heads a multiple of kv_heads")
    return shape


def _call_of(arguments: argparse.Namespace) -> AttentionCall:
    shape = _shape(arguments.shape)
    kind = arguments.cache_quant_type if arguments.op == "paged_attention" else "ragged"
    stored = arguments.k_dtype or (arguments.q_dtype if "16" in arguments.q_dtype else "bfloat16")
    names = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
    key = names.get(stored, stored)
    if kind != "ragged":
        key = _plan.key_dtype(kind, stored, arguments.fp8_format)
    return AttentionCall(
        arguments.op,
        names.get(arguments.q_dtype, arguments.q_dtype),
        key,
        kind,
        shape.get("tokens", shape["seqs"] * shape["new"]),
        shape["seqs"],
        shape["heads"],
        shape["kv_heads"],
        shape["head_dim"],
        shape["new"],
        max(shape["keys"], shape["new"]),
        arguments.window,
        arguments.batch_invariant,
    )


def explain(call: AttentionCall, device: Device, causal: bool) -> dict[str, Any]:
    """Everything that the command tells of an attention call."""
    facts = _plan.decision(call, device)
    long = {
        name: least_new_tokens(call, device, name)
        for of, name, _, _ in _plan.host().all_kernels()
        if of == _ROLES[1] and name not in (*facts["kernels"], "mma_sm80")
    }
    peaks = PEAKS.get(device.name)
    prediction = None if peaks is None else predict(call, facts["kernels"], peaks, causal)
    return {
        "call": call._asdict(),
        "device": device._asdict(),
        **facts,
        "why_not": why_not(call, device),
        "least_new_tokens": {name: new for name, new in long.items() if new is not None},
        "predicted": None if prediction is None else prediction._asdict(),
    }


def _launch_line(launch: dict[str, int]) -> str:
    how = f"{launch['shares']} equal shares of the keys" if launch["split"] else "whole tiles"
    if launch["cluster"] > 1:
        clusters = f"a cluster of {launch['cluster']} CTAs for a sequence and KV head"
        how = clusters if not launch["shares"] else f"{clusters}, or {how} (the device decides)"
    return f"{launch['grid']} CTAs, tiles of {launch['tile_rows']} rows, {how}"


def _print(facts: dict[str, Any], peaks: Peaks | None) -> None:
    call, device = facts["call"], facts["device"]
    print(
        f"{call['op']}: {call['batch']} sequences of {call['max_seqlen_q']} new tokens and up to "
        f"{call['max_seqlen_k']} keys, {call['num_heads']} heads over {call['num_kv_heads']} of "
        f"{call['head_dim']} channels, {call['q_dtype']} queries, {call['cache_type']} "
        f"({call['k_dtype']})"
    )
    print(f"device: {device['name']}, {device['processors']} multiprocessors")
    print(f"kernels: {', '.join(facts['kernels'])}")
    for i, launch in enumerate(facts["launches"]):
        print(f"  launch {i + 1}: {_launch_line(launch)}")
    print(f"workspace: {facts['workspace']} bytes", end="")
    room = facts["dequantize"]
    print(f", 16-bit K and V: {room['bytes']} bytes" if room else "")
    for name, change in facts["why_not"].items():
        least = facts["least_new_tokens"].get(name)
        more = "" if least is None else f"; from {least} new tokens a sequence on"
        lacks = facts["reasons"].get(name)
        print(f"not {name}: {f'{lacks}; ' if lacks else ''}{change}{more}")
    found = facts["predicted"]
    if found is None or peaks is None:
        print("predicted: no data sheet of this architecture here")
        return
    print(
        f"predicted (not measured): at least {found['us']:.1f} us, by {found['limited_by']}: "
        f"{found['moved'] / 1e6:.2f} MB at {peaks.bytes / 1e9:.0f} GB/s are "
        f"{found['bytes_us']:.1f} us, {found['operations'] / 1e9:.2f} G operations are "
        f"{found['operations_us']:.1f} us (peaks of {peaks.gpu}; launches not counted)"
    )


def _device(arch: str) -> Device:
    if arch in PEAKS:
        digits = arch.removeprefix("sm_")
        return Device(arch, int(digits[:-1]), PEAKS[arch].processors)
    return _plan.CPU


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation."""
    device = _device(arguments.arch)
    if arguments.sms and device.is_gpu:
        device = device._replace(processors=arguments.sms)
    if arguments.op not in _plan.ATTENTION:
        from fastattn import _ops  # it imports Paddle

        if arguments.op not in _ops.operators():
            print(f"explain: --op: no operator {arguments.op!r}", file=sys.stderr)
            return 1
    if arguments.op not in _plan.ATTENTION or not device.is_gpu:
        facts = _plan.facts_of(arguments.op, {}, {}, device)
        print(json.dumps(facts) if arguments.json else f"{arguments.op}: {facts['kernel']}")
        return 0
    try:
        call = _call_of(arguments)
        facts = explain(call, device, not arguments.not_causal)
    except ValueError as error:
        print(f"explain: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(facts))
    else:
        _print(facts, PEAKS.get(device.name))
    return 0


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "explain", help="which kernel a call takes, and why not another", description=__doc__
    )
    parser.add_argument("--op", default="paged_attention", help="default paged_attention")
    parser.add_argument(
        "--shape",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help="seqs, new (tokens a sequence), keys, heads, kv_heads, head_dim, tokens; defaults "
        + ", ".join(f"{name}={value}" for name, value in _SHAPE.items()),
    )
    parser.add_argument("--cache-quant-type", default="block_wise_fp8", metavar="TYPE")
    parser.add_argument("--fp8-format", choices=("e4m3", "e5m2"), default="e4m3")
    parser.add_argument("--q-dtype", choices=("bfloat16", "float16", "e4m3"), default="bfloat16")
    parser.add_argument(
        "--k-dtype",
        choices=("bfloat16", "float16", "e4m3", "e5m2", "int8"),
        help="of a cache of type none, or of flash_attention; default the queries' dtype",
    )
    parser.add_argument("--window", type=int, default=-1, help="window_size[0], default none")
    parser.add_argument("--not-causal", action="store_true", help="for the predicted time")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--arch", choices=("cpu", *PEAKS), default="sm_90", help="default sm_90")
    parser.add_argument("--sms", type=int, default=0, help="multiprocessors of the GPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
