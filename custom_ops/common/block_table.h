// Look-up of a sequence's physical cache blocks. Entries of block tables are not trusted: a block
// is not assigned if its id is outside [0, num_blocks), or if the table ends before its entry.
//
// References to parameters are not copies for a kernel: it reads what they name when it needs it.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

// The entry of a sequence's block `block_index`, which the table has.
FASTATTN_HD const int* BlockEntry(const int* const& block_tables, const int& max_blocks,
                                  int64_t batch_idx, int64_t block_index) {
  const int64_t first = batch_idx * max_blocks;
  return block_tables + (first + block_index);
}

// An entry's block, or -1 if it is not assigned. `block` is a copy of the entry: it is read twice.
FASTATTN_HD int AssignedBlock(const int& block, const int& num_blocks) {
  return block < 0 || block >= num_blocks ? -1 : block;
}

// The same in one comparison, where any negative number will do.
FASTATTN_HD int BlockOrNegative(int block, int num_blocks) {
  return block < num_blocks ? block : -1;
}

// And where nothing but the answer is wanted.
FASTATTN_HD bool IsAssignedBlock(int block, int num_blocks) {
  return static_cast<unsigned>(block) < static_cast<unsigned>(num_blocks);
}

// Physical block of a sequence's block `block_index` (not negative), or a negative number if none
// is assigned.
FASTATTN_HD int BlockOf(const int* block_tables, int max_blocks, int num_blocks, int64_t batch_idx,
                        int64_t block_index) {
  if (block_index >= max_blocks) return -1;
  return BlockOrNegative(*BlockEntry(block_tables, max_blocks, batch_idx, block_index), num_blocks);
}

}  // namespace fastattn
