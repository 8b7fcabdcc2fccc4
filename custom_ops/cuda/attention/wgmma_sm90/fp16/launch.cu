#include "cuda/attention/wgmma_sm90/fp16/launch.h"

#include <cstdint>
#include <limits>

#include "cuda/attention/wgmma_sm90/fp16/variant.h"
#include "cuda/common/tma.cuh"

namespace fastattn::cuda {

namespace {

using wgmma_fp16::Arguments;

bool IsHalf(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

bool IsAligned(const void* pointer) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether TMA takes a stride of so many elements.
bool IsStride(int64_t elements, DType dtype) {
  return elements > 0 && elements * SizeOf(dtype) % 16 == 0;
}

bool IsCode(DType dtype) {
  return dtype == DType::kE4M3 || dtype == DType::kE5M2 || dtype == DType::kInt8;
}

bool SupportsCache(const PagedCache& cache, DType query) {
  if (!IsAligned(cache.key) || !IsAligned(cache.value)) return false;
  for (const CacheStrides* strides : {&cache.key_strides, &cache.value_strides}) {
    if (!PlanesOf(*strides, cache.num_blocks, cache.num_kv_heads, SizeOf(cache.dtype)).fits) {
      return false;
    }
  }
  if (!IsQuantized(cache.type)) return cache.dtype == query;
  // e5m2 reaches too far for fp16 times a per-token scale.
  if (IsDynamic(cache.type) && cache.dtype == DType::kE5M2) return false;
  return IsCode(cache.dtype) && cache.layout == CacheLayout::kFastattn &&
         cache.k_scales != nullptr && cache.v_scales != nullptr;
}

bool SupportsRagged(const RaggedKv& kv, DType query) {
  if ((kv.dtype != query && !IsCode(kv.dtype)) || kv.num_tokens <= 0) return false;
  if (kv.num_tokens >= std::numeric_limits<int>::max()) return false;
  for (int64_t stride :
       {kv.key_token_stride, kv.key_head_stride, kv.value_token_stride, kv.value_head_stride}) {
    if (!IsStride(stride, kv.dtype)) return false;
  }
  return IsAligned(kv.key) && IsAligned(kv.value);
}

DType KeyType(const AttentionParams& p) { return p.paged ? p.cache.dtype : p.ragged.dtype; }

// Whether K's codes are operands as they lie. Two e4m3 codes hold a bf16 query, but not the bits of
// fp16, nor those of a product with per-channel scales.
bool KeyCodes(const AttentionParams& p) {
  if (KeyType(p) != DType::kE4M3) return KeyType(p) == DType::kInt8;
  const bool channels = p.paged && p.cache.k_granularity == ScaleGranularity::kChannel;
  return p.q_dtype == DType::kBFloat16 && !channels;
}

// A cache's planes, all but the size and box of their rows; *planes finds those of a block.
ByteTensor PlaneTensor(const AttentionParams& p, const void* data, const CacheStrides& strides,
                       BlockPlanes* planes) {
  const int size = SizeOf(p.cache.dtype);
  const PlaneDimension dimension = PlanesOf(strides, p.cache.num_blocks, p.num_kv_heads, size);
  *planes = dimension.planes;
  ByteTensor tensor;
  tensor.data = data;
  tensor.size[2] = static_cast<uint64_t>(dimension.planes.outside);
  tensor.stride[0] = static_cast<uint64_t>(strides.row * size);
  tensor.stride[1] = dimension.stride;
  return tensor;
}

// Tokens of K or V as rows: 16-bit values in boxes of 64 tokens x 128 bytes, codes in whole blocks.
ByteTensor RowTensor(const AttentionParams& p, const void* paged, const CacheStrides& strides,
                     const void* ragged, int64_t token_stride, int64_t head_stride,
                     BlockPlanes* planes) {
  const auto size = static_cast<uint64_t>(SizeOf(KeyType(p)));
  const uint64_t row = size * static_cast<uint64_t>(p.head_dim);
  ByteTensor tensor;
  if (p.paged) {
    tensor = PlaneTensor(p, paged, strides, planes);
    tensor.size[1] = kBlockSize;
  } else {
    tensor.data = ragged;
    tensor.size[1] = static_cast<uint64_t>(p.ragged.num_tokens);
    tensor.size[2] = static_cast<uint64_t>(p.num_kv_heads);
    tensor.stride[0] = size * static_cast<uint64_t>(token_stride);
    tensor.stride[1] = size * static_cast<uint64_t>(head_stride);
  }
  tensor.size[0] = row;
  tensor.box[0] = size == 1 ? static_cast<uint32_t>(row) : 128;
  tensor.box[1] = kBlockSize;
  tensor.box[2] = 1;
  tensor.swizzle = size == 1 ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B;
  return tensor;
}

// V of a cache of codes: channels as rows.
ByteTensor ChannelTensor(const AttentionParams& p, BlockPlanes* planes) {
  ByteTensor tensor = PlaneTensor(p, p.cache.value, p.cache.value_strides, planes);
  tensor.size[0] = kBlockSize;
  tensor.size[1] = static_cast<uint64_t>(p.head_dim);
  tensor.box[0] = kBlockSize;
  tensor.box[1] = static_cast<uint32_t>(p.head_dim);
  tensor.box[2] = 1;
  tensor.swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
  return tensor;
}

cudaError_t EncodeMaps(Arguments* arguments) {
  const AttentionParams& p = arguments->p;
  const RaggedKv& kv = p.ragged;
  const ByteTensor query{
      p.q,
      {2 * static_cast<uint64_t>(p.head_dim), static_cast<uint64_t>(p.num_heads),
       static_cast<uint64_t>(p.seqs.num_tokens)},
      {2 * static_cast<uint64_t>(p.q_head_stride), 2 * static_cast<uint64_t>(p.q_token_stride)},
      {128, 1, 64},
      CU_TENSOR_MAP_SWIZZLE_128B};
  ByteTensor key = RowTensor(p, p.cache.key, p.cache.key_strides, kv.key, kv.key_token_stride,
                             kv.key_head_stride, &arguments->key_planes);
  if (KeyCodes(p)) {
    key.swizzle = p.head_dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  }
  const ByteTensor value =
      p.paged && IsQuantized(p.cache.type)
          ? ChannelTensor(p, &arguments->value_planes)
          : RowTensor(p, p.cache.value, p.cache.value_strides, kv.value, kv.value_token_stride,
                      kv.value_head_stride, &arguments->value_planes);
  cudaError_t status = EncodeMap(query, &arguments->query);
  if (status == cudaSuccess) status = EncodeMap(key, &arguments->key);
  if (status == cudaSuccess) status = EncodeMap(value, &arguments->value);
  return status;
}

template <int kDim, wgmma_fp16::Source kSource, bool kPerTokenScales>
cudaError_t LaunchCodes(const Arguments& arguments, cudaStream_t stream) {
  using wgmma_fp16::LaunchVariant;
  if (!KeyCodes(arguments.p)) {
    return LaunchVariant<DType::kFloat16, kDim, kSource, kPerTokenScales>(arguments, stream);
  }
  if (KeyType(arguments.p) == DType::kInt8) {
    return LaunchVariant<DType::kInt8, kDim, kSource, kPerTokenScales>(arguments, stream);
  }
  return LaunchVariant<DType::kE4M3, kDim, kSource, kPerTokenScales>(arguments, stream);
}

template <int kDim>
cudaError_t Launch(const Arguments& arguments, cudaStream_t stream) {
  using wgmma_fp16::LaunchVariant;
  using wgmma_fp16::Source;
  const AttentionParams& p = arguments.p;
  constexpr DType kBf16 = DType::kBFloat16, kFp16 = DType::kFloat16;
  if (!IsCode(KeyType(p))) {
    return p.q_dtype == kBf16
               ? LaunchVariant<kBf16, kDim, Source::k16Bit, false>(arguments, stream)
               : LaunchVariant<kFp16, kDim, Source::k16Bit, false>(arguments, stream);
  }
  if (!p.paged) return LaunchCodes<kDim, Source::kRaggedCodes, false>(arguments, stream);
  return IsDynamic(p.cache.type) ? LaunchCodes<kDim, Source::kPagedCodes, true>(arguments, stream)
                                 : LaunchCodes<kDim, Source::kPagedCodes, false>(arguments, stream);
}

}  // namespace

bool WgmmaFp16Supports(const AttentionParams& p) {
  if (!IsHalf(p.q_dtype) || (p.head_dim != 64 && p.head_dim != 128)) return false;
  if (p.seqs.num_tokens <= 0 || p.seqs.batch <= 0 || p.num_heads <= 0) return false;
  if (p.num_kv_heads <= 0 || p.num_kv_heads > 65535 || p.num_heads % p.num_kv_heads != 0) {
    return false;
  }
  if (p.paged) {
    if (p.seqs.max_blocks <= 0 || !SupportsCache(p.cache, p.q_dtype)) return false;
  } else if (!SupportsRagged(p.ragged, p.q_dtype)) {
    return false;
  }
  // A maximum of scores needs a positive factor.
  return IsStride(p.q_token_stride, p.q_dtype) && IsStride(p.q_head_stride, p.q_dtype) &&
         IsAligned(p.q) && IsAligned(p.out) && p.softmax_scale > 0.0f;
}

cudaError_t LaunchWgmmaFp16(const AttentionParams& p, int min_query_tokens, cudaStream_t stream) {
  if (!WgmmaFp16Supports(p)) return cudaErrorInvalidValue;
  Arguments arguments;
  arguments.p = p;
  arguments.min_query_tokens = min_query_tokens;
  const cudaError_t status = EncodeMaps(&arguments);
  if (status != cudaSuccess) return status;
  return p.head_dim == 128 ? Launch<128>(arguments, stream) : Launch<64>(arguments, stream);
}

}  // namespace fastattn::cuda
