// What a split-KV launch is over some sequences of a call.
#pragma once

#include "plan/attention_plan.h"
#include "plan/invariant_plan.h"

namespace fastattn::cuda {

struct AttentionTask {
  bool split = false;
  bool clear_padding = false;      // also clears the tokens of no sequence
  bool overlaps_previous = false;  // runs while the kernel ahead of it does: see pdl.cuh
  bool keys_read_once = false;     // no two work tiles read the same keys
  int first_seq = 0;
  int num_seqs = 0;
  int group = 1;  // query heads of a KV head: packed GQA folds them into a tile's packed rows
  int min_packed_rows = 0;
  int max_packed_rows = 0;
  int cluster = 1;            // CTAs that take a sequence and KV head together; 1: equal shares
  int cluster_kv_tiles = 0;   // of a sequence, more: equal shares; kAnyKvTiles: clusters always
  bool finds_seqs = false;    // clusters must look which sequences have work, and how much
  bool wide = false;          // CTAs of eight warps, where there are such instances
  int shares = 0;             // CTAs that have equal shares
  int* arrivals = nullptr;    // [2, shares] counters, 0: no merge follows; see merge_splits.cuh
  int* headers = nullptr;     // [shares, kPartialHeader]
  float* partials = nullptr;  // [shares, kPartialsPerCta, packed rows, D + 2]
};

// A batch-invariant launch. Its work's
//  - headers tell of a CTA: {splits that are missing, batch_idx, KV head, tile} of the work tile
//    that it leaves unfinished, or {0, ..}; then the number of its results of the one that it found
//    begun.
//  - partials are [grid, most_splits, packed rows, D + 2]: the CTA's total, and then those results.
struct InvariantTask {
  AttentionTask work;
  int most_splits = 1;  // of a work tile
  int least_tiles = 0;  // KV tiles of a split, where there are several
  bool whole_tiles = false;
};

}  // namespace fastattn::cuda
