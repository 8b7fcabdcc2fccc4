// Byte permutations in registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastattn::cuda {

// Reorders bytes that are stored in the order 0,1,8,9, 2,3,10,11, ... to 0..15. TokenSlot of
// common/layout.h has that order.
__device__ __forceinline__ uint4 SlotsToOrder(uint4 x) {
  return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410),
                    __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
}

// The inverse of SlotsToOrder.
__device__ __forceinline__ uint4 OrderToSlots(uint4 x) {
  return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632),
                    __byte_perm(x.y, x.w, 0x5410), __byte_perm(x.y, x.w, 0x7632));
}

// Transposes 4x4 bytes: byte i of out[j] is byte j of in[i].
__device__ __forceinline__ void TransposeBytes(const uint32_t (&in)[4], uint32_t (&out)[4]) {
  const uint32_t low01 = __byte_perm(in[0], in[1], 0x5140);  // 0.0 1.0 0.1 1.1
  const uint32_t low23 = __byte_perm(in[2], in[3], 0x5140);
  const uint32_t high01 = __byte_perm(in[0], in[1], 0x7362);
  const uint32_t high23 = __byte_perm(in[2], in[3], 0x7362);
  out[0] = __byte_perm(low01, low23, 0x5410);
  out[1] = __byte_perm(low01, low23, 0x7632);
  out[2] = __byte_perm(high01, high23, 0x5410);
  out[3] = __byte_perm(high01, high23, 0x7632);
}

}  // namespace fastattn::cuda
