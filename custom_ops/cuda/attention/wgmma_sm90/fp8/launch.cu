#include "cuda/attention/wgmma_sm90/fp8/launch.h"

#include <cstdint>
#include <limits>

#include "cuda/attention/wgmma_sm90/fp8/variant.h"
#include "cuda/common/tma.cuh"

namespace fastattn::cuda {

namespace {

using wgmma_fp8::Arguments;

bool IsMultiple(int64_t x, int64_t of) { return x % of == 0; }

bool IsAligned(const void* pointer) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool AreAligned(const CacheStrides& strides, DType dtype) {
  return IsMultiple(strides.block * SizeOf(dtype), 16) &&
         IsMultiple(strides.head * SizeOf(dtype), 16);
}

bool IsCode(DType dtype) { return dtype == DType::kE4M3 || dtype == DType::kE5M2; }

bool SupportsCache(const PagedCache& cache) {
  const bool fp8 = cache.type == CacheType::kFp8 || cache.type == CacheType::kBlockWiseFp8;
  if (!fp8 || !IsCode(cache.dtype) || cache.layout != CacheLayout::kFastattn) return false;
  if (IsDynamic(cache.type) && cache.dtype != DType::kE4M3) return false;
  if (cache.k_scales == nullptr || cache.v_scales == nullptr) return false;
  if (IsDynamic(cache.type) && !(IsAligned(cache.k_scales) && IsAligned(cache.v_scales) &&
                                 AreAligned(cache.k_scale_strides, cache.scale_dtype) &&
                                 AreAligned(cache.v_scale_strides, cache.scale_dtype))) {
    return false;
  }
  return IsAligned(cache.key) && IsAligned(cache.value) &&
         PlanesOf(cache.key_strides, cache.num_blocks, cache.num_kv_heads, 1).fits &&
         PlanesOf(cache.value_strides, cache.num_blocks, cache.num_kv_heads, 1).fits;
}

bool SupportsRagged(const RaggedKv& kv) {
  if (!IsCode(kv.dtype) || kv.num_tokens <= 0) return false;
  if (kv.num_tokens >= std::numeric_limits<int>::max()) return false;
  for (int64_t stride : {kv.key_token_stride, kv.key_head_stride}) {
    if (stride <= 0 || !IsMultiple(stride, 16)) return false;
  }
  return IsMultiple(kv.value_token_stride, 4) && IsMultiple(kv.value_head_stride, 4) &&
         IsAligned(kv.key) && IsAligned(kv.value);
}

// Blocks of V, paged or transposed.
int64_t ValueBlocks(const AttentionParams& p) {
  return p.paged ? p.cache.num_blocks : p.ragged.num_tokens / kBlockSize + p.seqs.batch;
}

// Encodes the tensor maps: queries [T, H, D], the codes of K as rows of tokens and those of V as
// rows of channels.
cudaError_t EncodeMaps(Arguments* arguments) {
  const AttentionParams& p = arguments->p;
  const auto dim = static_cast<uint64_t>(p.head_dim);
  const auto box = static_cast<uint32_t>(p.head_dim);
  // LaunchTranspose writes ragged values as blocks of a contiguous cache.
  const int64_t plane = int64_t{kBlockSize} * p.head_dim;
  const CacheStrides blocks{plane * p.num_kv_heads, plane, kBlockSize};
  const CacheStrides& key_strides = p.paged ? p.cache.key_strides : blocks;
  const CacheStrides& value_strides = p.paged ? p.cache.value_strides : blocks;
  const PlaneDimension keys = PlanesOf(key_strides, arguments->value_blocks, p.num_kv_heads, 1);
  const PlaneDimension values = PlanesOf(value_strides, arguments->value_blocks, p.num_kv_heads, 1);
  arguments->key_planes = keys.planes;
  arguments->value_planes = values.planes;
  const CUtensorMapSwizzle swizzle =
      p.head_dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const ByteTensor query{
      p.q,
      {dim, static_cast<uint64_t>(p.num_heads), static_cast<uint64_t>(p.seqs.num_tokens)},
      {static_cast<uint64_t>(p.q_head_stride), static_cast<uint64_t>(p.q_token_stride)},
      {box, 1, 64},
      swizzle};
  ByteTensor key{p.cache.key,
                 {dim, kBlockSize, static_cast<uint64_t>(keys.planes.outside)},
                 {static_cast<uint64_t>(key_strides.row), keys.stride},
                 {box, kBlockSize, 1},
                 swizzle};
  if (!p.paged) {
    key.data = p.ragged.key;
    key.size[1] = static_cast<uint64_t>(p.ragged.num_tokens);
    key.size[2] = static_cast<uint64_t>(p.num_kv_heads);
    key.stride[0] = static_cast<uint64_t>(p.ragged.key_token_stride);
    key.stride[1] = static_cast<uint64_t>(p.ragged.key_head_stride);
  }
  const ByteTensor value{p.paged ? p.cache.value : p.workspace,
                         {kBlockSize, dim, static_cast<uint64_t>(values.planes.outside)},
                         {static_cast<uint64_t>(value_strides.row), values.stride},
                         {kBlockSize, box, 1},
                         CU_TENSOR_MAP_SWIZZLE_64B};
  cudaError_t status = EncodeMap(query, &arguments->query);
  if (status == cudaSuccess) status = EncodeMap(key, &arguments->key);
  if (status == cudaSuccess) status = EncodeMap(value, &arguments->value);
  return status;
}

template <int kDim, bool kSoftcap>
cudaError_t Launch(const Arguments& arguments, cudaStream_t stream) {
  using wgmma_fp8::LaunchVariant;
  const AttentionParams& p = arguments.p;
  constexpr DType kE4M3 = DType::kE4M3, kE5M2 = DType::kE5M2;
  if (p.paged && IsDynamic(p.cache.type)) {
    return LaunchVariant<kDim, true, kSoftcap, kE4M3>(arguments, stream);
  }
  const DType codes = p.paged ? p.cache.dtype : p.ragged.dtype;
  return codes == kE5M2 ? LaunchVariant<kDim, false, kSoftcap, kE5M2>(arguments, stream)
                        : LaunchVariant<kDim, false, kSoftcap, kE4M3>(arguments, stream);
}

template <int kDim>
cudaError_t Launch(const Arguments& arguments, cudaStream_t stream) {
  return arguments.p.softcap > 0.0f ? Launch<kDim, true>(arguments, stream)
                                    : Launch<kDim, false>(arguments, stream);
}

}  // namespace

bool WgmmaFp8Supports(const AttentionParams& p) {
  if (p.q_dtype != DType::kE4M3 || (p.head_dim != 64 && p.head_dim != 128)) return false;
  if (p.seqs.num_tokens <= 0 || p.seqs.batch <= 0 || p.num_heads <= 0) return false;
  if (p.num_kv_heads <= 0 || p.num_kv_heads > 65535 || p.num_heads % p.num_kv_heads != 0) {
    return false;
  }
  if (p.paged ? p.seqs.max_blocks <= 0 || !SupportsCache(p.cache) : !SupportsRagged(p.ragged)) {
    return false;
  }
  if ((ValueBlocks(p) + 1) * p.num_kv_heads >= std::numeric_limits<int>::max()) return false;
  // TMA wants strides of 16 bytes, and a maximum of scores needs a positive factor.
  const bool strides = IsMultiple(p.q_token_stride, 16) && IsMultiple(p.q_head_stride, 16) &&
                       p.q_token_stride > 0 && p.q_head_stride > 0;
  return strides && IsAligned(p.q) && IsAligned(p.out) && p.softmax_scale > 0.0f;
}

int64_t WgmmaFp8Workspace(const AttentionParams& p) {
  if (p.paged) return 0;
  return ValueBlocks(p) * p.num_kv_heads * p.head_dim * kBlockSize / sizeof(float);
}

cudaError_t LaunchWgmmaFp8(const AttentionParams& p, int min_query_tokens, cudaStream_t stream) {
  if (!WgmmaFp8Supports(p)) return cudaErrorInvalidValue;
  Arguments arguments;
  arguments.p = p;
  arguments.min_query_tokens = min_query_tokens;
  arguments.value_blocks = static_cast<int>(ValueBlocks(p));
  cudaError_t status = EncodeMaps(&arguments);
  if (status == cudaSuccess && !p.paged) {
    status = wgmma_fp8::LaunchTranspose(p, reinterpret_cast<uint8_t*>(p.workspace), stream);
  }
  if (status != cudaSuccess) return status;
  return p.head_dim == 128 ? Launch<128>(arguments, stream) : Launch<64>(arguments, stream);
}

}  // namespace fastattn::cuda
