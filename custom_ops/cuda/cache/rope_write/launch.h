// Launchers of rope_write_cache_kv and write_cache_kv.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "params/cache.h"
#include "params/key_transform.h"
#include "params/rope.h"

namespace fastattn::cuda {

// What both operators' kernels take: Q, K and V apart, the rest as in RopeWriteCacheParams (whose
// `qkv` and `qkv_stride` are not read). write_cache_kv has no Q heads and no rotation.
struct StepParams {
  RopeWriteCacheParams rope;
  const void* q = nullptr;  // [T, H, D]
  const void* k = nullptr;  // [T, KV, D]
  const void* v = nullptr;  // [T, KV, D]
  int64_t q_stride = 0;     // elements from one token to the next
  int64_t k_stride = 0;
  int64_t v_stride = 0;
};

// Those of kernels that transform K.
struct TransformStepParams : StepParams {
  KeyTransform transform;
};

template <typename Traits>
using StepParamsOf = std::conditional_t<Traits::kTransformsKey, TransformStepParams, StepParams>;

// Both enqueue one kernel on `stream` and throw std::invalid_argument for what is not compiled.
cudaError_t LaunchRopeWriteCache(const RopeWriteCacheParams& p, const KeyTransform& transform,
                                 cudaStream_t stream);
cudaError_t LaunchWriteCache(const WriteCacheParams& p, const KeyTransform& transform,
                             cudaStream_t stream);

// The variants of builder/instances.py. kCode is K's element type (bf16 / fp16 of a cache without
// codes), kValueCode is V's.
template <DType kIn, Scales kScales, DType kCode, DType kValueCode, bool kTransformsKey>
cudaError_t LaunchStepVariant(const TransformStepParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda
