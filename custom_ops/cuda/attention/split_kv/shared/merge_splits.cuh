// How CTAs with equal shares merge the partial results of a work tile without a second kernel: the
// CTA that comes last reads what the others left in global memory.
#pragma once

#include "cuda/attention/split_kv/shared/epilogue.cuh"
#include "cuda/attention/split_kv/shared/packed_rows.cuh"
#include "cuda/attention/split_kv/shared/schedule.cuh"
#include "cuda/merge/shared/merge_values.cuh"
#include "cuda/merge/shared/partial_weights.cuh"

namespace fastattn::cuda {

// Partial results that one CTA merges in turn. More are merged in groups of so many first, each by
// the last CTA of its group.
inline constexpr int kMergeGroup = 16;

// Groups of n CTAs. None of a single CTA: a group's counter is that of its first CTA, which begins
// no other work tile then.
__device__ __forceinline__ int MergeGroups(int n) { return max((n - 2) / kMergeGroup + 1, 1); }

// Whether this CTA is the last of `count` that count themselves here. What the others wrote before
// can be read then, past the L1 cache. All threads take part; a barrier lies behind their writes.
__device__ __forceinline__ bool ComesLast(int* counter, int count) {
  int before = 0;
  if (threadIdx.x == 0) {
    __threadfence();
    before = atomicAdd(counter, 1);
    __threadfence();
  }
  return __syncthreads_or(threadIdx.x == 0 && before == count - 1) != 0;
}

// Piece `index` of `kCount`, or of those that do not fill all threads the last one for the rest.
template <int kCount, int kThreads>
__device__ __forceinline__ int PieceOf(int index) {
  return kCount % kThreads == 0 ? index : min(index, kCount - 1);
}

// Merges `count` partial results of a work tile, of CTAs from `first` on, `stride` apart, in their
// order. They become the output if `last`, else the partial result of CTA `first`. Afterwards
// shared memory may be overwritten.
template <typename Traits>
__device__ __forceinline__ void MergePartials(const AttentionParams& p, const AttentionTask& task,
                                              const Segment& segment, const PackedRowInfo* infos,
                                              int first, int stride, int count, bool last) {
  constexpr int kQuads = Traits::kValueDim / 4;
  constexpr int kAllPieces = Traits::kTileRows * kQuads;
  constexpr int kPieces = (kAllPieces + Traits::kThreads - 1) / Traits::kThreads;  // of a thread
  // Partial results whose loads are under way together; 16 packed rows leave fewer registers.
  constexpr int kBatch = 16 / kPieces;
  static_assert(kPieces <= 16);
  const auto partial_of = [&](int cta) {
    return PartialOf(task, Traits::kTileRows, Traits::kValueDim, cta, cta == segment.first_cta);
  };
  const auto thread = static_cast<int>(threadIdx.x);
  uint4 out[kPieces];
  PartialWeight weight[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    out[i] = make_uint4(0, 0, 0, 0);
    weight[i] = {kLowestMaximum, 0.0f};
  }
#pragma unroll 1
  for (int done = 0; done < count; done += kBatch) {
    uint4 outs[kBatch][kPieces];
    float2 states[kBatch][kPieces];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const float* partial = partial_of(first + min(done + b, count - 1) * stride);
      const auto* of_rows =
          reinterpret_cast<const float2*>(partial + Traits::kTileRows * Traits::kValueDim);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int index = PieceOf<kAllPieces, Traits::kThreads>(thread + i * Traits::kThreads);
        outs[b][i] = __ldcg(reinterpret_cast<const uint4*>(partial) + index);
        states[b][i] = __ldcg(of_rows + index / kQuads);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (done + b >= count) continue;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const float2 state = states[b][i];
        const MergeWeights w =
            WeightsOfPartials(weight[i], {fmaxf(state.x, kLowestMaximum), state.y});
        float x[4];
        MergePack<DType::kFloat32>(out[i], outs[b][i], w, x);
        out[i] = make_uint4(FloatBits(x[0]), FloatBits(x[1]), FloatBits(x[2]), FloatBits(x[3]));
        weight[i] = {w.max, w.sum};
      }
    }
  }
  __syncthreads();  // all threads have read what some overwrite
  float* const merged = partial_of(first);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int index = thread + i * Traits::kThreads;
    if (PieceOf<kAllPieces, Traits::kThreads>(index) != index) continue;
    const int packed_row = index / kQuads, quad = index % kQuads;
    if (!last) {
      reinterpret_cast<uint4*>(merged)[index] = out[i];
      if (quad == 0) {
        reinterpret_cast<float2*>(merged + Traits::kTileRows * Traits::kValueDim)[packed_row] =
            make_float2(weight[i].max, weight[i].sum);
      }
    } else if (infos[packed_row].out >= 0) {
      const PackedRow info = PackedRowOf(task, segment.shape, segment.head,
                                         segment.tile * Traits::kTileRows + packed_row);
      const float factor = FinishPackedRow(p, info, infos[packed_row].value_scale, weight[i].max,
                                           weight[i].sum, quad == 0);
      StoreOutput(p, segment.head, infos[packed_row].out, 4 * quad,
                  make_float4(BitsFloat(out[i].x), BitsFloat(out[i].y), BitsFloat(out[i].z),
                              BitsFloat(out[i].w)),
                  factor);
    }
  }
  __syncthreads();
}

// Behind a CTA's partial result of a work tile: the last CTA that gets here writes the output.
// Which one that is changes nothing of the result. task.arrivals [2, shares], 0 at first, counts
// the CTAs, or groups, of the work tile that a CTA begins, and those of the group that it begins.
// A function of its own: inlined, it costs the kernels of 16 packed rows spilled registers.
template <typename Traits>
__device__ __noinline__ void MergeSplits(const AttentionParams& p, const AttentionTask& task,
                                         const Segment& segment, const char* shared) {
  const PackedRowInfo* infos =
      reinterpret_cast<const PackedRowInfo*>(shared + Traits::kRowInfoOffset);
  const int groups = MergeGroups(segment.num_splits);
  int first = segment.first_cta, count = segment.num_splits, stride = 1;
  int* counter = task.arrivals + first;
  bool last = true;
  if (groups > 1) {
    const int group = min((static_cast<int>(blockIdx.x) - first) / kMergeGroup, groups - 1);
    first += group * kMergeGroup;
    count = group + 1 < groups ? kMergeGroup : count - group * kMergeGroup;
    counter = task.arrivals + task.shares + first;
    last = false;
  }
#pragma unroll 1
  while (ComesLast(counter, count)) {
    MergePartials<Traits>(p, task, segment, infos, first, stride, count, last);
    if (last) return;
    first = segment.first_cta, count = groups, stride = kMergeGroup;
    counter = task.arrivals + first;
    last = true;
  }
}

}  // namespace fastattn::cuda
