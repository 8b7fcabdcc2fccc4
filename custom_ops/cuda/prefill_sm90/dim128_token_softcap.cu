#include "cuda/prefill_sm90/kernel.cuh"
#include "cuda/prefill_sm90/variant.h"

namespace fastattn::cuda::prefill_sm90 {

template <>
cudaError_t LaunchVariant<128, true, true, DType::kE4M3>(const Arguments& arguments,
                                                         cudaStream_t stream) {
  return LaunchConfig<Config<128, true, true, DType::kE4M3>>(arguments, stream);
}

}  // namespace fastattn::cuda::prefill_sm90
