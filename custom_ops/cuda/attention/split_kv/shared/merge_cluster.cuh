// How the CTAs of a cluster, which share a work tile, merge their partial results: through each
// other's shared memory, so that no second kernel is needed.
#pragma once

#include <cstdint>

#include "cuda/attention/split_kv/shared/epilogue.cuh"
#include "cuda/attention/split_kv/shared/packed_rows.cuh"
#include "cuda/attention/split_kv/shared/schedule.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/merge/shared/merge_values.cuh"
#include "cuda/merge/shared/partial_weights.cuh"

namespace fastattn::cuda {

// Merges the partial results at the start of each CTA's shared memory, in the order of their ranks.
// Every CTA writes some of the output. Afterwards, shared memory may be overwritten.
template <typename Traits>
__device__ __forceinline__ void MergeCluster(const AttentionParams& p, const AttentionTask& task,
                                             const Segment& segment, const char* shared) {
  constexpr int kQuads = Traits::kValueDim / 4;
  constexpr int kBatch = 8;  // partial results that are loaded together
  const PackedRowInfo* infos =
      reinterpret_cast<const PackedRowInfo*>(shared + Traits::kRowInfoOffset);
  const uint32_t partial = SharedAddress(shared);
  const int cluster = task.cluster;
  const int each = Traits::kTileRows * kQuads / cluster;
  const int begin = static_cast<int>(ClusterRank()) * each;
  ArriveAtCluster();
  WaitForCluster();
#pragma unroll 1
  for (int done = 0; done < each; done += Traits::kThreads) {
    const int index = begin + done + static_cast<int>(threadIdx.x);
    const int packed_row = index / kQuads, quad = index % kQuads;
    const bool mine = done + static_cast<int>(threadIdx.x) < each && infos[packed_row].out >= 0;
    uint4 out = make_uint4(0, 0, 0, 0);
    PartialWeight weight = {kLowestMaximum, 0.0f};
    if (mine) {
#pragma unroll 1
      for (int first = 0; first < cluster; first += kBatch) {
        uint4 outs[kBatch];
        float2 states[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const uint32_t from = AddressInCluster(min(first + b, cluster - 1), partial);
          outs[b] = LoadCluster16(from + index * 16);
          states[b] =
              LoadCluster8(from + Traits::kTileRows * Traits::kValueDim * 4 + packed_row * 8);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (first + b >= cluster) continue;
          const MergeWeights w =
              WeightsOfPartials(weight, {fmaxf(states[b].x, kLowestMaximum), states[b].y});
          float x[4];
          MergePack<DType::kFloat32>(out, outs[b], w, x);
          out = make_uint4(FloatBits(x[0]), FloatBits(x[1]), FloatBits(x[2]), FloatBits(x[3]));
          weight = {w.max, w.sum};
        }
      }
    }
    __syncwarp();
    if (done + Traits::kThreads >= each) ArriveAtCluster();
    if (mine) {
      const PackedRow info = PackedRowOf(task, segment.shape, segment.head,
                                         segment.tile * Traits::kTileRows + packed_row);
      const float factor = FinishPackedRow(p, info, infos[packed_row].value_scale, weight.max,
                                           weight.sum, quad == 0);
      StoreOutput(
          p, segment.head, infos[packed_row].out, 4 * quad,
          make_float4(BitsFloat(out.x), BitsFloat(out.y), BitsFloat(out.z), BitsFloat(out.w)),
          factor);
    }
  }
  __syncwarp();
  WaitForCluster();
}

}  // namespace fastattn::cuda
