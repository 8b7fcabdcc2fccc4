"""Whole models in FastDeploy: loader, scheduler with a prefix cache and chunks, runner, model.

Prompts go through FastDeploy's ``ResourceManagerV1`` and ``GPUModelRunner``, and every token's
hidden state is compared with a float64 model of the same checkpoint. The sampler is left out: the
largest logit is the next token.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle

from fastdeploy_check import serving
from fastdeploy_check.cases import NotRun, environment
from fastdeploy_check.checkpoints import bfloat16, save, save_scales, spec_of, weights
from fastdeploy_check.decoder import Decoder

#: Upper bound of an error, relative to the largest one of the model in bfloat16.
MOST_ERROR = 1.5
BLOCKS = 40

#: Variables of FastDeploy's worker processes, which its engine sets.
SOT = {"SOT_ENABLE_0_SIZE_FALLBACK": "0", "SOT_SPECIALIZED_DIM_NUMBERS": "no"}

Case = tuple[str, Callable[[], float]]


def find(module: str) -> Any:
    """A module of FastDeploy."""
    return importlib.import_module(f"fastdeploy.{module}")


class Server:
    """A server of one process, driven step by step.

    Parameters
    ----------
    architecture : str
        A model of :func:`checkpoints.spec_of`.
    kind : str or None
        FastDeploy's ``kv_cache_quant_type``.
    **options
        Arguments of the worker's command line.
    """

    def __init__(self, architecture: str, kind: str | None = None, **options: Any) -> None:
        if not hasattr(find("worker.gpu_model_runner").GPUModelRunner, "_preprocess"):
            raise NotRun("the runner of this FastDeploy runs a step as a whole, with its sampler")
        self.spec = spec_of(architecture)
        tensors = weights(self.spec)
        self.config = self._configure(tensors, kind, options)
        self.decoder = Decoder(self.spec, tensors, kind)
        for name in (
            "engine.sched.resource_manager_v1",
            "engine.resource_manager",
            "cache_manager.prefix_cache_manager",
            "worker.gpu_model_runner",
            "spec_decode.mtp",
        ):
            if hasattr(find(name), "IPCSignal"):
                find(name).IPCSignal = serving.Signal
        find("model_executor.layers.normalization")._TRITON_AVAILABLE = False
        loader = find("model_executor.model_loader.default_loader_v1")
        loader.need_memory_reconstruction = lambda config: False
        self.runner = find("worker.gpu_model_runner").GPUModelRunner(self.config, "gpu", 0, 0, 0)
        self.runner.load_model()
        self.runner.num_gpu_blocks = BLOCKS
        self.runner.initialize_kv_cache()
        manager = find("engine.sched.resource_manager_v1").ResourceManagerV1
        self.scheduler = manager(serving.SLOTS, self.config, 1, "mixed")
        self.requests: dict[str, Any] = {}
        #: Tokens of a sequence, a position, and the hidden states from there on.
        self.seen: list[tuple[list[int], int, np.ndarray]] = []
        #: Draft tokens by slot, and how many of them were accepted and rejected.
        self.drafts: dict[int, list[int]] = {}
        self.verified = [0, 0]

    def _configure(
        self, tensors: dict[str, np.ndarray], kind: str | None, options: dict[str, Any]
    ) -> Any:
        """FastDeploy's configuration, of a checkpoint that this function writes."""
        config = serving.make_config(
            self.spec.fields, kind, max_num_batched_tokens=96, ori_vocab_size=256, **options
        )
        save(config.model_config.model, tensors)
        if kind is not None:
            quantised = find("model_executor.layers.quantization.mix_quant").MixQuantConfig
            config.quant_config = quantised(None, None, kv_cache_quant_type=kind)
            config.quant_config.dense_quant_type = config.quant_config.moe_quant_type = None
            config.quant_config.is_checkpoint_bf16 = False
            if kind != "block_wise_fp8":
                save_scales(config.model_config.model, self.spec, kind)
        config.load_config.load_choices = "default_v1"
        cache = config.cache_config
        cache.enable_prefix_caching = cache.enable_chunked_prefill = True
        cache.total_block_num = cache.prefill_kvcache_block_num = BLOCKS
        cache.bytes_per_token_per_layer = 1024
        cache.prealloc_dec_block_slot_num_threshold = 2
        cache.enc_dec_block_num = 1
        return config

    def add(self, name: str, prompt: Any, most: int = 4) -> None:
        """Queue a request for `most` tokens."""
        sampling = find("engine.sampling_params").SamplingParams(
            max_tokens=most, temperature=1.0, top_p=1.0, repetition_penalty=1.0,
            frequency_penalty=0.0, presence_penalty=0.0,
        )  # fmt: skip
        request = find("engine.request").Request(
            request_id=name,
            prompt_token_ids=[int(x) for x in prompt],
            prompt_token_ids_len=len(prompt),
            eos_token_ids=[1] * self.config.model_config.eos_tokens_lens,
            sampling_params=sampling,
        )
        request.metrics.inference_start_time = time.time()
        self.scheduler.add_request(request)
        self.requests[name] = request

    def run(self, limit: int = 60) -> None:
        """Run until no request is left."""
        for _ in range(limit):
            if not self.step():
                time.sleep(0.02)  # the scheduler frees finished requests in a thread
            if not self.scheduler.running and not self.scheduler.waiting:
                return
        raise serving.Wrong(f"requests are left after {limit} steps")

    @paddle.no_grad()
    def step(self) -> bool:
        """Run one step, keep its hidden states, and append tokens; False if nothing ran."""
        batch = self.scheduler.schedule()
        batch = batch[0] if isinstance(batch, tuple) else batch
        count = max([r.idx for r in self.scheduler.running] or [-1]) + 1
        if count == 0:
            return False
        inputs, buffer = self.runner.share_inputs, self._begin(batch, count)
        new, cached = (
            x.numpy().reshape(-1)[:count].copy() for x in (buffer, inputs["seq_lens_decoder"])
        )
        made = self.runner._preprocess(batch, count)[0]
        if made is None:
            return False
        out = self.runner._execute(made)
        logits = self.runner.model.compute_logits(out).numpy()
        hidden = out.astype("float32").numpy().astype(np.float64)
        place, by_slot = 0, {r.idx: r for r in self.scheduler.running}
        for slot in np.flatnonzero(new):
            request, n, done = by_slot[slot], int(new[slot]), int(cached[slot])
            rows, place = slice(place, place + n), place + n
            drafts = self.drafts.pop(int(slot), [])
            ids = [*request.prompt_token_ids, *request.output_token_ids]
            self.seen.append(([*ids, *drafts][: done + n], done, hidden[rows]))
            tokens = self._verify(drafts, [int(x) for x in logits[rows].argmax(-1)])
            inputs["seq_lens_decoder"][slot] = done + n - len(drafts) + len(tokens) - 1
            inputs["seq_lens_encoder"][slot] = 0
            buffer[slot] = 0
            if done + n >= len(ids):
                self._append(request, tokens, int(slot), buffer)
        if place != len(hidden):
            raise serving.Wrong(f"{len(hidden)} tokens came out, expected {place}")
        self.runner.exist_prefill_flag = False
        return True

    def _begin(self, batch: list[Any], count: int) -> Any:
        """Give the runner the scheduled tasks; returns its buffer of new lengths."""
        inputs = self.runner.share_inputs
        if batch:
            self.runner.insert_tasks_v1(list(batch), count)
        buffer = getattr(self.runner, "seq_lens_this_time_buffer", None)
        buffer = inputs["seq_lens_this_time_buffer"] if buffer is None else buffer
        inputs["seq_lens_this_time"] = buffer[:count]
        return buffer

    def _verify(self, drafts: list[int], found: list[int]) -> list[int]:
        """The drafts that are what the model found at the tokens before them, and one more token.

        `found`: the model's choice after each token of the step, of which the drafts are the last.
        """
        found = found[len(found) - len(drafts) - 1 :]
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == found[accepted]:
            accepted += 1
        self.verified[0] += accepted
        self.verified[1] += len(drafts) - accepted
        return found[: accepted + 1]

    def _draft(self, request: Any, slot: int) -> list[int]:
        """Draft tokens: two right ones, a right and a wrong one, or a wrong and a right one."""
        ids = [*request.prompt_token_ids, *request.output_token_ids]
        head = self.decoder.weights["lm_head.weight"]
        made: list[int] = []
        for place in range(2):
            right = int((head @ self.decoder.hidden([*ids, *made])[-1]).argmax())
            made.append(right if (slot + len(ids)) % 3 != place else right % 200 + 3)
        return made

    def _append(self, request: Any, tokens: list[int], slot: int, buffer: Any) -> None:
        """Append tokens to a request, of which one may be its last."""
        inputs = self.runner.share_inputs
        request.output_token_ids.extend(tokens)
        inputs["input_ids"][slot, 0] = tokens[-1]
        buffer[slot] = 1
        if self.config.speculative_config.method is not None:
            self.drafts[slot] = self._draft(request, slot)
            inputs["draft_tokens"][slot, :3] = paddle.to_tensor([tokens[-1], *self.drafts[slot]])
            buffer[slot] = 3
        if len(request.output_token_ids) >= request.sampling_params.max_tokens:
            buffer[slot] = 0
            self.drafts.pop(slot, None)
            inputs["seq_lens_decoder"][slot] = 0
            inputs["stop_flags"][slot] = True
            self.scheduler.finish_requests(request.request_id)
            inputs["block_tables"][slot, :] = -1

    def day(self) -> float:
        """Prompts of several lengths, four of which share prefixes. Returns the error.

        Raises
        ------
        Wrong
            If the error is above :data:`MOST_ERROR`, or no prefix was found in the cache.
        """
        rng = np.random.default_rng(3)
        base = rng.integers(2, 256, 150)
        self.add("first", base[:130])
        self.run()
        self.add("two blocks shared", np.concatenate([base[:128], rng.integers(2, 256, 40)]))
        self.add("short", rng.integers(2, 256, 7))
        self.add("one block", rng.integers(2, 256, 64))
        self.run()
        longer = np.concatenate([base[:130], rng.integers(2, 256, 70)])
        self.add("two blocks shared, longer", longer, 6)
        self.add("one block shared", base[:66])
        self.run()
        reused = sum(int(r.num_cached_tokens or 0) for r in self.requests.values())
        if reused != 128 + 128 + 64:
            raise serving.Wrong(f"{reused} tokens came from the prefix cache, expected 320")
        return self.check()

    def check(self) -> float:
        """Compare all hidden states with the float64 model's; returns the largest error.

        Raises
        ------
        Wrong
            If it is above :data:`MOST_ERROR`.
        """
        worst = floor = 0.0
        whole = [[*r.prompt_token_ids, *r.output_token_ids] for r in self.requests.values()]
        known: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
        for ids, done, hidden in self.seen:
            # Later tokens do not change a hidden state. Only rejected drafts are in no request.
            ids = next((x for x in whole if x[: len(ids)] == ids), ids)
            if tuple(ids) not in known:
                known[tuple(ids)] = self.decoder.hidden(ids), self.decoder.hidden(ids, bfloat16)
            own = slice(done, done + len(hidden))
            wanted, rounded = (x[own] for x in known[tuple(ids)])
            floor = max(floor, serving.relative_error(rounded, wanted))
            worst = max(worst, serving.relative_error(hidden, wanted))
        if worst > MOST_ERROR * floor:
            raise serving.Wrong(f"error {worst:.4f}, in bfloat16 {floor:.4f}")
        return worst


#: Models with GQA, of which the first one runs with every cache type.
GROUPED = (
    "Qwen3ForCausalLM", "Qwen2ForCausalLM", "Ernie4_5_ForCausalLM", "Glm4MoeForCausalLM",
)  # fmt: skip
KINDS = (None, "int8", "float8_e4m3fn", "block_wise_fp8")

#: Models of latent attention, and their backends.
LATENT = {
    "DeepseekV3ForCausalLM": "MLA_ATTN",
    "Glm4MoeLiteForCausalLM": "MLA_ATTN",
    "DeepseekV32ForCausalLM": "DSA_ATTN",
    "GlmMoeDsaForCausalLM": "DSA_ATTN",
}


def _serve(architecture: str, kind: str | None = None, backend: str | None = None) -> float:
    names = find("platforms")._Backend.__members__
    known = find("model_executor.models.model_base").ModelRegistry.get_supported_archs()
    if architecture not in known or (backend is not None and backend not in names):
        raise NotRun("this FastDeploy has no such model or backend")
    with environment(**({} if backend is None else {"FD_ATTENTION_BACKEND": backend})):
        server = Server(architecture, kind)
        made = type(server.runner.attn_backends[0]).__module__
        if not made.startswith("fastattn"):
            raise serving.Wrong(f"the backend is FastDeploy's own {made}")
        return server.day()


def _drafts(architecture: str, kind: str | None = None, backend: str = "APPEND_ATTN") -> float:
    """Steps that verify drafts, of which the model accepts some and rejects others.

    The drafts come from the float64 model. FastDeploy's proposers need operators of a GPU.
    """
    options = {"method": "ngram", "num_speculative_tokens": 2}
    with environment(FD_ATTENTION_BACKEND=backend):
        server = Server(architecture, kind, speculative_config=options)
        error = server.day()
    if min(server.verified) < 4:
        raise serving.Wrong(f"{server.verified} drafts were accepted and rejected")
    return error


def _programs(kind: str | None, steps: str, level: int) -> float:
    """A server whose steps of one kind run a program, as FastDeploy's wrapper translates it.

    FastDeploy runs programs in decode steps, or with ``full_cuda_graph: false`` in steps with
    prefill; all of them in CUDA graphs, which this check leaves out.
    """
    package = "model_executor.graph_optimization"
    wrapper, counts = find(f"{package}.graph_optimization_backend").GraphOptBackend, [0, 0]

    def call(self: Any, **given: Any) -> Any:
        static = given["forward_meta"].exist_prefill == (steps == "prefill")
        counts[static] += 1
        if not static:
            return self.dy_runnable(**given)
        with find(f"{package}.utils").sot_warmup_guard(counts[True] <= 2):
            return self.runnable(**given)

    cache = importlib.import_module("paddle.jit.sot.opcode_translator.executor.executor_cache")
    cache.OpcodeExecutorCache().clear()  # of an earlier server in this process
    options = {"graph_opt_level": level, "use_cudagraph": False}
    really, wrapper.__call__ = wrapper.__call__, call
    try:
        with environment(**SOT):
            server = Server(GROUPED[0], kind, graph_optimization_config=options)
            error = server.day()
    finally:
        wrapper.__call__ = really
    backend = server.runner.attn_backends[0]
    if min(counts) < 4 or len(backend._programs.layers) != len(server.runner.attn_backends) * 2:
        raise serving.Wrong(f"{counts[1]} steps ran a program, {counts[0]} did not")
    return error


def cases() -> Iterator[Case]:
    """Models from end to end."""
    for architecture in GROUPED:
        for kind in KINDS if architecture == GROUPED[0] else KINDS[:1]:
            yield (
                f"end to end, {architecture}, {kind or 'none'}",
                lambda a=architecture, k=kind: _serve(a, k),
            )
    for architecture, backend in LATENT.items():
        yield (
            f"end to end, {architecture}",
            lambda a=architecture, b=backend: _serve(a, None, b),
        )
    for kind in KINDS:
        yield f"end to end, drafts, {kind or 'none'}", lambda k=kind: _drafts(GROUPED[0], k)
    for architecture, backend in list(LATENT.items())[::2]:
        yield (
            f"end to end, drafts, {architecture}",
            lambda a=architecture, b=backend: _drafts(a, None, b),
        )
    for steps in ("decode", "prefill"):
        for kind in KINDS:
            level = 2 if kind == "int8" else 1
            yield (
                f"end to end, graph_opt_level {level} in {steps} steps, {kind or 'none'}",
                lambda k=kind, s=steps, n=level: _programs(k, s, n),
            )
