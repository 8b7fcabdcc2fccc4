#!/usr/bin/env python3
"""Time vLLM's kernels at the steps of `python -m fastattn bench --op step/sparse`.

    scripts/vllm_sparse_step_peers.py --out peers.json [--peers FILE]

The script needs a Hopper GPU, and torch with an installed vLLM 0.26 and its DeepGEMM. Instead of
vLLM, FILE may be given as for scripts/vllm_step_peers.py, whose `HAVE` has DeepGEMM and the Triton
kernel of the indexer's queries. The parts are the same as in `SparseModel.vllm_parts`. Kernels that
only exist in Triton, such as V4's compression, and the map of a top-k to slots are not part of any
sum, on either side.

- write: the writer of the latent cache; for V4 also the writer that normalises, rotates and pads
  queries;
- index query: rotation and FP8; index key: FP8 into pages;
- selection: DeepGEMM's logits, over pages or, for a chunk, over keys that are gathered first; then
  the top-k that vLLM uses for this number of rows;
- attention: FlashMLA with queries padded to 64 heads. A chunk of V3.2 uses the decode kernel, as
  vLLM does for few heads. A chunk of V4 uses the prefill kernel over bf16 keys that are gathered
  before.

Times are medians of CUDA graphs with as many layers as the benchmark, and of eager steps. The
writers of latent caches are also timed alone, at the benchmark's sizes (--writers), over buffers
that exceed the L2 cache. Rows replace the rows of an earlier run in the file; name it in
FASTATTN_BENCH_PEERS.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import runpy
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "fastdeploy_peers"))
from report import write_section
from steps import graph_us
from vllm_operators import load_operators

ROOT = Path(__file__).resolve().parents[1]
facts = types.SimpleNamespace(
    **runpy.run_path(str(ROOT / "benchmarks" / "cases" / "sparse_models.py"))
)
PAGE, INDEX_DIM, HEADS = facts.PAGE, facts.INDEX_DIM, facts.PADDED_HEADS
E4M3, BF16, U8, I32 = torch.float8_e4m3fn, torch.bfloat16, torch.uint8, torch.int32
SECTION, WRITERS, PEER = "sparse_step", "mla_writers", "vLLM"
#: Format of a latent cache -> vLLM's name, and its bytes per token.
FORMATS = {"bf16": ("auto", 1152), "fp8": ("fp8", 576), "fp8_656": ("fp8_ds_mla", 656)}
#: Total bytes of the buffers of a writer, and their maximum number.
COLD_BYTES, MOST_COPIES = 400 << 20, 64
VALUE_DIM, ROPE = 512, 64
#: Maximum number of rows of a step for which vLLM uses the cluster top-k.
CLUSTER_ROWS = 32
EAGER_CALLS, EAGER_TOKENS, ROUNDS = 64, 4096, 9


def normal(*shape: int) -> torch.Tensor:
    """Normal values in bf16."""
    return torch.randn(*shape, device="cuda", dtype=BF16)


def codes(*shape: int) -> torch.Tensor:
    """Bytes of finite e4m3 numbers below 2."""
    return torch.randint(0, 256, shape, device="cuda", dtype=U8).bitwise_and_(0xBF)


def kernels(file: Path | None) -> types.SimpleNamespace:
    """DeepGEMM, and vLLM's kernel of index queries."""
    load_operators(file)
    if file is not None:
        have = sys.modules[file.stem].HAVE  # type: ignore[attr-defined]
        return types.SimpleNamespace(
            gemm=have.gemm, index_query=have.triton.indexer.fused_indexer_q_rope_quant
        )
    importlib.import_module("vllm._flashmla_C")
    queries = importlib.import_module("vllm.models.deepseek_v4.common.ops.fused_indexer_q")
    return types.SimpleNamespace(
        gemm=importlib.import_module("vllm.third_party.deep_gemm"),
        index_query=queries.fused_indexer_q_rope_quant,
    )


class Step:
    """Data that the layers of a step share.

    Parameters
    ----------
    model : SparseModel
    seqs : list of (int, int)
        Cached tokens and new tokens of each sequence.
    library : SimpleNamespace
        Result of :func:`kernels`.
    """

    def __init__(self, model: Any, seqs: list[tuple[int, int]], library: Any) -> None:
        self.model, self.library = model, library
        self.batch, self.tokens = len(seqs), sum(new for _, new in seqs)
        self.is_decode = self.tokens == self.batch
        self.keys = facts.entries(model, seqs)
        self.longest, self.topk = max(self.keys), facts.chosen(model, seqs)
        positions = torch.cat([torch.arange(c, c + n) for c, n in seqs])
        seq = torch.repeat_interleave(torch.arange(self.batch), torch.tensor([n for _, n in seqs]))
        blocks = -(-self.longest // PAGE)
        self.pages = self.batch * blocks
        tables = torch.randperm(self.pages).view(self.batch, blocks)
        entry = positions // model.ratio
        slots = tables[seq, (entry // PAGE).clamp(max=blocks - 1)] * PAGE + entry % PAGE
        self.slots, self.positions = slots.cuda(), positions.cuda()
        ends = (positions + 1) // model.ratio
        self.ends = ends.int().cuda()
        self.starts = torch.zeros_like(self.ends)
        self.tables = tables.int().cuda()
        self.key_starts = torch.tensor([0, self.longest], device="cuda", dtype=I32)
        self.cos_sin = torch.randn(int(positions.max()) + 1, ROPE, device="cuda")
        heads = model.heads if model.window else HEADS
        self.q = normal(self.tokens, heads, model.dim)
        self.out = torch.empty(self.tokens, HEADS, VALUE_DIM, device="cuda", dtype=BF16)
        self.latent, self.rope = normal(self.tokens, VALUE_DIM), normal(self.tokens, ROPE)
        self.index_key = normal(self.tokens, INDEX_DIM)
        self.index_q = normal(self.tokens, model.index_heads, INDEX_DIM)
        self.weights = torch.rand(self.tokens, model.index_heads, device="cuda")
        self.one = torch.ones(1, device="cuda")
        self.topk_out = torch.full((self.tokens, self.topk), -1, device="cuda", dtype=I32)
        self.work = torch.zeros(1 << 20, device="cuda", dtype=U8)
        self.sinks = torch.randn(HEADS, device="cuda") if model.window else None
        if self.is_decode:
            gemm = library.gemm
            self.schedule = gemm.get_paged_mqa_logits_metadata(
                self.ends.view(-1, 1), PAGE, gemm.get_num_sms()
            )
        self.chosen = self._chosen(tables.cuda(), seq.cuda())
        if model.window:
            self._recent(positions, seq)

    def _chosen(self, tables: torch.Tensor, seq: torch.Tensor) -> torch.Tensor:
        """Slots that each query attends to, int32 [T, topk]: ascending, distinct tokens."""
        few = min(self.tokens, 512)  # other queries have the same tokens, which are as fast to read
        tokens = torch.rand(few, int(self.ends.min()), device="cuda").topk(self.topk).indices
        tokens = tokens.sort().values.repeat(-(-self.tokens // few), 1)[: self.tokens]
        pages = tables[seq[:, None], tokens // PAGE]
        return (pages * PAGE + tokens % PAGE).int()

    def _recent(self, positions: torch.Tensor, seq: torch.Tensor) -> None:
        """The window's pages; for a chunk, its keys in bf16 with its combined indices."""
        window = self.model.window
        first = int(positions.min()) - window + 1
        blocks = int(positions.max()) // PAGE - first // PAGE + 1
        self.window_pages = self.batch * blocks
        tables = torch.randperm(self.window_pages).view(self.batch, blocks)

        def slots_of(at: torch.Tensor, seqs: torch.Tensor) -> torch.Tensor:
            return tables[seqs, at // PAGE - first // PAGE] * PAGE + at % PAGE

        self.window_slots = slots_of(positions, seq).cuda()
        before = positions[:, None] + torch.arange(1 - window, 1)
        recent = slots_of(before, seq[:, None]).int().cuda()
        if self.is_decode:
            self.recent = recent.view(self.batch, 1, window)
            self.lengths = [
                torch.full((self.batch,), n, device="cuda", dtype=I32) for n in (window, self.topk)
            ]
            return
        # A chunk: compressed keys, then its tokens and the tokens of the window before it,
        # contiguously.
        self.gathered = normal(self.longest + self.tokens + window - 1, 1, self.model.dim)
        near = (before - first + self.longest).int().cuda()
        # The table gave pages. Only the scattered order of the rows matters.
        self.combined = torch.cat((self.chosen % self.longest, near), -1)[:, None].contiguous()

    def queries(self) -> torch.Tensor:
        """Padded queries of one step."""
        if not self.model.window:
            return self.q
        return normal(self.tokens, HEADS, self.model.dim)


class Layer:
    """Caches of a layer, and vLLM's kernels of its step."""

    def __init__(self, step: Step) -> None:
        self.step, model = step, step.model
        self.ready = step.queries()
        if model.window:
            self.cache, self.near = self._planar(step.pages), self._planar(step.window_pages)
        else:
            self.cache = self._interleaved(step.pages)
        self.index = codes(step.pages, PAGE * (INDEX_DIM + 4))
        scales = torch.rand(step.pages, PAGE, device="cuda") + 0.5
        self.index[:, PAGE * INDEX_DIM :] = scales.view(U8)
        self.index = self.index.view(step.pages, PAGE, INDEX_DIM + 4)
        self.index_codes = codes(step.tokens, model.index_heads, INDEX_DIM).view(E4M3)
        self.plan: tuple[Any, ...] = (None, None)
        if not (model.window and not step.is_decode):
            self.plan = self._decode(self.ready, None, None)[2:]

    @staticmethod
    def _interleaved(pages: int) -> torch.Tensor:
        """Rows of 656 bytes: codes, scales, rotated channels."""
        cache = codes(pages, PAGE, 656)
        scales = torch.rand(pages, PAGE, 4, device="cuda") + 0.5
        cache[..., 512:528] = scales.view(U8)
        cache[..., 528:] = normal(pages, PAGE, ROPE).view(U8)
        return cache

    @staticmethod
    def _planar(pages: int) -> torch.Tensor:
        """Pages of 584 bytes per token at multiples of 576: codes and channels, then exponents."""
        size, rows = PAGE * 584, PAGE * 576
        cache = torch.zeros(pages, -(-size // 576) * 576, device="cuda", dtype=U8)[:, :size]
        tokens = codes(pages, PAGE, 576)
        tokens[..., 448:] = normal(pages, PAGE, ROPE).view(U8)
        cache[:, :rows] = tokens.flatten(1)
        cache[:, rows:] = 127
        return cache

    def write(self) -> torch.Tensor:
        """Write the rows of new tokens; for V4 also padded queries."""
        step = self.step
        if not step.model.window:
            torch.ops._C_cache_ops.concat_and_cache_mla(
                step.latent, step.rope, self.cache, step.slots, "fp8_ds_mla", step.one
            )
            return self.ready
        return torch.ops._C.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
            step.q, step.latent, self.near, step.window_slots, step.positions, step.cos_sin,
            HEADS, 1e-6, PAGE,
        )  # fmt: skip

    def index_query(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and folded weights."""
        step = self.step
        return step.library.index_query(
            step.positions, step.index_q, step.cos_sin, step.weights, INDEX_DIM**-0.5, 0.125, False
        )

    def index_key(self) -> None:
        """Index keys of the new tokens."""
        step = self.step
        torch.ops._C_cache_ops.indexer_k_quant_and_cache(
            step.index_key, self.index, step.slots, INDEX_DIM, "ue8m0"
        )

    def selection(self, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Logits and top-k."""
        step, gemm, ops = self.step, self.step.library.gemm, torch.ops._C
        out, rows = step.topk_out, step.tokens
        if step.is_decode:
            logits = gemm.fp8_fp4_paged_mqa_logits(
                (q.view(rows, 1, -1, INDEX_DIM), None), self.index.unsqueeze(2), weights,
                step.ends.view(-1, 1), step.tables, step.schedule, step.longest, clean_logits=False,
            )  # fmt: skip
            select = ops.cooperative_topk if rows <= CLUSTER_ROWS else ops.persistent_topk
            select(logits, step.ends, out, step.work, step.topk, step.longest)
            return out
        keys = torch.empty(step.longest, INDEX_DIM, device="cuda", dtype=E4M3)
        scales = torch.empty(step.longest, 4, device="cuda", dtype=U8)
        torch.ops._C_cache_ops.cp_gather_indexer_k_quant_cache(
            self.index, keys, scales, step.tables, step.key_starts
        )
        logits = gemm.fp8_fp4_mqa_logits(
            (q, None), (keys, scales.view(torch.float32).view(-1)), weights, step.starts, step.ends,
            clean_logits=False,
        )  # fmt: skip
        ops.top_k_per_row_prefill(
            logits, step.starts, step.ends, out, rows, logits.stride(0), logits.stride(1), step.topk
        )
        return out

    def _decode(self, q: torch.Tensor, *plan: Any) -> Any:
        step, model = self.step, self.step.model
        if model.window:
            shape = step.batch, 1
            view = (-1, PAGE, 1, model.token_bytes)
            near = self.near.view(view) if self.near.is_contiguous() else _rows(self.near)
            far = self.cache.view(view) if self.cache.is_contiguous() else _rows(self.cache)
            main = near, step.recent, step.lengths[0], step.sinks
            extra = far, step.chosen.view(*shape, -1), step.lengths[1]
            scale = model.dim**-0.5
        else:
            shape = (step.batch, 1) if step.is_decode else (1, step.tokens)
            main = self.cache.unsqueeze(2), step.chosen.view(*shape, -1), None, None
            extra, scale = (None, None, None), 192**-0.5
        return torch.ops._flashmla_C.sparse_decode_fwd(
            q.view(*shape, HEADS, model.dim), *main, *plan, *extra, VALUE_DIM, scale,
            step.out.view(*shape, HEADS, VALUE_DIM),
        )  # fmt: skip

    def attention(self, q: torch.Tensor) -> Any:
        """Attend to the selected tokens, which do not come from :meth:`selection`."""
        step, model = self.step, self.step.model
        if model.window and not step.is_decode:
            return torch.ops._flashmla_C.sparse_prefill_fwd(
                q, step.gathered, step.combined, model.dim**-0.5, VALUE_DIM, step.sinks, None,
                step.out,
            )  # fmt: skip
        return self._decode(q, *self.plan)

    def run(self, parts: tuple[str, ...]) -> None:
        """Run some parts of the step."""
        q, query = self.ready, (self.index_codes, self.step.weights)
        for part in parts:
            if part == "write":
                q = self.write()
            elif part == "index query":
                query = self.index_query()
            elif part == "index key":
                self.index_key()
            elif part == "selection":
                self.selection(*query)
            else:
                self.attention(q)


def _rows(pages: torch.Tensor) -> torch.Tensor:
    """Padded pages in FlashMLA's form: [pages, 64, 1, 584]."""
    return pages.unflatten(1, (PAGE, 1, -1))


def eager_us(calls: list[Callable[[], object]], tokens: int) -> tuple[float, float]:
    """Median microseconds of a call without a graph, by the clocks of the GPU and of the host."""
    wanted = max(1, min(EAGER_CALLS, EAGER_TOKENS // tokens))
    calls = calls * -(-wanted // len(calls))
    spent = []
    for index in range(ROUNDS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        start = time.perf_counter_ns()
        for call in calls:
            call()
        host = (time.perf_counter_ns() - start) / 1e3
        end.record()
        end.synchronize()
        if index >= 2:  # the first iterations warm up
            spent.append((begin.elapsed_time(end) * 1e3 / len(calls), host / len(calls)))
    gpu, hosts = zip(*spent)
    return statistics.median(gpu), statistics.median(hosts)


def step_rows(
    model_name: str, step_name: str, library: Any, failed: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The sum of a step's parts, and each part. Cases that could not be timed go to `failed`."""
    model, seqs = facts.MODELS[model_name], facts.STEPS[step_name]
    step = Step(model, seqs, library)
    layers = [Layer(step) for _ in range(facts.layer_count(model, seqs))]
    lists: dict[str, tuple[str, ...]] = {"sum": model.vllm_parts}
    lists.update({part: (part,) for part in model.vllm_parts})
    for name, parts in lists.items():
        calls = [functools.partial(layer.run, parts) for layer in layers]
        row = {"section": SECTION, "model": model_name, "step": step_name, "part": name}
        try:
            row.update(peer=PEER, us=graph_us(calls))
            if name == "sum":
                row["eager_us"], row["host_us"] = eager_us(calls, step.tokens)
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            failed[f"{model_name} {step_name} {name}"] = " ".join(str(error).split())[:200]
            continue
        yield row


def _slots(tokens: int) -> torch.Tensor:
    """Slots of tokens that fill scattered pages."""
    pages = torch.randperm(-(-tokens // PAGE), device="cuda")[:, None] * PAGE
    return (pages + torch.arange(PAGE, device="cuda")).flatten()[:tokens].contiguous()


def write_latents(cache_format: str, tokens: int) -> Iterator[Callable[[], object]]:
    """Calls of the writer of a format."""
    kind, size = FORMATS[cache_format]
    moved, slots = tokens * (1152 + size + 8), _slots(tokens)
    one = torch.ones(1, device="cuda")
    for _ in range(min(MOST_COPIES, -(-COLD_BYTES // moved))):
        latent = normal(tokens, VALUE_DIM), normal(tokens, ROPE)
        cache = codes(-(-tokens // PAGE), PAGE, size)
        if kind == "auto":
            cache = cache.view(BF16)
        yield functools.partial(
            torch.ops._C_cache_ops.concat_and_cache_mla, *latent, cache, slots, kind, one
        )


def write_queries_and_keys(heads: int, tokens: int) -> Iterator[Callable[[], object]]:
    """Calls of V4's writer, which pads queries."""
    moved, slots = tokens * (heads * 1024 + HEADS * 1024 + 1024 + 584), _slots(tokens)
    positions = torch.randint(0, 32768, (tokens,), device="cuda")
    cos_sin = torch.randn(32768, ROPE, device="cuda")
    for _ in range(min(MOST_COPIES, -(-COLD_BYTES // moved))):
        inputs = normal(tokens, heads, 512), normal(tokens, 512)
        cache = Layer._planar(-(-tokens // PAGE))
        yield functools.partial(
            torch.ops._C.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert,
            *inputs, cache, slots, positions, cos_sin, HEADS, 1e-6, PAGE,
        )  # fmt: skip


def writer_rows(failed: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The writers alone. Cases that could not be timed go to `failed`."""
    cases: list[tuple[dict[str, Any], Callable[[], Iterator[Callable[[], object]]]]] = [
        ({"op": "mla_write_cache", "format": name, "tokens": tokens},
         functools.partial(write_latents, name, tokens))
        for name in facts.WRITE_FORMATS for tokens in facts.WRITE_TOKENS
    ]  # fmt: skip
    cases += [
        ({"op": "mla_qkv_norm_rope_write", "heads": heads, "tokens": tokens},
         functools.partial(write_queries_and_keys, heads, tokens))
        for heads in facts.QKV_HEADS for tokens in facts.QKV_TOKENS
    ]  # fmt: skip
    for shape, make in cases:
        try:
            calls = list(make())
            us = graph_us(calls)
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            failed[str(shape)] = " ".join(str(error).split())[:200]
            continue
        finally:
            torch.cuda.empty_cache()
        yield {"section": WRITERS, "peer": PEER, **shape, "us": us}


def main() -> None:
    """Time and print from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to merge rows into")
    parser.add_argument("--peers", type=Path, help="Python file that loads vLLM's operators")
    parser.add_argument("--writers", action="store_true", help="also the writers alone")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    library = kernels(arguments.peers)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for model in facts.MODELS:
        for step in facts.STEPS:
            try:
                rows += step_rows(model, step, library, failed)
            except (RuntimeError, TypeError, AttributeError, ValueError) as error:
                failed[f"{model} {step}"] = " ".join(str(error).split())[:200]
            torch.cuda.empty_cache()
            write_section(arguments.out, SECTION, rows, {"left_out": failed})
            found = [row for row in rows if (row["model"], row["step"]) == (model, step)]
            print(f"{model} {step}:", ", ".join(f"{row['part']} {row['us']:.1f}" for row in found))
    if arguments.writers:
        missed: dict[str, str] = {}
        alone = list(writer_rows(missed))
        write_section(arguments.out, WRITERS, alone, {"left_out": missed})
        print("\n".join(f"{row['op']} {list(row.values())[3:-1]} {row['us']:.2f}" for row in alone))
        failed.update(missed)
    for what, why in failed.items():
        print(f"left out: {what}: {why}")
    if not rows:
        raise SystemExit("nothing could be timed")


if __name__ == "__main__":
    main()
