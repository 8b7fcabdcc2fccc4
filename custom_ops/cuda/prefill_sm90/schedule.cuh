// Which tiles a CTA works on. Everything is found on the device from the rows' lengths, so that a
// captured graph follows them; nothing is counted in global memory, so nothing needs a reset.
//
// Tiles are ordered by the number of keys that they read, the most first, and dealt to the CTAs to
// and fro. A row's tiles m = 0, 1, ... stand on the levels base + m, its last one on the level of
// its number of key steps; within a level, rows and then heads follow each other.
#pragma once

#include "cuda/prefill_sm90/config.h"

namespace fastattn::cuda::prefill_sm90 {

// Bounds on untrusted lengths, so that sums of positions fit into an int.
inline constexpr int kMaxLength = 1 << 29;

__device__ __forceinline__ int Clamp(int x, int low, int high) { return max(low, min(x, high)); }

// First key token of row b and the number of its keys, contiguous keys.
__device__ __forceinline__ int2 PackedKeys(const AttentionParams& p, int b) {
  const int tokens = static_cast<int>(p.packed.num_tokens);
  const int begin = Clamp(p.packed.cu_seqlens_k[b], 0, tokens);
  return make_int2(begin, Clamp(p.packed.cu_seqlens_k[b + 1], begin, tokens) - begin);
}

template <class C>
class TileWalk {
 public:
  // Works for any kernel's Arguments with `p` and `min_query_tokens`, and Shared with `rows` and
  // `walk`.
  template <class A, class S>
  __device__ TileWalk(const A& arguments, S& shared)
      : p_(arguments.p),
        min_query_tokens_(arguments.min_query_tokens),
        rows_(shared.rows),
        state_(shared.walk),
        lane_(threadIdx.x % 32) {}

  __device__ void Start() {
    state_.round = state_.count = state_.next_row = state_.start = 0;
    state_.level = -1;
    __syncwarp();
  }

  // Writes the CTA's next tile to shared memory; false if there is none. Called by a whole warp.
  __device__ bool Next(Tile* tile) {
    const int grid = gridDim.x, cta = blockIdx.x, round = state_.round;
    const int target = round * grid + (round % 2 == 0 ? cta : grid - 1 - cta);
    int level = state_.level, start = state_.start;
    bool found = false;
    do {
#pragma unroll 1
      for (level = NextLevel(level); level >= 0; level = NextLevel(level - 1)) {
        const int tiles = RowsAt(level) * p_.num_heads;
        found = target < start + tiles;
        if (found) break;
        start += tiles;
      }
    } while (!found && LoadRows(&level));
    // Every lane writes the same.
    state_.round = round + 1;
    state_.level = level;
    state_.start = start;
    __syncwarp();
    if (found) Describe(target - start, level, tile);
    return found;
  }

 private:
  __device__ static int Tiles(const ActiveRow& row) {
    return (row.q_len + C::kQueries - 1) / C::kQueries;
  }

  __device__ int Base(const ActiveRow& row) const {
    return max((min(row.k_len, Reach()) + C::kKeys - 1) / C::kKeys - Tiles(row), 0);
  }

  // Keys that a block table holds.
  __device__ int Reach() const {
    const int64_t reach = static_cast<int64_t>(p_.rows.max_blocks) * kBlockSize;
    return p_.paged ? static_cast<int>(min(reach, int64_t{2} * kMaxLength)) : 2 * kMaxLength;
  }

  __device__ bool IsAt(int i, int level) const {
    if (i >= state_.count) return false;
    const ActiveRow row = rows_[i];
    const int m = level - Base(row);
    return m >= 0 && m < Tiles(row);
  }

  // The first level from `level` downwards on which there are tiles; -1: none.
  __device__ int NextLevel(int level) const {
    int found = -1;
#pragma unroll 1
    for (int i = lane_; i < state_.count; i += 32) {
      const ActiveRow row = rows_[i];
      const int base = Base(row), at = min(level, base + Tiles(row) - 1);
      if (at >= base) found = max(found, at);
    }
    return __reduce_max_sync(~0u, found);
  }

  __device__ int RowsAt(int level) const {
    int found = 0;
#pragma unroll 1
    for (int i = 0; i < state_.count; i += 32) {
      found += __popc(__ballot_sync(~0u, IsAt(i + lane_, level)));
    }
    return found;
  }

  // Reads the lengths of further rows; false at the end. Nothing in them is trusted.
  __device__ bool LoadRows(int* level) {
    int count = 0, next = state_.next_row, top = -1;
#pragma unroll 1
    while (next < p_.rows.batch && count + 32 <= kMaxActiveRows) {
      ActiveRow row{next + lane_, 0, 0, 0};
      if (row.row < p_.rows.batch) Read(&row);
      const bool active = row.q_len >= max(min_query_tokens_, 1);
      const unsigned voters = __ballot_sync(~0u, active);
      if (active) {
        rows_[count + __popc(voters & ((1u << lane_) - 1))] = row;
        top = max(top, Base(row) + Tiles(row) - 1);
      }
      count += __popc(voters);
      next += 32;
    }
    state_.count = count;
    state_.next_row = next;
    __syncwarp();
    *level = __reduce_max_sync(~0u, top);
    return count > 0;
  }

  __device__ void Read(ActiveRow* row) const {
    const RowMeta& rows = p_.rows;
    const int b = row->row;
    row->token = Clamp(rows.cu_seqlens_q[b], 0, rows.num_tokens);
    const int end = Clamp(rows.cu_seqlens_q[b + 1], row->token, rows.num_tokens);
    if (p_.paged) {
      row->q_len = Clamp(rows.seq_lens_this_time[b], 0, end - row->token);
      row->k_len = Clamp(rows.seq_lens_decoder[b], 0, kMaxLength) + row->q_len;
    } else {
      row->q_len = end - row->token;
      row->k_len = PackedKeys(p_, b).y;
    }
  }

  __device__ void Describe(int index, int level, Tile* tile) const {
    const int head = index % p_.num_heads;
    int rank = index / p_.num_heads, slot = 0;
#pragma unroll 1
    for (int i = 0; i < state_.count; i += 32) {
      unsigned at = __ballot_sync(~0u, IsAt(i + lane_, level));
      const int here = __popc(at);
      if (rank < here) {
#pragma unroll 1
        for (; rank > 0; --rank) at &= at - 1;
        slot = i + __ffs(at) - 1;
        break;
      }
      rank -= here;
    }
    const ActiveRow row = rows_[slot];
    const int m = level - Base(row);
    if (lane_ == 0) {
      if (!p_.paged) {
        tile->key_token = PackedKeys(p_, row.row).x;
        tile->key_block = FirstBlock(tile->key_token, row.row);
      }
      tile->row = row.row;
      tile->head = head;
      tile->token = row.token + m * C::kQueries;
      tile->queries = min(row.q_len - m * C::kQueries, C::kQueries);
      tile->position = row.k_len - row.q_len + m * C::kQueries;
      tile->k_len = min(row.k_len, Reach());
    }
    __syncwarp();
    BoundKeys(tile);
    __syncwarp();
  }

  // Keys that a query of the tile may see.
  __device__ void BoundKeys(Tile* tile) const {
    const int first = tile->position, final = first + tile->queries - 1;
    int begin = 0, end = tile->k_len;
    int common_begin = 0, common_end = end;
    if (p_.causal) {
      end = min(end, final + 1);
      common_end = min(common_end, first + 1);
    }
    if (p_.window_right >= 0) {
      const int right = min(p_.window_right, kMaxLength) + 1;
      end = min(end, final + right);
      common_end = min(common_end, first + right);
    }
    if (p_.window_left >= 0) {
      begin = max(begin, first - min(p_.window_left, kMaxLength));
      common_begin = max(0, final - min(p_.window_left, kMaxLength));
    }
    if (p_.mask_offsets != nullptr) {
      int low = kMaxLength, high = 0;
#pragma unroll 1
      for (int i = lane_; i < tile->queries; i += 32) {
        const int64_t token = tile->token + i;
        low = min(low, p_.mask_offsets[2 * token]);
        high = max(high, p_.mask_offsets[2 * token + 1]);
      }
      begin = max(begin, __reduce_min_sync(~0u, low));
      end = min(end, __reduce_max_sync(~0u, high));
      common_end = 0;  // not known: every step is masked
    }
    if (lane_ != 0) return;
    // Without a visible key, one step finds that out.
    const bool empty = end <= begin;
    tile->steps = empty ? 1 : (end + C::kKeys - 1) / C::kKeys - begin / C::kKeys;
    tile->last = empty ? 0 : (end - 1) / C::kKeys;
    tile->common_lo = common_begin;
    tile->common_hi = common_end;
  }

  const AttentionParams& p_;
  const int min_query_tokens_;
  ActiveRow* rows_;
  volatile WalkState& state_;
  const int lane_;
};

}  // namespace fastattn::cuda::prefill_sm90
