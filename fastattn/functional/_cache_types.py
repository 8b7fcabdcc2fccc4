"""Names of the cache types, and the arguments that none of them takes."""

from __future__ import annotations

from typing import Any

#: Types whose two codes of a byte have 4 bits each.
NIBBLE_TYPES = ("block_wise_int4", "block_wise_mxfp4")

#: Types with scales of tokens (one for each token and KV head, or for each 32 of its channels),
#: computed while writing.
DYNAMIC_TYPES = ("block_wise_int8", "block_wise_fp8", *NIBBLE_TYPES)

#: Types with scales that the layer holds.
STATIC_TYPES = ("cache_int8", "cache_fp8")

#: Head dimensions of a cache: channels of K. V has 128 where K has 192, else as many.
HEAD_DIMS = (64, 96, 128, 192, 256)

#: Those of fused projections, whose heads are of one size.
FUSED_HEAD_DIMS = (64, 96, 128, 256)

CACHE_QUANT_TYPES = ("none", *STATIC_TYPES, *DYNAMIC_TYPES)


def value_dim(head_dim: int) -> int:
    """Channels of V, and of attention's output, where Q and K have `head_dim`."""
    return 128 if head_dim == 192 else head_dim


def codes_per_byte(cache_quant_type: str) -> int:
    """Codes in a byte of a quantised cache: 2 where they have 4 bits."""
    return 2 if cache_quant_type in NIBBLE_TYPES else 1


def token_scales(cache_quant_type: str, head_dim: int) -> tuple[list[int], str]:
    """Shape of a token's dynamic scales of one KV head, and their dtype (float32: or bfloat16)."""
    if cache_quant_type == "block_wise_mxfp4":
        return [head_dim // 32], "uint8"
    return [], "float32"


#: Types that lose much where K has large channels, unless K is rotated, and that need no scales for
#: it (docs/quality.md).
_ROTATED_BY_DEFAULT = (*NIBBLE_TYPES, "block_wise_int8")


def default_rotation(cache_quant_type: str) -> str:
    """The `k_rotation` that a type has unless one is named."""
    return "hadamard" if cache_quant_type in _ROTATED_BY_DEFAULT else "none"


#: FastDeploy's ``kv_cache_quant_type`` strings, and the type that each is.
CONFIG_TYPES = {"int8": "cache_int8", "float8_e4m3fn": "cache_fp8"}


def cache_type_name(cache_quant_type: str) -> str:
    """The type that a config string names; every other name as it is."""
    if isinstance(cache_quant_type, str):
        return CONFIG_TYPES.get(cache_quant_type, cache_quant_type)
    return cache_quant_type


def check_cache_type(op: str, cache_quant_type: str) -> str:
    """The type that a name means.

    Raises
    ------
    NotImplementedError
        For any other name; the message lists the supported ones.
    """
    name = cache_type_name(cache_quant_type)
    if name not in CACHE_QUANT_TYPES:
        raise NotImplementedError(
            f"{op}: cache_quant_type: {cache_quant_type!r} is not supported; supported: "
            + ", ".join(CACHE_QUANT_TYPES)
        )
    return name


def check_no_zero_points(op: str, cache_quant_type: str, **zero_points: Any) -> None:
    """Raise ValueError for a zero point: every supported type is symmetric."""
    for name, value in zero_points.items():
        if value is not None:
            check_cache_type(op, cache_quant_type)
            raise ValueError(
                f"{op}: {name}: cache_quant_type {cache_quant_type!r} is symmetric and takes no "
                "zero point"
            )
