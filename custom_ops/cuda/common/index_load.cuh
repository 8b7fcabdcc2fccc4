// A load from an IndexArray whose value is put together later: what follows the load is not held up
// by the choice between the two widths, which a branch around either would wait for.
#pragma once

#include <cstdint>

#include "params/index_array.h"

namespace fastattn::cuda {

struct LoadedIndex {
  uint32_t low = 0;
  int32_t high = 0;
  bool wide = false;

  __device__ __forceinline__ void Load(const IndexArray& array, int64_t i) {
    const auto* words = static_cast<const uint32_t*>(array.data);
    wide = array.wide;
    low = __ldg(words + (wide ? 2 * i : i));
    if (wide) high = static_cast<int32_t>(__ldg(words + 2 * i + 1));
  }

  __device__ __forceinline__ int64_t Value() const {
    const int32_t upper = wide ? high : static_cast<int32_t>(low) >> 31;
    return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(upper)) << 32 | low);
  }
};

}  // namespace fastattn::cuda
