"""A readable NumPy model of every operator. It imports no Paddle and favours clarity over speed."""

from fastattn.reference.attention import attention_mask, flash_attention, paged_attention
from fastattn.reference.block_selection import select_key_blocks, update_block_summaries
from fastattn.reference.cache import append_cache_kv_c8, convert_cache_layout, write_cache_kv
from fastattn.reference.compact_tables import compact_block_tables
from fastattn.reference.hadamard import hadamard, restore_key, transform_key
from fastattn.reference.index_maps import (
    combine_topk_window,
    short_context_indices,
    topk_to_slots,
    window_indices,
)
from fastattn.reference.indexer import (
    indexer_kv_compress_insert,
    indexer_q_quant,
    indexer_q_rope_quant,
    save_partial_states,
)
from fastattn.reference.indexer_keys import indexer_k_gather, indexer_k_write_cache
from fastattn.reference.indexer_topk import indexer_topk, paged_indexer_topk
from fastattn.reference.merge import merge_attn_states
from fastattn.reference.merge_many import merge_many_attn_states
from fastattn.reference.mla import mla_gather_cache, mla_write_cache
from fastattn.reference.mla_dense import mla_attention
from fastattn.reference.mla_layer import inverse_rope_quantize_fp8, mla_qkv_norm_rope_write
from fastattn.reference.mla_sparse import mla_sparse_attention
from fastattn.reference.mqa_logits import mqa_logits, paged_mqa_logits
from fastattn.reference.mxfp4 import mxfp4_dequantize, mxfp4_quantize
from fastattn.reference.quantize import quantize_fp8, quantize_query
from fastattn.reference.rope import make_rotary_embs, rope_write_cache_kv
from fastattn.reference.sparse_attention import sparse_paged_attention
from fastattn.reference.step import attention_step
from fastattn.reference.step_maps import query_rows, token_maps
from fastattn.reference.topk import topk_indices

__all__ = [
    "append_cache_kv_c8",
    "attention_mask",
    "attention_step",
    "combine_topk_window",
    "compact_block_tables",
    "convert_cache_layout",
    "flash_attention",
    "hadamard",
    "indexer_k_gather",
    "indexer_k_write_cache",
    "indexer_kv_compress_insert",
    "indexer_q_quant",
    "indexer_q_rope_quant",
    "indexer_topk",
    "inverse_rope_quantize_fp8",
    "make_rotary_embs",
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
    "quantize_fp8",
    "quantize_query",
    "query_rows",
    "restore_key",
    "rope_write_cache_kv",
    "save_partial_states",
    "select_key_blocks",
    "short_context_indices",
    "sparse_paged_attention",
    "token_maps",
    "topk_indices",
    "topk_to_slots",
    "transform_key",
    "update_block_summaries",
    "window_indices",
    "write_cache_kv",
]
