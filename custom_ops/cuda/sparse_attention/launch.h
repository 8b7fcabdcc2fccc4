// Launchers of sparse_paged_attention. LaunchSparseAttention picks one of the kernels for each type
// of codes (builder/instances.py). Lists of whole blocks become block tables, with which the
// kernels of paged_attention read them.
#pragma once

#include <cuda_runtime.h>

#include "params/sparse_attention.h"

namespace fastattn::cuda {

// Writes output and LSE of every token; p.attention.clear_padding says whether tokens of no
// sequence get an output of 0. Caches are aligned as PagedCache says, queries and outputs need no
// alignment. Throws std::invalid_argument for a combination that is not compiled.
cudaError_t LaunchSparseAttention(const SparseAttentionParams& p, cudaStream_t stream);

// Fills `tables` from lists of entries of 64 tokens or a multiple.
cudaError_t LaunchListTables(const SparseAttentionParams& p, const ListTables& tables,
                             cudaStream_t stream);

// kScales: scales of groups, or kStatic for all other ones, which a kernel tells apart itself.
template <DType kCode, DType kValue, Scales kScales>
cudaError_t LaunchSparseVariant(const SparseAttentionParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
