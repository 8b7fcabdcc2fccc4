#include "cpu/quantize_query.h"

#include "common/dispatch.h"
#include "common/numeric.h"
#include "cpu/parallel.h"
#include "cpu/quantize.h"

namespace fastattn::cpu {

void QuantizeQuery(const QuantizeQueryParams& p) {
  const int64_t heads = p.num_heads, dim = p.head_dim;
  dispatch<DType::kBFloat16, DType::kFloat16>(p.q_dtype, "q", [&](auto dtype) {
    constexpr DType kIn = decltype(dtype)::value;
    const auto* q = static_cast<const typename Element<kIn>::Storage*>(p.q);
    ParallelFor(p.num_tokens * heads, dim, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto* x = q + i / heads * p.q_token_stride + i % heads * p.q_head_stride;
        const float scale = DynamicScale(AmaxBits<kIn>(x, dim), kCacheAmaxFloor, kE4M3Max);
        EncodeE4M3<kIn>(x, dim, scale, p.codes + i * dim);
        p.descale[i] = scale;
      }
    });
  });
}

}  // namespace fastattn::cpu
