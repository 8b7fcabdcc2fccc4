#pragma once

#include <cstdint>

namespace fastattn::cuda {

// Address in the shared window, as instructions with a .shared operand take it.
__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace fastattn::cuda
