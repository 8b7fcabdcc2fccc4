// The order of tiles where rows are short.
#pragma once

#include "cuda/attention/wgmma_sm90/common/schedule.cuh"

namespace fastattn::cuda::wgmma_fp8 {

// TileWalk's order asks for the keys of every row and head of a section at once, which memory
// cannot deliver where a tile takes few steps. Here a CTA takes an item at a time: a tile, or with
// a causal mask the tiles n - 1 - m and m of a row of n, which cost the same together whatever m
// is. The items of a row and head are neighbours, so that their CTAs read the same keys at the same
// time, and others' keys are asked for later. Rows follow each other by the cost of their items,
// the highest first. Where rows are long, or the last round of items would leave many CTAs idle,
// the order is TileWalk's.
template <class C>
class ItemWalk : private TileWalk<C> {
  using Walk = TileWalk<C>;
  using Walk::lane_;
  using Walk::p_;
  using Walk::rows_;
  using Walk::state_;

 public:
  using Walk::Walk;

  __device__ void Start() {
    Walk::Start();
    Walk::LoadRows();
    if (lane_ == 0) {
      state_.level = Walk::kTop;
      state_.second = -1;
    }
    int items = 0, longest = 0;
#pragma unroll 1
    for (int i = lane_; i < state_.count; i += 32) {
      items += Items(rows_[i]);
      longest = max(longest, Walk::Tiles(rows_[i]));
    }
    items = __reduce_add_sync(~0u, items) * p_.num_heads;
    longest = __reduce_max_sync(~0u, longest);
    const int grid = gridDim.x, idle = (grid - items % grid) % grid;
    if (lane_ == 0) {
      state_.by_items = longest <= kMostTiles && (!p_.causal || idle <= items / kFewIdle);
    }
    __syncwarp();
  }

  __device__ bool ByItems() const { return state_.by_items; }

  // As TileWalk's.
  __device__ bool Next(Tile* tile) {
    if (!state_.by_items) return Walk::Next(tile);
    const int second = state_.second;
    if (second >= 0) {
      Walk::Fill(state_.slot, state_.head, second, tile);
      if (lane_ == 0) state_.second = -1;
      __syncwarp();
      return true;
    }
    const int round = state_.round, target = Walk::Target(round);
    int cost = state_.level, start = state_.start;
    bool found = false;
    do {
#pragma unroll 1
      for (; (cost = HighestCost(cost)) >= 0; --cost) {
        const int items = ItemsOf(cost) * p_.num_heads;
        found = target - start < items;
        if (found) break;
        start += items;
      }
      if (found || !Walk::LoadRows()) break;
      cost = Walk::kTop;
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
  static constexpr int kMostTiles = 32;  // of a row
  static constexpr int kFewIdle = 25;    // one in so many

  // Of a row and head.
  __device__ int Items(const ActiveSeq& row) const {
    return p_.causal ? (Walk::Tiles(row) + 1) / 2 : Walk::Tiles(row);
  }

  // Grows with the steps of an item.
  __device__ int Cost(const ActiveSeq& row) const {
    return (p_.causal ? 2 : 1) * Walk::Base(row) + Walk::Tiles(row);
  }

  // The highest cost of a row's items up to `most`; -1: there is none.
  __device__ int HighestCost(int most) const {
    int highest = -1;
#pragma unroll 1
    for (int i = lane_; i < state_.count; i += 32) {
      const int cost = Cost(rows_[i]);
      if (cost <= most) highest = max(highest, cost);
    }
    return __reduce_max_sync(~0u, highest);
  }

  // A head's items of a cost.
  __device__ int ItemsOf(int cost) const {
    int items = 0;
#pragma unroll 1
    for (int i = lane_; i < state_.count; i += 32) {
      if (Cost(rows_[i]) == cost) items += Items(rows_[i]);
    }
    return __reduce_add_sync(~0u, items);
  }

  // Starts item `index` of those of a cost.
  __device__ void Take(int index, int cost, Tile* tile) {
    int slot = 0, items = 1, before = 0;  // a row, its items; those of the rows ahead
#pragma unroll 1
    for (int i = 0; i < state_.count; i += 32) {
      const bool listed = i + lane_ < state_.count && Cost(rows_[i + lane_]) == cost;
      const int own = listed ? Items(rows_[i + lane_]) : 0;
      int sum = own;
#pragma unroll
      for (int j = 1; j < 32; j *= 2) {
        const int other = __shfl_up_sync(~0u, sum, j);
        if (lane_ >= j) sum += other;
      }
      const unsigned behind = __ballot_sync(~0u, index < (before + sum) * p_.num_heads);
      if (behind != 0) {
        const int first = __ffs(behind) - 1;
        slot = i + first;
        items = __shfl_sync(~0u, own, first);
        before += __shfl_sync(~0u, sum - own, first);
        break;
      }
      before += __shfl_sync(~0u, sum, 31);
    }
    index -= before * p_.num_heads;
    const int head = index / items, item = index % items;
    const int m = p_.causal ? Walk::Tiles(rows_[slot]) - 1 - item : item;
    if (lane_ == 0) {
      state_.slot = slot;
      state_.head = head;
      state_.second = m != item ? item : -1;
    }
    __syncwarp();
    Walk::Fill(slot, head, m, tile);
  }
};

}  // namespace fastattn::cuda::wgmma_fp8
