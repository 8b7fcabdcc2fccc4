#include "cuda/prefill_half_sm90/kernel.cuh"
#include "cuda/prefill_half_sm90/variant.h"

namespace fastattn::cuda::prefill_half_sm90 {

template <>
cudaError_t LaunchVariant<DType::kFloat16, 128, Source::kOperands, false>(
    const Arguments& arguments, cudaStream_t stream) {
  return LaunchConfig<DType::kFloat16, 128, Source::kOperands, false>(arguments, stream);
}

}  // namespace fastattn::cuda::prefill_half_sm90
