// Code that the indexer's kernels share: a slot's place in its page, and stores to pages.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// Page and row of a slot; a division of 64 bits takes far longer than one of 32.
__device__ __forceinline__ void SplitSlot(int64_t slot, int64_t page_size, int64_t* page,
                                          int64_t* row) {
  if ((slot | page_size) >> 32 == 0) {
    const auto size = static_cast<uint32_t>(page_size);
    const uint32_t quotient = static_cast<uint32_t>(slot) / size;
    *page = quotient;
    *row = static_cast<uint32_t>(slot) - quotient * size;
  } else {
    *page = slot / page_size;
    *row = slot - *page * page_size;
  }
}

// `aligned` says that the address suits a store of 4 bytes.
__device__ __forceinline__ void StoreWord(uint8_t* to, uint32_t word, bool aligned) {
  if (aligned) {
    *reinterpret_cast<uint32_t*>(to) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(word >> (8 * i));
}

}  // namespace fastattn::cuda
