#include "cuda/mqa_logits/launch.h"

#include <algorithm>

#include "common/dispatch.h"
#include "cuda/common/tma.cuh"
#include "cuda/mqa_logits/config.h"
#include "cuda/mqa_logits/instances.h"
#include "cuda/mqa_logits/mma.h"
#include "plan/mqa_logits.h"

namespace fastattn::cuda::mqa_logits {

namespace {

cudaError_t EncodeMaps(Arguments* arguments) {
  const LogitsParams& p = arguments->p;
  const bool fp8 = p.quant == IndexerQuant::kFp8;
  const uint64_t bytes = static_cast<uint64_t>(p.CodeBytes());
  const uint64_t heads = static_cast<uint64_t>(p.rows) * p.num_heads;
  cudaError_t status = cudaSuccess;
  if (fp8) {
    const ByteTensor query = {p.q,
                              {bytes, heads, 1},
                              {bytes, bytes * heads},
                              {kDim, static_cast<uint32_t>(LogitsColumns(p)), 1},
                              CU_TENSOR_MAP_SWIZZLE_128B};
    status = EncodeMap(query, &arguments->query);
    if (status != cudaSuccess) return status;
  }
  if (p.paged && !fp8) return cudaSuccess;  // pages of MXFP4 are copied as they are
  ByteTensor key = {p.keys,
                    {bytes, static_cast<uint64_t>(p.num_keys), 1},
                    {bytes, bytes * p.num_keys},
                    {static_cast<uint32_t>(bytes), kTileKeys, 1},
                    fp8 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE};
  if (p.paged) {
    key.data = p.cache;
    key.size[1] = p.page_size, key.size[2] = p.num_pages;
    key.stride[1] = p.page_stride;
    key.box[1] = static_cast<uint32_t>(std::min<int64_t>(p.page_size, kTileKeys));
    return EncodeMap(key, &arguments->key);
  }
  status = EncodeMap(key, &arguments->key);
  if (status != cudaSuccess) return status;
  const uint64_t scale_bytes = static_cast<uint64_t>(p.num_keys) * kLogitsScaleBytes;
  const ByteTensor scales = {p.key_scales,
                             {scale_bytes, 1, 1},
                             {(scale_bytes + 15) / 16 * 16, (scale_bytes + 15) / 16 * 16},
                             {kTileKeys * kLogitsScaleBytes, 1, 1},
                             CU_TENSOR_MAP_SWIZZLE_NONE};
  return EncodeMap(scales, &arguments->key_scales);
}

cudaError_t LaunchWgmma(const LogitsParams& p, cudaStream_t stream) {
  Arguments arguments = {};
  arguments.p = p;
  const int columns = LogitsColumns(p);
  arguments.groups = LogitsGroups(p, columns / p.num_heads);
  arguments.most_keys = static_cast<int>(std::min(p.columns, p.max_blocks * p.page_size));
  cudaError_t status = EncodeMaps(&arguments);
  if (status != cudaSuccess) return status;
  dispatch(LogitsInstances{},
           std::tuple{Wanted{"quant", p.quant}, Wanted{"paged", p.paged},
                      Wanted{"heads", p.num_heads}, Wanted{"columns", columns}},
           [&](auto... values) {
             status = LaunchLogitsVariant<decltype(values)::value...>(arguments, stream);
           });
  return status;
}

}  // namespace

}  // namespace fastattn::cuda::mqa_logits

namespace fastattn::cuda {

cudaError_t LaunchMqaLogits(const LogitsParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return cudaSuccess;
  int device = 0;
  DeviceFacts facts;
  const cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status != cudaSuccess) return status;
  switch (ChooseKernel(kLogitsKernels, p, facts.major).kernel) {
    case LogitsKernel::kWgmma:
      return mqa_logits::LaunchWgmma(p, stream);
    case LogitsKernel::kMma:
      return mqa_logits::LaunchMma(p, stream);
  }
  return cudaErrorUnknown;
}

}  // namespace fastattn::cuda
