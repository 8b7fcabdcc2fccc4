"""Tables of latent attention, its writers, the indexer in one call, and steps of such layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gpu_tables.results import (
    NONE,
    READ,
    Measured,
    Results,
    cell,
    digits,
    grid,
    links,
    percent,
    ratio,
    two_digits,
)

#: What stands where no row of a table is committed.
MISSING = "No row of these shapes is committed."

_GATHERED = "mla_gather_cache, then bf16 keys"


def _table(head: Sequence[str], lines: list[list[str]], rows: Iterable[Measured | None]) -> str:
    """A table and the files of its rows, or a word that there are none."""
    used = [row for row in rows if row]
    return f"{grid(head, lines)}\n{links(used)}" if used else MISSING


def sparse_attention(results: Results) -> str:
    """Decode steps beside FlashMLA, which pads queries of few heads, then prefill."""
    op, lines, used = "mla_sparse_attention", [], []
    for row in results.find(op, r"decode .*"):
        match = re.fullmatch(
            r"decode (\d+) B, batch (\d+), (\d+) queries, H (\d+), top (.*)", row.shape
        )
        if not match:
            continue
        size, batch, queries, heads, keys = match.groups()
        lines.append([
            f"{size} bytes, {batch} x {queries}, {heads} heads, {keys} keys", digits(row.us),
            cell(row.rate, "{:.0f}".format), cell(row.ratio(READ), percent),
            cell(row.peer_us("FlashMLA"), digits), cell(row.ratio("FlashMLA"), ratio),
        ])  # fmt: skip
        used.append(row)
    head = ["decode: sequences x queries", "us", "TFLOP/s", "% of reading once",
            "FlashMLA, us", "its time / ours"]  # fmt: skip
    decode = _table(head, lines, used)
    lines, prompts = [], results.find(op, r"prefill .*")
    for row in prompts:
        match = re.fullmatch(
            r"prefill (\w+), (\d+) x H (\d+), top (\d+), (\d+) keys", row.shape
        )  # fmt: skip
        if not match:
            continue
        kind, tokens, heads, topk, keys = match.groups()
        lines.append([
            f"`{kind}`, {tokens} x {heads} heads, {topk} of {int(keys) // 1024}k keys",
            digits(row.us), cell(row.rate, "{:.0f}".format),
            cell(row.peer_us("FlashMLA"), digits), cell(row.ratio("FlashMLA"), ratio),
            cell(row.ratio("bf16 keys"), ratio), cell(row.peer_us(_GATHERED), digits),
        ])  # fmt: skip
    head = ["prefill", "us", "TFLOP/s", "FlashMLA over bf16 keys, us", "its time / ours",
            "bf16 keys' time / this", f"{_GATHERED}, us"]  # fmt: skip
    return f"{decode}\n\n{_table(head, lines, prompts)}" if used or prompts else MISSING


_LENGTHS, _BATCHES = (4, 8, 32), (1, 16, 64, 128)
#: Format of a cache -> label, and that of FlashMLA's kernel over it.
_FORMATS = {"bf16": ("`bf16`", "FlashMLA BF16"), "fp8": ("`fp8`", "FlashMLA FP8"),
            "fp8_656": ("`fp8_656`", "")}  # fmt: skip


def dense_attention(results: Results) -> str:
    """Decode steps over whole caches, then chunks."""
    op, lines, used = "mla_attention", [], []
    for heads in (128, 16, 8):
        for cache_format, (label, peer) in _FORMATS.items():
            rows = [
                results.get(op, f"{heads} heads, batch {b}, {k}k keys, {cache_format}")
                for k in _LENGTHS for b in _BATCHES
            ]  # fmt: skip
            used += rows
            cells = [
                f"{two_digits(row.us)} ({cell(row.ratio(READ), percent)} %)" if row else NONE
                for row in rows
            ]
            lines.append([f"{label}, {heads} heads", *cells])
            times = [row and peer and row.peer_us(peer) for row in rows]
            if any(times):
                lines.append([f"{peer}, {heads} heads", *(cell(x or None, two_digits)
                                                          for x in times)])  # fmt: skip
    head = ["decode, us (of reading once)", *(f"{b} x {k}k" for k in _LENGTHS for b in _BATCHES)]
    decode = _table(head, lines, used)
    chunks = results.find(op, r"\d+ heads, .* new behind .*")
    lines = [[row.shape.removesuffix(", bf16"), digits(row.us), cell(row.rate, "{:.0f}".format)]
             for row in chunks]  # fmt: skip
    more = _table(["new and cached tokens, `bf16`", "us", "TFLOP/s"], lines, chunks)
    return f"{decode}\n\n{more}" if any(used) or chunks else MISSING


def latent_writers(results: Results) -> str:
    """Writers of latent caches beside vLLM's."""
    tokens = (1, 128, 1024, 4096, 8192, 16384, 65536)
    cases = [
        ("`mla_write_cache` bf16", "mla_write_cache", "T {}, bf16"),
        ("`mla_write_cache` fp8", "mla_write_cache", "T {}, fp8"),
        ("`mla_write_cache` fp8_656, scales of vLLM", "mla_write_cache", "T {}, fp8_656, amax"),
        *((f"`mla_qkv_norm_rope_write`, {heads} heads", "mla_qkv_norm_rope_write",
           f"T {{}}, H {heads}") for heads in (8, 16, 64)),
        ("`indexer_k_write_cache` fp8", "indexer_k_write_cache", "T {}, fp8"),
    ]  # fmt: skip
    lines, used = [], []
    for label, op, pattern in cases:
        rows = [results.get(op, pattern.format(n)) for n in tokens]
        beside = [row if row and row.peer_us("vLLM") else None for row in rows]
        if any(beside):
            lines += [
                [label, *(cell(row and row.us, digits) for row in rows)],
                ["vLLM", *(cell(row and row.peer_us("vLLM"), digits) for row in rows)],
            ]
            used += beside
    return _table(["us; tokens", *map(str, tokens)], lines, used)


def indexer_topk(results: Results) -> str:
    """Logits and top-k in one call."""
    lines, used = [], []
    for op in ("indexer_topk", "paged_indexer_topk"):
        for row in results.find(op, r".*, k \d+"):
            lines.append([
                f"`{op}`, {row.shape}", digits(row.us),
                cell(row.peer_us("logits, then top-k"), digits),
                cell(row.peer_us("DeepGEMM"), digits),
            ])  # fmt: skip
            used.append(row)
    head = ["H 64, D 128, FP8", "us", "in turn, us", "DeepGEMM, then vLLM's top-k, us"]
    return _table(head, lines, used)


_STEP_OP, _SHARED = "sparse step", ", parts of vLLM"


def sparse_step(results: Results) -> str:
    """Steps of layers with an indexer beside vLLM's kernels."""
    lines, used = [], []
    for row in results.find(_STEP_OP, r".*, graph"):
        at = row.shape.removesuffix(", graph")
        if at.endswith(_SHARED):
            continue
        shared = results.get(_STEP_OP, f"{at}{_SHARED}, graph")
        eager = results.get(_STEP_OP, f"{at}, eager")
        theirs = results.get(_STEP_OP, f"{at}{_SHARED}, eager")
        lines.append([
            at, digits(row.us), cell(shared and shared.us, digits),
            cell(shared and shared.peer_us("vLLM"), digits),
            cell(shared and shared.ratio("vLLM"), ratio),
            cell(eager and eager.us, digits), cell(eager and eager.peer_us("host"), digits),
            cell(theirs and theirs.peer_us("host"), digits),
            cell(theirs and theirs.peer_us("vLLM, host"), digits),
        ])  # fmt: skip
        used += [row, shared, eager, theirs]
    head = ["us of a layer", "all, graph", "vLLM's parts, graph", "vLLM", "its time / ours",
            "all, eager", "host", "host, vLLM's parts", "vLLM's host"]  # fmt: skip
    return _table(head, lines, used)


def sparse_parts(results: Results) -> str:
    """Parts of the same steps."""
    tables, used = [], []
    whole = [
        row.shape.removesuffix(", graph")
        for row in results.find(_STEP_OP, r".*, graph")
        if _SHARED not in row.shape
    ]
    for model in dict.fromkeys(at.partition(" TP8 ")[0] for at in whole):
        steps = [at for at in whole if at.startswith(f"{model} TP8 ")]
        parts: dict[str, None] = {}
        for at in steps:
            found = results.find(_STEP_OP, re.escape(at) + r", (?!graph|eager|parts of)[^,]+")
            parts.update(dict.fromkeys(row.shape.removeprefix(f"{at}, ") for row in found))
        lines = []
        for part in parts:
            rows = [results.get(_STEP_OP, f"{at}, {part}") for at in steps]
            used += rows
            lines.append([part, *map(_beside_vllm, rows)])
        head = [f"DeepSeek-{model} TP8, us (vLLM)", *(at.partition(" TP8 ")[2] for at in steps)]
        tables.append(grid(head, lines))
    return "\n\n".join(tables) + "\n" + links(used) if tables else MISSING


def _beside_vllm(row: Measured | None) -> str:
    if row is None:
        return NONE
    theirs = row.peer_us("vLLM")
    return f"{two_digits(row.us)} ({two_digits(theirs)})" if theirs else two_digits(row.us)
