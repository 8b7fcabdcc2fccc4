// Launchers of update_block_summaries and select_key_blocks.
#pragma once

#include <cuda_runtime.h>

#include "params/block_summaries.h"

namespace fastattn::cuda {

cudaError_t LaunchUpdateSummaries(const UpdateSummariesParams& p, cudaStream_t stream);

// The tokens of `work`: their scores, and after a top-k over these (if p.Scored() > 0) their lists.
cudaError_t LaunchBlockScores(const SelectBlocksParams& p, const SelectBlocksWork& work,
                              cudaStream_t stream);
cudaError_t LaunchBlockLists(const SelectBlocksParams& p, const SelectBlocksWork& work,
                             cudaStream_t stream);

}  // namespace fastattn::cuda
