#include "cuda/prefill_sm90/launch.h"

#include <cstdint>
#include <limits>

#include "cuda/common/tma.cuh"
#include "cuda/prefill_sm90/variant.h"

namespace fastattn::cuda {

namespace {

using prefill_sm90::Arguments;

bool IsMultiple(int64_t x, int64_t of) { return x % of == 0; }

bool IsAligned(const void* pointer) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool SupportsCache(const PagedCache& cache) {
  const bool fp8 = cache.type == CacheType::kFp8 || cache.type == CacheType::kBlockWiseFp8;
  if (!fp8 || cache.dtype != DType::kE4M3 || cache.layout != CacheLayout::kFastattn) return false;
  if (cache.k_scales == nullptr || cache.v_scales == nullptr) return false;
  if (IsDynamic(cache.type) && !(IsAligned(cache.k_scales) && IsAligned(cache.v_scales))) {
    return false;
  }
  const int64_t heads = static_cast<int64_t>(cache.num_blocks) * cache.num_kv_heads;
  return heads > 0 && heads < std::numeric_limits<int>::max() && IsAligned(cache.key) &&
         IsAligned(cache.value);
}

// The queries [T, H, D], the codes of K as rows of tokens and those of V as rows of channels.
cudaError_t EncodeMaps(Arguments* arguments) {
  const AttentionParams& p = arguments->p;
  const auto dim = static_cast<uint64_t>(p.head_dim);
  const auto box = static_cast<uint32_t>(p.head_dim);
  const uint64_t block = dim * kBlockSize;
  const uint64_t heads = static_cast<uint64_t>(p.cache.num_blocks) * p.cache.num_kv_heads;
  const CUtensorMapSwizzle rows =
      p.head_dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const ByteTensor query{
      p.q,
      {dim, static_cast<uint64_t>(p.num_heads), static_cast<uint64_t>(p.rows.num_tokens)},
      {static_cast<uint64_t>(p.q_head_stride), static_cast<uint64_t>(p.q_token_stride)},
      {box, 1, 64},
      rows};
  const ByteTensor key{
      p.cache.key, {dim, kBlockSize, heads}, {dim, block}, {box, kBlockSize, 1}, rows};
  const ByteTensor value{p.cache.value,
                         {kBlockSize, dim, heads},
                         {kBlockSize, block},
                         {kBlockSize, box, 1},
                         CU_TENSOR_MAP_SWIZZLE_64B};
  cudaError_t status = EncodeMap(query, &arguments->query);
  if (status == cudaSuccess) status = EncodeMap(key, &arguments->key);
  if (status == cudaSuccess) status = EncodeMap(value, &arguments->value);
  return status;
}

template <int kDim>
cudaError_t Launch(const Arguments& arguments, cudaStream_t stream) {
  using prefill_sm90::LaunchVariant;
  const bool softcap = arguments.p.softcap > 0.0f;
  if (IsDynamic(arguments.p.cache.type)) {
    return softcap ? LaunchVariant<kDim, true, true>(arguments, stream)
                   : LaunchVariant<kDim, true, false>(arguments, stream);
  }
  return softcap ? LaunchVariant<kDim, false, true>(arguments, stream)
                 : LaunchVariant<kDim, false, false>(arguments, stream);
}

}  // namespace

bool PrefillSm90Supports(const AttentionParams& p) {
  if (!p.paged || p.q_dtype != DType::kE4M3) return false;
  if (p.head_dim != 64 && p.head_dim != 128) return false;
  if (p.rows.num_tokens <= 0 || p.rows.batch <= 0 || p.num_heads <= 0) return false;
  if (p.rows.max_blocks <= 0 || p.num_kv_heads <= 0 || p.num_heads % p.num_kv_heads != 0) {
    return false;
  }
  if (!SupportsCache(p.cache)) return false;
  // The copy engine wants 16-byte steps, and a maximum of scores needs a positive factor.
  const bool strides = IsMultiple(p.q_token_stride, 16) && IsMultiple(p.q_head_stride, 16) &&
                       p.q_token_stride > 0 && p.q_head_stride > 0;
  return strides && IsAligned(p.q) && IsAligned(p.out) && p.softmax_scale > 0.0f;
}

cudaError_t LaunchPrefillSm90(const AttentionParams& p, int min_query_tokens, cudaStream_t stream) {
  if (!PrefillSm90Supports(p)) return cudaErrorInvalidValue;
  Arguments arguments;
  arguments.p = p;
  arguments.min_query_tokens = min_query_tokens;
  const cudaError_t status = EncodeMaps(&arguments);
  if (status != cudaSuccess) return status;
  return p.head_dim == 128 ? Launch<128>(arguments, stream) : Launch<64>(arguments, stream);
}

}  // namespace fastattn::cuda
