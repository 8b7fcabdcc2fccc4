#include "cpu/query_transform.h"

#include <vector>

#include "common/dispatch.h"
#include "common/hadamard.h"
#include "common/numeric.h"
#include "common/score_shift.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

void TransformQuery(const QueryTransformParams& p) {
  const int64_t heads = p.num_heads, dim = p.head_dim;
  const int64_t group = heads / p.num_kv_heads;
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16>(p.q_dtype, "q", [&](auto dtype) {
    using E = Element<decltype(dtype)::value>;
    const auto* q = static_cast<const typename E::Storage*>(p.q);
    ParallelFor(p.num_tokens * heads, 2 * dim, [&](int64_t begin, int64_t end) {
      std::vector<float> x(dim);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i % heads;
        LoadRow<decltype(dtype)::value>(q + i / heads * p.q_token_stride + head * p.q_head_stride,
                                        static_cast<int>(dim), x.data());
        if (p.shifts != nullptr) {
          const float* center = p.center + head / group * dim;
          float sum = 0.0f;
          for (int64_t d = 0; d < dim; ++d) sum += x[d] * center[d];
          p.shifts[i] = sum * p.softmax_scale;
        }
        if (p.rotated == nullptr) continue;
        HadamardRotate(x.data(), static_cast<int>(dim));
        StoreRow<decltype(dtype)::value>(x.data(), static_cast<int>(dim),
                                         static_cast<typename E::Storage*>(p.rotated) + i * dim);
      }
    });
  });
}

void ShiftScores(const ScoreShiftParams& p) {
  const int64_t heads = p.num_heads, dim = p.value_dim, tokens = p.num_tokens;
  const float inverse = p.out_scale == nullptr ? 1.0f : 1.0f / p.out_scale[0];
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kE4M3>(
      p.out_dtype, "out", [&](auto dtype) {
        using E = Element<decltype(dtype)::value>;
        auto* out = static_cast<typename E::Storage*>(p.out);
        ParallelFor(tokens * heads, dim, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t head = i % heads, at = head * tokens + i / heads;
            const float lse = p.lse_in[at], shift = p.shifts[i];
            if (p.sinks == nullptr) {
              p.lse[at] = ShiftedLse(lse, shift);
              continue;
            }
            const float sink = LoadScale(p.sinks, p.sinks_dtype, head);
            const Normaliser found = ShiftedNormaliser(lse, shift, sink);
            if (p.lse != nullptr) p.lse[at] = found.lse;
            for (int64_t d = 0; d < dim; ++d) {
              out[i * dim + d] = E::Store(p.partial[i * dim + d] * found.factor * inverse);
            }
          }
        });
      });
}

}  // namespace fastattn::cpu
