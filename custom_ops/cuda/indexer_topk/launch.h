// Launcher of what indexer_topk does besides logits and top-k. Enqueues one kernel.
#pragma once

#include <cuda_runtime.h>

#include "params/mqa_logits.h"

namespace fastattn::cuda {

// lengths[row] = TopkLengthOf(p, row), of every row.
cudaError_t LaunchTopkLengths(const LogitsParams& p, int32_t* lengths, cudaStream_t stream);

}  // namespace fastattn::cuda
