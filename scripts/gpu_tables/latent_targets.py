"""The table of goals of latent attention and of the indexer's logits, with results of an H100."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gpu_tables.latent import MISSING
from gpu_tables.peers import EMPTY_US, Notes, alike, fastest
from gpu_tables.results import (
    COPY,
    NONE,
    Measured,
    Results,
    digits,
    grid,
    links,
    percent,
    ratio,
    span,
)

Rows = list[Measured]
_SPARSE, _DENSE, _WRITE = "mla_sparse_attention", "mla_attention", "mla_write_cache"
_CHUNKS, _PAGED = "mqa_logits", "paged_mqa_logits"
_EMPTY = f"Its times less an empty kernel of {EMPTY_US} us. What its flush of the L2 cache costs is"
_EMPTY += " still in them"
_ALIKE = "Both sides launched alike, with the empty kernel in both"
_ALIKE += " ([how](ROOT/docs/experiments/merge_indexer.md#pages-again))"
#: Products of a key and a row: scores over 576 channels, outputs over 512.
_PRODUCTS = 576 + 512


def _known(rows: Iterable[Measured | None]) -> Rows:
    return [row for row in rows if row]


def _us(rows: Rows) -> str:
    return span((row.us for row in rows), digits) + " us"


def _rates(rows: Rows) -> str:
    return span((row.rate for row in rows), "{:.0f}".format)


def _of(*peers: str) -> Callable[[Rows], str]:
    return lambda rows: span((row.ratio(*peers) for row in rows), ratio)


def _of_fastest(rows: Rows) -> str:
    return span((rival.ratio for row in rows if (rival := fastest(row))), ratio)


def _of_copy(rows: Rows) -> str:
    return span((row.ratio(COPY) for row in rows), percent) + " %"


def _decode(results: Results, size: int, batch: int, queries: str, heads: str, top: str) -> Rows:
    return results.find(
        _SPARSE, rf"decode {size} B, batch {batch}, {queries} queries, H {heads}, top {top}"
    )


def _steps(results: Results, batch: int, keys: int, heads: str, kinds: str) -> Rows:
    return results.find(_DENSE, rf"{heads} heads, batch {batch}, {keys}k keys, {kinds}")


def _teraflops(rows: Rows) -> str:
    """Rates of steps with 128 heads, 128 sequences and 32k keys."""
    work = 2 * 128 * 128 * 32 * 1024 * _PRODUCTS
    return span((work / row.us / 1e6 for row in rows), "{:.0f}".format)


def _logits(results: Results, notes: Notes) -> list[tuple[str, str, Rows, Callable[[Rows], str]]]:
    """Goals of the indexer's logits: every cell, because there are few shapes."""

    def one(row: Measured | None) -> str:
        rival = fastest(row)
        if row is None or rival is None:
            return NONE
        return ratio(rival.ratio) + (notes.mark(_ALIKE) if alike(row.op, row.shape) else "")

    def cells(op: str, shapes: Iterable[str]) -> tuple[Rows, Callable[[Rows], str]]:
        found = [results.get(op, shape) for shape in shapes]
        text = " / ".join(map(one, found))
        known = [rival for row in found if (rival := fastest(row))]
        if any(rival.verdict_changed for rival in known):
            measured = " / ".join(ratio(rival.as_measured) for rival in known)
            text += notes.mark(f"As measured: {measured}")
        return _known(found), lambda _: text

    def chunks(tokens: int) -> tuple[Rows, Callable[[Rows], str]]:
        return cells(_CHUNKS, [f"{tokens} tokens, {keys}k keys, fp8" for keys in (4, 32, 64)])

    def steps(queries: int) -> tuple[Rows, Callable[[Rows], str]]:
        many = [(batch, keys) for keys in (8, 64) for batch in (1, 16, 64, 128)]
        return cells(_PAGED, [f"batch {b}, {k}k keys, {queries} queries, fp8" for b, k in many])

    def of_fp8(rows: Rows) -> str:
        return ratio(rows[0].us / rows[1].us) if len(rows) == 2 else NONE

    over = f"over DeepGEMM{notes.mark(_EMPTY)}"
    last = [f"batch 128, 64k keys, 1 queries, {kind}" for kind in ("mxfp4", "fp8")]
    return [
        *((f"`mqa_logits`, FP8, {tokens} x 4k / 32k / 64k, {over}", "1.05", *chunks(tokens))
          for tokens in (2048, 4096)),
        (f"`paged_mqa_logits`, FP8, 1 / 16 / 64 / 128 x 8k, then x 64k, {over}", "1.00",
         *steps(1)),
        ("the same, two queries a sequence", "1.00", *steps(2)),
        ("`paged_mqa_logits`, MXFP4, 128 x 64k, of FP8's time", "0.62",
         _known(results.get(_PAGED, shape) for shape in last), of_fp8),
    ]  # fmt: skip


def latent_targets(results: Results) -> str:
    """Goals of latent attention and its writers, then of the indexer's logits."""
    notes = Notes()
    v4 = r"512 \+ 128"
    many = _known(
        results.get(_WRITE, f"T {n}, {kind}")
        for kind in ("bf16", "fp8", "fp8_656", "fp8_584")
        for n in (8192, 16384, 65536)
    )
    goals: list[tuple[str, str, Rows, Callable[[Rows], str]]] = [
        ("656 bytes, 128 x 1 and 128 x 2, 128 heads, 2048 keys, TFLOP/s", "400",
         _decode(results, 656, 128, "[12]", "128", "2048"), _rates),
        ("the same, 128 x 1, 64 heads", "110 us",
         _decode(results, 656, 128, "1", "64", "2048"), _us),
        ("16 and 8 heads", "75 us", _decode(results, 656, 128, "1", "(16|8)", "2048"), _us),
        ("1 x 1, 128 heads", "18 us", _decode(results, 656, 1, "1", "128", "2048"), _us),
        ("8 x 1, 128 heads", "30 us", _decode(results, 656, 8, "1", "128", "2048"), _us),
        ("584 bytes, 128 x 1, 64 heads, 512 + 128 keys", "48 us",
         _decode(results, 584, 128, "1", "64", v4), _us),
        ("the same, 16 heads", "26 us", _decode(results, 584, 128, "1", "16", v4), _us),
        (f"prompt of 4096 x 128 heads, `bf16`, over FlashMLA{notes.mark(_EMPTY)}", "1.05",
         results.find(_SPARSE, r"prefill bf16, .*"), _of_fastest),
        ("the same from 656 bytes, over ours of `bf16`", "0.95",
         results.find(_SPARSE, r"prefill fp8_656, .*"), _of("bf16 keys")),
        ("`mla_attention`, 16 heads, 128 x 32k, `bf16`, GB/s", "2905",
         _steps(results, 128, 32, "16", "bf16"), _rates),
        ("128 heads, TFLOP/s", "551", _steps(results, 128, 32, "128", "bf16"),
         _teraflops),
        ("the same, `fp8`, at an error of 4e-3, TFLOP/s", "692",
         _steps(results, 128, 32, "128", "fp8"), _teraflops),
        ("16 and 128 heads, 1 x 4k, `bf16` and 8 bits", "20 us",
         _steps(results, 1, 4, "(16|128)", ".*"), _us),
        ("`mla_write_cache`, 8192 tokens and more, of a copy", "90 %", many, _of_copy),
        *_logits(results, notes),
    ]  # fmt: skip
    used = [row for _, _, rows, _ in goals for row in rows]
    if not used:
        return MISSING
    lines = [[what, goal, tell(rows) if rows else "-"] for what, goal, rows, tell in goals]
    return grid(["", "goal", "H100"], lines) + notes.text() + "\n" + links(used)
