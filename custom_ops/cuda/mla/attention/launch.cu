#include "cuda/mla/attention/launch.h"

#include "cuda/common/device_facts.h"

namespace fastattn::cuda {

namespace {

cudaError_t Decide(const MlaAttentionParams& p, MlaAttentionDecision* decision) {
  int device = 0;
  DeviceFacts facts;
  const cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status == cudaSuccess) *decision = DecideMlaAttention(p, facts.major, facts.processors);
  return status;
}

cudaError_t Launch(const MlaAttentionParams& p, const MlaAttentionDecision& decision,
                   cudaStream_t stream) {
  switch (decision.kernel) {
    case MlaAttentionKernel::kNarrow:
      return mla_attention::LaunchNarrow(p, decision.plan, stream);
    case MlaAttentionKernel::kWgmma:
      return mla_attention::LaunchWgmma(p, decision.plan, stream);
    case MlaAttentionKernel::kMma:
      return mla_attention::LaunchMma(p, decision.plan, stream);
  }
  return cudaErrorUnknown;
}

}  // namespace

cudaError_t MlaAttentionWorkspaceFloats(const MlaAttentionParams& p, int64_t* floats) {
  MlaAttentionDecision decision;
  const cudaError_t status = Decide(p, &decision);
  if (status == cudaSuccess) *floats = MlaAttentionWorkspace(decision.plan);
  return status;
}

cudaError_t LaunchMlaAttention(const MlaAttentionParams& p, cudaStream_t stream) {
  MlaAttentionDecision decision;
  cudaError_t status = Decide(p, &decision);
  if (status != cudaSuccess) return status;
  status = Launch(p, decision, stream);
  if (status != cudaSuccess) return status;
  return mla_attention::LaunchMerge(p, decision.plan, stream);
}

}  // namespace fastattn::cuda
