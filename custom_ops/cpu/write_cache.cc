#include "cpu/write_cache.h"

#include <vector>

#include "common/block_table.h"
#include "common/dispatch.h"
#include "cpu/cache_codec.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/token_seqs.h"

namespace fastattn::cpu {

namespace {

template <DType kDType, typename Kv>
void Run(const WriteCacheParams& p, const KeyTransform& transform) {
  using T = typename Element<kDType>::Storage;
  const int heads = p.cache.num_kv_heads;
  const int head_dim = p.cache.head_dim, value_dim = p.cache.ValueDim();
  const T* keys = static_cast<const T*>(p.key);
  const T* values = static_cast<const T*>(p.value);
  const CacheWriter<Kv> writer(p.cache);
  const std::vector<int> seq_of_token = SeqOfTokens(p.seqs);

  ParallelFor(int64_t{p.seqs.num_tokens} * heads, 2 * head_dim, [&](int64_t begin, int64_t end) {
    float x[kMaxHeadDim];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t token = task / heads;
      const int head = static_cast<int>(task % heads);
      const int batch_idx = seq_of_token[token];
      if (batch_idx < 0) continue;
      const int64_t position = PositionOf(p.seqs, batch_idx, token);
      const int block = BlockOf(p.seqs.block_tables, p.seqs.max_blocks, p.cache.num_blocks,
                                p.seqs.TableOf(batch_idx, head, heads), position / kBlockSize);
      if (block < 0) continue;
      const int slot = static_cast<int>(position % kBlockSize);
      LoadRow<kDType>(keys + token * p.key_token_stride + head * head_dim, head_dim, x);
      TransformKey(transform, head, head_dim, x);
      writer.Key(block, head, slot, x, transform.FeedbackOf(head, head_dim));
      LoadRow<kDType>(values + token * p.value_token_stride + head * value_dim, value_dim, x);
      writer.Value(block, head, slot, x);
    }
  });
}

}  // namespace

void WriteCache(const WriteCacheParams& p, const KeyTransform& transform) {
  DispatchCache(p.cache, [&](auto format) {
    dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16>(p.dtype, "dtype", [&](auto dtype) {
      Run<decltype(dtype)::value, decltype(format)>(p, transform);
    });
  });
}

}  // namespace fastattn::cpu
