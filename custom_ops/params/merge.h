// merge_attn_states: two partial attentions over disjoint keys become one by their log-sum-exp.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

// How the merged output is stored.
enum class MergeOutput : int {
  kPlain,       // in the inputs' dtype
  kFloat16,     // of fp32 inputs
  kBFloat16,    // of fp32 inputs
  kStaticFp8,   // e4m3, scale given
  kDynamicFp8,  // e4m3, one scale per group of channels, measured and written
};

inline const char* NameOf(MergeOutput output) {
  switch (output) {
    case MergeOutput::kPlain:
      return "plain";
    case MergeOutput::kFloat16:
      return "float16";
    case MergeOutput::kBFloat16:
      return "bfloat16";
    case MergeOutput::kStaticFp8:
      return "static FP8";
    case MergeOutput::kDynamicFp8:
      return "dynamic FP8";
  }
  return "unknown";
}

// Whether the output holds values, not FP8 codes.
FASTATTN_HD constexpr bool IsValues(MergeOutput output) {
  return output != MergeOutput::kStaticFp8 && output != MergeOutput::kDynamicFp8;
}

// Element type of the output for inputs of type `in`.
FASTATTN_HD constexpr DType StoredType(MergeOutput output, DType in) {
  return output == MergeOutput::kPlain      ? in
         : output == MergeOutput::kFloat16  ? DType::kFloat16
         : output == MergeOutput::kBFloat16 ? DType::kBFloat16
                                            : DType::kE4M3;
}

// Strides count elements; the D channels of a head lie side by side everywhere. `output` and
// `output_lse` may share memory and strides with either side's, so a kernel must read both sides'
// LSE of a token and head, and both sides' element, before it writes the element.
struct MergeParams {
  const void* prefix_output = nullptr;  // [T, H, D] fp32 / fp16 / bf16
  const void* suffix_output = nullptr;  // [T, H, D]
  const float* prefix_lse = nullptr;    // [H, T] natural log; -inf or +inf = no keys on this side
  const float* suffix_lse = nullptr;    // [H, T]
  const float* output_scale = nullptr;  // kStaticFp8: [1] dequantisation multiplier
  void* output = nullptr;               // [T, H, D] as output_kind says
  float* output_lse = nullptr;          // [H, T]
  float* output_scales = nullptr;       // kDynamicFp8: [T, H * D / group_size]

  DType dtype = DType::kBFloat16;  // of both inputs
  MergeOutput output_kind = MergeOutput::kPlain;
  int64_t num_tokens = 0;     // T
  int64_t merged_tokens = 0;  // tokens from here on take the suffix as it is
  int num_heads = 0;          // H
  int head_dim = 0;           // D, any
  int group_size = 0;         // kDynamicFp8: divides H * D; D = one scale a token and head

  int64_t prefix_token_stride = 0;
  int64_t prefix_head_stride = 0;
  int64_t suffix_token_stride = 0;
  int64_t suffix_head_stride = 0;
  int64_t output_token_stride = 0;
  int64_t output_head_stride = 0;
  int64_t prefix_lse_head_stride = 0;
  int64_t prefix_lse_token_stride = 0;
  int64_t suffix_lse_head_stride = 0;
  int64_t suffix_lse_token_stride = 0;
  int64_t output_lse_head_stride = 0;
  int64_t output_lse_token_stride = 0;
  int64_t output_scales_token_stride = 0;  // a token's scales lie side by side
};

}  // namespace fastattn
