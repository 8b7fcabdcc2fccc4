#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "heuristics/mla_dense.h"
#include "params/mla_attention.h"

namespace fastattn::cuda {

// Floats of the workspace that LaunchMlaDense takes in p.workspace.
cudaError_t MlaDenseWorkspaceFloats(const MlaDenseParams& p, int64_t* floats);

cudaError_t LaunchMlaDense(const MlaDenseParams& p, cudaStream_t stream);

namespace mla_dense {

// Kernels of their own architecture: mma.cu for all, wgmma.cu and narrow.cu for sm_90.
MlaDensePlan PlanMma(const MlaDenseParams& p, int processors);
cudaError_t LaunchMma(const MlaDenseParams& p, const MlaDensePlan& plan, cudaStream_t stream);
bool WgmmaSupports(const MlaDenseParams& p);
MlaDensePlan PlanWgmma(const MlaDenseParams& p, int processors);
cudaError_t LaunchWgmma(const MlaDenseParams& p, const MlaDensePlan& plan, cudaStream_t stream);
bool NarrowSupports(const MlaDenseParams& p);
MlaDensePlan PlanNarrow(const MlaDenseParams& p, int processors);
cudaError_t LaunchNarrow(const MlaDenseParams& p, const MlaDensePlan& plan, cudaStream_t stream);

cudaError_t LaunchCombine(const MlaDenseParams& p, const MlaDensePlan& plan, cudaStream_t stream);

}  // namespace mla_dense

}  // namespace fastattn::cuda
