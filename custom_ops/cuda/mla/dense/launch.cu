#include "cuda/mla/dense/launch.h"

#include "cuda/common/device_facts.h"

namespace fastattn::cuda {

namespace {

enum class Kernel { kMma, kWgmma, kNarrow };

struct Decision {
  Kernel kernel;
  MlaDensePlan plan;
};

cudaError_t Decide(const MlaDenseParams& p, Decision* decision) {
  int device = 0;
  DeviceFacts facts;
  const cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status != cudaSuccess) return status;
  if (facts.major == 9 && mla_dense::NarrowSupports(p)) {
    *decision = {Kernel::kNarrow, mla_dense::PlanNarrow(p, facts.processors)};
  } else if (facts.major == 9 && mla_dense::WgmmaSupports(p)) {
    *decision = {Kernel::kWgmma, mla_dense::PlanWgmma(p, facts.processors)};
  } else {
    *decision = {Kernel::kMma, mla_dense::PlanMma(p, facts.processors)};
  }
  return cudaSuccess;
}

cudaError_t Launch(const MlaDenseParams& p, const Decision& decision, cudaStream_t stream) {
  switch (decision.kernel) {
    case Kernel::kNarrow:
      return mla_dense::LaunchNarrow(p, decision.plan, stream);
    case Kernel::kWgmma:
      return mla_dense::LaunchWgmma(p, decision.plan, stream);
    case Kernel::kMma:
      return mla_dense::LaunchMma(p, decision.plan, stream);
  }
  return cudaErrorUnknown;
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
  status = Launch(p, decision, stream);
  if (status != cudaSuccess) return status;
  return mla_dense::LaunchCombine(p, decision.plan, stream);
}

}  // namespace fastattn::cuda
