#include "cpu/mla_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/block_table.h"
#include "common/normaliser.h"
#include "common/numeric.h"
#include "common/seq_lengths.h"
#include "cpu/mla_row.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

constexpr int kTile = 64;   // keys that are scored together
constexpr int kHeads = 16;  // of a unit of work, which dequantises its keys itself
constexpr int kMaxDim = 576;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// One token of a sequence, and kHeads of its heads.
struct Unit {
  int batch_idx;
  int head;
  int64_t token;
  int64_t num_keys;  // that it sees, pages without an assignment among them
};

// A tile's keys, of which only the assigned ones are there.
struct Tile {
  float rows[kTile][kMaxDim];
  float columns[kMaxDim][kTile];
  int count;
};

struct Head {
  float q[kMaxDim];
  float out[kMlaValueDim];
  float maximum;  // base-2 logarithm
  float sum;      // of 2^(score - maximum)
};

template <MlaFormat kFormat>
void LoadTile(const MlaAttentionParams& p, int batch_idx, int64_t begin, int64_t end, Tile* tile) {
  const SeqMeta& seqs = p.seqs;
  uint16_t bits[kMaxDim];
  tile->count = 0;
  for (int64_t key = begin; key < end; ++key) {
    const int page =
        BlockOf(seqs.block_tables, seqs.max_blocks, static_cast<int>(p.cache.num_pages), batch_idx,
                key / p.cache.page_size);
    if (page < 0) continue;
    ReadMlaToken<kFormat>(MlaRowOf(p.cache, kFormat, page, key % p.cache.page_size), p.scale, bits);
    float* row = tile->rows[tile->count];
    for (int d = 0; d < p.dim; ++d) {
      row[d] = BFloat16ToFloat(bits[d]);
      tile->columns[d][tile->count] = row[d];
    }
    ++tile->count;
  }
}

void AddTile(const MlaAttentionParams& p, const Tile& tile, Head* head) {
  float scores[kTile] = {};
  for (int d = 0; d < p.dim; ++d) {
    const float x = head->q[d];
    for (int j = 0; j < kTile; ++j) scores[j] += x * tile.columns[d][j];
  }
  float maximum = head->maximum;
  bool nan = std::isnan(maximum);
  const float factor = p.softmax_scale * kLog2E;
  for (int j = 0; j < tile.count; ++j) {
    scores[j] *= factor;
    nan = nan || std::isnan(scores[j]);
    maximum = std::max(maximum, scores[j]);
  }
  if (nan) maximum = std::numeric_limits<float>::quiet_NaN();
  const float reference = maximum == kHidden ? 0.0f : maximum;
  const float keep = std::exp2(head->maximum - reference);
  if (!(keep == 1.0f)) {
    head->sum *= keep;
    for (int d = 0; d < kMlaValueDim; ++d) head->out[d] *= keep;
  }
  for (int j = 0; j < tile.count; ++j) {
    const float weight = std::exp2(scores[j] - reference);
    head->sum += weight;
    for (int d = 0; d < kMlaValueDim; ++d) head->out[d] += weight * tile.rows[j][d];
  }
  head->maximum = maximum;
}

void Store(const MlaAttentionParams& p, const Unit& unit, int head_idx, const Head& head) {
  const Normaliser row =
      NormaliserWithoutSink(head.maximum, head.sum, p.sinks, [&] { return p.sinks[head_idx]; });
  const int64_t at = (unit.token * p.heads + head_idx) * kMlaValueDim;
  for (int d = 0; d < kMlaValueDim; ++d) {
    const float value = head.out[d] * row.factor;
    if (p.out_float != nullptr) {
      p.out_float[at + d] = value;
    } else {
      p.out[at + d] = FloatToBFloat16(value);
    }
  }
  if (p.lse != nullptr) p.lse[head_idx * int64_t{p.seqs.num_tokens} + unit.token] = row.lse;
}

template <MlaFormat kFormat>
void RunUnit(const MlaAttentionParams& p, const Unit& unit, Tile* tile, std::vector<Head>* heads) {
  const int count = std::min(kHeads, p.heads - unit.head);
  for (int h = 0; h < count; ++h) {
    Head& head = (*heads)[h];
    const uint16_t* q = p.q + unit.token * p.q_token_stride + (unit.head + h) * p.q_head_stride;
    for (int d = 0; d < p.dim; ++d) head.q[d] = BFloat16ToFloat(q[d]);
    std::fill(head.out, head.out + kMlaValueDim, 0.0f);
    head.maximum = kHidden;
    head.sum = 0.0f;
  }
  for (int64_t key = 0; key < unit.num_keys; key += kTile) {
    LoadTile<kFormat>(p, unit.batch_idx, key, std::min(key + kTile, unit.num_keys), tile);
    if (tile->count == 0) continue;
    for (int h = 0; h < count; ++h) AddTile(p, *tile, &(*heads)[h]);
  }
  for (int h = 0; h < count; ++h) Store(p, unit, unit.head + h, (*heads)[h]);
}

std::vector<Unit> FindUnits(const MlaAttentionParams& p, int64_t* num_keys) {
  const SeqMeta& seqs = p.seqs;
  const int64_t in_table = int64_t{seqs.max_blocks} * p.cache.page_size;
  std::vector<Unit> units;
  *num_keys = 0;
  for (int b = 0; b < seqs.batch; ++b) {
    const TokenRange<int64_t> tokens =
        RaggedTokens<int64_t>(seqs.cu_seqlens_q[b], seqs.cu_seqlens_q[b + 1], seqs.num_tokens);
    const int64_t count = NewTokens(int64_t{seqs.seq_lens_this_time[b]}, tokens.count);
    const int64_t keys = PagedKeys(int64_t{seqs.seq_lens_decoder[b]}, count, int64_t{kMaxKeys});
    for (int64_t i = 0; i < count; ++i) {
      const int64_t seen = p.causal ? keys - count + i + 1 : keys;
      for (int h = 0; h < p.heads; h += kHeads) {
        units.push_back({b, h, tokens.begin + i, std::min(seen, in_table)});
        *num_keys += units.back().num_keys;
      }
    }
  }
  return units;
}

}  // namespace

void MlaAttention(const MlaAttentionParams& p) {
  int64_t num_keys = 0;
  const std::vector<Unit> units = FindUnits(p, &num_keys);
  if (units.empty()) return;
  // About 0.15 ns a product.
  const auto count = static_cast<int64_t>(units.size());
  const int64_t products = int64_t{std::min(kHeads, p.heads)} * (p.dim + kMlaValueDim);
  const int64_t work = num_keys / count * products * 3 / 20 + 1;
  DispatchMlaFormat(p.cache.format, [&](auto format) {
    ParallelFor(count, work, [&](int64_t begin, int64_t end) {
      std::vector<Tile> tile(1);
      std::vector<Head> heads(kHeads);
      for (int64_t i = begin; i < end; ++i) {
        RunUnit<decltype(format)::value>(p, units[i], tile.data(), &heads);
      }
    });
  });
}

}  // namespace fastattn::cpu
