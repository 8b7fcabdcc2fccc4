"""Small models of every architecture that FastDeploy registers."""

from __future__ import annotations

import importlib
import types
from typing import Any

#: Fields that some kind of model reads from its config.json.
MOE = {
    "moe_num_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 64,
    "moe_layer_start_index": 0,
    "moe_layer_interval": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_nextn_predict_layers": 1,
}
MLA = {
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 64,
}
VISION = {
    "hidden_size": 64,
    "num_heads": 4,
    "num_attention_heads": 4,
    "depth": 1,
    "num_hidden_layers": 1,
    "patch_size": 14,
    "image_size": 28,
    "embed_dim": 64,
    "mlp_ratio": 2,
    "in_channels": 3,
    "in_chans": 3,
    "num_channels": 3,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 56,
    "out_hidden_size": 512,
    "intermediate_size": 64,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "attn_sep": False,
    "recompute": False,
    "vit_num_recompute_layers": 0,
}
MULTIMODAL = {
    "vision_config": VISION,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "pixel_hidden_size": 64,
    "image_token_id": 100,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "im_patch_id": 100,
    "image_patch_id": 100,
    "freq_allocation": 16,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}


def architectures() -> list[str]:
    """Names of the models that FastDeploy has registered."""
    registry = importlib.import_module("fastdeploy.model_executor.models.model_base").ModelRegistry
    return sorted(registry._arch_to_model_cls)


def fields_of(name: str) -> dict[str, Any]:
    """config.json of a small model of this architecture."""
    fields: dict[str, Any] = {"architectures": [name], "hidden_act": "silu"}
    if name.startswith("Glm4M"):
        fields.update(model_type="glm4_moe", partial_rotary_factor=0.5, attention_bias=False)
        fields.update(use_qk_norm=True)
    elif name.startswith("Ernie"):
        fields.update(model_type="ernie4_5_moe_vl" if "VL" in name else "ernie4_5_moe")
    elif name.startswith("GptOss"):
        fields.update(GPT_OSS)
    elif name.startswith("PaddleOCR"):
        fields.update(model_type="paddleocr_vl")
    elif name.startswith("Qwen"):
        fields.update(model_type=name.partition("For")[0].lower())
    if any(part in name for part in ("Moe", "Deepseek", "Oss", "MTP")):
        fields.update(MOE)
    if any(part in name for part in ("Deepseek", "Dsa")):
        fields.update(MLA, model_type="deepseek_v3")
    if "VL" in name:
        fields.update(MULTIMODAL)
    if name.startswith("Qwen3VL"):
        fields["vision_config"] = {**VISION, "hidden_act": "gelu_pytorch_tanh"}
    if name.startswith("Ernie4_5_VL"):  # one number for text, one for images
        fields.update(
            {key: [fields[key]] * 2 for key in ("moe_num_experts", "moe_intermediate_size")},
            moe_layer_start_index=[0, 0],
            moe_layer_end_index=[1, 1],
        )
    return fields


def attention_layers(name: str, config: Any) -> list[Any]:
    """The ``Attention`` layers that FastDeploy's model makes."""
    registry = importlib.import_module("fastdeploy.model_executor.models.model_base").ModelRegistry
    attention = importlib.import_module("fastdeploy.model_executor.layers.attention").Attention
    if "MTP" in name:  # a draft model shares parts of its main model
        config.model_config.pretrained_config.prefix_name = "mtp_block"
        part = types.SimpleNamespace(embed_tokens=None, norm=None)
        config.speculative_config.sharing_model = types.SimpleNamespace(
            ernie=part, model=part, lm_head=None
        )
    model = registry.get_class(name)(config)
    return [layer for layer in model.sublayers() if isinstance(layer, attention)]
