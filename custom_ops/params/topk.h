// topk_indices: the k largest of a range of columns in every row, by one total order.
#pragma once

#include <cstdint>

namespace fastattn {

// Most columns that a row may have, and most of them that are chosen.
inline constexpr int64_t kTopkMaxColumns = int64_t{1} << 30;
inline constexpr int64_t kTopkMaxK = 4096;

struct TopkParams {
  const float* logits = nullptr;     // [rows, columns], columns side by side
  const int32_t* lengths = nullptr;  // [rows] columns in the row's range
  const int32_t* starts = nullptr;   // [rows] first column of the range, or null: 0
  int32_t* indices = nullptr;        // [rows, k]
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;  // elements
  int64_t k = 0;
};

}  // namespace fastattn
