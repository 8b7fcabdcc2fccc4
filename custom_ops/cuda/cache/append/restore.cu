#include "cuda/cache/append/restore.cuh"

#include "common/dispatch.h"
#include "common/head_dims.h"
#include "cuda/cache/append/launch.h"
#include "cuda/cache/shared/seq_tiles.cuh"
#include "cuda/common/launch.cuh"

namespace fastattn::cuda {

cudaError_t LaunchRestoreKey(const AppendCacheParams& p, const KeyTransform& transform,
                             cudaStream_t stream) {
  if (!transform.Any() || p.num_out_tokens == 0 || p.batch == 0 || p.max_blocks == 0 ||
      p.cache.num_blocks == 0) {
    return cudaSuccess;
  }
  const int64_t ctas = NumTileSlots(p.num_out_tokens, p.batch) * p.cache.num_kv_heads;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch<DType::kBFloat16, DType::kFloat16>(p.dtype, "key dtype", [&](auto out) {
    dispatch<DType::kInt8, DType::kE4M3, DType::kInt4, DType::kE2M1>(
        p.cache.dtype, "codes", [&](auto code) {
          constexpr DType kCode = decltype(code)::value;
          AttentionHeadDims::Dispatch(p.cache.head_dim, [&](auto head_dim) {
            status =
                LaunchPdl(RestoreKeyKernel<decltype(out)::value, kCode, decltype(head_dim)::value>,
                          dim3(GridSize(ctas)), dim3(kRestoreThreads), stream, p, transform);
          });
        });
  });
  return status;
}

}  // namespace fastattn::cuda
