"""The table of cache types.

It is custom_ops/formats/cache_format.h for Python, which needs neither Paddle nor a build to read
it. scripts/make_formats.py writes the rows.
"""

from __future__ import annotations

from typing import NamedTuple


class CacheFormat(NamedTuple):
    """How a cache type stores K and V."""

    name: str
    code: str  #: of K
    value_code: str  #: of V
    other_code: str  #: of both, what ``fp8_format`` may name instead, else `code`
    bits: int  #: of K's code
    value_bits: int  #: of V's
    scheme: str  #: what a scale covers: none, head or channel (of the layer), token, group
    group: int  #: channels of a group
    scale_type: str  #: of dynamic scales; "float32": or bfloat16


def value_dim(head_dim: int) -> int:
    """Channels of V and of the attention output, for `head_dim` channels of Q and K."""
    return 128 if head_dim == 192 else head_dim


FORMATS = (
    CacheFormat("none", "bfloat16", "bfloat16", "float16", 16, 16, "none", 0, "float32"),
    CacheFormat("cache_int8", "int8", "int8", "int8", 8, 8, "channel", 0, "float32"),
    CacheFormat("cache_fp8", "e4m3", "e4m3", "e5m2", 8, 8, "head", 0, "float32"),
    CacheFormat("block_wise_int8", "int8", "int8", "int8", 8, 8, "token", 0, "float32"),
    CacheFormat("block_wise_fp8", "e4m3", "e4m3", "e4m3", 8, 8, "token", 0, "float32"),
    CacheFormat("block_wise_int4", "int4", "int4", "int4", 4, 4, "token", 0, "float32"),
    CacheFormat("block_wise_mxfp4", "e2m1", "e2m1", "e2m1", 4, 4, "group", 32, "ue8m0"),
    CacheFormat("block_wise_k8v4", "int8", "int4", "int8", 8, 4, "token", 0, "float32"),
    CacheFormat("block_wise_kfp8v4", "e4m3", "int4", "e4m3", 8, 4, "token", 0, "float32"),
)
