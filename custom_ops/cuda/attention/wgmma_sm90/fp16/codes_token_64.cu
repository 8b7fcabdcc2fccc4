#include "cuda/attention/wgmma_sm90/fp16/kernel.cuh"
#include "cuda/attention/wgmma_sm90/fp16/variant.h"

namespace fastattn::cuda::wgmma_fp16 {

template <>
cudaError_t LaunchVariant<DType::kFloat16, 64, Source::kPagedCodes, true>(
    const Arguments& arguments, cudaStream_t stream) {
  return LaunchConfig<DType::kFloat16, 64, Source::kPagedCodes, true>(arguments, stream);
}

}  // namespace fastattn::cuda::wgmma_fp16
