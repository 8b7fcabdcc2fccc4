#include "cpu/indexer.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/dispatch.h"
#include "common/exact.h"
#include "common/mla_scale.h"
#include "common/numeric.h"
#include "cpu/indexer_encode.h"
#include "cpu/inverse_rms.h"
#include "cpu/parallel.h"
#include "cpu/quantize.h"
#include "cpu/rotation.h"

namespace fastattn::cpu {

namespace {

// Segments of a group whose partial sums are added as a tree, the same one on every device.
constexpr int kSegments = 8;

template <IndexerQuant kQuant>
void QueryToken(const IndexerQParams& p, int64_t token) {
  const Rotation rotation =
      LoadRotation(p.cos_sin, p.cos_sin_dtype, p.positions.At(token), p.max_positions);
  float x[kIndexerHeadDim];
  for (int h = 0; h < p.num_heads; ++h) {
    const uint16_t* q = p.q + token * p.q_token_stride + h * p.q_head_stride;
    for (int d = 0; d < kIndexerHeadDim; ++d) x[d] = BFloat16ToFloat(q[d]);
    Rotate(rotation, x + kIndexerHeadDim - kIndexerRopeDim);
    RoundToBFloat16(x, kIndexerHeadDim);
    const int64_t index = token * p.num_heads + h;
    float weight = LoadScale(p.weights, p.weights_dtype, index);
    uint8_t* codes = p.codes + index * PageFormatOf(kQuant).code_bytes;
    if constexpr (kQuant == IndexerQuant::kMxfp4) {
      EncodeMxfp4(x, kIndexerHeadDim, codes, static_cast<uint8_t*>(p.scales) + index * 4);
    } else {
      const float scale = EncodeFp8(x, kIndexerHeadDim, codes);
      static_cast<float*>(p.scales)[index] = scale;
      weight = Mul(weight, scale);
    }
    p.weights_out[index] = Mul(Mul(weight, p.softmax_scale), p.head_scale);
  }
}

void QuantizeQuery(const IndexerQQuantParams& p, int64_t query) {
  const int64_t token = p.TokenOf(query);
  for (int h = 0; h < p.num_heads; ++h) {
    const int64_t index = query * p.num_heads + h;
    uint8_t* codes = p.codes + index * kIndexerHeadDim;
    if (token < 0) {
      std::fill(codes, codes + kIndexerHeadDim, uint8_t{0});
      p.weights_out[index] = 0.0f;
      continue;
    }
    const uint16_t* q = p.q + token * p.q_token_stride + h * p.q_head_stride;
    const float scale = EncodeE4M3Dynamic<DType::kBFloat16>(q, kIndexerHeadDim, codes);
    const float weight = LoadScale(p.weights, p.weights_dtype, token * p.num_heads + h);
    p.weights_out[index] = Mul(weight, Mul(scale, p.factor));
  }
}

// States of a group in the state cache, one a position, oldest first; null for a position below 0.
template <typename T>
struct Group {
  static constexpr int kMaxStates = 128;
  const T* states[kMaxStates];
  int count;
};

// Finds the states of the group that ends at `position`. False if a state block is unassigned.
template <typename T>
bool FindGroup(const IndexerKvParams& p, int64_t token, int64_t position, int state_size,
               Group<T>* group) {
  const int64_t batch_idx = p.batch_ids[token];
  if (batch_idx < 0 || batch_idx >= p.batch) return false;
  group->count = p.compress_ratio == 4 ? 8 : 128;
  for (int j = 0; j < group->count; ++j) {
    const int64_t at = position - group->count + 1 + j;
    group->states[j] = nullptr;
    if (at < 0) continue;
    const int64_t index = at / p.state_block;
    if (index >= p.max_blocks) return false;
    const int64_t block = p.block_tables[batch_idx * p.max_blocks + index];
    if (block < 0 || block >= p.num_state_blocks) return false;
    group->states[j] = static_cast<const T*>(p.state) + block * p.state_block_stride +
                       at % p.state_block * state_size;
  }
  return true;
}

// out[d] = sum_j softmax_j(score[j][d]) * kv[j][d], each channel by itself.
//
// The states are summed one by one in kSegments contiguous segments, and the segments pairwise.
template <DType kDType, int kHead>
void Compress(const Group<typename Element<kDType>::Storage>& group, int compress_ratio,
              int state_width, float* out) {
  using E = Element<kDType>;
  // States in the newer half of an overlapping group have their values in the second HEAD slice.
  const auto offset = [&](int j) { return j >= compress_ratio ? kHead : 0; };
  float maximum[kHead];
  std::fill_n(maximum, kHead, -std::numeric_limits<float>::infinity());
  for (int j = 0; j < group.count; ++j) {
    if (!group.states[j]) continue;
    const auto* score = group.states[j] + state_width + offset(j);
    for (int d = 0; d < kHead; ++d) {
      const float s = E::Load(score[d]);
      maximum[d] = s > maximum[d] ? s : maximum[d];
    }
  }
  for (int d = 0; d < kHead; ++d) {
    if (maximum[d] == -std::numeric_limits<float>::infinity()) maximum[d] = 0.0f;
  }

  float numerator[kSegments][kHead] = {};
  float denominator[kSegments][kHead] = {};
  const int states_per_segment = group.count / kSegments;
  for (int j = 0; j < group.count; ++j) {
    if (!group.states[j]) continue;  // weight 0 and value 0: adding +0 to sums that start at +0
    const auto* kv = group.states[j] + offset(j);
    const auto* score = kv + state_width;
    float* num = numerator[j / states_per_segment];
    float* den = denominator[j / states_per_segment];
    for (int d = 0; d < kHead; ++d) {
      const float e = ExpNonPositive(Sub(E::Load(score[d]), maximum[d]));
      num[d] = Add(num[d], Mul(e, E::Load(kv[d])));
      den[d] = Add(den[d], e);
    }
  }
  for (int width = kSegments / 2; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) {
      for (int d = 0; d < kHead; ++d) {
        numerator[i][d] = Add(numerator[2 * i][d], numerator[2 * i + 1][d]);
        denominator[i][d] = Add(denominator[2 * i][d], denominator[2 * i + 1][d]);
      }
    }
  }
  for (int d = 0; d < kHead; ++d) {
    // Where all scores are -inf there is nothing to average.
    out[d] = denominator[0][d] == 0.0f ? 0.0f : Div(numerator[0][d], denominator[0][d]);
  }
}

// x = x / rms(x) * weight
template <int kHead>
void RmsNorm(const IndexerKvParams& p, float* x) {
  const float inverse = InverseRms<kHead>(p.rms_norm_eps, x);
  for (int d = 0; d < kHead; ++d) {
    x[d] = Mul(Mul(x[d], inverse), LoadScale(p.rms_weight, p.rms_weight_dtype, d));
  }
}

// Quantises a bf16-rounded token into its codes and scales in the page.
template <IndexerQuant kQuant>
void Insert(const float* x, uint8_t* codes, uint8_t* scales) {
  if constexpr (kQuant == IndexerQuant::kFp8) {
    const float scale = EncodeFp8(x, kIndexerHeadDim, codes);
    std::memcpy(scales, &scale, sizeof(scale));
  } else if constexpr (kQuant == IndexerQuant::kMxfp4) {
    EncodeMxfp4(x, kIndexerHeadDim, codes, scales);
  } else {
    constexpr int kPlain = kIndexerWideHeadDim - kIndexerRopeDim;
    for (int b = 0; b < kPlain / kWideFp8Block; ++b) {
      const int at = b * kWideFp8Block;
      scales[b] = PowerOfTwoToUe8m0(EncodeFp8(x + at, kWideFp8Block, codes + at));
    }
    scales[kPlain / kWideFp8Block] = 0;
    for (int i = 0; i < kIndexerRopeDim; ++i) {
      // One NaN for all: a processor's own sign and payload must not reach the page.
      const uint16_t bits = ComputedBFloat16(x[kPlain + i]);
      std::memcpy(codes + kPlain + 2 * i, &bits, sizeof(bits));
    }
  }
}

template <IndexerQuant kQuant, DType kState>
void KeyToken(const IndexerKvParams& p, int64_t token) {
  constexpr IndexerPageFormat kFormat = PageFormatOf(kQuant);
  constexpr int kHead = kFormat.head_dim;
  const int64_t position = p.positions.At(token);
  const int64_t slot = p.kv_slots.At(token);
  // (position + 1) would overflow at INT64_MAX.
  if (position < 0 || position % p.compress_ratio != p.compress_ratio - 1) return;
  if (p.state_slots.At(token) < 0 || slot < 0 || slot / p.page_size >= p.num_pages) return;

  const int state_width = (p.compress_ratio == 4 ? 2 : 1) * kHead;
  Group<typename Element<kState>::Storage> group;
  if (!FindGroup(p, token, position, 2 * state_width, &group)) return;
  float x[kHead];
  Compress<kState, kHead>(group, p.compress_ratio, state_width, x);
  RmsNorm<kHead>(p, x);
  const int64_t rope_position = position - (p.compress_ratio - 1);
  Rotate(LoadRotation(p.cos_sin, p.cos_sin_dtype, rope_position, p.max_positions),
         x + kHead - kIndexerRopeDim);
  RoundToBFloat16(x, kHead);

  uint8_t* page = p.kv_cache + slot / p.page_size * p.page_stride;
  const int64_t entry = slot % p.page_size;
  Insert<kQuant>(x, page + entry * kFormat.code_bytes,
                 page + p.page_size * kFormat.code_bytes + entry * kFormat.scale_bytes);
}

}  // namespace

void IndexerQRopeQuant(const IndexerQParams& p) {
  dispatch<IndexerQuant::kFp8, IndexerQuant::kMxfp4>(p.quant, "quant", [&](auto quant) {
    ParallelFor(p.num_tokens, 2LL * p.num_heads * kIndexerHeadDim, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) QueryToken<decltype(quant)::value>(p, t);
    });
  });
}

void IndexerQQuant(const IndexerQQuantParams& p) {
  ParallelFor(p.num_queries, 2LL * p.num_heads * kIndexerHeadDim, [&](int64_t begin, int64_t end) {
    for (int64_t query = begin; query < end; ++query) QuantizeQuery(p, query);
  });
}

void IndexerKvCompressInsert(const IndexerKvParams& p) {
  dispatch<IndexerQuant::kFp8, IndexerQuant::kMxfp4, IndexerQuant::kFp8Wide>(
      p.quant, "quant", [&](auto quant) {
        dispatch<DType::kFloat32, DType::kBFloat16>(p.state_dtype, "state dtype", [&](auto state) {
          // Each token is compressed once or twice, with an exponential a channel.
          const int64_t work = 8LL * PageFormatOf(decltype(quant)::value).head_dim;
          ParallelFor(p.num_tokens, work, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) {
              KeyToken<decltype(quant)::value, decltype(state)::value>(p, t);
            }
          });
        });
      });
}

}  // namespace fastattn::cpu
