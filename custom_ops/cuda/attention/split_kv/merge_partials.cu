// Merges the partial results of work tiles that several CTAs of an attention kernel shared, as
// merge_attn_states merges two sides: by the weights and the values of cuda/merge.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/head_dims.h"
#include "cuda/attention/shared/clear_padding.cuh"
#include "cuda/attention/split_kv/launch.h"
#include "cuda/attention/split_kv/shared/epilogue.cuh"
#include "cuda/attention/split_kv/shared/schedule.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/merge/shared/merge_values.cuh"
#include "cuda/merge/shared/partial_weights.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kMergeRows = 8;  // of a block, at most
constexpr int kBatch = 4;      // partial results that are loaded and merged together
// Most blocks have nothing to do: more of them cost more time than the search for the few split
// work tiles.
constexpr int kMostBlocks = 1536;

// Some partial results of a packed row, 4 channels a thread. Without any it changes nothing that it
// merges.
struct Merged {
  uint4 out = make_uint4(0, 0, 0, 0);  // of fp32
  PartialWeight weight = {kLowestMaximum, 0.0f};

  __device__ __forceinline__ void Merge(const Merged& other) {
    const MergeWeights w = WeightsOfPartials(weight, other.weight);
    float x[4];
    MergePack<DType::kFloat32>(out, other.out, w, x);
    out = make_uint4(FloatBits(x[0]), FloatBits(x[1]), FloatBits(x[2]), FloatBits(x[3]));
    weight = {w.max, w.sum};
  }

  // Merges in pairs, so that few merges wait for each other.
  __device__ __forceinline__ void MergeAll(Merged (&others)[kBatch]) {
#pragma unroll
    for (int step = 1; step < kBatch; step *= 2) {
#pragma unroll
      for (int i = 0; i + step < kBatch; i += 2 * step) others[i].Merge(others[i + step]);
    }
    Merge(others[0]);
  }
};

// A work tile that several CTAs share.
struct SplitTile {
  int cta;      // that began it
  int4 header;  // what that one says: CTAs that share it, its sequence, KV head and tile
};

__device__ __forceinline__ int4 LoadHeader(const AttentionTask& task, int cta) {
  return __ldcg(
      reinterpret_cast<const int4*>(task.headers + static_cast<int64_t>(cta) * kPartialHeader));
}

// The k-th split work tile, in some order; of 0 CTAs behind the last.
__device__ __forceinline__ SplitTile FindSplitTile(const AttentionTask& task, int ctas, int k) {
  constexpr int kWarps = kThreads / 32, kHeaders = 2;
  __shared__ int counts[kWarps];
  __shared__ SplitTile found;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t lower_lanes = (1u << threadIdx.x % 32) - 1;
  if (threadIdx.x == 0) found.header = make_int4(0, 0, 0, 0);
  for (int first = 0; k >= 0 && first < ctas; first += kThreads * kHeaders) {
    const int begin = first + static_cast<int>(threadIdx.x);
    int4 headers[kHeaders];
    uint32_t votes[kHeaders];
    int count = 0;
#pragma unroll
    for (int h = 0; h < kHeaders; ++h) {
      const int cta = begin + h * kThreads;
      headers[h] = cta < ctas ? LoadHeader(task, cta) : make_int4(0, 0, 0, 0);
    }
#pragma unroll
    for (int h = 0; h < kHeaders; ++h) {
      votes[h] = __ballot_sync(0xFFFFFFFFu, headers[h].x > 0);
      count += __popc(votes[h]);
    }
    if (threadIdx.x % 32 == 0) counts[warp] = count;
    __syncthreads();
    int before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? counts[w] : 0;
      all += counts[w];
    }
#pragma unroll
    for (int h = 0; h < kHeaders; ++h) {
      if (headers[h].x > 0 && before + __popc(votes[h] & lower_lanes) == k) {
        found = {begin + h * kThreads, headers[h]};
      }
      before += __popc(votes[h]);
    }
    k -= all;
    __syncthreads();
  }
  return found;
}

// Merges `block_rows` packed rows of a work tile. Partial results are merged in a fixed order, so
// that the result does not depend on who finished first.
__device__ __forceinline__ void MergeTile(const AttentionParams& p, const AttentionTask& task,
                                          int tile_rows, int block_rows,
                                          const SplitTile& work_tile) {
  __shared__ uint4 outs[kThreads];
  __shared__ PartialWeight weights[kThreads];
  const int num_splits = work_tile.header.x;
  const int head_dim = ValueDim(p.head_dim), quads = head_dim / 4;
  const int quad = threadIdx.x % quads;
  const int packed_row = blockIdx.y * block_rows + threadIdx.x / quads % block_rows;
  const int lanes = quads * block_rows;
  // The partial results are dealt out over groups of threads that hold all packed rows of the
  // block. Threads that do not fill a group write nothing.
  const int groups = kThreads / lanes, group = threadIdx.x / lanes;
  const float* first_partial = PartialOf(task, tile_rows, head_dim, work_tile.cta, 1);
  const int64_t partial_size = static_cast<int64_t>(tile_rows) * (head_dim + 2);
  Merged merged;
  for (int first = group; first < num_splits; first += groups * kBatch) {
    Merged batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * groups;
      if (i < num_splits) {
        // The first partial result is its CTA's second one, the others are the first ones of the
        // next CTAs.
        const float* partial =
            first_partial + (i == 0 ? 0 : (kPartialsPerCta * i - 1) * partial_size);
        batch[b].out =
            __ldcg(reinterpret_cast<const uint4*>(partial + packed_row * head_dim) + quad);
        const float2 state =
            __ldcg(reinterpret_cast<const float2*>(partial + tile_rows * head_dim) + packed_row);
        batch[b].weight = {fmaxf(state.x, kLowestMaximum), state.y};
      }
    }
    merged.MergeAll(batch);
  }
  const SeqShape shape = LoadSeqShape(p, work_tile.header.y);
  const int kv_head = work_tile.header.z;
  const PackedRow info =
      PackedRowOf(task, shape, kv_head, work_tile.header.w * tile_rows + packed_row);
  const float value_scale = ValueScale(p, work_tile.header.y, kv_head);
  if (groups > 1) {
    outs[threadIdx.x] = merged.out;
    weights[threadIdx.x] = merged.weight;
    __syncthreads();
    if (group > 0) return;
    for (int first = 1; first < groups; first += kBatch) {
      Merged batch[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int other = threadIdx.x + (first + b) * lanes;
        if (other < groups * lanes) batch[b].out = outs[other], batch[b].weight = weights[other];
      }
      merged.MergeAll(batch);
    }
  }
  if (!info.valid || group >= groups) return;
  const float factor =
      FinishPackedRow(p, info, value_scale, merged.weight.max, merged.weight.sum, quad == 0);
  const int64_t out = (static_cast<int64_t>(info.token) * p.num_heads + info.head) * head_dim;
  const float4 values = make_float4(BitsFloat(merged.out.x), BitsFloat(merged.out.y),
                                    BitsFloat(merged.out.z), BitsFloat(merged.out.w));
  StoreOutput(p, kv_head, out, 4 * quad, values, factor);
}

// Blocks of the x axis stand for the CTAs that may have begun a split work tile, or with kSearch
// for the work tiles themselves.
template <bool kSearch>
__device__ __forceinline__ void MergeTiles(const AttentionParams& p, const AttentionTask& task,
                                           int tile_rows, int block_rows, int ctas) {
  int k = static_cast<int>(blockIdx.x);
  if constexpr (!kSearch) {
    const SplitTile work_tile = {k, LoadHeader(task, k)};
    if (work_tile.header.x > 0) MergeTile(p, task, tile_rows, block_rows, work_tile);
  } else {
    // The host does not know how many split work tiles there are, only how many there may be.
    for (;; k += static_cast<int>(gridDim.x)) {
      const SplitTile work_tile = FindSplitTile(task, ctas, k);
      if (work_tile.header.x == 0) return;
      MergeTile(p, task, tile_rows, block_rows, work_tile);
      __syncthreads();  // the next one takes the same shared memory
    }
  }
}

// Whether clusters took the call, which then left no partial results. It does not wait for the
// attention kernel: that one had waited for what wrote the lengths before it allowed this one.
__device__ __forceinline__ bool ClustersTookCall(const AttentionParams& p,
                                                 const AttentionTask& task, int tile_rows) {
  __shared__ uint32_t working[kMaxPlanSeqs / 32];
  PdlBeginConcurrent();
  const DType keys = p.paged ? p.cache.dtype : p.ragged.dtype;
  const int kv_tile = KeysPerKvTile(p.head_dim, SizeOf(keys));
  return ClustersTakeCall<kThreads>(p, task, tile_rows, kv_tile, working);
}

template <bool kSearch>
__global__ void __launch_bounds__(kThreads)
    MergePartialsKernel(const __grid_constant__ AttentionParams p,
                        const __grid_constant__ AttentionTask task, int tile_rows, int block_rows,
                        int ctas) {
  NameParameters(p);
  if (task.finds_seqs && ClustersTookCall(p, task, tile_rows)) {
    PdlEndConcurrent();  // it is the only merge of its call, so that none begins too early
    return;
  }
  if (task.overlaps_previous) {
    PdlBeginConcurrent();
  } else {
    PdlWait();
    PdlLaunchDependents();
  }
  MergeTiles<kSearch>(p, task, tile_rows, block_rows, ctas);
  if (task.overlaps_previous) PdlEndConcurrent();
}

__global__ void __launch_bounds__(kThreads) ClearKernel(const __grid_constant__ AttentionParams p) {
  const int each = (p.seqs.num_tokens + gridDim.x - 1) / gridDim.x;
  const int begin = static_cast<int>(
      min(static_cast<int64_t>(blockIdx.x) * each, static_cast<int64_t>(p.seqs.num_tokens)));
  ClearTokens<true>(p, begin, min(begin + each, p.seqs.num_tokens));
}

__global__ void __launch_bounds__(kThreads)
    ClearPaddingKernel(const __grid_constant__ AttentionParams p) {
  PdlBeginConcurrent();
  ClearPadding<true>(p, 0, p.seqs.batch);
  PdlEndConcurrent();
}

}  // namespace

cudaError_t LaunchClear(const AttentionParams& p, cudaStream_t stream) {
  if (p.seqs.num_tokens == 0 || (!p.clear_padding && p.lse == nullptr)) return cudaSuccess;
  return LaunchKernel(ClearKernel, dim3(std::min(p.seqs.num_tokens, 1024)), dim3(kThreads), stream,
                      p);
}

cudaError_t LaunchClearPadding(const AttentionParams& p, cudaStream_t stream) {
  if (!p.clear_padding && p.lse == nullptr) return cudaSuccess;
  constexpr int kMostCtas = 128;
  return LaunchPdl(ClearPaddingKernel, dim3(std::min(p.seqs.batch, kMostCtas)), dim3(kThreads),
                   stream, p);
}

cudaError_t LaunchMergePartials(const AttentionParams& p, const AttentionTask& task, int tile_rows,
                                cudaStream_t stream) {
  const int grid = task.shares;
  const int64_t packed_rows =
      std::min<int64_t>(std::max<int64_t>(p.max_seqlen_q, 1) * task.group, task.max_packed_rows);
  const int64_t seqs = std::min(task.num_seqs, p.seqs.num_tokens);
  const int64_t work_tiles = CeilDiv(packed_rows, tile_rows) * seqs * p.num_kv_heads;
  // Where few work tiles share many CTAs, each has many partial results: then a block takes one
  // packed row alone.
  const bool few = 16 * work_tiles <= grid;
  const int fitting = std::min(kMergeRows, kThreads / (ValueDim(p.head_dim) / 4));
  const int block_rows = few ? 1 : std::min(tile_rows, fitting);
  const bool search = few && grid * tile_rows > kMostBlocks;
  const dim3 blocks(search ? static_cast<int>(work_tiles) : grid, tile_rows / block_rows);
  return LaunchPdl(search ? MergePartialsKernel<true> : MergePartialsKernel<false>, blocks,
                   dim3(kThreads), stream, p, task, tile_rows, block_rows, grid);
}

}  // namespace fastattn::cuda
