// Sums of a row's probabilities.
#pragma once

#include <cstdint>

#include "cuda/common/shared_address.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_half.cuh"
#include "cuda/prefill_half_sm90/config.h"
#include "cuda/prefill_half_sm90/query.cuh"

namespace fastattn::cuda::prefill_half_sm90 {

// By the threads, each its columns of two rows.
template <class C, bool kProducts = C::kCodes>
class RowSums {
 public:
  __device__ __forceinline__ void Start() { sum_[0] = sum_[1] = 0.0f; }

  // The step's probabilities will be alpha of the old ones' unit.
  __device__ __forceinline__ void Follow(int h, float alpha) { sum_[h] *= alpha; }
  __device__ __forceinline__ void Add(int h, float probability) { sum_[h] += probability; }

  // Of a step whose probabilities are operands of P * V.
  __device__ __forceinline__ static uint64_t Operand(const Shared<C>&) { return 0; }
  __device__ __forceinline__ void Multiply(const uint32_t*, uint64_t) {}
  __device__ __forceinline__ void Keep() {}
  __device__ __forceinline__ void Rescale(const float (&)[2]) {}

  // This thread's part.
  __device__ __forceinline__ void Take(float (&sum)[2]) const {
    sum[0] = sum_[0];
    sum[1] = sum_[1];
  }

 private:
  float sum_[2];
};

// By the tensor cores, with values of 1: where codes are converted, the other warps' instructions
// cost more time than products do. P is rounded as it is for P * V.
template <class C>
class RowSums<C, true> {
 public:
  __device__ __forceinline__ void Start() {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums_[i] = 0.0f;
  }

  __device__ __forceinline__ void Follow(int, float) {}
  __device__ __forceinline__ void Add(int, float) {}

  __device__ __forceinline__ static uint64_t Operand(const Shared<C>& shared) {
    return OperandDescriptor<128>(Uniform(SharedAddress(shared.ones)));
  }

  __device__ __forceinline__ void Multiply(const uint32_t* probabilities, uint64_t ones) {
    MultiplyHalfRegisters<C::kOperand>(sums_, probabilities, ones);
  }

  // Behind a wait for the products.
  __device__ __forceinline__ void Keep() {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sums_[i])::"memory");
  }

  __device__ __forceinline__ void Rescale(const float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums_[i] *= alpha[i / 2];
  }

  // All four threads of a row have all of the sum.
  __device__ __forceinline__ void Take(float (&sum)[2]) const {
    sum[0] = 0.25f * sums_[0];
    sum[1] = 0.25f * sums_[2];
  }

 private:
  float sums_[4];  // two equal columns of rows h
};

}  // namespace fastattn::cuda::prefill_half_sm90
