#include "cuda/indexer/launch.h"

#include <tuple>

#include "cuda/indexer/instances.h"

namespace fastattn::cuda {

cudaError_t LaunchIndexerKvCompressInsert(const IndexerKvParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_pages == 0) return cudaSuccess;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch(IndexerKeyInstances{}, std::tuple{Wanted{"quant", p.quant}},
           [&](auto quant) { status = LaunchIndexerKey<decltype(quant)::value>(p, stream); });
  return status;
}

}  // namespace fastattn::cuda
