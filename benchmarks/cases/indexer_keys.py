"""Index keys in paged caches, beside a copy of as many bytes and vLLM's writer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import fastattn.functional as F
from benchmarks.core.devices import Device
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind

HEAD, PAGE = 128, 64
#: Bytes of a token in a page.
_TOKEN = {"fp8": 132, "mxfp4": 68}
_WRITES = {
    "cpu": (4096,),
    "cpu quick": (256,),
    "gpu": (1, 128, 1024, 4096, 16384, 65536),
    "gpu quick": (1, 4096),
}
#: Sequences, keys of each.
_GATHERS = {
    "cpu": [(4, 2048)],
    "cpu quick": [(2, 256)],
    "gpu": [(1, 4096), (16, 1024), (1, 65536), (4, 32768), (256, 512)],
    "gpu quick": [(4, 4096)],
}


@register("indexer_k_write_cache")
def writes(device: Device) -> Iterator[Row]:
    """Keys of one sequence into permuted pages."""
    rng = np.random.default_rng(7)
    for tokens in device.of(_WRITES):
        for quant, token_bytes in _TOKEN.items():
            moved = tokens * (2 * HEAD + token_bytes + 8)
            pages = -(-tokens // PAGE)
            calls: list[Call] = []
            for _ in range(device.copies(moved)):
                table, at = rng.permutation(pages), np.arange(tokens)
                calls.append(
                    bind(
                        F.indexer_k_write_cache,
                        device.random((tokens, HEAD)),
                        device.random((pages, PAGE, token_bytes), "int8"),
                        device.array(table[at // PAGE] * PAGE + at % PAGE),
                        quant=quant,
                    )
                )
            row = device.memory_row("indexer_k_write_cache", f"T {tokens}, {quant}", calls, moved)
            yield row
            for other in peers("indexer", peer="vllm indexer_k_quant_and_cache", tokens=tokens):
                if quant == "fp8" and device.kind == "gpu":
                    yield row.beside("vLLM", other["us"])


@register("indexer_k_gather")
def gathers(device: Device) -> Iterator[Row]:
    """All keys of some sequences out of permuted pages, into tensors that are there."""
    rng = np.random.default_rng(8)
    for batch, length in device.of(_GATHERS):
        for quant, token_bytes in _TOKEN.items():
            rows, blocks = batch * length, -(-length // PAGE)
            moved = 2 * rows * token_bytes
            starts = device.int32(np.arange(batch + 1) * length)
            calls: list[Call] = []
            for _ in range(device.copies(moved)):
                table = rng.permutation(batch * blocks).reshape(batch, blocks)
                calls.append(
                    bind(
                        F.indexer_k_gather,
                        device.random((batch * blocks, PAGE, token_bytes), "int8"),
                        device.int32(table),
                        starts,
                        rows,
                        quant=quant,
                        out=device.empty((rows, token_bytes - 4), "uint8"),
                        out_scales=device.empty((rows, 4), "uint8"),
                    )
                )
            shape = f"{batch} x {length} keys, {quant}"
            yield device.memory_row("indexer_k_gather", shape, calls, moved)
