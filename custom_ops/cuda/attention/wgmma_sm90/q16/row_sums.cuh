// Sums of a row's probabilities.
#pragma once

#include <cstdint>

#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/query.cuh"
#include "cuda/common/shared_address.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_half.cuh"

namespace fastattn::cuda::wgmma_q16 {

// What is known of a KV tile's probabilities before their product: the thread's sums of two rows.
template <class C, bool kProducts = C::kQuantized>
class KvTileSums {
 public:
  // Adds two probabilities, which become word i of the operand of P * V.
  __device__ __forceinline__ void Add(int i, float a, float b, const uint32_t*) {
    partial_[i % 2] += a;
    partial_[i % 2] += b;
  }

  // Whether a sum is above what 16 bits hold, or NaN.
  __device__ __forceinline__ bool Exceed() const {
    return !(partial_[0] <= kMost && partial_[1] <= kMost);
  }

  // Whether that of row h is.
  __device__ __forceinline__ bool Exceeds(int h, const uint32_t*) const {
    return !(partial_[h] <= kMost);
  }

  __device__ __forceinline__ float Partial(int h) const { return partial_[h]; }

 private:
  // bf16 would hold far larger ones, but the largest probability of a row is exact only where the
  // shift follows it.
  static constexpr float kMost = 0x1p15f;

  float partial_[2] = {0.0f, 0.0f};
};

// Keeps the largest one alone: the bits of fp16 values that are not negative are in the order of
// their values, and NaN is above all.
template <class C>
class KvTileSums<C, true> {
 public:
  __device__ __forceinline__ void Add(int i, float, float, const uint32_t* words) {
    if (i % 2 == 1) largest_ = __vimax3_u16x2(largest_, words[i - 1], words[i]);
  }

  __device__ __forceinline__ bool Exceed() const { return __vmaxu2(largest_, kMost) != kMost; }

  // Whether one of row h does, which has every second word.
  __device__ __forceinline__ bool Exceeds(int h, const uint32_t* words) const {
    uint32_t largest = 0;
#pragma unroll
    for (int i = h; i < C::kScores / 2; i += 2) largest = __vmaxu2(largest, words[i]);
    return __vmaxu2(largest, kMost) != kMost;
  }

 private:
  static_assert(C::kOperand == DType::kFloat16);
  static constexpr uint32_t kMost = 0x78007800u;  // 2^15, twice

  uint32_t largest_ = 0;
};

// Sums found by the threads, each its columns of two rows.
template <class C, bool kProducts = C::kQuantized>
class RowSums {
 public:
  __device__ __forceinline__ void Start() { sum_[0] = sum_[1] = 0.0f; }

  // Rescales what has been summed up, when the row's shift moves.
  __device__ __forceinline__ void Follow(int h, float alpha) { sum_[h] *= alpha; }
  __device__ __forceinline__ void Add(const KvTileSums<C>& iteration) {
    sum_[0] += iteration.Partial(0);
    sum_[1] += iteration.Partial(1);
  }

  // The right operand that sums up the probabilities of P * V; none here.
  __device__ __forceinline__ static uint64_t Operand(const Shared<C>&, bool) { return 0; }
  __device__ __forceinline__ void Multiply(const uint32_t*, uint64_t) {}
  __device__ __forceinline__ void Keep() {}
  __device__ __forceinline__ void Rescale(const float (&)[2]) {}

  // Gives this thread's addend of the sums.
  __device__ __forceinline__ void Take(float (&sum)[2]) const {
    sum[0] = sum_[0];
    sum[1] = sum_[1];
  }

 private:
  float sum_[2];
};

// Sums found by the tensor cores, with values of 1: where codes are converted, other warps'
// instructions cost more time than products do. P is rounded as it is for P * V.
template <class C>
class RowSums<C, true> {
 public:
  __device__ __forceinline__ void Start() {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums_[i] = 0.0f;
  }

  __device__ __forceinline__ void Follow(int, float) {}
  __device__ __forceinline__ void Add(const KvTileSums<C>&) {}

  // Values of 1, or with `zeros` of 0, which lie behind them: for KV tiles whose sums AddRow()
  // takes.
  __device__ __forceinline__ static uint64_t Operand(const Shared<C>& shared, bool zeros) {
    return OperandDescriptor<128>(Uniform(SharedAddress(shared.ones) + (zeros ? 32 : 0)));
  }

  // Adds the sum of a KV tile's probabilities of row h, where no product is under way.
  __device__ __forceinline__ void AddRow(int h, float sum) {
    sums_[2 * h] += sum;
    sums_[2 * h + 1] += sum;
  }

  __device__ __forceinline__ void Multiply(const uint32_t* probabilities, uint64_t ones) {
    MultiplyHalfRegisters<C::kOperand>(sums_, probabilities, ones);
  }

  // Called after a wait for the products.
  __device__ __forceinline__ void Keep() {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sums_[i])::"memory");
  }

  __device__ __forceinline__ void Rescale(const float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums_[i] *= alpha[i / 2];
  }

  // Gives a fourth of the sum: all four threads of a row have all of it.
  __device__ __forceinline__ void Take(float (&sum)[2]) const {
    sum[0] = 0.25f * sums_[0];
    sum[1] = 0.25f * sums_[2];
  }

 private:
  float sums_[4];  // two equal columns of rows h
};

}  // namespace fastattn::cuda::wgmma_q16
