// The launcher of a variant. Those that are compiled: builder/instances.py.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/divisor.cuh"
#include "params/mla_attention.h"

namespace fastattn::cuda::mla_sparse_sm90 {

// Arguments of both kernels and of the one that merges splits.
struct Arguments {
  MlaSparseParams p;
  Divisor page_size[2];
  unsigned head_groups = 1;
  unsigned splits = 1;
  unsigned work_tiles = 0;
  bool pairs = false;            // neighbouring groups of heads are CTAs of a cluster
  float* partial = nullptr;      // [splits, tokens, heads, 512]
  float* partial_lse = nullptr;  // [splits, tokens, heads], base 2; -inf: no key
};

// kHeads: 8 and 16: the narrow kernel, for at most as many; 64: the wide one, with groups of up to
// 64.
template <MlaFormat kFormat, int kDim, int kHeads>
cudaError_t LaunchVariant(const Arguments& args, cudaStream_t stream);

}  // namespace fastattn::cuda::mla_sparse_sm90
