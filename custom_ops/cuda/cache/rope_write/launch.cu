#include "cuda/cache/rope_write/launch.h"

#include <stdexcept>

#include "common/dispatch.h"

namespace fastattn::cuda {

namespace {

// Calls f(type, code) with the cache's format as constants.
template <typename F>
void DispatchFormat(const PagedCache& cache, F&& f) {
  dispatch<CacheType::kNone, CacheType::kInt8, CacheType::kFp8, CacheType::kBlockWiseInt8,
           CacheType::kBlockWiseFp8>(cache.type, "cache_quant_type", [&](auto type) {
    constexpr CacheType kType = decltype(type)::value;
    if constexpr (kType == CacheType::kNone) {
      dispatch<DType::kBFloat16, DType::kFloat16>(cache.dtype, "cache dtype",
                                                  [&](auto code) { f(type, code); });
    } else if constexpr (kType == CacheType::kFp8) {
      dispatch<DType::kE4M3, DType::kE5M2>(cache.dtype, "cache dtype",
                                           [&](auto code) { f(type, code); });
    } else {
      constexpr DType kCode = IsInt8(kType) ? DType::kInt8 : DType::kE4M3;
      f(type, std::integral_constant<DType, kCode>{});
    }
  });
}

template <DType kIn>
cudaError_t Launch(const StepParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  DispatchFormat(p.rope.cache, [&](auto type, auto code) {
    constexpr CacheType kType = decltype(type)::value;
    constexpr DType kCode = decltype(code)::value;
    if constexpr (kType == CacheType::kNone && kIn != DType::kFloat32 && kIn != kCode) {
      throw std::invalid_argument("a cache of type none holds the input's dtype");
    } else {
      status = LaunchStepVariant<kIn, kType, kCode>(p, stream);
    }
  });
  return status;
}

bool NothingToDo(const RopeWriteCacheParams& p) { return p.seqs.num_tokens == 0; }

}  // namespace

cudaError_t LaunchRopeWriteCache(const RopeWriteCacheParams& p, cudaStream_t stream) {
  if (NothingToDo(p)) return cudaSuccess;
  const int64_t head_dim = p.cache.head_dim;
  StepParams step;
  step.rope = p;
  const char* qkv = static_cast<const char*>(p.qkv);
  step.q = qkv;
  step.k = qkv + p.num_heads * head_dim * SizeOf(p.dtype);
  step.v = qkv + (p.num_heads + p.cache.num_kv_heads) * head_dim * SizeOf(p.dtype);
  step.q_stride = step.k_stride = step.v_stride = p.qkv_stride;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch<DType::kBFloat16, DType::kFloat16>(p.dtype, "qkv dtype", [&](auto dtype) {
    status = Launch<decltype(dtype)::value>(step, stream);
  });
  return status;
}

cudaError_t LaunchWriteCache(const WriteCacheParams& p, cudaStream_t stream) {
  StepParams step;
  step.rope.cache = p.cache;
  step.rope.seqs = p.seqs;
  step.rope.dtype = p.dtype;
  if (NothingToDo(step.rope)) return cudaSuccess;
  step.k = p.key;
  step.v = p.value;
  step.k_stride = p.key_token_stride;
  step.v_stride = p.value_token_stride;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch<DType::kBFloat16, DType::kFloat16, DType::kFloat32>(
      p.dtype, "key dtype",
      [&](auto dtype) { status = Launch<decltype(dtype)::value>(step, stream); });
  return status;
}

}  // namespace fastattn::cuda
