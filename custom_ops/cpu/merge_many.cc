#include "cpu/merge_many.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "common/dispatch.h"
#include "common/merge_many.h"
#include "cpu/parallel.h"
#include "cpu/quantize.h"

namespace fastattn::cpu {

namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();

// Merges a token and head into `row` [D] and writes its LSE.
template <DType kIn>
void MergeRow(const MergeManyParams& p, int64_t token, int head, float* row) {
  using E = Element<kIn>;
  const float sink =
      p.sinks == nullptr ? kEmpty : StateLse(LoadScale(p.sinks, p.sinks_dtype, head));
  const float* lses = p.lses + head * p.lse_head_stride + token * p.lse_token_stride;
  const auto lse = [&](int n) { return StateLse(lses[n * p.lse_state_stride]); };
  const MergeTotal total = TotalOfStates(p.num_states, sink, lse);
  const auto* from = static_cast<const typename E::Storage*>(p.outputs) + token * p.token_stride +
                     head * p.head_stride;
  bool first = true;
  for (int n = 0; n < p.num_states; ++n) {
    // A state without keys must not be read into the result: its memory may hold anything.
    if (lse(n) == kEmpty) continue;
    const float weight = WeightOfState(lse(n), total);
    const auto* state = from + n * p.state_stride;
    if (first) {
      for (int d = 0; d < p.head_dim; ++d) row[d] = Mul(E::Load(state[d]), weight);
    } else {
      for (int d = 0; d < p.head_dim; ++d) row[d] = Add(row[d], Mul(E::Load(state[d]), weight));
    }
    first = false;
  }
  if (first) std::fill(row, row + p.head_dim, 0.0f);
  const MergeTotal counted =
      p.sinks_in_lse || sink == kEmpty ? total : TotalOfStates(p.num_states, kEmpty, lse);
  p.output_lse[head * p.num_tokens + token] = LseOfTotal(counted);
}

template <DType kIn, MergeOutput kOutput>
void Run(const MergeManyParams& p) {
  using E = Element<StoredType(kOutput, kIn)>;
  const int64_t rows = p.num_tokens * p.num_heads;
  ParallelFor(rows, int64_t{p.head_dim} * p.num_states, [&](int64_t begin, int64_t end) {
    std::vector<float> row(p.head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / p.num_heads;
      const int head = static_cast<int>(i % p.num_heads);
      MergeRow<kIn>(p, token, head, row.data());
      auto* out = static_cast<typename E::Storage*>(p.output) + token * p.output_token_stride +
                  head * p.output_head_stride;
      if constexpr (kOutput == MergeOutput::kStaticFp8) {
        EncodeE4M3<DType::kFloat32>(row.data(), p.head_dim, p.output_scale[0], out);
      } else {
        for (int d = 0; d < p.head_dim; ++d) out[d] = E::Store(row[d]);
      }
    }
  });
}

}  // namespace

void MergeManyAttnStates(const MergeManyParams& p) {
  using M = MergeOutput;
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16>(p.dtype, "dtype", [&](auto dtype) {
    constexpr DType kIn = decltype(dtype)::value;
    const auto run = [&](auto output) { Run<kIn, decltype(output)::value>(p); };
    if constexpr (kIn == DType::kFloat32) {
      dispatch<M::kPlain, M::kFloat16, M::kBFloat16, M::kStaticFp8>(p.output_kind, "output", run);
    } else {
      dispatch<M::kPlain, M::kStaticFp8>(p.output_kind, "output", run);
    }
  });
}

}  // namespace fastattn::cpu
