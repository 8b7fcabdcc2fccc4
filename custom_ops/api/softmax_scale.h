// The factor of logits, as every kind of attention takes it.
#pragma once

#include <cmath>
#include <limits>

#include "api/check.h"
#include "common/normaliser.h"

namespace fastattn::api {

// Refuses what is no finite number, or none once it is multiplied by log2(e), as all kernels do.
inline float ParseSoftmaxScale(const char* op, double softmax_scale) {
  if (!std::isfinite(softmax_scale)) {
    Fail("ValueError", op, "softmax_scale", "expected a finite number, got ", softmax_scale);
  }
  constexpr double kMost = std::numeric_limits<float>::max() / static_cast<double>(kLog2E);
  if (std::abs(softmax_scale) >= kMost) {
    Fail("ValueError", op, "softmax_scale", "expected a magnitude below ", kMost,
         ", whose product with log2(e) fits float32, got ", softmax_scale);
  }
  return static_cast<float>(softmax_scale);
}

}  // namespace fastattn::api
