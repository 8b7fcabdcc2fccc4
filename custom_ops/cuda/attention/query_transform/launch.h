#pragma once

#include <cuda_runtime.h>

#include "params/query_transform.h"

namespace fastattn::cuda {

// num_tokens * num_heads fits an int. Queries of 16 bits, any strides and alignment; what is
// written is aligned to 16 bytes. Nothing is launched where there are no queries, or nothing is
// wanted.
cudaError_t LaunchTransformQuery(const QueryTransformParams& p, cudaStream_t stream);
cudaError_t LaunchShiftScores(const ScoreShiftParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
