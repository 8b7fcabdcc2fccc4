"""Tables of the README, of host times and of the result files."""

from __future__ import annotations

import re
from typing import NamedTuple

from gpu_tables.ahead import behind
from gpu_tables.attention import decode_row, prefill_row
from gpu_tables.peers import Notes, fastest
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
    two_digits,
)


class Plot(NamedTuple):
    """A drawing of committed rows."""

    source: str  # name of the file
    what: str  # description of the content
    op: str = ""  # restricts the rows to this operator


#: Name of a drawing in benchmarks/plots -> its content.
PLOTS = {
    "h100-decode": Plot("h100-decode", "time of a decode call over context on an H100"),
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
    notes = Notes()

    def line(what: str, row: Measured | None, ours: str, *, is_rate: bool = False) -> list[str]:
        rival = fastest(row)
        if row is None or rival is None:
            return [what, ours if row else NONE, NONE if row is None else "none timed", NONE]
        theirs = f"{row.rate / rival.ratio:.0f}" if is_rate and row.rate else digits(rival.us)
        source = f"[{row.file}](ROOT/benchmarks/results/{row.file}.json)"
        name = f"{rival.peer.label}{notes.of(row, rival.peer)}"
        return [what, ours, f"{theirs} ({name})", source]

    read, copied = batch and batch.ratio(READ), rope and rope.of_copy()
    of_read = f"{cell(read, percent)} % of reading K and V once"
    lines = [
        line("decode, 64 sequences x 8k keys, `cache_fp8`, bf16 queries, us", batch,
             f"{cell(batch and batch.us, digits)}, {of_read}"),
        line("a layer's decode step, Qwen3-8B, one sequence of 8k keys, `cache_fp8`, us", step,
             cell(step and step.us, digits)),
        line("causal prefill, 4 x 4096, H 16/16, `cache_fp8`, e4m3 queries, TFLOP/s", prompts,
             cell(prompts and prompts.rate, "{:.0f}".format), is_rate=True),
        line("RoPE and write of 16384 tokens, `cache_fp8`, us", rope,
             f"{cell(rope and rope.us, digits)}, {cell(copied, percent)} % of a copy"),
        line("host time of a `paged_attention` call, 16 sequences, us", host,
             cell(host and host.us, digits)),
    ]  # fmt: skip
    head = ["us or TFLOP/s", "fastattn", "fastest peer of the same work", "rows"]
    return f"{grid(head, lines)}{notes.text()}\n\n{behind(results)}"


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
