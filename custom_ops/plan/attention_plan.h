// How an attention call is cut into launches, from what the host knows: a pure function of ints.
//
// Two ways to share the work out:
//  - `split`: the KV tiles of all sequences and heads lie one after the other, and every CTA takes
//    an equal share of them. The keys of a sequence may so be split over several CTAs, whose
//    partial results a second kernel merges. The lengths are read on the device: the plan stays
//    right, and the shares equal, when they change between replays of a CUDA graph. In a call of
//    few sequences a cluster of CTAs takes all keys of a sequence and KV head instead, and merges
//    the partial results itself: a second kernel takes longer than such a call's keys. Where the
//    host's bound of the lengths leaves open which of the two is faster, the device decides.
//  - whole work tiles: a CTA takes a tile of queries with all their keys.
//
// Sequences of a step that differ much in their number of new tokens belong to different launches,
// each with tiles that such sequences fill.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/head_dims.h"
#include "common/types.h"
#include "plan/limits.h"
#include "plan/split_tile.h"

namespace fastattn {

inline constexpr int64_t kAnyKvTiles = 0x7FFFFFFF;

struct AttentionSizes {
  int64_t num_tokens = 0;  // query tokens, padding included
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t element_bytes = 1;  // of a key
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;
  int64_t num_sms = 0;
  int64_t max_cluster = 1;  // CTAs that may form a cluster
  // kLongSeq, or less where a kernel for long sequences is faster than split tiles from there on.
  int64_t long_seq = kLongSeq;
  // Clusters of 8 CTAs, two a multiprocessor, that run at the same time; 0: unknown.
  int64_t num_clusters = 0;
  bool per_token_scales = false;          // of K and V
  const SplitTile* tile = &kMmaSm80Tile;  // of the kernel of the split launches
};

struct AttentionLaunch {
  AttentionKernel kernel = AttentionKernel::kMmaSm80;  // of split_tile.h
  int tile_rows = 0;                                   // packed rows of a tile: 8, 16 or 64
  bool split = false;
  int64_t min_packed_rows = 0;  // sequences with so many a KV head, and at most max_packed_rows
  int64_t max_packed_rows = 0;
  int64_t grid = 0;     // CTAs
  int64_t shares = 0;   // CTAs of them that have equal shares, where clusters do not take the call
  int64_t cluster = 1;  // CTAs that take a sequence and KV head together; 1: equal shares
  // Clusters take a call whose sequences have no more KV tiles each: kAnyKvTiles where the host
  // knows that they do, else the device looks at the lengths.
  int64_t cluster_kv_tiles = 0;
  bool finds_seqs = false;        // the device looks at the lengths before clusters begin
  bool merges_in_kernel = false;  // the CTAs may merge partial results themselves, given counters
  int64_t workspace = 0;          // floats of partial results
  // Of a batch-invariant launch (invariant_plan.h): splits of a work tile, at most; 0 elsewhere.
  int64_t invariant_splits = 0;
  bool whole_tiles = false;  // no work tile lies in several CTAs
  bool wide = false;         // CTAs of eight warps take it

  // Whether a kernel may have partial results to merge behind this one.
  bool LeavesPartials() const { return split && shares > 1 && cluster_kv_tiles < kAnyKvTiles; }
};

inline constexpr int kMaxLaunches = 4;

struct AttentionPlan {
  int num_launches = 0;
  AttentionLaunch launches[kMaxLaunches];
  int64_t workspace = 0;  // floats of all launches: they may run at the same time

  // The launch of the longest sequences, which a prefill kernel may do instead, or null.
  const AttentionLaunch* Whole() const {
    const AttentionLaunch& last = launches[std::max(num_launches - 1, 0)];
    return num_launches > 0 && !last.split ? &last : nullptr;
  }

  // Whether a launch's CTAs may merge partial results themselves.
  bool MergesInKernel() const {
    return std::any_of(launches, launches + num_launches,
                       [](const AttentionLaunch& launch) { return launch.merges_in_kernel; });
  }
};

// Counters of CTAs that merge partial results without a second kernel: two for each equal share.
inline int64_t NumArrivals(int64_t shares) { return 2 * shares; }

// Sequences of one launch; a step with more is launched in pieces.
inline constexpr int kMaxPlanSeqs = 512;
// Of a launch that takes sequences of any length.
inline constexpr int64_t kAllPackedRows = 0x7FFFFFFF;
// Ints that a CTA tells the merging kernel, and the partial results it may leave: of the work tile
// that it found begun, and of the one that it leaves unfinished.
inline constexpr int kPartialHeader = 8;
inline constexpr int kPartialsPerCta = 2;

inline int64_t PartialFloats(int64_t grid, int64_t tile_rows, int64_t head_dim) {
  return grid * (kPartialHeader + kPartialsPerCta * tile_rows * (head_dim + 2));
}

// Sequences that have new tokens, as far as the host knows. A step that a server captures in a CUDA
// graph has lengths of as many sequences as the server can hold, most of them without tokens.
inline int64_t SeqsWithTokens(const AttentionSizes& s) {
  if (s.num_tokens >= s.batch) return s.batch;
  return CeilDiv(s.num_tokens, std::max<int64_t>(s.max_seqlen_q, 1));
}

// Whether the clusters of a call's only sequence are on half to three quarters of the
// multiprocessors, which read its keys nearly as fast as all do. On more, clusters begin to share
// some.
inline bool HalfReadsOneSeq(const AttentionSizes& s, int64_t cluster) {
  const int64_t ctas = s.num_kv_heads * cluster;
  return SeqsWithTokens(s) == 1 && 16 * ctas >= kHalfReadsFromSixteenths * s.num_sms &&
         16 * ctas <= kHalfReadsToSixteenths * s.num_sms;
}

struct ClusterChoice {
  int64_t cluster = 1;   // CTAs; 1: equal shares of all keys are faster whatever the lengths
  int64_t kv_tiles = 0;  // of the longest sequence, up to which clusters are faster
};

// Clusters for each sequence and KV head. Their limits (limits.h) hold for sequences of unequal
// lengths, too: the longest takes as long alone as in the company of others like it.
inline ClusterChoice ChooseCluster(const AttentionSizes& s, int tile_rows, int64_t packed_rows) {
  const int64_t seqs = SeqsWithTokens(s), seq_heads = seqs * s.num_kv_heads;
  if (s.batch > kMaxPlanSeqs || packed_rows > tile_rows || tile_rows > s.tile->cluster_rows ||
      seq_heads > s.tile->ctas_per_sm * s.num_sms) {
    return {};
  }
  for (int64_t cluster = 8; cluster > 1; cluster /= 2) {
    // Pairs of CTAs find two places everywhere, larger clusters only on multiprocessors of their
    // own.
    const int64_t ctas = seq_heads * cluster;
    if (cluster > s.max_cluster || ctas > s.num_sms * (cluster == 2 ? s.tile->ctas_per_sm : 1)) {
      continue;
    }
    // One sequence has no longer one beside it.
    if (HalfReadsOneSeq(s, cluster)) {
      return {cluster, s.per_token_scales ? kOneSeqKvTilesPerCta * ctas : kAnyKvTiles};
    }
    // Few CTAs leave most multiprocessors idle: then keys must be few, too.
    return {cluster, std::min(kClusterKvTilesPerSm * s.num_sms / seq_heads,
                              kClusterKvTilesPerWorkTile * ctas)};
  }
  return {};
}

// CTAs that run at the same time in a launch with clusters of that size.
inline int64_t CtasAtOnce(const AttentionSizes& s, int64_t cluster) {
  const int64_t ctas = s.num_sms * s.tile->ctas_per_sm;
  if (cluster <= 2) return ctas;
  return std::min(s.num_clusters > 0 ? s.num_clusters * 8 : ctas, ctas / 8 * 8);
}

inline AttentionLaunch SplitLaunch(const AttentionSizes& s, int tile_rows,
                                   int64_t max_packed_rows) {
  AttentionLaunch launch;
  launch.tile_rows = tile_rows;
  launch.split = true;
  launch.max_packed_rows = max_packed_rows;
  // As many CTAs as run at the same time, and none without work when the whole call is small.
  const int64_t keys =
      s.tile->keys(static_cast<int>(s.head_dim), static_cast<int>(s.element_bytes));
  const int64_t packed_rows = std::max<int64_t>(s.max_seqlen_q, 1) * s.num_heads / s.num_kv_heads;
  const int64_t tiles =
      s.batch * s.num_kv_heads * CeilDiv(std::min(packed_rows, max_packed_rows), tile_rows);
  const int64_t kv_tiles = tiles * (CeilDiv(std::max<int64_t>(s.max_seqlen_k, 1), keys) + 1);
  const ClusterChoice choice = ChooseCluster(s, tile_rows, packed_rows);
  launch.cluster = choice.cluster;
  launch.shares = std::max<int64_t>(1, std::min(kv_tiles, CtasAtOnce(s, choice.cluster)));
  launch.grid = launch.shares;
  if (launch.cluster > 1) {
    const bool fits = CeilDiv(s.max_seqlen_k, keys) <= choice.kv_tiles;
    launch.cluster_kv_tiles = fits ? kAnyKvTiles : choice.kv_tiles;
    launch.finds_seqs = !fits || s.num_tokens < s.batch;
    launch.grid = std::min(s.batch, s.num_tokens) * s.num_kv_heads * launch.cluster;
    if (fits) {
      launch.shares = 0;
      return launch;  // nothing goes through memory
    }
    launch.grid = CeilDiv(std::max(launch.grid, launch.shares), launch.cluster) * launch.cluster;
    // Clusters mostly take such a call, and a merging kernel would have nothing to do, even of a
    // sequence alone with more splits than that kernel would merge faster.
    const int64_t work_tiles = std::min(s.batch, s.num_tokens) * s.num_kv_heads;
    launch.merges_in_kernel =
        launch.shares / work_tiles <= kMergedSplits || HalfReadsOneSeq(s, choice.cluster);
  }
  launch.workspace =
      PartialFloats(launch.shares, tile_rows, ValueDim(static_cast<int>(s.head_dim)));
  return launch;
}

// Whether a step with a sequence of max_seqlen_q tokens may have shorter ones that are neither long
// nor decode. False where the others have too many tokens for that, or just one each.
inline bool MayHaveShortSeqs(const AttentionSizes& s, int64_t long_seq) {
  const int64_t others = s.batch - 1;
  return s.num_tokens < others * s.max_seqlen_q + long_seq &&
         s.num_tokens != s.max_seqlen_q + others;
}

inline AttentionLaunch WholeLaunch(const AttentionSizes& s, int64_t min_packed_rows) {
  AttentionLaunch launch;
  launch.tile_rows = s.tile->most_rows;
  launch.min_packed_rows = min_packed_rows;
  launch.max_packed_rows = kAllPackedRows;
  const int64_t group = s.num_heads / s.num_kv_heads;
  const int64_t tiles = std::min(CeilDiv(s.num_tokens * group, launch.tile_rows) + s.batch,
                                 s.batch * CeilDiv(s.max_seqlen_q * group, launch.tile_rows));
  launch.grid = std::min<int64_t>(tiles * s.num_kv_heads, int64_t{1} << 30);
  launch.shares = launch.grid;
  return launch;
}

// The launches of one call. A call of a few query tokens a sequence is one split launch. In any
// other, decoding sequences are split and long ones take whole tiles; those between them are a
// split launch of their own, so that a few of them with many keys still fill the GPU. Whether these
// exist is guessed: without that launch they are with the long ones. Where all sequences are long
// by their number and the number of tokens, there is nothing but whole tiles.
inline AttentionPlan PlanAttention(const AttentionSizes& s) {
  AttentionPlan plan;
  if (s.num_tokens <= 0 || s.batch <= 0 || s.num_kv_heads <= 0 || s.num_heads <= 0) return plan;
  const int64_t group = s.num_heads / s.num_kv_heads;
  const int64_t packed_rows = std::max<int64_t>(s.max_seqlen_q, 1) * group;
  if (packed_rows <= kOneLaunchRows || s.max_seqlen_q <= kOneLaunchTokens) {
    plan.launches[plan.num_launches++] = SplitLaunch(s, s.tile->rows(packed_rows), kAllPackedRows);
  } else {
    // Keys are better split where a tile for each sequence and head leaves half of the GPU without
    // work.
    const int64_t long_seq = 2 * s.batch * s.num_heads < s.num_sms ? kLongSeq : s.long_seq;
    const bool is_long = s.max_seqlen_q >= long_seq;
    if (is_long && s.num_tokens == s.batch * s.max_seqlen_q) {
      // All sequences are as long as one may be. A replay of a CUDA graph may find shorter ones:
      // whole tiles take those too, only not as fast.
      plan.launches[plan.num_launches++] = WholeLaunch(s, 0);
      return plan;
    }
    const bool mixed = MayHaveShortSeqs(s, long_seq);
    // Tiles of 16 packed rows cost decoding sequences little, and short ones less than 64 of them.
    const int tile_rows = s.tile->rows(mixed ? std::max<int64_t>(group, 16) : group);
    const int64_t decoding = std::max<int64_t>(tile_rows, group);
    plan.launches[plan.num_launches++] = SplitLaunch(s, tile_rows, decoding);
    int64_t done = decoding;
    if (mixed || !is_long) {
      AttentionLaunch& rest = plan.launches[plan.num_launches++];
      rest = SplitLaunch(s, s.tile->most_rows, is_long ? long_seq * group - 1 : kAllPackedRows);
      rest.min_packed_rows = decoding + 1;
      done = rest.max_packed_rows;
    }
    if (is_long) plan.launches[plan.num_launches++] = WholeLaunch(s, done + 1);
  }
  for (int i = 0; i < plan.num_launches; ++i) plan.workspace += plan.launches[i].workspace;
  return plan;
}

}  // namespace fastattn
