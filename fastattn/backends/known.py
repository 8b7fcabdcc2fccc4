"""What the backends know of FastDeploy's configuration and steps. Anything else is refused.

FastDeploy adds options and fields from release to release. A backend that never reads a new one
would serve wrong results without a message. So a backend refuses by name what is set and is not in
the lists below. A name in ``FASTATTN_IGNORED`` is not refused.
"""

from __future__ import annotations

from typing import Any

from fastattn import env

#: Attributes of a step in which backends keep a plan's fields and what they share.
PLAN_RECORD = "_fastattn_plan_record"
SHARED_STEP = "_fastattn_shared_step"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Sections of a configuration that may say how to attend.
_SECTIONS = ("model_config", "cache_config", "parallel_config", "speculative_config")

#: Parts of a name that concern attention. A model's file has many other names.
_WORDS = _names(
    """
    alibi attention attn causal context_parallel head_dim head_wise headwise key_value_head kv_head
    rope rotary sink softcap softmax swa window
    """
)

#: Options with such a part that a backend reads or refuses, or that FastDeploy's model, its rotary
#: table or its layer applies.
_OPTIONS = _names(
    """
    add_cross_attention attention_bias attention_dropout attention_dropout_prob
    attention_probs_dropout_prob attn_implementation causal cross_attention_hidden_size
    enable_rope_3d_runtime fuse_attention_ffn fuse_attention_qkv fuse_attn_ffn fuse_rope
    fuse_softmax_mask fused_rope gated_attn_act head_dim head_wise_swa_ratio index_head_dim
    indexer_rope_interleave max_window_layers mrope_interleaved mrope_section
    num_attention_heads num_key_value_heads num_key_value_heads_list output_attentions
    partial_rotary_factor qk_head_dim qk_nope_head_dim qk_rope_head_dim rope_3d rope_interleave
    rope_is_neox_style rope_parameters rope_reorder rope_scaling rope_scaling_factor rope_theta
    rotary_dim sink_size sinkhorn_2gate sinkhorn_temp sliding_window swa_num_key_value_heads
    swa_rope_theta use_3d_rope use_flash_attention use_flash_attn use_flash_attn_with_mask
    use_fused_rope use_gated_attn use_mem_eff_attn use_mrope use_recompute_attn use_rope
    use_sliding_window use_sparse_flash_attn use_var_len_flash_attn v_head_dim verify_window
    window_attn_skip_freq window_size with_sinks
    """
)

#: Fields of a ForwardMeta that backends read. :func:`fastattn.backends.forward_meta.optional`
#: refuses any other name, because FastDeploy's object returns None for a misspelt one.
FIELDS = _names(
    """
    attn_mask attn_mask_offsets batch_id_per_token block_tables cache_seqlens caches cascade_plan
    cu_seqlens_q exist_prefill forward_mode is_dummy_or_profile_run max_len_tensor_cpu position_ids
    pre_caches_length rope_already_applied rotary_embs seq_lens_decoder seq_lens_encoder
    seq_lens_this_time step_use_cudagraph swa_rotary_embs tbo_microbatch_id
    """
)

#: Fields that only FastDeploy's runner, models or own backends use.
_OTHER_FIELDS = _names(
    """
    attention_metadata attn_backend attn_backends attn_cu_seqlens_k attn_mask_q
    cu_seqlens_k decode_block_indices decode_chunk_size decode_num_blocks decode_states
    decode_tmp_d decode_tmp_m decode_tmp_workspace decoder_batch_ids decoder_chunk_size_device
    decoder_num_blocks_cpu decoder_num_blocks_device decoder_tile_ids_per_batch
    device_routing_buffer encoder_batch_ids encoder_num_blocks_x_cpu encoder_tile_ids_per_batch
    hidden_states ids_remove_padding is_draft is_profiling is_speculative is_zero_size
    kv_batch_ids kv_num_blocks_x_cpu kv_tile_ids_per_batch kv_token_num_cpu layer_done_counter
    mask_encoder_batch max_len_tensor_cpu_decoder max_moe_num_chunk max_num_seqs measurement_mode
    moe_num_chunk pre_cache_batch_ids pre_cache_num_blocks_cpu pre_cache_tile_ids_per_batch
    real_bsz routing_replay_table seq_lens_kv slot_mapping
    """
)
_KNOWN_FIELDS = FIELDS | _OTHER_FIELDS | {SHARED_STEP, PLAN_RECORD}


def refuse_unknown_options(fd_config: Any, backend: str) -> None:
    """Refuse options that concern attention, are set, and are not known.

    Raises
    ------
    NotImplementedError
        The message names the first one.
    """
    for section in _SECTIONS:
        options = getattr(getattr(fd_config, section, None), "__dict__", {})
        named = (name for name in options if any(word in name for word in _WORDS))
        _refuse(backend, section, options, set(named) - _OPTIONS)


def refuse_unknown_fields(forward_meta: Any, backend: str) -> None:
    """Refuse fields of a step that are set and are not known; raises as for options."""
    fields = getattr(forward_meta, "__dict__", {})
    if not _KNOWN_FIELDS.issuperset(fields):  # faster than a difference, in every step
        _refuse(backend, "forward_meta", fields, set(fields) - _KNOWN_FIELDS)


def _refuse(backend: str, owner: str, values: dict[str, Any], unknown: set[str]) -> None:
    for name in sorted(unknown):
        value = values[name]
        plain = value is None or isinstance(value, (bool, int, float, str, tuple, list, dict))
        if name.startswith("_") or (plain and not value) or name in env.ignored():
            continue
        text = f" = {value!r}"[:80] if plain else ""
        raise NotImplementedError(
            f"{backend}: {owner}.{name}{text} is not supported: this version of fastattn does not "
            "know it; if it changes nothing in attention, add its name to FASTATTN_IGNORED"
        )
