// The launcher of a variant. Those that are compiled: builder/instances.py.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention/wgmma_sm90/q16/config.h"

namespace fastattn::cuda::wgmma_q16 {

// For error messages.
inline const char* NameOf(Source source) {
  switch (source) {
    case Source::k16Bit:
      return "16-bit";
    case Source::kRaggedCodes:
      return "ragged codes";
    case Source::kPagedCodes:
      return "paged codes";
    case Source::kPagedNibbles:
      return "paged 4-bit codes";
  }
  return "unknown";
}

template <DType kOperand, int kDim, Source kSource, bool kPerTokenScales>
cudaError_t LaunchVariant(const Arguments& arguments, cudaStream_t stream);

}  // namespace fastattn::cuda::wgmma_q16
