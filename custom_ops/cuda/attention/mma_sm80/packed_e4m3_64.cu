#include "cuda/attention/mma_sm80/kernel.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchAttentionVariant<DType::kE4M3, 64, false, false, 8>(
    const AttentionParams&, const AttentionTask&, int, cudaStream_t);
template cudaError_t LaunchAttentionVariant<DType::kE4M3, 64, false, false, 16>(
    const AttentionParams&, const AttentionTask&, int, cudaStream_t);
template cudaError_t LaunchAttentionVariant<DType::kE4M3, 64, false, false, 64>(
    const AttentionParams&, const AttentionTask&, int, cudaStream_t);

}  // namespace fastattn::cuda
