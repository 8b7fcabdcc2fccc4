// Launchers that merge the partial results of split-KV launches, and that clear what no sequence
// has.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention/split_kv/shared/task.h"
#include "params/attention.h"

namespace fastattn::cuda {

// Merges the partial results that a split launch left.
cudaError_t LaunchMergePartials(const AttentionParams& p, const AttentionTask& task, int tile_rows,
                                cudaStream_t stream);

// Clears the output and LSE of all tokens, which belong to no sequence.
cudaError_t LaunchClear(const AttentionParams& p, cudaStream_t stream);

// Clears tokens of no sequence while the kernel ahead writes the others.
cudaError_t LaunchClearPadding(const AttentionParams& p, cudaStream_t stream);

// Merges what a batch-invariant launch left.
cudaError_t LaunchMergeInvariant(const AttentionParams& p, const InvariantTask& task, int tile_rows,
                                 int grid, cudaStream_t stream);

}  // namespace fastattn::cuda
