#include "cuda/compat/gqa_rope/launch.h"

#include <tuple>

#include "cuda/cache/append/launch.h"
#include "cuda/cache/shared/append_tile.cuh"
#include "cuda/cache/shared/seq_tiles.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/compat/gqa_rope/instances.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;

// One CTA copies the tokens of one block of one KV head. Values of 16 bits need no conversion.
__global__ void __launch_bounds__(kThreads)
    Prefix16Kernel(const __grid_constant__ AppendCacheParams p) {
  const AppendTile tile = BeginAppendTile(p, blockIdx.x);
  if (tile.block < 0) return;
  const int block = tile.block;
  const int head = blockIdx.y;
  const int pieces = p.cache.head_dim / 8;  // of 16 bytes, a token
  const PagedCache& cache = p.cache;
  const auto* keys = static_cast<const uint16_t*>(cache.key) + cache.key_strides.Plane(block, head);
  const auto* values =
      static_cast<const uint16_t*>(cache.value) + cache.value_strides.Plane(block, head);
  for (int i = threadIdx.x; i < tile.count * pieces; i += kThreads) {
    const int token = i / pieces, channel = i % pieces * 8;
    const int64_t out = tile.out_token + token;
    const int64_t target = (out * cache.num_kv_heads + head) * pieces + i % pieces;
    static_cast<uint4*>(p.key)[target] =
        *reinterpret_cast<const uint4*>(keys + token * cache.key_strides.row + channel);
    static_cast<uint4*>(p.value)[target] =
        *reinterpret_cast<const uint4*>(values + token * cache.value_strides.row + channel);
  }
}

}  // namespace

cudaError_t LaunchGqaPrefix16(const AppendCacheParams& p, cudaStream_t stream) {
  const dim3 grid(GridSize(NumTileSlots(p.num_out_tokens, p.batch)), p.cache.num_kv_heads);
  return LaunchPdl(Prefix16Kernel, grid, dim3(kThreads), stream, p);
}

cudaError_t LaunchGqaRopeWriteCache(const GqaRopeWriteCacheParams& p, cudaStream_t stream) {
  const SeqMeta& seqs = p.rope.seqs;
  cudaError_t status = cudaSuccess;
  if (seqs.num_tokens > 0) {
    const std::tuple wanted{Wanted{"qkv dtype", p.rope.dtype}};
    dispatch(GqaTokensInstances{}, wanted,
             [&](auto dtype) { status = LaunchGqaTokens<decltype(dtype)::value>(p, stream); });
  }
  if (status != cudaSuccess || seqs.batch == 0 || p.num_kv_tokens == 0) return status;
  AppendCacheParams prefix = PrefixOf(p);
  prefix.overlaps_previous = seqs.num_tokens > 0;
  return p.rope.cache.type == CacheType::kNone ? LaunchGqaPrefix16(prefix, stream)
                                               : LaunchAppendCache(prefix, stream);
}

}  // namespace fastattn::cuda
