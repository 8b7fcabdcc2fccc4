// Merges the partial results of items whose keys several groups took, and clears the tokens of no
// sequence.
#include <algorithm>

#include "cuda/common/exp2.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/mla/attention/finish.cuh"
#include "cuda/mla/attention/launch.h"
#include "cuda/mla/attention/schedule.cuh"

namespace fastattn::cuda::mla_attention {

namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kStrips = 4;  // of a row: 128 channels, four a lane, for a warp
constexpr int kStripChannels = kMlaAttentionChannels / kStrips;
constexpr int kRowThreads = 32 * kStrips;
static_assert(kStripChannels == 4 * 32);
// Warps that share the partial results of a strip, where there are many. Other rows fill the CTA.
constexpr int kMostPartWarps = kWarps / kStrips;
// Partial results that a lane asks for together.
constexpr int kChunk = 4;
// CTAs of all tiles' rows, at most about so many.
constexpr int64_t kCtas = 528;
static_assert(kMlaAttentionMaxGroups <= kThreads);

// An item whose keys several groups took.
struct Noted {
  int group = -1;  // the first of them; -1: there is no such item
  int4 note = {};
};

struct Shared {
  int noted[kWarps];
  int4 note;
  int group;
  float weights[kWarps][kMlaAttentionMaxGroups];
  float4 parts[kMostPartWarps - 1][kRowThreads];
};

// In all lanes. A NaN stays one.
__device__ __forceinline__ float MaxOfWarp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, x, step);
    x = x > other || x != x ? x : other;
  }
  return x;
}

// What a row's partial results count, found by each warp for itself: it has to wait for no other.
struct Weights {
  float maximum;
  float sum;
};

// Leaves the weight of each of `count` partial results in `weights`. lse(i) loads an LSE.
template <class Load>
__device__ __forceinline__ Weights FindWeights(int count, const Load& lse, float* weights) {
  const int lane = threadIdx.x % 32;
  const float first = lane < count ? lse(lane) : -INFINITY;
  float maximum = first;
  for (int i = lane + 32; i < count; i += 32) {
    const float other = lse(i);
    weights[i] = other;
    maximum = maximum > other || maximum != maximum ? maximum : other;
  }
  maximum = MaxOfWarp(maximum);
  const float shift = maximum == -INFINITY ? 0.0f : maximum;
  float sum = Exp2(first - shift);
  if (lane < count) weights[lane] = sum;
  for (int i = lane + 32; i < count; i += 32) {
    const float weight = Exp2(weights[i] - shift);
    weights[i] = weight;
    sum += weight;
  }
  sum = SumOfWarp(sum);
  __syncwarp();
  return {maximum, sum};
}

// Merges a CTA's rows, as many side by side as its warps can take, of the tile that CTA `sub` of a
// group has. A row takes `part_warps` warps a strip: one function for any number of them, since
// more code would be fetched where a call is hardly longer than that takes.
__device__ __forceinline__ void MergeRows(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                                          const Workspace& workspace, const Noted& noted, int sub,
                                          int row_ctas, Shared& shared) {
  // Workspaces have few enough rows that an int counts their numbers.
  static_assert(int64_t{kMlaAttentionMaxGroups} * 2 * 2 * 128 * kMlaAttentionChannels < INT32_MAX);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int count = noted.note.x + 1, first_row = noted.note.z + sub * plan.tile_rows;
  const int part_warps = count <= kChunk ? 1 : count <= 2 * kChunk ? 2 : kMostPartWarps;
  const int rows_at_once = kMostPartWarps / part_warps;
  const int strip = warp % kStrips, strips_before = warp / kStrips;
  const int part_warp = strips_before & (part_warps - 1), slot = strips_before / part_warps;
  const int rows = min(plan.tile_rows, noted.note.w - first_row);
  const int column = strip * kStripChannels + 4 * lane;
  const int cta = noted.group * plan.group_ctas + sub, step = 2 * plan.group_ctas * plan.tile_rows;
  // Row `i` of the workspace behind that of the first CTA: see PartialSlot.
  const auto behind = [&](int i) { return i > 0 ? i * step : plan.tile_rows; };
#pragma unroll 1
  for (int begin = blockIdx.y * rows_at_once; begin < rows; begin += row_ctas * rows_at_once) {
    const int row = begin + slot;
    const bool present = row < rows;
    float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    Weights found = {};
    if (present) {
      // The first partial results are under way with the LSEs that tell what they count.
      float4 parts[kChunk];
      const int first = static_cast<int>(PartialSlot(cta, true)) * plan.tile_rows + row;
      const float* partial = workspace.partial + first * kMlaAttentionChannels + column;
      const auto load = [&](int from) {
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const int i = from + part_warps * k;
          if (i < count) {
            parts[k] =
                *reinterpret_cast<const float4*>(partial + behind(i) * kMlaAttentionChannels);
          }
        }
      };
      load(part_warp);
      float* weights = shared.weights[warp];
      __syncwarp();  // the row before is no longer read
      found = FindWeights(count, [&](int i) { return workspace.lse[first + behind(i)]; }, weights);
#pragma unroll 1
      for (int from = part_warp; from < count; from += part_warps * kChunk) {
        if (from != part_warp) load(from);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const int i = from + part_warps * k;
          if (i >= count) break;
          const float weight = weights[i];
          out.x += weight * parts[k].x;
          out.y += weight * parts[k].y;
          out.z += weight * parts[k].z;
          out.w += weight * parts[k].w;
        }
      }
    }
    if (part_warps > 1) {
      const int at = slot * kRowThreads + threadIdx.x % kRowThreads;
      __syncthreads();  // the rows before are no longer read
      if (part_warp > 0) shared.parts[part_warp - 1][at] = out;
      __syncthreads();
      if (part_warp > 0) continue;
#pragma unroll 1
      for (int i = 0; i < part_warps - 1; ++i) {
        const float4 part = shared.parts[i][at];
        out.x += part.x;
        out.y += part.y;
        out.z += part.z;
        out.w += part.w;
      }
    }
    if (!present) continue;
    const int in_seq = first_row + row;
    const int head = in_seq % p.heads, token = noted.note.y + in_seq / p.heads;
    const Normaliser end = FinishRow(p, found.maximum, found.sum, head);
    const int64_t at = (int64_t{token} * p.heads + head) * kMlaAttentionChannels;
    StoreFour(p, at + column, out, end.factor);
    if (strip == 0 && lane == 0) StoreLse(p, token, head, end.lse);
  }
}

// Clears a token if it belongs to no sequence. Every warp looks for itself.
__device__ __forceinline__ void ClearToken(const MlaAttentionParams& p, int token) {
  bool taken = false;
  for (int b = threadIdx.x % 32; b < p.seqs.batch; b += 32) {
    const TokenRange<int> tokens = RaggedTokens(
        __ldg(p.seqs.cu_seqlens_q + b), __ldg(p.seqs.cu_seqlens_q + b + 1), p.seqs.num_tokens);
    const int count = NewTokens(__ldg(p.seqs.seq_lens_this_time + b), tokens.count);
    taken = taken || (token >= tokens.begin && token < tokens.begin + count);
  }
  if (__any_sync(kFullWarp, taken)) return;
  if (p.clear_padding) {
    const int64_t first = int64_t{token} * p.heads * kMlaAttentionChannels;
    for (int i = threadIdx.x; i < p.heads * kRowThreads; i += kThreads) {
      StoreFour(p, first + 4 * i, make_float4(0.0f, 0.0f, 0.0f, 0.0f), 1.0f);
    }
  }
  if (p.lse != nullptr && threadIdx.x < p.heads) StoreLse(p, token, threadIdx.x, -INFINITY);
}

__device__ __forceinline__ int4 LoadNote(const Workspace& workspace, int group) {
  return *reinterpret_cast<const int4*>(workspace.notes + group * kMlaAttentionNoteInts);
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
__global__ void __launch_bounds__(kThreads, 2)
    MergeKernel(const __grid_constant__ MlaAttentionParams p,
                const __grid_constant__ MlaAttentionPlan plan, int row_ctas) {
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
    MergeRows(p, plan, workspace, noted, sub, row_ctas, shared);
  }
}

}  // namespace

cudaError_t LaunchMerge(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                        cudaStream_t stream) {
  const int64_t rows =
      std::min<int64_t>(plan.tile_rows, std::max<int64_t>(int64_t{p.max_seqlen_q} * p.heads, 1));
  // No more items are split than there are, and one between two groups.
  const int64_t tile = int64_t{plan.tile_rows} * plan.group_ctas, tokens = p.seqs.num_tokens;
  const int64_t most = tokens * p.heads + std::min<int64_t>(p.seqs.batch, tokens) * (tile - 1);
  const int64_t items = std::clamp<int64_t>(most / tile, 1, plan.groups);
  const int columns = static_cast<int>(items) * plan.group_ctas;
  const int row_ctas = static_cast<int>(std::min(rows, std::max<int64_t>(kCtas / columns, 1)));
  const bool clears = p.clear_padding || p.lse != nullptr;
  const int clearing =
      clears ? static_cast<int>(std::min<int64_t>((p.seqs.num_tokens + columns - 1) / columns, 16))
             : 0;
  return LaunchPdl(MergeKernel, dim3(columns, row_ctas + clearing), dim3(kThreads), stream, p, plan,
                   row_ctas);
}

}  // namespace fastattn::cuda::mla_attention
