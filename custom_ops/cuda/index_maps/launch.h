// Launchers of the index maps. Each enqueues one kernel.
#pragma once

#include <cuda_runtime.h>

#include "params/index_maps.h"
#include "params/step_maps.h"

namespace fastattn::cuda {

// `compact` moves a row's indices to its front, in their order.
cudaError_t LaunchIndexMap(const TopkToSlotsParams& p, const MapOutput& out, bool compact,
                           cudaStream_t stream);
cudaError_t LaunchIndexMap(const WindowParams& p, const MapOutput& out, bool compact,
                           cudaStream_t stream);
cudaError_t LaunchIndexMap(const ShortContextParams& p, const MapOutput& out, bool compact,
                           cudaStream_t stream);
cudaError_t LaunchIndexMap(const CombineParams& p, const MapOutput& out, bool compact,
                           cudaStream_t stream);

// Writes some rows of `out`, which may have more rows than the map.
cudaError_t LaunchPlaceTopk(const PlaceTopkParams& p, const MapOutput& out, cudaStream_t stream);

cudaError_t LaunchTokenMaps(const TokenMapsParams& p, cudaStream_t stream);
cudaError_t LaunchQueryRows(const QueryRowsParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
