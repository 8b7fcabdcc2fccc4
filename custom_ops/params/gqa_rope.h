// FastDeploy's gqa_rope_write_cache: Q, K and V of a step whose prefill sequences are attended to
// on ragged tensors.
#pragma once

#include <cstdint>

#include "params/cache.h"
#include "params/rope.h"

namespace fastattn {

// The new tokens of every sequence are rotated and normalised into q, qkv_out, key and value. Those
// of a prefill sequence (seq_lens_encoder > 0) are also written into the cache, and stand in key
// and value behind its cached tokens, dequantised. Another operator writes those of decoding
// sequences.
//
// The tokens of sequence b start at cu_seqlens_k[b] of key and value; what falls outside
// [0, num_kv_tokens) is left out. A token of no sequence gives 0 in q and qkv_out.
struct GqaRopeWriteCacheParams {
  RopeWriteCacheParams rope;              // no bias, q_quant kNone; cache.layout kFastDeploy
  const int* seq_lens_encoder = nullptr;  // [batch] new tokens if prefill, else 0
  const int* cu_seqlens_k = nullptr;      // [batch + 1]
  void* qkv_out = nullptr;                // [T, (H + 2 KV) * D]
  void* key = nullptr;                    // [num_kv_tokens, KV, D]
  void* value = nullptr;                  // [num_kv_tokens, KV, D]
  int64_t num_kv_tokens = 0;
};

// Cached tokens of a sequence that precede its new ones in key and value.
FASTATTN_HD int PrefixLength(int encoder, int decoder) {
  return encoder > 0 && decoder > 0 ? decoder : 0;
}

// The arguments of the prefix's dequantisation.
inline AppendCacheParams PrefixOf(const GqaRopeWriteCacheParams& p) {
  AppendCacheParams prefix;
  prefix.cache = p.rope.cache;
  prefix.key = p.key;
  prefix.value = p.value;
  prefix.block_tables = p.rope.seqs.block_tables;
  prefix.seq_lens_decoder = p.rope.seqs.seq_lens_decoder;
  prefix.seq_lens_encoder = p.seq_lens_encoder;
  prefix.cu_seqlens_k = p.cu_seqlens_k;
  prefix.dtype = p.rope.dtype;
  prefix.dynamic_quant = IsDynamic(p.rope.cache.type);
  prefix.batch = p.rope.seqs.batch;
  prefix.max_blocks = p.rope.seqs.max_blocks;
  prefix.num_out_tokens = p.num_kv_tokens;
  prefix.key_token_stride = prefix.value_token_stride =
      static_cast<int64_t>(p.rope.cache.num_kv_heads) * p.rope.cache.head_dim;
  return prefix;
}

}  // namespace fastattn
