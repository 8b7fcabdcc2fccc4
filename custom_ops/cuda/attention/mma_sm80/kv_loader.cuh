// Moves KV tiles from global memory into a warp pipeline's stages.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/block_table.h"
#include "cuda/attention/mma_sm80/row_holes.cuh"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/attention/split_kv/shared/invariant_schedule.cuh"
#include "cuda/attention/split_kv/shared/schedule.cuh"
#include "cuda/common/mma.cuh"

namespace fastattn::cuda {

// A warp pipeline's stages: where the next load goes and where the next computation reads.
template <typename Traits>
struct StageRing {
  uint32_t base;
  int load = 0;
  int use = 0;

  __device__ __forceinline__ uint32_t NextLoad() {
    const uint32_t stage = base + load * Traits::kStageBytes;
    load = load + 1 == Traits::kStages ? 0 : load + 1;
    return stage;
  }
  __device__ __forceinline__ uint32_t NextUse() {
    const uint32_t stage = base + use * Traits::kStageBytes;
    use = use + 1 == Traits::kStages ? 0 : use + 1;
    return stage;
  }
};

// KV tiles of a segment that a warp pipeline takes in round `round` of a split; none: begin == end.
template <typename Traits>
__device__ __forceinline__ KeyRange<int> ChainIn(const Segment& segment,
                                                 const KeySplits<Traits::kKvTile>& splits,
                                                 int split, int round, int pipeline) {
  const KeyRange<int> chain = splits.Chains(split, round * Traits::kPipelines + pipeline, 1);
  const int begin = max(chain.begin, segment.kv_tile_begin);
  return {begin, max(min(chain.end, segment.kv_tile_end), begin)};
}

// Walks over a pipeline's KV tiles ahead of the computation, K before V of each. The block id of
// the next KV tile is read while the current one is loaded.
template <typename Traits>
class KvLoader {
 public:
  // `segments` are `count` segments in shared memory; `keys_read_once`: nothing else will read
  // their keys. `most_splits`: of chains only.
  __device__ __forceinline__ KvLoader(const AttentionParams& p, const Segment* segments, int count,
                                      int pipeline, bool keys_read_once, int most_splits = 1)
      : p_(p), segment_(segments), end_(segments + count), pipeline_(pipeline) {
    policy_ = CachePolicy(keys_read_once);
    if constexpr (Traits::kChained) {
      splits_.most = most_splits;
      EnterSegment();
    } else {
      kv_tile_ = segment_->kv_tile_begin + pipeline;
    }
    Settle();
  }

  // Starts the copies of K of the next KV tile into `stage`, or those of channels that the
  // kStage-th stage of its K has, one after the other; V is the same one's.
  template <int kStage = 0>
  __device__ __forceinline__ void LoadKeys(uint32_t stage) {
    if constexpr (kStage == 0) loading_ = segment_ != end_, assigned_ <<= 1;
    if (loading_) {
      if constexpr (kStage == 0) Place();
      if (LoadsAssigned()) {
        constexpr int kFirst = kStage * Traits::kStageDim;
        if constexpr (Traits::kPaged) {
          const PagedCache& cache = p_.cache;
          CopyPlane<Traits::kRowBytes, true>(stage, cache.key, cache.key_strides, key_ + kFirst);
          if constexpr (kStage + 1 == Traits::kKeyStages) {
            CopyScales<Traits::kKeyBlocks>(stage, cache.k_scales, key_scale_);
          }
        } else {
          CopyRagged(stage, p_.ragged.key, kFirst, p_.ragged.key_token_stride,
                     p_.ragged.key_head_stride);
        }
      }
      if constexpr (kStage == 0) Advance();
    }
    CommitCopies();
  }

  template <int kStage = 0>
  __device__ __forceinline__ void LoadValues(uint32_t stage) {
    if (loading_ && LoadsAssigned()) {
      constexpr int kFirst = kStage * Traits::kStageDim;
      if constexpr (Traits::kPaged) {
        const PagedCache& cache = p_.cache;
        constexpr int kRowBytes = Traits::kTransposedV ? kBlockSize : Traits::kRowBytes;
        constexpr bool kSwizzled = !Traits::kTransposedV;  // channels are read as they lie
        int64_t first = value_;
        if constexpr (kStage > 0) {
          first += kFirst * (Traits::kTransposedV ? cache.value_strides.row : 1);
        }
        CopyPlane<kRowBytes, kSwizzled>(stage, cache.value, cache.value_strides, first);
        if constexpr (kStage == 0) {
          CopyScales<Traits::kValueBlocks>(stage, cache.v_scales, value_scale_);
        }
      } else {
        CopyRagged(stage, p_.ragged.value, kFirst, p_.ragged.value_token_stride,
                   p_.ragged.value_head_stride);
      }
    }
    CommitCopies();
  }

  // Whether the block of the KV tile in use is assigned: the load of its K has been started, and
  // those of the K of kTilesAhead KV tiles behind it.
  __device__ __forceinline__ bool UsesAssigned() const {
    return (assigned_ >> Traits::kTilesAhead & 1) != 0;
  }

 private:
  static constexpr int kBytes = Traits::Format::kBytes;
  static constexpr int kPieces = Traits::kDataBytes / 16;
  static constexpr int kPiecesPerRow = Traits::kRowBytes / 16;
  // Those of a row of channels that a head has; the rest are 0.
  static constexpr int kHeadPieces = std::min(Traits::kStageDim, Traits::kHeadDim) *
                                     Traits::Format::kBytes / CodesPerByte(Traits::kElement) / 16;

  __device__ __forceinline__ int Lane() const { return threadIdx.x % Traits::kPipelineThreads; }

  // The same of the KV tile that is loaded.
  __device__ __forceinline__ bool LoadsAssigned() const { return (assigned_ & 1) != 0; }

  // Finds where the current KV tile lies.
  __device__ __forceinline__ void Place() {
    if constexpr (Traits::kPaged) {
      assigned_ |= IsAssignedBlock(block_, p_.cache.num_blocks) ? 1 : 0;
      // A plane holds 64 keys; a KV tile may be half of them.
      constexpr int kKvTilesPerBlock = kBlockSize / Traits::kKvTile;
      static_assert(kKvTilesPerBlock == 1 || !(Traits::kTransposedV || Traits::kStageScales));
      const PagedCache& cache = p_.cache;
      const int head = segment_->head, row = kv_tile_ % kKvTilesPerBlock * Traits::kKvTile;
      key_ = cache.key_strides.Row(block_, head, row);
      value_ = cache.value_strides.Row(block_, head, row);
      if constexpr (Traits::kStageScales) {
        key_scale_ = cache.k_scale_strides.Plane(block_, head);
        value_scale_ = cache.v_scale_strides.Plane(block_, head);
      }
    } else {
      assigned_ |= 1;
      offset_ = segment_->shape.k_begin + static_cast<int64_t>(kv_tile_) * Traits::kKvTile;
      rows_ = segment_->shape.k_len - kv_tile_ * Traits::kKvTile;
      head_ = segment_->head;
    }
  }

  __device__ __forceinline__ void Advance() {
    kv_tile_ += Traits::kChained ? 1 : Traits::kPipelines;
    Settle();
  }

  // The first chain of a segment that is the pipeline's.
  __device__ __forceinline__ void EnterSegment() {
    split_ = splits_.Of(segment_->kv_tile_begin);
    round_ = 0;
    EnterChain();
  }

  __device__ __forceinline__ void EnterChain() {
    const KeyRange<int> chain = ChainIn<Traits>(*segment_, splits_, split_, round_, pipeline_);
    kv_tile_ = chain.begin;
    chain_end_ = chain.end;
  }

  // Goes on to the pipeline's next chain. False: there is none.
  __device__ __forceinline__ bool NextChain() {
    if (++round_ < Traits::kRounds) {
      EnterChain();
    } else if (splits_.End(split_) < segment_->kv_tile_end) {
      ++split_;
      round_ = 0;
      EnterChain();
    } else {
      if (++segment_ == end_) return false;
      EnterSegment();
    }
    return true;
  }

  // Goes on to the segment that holds the pipeline's next KV tile.
  __device__ __forceinline__ void Settle() {
    if constexpr (Traits::kChained) {
      while (kv_tile_ >= chain_end_) {
        if (!NextChain()) return;
      }
    } else {
      while (kv_tile_ >= segment_->kv_tile_end) {
        if (++segment_ == end_) return;
        kv_tile_ = segment_->kv_tile_begin + pipeline_;
      }
    }
    if constexpr (Traits::kPaged) {
      constexpr int kKvTilesPerBlock = kBlockSize / Traits::kKvTile;
      const int page = kv_tile_ / kKvTilesPerBlock;
      const int batch_idx = segment_->batch_idx;
      const SeqMeta& seqs = p_.seqs;
      if constexpr (Traits::kGeneral) {
        const int first = kv_tile_ * Traits::kKvTile;
        const int64_t row = seqs.TableOf(batch_idx, segment_->head, p_.num_kv_heads);
        block_ = page < seqs.max_blocks && !InGap(p_, *segment_, first, first + Traits::kKvTile)
                     ? __ldg(BlockEntry(seqs.block_tables, seqs.max_blocks, row, page))
                     : -1;
        return;
      }
      block_ = page < seqs.max_blocks
                   ? __ldg(BlockEntry(seqs.block_tables, seqs.max_blocks, batch_idx, page))
                   : -1;
    }
  }

  // Copies a stage's rows of kRowBytes from `element` on.
  template <int kRowBytes, bool kSwizzled>
  __device__ __forceinline__ void CopyPlane(uint32_t stage, const void* tensor,
                                            const CacheStrides& strides, int64_t element) {
    constexpr int kRowPieces = kRowBytes == 96 ? 8 : kRowBytes / 16;  // and lanes without one
    // A transposed V has a row for each channel (of 4-bit codes, for two), else a stage is full.
    constexpr int kCodesPerByte = CodesPerByte(Traits::kValue);
    constexpr int kCopies =
        kSwizzled ? kPieces : Traits::kStageDimTiles * kBlockSize * kBytes / kCodesPerByte;
    constexpr int kRows =
        Traits::kPipelineThreads / kRowPieces;  // that the pipeline copies at a time
    const int row = Lane() / kRowPieces, chunk = Lane() % kRowPieces;
    const char* from =
        static_cast<const char*>(tensor) + (element + row * strides.row) * kBytes + chunk * 16;
    const int64_t stride = kRows * kBytes * strides.row;
    if constexpr (Traits::kKeyNibbles && kSwizzled) {
#pragma unroll
      for (int i = 0; i < Traits::kKvTile / kRows; ++i, from += stride) {
        const int key = row + i * kRows, piece = Traits::NibbleChunk(key, chunk);
        const uint32_t to = stage + Traits::NibbleRow(key) * kRowBytes;
        // What lies in channels past the head is any code: the query has none of them.
        if (kHeadPieces == kRowPieces || chunk < kHeadPieces) {
          CopyAsync16(to + piece * 16, from, policy_);
        }
      }
      return;
    }
    if constexpr (kSwizzled && Traits::kOtherRows) {
#pragma unroll
      for (int i = 0; i < kCopies / Traits::kPipelineThreads; ++i, from += stride) {
        const int to = Traits::KeyRow(row + i * kRows);
        const bool inside = kHeadPieces == kPiecesPerRow || chunk < kHeadPieces;
        CopyAsync16(stage + to * kRowBytes + Traits::Swizzle(to, chunk) * 16,
                    inside ? from : static_cast<const char*>(tensor), policy_, inside ? 16 : 0);
      }
      return;
    }
    const uint32_t to = stage + row * kRowBytes;
#pragma unroll
    for (int i = 0; i < kCopies / Traits::kPipelineThreads; ++i, from += stride) {
      const int piece = kSwizzled ? Traits::Swizzle(row + i * kRows, chunk) : chunk;
      if constexpr (kSwizzled && kHeadPieces < kPiecesPerRow) {
        const bool inside = chunk < kHeadPieces;
        CopyAsync16(to + piece * 16 + i * kRows * kRowBytes,
                    inside ? from : static_cast<const char*>(tensor), policy_, inside ? 16 : 0);
      } else {
        CopyAsync16(to + piece * 16 + i * kRows * kRowBytes, from, policy_);
      }
    }
  }

  // `kBlocks`: scales of a token, where it has some for blocks of channels.
  template <int kBlocks>
  __device__ __forceinline__ void CopyScales(uint32_t stage, const void* scales, int64_t element) {
    if constexpr (Traits::kStageScales) {
      constexpr int kOffset = Traits::kDataBytes + (Traits::kBlockScales ? Traits::kRawScales : 0);
      const int size = Traits::kBlockScales ? 1 : SizeOf(p_.cache.scale_dtype);
      constexpr int kTokenScales = Traits::kBlockScales ? kBlocks : 1;
      if (Lane() * 16 < Traits::kKvTile * kTokenScales * size) {
        CopyAsync16(stage + kOffset + Lane() * 16,
                    static_cast<const char*>(scales) + element * size + Lane() * 16, policy_);
      }
    }
  }

  // Copies rows of ragged tensors, zeros after the sequence's last key. Strides that are no
  // multiples of 16 bytes are served a byte at a time.
  __device__ __forceinline__ void CopyRagged(uint32_t stage, const void* tensor, int first,
                                             int64_t token_stride, int64_t head_stride) {
    const char* source = static_cast<const char*>(tensor) +
                         (offset_ * token_stride + head_ * head_stride + first) * kBytes;
    const int64_t stride = token_stride * kBytes;
    const bool aligned =
        ((reinterpret_cast<uintptr_t>(tensor) | stride | (head_stride * kBytes)) & 15) == 0;
#pragma unroll 2
    for (int i = 0; i < kPieces / Traits::kPipelineThreads; ++i) {
      const int piece = i * Traits::kPipelineThreads + Lane();
      const int row = piece / kPiecesPerRow, chunk = piece % kPiecesPerRow;
      const uint32_t target = stage + row * Traits::kRowBytes + Traits::Swizzle(row, chunk) * 16;
      const char* from = source + row * stride + chunk * 16;
      const bool inside = row < rows_ && (kHeadPieces == kPiecesPerRow || chunk < kHeadPieces);
      if (aligned) {
        CopyAsync16(target, inside ? from : static_cast<const char*>(tensor), policy_,
                    inside ? 16 : 0);
      } else {
        uint32_t words[4] = {0, 0, 0, 0};
        if (inside) {
#pragma unroll
          for (int b = 0; b < 16; ++b) {
            words[b / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(from[b])) << (8 * (b % 4));
          }
        }
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(words[0]),
                     "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
      }
    }
  }

  const AttentionParams& p_;
  const Segment* segment_;  // of the next KV tile; end_ when there is none
  const Segment* end_;
  uint64_t policy_;
  int pipeline_;
  int kv_tile_;
  KeySplits<Traits::kKvTile> splits_;  // of chains, and where the pipeline is in them
  int split_, round_, chain_end_;
  bool loading_ = false;   // the current KV tile exists
  uint32_t assigned_ = 0;  // and its block too: bit 0; bit n: that of the KV tile n before it
  int block_ = -1;
  int rows_ = 0;
  int head_ = 0;
  int64_t offset_ = 0;  // ragged: the first key
  // Paged: offsets in elements. Where they are not used the compiler drops them.
  int64_t key_ = 0;
  int64_t value_ = 0;
  int64_t key_scale_ = 0;
  int64_t value_scale_ = 0;
};

}  // namespace fastattn::cuda
