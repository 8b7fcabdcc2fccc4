// The merged values of two sides, 16 bytes at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/exact.h"
#include "cuda/common/vector.cuh"
#include "cuda/merge/shared/merge_weights.h"

namespace fastattn::cuda {

template <DType kIn>
inline constexpr int kPackWidth = 16 / SizeOf(kIn);

template <DType kIn>
__device__ __forceinline__ void UnpackPack(const uint4& pack, float (&x)[kPackWidth<kIn>]) {
  if constexpr (kIn == DType::kFloat32) {
    x[0] = __uint_as_float(pack.x);
    x[1] = __uint_as_float(pack.y);
    x[2] = __uint_as_float(pack.z);
    x[3] = __uint_as_float(pack.w);
  } else {
    Unpack<kIn>(Raw<kIn>{pack, make_uint4(0, 0, 0, 0)}, x);
  }
}

// Replaces the values of an empty side by zeros, so that one expression serves every case with the
// bits of leaving the side out: x + -0 is x for every x. Two empty sides give +0 + -0 = 0.
template <DType kIn>
__device__ __forceinline__ uint4 OrElse(bool use, const uint4& pack, bool negative_zero) {
  const uint32_t zero = !negative_zero ? 0u : kIn == DType::kFloat32 ? 0x80000000u : 0x80008000u;
  return make_uint4(use ? pack.x : zero, use ? pack.y : zero, use ? pack.z : zero,
                    use ? pack.w : zero);
}

template <DType kIn>
__device__ __forceinline__ void MergePack(const uint4& prefix, const uint4& suffix,
                                          const MergeWeights& w, float (&x)[kPackWidth<kIn>]) {
  float a[kPackWidth<kIn>], b[kPackWidth<kIn>];
  UnpackPack<kIn>(OrElse<kIn>(w.use_prefix, prefix, w.use_suffix), a);
  UnpackPack<kIn>(OrElse<kIn>(w.use_suffix, suffix, true), b);
#pragma unroll
  for (int i = 0; i < kPackWidth<kIn>; ++i) x[i] = Add(Mul(a[i], w.prefix), Mul(b[i], w.suffix));
}

}  // namespace fastattn::cuda
