"""Whether the peers that pages name are the fastest of the same work, by the committed rows.

What a peer does is declared in ``scripts/gpu_tables/peers.py``; which of them is the fastest is
found here anew, from the JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from gpu_tables import ahead
from gpu_tables.peers import ALIKE, EMPTY_US, LAUNCHED_US, declared

#: Start of a line of the README's figures -> operator, shape.
FIGURES = {
    "decode, 64": ("paged_attention", "decode cache_fp8 B 64 ctx 8192 H 32/8 D 128"),
    "a layer's": ("layer step", "Qwen3-8B cache_fp8 decode 1 x 8k, graph"),
    "causal prefill": ("paged_attention", "prefill cache_fp8 causal B 4 x 4096 H 16/16 D 128"),
    "RoPE and": ("rope_write_cache_kv", "16384 tokens, KV 8, D 128, cache_fp8, H 32"),
    "host time": ("host", "paged_attention, 16 sequences, H 32/8 D 128"),
}
#: Start of a goal -> pattern of its shapes. Both are of `paged_attention`.
_EQUAL = "B (16 x 1024|8 x 2048|4 x 4096|2 x 8192|1 x 16384) H 16/16 D 128"
GOALS = {
    "FP8 prefill, causal": f"prefill cache_fp8 causal {_EQUAL}",
    "the same, no mask": f"prefill cache_fp8 full {_EQUAL}",
    "bf16 decode": r"decode none B (1|16|64|128) ctx (1024|8192|32768) H 32/8 D 128",
}
_NAMES = r"FlashMLA|DeepGEMM|cuDNN|FlashAttention-3|FastDeploy|vLLM|Triton"


class Best(NamedTuple):
    """A row's fastest peer of the same work."""

    label: str
    us: float
    ratio: float  # its time over ours
    as_measured: float  # likewise, without a correction


class Rows:
    """Rows of committed files, each from the newest run that has its peers."""

    def __init__(self, folder: Path, files: str) -> None:
        self.us: dict[tuple[str, str], float] = {}
        self.rates: dict[tuple[str, str], float | None] = {}
        self.peers: dict[tuple[str, str], dict[str, float]] = {}
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(files)]
        for report in sorted(reports, key=lambda x: x["machine"].get("date", "")):
            times: dict[tuple[str, str], dict[str, float]] = {}
            of_file = {(row["op"], row["shape"]): row for row in reversed(report["rows"])}
            for row in report["rows"]:
                found = times.setdefault((row["op"], row["shape"]), {})
                if row["peer"]:
                    found.setdefault(row["peer"], row["peer_us"])
            for key, row in of_file.items():
                if len(times[key]) >= len(self.peers.get(key, {})):
                    self.us[key], self.rates[key] = row["us"], row["rate"]
                    self.peers[key] = times[key]

    def matching(self, op: str, shape: str) -> Iterator[tuple[str, str]]:
        """Operator and shape of rows."""
        for key in self.us:
            if re.fullmatch(op, key[0]) and re.search(shape, key[1]):
                yield key

    def best(self, key: tuple[str, str], *, other_work: bool = False) -> Best | None:
        """The fastest peer of a row; None where the host hides its time."""
        found, times = [], dict(self.peers[key])
        lender = re.sub("^decode (cache_int8|block_wise_fp8|block_wise_int8) ",
                        "decode cache_fp8 ", key[1])  # fmt: skip
        if key[0] == "paged_attention":  # peers over e4m3 keys stand beside all types of 8 bits
            times |= self.peers.get((key[0], lender), {})
        for name, us in times.items():
            peer = declared(*key, name)
            if peer is not None and bool(peer.other_work) == other_work:
                found.append((us - EMPTY_US * peer.has_empty, us, peer))
        if not found:
            return None
        us, measured, peer = min(found, key=lambda x: x[0])
        if peer.by_call and measured < LAUNCHED_US:
            return None
        ours, ratio = self.us[key], us / self.us[key]
        match = re.fullmatch(r"batch (\d+), (\d+)k keys, 1 queries, fp8", key[1])
        if match and key[0] == "paged_mqa_logits":
            ratio = ALIKE.get((int(match[1]), int(match[2])), ratio)
        return Best(peer.label, us, ratio, measured / ours)


def table(page: str, name: str) -> list[list[str]]:
    """Cells of a generated table, without the marks of footnotes and without its head."""
    block = page.partition(f"<!-- table: {name} -->")[2].partition("<!-- end -->")[0]
    lines = re.sub(r"<sup>\d+</sup>", "", block).splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]


def wrong_figures(readme: str, rows: Rows) -> list[str]:
    """Lines of the README's figures beside another peer than the fastest."""
    wrong, lines = [], table(readme, "figures")
    for start, key in FIGURES.items():
        (line,) = (line for line in lines if line[0].startswith(start))
        best, match = rows.best(key), re.fullmatch(r"([\d.]+) \((.+)\)", line[2])
        rate = rows.rates[key] if "TFLOP/s" in line[0] else None
        value = best and (rate / best.ratio if rate else best.us)
        told = match and abs(float(match[1]) / value - 1) < 6e-3 if value else None
        if not best or not match or match[2] != best.label or not told:
            wrong.append(f"{line[0]}: {line[2]} instead of {best}")
    (count, of, measured) = re.search(  # type: ignore[union-attr]
        r"(\d+) of (\d+) calls of latent attention are slower than FlashMLA .*?\((\d+) with", readme
    ).groups()
    keys = list(rows.matching("mla_(sparse_)?attention", ""))
    found = [b for key in keys if (b := rows.best(key) or rows.best(key, other_work=True))]
    right = (sum(b.ratio < 1 for b in found), len(found), sum(b.as_measured < 1 for b in found))
    if (int(count), int(of), int(measured)) != right:
        wrong.append(f"latent attention: {count} of {of}, {measured} instead of {right}")
    return wrong


def wrong_goals(page: str, rows: Rows, more: Rows) -> list[str]:
    """Goals over another peer than the fastest, on both GPUs."""
    wrong = []
    for line in table(page, "targets"):
        shape = next((x for start, x in GOALS.items() if line[0].startswith(start)), None)
        if shape is None:
            if re.search(_NAMES, line[0]):
                wrong.append(f"{line[0]}: names a peer")
            continue
        labels, cells = set(), []
        for of_gpu in (rows, more):
            keys = of_gpu.matching("paged_attention", f"^{shape}$")
            found = [best for key in keys if (best := of_gpu.best(key))]
            labels |= {best.label for best in found}
            ratios = [best.ratio for best in found]
            cells.append(f"{min(ratios):.2f}-{max(ratios):.2f}")
        if line[0].rpartition(": ")[2] != " or ".join(sorted(labels)) or line[2:4] != cells:
            wrong.append(f"{line[0]}: {line[2:4]} instead of {labels}, {cells}")
    return wrong


def wrong_kinds(page: str, rows: Rows) -> list[str]:
    """Kinds of calls whose counts or slowest row are not beside the fastest peers."""
    wrong, lines = [], {line[0]: line for line in table(page, "ahead")}
    for label, op, shape in ahead.KINDS:
        found = [(best, key) for key in rows.matching(op, shape) if (best := rows.best(key))]
        if not found:
            continue
        least, key = min(found, key=lambda x: (x[0].ratio, x[1][1]))
        behind = sum(best.ratio < 1 for best, _ in found)
        measured = sum(best.as_measured < 1 for best, _ in found)
        count = f"{behind}" + f" ({measured} as measured)" * (measured != behind)
        slowest = f"{least.ratio:.2f}: `{key[1].removesuffix(', graph')}`"
        right = [label, str(len(found)), count, slowest, least.label]
        if lines.pop(label, None) != right:
            wrong.append(f"{label}: expected {right}")
    return wrong + [f"{label}: no such kind" for label in lines]


def peers_in_prose(page: str) -> list[str]:
    """Sentences outside generated tables that give a peer a figure."""
    text = re.sub(r"<!-- table: .*?<!-- end -->|```.*?```", "", page, flags=re.S)
    figure = r"\d ?(us|ms|GB/s|TFLOP/s|%|times|x\b)|\bslightly\b|\bahead\b|\bfaster\b|\bslower\b"
    sentences = re.split(r"(?<=\.) |\n", text)
    return [x for x in sentences if re.search(_NAMES, x) and re.search(figure, x)]
