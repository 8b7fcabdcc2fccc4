// What the plan of a sparse latent attention call (mla_sparse_attention.cc) and the instruction-set
// variants of its inner kernel (mla_sparse_attention_kernel.h) share.
#pragma once

#include <cstdint>

#include "cpu/attention_tile.h"
#include "params/mla_attention.h"

namespace fastattn::cpu {

inline constexpr int kMlaMaxDim = 576;
inline constexpr int kMlaTileKeys = 32;  // dequantised together: 72 KB of fp32

// Buffers of one thread.
struct MlaBuffers {
  explicit MlaBuffers(int heads)
      : q_(heads * kMlaMaxDim),
        acc_(heads * kMlaValueDim),
        keys_(kMlaTileKeys * kMlaMaxDim),
        scores_(heads * kMlaTileKeys),
        max_(heads),
        sum_(heads),
        q(q_.get()),
        acc(acc_.get()),
        keys(keys_.get()),
        scores(scores_.get()),
        row_max(max_.get()),
        row_sum(sum_.get()) {}

 private:
  AlignedFloats q_, acc_, keys_, scores_, max_, sum_;

 public:
  float* q;        // [heads, dim]
  float* acc;      // [heads, 512], unnormalised output
  float* keys;     // [kMlaTileKeys, dim], dequantised
  float* scores;   // [heads, kMlaTileKeys], then their weights
  float* row_max;  // [heads], base-2 logarithm
  float* row_sum;  // [heads] of exp2(score - row_max)
};

// Attends with heads [begin, end) of one query token, whose results it leaves in the buffers.
using MlaSparseFunction = void (*)(const MlaSparseParams& p, int64_t token, int begin, int end,
                                   MlaBuffers& buffers);

namespace baseline {
MlaSparseFunction FindMlaSparse();
}
namespace avx2 {
MlaSparseFunction FindMlaSparse();
}
namespace avx512 {
MlaSparseFunction FindMlaSparse();
}

}  // namespace fastattn::cpu
