// Launchers of indexer_q_rope_quant and indexer_kv_compress_insert. Each enqueues one kernel.
#pragma once

#include <cuda_runtime.h>

#include "params/indexer.h"

namespace fastattn::cuda {

cudaError_t LaunchIndexerQRopeQuant(const IndexerQParams& p, cudaStream_t stream);
cudaError_t LaunchIndexerKvCompressInsert(const IndexerKvParams& p, cudaStream_t stream);

// The variants of builder/instances.py, one a page format.
template <IndexerQuant kQuant>
cudaError_t LaunchIndexerKey(const IndexerKvParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
