// Lists of key blocks: scores by the summaries, then the k largest.
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "common/block_table.h"
#include "common/dispatch.h"
#include "common/summary_score.h"
#include "cpu/block_summaries.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/token_seqs.h"
#include "cpu/topk_row.h"

namespace fastattn::cpu {

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The fold that common/summary_score.h tells.
float Fold(float* sums) {
  for (int half = kScoreLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] = Add(sums[i], sums[i + half]);
  }
  return sums[0];
}

// Scores the key blocks of one query token and KV head after the other. One for each thread.
template <DType kQuery, DType kStored>
class Selector {
 public:
  explicit Selector(const SelectBlocksParams& p)
      : p_(p),
        group_(p.attention.num_heads / p.attention.num_kv_heads),
        dim_(p.summaries.head_dim),
        rows_(SummaryRows(p.summaries.kind)),
        queries_(static_cast<size_t>(group_) * dim_),
        summary_(static_cast<size_t>(rows_) * dim_),
        part_(static_cast<size_t>(rows_) * dim_) {}

  void Select(int64_t token, int batch_idx, int64_t position, int kv_head) {
    const SeenBlocks seen = SeenBlocksOf(p_, position / p_.summaries.granularity + 1);
    int32_t* out = p_.selected + (token * p_.summaries.num_kv_heads + kv_head) * p_.k;
    int32_t* const end = out + p_.k;
    out = Range(0, seen.first, out);
    const int scored = p_.Scored();
    if (seen.Between() <= scored) {
      out = Range(seen.first, seen.end - seen.last, out);
    } else if (scored > 0) {
      LoadQueries(token, batch_idx, kv_head);
      scores_.resize(seen.Between());
      for (int64_t i = 0; i < seen.Between(); ++i) {
        scores_[i] = Score(batch_idx, kv_head, seen.first + i);
      }
      topk_.Select(scores_.data(), seen.Between(), scored, out);
      for (int i = 0; i < scored; ++i) *out++ += static_cast<int32_t>(seen.first);
    }
    out = Range(seen.end - seen.last, seen.end, out);
    std::fill(out, end, -1);
  }

 private:
  static int32_t* Range(int64_t begin, int64_t end, int32_t* out) {
    for (int64_t i = begin; i < end; ++i) *out++ = static_cast<int32_t>(i);
    return out;
  }

  void LoadQueries(int64_t token, int batch_idx, int kv_head) {
    const AttentionParams& a = p_.attention;
    const auto* q =
        static_cast<const typename Element<kQuery>::Storage*>(a.q) + token * a.q_token_stride;
    for (int r = 0; r < group_; ++r) {
      const int64_t head = int64_t{kv_head} * group_ + r;
      float* x = queries_.data() + static_cast<size_t>(r) * dim_;
      LoadRow<kQuery>(q + head * a.q_head_stride, dim_, x);
      if (a.q_descale.data == nullptr) continue;
      const float scale = LoadScale(a.q_descale.data, a.q_descale.dtype,
                                    a.q_descale.Index(token, batch_idx, kv_head, head));
      for (int d = 0; d < dim_; ++d) x[d] = Mul(x[d], scale);
    }
  }

  // Loads a key block's summary; false if none of its blocks is assigned.
  bool LoadSummary(int batch_idx, int kv_head, int64_t key_block) {
    const BlockSummaries& from = p_.summaries;
    const SeqMeta& seqs = p_.attention.seqs;
    const auto* data = static_cast<const typename Element<kStored>::Storage*>(from.data);
    int parts = 0;
    for (int i = 0; i < from.Parts(); ++i) {
      const int64_t position = key_block * from.granularity + i * from.Tokens();
      const int block = BlockOf(seqs.block_tables, seqs.max_blocks, from.num_blocks, batch_idx,
                                position / kBlockSize);
      if (block < 0) continue;
      const auto index = static_cast<int>(position % kBlockSize) / from.Tokens();
      LoadRow<kStored>(data + from.At(block, kv_head, index), rows_ * dim_,
                       parts == 0 ? summary_.data() : part_.data());
      if (parts++ == 1) AddPart();
    }
    return parts > 0;
  }

  void AddPart() {
    const float* b = part_.data();
    float* a = summary_.data();
    switch (p_.summaries.kind) {
      case SummaryKind::kMean:
        for (int d = 0; d < dim_; ++d) a[d] = MeanOfTwo(a[d], b[d]);
        return;
      case SummaryKind::kMinMax:
        for (int d = 0; d < dim_; ++d) a[d] = LeastOrNaN(a[d], b[d]);
        for (int d = dim_; d < 2 * dim_; ++d) a[d] = MostOrNaN(a[d], b[d]);
        return;
      case SummaryKind::kPooled:
        for (int d = 0; d < dim_; ++d) a[d] = Add(a[d], b[d]);
        return;
    }
  }

  float Score(int batch_idx, int kv_head, int64_t key_block) {
    if (!LoadSummary(batch_idx, kv_head, key_block)) return kNaN;
    float result = 0.0f;
    for (int r = 0; r < group_; ++r) {
      const float score = ScoreOf(queries_.data() + static_cast<size_t>(r) * dim_);
      if (r == 0) {
        result = score;
      } else {
        result =
            p_.reduction == ScoreReduction::kMax ? MostOrNaN(result, score) : Add(result, score);
      }
    }
    return result;
  }

  float ScoreOf(const float* q) const {
    float sums[kScoreLanes] = {};
    const float* x = summary_.data();
    const bool bounds = p_.summaries.kind == SummaryKind::kMinMax;
    for (int d = 0; d < dim_; d += kScoreLanes) {
      for (int i = 0; i < kScoreLanes; ++i) {
        const float product =
            bounds ? BoundOfProduct(q[d + i], x[d + i], x[dim_ + d + i]) : Mul(q[d + i], x[d + i]);
        sums[i] = Add(sums[i], product);
      }
    }
    return Fold(sums);
  }

  const SelectBlocksParams& p_;
  const int group_, dim_, rows_;
  std::vector<float> queries_;  // [group, D]
  std::vector<float> summary_;  // [rows, D]
  std::vector<float> part_;     // the same
  std::vector<float> scores_;
  TopkRow topk_;
};

template <DType kQuery, DType kStored>
void Run(const SelectBlocksParams& p) {
  const AttentionParams& a = p.attention;
  const int64_t keys = int64_t{a.seqs.max_blocks} * kBlockSize;
  const int64_t blocks = keys / p.summaries.granularity;
  const std::vector<QueryPlace> queries = FindQueries(a.seqs, keys);
  const int64_t count = int64_t{a.seqs.num_tokens} * a.num_kv_heads;
  const int64_t work = blocks * p.summaries.head_dim * (1 + a.num_heads / a.num_kv_heads) / 4;
  // Queries differ in their blocks, so every thread takes the next one when it is done.
  std::atomic<int64_t> next{0};
  ParallelFor(count, work, [&](int64_t, int64_t) {
    Selector<kQuery, kStored> selector(p);
    for (int64_t i = next++; i < count; i = next++) {
      const QueryPlace& query = queries[i / a.num_kv_heads];
      const int kv_head = static_cast<int>(i % a.num_kv_heads);
      if (query.batch_idx < 0) {
        std::fill_n(p.selected + i * p.k, p.k, -1);
      } else {
        selector.Select(i / a.num_kv_heads, query.batch_idx, query.position, kv_head);
      }
    }
  });
}

}  // namespace

void SelectKeyBlocks(const SelectBlocksParams& p) {
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kE4M3>(
      p.attention.q_dtype, "q", [&](auto query) {
        dispatch<DType::kFloat32, DType::kBFloat16>(
            p.summaries.dtype, "summaries",
            [&](auto stored) { Run<decltype(query)::value, decltype(stored)::value>(p); });
      });
}

}  // namespace fastattn::cpu
