// Merge of contiguous tensors of whole 16-byte packs, up to 64 a head: the usual shapes.
//
// A row is the D channels of a token and head. 2^log2_lanes neighbouring threads, at most a warp,
// hold a row (some idle where its packs are no power of two), and rows follow each other through
// the grid as they do in memory, which keeps DRAM pages open: with several tokens a CTA, for the
// sake of whole sectors of LSEs, 340 MB took 9 % longer. A thread waits for nothing but its loads:
// it meets no barrier (a row's threads are in one warp), no branch on what was loaded and no
// division. Inputs are loaded as usual, so that they may stay in L2, but the output streams
// through.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/divisor.cuh"
#include "cuda/common/dynamic_scale.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/merge/vector_kernel.cuh"

namespace fastattn::cuda {

inline constexpr int kDenseMergeThreads = 128;

struct MergeDenseParams : MergePointers {
  uint32_t rows;         // T * H
  uint32_t merged_rows;  // rows from here on take the suffix as it is
  Divisor heads;
  int packs;                              // of a row
  int lse_head_stride, lse_token_stride;  // of all three
  int log2_lanes;
  int log2_segment;  // kDynamicFp8: 2^this neighbouring threads share a scale, at most a warp
};

// Returns 1 / x for a scale whose inverse is a normal number: this is the fast path of a correctly
// rounded division, without its branch. `rare` tells that x has no such inverse.
__device__ __forceinline__ float UsualInverse(float x, bool& rare) {
  rare = ((FloatBits(x) + 0x01800000u) & 0x7F800000u) <= 0x01FFFFFFu;
  return ReciprocalOfNormal(x);
}

template <int kWidth, int kPacks>
__device__ __forceinline__ float DenseScale(const MergeDenseParams& p, uint32_t index, bool active,
                                            const float (&x)[kPacks][kWidth]) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) amax = max(amax, AbsBits(x[i][j]));
  }
  for (int lanes = 1; lanes < 1 << p.log2_segment; lanes *= 2) {
    amax = max(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
  }
  // A scale of e4m3 is never too small or too large for UsualInverse.
  const float scale = FastDynamicScale(amax, kActivationAmaxFloor, kE4M3Max);
  const uint32_t segment = index >> p.log2_segment;
  if (active && index == segment << p.log2_segment) p.output_scales[segment] = scale;
  return scale;
}

// kExact: no thread of a row idles.
template <DType kIn, MergeOutput kOutput, int kPacks, bool kExact>
__global__ void __launch_bounds__(kDenseMergeThreads)
    MergeDenseKernel(const __grid_constant__ MergeDenseParams p) {
  constexpr int kWidth = kPackWidth<kIn>;
  constexpr bool kDynamic = kOutput == MergeOutput::kDynamicFp8;
  const uint32_t index = blockIdx.x * kDenseMergeThreads + threadIdx.x;
  const uint32_t row = index >> p.log2_lanes;
  const uint32_t lane = index & ((1u << p.log2_lanes) - 1);
  const uint32_t first = (kExact ? (row << p.log2_lanes) * kPacks : row * p.packs) + lane;
  const uint32_t token = p.heads.Quotient(row);
  const uint32_t head = row - token * p.heads.divisor;
  const int lse_at = static_cast<int>(head) * p.lse_head_stride +  //
                     static_cast<int>(token) * p.lse_token_stride;
  const bool active = row < p.rows;
  if (!kDynamic && !active) return;  // a dynamic scale takes whole warps

  PdlWait();
  PdlLaunchDependents();
  const auto holds = [&](int i) {  // neighbours take neighbouring packs
    return kExact || lane + (static_cast<uint32_t>(i) << p.log2_lanes) < p.packs;
  };
  uint4 a[kPacks], b[kPacks];
  float prefix_lse = -INFINITY, suffix_lse = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) a[i] = b[i] = make_uint4(0, 0, 0, 0);
  if (row < p.merged_rows) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const uint32_t pack = first + (static_cast<uint32_t>(i) << p.log2_lanes);
      if (holds(i)) a[i] = static_cast<const uint4*>(p.prefix_output)[pack];
    }
    prefix_lse = p.prefix_lse[lse_at];
  }
  if (!kDynamic || active) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const uint32_t pack = first + (static_cast<uint32_t>(i) << p.log2_lanes);
      if (holds(i)) b[i] = static_cast<const uint4*>(p.suffix_output)[pack];
    }
    suffix_lse = p.suffix_lse[lse_at];
  }
  float inverse = 1.0f;
  bool rare = false;
  if constexpr (kOutput == MergeOutput::kStaticFp8) {
    inverse = UsualInverse(__ldg(p.output_scale), rare);
  }
  const MergeWeights w = WeightsOfSides(prefix_lse, suffix_lse);
  const float lse = MergedLse(w);
  float x[kPacks][kWidth];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) MergePack<kIn>(a[i], b[i], w, x[i]);
  if constexpr (kOutput == MergeOutput::kStaticFp8) {
    if (rare) inverse = Div(1.0f, __ldg(p.output_scale));
  } else if constexpr (kDynamic) {
    inverse = UsualInverse(DenseScale(p, index, active, x), rare);
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (holds(i) && (!kDynamic || active)) {
      const int64_t element = int64_t{first + (static_cast<uint32_t>(i) << p.log2_lanes)} * kWidth;
      if constexpr (IsValues(kOutput)) {
        StoreValues<StoredType(kOutput, kIn), true>(p.output, element, x[i]);
      } else {
        StoreCodes<true>(p.output, element, x[i], inverse);
      }
    }
  }
  // All threads of a row have read its LSEs before one of them writes, maybe over them.
  __syncwarp();
  if (lane == 0 && (!kDynamic || active)) p.output_lse[lse_at] = lse;
}

}  // namespace fastattn::cuda
