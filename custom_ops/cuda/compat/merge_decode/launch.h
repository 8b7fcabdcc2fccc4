// Launcher of FastDeploy's merge_prefill_decode_output.
#pragma once

#include <cuda_runtime.h>

#include "params/merge_decode.h"

namespace fastattn::cuda {

cudaError_t LaunchMergeDecode(const MergeDecodeParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
