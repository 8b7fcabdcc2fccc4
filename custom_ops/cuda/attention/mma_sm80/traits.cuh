// Shapes of one attention kernel.
//
// A CTA of 4 warps, or 8, works on a work tile of `kTileRows` packed rows. Its warps form
// warp pipelines: each takes every kPipelines-th KV tile of 64 (or 32) keys, moves it through its
// own stages of shared memory, and keeps its own maximum, sum and output, merged at the end of the
// segment.
//
// The matrix products are transposed, S^T = K Q^T and O^T = V^T P^T: keys are their rows, and
// packed rows their columns, of which 8 fill a tensor-core tile.
#pragma once

#include <algorithm>

#include "common/types.h"
#include "cuda/attention/shared/format.cuh"
#include "formats/kv_format.h"
#include "plan/attention_plan.h"

namespace fastattn::cuda {

inline constexpr int kAttentionThreads = 128;

// Whether code compiled for this architecture (its number, 89 for 8.9) has fewer stages, for GPUs
// with 99 KiB of shared memory for a CTA. The other ones have 163 KiB or more.
FASTATTN_HD constexpr bool HasFewStages(int arch) {
  return arch == 86 || arch == 89 || arch / 10 == 12;
}

#if defined(FASTATTN_FEW_STAGES)  // to try them on any GPU
inline constexpr bool kHasFewStages = true;
#elif defined(__CUDA_ARCH__)
inline constexpr bool kHasFewStages = HasFewStages(__CUDA_ARCH__ / 10);
#else
inline constexpr bool kHasFewStages = false;
#endif

// The largest multiple of 16 channels up to `most` that divides `dim`.
constexpr int MergeDims(int most, int dim) {
  int dims = std::min(most, dim);
  while (dim % dims != 0) dims -= 16;
  return dims;
}

// kElement: of K, and kValue: of V. kWide: twice the warps in a CTA, for calls whose clusters have
// a multiprocessor for each CTA.
// kGeneral: packed rows may have holes in what they see, and heads block tables (row_holes.cuh).
// kChained: a result's bits follow from the keys alone (invariant_kernel.cuh).
template <DType kElement_, int kHeadDim_, bool kPaged_, Scales kScales_, int kTileRows_,
          bool kWide_ = false, bool kGeneral_ = false, DType kValue_ = kElement_,
          bool kChained_ = false>
struct AttentionTraits {
  static constexpr bool kWide = kWide_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr bool kChained = kChained_;
  static constexpr int kThreads = kAttentionThreads * (kWide ? 2 : 1);
  static constexpr int kCtasPerSm = kWide ? 1 : kAttentionCtasPerSm;
  static constexpr DType kElement = kElement_;
  static constexpr DType kValue = kValue_;
  using Format = fastattn::cuda::Format<kElement>;
  using ValueFormat = fastattn::cuda::Format<kValue>;
  static_assert(Format::kOperand == ValueFormat::kOperand && Format::kBytes == ValueFormat::kBytes);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kPaged = kPaged_;
  using Side = SideFormat<kElement, kScales_>;             // how K is stored
  using ValueSide = SideFormat<kValue, kScales_>;          // how V is
  static constexpr bool kStageScales = Side::kDynamic;     // a stage has the scales of its tokens
  static constexpr bool kPerTokenScales = Side::kDynamic;  // V's multiply probabilities
  static constexpr int kTileRows = kTileRows_;

  // Channels of V and of the output.
  static constexpr int kValueDim = ValueDim(kHeadDim);
  static constexpr bool kOwnValueDim = kValueDim != kHeadDim;
  // A KV tile's K, and its V, lie in several stages where a head is large, kStageDim channels in
  // each (4-bit codes of any head: in one). Channels of K past kHeadDim are 0, and so are a
  // query's.
  static constexpr bool kKeyNibbles = Side::kNibbles;
  static constexpr bool kValueNibbles = ValueSide::kNibbles;
  static constexpr int kStageDim =
      kKeyNibbles ? (kHeadDim == 96 ? 128 : kHeadDim) : StageDim(kHeadDim);
  static constexpr int kKeyStages = (kHeadDim + kStageDim - 1) / kStageDim;
  static constexpr int kValueStages = kValueNibbles ? 1 : (kValueDim + kStageDim - 1) / kStageDim;
  static constexpr int kTileStages = kKeyStages + kValueStages;
  static constexpr int kKeyDim = kKeyStages * kStageDim;

  // As many as hold a work tile's outputs in their registers.
  static constexpr bool kLarge = kHeadDim > 128;
  static constexpr int kPipelineWarps = kLarge            ? (kTileRows == 64 ? 4 : kTileRows / 8)
                                        : kTileRows == 64 ? 2
                                                          : 1;
  static constexpr int kPipelineThreads = 32 * kPipelineWarps;
  static constexpr int kPipelines = kThreads / kPipelineThreads;
  static constexpr int kRounds =
      std::max(4 / kPipelines, 1);  // in which they take a split's chains
  static constexpr int kTiles = kTileRows / 8 / kPipelineWarps;  // 8-column tiles of a warp

  static constexpr bool kQuantized = Format::kBytes == 1;
  // A scale for a block of some channels of a token (mx_scales.cuh).
  static constexpr bool kBlockScales = Side::kGrouped;
  static constexpr int kKeyBlocks = Side::TokenScales(kHeadDim);
  static constexpr int kValueBlocks = Side::TokenScales(kValueDim);
  static constexpr int kBlockTiles = Side::kGroup / 16;  // channel tiles of a block
  // Integers of 4 bits are operands with a bias.
  static constexpr bool kKeyBiased = kKeyNibbles && InfoOf(kElement).kind == NumberKind::kInteger;
  static constexpr bool kValueBiased = kValueNibbles && InfoOf(kValue).kind == NumberKind::kInteger;
  static constexpr bool kTransposedV = kQuantized && kPaged;  // V [D, 64] in TokenSlot order
  static constexpr int kRowBytes =
      kStageDim * Format::kBytes / CodesPerByte(kElement);  // of a key in a stage
  static constexpr int kKvTile = KeysPerKvTile(kHeadDim, Format::kBytes);
  static constexpr int kKeyTiles = kKvTile / 16;
  // Key tiles (16 keys each) whose scores raise the maximum together. Their registers are the limit
  // of work tiles of 64 packed rows, so in chains, of any work tile.
  static constexpr int kGroup = kTiles >= 4 || (kChained && !kLarge) ? 2 : kKeyTiles;
  static constexpr int kDimTiles = kValueDim / 16;
  // int4: a last one, what the codes' bias of 8 adds to a packed row's output, the same in all
  // rows.
  static constexpr int kOutTiles = kDimTiles + (kValueBiased ? 1 : 0);
  static constexpr int kStageDimTiles =  // of V
      kValueNibbles ? kDimTiles : std::min(kStageDim, kValueDim) / 16;
  static constexpr int kMmaSteps = kKeyDim / 16;  // of the product over channels
  static constexpr int kStageSteps = kStageDim / 16;
  // A lane's scales of a KV tile are loaded together, V's before the softmax, where registers are
  // left for them: not beside all outputs of a large head at a time (V of 4 bits) and K of 8 bits.
  static constexpr bool kScalesAtOnce =
      kPerTokenScales && (kKeyNibbles || (kTiles == 1 && !(kLarge && kValueNibbles)));
  static constexpr bool kQueryInRegisters = kTiles <= 2 && kTiles * kMmaSteps <= 24;

  // A stage is a KV tile's K or V, or some channels of them, and its per-token scales (of K in the
  // last stage, of V in the first). V of 4 bits beside a K of 8 leaves a part of it free.
  static constexpr int kDataBytes = kKvTile * kRowBytes;
  static_assert(!kValueNibbles || kValueDim / 2 * kBlockSize <= kDataBytes);
  // V's block scales become a bf16 scale a token and a byte for each block, beside the bytes that
  // they are in the cache.
  static constexpr int kBlockFactors = kKvTile * 2;  // offset of those bytes behind the data
  // Large heads have many, and the factors take the place of the bytes.
  static constexpr bool kFactorsInPlace = kLarge;
  static constexpr int kRawScales = kBlockFactors + (kFactorsInPlace ? 0 : kKvTile * kValueBlocks);
  static constexpr int kScaleBytes = kBlockScales
                                         ? kRawScales + kKvTile * std::max(kKeyBlocks, kValueBlocks)
                                     : kStageScales ? kKvTile * 4
                                                    : 0;
  // 128 bytes that neighbouring lanes copy must lie in one line of shared memory: else the copy
  // becomes several requests to the L2 cache, and large calls take 3 to 6 % longer.
  static constexpr int kStageBytes = kDataBytes + kScaleBytes;
  static_assert(kStageBytes % 128 == 0);
  // With few packed rows the pipeline goes on by a K or a V at a time, and starts the load that
  // lies kStages - 1 ahead. With many, scores of only kGroup key tiles fit in registers at a time:
  // it goes on by a K and its V, and the warp pipelines do so together.
  static constexpr bool kPairsKv = kTiles >= 4;
  static constexpr bool kClusters = kTileRows < 64;  // the kernel can run in clusters of CTAs
  // So many scales that two CTAs would not fit a multiprocessor.
  static constexpr bool kManyScales = kBlockScales && kHeadDim == 256 && kPipelines > 1;
  static constexpr int kManyStages = kPairsKv                           ? 4
                                     : kLarge && kPipelines == 4        ? 3
                                     : kLarge && kManyScales            ? 5
                                     : kLarge                           ? 6
                                     : kDataBytes * kPipelines <= 16384 ? 5
                                                                        : 3;
  static constexpr int kFewStages = kPairsKv          ? 4
                                    : !kLarge         ? 2
                                    : kPipelines == 4 ? 2
                                    : kPipelines == 2 ? 4
                                                      : 6;
  static constexpr int kStages = kHasFewStages ? kFewStages : kManyStages;
  // KV tiles whose K's load has been started ahead of the use of a K.
  static constexpr int kTilesAhead = kPairsKv ? 1 : (kStages - 1) / kTileStages;

  // Outputs of all pipelines are merged this many channels at a time.
  static constexpr int kMergeDims =
      MergeDims((kManyScales ? 1024 : 2048) / (kPipelines * kTileRows), kValueDim);
  static constexpr int kMergeStride = kMergeDims + 4;  // floats; keeps banks apart

  static constexpr int kQueryBytes = kTileRows * kKeyDim * 2;
  static constexpr int kMergeBytes = kPipelines * kTileRows * kMergeStride * 4;
  // The merge begins when all warps have used a work tile's queries.
  static constexpr int kMergeOffset = kPipelines * kStages * kStageBytes;
  static constexpr int kQueryOffset = kMergeOffset;
  static constexpr int kStateOffset = kMergeOffset + std::max(kMergeBytes, kQueryBytes);
  static constexpr int kStateBytes = kPipelines * kTileRows * 8;  // maximum, sum
  static constexpr int kRowInfoOffset = kStateOffset + kStateBytes;
  static constexpr int kRowInfoBytes = kTileRows * 32;  // PackedRowInfo
  static constexpr int kHolesOffset = kRowInfoOffset + kRowInfoBytes;
  static constexpr int kHolesBytes = kGeneral ? kTileRows * 32 : 0;  // RowHoles
  static constexpr int kScanOffset = kHolesOffset + kHolesBytes;
  static constexpr int kScanBytes = kThreads / 32 * 8;
  static constexpr int kShareOffset = kScanOffset + kScanBytes;
  static constexpr int kShareBytes = 48;  // Schedule
  static constexpr int kMaxSegments = 12;
  static constexpr int kSegmentOffset = kShareOffset + kShareBytes;
  static constexpr int kSegmentBytes = kMaxSegments * 80;
  static constexpr int kScheduleOffset = kSegmentOffset + kSegmentBytes;
  // Bytes of a kernel with `stages` stages: the host does not know how many were compiled.
  static constexpr int SharedBytes(int num_seqs, int stages) {
    return kScheduleOffset + kPipelines * (stages - kStages) * kStageBytes + 8 * (num_seqs + 1);
  }

  static_assert(kMergeDims % 16 == 0);
  // Swizzles and chunks of KV tiles assume it; the last channels would be dropped.
  static_assert(kRowBytes == 64 || kRowBytes == 128 || kRowBytes == 256 ||
                (kKeyNibbles && (kRowBytes == 32 || kRowBytes == 96)));
  static_assert(!kValueNibbles || (kPaged && kStageScales));
  static_assert(!kKeyNibbles || kValueNibbles);

  // The 16-byte piece in which a row's piece `chunk` lies: no 8 lanes of a load meet in a bank.
  static __device__ __forceinline__ int Swizzle(int row, int chunk) {
    return kRowBytes / 16 >= 8 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
  }

  // Where a key of 8-bit codes or of 16 bits lies among those of its stage. Where V has 4-bit
  // codes, the keys that neighbouring lanes read are 8 apart (KeyOf), which Swizzle does not tell
  // apart: every second of those changes places with its neighbour.
  static constexpr bool kOtherRows = kValueNibbles && !kKeyNibbles;
  static __device__ __forceinline__ constexpr int KeyRow(int key) {
    return kOtherRows ? key ^ (key >> 3 & 1) : key;
  }

  // Where a key of 4-bit codes lies among those of its stage. The keys that neighbouring lanes read
  // are 8 and 16 apart (KeyOf): those change places inside of 128 bytes, so that no lanes of a load
  // meet in a bank, and what lanes copy together lies in one line. (Rows of 96 bytes: inside of
  // three lines, and copies cross them.)
  static constexpr int kNibbleSwaps = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 4;
  static __device__ __forceinline__ constexpr int NibbleRow(int key) {
    return key ^ (key >> 3 & (kNibbleSwaps - 1));
  }

  // Where the 16-byte piece `chunk` of such a key lies: halves of 256 channels change places in
  // every second row, as two rows together fill the banks twice. (Thirds of 192 channels, 32 bytes,
  // are in other banks in each of four rows of 96.) With a scale for each piece, one piece of eight
  // keys, 8 apart, is read at a time.
  static __device__ __forceinline__ constexpr int NibbleChunk(int key, int chunk) {
    if constexpr (kBlockScales) {
      return chunk ^ (kRowBytes == 128  ? key >> 3 & 7
                      : kRowBytes == 64 ? key >> 4 & 3
                                        : key >> 5 & 1);
    }
    return kNibbleParts == 2 ? chunk ^ (key >> 1 & 4) : chunk;
  }

  // Key of a KV tile that is row `r` (0..15) of key tile m in S^T. For V in TokenSlot order, the
  // tokens of a thread's 16-byte pieces of V are then the rows that it holds of S.
  static __device__ __forceinline__ constexpr int KeyOf(int m, int r) {
    if constexpr (kValueNibbles) {
      // The tokens of Widen's pairs of V are those of bytes 0 and 2 of a word, and 1 and 3.
      return 16 * ((r & 7) >> 1) + 2 * m + 8 * (r & 1) + (r >> 3);
    } else if constexpr (kTransposedV) {
      return 16 * ((r & 7) >> 1) + 2 * m + (r & 1) + (r & 8);
    } else {
      return 16 * m + r;
    }
  }

  // Channel of row r (0..15) of channel tile i in O^T.
  static __device__ __forceinline__ int ChannelOf(int i, int r) {
    if constexpr (kValueNibbles || (kQuantized && !kTransposedV)) {
      return 16 * i + 2 * (r & 7) + (r >> 3);
    } else {
      return 16 * i + r;
    }
  }

  // Lane % 4 = t holds 4 neighbouring channels of step s of the product over channels, as operand
  // channels 2t, 2t + 1, 2t + 8, 2t + 9. A lane so reads K in whole 16-byte pieces, ChunkOf(t, j).
  static constexpr int kMmaStepsPerChunk = kKeyNibbles ? kMmaSteps : kQuantized ? 4 : 2;
  static constexpr int kChunks =
      kStageSteps / kMmaStepsPerChunk;  // 16-byte pieces of a lane and row
  // 4-bit codes: a lane reads a quarter of a key, 16 or 8 bytes, or of each half or third of a
  // large key. A word is two steps.
  static constexpr int kNibbleParts = kKeyDim / (kKeyDim % 128 == 0 ? 128 : 64);
  static constexpr int kNibbleWords = kKeyDim / 32 / kNibbleParts;  // that a lane reads of a part

  static __device__ __forceinline__ int ChunkOf(int t, int j) {
    return kRowBytes / 16 >= 8 ? 2 * t + (j & 1) + 8 * (j >> 1) : t;
  }
  // Where a step's four channels from 4 * quad on are: {t, s}.
  static __device__ __forceinline__ int2 StepOf(int quad) {
    constexpr int kStageQuads = kStageDim / 4;
    if constexpr (kKeyStages > 1) {
      const int2 step = StageStepOf(quad % kStageQuads);
      return make_int2(step.x, step.y + quad / kStageQuads * kStageSteps);
    } else {
      return StageStepOf(quad);
    }
  }
  static __device__ __forceinline__ int2 StageStepOf(int quad) {
    const int chunk = quad / kMmaStepsPerChunk, step = quad % kMmaStepsPerChunk;
    if (kRowBytes / 16 >= 8) {
      const int j = (chunk & 1) + 2 * (chunk >> 3);
      return make_int2((chunk >> 1) & 3, j * kMmaStepsPerChunk + step);
    }
    return make_int2(chunk, step);
  }
};

}  // namespace fastattn::cuda
