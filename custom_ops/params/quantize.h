// quantize_fp8: one launch reads x once (twice for the per-tensor amax) and writes codes and
// scales.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

// Smallest amax of a group of activations that gets a dynamic scale.
inline constexpr float kActivationAmaxFloor = 1e-10f;

enum class QuantGranularity : int { kStatic, kTensor, kToken, kGroup };

struct QuantizeFp8Params {
  const void* x = nullptr;   // [rows, cols] fp32 / fp16 / bf16
  uint8_t* codes = nullptr;  // [rows, cols] e4m3
  float* scales = nullptr;  // kStatic: input [1]; kTensor [1]; kToken [rows]; kGroup [rows, groups]
  DType dtype = DType::kBFloat16;
  QuantGranularity granularity = QuantGranularity::kToken;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t x_row_stride = 0;  // elements
  int64_t codes_row_stride = 0;
  int group_size = 0;  // kGroup: divides cols
};

}  // namespace fastattn
