// The end of a round of chains: their results are added up in their order, to that of the split's
// chains before them. With the split's last round, the split is added to the total of the work
// tile's splits before it, or left for the merging kernel where those are another CTA's.
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
// and lie in the workspace, which the same thread writes and reads. So do the channels of a split
// whose chains take several rounds.
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
  float2 split[kPasses];  // those of the split

  // Whether a thread has something in a pass: 96 channels of 8 packed rows do not fill all threads.
  static __device__ __forceinline__ bool Has(int index) {
    return kAll % kAttentionThreads == 0 || index < kAll;
  }
};

// What becomes of a round's result.
struct RoundEnd {
  bool begins_split;
  bool ends_split;
  bool first;     // split of its work tile: there is no total before
  bool last;      // split of its work tile
  bool adds;      // the CTA has the splits before it
  bool leaves;    // others have the splits after it: the total goes to memory
  float* total;   // [packed rows, D] and the packed rows' (maximum, sum)
  float* split;   // the same, of the split between rounds
  float* result;  // the same, for a split that is not added here
};

// Adds the split's maximum and sum. Returns the weights of the values.
template <typename Traits>
__device__ __forceinline__ FoldWeights EndState(const RoundEnd& end, float2 split, int packed_row,
                                                bool writes, float2* total) {
  FoldWeights weights = {0.0f, 1.0f};
  if (!end.adds) {
    if (writes) {
      reinterpret_cast<float2*>(end.result + Traits::kTileRows * Traits::kValueDim)[packed_row] =
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

// Ends a round. All threads take part; afterwards shared memory may be overwritten.
template <typename Traits>
__device__ __forceinline__ void FinishRound(const AttentionParams& p, const AttentionTask& task,
                                            const Segment& segment, const RoundEnd& end,
                                            int pipeline, int warp_row, char* shared,
                                            TileState<Traits>* state, RunningTotal<Traits>* total) {
  using Total = RunningTotal<Traits>;
  constexpr int kRounds = Total::kRounds, kPasses = Total::kPasses, kQuads = Total::kQuads;
  constexpr int kPipelines = Traits::kPipelines;
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
  DropScaleExponent<Traits>(state);
  FoldWeights chains[kPasses][kPipelines], weights[kPasses];
  float factor[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int index = pass * kAttentionThreads + static_cast<int>(threadIdx.x);
    if (!Total::Has(index)) continue;
    const int packed_row = index / kQuads;
    const bool writes = index % kQuads == 0;
    float2 split = end.begins_split ? make_float2(-kInfinity, 0.0f) : total->split[pass];
#pragma unroll
    for (int s = 0; s < kPipelines; ++s) {
      chains[pass][s] = FoldState(&split, states[s * Traits::kTileRows + packed_row]);
    }
    total->split[pass] = split;
    factor[pass] = 0.0f;
    weights[pass] = {0.0f, 1.0f};
    if (!end.ends_split) continue;
    weights[pass] = EndState<Traits>(end, split, packed_row, writes, &total->state[pass]);
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
      float4 split = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if constexpr (Traits::kRounds > 1) {
        if (!end.begins_split) split = *reinterpret_cast<const float4*>(end.split + at);
      }
#pragma unroll
      for (int s = 0; s < kPipelines; ++s) {
        const float4 chain = *reinterpret_cast<const float4*>(
            merge + (s * Traits::kTileRows + packed_row) * Traits::kMergeStride + 4 * quad);
        split = FoldValues(split, chain, chains[pass][s]);
      }
      if (Traits::kRounds > 1 && !end.ends_split) {
        *reinterpret_cast<float4*>(end.split + at) = split;
        continue;
      }
      if (!end.adds) {
        *reinterpret_cast<float4*>(end.result + at) = split;
        continue;
      }
      float4 before = out[pass];
      if constexpr (!Total::kInRegisters) {
        if (!end.first) before = *reinterpret_cast<const float4*>(end.total + at);
      }
      out[pass] = end.first ? split : FoldValues(before, split, weights[pass]);
      if (end.last) {
        if (infos[packed_row].out >= 0) {
          StoreOutput(p, segment.head, infos[packed_row].out, channel, DoneValues(out[pass]),
                      factor[pass]);
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
