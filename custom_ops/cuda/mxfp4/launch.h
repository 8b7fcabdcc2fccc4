// Launchers of mxfp4_quantize and mxfp4_dequantize. Each enqueues one kernel.
#pragma once

#include <cuda_runtime.h>

#include "params/mxfp4.h"

namespace fastattn::cuda {

cudaError_t LaunchMxfp4Quantize(const Mxfp4QuantizeParams& p, cudaStream_t stream);
cudaError_t LaunchMxfp4Dequantize(const Mxfp4DequantizeParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
