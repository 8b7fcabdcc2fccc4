// Launcher of quantize_fp8.
#pragma once

#include <cuda_runtime.h>

#include "params/quantize.h"

namespace fastattn::cuda {

cudaError_t LaunchQuantizeFp8(const QuantizeFp8Params& p, cudaStream_t stream);

}  // namespace fastattn::cuda
