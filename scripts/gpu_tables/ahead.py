"""Where peers are ahead: every row beside the fastest peer of the same work, by kind of call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from gpu_tables.attention import prefill_row
from gpu_tables.peers import EMPTY_US, Notes, Rival, fastest, rivals
from gpu_tables.results import NONE, Measured, Results, grid, links, ratio, span

#: Kind of call, its operators, what their shapes contain.
KINDS = (
    ("decode", "paged_attention", "^decode .* D 128$"),
    ("prefill, 8-bit cache, e4m3 queries", "paged_attention", "^prefill (cache|block_wise)_fp8 "),
    ("prefill, contiguous e4m3", "flash_attention", "^prefill e4m3 .* D 128$"),
    ("prefill, bf16 cache", "paged_attention", "^prefill bf16 q, bf16 .* D 128$"),
    ("prefill, contiguous bf16", "flash_attention", "^prefill bf16 q, bf16 .* D 128$"),
    ("prefill, other head dimensions, an older run", "flash_attention", "^prefill .* D (?!128$)"),
    ("a layer's step", "layer step", ", graph$"),
    ("`mla_attention`", "mla_attention", ""),
    ("`mla_sparse_attention`", "mla_sparse_attention", ""),
    ("a DeepSeek layer's step, vLLM's parts", "sparse step", "parts of vLLM, (graph|eager)$"),
    ("a part of a DeepSeek layer's step", "sparse step", "(?<!graph)(?<!eager)$"),
    ("`mqa_logits`", "mqa_logits", ""),
    ("`paged_mqa_logits`", "paged_mqa_logits", ""),
    ("`topk_indices`", "topk_indices", ""),
    ("`indexer_topk`, `paged_indexer_topk`", "(paged_)?indexer_topk", ""),
    ("`write_cache_kv`, `rope_write_cache_kv`", "(rope_)?write_cache_kv", ""),
    ("writers of latent caches", "mla_(write_cache|qkv_norm_rope_write)", ""),
    ("`indexer_q_rope_quant`", "indexer_q_rope_quant", ""),
    ("`merge_attn_states`", "merge_attn_states, fused", ""),
    ("host time of a call", "host", ""),
)  # fmt: skip


class Found(NamedTuple):
    """Rows of a kind of call that stand beside a peer of the same work, the slowest first."""

    label: str
    pairs: list[tuple[Rival, Measured]]

    @property
    def behind(self) -> int:
        """In how many the peer is ahead."""
        return sum(rival.ratio < 1 for rival, _ in self.pairs)

    @property
    def behind_as_measured(self) -> int:
        """Likewise by times without a correction."""
        return sum(rival.as_measured < 1 for rival, _ in self.pairs)


def beside(results: Results, label: str, op: str, shape: str) -> Found:
    """Rows of a kind beside their fastest peers."""
    rows = [
        row
        for row in results.rows()
        if re.fullmatch(op, row.op) and re.search(shape, row.shape) and "cpu-" not in row.file
    ]
    pairs = [(rival, row) for row in rows if (rival := fastest(row))]
    return Found(label, sorted(pairs, key=lambda pair: (pair[0].ratio, pair[1].shape)))


def kinds(results: Results) -> list[Found]:
    """Every kind of call that has a row beside a peer, the slowest first."""
    found = [beside(results, *kind) for kind in KINDS]
    return sorted((x for x in found if x.pairs), key=lambda x: x.pairs[0][0].ratio)


def ahead(results: Results) -> str:
    """A line for each kind of call: how often a peer is ahead, and where most."""
    notes, lines, used = Notes(), [], []
    for found in kinds(results):
        rival, row = found.pairs[0]
        count = str(found.behind)
        if found.behind != found.behind_as_measured:
            count += f" ({found.behind_as_measured} as measured)"
        shape = row.shape.removesuffix(", graph")
        lines.append([
            found.label, str(len(found.pairs)), count, f"{ratio(rival.ratio)}: `{shape}`",
            rival.peer.label + notes.of(row, rival.peer),
        ])  # fmt: skip
        used += [row for _, row in found.pairs]
    head = ["calls on an H100", "rows beside a peer", "a peer is ahead in",
            "least speed over the fastest peer", "which is"]  # fmt: skip
    return grid(head, lines or [[NONE] * len(head)]) + notes.text() + "\n" + links(used)


def latent(results: Results) -> tuple[list[Rival], list[Rival]]:
    """Calls of latent attention beside FlashMLA: over the same keys, and over bf16 keys instead."""
    rows = [
        row for op in ("mla_attention", "mla_sparse_attention") for row in results.find(op, ".*")
    ]
    same = [rival for row in rows if (rival := fastest(row))]
    other = [rival for row in rows for rival in rivals(row, other_work=True)[:1]]
    return same, other


def _of_kinds(found: Sequence[Found], *starts: str) -> list[tuple[Rival, Measured]]:
    return [pair for x in found if x.label.startswith(starts) for pair in x.pairs]


#: What the README says of kinds of call: the words, and the starts of their labels.
_TOLD = (
    ("calls of FP8 prefill", ("prefill, 8-bit", "prefill, contiguous e4m3")),
    ("calls of bf16 prefill", ("prefill, bf16", "prefill, contiguous bf16")),
    ("steps of a layer", ("a layer's step",)),
    ("decode calls that a peer was timed beside", ("decode",)),
    ("calls of the indexer's logits and top-k",
     ("`mqa", "`paged_mqa", "`topk", "`indexer_topk")),
    ("parts of a DeepSeek layer's step", ("a part of",)),
    ("host times", ("host",)),
)  # fmt: skip


def behind(results: Results) -> str:
    """Where peers are ahead, in sentences."""
    found, parts = kinds(results), []
    for words, starts in _TOLD:
        pairs = _of_kinds(found, *starts)
        slower = sorted((p for p in pairs if p[0].ratio < 1), key=lambda pair: pair[0].ratio)
        if slower:
            least, measured = slower[0][0], sum(p[0].as_measured < 1 for p in pairs)
            told = f"{measured} by uncorrected times; " * (measured != len(slower))
            told += f"least {ratio(least.ratio)}, beside {least.peer.label}"
            parts.append(f"{len(slower)} of {len(pairs)} {words} ({told})")
    sentences = [f"The fastest peer of the same work is ahead in {', '.join(parts)}"] * bool(parts)
    same, other = latent(results)
    slow = [x for x in (*same, *other) if x.ratio < 1]
    if slow:
        measured = sum(x.as_measured < 1 for x in (*same, *other))
        text = f"{len(slow)} of {len(same) + len(other)} calls of latent attention are slower than"
        least = min(slow, key=lambda rival: rival.ratio)
        text += f" FlashMLA less an empty kernel of {EMPTY_US} us ({measured} with it; least"
        text += f" {ratio(least.ratio)}, beside {least.peer.label}"
        text += f", {least.peer.differs[0]})" if least.peer.differs else ")"
        if other:
            text += f". In {len(other)} of them FlashMLA attends to bf16 keys, ours to 656 bytes"
        sentences.append(text)
    shares = []
    for prompts in ((16, 1024, "16/16"), (4, 4096, "16/16"), (1, 16384, "16/16")):
        pair = [
            prefill_row(results, "paged_attention", f"bf16 q, {name}", prompts)
            for name in ("block_wise_fp8", "bf16")
        ]
        shares.append(pair[1].us / pair[0].us if pair[0] and pair[1] else None)
    if any(shares):
        text = "Prefill over `block_wise_fp8` with bf16 queries has"
        sentences.append(f"{text} {span(shares, ratio)} of the speed of a bf16 cache")
    if not sentences:
        return NONE
    return (
        f"{'. '.join(sentences)}. [All kinds of calls](ROOT/docs/gpu.md#beside-the-fastest-peer)."
    )
