"""Tables of attention: decode, prefill, mixed calls, a layer's step."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_tables.peers import LAUNCHED_US, Notes, declared
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
    span,
    two_digits,
)

QUANTS = ("cache_fp8", "block_wise_fp8", "cache_int8", "block_wise_int8", "none")
#: Rows of the decode table, including the 4-bit types.
_DECODE_QUANTS = (*QUANTS[:-1], "block_wise_int4", "block_wise_mxfp4", QUANTS[-1])
#: Batch, context, heads: columns of the decode table.
_DECODE = [
    *((b, f"{k * 1024}", "32/8") for b, k in
      ((1, 1), (1, 8), (1, 32), (1, 128), (16, 8), (16, 128), (64, 1), (64, 8), (64, 32),
       (128, 1), (128, 8), (128, 32))),
    (64, "64..32768 ragged", "32/8"),
    (64, "8192", "16/1"),
]  # fmt: skip
#: Peer: cache type of the rows that have it, the types for comparison, prefix of its name.
_DECODE_PEERS = [
    ("cache_fp8", "types of 8 bits", "vllm_fa3_fp8"),
    ("cache_fp8", "types of 8 bits", "vllm_triton_fp8"),
    ("block_wise_int8", "`block_wise_int8`", "vllm_triton_int8"),
    ("none", "`none`", "vllm_fa3_bf16"),
]


def _context(context: str) -> str:
    return f"{int(context) // 1024}k" if context.isdigit() else "64..32k"


def decode_row(results: Results, quant: str, column: tuple[int, str, str]) -> Measured | None:
    """Decode over a cache type: batch, context, heads."""
    batch, context, heads = column
    shape = f"decode {quant} B {batch} ctx {context} H {heads} D 128"
    return results.get("paged_attention", shape)


def decode(results: Results) -> str:
    """Times, and fractions of one read of K, V and scales; then peers."""
    rows = {q: [decode_row(results, q, column) for column in _DECODE] for q in _DECODE_QUANTS}
    head = [
        f"{b} x {_context(context)}{'' if heads == '32/8' else ', MQA'}"
        for b, context, heads in _DECODE
    ]
    lines = []
    for quant, found in rows.items():
        cells = [
            f"{two_digits(row.us)} ({cell(row.ratio(READ), percent)} %)" if row else NONE
            for row in found
        ]
        lines.append([f"`{quant}`", *cells])
    notes = Notes()
    for quant, types, start in _DECODE_PEERS:
        label = _peer_label(rows[quant], start, notes)
        cells = (_peer_cell(row, start) for row in rows[quant])
        lines.append([f"{label}, beside {types}", *cells])
    used = [row for found in rows.values() for row in found]
    text = notes.text() + "\n\nBeside types of 4 bits no peer of the same work was timed."
    text += f" Peers were launched call by call; below {LAUNCHED_US:.0f} us the host shows in that."
    return grid(["us (of reading once)", *head], lines) + text * any(used) + "\n" + links(used)


def _peer_cell(row: Measured | None, start: str) -> str:
    """Time of a peer, or the bound where the host is in it."""
    if row is None or not any(name.startswith(start) for name in row.as_measured):
        return NONE
    return cell(row.peer_us(start), two_digits).replace(NONE, f"< {LAUNCHED_US:.0f}")


def _peer_label(rows: Sequence[Measured | None], start: str, notes: Notes) -> str:
    """Name of a peer with the mark of its caveats; the start of its name where no row has it."""
    for row in rows:
        name = next((x for x in row.as_measured if x.startswith(start)), None) if row else None
        if row and name and (peer := declared(row.op, row.shape, name)):
            return peer.label + notes.of(row, peer)
    return start


#: Columns of the prefill table: sequences, their length, heads.
_PROMPTS = [
    *((16384 // length, length, "16/16") for length in (1024, 2048, 4096, 8192, 16384)),
    (4, 4096, "64/8"),
    (1, 16384, "64/8"),
]
#: Label, operator, name in the shape, and prefix of the peer's name for a peer's row.
_PREFILL = [
    ("`cache_fp8`, e4m3 queries", "paged_attention", "cache_fp8", ()),
    ("`block_wise_fp8`, e4m3 queries", "paged_attention", "block_wise_fp8", ()),
    ("contiguous e4m3", "flash_attention", "e4m3", ()),
    ("", "paged_attention", "cache_fp8", ("vllm_fa3_fp8_paged",)),
    ("", "flash_attention", "e4m3", ("vllm_fa3_fp8_varlen",)),
    ("", "paged_attention", "cache_fp8", ("cudnn_fp8",)),
    ("`none`, bf16 queries", "paged_attention", "bf16 q, bf16", ()),
    ("`cache_fp8`, bf16 queries", "paged_attention", "bf16 q, cache_fp8", ()),
    ("`block_wise_fp8`, bf16 queries", "paged_attention", "bf16 q, block_wise_fp8", ()),
    ("`cache_int8`, bf16 queries", "paged_attention", "bf16 q, cache_int8", ()),
    ("`block_wise_int8`, bf16 queries", "paged_attention", "bf16 q, block_wise_int8", ()),
    ("`block_wise_int4`, bf16 queries", "paged_attention", "bf16 q, block_wise_int4", ()),
    ("`block_wise_mxfp4`, bf16 queries", "paged_attention", "bf16 q, block_wise_mxfp4", ()),
    ("contiguous bf16", "flash_attention", "bf16 q, bf16", ()),
    ("", "paged_attention", "bf16 q, bf16", ("vllm_fa3_bf16",)),
    ("", "paged_attention", "bf16 q, bf16", ("cudnn_bf16",)),
]  # fmt: skip


def prefill_row(
    results: Results, op: str, name: str, prompts: tuple[int, int, str]
) -> Measured | None:
    """Causal prefill: sequences, their length, heads."""
    seqs, length, heads = prompts
    return results.get(op, f"prefill {name} causal B {seqs} x {length} H {heads} D 128")


def prefill(results: Results) -> str:
    """TFLOP/s of fastattn and of peers."""
    lines, used, notes = [], [], Notes()
    for label, op, name, peer in _PREFILL:
        rows = [prefill_row(results, op, name, prompts) for prompts in _PROMPTS]
        rates = [row and (row.peer_rate(*peer) if peer else row.rate) for row in rows]
        used += rows
        label = label or _peer_label(rows, peer[0], notes)
        if any(rates) or not peer:
            lines.append([label, *(cell(rate, "{:.0f}".format) for rate in rates)])
    head = [
        f"{length // 1024}k{'' if heads == '16/16' else ', H ' + heads}"
        for _, length, heads in _PROMPTS
    ]
    other = "\n\nThe bf16 peers attend to bf16 keys, which is other work than bf16 queries over"
    text = notes.text() + f"{other} a cache of 8 or 4 bits: beside those no peer was timed."
    return grid(["TFLOP/s", *head], lines) + text * any(used) + "\n" + links(used)


def mixed(results: Results) -> str:
    """Gain of a call with several kinds of sequences, and the pass of quantize_q."""
    steps = results.find("paged_attention", "mixed .*")
    alone = results.find("flash_attention", "quantize_q alone .*")
    lines = []
    for row in alone:
        match = row.shape.removeprefix("quantize_q alone T ").removesuffix(" D 128")
        tokens, _, heads = match.partition(" H ")
        lines.append([f"{tokens} x {heads}", two_digits(row.us), cell(row.of_copy(), percent)])
    share = span((row.ratio("its parts alone") for row in steps), ratio)
    text = f"Calls that decode, speculate and prefill at once: {share} of the speed of the calls"
    text += f" of their parts ({len(steps)} shapes).\n\n"
    head = ["pass of `quantize_q` alone, tokens x heads", "us", "% of a copy"]
    return text + grid(head, lines) + "\n" + links([*steps, *alone])


_MODELS = ("Qwen3-8B", "ERNIE-4.5-300B TP8", "gpt-oss-120b", "PaddleOCR-VL")
MIXED_STEP = "2048 behind 6144 + 32 x 8k"
STEPS = (*(f"decode {batch} x 8k" for batch in (1, 16, 64, 128)), MIXED_STEP)
_VLLM = "vLLM"
#: Starts of the names of FastDeploy's operator and of its prefill path, at either `max_model_len`.
FASTDEPLOY = ("FastDeploy 32k", "FastDeploy 8k")
GATHERED = ("FastDeploy + vLLM's FA3 32k", "FastDeploy + vLLM's FA3 8k")
#: Part of the name of FastDeploy's row -> its mark.
_MARKS = {"other rope": "r", "wrong output": "w"}


def _faster(row: Measured, peers: tuple[str, ...]) -> tuple[str, float] | None:
    """Name and ratio of the limit with which a way of FastDeploy's is faster."""
    found = [(us / row.us, name) for name, us in row.peers.items() if name.startswith(peers)]
    return (min(found)[1], min(found)[0]) if found else None


def _marked(row: Measured, peers: tuple[str, ...]) -> str:
    """Ratio of a way of FastDeploy's, with the marks of its name."""
    found = _faster(row, peers)
    if not found:
        return NONE
    return ratio(found[1]) + "".join(mark for text, mark in _MARKS.items() if text in found[0])


def right(row: Measured, peers: tuple[str, ...]) -> float | None:
    """Ratio of a way of FastDeploy's whose output is right."""
    found = _faster(row, peers)
    return None if not found or "wrong output" in found[0] else found[1]


def _step_cell(row: Measured | None) -> str:
    if row is None:
        return NONE
    ratios = [cell(row.ratio(_VLLM), ratio), _marked(row, FASTDEPLOY)]
    if _faster(row, GATHERED):
        ratios.append(_marked(row, GATHERED))
    return f"{_us(row.us)} ({', '.join(ratios)})"


def step_rows(results: Results, quant: str, names: Sequence[str], how: str) -> list[Measured]:
    """Rows of all models for some steps; `how` is graph or eager."""
    shapes = [f"{model} {quant} {name}, {how}" for model in _MODELS for name in names]
    return [row for shape in shapes if (row := results.get("layer step", shape))]


def step(results: Results) -> str:
    """A layer's step of every model and cache type."""
    lines, used = [], []
    for model in _MODELS:
        for quant in QUANTS:
            shapes = [f"{model} {quant} {name}, graph" for name in STEPS]
            rows = [results.get("layer step", shape) for shape in shapes]
            lines.append([f"{model}, `{quant}`", *map(_step_cell, rows)])
            used += rows
    names = [name.removeprefix("decode ").replace(" + ", ", and ") for name in STEPS]
    speeds = "of vLLM's sum, of FastDeploy's operator, of its prefill path; above 1 is faster"
    head = [f"us ({speeds})", *names]
    return grid(head, lines) + "\n" + links(used)


def step_ranges(results: Results) -> str:
    """Minimum and maximum over all models."""
    lines = []
    for quant in QUANTS:
        cells = []
        for names in (STEPS[:-1], [MIXED_STEP]):
            graph = step_rows(results, quant, names, "graph")
            cells.append(span((row.ratio(_VLLM) for row in graph), ratio))
            cells.append(span((right(row, FASTDEPLOY) for row in graph), ratio))
        cells.append(span((right(row, GATHERED) for row in graph), ratio))
        graph = step_rows(results, quant, STEPS, "graph")
        cells.append(span((row.ratio("exact lengths") for row in graph), ratio))
        eager = step_rows(results, quant, STEPS, "eager")
        cells.append(span((row.ratio("exact lengths") for row in eager), ratio))
        cells.append(span((row.peer_us("host") for row in eager), two_digits))
        lines.append([f"`{quant}`", *cells])
    head = ["least and most over the models", "decode, of vLLM's speed", "of FastDeploy's",
            "mixed step, of vLLM's", "of FastDeploy's", "of its prefill path",
            "of the step with exact lengths", "eager, of that",
            "eager: the host's us a layer"]  # fmt: skip
    return grid(head, lines)


_INVARIANT = "paged_attention, batch_invariant"
_BATCHES = (1, 16, 64, 128)
#: Cache type, context and new tokens of each row.
_INVARIANT_LINES = [
    *((quant, context, new)
      for new in (1, 4)
      for quant in ("cache_fp8", "block_wise_fp8", "none")
      for context in (1024, 8192, 32768)),
]  # fmt: skip
#: Label and shape of the rows below the table.
_INVARIANT_MORE = (
    ("64 sequences of 64 to 32k keys", "B 64 ctx 64..32768 ragged new 1"),
    ("4 sequences of 8k with 16 new tokens", "B 4 ctx 8192 new 16"),
    ("a chunk of 2048 behind 6144", "B 1 ctx 8192 new 2048"),
)


def batch_invariant(results: Results) -> str:
    """Times without and with `batch_invariant`, from one run."""

    def both(row: Measured | None) -> str:
        if row is None:
            return NONE
        return f"{cell(row.peer_us('default'), digits)} / {digits(row.us)}"

    lines, used = [], []
    for quant, context, new in _INVARIANT_LINES:
        shapes = [f"{quant} B {b} ctx {context} new {new} H 32/8 D 128" for b in _BATCHES]
        rows = [results.get(_INVARIANT, shape) for shape in shapes]
        if any(rows):
            label = f"`{quant}`, {_context(str(context))}{f', {new} new tokens' if new > 1 else ''}"
            lines.append([label, *map(both, rows)])
            used += rows
    texts = []
    for label, shape in _INVARIANT_MORE:
        row = results.get(_INVARIANT, f"cache_fp8 {shape} H 32/8 D 128")
        if row:
            texts.append(f"{label} {both(row)}")
            used.append(row)
    head = ["us, default / `batch_invariant`; sequences", *map(str, _BATCHES)]
    more = f"\n\n`cache_fp8`: {', '.join(texts)}." if texts else ""
    return grid(head, lines or [[NONE] * len(head)]) + more + "\n" + links(used)


_SPLIT = "paged_attention, split_invariant"
_SPLIT_TYPES = ("none", "cache_fp8", "block_wise_int8", "block_wise_int4")
#: Label and shape of each row.
_SPLIT_LINES = (
    ("decode, 64 sequences of 1k", "B 64 ctx 1024 new 1"),
    *((f"decode, {b} sequences of 8k", f"B {b} ctx 8192 new 1") for b in (1, 16, 64, 128)),
    ("decode, 1 sequence of 32k", "B 1 ctx 32768 new 1"),
    ("decode, 1 sequence of 128k", "B 1 ctx 131072 new 1"),
    ("16 sequences of 8k, 4 new tokens", "B 16 ctx 8192 new 4"),
    ("4 sequences of 8k, 16 new tokens", "B 4 ctx 8192 new 16"),
    ("a chunk of 256 to 8k", "B 1 ctx 8192 new 256"),
    ("a chunk of 2048 to 8k", "B 1 ctx 8192 new 2048"),
    ("4 prompts of 4k", "B 4 ctx 4096 new 4096"),
    ("a prompt of 16k", "B 1 ctx 16384 new 16384"),
)


def split_invariant(results: Results) -> str:
    """Times of a call with `split_invariant` over those without it, from one run."""
    lines, used = [], []
    for label, shape in _SPLIT_LINES:
        rows = [results.get(_SPLIT, f"{q} {shape} H 32/8 D 128") for q in _SPLIT_TYPES]
        cells = [f"{row.us / row.peer_us('default'):.2f}" if row else NONE for row in rows]
        lines.append([label, *cells])
        used += rows
    head = ["time with `split_invariant` over that without", *(f"`{q}`" for q in _SPLIT_TYPES)]
    return grid(head, lines) + "\n" + links(used)


_SPARSE = "sparse_paged_attention"


def chosen_keys(results: Results) -> str:
    """Decode over 2048 of 32k keys, beside reading them and beside attention to all keys."""
    lines, used = [], []
    for quant in ("none", "cache_fp8", "block_wise_int4"):
        for batch, keys in ((16, "blocks of 64"), (64, "blocks of 64"), (64, "single tokens")):
            shape = f"decode {quant} B {batch} ctx 32768 H 32/8 D 128, 2048 keys in {keys}"
            row = results.get(_SPARSE, shape)
            if row is None:
                continue
            read, dense = (
                row.peer_us("reading as many bytes"),
                row.peer_us("paged_attention, all keys"),
            )
            shares = [f"{100 * read / row.us:.0f} %" if read else NONE]
            shares.append(f"{dense / row.us:.1f}" if dense else NONE)
            lines.append([f"`{quant}`, {batch} sequences, {keys}", digits(row.us), *shares])
            used.append(row)
    head = [
        "decode, 2048 of 32k keys",
        "us",
        "of the speed of reading them",
        "times as fast as all keys",
    ]
    return grid(head, lines or [[NONE] * len(head)]) + "\n" + links(used)


_LARGE = [(64, "64/8"), (96, "32/32"), (192, "16/16"), (256, "16/16"), (256, "32/2"), (256, "16/4")]
_LARGE_PAGED = ("none", *QUANTS[:-1], "block_wise_int4", "block_wise_mxfp4")


def head_dims(results: Results) -> str:
    """Head dimensions other than 64 and 128: prefill of 4 x 4k, decode of 64 x 8k."""
    return f"{_large(results)}\n\n{_large_paged(results)}"


def _large_paged(results: Results) -> str:
    """Bf16 queries over the cache types that have such kernels."""
    lines, used = [], []
    for dim, heads in _LARGE:
        shapes = [
            f"prefill bf16 q, {quant} causal B 4 x 4096 H {heads} D {dim}" for quant in _LARGE_PAGED
        ]
        rows = [results.get("paged_attention", shape) for shape in shapes]
        if any(rows):
            cells = [cell(row and row.rate, "{:.0f}".format) for row in rows]
            lines.append([f"{dim}, {heads}", *cells])
            used += rows
    head = ["prefill of bf16 queries, TFLOP/s; D, heads", *(f"`{x}`" for x in _LARGE_PAGED)]
    return grid(head, lines or [[NONE] * len(head)]) + "\n" + links(used)


def _large(results: Results) -> str:
    """Prefill over contiguous keys, and decode."""
    lines, used = [], []
    for dim, heads in _LARGE:
        cells = []
        for dtype, peer in (("bfloat16", "vllm_fa3_bf16"), ("e4m3", "vllm_fa3_fp8")):
            shape = f"prefill {dtype} causal B 4 x 4096 H {heads} D {dim}"
            row = results.get("flash_attention", shape)
            cells.append(
                f"{cell(row.rate, digits)} / {cell(row.peer_rate(peer), digits)}" if row else NONE
            )
            used.append(row)
        for quant in QUANTS:
            shape = f"decode {quant} B 64 ctx 8192 H {heads} D {dim}"
            row = results.get("paged_attention", shape)
            cells.append(
                f"{two_digits(row.us)} ({cell(row.ratio(READ), percent)} %)" if row else NONE
            )
            used.append(row)
        lines.append([f"{dim}, {heads}", *cells])
    head = ["D, heads", "prefill bf16, TFLOP/s / FA3's", "FP8 / FA3's"]
    return grid([*head, *(f"decode `{quant}`" for quant in QUANTS)], lines) + "\n" + links(used)


def signals(results: Results) -> str:
    """A layer of a prompt's chunk with and without signals of complete layers."""
    lines, used = [], []
    for chunk in (256, 2048, 8192):
        for how, label in (("eager", "eager"), ("host", "host's time"), ("graph", "CUDA graph")):
            found = [
                results.get("kv_signal", f"{mode}, chunk of {chunk}, H 32/8 D 128, {how}")
                for mode in ("per_chunk", "per_query")
            ]
            silent = next((row.peer_us("no signal") for row in found if row), None)
            times = [silent, *(row and row.us for row in found)]
            lines.append([f"{chunk} tokens, {label}", *(cell(x, _us) for x in times)])
            used += found
    head = ["us of a layer", "no signals", "per_chunk", "per_query"]
    return grid(head, lines) + "\n" + links(used)


def dcp(results: Results) -> str:
    """Steps over a cache on two GPUs and on one, in CUDA graphs."""
    lines, used = [], []
    for step in (
        "decode {} B 1 ctx 1048576",
        "decode {} B 1 ctx 262144",
        "decode {} B 1 ctx 65536",
        "decode {} B 16 ctx 131072",
        "4 new tokens {} B 1 ctx 262144",
        "4 new tokens {} B 16 ctx 65536",
        "2048 new tokens {} B 1 ctx 262144",
        "2048 new tokens and 15 x 1 {} B 16 ctx 65536",
    ):
        line = [step.replace(" {}", "").replace("ctx ", "cached ")]
        for quant in ("cache_fp8", "block_wise_fp8"):
            shape = f"{step.format(quant)} H 32/8 D 128, 2 ranks, graph"
            whole, given = (
                results.get("paged_attention_dcp", shape + how)
                for how in ("", ", local_keys given")
            )
            line.append(cell(whole and whole.peer_us("one rank"), _us))
            line += [_us_and_ratio(row) for row in (whole, given)]
            used += [whole, given]
        lines.append(line)
    head = ["us"]
    for quant in ("`cache_fp8`", "`block_wise_fp8`"):
        head += [f"{quant}, one GPU", "two (ratio)", "two, `local_keys` given"]
    return grid(head, lines) + "\n" + links(used)


def _us_and_ratio(row: Measured | None) -> str:
    faster = row and row.ratio("one rank")
    return f"{_us(row.us)} ({faster:.2f}x)" if row and faster else NONE


def _us(value: float) -> str:
    return f"{value:.{1 if value < 99.95 else 0}f}"
