// Launcher of mqa_logits and paged_mqa_logits. Enqueues one kernel.
#pragma once

#include <cuda_runtime.h>

#include "params/mqa_logits.h"

namespace fastattn::cuda {

cudaError_t LaunchMqaLogits(const LogitsParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
