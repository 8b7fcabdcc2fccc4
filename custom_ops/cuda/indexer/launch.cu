#include "cuda/indexer/launch.h"

#include "common/dispatch.h"

namespace fastattn::cuda {

cudaError_t LaunchIndexerKvCompressInsert(const IndexerKvParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_pages == 0) return cudaSuccess;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch<IndexerQuant::kFp8, IndexerQuant::kMxfp4, IndexerQuant::kFp8Wide>(
      p.quant, "quant",
      [&](auto quant) { status = LaunchIndexerKey<decltype(quant)::value>(p, stream); });
  return status;
}

}  // namespace fastattn::cuda
