#include "cpu/append_cache.h"

#include <algorithm>
#include <vector>

#include "common/block_table.h"
#include "common/dispatch.h"
#include "common/seq_lengths.h"
#include "cpu/cache_codec.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

// Tokens of one sequence that lie in one block.
struct BlockTokens {
  int block;
  int count;
  int64_t out_token;
};

std::vector<BlockTokens> FindBlocks(const AppendCacheParams& p) {
  std::vector<BlockTokens> blocks;
  for (int b = 0; b < p.batch; ++b) {
    const TokenRange<int64_t> out = WrittenTokens<int64_t>(p.cu_seqlens_k[b], p.cu_seqlens_k[b + 1],
                                                           CachedTokens(p, b), p.num_out_tokens);
    const int64_t count = std::min(out.count, int64_t{p.max_blocks} * kBlockSize);
    for (int64_t i = 0; i < count; i += kBlockSize) {
      const int block =
          BlockOf(p.block_tables, p.max_blocks, p.cache.num_blocks, b, i / kBlockSize);
      if (block < 0) continue;
      const int size = static_cast<int>(std::min<int64_t>(kBlockSize, count - i));
      blocks.push_back({block, size, out.begin + i});
    }
  }
  return blocks;
}

template <DType kOut, CacheLayout kLayout, typename Kv>
void Run(const AppendCacheParams& p, const KeyTransform& transform) {
  using T = typename Element<kOut>::Storage;
  const int heads = p.cache.num_kv_heads;
  const int head_dim = p.cache.head_dim, value_dim = p.cache.ValueDim();
  const CacheReader<Kv, kLayout> reader(p.cache);
  const std::vector<BlockTokens> blocks = FindBlocks(p);

  const int64_t tasks = static_cast<int64_t>(blocks.size()) * heads;
  ParallelFor(tasks, 2LL * kBlockSize * head_dim, [&](int64_t begin, int64_t end) {
    typename CacheReader<Kv, kLayout>::KeyStorage codes[kBlockSize * kMaxHeadDim];
    typename CacheReader<Kv, kLayout>::ValueStorage value_codes[kBlockSize * kMaxHeadDim];
    float x[kMaxHeadDim];
    for (int64_t task = begin; task < end; ++task) {
      const BlockTokens& tokens = blocks[task / heads];
      const int head = static_cast<int>(task % heads);
      T* key = static_cast<T*>(p.key) + tokens.out_token * p.key_token_stride + head * head_dim;
      reader.KeyCodes(tokens.block, head, 0, tokens.count, codes);
      for (int r = 0; r < tokens.count; ++r) {
        reader.DecodeKey(tokens.block, head, r, codes + r * head_dim, x);
        RestoreKey(transform, head, head_dim, x);
        StoreRow<kOut>(x, head_dim, key + r * p.key_token_stride);
      }
      T* value =
          static_cast<T*>(p.value) + tokens.out_token * p.value_token_stride + head * value_dim;
      reader.ValueCodes(tokens.block, head, 0, tokens.count, value_codes);
      for (int r = 0; r < tokens.count; ++r) {
        reader.DecodeValue(tokens.block, head, r, value_codes + r * value_dim, x);
        StoreRow<kOut>(x, value_dim, value + r * p.value_token_stride);
      }
    }
  });
}

}  // namespace

void AppendCache(const AppendCacheParams& p, const KeyTransform& transform) {
  DispatchCache(p.cache, [&](auto format) {
    using Kv = decltype(format);
    if constexpr (!Kv::Key::kQuantized) {  // the same order in every layout
      Run<Kv::Key::kCode, CacheLayout::kFastattn, Kv>(p, transform);
    } else {
      dispatch<CacheLayout::kFastattn, CacheLayout::kFastDeploy>(
          p.cache.layout, "cache_layout", [&](auto layout) {
            dispatch<DType::kFloat16, DType::kBFloat16>(p.dtype, "dtype", [&](auto dtype) {
              Run<decltype(dtype)::value, decltype(layout)::value, Kv>(p, transform);
            });
          });
    }
  });
}

}  // namespace fastattn::cpu
