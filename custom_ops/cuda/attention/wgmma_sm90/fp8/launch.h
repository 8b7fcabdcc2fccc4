// Attention of sequences with many new tokens over FP8 keys and values, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include "params/attention.h"

namespace fastattn::cuda {

// Whether LaunchWgmmaFp8 takes these parameters on a device of compute capability 9.0: a function
// of the host's values, not of p.workspace.
bool WgmmaFp8Supports(const AttentionParams& p);

// Floats of p.workspace that LaunchWgmmaFp8 writes: none for a paged cache, the transposed values
// of ragged K and V. p.workspace must be aligned to 128 bytes.
int64_t WgmmaFp8Workspace(const AttentionParams& p);

// Enqueues the attention of the sequences with at least `min_query_tokens` new tokens; tokens of
// the other sequences, and of none, are not touched. Nothing is read on the host, so a captured
// graph follows the lengths.
cudaError_t LaunchWgmmaFp8(const AttentionParams& p, int min_query_tokens, cudaStream_t stream);

inline cudaError_t LaunchWgmmaFp8(const AttentionParams& p, cudaStream_t stream) {
  return LaunchWgmmaFp8(p, 1, stream);
}

}  // namespace fastattn::cuda
