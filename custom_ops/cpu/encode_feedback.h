// Codes of a head's K with error feedback (common/key_feedback.h).
#pragma once

#include "common/key_feedback.h"
#include "cpu/convert.h"

namespace fastattn::cpu {

inline constexpr int kMostChannels = 256;

// Codes of x * inverse. `n` is a multiple of a block.
template <DType kCode>
void EncodeWithFeedback(const float* x, int n, float inverse, const KeyFeedback& feedback,
                        typename Element<kCode>::Storage* out) {
  using Code = detail::Lane<kCode>;
  float y[kMostChannels];
  for (int i = 0; i < n; ++i) y[i] = x[i] * inverse;
  for (int begin = 0; begin < n; begin += kFeedbackBlock) {
    const int end = begin + kFeedbackBlock;
    int32_t codes[kFeedbackBlock];
    float errors[kFeedbackBlock];
    for (int i = 0; i < kFeedbackBlock; ++i) {
      codes[i] = Code::From(y[begin + i]);
      errors[i] = PassedError(Code::To(codes[i]), y[begin + i]);
    }
    for (int i = 0; i < kFeedbackBlock; ++i) {
      out[begin + i] = static_cast<typename Element<kCode>::Storage>(codes[i]);
    }
    const float* rows = feedback.matrix + static_cast<int64_t>(begin) * n;
    for (int j = end; j < n; ++j) y[j] = WithPassedErrors(y[j], errors, rows + j, n);
  }
}

}  // namespace fastattn::cpu
