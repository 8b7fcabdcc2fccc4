#include "cuda/mla/sparse_attention/wgmma_sm90/launch.h"

#include <tuple>

#include "cuda/common/launch.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/instances.h"
#include "cuda/mla/sparse_attention/wgmma_sm90/merge.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/work.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

cudaError_t Launch(const MlaSparseParams& p, const MlaSparsePlan& plan, void* workspace,
                   cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  Arguments args;
  args.p = p;
  args.page_size[0] = Divisor(static_cast<uint32_t>(p.keys.cache.page_size));
  args.page_size[1] = Divisor(static_cast<uint32_t>(p.extra.cache.page_size));
  args.head_groups = plan.head_groups;
  args.splits = plan.splits;
  args.work_tiles = GridSize(p.tokens * args.head_groups * args.splits);
  args.pairs = plan.pairs;
  if (args.splits > 1) {
    if (workspace == nullptr) return cudaErrorInvalidValue;
    args.partial_lse = static_cast<float*>(workspace);
    args.partial = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.lse_bytes);
  }
  dispatch(
      Instances{},
      std::tuple{Wanted{"format", p.keys.cache.format}, Wanted{"dim", p.dim},
                 Wanted{"heads", plan.heads}},
      [&](auto... values) { status = LaunchVariant<decltype(values)::value...>(args, stream); });
  if (status != cudaSuccess || args.splits == 1) return status;
  return LaunchPdl(MergeKernel, dim3(GridSize(p.tokens * p.heads)), dim3(kMergeThreads), stream,
                   args);
}

}  // namespace fastattn::cuda::mla_sparse_sm90
