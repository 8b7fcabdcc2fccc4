"""Small models with random weights, as files of a Hugging Face checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

#: Fields of config.json that all models have.
BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 192,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

#: Fields of models with experts. No layer has any, because this check does not cover them.
NO_EXPERTS: dict[str, Any] = {
    "first_k_dense_replace": 99,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
}

#: Fields of models of latent attention.
LATENT: dict[str, Any] = {
    **NO_EXPERTS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 192,
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 8,
    "index_head_dim": 128,
    "index_topk": 512,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {"rope_theta": 10000.0},
}


def bfloat16(x: Any) -> np.ndarray:
    """float64 values, rounded to bfloat16."""
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


@dataclass
class Spec:
    """A model: fields of its config.json, and what the float64 model must know besides.

    Attributes
    ----------
    fields : dict
    attention : {"gqa", "mla", "dsa"}
    neox : bool
        Whether the rotation pairs channels that are half of the rotated channels apart.
    partial : float
        Part of a head that is rotated.
    bias, norm : bool
        Whether the projections have a bias, and Q and K a norm before the rotation.
    """

    fields: dict[str, Any]
    attention: str = "gqa"
    neox: bool = True
    partial: float = 1.0
    bias: bool = False
    norm: bool = False
    scales: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)


def spec_of(architecture: str) -> Spec:
    """One of the models that run end to end."""
    names: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "Qwen2ForCausalLM": ("qwen2", {"hidden_size": 512}, {"bias": True}),
        "Qwen3ForCausalLM": ("qwen3", {}, {"norm": True}),
        "Ernie4_5_ForCausalLM": ("ernie4_5", {"use_bias": False}, {"neox": False}),
        "Glm4MoeForCausalLM": (
            "glm4_moe",
            {
                **NO_EXPERTS,
                "partial_rotary_factor": 0.5,
                "attention_bias": True,
                "use_qk_norm": False,
            },
            {"bias": True, "partial": 0.5},
        ),
        "DeepseekV3ForCausalLM": ("deepseek_v3", LATENT, {"attention": "mla", "neox": False}),
        "Glm4MoeLiteForCausalLM": ("glm4_moe_lite", LATENT, {"attention": "mla", "neox": False}),
        "DeepseekV32ForCausalLM": ("deepseek_v32", LATENT, {"attention": "dsa", "neox": False}),
        "GlmMoeDsaForCausalLM": ("glm_moe_dsa", LATENT, {"attention": "dsa", "neox": False}),
    }
    kind, own, more = names[architecture]
    fields = {**BASE, **own, "architectures": [architecture], "model_type": kind}
    return Spec(fields, **more)


def weights(spec: Spec) -> dict[str, np.ndarray]:
    """float64 weights, which bfloat16 holds exactly, by their names in the checkpoint."""
    rng, fields = np.random.default_rng(5), spec.fields
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    made: dict[str, Any] = {
        "model.embed_tokens.weight": rng.normal(size=(fields["vocab_size"], hidden)),
        "model.norm.weight": rng.uniform(0.5, 1.5, hidden),
        "lm_head.weight": rng.normal(size=(fields["vocab_size"], hidden)) * 0.08,
    }
    for index in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        own = _attention(spec, rng) if spec.attention == "gqa" else _latent(spec, rng)
        made.update({f"{layer}self_attn.{name}": x for name, x in own.items()})
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden))):
            made[f"{layer}mlp.{name}_proj.weight"] = rng.normal(size=shape) * 0.08
        made[f"{layer}mlp.down_proj.weight"] = rng.normal(size=(hidden, inner)) * 0.08
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"{layer}{name}.weight"] = rng.uniform(0.5, 1.5, hidden)
    return {name: bfloat16(x) for name, x in made.items()}


def _attention(spec: Spec, rng: Any) -> dict[str, Any]:
    """Weights of a layer's projections, for its heads."""
    fields = spec.fields
    hidden, dim = fields["hidden_size"], fields["head_dim"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    made: dict[str, Any] = {"o_proj.weight": rng.normal(size=(hidden, heads * dim)) * 0.08}
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        made[f"{name}_proj.weight"] = rng.normal(size=(count * dim, hidden)) * hidden**-0.5
        if spec.bias:
            made[f"{name}_proj.bias"] = rng.normal(size=count * dim) * 0.5
    if spec.norm:
        made.update({f"{name}_norm.weight": rng.uniform(0.5, 2, dim) for name in "qk"})
    return made


def _latent(spec: Spec, rng: Any) -> dict[str, Any]:
    """Weights of a layer of latent attention, and of its indexer."""
    fields = spec.fields
    hidden, heads, rank = fields["hidden_size"], fields["num_attention_heads"], 64
    shapes: dict[str, tuple[Any, float]] = {
        "q_a_proj": ((rank, hidden), 0.08),
        "q_a_layernorm": ((rank,), 0.0),
        "q_b_proj": ((heads * 192, rank), 0.15),
        "kv_a_proj_with_mqa": ((576, hidden), 0.08),
        "kv_a_layernorm": ((512,), 0.0),
        "kv_b_proj": ((heads * 256, 512), 0.08),
        "o_proj": ((hidden, heads * 128), 0.08),
    }
    if spec.attention == "dsa":
        shapes |= {
            "indexer.wq_b": ((8 * 128, rank), 0.15),
            "indexer.wk": ((128, hidden), 0.08),
            "indexer.k_norm": ((128,), 0.0),
            "indexer.weights_proj": ((8, hidden), 0.08),
        }
    made = {
        f"{name}.weight": rng.normal(size=shape) * std if std else rng.uniform(0.5, 1.5, shape)
        for name, (shape, std) in shapes.items()
    }
    if spec.attention == "dsa":
        made["indexer.k_norm.bias"] = rng.normal(size=128) * 0.3
    return made


def save(folder: str, tensors: dict[str, np.ndarray]) -> None:
    """Write tensors as bfloat16 into ``model.safetensors``, and the index of the checkpoint."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place, body = 0, []
    for name, values in tensors.items():
        raw = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16)).tobytes()
        ends = [place, place + len(raw)]
        head[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": ends}
        place += len(raw)
        body.append(raw)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path = Path(folder, "model.safetensors")
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(body))
    files = {name: path.name for name in tensors}
    index = json.dumps({"metadata": {"total_size": place}, "weight_map": files})
    path.with_name("model.safetensors.index.json").write_text(index)


def save_scales(folder: str, spec: Spec, kind: str) -> None:
    """Write ``kv_cache_scale.json``, and keep the multipliers that FastDeploy makes of it.

    FastDeploy's loader multiplies a value by 448, divides the type's maximum by that, and inverts
    the result; each step is rounded to bfloat16.
    """
    rng, fields = np.random.default_rng(9), spec.fields
    heads, dim = fields["num_key_value_heads"], fields["head_dim"]
    count, most = (heads * dim, 127.0) if kind == "int8" else (heads, 448.0)
    ernie = fields["model_type"] == "ernie4_5"
    name = "cache{}_matmul.activation_scale" if ernie else "attn.cache_{}_scale"
    data = {}
    for index in range(fields["num_hidden_layers"]):
        for part in "kv":
            amax = rng.uniform(4, 8, count)
            data[f"model.layers.{index}.self_attn.{name.format(part)}"] = (amax / 448).tolist()
            multiplier = bfloat16(most / bfloat16(bfloat16(amax / 448) * 448))
            spec.scales[index, part] = bfloat16(1 / multiplier)
    Path(folder, "kv_cache_scale.json").write_text(json.dumps(data))
