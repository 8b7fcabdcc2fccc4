"""Tables of memory-bound operators: caches, merge, indexer, quantisation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from gpu_tables.peers import CORRECTED, EMPTY_US, Notes, alike, fastest, shown
from gpu_tables.results import (
    NONE,
    READ,
    Measured,
    Results,
    cell,
    digits,
    grid,
    links,
    mean,
    percent,
    ratio,
    span,
    two_digits,
)

_WRITTEN = ("none", "cache_fp8", "block_wise_fp8", "cache_int8")
_PROMPTS = (("8k", "batch 1 x 8192"), ("16k", "batch 8 x 2048"), ("32k", "batch 1 x 32768"),
            ("64k", "batch 1 x 65536"))  # fmt: skip
_EIGHT_BITS = "(?:cache_int8|cache_fp8|block_wise_fp8)"
Line = tuple[str, str, Sequence[str]]


def _patterns() -> list[Line]:
    """Label, operator, and pattern of the shapes of each part of a row."""
    prompts, batches = [p for _, p in _PROMPTS], ("batch 1 x 1", "batch 64 x 1", "batch 256 x 1")
    sizes = " / ".join(name for name, _ in _PROMPTS)
    lines: list[Line] = [
        ("`append_cache_kv_c8`, 32k / 256k tokens, all types and layouts", "append_cache_kv_c8",
         [f"{k}k tokens, .*" for k in (32, 256)]),
    ]  # fmt: skip
    for quant in _WRITTEN:
        label = f"`write_cache_kv` `{quant}`, {sizes} tokens"
        lines.append((label, "write_cache_kv", [f"{p} new, .*, {quant}" for p in prompts]))
    for q, what in (("none", "bf16"), ("per_token_head", "e4m3 with measured scales")):
        for quant in _WRITTEN:
            label = f"`rope_write_cache_kv` `{quant}`, Q in {what}, the same"
            shapes = [f"{p} new, H.*, {quant}, q {q}" for p in prompts]
            lines.append((label, "rope_write_cache_kv", shapes))
    return [
        *lines,
        ("`rope_write_cache_kv` decode, batch 1 / 64 / 256, all types", "rope_write_cache_kv",
         [f"{b} new, H.*" for b in batches]),
        ("`write_cache_kv` decode, batch 1 / 64 / 256, all types", "write_cache_kv",
         [f"{b} new, .*" for b in batches]),
        ("`convert_cache_layout`, 16384 blocks", "convert_cache_layout", ["16384 blocks, .*"]),
        ("`convert_cache_blocks`, the same in place, in ranges of 2048 / 256",
         "convert_cache_blocks", [f"16384 blocks, .* of {n}" for n in (2048, 256)]),
        *((f"`gqa_rope_write_cache` (compat), {what}: 1 x 8192 / 8 x 2048 / 4 x 2048 behind 6144"
           " / 1 x 2048 and 64 decode tokens", "gqa_rope_write_cache",
           [f"{quant}, {steps}, H.*" for steps in
            ("1 x 8192 prefill", "8 x 2048 prefill", "4 x 2048 prefill after 6144",
             "1 x 2048 prefill, 64 x 1 decode")])
          for what, quant in (("`none`", "none"), ("8 bits", _EIGHT_BITS))),
        ("`merge_prefill_decode_output` (compat), 64 x 1 / 256 x 1 / 512 x 8 decode tokens",
         "merge_prefill_decode_output",
         [f".*, {n} decode, H.*" for n in ("64 x 1", "256 x 1", "512 x 8")]),
        ("`quantize_fp8` 16384 x 8192, group / token / tensor", "quantize_fp8",
         [f"16384 x 8192 bf16, {g}" for g in ("group", "token", "tensor")]),
        *((f"`{op}`, 32 / 64 / 128 / 512 MiB of bf16", op,
           [f".* bf16, {n} MiB" for n in (32, 64, 128, 512)])
          for op in ("mxfp4_quantize", "mxfp4_dequantize")),
        *((f"`indexer_q_rope_quant` {quant}, H 64, 1 / 1024 / 4096 / 16384 tokens",
           "indexer_q_rope_quant",
           [f"T {t}, H 64, {quant}" for t in (1, 1024, 4096, 16384)])
          for quant in ("fp8", "mxfp4")),
        *((f"`indexer_kv_compress_insert` {quant}, 16384 tokens, ratio 4 / 128",
           "indexer_kv_compress_insert", [f"16384 tokens, ratio {n}, {quant}" for n in (4, 128)])
          for quant in ("fp8", "mxfp4", "fp8_512")),
        *((f"`indexer_k_write_cache` {quant}, 1 / 4096 / 65536 tokens", "indexer_k_write_cache",
           [f"T {t}, {quant}" for t in (1, 4096, 65536)]) for quant in ("fp8", "mxfp4")),
        ("`indexer_k_gather`, all sizes and formats", "indexer_k_gather", [".*"]),
        *((f"`{op}`, all sizes", op, [".*"])
          for op in ("topk_to_slots", "window_indices", "short_context_indices",
                     "combine_topk_window")),
        *((f"`mla_write_cache` {name}, 1 / 8192 / 65536 tokens", "mla_write_cache",
           [f"T {t}, {name}" for t in (1, 8192, 65536)])
          for name in ("bf16", "fp8", "fp8_656", "fp8_584")),
        *((f"`mla_gather_cache` {name}, 16 x 512 / 16 x 4096 tokens", "mla_gather_cache",
           [f"16 x {t}, {name}" for t in (512, 4096)])
          for name in ("bf16", "fp8", "fp8_656", "fp8_584")),
        ("`mla_write_cache` fp8_656, scales of vLLM, the same", "mla_write_cache",
         [f"T {t}, fp8_656, amax" for t in (1, 8192, 65536)]),
        *((f"`{op}`, {heads} heads, 1 / 1024 / 4096 / 16384 tokens", op,
           [f"T {t}, H {heads}" for t in (1, 1024, 4096, 16384)])
          for op in ("mla_qkv_norm_rope_write", "inverse_rope_quantize_fp8")
          for heads in (8, 16, 64)),
        *((f"`save_partial_states` {what}, 1 / 1024 / 16384 tokens", "save_partial_states",
           [f"T {t}, HEAD {head}, ratio {n}" for t in (1, 1024, 16384)])
          for what, head, n in (("of keys, ratio 4", 512, 4), ("of keys, ratio 128", 512, 128),
                                ("of index keys", 128, 4))),
        *((f"`merge_attn_states` to e4m3, {dtype}{what}, 1 x 4 / 256 x 32 / 1024 x 64 / 4096 x 128"
           " tokens x heads, cold", f"merge_attn_states, {variant}",
           [f"{t} tokens, H {h}, D 128, {dtype} to e4m3, cold"
            for t, h in ((1, 4), (256, 32), (1024, 64), (4096, 128))])
          for dtype, what, variant in (("bfloat16", "", "fused"), ("float32", "", "fused"),
                                       ("bfloat16", ", measured scales", "fused dynamic"))),
    ]  # fmt: skip


def _joined(groups: Iterable[str]) -> str:
    texts = list(groups)
    return " / ".join(texts) if set(texts) != {NONE} else NONE


def operators(results: Results) -> str:
    """Times and fractions of a copy; decode steps in launches of an empty kernel."""
    lines, used = [], []
    for label, op, patterns in _patterns():
        groups = [results.find(op, pattern) for pattern in patterns]
        if not any(groups):
            continue
        us = _joined(span((row.us for row in rows), digits) for rows in groups)
        if "decode, batch" in label:
            empty = [
                [row.us / row.machine["empty_kernel_us"] for row in rows if row.machine]
                for rows in groups
            ]
            share = _joined(span(x, "{:.1f}".format) for x in empty) + " empty kernels"
        else:
            share = _joined(span((row.of_copy() for row in rows), percent) for rows in groups)
        lines.append([label, us, share])
        used += [row for rows in groups for row in rows]
    head = ["operator, shape (H 32, KV 8, D 128)", "us", "% of a copy"]
    return grid(head, lines) + "\n" + links(used)


_OPTIONS = {
    "norm": "qk-norm, before the rotation",
    "norm after": "after it",
    "bias": "bias",
    "norm and bias": "norm and bias",
    "half rotated": "half of the channels rotated",
    "half rotated, norm and bias": "that, norm and bias",
    "a table for each sequence": "a table for each sequence",
}
#: Label, cache types, form of the returned Q, and steps, as patterns.
_OPTION_STEPS = (
    ("prompts of 8k to 64k, Q in bf16", r"\w+", "none", r"1 x \d{4,}"),
    ("the same, Q in e4m3, `none` and static caches", r"(?:none|cache_\w+)", "per_token_head",
     r"1 x \d{4,}"),
    ("the same, Q in e4m3, `block_wise_*`", r"block_wise_\w+", "per_token_head", r"1 x \d{4,}"),
    ("decode, batch 1", r"\w+", r"\w+", "1 x 1"),
    ("decode, batch 64", r"\w+", r"\w+", "64 x 1"),
    ("decode, batch 256", r"\w+", r"\w+", "256 x 1"),
)  # fmt: skip


def rope_options(results: Results) -> str:
    """Times relative to the plain step of the same run."""
    lines, used = [], []
    for label, quants, q_quant, steps in _OPTION_STEPS:
        line = [label]
        for option in _OPTIONS:
            pattern = f"{quants}, q {q_quant}, batch {steps} new, {option}"
            rows = results.find("rope_write_cache_kv", pattern)
            shares = [1 / share for row in rows if (share := row.ratio("rotation alone"))]
            line.append(span(shares, ratio))
            used += rows
        lines.append(line)
    return grid(["steps", *_OPTIONS.values()], lines) + "\n" + links(used)


_KEY_STEPS = ("1 x 1", "16 x 1", "64 x 1", "256 x 1", "1 x 8192")
_KEY_TYPES = ("block_wise_int4", "block_wise_int8", "block_wise_fp8", "cache_fp8")
_KEY_TRANSFORMS = ("K as it is", "centred and rotated", "centred, rotated, with feedback")


def key_transforms(results: Results) -> str:
    """Times of rope_write_cache_kv by what is done to K."""
    lines, used = [], []
    for quant in _KEY_TYPES:
        for transform in _KEY_TRANSFORMS:
            rows = [
                results.get("rope_write_cache_kv", f"{quant}, batch {step} new, {transform}")
                for step in _KEY_STEPS
            ]
            lines.append(
                [f"`{quant}`, {transform}", *(cell(row and row.us, digits) for row in rows)]
            )
            used += rows
    return grid(["us; sequences x new tokens", *_KEY_STEPS], lines) + "\n" + links(used)


def cache_writers(results: Results) -> str:
    """Both writers against vLLM's kernels."""
    tokens, lines, used = (1, 16, 128, 1024, 4096, 16384), [], []
    for op, what, peer, theirs in (
        ("write_cache_kv", "", "vllm reshape_and_cache_flash", "`reshape_and_cache_flash`"),
        ("rope_write_cache_kv", ", H 32", "vllm rope", "`rotary_embedding`, then that"),
        ("rope_write_cache_kv", ", H 64", "vllm rope", "the same two kernels"),
    ):
        shapes = [f"{n} tokens, KV 8, D 128, cache_fp8{what}" for n in tokens]
        rows = [results.get(op, shape) for shape in shapes]
        lines += [
            [f"`{op}`{what}", *(cell(row and row.us, digits) for row in rows)],
            [theirs, *(cell(row and row.peer_us(peer), digits) for row in rows)],
            ["faster by", *(_times(row and row.ratio(peer), 1) for row in rows)],
        ]
        used += rows
    return grid(["us; tokens", *map(str, tokens)], lines) + "\n" + links(used)


def _times(value: float | None, places: int = 2) -> str:
    return NONE if value is None else f"{value:.{places}f}x"


#: Label, names of the peer.
_MERGE_PEERS = (
    ("merge, then quantise (own kernels)", ("merge, then quantize_fp8",)),
    ("vLLM CUDA, without the LSE that ours writes", ("vLLM CUDA", "vllm_cuda_fused")),
    ("vLLM CUDA, with the LSE", ("vLLM CUDA, LSE too",)),
    ("vLLM CUDA, merge and quantisation", ("vllm_cuda_unfused",)),
    ("vLLM Triton, without the LSE", ("vLLM Triton", "vllm_triton_fused")),
    ("vLLM Triton, with the LSE", ("vLLM Triton, LSE too",)),
)
_SMALL = 10e6  # bytes


def _merge_bytes(shape: str) -> int:
    match = re.match(r"(\d+) tokens, H (\d+), D (\d+), (\w+) to e4m3", shape)
    assert match, shape
    tokens, heads, dim = (int(match[i]) for i in (1, 2, 3))
    return tokens * heads * (dim * (2 * (4 if match[4] == "float32" else 2) + 1) + 12)


def merge(results: Results) -> str:
    """Geometric means over all shapes."""
    fused, lines, used = "merge_attn_states, fused", [], []
    for label, names in _MERGE_PEERS:
        ratios: dict[str, dict[str, float]] = {"warm": {}, "cold": {}}
        for state, of_state in ratios.items():
            for row in results.find(fused, f".* to e4m3, {state}"):
                times = [row.peers[name] for name in names if name in row.peers]
                if times:
                    of_state[row.shape] = times[0] / row.us
                    used.append(row)
        if not ratios["warm"]:
            continue
        small = [
            mean([x for shape, x in of.items() if _merge_bytes(shape) < _SMALL])
            for of in ratios.values()
        ]
        means = [mean(list(of_state.values())) for of_state in ratios.values()]
        least = min((x for of_state in ratios.values() for x in of_state.values()), default=None)
        count = len(ratios["warm"])
        lines.append([label, str(count), _joined(map(_times, means)),
                      _joined(map(_times, small)), _times(least, 3)])  # fmt: skip
    head = ["fused merge to e4m3, D 128, against", "shapes", "geometric mean, warm / cold",
            "of those below 10 MB", "least"]  # fmt: skip
    return grid(head, lines) + "\n" + links(used)


def indexer_queries(results: Results) -> str:
    """The indexer's queries against vLLM's kernel."""
    tokens = (1, 7, 32, 128, 512, 1024, 4096, 16384)
    rows = [results.get("indexer_q_rope_quant", f"T {n}, H 64, fp8") for n in tokens]
    others = [row and row.peer_us("vLLM Triton", "vllm triton") for row in rows]
    lines = [
        ["us", *(cell(row and row.us, digits) for row in rows)],
        ["vLLM Triton, us", *(cell(us, digits) for us in others)],
    ]
    head = ["`indexer_q_rope_quant` fp8, H 64, tokens", *map(str, tokens)]
    return grid(head, lines) + "\n" + links(rows)


#: Heading, prefix of the peer's name.
_TOPK_PEERS = (
    ("vLLM `persistent_topk`", "vllm persistent"),
    ("`cooperative_topk`", "vllm cooperative"),
    ("`top_k_per_row_prefill`", "vllm top_k_per_row_prefill"),
    ("`top_k_per_row_decode`", "vllm top_k_per_row_decode"),
    ("`torch.topk`", "torch.topk"),
)


def topk(results: Results) -> str:
    """Selections against one read and against peers."""
    normal = results.find("topk_indices", r"\d+ x \d+k, k \d+, normal")
    lines = []
    for row in normal:
        zeros = results.get("topk_indices", row.shape.replace("normal", "zeros"))
        lines.append([
            row.shape.removesuffix(", normal"),
            digits(row.us), cell(row.ratio(READ), percent), cell(zeros and zeros.us, digits),
            *(cell(row.peer_us(start), digits) for _, start in _TOPK_PEERS),
        ])  # fmt: skip
    head = ["rows x columns", "us", "% of reading once", "us, three quarters zeros",
            *(heading for heading, _ in _TOPK_PEERS)]  # fmt: skip
    return grid(head, lines) + "\n" + links(normal)


def _beside_mxfp4(
    results: Results,
    op: str,
    pattern: str,
    share: Callable[[Measured], str],
    heading: str,
    notes: Notes,
) -> tuple[str, list[Measured]]:
    """Table of FP8 rows against DeepGEMM, and of the same shapes in MXFP4."""
    rows, lines = results.find(op, f"{pattern}, fp8"), []
    mark = notes.mark(f"Less an empty kernel of {EMPTY_US} us. {CORRECTED}")
    alone = "with both sides launched alike its time over ours is"
    for row in rows:
        narrow = results.get(op, row.shape.removesuffix("fp8") + "mxfp4")
        lines.append([
            row.shape.removesuffix(", fp8"), digits(row.us), share(row),
            shown(rival := fastest(row), digits)
            + (notes.mark(f"{alone} {rival.ratio}") if rival and alike(op, row.shape) else ""),
            *((digits(narrow.us), share(narrow)) if narrow else (NONE, NONE)),
        ])  # fmt: skip
    head = [
        f"`{op}`, H 64, D 128",
        "FP8, us",
        heading,
        f"DeepGEMM FP8{mark}, us",
        "MXFP4, us",
        heading,
    ]
    return grid(head, lines or [[NONE] * len(head)]), rows


def logits(results: Results) -> str:
    """Both operators of the indexer's logits."""
    notes = Notes()
    chunks, first = _beside_mxfp4(
        results, "mqa_logits", r"\d+ tokens, \d+k keys", lambda row: cell(row.rate, two_digits),
        "TFLOP/s", notes,
    )  # fmt: skip
    steps, second = _beside_mxfp4(
        results, "paged_mqa_logits", r"batch \d+, \d+k keys, \d queries",
        lambda row: cell(row.ratio(READ), percent), "% of reading once", notes,
    )  # fmt: skip
    text = notes.text() if first or second else ""
    return f"{chunks}\n\n{steps}{text}\n{links([*first, *second])}"
