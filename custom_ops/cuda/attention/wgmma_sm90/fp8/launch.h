// Attention of long query rows over FP8 keys and values, for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include "params/attention.h"

namespace fastattn::cuda {

// Whether LaunchPrefillSm90 takes these parameters on a device of compute capability 9.0. Looks at
// nothing but the host's values, and not at p.workspace.
bool PrefillSm90Supports(const AttentionParams& p);

// Floats of p.workspace that LaunchPrefillSm90 writes: none for a paged cache, the transposed
// values of contiguous ones. It must be aligned to 128 bytes.
int64_t PrefillSm90Workspace(const AttentionParams& p);

// Enqueues the attention of the rows with at least `min_query_tokens` new tokens; those of the
// other rows, and tokens of no row, are not touched. Nothing is read on the host, so a captured
// graph follows the lengths.
cudaError_t LaunchPrefillSm90(const AttentionParams& p, int min_query_tokens, cudaStream_t stream);

inline cudaError_t LaunchPrefillSm90(const AttentionParams& p, cudaStream_t stream) {
  return LaunchPrefillSm90(p, 1, stream);
}

}  // namespace fastattn::cuda
