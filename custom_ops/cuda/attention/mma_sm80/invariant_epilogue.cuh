// The end of a split: the warp pipelines' results become one, which is added to the total of the
// work tile's splits before it, or left for the merging kernel where those are another CTA's.
#pragma once

#include <cstdint>

#include "cuda/attention/mma_sm80/kv_tile.cuh"
#include "cuda/attention/mma_sm80/launch.h"
#include "cuda/attention/mma_sm80/merge_pipelines.cuh"
#include "cuda/attention/mma_sm80/query.cuh"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/attention/mma_sm80/value_scales.cuh"
#include "cuda/attention/split_kv/shared/epilogue.cuh"
#include "cuda/attention/split_kv/shared/invariant_total.cuh"

namespace fastattn::cuda {

// What a thread holds of a work tile's total: four channels of a packed row, in each round and pass
// of the epilogue. Those of more than 8 packed rows would not fit beside the mainloop's registers
// and lie in the workspace, which the same thread writes and reads.
template <typename Traits>
struct RunningTotal {
  static constexpr int kQuads = Traits::kMergeDims / 4;
  static constexpr int kRounds = Traits::kValueDim / Traits::kMergeDims;
  static constexpr int kAll = Traits::kTileRows * kQuads;  // of all threads, in a round
  static constexpr int kPasses = (kAll + kAttentionThreads - 1) / kAttentionThreads;
  static constexpr bool kInRegisters = Traits::kTileRows == 8;
  static_assert(Traits::kValueDim % Traits::kMergeDims == 0);
  float4 out[kInRegisters ? kRounds : 1][kPasses];
  float2 state[kPasses];  // maximum and sum of the packed row

  // Whether a thread has something in a pass: 96 channels of 8 packed rows do not fill all threads.
  static __device__ __forceinline__ bool Has(int index) {
    return kAll % kAttentionThreads == 0 || index < kAll;
  }
};

// What becomes of a split's result.
struct SplitEnd {
  bool first;    // of its work tile: there is no total before
  bool last;     // of its work tile
  bool adds;     // the CTA has the splits before it
  bool leaves;   // others have the splits behind it: the total goes to memory
  float* total;  // [packed rows, D] and the packed rows' (maximum, sum)
  float* split;  // the same, for a result that is not added here
};

// The maximum and the sum of a packed row over all pipelines.
template <typename Traits>
__device__ __forceinline__ float2 MergeStates(const float2* states, int packed_row) {
  float2 merged = make_float2(-kInfinity, 0.0f);
#pragma unroll
  for (int s = 0; s < Traits::kPipelines; ++s) {
    merged.x = fmaxf(merged.x, states[s * Traits::kTileRows + packed_row].x);
  }
#pragma unroll
  for (int s = 0; s < Traits::kPipelines; ++s) {
    const float2 of = states[s * Traits::kTileRows + packed_row];
    merged.y = Add(merged.y, Mul(of.y, WeightOf(of.x, merged.x)));
  }
  return merged;
}

// Adds the split's maximum and sum. Returns the weights of the values.
template <typename Traits>
__device__ __forceinline__ FoldWeights EndState(const SplitEnd& end, const float2* states,
                                                int packed_row, bool writes, float2* total) {
  const float2 split = MergeStates<Traits>(states, packed_row);
  FoldWeights weights = {0.0f, 1.0f};
  if (!end.adds) {
    if (writes) {
      reinterpret_cast<float2*>(end.split + Traits::kTileRows * Traits::kValueDim)[packed_row] =
          split;
    }
    return weights;
  }
  if (end.first) {
    *total = split;
  } else {
    weights = FoldState(total, split);
  }
  if (end.leaves && writes) {
    reinterpret_cast<float2*>(end.total + Traits::kTileRows * Traits::kValueDim)[packed_row] =
        *total;
  }
  return weights;
}

// Ends a split. All threads take part; afterwards shared memory may be overwritten.
template <typename Traits>
__device__ __forceinline__ void FinishSplit(const AttentionParams& p, const AttentionTask& task,
                                            const Segment& segment, const SplitEnd& end,
                                            int pipeline, int warp_row, char* shared,
                                            TileState<Traits>* state, RunningTotal<Traits>* total) {
  using Total = RunningTotal<Traits>;
  constexpr int kRounds = Total::kRounds, kPasses = Total::kPasses, kQuads = Total::kQuads;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float2* states = reinterpret_cast<float2*>(shared + Traits::kStateOffset);
  const PackedRowInfo* infos =
      reinterpret_cast<const PackedRowInfo*>(shared + Traits::kRowInfoOffset);
  float* merge = reinterpret_cast<float*>(shared + Traits::kMergeOffset);
  if constexpr (Traits::kPerTokenScales) {
    if (state->scale_exponent == kRowExponents) DropRowExponents<Traits>(state);
  }
  WriteStates<Traits>(*state, pipeline, warp_row, threadIdx.x % 32 < 4, t, states);
  __syncthreads();
  Equalize<Traits>(states, warp_row, t, state);
  FoldWeights weights[kPasses];
  float factor[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int index = pass * kAttentionThreads + static_cast<int>(threadIdx.x);
    if (!Total::Has(index)) continue;
    const int packed_row = index / kQuads;
    const bool writes = index % kQuads == 0;
    weights[pass] = EndState<Traits>(end, states, packed_row, writes, &total->state[pass]);
    factor[pass] = 0.0f;
    if (end.adds && end.last && infos[packed_row].out >= 0) {
      const PackedRow info = PackedRowOf(task, segment.shape, segment.head,
                                         segment.tile * Traits::kTileRows + packed_row);
      const float2 sums = total->state[pass];
      factor[pass] =
          FinishPackedRow(p, info, infos[packed_row].value_scale, sums.x, sums.y, writes);
    }
  }
  const auto round_of = [&](int round, float4(&out)[kPasses]) {
    StoreRound<Traits>(*state, round, pipeline, warp_row, g, t, merge);
    __syncthreads();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int index = pass * kAttentionThreads + static_cast<int>(threadIdx.x);
      if (!Total::Has(index)) continue;
      const int packed_row = index / kQuads, quad = index % kQuads;
      const int channel = round * Traits::kMergeDims + 4 * quad;
      const int64_t at = packed_row * Traits::kValueDim + channel;
      float4 before = out[pass];
      if constexpr (!Total::kInRegisters) {
        if (end.adds && !end.first) before = *reinterpret_cast<const float4*>(end.total + at);
      }
      const float4 split = SumPipelines<Traits>(merge, packed_row, quad);
      if (!end.adds) {
        *reinterpret_cast<float4*>(end.split + at) = split;
        continue;
      }
      out[pass] = end.first ? split : FoldValues(before, split, weights[pass]);
      if (end.last) {
        if (infos[packed_row].out >= 0) {
          StoreOutput(p, segment.head, infos[packed_row].out, channel, out[pass], factor[pass]);
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
