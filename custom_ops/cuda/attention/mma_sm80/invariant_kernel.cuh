// The batch-invariant attention kernel: mma_sm80's mainloop, over splits of a work tile's keys that
// follow from its sequence alone (plan/invariant_plan.h).
//
// A CTA takes neighbouring splits of any work tiles. Where a split ends, the warp pipelines become
// one result, and the next split starts from nothing; results are added up in the order of splits
// (invariant_total.cuh). The CTA that has a work tile's first split adds up those that follow in
// the same CTA, and writes the output if it has all of them. Else it leaves the total, other CTAs
// the results of single splits, and merge_invariant.cu goes on with the sum.
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

template <typename Traits>
__device__ __forceinline__ float* InvariantPartial(const InvariantTask& task, int slot) {
  return task.work.partials + (static_cast<int64_t>(blockIdx.x) * task.most_splits + slot) *
                                  Traits::kTileRows * (Traits::kValueDim + 2);
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

// Makes `part` the split of a segment with that number.
__device__ __forceinline__ void TakeSplit(const Segment& segment, int split, int tiles,
                                          Segment* part) {
  if (split == 0) *part = segment;
  part->kv_tile_begin = segment.kv_tile_begin + split * tiles;
  part->kv_tile_end = min(part->kv_tile_begin + tiles, segment.kv_tile_end);
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
  static_assert(kInvariantStep % Traits::kPipelines == 0,
                "the pipelines of a split begin anew, as if it were a segment of its own");
  const InvariantSchedule schedule =
      MakeInvariantSchedule<Traits::kTileRows, Traits::kKvTile, kAttentionThreads>(
          p, task, reinterpret_cast<uint2*>(shared + Traits::kScheduleOffset),
          reinterpret_cast<uint2*>(shared + Traits::kScanOffset));
  Segment* segments = reinterpret_cast<Segment*>(shared + Traits::kSegmentOffset);
  // The last one is the split that all warps work on.
  constexpr uint32_t kMostSegments = Traits::kMaxSegments - 1;
  Segment& part = segments[kMostSegments];
  RunningTotal<Traits> total;
  const Segment* unfinished = nullptr;
  int results = 0;  // of the work tile that was found begun
  for (uint32_t done = 0; done < schedule.num_work_tiles; done += kMostSegments) {
    const int count = static_cast<int>(min(schedule.num_work_tiles - done, kMostSegments));
    if (threadIdx.x < count) {
      segments[threadIdx.x] = MakeInvariantSegment<Traits::kTileRows, Traits::kKvTile>(
          p, task, schedule, schedule.begin.work_tile + done + threadIdx.x);
    }
    __syncthreads();
    // The first queries are asked for ahead of the first keys, behind which they would wait. With
    // more packed rows, or scales of tokens, registers would spill.
    constexpr bool kQueriesAhead = Traits::kTileRows == 8 && !Traits::kPerTokenScales;
    QueryLoads<Traits> loads;
    if constexpr (kQueriesAhead) loads.Start(p, task.work, segments[0]);
    KvLoader<Traits> cursor(p, segments, count, pipeline, task.work.keys_read_once);
    StageRing<Traits> ring{SharedAddress(shared) +
                           pipeline * Traits::kStages * Traits::kStageBytes};
    StartLoads<Traits>(&cursor, &ring);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const Segment& segment = segments[i];
      const SeqWork work = WorkOf<Traits::kTileRows, Traits::kKvTile>(p, task.work, segment.shape);
      const int tiles = SplitsOf(task, work).tiles;
      // A work tile without a visible key is one split; nothing may be left of one found begun.
      const int splits = max((segment.kv_tile_end - segment.kv_tile_begin + tiles - 1) / tiles,
                             segment.begins_work_tile);
      QueryTile<Traits> query;
      const int first_row = warp_row + 2 * (threadIdx.x % 4);
      const PackedRowInfo* infos =
          reinterpret_cast<const PackedRowInfo*>(shared + Traits::kRowInfoOffset) + first_row;
      float factors[Traits::kTiles][2];
#pragma unroll 1
      for (int split = 0; split < splits; ++split) {
        if (threadIdx.x == 0) TakeSplit(segment, split, tiles, &part);
        // The end of a split overwrites the queries in shared memory.
        if (split == 0 || !Traits::kQueryInRegisters) {
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
        } else {
          __syncthreads();
        }
        TileState<Traits> state;
        state.Reset();
        RunMainloop<Traits>(p, part, pipeline, query, factors, SharedAddress(infos), &cursor, &ring,
                            &state);
        const bool last = split + 1 == splits;
        if (last && done + i + 1 == schedule.num_work_tiles) PdlLaunchDependents();
        SplitEnd end;
        end.adds = segment.begins_work_tile;
        end.first = split == 0;
        end.last = last && segment.ends_work_tile;
        end.leaves = last && !segment.ends_work_tile;
        end.total = InvariantPartial<Traits>(task, 0);
        end.split = InvariantPartial<Traits>(task, end.adds ? 0 : 1 + split);
        FinishSplit<Traits>(p, task.work, segment, end, pipeline, warp_row, shared, &state, &total);
      }
      if (!segment.begins_work_tile) results = splits;
      unfinished = segment.num_splits > 0 ? &segment : nullptr;
    }
    WaitForCopies<0>();
  }
  if (task.work.headers != nullptr && threadIdx.x == 0) {
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
      AttentionTraits<kElement, kHeadDim, true, kScales, kTileRows, false, false, kValue>;
  constexpr auto kKernel = InvariantKernel<Traits>;
  int stages = 0;
  const cudaError_t status = PrepareLaunch<kKernel, Traits>(&stages);
  if (status != cudaSuccess) return status;
  return LaunchPdlWithShared(kKernel, dim3(grid), dim3(kAttentionThreads),
                             Traits::SharedBytes(task.work.num_seqs, stages), stream, p, task);
}

}  // namespace fastattn::cuda
