// Which work tiles a CTA takes. All of it is found on the device from the sequences' lengths, so
// that a captured graph follows them; nothing is counted in global memory, so nothing needs a
// reset.
//
// Tiles are ordered by the number of keys that they read, the most first, and dealt to the CTAs to
// and fro. A sequence's tiles m = 0, 1, ... stand on the levels base + m, its last one on the level
// of its number of KV tiles; within a level, sequences and then heads follow each other.
//
// With C::kKeyBytes (of a key and its value, of one KV head) the heads are cut into sections whose
// keys fit into the L2 cache, and one section's tiles follow the other's. Every second section goes
// from few keys to many, so that neighbouring tiles stay alike.
#pragma once

#include "cuda/attention/shared/seq_lengths.cuh"
#include "cuda/attention/wgmma_sm90/common/query_keys.cuh"
#include "cuda/attention/wgmma_sm90/common/work_tile.h"

namespace fastattn::cuda::wgmma_sm90 {

inline constexpr float kSectionBytes = 32 << 20;

template <class C>
class TileScheduler {
 public:
  // Arguments has `p` and `min_query_tokens`, Shared has `seqs` and `scheduler`.
  template <class A, class S>
  __device__ TileScheduler(const A& arguments, S& shared)
      : p_(arguments.p),
        min_query_tokens_(arguments.min_query_tokens),
        seqs_(shared.seqs),
        state_(shared.scheduler),
        lane_(threadIdx.x % 32) {}

  __device__ void Start() {
    if (lane_ == 0) {
      state_.round = state_.count = state_.next_seq = state_.start = 0;
      state_.level = -1;
      state_.section = state_.sections = 0;
    }
    __syncwarp();
  }

  // Writes the CTA's next tile to shared memory; false if there is none. Called by a whole warp.
  __device__ bool Next(WorkTile* tile) {
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
      if (found || !LoadSeqs()) break;
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
  static constexpr int kTop = kMaxKeys;  // above all levels, of kKeys keys each

  // Number of the CTA's tile of a round: they are dealt to and fro.
  __device__ static int Target(int round) {
    const int grid = gridDim.x, cta = blockIdx.x;
    return round * grid + (round % 2 == 0 ? cta : grid - 1 - cta);
  }

  __device__ static int Tiles(const ActiveSeq& seq) {
    return (seq.q_len + C::kQueries - 1) / C::kQueries;
  }

  __device__ int Base(const ActiveSeq& seq) const {
    return max((min(seq.k_len, Reach()) + C::kKeys - 1) / C::kKeys - Tiles(seq), 0);
  }

  // Keys of a sequence, at most, that can be addressed.
  __device__ int Reach() const {
    return p_.paged ? KeysInTable<int64_t>(p_.seqs.max_blocks) : kMaxKeys;
  }

  __device__ bool IsAt(int i, int level) const {
    if (i >= state_.count) return false;
    const ActiveSeq seq = seqs_[i];
    const int m = level - Base(seq);
    return m >= 0 && m < Tiles(seq);
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

  // Levels one below the other with tiles of the same sequences.
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

  // Lowest and highest level of a listed sequence.
  __device__ int2 LevelsOf(int i, bool up) const {
    const ActiveSeq seq = seqs_[i];
    const int base = Base(seq), top = base + Tiles(seq) - 1;
    return up ? make_int2(-top, -base) : make_int2(base, top);
  }

  // Reads the lengths of further sequences; false at the end.
  __device__ bool LoadSeqs() {
    int count = 0, next = state_.next_seq;
    float bytes = 0.0f;  // of the sequences' keys, for one KV head
#pragma unroll 1
    while (next < p_.seqs.batch && count + 32 <= kMaxActiveSeqs) {
      ActiveSeq seq{next + lane_, 0, 0, 0};
      if (seq.batch_idx < p_.seqs.batch) Read(&seq);
      const bool active = seq.q_len >= max(min_query_tokens_, 1);
      const unsigned voters = __ballot_sync(~0u, active);
      if (active) {
        seqs_[count + __popc(voters & ((1u << lane_) - 1))] = seq;
        bytes += static_cast<float>(min(seq.k_len, Reach())) * C::kKeyBytes;
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
      state_.next_seq = next;
      state_.sections = (p_.num_kv_heads + heads - 1) / heads;
    }
    __syncwarp();
    return count > 0;
  }

  __device__ void Read(ActiveSeq* seq) const { LoadSeqLengths(p_, seq->batch_idx, seq); }

  __device__ void Describe(int index, int level, int section, WorkTile* tile) const {
    const int heads = HeadsOf(section), group = p_.num_heads / p_.num_kv_heads;
    const int head = section * SectionHeads() * group + index % heads;
    int rank = index / heads, listed = 0;
#pragma unroll 1
    for (int i = 0; i < state_.count; i += 32) {
      unsigned at = __ballot_sync(~0u, IsAt(i + lane_, level));
      const int here = __popc(at);
      if (rank < here) {
#pragma unroll 1
        for (; rank > 0; --rank) at &= at - 1;
        listed = i + __ffs(at) - 1;
        break;
      }
      rank -= here;
    }
    Fill(listed, head, level - Base(seqs_[listed]), tile);
  }

  // Describes tile m of a listed sequence.
  __device__ void Fill(int listed, int head, int m, WorkTile* tile) const {
    const ActiveSeq seq = seqs_[listed];
    if (lane_ == 0) {
      if (!p_.paged) {
        tile->ragged_token = LoadRaggedKeys(p_, seq.batch_idx).begin;
        tile->ragged_block = FirstBlock(tile->ragged_token, seq.batch_idx);
      }
      tile->batch_idx = seq.batch_idx;
      tile->head = head;
      tile->kv_head = head / (p_.num_heads / p_.num_kv_heads);  // once: a division takes long
      tile->token = seq.q_begin + m * C::kQueries;
      tile->queries = min(seq.q_len - m * C::kQueries, C::kQueries);
      tile->position = seq.k_len - seq.q_len + m * C::kQueries;
      tile->k_len = min(seq.k_len, Reach());
    }
    __syncwarp();
    SetKvTiles<C>(p_, tile, lane_);
    __syncwarp();
  }

  const AttentionParams& p_;
  const int min_query_tokens_;
  ActiveSeq* seqs_;
  volatile SchedulerState& state_;
  const int lane_;
};

}  // namespace fastattn::cuda::wgmma_sm90
