// A kernel's parameters, and what follows from them, while it waits for the kernel before it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/lane.cuh"

namespace fastattn::cuda {

// Has values computed before the wait: a branch needs them, so that neither compiler moves them
// behind it. Loads behind the wait then leave one after the other. All lanes of the warp take part;
// the grid has at most two dimensions.
class EarlyValues {
 public:
  template <typename T>
  __device__ __forceinline__ void operator()(const T& x) {
#if __CUDA_ARCH__ >= 900
    static_assert(sizeof(T) == 1 || sizeof(T) == 4 || sizeof(T) == 8);
    if constexpr (std::is_pointer_v<T>) {
      (*this)(reinterpret_cast<uint64_t>(x));
    } else if constexpr (sizeof(T) == 8) {
      bits_ ^= static_cast<uint32_t>(x) ^ static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32);
    } else {
      bits_ ^= static_cast<uint32_t>(x);
    }
#endif
  }

  // The same for a parameter, which would be read again where it is used: its register differs from
  // the parameter, for all that a compiler knows.
  template <typename T>
  __device__ __forceinline__ void Hold(T& x) {
#if __CUDA_ARCH__ >= 900
    const unsigned zero = Zero();
    if constexpr (std::is_pointer_v<T>) {  // an integer would lose that it is global memory
      using Bytes = std::conditional_t<std::is_const_v<std::remove_pointer_t<T>>, const char, char>;
      x = reinterpret_cast<T>(reinterpret_cast<Bytes*>(x) + zero);
    } else if constexpr (std::is_same_v<T, bool>) {
      x = (static_cast<unsigned>(x) | zero) != 0;
    } else if constexpr (std::is_enum_v<T>) {
      x = static_cast<T>(static_cast<unsigned>(x) | zero);
    } else {
      x |= zero;
    }
    (*this)(x);
#endif
  }

  // Ends the computation, before the wait.
  __device__ __forceinline__ void Finish() const {
#if __CUDA_ARCH__ >= 900
    if (__any_sync(kFullWarp, bits_ == 0x5bd1e995)) __nanosleep(1);  // harmless
#endif
  }

  // Brings a kernel's parameters into the constant cache.
  template <typename Params>
  __device__ __forceinline__ void Touch(const Params& p) {
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (unsigned i = 0; i < sizeof(p); i += 64) {
      bits_ ^= *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(&p) + i);
    }
#endif
  }

  // A 0 that no compiler knows, the same in all lanes. It comes from a vote, which is not repeated
  // where the 0 is used.
  __device__ __forceinline__ unsigned Zero() const { return zero_; }

 private:
  uint32_t bits_ = 0;
  unsigned zero_ = __ballot_sync(kFullWarp, blockIdx.z != 0);
};

}  // namespace fastattn::cuda
