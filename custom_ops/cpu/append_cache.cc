#include "cpu/append_cache.h"

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "cpu/cache_codec.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

// Tokens of one row that lie in one block.
struct Piece {
  int block;
  int count;
  int64_t out_token;
};

std::vector<Piece> Pieces(const AppendCacheParams& p) {
  std::vector<Piece> pieces;
  for (int row = 0; row < p.batch; ++row) {
    const int64_t first = p.cu_seqlens_k[row];
    if (first < 0) continue;
    const int64_t end = std::min<int64_t>(p.cu_seqlens_k[row + 1], p.num_out_tokens);
    const int64_t count = std::min<int64_t>(
        {p.seq_lens_decoder[row], end - first, int64_t{p.max_blocks} * kBlockSize});
    for (int64_t i = 0; i < count; i += kBlockSize) {
      const int block = BlockOf(p.block_tables, p.max_blocks, p.cache.num_blocks, row, i);
      if (block < 0) continue;
      const int size = static_cast<int>(std::min<int64_t>(kBlockSize, count - i));
      pieces.push_back({block, size, first + i});
    }
  }
  return pieces;
}

template <DType kOut, CacheLayout kLayout, typename Format>
void Run(const AppendCacheParams& p) {
  using T = typename Element<kOut>::Storage;
  const int heads = p.cache.num_kv_heads;
  const int head_dim = p.cache.head_dim;
  const CacheReader<Format, kLayout> reader(p.cache);
  const std::vector<Piece> pieces = Pieces(p);

  const int64_t items = static_cast<int64_t>(pieces.size()) * heads;
  ParallelFor(items, 2LL * kBlockSize * head_dim, [&](int64_t begin, int64_t end) {
    typename Format::Storage codes[kBlockSize * kMaxHeadDim];
    float x[kMaxHeadDim];
    for (int64_t item = begin; item < end; ++item) {
      const Piece& piece = pieces[item / heads];
      const int head = static_cast<int>(item % heads);
      T* key = static_cast<T*>(p.key) + piece.out_token * p.key_token_stride + head * head_dim;
      reader.KeyCodes(piece.block, head, 0, piece.count, codes);
      for (int r = 0; r < piece.count; ++r) {
        reader.DecodeKey(piece.block, head, r, codes + r * head_dim, x);
        StoreRow<kOut>(x, head_dim, key + r * p.key_token_stride);
      }
      T* value =
          static_cast<T*>(p.value) + piece.out_token * p.value_token_stride + head * head_dim;
      reader.ValueCodes(piece.block, head, 0, piece.count, codes);
      for (int r = 0; r < piece.count; ++r) {
        reader.DecodeValue(piece.block, head, r, codes + r * head_dim, x);
        StoreRow<kOut>(x, head_dim, value + r * p.value_token_stride);
      }
    }
  });
}

}  // namespace

void AppendCache(const AppendCacheParams& p) {
  DispatchCache(p.cache, [&](auto format) {
    using Format = decltype(format);
    if constexpr (!IsQuantized(Format::kType)) {  // one order in every layout
      Run<Format::kCode, CacheLayout::kFastattn, Format>(p);
    } else {
      dispatch<CacheLayout::kFastattn, CacheLayout::kFastDeploy>(
          p.cache.layout, "cache_layout", [&](auto layout) {
            dispatch<DType::kFloat16, DType::kBFloat16>(p.dtype, "dtype", [&](auto dtype) {
              Run<decltype(dtype)::value, decltype(layout)::value, Format>(p);
            });
          });
    }
  });
}

}  // namespace fastattn::cpu
