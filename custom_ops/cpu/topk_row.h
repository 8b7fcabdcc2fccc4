// The k largest of a row by the total order of common/topk_key.h, for operators that choose.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "common/topk_key.h"

namespace fastattn::cpu {

// One for each thread.
class TopkRow {
 public:
  // Writes the columns of the k largest of `size` > k > 0 logits, ascending.
  void Select(const float* logits, int64_t size, int64_t k, int32_t* out) {
    keys_.resize(size);
    for (int64_t i = 0; i < size; ++i) {
      uint32_t bits;
      std::memcpy(&bits, logits + i, sizeof(bits));
      keys_[i] = TopkKey(bits);
    }
    int64_t equal = 0;
    const uint32_t threshold = FindThreshold(k, &equal);
    for (int64_t i = 0; i < size; ++i) {
      if (keys_[i] > threshold || (keys_[i] == threshold && equal-- > 0)) {
        *out++ = static_cast<int32_t>(i);
      }
    }
  }

 private:
  static constexpr int kDigitShift = 21;
  static constexpr int kDigits = 1 << (32 - kDigitShift);

  // The k-th largest of more than k keys, and how many of those equal to it are among the k
  // largest. Only keys with its leading digit are sorted.
  uint32_t FindThreshold(int64_t k, int64_t* equal) {
    int64_t counts[kDigits] = {};
    for (const uint32_t key : keys_) ++counts[key >> kDigitShift];
    int digit = kDigits - 1;
    int64_t wanted = k;
    while (counts[digit] < wanted) wanted -= counts[digit--];
    alike_.clear();
    for (const uint32_t key : keys_) {
      if (static_cast<int>(key >> kDigitShift) == digit) alike_.push_back(key);
    }
    const auto last = alike_.begin() + (wanted - 1);
    std::nth_element(alike_.begin(), last, alike_.end(), std::greater<uint32_t>());
    const uint32_t threshold = *last;
    *equal =
        wanted - std::count_if(alike_.begin(), last, [&](uint32_t x) { return x > threshold; });
    return threshold;
  }

  std::vector<uint32_t> keys_, alike_;
};

}  // namespace fastattn::cpu
