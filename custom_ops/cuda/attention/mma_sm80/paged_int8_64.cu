#include "cuda/attention/mma_sm80/kernel.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchAttentionVariant<DType::kInt8, 64, true, false, 8>(
    const AttentionParams&, const AttentionTask&, int, cudaStream_t);
template cudaError_t LaunchAttentionVariant<DType::kInt8, 64, true, false, 16>(
    const AttentionParams&, const AttentionTask&, int, cudaStream_t);
template cudaError_t LaunchAttentionVariant<DType::kInt8, 64, true, false, 64>(
    const AttentionParams&, const AttentionTask&, int, cudaStream_t);

}  // namespace fastattn::cuda
