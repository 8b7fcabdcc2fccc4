// Launcher of compact_block_tables.
#pragma once

#include <cuda_runtime.h>

#include "params/compact_tables.h"

namespace fastattn::cuda {

cudaError_t LaunchCompactBlockTables(const CompactTablesParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
