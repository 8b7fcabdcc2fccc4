// A CTA takes a sequence. Its warps share the table's entries in contiguous parts, so that their
// order stays: each counts the assigned blocks of its part and writes behind those of the warps
// before it. A lane holds up to kItems entries, whose loads are all under way at once: a sequence
// of a million tokens is one round.
#include <algorithm>

#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/compact_tables/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 16;  // entries of a thread in a round
constexpr int kRound = kThreads * kItems;

// Assigned blocks of all warps, and of those before the calling thread's. `counts` are those of
// each warp.
struct WarpTotals {
  int before;
  int all;
};

__device__ __forceinline__ WarpTotals SumWarps(const int* counts) {
  static_assert(kWarps == 32, "a lane has a warp's count");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int count = counts[lane];
  return {__reduce_add_sync(kFullWarp, lane < warp ? count : 0),
          __reduce_add_sync(kFullWarp, count)};
}

// Writes the sequence's assigned blocks to the front of `to`, and with kCounts how many are before
// each entry; returns their number.
template <bool kCounts>
__device__ __forceinline__ int Compact(const CompactTablesParams& p, const CompactSeq& seq,
                                       const int* table, int* to, int* before, int* counts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t lower = (1u << lane) - 1;
  int written = 0;
#pragma unroll 1
  for (int base = seq.first; base < seq.end; base += min(kRound, seq.end - base)) {
    const int size = min(seq.end - base, kRound);
    const int steps = (size + kThreads - 1) / kThreads;  // of a warp, 32 entries each
    const int first = warp * (steps * 32) + lane;
    int blocks[kItems];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = first + i * 32;
      blocks[i] = i < steps && at < size ? __ldg(table + base + at) : -1;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      count += __popc(__ballot_sync(kFullWarp, IsAssignedBlock(blocks[i], p.num_blocks)));
    }
    __syncthreads();  // the counts of the round before have been read
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    const WarpTotals totals = SumWarps(counts);
    int place = written + totals.before;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool assigned = IsAssignedBlock(blocks[i], p.num_blocks);
      const uint32_t found = __ballot_sync(kFullWarp, assigned);
      const int at = first + i * 32, mine = place + __popc(found & lower);
      if (assigned) to[mine] = blocks[i];
      if (kCounts && i < steps && at < size) before[base + at] = mine;
      place += __popc(found);
    }
    written += totals.all;
  }
  if (kCounts && threadIdx.x == 0) before[seq.end] = written;
  return written;
}

// Tokens [begin, end), which belong to no sequence, see nothing.
__device__ __forceinline__ void ClearMasks(const CompactTablesParams& p, int begin, int end) {
  int2* masks = reinterpret_cast<int2*>(p.local_masks);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    masks[i] = make_int2(0, 0);
  }
}

template <bool kMasks>
__global__ void __launch_bounds__(kThreads)
    CompactKernel(const __grid_constant__ CompactTablesParams p) {
  __shared__ int counts[kWarps];
  const int b = blockIdx.x, num_tokens = p.seqs.num_tokens;
  PdlWait();
  PdlLaunchDependents();
  if (b >= p.seqs.batch) {  // there is no sequence
    if constexpr (kMasks) ClearMasks(p, 0, num_tokens);
    return;
  }
  const CompactSeq seq = p.SeqOf(b);
  const int64_t max_blocks = p.seqs.max_blocks;
  const int* table = p.seqs.block_tables + b * max_blocks;
  int* to = p.tables + b * max_blocks;
  int* before = kMasks ? p.before + b * (max_blocks + 1) : nullptr;
  const int count = Compact<kMasks>(p, seq, table, to, before, counts);
  for (int64_t i = count + static_cast<int>(threadIdx.x); i < max_blocks; i += kThreads) to[i] = -1;
  if (threadIdx.x == 0) p.seq_lens[b] = max(p.LocalKeys(seq, table, count) - seq.q_len, 0);
  if constexpr (kMasks) {
    __syncthreads();  // all of `before` has been written
    int2* masks = reinterpret_cast<int2*>(p.local_masks) + seq.q_begin;
    for (int i = threadIdx.x; i < seq.q_len; i += kThreads) {
      const KeyRange<int> keys = p.LocalMask(seq, before, i);
      masks[i] = make_int2(keys.begin, keys.end);
    }
    if (b == 0) ClearMasks(p, 0, RaggedBegin(p.seqs.cu_seqlens_q[0], num_tokens));
    const int next =
        b + 1 == p.seqs.batch ? num_tokens : min(p.seqs.cu_seqlens_q[b + 1], num_tokens);
    ClearMasks(p, seq.q_begin + seq.q_len, next);
  }
}

}  // namespace

cudaError_t LaunchCompactBlockTables(const CompactTablesParams& p, cudaStream_t stream) {
  const bool masks = p.local_masks != nullptr;
  if (p.seqs.batch == 0 && !(masks && p.seqs.num_tokens > 0)) return cudaSuccess;
  const auto kernel = masks ? CompactKernel<true> : CompactKernel<false>;
  return LaunchPdl(kernel, dim3(GridSize(std::max(p.seqs.batch, 1))), dim3(kThreads), stream, p);
}

}  // namespace fastattn::cuda
