// Summaries of K. A CTA has a thread for each channel, and takes the summaries of one sequence and
// KV head that hold new tokens, one after the other. A channel's keys are added by one thread in
// the order of the tokens, which is that of the CPU's kernel.
#include <algorithm>

#include "common/block_table.h"
#include "common/fp4.h"
#include "common/group_scale.h"
#include "common/hadamard.h"
#include "common/int4.h"
#include "common/numeric.h"
#include "common/seq_lengths.h"
#include "common/static_scales.h"
#include "common/summary_score.h"
#include "cuda/block_summaries/launch.h"
#include "cuda/common/any_dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "formats/kv_format.h"

namespace fastattn::cuda {

namespace {

constexpr int kMostChannels = 256;
// CTAs that share the summaries of a sequence and KV head: a prompt has many.
constexpr int kMostShares = 64;

// Channel d of a token's K, as the cache gives it back.
template <typename Side>
__device__ __forceinline__ float LoadKey(const PagedCache& cache, int block, int head, int slot,
                                         int d) {
  using Stored = Element<Side::kCode>;
  const auto* row = static_cast<const typename Stored::Storage*>(cache.key) +
                    cache.key_strides.Row(block, head, slot);
  float x;
  if constexpr (Side::kNibbles) {
    const uint8_t byte = row[d / 2];
    x = Stored::Load(static_cast<uint8_t>(d % 2 == 0 ? byte & 0xF : byte >> 4));
  } else {
    x = Stored::Load(row[d]);
  }
  if constexpr (!Side::kQuantized) return x;
  const int64_t plane = cache.k_scale_strides.Plane(block, head);
  if constexpr (Side::kGrouped) {
    const int64_t index = plane + slot * Side::TokenScales(cache.head_dim) + d / Side::kGroup;
    return Mul(
        x, GroupScale<Side::kScaleType>::Value(static_cast<const uint8_t*>(cache.k_scales)[index]));
  } else if constexpr (Side::kDynamic) {
    return Mul(x, LoadScale(cache.k_scales, cache.scale_dtype, plane + slot));
  } else {
    const int64_t index = StaticScaleIndex(cache.k_granularity, head, d, cache.head_dim);
    return Mul(x, LoadScale(cache.k_scales, cache.scale_dtype, index));
  }
}

// HadamardRotate() of a head whose channels the threads have; `row` is shared memory.
__device__ __forceinline__ float Rotate(float x, int dim, float* row) {
  const int d = threadIdx.x, size = HadamardSize(dim);
  for (int step = 1; step < size; step *= 2) {
    row[d] = x;
    __syncthreads();
    const float a = row[d & ~step], b = row[d | step];
    __syncthreads();
    x = (d & step) == 0 ? Add(a, b) : Sub(a, b);
  }
  return Mul(x, HadamardFactor(size));
}

template <typename Side>
__global__ void __launch_bounds__(kMostChannels)
    UpdateKernel(const __grid_constant__ UpdateSummariesParams p) {
  __shared__ float row[kMostChannels];
  const int head = blockIdx.x % p.cache.num_kv_heads, b = blockIdx.x / p.cache.num_kv_heads;
  const int d = threadIdx.x, dim = p.cache.head_dim, tokens = p.summaries.Tokens();
  const SeqMeta& seqs = p.seqs;
  PdlWait();
  PdlLaunchDependents();
  const int64_t count = WrittenTokens<int64_t>(seqs.cu_seqlens_q[b], seqs.cu_seqlens_q[b + 1],
                                               seqs.seq_lens_this_time[b], seqs.num_tokens)
                            .count;
  if (count == 0) return;
  const int64_t cached = NewTokenPosition<int64_t>(seqs.seq_lens_decoder[b], 0);
  const int64_t end =
      Least<int64_t>(cached + count, static_cast<int64_t>(seqs.max_blocks) * kBlockSize);
  for (int64_t begin = (cached / tokens + blockIdx.y) * tokens; begin < end;
       begin += static_cast<int64_t>(gridDim.y) * tokens) {
    const int block =
        BlockOf(seqs.block_tables, seqs.max_blocks, p.cache.num_blocks, b, begin / kBlockSize);
    if (block < 0) continue;
    const int slot = static_cast<int>(begin % kBlockSize);
    const int keys = static_cast<int>(Least<int64_t>(tokens, end - begin));
    const int place = static_cast<int>(begin % p.summaries.granularity);
    float first = 0.0f, second = 0.0f;
    for (int t = 0; t < keys; ++t) {
      float x = LoadKey<Side>(p.cache, block, head, slot + t, d);
      if (p.transform.rotation == KeyRotation::kHadamard) x = Rotate(x, dim, row);
      if (p.transform.center != nullptr) x = Add(x, p.transform.center[head * dim + d]);
      if (p.summaries.kind == SummaryKind::kMinMax) {
        x = Add(x, 0.0f);  // of equal zeros, always +0
        first = t == 0 ? x : LeastOrNaN(first, x);
        second = t == 0 ? x : MostOrNaN(second, x);
      } else {
        if (p.summaries.kind == SummaryKind::kPooled) {
          const int64_t weight =
              (static_cast<int64_t>(head) * p.summaries.granularity + place + t) * dim + d;
          x = Mul(p.pool_weights[weight], x);
        }
        first = t == 0 ? x : Add(first, x);
      }
    }
    if (p.summaries.kind == SummaryKind::kMean) first = Div(first, static_cast<float>(keys));
    const int64_t at = p.summaries.At(block, head, slot / tokens) + d;
    StoreAny(first, p.summaries.dtype, p.summaries.data, at);
    if (p.summaries.kind == SummaryKind::kMinMax) {
      StoreAny(second, p.summaries.dtype, p.summaries.data, at + dim);
    }
  }
}

}  // namespace

cudaError_t LaunchUpdateSummaries(const UpdateSummariesParams& p, cudaStream_t stream) {
  if (p.seqs.batch == 0 || p.seqs.max_blocks == 0 || p.cache.num_blocks == 0) return cudaSuccess;
  const int64_t most =
      static_cast<int64_t>(p.seqs.max_blocks) * (kBlockSize / p.summaries.Tokens());
  const dim3 grid(GridSize(static_cast<int64_t>(p.seqs.batch) * p.cache.num_kv_heads),
                  static_cast<unsigned>(std::min<int64_t>(most, kMostShares)));
  cudaError_t status = cudaErrorInvalidValue;
  DispatchFormat(p.cache.type, p.cache.dtype, [&](auto format) {
    using Side = typename decltype(format)::Key;
    status = LaunchPdl(UpdateKernel<Side>, grid, dim3(p.cache.head_dim), stream, p);
  });
  return status;
}

}  // namespace fastattn::cuda
