// Attention of a call: the kernels that heuristics/attention.h decided on, in turn.
#pragma once

#include <cuda_runtime.h>

#include "heuristics/attention.h"
#include "params/attention.h"

namespace fastattn::cuda {

// p.workspace holds decision.workspace floats.
cudaError_t LaunchAttention(const AttentionParams& p, const AttentionDecision& decision,
                            cudaStream_t stream);

}  // namespace fastattn::cuda
