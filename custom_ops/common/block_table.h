// Look-up of a sequence's physical cache blocks.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

// Physical block of a sequence's block `block_index` (not negative), or a negative number if none
// is assigned: its id is outside [0, num_blocks), or the table ends before it.
FASTATTN_HD int BlockOf(const int* block_tables, int max_blocks, int num_blocks, int64_t batch_idx,
                        int64_t block_index) {
  if (block_index >= max_blocks) return -1;
  const int* entry = block_tables + batch_idx * max_blocks + block_index;
#if defined(__CUDA_ARCH__)
  const int block = __ldg(entry);
#else
  const int block = *entry;
#endif
  return block < num_blocks ? block : -1;
}

}  // namespace fastattn
