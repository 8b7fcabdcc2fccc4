"""A configuration and a layer with FastDeploy's attribute names, for use without FastDeploy."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


def make_config(
    *,
    max_model_len: int,
    num_key_value_heads: int | None = None,
    causal: bool = True,
    window_size: int = 0,
    partial_rotary_factor: float = 1.0,
    tensor_parallel_size: int = 1,
    tensor_parallel_rank: int = 0,
) -> SimpleNamespace:
    """Make a configuration with the attributes of ``FDConfig`` that the backends read.

    Parameters
    ----------
    max_model_len : int
        Maximum number of tokens of a sequence, cached and new ones together. It bounds the launches
        where the host has no lengths, and the caches do not grow with it. Sequences may not be
        longer.
    num_key_value_heads : int, optional
        Of the whole model. Default: those that the backend is made with.
    causal : bool
    window_size : int
        Number of keys that a query sees in every layer, its own included; 0 leaves it to
        ``AttentionLayer.sliding_window``. The operators count without the query's own key: 512
        here is their ``window_size=(511, -1)``.
    partial_rotary_factor : float
        Part of a head's channels that is rotated.
    tensor_parallel_size, tensor_parallel_rank : int
    """
    return SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=max_model_len,
            num_key_value_heads=num_key_value_heads,
            causal=causal,
            window_size=window_size,
            partial_rotary_factor=partial_rotary_factor,
        ),
        cache_config=SimpleNamespace(block_size=64),
        parallel_config=SimpleNamespace(
            pd_disaggregation_mode="None",
            tensor_parallel_size=tensor_parallel_size,
            tensor_parallel_rank=tensor_parallel_rank,
        ),
        speculative_config=SimpleNamespace(method=None, model_type="main"),
    )


def make_latent_config(
    *,
    max_model_len: int,
    qk_nope_head_dim: int,
    index_n_heads: int | None = None,
    index_topk: int | None = None,
    indexer_rope_interleave: bool = False,
    rope_scaling: dict[str, float] | None = None,
    block_size: int = 64,
    draft_tokens: int = 0,
) -> SimpleNamespace:
    """Make a configuration with the attributes of ``FDConfig`` that backends of latent caches read.

    The attributes of an indexer are for :class:`fastattn.backends.DSAAttentionBackend`.
    """
    config = make_config(max_model_len=max_model_len)
    vars(config.model_config).update(
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=qk_nope_head_dim,
        index_head_dim=128,
        index_n_heads=index_n_heads,
        index_topk=index_topk,
        indexer_rope_interleave=indexer_rope_interleave,
        rope_scaling=rope_scaling,
    )
    config.cache_config.block_size = block_size
    if draft_tokens:
        config.speculative_config.method = "ngram"
        config.speculative_config.num_speculative_tokens = draft_tokens
    return config


@dataclass
class AttentionLayer:
    """A layer with the attributes of FastDeploy's ``Attention`` that the backends read.

    Attributes
    ----------
    layer_id : int
        The layer's caches are at ``2 * layer_id`` of ``ForwardMeta.caches`` (``4 * layer_id`` for
        the dynamic types).
    cache_quant_type_str : str
    use_neox_rotary_style : bool
        Which channels RoPE pairs. False, the default, pairs neighbours (2i, 2i + 1), as Llama's own
        code and GGUF files do; True pairs halves of the head (i, i + D / 2), as weights of the
        ``transformers`` library need it.
        :func:`fastattn.functional.use_neox_rotary_style` knows it by architecture and format.
    cache_k_out_scale, cache_v_out_scale : Tensor, optional
        Dequantisation multipliers of the static cache types.
    cache_k_rotation : {"none", "hadamard"}, optional
        Rotation of K before it is quantised; not for e5m2. None means what `make_cache` does:
        ``"hadamard"`` for ``block_wise_int8``, ``block_wise_int4``, ``block_wise_mxfp4``,
        ``block_wise_k8v4`` and ``block_wise_kfp8v4``, and ``"none"`` for every other type.
    cache_k_center : Tensor, shape [KV, D], float32, optional
        The constant that is subtracted from K before it is stored.
    cache_k_feedback : Tensor, shape [KV, D, D], float32, optional
        Error feedback of the writer, for keys of this rotation.
    cache_k_summaries : Tensor, optional
        Summaries of the layer's key blocks, for :class:`BlockSparseAttentionBackend`.
    cache_k_pool_weights : Tensor, shape [KV, granularity, D], float32, optional
        Weights of ``"pooled"`` summaries.
    q_norm_weight, k_norm_weight : Tensor, optional
        RMSNorm of Q and K heads, after the rotation.
    qk_norm_before_rope : bool
        Whether the model itself has already normalised Q and K; the norm weights are then not used.
    fp8_output_scale : Tensor, shape [1], float32, optional
        The backend returns e4m3 codes of ``out / fp8_output_scale`` for the next GEMM.
    sliding_window : int
        Number of keys that a query sees, including its own; 0 means all. 512 is the operators'
        ``window_size=(511, -1)``.
    """

    layer_id: int
    cache_quant_type_str: str = "none"
    cache_fp8_format: str = "e4m3"
    cache_k_out_scale: Any = None
    cache_v_out_scale: Any = None
    cache_k_rotation: str | None = None
    cache_k_center: Any = None
    cache_k_feedback: Any = None
    cache_k_summaries: Any = None
    cache_k_pool_weights: Any = None
    use_neox_rotary_style: bool = False
    qkv_bias: Any = None
    q_norm_weight: Any = None
    k_norm_weight: Any = None
    qk_norm_before_rope: bool = False
    rms_norm_eps: float = 1e-6
    sliding_window: int = 0
    sinks: Any = None
    q_scale: Any = None
    fp8_output_scale: Any = None
