#!/usr/bin/env python3
"""Time vLLM's kernels at the steps of `python -m fastattn bench --op step`.

    scripts/vllm_step_peers.py --out peers.json [--peers FILE]

The script needs a Hopper GPU, and torch with an installed vLLM 0.26, whose operators are called by
their names in `torch.ops`. Instead of vLLM, FILE may be a Python file that loads the libraries with
these operators: its `unpack`, if it has one, is called with its folder, then its `load`. A layer's
time is the sum of the kernels that vLLM runs for it: rotation of Q and K, cache write, quantisation
of Q to e4m3 for an 8-bit cache, and FlashAttention-3 over pages of 64 tokens, in a CUDA graph with
as many layers as the benchmark. Rows are merged into the file; name it in FASTATTN_BENCH_PEERS.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "fastdeploy_peers"))
import report
from steps import BLOCK, MAX_MODEL_LEN, MODELS, STEPS, Model, block_tables, graph_us, layer_count
from vllm_operators import load_operators

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
#: Cache types that are compared with vLLM's e4m3 kernels. Its 16-bit kernels are compared with
#: "none".
EIGHT_BITS = ("cache_fp8", "block_wise_fp8", "cache_int8", "block_wise_int8")
Tensors = tuple[torch.Tensor, ...]


class Layers:
    """Layers of a model that hold a step's sequences, and vLLM's calls of each.

    Parameters
    ----------
    model : Model
    sequences : list of (int, int, bool)
        Cached tokens, new tokens, and whether the sequence is in prefill.
    fp8 : bool
        Whether the cache is e4m3; otherwise it is bf16.
    """

    def __init__(self, model: Model, sequences: list[tuple[int, int, bool]], fp8: bool) -> None:
        self.model, self.fp8 = model, fp8
        h, kv, d = model.heads, model.kv, model.dim
        cached, new = ([s[i] for s in sequences] for i in range(2))
        lengths = [a + b for a, b in zip(cached, new)]
        self.tables, blocks = block_tables(lengths, 0)
        positions = [torch.arange(a, a + b, device="cuda") for a, b in zip(cached, new)]
        slots = [row[at // BLOCK].long() * BLOCK + at % BLOCK
                 for row, at in zip(self.tables, positions)]  # fmt: skip
        self.positions, self.slots = torch.cat(positions), torch.cat(slots)
        self.tokens = len(self.positions)
        self.most_queries, self.most_keys = max(new), max(lengths)
        self.starts = torch.tensor([0, *new], device="cuda").cumsum(0).int()
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        layers = layer_count(2 * blocks * BLOCK * kv * d * (1 if fp8 else 2))
        self.pools = [self._pool((2, blocks, BLOCK, kv, d)) for _ in range(layers)]
        self.inputs: list[Tensors] = [
            tuple(self._normal(heads, d) for heads in (h, kv, kv)) for _ in range(4)
        ]
        angles = torch.rand(MAX_MODEL_LEN, d // 2, device="cuda") * 2 * math.pi
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(BF16)
        self.one = torch.ones(1, device="cuda")
        self.sinks = torch.rand(h, device="cuda").to(BF16) if model.sinks else None
        self.quantised = torch.empty(self.tokens, h * d, device="cuda", dtype=E4M3)
        scales = torch.ones(len(sequences), kv, device="cuda")
        self.descales = (scales,) * 3 if fp8 else (None,) * 3
        self.schedule = self._schedule() if self.most_queries == 1 else None

    def _pool(self, shape: tuple[int, ...]) -> torch.Tensor:
        if not self.fp8:
            return torch.randn(shape, device="cuda", dtype=BF16)
        pool = torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)
        pool &= 0xBF  # finite numbers below 2
        return pool

    def _normal(self, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(self.tokens, heads, dim, device="cuda", dtype=BF16)

    def _schedule(self) -> torch.Tensor:
        """FlashAttention-3's schedule of a decode step, which vLLM makes once for all layers."""
        model, dtype = self.model, E4M3 if self.fp8 else BF16
        heads = model.heads, model.kv, model.dim, model.dim
        sizes = len(self.lengths), 1, self.most_keys
        lengths = self.lengths, self.starts, None, None, None, None
        make = torch.ops._vllm_fa3_C.get_scheduler_metadata
        options = BLOCK, 0, True, -1, -1, False, 0, None, 0
        return make(*sizes, *heads, dtype, *lengths, *options)

    def _attend(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        keys, values = pool.view(E4M3) if self.fp8 else pool
        rows = None, None, None, None, self.starts, None, None, None, self.lengths
        rows += self.most_queries, self.most_keys, self.tables
        rotation = (None,) * 5
        mask = q.shape[-1] ** -0.5, True, -1, -1, 0.0
        splits = True, self.schedule, 0, None, 0, self.sinks, 1, 0, None
        forward = torch.ops._vllm_fa3_C.fwd
        return forward(q, keys, values, *rows, *rotation, *self.descales, *mask, *splits)[0]

    def run(self, index: int) -> torch.Tensor:
        """The kernels of one layer."""
        (q, k, v), pool = self.inputs[index % len(self.inputs)], self.pools[index]
        flat = (x.view(self.tokens, -1) for x in (q, k))
        torch.ops._C.rotary_embedding(
            self.positions, *flat, self.model.dim, self.cos_sin, True
        )  # fmt: skip
        write = torch.ops._C_cache_ops.reshape_and_cache_flash
        kind = "fp8" if self.fp8 else "auto"
        write(k, v, pool[0], pool[1], self.slots, kind, self.one, self.one)
        if self.fp8:
            quantise(self.quantised, q.view(self.tokens, -1), self.one)
            q = self.quantised.view_as(q)
        return self._attend(q, pool)

    def calls(self) -> list[Callable[[], torch.Tensor]]:
        """A call for each layer."""
        return [functools.partial(self.run, index) for index in range(len(self.pools))]


def quantise(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    """Quantise to e4m3 with one scale; later versions of the operator also need its shape."""
    operator = torch.ops._C.static_scaled_fp8_quant
    more = len(operator.default._schema.arguments) - 3
    operator(out, x, scale, *[None] * more)


def all_rows(failed: dict[str, str]) -> Iterator[report.Row]:
    """Every row. Cases that could not be timed go to `failed`."""
    for name, model in MODELS.items():
        for step, sequences in STEPS.items():
            for fp8 in (True, False):
                kernels = "Q + FA3 FP8" if fp8 else "FA3 BF16"
                peer = f"{report.VLLM} rope + write + {kernels}"
                try:
                    us = graph_us(Layers(model, sequences, fp8).calls())
                except (RuntimeError, TypeError, AttributeError) as error:
                    failed[f"{name} {step} {peer}"] = str(error)[:200]
                    continue
                finally:
                    torch.cuda.empty_cache()
                quants = EIGHT_BITS if fp8 else ("none",)
                yield report.step_row(name, step, quants, peer, us)


def main() -> None:
    """Time and print from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to merge rows into")
    parser.add_argument("--peers", type=Path, help="Python file that loads vLLM's operators")
    arguments = parser.parse_args()
    load_operators(arguments.peers)
    failed: dict[str, str] = {}
    rows = list(all_rows(failed))
    report.write_merged(arguments.out, report.VLLM, rows, {"left_out": failed})
    print("\n".join(report.compact(rows, report.VLLM)))
    for what, why in failed.items():
        print(f"left out: {what}: {why}")
    if not rows:
        raise SystemExit("nothing could be timed")


if __name__ == "__main__":
    main()
