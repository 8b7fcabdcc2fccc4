// Attention of sequences with many new tokens over FP8 keys and values, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include "params/attention.h"

namespace fastattn::cuda {

// For parameters of which WgmmaFp8Lacks nothing (plan/wgmma_support.h) on compute capability 9.0.
// Ragged values are transposed into the first WgmmaFp8Workspace(p) floats of p.workspace.
//
// Enqueues the attention of the sequences with at least `min_query_tokens` new tokens; those of the
// other sequences, and tokens of none, are not touched. Nothing is read on the host, so a captured
// graph follows the lengths.
cudaError_t LaunchWgmmaFp8(const AttentionParams& p, int min_query_tokens, cudaStream_t stream);

inline cudaError_t LaunchWgmmaFp8(const AttentionParams& p, cudaStream_t stream) {
  return LaunchWgmmaFp8(p, 1, stream);
}

}  // namespace fastattn::cuda
