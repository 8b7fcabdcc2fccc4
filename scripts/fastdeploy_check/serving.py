"""FastDeploy's runner on this machine: its configuration, steps, and the check of a layer."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from fastdeploy_check.oracle import LayerModel, relative_error

#: Upper bound of the root mean square error of a bfloat16 result, relative to the exact values.
TOLERANCE = 0.01
SLOTS = 8
MAX_LEN = 512
BLOCKS = 36

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "vocab_size": 128,
    "max_position_embeddings": MAX_LEN,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}


class Wrong(AssertionError):
    """A result differs from the exact one."""


def tolerable(error: float) -> float:
    """The error, if it is at most :data:`TOLERANCE`."""
    if error > TOLERANCE:
        raise Wrong(f"error {error:.3f}")
    return error


def make_config(
    model: dict[str, Any] | None = None,
    kind: str | None = None,
    rank: int = 0,
    **options: Any,
) -> Any:
    """FastDeploy's own ``FDConfig``, made from a command line as a worker makes it.

    Parameters
    ----------
    model : dict, optional
        Fields of the model's ``config.json`` in addition to :data:`MODEL`.
    kind : str, optional
        ``kv_cache_quant_type``.
    rank : int
        This worker's rank.
    **options
        Arguments of the worker's command line, as values.
    """
    worker = importlib.import_module("fastdeploy.worker.worker_process")
    folder = tempfile.mkdtemp(prefix="check_fastdeploy_")
    fields = {**MODEL, **(model or {})}
    fields = {name: value for name, value in fields.items() if value is not None}
    (Path(folder) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    given, sys.argv = sys.argv, ["worker", "--model", folder]
    try:
        args = worker.parse_args()
    finally:
        sys.argv = given
    for name, value in vars(args).items():
        if name.endswith("_config") and value is None:
            setattr(args, name, {})
    chosen = {
        "max_model_len": MAX_LEN,
        "max_num_seqs": SLOTS,
        "dtype": "bfloat16",
        "max_num_batched_tokens": MAX_LEN,
        "graph_optimization_config": {"use_cudagraph": False},
        **options,
    }
    if kind is not None:
        chosen["quantization"] = {
            "quantization": "mix_quant",
            "kv_cache_quant_type": kind,
            "dense_quant_type": "wint8",
            "moe_quant_type": "wint8",
            "is_quantized": True,
        }
    for name, value in chosen.items():
        setattr(args, name, value)
    config = worker.initialize_fd_config(args, 1, rank)
    config.model_config.is_quantized = False
    return config


class Signal:
    """FastDeploy's signal to another process. There is none; it reports that the caches exist."""

    def __init__(self, name: str = "", array: Any = None, **_: Any) -> None:
        self.value = np.ones_like(array) if name == "cache_ready_signal" else array


def make_runner(config: Any) -> Any:
    """FastDeploy's own ``GPUModelRunner`` with its caches."""
    module = importlib.import_module("fastdeploy.worker.gpu_model_runner")
    module.IPCSignal = importlib.import_module("fastdeploy.spec_decode.mtp").IPCSignal = Signal
    # a package that is not installed
    module.GPUModelRunner._init_image_preprocess = lambda self: None
    runner = module.GPUModelRunner(config, "gpu", 0, config.parallel_config.tensor_parallel_rank, 0)
    runner.num_gpu_blocks = BLOCKS
    runner.initialize_kv_cache()
    return runner


def make_layers(config: Any, count: int = 2, **options: Any) -> list[Any]:
    """FastDeploy's own ``Attention`` layers, with scales and norms from its own loaders."""
    attention = importlib.import_module("fastdeploy.model_executor.layers.attention").Attention
    layers = []
    for index in range(count):
        layer = attention(config, index, prefix=f"layers.{index}", **options)
        load(layer)
        layers.append(layer)
    return layers


def load(layer: Any) -> None:
    """A checkpoint's scales, norms and sinks, all different, through ``load_state_dict``."""
    rng = np.random.default_rng(10 * layer.layer_id)
    prefix, state = layer.prefix, {}
    if getattr(layer, "cache_k_scale", None) is not None:
        for name in "kv":
            shape = layer.cache_k_scale.shape
            state[f"{prefix}.cache{name}_matmul.activation_scale"] = rng.uniform(3, 7, shape)
    if getattr(layer, "use_qk_norm", False):
        for name in "qk":
            state[f"{prefix}.{name}_norm.weight"] = rng.uniform(0.5, 2, layer.head_dim)
    if getattr(layer, "with_sinks", False):
        state[f"{prefix}.sinks"] = rng.normal(size=layer.num_heads)
    arrays = {name: paddle.to_tensor(x.astype(np.float32)) for name, x in state.items()}
    if f"{prefix}.sinks" in arrays:
        arrays[f"{prefix}.sinks"] = arrays[f"{prefix}.sinks"].astype(layer.sinks.dtype)
    layer.load_state_dict(arrays)


def array(tensor: Any) -> Any:
    """float64 values of a tensor; None for None."""
    return None if tensor is None else tensor.astype("float32").numpy().astype(np.float64)


def model_of(layer: Any, config: Any, table: np.ndarray, kind: str | None) -> LayerModel:
    """A layer in NumPy, with the rank's own heads and scales."""
    scales = []
    for name in ("cache_k_out_scale", "cache_v_out_scale"):
        values = array(getattr(layer, name, None))
        if values is not None and kind == "float8_e4m3fn":  # for all heads of the model
            total, parallel = config.model_config.num_key_value_heads, config.parallel_config
            first = parallel.tensor_parallel_rank * total // parallel.tensor_parallel_size
            values = values[first : first + layer.kv_num_heads]
        scales.append(values)
    normed = not getattr(layer, "qk_norm_before_rope", False)
    norms = [array(getattr(layer, f"{x}_norm_weight", None)) if normed else None for x in "qk"]
    window = getattr(config.model_config, "window_size", 0) or layer.sliding_window
    return LayerModel(
        layer.num_heads,
        layer.kv_num_heads,
        layer.head_dim,
        table,
        layer.use_neox_rotary_style,
        kind,
        (scales[0], scales[1]),
        (norms[0], norms[1]),
        layer.rms_norm_eps,
        array(getattr(layer, "sinks", None)),
        window,
        getattr(config.model_config, "causal", True),
        getattr(config.model_config, "head_wise_swa_ratio", 0.0),
        getattr(config.model_config, "sink_size", 0),
    )


class Serving:
    """Sequences that grow step by step through FastDeploy's runner and attention layers."""

    def __init__(
        self, config: Any, kind: str | None = None, layers: list[Any] | None = None, **options: Any
    ) -> None:
        self.config, self.kind = config, kind
        self.runner = make_runner(config)
        self.layers = make_layers(config, **options) if layers is None else layers
        self.inputs = self.runner.share_inputs
        table = self.inputs["rope_emb"].numpy()
        self.models = [model_of(layer, config, table, kind) for layer in self.layers]
        self.rng = np.random.default_rng(3)
        width = self.models[0]
        columns = (width.heads + 2 * width.kv_heads) * width.dim
        self.tokens = [
            self.rng.normal(size=(len(self.layers), MAX_LEN, columns)) for _ in range(SLOTS)
        ]
        self.cached = [0] * SLOTS
        self.after_layer: Callable[[int], None] = lambda index: None
        self.images: list[tuple[int, int]] = []
        if table.ndim == 6:
            self._place_images()
        self._assign_blocks()

    def _assign_blocks(self) -> None:
        """Four blocks per slot, in random order."""
        tables = np.full(self.inputs["block_tables"].shape, -1, np.int32)
        tables[:, :4] = self.rng.permutation(BLOCKS)[: SLOTS * 4].reshape(SLOTS, 4)
        self.inputs["block_tables"].set_value(paddle.to_tensor(tables))

    def _place_images(self) -> None:
        """Place an image in each slot, at different positions, with FastDeploy's rotary tables.

        Positions have three axes. Text advances along all of them; an image of 2 rows does not
        advance along the first.
        """
        self.images = [(slot + 1, slot + 1 + 2 * (slot + 2)) for slot in range(SLOTS)]
        for slot, (first, last) in enumerate(self.images):
            text = np.repeat(np.arange(first)[:, None], 3, 1)
            row, column = np.divmod(np.arange(last - first), (last - first) // 2)
            image = first + np.stack([np.zeros_like(row), row, column], 1)
            ids = paddle.to_tensor(np.concatenate([text, image]).astype(np.int64))
            (table,) = self.runner.prepare_rope3d(ids, [MAX_LEN // 2], [0, last])
            self.inputs["rope_emb"][slot : slot + 1, :] = table
        self.tables = self.inputs["rope_emb"].numpy()
        if any((self.tables[0] == table).all() for table in self.tables[1:]):
            raise Wrong("slots have the same rotary table")

    def _image_ends(self, slot: int, n: int) -> np.ndarray:
        """Number of keys that a slot's next tokens see if image tokens see their whole image."""
        ends = self.cached[slot] + 1 + np.arange(n)
        first, last = self.images[slot]
        inside = (ends > first) & (ends <= last) & (last <= self.cached[slot] + n)
        return np.where(inside, last, ends)

    def _set_mask(self, new: list[int], prefill: list[bool]) -> None:
        """Ends of the masks of prefilled tokens, as the runner takes them from a request."""
        full = self.inputs["attn_mask_offsets_full"].numpy()
        for slot, n in enumerate(new):
            if prefill[slot]:
                full[slot, :n] = self._image_ends(slot, n) - 1
        self.inputs["attn_mask_offsets_full"].set_value(paddle.to_tensor(full))

    def prepare(self, new: list[int], prefill: list[bool]) -> Any:
        """Set the slots as the scheduler's tasks do, then call the runner's own
        ``_prepare_inputs``.
        """
        runner, inputs = self.runner, self.inputs
        buffer = getattr(runner, "seq_lens_this_time_buffer", None)
        buffer = inputs["seq_lens_this_time_buffer"] if buffer is None else buffer
        lens = np.zeros(SLOTS, np.int32)
        lens[: len(new)] = new
        encoder = np.where([*prefill, *[False] * (SLOTS - len(new))], lens, 0)
        for name, values in (
            (buffer, lens),
            (inputs["seq_lens_encoder"], encoder),
            (inputs["seq_lens_decoder"], np.array(self.cached)),
        ):
            name.set_value(paddle.to_tensor(values.astype(np.int32).reshape(name.shape)))
        inputs["seq_lens_this_time"] = buffer[: len(new)]
        if "seq_lens_this_time_cpu" in inputs:
            inputs["seq_lens_this_time_cpu"] = paddle.zeros([len(new)], "int32")
        if hasattr(runner, "exist_prefill_flag"):
            runner.exist_prefill_flag = any(prefill)
        self.masked = bool(self.images) and "attn_mask_offsets_full" in inputs
        if self.masked:
            self._set_mask(new, prefill)
        with paddle.no_grad():
            runner._prepare_inputs()
            runner.padding_cudagraph_inputs()
        return runner.forward_meta

    def fused(self, layer: int, new: list[int]) -> Any:
        """The fused projection of the step's tokens."""
        parts = [x[layer, at : at + n] for x, at, n in zip(self.tokens, self.cached, new)]
        return paddle.to_tensor(np.concatenate(parts).astype(np.float32)).astype("bfloat16")

    def check(
        self,
        layer: int,
        out: Any,
        new: list[int],
        ends: list[np.ndarray] | None = None,
        trees: np.ndarray | None = None,
    ) -> float:
        """Largest error of a sequence of the step. `ends`: number of keys that each of its tokens
        sees. `trees`: which new tokens of each slot see each other.
        """
        worst, start, values = 0.0, 0, array(out)
        for slot, n in enumerate(new):
            if n == 0:
                continue
            tokens = self.tokens[slot][layer, : self.cached[slot] + n].astype(np.float32)
            rounded = paddle.to_tensor(tokens).astype("bfloat16").astype("float32").numpy()
            if self.images:
                self.models[layer].table = self.tables[slot]
            seen = None if ends is None else ends[slot]
            if self.masked:
                seen = self._image_ends(slot, n)
            tree = None if trees is None else trees[slot, :n, :n]
            exact = self.models[layer].attend(rounded, self.cached[slot], ends=seen, tree=tree)
            worst = max(worst, relative_error(values[start : start + n], exact))
            start += n
        if len(values) != start:
            raise Wrong(f"{len(values)} tokens came out, expected {start}")
        return worst

    def step(self, new: list[int], prefill: list[bool] | None = None) -> float:
        """Run one step of all layers; the sequences grow. Returns the largest error.

        Raises
        ------
        Wrong
            If the error is above :data:`TOLERANCE`.
        """
        prefill = [n > 1 for n in new] if prefill is None else prefill
        meta = self.prepare(new, prefill)
        worst = 0.0
        for index, layer in enumerate(self.layers):
            with paddle.no_grad():
                out = layer(qkv=self.fused(index, new), forward_meta=meta)
            self.after_layer(index)
            worst = max(worst, self.check(index, out, new))
        for slot, n in enumerate(new):
            self.cached[slot] += n
        return tolerable(worst)
