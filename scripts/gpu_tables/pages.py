"""Tables of the README, of host times and of the result files."""

from __future__ import annotations

import re
from typing import NamedTuple

from gpu_tables.attention import decode_row, prefill_row, step_rows
from gpu_tables.results import (
    NONE,
    READ,
    Measured,
    Results,
    cell,
    date,
    digits,
    grid,
    links,
    percent,
    ratio,
    span,
    two_digits,
)


class Plot(NamedTuple):
    """A drawing of committed rows."""

    source: str  # name of the file
    what: str  # description of the content
    op: str = ""  # restricts the rows to this operator


#: Name of a drawing in benchmarks/plots -> its content.
PLOTS = {
    "h100-decode": Plot("h100-decode", "decode bandwidth over context on an H100"),
    "h100-prefill": Plot("h100-prefill", "prefill over the length of a sequence on an H100"),
    "h100-mla-attention": Plot("h100-mla-attention", "dense latent decode over batch on an H100"),
    "h100-mla-sparse": Plot("h100-mla-sparse", "sparse latent decode over heads on an H100"),
    "h100-sparse-step": Plot("h100-sparse-step", "DeepSeek layers' steps over batch on an H100"),
    "h100-paged-logits": Plot(
        "h100-mqa-logits", "the indexer's logits of decode steps on an H100", "paged_mqa_logits"
    ),
    "h100-logits": Plot(
        "h100-mqa-logits", "the indexer's logits of a prefill on an H100", "mqa_logits"
    ),
    "h100-topk": Plot("h100-topk", "top-k over the number of columns on an H100"),
    "h100-merge": Plot("h100-merge", "merge_attn_states on an H100"),
    "h100-indexer": Plot("h100-indexer", "the indexer's operators on an H100"),
    "h100-cache": Plot("h100-cache", "cache writers on an H100"),
    "cpu-numpy-attention": Plot("cpu-numpy-attention", "paged_attention on two CPU cores"),
}


def plots(results: Results) -> str:
    """The drawings whose files are committed."""
    found = [
        f"![{plot.what}](ROOT/benchmarks/plots/{name}.png)"
        for name, plot in PLOTS.items()
        if plot.source in results.files
    ]
    return "\n\n".join(found)


def runs(results: Results) -> str:
    """Machine, versions and commit of every run. Files of one run share a row."""
    named: dict[tuple[str, ...], list[str]] = {}
    for name, report in results.files.items():
        machine = report["machine"]
        if "gpu" not in machine:
            continue
        driver = machine.get("gpu_driver") or NONE
        facts = (machine["gpu"], f"{driver} (CUDA {machine.get('driver_cuda', NONE)})")
        versions = f"Paddle {machine.get('paddle')}, Python {machine.get('python')}"
        bandwidth = cell(machine.get("copy_gbs"), "{:.0f}".format)
        empty = cell(machine.get("empty_kernel_us"), ratio)
        run = (*facts, versions, str(machine.get("commit")), date(machine), bandwidth, empty)
        named.setdefault(run, []).append(name.partition("-")[2])
    lines = [[*run, ", ".join(names)] for run, names in named.items()]
    lines.sort(key=lambda line: line[4])
    head = ["GPU", "driver", "software", "commit", "begun, UTC", "copy, GB/s", "empty kernel, us",
            "files"]  # fmt: skip
    return grid(head, lines)


def files(results: Results) -> str:
    """Every committed file."""
    lines = []
    every = Results.read(results.folder, ("*.json",)).files  # also of GPUs that no other table has
    for name, report in every.items():
        machine = report["machine"]
        where = machine.get("gpu") or f"{machine['cores']} cores of an {machine['cpu']}"
        ops = dict.fromkeys(re.split(", | ", row["op"])[0] for row in report["rows"])
        what = ", ".join(f"`{op}`" for op in ops)
        link = f"[{name}.json](ROOT/benchmarks/results/{name}.json)"
        facts = f"{machine.get('commit')}, {date(machine)}"
        lines.append([link, where, facts, str(len(report["rows"])), what])
    return grid(["file", "machine", "commit, begun (UTC)", "rows", "operators"], lines)


_FOUR = (4, 4096, "16/16")


def figures(results: Results) -> str:
    """Five lines for the README, and the cases in which peers are faster."""
    batch = decode_row(results, "cache_fp8", (64, "8192", "32/8"))
    step = results.get("layer step", "Qwen3-8B cache_fp8 decode 1 x 8k, graph")
    prompts = prefill_row(results, "paged_attention", "cache_fp8", _FOUR)
    rope = results.get("rope_write_cache_kv", "16384 tokens, KV 8, D 128, cache_fp8, H 32")
    host = results.get("host", "paged_attention, 16 sequences, H 32/8 D 128")
    fa3 = "vllm_fa3_fp8"

    def peer(row: Measured | None, start: str, name: str) -> str:
        us = row and row.peer_us(start)
        return f"{digits(us)} ({name})" if us else NONE

    def source(row: Measured | None) -> str:
        name = row.file if row else ""
        return f"[{name}](ROOT/benchmarks/results/{name}.json)" if row else NONE

    theirs = prompts and prompts.peer_rate(fa3)
    read, copied = batch and batch.ratio(READ), rope and rope.of_copy()
    lines = [
        ["decode, 64 sequences x 8k keys, `cache_fp8`, bf16 queries, us",
         f"{cell(batch and batch.us, digits)}, {cell(read, percent)} % of reading K and V once",
         peer(batch, fa3, "FlashAttention-3 FP8, e4m3 queries"), source(batch)],
        ["a layer's decode step, Qwen3-8B, one sequence of 8k keys, `cache_fp8`, us",
         cell(step and step.us, digits), peer(step, "vLLM", "rotation, write, Q, FlashAttention-3"),
         source(step)],
        ["causal prefill, 4 x 4096, H 16/16, `cache_fp8`, e4m3 queries, TFLOP/s",
         cell(prompts and prompts.rate, "{:.0f}".format),
         f"{cell(theirs, '{:.0f}'.format)} (FlashAttention-3 FP8, page 64, two-level accumulation)",
         source(prompts)],
        ["RoPE and write of 16384 tokens, `cache_fp8`, us",
         f"{cell(rope and rope.us, digits)}, {cell(copied, percent)} % of a copy",
         peer(rope, "vllm rope", "two kernels"), source(rope)],
        ["host time of a `paged_attention` call, 16 sequences, us", cell(host and host.us, digits),
         peer(host, "vllm fa3", "FlashAttention-3 FP8"), source(host)],
    ]  # fmt: skip
    return grid(["us or TFLOP/s", "fastattn", "peer", "rows"], lines) + f"\n\n{behind(results)}"


def behind(results: Results) -> str:
    """The cases in which peers are faster."""
    quants = ("cache_fp8", "block_wise_fp8", "cache_int8", "block_wise_int8", "none")
    names = (*(f"decode {n} x 8k" for n in (1, 16, 64, 128)), "2048 behind 6144 + 32 x 8k")
    steps = [
        (share, row)
        for quant in quants
        for row in step_rows(results, quant, names, "graph")
        if (share := row.ratio("vLLM"))
    ]
    slower = sorted((pair for pair in steps if pair[0] < 1), key=lambda pair: pair[0])
    parts = []
    if slower:
        least, row = slower[0]
        shape = row.shape.removesuffix(", graph")
        parts.append(
            f"{len(slower)} of {len(steps)} steps of a layer are slower than vLLM's kernels;"
            f" the slowest has {least:.2f} of their speed (`{shape}`)"
        )
    latent = [
        (share, row)
        for op in ("mla_attention", "mla_sparse_attention")
        for row in results.find(op, ".*")
        if (share := row.ratio("FlashMLA"))
    ]
    slower = sorted((pair for pair in latent if pair[0] < 1), key=lambda pair: pair[0])
    if slower:
        least, row = slower[0]
        parts.append(
            f"{len(slower)} of {len(latent)} calls of latent attention are slower than FlashMLA's"
            " (whose times include an empty kernel);"
            f" the slowest has {least:.2f} of its speed (`{row.op}`, {row.shape})"
        )
    wide = decode_row(results, "none", (64, "8192", "32/8"))
    fa3 = wide and wide.peer_us("vllm_fa3_bf16")
    if wide and fa3:
        parts.append(
            f"decode of a 16-bit cache, 64 x 8k, takes {wide.us:.0f} us, FlashAttention-3's"
            f" {fa3:.0f}"
        )
    shares = []
    for prompts in ((16, 1024, "16/16"), _FOUR, (1, 16384, "16/16")):
        pair = [
            prefill_row(results, "paged_attention", f"bf16 q, {name}", prompts)
            for name in ("block_wise_fp8", "bf16")
        ]
        shares.append(pair[1].us / pair[0].us if pair[0] and pair[1] else None)
    if any(shares):
        parts.append(
            "prefill over `block_wise_fp8` with bf16 queries has"
            f" {span(shares, ratio)} of the speed of a bf16 cache"
        )
    if not parts:
        return NONE
    sentences = ". ".join(part[0].upper() + part[1:] for part in parts)
    return f"Where peers are ahead ([more](ROOT/docs/gpu.md)): {sentences}."


def cpu(results: Results) -> str:
    """The CPU's rows against NumPy."""
    report = results.files.get("cpu-numpy-attention", {"rows": [], "machine": {}})
    machine = report["machine"]
    lines = [
        [row["shape"], f"{row['us'] / 1e3:.2f}", f"{row['peer_us'] / 1e3:.2f}", ratio(row["ratio"])]
        for row in report["rows"]
    ]
    where = f"{machine.get('cores')} cores of an {machine.get('cpu')}, Paddle"
    where += f" {machine.get('paddle')}, commit {machine.get('commit')}, {date(machine)} UTC:\n\n"
    table = grid(["`paged_attention`", "ms", "NumPy, ms", "faster by"], lines)
    link = "[cpu-numpy-attention](ROOT/benchmarks/results/cpu-numpy-attention.json)"
    return f"{where}{table}\n\nRows of {link}."


#: Operator of a host row -> its peer.
_HOST_PEERS = {
    "vllm fa3 paged": "FlashAttention-3 paged FP8 decode, batch 16",
    "vllm fa3 varlen": "FlashAttention-3 varlen bf16",
    "vllm reshape": "`reshape_and_cache_flash` FP8",
    "vllm rope": "rope + `reshape_and_cache` FP8 (2 kernels)",
    "merge, vllm": "CUDA merge, fused",
}


def host(results: Results) -> str:
    """Host time of calls: direct, through the registry, and of vLLM's."""
    lines, used = [], []
    for row in results.find("host", r".*, \d+ more operators"):
        shape, _, _ = row.shape.rpartition(", ")
        beside = results.get("host", shape)
        found = [
            (text, us)
            for start, text in _HOST_PEERS.items()
            if beside and (us := beside.peer_us(start))
        ]
        name, us = found[0] if found else (NONE, None)
        registry = cell(row.peer_us("Paddle's registry"), two_digits)
        lines.append([shape, f"{row.us:.1f}", registry, name, cell(us, "{:.1f}".format)])
        used.append(row)
    head = ["call", "us", "through Paddle's registry", "vLLM", "us"]
    facts = ""
    if used:
        machine = used[0].machine
        facts = f"{machine.get('gpu', machine['cpu'])}, Paddle {machine['paddle']}, Python"
        facts += f" {machine['python']}, commit {machine['commit']}, {date(machine)} UTC.\n\n"
    return facts + grid(head, lines) + "\n" + links(used)
