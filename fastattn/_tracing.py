"""Checks of an operator's arguments while a program is traced.

While Paddle 3 traces, an operator that throws ends the process, and a traced program throws only
when it runs. So wrong arguments must be refused before they get into a program. :data:`RULES`
repeats the operators' own checks of all that is known at that time (names, ranges and dtypes), with
the same types and texts of errors. Dygraph calls do not use it.
"""

from __future__ import annotations

from typing import Any

import paddle

from fastattn import _ops, _rules, _rules_keys, _rules_latent, _rules_maps, _rules_signals
from fastattn._rules import Call, OpRules, Rule

_CACHE: dict[str, Rule] = {
    "key_cache": _rules.cache_dtype,
    "value_cache": _rules.value_cache_dtype,
    "cache_k_scales": _rules.cache_scales,
    "cache_v_scales": _rules.both(_rules.cache_scales, _rules.like("cache_k_scales")),
}
_INT32 = _rules.dtypes("int32")
_SEQS: dict[str, Rule] = {
    name: _INT32
    for name in ("block_tables", "cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time")
}
_STEP: dict[str, Rule] = {**_CACHE, **_SEQS, "batch_id_per_token": _INT32}
_PARAMETER = _rules.dtypes("float32", "bfloat16", "float16")
_NORMS: dict[str, Rule] = {"q_norm_weight": _PARAMETER, "k_norm_weight": _PARAMETER}
_window = _rules.at_least(-1, "expected -1 (unlimited) or at least 0, got ", shown_as="window_size")
_ATTENTION_INPUTS: dict[str, Rule] = {
    "q_descale": _rules.query_descale,
    "sinks": _rules.dtypes("float32", "bfloat16"),
    "mask_offsets": _INT32,
    "out_scale": _rules.dtypes("float32"),
    "out": _rules.attention_out,
}
_ATTENTION_ATTRS: dict[str, Rule] = {
    "max_seqlen_q": _rules.at_least(0),
    "max_seqlen_k": _rules.at_least(0),
    "softmax_scale": _rules.finite(),
    "causal": _rules.anything,
    "window_left": _window,
    "window_right": _window,
    "softcap": _rules.finite(0),
    "return_softmax_lse": _rules.anything,
    "out_dtype": _rules.out_dtype,
    "quantize_q": _rules.quantize_q,
}

_FP32_OR_BF16 = _rules.dtypes("float32", "bfloat16")
_INDEX = _rules.dtypes("int32", "int64")
_TYPE_AND_FORMAT: dict[str, Rule] = {
    "cache_quant_type": _rules.cache_type,
    "fp8_format": _rules.fp8_format,
}
_K_ROTATION: dict[str, Rule] = {"k_rotation": _rules_keys.k_rotation}
_K_CENTER: dict[str, Rule] = {"k_center": _rules_keys.k_center}
_K_CENTER_READ: dict[str, Rule] = {
    "k_center": _rules.both(_rules_keys.k_center, _rules_keys.centred_scores)
}
_COUNT = _rules.int32_from(1)
_PAGE_SIZE = _rules.at_least(1, "expected a positive number of tokens, got ")
_INDEX_QUANT = _rules.names(ValueError, ("fp8", "mxfp4"), "expected fp8 or mxfp4, got '{}'")
_CONVERSION: dict[str, Rule] = {
    "kind": _rules.names(ValueError, ("k", "v"), "expected k or v, got '{}'"),
    "cache_quant_type": _rules.cache_type,
    "src": _rules.layout,
    "dst": _rules.layout,
}


_SCALES = ("cache_k_scales", "cache_v_scales")

#: Every input and attribute of every operator (a test compares). Attributes come first: an input's
#: rule may rely on them.
RULES: dict[str, OpRules] = {
    "write_cache_kv": OpRules(
        {
            **_STEP,
            **_K_CENTER,
            "key": _rules.dtypes(*_rules.FLOATS),
            "value": _rules.written_values,
        },
        {**_TYPE_AND_FORMAT, **_K_ROTATION},
        _SCALES,
    ),
    "rope_write_cache_kv": OpRules(
        {
            **_STEP,
            **_NORMS,
            **_K_CENTER,
            "qkv": _rules.qkv,
            "rotary_embs": _rules.dtypes("float32"),
            "qkv_bias": _PARAMETER,
            "q_scale": _rules.q_scale,
        },
        {
            **_TYPE_AND_FORMAT,
            **_K_ROTATION,
            "q_rotation": _rules_keys.q_rotation,
            "num_kv_heads": _rules.num_kv_heads,
            "num_heads": _rules.num_heads,
            "rms_norm_eps": _rules.finite(0),
            "use_neox_rotary_style": _rules.anything,
            "rotary_dim": _rules.rotary_dim,
            "qk_norm_before_rope": _rules.anything,
            "q_quant": _rules.names(
                ValueError,
                ("none", "per_tensor", "per_token_head"),
                "expected none, per_tensor or per_token_head, got '{}'",
            ),
        },
        (*_SCALES, "q_scale"),
    ),
    "gqa_rope_write_cache": OpRules(
        {
            **_STEP,
            **_NORMS,
            "qkv": _rules.qkv,
            "rotary_embs": _rules.dtypes("float32"),
            "cu_seqlens_k": _INT32,
            "seq_lens_encoder": _INT32,
        },
        {
            "cache_quant_type": _rules.fastdeploy_type,
            "kv_token_num": _rules.kv_token_num,
            "rms_norm_eps": _rules.finite(0),
            "use_neox_rotary_style": _rules.anything,
        },
        _SCALES,
    ),
    "begin_kv_signals": OpRules(
        {"seq_lens_encoder": _INT32, "seq_lens_decoder": _INT32},
        {
            "batch": _rules_signals.batch,
            "silent": _rules.anything,
            "channel": _rules_signals.channel,
        },
    ),
    "send_kv_signal": OpRules(
        {"key_cache": _rules.supported, "value_cache": _rules.supported},
        {"layer_id": _rules.at_least(0), "channel": _rules_signals.channel},
    ),
    "append_cache_kv_c8": OpRules(
        {
            **_CACHE,
            **_K_CENTER,
            "key": _rules.dtypes(*_rules.HALVES),
            "value": _rules.both(_rules.dtypes(*_rules.HALVES), _rules.like("key")),
            "block_tables": _INT32,
            "seq_lens_decoder": _INT32,
            "cu_seqlens_k": _INT32,
        },
        {
            "cache_quant_type": _rules.append_type,
            "dynamic_quant": _rules.dynamic_quant,
            "cache_layout": _rules.append_layout,
            "fp8_format": _rules.fp8_format,
            **_K_ROTATION,
        },
    ),
    "convert_cache_layout": OpRules({"cache": _rules.convertible}, _CONVERSION),
    "convert_cache_blocks": OpRules(
        {"cache": _rules.convertible},
        {**_CONVERSION, "begin": _rules.block_range, "end": _rules.block_range},
    ),
    "flash_attention": OpRules(
        {
            "q": _rules.queries,
            "v": _rules.like("k"),
            "k": _rules.keys,
            "cu_seqlens_q": _INT32,
            "cu_seqlens_k": _INT32,
            "k_descale": _rules.key_descale,
            "v_descale": _rules.key_descale,
            **_ATTENTION_INPUTS,
        },
        {
            **_ATTENTION_ATTRS,
            "kv_dtype": _rules.names(
                ValueError,
                ("auto", "e4m3", "e5m2", "int8"),
                "expected auto, e4m3, e5m2 or int8, got '{}'",
            ),
        },
    ),
    "paged_attention": OpRules(
        {**_CACHE, "q": _rules.paged_queries, **_SEQS, **_ATTENTION_INPUTS, **_K_CENTER_READ},
        {
            **_TYPE_AND_FORMAT,
            **_ATTENTION_ATTRS,
            "batch_invariant": _rules.anything,
            "k_rotation": _rules.both(_rules_keys.k_rotation, _rules_keys.rotated_queries),
        },
        _SCALES,
    ),
    "compact_block_tables": OpRules(
        {**_SEQS, "mask_offsets": _rules.with_masks},
        {
            "num_tokens": _rules.int32_from(0),
            "num_blocks": _rules.int32_from(0),
            "block_size": _COUNT,
            "causal": _rules.anything,
            "window_left": _window,
            "window_right": _window,
            "want_masks": _rules.anything,
        },
    ),
    "merge_attn_states": OpRules(
        {
            "prefix_output": _rules.dtypes(*_rules.FLOATS),
            "prefix_lse": _rules.dtypes("float32"),
            "suffix_output": _rules.like("prefix_output"),
            "suffix_lse": _rules.dtypes("float32"),
            "output_scale": _rules.dtypes("float32"),
            "output": _rules.merged,
            "output_lse": _rules.dtypes("float32"),
            "output_scales": _rules.dtypes("float32"),
        },
        {"prefill_tokens_with_context": _rules.prefill_tokens},
    ),
    "merge_many_attn_states": OpRules(
        {
            "outputs": _rules.dtypes(*_rules.FLOATS),
            "lses": _rules.dtypes("float32"),
            "sinks": _FP32_OR_BF16,
            "output_scale": _rules.dtypes("float32"),
            "output": _rules.merged,
        },
        {"sinks_in_lse": _rules.anything},
    ),
    "merge_prefill_decode_output": OpRules(
        {
            "encoder_res": _rules.supported,
            "decoder_res": _rules.like("encoder_res"),
            "seq_lens_encoder": _INT32,
            "seq_lens_decoder": _INT32,
            "seq_lens_this_time": _INT32,
            "cu_seq_q": _INT32,
        },
        {
            "head_num": _rules.at_least(1),
            "head_dim": _rules.at_least(1),
            "max_token": _rules.at_least(1),
        },
    ),
    "quantize_fp8": OpRules(
        {
            "x": _rules.dtypes(*_rules.FLOATS),
            "scale": _rules.dtypes("float32"),
            "output": _rules.codes_output(""),
        },
        {
            "granularity": _rules.names(
                ValueError,
                ("tensor", "token", "group"),
                "expected tensor, token or group, got '{}'",
            ),
            "group_size": _rules.group_size,
        },
    ),
    "mla_sparse_attention": OpRules(
        {
            "q": _rules_latent.latent_query,
            "cache": _rules_latent.latent_cache,
            "indices": _INT32,
            "topk_length": _INT32,
            "scale": _rules_latent.latent_scale,
            "extra_cache": _rules_latent.latent_cache,
            "extra_indices": _rules_latent.extra_selection,
            "extra_topk_length": _rules_latent.extra_selection,
            "extra_scale": _rules_latent.extra_selection,
            "sinks": _rules.dtypes("float32"),
            "out": _rules_latent.latent_out,
        },
        {
            "cache_format": _rules_latent.latent_format,
            "extra_cache_format": _rules_latent.latent_format,
            "page_size": _rules.anything,
            "extra_page_size": _rules.anything,
            "softmax_scale": _rules.finite(),
            "return_softmax_lse": _rules.anything,
            "return_max_logits": _rules.anything,
            "flash_mla": _rules.anything,
            "out_dtype": _rules_latent.latent_out_dtype,
        },
        ("scale", "extra_scale"),
    ),
    "mla_write_cache": OpRules(
        {
            "latent": _rules.dtypes("bfloat16"),
            "rope": _rules.dtypes("bfloat16"),
            "cache": _rules_latent.latent_cache,
            "slot_mapping": _INDEX,
            "scale": _rules_latent.latent_scale,
        },
        {
            "cache_format": _rules_latent.written_latent_format,
            "scale_rule": _rules_latent.latent_scale_rule,
            "page_size": _rules.anything,
        },
        ("scale",),
    ),
    "mla_gather_cache": OpRules(
        {
            "cache": _rules_latent.latent_cache,
            "out": _rules.dtypes("bfloat16"),
            "block_tables": _INT32,
            "seq_lens_decoder": _INT32,
            "cu_seqlens_k": _INT32,
            "scale": _rules_latent.latent_scale,
        },
        {"cache_format": _rules_latent.latent_format, "page_size": _rules.anything},
        ("scale",),
    ),
    "inverse_rope_quantize_fp8": OpRules(
        {
            "x": _rules.dtypes("bfloat16"),
            "positions": _INDEX,
            "cos_sin_cache": _FP32_OR_BF16,
        },
        {"num_groups": _rules_latent.head_groups},
    ),
    "mla_qkv_norm_rope_write": OpRules(
        {
            "q": _rules.dtypes("bfloat16"),
            "kv": _rules.dtypes("bfloat16"),
            "cache": _rules_latent.latent_cache,
            "slot_mapping": _INDEX,
            "positions": _INDEX,
            "cos_sin_cache": _FP32_OR_BF16,
            "out": _rules.dtypes("bfloat16"),
        },
        {
            "cache_format": _rules.names(
                NotImplementedError, ("fp8_584",), "'{}' is not supported; supported: fp8_584"
            ),
            "page_size": _rules.anything,
            "padded_heads": _rules_latent.padded_heads,
            "rms_norm_eps": _rules.finite(0),
        },
    ),
    "mla_attention": OpRules(
        {
            "q": _rules.dtypes("bfloat16"),
            "cache": _rules_latent.latent_cache,
            **_SEQS,
            "scale": _rules_latent.latent_scale,
            "sinks": _rules.dtypes("float32"),
            "out": _rules_latent.latent_out,
        },
        {
            "max_seqlen_q": _rules.at_least(0),
            "max_seqlen_k": _rules.at_least(0),
            "softmax_scale": _rules.finite(),
            "causal": _rules.anything,
            "return_softmax_lse": _rules.anything,
            "cache_format": _rules_latent.latent_format,
            "page_size": _rules.anything,
            "out_dtype": _rules_latent.latent_out_dtype,
        },
        ("scale",),
    ),
    "topk_indices": OpRules(
        {"logits": _rules.dtypes("float32"), "lengths": _INT32, "starts": _INT32, "out": _INT32},
        {"k": _rules.anything},  # the function has checked it: results have its size
    ),
    "mqa_logits": OpRules(
        {
            "q": _rules.index_codes,
            "keys": _rules.index_codes,
            "k_scales": _rules.index_scales,
            "weights": _rules.dtypes("float32"),
            "starts": _INT32,
            "ends": _INT32,
            "q_scales": _rules.index_q_scales,
            "out": _rules.dtypes("float32"),
        },
        {"max_seqlen_k": _rules.anything, "quant": _INDEX_QUANT},
        ("q_scales",),
    ),
    "paged_mqa_logits": OpRules(
        {
            "q": _rules.index_codes,
            "cache": _rules.dtypes("uint8"),
            "weights": _rules.dtypes("float32"),
            "context_lens": _INT32,
            "block_tables": _INT32,
            "q_scales": _rules.index_q_scales,
            "out": _rules.dtypes("float32"),
        },
        {
            "max_context_len": _rules.anything,
            "page_size": _rules.at_least(1, "expected a positive number of tokens, got "),
            "quant": _INDEX_QUANT,
        },
        ("q_scales",),
    ),
    "indexer_topk": OpRules(
        {
            "q": _rules.index_codes,
            "keys": _rules.index_codes,
            "k_scales": _rules.index_scales,
            "weights": _rules.dtypes("float32"),
            "starts": _INT32,
            "ends": _INT32,
            "q_scales": _rules.index_q_scales,
            "out": _INT32,
        },
        {
            "k": _rules.anything,
            "max_seqlen_k": _rules.anything,
            "workspace_bytes": _rules.at_least(1),
            "quant": _INDEX_QUANT,
        },
        ("q_scales",),
    ),
    "paged_indexer_topk": OpRules(
        {
            "q": _rules.index_codes,
            "cache": _rules.dtypes("uint8"),
            "weights": _rules.dtypes("float32"),
            "context_lens": _INT32,
            "block_tables": _INT32,
            "q_scales": _rules.index_q_scales,
            "out": _INT32,
        },
        {
            "k": _rules.anything,
            "max_context_len": _rules.anything,
            "page_size": _rules.at_least(1, "expected a positive number of tokens, got "),
            "workspace_bytes": _rules.at_least(1),
            "quant": _INDEX_QUANT,
        },
        ("q_scales",),
    ),
    "mxfp4_quantize": OpRules({"x": _rules.dtypes(*_rules.FLOATS)}),
    "mxfp4_dequantize": OpRules(
        {"codes": _rules.dtypes("uint8"), "scales": _rules.dtypes("uint8")},
        {
            "dtype": _rules.names(
                ValueError, _rules.FLOATS, "expected float32, float16 or bfloat16, got '{}'"
            )
        },
    ),
    "indexer_q_rope_quant": OpRules(
        {
            "positions": _INDEX,
            "q": _rules.dtypes("bfloat16"),
            "cos_sin_cache": _FP32_OR_BF16,
            "weights": _FP32_OR_BF16,
        },
        {
            "softmax_scale": _rules.anything,
            "head_scale": _rules.anything,
            "quant": _INDEX_QUANT,
        },
    ),
    "indexer_q_quant": OpRules(
        {"q": _rules.dtypes("bfloat16"), "weights": _FP32_OR_BF16, "token_of_query": _INT32},
        {"factor": _rules.anything},
    ),
    "indexer_kv_compress_insert": OpRules(
        {
            "state_cache": _FP32_OR_BF16,
            "block_tables": _INT32,
            "batch_id_per_token": _INT32,
            "positions": _INDEX,
            "state_slots": _INDEX,
            "kv_slots": _INDEX,
            "rms_norm_weight": _FP32_OR_BF16,
            "cos_sin_cache": _FP32_OR_BF16,
            "kv_cache": _rules.dtypes("uint8"),
        },
        {
            "compress_ratio": _rules.compress_ratio,
            "page_size": _rules.at_least(1, "expected a positive number of tokens, got "),
            "rms_norm_eps": _rules.anything,
            "quant": _rules.names(
                ValueError,
                ("fp8", "mxfp4", "fp8_512"),
                "expected fp8, mxfp4 or fp8_512, got '{}'",
            ),
        },
    ),
    "save_partial_states": OpRules(
        {
            "kv_score": _FP32_OR_BF16,
            "ape": _FP32_OR_BF16,
            "positions": _INDEX,
            "state_cache": _FP32_OR_BF16,
            "state_slots": _INDEX,
        }
    ),
    "indexer_k_write_cache": OpRules(
        {
            "key": _rules.dtypes("bfloat16", "float16", "float32"),
            "cache": _rules.dtypes("uint8"),
            "slot_mapping": _rules.dtypes("int64", "int32"),
        },
        {
            "page_size": _PAGE_SIZE,
            "quant": _INDEX_QUANT,
            "scale_rule": _rules.key_scale_rule,
        },
    ),
    "indexer_k_gather": OpRules(
        {
            "cache": _rules.dtypes("uint8"),
            "block_tables": _INT32,
            "cu_seqlens_k": _INT32,
            "out": _rules.dtypes("uint8"),
            "out_scales": _rules.dtypes("float32", "int32", "uint8"),
        },
        {
            "num_tokens": _rules.at_least(0),
            "page_size": _PAGE_SIZE,
            "quant": _INDEX_QUANT,
        },
    ),
    **_rules_maps.RULES,
    "radix_topk_ragged_transform": OpRules(
        {
            "input": _rules.dtypes("float32"),
            "output": _INT32,
            "offsets": _INT32,
            "lengths": _INT32,
            "seq_len_decoder": _INT32,
            "batch_id_per_token": _INT32,
            "block_tables": _INT32,
        },
        {
            "top_k": _rules.top_k,
            "q_num_heads": _rules.query_heads,
            "block_size": _COUNT,
        },
    ),
}


def _check_view(op: str, name: str, value: Any) -> None:
    """Refuse to write into a view that the traced function itself made.

    A traced program computes a view as a tensor of its own: what is written into it is lost.
    """
    define = getattr(value, "get_defining_op", None)
    made_by = define() if define is not None else None
    if made_by is None or made_by.name() not in getattr(paddle.base.framework, "stride_ops", ()):
        return
    raise ValueError(
        f"{op}: {name}: it is written in place and must not be a view that the traced function "
        f"made ({made_by.name()}): a program writes into a copy of it; make the view outside"
    )


def check(sig: _ops.OpSignature, inputs: tuple[Any, ...], attrs: tuple[Any, ...]) -> None:
    """Refuse arguments that the operator would refuse, and writes that would be lost.

    Parameters
    ----------
    sig : OpSignature
    inputs, attrs : tuple
        In the order of registration, of the right Python types.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        With the operator's own text.
    """
    call = Call(sig.name, dict(zip(sig.inputs, inputs)), dict(zip(sig.attrs, attrs)))
    rules = RULES[sig.name]
    for name, rule in rules.attrs.items():
        rule(call, name)
    for name, rule in rules.inputs.items():
        if call.inputs[name] is not None or name in rules.always:
            rule(call, name)
    for i in sig.inplace.values():
        _check_view(sig.name, sig.inputs[i], inputs[i])
