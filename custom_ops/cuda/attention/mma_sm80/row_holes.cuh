// What the packed rows of a call see that has holes: trees of drafts, and windows of KV heads
// beside the first keys of a sequence (common/holes.h). Only kernels with Traits::kGeneral look
// here.
//
// A packed row sees the keys of its PackedRowInfo without those in its gap, and of the new keys
// those whose entry in its row of the tree is not 0. Both are kept beside the PackedRowInfo, at the
// same stride, so that one address finds them.
#pragma once

#include <cstdint>

#include "common/holes.h"
#include "cuda/attention/split_kv/shared/schedule.cuh"
#include "cuda/common/mma.cuh"
#include "params/attention.h"

namespace fastattn::cuda {

struct alignas(16) RowHoles {
  const uint8_t* tree;  // entry of the first new key; null: no tree
  KeyRange<int> gap;    // that it does not see
  int tree_begin;       // the first new key
  int unused[3];
};

// Takes what hides keys from the query `index` of a sequence out of the interval that it sees.
__device__ __forceinline__ RowHoles TakeHoles(const AttentionParams& p, const SeqShape& seq,
                                              int batch_idx, int kv_head, int index,
                                              KeyRange<int>* keys) {
  RowHoles holes;
  holes.tree_begin = seq.k_len - seq.q_len;
  holes.gap = TakeHeadWindow(p.WindowOf(kv_head), index + holes.tree_begin, kMaxKeys, keys);
  holes.tree = nullptr;
  if (p.tree.data != nullptr && seq.q_len <= p.tree.size) {
    holes.tree = p.tree.Row(batch_idx, index);
  }
  return holes;
}

// What one packed row sees, from shared memory.
template <typename Traits>
struct RowKeys {
  KeyRange<int> keys;
  RowHoles holes;

  // `info`: address of its PackedRowInfo.
  __device__ __forceinline__ explicit RowKeys(uint32_t info) {
    const uint2 range = LoadShared8(info);
    keys = {static_cast<int>(range.x), static_cast<int>(range.y)};
    const uint32_t from = info + (Traits::kHolesOffset - Traits::kRowInfoOffset);
    const uint4 words = LoadShared16(from);
    const uint2 begin = LoadShared8(from + 16);
    holes.tree = reinterpret_cast<const uint8_t*>(static_cast<uint64_t>(words.y) << 32 | words.x);
    holes.gap = {static_cast<int>(words.z), static_cast<int>(words.w)};
    holes.tree_begin = static_cast<int>(begin.x);
  }

  __device__ __forceinline__ bool Sees(int key) const {
    if (key < keys.begin || key >= keys.end) return false;
    if (key >= holes.gap.begin && key < holes.gap.end) return false;
    return holes.tree == nullptr || key < holes.tree_begin ||
           __ldg(holes.tree + (key - holes.tree_begin)) != 0;
  }
};

// Whether no query of the sequence sees a key of [begin, end), by the windows of heads alone.
__device__ __forceinline__ bool InGap(const AttentionParams& p, const Segment& s, int begin,
                                      int end) {
  KeyRange<int> keys = {0, kMaxKeys};
  const KeyRange<int> gap =
      TakeHeadWindow(p.WindowOf(s.head), s.shape.k_len - s.shape.q_len, kMaxKeys, &keys);
  return begin >= gap.begin && end <= gap.end;
}

}  // namespace fastattn::cuda
