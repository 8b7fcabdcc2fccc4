// Lists of key blocks: a kernel for the scores, the top-k of topk_indices, and a kernel that writes
// the lists. A warp scores a key block; its lanes are the sums of common/summary_score.h, so that
// scores have the bits of the CPU's kernel.
#include <algorithm>

#include "common/block_table.h"
#include "common/numeric.h"
#include "common/seq_lengths.h"
#include "common/summary_score.h"
#include "cuda/block_summaries/launch.h"
#include "cuda/common/any_dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMostParts = 32;     // CTAs of a row
constexpr int kBlocksOfPart = 64;  // key blocks that are worth a CTA
constexpr int kNone = 0x7FFFFFFF;
constexpr unsigned kWarp = 0xFFFFFFFFu;
// Channels of a lane, at most.
constexpr int kChannels = 256 / kScoreLanes;
static_assert(kScoreLanes == 32, "a lane has one of the sums");

__device__ __forceinline__ float LoadSummary(const BlockSummaries& from, int64_t index) {
  return LoadScale(from.data, from.dtype, index);
}

// Where a query token belongs: the first sequence that claims it; -1 if none does. All threads of
// a CTA take part; `found` is shared memory.
struct Place {
  int batch_idx;
  int64_t position;
};

__device__ __forceinline__ TokenRange<int64_t> TokensOf(const SeqMeta& seqs, int b) {
  const auto own =
      RaggedTokens<int64_t>(seqs.cu_seqlens_q[b], seqs.cu_seqlens_q[b + 1], seqs.num_tokens);
  return {own.begin, NewTokens<PlainForm, int64_t>(seqs.seq_lens_this_time[b], own.count)};
}

__device__ __forceinline__ Place FindPlace(const SeqMeta& seqs, int token, int* found) {
  if (threadIdx.x == 0) *found = kNone;
  __syncthreads();
  for (int b = threadIdx.x; b < seqs.batch; b += kThreads) {
    const TokenRange<int64_t> own = TokensOf(seqs, b);
    if (token >= own.begin && token < own.begin + own.count) atomicMin(found, b);
  }
  __syncthreads();
  const int b = *found;
  if (b == kNone) return {-1, 0};
  const TokenRange<int64_t> own = TokensOf(seqs, b);
  const int64_t most = static_cast<int64_t>(seqs.max_blocks) * kBlockSize;
  const int64_t keys = PagedKeys<PlainForm, int64_t>(seqs.seq_lens_decoder[b], own.count, most);
  return {b, keys - own.count + (token - own.begin)};
}

// A lane's channels of a key block's summary; false if none of its blocks is assigned.
__device__ __forceinline__ bool LoadBlock(const SelectBlocksParams& p, int batch_idx, int head,
                                          int64_t key_block, float (&first)[kChannels],
                                          float (&second)[kChannels]) {
  const BlockSummaries& from = p.summaries;
  const SeqMeta& seqs = p.attention.seqs;
  const int lane = threadIdx.x % 32, dim = from.head_dim;
  const bool bounds = from.kind == SummaryKind::kMinMax;
  bool any = false;
  for (int i = 0; i < from.Parts(); ++i) {
    const int64_t position = key_block * from.granularity + i * from.Tokens();
    const int block = BlockOf(seqs.block_tables, seqs.max_blocks, from.num_blocks, batch_idx,
                              position / kBlockSize);
    if (block < 0) continue;
    const int64_t at =
        from.At(block, head, static_cast<int>(position % kBlockSize) / from.Tokens());
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int d = lane + 32 * c;
      if (d >= dim) continue;
      const float x = LoadSummary(from, at + d);
      const float y = bounds ? LoadSummary(from, at + dim + d) : 0.0f;
      if (!any) {
        first[c] = x, second[c] = y;
      } else if (bounds) {
        first[c] = LeastOrNaN(first[c], x), second[c] = MostOrNaN(second[c], y);
      } else {
        first[c] = from.kind == SummaryKind::kMean ? MeanOfTwo(first[c], x) : Add(first[c], x);
      }
    }
    any = true;
  }
  return any;
}

// The score of a key block for a KV head's query heads, in all lanes.
__device__ __forceinline__ float Score(const SelectBlocksParams& p, int token, int batch_idx,
                                       int head, const float (&first)[kChannels],
                                       const float (&second)[kChannels]) {
  const AttentionParams& a = p.attention;
  const int lane = threadIdx.x % 32, dim = p.summaries.head_dim;
  const int group = a.num_heads / a.num_kv_heads;
  const bool bounds = p.summaries.kind == SummaryKind::kMinMax;
  float result = 0.0f;
  for (int r = 0; r < group; ++r) {
    const int64_t query_head = static_cast<int64_t>(head) * group + r;
    const int64_t at = token * a.q_token_stride + query_head * a.q_head_stride;
    float scale = 1.0f;
    const bool scales = a.q_descale.data != nullptr;
    if (scales) {
      scale = LoadScale(a.q_descale.data, a.q_descale.dtype,
                        a.q_descale.Index(token, batch_idx, head, query_head));
    }
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int d = lane + 32 * c;
      if (d >= dim) continue;
      float q = LoadAny(a.q, a.q_dtype, at + d);
      if (scales) q = Mul(q, scale);
      sum = Add(sum, bounds ? BoundOfProduct(q, first[c], second[c]) : Mul(q, first[c]));
    }
#pragma unroll
    for (int half = 16; half > 0; half /= 2) sum = Add(sum, __shfl_xor_sync(kWarp, sum, half));
    if (r == 0) {
      result = sum;
    } else {
      result = p.reduction == ScoreReduction::kMax ? MostOrNaN(result, sum) : Add(result, sum);
    }
  }
  return result;
}

// A CTA takes every gridDim.y-th group of kWarps key blocks of a query token and KV head.
__global__ void __launch_bounds__(kThreads)
    ScoreKernel(const __grid_constant__ SelectBlocksParams p,
                const __grid_constant__ SelectBlocksWork work) {
  __shared__ int found;
  const AttentionParams& a = p.attention;
  const int head = blockIdx.x % a.num_kv_heads;
  const int token = work.begin + static_cast<int>(blockIdx.x / a.num_kv_heads);
  const int64_t row = blockIdx.x;
  PdlWait();
  PdlLaunchDependents();
  const Place place = FindPlace(a.seqs, token, &found);
  const bool owned = place.batch_idx >= 0;
  const SeenBlocks seen = SeenBlocksOf(p, owned ? place.position / p.summaries.granularity + 1 : 0);
  if (threadIdx.x == 0 && blockIdx.y == 0) {
    work.ends[row] = static_cast<int>(seen.end);
    work.starts[row] = static_cast<int>(seen.first);
    work.lengths[row] = static_cast<int>(seen.Between());
  }
  // Otherwise all of them are taken, or none.
  if (seen.Between() <= p.Scored() || p.Scored() == 0) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t i = seen.first + blockIdx.y * kWarps + warp; i < seen.end - seen.last;
       i += static_cast<int64_t>(gridDim.y) * kWarps) {
    float first[kChannels] = {}, second[kChannels] = {};
    float score = __int_as_float(0x7FC00000);  // NaN: after all others
    if (LoadBlock(p, place.batch_idx, head, i, first, second)) {
      score = Score(p, token, place.batch_idx, head, first, second);
    }
    if (lane == 0) work.scores[row * work.columns + i] = score;
  }
}

// A CTA writes the list of a query token and KV head.
__global__ void __launch_bounds__(kThreads)
    ListKernel(const __grid_constant__ SelectBlocksParams p,
               const __grid_constant__ SelectBlocksWork work) {
  PdlWait();
  PdlLaunchDependents();
  const int64_t row = blockIdx.x;
  const SeenBlocks seen = SeenBlocksOf(p, work.ends[row]);
  const int scored = p.Scored();
  const bool all = seen.Between() <= scored;
  const int64_t middle = all ? seen.Between() : scored;
  const int64_t rows = static_cast<int64_t>(work.begin) * p.attention.num_kv_heads;
  int* out = p.selected + (rows + row) * p.k;
  for (int i = threadIdx.x; i < p.k; i += kThreads) {
    const int64_t in_middle = i - seen.first, in_last = in_middle - middle;
    int64_t entry = -1;
    if (in_middle < 0) {
      entry = i;
    } else if (in_last < 0) {
      entry = seen.first + (all ? in_middle : work.chosen[row * scored + in_middle]);
    } else if (in_last < seen.last) {
      entry = seen.end - seen.last + in_last;
    }
    out[i] = static_cast<int>(entry);
  }
}

int64_t Rows(const SelectBlocksParams& p, const SelectBlocksWork& work) {
  return static_cast<int64_t>(work.count) * p.attention.num_kv_heads;
}

}  // namespace

cudaError_t LaunchBlockScores(const SelectBlocksParams& p, const SelectBlocksWork& work,
                              cudaStream_t stream) {
  const int64_t parts = std::clamp<int64_t>(work.columns / kBlocksOfPart, 1, kMostParts);
  return LaunchPdl(ScoreKernel, dim3(GridSize(Rows(p, work)), static_cast<unsigned>(parts)),
                   dim3(kThreads), stream, p, work);
}

cudaError_t LaunchBlockLists(const SelectBlocksParams& p, const SelectBlocksWork& work,
                             cudaStream_t stream) {
  return LaunchPdl(ListKernel, dim3(GridSize(Rows(p, work))), dim3(kThreads), stream, p, work);
}

}  // namespace fastattn::cuda
