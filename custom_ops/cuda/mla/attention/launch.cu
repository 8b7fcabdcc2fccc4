// Which kernel attends a call of mla_sparse_attention.
#include "cuda/mla/attention/launch.h"

#include "cuda/mla/attention/simple.h"

namespace fastattn::cuda {

int64_t MlaSparseWorkspaceBytes(const MlaSparseParams&) { return 0; }

cudaError_t LaunchMlaSparse(const MlaSparseParams& p, void*, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads == 0) return cudaSuccess;
  return LaunchMlaSparseSimple(p, stream);
}

}  // namespace fastattn::cuda
