// The factor of the scores that attention operators take.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "api/check.h"
#include "common/normaliser.h"

namespace fastattn::api {

// Stands for a scale that was not given. The operator resolves it, not Python: a program may be
// traced without knowing the channels of its queries. DEFAULT_SCALE of
// fastattn/functional/_attributes.py has the same value.
inline constexpr float kDefaultScale = std::numeric_limits<float>::lowest();

// 1 / sqrt(channels) where no scale was given. Refuses what is no finite number, or none once it is
// multiplied by log2(e), as all kernels do.
inline float ParseSoftmaxScale(const char* op, float scale, int64_t channels) {
  if (scale == kDefaultScale) {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(channels)));
  }
  if (!std::isfinite(scale)) {
    Fail("ValueError", op, "softmax_scale", "expected a finite number, got ", scale);
  }
  constexpr double kMost = std::numeric_limits<float>::max() / static_cast<double>(kLog2E);
  if (std::abs(static_cast<double>(scale)) >= kMost) {
    Fail("ValueError", op, "softmax_scale", "expected a magnitude below ", kMost,
         ", whose product with log2(e) fits float32, got ", scale);
  }
  return scale;
}

}  // namespace fastattn::api
