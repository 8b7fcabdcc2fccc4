// mla_sparse_attention for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params/mla_attention.h"

namespace fastattn::cuda::mla_sparse_sm90 {

// Whether the kernels take a call: one format in both selections, rows that begin at multiples of
// 16 bytes.
bool Takes(const MlaSparseParams& p);

// Bytes that the launch needs on a GPU of `processors` multiprocessors, at a multiple of 256.
int64_t WorkspaceBytes(const MlaSparseParams& p, int processors);

cudaError_t Launch(const MlaSparseParams& p, void* workspace, cudaStream_t stream);

}  // namespace fastattn::cuda::mla_sparse_sm90
