// Merges the partial results of items whose keys several groups took, and clears the tokens of no
// sequence.
#include <algorithm>

#include "cuda/common/convert.cuh"
#include "cuda/common/exp2.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/mla/dense/finish.cuh"
#include "cuda/mla/dense/launch.h"
#include "cuda/mla/dense/schedule.cuh"

namespace fastattn::cuda::mla_dense {

namespace {

constexpr int kChannelThreads = 128;  // of a row, four channels each
constexpr int kQuarters = 4;          // each has every fourth partial result
constexpr int kThreads = kChannelThreads * kQuarters;
// CTAs of a tile's rows: at least so many, and more where few items can be split.
constexpr int kRowCtas = 16;
constexpr int64_t kCtas = 2048;
static_assert(kMlaDenseMaxGroups <= kThreads);

// An item whose keys several groups took.
struct Noted {
  int group = -1;  // the first of them; -1: there is no such item
  int4 note = {};
};

struct Shared {
  int noted[kThreads / 32];
  int4 note;
  int group;
  float weights[kThreads];
  float warps[kThreads / 32];
  float4 parts[kQuarters - 1][kChannelThreads];
};

// In all threads. A NaN stays one.
template <typename F>
__device__ __forceinline__ float OfCta(float x, float (&warps)[kThreads / 32], F&& f) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = f(x, __shfl_xor_sync(kFullWarp, x, step));
  __syncthreads();  // the values before are no longer read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) x = f(x, warps[i]);
  return x;
}

// Row `row` of the tile that CTA `sub` of a group has.
__device__ __forceinline__ void CombineRow(const MlaDenseParams& p, const MlaDensePlan& plan,
                                           const Workspace& workspace, int group, int sub, int row,
                                           const int4& note, Shared& shared) {
  const int count = note.x + 1, thread = threadIdx.x;
  const int in_seq = note.z + sub * plan.tile_rows + row;
  if (in_seq >= note.w) return;
  const auto at_of = [&](int i) {
    const int64_t cta = int64_t{group + i} * plan.group_ctas + sub;
    return PartialSlot(cta, i > 0) * plan.tile_rows + row;
  };
  const float lse = thread < count ? workspace.lse[at_of(thread)] : -INFINITY;
  const float maximum =
      OfCta(lse, shared.warps, [](float a, float b) { return a > b || a != a ? a : b; });
  const float weight = thread < count ? Exp2(lse - (maximum == -INFINITY ? 0.0f : maximum)) : 0.0f;
  shared.weights[thread] = weight;
  const float sum = OfCta(weight, shared.warps, [](float a, float b) { return a + b; });
  const int quarter = thread / kChannelThreads, lane = thread % kChannelThreads;
  float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int i = quarter; i < count; i += kQuarters) {
    const float4 part =
        reinterpret_cast<const float4*>(workspace.partial + at_of(i) * kMlaDenseChannels)[lane];
    const float factor = shared.weights[i];
    out.x += factor * part.x;
    out.y += factor * part.y;
    out.z += factor * part.z;
    out.w += factor * part.w;
  }
  if (quarter > 0) shared.parts[quarter - 1][lane] = out;
  __syncthreads();
  if (quarter > 0) return;
#pragma unroll
  for (int i = 0; i < kQuarters - 1; ++i) {
    const float4 part = shared.parts[i][lane];
    out.x += part.x;
    out.y += part.y;
    out.z += part.z;
    out.w += part.w;
  }
  const int head = in_seq % p.heads, token = note.y + in_seq / p.heads;
  const Normaliser end = FinishRow(p, maximum, sum, head);
  const int64_t at = (int64_t{token} * p.heads + head) * kMlaDenseChannels;
  StoreFour(p, at + 4 * lane, out, end.factor);
  if (lane == 0) StoreLse(p, token, head, end.lse);
}

// Clears a token if it belongs to no sequence. Every warp looks for itself.
__device__ __forceinline__ void ClearToken(const MlaDenseParams& p, int token) {
  bool taken = false;
  for (int b = threadIdx.x % 32; b < p.seqs.batch; b += 32) {
    const TokenRange<int> tokens = RaggedTokens(
        __ldg(p.seqs.cu_seqlens_q + b), __ldg(p.seqs.cu_seqlens_q + b + 1), p.seqs.num_tokens);
    const int count = NewTokens(__ldg(p.seqs.seq_lens_this_time + b), tokens.count);
    taken = taken || (token >= tokens.begin && token < tokens.begin + count);
  }
  if (__any_sync(kFullWarp, taken)) return;
  if (p.clear_padding) {
    const int64_t first = int64_t{token} * p.heads * kMlaDenseChannels;
    for (int i = threadIdx.x; i < p.heads * kChannelThreads; i += kThreads) {
      StoreFour(p, first + 4 * i, make_float4(0.0f, 0.0f, 0.0f, 0.0f), 1.0f);
    }
  }
  if (p.lse != nullptr && threadIdx.x < p.heads) StoreLse(p, token, threadIdx.x, -INFINITY);
}

__device__ __forceinline__ int4 LoadNote(const Workspace& workspace, int group) {
  return *reinterpret_cast<const int4*>(workspace.notes + group * kMlaDenseNoteInts);
}

// The `which`-th noted item; *count: all of them. All threads call it.
__device__ __forceinline__ Noted FindNoted(const Workspace& workspace, int groups, int which,
                                           Shared& shared, int* count) {
  const int group = threadIdx.x, lane = group % 32, warp = group / 32;
  const int4 note = group < groups ? LoadNote(workspace, group) : int4{};
  const uint32_t votes = __ballot_sync(kFullWarp, note.x != 0);
  __syncthreads();  // what the item before left is no longer read
  if (lane == 0) shared.noted[warp] = __popc(votes);
  if (group == 0) shared.group = -1;
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1));
  *count = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    before += w < warp ? shared.noted[w] : 0;
    *count += shared.noted[w];
  }
  if (note.x != 0 && before == which) {
    shared.group = group;
    shared.note = note;
  }
  __syncthreads();
  return {shared.group, shared.note};
}

// CTAs (x, y): y of the rows' CTAs times the tile of x = item * group_ctas + sub, items counted as
// they were noted. Those with y past them clear tokens.
__global__ void __launch_bounds__(kThreads, 2048 / kThreads)
    CombineKernel(const __grid_constant__ MlaDenseParams p,
                  const __grid_constant__ MlaDensePlan plan, int row_ctas) {
  PdlWait();
  if (static_cast<int>(blockIdx.y) >= row_ctas) {
    const int64_t step = int64_t{gridDim.x} * (gridDim.y - row_ctas);
    for (int64_t token = blockIdx.x + int64_t{gridDim.x} * (blockIdx.y - row_ctas);
         token < p.seqs.num_tokens; token += step) {
      ClearToken(p, static_cast<int>(token));
    }
    return;
  }
  const Workspace workspace = WorkspaceOf(p, plan);
  __shared__ Shared shared;
  const int sub = blockIdx.x % plan.group_ctas, step = gridDim.x / plan.group_ctas;
  int count = step;  // of noted items, as far as known
  for (int item = blockIdx.x / plan.group_ctas; item < count; item += step) {
    // Where every group may have noted one there is nothing to count.
    const Noted noted = step == plan.groups
                            ? Noted{item, LoadNote(workspace, item)}
                            : FindNoted(workspace, plan.groups, item, shared, &count);
    if (noted.group < 0 || noted.note.x == 0) return;
    for (int row = blockIdx.y; row < plan.tile_rows; row += row_ctas) {
      CombineRow(p, plan, workspace, noted.group, sub, row, noted.note, shared);
    }
  }
}

}  // namespace

cudaError_t LaunchCombine(const MlaDenseParams& p, const MlaDensePlan& plan, cudaStream_t stream) {
  const int64_t rows =
      std::min<int64_t>(plan.tile_rows, std::max<int64_t>(int64_t{p.max_seqlen_q} * p.heads, 1));
  // No more items are split than there are, and one between two groups.
  const int64_t tile = int64_t{plan.tile_rows} * plan.group_ctas, tokens = p.seqs.num_tokens;
  const int64_t most = tokens * p.heads + std::min<int64_t>(p.seqs.batch, tokens) * (tile - 1);
  const int64_t items = std::clamp<int64_t>(most / tile, 1, plan.groups);
  const int columns = static_cast<int>(items) * plan.group_ctas;
  const int row_ctas =
      static_cast<int>(std::min(rows, std::max<int64_t>(kRowCtas, kCtas / columns)));
  const bool clears = p.clear_padding || p.lse != nullptr;
  const int clearing =
      clears ? static_cast<int>(std::min<int64_t>((p.seqs.num_tokens + columns - 1) / columns, 16))
             : 0;
  return LaunchPdl(CombineKernel, dim3(columns, row_ctas + clearing), dim3(kThreads), stream, p,
                   plan, row_ctas);
}

}  // namespace fastattn::cuda::mla_dense
