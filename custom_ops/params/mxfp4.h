// mxfp4_quantize and mxfp4_dequantize: E2M1 pairs with one UE8M0 exponent per 32 elements.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

struct Mxfp4QuantizeParams {
  const void* x = nullptr;    // [rows, cols] fp32 / fp16 / bf16
  uint8_t* codes = nullptr;   // [rows, cols / 2] element 2i in the low nibble of byte i
  uint8_t* scales = nullptr;  // [rows, cols / 32] exponent + 127
  DType dtype = DType::kBFloat16;
  int64_t rows = 0;
  int64_t cols = 0;          // a multiple of 32
  int64_t x_row_stride = 0;  // elements
};

struct Mxfp4DequantizeParams {
  const uint8_t* codes = nullptr;   // [rows, cols / 2]
  const uint8_t* scales = nullptr;  // [rows, cols / 32]
  void* x = nullptr;                // [rows, cols] fp32 / fp16 / bf16
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
};

}  // namespace fastattn
