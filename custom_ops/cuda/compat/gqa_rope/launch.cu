#include "cuda/compat/gqa_rope/launch.h"

#include <tuple>

#include "common/block_table.h"
#include "common/seq_lengths.h"
#include "cuda/cache/append/launch.h"
#include "cuda/cache/shared/seq_tiles.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/compat/gqa_rope/instances.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;

// What the kernel of the new tokens does beside them, for a step that has none.
__global__ void PrefixLengthsKernel(const __grid_constant__ GqaRopeWriteCacheParams p) {
  const int batch_idx = blockIdx.x * kThreads + threadIdx.x;
  if (batch_idx < p.rope.seqs.batch) {
    p.prefix_lens[batch_idx] =
        PrefixLength(p.seq_lens_encoder[batch_idx], p.rope.seqs.seq_lens_decoder[batch_idx]);
  }
}

// One CTA copies the tokens of one block of one KV head. Values of 16 bits need no conversion.
__global__ void __launch_bounds__(kThreads)
    Prefix16Kernel(const __grid_constant__ AppendCacheParams p) {
  PdlWait();
  const int batch_idx = FindSeq(p.cu_seqlens_k, p.batch, blockIdx.x);
  if (batch_idx < 0) return;
  const TokenRange<int64_t> prefix =
      WrittenTokens<int64_t>(p.cu_seqlens_k[batch_idx], p.cu_seqlens_k[batch_idx + 1],
                             p.seq_lens_decoder[batch_idx], p.num_out_tokens);
  const int64_t tile = blockIdx.x - FirstSlot(static_cast<int>(prefix.begin), batch_idx);
  const int64_t begin = tile * kBlockSize;
  if (begin >= prefix.count || tile >= p.max_blocks) return;
  const int block = *BlockEntry(p.block_tables, p.max_blocks, batch_idx, tile);
  if (block < 0 || block >= p.cache.num_blocks) return;
  const int tokens = static_cast<int>(min(prefix.count - begin, int64_t{kBlockSize}));
  const int head = blockIdx.y;
  const int pieces = p.cache.head_dim / 8;  // of 16 bytes, a token
  const PagedCache& cache = p.cache;
  const auto* keys = static_cast<const uint16_t*>(cache.key) + cache.key_strides.Plane(block, head);
  const auto* values =
      static_cast<const uint16_t*>(cache.value) + cache.value_strides.Plane(block, head);
  for (int i = threadIdx.x; i < tokens * pieces; i += kThreads) {
    const int token = i / pieces, channel = i % pieces * 8;
    const int64_t out = prefix.begin + begin + token;
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
  } else if (seqs.batch > 0) {
    const unsigned ctas = GridSize((seqs.batch + int64_t{kThreads} - 1) / kThreads);
    status = LaunchKernel(PrefixLengthsKernel, ctas, kThreads, stream, p);
  }
  if (status != cudaSuccess || seqs.batch == 0 || p.num_kv_tokens == 0) return status;
  const AppendCacheParams prefix = PrefixOf(p);
  return p.rope.cache.type == CacheType::kNone ? LaunchGqaPrefix16(prefix, stream)
                                               : LaunchAppendCache(prefix, stream);
}

}  // namespace fastattn::cuda
