#include "cuda/attention/wgmma_sm90/fp8/launch.h"

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "cuda/attention/wgmma_sm90/fp8/instances.h"
#include "cuda/common/tma.cuh"
#include "plan/wgmma_support.h"

namespace fastattn::cuda {

namespace {

using wgmma_fp8::Arguments;
using wgmma_fp8::Instances;
using wgmma_sm90::PaddedDim;

// Encodes the tensor maps: queries [T, H, D], the codes of K as rows of tokens and those of V as
// rows of channels.
cudaError_t EncodeMaps(Arguments* arguments) {
  const AttentionParams& p = arguments->p;
  const auto dim = static_cast<uint64_t>(p.head_dim);
  const auto value_dim = static_cast<uint32_t>(ValueDim(p.head_dim));
  const auto box = std::min<uint32_t>(PaddedDim(p.head_dim), 128);  // Config::kSlice
  // LaunchTranspose writes ragged values as blocks of a contiguous cache.
  const int64_t plane = int64_t{kBlockSize} * value_dim;
  const CacheStrides blocks{plane * p.num_kv_heads, plane, kBlockSize};
  const CacheStrides& key_strides = p.paged ? p.cache.key_strides : blocks;
  const CacheStrides& value_strides = p.paged ? p.cache.value_strides : blocks;
  const PlaneDimension keys = PlanesOf(key_strides, arguments->value_blocks, p.num_kv_heads, 1);
  const PlaneDimension values = PlanesOf(value_strides, arguments->value_blocks, p.num_kv_heads, 1);
  arguments->key_planes = keys.planes;
  arguments->value_planes = values.planes;
  const CUtensorMapSwizzle swizzle =
      box == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
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
                         {kBlockSize, value_dim, static_cast<uint64_t>(values.planes.outside)},
                         {static_cast<uint64_t>(value_strides.row), values.stride},
                         {kBlockSize, static_cast<uint32_t>(PaddedDim(value_dim)), 1},
                         CU_TENSOR_MAP_SWIZZLE_64B};
  cudaError_t status = EncodeMap(query, &arguments->query);
  if (status == cudaSuccess) status = EncodeMap(key, &arguments->key);
  if (status == cudaSuccess) status = EncodeMap(value, &arguments->value);
  if (PaddedDim(p.head_dim) % box != 0 && status == cudaSuccess) {  // Config::kTail
    ByteTensor query_tail = query, key_tail = key;
    query_tail.box[0] = key_tail.box[0] = 64;
    query_tail.swizzle = key_tail.swizzle = CU_TENSOR_MAP_SWIZZLE_64B;
    status = EncodeMap(query_tail, &arguments->query_tail);
    if (status == cudaSuccess) status = EncodeMap(key_tail, &arguments->key_tail);
  }
  return status;
}

// Template arguments of the variant for these parameters.
auto VariantOf(const AttentionParams& p) {
  return std::tuple{Wanted{"head_dim", p.head_dim},
                    Wanted{"per_token_scales", p.paged && IsDynamic(p.cache.type)},
                    Wanted{"softcap", p.softcap > 0.0f},
                    Wanted{"code", p.paged ? p.cache.dtype : p.ragged.dtype}};
}

}  // namespace

cudaError_t LaunchWgmmaFp8(const AttentionParams& p, int min_query_tokens, cudaStream_t stream) {
  if (WgmmaFp8Lacks(p) != nullptr) return cudaErrorInvalidValue;
  Arguments arguments;
  arguments.p = p;
  arguments.min_query_tokens = min_query_tokens;
  arguments.value_blocks = static_cast<int>(WgmmaFp8ValueBlocks(p));
  cudaError_t status = EncodeMaps(&arguments);
  if (status == cudaSuccess && !p.paged) {
    status = wgmma_fp8::LaunchTranspose(p, reinterpret_cast<uint8_t*>(p.workspace), stream);
  }
  if (status != cudaSuccess) return status;
  dispatch(Instances{}, VariantOf(p), [&](auto... values) {
    status = wgmma_fp8::LaunchVariant<decltype(values)::value...>(arguments, stream);
  });
  return status;
}

}  // namespace fastattn::cuda
