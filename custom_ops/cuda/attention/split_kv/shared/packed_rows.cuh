// The packed rows of a work tile: which query and head each is, what its result is multiplied with,
// and in which units its partial results are.
#pragma once

#include <cstdint>

#include "cuda/attention/shared/scales.cuh"
#include "cuda/attention/split_kv/shared/schedule.cuh"

namespace fastattn::cuda {

// P = 2^kShift * exp2(score - maximum): fp16 then has its full precision down to probabilities of
// 2^-29 of the largest, and sums of products stay far inside fp32.
inline constexpr int kLog2Unit = 15;
inline constexpr float kShift = kLog2Unit;
inline constexpr float kInfinity = __builtin_huge_valf();

// A scale of V that is constant over a sequence's keys and a head's channels.
__device__ __forceinline__ float ValueScale(const AttentionParams& p, int batch_idx, int kv_head) {
  if (p.paged) {
    const PagedCache& cache = p.cache;
    if (cache.v_granularity == ScaleScheme::kChannel || !IsQuantized(cache.type) ||
        IsDynamic(cache.type)) {
      return 1.0f;
    }
    return LoadHeadScale(cache, cache.v_scales, cache.v_granularity, kv_head);
  }
  const Descale& scale = p.ragged.v_descale;
  return LoadDescale(scale, 0, kv_head, DescaleAt{batch_idx, 0});
}

// Packed GQA: a packed row of a work tile is a query token with one of the group's heads. Packed
// rows after the sequence's last one are not valid.
struct PackedRow {
  bool valid;
  int token;
  int head;
};

__device__ __forceinline__ PackedRow PackedRowOf(const AttentionTask& task, const SeqShape& seq,
                                                 int kv_head, int row) {
  const int index = row / task.group;
  PackedRow packed_row;
  packed_row.valid = index < seq.q_len;
  packed_row.token = seq.q_begin + index;
  packed_row.head = kv_head * task.group + row - index * task.group;
  return packed_row;
}

// What a CTA keeps of a packed row in shared memory.
struct PackedRowInfo {
  KeyRange<int> keys;  // that it sees
  float score_factor;  // of products of queries and K's codes
  float query_factor;  // what its query was divided by
  float out_factor;    // of the merged output
  float value_scale;   // constant over its keys
  int64_t out;         // elements from the start of the output, -1 = not valid
};

}  // namespace fastattn::cuda
