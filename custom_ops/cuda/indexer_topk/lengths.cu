#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/indexer_topk/launch.h"
#include "params/indexer_topk.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    LengthsKernel(const __grid_constant__ LogitsParams p, int32_t* lengths) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  PdlWait();
  PdlLaunchDependents();
  if (row < p.rows) lengths[row] = static_cast<int32_t>(TopkLengthOf(p, row));
}

}  // namespace

cudaError_t LaunchTopkLengths(const LogitsParams& p, int32_t* lengths, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return LaunchPdl(LengthsKernel, dim3(GridSize((p.rows + kThreads - 1) / kThreads)),
                   dim3(kThreads), stream, p, lengths);
}

}  // namespace fastattn::cuda
