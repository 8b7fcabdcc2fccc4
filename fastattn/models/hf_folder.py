"""Models in folders of Hugging Face's layout: ``config.json`` and safetensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.calibrate.errors import CalibrationError
from fastattn.calibrate.tensor_files import read_safetensors
from fastattn.functional.rotary_styles import use_neox_rotary_style
from fastattn.models.config import ModelConfig, ModelError
from fastattn.models.hf_tokenizer import read_tokenizer
from fastattn.models.tokenizer import Tokenizer
from fastattn.models.weights import LayerNames, NamedReader, Weights, read_weights
from fastattn.reference.numerics import Array

_LAYER = "model.layers.{}."
_LLAMA_NAMES = LayerNames(
    attention_norm=_LAYER + "input_layernorm",
    q=_LAYER + "self_attn.q_proj",
    k=_LAYER + "self_attn.k_proj",
    v=_LAYER + "self_attn.v_proj",
    attention_out=_LAYER + "self_attn.o_proj",
    mlp_norm=_LAYER + "post_attention_layernorm",
    gate=_LAYER + "mlp.gate_proj",
    up=_LAYER + "mlp.up_proj",
    down=_LAYER + "mlp.down_proj",
    q_norm=_LAYER + "self_attn.q_norm",
    k_norm=_LAYER + "self_attn.k_norm",
)
_GEMMA_NAMES = LayerNames(
    **{
        **vars(_LLAMA_NAMES),
        "mlp_norm": _LAYER + "pre_feedforward_layernorm",
        "attention_post_norm": _LAYER + "post_attention_layernorm",
        "mlp_post_norm": _LAYER + "post_feedforward_layernorm",
    }
)

#: Embedding, last norm, head.
_ENDS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")

#: ``model_type`` -> architecture.
_TYPES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}


def llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> Array:
    """What divides the frequencies of Llama 3.1: 1 for short waves, `factor` for long ones.

    Source: Llama 3.1's reference code, ``apply_scaling``.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    waves = 2 * math.pi / frequencies
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    length, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])
    smooth = np.clip((length / waves - low) / (high - low), 0.0, 1.0)
    result: Array = 1 / ((1 - smooth) / factor + smooth)
    return result


def _config(told: dict[str, Any]) -> tuple[ModelConfig, Array | None]:
    kind = told.get("model_type")
    if kind not in _TYPES:
        raise ModelError(f"model_type {kind!r} is not supported; supported: {', '.join(_TYPES)}")
    architecture = _TYPES[kind]
    gemma = architecture == "gemma3"
    heads, hidden, layers = (
        int(told[n]) for n in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    head_dim = int(told.get("head_dim") or hidden // heads)
    theta = float(told.get("rope_theta") or 1e4)
    factor, factors = 1.0, None
    scaling = told.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "linear":
        factor = float(scaling["factor"])
    elif rope_type == "llama3":
        factors = llama3_factors(scaling, theta, head_dim)
    elif rope_type != "default":
        raise ModelError(f"rope_scaling of type {rope_type!r} is not supported")
    window, full = _windows(told, gemma, layers)
    config = ModelConfig(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(told.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        vocabulary=int(told["vocab_size"]),
        context=int(told.get("max_position_embeddings", 2048)),
        norm_eps=float(told.get("rms_norm_eps", 1e-6)),
        softmax_scale=float(told.get("query_pre_attn_scalar", head_dim) if gemma else head_dim)
        ** -0.5,
        neox=use_neox_rotary_style(kind, "hf"),
        rope_theta=theta,
        rope_factor=factor,
        local_rope_theta=float(told.get("rope_local_base_freq", 1e4)) if gemma else theta,
        window=window,
        full=full,
        gelu=gemma,
        embedding_scale=hidden**0.5 if gemma else 1.0,
    )
    return config, factors


def _windows(told: dict[str, Any], gemma: bool, layers: int) -> tuple[int, tuple[bool, ...]]:
    """Window of a model, 0 if it has none, and for each layer whether it sees all keys."""
    if told.get("use_sliding_window") is False or not told.get("sliding_window"):
        return 0, ()
    kinds = told.get("layer_types")
    if kinds is not None:
        full = tuple(kind == "full_attention" for kind in kinds)
    elif gemma:
        every = int(told.get("sliding_window_pattern", 6))
        full = tuple((n + 1) % every == 0 for n in range(layers))
    else:
        full = (False,) * layers
    return int(told["sliding_window"]), full


def _reader(folder: Path, gemma: bool) -> NamedReader:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError("no .safetensors in it")
    tensors: dict[str, Array] = {}
    for file in files:
        try:
            tensors.update(read_safetensors(file)[0])
        except (CalibrationError, OSError) as error:
            raise ModelError(str(error)) from None

    def read(name: str) -> Array | None:
        found = tensors.get(name)
        if found is None:
            return None
        values = found.astype(np.float32)
        # Gemma's norms are stored less 1.
        return values + 1 if gemma and name.endswith("norm.weight") else values

    return NamedReader(read)


def read_hf_folder(folder: Path) -> tuple[ModelConfig, Weights, Tokenizer]:
    """A model of a folder with ``config.json``, ``tokenizer.json`` and ``*.safetensors``.

    Raises
    ------
    ModelError
        If it is no model that this package runs.
    """
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, factors = _config(told)
        gemma = config.architecture == "gemma3"
        named = _reader(folder, gemma)
        names = _GEMMA_NAMES if gemma else _LLAMA_NAMES
        mlp = int(told["intermediate_size"])
        weights = read_weights(named, config, names, mlp, _ENDS, factors)
        return config, weights, read_tokenizer(folder)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    except KeyError as error:
        raise ModelError(f"{folder}: config.json: {error} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: {error}") from None
