// The compiled variants; each is instantiated in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "cuda/prefill_half_sm90/config.h"

namespace fastattn::cuda::prefill_half_sm90 {

template <DType kOperand, int kDim, Source kSource, bool kTokenScales>
cudaError_t LaunchVariant(const Arguments& arguments, cudaStream_t stream);

}  // namespace fastattn::cuda::prefill_half_sm90
