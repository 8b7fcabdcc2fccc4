#include "cuda/cache/rope_write/launch.h"

#include <tuple>

#include "common/dispatch.h"
#include "cuda/cache/rope_write/instances.h"

namespace fastattn::cuda {

namespace {

cudaError_t Launch(const TransformStepParams& p, const char* dtype_name, cudaStream_t stream) {
  const PagedCache& cache = p.rope.cache;
  const auto wanted = [&](bool transforms) {
    return std::tuple{Wanted{dtype_name, p.rope.dtype},
                      Wanted{"scales of the cache", FormatOf(cache.type).scales},
                      Wanted{"cache dtype", cache.dtype}, Wanted{"dtype of V", cache.value_dtype},
                      Wanted{"k_rotation, k_center or k_feedback", transforms}};
  };
  // Keys of some types are mostly transformed: those that are not have no kernels of their own.
  const bool transforms = p.transform.Any() || p.transform.feedback != nullptr ||
                          !IsCompiled(StepInstances{}, wanted(false));
  cudaError_t status = cudaErrorInvalidValue;
  dispatch(StepInstances{}, wanted(transforms), [&](auto... arguments) {
    status = LaunchStepVariant<decltype(arguments)::value...>(p, stream);
  });
  return status;
}

bool NothingToDo(const RopeWriteCacheParams& p) { return p.seqs.num_tokens == 0; }

}  // namespace

cudaError_t LaunchRopeWriteCache(const RopeWriteCacheParams& p, const KeyTransform& transform,
                                 cudaStream_t stream) {
  if (NothingToDo(p)) return cudaSuccess;
  const int64_t head_dim = p.cache.head_dim;
  TransformStepParams step;
  step.rope = p;
  step.transform = transform;
  const char* qkv = static_cast<const char*>(p.qkv);
  step.q = qkv;
  step.k = qkv + p.num_heads * head_dim * SizeOf(p.dtype);
  step.v = qkv + (p.num_heads + p.cache.num_kv_heads) * head_dim * SizeOf(p.dtype);
  step.q_stride = step.k_stride = step.v_stride = p.qkv_stride;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch<DType::kBFloat16, DType::kFloat16>(
      p.dtype, "qkv dtype", [&](auto) { status = Launch(step, "qkv dtype", stream); });
  return status;
}

cudaError_t LaunchWriteCache(const WriteCacheParams& p, const KeyTransform& transform,
                             cudaStream_t stream) {
  TransformStepParams step;
  step.transform = transform;
  step.rope.cache = p.cache;
  step.rope.seqs = p.seqs;
  step.rope.dtype = p.dtype;
  if (NothingToDo(step.rope)) return cudaSuccess;
  step.k = p.key;
  step.v = p.value;
  step.k_stride = p.key_token_stride;
  step.v_stride = p.value_token_stride;
  return Launch(step, "key dtype", stream);
}

}  // namespace fastattn::cuda
