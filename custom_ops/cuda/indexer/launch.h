// Launchers of the indexer's queries, keys and states. Each enqueues one kernel.
#pragma once

#include <cuda_runtime.h>

#include "params/indexer.h"
#include "params/indexer_keys.h"
#include "params/partial_states.h"

namespace fastattn::cuda {

cudaError_t LaunchIndexerQRopeQuant(const IndexerQParams& p, cudaStream_t stream);
cudaError_t LaunchIndexerQQuant(const IndexerQQuantParams& p, cudaStream_t stream);
cudaError_t LaunchIndexerKvCompressInsert(const IndexerKvParams& p, cudaStream_t stream);
cudaError_t LaunchSavePartialStates(const PartialStatesParams& p, cudaStream_t stream);
cudaError_t LaunchIndexerKWrite(const IndexerKWriteParams& p, cudaStream_t stream);
cudaError_t LaunchIndexerKGather(const IndexerKGatherParams& p, cudaStream_t stream);

// The variants of builder/instances.py, one a page format.
template <IndexerQuant kQuant>
cudaError_t LaunchIndexerKey(const IndexerKvParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
