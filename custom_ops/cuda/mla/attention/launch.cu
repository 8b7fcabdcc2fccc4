#include "cuda/mla/attention/launch.h"

#include "cuda/common/device_facts.h"

namespace fastattn::cuda {

namespace {

enum class Kernel { kMma, kWgmma, kNarrow };

struct Decision {
  Kernel kernel;
  MlaAttentionPlan plan;
};

cudaError_t Decide(const MlaAttentionParams& p, Decision* decision) {
  int device = 0;
  DeviceFacts facts;
  const cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status != cudaSuccess) return status;
  if (facts.major == 9 && mla_attention::NarrowSupports(p)) {
    *decision = {Kernel::kNarrow, mla_attention::PlanNarrow(p, facts.processors)};
  } else if (facts.major == 9 && mla_attention::WgmmaSupports(p)) {
    *decision = {Kernel::kWgmma, mla_attention::PlanWgmma(p, facts.processors)};
  } else {
    *decision = {Kernel::kMma, mla_attention::PlanMma(p, facts.processors)};
  }
  return cudaSuccess;
}

cudaError_t Launch(const MlaAttentionParams& p, const Decision& decision, cudaStream_t stream) {
  switch (decision.kernel) {
    case Kernel::kNarrow:
      return mla_attention::LaunchNarrow(p, decision.plan, stream);
    case Kernel::kWgmma:
      return mla_attention::LaunchWgmma(p, decision.plan, stream);
    case Kernel::kMma:
      return mla_attention::LaunchMma(p, decision.plan, stream);
  }
  return cudaErrorUnknown;
}

}  // namespace

cudaError_t MlaAttentionWorkspaceFloats(const MlaAttentionParams& p, int64_t* floats) {
  Decision decision;
  const cudaError_t status = Decide(p, &decision);
  if (status == cudaSuccess) *floats = MlaAttentionWorkspace(decision.plan);
  return status;
}

cudaError_t LaunchMlaAttention(const MlaAttentionParams& p, cudaStream_t stream) {
  Decision decision;
  cudaError_t status = Decide(p, &decision);
  if (status != cudaSuccess) return status;
  status = Launch(p, decision, stream);
  if (status != cudaSuccess) return status;
  return mla_attention::LaunchMerge(p, decision.plan, stream);
}

}  // namespace fastattn::cuda
