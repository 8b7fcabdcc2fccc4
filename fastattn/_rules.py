"""Rules of single arguments for :mod:`fastattn._tracing`: their allowed values, and the errors.

Types and texts of the errors are those of the operators' own checks (custom_ops/api).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from fastattn.functional._cache_types import (
    CACHE_QUANT_TYPES,
    DYNAMIC_TYPES,
    NIBBLE_TYPES,
    codes_per_byte,
)

_INT8_TYPES = ("cache_int8", "block_wise_int8")
FLOATS = ("float32", "float16", "bfloat16")
HALVES = ("bfloat16", "float16")
_CODES = ("uint8", "int8", "float8_e4m3fn", "float8_e5m2")
_OTHERS = ("bool", "int16", "int32", "int64", "float64", "complex64", "complex128")


@dataclass(frozen=True)
class Call:
    """Arguments of an operator's call: tensors and attributes by name."""

    op: str
    inputs: Mapping[str, Any]
    attrs: Mapping[str, Any]

    def fail(self, kind: type[Exception], name: str, text: str) -> NoReturn:
        """Raise as the operator would."""
        raise kind(f"{self.op}: {name}: {text}")

    def dtype(self, name: str) -> str | None:
        """Name of a tensor's dtype; None for an absent tensor, and where Paddle does not tell."""
        dtype = str(getattr(self.inputs[name], "dtype", None)).rpartition(".")[2]
        return dtype if dtype in (*FLOATS, *_CODES, *_OTHERS) else None

    def size(self, name: str, dimension: int) -> int | None:
        """Size of a tensor's dimension, None where the program does not know it."""
        shape = getattr(self.inputs[name], "shape", ())
        if not -len(shape) <= dimension < len(shape) or shape[dimension] < 0:
            return None
        return int(shape[dimension])


#: Checks the named input or attribute and raises what the operator would.
Rule = Callable[[Call, str], None]


@dataclass(frozen=True)
class OpRules:
    """Rules of an operator's inputs and attributes; absent optional inputs are skipped.

    `always` names the optional inputs whose absence may be wrong.
    """

    inputs: Mapping[str, Rule]
    attrs: Mapping[str, Rule] = field(default_factory=dict)
    always: tuple[str, ...] = ()


def anything(call: Call, name: str) -> None:
    """Accept every value of the attribute's type."""


def names(kind: type[Exception], allowed: tuple[str, ...], text: str) -> Rule:
    def check(call: Call, name: str) -> None:
        if call.attrs[name] not in allowed:
            call.fail(kind, name, text.format(call.attrs[name]))

    return check


def at_least(least: int, text: str = "", shown_as: str = "") -> Rule:
    text = text or f"expected at least {least}, got "

    def check(call: Call, name: str) -> None:
        if call.attrs[name] < least:
            call.fail(ValueError, shown_as or name, f"{text}{call.attrs[name]}")

    return check


def finite(least: float = -math.inf) -> Rule:
    text = "expected a finite number" + ("" if math.isinf(least) else f" of at least {least:g}")

    def check(call: Call, name: str) -> None:
        with np.errstate(over="ignore"):
            value = float(np.float32(call.attrs[name]))  # what the operator gets
        if not math.isfinite(value) or value < least:
            call.fail(ValueError, name, f"{text}, got {value:g}")

    return check


def dtypes(*allowed: str) -> Rule:
    def check(call: Call, name: str) -> None:
        got = call.dtype(name)
        if got is not None and got not in allowed:
            call.fail(TypeError, name, f"expected dtype {' or '.join(allowed)}, got {got}")

    return check


def like(other: str) -> Rule:
    def check(call: Call, name: str) -> None:
        expected = call.dtype(other)
        if expected is not None:
            dtypes(expected)(call, name)

    return check


def both(*rules: Rule) -> Rule:
    def check(call: Call, name: str) -> None:
        for rule in rules:
            rule(call, name)

    return check


def supported(call: Call, name: str) -> None:
    got = call.dtype(name)
    if got is not None and got not in (*FLOATS, *_CODES):
        call.fail(TypeError, name, f"dtype {got} is not supported")


def index_codes(call: Call, name: str) -> None:
    """Codes of the indexer's queries or keys: those of FP8 may have their own dtype."""
    got = call.dtype(name)
    if got != "float8_e4m3fn" or call.attrs["quant"] != "fp8":
        dtypes("uint8")(call, name)


def index_scales(call: Call, name: str) -> None:
    dtypes("float32" if call.attrs["quant"] == "fp8" else "int32")(call, name)


def index_q_scales(call: Call, name: str) -> None:
    """Scales of the indexer's queries are given exactly for MXFP4."""
    given = call.inputs[name] is not None
    if given and call.attrs["quant"] == "fp8":
        text = "expected None with fp8: the weights include the scales of q"
        call.fail(ValueError, name, text)
    if not given and call.attrs["quant"] == "mxfp4":
        call.fail(ValueError, name, "expected a tensor with mxfp4, got None")
    if given:
        dtypes("int32")(call, name)


def codes_output(text: str) -> Rule:
    """For an output tensor that takes e4m3 codes."""

    def check(call: Call, name: str) -> None:
        supported(call, name)
        got = call.dtype(name)
        if got not in (None, "uint8", "float8_e4m3fn"):
            call.fail(TypeError, name, f"expected dtype uint8 or float8_e4m3fn{text}, got {got}")

    return check


# ---- caches ----

_cache_types = ", ".join(CACHE_QUANT_TYPES)
cache_type = names(
    NotImplementedError, CACHE_QUANT_TYPES, f"'{{}}' is not supported; supported: {_cache_types}"
)
_layout = names(
    ValueError,
    ("fastattn", "fastdeploy", "logical"),
    "expected fastattn, fastdeploy or logical, got '{}'",
)


def _fastdeploy_order(call: Call, name: str, supported: str) -> None:
    kind = call.attrs["cache_quant_type"]
    if call.attrs[name] == "fastdeploy" and codes_per_byte(kind) == 2:
        text = f"'fastdeploy' has no order for {kind}; supported: {supported}"
        call.fail(NotImplementedError, name, text)


def layout(call: Call, name: str) -> None:
    _layout(call, name)
    _fastdeploy_order(call, name, "fastattn, logical")


def fp8_format(call: Call, name: str) -> None:
    names(ValueError, ("e4m3", "e5m2"), "expected e4m3 or e5m2, got '{}'")(call, name)
    if call.attrs["cache_quant_type"] == "block_wise_fp8" and call.attrs[name] != "e4m3":
        text = f"block_wise_fp8 stores e4m3 only, got '{call.attrs[name]}'"
        call.fail(NotImplementedError, name, text)


def cache_dtype(call: Call, name: str) -> None:
    cache_type = call.attrs["cache_quant_type"]
    if cache_type == "none":
        dtypes(*HALVES)(call, name)
        return
    if codes_per_byte(cache_type) == 2:
        return dtypes("uint8")(call, name)
    supported(call, name)
    e5m2 = call.attrs.get("fp8_format") == "e5m2"
    codes = "int8" if cache_type in _INT8_TYPES else "float8_e5m2" if e5m2 else "float8_e4m3fn"
    got = call.dtype(name)
    if got not in (None, "uint8", codes):
        text = f"expected dtype uint8 or {codes} for {cache_type}, got {got}"
        call.fail(TypeError, name, text)


def value_cache_dtype(call: Call, name: str) -> None:
    cache_dtype(call, name)
    if call.attrs["cache_quant_type"] == "none":
        like("key_cache")(call, name)


def cache_scales(call: Call, name: str) -> None:
    """Scales are given exactly for the types that have them, and have a supported dtype."""
    cache_type = call.attrs["cache_quant_type"]
    given = call.inputs[name] is not None
    if cache_type == "none":
        if given:
            call.fail(ValueError, name, "cache_quant_type 'none' takes no scales")
        return
    without_blocks = cache_type in DYNAMIC_TYPES and call.size("key_cache", 0) in (0, None)
    if not given and not without_blocks:
        text = f"cache_quant_type '{cache_type}' needs scales, got None"
        call.fail(ValueError, name, text)
    allowed = ("uint8",) if cache_type == "block_wise_mxfp4" else ("float32", "bfloat16")
    dtypes(*allowed)(call, name)


def written_values(call: Call, name: str) -> None:
    """V of write_cache_kv, then K: a cache of type none stores its own dtype, or rounded fp32."""
    dtypes(*FLOATS)(call, name)
    like("key")(call, name)
    cache, got = call.dtype("key_cache"), call.dtype("key")
    plain = call.attrs["cache_quant_type"] == "none"
    if plain and None not in (cache, got) and got not in ("float32", cache):
        text = f"expected dtype float32 or the cache's {cache}, got {got}"
        call.fail(TypeError, "key", text)


def qkv(call: Call, name: str) -> None:
    dtypes(*HALVES)(call, name)
    cache, got = call.dtype("key_cache"), call.dtype(name)
    if call.attrs["cache_quant_type"] == "none" and None not in (cache, got) and got != cache:
        call.fail(TypeError, name, f"expected the dtype of key_cache, {cache}, got {got}")


def append_type(call: Call, name: str) -> None:
    cache_type(call, name)
    if call.attrs[name] == "none":
        text = "'none' stores no codes; supported: " + _cache_types.partition(", ")[2]
        call.fail(NotImplementedError, name, text)


def dynamic_quant(call: Call, name: str) -> None:
    cache_type, given = call.attrs["cache_quant_type"], call.attrs[name]
    if given != (cache_type in DYNAMIC_TYPES):
        kind = "static" if given else "dynamic"
        text = f"cache_quant_type '{cache_type}' has {kind} scales, but dynamic_quant is {given}"
        call.fail(ValueError, name, text)


def append_layout(call: Call, name: str) -> None:
    _layout(call, name)
    _fastdeploy_order(call, name, "fastattn")
    if call.attrs[name] == "logical":
        text = "'logical' is not supported; supported: fastattn, fastdeploy"
        call.fail(NotImplementedError, name, text)
    transforms = call.attrs["k_rotation"] != "none" or call.inputs["k_center"] is not None
    if transforms and call.attrs[name] != "fastattn":
        text = f"'{call.attrs[name]}' is not supported with k_rotation or k_center"
        call.fail(NotImplementedError, name, f"{text}; supported: fastattn")


def fastdeploy_type(call: Call, name: str) -> None:
    cache_type(call, name)
    kind, supported = call.attrs[name], "none, cache_int8, cache_fp8, block_wise_fp8"
    if kind in ("block_wise_int8", *NIBBLE_TYPES):
        text = f"FastDeploy has no '{kind}'; supported: {supported}"
        call.fail(NotImplementedError, name, text)


def kv_token_num(call: Call, name: str) -> None:
    at_least(0)(call, name)
    sizes = [call.attrs[name], call.size("key_cache", 1), call.size("key_cache", 3), 2]
    if None not in sizes and math.prod(sizes) >= 2**63:  # type: ignore[arg-type]
        text = f"expected sizes whose product fits 64 bits, got {' * '.join(map(str, sizes))}"
        call.fail(ValueError, name, text)


def convertible(call: Call, name: str) -> None:
    cache_type, got = call.attrs["cache_quant_type"], call.dtype(name)
    supported(call, name)
    allowed: tuple[str, ...] = ("uint8", "float8_e4m3fn", "float8_e5m2")
    text = "uint8, float8_e4m3fn or float8_e5m2"
    if cache_type == "none":
        allowed, text = HALVES, "bfloat16 or float16"
    elif codes_per_byte(cache_type) == 2:
        allowed, text = ("uint8",), "uint8"
    elif cache_type in _INT8_TYPES:
        allowed, text = ("uint8", "int8"), "uint8 or int8"
    if got is not None and got not in allowed:
        call.fail(TypeError, name, f"expected dtype {text} for {cache_type}, got {got}")


def block_range(call: Call, name: str) -> None:
    blocks = call.size("cache", 0)
    begin, end = call.attrs["begin"], call.attrs["end"]
    if blocks is None:
        return
    if end == 2**63 - 1:
        end = blocks
    in_order = 0 <= begin <= end
    if not in_order or end > blocks:
        text = f"expected 0 <= begin <= end <= {blocks} (num_blocks), got begin {begin}, end {end}"
        call.fail(ValueError, "end" if in_order else "begin", text)


# ---- RoPE ----


def num_heads(call: Call, name: str) -> None:
    at_least(1)(call, name)
    kv_heads = call.attrs["num_kv_heads"]
    if kv_heads > 0 and call.attrs[name] % kv_heads:
        text = f"expected a multiple of num_kv_heads = {kv_heads}, got {call.attrs[name]}"
        call.fail(ValueError, name, text)


def num_kv_heads(call: Call, name: str) -> None:
    heads = call.size("key_cache", 1)
    if heads is not None and call.attrs[name] != heads:
        text = f"key_cache holds {heads} KV heads, got {call.attrs[name]}"
        call.fail(ValueError, name, text)


def rotary_dim(call: Call, name: str) -> None:
    row, given = call.size("key_cache", 3), call.attrs[name]
    if row is None or given == -1:
        return
    head_dim = row * codes_per_byte(call.attrs["cache_quant_type"])
    if given <= 0 or given > head_dim or given % 2:
        text = f"expected an even number in [2, {head_dim}] (head_dim), got {given}"
        call.fail(ValueError, name, text)


def q_scale(call: Call, name: str) -> None:
    quant, given = call.attrs["q_quant"], call.inputs[name] is not None
    if quant == "per_tensor" and not given:
        call.fail(ValueError, name, "q_quant 'per_tensor' needs a scale, got None")
    if quant != "per_tensor" and given:
        call.fail(ValueError, name, f"q_quant '{quant}' takes no scale")
    dtypes("float32")(call, name)


# ---- attention ----


def queries(call: Call, name: str) -> None:
    supported(call, name)
    got = call.dtype(name)
    if got in ("int8", "float8_e5m2"):
        text = (
            "expected dtype float32, float16, bfloat16, uint8 (e4m3 codes) or float8_e4m3fn, got "
        )
        call.fail(TypeError, name, text + got)


def paged_queries(call: Call, name: str) -> None:
    queries(call, name)
    cache, got = call.dtype("key_cache"), call.dtype(name)
    if call.attrs["cache_quant_type"] == "none" and None not in (cache, got) and got != cache:
        call.fail(TypeError, name, f"expected dtype {cache} as the cache has, got {got}")


def keys(call: Call, name: str) -> None:
    supported(call, name)
    got, queries, kind = call.dtype(name), call.dtype("q"), call.attrs["kv_dtype"]
    if got in (None, "uint8"):
        return
    named = {"int8": "int8", "e5m2": "float8_e5m2"}.get(kind, "float8_e4m3fn")
    if kind != "auto" and got != named:
        call.fail(TypeError, name, f"expected codes of kv_dtype {kind}, got {got}")
    if got in FLOATS and queries is not None and got != queries:
        expected = queries if queries in FLOATS else "float8_e4m3fn"
        text = f"expected 8-bit codes or dtype {expected} as q has, got {got}"
        call.fail(TypeError, name, text)


def _descale_of(tensor: str, text: str) -> Rule:
    """Descale of a tensor of codes; `text` is the error for a tensor of another dtype."""

    def rule(call: Call, name: str) -> None:
        dtype = call.dtype(tensor)
        if call.inputs[name] is not None and dtype in FLOATS:
            call.fail(ValueError, name, text.format(dtype))
        dtypes("float32", "bfloat16")(call, name)

    return rule


key_descale = _descale_of("k", "expected None for {} keys and values; it belongs to 8-bit codes")
query_descale = _descale_of("q", "expected None for {} queries; it belongs to e4m3 codes")


def out_dtype(call: Call, name: str) -> None:
    given, queries = call.attrs[name], call.dtype("q")
    text = "expected auto, float32, float16 or bfloat16, got '{}'"
    names(ValueError, ("auto", *FLOATS), text)(call, name)
    if call.inputs["out_scale"] is not None and given != "auto":
        text = f"expected auto with out_scale (e4m3 codes), got {given}"
        call.fail(ValueError, name, text)
    if queries in FLOATS and given not in ("auto", queries, "float32"):
        call.fail(TypeError, name, f"expected {queries} as q has, or float32, got {given}")


def attention_out(call: Call, name: str) -> None:
    queries, given = call.dtype("q"), call.attrs["out_dtype"]
    supported(call, name)
    if call.inputs["out_scale"] is not None:
        codes_output(" with out_scale")(call, name)
    elif given != "auto":
        dtypes(given)(call, name)
    elif queries in FLOATS:
        dtypes(str(queries))(call, name)
    elif call.dtype(name) not in ("float16", "float32"):
        dtypes("bfloat16")(call, name)


def quantize_q(call: Call, name: str) -> None:
    queries = call.dtype("q")
    if not call.attrs[name] or queries is None:
        return
    if queries not in HALVES:
        shown = "float8_e4m3fn" if queries == "uint8" else queries
        call.fail(ValueError, name, f"expected bfloat16 or float16 queries, got {shown}")


# ---- the others ----


def merged(call: Call, name: str) -> None:
    if any(call.inputs.get(scale) is not None for scale in ("output_scale", "output_scales")):
        supported(call, name)
        got = call.dtype(name)
        if got not in (None, "uint8", "float8_e4m3fn"):
            text = f"expected dtype uint8 or float8_e4m3fn for FP8, got {got}"
            call.fail(TypeError, name, text)
        return
    supported(call, name)
    states = "prefix_output" if "prefix_output" in call.inputs else "outputs"
    given, dtype = call.dtype(name), call.dtype(states)
    wide = dtype == "float32"
    if None not in (given, dtype) and given != dtype and not (wide and given in HALVES):
        more = ", float16 or bfloat16" if wide else ""
        call.fail(TypeError, name, f"expected dtype {dtype}{more}, got {given}")


def prefill_tokens(call: Call, name: str) -> None:
    tokens, given = call.size("prefix_output", 0), call.attrs[name]
    if given < -1 or (tokens is not None and given > tokens):
        text = f"expected None or 0 to T = {'?' if tokens is None else tokens}, got {given}"
        call.fail(ValueError, name, text)


def group_size(call: Call, name: str) -> None:
    if call.inputs["scale"] is not None or call.attrs["granularity"] != "group":
        return
    group, last = call.attrs[name], call.size("x", -1)
    if group <= 0 or (last is not None and last % group):
        shown = -1 if last is None else last
        text = f"expected a divisor of the last dimension {shown}, got {group}"
        call.fail(ValueError, name, text)


def compress_ratio(call: Call, name: str) -> None:
    if call.attrs[name] not in (4, 128):
        call.fail(NotImplementedError, name, f"expected 4 or 128, got {call.attrs[name]}")


def key_scale_rule(call: Call, name: str) -> None:
    rules = ("pow2", "amax", "amax_div")
    names(ValueError, rules, "expected pow2, amax or amax_div, got '{}'")(call, name)
    if call.attrs[name] != "pow2" and call.attrs["quant"] == "mxfp4":
        call.fail(ValueError, name, f"expected pow2 with mxfp4, got '{call.attrs[name]}'")


def int32_from(least: int) -> Rule:
    def check(call: Call, name: str) -> None:
        if not least <= call.attrs[name] < 2**31:
            text = f"expected {least} to {2**31 - 1}, got {call.attrs[name]}"
            call.fail(ValueError, name, text)

    return check


def tile(call: Call, name: str) -> None:
    if not 1 <= call.attrs[name] <= 64:
        call.fail(ValueError, name, f"expected 1 to 64, got {call.attrs[name]}")


def block_stride(call: Call, name: str) -> None:
    int32_from(call.attrs["block_size"])(call, name)


def with_masks(call: Call, name: str) -> None:
    dtypes("int32")(call, name)
    if call.inputs[name] is not None and not call.attrs["want_masks"]:
        call.fail(ValueError, name, "expected None without want_masks")


def rank(call: Call, name: str) -> None:
    int32_from(0)(call, name)
    ranks = call.attrs["world_size"]
    if call.attrs[name] >= ranks:
        text = f"expected less than world_size = {ranks}, got {call.attrs[name]}"
        call.fail(ValueError, name, text)


def top_k(call: Call, name: str) -> None:
    if not 1 <= call.attrs[name] <= 4096:
        call.fail(ValueError, name, f"expected 1 to 4096, got {call.attrs[name]}")


def query_heads(call: Call, name: str) -> None:
    rows, given = call.size("input", 0), call.attrs[name]
    if given < 0 or (given > 0 and rows is not None and rows % given):
        shown = "?" if rows is None else rows
        call.fail(ValueError, name, f"expected 0 or a divisor of {shown} rows, got {given}")
