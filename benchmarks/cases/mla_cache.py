"""Latent caches: writing tokens and gathering them, beside a copy of as many bytes and vLLM.

vLLM's scales of 656 bytes a token are those of the rule "amax".
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle

import fastattn.functional as F
from benchmarks.cases.sparse_models import WRITE_TOKENS
from benchmarks.core.devices import Device
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import bind

PAGE = 64
#: Format: latent channels, elements of a cached token and the type of the cache.
_FORMATS = {
    "bf16": (512, 576, "bfloat16"),
    "fp8": (512, 576, "uint8"),
    "fp8_656": (512, 656, "uint8"),
    "fp8_584": (448, 584, "uint8"),
}
_TOKENS = {
    "cpu": (4096,),
    "cpu quick": (256,),
    "gpu": WRITE_TOKENS,
    "gpu quick": (128, 8192),
}
_SEQS = 16
_ROPE = 64


def _cache(device: Device, tokens: int, cache_format: str) -> paddle.Tensor:
    """Pages for `tokens` tokens, of any contents."""
    _, width, dtype = _FORMATS[cache_format]
    return device.random((-(-tokens // PAGE), PAGE, width), "e4m3" if dtype == "uint8" else dtype)


def _options(device: Device, cache_format: str) -> dict[str, object]:
    scale = device.uniform((1,)) if cache_format == "fp8" else None
    return {"cache_format": cache_format, "scale": scale}


def _bytes(cache_format: str) -> tuple[int, int]:
    """Bytes of a token in bf16 and in the cache."""
    latent, width, dtype = _FORMATS[cache_format]
    return 2 * (latent + _ROPE), width * (2 if dtype == "bfloat16" else 1)


@register("mla_write_cache")
def writes(device: Device) -> Iterator[Row]:
    """Tokens into pages that lie anywhere."""
    rng = np.random.default_rng(3)
    cases = [(name, "pow2") for name in _FORMATS] + [("fp8_656", "amax")]
    for cache_format, rule in cases:
        options = {**_options(device, cache_format), "scale_rule": rule}
        latent = _FORMATS[cache_format][0]
        for tokens in device.of(_TOKENS):
            moved = tokens * (sum(_bytes(cache_format)) + 8)
            pages = rng.permutation(-(-tokens // PAGE))
            slots = device.array((pages[:, None] * PAGE + np.arange(PAGE)).ravel()[:tokens])
            calls = []
            for _ in range(device.copies(moved)):
                inputs = device.random((tokens, latent)), device.random((tokens, _ROPE))
                cache = _cache(device, tokens, cache_format)
                calls.append(bind(F.mla_write_cache, *inputs, cache, slots, **options))
            shape = f"T {tokens}, {cache_format}{', amax' if rule == 'amax' else ''}"
            row = device.memory_row("mla_write_cache", shape, calls, moved)
            yield row
            if device.kind == "gpu" and rule == ("amax" if cache_format == "fp8_656" else "pow2"):
                shape_of = {"op": "mla_write_cache", "format": cache_format, "tokens": tokens}
                for other in peers("mla_writers", **shape_of):
                    yield row.beside(other["peer"], other["us"])


@register("mla_gather_cache")
def gathers(device: Device) -> Iterator[Row]:
    """Cached tokens of up to 16 sequences into contiguous rows."""
    rng = np.random.default_rng(4)
    for cache_format, (latent, _, _) in _FORMATS.items():
        options = _options(device, cache_format)
        for tokens in device.of(_TOKENS):
            seqs = max(1, min(_SEQS, tokens // PAGE))
            length = tokens // seqs
            blocks = -(-length // PAGE)
            table = device.int32(rng.permutation(seqs * blocks).reshape(seqs, blocks))
            lengths = device.int32(np.full(seqs, length))
            starts = device.int32(np.arange(seqs + 1) * length)
            moved = tokens * sum(_bytes(cache_format))
            calls = []
            for _ in range(device.copies(moved)):
                cache = _cache(device, seqs * blocks * PAGE, cache_format)
                out = device.empty((tokens, latent + _ROPE), "bfloat16")
                inputs = cache, out, table, lengths, starts
                calls.append(bind(F.mla_gather_cache, *inputs, **options))
            shape = f"{seqs} x {length}, {cache_format}"
            yield device.memory_row("mla_gather_cache", shape, calls, moved)
