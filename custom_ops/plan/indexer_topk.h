// How many rows of logits indexer_topk has at once.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastattn {

// Rows that a kernel of the logits may score together, from a multiple of it on: tiles that begin
// there have the bits of one call over all rows (MXFP4 rows share an operand).
inline constexpr int64_t kIndexerTopkRows = 32;

struct IndexerTopkPlan {
  int64_t tile_rows = 0;
  int64_t row_stride = 0;  // floats; rows begin at multiples of 16 bytes
  int64_t lengths = 0;     // of rows, behind the logits

  int64_t Words() const { return tile_rows * row_stride + lengths; }  // of 4 bytes
};

// `workspace_bytes`: of logits, at most, but for the first kIndexerTopkRows rows.
inline IndexerTopkPlan PlanIndexerTopk(int64_t rows, int64_t columns, int64_t workspace_bytes,
                                       bool makes_lengths) {
  IndexerTopkPlan plan;
  plan.row_stride = (std::max<int64_t>(columns, 1) + 3) / 4 * 4;
  const int64_t room = workspace_bytes / 4 / plan.row_stride;
  const int64_t whole = room / kIndexerTopkRows * kIndexerTopkRows;
  plan.tile_rows = std::min(rows, std::max(whole, kIndexerTopkRows));
  plan.lengths = makes_lengths ? rows : 0;
  return plan;
}

}  // namespace fastattn
