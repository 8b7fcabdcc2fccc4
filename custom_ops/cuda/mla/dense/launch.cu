#include "cuda/mla/dense/launch.h"

#include "cuda/common/device_facts.h"

namespace fastattn::cuda {

namespace {

struct Decision {
  bool wgmma;
  MlaDensePlan plan;
};

cudaError_t Decide(const MlaDenseParams& p, Decision* decision) {
  int device = 0;
  DeviceFacts facts;
  const cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status != cudaSuccess) return status;
  decision->wgmma = facts.major == 9 && mla_dense::WgmmaSupports(p);
  decision->plan = decision->wgmma ? mla_dense::PlanWgmma(p, facts.processors)
                                   : mla_dense::PlanMma(p, facts.processors);
  return cudaSuccess;
}

}  // namespace

cudaError_t MlaDenseWorkspaceFloats(const MlaDenseParams& p, int64_t* floats) {
  Decision decision;
  const cudaError_t status = Decide(p, &decision);
  if (status == cudaSuccess) *floats = MlaDenseWorkspace(decision.plan);
  return status;
}

cudaError_t LaunchMlaDense(const MlaDenseParams& p, cudaStream_t stream) {
  Decision decision;
  cudaError_t status = Decide(p, &decision);
  if (status != cudaSuccess) return status;
  status = decision.wgmma ? mla_dense::LaunchWgmma(p, decision.plan, stream)
                          : mla_dense::LaunchMma(p, decision.plan, stream);
  if (status != cudaSuccess) return status;
  return mla_dense::LaunchCombine(p, decision.plan, stream);
}

}  // namespace fastattn::cuda
