"""Models of latent attention (MLA, DSA): FastDeploy's own layers, from hidden states to outputs.

Their projections, norms, rotation, indexer and loaders run as they are in the tree. The reference
is attention in float64 with keys and values expanded for every head, as in training; the layers
themselves use absorbed projections.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import paddle

from fastdeploy_check import architectures
from fastdeploy_check.cases import STEPS, Case, Later, NotRun, environment
from fastdeploy_check.oracle import relative_error
from fastdeploy_check.serving import BLOCKS, MAX_LEN, SLOTS, Wrong, array, make_config, make_runner

#: Upper bound of the relative error of a layer. Its inputs are rounded to bfloat16 seven times. In
#: a sparse layer these roundings move latents from one e4m3 code to the next.
TOLERANCE = {"MLA_ATTN": 0.02, "DSA_ATTN": 0.03}

#: Minimum fraction of the best keys that an indexer selects from FP8 queries and keys.
RECALL = 0.93

HIDDEN, RANK, LATENT, ROPE, NOPE, VALUE, INDEX = 256, 64, 512, 64, 64, 64, 128
HEADS, INDEX_HEADS, LAYERS = 8, 8, 2
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": MAX_LEN // 4,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
MODEL = {
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "head_dim": NOPE + ROPE,
    "kv_lora_rank": LATENT,
    "q_lora_rank": RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "index_n_heads": INDEX_HEADS,
    "index_head_dim": INDEX,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": LAYERS,  # no layer has experts, because this check does not cover them
}
#: Models by their backend, and additional fields of their config.json.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepseekV3ForCausalLM": ("MLA_ATTN", {"model_type": "deepseek_v3", "rope_scaling": YARN}),
    "Glm4MoeLiteForCausalLM": ("MLA_ATTN", {"model_type": "glm4_moe_lite"}),
    "DeepseekV32ForCausalLM": ("DSA_ATTN", {"model_type": "deepseek_v32", "rope_scaling": YARN}),
    "GlmMoeDsaForCausalLM": (
        "DSA_ATTN",
        {"model_type": "glm_moe_dsa", "rope_parameters": {"rope_theta": 10000.0}},
    ),
}
#: Numbers of keys that an indexer selects: fewer than a sequence has, and more.
TOPK = (16, 512)


def checkpoint() -> tuple[dict[str, np.ndarray], Any]:
    """float64 weights of both layers by name, and an iterator over bfloat16 tensors."""
    rng = np.random.default_rng(9)
    shapes = {
        "q_a_proj": (RANK, HIDDEN),
        "kv_a_proj_with_mqa": (LATENT + ROPE, HIDDEN),
        "q_b_proj": (HEADS * (NOPE + ROPE), RANK),
        "kv_b_proj": (HEADS * (NOPE + VALUE), LATENT),
        "o_proj": (HIDDEN, HEADS * VALUE),
        "q_a_layernorm": (RANK,),
        "kv_a_layernorm": (LATENT,),
        "indexer.wq_b": (INDEX_HEADS * INDEX, RANK),
        "indexer.wk": (INDEX, HIDDEN),
        "indexer.k_norm": (INDEX,),
        "indexer.weights_proj": (INDEX_HEADS, HIDDEN),
    }
    made: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            spread = rng.normal(size=shape) / np.sqrt(shape[-1])
            values = rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else spread
            made[f"{layer}.{name}.weight"] = values
        made[f"{layer}.indexer.k_norm.bias"] = rng.normal(size=INDEX)
    made = {name: x.astype(ml_dtypes.bfloat16).astype(np.float64) for name, x in made.items()}
    return made, (
        (
            "model.layers.{}.self_attn.{}".format(*name.split(".", 1)),
            paddle.to_tensor(x.astype(np.float32)).astype("bfloat16"),
        )
        for name, x in made.items()
    )


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """RMSNorm over the channels."""
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * weight


def turn(x: np.ndarray, table: np.ndarray, halves: bool) -> np.ndarray:
    """Rotate x [T, H, 64] at positions 0, 1, ... by a table of 32 cosines and 32 sines."""
    cos, sin = (part[: len(x), None] for part in np.split(table, 2, -1))
    index = np.arange(ROPE // 2)
    one, two = (index, index + ROPE // 2) if halves else (2 * index, 2 * index + 1)
    out = x.copy()
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., two] * cos + x[..., one] * sin
    return out


def e4m3(x: np.ndarray, tile: int) -> np.ndarray:
    """bfloat16 values after a round trip through e4m3 with a power-of-two scale per tile."""
    tiles = x.astype(ml_dtypes.bfloat16).astype(np.float64).reshape(len(x), -1, tile)
    amax = np.maximum(np.abs(tiles).max(-1, keepdims=True), 1e-4)
    scale = np.exp2(np.ceil(np.log2(amax / 448)))
    return ((tiles / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale).reshape(
        x.shape
    )


class LatentModel:
    """One layer in float64."""

    def __init__(
        self, weights: dict[str, np.ndarray], layer: int, table: np.ndarray, kind: str, heads: Any
    ) -> None:
        self.sparse, self.halves = kind in SPARSE, kind == "DeepseekV32ForCausalLM"
        prefix = f"{layer}."
        self.w = {n[len(prefix) :]: x for n, x in weights.items() if n.startswith(prefix)}
        for weight, axis in (("q_b_proj", 0), ("kv_b_proj", 0), ("o_proj", 1)):
            whole = self.w[f"{weight}.weight"]
            parts = np.split(whole, HEADS, axis)
            self.w[f"{weight}.weight"] = np.concatenate([parts[head] for head in heads], axis)
        self.table, self.heads = table, len(heads)
        factor = 0.1 * np.log(YARN["factor"]) + 1 if "rope_scaling" in MODELS[kind][1] else 1.0
        self.scale = (NOPE + ROPE) ** -0.5 * factor**2

    def project(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Logits of the indexer [T, T]."""
        qr = rms(self.project(x, "q_a_proj"), self.w["q_a_layernorm.weight"])
        q = self.project(qr, "indexer.wq_b").reshape(len(x), INDEX_HEADS, INDEX)
        k = self.project(x, "indexer.wk")
        k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
        k = (k * self.w["indexer.k_norm.weight"] + self.w["indexer.k_norm.bias"])[:, None]
        for part in (q, k):
            part[..., :ROPE] = turn(part[..., :ROPE], self.table, self.halves)
        weights = self.project(x, "indexer.weights_proj")
        return np.einsum("th,thn->tn", weights, np.maximum(q @ k[:, 0].T, 0))

    def attend(self, x: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Outputs [T, hidden] of tokens [T, hidden] that see keys `seen` [T, T]."""
        tokens = len(x)
        qr = rms(self.project(x, "q_a_proj"), self.w["q_a_layernorm.weight"])
        q = self.project(qr, "q_b_proj").reshape(tokens, self.heads, NOPE + ROPE)
        latent, rope = np.split(self.project(x, "kv_a_proj_with_mqa"), [LATENT], -1)
        latent = rms(latent, self.w["kv_a_layernorm.weight"])
        if self.sparse:
            latent = e4m3(latent, 128)
        expanded = self.project(latent, "kv_b_proj").reshape(tokens, self.heads, NOPE + VALUE)
        rope = turn(rope[:, None], self.table, halves=False)
        scores = np.einsum("qhd,khd->hqk", q[..., :NOPE], expanded[..., :NOPE])
        turned = turn(q[..., NOPE:], self.table, halves=False)
        scores += np.einsum("qhd,kd->hqk", turned, rope[:, 0])
        scores = np.where(seen[None], scores * self.scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", weights, expanded[..., NOPE:])
        return self.project(out.reshape(tokens, -1), "o_proj")


SPARSE = tuple(name for name, (backend, _) in MODELS.items() if backend == "DSA_ATTN")


class LatentServing:
    """Sequences that grow step by step through FastDeploy's runner and a model's attention."""

    def __init__(self, name: str, topk: int = 512, **options: Any) -> None:
        parallel = options.get("tensor_parallel_size", 1)
        self.rank, self.heads = options.get("rank", 0), HEADS // parallel
        registry = importlib.import_module("fastdeploy.model_executor.models.model_base")
        self.name, self.topk = name, topk
        fields = {**MODEL, **MODELS[name][1], "architectures": [name], "index_topk": topk}
        self.config = config = make_config(fields, **options)
        self.runner = make_runner(config)
        self.backend = self.runner.attn_backends[0]
        if not type(self.backend).__module__.startswith("fastattn"):
            raise Wrong(f"the backend is FastDeploy's own {type(self.backend).__module__}")
        self.net = registry.ModelRegistry.get_class(name)(config)
        weights, pairs = checkpoint()
        with paddle.no_grad():
            self.net.load_weights(pairs)
            utils = importlib.import_module("fastdeploy.model_executor.utils")
            utils.process_final_after_loading(self.net, config)
        self.layers = [layer.self_attn for layer in self.net.model.layers]
        tables = [array(layer.rotary_emb.cos_sin_cache) for layer in self.layers]
        own = list(range(self.rank * self.heads, (self.rank + 1) * self.heads))
        self.models = [LatentModel(weights, i, tables[i], name, own) for i in range(LAYERS)]
        self.inputs = self.runner.share_inputs
        rng = np.random.default_rng(3)
        hidden = rng.normal(size=(SLOTS, LAYERS, MAX_LEN, HIDDEN))
        self.tokens = hidden.astype(ml_dtypes.bfloat16).astype(np.float64)
        self.tables = np.full(self.inputs["block_tables"].shape, -1, np.int32)
        self.tables[:, :4] = rng.permutation(BLOCKS)[: SLOTS * 4].reshape(SLOTS, 4)
        self.inputs["block_tables"].set_value(paddle.to_tensor(self.tables))
        self.cached = [0] * SLOTS

    def prepare(self, new: list[int], prefill: list[bool]) -> Any:
        """Set the slots, then call the runner's own ``_prepare_inputs``, and set its positions."""
        from fastdeploy_check.serving import Serving

        self.images: list[Any] = []
        meta = Serving.prepare(self, new, prefill)  # type: ignore[arg-type]
        places = getattr(self.runner, "_compute_position_ids_and_slot_mapping", None)
        if places is not None:
            asked = len(inspect.signature(places).parameters)
            places(*[sum(new)][:asked])
        return meta

    def forward(self, index: int, hidden: Any, meta: Any) -> Any:
        """Call a layer's attention as its release does."""
        layer = self.layers[index]
        names = inspect.signature(layer.forward).parameters
        if "position_ids" not in names:
            return layer(meta, hidden)
        return layer(meta, hidden, meta.position_ids.cast("int32"))

    def step(self, new: list[int], prefill: list[bool]) -> float:
        """Run one step of all layers; the sequences grow. Returns the largest error."""
        meta = self.prepare(new, prefill)
        worst = 0.0
        for index in range(LAYERS):
            parts = [self.tokens[b, index, at : at + n] for b, (at, n) in self.running(new)]
            hidden = paddle.to_tensor(np.concatenate(parts).astype(np.float32)).astype("bfloat16")
            self.chosen: Any = None
            with paddle.no_grad():
                self.watch()
                out = array(self.forward(index, hidden, meta))
            worst = max(worst, self.check(index, out, new))
        for slot, n in enumerate(new):
            self.cached[slot] += n
        if worst > TOLERANCE[MODELS[self.name][0]]:
            raise Wrong(f"error {worst:.3f}")
        return worst

    def running(self, new: list[int]) -> list[tuple[int, tuple[int, int]]]:
        return list(enumerate(zip(self.cached, new)))

    def watch(self) -> None:
        """Record the keys that the backend selects."""
        if self.name not in SPARSE:
            return
        choose = type(self.backend).select

        def select(*args: Any) -> Any:
            slots = choose(self.backend, *args)
            self.chosen = slots.numpy()
            return slots

        self.backend.select = select

    def check(self, index: int, out: np.ndarray, new: list[int]) -> float:
        """Largest error of a sequence of the step."""
        worst, start, model = 0.0, 0, self.models[index]
        self.recall: list[float] = []
        for slot, (done, n) in self.running(new):
            if n == 0:
                continue
            tokens = self.tokens[slot, index, : done + n]
            seen = np.tril(np.ones((done + n, done + n), bool))
            if self.name in SPARSE:
                seen[done:] = self.chosen_keys(slot, done, n, start, model.logits(tokens))
            exact = model.attend(tokens, seen)[done:]
            worst = max(worst, relative_error(out[start : start + n], exact))
            start += n
        if len(out) != start:
            raise Wrong(f"{len(out)} tokens came out, expected {start}")
        if self.recall and np.mean(self.recall) < RECALL:
            raise Wrong(f"{np.mean(self.recall):.2f} of the best keys were chosen")
        return worst

    def chosen_keys(self, slot: int, done: int, n: int, start: int, logits: np.ndarray) -> Any:
        """Keys [n, done + n] that a slot's tokens of the step selected, if they are the best."""
        positions = np.arange(done + n)
        own = self.tables[slot, positions // 64] * 64 + positions % 64
        seen = np.zeros((n, done + n), bool)
        for i in range(n):
            row, last = self.chosen[start + i], done + i
            seen[i] = np.isin(own, row[row >= 0])
            if seen[i].sum() != min(self.topk, last + 1) or seen[i, last + 1 :].any():
                raise Wrong(f"token {last} of slot {slot} chose other keys than its own")
            best = np.argsort(-logits[last, : last + 1])[: self.topk]
            self.recall.append(seen[i, best].mean())
        return seen


def options() -> Iterator[Case]:
    """Further options of a server of such a model."""
    dense, sparse = "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"
    known = [name for name in (dense, sparse) if name in architectures.architectures()]
    graphs = {"graph_optimization_config": {"use_cudagraph": True}}
    for name in known:
        for size in (2, 4, 8):
            ranks = {"tensor_parallel_size": size, "rank": size - 1}
            yield f"{name}: rank {size - 1} of {size}", lambda n=name, o=ranks: _day(n, **o)
        yield f"{name}: shapes that the engine asks for", lambda n=name: _engine(n)
        spec = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 1}}
        yield f"{name}: speculative decoding", lambda n=name, o=spec: _drafts(n, **o)
        yield f"{name}: CUDA graphs", lambda n=name: _day(n, **graphs)
        yield f"{name}: a prefix that two sequences share", lambda n=name: _shared_prefix(n)
        yield f"{name}: deterministic mode", lambda n=name: _day(n, {"FD_DETERMINISTIC_MODE": "1"})
        yield f"{name}: int8", lambda n=name: _day(n, kind="int8")
        level = {"graph_optimization_config": {"graph_opt_level": 1}}
        yield f"{name}: graph_opt_level 1", lambda n=name, o=level: _day(n, **o)
    yield "USE_FLASH_MLA", lambda: _flash_mla(dense)


def _flash_mla(name: str) -> float:
    """Where FastDeploy's layers pass one token of each sequence, a kernel in Triton takes it."""
    backend = importlib.import_module(
        "fastdeploy.model_executor.layers.attention.mla_attention_backend"
    )

    def first_tokens(q: Any, starts: Any, _: Any, cached: Any) -> tuple[Any, Any]:
        return paddle.gather(q, starts[: cached.shape[0]].clip(max=q.shape[0] - 1)), cached + 1

    if hasattr(backend, "extract_decoder_token_from_q"):
        backend.extract_decoder_token_from_q = first_tokens
    return _day(name, {"USE_FLASH_MLA": "1"})


def _serving(name: str, variables: dict[str, str] | None = None, **options: Any) -> LatentServing:
    with environment(FD_ATTENTION_BACKEND=MODELS[name][0], **(variables or {})):
        return LatentServing(name, 16, **options)


def _day(name: str, variables: dict[str, str] | None = None, **options: Any) -> float:
    server = _serving(name, variables, **options)
    with environment(**(variables or {})):
        return max(server.step(*STEPS[step]) for step in ("prefill", "chunk", "fewer, mixed"))


def _drafts(name: str, **options: Any) -> float:
    """Two queries per decoding sequence, with some rejected draft tokens."""
    server = _serving(name, **options)
    if server.backend.config.decode_tokens != 2:
        raise Wrong("the backend does not know of drafts")
    worst = server.step(*STEPS["prefill"])
    for accepted in ([2, 1, 1, 2, 1, 2, 2, 1], [1] * 8, [2] * 8):
        before = list(server.cached)
        worst = max(worst, server.step([2] * 8, [False] * 8))
        server.cached = [a + b for a, b in zip(before, accepted)]
    return max(worst, server.step(*STEPS["mixed"]))


def _engine(name: str) -> float:
    """The engine's prefix cache uses shapes in this way before it starts its processes."""
    module = importlib.import_module("fastdeploy.cache_manager.prefix_cache_manager")
    server = _serving(name)
    manager = object.__new__(module.PrefixCacheManager)
    manager.config = server.config
    with environment(FD_ATTENTION_BACKEND=MODELS[name][0]):
        key, value = manager._get_kv_cache_shape(BLOCKS)
    if (made := list(server.inputs["caches"][0].shape)) != key or value:
        raise Wrong(f"the engine has {key} and {value}, the worker {made}")
    return 0.0


def _shared_prefix(name: str) -> float:
    """Slot 1 begins with two blocks that slot 0 wrote."""
    server = _serving(name)
    server.tokens[1, :, :128] = server.tokens[0, :, :128]
    server.tables[1, :2] = server.tables[0, :2]
    server.inputs["block_tables"].set_value(paddle.to_tensor(server.tables))
    worst = server.step([140, 0], [True, False])
    server.cached[1] = 128
    return max(worst, server.step([1, 30], [False, True]), server.step([1, 1], [False, False]))


def not_there() -> float:
    """A model that no release has yet."""
    raise NotRun("this FastDeploy has no such model")


def cases() -> Iterator[Case]:
    """The steps through every model, and further options of a server."""
    for name, (backend, _) in MODELS.items():
        if name not in architectures.architectures():
            yield name, lambda: not_there()
            continue
        for topk in TOPK if backend == "DSA_ATTN" else (512,):

            def make(name: str = name, backend: str = backend, topk: int = topk) -> Any:
                with environment(FD_ATTENTION_BACKEND=backend):
                    return LatentServing(name, topk)

            server = Later(make)
            label = f"{name}, top-{topk}" if backend == "DSA_ATTN" else name
            for step, (new, prefill) in STEPS.items():
                yield (
                    f"{label}: {step}",
                    lambda server=server, new=new, prefill=prefill: server.get().step(new, prefill),
                )
    yield from options()
