"""A small valid call of every operator, by the names it was registered with."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import paddle

from fastattn import _ops
from fastattn.functional._marker import unified
from tests.support.tensors import DTYPES, int32, to_paddle


class OpCall(NamedTuple):
    """Tensors and attributes by name; an input that is not named is absent."""

    inputs: dict[str, Any]
    attrs: dict[str, Any]

    def changed(self, **changes: Any) -> OpCall:
        """The same with some tensors or attributes replaced."""
        inputs = {k: v for k, v in changes.items() if k not in self.attrs}
        attrs = {k: v for k, v in changes.items() if k in self.attrs}
        return OpCall({**self.inputs, **inputs}, {**self.attrs, **attrs})


def zeros(*shape: int, dtype: str = "float32", place: str = "cpu") -> paddle.Tensor:
    return to_paddle(np.zeros(shape, DTYPES.get(dtype, dtype)), place)


@unified
def run(op: str, inputs: dict[str, Any], attrs: dict[str, Any]) -> list[Any]:
    """Call the registered operator, past its Python function."""
    sig = _ops.signature(op)
    assert set(inputs) <= set(sig.inputs) and set(attrs) == set(sig.attrs), op
    tensors = tuple(inputs.get(name) for name in sig.inputs)
    return _ops.call(op, tensors, tuple(attrs[name] for name in sig.attrs))


def calls(place: str = "cpu") -> dict[str, OpCall]:
    """One sequence of 2 new tokens, 4 heads over 2 KV heads of 64 channels."""

    def make(*shape: int, dtype: str = "float32") -> paddle.Tensor:
        return zeros(*shape, dtype=dtype, place=place)

    def ones(*shape: int) -> paddle.Tensor:
        return to_paddle(np.ones(shape, np.float32), place)

    def seqs() -> dict[str, Any]:
        return {
            "block_tables": int32([[0]], place),
            "cu_seqlens_q": int32([0, 2], place),
            "seq_lens_decoder": int32([0], place),
            "seq_lens_this_time": int32([2], place),
        }

    def cache(dtype: str = "float16") -> dict[str, Any]:
        return {name: make(3, 2, 64, 64, dtype=dtype) for name in ("key_cache", "value_cache")}

    def scales() -> dict[str, Any]:
        return {"cache_k_scales": ones(2), "cache_v_scales": ones(2)}

    plain = {"cache_quant_type": "none", "fp8_format": "e4m3"}
    attention = {
        "max_seqlen_q": 2,
        "max_seqlen_k": 2,
        "softmax_scale": 0.125,
        "causal": True,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "return_softmax_lse": False,
        "out_dtype": "auto",
        "quantize_q": False,
    }
    projection = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "rms_norm_eps": 1e-6,
        "use_neox_rotary_style": False,
        "rotary_dim": -1,
        "qk_norm_before_rope": False,
        "q_quant": "none",
    }
    conversion = {"kind": "k", "cache_quant_type": "cache_fp8", "src": "fastattn", "dst": "logical"}
    return {
        "write_cache_kv": OpCall(
            {
                "key": make(2, 2, 64, dtype="float16"),
                "value": make(2, 2, 64, dtype="float16"),
                **cache(),
                **seqs(),
            },
            {**plain, "k_rotation": "none"},
        ),
        "rope_write_cache_kv": OpCall(
            {
                "qkv": make(2, 8 * 64, dtype="float16"),
                **cache(),
                **seqs(),
                "rotary_embs": make(2, 1, 8, 1, 32),
            },
            {**plain, **projection, "k_rotation": "none", "q_rotation": "none"},
        ),
        "attention_step": OpCall(
            {
                "qkv": make(2, 8 * 64, dtype="float16"),
                **cache(),
                **seqs(),
                "rotary_embs": make(2, 1, 8, 1, 32),
            },
            {
                **plain,
                **{name: value for name, value in attention.items() if name != "quantize_q"},
                **projection,
                "k_rotation": "none",
                "batch_invariant": False,
                "split_invariant": False,
            },
        ),
        "gqa_rope_write_cache": OpCall(
            {
                "qkv": make(2, 8 * 64, dtype="float16"),
                **cache(),
                **seqs(),
                "rotary_embs": make(2, 1, 8, 1, 32),
                "cu_seqlens_k": int32([0, 2], place),
                "seq_lens_encoder": int32([2], place),
            },
            {
                "kv_token_num": 2,
                "rms_norm_eps": 1e-6,
                "use_neox_rotary_style": False,
                "cache_quant_type": "none",
            },
        ),
        "begin_kv_signals": OpCall(
            {"seq_lens_encoder": int32([2], place), "seq_lens_decoder": int32([0], place)},
            {"batch": 1, "silent": False, "channel": ""},
        ),
        "send_kv_signal": OpCall(cache(), {"layer_id": 0, "channel": ""}),
        "append_cache_kv_c8": OpCall(
            {
                **cache("uint8"),
                **scales(),
                "key": make(2, 2, 64, dtype="float16"),
                "value": make(2, 2, 64, dtype="float16"),
                "block_tables": int32([[0]], place),
                "seq_lens_decoder": int32([2], place),
                "cu_seqlens_k": int32([0, 2], place),
            },
            {
                "dynamic_quant": False,
                "cache_quant_type": "cache_fp8",
                "cache_layout": "fastattn",
                "fp8_format": "e4m3",
                "k_rotation": "none",
            },
        ),
        "convert_cache_layout": OpCall({"cache": make(3, 2, 64, 64, dtype="uint8")}, conversion),
        "convert_cache_blocks": OpCall(
            {"cache": make(3, 2, 64, 64, dtype="uint8")}, {**conversion, "begin": 0, "end": 2}
        ),
        "flash_attention": OpCall(
            {
                "q": make(2, 4, 64, dtype="float16"),
                "k": make(2, 2, 64, dtype="float16"),
                "v": make(2, 2, 64, dtype="float16"),
                "cu_seqlens_q": int32([0, 2], place),
                "cu_seqlens_k": int32([0, 2], place),
            },
            {**attention, "kv_dtype": "auto"},
        ),
        "paged_attention": OpCall(
            {"q": make(2, 4, 64, dtype="float16"), **cache(), **seqs()},
            {
                **{**plain, **attention, "batch_invariant": False},
                **{"k_rotation": "none", "split_invariant": False},
            },
        ),
        "sparse_paged_attention": OpCall(
            {
                "q": make(2, 4, 64, dtype="float16"),
                **cache(),
                **seqs(),
                "selected": int32([[[0, -1]], [[1, 0]]], place),
                "selected_lens": int32([[1], [2]], place),
            },
            {
                **plain,
                "max_seqlen_q": 2,
                "max_seqlen_k": 2,
                "granularity": 1,
                "window": 1,
                "sink_tokens": 0,
                "softmax_scale": 0.125,
                "softcap": 0.0,
                "return_softmax_lse": False,
                "out_dtype": "auto",
                "k_rotation": "none",
            },
        ),
        "update_block_summaries": OpCall(
            {"summaries": make(3, 2, 4, 1, 64), **cache(), **seqs()},
            {**plain, "granularity": 16, "kind": "mean", "k_rotation": "none"},
        ),
        "select_key_blocks": OpCall(
            {
                "q": make(2, 4, 64, dtype="float16"),
                "summaries": make(3, 2, 4, 1, 64),
                **seqs(),
            },
            {
                "k": 3,
                "granularity": 16,
                "kind": "mean",
                "reduction": "max",
                "first_blocks": 0,
                "last_blocks": 1,
            },
        ),
        "compact_block_tables": OpCall(
            seqs(),
            {
                "num_tokens": 2,
                "num_blocks": 3,
                "block_size": 64,
                "causal": True,
                "window_left": -1,
                "window_right": -1,
                "want_masks": True,
            },
        ),
        "merge_attn_states": OpCall(
            {
                "prefix_output": make(2, 4, 64, dtype="float16"),
                "prefix_lse": make(4, 2),
                "suffix_output": make(2, 4, 64, dtype="float16"),
                "suffix_lse": make(4, 2),
            },
            {"prefill_tokens_with_context": -1},
        ),
        "merge_many_attn_states": OpCall(
            {"outputs": make(3, 2, 4, 64, dtype="float16"), "lses": make(3, 4, 2)},
            {"sinks_in_lse": True},
        ),
        "merge_prefill_decode_output": OpCall(
            {
                "encoder_res": make(2, 4 * 64, dtype="float16"),
                "decoder_res": make(2, 4 * 64, dtype="float16"),
                "seq_lens_encoder": int32([0], place),
                "seq_lens_decoder": int32([5], place),
                "seq_lens_this_time": int32([2], place),
                "cu_seq_q": int32([0, 2], place),
            },
            {"head_num": 4, "head_dim": 64, "max_token": 2},
        ),
        "quantize_fp8": OpCall({"x": make(2, 64)}, {"granularity": "group", "group_size": 32}),
        "mla_sparse_attention": OpCall(
            {
                "q": make(2, 3, 576, dtype="bfloat16"),
                "cache": make(2, 64, 656, dtype="uint8"),
                "indices": int32([[1, 70], [-1, 3]], place),
                "topk_length": int32([2, 1], place),
            },
            {
                "cache_format": "fp8_656",
                "extra_cache_format": "fp8_656",
                "page_size": 0,
                "extra_page_size": 0,
                "softmax_scale": 0.1,
                "return_softmax_lse": False,
                "return_max_logits": False,
                "flash_mla": False,
                "out_dtype": "bfloat16",
            },
        ),
        "mla_write_cache": OpCall(
            {
                "latent": make(2, 512, dtype="bfloat16"),
                "rope": make(2, 64, dtype="bfloat16"),
                "cache": make(2, 64, 656, dtype="uint8"),
                "slot_mapping": int32([1, 70], place),
            },
            {"cache_format": "fp8_656", "scale_rule": "pow2", "page_size": 0},
        ),
        "mla_gather_cache": OpCall(
            {
                "cache": make(2, 64, 656, dtype="uint8"),
                "out": make(3, 576, dtype="bfloat16"),
                "block_tables": int32([[1]], place),
                "seq_lens_decoder": int32([3], place),
                "cu_seqlens_k": int32([0, 3], place),
            },
            {"cache_format": "fp8_656", "page_size": 0},
        ),
        "inverse_rope_quantize_fp8": OpCall(
            {
                "x": make(2, 4, 512, dtype="bfloat16"),
                "positions": int32([0, 3], place),
                "cos_sin_cache": make(4, 64),
            },
            {"num_groups": 2},
        ),
        "mla_qkv_norm_rope_write": OpCall(
            {
                "q": make(2, 4, 512, dtype="bfloat16"),
                "kv": make(2, 512, dtype="bfloat16"),
                "cache": make(2, 64, 584, dtype="uint8"),
                "slot_mapping": int32([1, 70], place),
                "positions": int32([0, 3], place),
                "cos_sin_cache": make(4, 64),
            },
            {
                "cache_format": "fp8_584",
                "page_size": 0,
                "padded_heads": 0,
                "rms_norm_eps": 1e-6,
            },
        ),
        "mla_attention": OpCall(
            {
                "q": make(2, 3, 576, dtype="bfloat16"),
                "cache": make(2, 64, 656, dtype="uint8"),
                **seqs(),
            },
            {
                "max_seqlen_q": 2,
                "max_seqlen_k": 2,
                "softmax_scale": 0.1,
                "causal": True,
                "return_softmax_lse": False,
                "cache_format": "fp8_656",
                "page_size": 0,
                "out_dtype": "bfloat16",
            },
        ),
        "topk_indices": OpCall({"logits": make(2, 64), "lengths": int32([64, 9], place)}, {"k": 4}),
        "mqa_logits": OpCall(
            {
                "q": make(2, 8, 128, dtype="uint8"),
                "keys": make(5, 128, dtype="uint8"),
                "k_scales": ones(5),
                "weights": make(2, 8),
                "starts": int32([0, 1], place),
                "ends": int32([3, 5], place),
            },
            {"max_seqlen_k": -1, "quant": "fp8"},
        ),
        "paged_mqa_logits": OpCall(
            {
                "q": make(2, 1, 8, 64, dtype="uint8"),
                "cache": make(3, 16, 68, dtype="uint8"),
                "weights": make(2, 8),
                "context_lens": int32([16, 3], place),
                "block_tables": int32([[2], [0]], place),
                "q_scales": int32(np.zeros((2, 1, 8)), place),
            },
            {"max_context_len": 20, "page_size": 16, "quant": "mxfp4"},
        ),
        "indexer_topk": OpCall(
            {
                "q": make(2, 8, 128, dtype="uint8"),
                "keys": make(5, 128, dtype="uint8"),
                "k_scales": ones(5),
                "weights": make(2, 8),
                "starts": int32([0, 1], place),
                "ends": int32([3, 5], place),
            },
            {"k": 3, "max_seqlen_k": -1, "workspace_bytes": 64, "quant": "fp8"},
        ),
        "paged_indexer_topk": OpCall(
            {
                "q": make(2, 1, 8, 64, dtype="uint8"),
                "cache": make(3, 16, 68, dtype="uint8"),
                "weights": make(2, 8),
                "context_lens": int32([16, 3], place),
                "block_tables": int32([[2], [0]], place),
                "q_scales": int32(np.zeros((2, 1, 8)), place),
            },
            {
                "k": 5,
                "max_context_len": 20,
                "page_size": 16,
                "workspace_bytes": 1,
                "quant": "mxfp4",
            },
        ),
        "mxfp4_quantize": OpCall({"x": make(2, 64)}, {}),
        "mxfp4_dequantize": OpCall(
            {"codes": make(2, 32, dtype="uint8"), "scales": make(2, 2, dtype="uint8")},
            {"dtype": "float16"},
        ),
        "indexer_q_rope_quant": OpCall(
            {
                "positions": int32([0, 1], place),
                "q": make(2, 3, 128, dtype="bfloat16"),
                "cos_sin_cache": make(4, 64),
                "weights": make(2, 3),
            },
            {"softmax_scale": 1.0, "head_scale": 1.0, "quant": "fp8"},
        ),
        "indexer_q_quant": OpCall(
            {
                "q": make(2, 3, 128, dtype="bfloat16"),
                "weights": make(2, 3),
                "token_of_query": int32([1, -1, 0], place),
            },
            {"factor": 0.5},
        ),
        "indexer_kv_compress_insert": OpCall(
            {
                "state_cache": make(2, 4, 512),
                "block_tables": int32([[0, 1]], place),
                "batch_id_per_token": int32([0, 0], place),
                "positions": int32([3, 4], place),
                "state_slots": int32([0, 1], place),
                "kv_slots": int32([0, 1], place),
                "rms_norm_weight": make(128),
                "cos_sin_cache": make(4, 64),
                "kv_cache": make(2, 4, 132, dtype="uint8"),
            },
            {"compress_ratio": 4, "page_size": 4, "rms_norm_eps": 1e-6, "quant": "fp8"},
        ),
        "save_partial_states": OpCall(
            {
                "kv_score": make(2, 64),
                "ape": make(4, 32),
                "positions": int32([3, 4], place),
                "state_cache": make(2, 4, 64),
                "state_slots": int32([5, 1], place),
            },
            {},
        ),
        "indexer_k_write_cache": OpCall(
            {
                "key": make(2, 128, dtype="bfloat16"),
                "cache": make(2, 4, 132, dtype="uint8"),
                "slot_mapping": int32([5, 1], place),
            },
            {"page_size": 4, "quant": "fp8", "scale_rule": "pow2"},
        ),
        "indexer_k_gather": OpCall(
            {
                "cache": make(2, 4, 132, dtype="uint8"),
                "block_tables": int32([[1, 0]], place),
                "cu_seqlens_k": int32([0, 6], place),
            },
            {"num_tokens": 6, "page_size": 4, "quant": "fp8"},
        ),
        "topk_to_slots": OpCall(
            {
                "indices": int32([[0, 3, -1], [5, -1, -1]], place),
                "block_tables": int32([[4, 2], [1, 0]], place),
            },
            {
                "block_size": 4,
                "block_stride": 5,
                "num_blocks": 5,
                "compact": True,
                "rank": 0,
                "world_size": 1,
                "interleave": 1,
            },
        ),
        "token_maps": OpCall(
            {
                "batch_ids": int32([0, 1, -1], place),
                "block_tables": int32([[4, 2], [1, 0]], place),
                "cu_seqlens_q": int32([0, 1, 2], place),
                "seq_lens_decoder": int32([5, 0], place),
            },
            {"num_tokens": 3, "block_size": 4, "num_blocks": 5},
        ),
        "query_rows": OpCall(
            {
                "batch_ids": int32([0, 1, -1], place),
                "positions": int32([5, 0, -1], place),
                "block_tables": int32([[4, 2], [1, 0]], place),
                "cu_seqlens_q": int32([0, 1, 2], place),
            },
            {"tile": 2},
        ),
        "window_indices": OpCall(
            {"positions": int32([3, 9], place), "batch_ids": int32([0, 1], place)},
            {"window": 4, "block_size": 4, "num_blocks": -1},
        ),
        "short_context_indices": OpCall(
            {"positions": int32([3, 9], place)}, {"k": 6, "compress_ratio": 4}
        ),
        "combine_topk_window": OpCall(
            {
                "topk": int32([[0, 3, -1], [5, -1, -1]], place),
                "window": int32([[4, 5], [0, -1]], place),
                "batch_ids": int32([1, 0], place),
            },
            {"seq_stride": 50, "window_offset": 30, "multiple": 8},
        ),
        "radix_topk_ragged_transform": OpCall(
            {
                "input": make(2, 64),
                "output": int32(np.full((2, 4), -1), place),
                "offsets": int32([0, 1, 2], place),
                "lengths": int32([64, 9], place),
            },
            {"top_k": 4, "q_num_heads": 1, "block_size": 64},
        ),
    }
