// Positions, slots and the like: integers whose width the caller chooses.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

// Integers of either width, as callers keep positions and slots.
struct IndexArray {
  const void* data = nullptr;
  bool wide = false;  // int64, else int32

  FASTATTN_HD int64_t At(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace fastattn
