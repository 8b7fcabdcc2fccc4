// Which kernel attends a call of mla_sparse_attention.
#include "cuda/mla/sparse_attention/launch.h"

#include "cuda/common/device_facts.h"
#include "cuda/mla/sparse_attention/simple.h"
#include "cuda/mla/sparse_attention/wgmma_sm90/launch.h"

namespace fastattn::cuda {

namespace {

// Whether the Hopper kernels run; *facts are the current device's.
bool OnHopper(const MlaSparseParams& p, DeviceFacts* facts) {
  int device = 0;
  return GetCurrentDevice(&device, facts) == cudaSuccess && facts->major == 9 &&
         mla_sparse_sm90::Takes(p);
}

}  // namespace

int64_t MlaSparseWorkspaceBytes(const MlaSparseParams& p) {
  DeviceFacts facts;
  if (p.tokens == 0 || p.heads == 0 || !OnHopper(p, &facts)) return 0;
  return mla_sparse_sm90::WorkspaceBytes(p, facts.processors);
}

cudaError_t LaunchMlaSparse(const MlaSparseParams& p, void* workspace, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads == 0) return cudaSuccess;
  DeviceFacts facts;
  if (OnHopper(p, &facts)) return mla_sparse_sm90::Launch(p, workspace, stream);
  return LaunchMlaSparseSimple(p, stream);
}

}  // namespace fastattn::cuda
