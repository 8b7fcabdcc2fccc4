// The attention kernel of every call that no wgmma_sm90 kernel takes: mma.sync, from sm_80 on.
//
// Work tile: kTileRows = 8, 16 or 64 packed rows, query tokens times query heads of one KV
// head, over all keys that they see. Whole: a CTA takes it alone. Split: the keys of all work tiles
// lie on one axis of costs, of which every CTA takes an equal share (schedule.cuh); what it has of
// one is a Segment. A work tile that lies in several CTAs leaves partial results: merge_partials.cu
// or the last of those CTAs (merge_splits.cuh) merges them, in small calls a cluster's CTAs at once
// (merge_cluster.cuh).
//
// Warps: 4, without roles. They form warp pipelines of one or two warps (traits.cuh): each takes
// every kPipelines-th KV tile of 64 (or 32) keys, copies it ahead with cp.async, and has a maximum,
// sums and an output of its own, merged in the epilogue. One-warp pipelines synchronise with nobody
// inside a segment; two-warp ones meet at __syncthreads in every iteration, as they share their
// stages.
//
// Shared memory (offsets in traits.cuh): the stages of all pipelines; queries as fragments, in the
// same place as the merge of outputs; maxima and sums; PackedRowInfo; segments; the schedule.
//
// Numerics: K and V become 16-bit operands (exactly, for codes); queries over codes are fp16 times
// a power of two. Scores, sums and outputs are fp32; P is 2^15 times its value in 16 bits. Scales
// of Q and K are one factor of a packed row; per-token K scales multiply scores, per-token V scales
// multiply P relative to a power of two (value_scales.cuh); per-channel V scales belong to the
// epilogue. NaN scrubbing: where keys are masked, V is scrubbed in shared memory and NaNs are given
// to the packed rows that see them (kv_tile.cuh).
//
// Reading order: docs/kernels/mma_sm80.md.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/attention/mma_sm80/kv_loader.cuh"
#include "cuda/attention/mma_sm80/kv_tile.cuh"
#include "cuda/attention/mma_sm80/launch.h"
#include "cuda/attention/mma_sm80/merge_pipelines.cuh"
#include "cuda/attention/mma_sm80/mx_scales.cuh"
#include "cuda/attention/mma_sm80/nibbles.cuh"
#include "cuda/attention/mma_sm80/query.cuh"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/attention/mma_sm80/value_scales.cuh"
#include "cuda/attention/shared/clear_padding.cuh"
#include "cuda/attention/split_kv/shared/epilogue.cuh"
#include "cuda/attention/split_kv/shared/merge_cluster.cuh"
#include "cuda/attention/split_kv/shared/merge_splits.cuh"
#include "cuda/attention/split_kv/shared/schedule.cuh"
#include "cuda/common/exp2.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda {

template <typename Traits>
__device__ __forceinline__ KvTileMask MaskOf(const Segment& segment, int kv_tile,
                                             uint32_t row_infos) {
  KvTileMask mask;
  mask.first_key = kv_tile * Traits::kKvTile;
  mask.needs_mask = mask.first_key < segment.seen_by_all.begin ||
                    mask.first_key + Traits::kKvTile > segment.seen_by_all.end;
  mask.packed_rows_differ = segment.packed_rows_differ;
  mask.begin = segment.seen_by_any.begin - mask.first_key;
  mask.end = segment.seen_by_any.end - mask.first_key;
  mask.row_infos = row_infos;
  return mask;
}

// Packs the scores of kGroup key tiles, probabilities by now, as B operands of V^T P^T.
template <typename Traits>
__device__ __forceinline__ void PackProbabilities(
    const float (&scores)[Traits::kGroup][Traits::kTiles][4],
    uint32_t (&probabilities)[Traits::kGroup][Traits::kTiles][2]) {
#pragma unroll
  for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        probabilities[m][n][half] = TransposeMatrix(
            PackPair<Traits::Format::kOperand>(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      }
    }
  }
}

// Starts the load of a KV tile's kIndex-th stage: those of K come before those of V.
template <typename Traits, int kIndex>
__device__ __forceinline__ void StartLoad(KvLoader<Traits>* cursor, StageRing<Traits>* ring) {
  if constexpr (kIndex < Traits::kKeyStages) {
    cursor->template LoadKeys<kIndex>(ring->NextLoad());
  } else {
    cursor->template LoadValues<kIndex - Traits::kKeyStages>(ring->NextLoad());
  }
}

// f(0), .., f(kCount - 1) with compile-time integers.
template <int kCount, int kFirst = 0, typename F>
__device__ __forceinline__ void ForStages(F&& f) {
  if constexpr (kFirst < kCount) {
    f(std::integral_constant<int, kFirst>{});
    ForStages<kCount, kFirst + 1>(f);
  }
}

// The first loads of a CTA's work.
template <typename Traits>
__device__ __forceinline__ void StartLoads(KvLoader<Traits>* cursor, StageRing<Traits>* ring) {
  if constexpr (Traits::kLarge) {
    ForStages<Traits::kStages - 1>(
        [&](auto i) { StartLoad<Traits, decltype(i)::value % Traits::kTileStages>(cursor, ring); });
  } else {
#pragma unroll 1
    for (int i = 0; i < (Traits::kPairsKv ? 1 : (Traits::kStages - 1) / 2); ++i) {
      cursor->LoadKeys(ring->NextLoad());
      cursor->LoadValues(ring->NextLoad());
    }
    if constexpr (!Traits::kPairsKv && Traits::kStages % 2 == 0) cursor->LoadKeys(ring->NextLoad());
  }
}

// Waits for the threads that share a warp pipeline.
template <typename Traits>
__device__ __forceinline__ void SyncPipeline() {
  if constexpr (Traits::kPipelineWarps == 1) {
    __syncwarp();
  } else if constexpr (Traits::kPipelines == 1) {
    __syncthreads();
  } else {
    // Barrier 0 is __syncthreads.
    const int barrier = 1 + static_cast<int>(threadIdx.x) / Traits::kPipelineThreads;
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(Traits::kPipelineThreads) : "memory");
  }
}

template <typename Traits>
using Scores = float[Traits::kGroup][Traits::kTiles][4];

template <typename Traits>
__device__ __forceinline__ void StartScores(const QueryTile<Traits>& query,
                                            Scores<Traits>& scores) {
#pragma unroll
  for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[m][n][c] = query.Start(n, c);
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void Score(const AttentionParams& p, uint32_t stage,
                                      const KvTileMask& mask, const QueryTile<Traits>& query,
                                      const float (&factors)[Traits::kTiles][2], int first,
                                      Scores<Traits>& scores) {
  StartScores<Traits>(query, scores);
  MultiplyKeys<Traits>(stage, query, first, scores);
  FinishScores<Traits>(p, stage, mask, factors, first, scores);
}

template <typename Traits>
using Probabilities = uint32_t[Traits::kGroup][Traits::kTiles][2];

// From scores to probabilities; `stage` has V's per-token scales.
template <typename Traits>
__device__ __forceinline__ void Weigh(const AttentionParams& p, uint32_t stage,
                                      const KvTileMask& mask, int first, Scores<Traits>& scores,
                                      Probabilities<Traits>& probabilities,
                                      TileState<Traits>* state) {
  float value_scales[Traits::kGroup][2];
  if constexpr (Traits::kScalesAtOnce) {  // ahead of what takes time
    LoadTokenScales<Traits>(stage, first, TokenScaleType<Traits>(p), value_scales);
  }
  RaiseMaximum<Traits>(scores, state);
  Exponentiate<Traits>(scores, state);
  if constexpr (Traits::kPerTokenScales) {
    ApplyValueScales<Traits>(p, stage, mask, first, value_scales, scores, state);
  }
  PackProbabilities<Traits>(scores, probabilities);
}

template <typename Traits>
__device__ __forceinline__ void Attend(const AttentionParams& p, uint32_t stage,
                                       const KvTileMask& mask, int first, Scores<Traits>& scores,
                                       TileState<Traits>* state) {
  Probabilities<Traits> probabilities;
  Weigh<Traits>(p, stage, mask, first, scores, probabilities, state);
  if constexpr (Traits::kValueNibbles) {
    AccumulateNibbles<Traits>(stage, first, probabilities, state->out);
  } else {
    Accumulate<Traits>(stage, first, probabilities, state);
  }
}

// A KV tile whose K and V lie in several stages.
template <typename Traits>
__device__ __forceinline__ void RunStages(const AttentionParams& p, const KvTileMask& mask,
                                          const QueryTile<Traits>& query,
                                          const float (&factors)[Traits::kTiles][2],
                                          KvLoader<Traits>* cursor, StageRing<Traits>* ring,
                                          TileState<Traits>* state) {
  static_assert(Traits::kGroup == Traits::kKeyTiles, "a stage is used once");
  // The next stage, once the load that lies kStages - 1 ahead of it has been started.
  const auto next = [&](auto index) {
    WaitForCopies<Traits::kStages - 2>();
    SyncPipeline<Traits>();
    constexpr int kAhead = decltype(index)::value + Traits::kStages - 1;
    StartLoad<Traits, kAhead % Traits::kTileStages>(cursor, ring);
    return ring->NextUse();
  };
  Scores<Traits> scores;
  StartScores<Traits>(query, scores);
  bool assigned = false;
  ForStages<Traits::kKeyStages>([&](auto index) {
    constexpr int kStage = decltype(index)::value;
    const uint32_t stage = next(index);
    if constexpr (kStage == 0) assigned = cursor->UsesAssigned();
    if (!assigned) return;
    MultiplyKeys<Traits, kStage>(stage, query, 0, scores);
    if constexpr (kStage + 1 == Traits::kKeyStages) {
      FinishScores<Traits>(p, stage, mask, factors, 0, scores);
    }
  });
  Probabilities<Traits> probabilities;
  ForStages<Traits::kValueStages>([&](auto index) {
    constexpr int kStage = decltype(index)::value;
    const uint32_t stage =
        next(std::integral_constant<int, Traits::kKeyStages + decltype(index)::value>{});
    if (!assigned) return;
    if constexpr (Traits::kValueNibbles) {
      // Nothing to scrub, as below.
    } else if (mask.needs_mask) {
      PropagateNonFinite<Traits, kStage>(stage, mask, state);
      SyncPipeline<Traits>();
      ScrubValues<Traits>(stage, mask);
      SyncPipeline<Traits>();
    }
    if constexpr (Traits::kBlockScales) {
      PrepareValueScales<Traits>(stage, SyncPipeline<Traits>);
      SyncPipeline<Traits>();
    }
    if constexpr (kStage == 0) {
      Weigh<Traits>(p, stage, mask, 0, scores, probabilities, state);
    }
    if constexpr (Traits::kValueNibbles) {
      AccumulateNibbles<Traits>(stage, 0, probabilities, state->out);
    } else {
      Accumulate<Traits, kStage>(stage, 0, probabilities, state);
    }
  });
}

// KV tiles of a warp pipeline's chain, and the number of those of the longest chain beside it.
struct KvTiles {
  int begin = 0, end = 0, longest = 0;
};

// The mainloop: the warp pipeline's KV tiles of a segment, or those of a chain.
template <typename Traits>
__device__ __forceinline__ void RunMainloop(const AttentionParams& p, const Segment& segment,
                                            int pipeline, const QueryTile<Traits>& query,
                                            const float (&factors)[Traits::kTiles][2],
                                            uint32_t row_infos, KvLoader<Traits>* cursor,
                                            StageRing<Traits>* ring, TileState<Traits>* state,
                                            const KvTiles& chain = {}) {
  constexpr bool kChained = Traits::kChained;
  constexpr int kStep = kChained ? 1 : Traits::kPipelines;
  const int kv_tile_begin = kChained ? chain.begin : segment.kv_tile_begin + pipeline;
  const int kv_tile_end = kChained ? chain.end : segment.kv_tile_end;
  if constexpr (Traits::kPairsKv) {
    const int iterations =
        kChained
            ? chain.longest
            : (kv_tile_end - segment.kv_tile_begin + Traits::kPipelines - 1) / Traits::kPipelines;
#pragma unroll 1
    for (int iteration = 0; iteration < iterations; ++iteration) {
      const int kv_tile = kv_tile_begin + iteration * kStep;
      const KvTileMask mask = MaskOf<Traits>(segment, kv_tile, row_infos);
      WaitForCopies<0>();
      __syncthreads();
      uint32_t key_stage = 0, value_stage = 0;
      bool present = kv_tile < kv_tile_end;
      if (present) {
        cursor->LoadKeys(ring->NextLoad());
        cursor->LoadValues(ring->NextLoad());
        key_stage = ring->NextUse(), value_stage = ring->NextUse();
        present = cursor->UsesAssigned();
      }
      if constexpr (Traits::kValueNibbles) {
        // They are finite whatever their bits are, and probabilities of masked keys are 0.
      } else if (__syncthreads_or(present && mask.needs_mask)) {
        if (present && mask.needs_mask) PropagateNonFinite<Traits>(value_stage, mask, state);
        __syncthreads();
        if (present && mask.needs_mask) ScrubValues<Traits>(value_stage, mask);
        __syncthreads();
      }
      if constexpr (Traits::kBlockScales) {
        if (present) PrepareValueScales<Traits>(value_stage, [] {});
        __syncthreads();
      }
      if (!present) continue;
#pragma unroll 1
      for (int first = 0; first < Traits::kKeyTiles; first += Traits::kGroup) {
        Scores<Traits> scores;
        Score<Traits>(p, key_stage, mask, query, factors, first, scores);
        Attend<Traits>(p, value_stage, mask, first, scores, state);
      }
    }
  } else if constexpr (Traits::kLarge) {
#pragma unroll 1
    for (int kv_tile = kv_tile_begin; kv_tile < kv_tile_end; kv_tile += kStep) {
      const KvTileMask mask = MaskOf<Traits>(segment, kv_tile, row_infos);
      RunStages<Traits>(p, mask, query, factors, cursor, ring, state);
    }
  } else {
#pragma unroll 1
    for (int kv_tile = kv_tile_begin; kv_tile < kv_tile_end; kv_tile += kStep) {
      const KvTileMask mask = MaskOf<Traits>(segment, kv_tile, row_infos);
      constexpr int kGroups = Traits::kKeyTiles / Traits::kGroup;
      Scores<Traits> scores[kGroups];
      // The newest kStages - 2 loads may still be under way.
      WaitForCopies<Traits::kStages - 2>();
      __syncwarp();
      StartLoad<Traits, (Traits::kStages + 1) % 2>(cursor, ring);
      const uint32_t key_stage = ring->NextUse();
      const bool assigned = cursor->UsesAssigned();
      if (assigned) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          Score<Traits>(p, key_stage, mask, query, factors, i * Traits::kGroup, scores[i]);
        }
      }
      WaitForCopies<Traits::kStages - 2>();
      __syncwarp();
      StartLoad<Traits, Traits::kStages % 2>(cursor, ring);
      const uint32_t value_stage = ring->NextUse();
      if (!assigned) continue;
      PrepareForWarp<Traits>(value_stage);
      if constexpr (Traits::kValueNibbles) {
        // Nothing to scrub, as above.
      } else if (mask.needs_mask) {
        PropagateNonFinite<Traits>(value_stage, mask, state);
        __syncwarp();
        ScrubValues<Traits>(value_stage, mask);
        __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        Attend<Traits>(p, value_stage, mask, i * Traits::kGroup, scores[i], state);
      }
    }
  }
  if constexpr (Traits::kValueBiased) DropBias<Traits>(state->out);
}

// The epilogue: merges the warp pipelines and writes the work tile's output, or this CTA's partial
// result.
template <typename Traits>
__device__ __forceinline__ void WriteEpilogue(const AttentionParams& p, const AttentionTask& task,
                                              const Segment& segment, bool clustered, int pipeline,
                                              int warp_row, char* shared,
                                              TileState<Traits>* state) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float2* states = reinterpret_cast<float2*>(shared + Traits::kStateOffset);
  PackedRowInfo* infos = reinterpret_cast<PackedRowInfo*>(shared + Traits::kRowInfoOffset);
  float* merge = reinterpret_cast<float*>(shared + Traits::kMergeOffset);
  if constexpr (Traits::kPerTokenScales) {
    if (state->scale_exponent == kRowExponents) DropRowExponents<Traits>(state);
  }
  WriteStates<Traits>(*state, pipeline, warp_row, g == 0, t, states);
  __syncthreads();
  // Pipelines that saw nothing have -inf for a maximum and 0 for a sum. A NaN stays.
  Equalize<Traits>(states, warp_row, t, state);
  float* partial = nullptr;
  if (clustered) {
    partial =
        reinterpret_cast<float*>(shared);  // nothing is left in the stages, or under way to them
  } else if (!segment.Whole()) {
    partial =
        PartialOf(task, Traits::kTileRows, Traits::kValueDim, blockIdx.x, segment.begins_work_tile);
  }
  if (threadIdx.x < Traits::kTileRows) {
    const int packed_row = threadIdx.x;
    float maximum = -kInfinity, sum = 0.0f;
#pragma unroll
    for (int s = 0; s < Traits::kPipelines; ++s) {
      maximum = fmaxf(maximum, states[s * Traits::kTileRows + packed_row].x);
    }
#pragma unroll
    for (int s = 0; s < Traits::kPipelines; ++s) {
      const float2 state_of = states[s * Traits::kTileRows + packed_row];
      sum += state_of.y * WeightOf(state_of.x, maximum);
    }
    if (partial != nullptr) {
      reinterpret_cast<float2*>(partial + Traits::kTileRows * Traits::kValueDim)[packed_row] =
          make_float2(maximum, sum);
    } else if (infos[packed_row].out >= 0) {
      const PackedRow info = PackedRowOf(task, segment.shape, segment.head,
                                         segment.tile * Traits::kTileRows + packed_row);
      infos[packed_row].out_factor =
          FinishPackedRow(p, info, infos[packed_row].value_scale, maximum, sum);
    }
  }
  constexpr int kQuads = Traits::kMergeDims / 4;
#pragma unroll 1
  for (int round = 0; round < Traits::kValueDim / Traits::kMergeDims; ++round) {
    StoreRound<Traits>(*state, round, pipeline, warp_row, g, t, merge);
    __syncthreads();
#pragma unroll 1
    for (int index = threadIdx.x; index < Traits::kTileRows * kQuads; index += Traits::kThreads) {
      const int packed_row = index / kQuads, quad = index % kQuads;
      const float4 sum = SumPipelines<Traits>(merge, packed_row, quad);
      const int channel = round * Traits::kMergeDims + 4 * quad;
      if (partial != nullptr) {
        *reinterpret_cast<float4*>(partial + packed_row * Traits::kValueDim + channel) = sum;
      } else if (infos[packed_row].out >= 0) {
        StoreOutput(p, segment.head, infos[packed_row].out, channel, sum,
                    infos[packed_row].out_factor);
      }
    }
    __syncthreads();
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    AttentionKernel(const __grid_constant__ AttentionParams p,
                    const __grid_constant__ AttentionTask task) {
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32;
  const int pipeline = warp / Traits::kPipelineWarps;
  const int warp_row = warp % Traits::kPipelineWarps * Traits::kTiles * 8;
  NameParameters(p);
  NameParameters(task);
  if (task.overlaps_previous) {
    PdlBeginConcurrent();
  } else {
    PdlWait();
  }
  bool clustered = Traits::kClusters && task.cluster > 1;
  uint32_t* working = nullptr;
  if (clustered && task.finds_seqs) {
    working = reinterpret_cast<uint32_t*>(shared + Traits::kScheduleOffset);
    clustered =
        ClustersTakeCall<Traits::kThreads>(p, task, Traits::kTileRows, Traits::kKvTile, working);
    if (p.seqs.num_tokens >= task.num_seqs) working = nullptr;
  }
  Segment* segments = reinterpret_cast<Segment*>(shared + Traits::kSegmentOffset);
  static_assert(Traits::kSegmentBytes == sizeof(Segment) * Traits::kMaxSegments);
  const Schedule schedule =
      clustered
          ? MakeClusterSchedule<Traits::kTileRows, Traits::kKvTile>(p, task, working, segments)
          : MakeSchedule<Traits::kTileRows, Traits::kKvTile, Traits::kThreads>(
                p, task, reinterpret_cast<uint2*>(shared + Traits::kScheduleOffset),
                reinterpret_cast<uint2*>(shared + Traits::kScanOffset));
  clustered = Traits::kClusters && schedule.InCluster();  // takes no register of its own
  // Only the first warp needs it again, seldom: it takes no registers, either.
  Schedule* const share = reinterpret_cast<Schedule*>(shared + Traits::kShareOffset);
  static_assert(sizeof(Schedule) <= Traits::kShareBytes && Traits::kMaxSegments <= 32);
  if (threadIdx.x == 0) *share = schedule;
  __syncwarp();
  // A cluster merges what its CTAs have of a work tile before it goes on to the next one.
  const uint32_t most = clustered ? 1 : Traits::kMaxSegments;
  for (uint32_t done = 0; done < schedule.num_work_tiles; done += most) {
    const int count = static_cast<int>(min(schedule.num_work_tiles - done, most));
    if (threadIdx.x < count) {
      if (clustered) {
        SetClusterSegment<Traits::kTileRows, Traits::kKvTile, Traits::kGeneral>(p, task, done,
                                                                                segments);
      } else {
        segments[threadIdx.x] = MakeSegment<Traits::kTileRows, Traits::kKvTile, Traits::kGeneral>(
            p, task, *share, share->first_work_tile + done + threadIdx.x);
      }
    }
    __syncthreads();
    QueryLoads<Traits> loads;
    if (clustered) loads.Start(p, task, segments[0]);
    KvLoader<Traits> cursor(p, segments, count, pipeline, task.keys_read_once);
    StageRing<Traits> ring{SharedAddress(shared) +
                           pipeline * Traits::kStages * Traits::kStageBytes};
    StartLoads<Traits>(&cursor, &ring);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const Segment& segment = segments[i];
      if (!clustered) loads.Start(p, task, segment);
      StoreQueries<Traits>(p, task, segment, &loads, shared);
      __syncthreads();
      QueryTile<Traits> query;
      query.shared = SharedAddress(shared) + Traits::kQueryOffset + warp_row * Traits::kKeyDim * 2 +
                     threadIdx.x % 32 * 8;
      query.Fetch();
      const int first_row = warp_row + 2 * (threadIdx.x % 4);
      const PackedRowInfo* infos =
          reinterpret_cast<const PackedRowInfo*>(shared + Traits::kRowInfoOffset) + first_row;
      float factors[Traits::kTiles][2];
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
        factors[n][0] = infos[8 * n].score_factor * infos[8 * n].query_factor;
        factors[n][1] = infos[8 * n + 1].score_factor * infos[8 * n + 1].query_factor;
      }
      TileState<Traits> state;
      state.Reset();
      RunMainloop<Traits>(p, segment, pipeline, query, factors, SharedAddress(infos), &cursor,
                          &ring, &state);
      if (done + i + 1 == schedule.num_work_tiles) PdlLaunchDependents();
      WriteEpilogue<Traits>(p, task, segment, clustered, pipeline, warp_row, shared, &state);
      if constexpr (Traits::kClusters) {
        // Only the first and the last work tile of a CTA may lie in others, too. The segments of
        // the rest are not looked at: a faster warp may have begun to write the next ones.
        const bool at_edge = done + i == 0 || done + i + 1 == schedule.num_work_tiles;
        if (task.arrivals != nullptr && at_edge && segment.num_splits > 0) {
          MergeSplits<Traits>(p, task, segment, shared);
        }
      }
    }
    WaitForCopies<0>();
    if constexpr (Traits::kClusters) {
      if (clustered) MergeCluster<Traits>(p, task, segments[0], shared);
    }
  }
  if (task.split && task.arrivals == nullptr && !clustered && threadIdx.x == 0 &&
      blockIdx.x < task.shares) {
    int4 header = make_int4(0, 0, 0, 0);
    if (schedule.num_work_tiles > 0) {
      // The work tile that goes on in other CTAs is the last one.
      const Segment& last = segments[(schedule.num_work_tiles - 1) % Traits::kMaxSegments];
      if (last.begins_work_tile && last.num_splits > 0) {
        header = make_int4(last.num_splits, last.batch_idx, last.head, last.tile);
      }
    }
    reinterpret_cast<int4*>(task.headers)[static_cast<int64_t>(blockIdx.x) * kPartialHeader / 4] =
        header;
  }
  if (task.clear_padding) ClearPadding<Traits::kOwnValueDim>(p, task.first_seq, task.num_seqs);
  if (task.overlaps_previous) PdlEndConcurrent();
}

// Stages of the kernel on a device whose CTAs have up to `bytes` of shared memory.
template <typename Traits, typename Kernel>
cudaError_t FindStages(Kernel kernel, int bytes, int* stages) {
  static_assert(Traits::SharedBytes(kMaxPlanSeqs, Traits::kFewStages) <= 99 * 1024);
  *stages = Traits::kStages;
  if (bytes > 128 * 1024) return cudaSuccess;
  // On a small GPU the code says how many stages it was compiled with.
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  if (HasFewStages(attributes.ptxVersion)) *stages = Traits::kFewStages;
  const bool fits = bytes >= Traits::SharedBytes(kMaxPlanSeqs, *stages);
  return fits ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

// Finds the kernel's stages on the current device and lets its CTAs have the shared memory of any
// number of sequences. The kernel is a template argument because its attributes are set once, for
// each of them.
template <auto kKernel, typename Traits>
cudaError_t PrepareLaunch(int* stages) {
  int device = 0;
  DeviceFacts facts;
  cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status == cudaSuccess) status = FindStages<Traits>(kKernel, facts.max_shared_bytes, stages);
  if (status != cudaSuccess) return status;
  static OncePerDevice once;
  return once.Run(device, [&] {
    return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                Traits::SharedBytes(kMaxPlanSeqs, *stages));
  });
}

template <typename Traits>
cudaError_t LaunchKernel(const AttentionParams& p, const AttentionTask& task, int grid,
                         cudaStream_t stream) {
  constexpr auto kKernel = AttentionKernel<Traits>;
  int stages = 0;
  const cudaError_t status = PrepareLaunch<kKernel, Traits>(&stages);
  if (status != cudaSuccess) return status;
  return LaunchPdlInClusters(kKernel, dim3(grid), dim3(Traits::kThreads), task.cluster,
                             Traits::SharedBytes(task.num_seqs, stages), stream, p, task);
}

template <DType kElement, DType kValue, int kHeadDim, bool kPaged, Scales kScales, int kTileRows>
cudaError_t LaunchAttentionVariant(const AttentionParams& p, const AttentionTask& task, int grid,
                                   cudaStream_t stream) {
  using Traits =
      AttentionTraits<kElement, kHeadDim, kPaged, kScales, kTileRows, false, false, kValue>;
  if constexpr (Traits::kKeyNibbles && kHeadDim == 128 && kTileRows == 8) {
    using Wide =
        AttentionTraits<kElement, kHeadDim, kPaged, kScales, kTileRows, true, false, kValue>;
    if (task.wide) return LaunchKernel<Wide>(p, task, grid, stream);
  }
  return LaunchKernel<Traits>(p, task, grid, stream);
}

}  // namespace fastattn::cuda
