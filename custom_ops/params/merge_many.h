// merge_many_attn_states: any number of partial attentions over disjoint keys become one.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/merge.h"

namespace fastattn {

// Strides count elements; the D channels of a head lie side by side. The output lies apart from the
// inputs.
struct MergeManyParams {
  const void* outputs = nullptr;  // [N, T, H, D] fp32 / fp16 / bf16
  const float* lses = nullptr;    // [N, H, T] natural log; -inf or +inf = no keys in the state
  const void* sinks = nullptr;    // [H] fp32 or bf16, or null; -inf or +inf = none
  const float* output_scale = nullptr;  // kStaticFp8: [1] dequantisation multiplier
  void* output = nullptr;               // [T, H, D] as output_kind says
  float* output_lse = nullptr;          // [H, T], contiguous

  DType dtype = DType::kBFloat16;  // of the states' outputs
  DType sinks_dtype = DType::kFloat32;
  MergeOutput output_kind = MergeOutput::kPlain;  // not kDynamicFp8
  bool sinks_in_lse = false;                      // whether the written LSE counts the sinks
  int num_states = 0;                             // N >= 1
  int64_t num_tokens = 0;                         // T
  int num_heads = 0;                              // H
  int head_dim = 0;                               // D, any

  int64_t state_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  int64_t lse_state_stride = 0;
  int64_t lse_head_stride = 0;
  int64_t lse_token_stride = 0;
  int64_t output_token_stride = 0;
  int64_t output_head_stride = 0;
};

}  // namespace fastattn
