// Where a warp is in a ring of buffers: the buffer, and the phase of its barriers.
#pragma once

#include <cstdint>

namespace fastattn::cuda::mqa_logits {

template <int kBuffers>
struct Ring {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++index == kBuffers) index = 0, phase ^= 1;
  }
  // At most kBuffers steps.
  __device__ __forceinline__ void Advance(int steps) {
    index += steps;
    if (index >= kBuffers) index -= kBuffers, phase ^= 1;
  }
};

}  // namespace fastattn::cuda::mqa_logits
