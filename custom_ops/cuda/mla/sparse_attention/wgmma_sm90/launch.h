// mla_sparse_attention for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include "params/mla_attention.h"
#include "plan/mla_sparse_attention.h"

namespace fastattn::cuda::mla_sparse_sm90 {

// `workspace` has plan.workspace bytes, at a multiple of 256.
cudaError_t Launch(const MlaSparseParams& p, const MlaSparsePlan& plan, void* workspace,
                   cudaStream_t stream);

}  // namespace fastattn::cuda::mla_sparse_sm90
