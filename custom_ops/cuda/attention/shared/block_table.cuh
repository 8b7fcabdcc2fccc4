// Where the blocks of a sequence stand in its block table.
#pragma once

#include <cstdint>

#include "params/attention.h"

namespace fastattn::cuda {

// The entry of block `block_idx` of a sequence. Entries are not trusted: an id outside of the cache
// means that the block is not assigned, and its keys are masked.
__device__ __forceinline__ const int* BlockEntry(const AttentionParams& p, int batch_idx,
                                                 int block_idx) {
  const int64_t first = static_cast<int64_t>(batch_idx) * p.seqs.max_blocks;
  return p.seqs.block_tables + (first + block_idx);
}

}  // namespace fastattn::cuda
