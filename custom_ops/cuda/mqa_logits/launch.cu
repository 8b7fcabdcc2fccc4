#include "cuda/mqa_logits/launch.h"

#include <algorithm>

#include "common/dispatch.h"
#include "cuda/common/tma.cuh"
#include "cuda/mqa_logits/config.h"
#include "cuda/mqa_logits/instances.h"
#include "cuda/mqa_logits/mma.h"

namespace fastattn::cuda::mqa_logits {

namespace {

bool Aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Columns of a call's groups: as few as hold a step's queries.
int ColumnsOf(const LogitsParams& p) {
  if (!p.paged) return p.quant == IndexerQuant::kFp8 ? 256 : 128;
  return p.next_n * p.num_heads <= 64 ? 64 : 128;
}

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
                              {kDim, static_cast<uint32_t>(ColumnsOf(p)), 1},
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

// Whether the Hopper kernel (wgmma_kernel.cuh) takes a call.
bool WgmmaSupports(const LogitsParams& p) {
  const bool heads =
      p.num_heads == 8 || p.num_heads == 16 || p.num_heads == 32 || p.num_heads == 64;
  // Coordinates are 32-bit: of heads, and of the scales' bytes.
  constexpr int64_t kMost = int64_t{1} << 31;
  if (p.head_dim != kDim || !heads || !Aligned16(p.q)) return false;
  if ((p.rows + 256) * p.num_heads >= kMost) return false;
  // Units of work (schedule.cuh) are counted in 32 bits: more of them have 500 GB of logits.
  const int64_t groups = LogitsGroups(p, ColumnsOf(p) / p.num_heads).count;
  const int64_t keys = p.paged ? p.columns : std::max(p.columns, p.num_keys);
  if (groups * (keys / kTileKeys + 6) >= kMost) return false;
  if (!p.paged) {
    return p.num_keys > 0 && (p.num_keys + kTileKeys) * kLogitsScaleBytes < kMost &&
           Aligned16(p.keys) && Aligned16(p.key_scales);
  }
  const int64_t size = p.page_size;
  const bool pages = size % kTileKeys == 0 || size == 8 || size == 16 || size == 32;
  return p.num_pages > 0 && pages && Aligned16(p.cache) && p.page_stride % 16 == 0 &&
         p.page_stride > 0 && p.columns < kMost - kTileKeys;
}

cudaError_t LaunchWgmma(const LogitsParams& p, cudaStream_t stream) {
  Arguments arguments = {};
  arguments.p = p;
  const int columns = ColumnsOf(p);
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
  if (facts.major == 9 && mqa_logits::WgmmaSupports(p)) return mqa_logits::LaunchWgmma(p, stream);
  return mqa_logits::LaunchMma(p, stream);
}

}  // namespace fastattn::cuda
