// topk_indices on a GPU: one kernel, a CTA or a cluster for each row.
//
// Every CTA collects the candidates of its share of the row's columns (collect.cuh), the cluster
// finds the threshold (select.cuh), and every CTA writes the indices of what it has above it, at
// the place that the counts of the CTAs before it give. Nothing depends on the order in which
// threads or CTAs run, so that the result is the same at every run, and the CPU's.
#include <stdexcept>
#include <string>

#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/topk/collect.cuh"
#include "cuda/topk/launch.h"
#include "cuda/topk/select.cuh"

namespace fastattn::cuda {

namespace {

struct TopkShared {
  uint32_t words[kTopkWords];
  TopkScratch scratch;
};
static_assert(2 * sizeof(TopkShared) + 2 * 1024 <= 228 * 1024, "two CTAs a multiprocessor");

// Sums over the cluster's CTAs before this one: of the larger ones, and of the equal ones.
__device__ __forceinline__ uint2 ChosenBefore(TopkScratch* scratch, int cluster) {
  uint2 before = make_uint2(0, 0);
  if (cluster == 1) return before;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  ArriveAtCluster();
  WaitForCluster();
  const uint32_t rank = ClusterRank(), address = SharedAddress(scratch->chosen);
  for (uint32_t r = 0; r < rank; ++r) {
    uint32_t larger, equal;
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(larger), "=r"(equal)
                 : "r"(AddressInCluster(r, address))
                 : "memory");
    before.x += larger, before.y += equal;
  }
  ArriveAtCluster();  // no CTA ends while others read its counts
  WaitForCluster();
#endif
  return before;
}

// Candidates that a warp looks at in the output: a contiguous share, so that order is kept.
__device__ __forceinline__ int2 WarpShare(const TopkCandidates& candidates) {
  const int warp = threadIdx.x / 32, size = candidates.end - candidates.begin;
  const int share = (size + kTopkWarps - 1) / kTopkWarps;
  const int begin = min(warp * share, size);
  return make_int2(candidates.begin + begin, candidates.begin + min(begin + share, size));
}

// Writes the chosen candidates' columns; `columns` is null where a candidate's place tells it.
__device__ __forceinline__ void WriteChosen(const TopkCandidates& candidates,
                                            const int32_t* columns, int first_column,
                                            const TopkThreshold& threshold, int cluster,
                                            int32_t* out, TopkScratch* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t lower = (1u << lane) - 1;
  const int2 share = WarpShare(candidates);
  uint32_t larger = 0, equal = 0;  // of this lane, then of the warp
#pragma unroll 4
  for (int i = share.x + lane; i < share.y; i += 32) {
    const uint32_t key = candidates.keys[i];
    larger += threshold.Larger(key);
    equal += threshold.Equal(key);
  }
  larger = __reduce_add_sync(kFullWarp, larger);
  equal = __reduce_add_sync(kFullWarp, equal);
  if (lane == 0) scratch->warp_sums[0][warp] = larger, scratch->warp_sums[1][warp] = equal;
  __syncthreads();
  uint32_t larger_before = 0, equal_before = 0, all_larger = 0, all_equal = 0;
#pragma unroll
  for (int w = 0; w < kTopkWarps; ++w) {
    const uint32_t x = scratch->warp_sums[0][w], y = scratch->warp_sums[1][w];
    larger_before += w < warp ? x : 0, equal_before += w < warp ? y : 0;
    all_larger += x, all_equal += y;
  }
  if (threadIdx.x == 0) scratch->chosen[0] = all_larger, scratch->chosen[1] = all_equal;
  const uint2 before = ChosenBefore(scratch, cluster);
  larger_before += before.x, equal_before += before.y;
#pragma unroll 1
  for (int i = share.x; i < share.y; i += 32) {
    const bool there = i + lane < share.y;
    const uint32_t key = there ? candidates.keys[i + lane] : 0;
    const bool is_larger = there && threshold.Larger(key);
    const bool is_equal = there && threshold.Equal(key);
    const uint32_t larger_lanes = __ballot_sync(kFullWarp, is_larger);
    const uint32_t equal_lanes = __ballot_sync(kFullWarp, is_equal);
    const uint32_t my_equal = equal_before + __popc(equal_lanes & lower);
    if (is_larger || (is_equal && my_equal < threshold.equal)) {
      const uint32_t place =
          larger_before + __popc(larger_lanes & lower) + min(my_equal, threshold.equal);
      out[place] = columns != nullptr ? columns[i + lane] : first_column + i + lane;
    }
    larger_before += __popc(larger_lanes);
    equal_before += __popc(equal_lanes);
  }
}

__global__ void __launch_bounds__(kTopkThreads, 2) TopkKernel(const TopkParams p, int cluster) {
  extern __shared__ __align__(16) char dynamic[];
  TopkShared* shared = reinterpret_cast<TopkShared*>(dynamic);
  TopkScratch* scratch = &shared->scratch;
  PdlWait();
  PdlLaunchDependents();
  const int64_t row = blockIdx.x / cluster;
  const TopkRange range =
      TopkRangeOf(p.starts == nullptr ? 0 : p.starts[row], p.lengths[row], p.columns);
  int32_t* out = p.indices + row * p.k;
  if (range.size <= p.k) {  // for the whole cluster
    const int step = kTopkThreads * cluster;
    for (int64_t i = blockIdx.x % cluster * kTopkThreads + threadIdx.x; i < p.k; i += step) {
      out[i] = i < range.size ? static_cast<int32_t>(i) : -1;
    }
    return;
  }
  // Columns from a 16-byte boundary on, at most 3 before the range.
  const float* first = p.logits + row * p.row_stride + range.begin;
  const int origin = static_cast<int>(reinterpret_cast<uintptr_t>(first) / 4 % 4);
  const int end = origin + static_cast<int>(range.size);
  const int share = ((end + cluster - 1) / cluster + 3) / 4 * 4;
  const int rank = blockIdx.x % cluster;
  TopkSlice slice;
  slice.base = first - origin;
  slice.end = min((rank + 1) * share, end);
  slice.begin = min(max(rank * share, origin), slice.end);
  const auto k = static_cast<uint32_t>(p.k);
  const bool resident = share <= kTopkWords;  // alike in all CTAs
  TopkCandidates candidates;
  int32_t* columns = nullptr;
  if (resident) {
    ClearCounts(scratch);
    candidates = CollectAll(slice, shared->words, scratch);
  } else {
    columns = reinterpret_cast<int32_t*>(shared->words + kTopkCandidates);
    candidates = CollectLargest(slice, origin, k, shared->words, columns, scratch);
  }
  const TopkThreshold threshold = FindThreshold(candidates, k, resident, cluster, scratch);
  WriteChosen(candidates, columns, (slice.begin & ~3) - origin, threshold, cluster, out, scratch);
}

// CTAs of a row: so many that rows together fill the GPU and each has a few thousand columns.
int ClusterOf(const TopkParams& p, const DeviceFacts& facts) {
  constexpr int64_t kAlone = 12288, kLeastShare = 4096;
  if (facts.major < 9 || p.columns <= kAlone) return 1;
  int cluster = 1;
  while (cluster < 8 && p.rows * 2 * cluster <= 2 * facts.processors &&
         p.columns / (2 * cluster) >= kLeastShare) {
    cluster *= 2;
  }
  return cluster;
}

}  // namespace

cudaError_t LaunchTopk(const TopkParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.k == 0) return cudaSuccess;
  int device = 0;
  DeviceFacts facts;
  cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status != cudaSuccess) return status;
  if (facts.max_shared_bytes < static_cast<int>(sizeof(TopkShared))) {
    throw std::invalid_argument("this GPU has " + std::to_string(facts.max_shared_bytes) +
                                " bytes of shared memory a CTA, " +
                                std::to_string(sizeof(TopkShared)) + " are needed");
  }
  static OncePerDevice once;
  status = once.Run(device, [&] {
    return cudaFuncSetAttribute(TopkKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(sizeof(TopkShared)));
  });
  if (status != cudaSuccess) return status;
  const int cluster = ClusterOf(p, facts);
  const dim3 grid(GridSize(p.rows * cluster));
  return LaunchPdlInClusters(TopkKernel, grid, dim3(kTopkThreads), cluster, sizeof(TopkShared),
                             stream, p, cluster);
}

}  // namespace fastattn::cuda
