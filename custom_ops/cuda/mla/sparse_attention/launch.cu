// The kernel that plan/mla_sparse_attention.h chooses for a call.
#include "cuda/mla/sparse_attention/launch.h"

#include "cuda/common/device_facts.h"
#include "cuda/mla/sparse_attention/simple.h"
#include "cuda/mla/sparse_attention/wgmma_sm90/launch.h"
#include "plan/mla_sparse_attention.h"

namespace fastattn::cuda {

namespace {

// Of a call that has work, on the current device.
MlaSparseDecision Decide(const MlaSparseParams& p) {
  int device = 0;
  DeviceFacts facts;
  if (GetCurrentDevice(&device, &facts) != cudaSuccess) return {};
  return DecideMlaSparse(p, facts.major, facts.processors);
}

}  // namespace

int64_t MlaSparseWorkspaceBytes(const MlaSparseParams& p) {
  if (p.tokens == 0 || p.heads == 0) return 0;
  return Decide(p).plan.workspace;
}

cudaError_t LaunchMlaSparse(const MlaSparseParams& p, void* workspace, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads == 0) return cudaSuccess;
  const MlaSparseDecision decision = Decide(p);
  switch (decision.kernel) {
    case MlaSparseKernel::kWgmma:
      return mla_sparse_sm90::Launch(p, decision.plan, workspace, stream);
    case MlaSparseKernel::kSimple:
      return LaunchMlaSparseSimple(p, stream);
  }
  return cudaErrorUnknown;
}

}  // namespace fastattn::cuda
