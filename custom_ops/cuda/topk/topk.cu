// topk_indices on a GPU: one kernel, a CTA or a cluster for each row.
#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/topk/launch.h"
#include "cuda/topk/long_rows.cuh"
#include "cuda/topk/short_rows.cuh"

namespace fastattn::cuda {

namespace {

// Shared memory that a CTA may use where two of them are to share a multiprocessor of sm_90.
constexpr int64_t kHalfShared = 113 * 1024;

bool AlignedRows(const TopkParams& p) {
  return p.starts == nullptr && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
         p.row_stride % 4 == 0;
}

// 16 columns a thread: with 8 of twice as many threads the instructions that every warp runs, and
// waits at barriers, take longer, even where a row has a multiprocessor to itself.
constexpr int kShortThreads = 512, kShortVectors = 4;
constexpr int64_t kShortColumns = int64_t{4} * kShortThreads * kShortVectors;

template <bool kAligned>
cudaError_t LaunchShort(const TopkParams& p, cudaStream_t stream) {
  return LaunchPdl(ShortTopkKernel<kShortThreads, kShortVectors, kAligned>, dim3(GridSize(p.rows)),
                   dim3(kShortThreads), stream, p);
}

// CTAs of a row: so many that all rows together fill the GPU, each with a few thousand columns.
int ClusterOf(const TopkParams& p, const DeviceFacts& facts) {
  constexpr int64_t kLeastShare = 4096;
  if (facts.major < 9) return 1;
  int cluster = 1;
  while (cluster < 8 && p.rows * 2 * cluster <= facts.processors &&
         p.columns / (2 * cluster) >= kLeastShare) {
    cluster *= 2;
  }
  return cluster;
}

// A CTA for each row always fits, whatever GPU it is: 99 KiB is the least that one has.
static_assert(TopkPlan{1, LeastCapacity(kTopkMaxK), 1}.Bytes() <= 99 * 1024);

TopkPlan PlanOf(const TopkParams& p, int cluster, int64_t max_shared) {
  // Words that WriteWindow counts in.
  constexpr int64_t kMaxWords = (int64_t{1} << kEqualBits) / 32 - 1;
  TopkPlan plan;
  plan.cluster = cluster;
  plan.capacity = LeastCapacity(p.k);
  plan.window = 1;
  // The keys of all CTAs' candidates do not fit everywhere: a window without words has no end.
  if (plan.Bytes() > max_shared) plan.cluster = 1;
  const int64_t words = ((p.columns + 3 + plan.cluster - 1) / plan.cluster + 31) / 32;
  const int64_t room = 1 + (max_shared - plan.Bytes()) / 8;
  plan.window = static_cast<int>(std::min({words, room, kMaxWords, int64_t{2} * plan.capacity}));
  return plan;
}

template <int kThreads>
cudaError_t LaunchLong(const TopkParams& p, const TopkPlan& plan, int device, int max_shared,
                       cudaStream_t stream) {
  static OncePerDevice once;
  const cudaError_t status = once.Run(device, [&] {
    return cudaFuncSetAttribute(LongTopkKernel<kThreads>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared);
  });
  if (status != cudaSuccess) return status;
  return LaunchPdlInClusters(LongTopkKernel<kThreads>, dim3(GridSize(p.rows * plan.cluster)),
                             dim3(kThreads), plan.cluster, static_cast<size_t>(plan.Bytes()),
                             stream, p, plan);
}

}  // namespace

cudaError_t LaunchTopk(const TopkParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.k == 0) return cudaSuccess;
  int device = 0;
  DeviceFacts facts;
  const cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status != cudaSuccess) return status;
  if (AlignedRows(p) && p.columns <= kShortColumns) return LaunchShort<true>(p, stream);
  if (p.columns + 3 <= kShortColumns) return LaunchShort<false>(p, stream);
  const bool few = p.rows <= facts.processors;  // a multiprocessor for each row
  const TopkPlan plan = PlanOf(p, ClusterOf(p, facts), facts.max_shared_bytes);
  if (few || plan.Bytes() > kHalfShared) {
    return LaunchLong<1024>(p, plan, device, facts.max_shared_bytes, stream);
  }
  return LaunchLong<512>(p, plan, device, facts.max_shared_bytes, stream);
}

}  // namespace fastattn::cuda
