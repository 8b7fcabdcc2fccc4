"""The indexer operators, beside a copy of as many bytes and peers' kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import fastattn.functional as F
from benchmarks.core.devices import Device
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind

HEADS, HEAD, ROPE = 64, 128, 64
#: Positions of the table of cosines and sines.
POSITIONS = 32768
PAGE = 64

_QUERIES = {
    "cpu": (256,),
    "cpu quick": (32,),
    "gpu": (1, 7, 32, 128, 512, 1024, 4096, 16384),
    "gpu quick": (1, 128, 4096),
}
#: Tokens, tokens of a compressed one.
_KEYS = {
    "cpu": [(2048, 4)],
    "cpu quick": [(256, 4)],
    "gpu": [(tokens, ratio) for ratio in (4, 128) for tokens in (128, 4096, 16384)],
    "gpu quick": [(4096, 4), (4096, 128)],
}
_STATES = {
    "cpu": (256,),
    "cpu quick": (32,),
    "gpu": (1, 128, 1024, 4096, 16384),
    "gpu quick": (128, 4096),
}
#: Format of a page: head dimension, bytes of a token.
_PAGES = {"fp8": (128, 132), "mxfp4": (128, 68), "fp8_512": (512, 584)}


@register("indexer_q_rope_quant")
def queries(device: Device) -> Iterator[Row]:
    """Queries of 64 heads."""
    rng = np.random.default_rng(7)
    table = device.uniform((POSITIONS, ROPE), -1, 1)
    for quant in ("fp8", "mxfp4"):
        codes = HEAD if quant == "fp8" else HEAD // 2
        for tokens in device.of(_QUERIES):
            # A token's angles and position; of a head also the scale and both weights.
            moved = tokens * (HEADS * (2 * HEAD + codes + 12) + 4 * ROPE + 8)
            positions = device.array(rng.integers(0, POSITIONS, tokens))
            settings = (table, device.random((tokens, HEADS), "float32"), HEAD**-0.5, 0.125)
            calls: list[Call] = []
            for _ in range(device.copies(moved)):
                q = device.random((tokens, HEADS, HEAD))
                calls.append(bind(F.indexer_q_rope_quant, positions, q, *settings, quant=quant))
            shape = f"T {tokens}, H {HEADS}, {quant}"
            row = device.memory_row("indexer_q_rope_quant", shape, calls, moved)
            yield row
            for peer in peers("indexer", tokens=tokens):
                if "q_rope_quant" in peer["peer"] and peer.get("quant", "fp8") == quant:
                    yield row.beside(peer["peer"], peer["us"])


@register("indexer_q_quant")
def rotated_queries(device: Device) -> Iterator[Row]:
    """Queries of 64 heads that are rotated already, in the order of the tokens."""
    for tokens in device.of(_QUERIES):
        moved = tokens * HEADS * (3 * HEAD + 8)  # of a head also both weights
        weights = device.random((tokens, HEADS), "float32")
        calls = [
            bind(F.indexer_q_quant, device.random((tokens, HEADS, HEAD)), weights, HEAD**-0.5)
            for _ in range(device.copies(moved))
        ]
        yield device.small_row("indexer_q_quant", f"T {tokens}, H {HEADS}", calls, moved)


def _key_call(device: Device, tokens: int, ratio: int, quant: str) -> Call:
    """A call on one sequence of new tokens from position 0."""
    head, token_bytes = _PAGES[quant]
    block, halves = (4, 2) if ratio == 4 else (8, 1)
    blocks, at = -(-tokens // block), np.arange(tokens)
    return bind(
        F.indexer_kv_compress_insert,
        device.random((blocks, block, 2 * halves * head), "float32"),
        device.int32(np.random.default_rng(8).permutation(blocks)[None]),
        device.int32(np.zeros(tokens)),
        device.array(at),
        device.array(at),
        device.array(at // ratio),
        device.uniform((head,), 0.5, 2.0),
        device.uniform((POSITIONS, ROPE), -1, 1),
        device.array(np.zeros((tokens // ratio // PAGE + 1, PAGE * token_bytes), np.uint8)),
        compress_ratio=ratio,
        page_size=PAGE,
        quant=quant,
    )


@register("indexer_kv_compress_insert")
def keys(device: Device) -> Iterator[Row]:
    """Every page format and ratio, fp32 state."""
    for tokens, ratio in device.of(_KEYS):
        for quant, (head, token_bytes) in _PAGES.items():
            # Every kv and score is read once, whether groups overlap (in the other half) or not.
            read = (8 if ratio == 4 else 128) * head * 8
            moved = tokens // ratio * (read + token_bytes + 4 * ROPE) + tokens * 28
            copies = device.copies(moved, 4 if quant == "fp8_512" else 16)
            calls = [_key_call(device, tokens, ratio, quant) for _ in range(copies)]
            shape = f"{tokens} tokens, ratio {ratio}, {quant}"
            yield device.memory_row("indexer_kv_compress_insert", shape, calls, moved)


@register("save_partial_states")
def states(device: Device) -> Iterator[Row]:
    """States of the latent's and of the index keys' compressor, fp32, into blocks anywhere."""
    rng = np.random.default_rng(11)
    for head, ratio in ((512, 4), (512, 128), (128, 4)):
        width, block = (2 * head, 4) if ratio == 4 else (head, 8)
        ape = device.random((ratio, width), "float32")
        for tokens in device.of(_STATES):
            # Values and scores in and out; a token's position and slot.
            moved = tokens * (16 * width + 16)
            blocks = rng.permutation(-(-tokens // block))
            slots = device.array((blocks[:, None] * block + np.arange(block)).ravel()[:tokens])
            positions = device.array(np.arange(tokens))
            calls = []
            for _ in range(device.copies(moved)):
                kv_score = device.random((tokens, 2 * width), "float32")
                state = device.random((len(blocks), block, 2 * width), "float32")
                inputs = kv_score, ape, positions, state, slots
                calls.append(bind(F.save_partial_states, *inputs))
            shape = f"T {tokens}, HEAD {head}, ratio {ratio}"
            yield device.small_row("save_partial_states", shape, calls, moved)
