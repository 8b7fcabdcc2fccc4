"""Steps for FastDeploy's two operators, for a benchmark on any place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from fastattn.compat.fastdeploy import gqa_rope_write_cache, merge_prefill_decode_output
from fastattn.reference.layout import BLOCK_SIZE
from fastattn.reference.rope import make_rotary_embs

HEADS, KV, DIM = 32, 8, 128
BF16, CODE = 2, 1

Call = Callable[[], object]
#: A row's new tokens if it is a prefill row, else 0; its cached tokens; its new tokens.
RowOfStep = tuple[int, int, int]


@dataclass(frozen=True)
class Place:
    """How tensors are made somewhere: of an array, or of a shape with random contents."""

    array: Callable[[NDArray[Any]], paddle.Tensor]
    bfloat16: Callable[[tuple[int, ...]], paddle.Tensor]
    codes: Callable[[tuple[int, ...]], paddle.Tensor]

    def int32(self, values: Any) -> paddle.Tensor:
        """Tensor of integers."""
        return self.array(np.asarray(values, np.int32))


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)])


def _scales(place: Place, quant: str, blocks: int) -> list[Any]:
    """Quantisation and dequantisation multipliers of K and V, in the operator's order."""
    if quant == "none":
        return [None] * 4
    shape = (blocks, KV, BLOCK_SIZE) if quant.startswith("block_wise") else (KV,)
    rng = np.random.default_rng(0)
    scales = [place.array(rng.uniform(0.01, 0.02, shape).astype(np.float32)) for _ in "kv"]
    return [*scales, None, None] if quant.startswith("block_wise") else [None, None, *scales]


def gqa_calls(
    place: Place, quant: str, rows: Sequence[RowOfStep], copies: Callable[[int], int]
) -> tuple[list[Call], int]:
    """Calls of gqa_rope_write_cache over projections of their own, and the bytes of one.

    `copies` tells from the bytes how many calls there should be.
    """
    encoder, cached, new = (np.array(x, np.int64) for x in zip(*rows))
    prefix = np.where(encoder > 0, cached, 0)
    needed = -(-(cached + new) // BLOCK_SIZE)
    order = np.random.default_rng(1).permutation(int(needed.sum()))
    tables = np.full((len(rows), int(needed.max())), -1)
    for row, ids in enumerate(np.split(order, np.cumsum(needed)[:-1])):
        tables[row, : len(ids)] = ids
    shape = (len(order), KV, BLOCK_SIZE, DIM)
    caches = [place.bfloat16(shape) if quant == "none" else place.codes(shape) for _ in "kv"]
    tokens, kv_tokens = int(new.sum()), int((prefix + new).sum())
    arguments = (
        *caches,
        place.int32(_starts(new)),
        place.int32(_starts(prefix + new)),
        place.array(make_rotary_embs(int((cached + new).max()), DIM)),
        *(place.int32(x) for x in (new, encoder, cached)),
        place.int32(np.repeat(np.arange(len(rows)), new)),
        place.int32(tables),
        *[None] * 8,  # lists of tiles, norms
        *_scales(place, quant, len(order)),
        *[None] * 3,  # zero points, PD signals
        kv_tokens,
        0,
        1e-6,
        False,
        quant,
    )
    width = (HEADS + 2 * KV) * DIM
    element = BF16 if quant == "none" else CODE
    cached_token = 2 * KV * (DIM * element + 4 * quant.startswith("block_wise"))
    moved = tokens * (2 * width * BF16 + HEADS * DIM * BF16 + 4 * DIM)  # q, qkv_out, angles
    moved += kv_tokens * 2 * KV * DIM * BF16
    moved += int(prefix.sum() + new[encoder > 0].sum()) * cached_token
    calls: list[Call] = [
        functools.partial(gqa_rope_write_cache, place.bfloat16((tokens, width)), *arguments)
        for _ in range(copies(moved))
    ]
    return calls, moved


def merge_calls(
    place: Place, rows: Sequence[RowOfStep], copies: Callable[[int], int]
) -> tuple[list[Call], int]:
    """Calls of merge_prefill_decode_output over outputs of their own, and the bytes of one."""
    encoder, cached, new = (np.array(x, np.int64) for x in zip(*rows))
    lengths = (place.int32(encoder), place.int32(cached), place.int32(new))
    starts = place.int32(_starts(new))
    shape = (int(new.sum()), HEADS * DIM)
    moved = 2 * int(new[encoder == 0].sum()) * HEADS * DIM * BF16

    def call_of(prefill: paddle.Tensor, decode: paddle.Tensor) -> Call:
        longest = int(new.max())
        return lambda: merge_prefill_decode_output(
            prefill, decode, *lengths, starts, HEADS, DIM, longest
        )

    calls = [call_of(place.bfloat16(shape), place.bfloat16(shape)) for _ in range(copies(moved))]
    return calls, moved


def describe(rows: Sequence[RowOfStep]) -> str:
    """Such as ``1 x 2048 prefill after 2048, 64 x 1 decode, H 32, KV 8, D 128``."""
    parts = []
    for row in dict.fromkeys(rows):
        encoder, cached, new = row
        behind = f" after {cached}" if encoder and cached else ""
        kind = "prefill" if encoder else "decode"
        parts.append(f"{list(rows).count(row)} x {new} {kind}{behind}")
    return f"{', '.join(parts)}, H {HEADS}, KV {KV}, D {DIM}"
