#include "cuda/prefill_sm90/kernel.cuh"
#include "cuda/prefill_sm90/variant.h"

namespace fastattn::cuda::prefill_sm90 {

template <>
cudaError_t LaunchVariant<128, false, false>(const Arguments& arguments, cudaStream_t stream) {
  return LaunchConfig<Config<128, false, false>>(arguments, stream);
}

}  // namespace fastattn::cuda::prefill_sm90
