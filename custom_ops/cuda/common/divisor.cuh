// Division of indices by a number that the host chooses: the device only multiplies.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// Divides n < 2^31 by a divisor in [1, 2^31).
//
// With 2^shift >= divisor, multiplier / 2^(31 + shift) exceeds 1 / divisor by less than 2^-31 of
// it: too little to carry a quotient of n over the next integer.
struct Divisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 1u << 31;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d);
  }

#if defined(__CUDACC__)
  __device__ __forceinline__ uint32_t Quotient(uint32_t n) const {
    return __umulhi(2 * n, multiplier) >> shift;
  }
#endif
};

}  // namespace fastattn::cuda
