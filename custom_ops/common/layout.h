// Where element (token r, channel d) of one (block, KV head) lies, in bytes from its start, for the
// 8-bit caches. One block of one head is 64 * D bytes for K and for V alike.
#pragma once

#include "common/types.h"

namespace fastattn {

// Slot of token r (0..63) among the 64 tokens of a channel of V in the `fastattn` layout.
//
// Each group of 16 tokens is stored in the order 0,1,8,9, 2,3,10,11, 4,5,12,13, 6,7,14,15: the four
// bytes of a word are then the accumulator columns that one thread of an m16n8 MMA holds in two
// neighbouring n-tiles, so that P needs no shuffle before it becomes the A operand of P * V.
FASTATTN_HD constexpr int TokenSlot(int r) {
  return (r & ~15) + (((r & 7) >> 1) << 2) + (((r & 15) >> 3) << 1) + (r & 1);
}

// Inverse of TokenSlot.
FASTATTN_HD constexpr int TokenOfSlot(int slot) {
  return (slot & ~15) + (((slot & 15) >> 2) << 1) + (((slot & 3) >> 1) << 3) + (slot & 1);
}

template <CacheLayout kLayout>
FASTATTN_HD constexpr int KeyOffset(int r, int d, int head_dim) {
  if constexpr (kLayout == CacheLayout::kFastDeploy) {
    // 16 x 32 tiles in MMA fragment order.
    const int g = d / 16, w = d % 16;
    const int row = (r / 16) * 16 + r % 8 + (g % 2) * 8;
    const int col = (g / 2) * 32 + ((r % 16) / 8) * 16 + ((w % 8) / 2) * 4 + (w / 8) * 2 + w % 2;
    return row * head_dim + col;
  } else {
    return r * head_dim + d;
  }
}

template <CacheLayout kLayout>
FASTATTN_HD constexpr int ValueOffset(int r, int d, int head_dim) {
  if constexpr (kLayout == CacheLayout::kFastDeploy) {
    const int g = d / 16, w = d % 16;
    const int row = g * 16 + w % 8 + ((r / 16) % 2) * 8;
    const int col = (r / 32) * 32 + (w / 8) * 16 + ((r % 8) / 2) * 4 + ((r % 16) / 8) * 2 + r % 2;
    return row * kBlockSize + col;
  } else if constexpr (kLayout == CacheLayout::kFastattn) {
    return d * kBlockSize + TokenSlot(r);
  } else {
    return r * head_dim + d;
  }
}

}  // namespace fastattn
