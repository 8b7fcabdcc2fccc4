// How the results of a CTA's warp pipelines become one, by way of shared memory. A warp has packed
// rows from `warp_row` on; `g` and `t` are its lane / 4 and lane % 4.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attention/mma_sm80/kv_tile.cuh"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/common/exp2.cuh"

namespace fastattn::cuda {

// Writes the maximum and the sum of the warp's packed rows over its pipeline's keys. `leads`: g is
// 0, in the form that the kernel was measured with.
template <typename Traits>
__device__ __forceinline__ void WriteStates(const TileState<Traits>& state, int pipeline,
                                            int warp_row, bool leads, int t, float2* states) {
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = state.sum[n][c];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      if (leads) {
        states[pipeline * Traits::kTileRows + warp_row + 8 * n + 2 * t + c] =
            make_float2(state.maximum[n][c], sum);
      }
    }
  }
}

// Brings the warp's output to the packed rows' maxima over all pipelines, in units of 1.
template <typename Traits>
__device__ __forceinline__ void Equalize(const float2* states, int warp_row, int t,
                                         TileState<Traits>* state) {
  const float scale = Traits::kPerTokenScales
                          ? __uint_as_float(static_cast<uint32_t>(state->scale_exponent) << 23)
                          : 1.0f;
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float maximum = -kInfinity;
#pragma unroll
      for (int s = 0; s < Traits::kPipelines; ++s) {
        maximum = fmaxf(maximum, states[s * Traits::kTileRows + warp_row + 8 * n + 2 * t + c].x);
      }
      const float weight = scale * WeightOf(state->maximum[n][c], maximum);
#pragma unroll
      for (int i = 0; i < Traits::kDimTiles; ++i) {
        state->out[i][n][c] *= weight;
        state->out[i][n][c + 2] *= weight;
      }
    }
  }
}

// Stores the channels of round `round` of the warp's output. Registers take no index that varies,
// so every round passes by all of them.
template <typename Traits>
__device__ __forceinline__ void StoreRound(const TileState<Traits>& state, int round, int pipeline,
                                           int warp_row, int g, int t, float* merge) {
  constexpr int kTilesPerRound = Traits::kMergeDims / 16;
  static_assert(Traits::kDimTiles % kTilesPerRound == 0, "a round more would hold the rest");
#pragma unroll
  for (int i = 0; i < Traits::kDimTiles; ++i) {
    if (i / kTilesPerRound != round) continue;
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int packed_row = warp_row + 8 * n + 2 * t + c % 2;
        merge[(pipeline * Traits::kTileRows + packed_row) * Traits::kMergeStride +
              Traits::ChannelOf(i % kTilesPerRound, g + 8 * (c / 2))] = state.out[i][n][c];
      }
    }
  }
}

// The sum over all pipelines of four channels that the round has of a packed row.
template <typename Traits>
__device__ __forceinline__ float4 SumPipelines(const float* merge, int packed_row, int quad) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int s = 0; s < Traits::kPipelines; ++s) {
    const float4 x = *reinterpret_cast<const float4*>(
        merge + (s * Traits::kTileRows + packed_row) * Traits::kMergeStride + 4 * quad);
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  return sum;
}

}  // namespace fastattn::cuda
