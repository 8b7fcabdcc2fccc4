// Rotation of the last 64 channels of a head by a token's position, interleaved pairs.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/index_array.h"

namespace fastattn {

struct Rotations {
  IndexArray positions;           // [T]; clamped to [0, max_positions)
  const void* cos_sin = nullptr;  // [max_positions, 64]: 32 cosines, then 32 sines
  DType dtype = DType::kFloat32;  // fp32 or bf16
  int64_t max_positions = 0;      // at least 1

  // The table's row of a position. Two selects: a branch would hold up a kernel's other loads.
  FASTATTN_HD int64_t RowOf(int64_t position) const {
    const int64_t row = position < max_positions ? position : max_positions - 1;
    return row < 0 ? 0 : row;
  }
};

}  // namespace fastattn
