// The attention kernel: see traits.cuh for who does what.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attention/launch.h"
#include "cuda/attention/mma_sm80/cluster_join.cuh"
#include "cuda/attention/mma_sm80/finish.cuh"
#include "cuda/attention/mma_sm80/loader.cuh"
#include "cuda/attention/mma_sm80/mma.cuh"
#include "cuda/attention/mma_sm80/query.cuh"
#include "cuda/attention/mma_sm80/schedule.cuh"
#include "cuda/attention/mma_sm80/tile.cuh"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/attention/mma_sm80/value_scales.cuh"
#include "cuda/attention/shared/clear.cuh"
#include "cuda/common/exp2.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda {

template <typename Traits>
__device__ __forceinline__ UnitMask MaskOf(const Segment& segment, int unit, uint32_t columns) {
  UnitMask mask;
  mask.first_key = unit * Traits::kUnit;
  mask.needed =
      mask.first_key < segment.full.begin || mask.first_key + Traits::kUnit > segment.full.end;
  mask.divided = segment.divided;
  mask.begin = segment.any.begin - mask.first_key;
  mask.end = segment.any.end - mask.first_key;
  mask.columns = columns;
  return mask;
}

// Scores of kGroup key tiles to packed probabilities, as B operands of V^T P^T.
template <typename Traits>
__device__ __forceinline__ void PackProbabilities(
    const float (&scores)[Traits::kGroup][Traits::kTiles][4],
    uint32_t (&packed)[Traits::kGroup][Traits::kTiles][2]) {
#pragma unroll
  for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        packed[m][n][half] = TransposeMatrix(
            PackPair<Traits::Format::kOperand>(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      }
    }
  }
}

// A stream's ring: where the next load goes and where the next computation reads.
template <typename Traits>
struct Ring {
  uint32_t base;
  int load = 0;
  int use = 0;

  __device__ __forceinline__ uint32_t NextLoad() {
    const uint32_t slot = base + load * Traits::kSlotBytes;
    load = load + 1 == Traits::kSlots ? 0 : load + 1;
    return slot;
  }
  __device__ __forceinline__ uint32_t NextUse() {
    const uint32_t slot = base + use * Traits::kSlotBytes;
    use = use + 1 == Traits::kSlots ? 0 : use + 1;
    return slot;
  }
};

template <typename Traits, bool kKeys>
__device__ __forceinline__ void StartLoad(LoadCursor<Traits>* cursor, Ring<Traits>* ring) {
  if constexpr (kKeys) {
    cursor->LoadKeys(ring->NextLoad());
  } else {
    cursor->LoadValues(ring->NextLoad());
  }
}

// Whether the block of the unit whose K lies in `slot` exists.
template <typename Traits>
__device__ __forceinline__ bool IsAssigned(uint32_t slot) {
  uint32_t assigned;
  asm volatile("ld.shared.u32 %0, [%1];"
               : "=r"(assigned)
               : "r"(slot + Traits::kDataBytes + Traits::kScaleBytes));
  return assigned != 0;
}

template <typename Traits>
using Scores = float[Traits::kGroup][Traits::kTiles][4];

template <typename Traits>
__device__ __forceinline__ void Score(const AttentionParams& p, uint32_t slot, const UnitMask& mask,
                                      const QueryTile<Traits>& query,
                                      const float (&factors)[Traits::kTiles][2], int first,
                                      Scores<Traits>& scores) {
#pragma unroll
  for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[m][n][c] = 0.0f;
    }
  }
  Multiply<Traits>(slot, query, first, scores);
  FinishScores<Traits>(p, slot, mask, factors, first, scores);
}

template <typename Traits>
__device__ __forceinline__ void Attend(const AttentionParams& p, uint32_t slot,
                                       const UnitMask& mask, int first, Scores<Traits>& scores,
                                       TileState<Traits>* state) {
  RaiseMaximum<Traits>(scores, state);
  Exponentiate<Traits>(scores, state);
  if constexpr (Traits::kTokenScales) {
    ApplyValueScales<Traits>(p, slot, mask, first, scores, state);
  }
  uint32_t packed[Traits::kGroup][Traits::kTiles][2];
  PackProbabilities<Traits>(scores, packed);
  Accumulate<Traits>(slot, first, packed, state);
}

// Works through the stream's units of a segment.
template <typename Traits>
__device__ __forceinline__ void RunSegment(const AttentionParams& p, const Segment& segment,
                                           int stream, const QueryTile<Traits>& query,
                                           const float (&factors)[Traits::kTiles][2],
                                           uint32_t columns, LoadCursor<Traits>* cursor,
                                           Ring<Traits>* ring, TileState<Traits>* state) {
  const int unit_end = segment.unit_end;
  if constexpr (Traits::kPairs) {
    const int steps = (unit_end - segment.unit_begin + Traits::kStreams - 1) / Traits::kStreams;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int unit = segment.unit_begin + step * Traits::kStreams + stream;
      const UnitMask mask = MaskOf<Traits>(segment, unit, columns);
      WaitForCopies<0>();
      __syncthreads();
      uint32_t key_slot = 0, value_slot = 0;
      bool present = unit < unit_end;
      if (present) {
        cursor->LoadKeys(ring->NextLoad());
        cursor->LoadValues(ring->NextLoad());
        key_slot = ring->NextUse(), value_slot = ring->NextUse();
        present = IsAssigned<Traits>(key_slot);
      }
      if (__syncthreads_or(present && mask.needed)) {
        if (present && mask.needed) InspectValues<Traits>(value_slot, mask, state);
        __syncthreads();
        if (present && mask.needed) EraseValues<Traits>(value_slot, mask);
        __syncthreads();
      }
      if (!present) continue;
#pragma unroll 1
      for (int first = 0; first < Traits::kKeyTiles; first += Traits::kGroup) {
        Scores<Traits> scores;
        Score<Traits>(p, key_slot, mask, query, factors, first, scores);
        Attend<Traits>(p, value_slot, mask, first, scores, state);
      }
    }
  } else {
#pragma unroll 1
    for (int unit = segment.unit_begin + stream; unit < unit_end; unit += Traits::kStreams) {
      const UnitMask mask = MaskOf<Traits>(segment, unit, columns);
      Scores<Traits> scores;
      // The newest kSlots - 2 loads may still be under way.
      WaitForCopies<Traits::kSlots - 2>();
      __syncwarp();
      StartLoad<Traits, Traits::kSlots % 2 == 1>(cursor, ring);
      const uint32_t key_slot = ring->NextUse();
      const bool assigned = IsAssigned<Traits>(key_slot);
      if (assigned) Score<Traits>(p, key_slot, mask, query, factors, 0, scores);
      WaitForCopies<Traits::kSlots - 2>();
      __syncwarp();
      StartLoad<Traits, Traits::kSlots % 2 == 0>(cursor, ring);
      const uint32_t value_slot = ring->NextUse();
      if (!assigned) continue;
      if (mask.needed) {
        InspectValues<Traits>(value_slot, mask, state);
        __syncwarp();
        EraseValues<Traits>(value_slot, mask);
        __syncwarp();
      }
      Attend<Traits>(p, value_slot, mask, 0, scores, state);
    }
  }
}

// Merges the streams and writes the item's output, or this CTA's part of it.
template <typename Traits>
__device__ __forceinline__ void FinishSegment(const AttentionParams& p, const AttentionTask& task,
                                              const Segment& segment, int stream, int warp_column,
                                              char* shared, TileState<Traits>* state) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float2* states = reinterpret_cast<float2*>(shared + Traits::kStateOffset);
  ColumnInfo* infos = reinterpret_cast<ColumnInfo*>(shared + Traits::kColumnOffset);
  float* merge = reinterpret_cast<float*>(shared + Traits::kMergeOffset);
  if constexpr (Traits::kTokenScales) {
    if (state->scale_exponent == kOwnExponents) LeaveOwnExponents<Traits>(state);
  }
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = state->sum[n][c];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      if (g == 0) {
        states[stream * Traits::kColumns + warp_column + 8 * n + 2 * t + c] =
            make_float2(state->maximum[n][c], sum);
      }
    }
  }
  __syncthreads();
  // Streams that saw nothing have -inf for a maximum and 0 for a sum, but for NaN, which stays.
  const auto weight_of = [](float part, float maximum) {
    return part == maximum ? 1.0f : Exp2(part - maximum);
  };
  const float scale = Traits::kTokenScales
                          ? __uint_as_float(static_cast<uint32_t>(state->scale_exponent) << 23)
                          : 1.0f;
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float maximum = -kInfinity;
#pragma unroll
      for (int s = 0; s < Traits::kStreams; ++s) {
        maximum = fmaxf(maximum, states[s * Traits::kColumns + warp_column + 8 * n + 2 * t + c].x);
      }
      const float weight = scale * weight_of(state->maximum[n][c], maximum);
#pragma unroll
      for (int i = 0; i < Traits::kDimTiles; ++i) {
        state->out[i][n][c] *= weight;
        state->out[i][n][c + 2] *= weight;
      }
    }
  }
  float* part = nullptr;
  if (Traits::kClusters && task.cluster > 1) {
    part = reinterpret_cast<float*>(shared);  // nothing is left in the ring, or under way to it
  } else if (!segment.Whole()) {
    part = PartOf(task, Traits::kColumns, Traits::kHeadDim, blockIdx.x, segment.begins_item);
  }
  if (threadIdx.x < Traits::kColumns) {
    const int column = threadIdx.x;
    float maximum = -kInfinity, sum = 0.0f;
#pragma unroll
    for (int s = 0; s < Traits::kStreams; ++s) {
      maximum = fmaxf(maximum, states[s * Traits::kColumns + column].x);
    }
#pragma unroll
    for (int s = 0; s < Traits::kStreams; ++s) {
      const float2 state_of = states[s * Traits::kColumns + column];
      sum += state_of.y * weight_of(state_of.x, maximum);
    }
    if (part != nullptr) {
      reinterpret_cast<float2*>(part + Traits::kColumns * Traits::kHeadDim)[column] =
          make_float2(maximum, sum);
    } else if (infos[column].out >= 0) {
      const Column info =
          ColumnOf(task, segment.shape, segment.head, segment.tile * Traits::kColumns + column);
      infos[column].out_factor = FinishColumn(p, info, infos[column].value_scale, maximum, sum);
    }
  }
  constexpr int kTilesPerRound = Traits::kMergeDims / 16;
  constexpr int kQuads = Traits::kMergeDims / 4;
#pragma unroll 1
  for (int round = 0; round < Traits::kDimTiles / kTilesPerRound; ++round) {
    // Registers take no index that varies: every round passes by all of them.
#pragma unroll
    for (int i = 0; i < Traits::kDimTiles; ++i) {
      if (i / kTilesPerRound != round) continue;
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int column = warp_column + 8 * n + 2 * t + c % 2;
          merge[(stream * Traits::kColumns + column) * Traits::kMergeStride +
                Traits::ChannelOf(i % kTilesPerRound, g + 8 * (c / 2))] = state->out[i][n][c];
        }
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int index = threadIdx.x; index < Traits::kColumns * kQuads; index += kAttentionThreads) {
      const int column = index / kQuads, quad = index % kQuads;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int s = 0; s < Traits::kStreams; ++s) {
        const float4 x = *reinterpret_cast<const float4*>(
            merge + (s * Traits::kColumns + column) * Traits::kMergeStride + 4 * quad);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      const int channel = round * Traits::kMergeDims + 4 * quad;
      if (part != nullptr) {
        *reinterpret_cast<float4*>(part + column * Traits::kHeadDim + channel) = sum;
      } else if (infos[column].out >= 0) {
        StoreOutput(p, segment.head, infos[column].out, channel, sum, infos[column].out_factor);
      }
    }
    __syncthreads();
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionCtasPerSm)
    AttentionKernel(const __grid_constant__ AttentionParams p,
                    const __grid_constant__ AttentionTask task) {
  extern __shared__ __align__(16) char shared[];
  const int warp = threadIdx.x / 32;
  const int stream = warp / Traits::kStreamWarps;
  const int warp_column = warp % Traits::kStreamWarps * Traits::kTiles * 8;
  TouchParameters(p);
  TouchParameters(task);
  if (task.beside) {
    PdlBeginConcurrent();
  } else {
    PdlWait();
  }
  const bool clustered = Traits::kClusters && task.cluster > 1;
  Schedule schedule;
  RowShape cluster_row;
  if (clustered) {
    schedule = MakeClusterSchedule<Traits::kColumns, Traits::kUnit>(p, task, &cluster_row);
  } else {
    schedule = MakeSchedule<Traits::kColumns, Traits::kUnit, kAttentionThreads>(
        p, task, reinterpret_cast<uint2*>(shared + Traits::kScheduleOffset),
        reinterpret_cast<uint2*>(shared + Traits::kScanOffset));
  }
  Segment* segments = reinterpret_cast<Segment*>(shared + Traits::kSegmentOffset);
  static_assert(Traits::kSegmentBytes == sizeof(Segment) * Traits::kMaxSegments);
  int parts = 0;
  // A cluster joins what its CTAs have of an item before it goes on to the next one.
  const uint32_t most = clustered ? 1 : Traits::kMaxSegments;
  for (uint32_t done = 0; done < schedule.num_items; done += most) {
    const int count = static_cast<int>(min(schedule.num_items - done, most));
    if (threadIdx.x < count) {
      segments[threadIdx.x] =
          clustered ? MakeClusterSegment<Traits::kColumns, Traits::kUnit>(
                          p, task, schedule, cluster_row, done, ClusterRank())
                    : MakeSegment<Traits::kColumns, Traits::kUnit>(
                          p, task, schedule, schedule.first_item + done + threadIdx.x);
    }
    __syncthreads();
    QueryLoads<Traits> loads;
    if (clustered) loads.Start(p, task, segments[0]);
    LoadCursor<Traits> cursor(p, segments, count, stream, task.once);
    Ring<Traits> ring{SharedAddress(shared) + stream * Traits::kSlots * Traits::kSlotBytes};
#pragma unroll 1
    for (int i = 0; i < (Traits::kPairs ? 1 : (Traits::kSlots - 1) / 2); ++i) {
      cursor.LoadKeys(ring.NextLoad());
      cursor.LoadValues(ring.NextLoad());
    }
    if constexpr (!Traits::kPairs && Traits::kSlots % 2 == 0) cursor.LoadKeys(ring.NextLoad());
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const Segment& segment = segments[i];
      if (!clustered) loads.Start(p, task, segment);
      StoreQueries<Traits>(p, task, segment, &loads, shared);
      __syncthreads();
      QueryTile<Traits> query;
      query.shared = SharedAddress(shared) + Traits::kQueryOffset +
                     warp_column * Traits::kHeadDim * 2 + threadIdx.x % 32 * 8;
      query.Fetch();
      const int first_column = warp_column + 2 * (threadIdx.x % 4);
      const ColumnInfo* infos =
          reinterpret_cast<const ColumnInfo*>(shared + Traits::kColumnOffset) + first_column;
      float factors[Traits::kTiles][2];
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
        factors[n][0] = infos[8 * n].score_factor * infos[8 * n].query_factor;
        factors[n][1] = infos[8 * n + 1].score_factor * infos[8 * n + 1].query_factor;
      }
      TileState<Traits> state;
      state.Reset();
      RunSegment<Traits>(p, segment, stream, query, factors, SharedAddress(infos), &cursor, &ring,
                         &state);
      if (done + i + 1 == schedule.num_items) PdlLaunchDependents();
      parts = segment.parts;
      FinishSegment<Traits>(p, task, segment, stream, warp_column, shared, &state);
    }
    WaitForCopies<0>();
    if constexpr (Traits::kClusters) {
      if (clustered) JoinCluster<Traits>(p, task, segments[0], shared);
    }
  }
  if (task.split && !clustered && threadIdx.x == 0) {
    int4 header = make_int4(0, 0, 0, 0);
    if (parts > 0) {
      // The item that goes on in other CTAs is the last one.
      const Segment& last = segments[(schedule.num_items - 1) % Traits::kMaxSegments];
      header = make_int4(parts, last.row, last.head, last.tile);
    }
    reinterpret_cast<int4*>(task.headers)[static_cast<int64_t>(blockIdx.x) * kPartialHeader / 4] =
        header;
  }
  if (task.clear) ClearPadding(p, task.first_row, task.num_rows);
  if (task.beside) PdlEndConcurrent();
}

// Slots of the kernel's rings on a device whose CTAs have up to `bytes` of shared memory.
template <typename Traits, typename Kernel>
cudaError_t FindRing(Kernel kernel, int bytes, int* slots) {
  static_assert(Traits::SharedBytes(kMaxPlanSeqs, Traits::kShortRing) <= 99 * 1024);
  *slots = Traits::kSlots;
  if (bytes > 128 * 1024) return cudaSuccess;
  // A small GPU: its code says which rings it was compiled with.
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  if (HasShortRings(attributes.ptxVersion)) *slots = Traits::kShortRing;
  const bool fits = bytes >= Traits::SharedBytes(kMaxPlanSeqs, *slots);
  return fits ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

template <DType kElement, int kHeadDim, bool kPaged, bool kTokenScales, int kColumns>
cudaError_t LaunchAttentionVariant(const AttentionParams& p, const AttentionTask& task, int grid,
                                   cudaStream_t stream) {
  using Traits = AttentionTraits<kElement, kHeadDim, kPaged, kTokenScales, kColumns>;
  const auto kernel = AttentionKernel<Traits>;
  int device = 0, slots = 0;
  DeviceFacts facts;
  cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status == cudaSuccess) status = FindRing<Traits>(kernel, facts.max_shared_bytes, &slots);
  if (status != cudaSuccess) return status;
  static OncePerDevice once;
  status = once.Run(device, [&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                Traits::SharedBytes(kMaxPlanSeqs, slots));
  });
  if (status != cudaSuccess) return status;
  return LaunchPdlInClusters(kernel, dim3(grid), dim3(kAttentionThreads), task.cluster,
                             Traits::SharedBytes(task.num_rows, slots), stream, p, task);
}

}  // namespace fastattn::cuda
