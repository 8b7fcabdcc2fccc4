"""Names of the cache types, and the check for arguments that none of them takes."""

from __future__ import annotations

from typing import Any

from fastattn._formats import FORMATS, value_dim

__all__ = ["value_dim"]

#: Rows of the table of cache types by name.
TYPES = {row.name: row for row in FORMATS}

CACHE_QUANT_TYPES = tuple(TYPES)

#: Types with 4-bit codes of K and V: a byte holds two.
NIBBLE_TYPES = tuple(row.name for row in FORMATS if row.bits == row.value_bits == 4)

#: Types whose V alone has 4-bit codes.
MIXED_TYPES = tuple(row.name for row in FORMATS if row.code != row.value_code)

#: Types whose scales are computed while writing: one scale per token and KV head, or per group of
#: its channels.
DYNAMIC_TYPES = tuple(row.name for row in FORMATS if row.scheme in ("token", "group"))

#: Types whose scales belong to the layer.
STATIC_TYPES = tuple(row.name for row in FORMATS if row.scheme in ("layer", "head", "channel"))

#: Types whose K takes error feedback: one scale for all channels of a head or token.
FEEDBACK_TYPES = tuple(
    row.name for row in FORMATS if row.scheme in ("layer", "head", "channel", "token")
)

#: Tokens of a block.
BLOCK_SIZE = 64

#: Head dimensions of K in a cache. V has 128 channels if K has 192, otherwise as many as K.
HEAD_DIMS = (64, 96, 128, 192, 256)

#: Head dimensions of fused projections, whose heads all have one size.
FUSED_HEAD_DIMS = (64, 96, 128, 256)


def codes_per_byte(cache_quant_type: str) -> tuple[int, int]:
    """Number of codes in a byte of a quantised K, and of V: 2 for 4-bit codes."""
    row = TYPES[cache_quant_type]
    return 2 if row.bits == 4 else 1, 2 if row.value_bits == 4 else 1


def cache_shapes(
    cache_quant_type: str, num_blocks: int, num_kv_heads: int, head_dim: int
) -> tuple[list[int], list[int]]:
    """Shapes of a layer's key and value cache: a quantised V keeps a block's tokens together."""
    packed, value_packed = codes_per_byte(cache_quant_type)
    row, value_row = head_dim // packed, value_dim(head_dim) // value_packed
    rest = [BLOCK_SIZE, value_row] if cache_quant_type == "none" else [value_row, BLOCK_SIZE]
    heads = [num_blocks, num_kv_heads]
    return [*heads, BLOCK_SIZE, row], [*heads, *rest]


def token_scales(cache_quant_type: str, head_dim: int) -> tuple[list[int], str]:
    """Shape and dtype of a token's dynamic scales of one KV head; float32 also allows bfloat16."""
    group = TYPES[cache_quant_type].group
    return ([head_dim // group], "uint8") if group else ([], "float32")


#: Types that lose much if K has large channels and is not rotated, and that need no other scales
#: for rotated keys (docs/quality.md).
_ROTATED_BY_DEFAULT = (*NIBBLE_TYPES, *MIXED_TYPES, "block_wise_int8")


def default_rotation(cache_quant_type: str) -> str:
    """The `k_rotation` of a type if :func:`make_cache`, a layer or a file gives none.

    Types of FastDeploy's own keep K as FastDeploy writes it. Servers exchange blocks by this rule:
    a change of it for a type changes ``fastattn.backends.peers.LAYOUT``.
    """
    return "hadamard" if cache_quant_type in _ROTATED_BY_DEFAULT else "none"


#: FastDeploy's ``kv_cache_quant_type`` strings and their cache types.
CONFIG_TYPES = {"int8": "cache_int8", "float8_e4m3fn": "cache_fp8"}


def cache_type_name(cache_quant_type: str) -> str:
    """The cache type of a config string; any other name is returned unchanged."""
    if isinstance(cache_quant_type, str):
        return CONFIG_TYPES.get(cache_quant_type, cache_quant_type)
    return cache_quant_type


def check_cache_type(op: str, cache_quant_type: str) -> str:
    """The cache type of a name.

    Raises
    ------
    NotImplementedError
        For any other name; the message lists the supported ones.
    """
    name = cache_type_name(cache_quant_type)
    if name not in CACHE_QUANT_TYPES:
        raise NotImplementedError(
            f"{op}: cache_quant_type: {unsupported(cache_quant_type)}"
            + ", ".join(CACHE_QUANT_TYPES)
        )
    return name


def unsupported(cache_quant_type: Any) -> str:
    """Text of an error about a type's name, to be followed by the list of the supported names."""
    meant = _meant(cache_quant_type)
    if not meant:
        return f"{cache_quant_type!r} is not supported; supported: "
    hint = " or ".join(meant)
    return f"{cache_quant_type!r} is not supported, did you mean {hint}? supported: "


def _meant(name: Any) -> list[str]:
    """Types that a name may mean: the last word of theirs, or all words joined in another way."""
    if not isinstance(name, str):
        return []
    plain = name.lower().replace("-", "_")

    def joined(text: str) -> str:
        return text.replace("_", "")

    return [t for t in TYPES if t.endswith("_" + plain) or joined(t) == joined(plain)]


def operator_cache_type(op: str, cache_quant_type: str) -> str:
    """The cache type of a name, for an operator that checks it after other arguments.

    Raises
    ------
    NotImplementedError
        For the short name of a type. The operator refuses any other name.
    """
    name = cache_type_name(cache_quant_type)
    if isinstance(name, str) and name not in TYPES and _meant(name):
        check_cache_type(op, name)
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
