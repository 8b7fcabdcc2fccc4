// What all kernels of the logits do alike: groups of rows, cells that nobody sees, ReLU.
#pragma once

#include <cuda_runtime.h>

#include "params/mqa_logits.h"
#include "plan/mqa_logits.h"

namespace fastattn::cuda {

// Queries that a CTA scores together. Those of a paged call belong to one sequence.
struct LogitsGroups {
  int rows = 1;          // of a group
  int per_sequence = 1;  // groups of a sequence; paged only
  int count = 0;

  LogitsGroups() = default;
  LogitsGroups(const LogitsParams& p, int rows_of_group) : rows(rows_of_group) {
    per_sequence = LogitsGroupsOfSequence(p, rows);
    count = LogitsGroupCount(p, rows);
  }

  __device__ __forceinline__ int Sequence(int group) const {
    return per_sequence == 1 ? group : group / per_sequence;
  }
  __device__ __forceinline__ int FirstRow(const LogitsParams& p, int group) const {
    if (!p.paged) return group * rows;
    const int sequence = Sequence(group);
    return sequence * static_cast<int>(p.next_n) + (group - sequence * per_sequence) * rows;
  }
  __device__ __forceinline__ int RowsOf(const LogitsParams& p, int group) const {
    if (!p.paged) return min(rows, static_cast<int>(p.rows) - group * rows);
    const int part = group - Sequence(group) * per_sequence;
    return min(rows, static_cast<int>(p.next_n) - part * rows);
  }
};

// Keys [begin, end) that a row sees and whose logits have a column; key `first` has column 0.
struct VisibleKeys {
  int begin, end, first;
};

__device__ __forceinline__ VisibleKeys VisibleKeysOf(const LogitsParams& p, int64_t row) {
  const LogitsRange range = p.RangeOf(row);
  const int64_t first = p.FirstKey(row), last = min(range.end, first + p.columns);
  return {static_cast<int>(range.begin), static_cast<int>(max(last, range.begin)),
          static_cast<int>(first)};
}

// x, or 0 for a negative x; a NaN stays one.
__device__ __forceinline__ float Relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// The same of a row of a sequence, without a division.
__device__ __forceinline__ VisibleKeys VisibleKeysOf(const LogitsParams& p, int sequence,
                                                     int64_t row) {
  if (!p.paged) return VisibleKeysOf(p, row);
  const int step = static_cast<int>(row - sequence * p.next_n);
  const int most = static_cast<int>(min(p.columns, p.max_blocks * p.page_size));
  const int length = p.lens_per_row
                         ? p.context_lens[row]
                         : max(p.context_lens[sequence], 0) - static_cast<int>(p.next_n) + step + 1;
  return {0, min(max(length, 0), most), 0};
}

constexpr int kFillColumns = 4096;

// Writes -inf into columns [begin, end) of a row, by one warp.
__device__ __forceinline__ void FillCells(float* row, int begin, int end, int lane) {
  const float hidden = -__builtin_huge_valf();
  // Up to a 16-byte boundary, in vectors, and the rest.
  const int odd = static_cast<int>(-(reinterpret_cast<intptr_t>(row + begin) / 4) & 3);
  const int head = min(begin + odd, end), tail = head + (end - head) / 4 * 4;
  if (begin + lane < head) row[begin + lane] = hidden;
  for (int i = head + 4 * lane; i < tail; i += 128) {
    *reinterpret_cast<float4*>(row + i) = make_float4(hidden, hidden, hidden, hidden);
  }
  if (tail + lane < end) row[tail + lane] = hidden;
}

// The cells that nobody sees, by warp `warp` of `warps` in the grid.
__device__ __forceinline__ void FillHidden(const LogitsParams& p, int warp, int warps, int lane) {
  const int chunks = static_cast<int>((p.columns + kFillColumns - 1) / kFillColumns);
  const int64_t items = p.rows * chunks;
  for (int64_t item = warp; item < items; item += warps) {
    const int64_t row = item / chunks;
    const int64_t from = (item - row * chunks) * kFillColumns;
    const int begin = static_cast<int>(from);
    const int end = static_cast<int>(min(from + kFillColumns, p.columns));
    const VisibleKeys keys = VisibleKeysOf(p, row);
    float* out = p.out + row * p.row_stride;
    const int seen = keys.begin - keys.first, unseen = keys.end - keys.first;
    FillCells(out, begin, min(end, seen), lane);
    FillCells(out, max(begin, unseen), end, lane);
  }
}

}  // namespace fastattn::cuda
