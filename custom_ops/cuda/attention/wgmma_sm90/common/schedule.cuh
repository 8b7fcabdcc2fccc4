// Which tiles a CTA works on. Everything is found on the device from the rows' lengths, so that a
// captured graph follows them; nothing is counted in global memory, so nothing needs a reset.
//
// Tiles are ordered by the number of keys that they read, the most first, and dealt to the CTAs to
// and fro. A row's tiles m = 0, 1, ... stand on the levels base + m, its last one on the level of
// its number of key steps; within a level, rows and then heads follow each other.
//
// With C::kKeyBytes (of a key and its value, of one KV head) the heads are cut into sections whose
// keys fit into the L2 cache, and one section's tiles follow the other's. Every second section goes
// from few keys to many, so that neighbouring tiles stay alike.
#pragma once

#include "cuda/attention/wgmma_sm90/fp8/config.h"

namespace fastattn::cuda::wgmma_fp8 {

// Bounds on untrusted lengths, so that sums of positions fit into an int.
inline constexpr int kMaxLength = 1 << 29;

__device__ __forceinline__ int Clamp(int x, int low, int high) { return max(low, min(x, high)); }

// First key token of row b and the number of its keys, contiguous keys.
__device__ __forceinline__ int2 PackedKeys(const AttentionParams& p, int b) {
  const int tokens = static_cast<int>(p.ragged.num_tokens);
  const int begin = Clamp(p.ragged.cu_seqlens_k[b], 0, tokens);
  return make_int2(begin, Clamp(p.ragged.cu_seqlens_k[b + 1], begin, tokens) - begin);
}

// The interval of keys that query i sees. One that does not exist asks for no mask.
__device__ inline int2 VisibleKeys(const AttentionParams& p, const volatile Tile& tile, int i) {
  constexpr int kFar = 1 << 30;
  int begin = 0, end = kFar;
  // A row that does not exist sees what was written: a NaN behind it would stay in its shift.
  if (i >= tile.queries) return make_int2(begin, tile.k_len);
  const int position = tile.position + i;
  end = tile.k_len;
  if (p.causal) end = min(end, position + 1);
  if (p.window_right >= 0) end = min(end, position + min(p.window_right, kMaxLength) + 1);
  if (p.window_left >= 0) begin = max(begin, position - min(p.window_left, kMaxLength));
  if (p.mask_offsets != nullptr) {
    const int* mask = p.mask_offsets + 2 * static_cast<int64_t>(tile.token + i);
    begin = max(begin, min(mask[0], kFar));
    end = min(end, max(mask[1], 0));
  }
  return make_int2(begin, max(begin, end));
}

inline constexpr float kSectionBytes = 32 << 20;

template <class C>
class TileWalk {
 public:
  // Works for any kernel's Arguments with `p` and `min_query_tokens`, and Shared with `rows` and
  // `walk`.
  template <class A, class S>
  __device__ TileWalk(const A& arguments, S& shared)
      : p_(arguments.p),
        min_query_tokens_(arguments.min_query_tokens),
        rows_(shared.seqs),
        state_(shared.walk),
        lane_(threadIdx.x % 32) {}

  __device__ void Start() {
    if (lane_ == 0) {
      state_.round = state_.count = state_.next_row = state_.start = 0;
      state_.level = -1;
      state_.section = state_.sections = 0;
    }
    __syncwarp();
  }

  // Writes the CTA's next tile to shared memory; false if there is none. Called by a whole warp.
  __device__ bool Next(Tile* tile) {
    const int round = state_.round, target = Target(round);
    int level = state_.level, start = state_.start, section = state_.section;
    bool found = false, up = false;
    do {
#pragma unroll 1
      for (; section < state_.sections; ++section, level = kTop) {
        up = (state_.sections - section) % 2 == 0;
        const int heads = HeadsOf(section);
#pragma unroll 1
        while (heads > 0) {
          const Span span = FindSpan(level, up);
          if (span.seqs == 0) break;
          const int tiles = span.seqs * heads, levels = (target - start) / tiles;
          found = levels < span.levels;
          level = span.level - (found ? levels : span.levels);
          start += (found ? levels : span.levels) * tiles;
          if (found) break;
        }
        if (found) break;
      }
      if (found || !LoadRows()) break;
      section = 0;
      level = kTop;
    } while (true);
    __syncwarp();
    if (lane_ == 0) {
      state_.round = round + 1;
      state_.level = level;
      state_.start = start;
      state_.section = section;
    }
    __syncwarp();
    if (found) Describe(target - start, up ? -level : level, section, tile);
    return found;
  }

 protected:
  static constexpr int kTop = 1 << 30;  // above all levels

  // Number of the CTA's tile of a round: they are dealt to and fro.
  __device__ static int Target(int round) {
    const int grid = gridDim.x, cta = blockIdx.x;
    return round * grid + (round % 2 == 0 ? cta : grid - 1 - cta);
  }

  __device__ static int Tiles(const ActiveSeq& row) {
    return (row.q_len + C::kQueries - 1) / C::kQueries;
  }

  __device__ int Base(const ActiveSeq& row) const {
    return max((min(row.k_len, Reach()) + C::kKeys - 1) / C::kKeys - Tiles(row), 0);
  }

  // Keys that a block table holds.
  __device__ int Reach() const {
    const int64_t reach = static_cast<int64_t>(p_.seqs.max_blocks) * kBlockSize;
    return p_.paged ? static_cast<int>(min(reach, int64_t{2} * kMaxLength)) : 2 * kMaxLength;
  }

  __device__ bool IsAt(int i, int level) const {
    if (i >= state_.count) return false;
    const ActiveSeq row = rows_[i];
    const int m = level - Base(row);
    return m >= 0 && m < Tiles(row);
  }

  // KV heads of a section, but for the last one.
  __device__ int SectionHeads() const {
    return (p_.num_kv_heads + state_.sections - 1) / state_.sections;
  }

  // Query heads of a section.
  __device__ int HeadsOf(int section) const {
    const int size = SectionHeads(), heads = min(size, p_.num_kv_heads - section * size);
    return max(heads, 0) * (p_.num_heads / p_.num_kv_heads);
  }

  // Levels one below the other with tiles of the same rows.
  struct Span {
    int level;   // the highest
    int levels;  // how many
    int seqs;    // 0: there is no such span
  };

  // The first span from `level` downwards. A section that goes upwards counts its levels from 0
  // downwards.
  __device__ Span FindSpan(int level, bool up) const {
    int highest = -kTop;
#pragma unroll 1
    for (int i = lane_; i < state_.count; i += 32) {
      const int2 range = LevelsOf(i, up);
      if (range.x <= level) highest = max(highest, min(level, range.y));
    }
    Span span{__reduce_max_sync(~0u, highest), 0, 0};
    if (span.level == -kTop) return span;
    int end = -kTop, seqs = 0;  // the next level that differs
#pragma unroll 1
    for (int i = lane_; i < state_.count; i += 32) {
      const int2 range = LevelsOf(i, up);
      if (range.y < span.level) {
        end = max(end, range.y);
      } else if (range.x <= span.level) {
        end = max(end, range.x - 1);
        ++seqs;
      }
    }
    span.seqs = __reduce_add_sync(~0u, seqs);
    span.levels = span.level - __reduce_max_sync(~0u, end);
    return span;
  }

  // Lowest and highest level of a listed row.
  __device__ int2 LevelsOf(int i, bool up) const {
    const ActiveSeq row = rows_[i];
    const int base = Base(row), top = base + Tiles(row) - 1;
    return up ? make_int2(-top, -base) : make_int2(base, top);
  }

  // Reads the lengths of further rows; false at the end. Nothing in them is trusted.
  __device__ bool LoadRows() {
    int count = 0, next = state_.next_row;
    float bytes = 0.0f;  // of the rows' keys, for one KV head
#pragma unroll 1
    while (next < p_.seqs.batch && count + 32 <= kMaxActiveSeqs) {
      ActiveSeq row{next + lane_, 0, 0, 0};
      if (row.row < p_.seqs.batch) Read(&row);
      const bool active = row.q_len >= max(min_query_tokens_, 1);
      const unsigned voters = __ballot_sync(~0u, active);
      if (active) {
        rows_[count + __popc(voters & ((1u << lane_) - 1))] = row;
        bytes += static_cast<float>(min(row.k_len, Reach())) * C::kKeyBytes;
      }
      count += __popc(voters);
      next += 32;
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) bytes += __shfl_xor_sync(~0u, bytes, i);
    // At least a KV head a section.
    const float fit = fminf(kSectionBytes / fmaxf(bytes, 1.0f), p_.num_kv_heads);
    const int heads = max(static_cast<int>(fit), 1);
    __syncwarp();
    if (lane_ == 0) {
      state_.count = count;
      state_.next_row = next;
      state_.sections = (p_.num_kv_heads + heads - 1) / heads;
    }
    __syncwarp();
    return count > 0;
  }

  __device__ void Read(ActiveSeq* row) const {
    const SeqMeta& seqs = p_.seqs;
    const int b = row->row;
    row->token = Clamp(seqs.cu_seqlens_q[b], 0, seqs.num_tokens);
    const int end = Clamp(seqs.cu_seqlens_q[b + 1], row->token, seqs.num_tokens);
    if (p_.paged) {
      row->q_len = Clamp(seqs.seq_lens_this_time[b], 0, end - row->token);
      row->k_len = Clamp(seqs.seq_lens_decoder[b], 0, kMaxLength) + row->q_len;
    } else {
      row->q_len = end - row->token;
      row->k_len = PackedKeys(p_, b).y;
    }
  }

  __device__ void Describe(int index, int level, int section, Tile* tile) const {
    const int heads = HeadsOf(section), group = p_.num_heads / p_.num_kv_heads;
    const int head = section * SectionHeads() * group + index % heads;
    int rank = index / heads, slot = 0;
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
    Fill(slot, head, level - Base(rows_[slot]), tile);
  }

  // Describes tile m of a listed row.
  __device__ void Fill(int slot, int head, int m, Tile* tile) const {
    const ActiveSeq row = rows_[slot];
    if (lane_ == 0) {
      if (!p_.paged) {
        tile->key_token = PackedKeys(p_, row.row).x;
        tile->key_block = FirstBlock(tile->key_token, row.row);
      }
      tile->row = row.row;
      tile->head = head;
      tile->kv_head = head / (p_.num_heads / p_.num_kv_heads);  // once: a division takes long
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
  ActiveSeq* rows_;
  volatile WalkState& state_;
  const int lane_;
};

}  // namespace fastattn::cuda::wgmma_fp8
