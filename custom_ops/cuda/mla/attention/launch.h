#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "heuristics/mla_attention.h"
#include "params/mla_attention.h"

namespace fastattn::cuda {

// Floats of the workspace that LaunchMlaAttention takes in p.workspace.
cudaError_t MlaAttentionWorkspaceFloats(const MlaAttentionParams& p, int64_t* floats);

cudaError_t LaunchMlaAttention(const MlaAttentionParams& p, cudaStream_t stream);

namespace mla_attention {

// Kernels of their own architecture: mma.cu for all, wgmma.cu and narrow.cu for sm_90.
MlaAttentionPlan PlanMma(const MlaAttentionParams& p, int processors);
cudaError_t LaunchMma(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                      cudaStream_t stream);
bool WgmmaSupports(const MlaAttentionParams& p);
MlaAttentionPlan PlanWgmma(const MlaAttentionParams& p, int processors);
cudaError_t LaunchWgmma(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                        cudaStream_t stream);
bool NarrowSupports(const MlaAttentionParams& p);
MlaAttentionPlan PlanNarrow(const MlaAttentionParams& p, int processors);
cudaError_t LaunchNarrow(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                         cudaStream_t stream);

cudaError_t LaunchMerge(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                        cudaStream_t stream);

}  // namespace mla_attention

}  // namespace fastattn::cuda
