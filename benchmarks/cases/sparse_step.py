"""A layer's attention step of a DeepSeek model with an indexer, from the caches' writes on.

Every operator between a layer's products, in the order of a step: the new token's row of the latent
cache, the indexer's queries and keys, its logits with their top-k, slots, the attention; for V4 the
compression and the output's inverse rotation, too. Norms, rotations and products that other
libraries have for every model are left out. What a step does once for all layers, its maps (slots
of tokens, rows of queries, windows), is a row of its own and in no sum. Each operator has the
results of those before it. A step is replayed in a CUDA graph of layers whose caches exceed the L2
cache together, and made eagerly, where the host may take longer than the GPU.

Parts have rows of their own. vLLM's compiled kernels do some of them; a graph of these alone stands
beside a graph of vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import paddle

import fastattn.functional as F
from benchmarks.cases import sparse_models as facts
from benchmarks.cases.sparse_models import INDEX_DIM, PAGE, Seqs, SparseModel
from benchmarks.core import cuda
from benchmarks.core.devices import Cpu, Device, Gpu
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, medians
from fastattn._views import view
from fastattn.backends.indexer import TILE

OP = "sparse step"
VALUE_DIM, ROPE = 512, 64
#: Tokens of a block of the compressor's states.
STATE_BLOCK = 4
#: Calls that are made eagerly before anything is waited for: about, and new tokens in them at most.
_GRAPH_CALLS = 16
_EAGER_CALLS, _EAGER_TOKENS = 64, 4096
_CHUNK = 1 << 16  # tokens that are written at a time
_STEPS = {
    "gpu": facts.STEPS,
    "gpu quick": facts.QUICK_STEPS,
    "cpu": facts.CPU_STEPS,
    "cpu quick": facts.CPU_QUICK_STEPS,
}


def _tables(counts: Sequence[int], first: Sequence[int] | None = None) -> tuple[Any, int]:
    """Blocks of sequences in random order, int32 [B, most], and their number.

    Parameters
    ----------
    counts : sequence of int
        Blocks of each sequence, those that it has left behind included.
    first : sequence of int, optional
        The first block that each still has; -1 stands for those before it.
    """
    begins = [int(x) for x in first or [0] * len(counts)]
    total = sum(counts) - sum(begins)
    order = np.random.default_rng(4).permutation(total)
    table = np.full((len(counts), max(counts)), -1, np.int32)
    used = 0
    for row, begin, end in zip(table, begins, counts):
        row[begin:end] = order[used : used + end - begin]
        used += end - begin
    return table, total


class SparseStep:
    """What all layers of a step share: where its tokens are, and their inputs.

    Parameters
    ----------
    device : Device
    model : SparseModel
    seqs : list of (int, int)
        Cached tokens and new tokens of each sequence; one new token of each, or one sequence.
    """

    def __init__(self, device: Device, model: SparseModel, seqs: Seqs) -> None:
        self.device, self.model, self.seqs = device, model, seqs
        cached, new = np.array(seqs).T
        self.is_decode = bool((new == 1).all())
        seq = np.repeat(np.arange(len(seqs)), new)
        positions = np.concatenate([np.arange(c, c + n) for c, n in seqs])
        self.tokens = len(positions)
        self.keys = facts.entries(model, seqs)
        self.longest = max(self.keys)
        self.topk = facts.chosen(model, seqs)
        table, self.pages = _tables([-(-keys // PAGE) for keys in self.keys])
        self.tables = device.int32(table)
        entry = positions // model.ratio
        page = np.minimum(entry // PAGE, table.shape[1] - 1)  # an incomplete group may have none
        slots = table[seq, page].astype(np.int64) * PAGE + entry % PAGE
        ends = (positions + 1) // model.ratio
        complete = (positions + 1) % model.ratio == 0
        self.slots = device.array(np.where(complete, slots, -1))
        self.positions = device.array(positions)
        self.seq_of_token = device.int32(seq)
        self.ends, self.starts = device.int32(ends), device.int32(np.zeros(self.tokens))
        self.cached = device.int32(cached)
        self.first_tokens = device.int32(np.concatenate([[0], np.cumsum(new)]))
        self.key_starts = device.int32(np.concatenate([[0], np.cumsum(self.keys)]))
        self.angles = device.uniform((int(positions.max()) + 1, ROPE), -1, 1)
        self.q = device.random((self.tokens, model.heads, model.dim), seed=3)
        self.index_q = device.random((self.tokens, model.index_heads, INDEX_DIM), seed=5)
        self.weights = device.uniform((self.tokens, model.index_heads))
        self.outs = self._outs()
        self.sinks = device.uniform((model.heads,)) if model.window else None
        if model.window:
            self._recent(seq, positions, cached)
        else:
            self.latent = device.random((self.tokens, VALUE_DIM), seed=7)
            self.rope = device.random((self.tokens, ROPE), seed=9)
            self.index_key = device.random((self.tokens, INDEX_DIM), seed=11)

    def _outs(self) -> dict[str, paddle.Tensor]:
        """Results that layers write one after the other."""
        empty, model = self.device.empty, self.model
        outs = {
            "topk": empty((self.tokens, self.topk), "int32"),
            "attention": empty((self.tokens, model.heads, VALUE_DIM), "bfloat16"),
            "q": empty((self.tokens, model.heads, model.dim), "bfloat16"),
        }
        if not self.is_decode:
            outs["codes"] = empty((self.longest, INDEX_DIM), "uint8")
            outs["scales"] = empty((self.longest,), "float32")
        return outs

    def _recent(self, seq: Any, positions: Any, cached: Any) -> None:
        """The window's cache and the compressor's states, of which old tokens have left."""
        device, model = self.device, self.model
        ends = [int(c + n) for c, n in self.seqs]
        begins = np.maximum(cached - model.window + 1, 0)
        window, self.window_pages = _tables(
            [-(-end // PAGE) for end in ends], [b // PAGE for b in begins]
        )
        slots = window[seq, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
        self.window_slots = device.array(slots)
        self.window_tables = device.int32(window)
        self.seen = self._windows(device.int32(positions))
        groups = np.maximum(cached - 2 * model.ratio + 1, 0) // STATE_BLOCK
        states, self.state_blocks = _tables([-(-end // STATE_BLOCK) for end in ends], list(groups))
        at = states[seq, positions // STATE_BLOCK].astype(np.int64) * STATE_BLOCK
        self.state_tables = device.int32(states)
        self.state_slots = device.array(at + positions % STATE_BLOCK)
        self.latent = device.random((self.tokens, model.dim), seed=7)
        #: Values and scores of the states, biases and norms: of the attention, of the indexer.
        self.compressed = {
            head: (
                device.random((self.tokens, 4 * head), "float32", seed=head),
                device.uniform((model.ratio, 2 * head)),
                device.uniform((head,)),
            )
            for head in (model.dim, INDEX_DIM)
        }

    def _windows(self, positions: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        return F.window_indices(
            positions, self.seq_of_token, window=self.model.window, block_tables=self.window_tables
        )

    def maps(self) -> None:
        """What all layers share: slots of the tokens; windows, or rows of the indexer's queries."""
        tables = self.window_tables if self.model.window else self.tables
        ids, starts = self.seq_of_token, self.first_tokens
        _, positions, _ = F.token_maps(ids, tables, starts, self.cached, num_tokens=self.tokens)
        if self.model.window:
            self._windows(positions)
        else:
            F.query_rows(ids, positions, tables, starts, tile=1 if self.is_decode else TILE)


class SparseLayer:
    """A layer's caches, and the parts of its step."""

    def __init__(self, step: SparseStep) -> None:
        self.step = step
        device, model = step.device, step.model
        self.cache = self._latents(step.pages)
        self.index = device.empty((step.pages, PAGE, INDEX_DIM + 4), "uint8")
        for slots, count in _slot_ranges(device, step.pages * PAGE):
            keys = device.random((count, INDEX_DIM), seed=13)
            F.indexer_k_write_cache(keys, self.index, slots)
        if model.window:
            self.near = self._latents(step.window_pages)
            self.states = {
                head: device.random((step.state_blocks, STATE_BLOCK, 4 * head), "float32", seed=1)
                for head in (model.dim, INDEX_DIM)
            }

    def _latents(self, pages: int) -> paddle.Tensor:
        """A latent cache of normal values, written by the operator that a server calls."""
        device, model = self.step.device, self.step.model
        cache = device.empty((pages, PAGE, model.token_bytes), "uint8")
        for slots, count in _slot_ranges(device, pages * PAGE):
            latent = device.random((count, model.dim - ROPE), seed=15)
            rope = device.random((count, ROPE), seed=17)
            F.mla_write_cache(latent, rope, cache, slots, cache_format=model.cache_format)
        return cache

    # --- the parts, each with what those before it gave

    def write(self) -> paddle.Tensor:
        """The new tokens' rows, and for V4 their queries' norm and rotation."""
        step = self.step
        if not step.model.window:
            latent = step.latent, step.rope
            F.mla_write_cache(*latent, self.cache, step.slots, cache_format="fp8_656")
            return step.q
        return F.mla_qkv_norm_rope_write(
            step.q, step.latent, self.near, step.window_slots, step.positions, step.angles,
            out=step.outs["q"],
        )  # fmt: skip

    def _compressed(self, head: int, cache: paddle.Tensor, quant: str) -> None:
        step, states = self.step, self.states[head]
        kv_score, ape, norm = step.compressed[head]
        F.save_partial_states(kv_score, ape, step.positions, states, step.state_slots)
        F.indexer_kv_compress_insert(
            states, step.state_tables, step.seq_of_token, step.positions, step.state_slots,
            step.slots, norm, step.angles, cache,
            compress_ratio=step.model.ratio, page_size=PAGE, quant=quant,
        )  # fmt: skip

    def compress(self) -> None:
        """V4: the new tokens' states, and the keys of groups that they complete."""
        self._compressed(self.step.model.dim, self.cache, "fp8_512")

    def index_query(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Codes and folded weights; V3.2's channels are those of V4 in another order."""
        step = self.step
        codes, _, weights = F.indexer_q_rope_quant(
            step.positions, step.index_q, step.angles, step.weights, INDEX_DIM**-0.5, 0.125
        )
        return codes, weights

    def index_key(self) -> None:
        """The new tokens' index keys."""
        if self.step.model.window:
            self._compressed(INDEX_DIM, self.index, "fp8")
        else:
            F.indexer_k_write_cache(self.step.index_key, self.index, self.step.slots)

    def selection(self, codes: paddle.Tensor, weights: paddle.Tensor) -> paddle.Tensor:
        """Logits and their top-k: over pages, and for a chunk over keys that are gathered once."""
        step, outs = self.step, self.step.outs
        if step.is_decode:
            q = view(codes, [step.tokens, 1, -1, INDEX_DIM])
            return F.paged_indexer_topk(
                q, self.index, weights, step.ends, step.tables, step.longest, step.topk,
                out=outs["topk"],
            )  # fmt: skip
        keys, scales = F.indexer_k_gather(
            self.index, step.tables, step.key_starts, step.longest,
            out=outs["codes"], out_scales=outs["scales"],
        )  # fmt: skip
        return F.indexer_topk(
            codes, keys, weights, step.starts, step.ends, step.topk,
            k_scales=scales, out=outs["topk"],
        )  # fmt: skip

    def slots(self, chosen: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Slots of the chosen tokens."""
        step = self.step
        return F.topk_to_slots(chosen, step.tables, step.seq_of_token, num_blocks=step.pages)

    def attention(
        self, q: paddle.Tensor, slots: paddle.Tensor, lengths: paddle.Tensor
    ) -> paddle.Tensor:
        """The attention; for V4 over the window and the compressed tokens."""
        step, out = self.step, self.step.outs["attention"]
        if not step.model.window:
            return F.mla_sparse_attention(
                q, self.cache, slots, cache_format="fp8_656", topk_length=lengths,
                softmax_scale=192**-0.5, out=out,
            )  # fmt: skip
        recent, counts = step.seen
        return F.mla_sparse_attention(
            q, self.near, recent, cache_format="fp8_584", topk_length=counts,
            extra_cache=self.cache, extra_indices=slots, extra_topk_length=lengths,
            sinks=step.sinks, out=out,
        )  # fmt: skip

    def output(self, attended: paddle.Tensor) -> object:
        """V4: the output's inverse rotation and quantisation."""
        step = self.step
        return F.inverse_rope_quantize_fp8(attended, step.positions, step.angles)

    def run(self, parts: Sequence[str], given: dict[str, Any] | None = None) -> dict[str, Any]:
        """Some parts of the step; `given` has results of parts that are not among them.

        Returns
        -------
        dict
            What each part gave.
        """
        return _run(self._works(parts), given or {})

    def call(self, parts: Sequence[str], given: dict[str, Any] | None = None) -> Call:
        """A call of :meth:`run` that keeps nothing alive."""
        works, known = self._works(parts), given or {}

        def work() -> None:
            _run(works, known)

        return work

    def _works(self, parts: Sequence[str]) -> list[tuple[str, Any, Any]]:
        """Parts, what does them, and what takes their inputs from the results of others."""
        return [(part, getattr(self, part.replace(" ", "_")), _INPUTS.get(part)) for part in parts]


#: Arguments of parts, from what other parts gave.
_INPUTS: dict[str, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
    "selection": lambda found: found["index query"],
    "slots": lambda found: (found["selection"],),
    "attention": lambda found: (found["write"], *found["slots"]),
    "output": lambda found: (found["attention"],),
}


def _run(works: list[tuple[str, Any, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """Results of parts beside those given. It does little else: a step's host time is measured."""
    found = dict(given)
    for part, work, inputs in works:
        found[part] = work() if inputs is None else work(*inputs(found))
    return found


def _slot_ranges(device: Device, tokens: int) -> Iterator[tuple[paddle.Tensor, int]]:
    for begin in range(0, tokens, _CHUNK):
        count = min(_CHUNK, tokens - begin)
        yield device.array(np.arange(begin, begin + count)), count


def _repeated(calls: list[Call]) -> list[Call]:
    """As many calls that the launch of a graph with all of them is nothing."""
    return calls * -(-_GRAPH_CALLS // len(calls))


def _beside(row: Row, **shape: object) -> Iterator[Row]:
    yield from [
        row.beside(other["peer"], other["us"]) for other in peers("sparse_step", **shape)
    ] or [row]


def _eager(row_shape: str, calls: list[Call], tokens: int, **shape: object) -> Iterator[Row]:
    """Rows of steps without a graph: on the GPU's clock, beside the host's time and vLLM's."""
    wanted = max(1, min(_EAGER_CALLS, _EAGER_TOKENS // tokens))
    work = calls * -(-wanted // len(calls))
    ((us, host),) = cuda.median_eager_us([work], rounds=9)
    row = Row(OP, f"{row_shape}, eager", us / len(work))
    yield row.beside("host", host / len(work))
    for other in peers("sparse_step", **shape):
        if "host_us" in other:
            yield row.beside(f"{other['peer']}, eager", other["eager_us"])
            yield row.beside(f"{other['peer']}, host", other["host_us"])


@register("step/sparse", "gpu")
def sparse_step(device: Gpu) -> Iterator[Row]:
    """Two models: decode of 1 to 128 sequences, and a chunk of a prompt."""
    for model_name, model in facts.MODELS.items():
        for step_name, seqs in device.of(_STEPS).items():
            layers = _layers(device, model, seqs, facts.layer_count(model, seqs))
            shape, at = f"{model_name} {step_name}", {"model": model_name, "step": step_name}
            given = [layer.run(model.parts) for layer in layers]
            shares: dict[str, tuple[str, ...]] = {"": model.parts}
            if model.parts != model.vllm_parts:
                shares[", parts of vLLM"] = model.vllm_parts
            for label, parts in shares.items():
                calls = [layer.call(parts, x) for layer, x in zip(layers, given)]
                part = "sum" if parts == model.vllm_parts else "all"
                us = device.us(_repeated(calls))
                yield from _beside(Row(OP, f"{shape}{label}, graph", us), part=part, **at)
                yield from _eager(shape + label, calls, layers[0].step.tokens, part=part, **at)
            maps = [layers[0].step.maps] * _GRAPH_CALLS
            yield Row(OP, f"{shape}, maps once a step", device.us(maps))
            for part in model.parts:
                calls = [layer.call([part], x) for layer, x in zip(layers, given)]
                row = Row(OP, f"{shape}, {part}", device.us(_repeated(calls)))
                yield from _beside(row, part=part, **at)
            del layers, given, calls


@register("step/sparse", "cpu")
def sparse_step_cpu(device: Cpu) -> Iterator[Row]:
    """A layer of each model, and its parts."""
    for model_name, model in facts.MODELS.items():
        for step_name, seqs in device.of(_STEPS).items():
            (layer,) = _layers(device, model, seqs, 1)
            given = layer.run(model.parts)
            works = [layer.call(model.parts), *(layer.call([x], given) for x in model.parts)]
            times = medians([*works, layer.step.maps], 3 if device.quick else 9)
            for part, us in zip(("", *model.parts, "maps once a step"), times):
                yield Row(OP, f"{model_name} {step_name}{part and f', {part}'}", us)


def _layers(device: Device, model: SparseModel, seqs: Seqs, count: int) -> list[SparseLayer]:
    step = SparseStep(device, model, seqs)
    return [SparseLayer(step) for _ in range(count)]
