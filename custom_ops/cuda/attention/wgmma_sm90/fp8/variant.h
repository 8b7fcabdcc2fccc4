// The launcher of a variant. Those that are compiled: builder/instances.py.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention/wgmma_sm90/fp8/config.h"

namespace fastattn::cuda::wgmma_fp8 {

template <int kDim, bool kTokenScales, bool kSoftcap, DType kCodes>
cudaError_t LaunchVariant(const Arguments& arguments, cudaStream_t stream);

// Writes the values of contiguous keys as Arguments::value has them.
cudaError_t LaunchTranspose(const AttentionParams& p, uint8_t* out, cudaStream_t stream);

}  // namespace fastattn::cuda::wgmma_fp8
