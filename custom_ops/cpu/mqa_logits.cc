#include "cpu/mqa_logits.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "common/fp4.h"
#include "common/numeric.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

constexpr int kTile = 64;  // keys that are scored together
constexpr int kMaxDim = 128;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

struct Tables {
  float e4m3[256];
  Tables() {
    for (int i = 0; i < 256; ++i) e4m3[i] = E4M3ToFloat(static_cast<uint8_t>(i));
  }
};

// Values of one key or query head. The scale of an FP8 one is not in them.
void Decode(const LogitsParams& p, const uint8_t* codes, const uint8_t* scales, float* values) {
  static const Tables tables;
  if (p.quant == IndexerQuant::kFp8) {
    for (int d = 0; d < p.head_dim; ++d) values[d] = tables.e4m3[codes[d]];
    return;
  }
  for (int d = 0; d < p.head_dim; d += 2) {
    const float scale = UE8M0ToFloat(scales[d / kMxBlock]);
    values[d] = E2M1ToFloat(codes[d / 2] & 0xF) * scale;
    values[d + 1] = E2M1ToFloat(codes[d / 2] >> 4) * scale;
  }
}

// Keys of a tile, channel by channel, and their scales.
struct KeyTile {
  float values[kMaxDim][kTile];
  float scales[kTile];
  bool visible[kTile];
};

void LoadKey(const LogitsParams& p, int64_t row, int64_t key, int column, KeyTile* tile) {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  if (p.paged) {
    const int64_t page = p.PageOf(row / p.next_n, key / p.page_size), at = key % p.page_size;
    tile->visible[column] = page >= 0;
    if (page < 0) return;
    const uint8_t* start = p.cache + page * p.page_stride;
    codes = start + at * p.CodeBytes();
    scales = start + p.page_size * p.CodeBytes() + at * kLogitsScaleBytes;
  } else {
    codes = p.keys + key * p.CodeBytes();
    scales = p.key_scales + key * kLogitsScaleBytes;
    tile->visible[column] = true;
  }
  float values[kMaxDim];
  Decode(p, codes, scales, values);
  for (int d = 0; d < p.head_dim; ++d) tile->values[d][column] = values[d];
  tile->scales[column] = 1.0f;
  if (p.quant == IndexerQuant::kFp8) {
    std::memcpy(&tile->scales[column], scales, sizeof(float));
  }
}

// Scores of all heads, one channel of all keys at a time.
void ScoreTile(const LogitsParams& p, int64_t row, const float* q, const KeyTile& tile,
               float (&sums)[kTile]) {
  std::fill(sums, sums + kTile, 0.0f);
  for (int h = 0; h < p.num_heads; ++h) {
    const float weight = p.weights[row * p.num_heads + h];
    float dot[kTile] = {};
    for (int d = 0; d < p.head_dim; ++d) {
      const float x = q[h * p.head_dim + d];
      for (int j = 0; j < kTile; ++j) dot[j] += x * tile.values[d][j];
    }
    // A NaN stays one.
    for (int j = 0; j < kTile; ++j) sums[j] += (dot[j] < 0.0f ? 0.0f : dot[j]) * weight;
  }
}

void ScoreRow(const LogitsParams& p, const int32_t* lengths, int64_t row, std::vector<float>* q,
              KeyTile* tile) {
  float* out = p.out + row * p.row_stride;
  const LogitsRange range = p.RangeOf(row);
  const int64_t first = p.FirstKey(row);
  const int64_t begin = std::clamp<int64_t>(range.begin - first, 0, p.columns);
  const int64_t end = std::clamp<int64_t>(range.end - first, begin, p.columns);
  int64_t from = 0, to = p.columns;
  if (lengths != nullptr) {
    from = p.paged || p.relative ? 0 : begin;
    to = std::clamp<int64_t>(from + lengths[row], end, p.columns);
  }
  std::fill(out + from, out + begin, kHidden);
  std::fill(out + end, out + to, kHidden);
  if (begin == end) return;
  q->resize(static_cast<size_t>(p.num_heads) * p.head_dim);
  for (int h = 0; h < p.num_heads; ++h) {
    const int64_t at = row * p.num_heads + h;
    const uint8_t* scales = p.q_scales == nullptr ? nullptr : p.q_scales + at * kLogitsScaleBytes;
    Decode(p, p.q + at * p.CodeBytes(), scales, q->data() + h * p.head_dim);
  }
  for (int64_t start = begin; start < end; start += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, end - start));
    for (int j = 0; j < count; ++j) LoadKey(p, row, first + start + j, j, tile);
    float sums[kTile];
    ScoreTile(p, row, q->data(), *tile, sums);
    for (int j = 0; j < count; ++j) {
      out[start + j] = tile->visible[j] ? sums[j] * tile->scales[j] : kHidden;
    }
  }
}

}  // namespace

void MqaLogits(const LogitsParams& p, const int32_t* lengths) {
  // About 0.2 ns a product.
  const int64_t work = p.columns * p.num_heads * p.head_dim / 5;
  ParallelFor(p.columns == 0 ? 0 : p.rows, work, [&](int64_t begin, int64_t end) {
    std::vector<float> q;
    std::vector<KeyTile> tile(1);
    for (int64_t row = begin; row < end; ++row) ScoreRow(p, lengths, row, &q, tile.data());
  });
}

}  // namespace fastattn::cpu
