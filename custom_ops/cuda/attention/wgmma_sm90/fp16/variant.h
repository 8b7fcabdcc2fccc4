// The compiled variants; each is instantiated in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention/wgmma_sm90/fp16/config.h"

namespace fastattn::cuda::wgmma_fp16 {

template <DType kOperand, int kDim, Source kSource, bool kPerTokenScales>
cudaError_t LaunchVariant(const Arguments& arguments, cudaStream_t stream);

}  // namespace fastattn::cuda::wgmma_fp16
