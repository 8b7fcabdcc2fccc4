#include "cuda/prefill_half_sm90/kernel.cuh"
#include "cuda/prefill_half_sm90/variant.h"

namespace fastattn::cuda::prefill_half_sm90 {

template <>
cudaError_t LaunchVariant<DType::kE4M3, 128, Source::kCodeRows, false>(const Arguments& arguments,
                                                                       cudaStream_t stream) {
  return LaunchConfig<DType::kE4M3, 128, Source::kCodeRows, false>(arguments, stream);
}

}  // namespace fastattn::cuda::prefill_half_sm90
