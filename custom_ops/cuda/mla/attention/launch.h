#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params/mla_attention.h"
#include "plan/mla_attention.h"

namespace fastattn::cuda {

// Floats of the workspace that LaunchMlaAttention takes in p.workspace.
cudaError_t MlaAttentionWorkspaceFloats(const MlaAttentionParams& p, int64_t* floats);

cudaError_t LaunchMlaAttention(const MlaAttentionParams& p, cudaStream_t stream);

namespace mla_attention {

// The kernels of plan/mla_attention.h's table.
cudaError_t LaunchMma(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                      cudaStream_t stream);
cudaError_t LaunchWgmma(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                        cudaStream_t stream);
cudaError_t LaunchNarrow(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                         cudaStream_t stream);

cudaError_t LaunchMerge(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                        cudaStream_t stream);

}  // namespace mla_attention

}  // namespace fastattn::cuda
