// The end of a split: the warp pipelines' results become one, which is added to the total of the
// work tile's splits before it, or left for the merging kernel where those are another CTA's.
#pragma once

#include <cstdint>

#include "cuda/attention/mma_sm80/epilogue.cuh"
#include "cuda/attention/mma_sm80/invariant_total.cuh"
#include "cuda/attention/mma_sm80/kv_tile.cuh"
#include "cuda/attention/mma_sm80/launch.h"
#include "cuda/attention/mma_sm80/query.cuh"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/attention/mma_sm80/value_scales.cuh"

namespace fastattn::cuda {

// What a thread holds of a work tile's total: four channels of a column, in each round and pass of
// the epilogue. Those of more than 8 columns would not fit beside the mainloop's registers and lie
// in the workspace, which the same thread writes and reads.
template <typename Traits>
struct RunningTotal {
  static constexpr int kQuads = Traits::kMergeDims / 4;
  static constexpr int kRounds = Traits::kHeadDim / Traits::kMergeDims;
  static constexpr int kPasses = Traits::kColumns * kQuads / kAttentionThreads;
  static constexpr bool kInRegisters = Traits::kColumns == 8;
  static_assert(kPasses * kAttentionThreads == Traits::kColumns * kQuads);
  static_assert(Traits::kHeadDim % Traits::kMergeDims == 0);
  float4 out[kInRegisters ? kRounds : 1][kPasses];
  float2 state[kPasses];  // maximum and sum of the column
};

// What becomes of a split's result.
struct SplitEnd {
  bool first;    // of its work tile: there is no total before
  bool last;     // of its work tile
  bool adds;     // the CTA has the splits before it
  bool leaves;   // others have the splits behind it: the total goes to memory
  float* total;  // [columns, D] and the columns' (maximum, sum)
  float* split;  // the same, for a result that is not added here
};

// Writes the maximum and the sum of the warp's columns over its pipeline's keys.
template <typename Traits>
__device__ __forceinline__ void WriteStates(const TileState<Traits>& state, float2* states) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = state.sum[n][c];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      if (lane / 4 == 0) states[8 * n + 2 * (lane % 4) + c] = make_float2(state.maximum[n][c], sum);
    }
  }
}

// The maximum and the sum of a column over all pipelines.
template <typename Traits>
__device__ __forceinline__ float2 JoinStates(const float2* states, int column) {
  float2 joined = make_float2(-kInfinity, 0.0f);
#pragma unroll
  for (int s = 0; s < Traits::kPipelines; ++s) {
    joined.x = fmaxf(joined.x, states[s * Traits::kColumns + column].x);
  }
#pragma unroll
  for (int s = 0; s < Traits::kPipelines; ++s) {
    const float2 of = states[s * Traits::kColumns + column];
    joined.y = Add(joined.y, Mul(of.y, WeightOf(of.x, joined.x)));
  }
  return joined;
}

// Brings the warp's output to the columns' maxima over all pipelines, in units of 1.
template <typename Traits>
__device__ __forceinline__ void Equalize(const float2* states, int warp_column,
                                         TileState<Traits>* state) {
  const int t = threadIdx.x % 4;
  const float scale = Traits::kPerTokenScales
                          ? __uint_as_float(static_cast<uint32_t>(state->scale_exponent) << 23)
                          : 1.0f;
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = warp_column + 8 * n + 2 * t + c;
      float maximum = -kInfinity;
#pragma unroll
      for (int s = 0; s < Traits::kPipelines; ++s) {
        maximum = fmaxf(maximum, states[s * Traits::kColumns + column].x);
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

// Adds the split's maximum and sum. Returns the weights of the values.
template <typename Traits>
__device__ __forceinline__ FoldWeights EndState(const SplitEnd& end, const float2* states,
                                                int column, bool writes, float2* total) {
  const float2 split = JoinStates<Traits>(states, column);
  FoldWeights weights = {0.0f, 1.0f};
  if (!end.adds) {
    if (writes) {
      reinterpret_cast<float2*>(end.split + Traits::kColumns * Traits::kHeadDim)[column] = split;
    }
    return weights;
  }
  if (end.first) {
    *total = split;
  } else {
    weights = FoldState(total, split);
  }
  if (end.leaves && writes) {
    reinterpret_cast<float2*>(end.total + Traits::kColumns * Traits::kHeadDim)[column] = *total;
  }
  return weights;
}

// Ends a split. All threads take part; afterwards shared memory may be overwritten.
template <typename Traits>
__device__ __forceinline__ void FinishSplit(const AttentionParams& p, const AttentionTask& task,
                                            const Segment& segment, const SplitEnd& end,
                                            int pipeline, int warp_column, char* shared,
                                            TileState<Traits>* state, RunningTotal<Traits>* total) {
  using Total = RunningTotal<Traits>;
  constexpr int kRounds = Total::kRounds, kPasses = Total::kPasses, kQuads = Total::kQuads;
  constexpr int kTilesPerRound = Traits::kMergeDims / 16;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float2* states = reinterpret_cast<float2*>(shared + Traits::kStateOffset);
  const ColumnInfo* infos = reinterpret_cast<const ColumnInfo*>(shared + Traits::kColumnOffset);
  float* merge = reinterpret_cast<float*>(shared + Traits::kMergeOffset);
  if constexpr (Traits::kPerTokenScales) {
    if (state->scale_exponent == kColumnExponents) DropColumnExponents<Traits>(state);
  }
  WriteStates<Traits>(*state, states + pipeline * Traits::kColumns + warp_column);
  __syncthreads();
  Equalize<Traits>(states, warp_column, state);
  FoldWeights weights[kPasses];
  float factor[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int index = pass * kAttentionThreads + static_cast<int>(threadIdx.x);
    const int column = index / kQuads;
    const bool writes = index % kQuads == 0;
    weights[pass] = EndState<Traits>(end, states, column, writes, &total->state[pass]);
    factor[pass] = 0.0f;
    if (end.adds && end.last && infos[column].out >= 0) {
      const Column info =
          ColumnOf(task, segment.shape, segment.head, segment.tile * Traits::kColumns + column);
      const float2 sums = total->state[pass];
      factor[pass] = FinishColumn(p, info, infos[column].value_scale, sums.x, sums.y, writes);
    }
  }
  const auto round_of = [&](int round, float4(&out)[kPasses]) {
  // Registers take no index that varies, so every round passes by all of them.
#pragma unroll
    for (int i = 0; i < Traits::kDimTiles; ++i) {
      if (i / kTilesPerRound != round) continue;
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int column = warp_column + 8 * n + 2 * t + c % 2;
          merge[(pipeline * Traits::kColumns + column) * Traits::kMergeStride +
                Traits::ChannelOf(i % kTilesPerRound, g + 8 * (c / 2))] = state->out[i][n][c];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int index = pass * kAttentionThreads + static_cast<int>(threadIdx.x);
      const int column = index / kQuads, quad = index % kQuads;
      const int channel = round * Traits::kMergeDims + 4 * quad;
      const int64_t at = column * Traits::kHeadDim + channel;
      float4 before = out[pass];
      if constexpr (!Total::kInRegisters) {
        if (end.adds && !end.first) before = *reinterpret_cast<const float4*>(end.total + at);
      }
      float4 split = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int s = 0; s < Traits::kPipelines; ++s) {
        const float4 x = *reinterpret_cast<const float4*>(
            merge + (s * Traits::kColumns + column) * Traits::kMergeStride + 4 * quad);
        split.x += x.x, split.y += x.y, split.z += x.z, split.w += x.w;
      }
      if (!end.adds) {
        *reinterpret_cast<float4*>(end.split + at) = split;
        continue;
      }
      out[pass] = end.first ? split : FoldValues(before, split, weights[pass]);
      if (end.last) {
        if (infos[column].out >= 0) {
          StoreOutput(p, segment.head, infos[column].out, channel, out[pass], factor[pass]);
        }
      } else if (end.leaves || !Total::kInRegisters) {
        *reinterpret_cast<float4*>(end.total + at) = out[pass];
      }
    }
    __syncthreads();
  };
  if constexpr (Total::kInRegisters) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) round_of(round, total->out[round]);
  } else {
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) round_of(round, total->out[0]);
  }
}

}  // namespace fastattn::cuda
