// save_partial_states: what a token adds to its group before the group is compressed.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "common/numeric.h"
#include "common/types.h"
#include "params/index_array.h"

namespace fastattn {

// One token for each slot: row s % state_block of block s / state_block. A slot outside the cache
// and a negative position are skipped.
//
// Only in invalid input do two tokens share a slot; then either may be the one that stays.
struct PartialStatesParams {
  const void* kv_score = nullptr;    // [>= num_slots, 2 * width]: values, then scores
  const void* ape = nullptr;         // [ratio, width]
  void* state = nullptr;             // [num_blocks, state_block, 2 * width]
  IndexArray positions;              // [>= num_slots]
  IndexArray slots;                  // [num_slots]
  DType kv_dtype = DType::kFloat32;  // fp32 or bf16, as the others
  DType ape_dtype = DType::kFloat32;
  DType state_dtype = DType::kFloat32;
  int64_t num_slots = 0;
  int64_t kv_stride = 0;  // elements, as the others
  int64_t block_stride = 0;
  int64_t row_stride = 0;
  int64_t num_blocks = 0;
  int64_t state_block = 1;
  int width = 0;  // a multiple of kStateVector
  int ratio = 1;
};

inline constexpr int kStateVector = 8;

// A score with its position's bias: one fp32 sum. Every NaN is 0x7FFFFFFF (0x7FFF in bf16).
FASTATTN_HD float PartialScore(float score, float bias) {
  const float sum = Add(score, bias);
  return IsNaN(sum) ? BitsFloat(0x7FFFFFFFu) : sum;
}

}  // namespace fastattn
