#pragma once

#include <cuda_runtime.h>

#include "params/quantize_query.h"

namespace fastattn::cuda {

// num_tokens * num_heads fits an int. Queries of any strides and alignment; codes are aligned to 16
// bytes.
cudaError_t LaunchQuantizeQuery(const QuantizeQueryParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
