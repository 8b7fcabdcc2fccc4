#include "cpu/topk.h"

#include "common/topk_key.h"
#include "cpu/parallel.h"
#include "cpu/topk_row.h"

namespace fastattn::cpu {

namespace {

void SelectRow(const TopkParams& p, int64_t row, TopkRow* topk) {
  const TopkRange range =
      TopkRangeOf(p.starts == nullptr ? 0 : p.starts[row], p.lengths[row], p.columns);
  int32_t* out = p.indices + row * p.k;
  if (range.size <= p.k) {
    for (int64_t i = 0; i < p.k; ++i) out[i] = i < range.size ? static_cast<int32_t>(i) : -1;
    return;
  }
  topk->Select(p.logits + row * p.row_stride + range.begin, range.size, p.k, out);
}

}  // namespace

void TopkIndices(const TopkParams& p) {
  // About 4 ns a column: its key, its count and two passes.
  ParallelFor(p.k == 0 ? 0 : p.rows, 4 * p.columns, [&](int64_t begin, int64_t end) {
    TopkRow topk;
    for (int64_t row = begin; row < end; ++row) SelectRow(p, row, &topk);
  });
}

}  // namespace fastattn::cpu
