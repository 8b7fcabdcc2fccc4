#include "cuda/attention/wgmma_sm90/fp8/kernel.cuh"
#include "cuda/attention/wgmma_sm90/fp8/variant.h"

namespace fastattn::cuda::wgmma_fp8 {

template <>
cudaError_t LaunchVariant<128, false, true, DType::kE4M3>(const Arguments& arguments,
                                                          cudaStream_t stream) {
  return LaunchConfig<Config<128, false, true, DType::kE4M3>>(arguments, stream);
}

}  // namespace fastattn::cuda::wgmma_fp8
