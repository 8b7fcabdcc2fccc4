"""The operators as typed Python functions that check their arguments."""

from fastattn import _ops, _programs
from fastattn.functional.attention import flash_attention, paged_attention
from fastattn.functional.block_selection import select_key_blocks, update_block_summaries
from fastattn.functional.cache import (
    append_cache_kv_c8,
    convert_cache_blocks,
    convert_cache_layout,
    write_cache_kv,
)
from fastattn.functional.cascade import cascade_attention, plan_cascade
from fastattn.functional.compact_tables import compact_block_tables
from fastattn.functional.index_maps import (
    combine_topk_window,
    short_context_indices,
    topk_to_slots,
    window_indices,
)
from fastattn.functional.indexer import (
    indexer_kv_compress_insert,
    indexer_q_quant,
    indexer_q_rope_quant,
    save_partial_states,
)
from fastattn.functional.indexer_keys import indexer_k_gather, indexer_k_write_cache
from fastattn.functional.indexer_topk import indexer_topk, paged_indexer_topk
from fastattn.functional.kv_cache import make_cache
from fastattn.functional.merge import merge_attn_states
from fastattn.functional.merge_many import merge_many_attn_states
from fastattn.functional.mla import mla_gather_cache, mla_write_cache
from fastattn.functional.mla_dense import mla_attention
from fastattn.functional.mla_layer import inverse_rope_quantize_fp8, mla_qkv_norm_rope_write
from fastattn.functional.mla_sparse import mla_sparse_attention
from fastattn.functional.mqa_logits import mqa_logits, paged_mqa_logits
from fastattn.functional.mxfp4 import mxfp4_dequantize, mxfp4_quantize
from fastattn.functional.quantize import quantize_fp8
from fastattn.functional.rope import rope_write_cache_kv
from fastattn.functional.rotary_styles import use_neox_rotary_style
from fastattn.functional.sparse_attention import sparse_paged_attention
from fastattn.functional.step import attention_step
from fastattn.functional.step_maps import query_rows, token_maps
from fastattn.functional.topk import topk_indices

__all__ = [
    "append_cache_kv_c8",
    "attention_step",
    "cascade_attention",
    "combine_topk_window",
    "compact_block_tables",
    "convert_cache_blocks",
    "convert_cache_layout",
    "flash_attention",
    "indexer_k_gather",
    "indexer_k_write_cache",
    "indexer_kv_compress_insert",
    "indexer_q_quant",
    "indexer_q_rope_quant",
    "indexer_topk",
    "inverse_rope_quantize_fp8",
    "make_cache",
    "merge_attn_states",
    "merge_many_attn_states",
    "mla_attention",
    "mla_gather_cache",
    "mla_qkv_norm_rope_write",
    "mla_sparse_attention",
    "mla_write_cache",
    "mqa_logits",
    "mxfp4_dequantize",
    "mxfp4_quantize",
    "paged_attention",
    "paged_indexer_topk",
    "paged_mqa_logits",
    "plan_cascade",
    "quantize_fp8",
    "query_rows",
    "rope_write_cache_kv",
    "save_partial_states",
    "select_key_blocks",
    "short_context_indices",
    "sparse_paged_attention",
    "token_maps",
    "topk_indices",
    "topk_to_slots",
    "update_block_summaries",
    "use_neox_rotary_style",
    "window_indices",
    "write_cache_kv",
]

_ops.check_installation()
_programs.register_before_loading()
