#include "cpu/topk.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "common/topk_key.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

constexpr int kDigitShift = 21;
constexpr int kDigits = 1 << (32 - kDigitShift);

struct Scratch {
  std::vector<uint32_t> keys, alike;
};

// The k-th largest of more than k keys, and how many of those equal to it are among the k largest.
// Only keys with its leading digit are sorted.
uint32_t FindThreshold(int64_t k, Scratch* scratch, int64_t* equal) {
  int64_t counts[kDigits] = {};
  for (const uint32_t key : scratch->keys) ++counts[key >> kDigitShift];
  int digit = kDigits - 1;
  int64_t wanted = k;
  while (counts[digit] < wanted) wanted -= counts[digit--];
  std::vector<uint32_t>& alike = scratch->alike;
  alike.clear();
  for (const uint32_t key : scratch->keys) {
    if (static_cast<int>(key >> kDigitShift) == digit) alike.push_back(key);
  }
  const auto last = alike.begin() + (wanted - 1);
  std::nth_element(alike.begin(), last, alike.end(), std::greater<uint32_t>());
  const uint32_t threshold = *last;
  *equal = wanted - std::count_if(alike.begin(), last, [&](uint32_t x) { return x > threshold; });
  return threshold;
}

void SelectRow(const TopkParams& p, int64_t row, Scratch* scratch) {
  const TopkRange range =
      TopkRangeOf(p.starts == nullptr ? 0 : p.starts[row], p.lengths[row], p.columns);
  int32_t* out = p.indices + row * p.k;
  if (range.size <= p.k) {
    for (int64_t i = 0; i < p.k; ++i) out[i] = i < range.size ? static_cast<int32_t>(i) : -1;
    return;
  }
  const float* logits = p.logits + row * p.row_stride + range.begin;
  std::vector<uint32_t>& keys = scratch->keys;
  keys.resize(range.size);
  for (int64_t i = 0; i < range.size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, logits + i, sizeof(bits));
    keys[i] = TopkKey(bits);
  }
  int64_t equal = 0;
  const uint32_t threshold = FindThreshold(p.k, scratch, &equal);
  for (int64_t i = 0; i < range.size; ++i) {
    if (keys[i] > threshold || (keys[i] == threshold && equal-- > 0)) {
      *out++ = static_cast<int32_t>(i);
    }
  }
}

}  // namespace

void TopkIndices(const TopkParams& p) {
  // About 4 ns a column: its key, its count and two passes.
  ParallelFor(p.k == 0 ? 0 : p.rows, 4 * p.columns, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t row = begin; row < end; ++row) SelectRow(p, row, &scratch);
  });
}

}  // namespace fastattn::cpu
