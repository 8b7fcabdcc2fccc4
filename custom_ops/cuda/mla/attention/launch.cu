// Which kernel attends a call of mla_sparse_attention.
#include "cuda/mla/attention/launch.h"

#include "cuda/common/device_facts.h"
#include "cuda/mla/attention/simple.h"
#include "cuda/mla/attention/wgmma_sm90/launch.h"

namespace fastattn::cuda {

namespace {

bool HopperTakes(const MlaSparseParams& p, DeviceFacts* facts) {
  int device = 0;
  return GetCurrentDevice(&device, facts) == cudaSuccess && facts->major == 9 && mla_sm90::Takes(p);
}

}  // namespace

int64_t MlaSparseWorkspaceBytes(const MlaSparseParams& p) {
  DeviceFacts facts;
  return HopperTakes(p, &facts) ? mla_sm90::WorkspaceBytes(p, facts.processors) : 0;
}

cudaError_t LaunchMlaSparse(const MlaSparseParams& p, void* workspace, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads == 0) return cudaSuccess;
  DeviceFacts facts;
  if (HopperTakes(p, &facts)) return mla_sm90::Launch(p, workspace, stream);
  return LaunchMlaSparseSimple(p, stream);
}

}  // namespace fastattn::cuda
