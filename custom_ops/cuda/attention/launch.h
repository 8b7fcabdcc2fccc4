// Attention of a call: the kernels that plan/attention.h decided on, in turn.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/device_facts.h"
#include "params/attention.h"
#include "params/dequantized_kv.h"
#include "plan/attention.h"

namespace fastattn::cuda {

// Clusters of 8 CTAs of mma_sm80, two CTAs a multiprocessor, that run at the same time; 0 without
// clusters. The first call asks the runtime.
cudaError_t CountClusters(int device, const DeviceFacts& facts, int* count);

// p.workspace holds decision.workspace floats. `kv`: what LaunchDequantizeKv filled, where the
// decision has it.
cudaError_t LaunchAttention(const AttentionParams& p, const AttentionDecision& decision,
                            const DequantizedKv& kv, cudaStream_t stream);

}  // namespace fastattn::cuda
