"""Tables for a choice: the cache types in comparison, and the gain from the plug-in."""

from __future__ import annotations

import json
from pathlib import Path

from gpu_tables.attention import (
    FASTDEPLOY,
    GATHERED,
    MIXED_STEP,
    STEPS,
    decode_row,
    prefill_row,
    right,
    step_rows,
)
from gpu_tables.results import NONE, Results, cell, grid, links, ratio, span

#: Bytes of K and V, including scales, per token and KV head of 128 channels.
_BYTES = {
    "none": 512,
    "cache_fp8": 256,
    "cache_int8": 256,
    "block_wise_fp8": 256 + 2 * 4,
    "block_wise_int8": 256 + 2 * 4,
    "block_wise_int4": 128 + 2 * 4,
    "block_wise_mxfp4": 128 + 2 * 4,  # four exponents of one byte each
    "block_wise_k8v4": 128 + 64 + 2 * 4,
    "block_wise_kfp8v4": 128 + 64 + 2 * 4,
}
_KV_HEADS = 8
_PROMPTS = (4, 4096, "16/16")


def _perplexity(folder: Path) -> dict[str, str]:
    """The demo's perplexity of each type relative to `none`."""
    path = folder / "experiments" / "demo.json"
    if not path.exists():
        return {}
    report = json.loads(path.read_text(encoding="utf-8"))
    rows = next(s for s in report["sections"] if s["heading"] == "The table")["tables"][0]["rows"]
    return {name: f"{more:+.3f} %" for name, _, _, more, _ in rows}


def cache_types(results: Results) -> str:
    """Bytes, speed and the demo's perplexity of every type. All times are from one machine."""
    rows = Results.read(Path(results.folder), ("h100-decode.json", "h100-prefill.json"))
    quality = _perplexity(Path(results.folder))
    lines, used = [], []
    for quant, size in _BYTES.items():
        sixteen = "bf16" if quant == "none" else quant
        found = [
            decode_row(rows, quant, (64, "8192", "32/8")),
            prefill_row(rows, "paged_attention", f"bf16 q, {sixteen}", _PROMPTS),
            prefill_row(rows, "paged_attention", quant, _PROMPTS),
        ]
        decoded, *prompts = found
        lines.append(
            [
                f"`{quant}`",
                str(size * _KV_HEADS),
                cell(decoded and decoded.us, "{:.0f}".format),
                *(cell(row and row.rate, "{:.0f}".format) for row in prompts),
                quality.get(quant, NONE),
            ]
        )
        used += found
    head = ["type", "bytes a token and layer", "decode, us", "prefill, bf16 queries, TFLOP/s",
            "prefill, e4m3 queries, TFLOP/s", "perplexity of the demo's model"]  # fmt: skip
    return grid(head, lines) + "\n" + links(used)


#: FastDeploy's `kv_cache_quant_type` -> the type.
_CONFIGURED = {
    "none": "none",
    "`int8`": "cache_int8",
    "`float8_e4m3fn`": "cache_fp8",
    "`block_wise_fp8`": "block_wise_fp8",
}


def gain(results: Results) -> str:
    """A layer's step against FastDeploy's own operators."""
    lines, used = [], []
    for label, quant in _CONFIGURED.items():
        decode = step_rows(results, quant, STEPS[:-1], "graph")
        mixed = step_rows(results, quant, [MIXED_STEP], "graph")
        lines.append(
            [
                label,
                span((right(row, FASTDEPLOY) for row in decode), ratio),
                span((right(row, FASTDEPLOY) for row in mixed), ratio),
                span((right(row, GATHERED) for row in mixed), ratio),
            ]
        )
        used += [*decode, *mixed]
    head = ["`kv_cache_quant_type`", "decode, `APPEND_ATTN`", "mixed step, `APPEND_ATTN`",
            "mixed step, `FLASH_ATTN`"]  # fmt: skip
    return grid(head, lines) + "\n" + links(used)
