// The order of work tiles where sequences are short.
#pragma once

#include "cuda/attention/wgmma_sm90/common/tile_scheduler.cuh"

namespace fastattn::cuda::wgmma_sm90 {

// TileScheduler's order asks for the keys of every sequence and head of a section at once, which
// memory cannot deliver where a tile takes few KV iterations. Here a CTA takes a pair of tiles at a
// time: with a causal mask the tiles n - 1 - m and m of a sequence of n, which cost the same
// together whatever m is; without one, a tile counts as a pair. The pairs of a sequence and head
// are neighbours, so that their CTAs read the same keys at the same time, and others' keys are
// asked for later. Sequences follow each other by the cost of their pairs, the highest first. Where
// sequences are long, or the last round of pairs would leave many CTAs idle, the order is
// TileScheduler's.
template <class C>
class PairedTileScheduler : private TileScheduler<C> {
  using Scheduler = TileScheduler<C>;
  using Scheduler::lane_;
  using Scheduler::p_;
  using Scheduler::seqs_;
  using Scheduler::state_;

 public:
  using Scheduler::Scheduler;

  __device__ void Start() {
    Scheduler::Start();
    Scheduler::LoadSeqs();
    if (lane_ == 0) {
      state_.level = Scheduler::kTop;
      state_.second = -1;
    }
    int pairs = 0, longest = 0;
#pragma unroll 1
    for (int i = lane_; i < state_.count; i += 32) {
      pairs += Pairs(seqs_[i]);
      longest = max(longest, Scheduler::Tiles(seqs_[i]));
    }
    pairs = __reduce_add_sync(~0u, pairs) * p_.num_heads;
    longest = __reduce_max_sync(~0u, longest);
    const int grid = gridDim.x, idle = (grid - pairs % grid) % grid;
    if (lane_ == 0) {
      state_.in_pairs = longest <= kMostTiles && (!p_.causal || idle <= pairs / kFewIdle);
    }
    __syncwarp();
  }

  __device__ bool InPairs() const { return state_.in_pairs; }

  // As TileScheduler's. Also goes through a pair's second tile.
  __device__ bool Next(WorkTile* tile) {
    if (!state_.in_pairs) return Scheduler::Next(tile);
    const int second = state_.second;
    if (second >= 0) {
      Scheduler::Fill(state_.pair_seq, state_.pair_head, second, tile);
      if (lane_ == 0) state_.second = -1;
      __syncwarp();
      return true;
    }
    const int round = state_.round, target = Scheduler::Target(round);
    int cost = state_.level, start = state_.start;
    bool found = false;
    do {
#pragma unroll 1
      for (; (cost = HighestCost(cost)) >= 0; --cost) {
        const int pairs = PairsOf(cost) * p_.num_heads;
        found = target - start < pairs;
        if (found) break;
        start += pairs;
      }
      if (found || !Scheduler::LoadSeqs()) break;
      cost = Scheduler::kTop;
    } while (true);
    __syncwarp();
    if (lane_ == 0) {
      state_.round = round + 1;
      state_.level = cost;
      state_.start = start;
    }
    __syncwarp();
    if (found) Take(target - start, cost, tile);
    return found;
  }

 private:
  static constexpr int kMostTiles = 32;  // of a sequence
  static constexpr int kFewIdle = 25;    // one in so many

  // Of a sequence and head.
  __device__ int Pairs(const ActiveSeq& seq) const {
    return p_.causal ? (Scheduler::Tiles(seq) + 1) / 2 : Scheduler::Tiles(seq);
  }

  // Grows with the KV iterations of a pair.
  __device__ int Cost(const ActiveSeq& seq) const {
    return (p_.causal ? 2 : 1) * Scheduler::Base(seq) + Scheduler::Tiles(seq);
  }

  // The highest cost of a sequence's pairs up to `most`; -1: there is none.
  __device__ int HighestCost(int most) const {
    int highest = -1;
#pragma unroll 1
    for (int i = lane_; i < state_.count; i += 32) {
      const int cost = Cost(seqs_[i]);
      if (cost <= most) highest = max(highest, cost);
    }
    return __reduce_max_sync(~0u, highest);
  }

  // A head's pairs of a cost.
  __device__ int PairsOf(int cost) const {
    int pairs = 0;
#pragma unroll 1
    for (int i = lane_; i < state_.count; i += 32) {
      if (Cost(seqs_[i]) == cost) pairs += Pairs(seqs_[i]);
    }
    return __reduce_add_sync(~0u, pairs);
  }

  // Starts pair `index` of those of a cost.
  __device__ void Take(int index, int cost, WorkTile* tile) {
    int listed = 0, pairs = 1, before = 0;  // a sequence, its pairs; those of the sequences ahead
#pragma unroll 1
    for (int i = 0; i < state_.count; i += 32) {
      const bool counts = i + lane_ < state_.count && Cost(seqs_[i + lane_]) == cost;
      const int own = counts ? Pairs(seqs_[i + lane_]) : 0;
      int sum = own;
#pragma unroll
      for (int j = 1; j < 32; j *= 2) {
        const int other = __shfl_up_sync(~0u, sum, j);
        if (lane_ >= j) sum += other;
      }
      const unsigned behind = __ballot_sync(~0u, index < (before + sum) * p_.num_heads);
      if (behind != 0) {
        const int first = __ffs(behind) - 1;
        listed = i + first;
        pairs = __shfl_sync(~0u, own, first);
        before += __shfl_sync(~0u, sum - own, first);
        break;
      }
      before += __shfl_sync(~0u, sum, 31);
    }
    index -= before * p_.num_heads;
    const int head = index / pairs, pair = index % pairs;
    const int m = p_.causal ? Scheduler::Tiles(seqs_[listed]) - 1 - pair : pair;
    if (lane_ == 0) {
      state_.pair_seq = listed;
      state_.pair_head = head;
      state_.second = m != pair ? pair : -1;
    }
    __syncwarp();
    Scheduler::Fill(listed, head, m, tile);
  }
};

}  // namespace fastattn::cuda::wgmma_sm90
