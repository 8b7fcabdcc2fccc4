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
    DispatchFormat(p.cache.type, p.cache.dtype, [&](auto format) {
      using Key = typename decltype(format)::Key;
      if constexpr (Key::kQuantized && Key::kCode != DType::kE5M2) {  // which is not transformed
        constexpr Scales kScales = Key::kGrouped ? Key::kScales : Scales::kStatic;
        using Side = SideFormat<Key::kCode, kScales>;
        AttentionHeadDims::Dispatch(p.cache.head_dim, [&](auto head_dim) {
          status =
              LaunchPdl(RestoreKeyKernel<decltype(out)::value, Side, decltype(head_dim)::value>,
                        dim3(GridSize(ctas)), dim3(kRestoreThreads), stream, p, transform);
        });
      }
    });
  });
  return status;
}

}  // namespace fastattn::cuda
