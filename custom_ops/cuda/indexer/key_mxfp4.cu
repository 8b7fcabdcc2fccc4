#include "cuda/indexer/key.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchIndexerKey<IndexerQuant::kMxfp4>(const IndexerKvParams&, cudaStream_t);

}  // namespace fastattn::cuda
