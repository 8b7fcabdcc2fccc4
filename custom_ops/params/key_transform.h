// What happens to K between its rounding to the type it comes in and its quantisation.
#pragma once

#include <cstdint>

#include "common/hadamard.h"
#include "common/key_feedback.h"
#include "common/types.h"

namespace fastattn {

// K less a constant, then rotated, both in fp32: what is quantised is not rounded in between.
struct KeyTransform {
  const float* center = nullptr;  // [KV, D] or null
  KeyRotation rotation = KeyRotation::kNone;
  // rope_write_cache_kv: Q as it would be returned is rotated, too, and rounded to its type again.
  bool rotates_q = false;
  // [KV, D, D] or null: error feedback while K is quantised (common/key_feedback.h).
  const float* feedback = nullptr;

  // Whether a reader has something to undo.
  FASTATTN_HD bool Any() const { return center != nullptr || rotation != KeyRotation::kNone; }

  FASTATTN_HD KeyFeedback FeedbackOf(int head, int head_dim) const {
    if (feedback == nullptr) return {};
    return {feedback + int64_t{head} * head_dim * head_dim};
  }
};

}  // namespace fastattn
