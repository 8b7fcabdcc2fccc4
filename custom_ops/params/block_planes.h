// A cache's planes (one for each block and KV head) as one dimension of a tensor map.
//
// Whatever the strides of blocks and heads are, both are multiples of their greatest common
// divisor, which is the dimension's stride. In a contiguous cache that is a plane's size, and plane
// (block, head) is number block * KV + head. In other orders a box could begin between two planes,
// but no kernel asks for one there.
#pragma once

#include <cstdint>
#include <limits>
#include <numeric>

#include "params/common.h"

namespace fastattn {

struct BlockPlanes {
  int block = 0;    // from one block to the next, in strides of the dimension
  int head = 0;     // from one KV head to the next
  int outside = 0;  // the dimension's size: TMA fills with zeros what lies there

  // A negative block_id is an unassigned block.
  FASTATTN_HD int Of(int block_id, int kv_head) const {
    return block_id < 0 ? outside : block_id * block + kv_head * head;
  }
};

struct PlaneDimension {
  BlockPlanes planes;
  uint64_t stride = 0;  // bytes
  bool fits = false;    // a tensor map can have it
};

inline PlaneDimension PlanesOf(const CacheStrides& strides, int num_blocks, int num_kv_heads,
                               int element_bytes) {
  PlaneDimension result;
  const int64_t stride = std::gcd(strides.block, strides.head);
  if (num_blocks <= 0 || num_kv_heads <= 0 || stride <= 0 || stride * element_bytes % 16 != 0) {
    return result;
  }
  const int64_t block = strides.block / stride, head = strides.head / stride;
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  constexpr int64_t kMostBytes = int64_t{1} << 40;
  const bool positive = strides.block > 0 && strides.head > 0 && strides.row > 0;
  if (!positive || block > kMost / num_blocks || head > kMost / num_kv_heads ||
      strides.row * element_bytes % 16 != 0 || strides.row >= kMostBytes / element_bytes ||
      stride >= kMostBytes / element_bytes) {
    return result;
  }
  const int64_t size = (num_blocks - 1) * block + (num_kv_heads - 1) * head + 1;
  if (size >= kMost) return result;
  result.planes = {static_cast<int>(block), static_cast<int>(head), static_cast<int>(size)};
  result.stride = static_cast<uint64_t>(stride * element_bytes);
  result.fits = true;
  return result;
}

}  // namespace fastattn
