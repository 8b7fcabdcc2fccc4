// What happens to K between its rounding to the type it comes in and its quantisation.
#pragma once

#include "common/hadamard.h"
#include "common/types.h"

namespace fastattn {

// K less a constant, then rotated, both in fp32: what is quantised is not rounded in between.
struct KeyTransform {
  const float* center = nullptr;  // [KV, D] or null
  KeyRotation rotation = KeyRotation::kNone;
  // rope_write_cache_kv: Q as it would be returned is rotated, too, and rounded to its type again.
  bool rotates_q = false;

  FASTATTN_HD bool Any() const { return center != nullptr || rotation != KeyRotation::kNone; }
};

}  // namespace fastattn
