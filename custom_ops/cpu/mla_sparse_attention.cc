// Sparse latent attention on the CPU: which thread attends what, and from sums to outputs.
#include "cpu/mla_sparse_attention.h"

#include <algorithm>

#include "common/normaliser.h"
#include "common/numeric.h"
#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/mla_sparse_attention_tile.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

// Every group of heads dequantises its tokens itself; this many are worth it.
constexpr int kLeastHeads = 8;

MlaSparseFunction ChooseFunction() {
  switch (ChosenIsa()) {
    case Isa::kAvx512:
      return avx512::FindMlaSparse();
    case Isa::kAvx2:
      return avx2::FindMlaSparse();
    case Isa::kBaseline:
      break;
  }
  return baseline::FindMlaSparse();
}

void StoreHeads(const MlaSparseParams& p, int64_t token, int begin, int end,
                const MlaBuffers& buffers) {
  for (int h = 0; h < end - begin; ++h) {
    const int64_t at = p.StatisticAt(token, begin + h);
    const float maximum = buffers.row_max[h], sum = buffers.row_sum[h];
    const Normaliser row =
        NormaliserWithoutSink(maximum, sum, p.sinks, [&] { return p.sinks[begin + h]; });
    if (p.lse != nullptr) p.lse[at] = sum == 0.0f ? p.LonelyLse() : row.lse;
    if (p.max_logits != nullptr) p.max_logits[at] = LargestLogit(maximum, sum);
    const float* acc = buffers.acc + h * kMlaValueDim;
    const int64_t row_at = (token * p.heads + begin + h) * kMlaValueDim;
    if (p.out_float != nullptr) {
      for (int i = 0; i < kMlaValueDim; ++i) p.out_float[row_at + i] = acc[i] * row.factor;
      continue;
    }
    StoreValues<DType::kBFloat16>(kMlaValueDim, p.out + row_at,
                                  [&](int i) { return acc[i] * row.factor; });
  }
}

}  // namespace

void MlaSparseAttention(const MlaSparseParams& p) {
  if (p.tokens == 0 || p.heads == 0) return;
  const MlaSparseFunction run = ChooseFunction();
  // About 0.05 ns a product, 0.5 ns a dequantised channel.
  const int64_t keys = p.keys.topk + p.extra.topk;
  const int64_t work = keys * (p.heads * (p.dim + kMlaValueDim) / 20 + p.dim / 2);
  // A head's arithmetic does not depend on the heads beside it, so groups may follow the threads.
  const int64_t threads = ThreadsFor(p.tokens * p.heads, work / p.heads);
  const int64_t most = std::max(1, p.heads / kLeastHeads);
  const int64_t groups = std::clamp<int64_t>((threads + p.tokens - 1) / p.tokens, 1, most);
  ParallelFor(p.tokens * groups, work / groups, [&](int64_t begin, int64_t end) {
    MlaBuffers buffers(static_cast<int>((p.heads + groups - 1) / groups));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / groups, group = i % groups;
      const int first = static_cast<int>(p.heads * group / groups);
      const int last = static_cast<int>(p.heads * (group + 1) / groups);
      run(p, token, first, last, buffers);
      StoreHeads(p, token, first, last, buffers);
    }
  });
}

}  // namespace fastattn::cpu
