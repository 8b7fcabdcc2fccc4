// 16-bit queries as e4m3 codes with one scale for each token and head, ahead of the attention.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

struct QuantizeQueryParams {
  const void* q = nullptr;           // [num_tokens, num_heads, head_dim] fp16 / bf16
  uint8_t* codes = nullptr;          // the same shape, e4m3, contiguous
  float* descale = nullptr;          // [num_tokens, num_heads]
  DType q_dtype = DType::kBFloat16;  // fp16 or bf16
  int num_tokens = 0;
  int num_heads = 0;
  int head_dim = 0;            // 64 or 128
  int64_t q_token_stride = 0;  // elements; the channels of a head lie side by side
  int64_t q_head_stride = 0;
};

}  // namespace fastattn
