// Structs that several operators' Params share. Pointers point to memory of the operator's place.
#pragma once

#include <cstdint>

#include "common/head_dims.h"
#include "common/types.h"

namespace fastattn {

// Strides, in elements, of the planes of a cache tensor (one a block and KV head) and of the rows
// of a plane. A row is the last dimension and contiguous: a token's channels, or a channel's tokens
// where V is [.., D, 64]. The other dimensions may have any order, so that K and V may be views of
// one pool. The rows of scales [num_blocks, KV, 64] are single elements, those of the planes of
// scales [num_blocks, KV, 64, D / 32] lie side by side.
struct CacheStrides {
  int64_t block = 0;
  int64_t head = 0;
  int64_t row = 0;

  // First element of a plane. Neither index is negative.
  FASTATTN_HD int64_t Plane(int block_id, int kv_head) const {
    return static_cast<uint32_t>(block_id) * block + static_cast<uint32_t>(kv_head) * head;
  }
  FASTATTN_HD int64_t Row(int block_id, int kv_head, int index) const {
    return Plane(block_id, kv_head) + index * row;
  }
};

// A layer's paged KV cache; see common/layout.h for the order inside a block. On a GPU, addresses
// and strides of caches and dynamic scales are multiples of 16 bytes.
struct PagedCache {
  // D is head_dim here, and half of it where a byte holds two codes (KeyCodesPerByte); of V it is
  // ValueDim(), or half of it (ValueCodesPerByte).
  void* key = nullptr;       // [num_blocks, KV, 64, D]
  void* value = nullptr;     // quantised [num_blocks, KV, D, 64] (fastattn), else [.., KV, 64, D]
  void* k_scales = nullptr;  // by granularity; null for CacheType::kNone
  void* v_scales = nullptr;
  CacheStrides key_strides;  // planes are contiguous in layout kFastDeploy
  CacheStrides value_strides;
  CacheStrides k_scale_strides;  // of dynamic types
  CacheStrides v_scale_strides;
  DType dtype = DType::kBFloat16;       // of key (codes: e4m3, e5m2, int8, int4, e2m1)
  DType scale_dtype = DType::kFloat32;  // fp32 or bf16, the same for K and V; uint8: UE8M0
  CacheType type = CacheType::kNone;
  CacheLayout layout = CacheLayout::kFastattn;
  ScaleScheme k_granularity = ScaleScheme::kLayer;
  ScaleScheme v_granularity = ScaleScheme::kLayer;
  int num_blocks = 0;
  int num_kv_heads = 0;
  int head_dim = 0;                      // of K
  DType value_dtype = DType::kBFloat16;  // of value; another one only if HasTwoCodes(type)

  FASTATTN_HD int ValueDim() const { return fastattn::ValueDim(head_dim); }

  // Elements of a token's K, and of its V.
  FASTATTN_HD int RowElements() const { return head_dim / KeyCodesPerByte(type); }
  FASTATTN_HD int ValueElements() const { return ValueDim() / ValueCodesPerByte(type); }
};

// Which tokens of a step belong to which sequence, and where the sequences' blocks are.
//
// Nothing here is trusted (see common/seq_lengths.h and common/block_table.h): a block id outside
// [0, num_blocks) is an unassigned block, a length below 0 counts as 0, tokens past `num_tokens`
// are ignored.
struct SeqMeta {
  const int* block_tables = nullptr;        // [batch, max_blocks], or as head_tables says
  const int* cu_seqlens_q = nullptr;        // [batch + 1] first token of each
  const int* seq_lens_decoder = nullptr;    // [batch] tokens cached before this step
  const int* seq_lens_this_time = nullptr;  // [batch] new tokens; 0 = inactive
  const int* batch_id_per_token = nullptr;  // [num_tokens] or null; -1 = padding
  int batch = 0;
  int max_blocks = 0;
  int num_tokens = 0;
  bool head_tables = false;  // block_tables are [batch, KV, max_blocks]: a table for each KV head

  // The table of a sequence's KV head, among those of all `num_kv_heads`.
  FASTATTN_HD int64_t TableOf(int64_t batch_idx, int kv_head, int num_kv_heads) const {
    return head_tables ? batch_idx * num_kv_heads + kv_head : batch_idx;
  }
};

}  // namespace fastattn
