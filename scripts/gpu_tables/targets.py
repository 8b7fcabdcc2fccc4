"""The table of goals: required speeds of the attention kernels, and results of each GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from gpu_tables.attention import decode_row
from gpu_tables.peers import Notes, fastest
from gpu_tables.results import READ, Measured, Results, digits, grid, links, percent, ratio, span

EIGHT_BITS = ("cache_fp8", "cache_int8", "block_wise_fp8", "block_wise_int8")
_LENGTHS = ((16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384))
Rows = list[Measured]


def _prefill(results: Results, quant: str, mask: str) -> Rows:
    shapes = (f"prefill {quant} {mask} B {b} x {n} H 16/16 D 128" for b, n in _LENGTHS)
    return _known(results.get("paged_attention", shape) for shape in shapes)


def _decode(
    results: Results, quants: Iterable[str], *cells: tuple[int, int], mqa: bool = False
) -> Rows:
    heads = "16/1" if mqa else "32/8"
    return _known(
        decode_row(results, quant, (batch, str(context), heads))
        for quant in quants
        for batch, context in cells
    )


def _known(rows: Iterable[Measured | None]) -> Rows:
    return [row for row in rows if row]


def _of_peer(*starts: str) -> Callable[[Rows], str]:
    return lambda rows: span((row.ratio(*starts) for row in rows), ratio)


def _of_fastest(rows: Rows) -> str:
    """Speed over the fastest peer of the same work."""
    return span((rival.ratio for row in rows if (rival := fastest(row))), ratio)


def _beside(rows: Rows, notes: Notes) -> str:
    """Who the fastest peers of rows are."""
    found = {r.peer.label: notes.of(row, r.peer) for row in rows if (r := fastest(row))}
    return " or ".join(label + mark for label, mark in found.items()) or "none timed"


def _of_read(rows: Rows) -> str:
    return span((row.ratio(READ) for row in rows), percent) + " %"


def _us(rows: Rows) -> str:
    return span((row.us for row in rows), digits) + " us"


def _block_wise(results: Results) -> tuple[Rows, str]:
    """Rows of block_wise_fp8, and their speed relative to cache_fp8 at the same shape."""
    pairs = [
        (mine, other)
        for mask in ("causal", "full")
        for mine in _prefill(results, "block_wise_fp8", mask)
        for other in [results.get(mine.op, mine.shape.replace("block_wise_fp8", "cache_fp8"))]
        if other
    ]
    return [mine for mine, _ in pairs], span((b.us / a.us for a, b in pairs), ratio)


def _goals(results: Results, notes: Notes) -> list[tuple[str, str, Rows, str]]:
    """Description, goal, the rows that measure it, and the measured value."""
    short, long = ((1, 8192),), ((1, 131072),)
    static, dynamic = EIGHT_BITS[:2], EIGHT_BITS[2:]
    shapes = ((b, n) for b in (1, 16, 64, 128) for n in (1024, 8192, 32768))
    bf16 = [row for row in _decode(results, ["none"], *shapes) if fastest(row)]
    chunks = {
        q: _known(
            results.find("paged_attention", rf"\d+ x 2048 behind \d+, {q} q, block_wise_fp8, .*")
        )
        for q in ("bf16", "e4m3")
    }
    causal, full = (_prefill(results, "cache_fp8", mask) for mask in ("causal", "full"))
    block_wise, of_static = _block_wise(results)
    ranks = results.find("paged_attention_dcp", r"decode \w+ B 1 ctx 1048576 .*, 2 ranks, graph")
    listed: list[tuple[str, str, Rows, Callable[[Rows], str]]] = [
        (f"FP8 prefill, causal, over the fastest peer: {_beside(causal, notes)}", "0.97",
         causal, _of_fastest),
        (f"the same, no mask: {_beside(full, notes)}", "0.92", full, _of_fastest),
        ("`block_wise_fp8` prefill over `cache_fp8`", "0.93", block_wise, lambda _: of_static),
        (f"bf16 decode over the fastest peer, 1 to 128 x 1k to 32k: {_beside(bf16, notes)}", "1.00",
         bf16, _of_fastest),
        ("decode 128 x 8k, scales of heads", "735 us (H100)",
         _decode(results, static, (128, 8192)), _us),
        ("decode 128 x 8k, scales of tokens", "755 us (H100)",
         _decode(results, dynamic, (128, 8192)), _us),
        ("decode 128 x 8k and 32k, 8 bits, of a read", "93 % (H200)",
         _decode(results, EIGHT_BITS, (128, 8192), (128, 32768)), _of_read),
        ("decode, heads 16/1, 64 x 8k, 8 bits, of a read", "80 %",
         _decode(results, EIGHT_BITS, (64, 8192), mqa=True), _of_read),
        ("decode 64 x 1k, 8 bits, of a read", "80 %",
         _decode(results, EIGHT_BITS, (64, 1024)), _of_read),
        ("decode 16 x 8k, 8 bits, of a read", "88 %",
         _decode(results, EIGHT_BITS, (16, 8192)), _of_read),
        ("decode 1 x 8k, 8 bits", "13 us", _decode(results, EIGHT_BITS, *short), _us),
        ("decode 1 x 128k, 8 bits, of a read", "88 %",
         _decode(results, EIGHT_BITS, *long), _of_read),
        ("chunk of 2048 behind 6k to 64k, bf16 queries, over writing and reading bf16 keys", "1.2",
         chunks["bf16"], _of_peer("writing bf16")),
        ("the same, e4m3 queries", "1.5", chunks["e4m3"], _of_peer("writing bf16")),
        ("decode of 1M keys on two GPUs over one", "1.85", ranks, _of_peer("one rank")),
    ]  # fmt: skip
    return [(what, goal, rows, tell(rows) if rows else "-") for what, goal, rows, tell in listed]


def targets(results: Results) -> str:
    """Goals and results of an H100 and an H200."""
    others = Results.read(Path(results.folder), ("h200-*.json",))
    lines, used, notes = [], [], Notes()
    pairs = zip(_goals(results, notes), _goals(others, notes))
    for (what, goal, rows, here), (_, _, more, there) in pairs:
        lines.append([what, goal, here if _on(rows, "H100") else "-", there])
        used += rows + more
    return grid(["", "goal", "H100", "H200"], lines) + notes.text() + "\n" + links(used)


def _on(rows: Rows, gpu: str) -> bool:
    return any(gpu in row.machine.get("gpu", "") for row in rows)
