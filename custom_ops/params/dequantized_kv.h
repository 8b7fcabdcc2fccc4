// Keys and values of long sequences that become 16-bit ones ahead of the attention: where they go,
// and which sequences they are of. plan/dequantize_kv.h says when that pays. Of a cache, room
// is dealt out to some sequences; contiguous tensors become 16-bit ones as a whole.
#pragma once

#include <cstdint>

#include "common/head_dims.h"
#include "common/types.h"
#include "params/attention.h"

namespace fastattn {

struct DequantizePlan {
  int64_t blocks = 0;       // of 64 keys that there is room for; 0: codes are attended as they are
  int64_t table_width = 0;  // of a cache: blocks of one sequence, at most
  int min_tokens = 0;       // new tokens of a sequence that takes part, at least
  // And the packed rows that see a key of it, on average.
  int64_t min_rows = 0;
};

// Sequences are told apart on the device, by their lengths.
struct DequantizedKv {
  DequantizePlan plan;
  void* key = nullptr;    // [plan.blocks * 64, KV, D] of the queries' type
  void* value = nullptr;  // [plan.blocks * 64, KV, ValueDim(D)]
  // Of a cache:
  int* block_tables = nullptr;  // [batch, plan.table_width] blocks of 64 of those tokens, or -1
  int* keys = nullptr;          // [batch] keys of a sequence that takes part; 0 of others
  int* starts = nullptr;        // [batch + 1] the token of its first key, a multiple of 64
  int* new_tokens = nullptr;    // [batch] its new tokens; 0 of others
  int* other_tokens = nullptr;  // [batch] new tokens of the others; 0 of those that take part
};

// Bytes of memory that DequantizedKvAt() shares out.
inline int64_t DequantizedBytes(const AttentionParams& p, const DequantizePlan& plan) {
  if (plan.blocks == 0) return 0;
  const int64_t channels = p.head_dim + ValueDim(p.head_dim);
  const int64_t ints = p.paged ? p.seqs.batch * (plan.table_width + 4) + 1 : 0;
  return plan.blocks * kBlockSize * p.num_kv_heads * channels * SizeOf(p.q_dtype) +
         ints * static_cast<int64_t>(sizeof(int));
}

// `memory` is aligned to 16 bytes. It needs no content.
inline DequantizedKv DequantizedKvAt(void* memory, const AttentionParams& p,
                                     const DequantizePlan& plan) {
  DequantizedKv kv;
  kv.plan = plan;
  const int64_t heads = plan.blocks * kBlockSize * p.num_kv_heads;
  char* at = static_cast<char*>(memory);
  kv.key = at;
  at += heads * p.head_dim * SizeOf(p.q_dtype);
  kv.value = at;
  at += heads * ValueDim(p.head_dim) * SizeOf(p.q_dtype);
  int* ints = reinterpret_cast<int*>(at);
  const int64_t batch = p.seqs.batch;
  if (!p.paged) return kv;
  kv.keys = ints, kv.starts = ints + batch;
  kv.new_tokens = kv.starts + batch + 1, kv.other_tokens = kv.new_tokens + batch;
  kv.block_tables = kv.other_tokens + batch;
  return kv;
}

// The call over the sequences that take part, and over the others.
inline AttentionParams OverDequantized(const AttentionParams& p, const DequantizedKv& kv) {
  AttentionParams wide = p;
  if (!p.paged) {
    RaggedKv& ragged = wide.ragged;
    ragged.key = kv.key;
    ragged.value = kv.value;
    ragged.key_head_stride = p.head_dim;
    ragged.value_head_stride = ValueDim(p.head_dim);
    ragged.key_token_stride = p.num_kv_heads * ragged.key_head_stride;
    ragged.value_token_stride = p.num_kv_heads * ragged.value_head_stride;
    ragged.dtype = p.q_dtype;
    ragged.k_descale = ragged.v_descale = Descale{};
    return wide;
  }
  wide.seqs.seq_lens_this_time = kv.new_tokens;
  wide.seqs.block_tables = kv.block_tables;
  wide.seqs.max_blocks = static_cast<int>(kv.plan.table_width);
  PagedCache& cache = wide.cache;
  cache = PagedCache{};
  cache.key = kv.key;
  cache.value = kv.value;
  cache.dtype = cache.value_dtype = p.q_dtype;
  const auto strides = [&p](int64_t dim) {
    return CacheStrides{kBlockSize * p.num_kv_heads * dim, dim, p.num_kv_heads * dim};
  };
  cache.key_strides = strides(p.head_dim);
  cache.value_strides = strides(ValueDim(p.head_dim));
  cache.num_blocks = static_cast<int>(kv.plan.blocks);
  cache.num_kv_heads = p.num_kv_heads;
  cache.head_dim = p.head_dim;
  return wide;
}

// There are none with contiguous tensors.
inline AttentionParams OverOthers(const AttentionParams& p, const DequantizedKv& kv) {
  AttentionParams others = p;
  if (!p.paged) return others;
  others.seqs.seq_lens_this_time = kv.other_tokens;
  return others;
}

}  // namespace fastattn
