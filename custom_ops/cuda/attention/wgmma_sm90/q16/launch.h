// Attention of sequences with many new tokens and 16-bit queries, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include "params/attention.h"

namespace fastattn::cuda {

// For parameters of which WgmmaQ16Lacks nothing (plan/wgmma_support.h) on compute capability 9.0.
//
// Enqueues the attention of the sequences with at least `min_query_tokens` new tokens; those of the
// other sequences, and tokens of none, are not touched. Nothing is read on the host, so a captured
// graph follows the lengths.
cudaError_t LaunchWgmmaQ16(const AttentionParams& p, int min_query_tokens, cudaStream_t stream);

}  // namespace fastattn::cuda
