"""Rules for arguments of latent attention and of what stands around it, as in `_rules`."""

from __future__ import annotations

from fastattn._rules import Call, dtypes, names, supported

latent_format = names(
    NotImplementedError,
    ("bf16", "fp8", "fp8_656", "fp8_584", "fp8_528"),
    "'{}' is not supported; supported: bf16, fp8, fp8_656, fp8_584, fp8_528",
)


def written_latent_format(call: Call, name: str) -> None:
    if call.attrs[name] == "fp8_528":
        text = "'fp8_528' is only read; supported: bf16, fp8, fp8_656, fp8_584"
        call.fail(NotImplementedError, name, text)
    latent_format(call, name)


def latent_scale_rule(call: Call, name: str) -> None:
    names(ValueError, ("pow2", "amax"), "expected pow2 or amax, got '{}'")(call, name)
    cache_format = call.attrs["cache_format"]
    if call.attrs[name] == "amax" and cache_format != "fp8_656":
        call.fail(ValueError, name, f"amax is for fp8_656, got cache_format '{cache_format}'")


def _format_of(call: Call, name: str) -> str:
    """Format of the cache that an argument belongs to."""
    attr = "extra_cache_format" if name.startswith("extra_") else "cache_format"
    return str(call.attrs[attr])


def latent_cache(call: Call, name: str) -> None:
    if _format_of(call, name) == "bf16":
        dtypes("bfloat16")(call, name)
    elif call.dtype(name) != "float8_e4m3fn":
        supported(call, name)
        dtypes("uint8")(call, name)


def latent_scale(call: Call, name: str) -> None:
    cache_format = _format_of(call, name)
    if call.inputs[name] is None:
        if cache_format == "fp8":
            call.fail(TypeError, name, "expected a tensor for fp8, got None")
    elif cache_format != "fp8":
        call.fail(ValueError, name, f"expected None for {cache_format}, got a tensor")
    else:
        dtypes("float32")(call, name)


def latent_query(call: Call, name: str) -> None:
    """The query's channels are those of both caches' formats."""
    dtypes("bfloat16")(call, name)
    dim, heads = call.size(name, -1), call.size(name, -2)
    if len(getattr(call.inputs[name], "shape", ())) != 3:
        return  # the operator raises for that
    shape = "[" + ", ".join("?" if n < 0 else str(n) for n in call.inputs[name].shape) + "]"
    if dim not in (None, 576, 512):
        call.fail(ValueError, name, f"expected 576 or 512 channels, got shape {shape}")
    if heads is not None and not 1 <= heads <= 128:
        call.fail(NotImplementedError, name, f"expected 1 to 128 heads, got shape {shape}")
    for cache in ("cache", "extra_cache"):
        cache_format = call.attrs[f"{cache}_format"]
        wanted = {"bf16": dim, "fp8_584": 512, "fp8_528": 512}.get(cache_format, 576)
        if call.inputs[cache] is not None and dim is not None and dim != wanted:
            text = f"expected {wanted} channels, those of {cache}_format {cache_format}, got {dim}"
            call.fail(ValueError, name, text)


def latent_out_dtype(call: Call, name: str) -> None:
    names(ValueError, ("bfloat16", "float32"), "expected bfloat16 or float32, got '{}'")(call, name)


def latent_out(call: Call, name: str) -> None:
    dtypes(call.attrs["out_dtype"])(call, name)


def extra_selection(call: Call, name: str) -> None:
    """Arguments of a second cache come with it."""
    given, cache = call.inputs[name] is not None, call.inputs["extra_cache"] is not None
    if given and not cache:
        call.fail(ValueError, name, "expected None without extra_cache, got a tensor")
    if name == "extra_scale":
        if cache:
            latent_scale(call, name)
    elif given:
        dtypes("int32")(call, name)


def head_groups(call: Call, name: str) -> None:
    groups, heads = call.attrs[name], call.size("x", 1)
    if groups <= 0 or (heads is not None and heads % groups):
        shown = -1 if heads is None else heads
        call.fail(ValueError, name, f"expected a divisor of the {shown} heads, got {groups}")


def padded_heads(call: Call, name: str) -> None:
    padded, heads = call.attrs[name], call.size("q", 1)
    least = -1 if heads is None else heads
    if padded != 0 and (padded < 0 or padded < least):
        call.fail(ValueError, name, f"expected at least the {least} heads of q, got {padded}")
