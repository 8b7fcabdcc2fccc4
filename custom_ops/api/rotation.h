// Checks of the table of cosines and sines that DeepSeek's operators take.
#pragma once

#include "api/check.h"
#include "api/index_array.h"
#include "params/rotation.h"

namespace fastattn::api {

inline constexpr int64_t kCosSinColumns = 64;

inline void CheckCosSin(const char* op, const Tensor& cos_sin) {
  const Arg arg(op, "cos_sin_cache", cos_sin);
  arg.Dtype({phi::DataType::FLOAT32, phi::DataType::BFLOAT16})
      .Dims({-1, kCosSinColumns})
      .Contiguous();
  if (cos_sin.dims()[0] == 0) {
    Fail("ValueError", op, "cos_sin_cache", "expected at least 1 position, got shape ",
         ShapeText(SizesOf(cos_sin)));
  }
}

// The rotations of `tokens` tokens. The table, which is never empty, has been checked.
inline Rotations ToRotations(const char* op, const Tensor& positions, const Tensor& cos_sin,
                             int64_t tokens) {
  Rotations r;
  r.positions = ToIndexArray(op, "positions", positions, cos_sin.place(), tokens);
  r.cos_sin = Data(cos_sin);
  r.dtype = ToDType(op, "cos_sin_cache", cos_sin.dtype());
  r.max_positions = cos_sin.dims()[0];
  return r;
}

}  // namespace fastattn::api
