// Ahead of the attention: K and V of long sequences from codes to the queries' type.
#pragma once

#include <cuda_runtime.h>

#include "params/attention.h"
#include "params/dequantized_kv.h"

namespace fastattn::cuda {

// Fills the memory of `kv`. p is a call over codes that plan/dequantize_kv.h takes.
cudaError_t LaunchDequantizeKv(const AttentionParams& p, const DequantizedKv& kv,
                               cudaStream_t stream);

}  // namespace fastattn::cuda
