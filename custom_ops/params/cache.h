// write_cache_kv, append_cache_kv_c8 and convert_cache_layout.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/common.h"

namespace fastattn {

// write_cache_kv: quantises the new tokens' K and V into the cache. Dynamic types also write the
// tokens' scales.
//
// Only in invalid input do two tokens share a slot; then either may be the one that stays.
struct WriteCacheParams {
  PagedCache cache;                // layout is kFastattn
  SeqMeta seqs;                    // seqs.num_tokens is T
  const void* key = nullptr;       // [T, KV, D] fp32 / fp16 / bf16, heads contiguous
  const void* value = nullptr;     // [T, KV, D]
  DType dtype = DType::kBFloat16;  // of key and value; for type none the cache's, or fp32 (rounded)
  int64_t key_token_stride = 0;    // elements
  int64_t value_token_stride = 0;
};

// append_cache_kv_c8: dequantises the cached tokens of each sequence into ragged K and V. Token i
// of sequence b goes to output token cu_seqlens_k[b] + i, as round(code * scale) with one fp32
// product.
//
// A sequence gives min(seq_lens_decoder[b], cu_seqlens_k[b + 1] - cu_seqlens_k[b]) tokens, of those
// only the ones inside [0, num_out_tokens). A negative cu_seqlens_k[b] is no offset, so that
// sequence is left out. Every other output token keeps its contents, those of an unassigned block
// (past max_blocks, or an id outside [0, num_blocks)) included.
struct AppendCacheParams {
  PagedCache cache;                       // layout kFastattn or kFastDeploy (int8 codes + 128)
  void* key = nullptr;                    // [num_out_tokens, KV, D] bf16 / fp16, heads contiguous
  void* value = nullptr;                  // [num_out_tokens, KV, D]
  const int* block_tables = nullptr;      // [batch, max_blocks]
  const int* seq_lens_decoder = nullptr;  // [batch] cached tokens
  const int* seq_lens_encoder = nullptr;  // [batch] or null; not positive: the sequence gives none
  const int* cu_seqlens_k = nullptr;      // [batch + 1] first output token of each
  DType dtype = DType::kBFloat16;         // of key and value
  bool dynamic_quant = false;             // IsDynamic(cache.type)
  int batch = 0;
  int max_blocks = 0;
  int64_t num_out_tokens = 0;
  int64_t key_token_stride = 0;  // elements
  int64_t value_token_stride = 0;
  // GPU: the kernel ahead writes no length, offset or table, and was itself launched with PDL or
  // behind all that is ahead of it.
  bool overlaps_previous = false;
};

// Cached tokens that a sequence may give. A negative number counts as 0.
FASTATTN_HD int CachedTokens(const AppendCacheParams& p, int batch_idx) {
  const int cached = p.seq_lens_decoder[batch_idx];
  return p.seq_lens_encoder != nullptr && p.seq_lens_encoder[batch_idx] <= 0 ? 0 : cached;
}

// convert_cache_layout and convert_cache_blocks: the same codes in another order. kFastDeploy
// stores int8 codes with 128 added. src == dst converts in place; otherwise the two do not overlap.
struct ConvertLayoutParams {
  // [num_blocks, KV] planes of 64 * row_elements elements, each contiguous
  const void* src = nullptr;
  void* dst = nullptr;  // the same
  CacheStrides src_strides;
  CacheStrides dst_strides;
  CacheLayout src_layout = CacheLayout::kFastattn;
  CacheLayout dst_layout = CacheLayout::kLogical;
  CacheType type = CacheType::kFp8;  // kNone: every layout is the plain order, 2 bytes an element
  bool is_value = false;             // V's order (else K's)
  int64_t num_planes = 0;            // num_blocks * KV
  int num_kv_heads = 1;
  int row_elements = 0;  // D, or D / 2 where a byte holds two codes

  // First element of a plane, counted block by block.
  FASTATTN_HD int64_t SrcPlane(int64_t plane) const {
    return src_strides.Plane(static_cast<int>(plane / num_kv_heads),
                             static_cast<int>(plane % num_kv_heads));
  }
  FASTATTN_HD int64_t DstPlane(int64_t plane) const {
    return dst_strides.Plane(static_cast<int>(plane / num_kv_heads),
                             static_cast<int>(plane % num_kv_heads));
  }
};

}  // namespace fastattn
