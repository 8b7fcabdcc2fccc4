// mla_qkv_norm_rope_write: what happens to the queries and the keys of a DeepSeek-V4 layer between
// their projections and the attention.
#pragma once

#include <cstdint>

#include "params/mla_cache.h"
#include "params/rotation.h"

namespace fastattn {

inline constexpr int kMlaQkvDim = 512;  // the last kMlaRopeDim channels are rotated

struct MlaQkvParams {
  const uint16_t* q = nullptr;   // [T, H, 512] bf16
  uint16_t* q_out = nullptr;     // [T, out_heads, 512] bf16: may be q; 0 from head H on
  const uint16_t* kv = nullptr;  // [T, 512] bf16
  Rotations rotations;
  MlaCache cache;    // kFp8x584; no pages: nothing is written
  IndexArray slots;  // [num_slots]: of the first tokens; one outside the cache is skipped
  int64_t num_tokens = 0;
  int64_t num_slots = 0;  // at most num_tokens
  int num_heads = 0;
  int out_heads = 0;           // at least num_heads
  int64_t q_token_stride = 0;  // elements, as the others
  int64_t q_head_stride = 0;
  int64_t out_token_stride = 0;
  int64_t out_head_stride = 0;
  int64_t kv_stride = 0;
  float rms_norm_eps = 1e-6f;
};

}  // namespace fastattn
