// Launcher of inverse_rope_quantize_fp8. It enqueues one kernel.
#pragma once

#include <cuda_runtime.h>

#include "params/mla_output.h"

namespace fastattn::cuda {

cudaError_t LaunchInverseRopeQuantizeFp8(const InverseRopeParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
