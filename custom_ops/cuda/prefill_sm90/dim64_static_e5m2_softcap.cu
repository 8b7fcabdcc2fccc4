#include "cuda/prefill_sm90/kernel.cuh"
#include "cuda/prefill_sm90/variant.h"

namespace fastattn::cuda::prefill_sm90 {

template <>
cudaError_t LaunchVariant<64, false, true, DType::kE5M2>(const Arguments& arguments,
                                                         cudaStream_t stream) {
  return LaunchConfig<Config<64, false, true, DType::kE5M2>>(arguments, stream);
}

}  // namespace fastattn::cuda::prefill_sm90
