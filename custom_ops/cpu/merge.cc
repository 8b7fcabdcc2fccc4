#include "cpu/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/dispatch.h"
#include "common/exact.h"
#include "cpu/parallel.h"
#include "cpu/quantize.h"

namespace fastattn::cpu {

namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();

// Weight of each side of one (token, head). The output of an empty side must not be read into the
// result: its memory may hold anything, and 0 * NaN is NaN.
struct Weights {
  bool use_prefix;
  bool use_suffix;
  float prefix;
  float suffix;
  float lse;
};

Weights WeightsOf(float prefix_lse, float suffix_lse) {
  // Some kernels mark a query without keys by an LSE of +inf.
  const float p = prefix_lse == -kEmpty ? kEmpty : prefix_lse;
  const float s = suffix_lse == -kEmpty ? kEmpty : suffix_lse;
  Weights w{p != kEmpty, s != kEmpty, 0.0f, 0.0f, kEmpty};
  if (!w.use_prefix && !w.use_suffix) return w;
  const float m = p > s ? p : s;  // a NaN on either side reaches both weights below
  const float prefix = ExpNonPositive(Sub(p, m));
  const float suffix = ExpNonPositive(Sub(s, m));
  const float sum = Add(prefix, suffix);
  w.prefix = Div(prefix, sum);
  w.suffix = Div(suffix, sum);
  w.lse = Add(static_cast<float>(std::log(static_cast<double>(sum))), m);
  return w;
}

template <DType kDType>
void MergeRow(const typename Element<kDType>::Storage* prefix,
              const typename Element<kDType>::Storage* suffix, const Weights& w, int n,
              float* row) {
  using E = Element<kDType>;
  if (w.use_prefix && w.use_suffix) {
    for (int d = 0; d < n; ++d) {
      row[d] = Add(Mul(E::Load(prefix[d]), w.prefix), Mul(E::Load(suffix[d]), w.suffix));
    }
  } else if (w.use_prefix) {
    for (int d = 0; d < n; ++d) row[d] = Mul(E::Load(prefix[d]), w.prefix);
  } else if (w.use_suffix) {
    for (int d = 0; d < n; ++d) row[d] = Mul(E::Load(suffix[d]), w.suffix);
  } else {
    std::fill(row, row + n, 0.0f);
  }
}

// Merges token t into `rows` [H, D] and writes its LSE. Both sides of the token are read before
// anything of it is written.
template <DType kDType>
void MergeToken(const MergeParams& p, int64_t t, float* rows, Weights* weights) {
  using T = typename Element<kDType>::Storage;
  const T* prefix = static_cast<const T*>(p.prefix_output) + t * p.prefix_token_stride;
  const T* suffix = static_cast<const T*>(p.suffix_output) + t * p.suffix_token_stride;
  for (int h = 0; h < p.num_heads; ++h) {
    const float prefix_lse =
        t < p.merged_tokens
            ? p.prefix_lse[h * p.prefix_lse_head_stride + t * p.prefix_lse_token_stride]
            : kEmpty;
    weights[h] = WeightsOf(
        prefix_lse, p.suffix_lse[h * p.suffix_lse_head_stride + t * p.suffix_lse_token_stride]);
    MergeRow<kDType>(prefix + h * p.prefix_head_stride, suffix + h * p.suffix_head_stride,
                     weights[h], p.head_dim, rows + int64_t{h} * p.head_dim);
  }
  for (int h = 0; h < p.num_heads; ++h) {
    p.output_lse[h * p.output_lse_head_stride + t * p.output_lse_token_stride] = weights[h].lse;
  }
}

template <DType kDType, MergeOutput kOutput>
void StoreToken(const MergeParams& p, int64_t t, const float* rows, uint8_t* codes) {
  using E = Element<StoredType(kOutput, kDType)>;
  const int64_t channels = int64_t{p.num_heads} * p.head_dim;
  if constexpr (kOutput == MergeOutput::kDynamicFp8) {
    // A group may span heads, whose codes need not lie side by side in the output.
    float* scales = p.output_scales + t * p.output_scales_token_stride;
    for (int64_t g = 0; g < channels / p.group_size; ++g) {
      const int64_t first = g * p.group_size;
      scales[g] = EncodeE4M3Dynamic<DType::kFloat32>(rows + first, p.group_size, codes + first);
    }
  } else if constexpr (kOutput == MergeOutput::kStaticFp8) {
    EncodeE4M3<DType::kFloat32>(rows, channels, p.output_scale[0], codes);
  }
  for (int h = 0; h < p.num_heads; ++h) {
    const int64_t at = t * p.output_token_stride + h * p.output_head_stride;
    if constexpr (IsValues(kOutput)) {
      auto* out = static_cast<typename E::Storage*>(p.output) + at;
      const float* row = rows + int64_t{h} * p.head_dim;
      for (int d = 0; d < p.head_dim; ++d) out[d] = E::Store(row[d]);
    } else {
      std::copy_n(codes + int64_t{h} * p.head_dim, p.head_dim,
                  static_cast<uint8_t*>(p.output) + at);
    }
  }
}

template <DType kDType, MergeOutput kOutput>
void Run(const MergeParams& p) {
  const int64_t channels = int64_t{p.num_heads} * p.head_dim;
  ParallelFor(p.num_tokens, channels, [&](int64_t begin, int64_t end) {
    std::vector<float> rows(channels);
    std::vector<Weights> weights(p.num_heads);
    std::vector<uint8_t> codes(IsValues(kOutput) ? 0 : channels);
    for (int64_t t = begin; t < end; ++t) {
      MergeToken<kDType>(p, t, rows.data(), weights.data());
      StoreToken<kDType, kOutput>(p, t, rows.data(), codes.data());
    }
  });
}

}  // namespace

void MergeAttnStates(const MergeParams& p) {
  using M = MergeOutput;
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16>(p.dtype, "dtype", [&](auto dtype) {
    constexpr DType kDType = decltype(dtype)::value;
    const auto run = [&](auto output) { Run<kDType, decltype(output)::value>(p); };
    if constexpr (kDType == DType::kFloat32) {
      dispatch<M::kPlain, M::kFloat16, M::kBFloat16, M::kStaticFp8, M::kDynamicFp8>(p.output_kind,
                                                                                    "output", run);
    } else {
      dispatch<M::kPlain, M::kStaticFp8, M::kDynamicFp8>(p.output_kind, "output", run);
    }
  });
}

}  // namespace fastattn::cpu
