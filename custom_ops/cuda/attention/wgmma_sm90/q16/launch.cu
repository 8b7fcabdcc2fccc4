#include "cuda/attention/wgmma_sm90/q16/launch.h"

#include <cstdint>
#include <tuple>

#include "cuda/attention/wgmma_sm90/q16/instances.h"
#include "cuda/common/tma.cuh"
#include "plan/wgmma_support.h"

namespace fastattn::cuda {

namespace {

using wgmma_q16::Arguments;
using wgmma_q16::CodeParts;
using wgmma_q16::Instances;
using wgmma_sm90::PaddedDim;

bool IsCode(DType dtype) {
  return dtype == DType::kE4M3 || dtype == DType::kE5M2 || dtype == DType::kInt8 ||
         dtype == DType::kInt4;
}

// Whether codes of K are operands as they lie. Two e4m3 codes hold a bf16 query, but not the bits
// of fp16, nor those of a product with the scales of channels.
bool KeyCodes(const AttentionParams& p) {
  if (p.head_dim > 128) return false;  // two codes of each channel take too many registers
  if (KeyType(p) != DType::kE4M3) return KeyType(p) == DType::kInt8;  // of 4 bits: see below
  const bool channels = p.paged && p.cache.k_granularity == ScaleScheme::kChannel;
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

// Tokens of K or V as rows: 16-bit values in boxes of 64 tokens x 128 bytes, codes in blocks, or
// parts of them.
ByteTensor RowTensor(const AttentionParams& p, const void* paged, const CacheStrides& strides,
                     const void* ragged, int64_t token_stride, int64_t head_stride, int head_dim,
                     BlockPlanes* planes) {
  const auto size = static_cast<uint64_t>(SizeOf(KeyType(p)));
  const uint64_t row = size * static_cast<uint64_t>(head_dim / CodesPerByte(KeyType(p)));
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
  const int padded = PaddedDim(head_dim);
  tensor.box[0] = size == 1 ? static_cast<uint32_t>(padded / CodesPerByte(KeyType(p))) : 128;
  tensor.box[1] = static_cast<uint32_t>(kBlockSize / (size == 1 ? CodeParts(padded) : 1));
  tensor.box[2] = 1;
  tensor.swizzle = size == 1 ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B;
  return tensor;
}

// V of a cache of codes: channels as rows.
ByteTensor ChannelTensor(const AttentionParams& p, BlockPlanes* planes) {
  ByteTensor tensor = PlaneTensor(p, p.cache.value, p.cache.value_strides, planes);
  tensor.size[0] = kBlockSize;
  tensor.size[1] = static_cast<uint64_t>(p.cache.ValueElements());
  tensor.box[0] = kBlockSize;
  const int padded = PaddedDim(p.head_dim) / CodesPerByte(p.cache.dtype);
  tensor.box[1] = static_cast<uint32_t>(padded / CodeParts(p.head_dim));
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
                             kv.key_head_stride, p.head_dim, &arguments->key_planes);
  if (KeyCodes(p)) {
    key.swizzle =
        PaddedDim(p.head_dim) == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  }
  const ByteTensor value =
      p.paged && IsQuantized(p.cache.type)
          ? ChannelTensor(p, &arguments->value_planes)
          : RowTensor(p, p.cache.value, p.cache.value_strides, kv.value, kv.value_token_stride,
                      kv.value_head_stride, ValueDim(p.head_dim), &arguments->value_planes);
  cudaError_t status = EncodeMap(query, &arguments->query);
  if (status == cudaSuccess) status = EncodeMap(key, &arguments->key);
  if (status == cudaSuccess) status = EncodeMap(value, &arguments->value);
  return status;
}

// Template arguments of the variant for these parameters.
auto VariantOf(const AttentionParams& p) {
  using wgmma_q16::Source;
  const bool codes = IsCode(KeyType(p));
  const bool nibbles = CodesPerByte(KeyType(p)) == 2;
  const DType operand = nibbles       ? DType::kFloat16
                        : !codes      ? p.q_dtype
                        : KeyCodes(p) ? KeyType(p)
                                      : DType::kFloat16;
  const Source source = nibbles   ? Source::kPagedNibbles
                        : !codes  ? Source::k16Bit
                        : p.paged ? Source::kPagedCodes
                                  : Source::kRaggedCodes;
  return std::tuple{Wanted{"operand", operand}, Wanted{"head_dim", p.head_dim},
                    Wanted{"source", source},
                    Wanted{"per_token_scales", codes && p.paged && IsDynamic(p.cache.type)}};
}

}  // namespace

cudaError_t LaunchWgmmaQ16(const AttentionParams& p, int min_query_tokens, cudaStream_t stream) {
  if (WgmmaQ16Lacks(p) != nullptr) return cudaErrorInvalidValue;
  Arguments arguments;
  arguments.p = p;
  arguments.min_query_tokens = min_query_tokens;
  cudaError_t status = EncodeMaps(&arguments);
  if (status != cudaSuccess) return status;
  dispatch(Instances{}, VariantOf(p), [&](auto... values) {
    status = wgmma_q16::LaunchVariant<decltype(values)::value...>(arguments, stream);
  });
  return status;
}

}  // namespace fastattn::cuda
