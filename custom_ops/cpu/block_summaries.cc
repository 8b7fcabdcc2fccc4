// Summaries of K from the keys that a cache holds.
#include "cpu/block_summaries.h"

#include <algorithm>
#include <vector>

#include "common/block_table.h"
#include "common/dispatch.h"
#include "common/seq_lengths.h"
#include "common/summary_score.h"
#include "cpu/cache_codec.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/token_seqs.h"

namespace fastattn::cpu {

namespace {

// Keys that a summary has now: `count` from a physical block's token `slot` on. `place` is the
// first one's, in its key block.
struct Summary {
  int block;
  int slot;
  int count;
  int place;
};

// Summaries that hold new tokens.
std::vector<Summary> FindSummaries(const UpdateSummariesParams& p) {
  const SeqMeta& seqs = p.seqs;
  const int tokens = p.summaries.Tokens();
  std::vector<Summary> found;
  for (int b = 0; b < seqs.batch; ++b) {
    const int64_t count = NewTokensOf(seqs, b).count;  // as the writer of the cache counts
    const int64_t cached = NewTokenPosition<int64_t>(seqs.seq_lens_decoder[b], 0);
    const int64_t end = std::min(cached + count, int64_t{seqs.max_blocks} * kBlockSize);
    if (count == 0) continue;
    for (int64_t begin = cached / tokens * tokens; begin < end; begin += tokens) {
      const int block =
          BlockOf(seqs.block_tables, seqs.max_blocks, p.cache.num_blocks, b, begin / kBlockSize);
      if (block < 0) continue;
      found.push_back({block, static_cast<int>(begin % kBlockSize),
                       static_cast<int>(std::min<int64_t>(tokens, end - begin)),
                       static_cast<int>(begin % p.summaries.granularity)});
    }
  }
  return found;
}

// Adds a key to the rows of a summary; the first one begins them.
void AddKey(SummaryKind kind, bool begins, const float* x, const float* weights, int dim,
            float* rows) {
  switch (kind) {
    case SummaryKind::kMean:
      for (int d = 0; d < dim; ++d) rows[d] = begins ? x[d] : Add(rows[d], x[d]);
      return;
    case SummaryKind::kMinMax:
      for (int d = 0; d < dim; ++d) {
        const float key = Add(x[d], 0.0f);  // of equal zeros, always +0
        rows[d] = begins ? key : LeastOrNaN(rows[d], key);
        rows[dim + d] = begins ? key : MostOrNaN(rows[dim + d], key);
      }
      return;
    case SummaryKind::kPooled:
      for (int d = 0; d < dim; ++d) {
        const float product = Mul(weights[d], x[d]);
        rows[d] = begins ? product : Add(rows[d], product);
      }
      return;
  }
}

template <typename Kv, DType kStored>
void Update(const UpdateSummariesParams& p) {
  using Reader = CacheReader<Kv, CacheLayout::kFastattn>;
  const BlockSummaries& to = p.summaries;
  const int heads = to.num_kv_heads, dim = to.head_dim, tokens = to.Tokens();
  const std::vector<Summary> found = FindSummaries(p);
  const Reader reader(p.cache);
  const int64_t count = static_cast<int64_t>(found.size()) * heads;
  ParallelFor(count, 2LL * tokens * dim, [&](int64_t first, int64_t last) {
    std::vector<typename Reader::KeyStorage> codes(static_cast<size_t>(tokens) * dim);
    std::vector<float> x(dim), rows(static_cast<size_t>(2) * dim);
    for (int64_t i = first; i < last; ++i) {
      const Summary& summary = found[i / heads];
      const int head = static_cast<int>(i % heads);
      const float* weights = p.pool_weights;
      if (weights != nullptr) {
        weights += (static_cast<int64_t>(head) * to.granularity + summary.place) * dim;
      }
      reader.KeyCodes(summary.block, head, summary.slot, summary.slot + summary.count,
                      codes.data());
      for (int t = 0; t < summary.count; ++t) {
        reader.DecodeKey(summary.block, head, summary.slot + t,
                         codes.data() + static_cast<size_t>(t) * dim, x.data());
        RestoreKey(p.transform, head, dim, x.data());
        AddKey(to.kind, t == 0, x.data(), weights, dim, rows.data());
        if (weights != nullptr) weights += dim;
      }
      if (to.kind == SummaryKind::kMean) {
        const auto keys = static_cast<float>(summary.count);
        for (int d = 0; d < dim; ++d) rows[d] = Div(rows[d], keys);
      }
      auto* out = static_cast<typename Element<kStored>::Storage*>(to.data) +
                  to.At(summary.block, head, summary.slot / tokens);
      StoreRow<kStored>(rows.data(), SummaryRows(to.kind) * dim, out);
    }
  });
}

}  // namespace

void UpdateBlockSummaries(const UpdateSummariesParams& p) {
  DispatchCache(p.cache, [&](auto format) {
    dispatch<DType::kFloat32, DType::kBFloat16>(p.summaries.dtype, "summaries", [&](auto dtype) {
      Update<decltype(format), decltype(dtype)::value>(p);
    });
  });
}

}  // namespace fastattn::cpu
