// Limits that follow from measurements and not from the kernels: where one way begins to be faster
// than another. Each says what was measured, on which GPU, and with which command, or where the
// figures are. "Command: not recorded" marks a program around a launcher that is not part of this
// repository (docs/experiments/README.md). Nothing else in this folder is measured.
#pragma once

#include <cstdint>

namespace fastattn {

// --- Attention: whole tiles or split ones (attention.h, attention_plan.h) ---

// New tokens from which a sequence's tiles are better whole than split.
// Measured: split and whole tiles of 16-bit queries over 8-bit keys, which wgmma_sm90/q16 converts
// for every head: slower up to 63 tokens. H100 80GB HBM3; table "From how many tokens on a sequence
// is long" of docs/experiments/plan.md. Command: not recorded. For GPUs without a wgmma kernel:
// nothing is recorded.
inline constexpr int64_t kLongSeq = 64;
// The same for the other calls of the wgmma kernels.
// Measured: with 32 tokens both take as long for e4m3 queries, and nearly as long for 16-bit ones
// over 16-bit keys. H100 80GB HBM3; the same table. Command: not recorded.
inline constexpr int64_t kLongWgmmaSeq = 33;
// New tokens, and packed rows of a KV head, up to which a call is one split launch. Not recorded.
inline constexpr int64_t kOneLaunchTokens = 8;
inline constexpr int64_t kOneLaunchRows = 64;

// --- Attention: clusters or equal shares (attention_plan.h) ---

// KV tiles of a call in clusters, at most, for each multiprocessor of the GPU.
// Measured: 16, 32 and 48. H100 80GB HBM3; table "From how many keys on sequences take equal
// shares" of docs/experiments/plan.md. Command: not recorded.
inline constexpr int kClusterKvTilesPerSm = 32;
// And those of a sequence and KV head, for each CTA that has a share of them and for each sequence
// and head of the call. H100. Figures and command: not recorded.
inline constexpr int kClusterKvTilesPerWorkTile = 4;
// KV tiles for each CTA in the clusters of a sequence alone with scales of tokens, which are work
// besides, so that all multiprocessors are faster in the end.
// Measured: 64 CTAs took 37 and 129 us for 32k and 128k keys of block_wise_fp8, all of them 42 and
// 122; of block_wise_int8 43 and 153, and 45 and 128. H100. Command: not recorded.
inline constexpr int kOneSeqKvTilesPerCta = 10;
// Sixteenths of the multiprocessors on which the clusters of a sequence alone read its keys nearly
// as fast as all do: at least, and at most. On more, clusters begin to share some. H100. Figures
// and command: not recorded.
inline constexpr int kHalfReadsFromSixteenths = 7;
inline constexpr int kHalfReadsToSixteenths = 12;
// Splits of a work tile, on average, up to which its CTAs merge them: an idle merging kernel costs
// 0.7 to 2 us, but it merges more splits faster. H100 80GB HBM3; "Lengths that the host does not
// know" in docs/experiments/plan.md. Command: not recorded.
inline constexpr int kMergedSplits = 16;
// What a work tile costs beside its keys, in KV tiles.
// Measured: decode before and after, together with two other changes. H100 80GB HBM3; row "a work
// tile costs 6 KV tiles" of docs/experiments/mma_sm80.md. Command: not recorded.
inline constexpr uint32_t kWorkTileCost = 6;

// --- Batch-invariant attention (invariant_plan.h) ---

// Splits of a work tile of 8 or 16 packed rows, at most, with 8 KV heads or more: 16 splits of one
// sequence then give work to 128 CTAs, about the multiprocessors of an H100. Tiles of 64 rows are
// more by themselves, and their results are eight times as large: a quarter. Reckoned; figures of a
// measurement are not recorded.
inline constexpr int kInvariantSplits = 16;
inline constexpr int kInvariantSplitsFewHeads = 32;
// KV tiles of a split, where there are several: of 8 and 16 packed rows, and of 64. Not recorded.
inline constexpr int kInvariantLeastTiles = 8;
inline constexpr int kInvariantLeastTilesOf64 = 16;

// --- Dequantised keys (dequantize_kv.h) ---

// Packed rows that see a key of a sequence, on average, from which 16-bit keys pay: where mma_sm80
// would take whole tiles, over heads of more than 128 channels, and over caches with scales of
// tokens in 4 bits, int8 and e4m3.
// Measured: the time that a key's codes cost a work tile beside its two copies. H100 80GB HBM3;
// tables in docs/experiments/wgmma_q16.md. Command: `FASTATTN_DEQUANTIZED_MIB=0` and without it,
// `python -m fastattn bench --op prefill_fp16 --op chunk --op head_dims_paged`.
inline constexpr int kDequantizeRowsOfMma = 128;
inline constexpr int kDequantizeRowsOfLargeHeads = 400;
inline constexpr int kDequantizeRowsOf4Bits = 300;
inline constexpr int kDequantizeRowsOfInt8 = 450;
inline constexpr int kDequantizeRowsOfFp8 = 500;
// Memory, at most, where nothing else is asked for (api/attention_run.cc). Chosen, not measured.
inline constexpr int64_t kDequantizedBytes = int64_t{512} << 20;
// Operations (4 for a query, key, head and channel) that 16-bit keys save a third of what the
// launches take: some 8 us. Where nothing else is asked for (api/attention_run.cc). GPU, figures
// and command: not recorded.
inline constexpr double kDequantizedOperations = 4e9;
// CTAs without work of append_cache_kv_c8's kernel that take as long. The same.
inline constexpr double kIdleCtas = 7000;

// --- mla_attention (mla_attention.h) ---

// Rows of a sequence (new tokens times heads) that the narrow kernel takes: its tiles have 8 or 16.
inline constexpr int kMlaNarrowRows = 16;

// --- mla_sparse_attention (mla_sparse_attention.h) ---

// What a CTA costs beside its tiles, in tiles. GPU, figures and command: not recorded.
inline constexpr int kMlaSparseFixedTiles = 3;
// Tiles of a multiprocessor from which groups of heads go to clusters of two CTAs: setting those
// up, and ending together, takes 3 us, which fewer tiles do not save. GPU and command: not
// recorded.
inline constexpr int kMlaSparsePairTiles = 48;

// --- rope_write_cache_kv and write_cache_kv (rope_write.h) ---

// Tokens up to which a prompt is not faster in tiles. GPU, figures and command: not recorded.
inline constexpr int kDecodeKernelMax = 16;
// Tokens for each sequence up to which the decode kernel takes a larger step: those are decode and
// speculative steps, where a tile would be nearly empty. Not recorded.
inline constexpr int kTokensPerSeqMax = 8;
// CTAs of a grid that leaves most of a GPU to the next kernel, at most. Not recorded.
inline constexpr int kSmallGrid = 256;
// CTAs of a warp of a grid that lets the next kernel be set up from its start on, at most; the same
// of CTAs of several tokens.
// Measured: decode steps with 256 and with 1536 CTAs. H100; table in docs/experiments/cache.md
// ("Decode steps let the next kernel in early"). Command: not recorded.
inline constexpr int kReleasingGrid = 1536;
inline constexpr int kReleasingGridTogether = 6144;

}  // namespace fastattn
