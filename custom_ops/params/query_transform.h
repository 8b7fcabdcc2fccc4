// What attention over transformed keys (params/key_transform.h) does ahead of its products and
// behind them.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

// Q is rotated in fp32 and rounded to its type again. Keys that are stored less a centre give
// scores that all lack the same number, softmax_scale * (q . centre): the shift of a query.
struct QueryTransformParams {
  const void* q = nullptr;           // [num_tokens, num_heads, head_dim]
  void* rotated = nullptr;           // the same shape and type, contiguous; null: not wanted
  const float* center = nullptr;     // [num_kv_heads, head_dim]
  float* shifts = nullptr;           // [num_tokens, num_heads]; null: not wanted
  DType q_dtype = DType::kBFloat16;  // fp32 (CPU), fp16 or bf16
  int num_tokens = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int64_t q_token_stride = 0;  // elements; the channels of a head lie side by side
  int64_t q_head_stride = 0;
  float softmax_scale = 1.0f;
};

// Puts the LSE right, and the output where a sink is to enter its denominator: a sink is a logit
// beside scores that do not lack the shift.
struct ScoreShiftParams {
  const float* shifts = nullptr;        // [num_tokens, num_heads]
  const float* lse_in = nullptr;        // [num_heads, num_tokens], without sinks
  float* lse = nullptr;                 // the same shape, may be lse_in if there are no sinks; null
  const float* partial = nullptr;       // [num_tokens, num_heads, value_dim], null without sinks
  const void* sinks = nullptr;          // [num_heads] or null
  const float* out_scale = nullptr;     // [1] or null
  void* out = nullptr;                  // the shape of `partial`
  DType out_dtype = DType::kBFloat16;   // fp32, fp16, bf16, e4m3
  DType sinks_dtype = DType::kFloat32;  // fp32 or bf16
  int num_tokens = 0;
  int num_heads = 0;
  int value_dim = 0;  // channels of the output
};

}  // namespace fastattn
