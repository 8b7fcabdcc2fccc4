// What the plan of an attention call (attention.cc) and the instruction-set variants of its inner
// kernel (attention_kernel.h) share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "common/fp4.h"
#include "common/int4.h"
#include "common/layout.h"
#include "params/attention.h"

namespace fastattn::cpu {

// Packed rows of a tile: (query token, query head of one KV head) pairs, tokens outermost.
inline constexpr int kMaxTileRows = 64;
// Keys that one pass of the online softmax covers: up to 4 chunks of a cache block's length.
inline constexpr int kMaxChunks = 4;
inline constexpr int kTileKeys = kMaxChunks * kBlockSize;

// A sequence of the step, its lengths cut to the tensors (see common/seq_lengths.h).
struct AttentionSeq {
  int64_t q_begin = 0;  // first query token
  int64_t q_len = 0;
  int64_t k_len = 0;
  int64_t k_begin = 0;  // first key token, ragged K and V only
};

// What a thread works on at a time: a tile of packed rows over the keys [key_begin, key_end).
struct AttentionTask {
  int batch_idx = 0;
  int kv_head = 0;
  int64_t packed_begin = 0;  // packed row r is query token r / group, head r % group
  int packed_count = 0;
  int64_t key_begin = 0;
  int64_t key_end = 0;
};

// Tokens in the order in which the columns of a score tile hold them: values stored by channel
// ([D, 64]) keep their tokens in TokenSlot order, and the scores follow them.
template <bool kByChannel>
struct ColumnOrder {
  alignas(64) int32_t token[kBlockSize];
  constexpr ColumnOrder() : token() {
    for (int i = 0; i < kBlockSize; ++i) token[i] = kByChannel ? TokenOfSlot(i) : i;
  }
};

template <bool kByChannel>
inline constexpr ColumnOrder<kByChannel> kColumnOrder{};

// 64-byte aligned floats, left uninitialised.
class AlignedFloats {
 public:
  explicit AlignedFloats(size_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64)), std::free) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  float* get() const { return data_.get(); }

 private:
  std::unique_ptr<float, void (*)(void*)> data_;
};

// Buffers of one thread, for one task after the other. The caller fills `visible_begin` and
// `visible_end`. `acc`, `row_max` and `row_sum` are the result: unnormalised output, maximum (a
// base-2 logarithm) and sum of exp2(score - maximum).
struct TileBuffers {
  explicit TileBuffers(int head_dim)
      : q_(kMaxTileRows * head_dim),
        acc_(kMaxTileRows * head_dim),
        scores_(kMaxTileRows * kTileKeys),
        keys_(kBlockSize * head_dim),
        values_(kTileKeys * head_dim),
        q(q_.get()),
        acc(acc_.get()),
        scores(scores_.get()),
        keys(keys_.get()),
        values(values_.get()) {}

 private:
  AlignedFloats q_, acc_, scores_, keys_, values_;

 public:
  float* q;       // [rows, D]
  float* acc;     // [rows, D]
  float* scores;  // [rows, kTileKeys]
  float* keys;    // [64, D] decoded
  float* values;  // [kTileKeys, D], or [chunk, D, 64] for values stored by channel
  alignas(64) float key_scales[kTileKeys];
  alignas(64) float value_scales[kTileKeys];
  float row_max[kMaxTileRows];
  float row_sum[kMaxTileRows];
  float row_factor[kMaxTileRows];       // score = row_factor * (q . code) * key scale
  int64_t visible_begin[kMaxTileRows];  // keys that a row sees; none if end <= begin
  int64_t visible_end[kMaxTileRows];
  // Of these a row does not see the ones in its gap, nor new keys, from `tree_begin` on, whose
  // entry in its row of the tree is 0. `holes`: some row has a gap or a tree; else the rest is not
  // set.
  bool holes = false;
  int64_t tree_begin;
  int64_t gap_begin[kMaxTileRows];
  int64_t gap_end[kMaxTileRows];
  const uint8_t* tree[kMaxTileRows];  // null: no tree
};

using TileFunction = void (*)(const AttentionParams& p, const AttentionSeq& seq,
                              const AttentionTask& task, TileBuffers& buffers);

// The kernel for p's head_dim and types in the best instruction set. Throws std::invalid_argument
// for types that are not compiled.
TileFunction ChooseTileFunction(const AttentionParams& p);

// The same in each instruction set; null where it is not compiled.
namespace baseline {
TileFunction FindTileFunction(const AttentionParams& p);
}
namespace avx2 {
TileFunction FindTileFunction(const AttentionParams& p);
}
namespace avx512 {
TileFunction FindTileFunction(const AttentionParams& p);
}

}  // namespace fastattn::cpu
