"""Rules of `k_rotation`, `q_rotation` and `k_center`."""

from __future__ import annotations

from fastattn import _rules
from fastattn._rules import Call
from fastattn.functional._cache_types import CACHE_QUANT_TYPES

_ROTATIONS = _rules.names(ValueError, ("none", "hadamard"), "expected none or hadamard, got '{}'")


def _takes_key_transforms(call: Call, name: str) -> None:
    kind = call.attrs["cache_quant_type"]
    if kind == "none":
        supported = ", ".join(CACHE_QUANT_TYPES[1:])
        text = f"cache_quant_type '{kind}' is not supported; supported: {supported}"
        call.fail(NotImplementedError, name, text)
    if kind == "cache_fp8" and call.attrs["fp8_format"] == "e5m2":
        text = "fp8_format 'e5m2' is not supported; supported: e4m3"
        call.fail(NotImplementedError, name, text)


def k_rotation(call: Call, name: str) -> None:
    """The rotation of K, of types that take one."""
    _ROTATIONS(call, name)
    if call.attrs[name] != "none":
        _takes_key_transforms(call, name)


def q_rotation(call: Call, name: str) -> None:
    """The rotation of the queries that a writer returns: that of K."""
    _ROTATIONS(call, name)
    q, k = call.attrs[name], call.attrs["k_rotation"]
    if q not in ("none", k):
        call.fail(ValueError, name, f"expected none or that of K, got '{q}' with k_rotation '{k}'")


def k_center(call: Call, name: str) -> None:
    """The constant that K is stored without, of types that take one."""
    _takes_key_transforms(call, name)
    _rules.dtypes("float32")(call, name)


_ROTATE_FIRST = (
    "e4m3 queries are not supported: quantise queries that are rotated (q_rotation of "
    "rope_write_cache_kv), and leave it out here"
)


def rotated_queries(call: Call, name: str) -> None:
    """Queries that the attention is to rotate."""
    if call.attrs[name] != "none" and call.dtype("q") in ("uint8", "float8_e4m3fn"):
        call.fail(NotImplementedError, name, _ROTATE_FIRST)


def centred_scores(call: Call, name: str) -> None:
    """Scores that lack a constant."""
    if call.attrs["softcap"] > 0:
        text = "softcap is not supported with it: a score that lacks a constant has another tanh"
        call.fail(NotImplementedError, name, text)
    counts = call.attrs["return_softmax_lse"] or call.inputs["sinks"] is not None
    if counts and call.dtype("q") in ("uint8", "float8_e4m3fn"):
        text = "e4m3 queries are not supported with it where an LSE is returned or a sink counts"
        call.fail(NotImplementedError, name, text)
    if call.inputs["sinks"] is not None and call.inputs["out"] is not None:
        text = "a given output is not supported with k_center and sinks"
        call.fail(NotImplementedError, "out", text)
