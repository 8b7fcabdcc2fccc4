// Attention of long query rows of 16-bit queries, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include "params/attention.h"

namespace fastattn::cuda {

// Whether LaunchWgmmaFp16 takes these parameters on a device of compute capability 9.0. Looks
// at nothing but the host's values, and not at p.workspace.
bool WgmmaFp16Supports(const AttentionParams& p);

// Enqueues the attention of the rows with at least `min_query_tokens` new tokens; those of the
// other rows, and tokens of no row, are not touched. Nothing is read on the host, so a captured
// graph follows the lengths.
cudaError_t LaunchWgmmaFp16(const AttentionParams& p, int min_query_tokens, cudaStream_t stream);

}  // namespace fastattn::cuda
