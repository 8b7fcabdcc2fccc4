// The attention kernel whose bits follow from the keys that a query sees: mma_sm80's mainloop over
// chains of keys, which lie at fixed positions (plan/invariant_plan.h).
//
// A CTA takes neighbouring splits of any work tiles, and its warp pipelines the chains of a split,
// all at once or in rounds. Where a round ends, the chains' results are added up in their order,
// and where a split ends, so are the splits' (invariant_total.cuh). The CTA that has a work tile's
// first split adds those that follow in the same CTA, and writes the output if it has all of them.
// Else it leaves the total, other CTAs the results of single splits, and merge_invariant.cu goes on
// with the sum. With many work tiles of 64 packed rows each is one CTA's.
//
// The same for work tiles of any size: a chain raises its maximum by the same keys at a time
// (Traits::kGroup), every product and sum is rounded by itself (kv_tile.cuh), and a key that a
// query does not see adds 0.
//
// Reading order: kernel.cuh, invariant_{schedule,total,epilogue}.cuh, this file,
// merge_invariant.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attention/mma_sm80/invariant_epilogue.cuh"
#include "cuda/attention/mma_sm80/kernel.cuh"
#include "cuda/attention/mma_sm80/launch.h"
#include "cuda/attention/split_kv/shared/invariant_schedule.cuh"

namespace fastattn::cuda {

// Totals and splits of the CTAs come first, then the results of single splits.
template <typename Traits>
__device__ __forceinline__ float* InvariantPartial(const InvariantTask& task, int64_t place) {
  return task.work.partials + place * Traits::kTileRows * (Traits::kValueDim + 2);
}

// Tells the merging kernel what the CTA left. `unfinished`: its last segment, if that is the
// beginning of a work tile that goes on in other CTAs.
__device__ __forceinline__ void WriteInvariantHeader(const InvariantTask& task,
                                                     const Segment* unfinished, int results) {
  int4* header = reinterpret_cast<int4*>(task.work.headers) +
                 static_cast<int64_t>(blockIdx.x) * kPartialHeader / 4;
  header[0] = unfinished == nullptr ? make_int4(0, 0, 0, 0)
                                    : make_int4(unfinished->num_splits, unfinished->batch_idx,
                                                unfinished->head, unfinished->tile);
  header[1] = make_int4(results, 0, 0, 0);
}

// The pipeline's chain in a round of a split, and how long the longest one of the round is.
template <typename Traits>
__device__ __forceinline__ KvTiles TilesOfRound(const Segment& segment,
                                                const KeySplits<Traits::kKvTile>& splits, int split,
                                                int round, int pipeline) {
  KvTiles tiles;
  const KeyRange<int> own = ChainIn<Traits>(segment, splits, split, round, pipeline);
  tiles.begin = own.begin, tiles.end = own.end;
#pragma unroll
  for (int i = 0; i < Traits::kPipelines; ++i) {
    const KeyRange<int> chain = ChainIn<Traits>(segment, splits, split, round, i);
    tiles.longest = max(tiles.longest, chain.end - chain.begin);
  }
  return tiles;
}

template <typename Traits>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionCtasPerSm)
    InvariantKernel(const __grid_constant__ AttentionParams p,
                    const __grid_constant__ InvariantTask task) {
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32;
  const int pipeline = warp / Traits::kPipelineWarps;
  const int warp_row = warp % Traits::kPipelineWarps * Traits::kTiles * 8;
  NameParameters(p);
  NameParameters(task);
  if (task.work.overlaps_previous) {
    PdlBeginConcurrent();
  } else {
    PdlWait();
  }
  static_assert(Traits::kPipelines * Traits::kRounds == kChainsOfSplit);
  const InvariantSchedule schedule =
      MakeInvariantSchedule<Traits::kTileRows, Traits::kKvTile, kAttentionThreads>(
          p, task, reinterpret_cast<uint2*>(shared + Traits::kScheduleOffset),
          reinterpret_cast<uint2*>(shared + Traits::kScanOffset));
  Segment* segments = reinterpret_cast<Segment*>(shared + Traits::kSegmentOffset);
  constexpr uint32_t kMostSegments = Traits::kMaxSegments;
  const KeySplits<Traits::kKvTile> splits{task.most_splits};
  RunningTotal<Traits> total;
  const Segment* unfinished = nullptr;
  int results = 0;  // of the work tile that was found begun
  for (uint32_t done = 0; done < schedule.num_work_tiles; done += kMostSegments) {
    const int count = static_cast<int>(min(schedule.num_work_tiles - done, kMostSegments));
    if (threadIdx.x < count) {
      segments[threadIdx.x] = MakeInvariantSegment<Traits::kTileRows, Traits::kKvTile>(
          p, task, schedule, done + threadIdx.x);
    }
    __syncthreads();
    // The first queries are asked for ahead of the first keys, after which they would wait. With
    // more packed rows, or scales of tokens, registers would spill.
    constexpr bool kQueriesAhead = Traits::kTileRows == 8 && !Traits::kPerTokenScales;
    QueryLoads<Traits> loads;
    if constexpr (kQueriesAhead) loads.Start(p, task.work, segments[0]);
    KvLoader<Traits> cursor(p, segments, count, pipeline, task.work.keys_read_once,
                            task.most_splits);
    StageRing<Traits> ring{SharedAddress(shared) +
                           pipeline * Traits::kStages * Traits::kStageBytes};
    StartLoads<Traits>(&cursor, &ring);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const Segment& segment = segments[i];
      const int first_split = splits.Of(segment.kv_tile_begin);
      const bool empty = segment.kv_tile_begin == segment.kv_tile_end;
      // A work tile without a visible key is one split; nothing may be left of one found begun.
      const int num_splits =
          empty ? segment.begins_work_tile : splits.Of(segment.kv_tile_end - 1) + 1 - first_split;
      bool stored = false;  // queries
      QueryTile<Traits> query;
      const int first_row = warp_row + 2 * (threadIdx.x % 4);
      const PackedRowInfo* infos =
          reinterpret_cast<const PackedRowInfo*>(shared + Traits::kRowInfoOffset) + first_row;
      float factors[Traits::kTiles][2];
#pragma unroll 1
      for (int at = 0; at < num_splits * Traits::kRounds; ++at) {
        const int split = first_split + at / Traits::kRounds, round = at % Traits::kRounds;
        const KvTiles tiles = TilesOfRound<Traits>(segment, splits, split, round, pipeline);
        RoundEnd end;
        end.begins_split = round == 0;
        end.ends_split = round + 1 == Traits::kRounds;
        // A round without keys changes nothing, but the last one of a split ends it.
        if (tiles.longest == 0 && !end.ends_split && !end.begins_split) continue;
        // The end of a round overwrites the queries in shared memory.
        if (!stored || !Traits::kQueryInRegisters) {
          if (!kQueriesAhead || i > 0) loads.Start(p, task.work, segment);
          StoreQueries<Traits>(p, task.work, segment, &loads, shared);
          __syncthreads();
          query.shared = SharedAddress(shared) + Traits::kQueryOffset +
                         warp_row * Traits::kKeyDim * 2 + threadIdx.x % 32 * 8;
          query.Fetch();
#pragma unroll
          for (int n = 0; n < Traits::kTiles; ++n) {
            factors[n][0] = infos[8 * n].score_factor * infos[8 * n].query_factor;
            factors[n][1] = infos[8 * n + 1].score_factor * infos[8 * n + 1].query_factor;
          }
          stored = true;
        }
        TileState<Traits> state;
        state.Reset();
        RunMainloop<Traits>(p, segment, pipeline, query, factors, SharedAddress(infos), &cursor,
                            &ring, &state, tiles);
        const bool last = at + 1 == num_splits * Traits::kRounds;
        if (last && done + i + 1 == schedule.num_work_tiles) PdlLaunchDependents();
        end.adds = segment.begins_work_tile;
        end.first = at < Traits::kRounds;
        end.last = last && segment.ends_work_tile;
        end.leaves = last && !segment.ends_work_tile;
        const int64_t own = 2 * static_cast<int64_t>(blockIdx.x);
        end.total = InvariantPartial<Traits>(task, own);
        end.split = InvariantPartial<Traits>(task, own + 1);
        end.result = InvariantPartial<Traits>(
            task, task.FirstResult(blockIdx.x) + (end.adds ? 0 : at / Traits::kRounds));
        FinishRound<Traits>(p, task.work, segment, end, pipeline, warp_row, shared, &state, &total);
      }
      if (!segment.begins_work_tile) results = num_splits;
      unfinished = segment.num_splits > 0 ? &segment : nullptr;
    }
    WaitForCopies<0>();
  }
  if (task.work.headers != nullptr && threadIdx.x == 0 && blockIdx.x < task.work.shares) {
    WriteInvariantHeader(task, unfinished, results);
  }
  if (task.work.clear_padding)
    ClearPadding<Traits::kOwnValueDim>(p, task.work.first_seq, task.work.num_seqs);
  if (task.work.overlaps_previous) PdlEndConcurrent();
}

template <DType kElement, DType kValue, int kHeadDim, Scales kScales, int kTileRows>
cudaError_t LaunchInvariantVariant(const AttentionParams& p, const InvariantTask& task, int grid,
                                   cudaStream_t stream) {
  using Traits =
      AttentionTraits<kElement, kHeadDim, true, kScales, kTileRows, false, false, kValue, true>;
  constexpr auto kKernel = InvariantKernel<Traits>;
  int stages = 0;
  const cudaError_t status = PrepareLaunch<kKernel, Traits>(&stages);
  if (status != cudaSuccess) return status;
  return LaunchPdlWithShared(kKernel, dim3(grid), dim3(kAttentionThreads),
                             Traits::SharedBytes(task.work.num_seqs, stages), stream, p, task);
}

}  // namespace fastattn::cuda
