// Goes on with the sum over the splits of a work tile where it lies in several CTAs: a total, and
// the results of single splits, which are added one after the other.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/ceil_div.h"
#include "common/head_dims.h"
#include "cuda/attention/split_kv/launch.h"
#include "cuda/attention/split_kv/shared/epilogue.cuh"
#include "cuda/attention/split_kv/shared/invariant_total.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;  // four channels of a packed row each
constexpr int kBatch = 8;      // results that are loaded together
constexpr int kMostResults = 128;

__device__ __forceinline__ const int4* HeaderOf(const InvariantTask& task, int cta) {
  return reinterpret_cast<const int4*>(task.work.headers) +
         static_cast<int64_t>(cta) * kPartialHeader / 4;
}

// Lists the `missing` results of the work tile that CTA `first - 1` left, as slots of the
// workspace. Returns how many there are. A warp looks at 32 CTAs at a time: some have no split.
__device__ __forceinline__ int ListResults(const InvariantTask& task, int first, int ctas,
                                           int missing, int* slots) {
  const int lane = threadIdx.x;
  int found = 0;
  for (int base = first; found < missing && base < ctas; base += 32) {
    const int cta = base + lane;
    const int results = cta < ctas ? __ldcg(HeaderOf(task, cta) + 1).x : 0;
    int sum = results;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, sum, step);
      if (lane >= step) sum += other;
    }
    // The next results are of another work tile.
    for (int i = 0, at = found + sum - results; i < results && at < missing; ++i, ++at) {
      slots[at] = task.FirstResult(cta) + i;
    }
    found += __shfl_sync(0xFFFFFFFFu, sum, 31);
  }
  return min(found, missing);
}

__global__ void __launch_bounds__(kThreads)
    MergeInvariantKernel(const __grid_constant__ AttentionParams p,
                         const __grid_constant__ InvariantTask task, int tile_rows) {
  __shared__ int slots[kMostResults];
  __shared__ int listed;
  if (task.work.overlaps_previous) {
    PdlBeginConcurrent();
  } else {
    PdlWait();
    PdlLaunchDependents();
  }
  const int cta = static_cast<int>(blockIdx.x);
  const int4 header = __ldcg(HeaderOf(task, cta));
  if (header.x > 0) {
    if (threadIdx.x < 32) {
      const int found = ListResults(task, cta + 1, static_cast<int>(gridDim.x),
                                    min(header.x, kMostResults), slots);
      if (threadIdx.x == 0) listed = found;
    }
    const int head_dim = ValueDim(p.head_dim), quads = head_dim / 4;
    const int place = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
    const int index = min(place, tile_rows * quads - 1);
    const int packed_row = index / quads, quad = index % quads;
    const int64_t size = static_cast<int64_t>(tile_rows) * (head_dim + 2);
    const auto values_of = [&](int64_t slot) {
      return __ldcg(reinterpret_cast<const float4*>(task.work.partials + slot * size) + index);
    };
    const auto state_of = [&](int64_t slot) {
      const float* states = task.work.partials + slot * size + tile_rows * head_dim;
      return __ldcg(reinterpret_cast<const float2*>(states) + packed_row);
    };
    const int64_t own = 2 * static_cast<int64_t>(cta);
    float4 total = values_of(own);
    float2 sums = state_of(own);
    const SeqShape shape = LoadSeqShape(p, header.y);
    const PackedRow info =
        PackedRowOf(task.work, shape, header.z, header.w * tile_rows + packed_row);
    const float value_scale = ValueScale(p, header.y, header.z);
    __syncthreads();
    const int missing = listed;
    for (int first = 0; first < missing; first += kBatch) {
      float4 values[kBatch];
      float2 states[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int slot = slots[min(first + b, missing - 1)];
        values[b] = values_of(slot);
        states[b] = state_of(slot);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b >= missing) continue;
        const FoldWeights weights = FoldState(&sums, states[b]);
        total = FoldValues(total, values[b], weights);
      }
    }
    if (info.valid && place == index) {
      const float factor = FinishPackedRow(p, info, value_scale, sums.x, sums.y, quad == 0);
      const int64_t out = (static_cast<int64_t>(info.token) * p.num_heads + info.head) * head_dim;
      StoreOutput(p, header.z, out, 4 * quad, DoneValues(total), factor);
    }
  }
  if (task.work.overlaps_previous) PdlEndConcurrent();
}

}  // namespace

cudaError_t LaunchMergeInvariant(const AttentionParams& p, const InvariantTask& task, int tile_rows,
                                 cudaStream_t stream) {
  // Some packed rows' channels do not fill a whole number of CTAs.
  const dim3 blocks(task.work.shares, CeilDiv(tile_rows * (ValueDim(p.head_dim) / 4), kThreads));
  return LaunchPdl(MergeInvariantKernel, blocks, dim3(kThreads), stream, p, task, tile_rows);
}

}  // namespace fastattn::cuda
