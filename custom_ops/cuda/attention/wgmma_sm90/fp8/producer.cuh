// The producer warpgroup: one warp finds work tiles and loads them with TMA, the other three scrub
// NaNs out of V, so that no value of a masked key can reach a result.
#pragma once

#include "common/normaliser.h"
#include "common/numeric.h"
#include "cuda/attention/shared/scales.cuh"
#include "cuda/attention/wgmma_sm90/common/kv_blocks.cuh"
#include "cuda/attention/wgmma_sm90/common/paired_tile_scheduler.cuh"
#include "cuda/attention/wgmma_sm90/common/query_keys.cuh"
#include "cuda/attention/wgmma_sm90/fp8/config.h"
#include "cuda/common/tma.cuh"

namespace fastattn::cuda::wgmma_fp8 {

template <class C>
class KvLoader {
 public:
  __device__ KvLoader(const Arguments& arguments, Shared<C>& shared)
      : a_(arguments), p_(arguments.p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    PairedTileScheduler<C> scheduler(a_, shared_);
    scheduler.Start();
    PipelineState<2> queries;
    PipelineState<C::kStages> stages;
    bool ends = !C::kLazy;
    while (true) {
      Wait(&shared_.query_empty[queries.index], queries.phase ^ 1);
      WorkTile* tile = &shared_.tile[queries.index];
      bool found;
      if constexpr (C::kLazy) {
        found = Again(queries.index) || (!ends && FindExact(scheduler.Next(tile), queries.index));
      } else {
        found = scheduler.Next(tile);
      }
      if (lane_ == 0) {
        if (found) {
          LoadQueries(*tile, queries.index);
        } else {
          tile->kv_tiles = -1;
          Arrive(&shared_.query_full[queries.index]);
        }
        Arrive(&shared_.tile_found[queries.index]);
      }
      __syncwarp();
      if (found) LoadKeys(*tile, &stages);
      if (ends && (C::kLazy || !found)) return;
      // The tile before this one may have to be done again, which is known when the consumers have
      // seen that none follows.
      if (C::kLazy) ends = !found;
      queries.Advance();
    }
  }

 private:
  // Whether the buffer's work tile, which has been done, is done again, with maxima in each of its
  // iterations (LazyConsumer).
  __device__ bool Again(int buffer) {
    const uint32_t* failed = shared_.failed[buffer][0];
    const bool again = __any_sync(~0u, lane_ < 8 * C::kConsumers && failed[lane_] != 0);
    if (lane_ == 0) {
      shared_.is_again[buffer] = again;
      if (again) shared_.exact_iterations[buffer] = shared_.tile[buffer].kv_tiles;
    }
    return again;
  }

  // Maxima are found in the first iteration, and behind those of which some query sees only a part,
  // as they grow there. Returns `found`.
  __device__ bool FindExact(bool found, int buffer) {
    const WorkTile& tile = shared_.tile[buffer];
    // An end may be as low as INT_MIN.
    const int behind = (tile.last_kv_tile + 1) * C::kKeys - max(tile.unmasked_end, 0);
    if (lane_ == 0 && found) {
      shared_.exact_iterations[buffer] =
          min(1 + (max(behind, 0) + C::kKeys - 1) / C::kKeys, tile.kv_tiles);
    }
    return found;
  }

  __device__ void LoadQueries(const volatile WorkTile& tile, int buffer) {
    uint64_t* barrier = &shared_.query_full[buffer];
    ArriveExpect(barrier, C::kQueries * C::kDim);
    for (int i = 0; i < C::kConsumers; ++i) {
      for (int slice = 0; slice < C::kSlices; ++slice) {
        CopyBox(&a_.query, shared_.query[buffer] + i * 64 * C::kDim + slice * 64 * C::kSlice,
                barrier, slice * C::kSlice, tile.head, tile.token + 64 * i);
      }
      if constexpr (C::kTail > 0) {
        constexpr int kWhole = C::kSlices * C::kSlice;
        CopyBox(&a_.query_tail, shared_.query[buffer] + (i * C::kDim + kWhole) * 64, barrier,
                kWhole, tile.head, tile.token + 64 * i);
      }
    }
  }

  __device__ void LoadKeys(const volatile WorkTile& tile, PipelineState<C::kStages>* stages) {
    int ahead = FindBlock<true>(p_, tile, 0, lane_, a_.value_blocks), block = -1, before = 0;
#pragma unroll 1
    for (int iteration = 0; iteration < tile.kv_tiles; ++iteration) {
      if (iteration % kBlockLookups == 0) {
        block = ahead;
        ahead = FindBlock<true>(p_, tile, iteration + kBlockLookups, lane_, a_.value_blocks);
      }
      const int blocks[2] = {__shfl_sync(~0u, block, 2 * (iteration % kBlockLookups)),
                             __shfl_sync(~0u, block, 2 * (iteration % kBlockLookups) + 1)};
      const int start = (tile.last_kv_tile - iteration) * C::kKeys;
      int flags = (blocks[0] < 0 ? kUnassigned : 0) | (blocks[1] < 0 ? kUnassigned << 1 : 0);
      if (start < tile.unmasked_begin || start + C::kKeys > tile.unmasked_end) flags |= kNeedsScrub;
      if (before & kNeedsScrub) flags |= kAfterScrub;
      before = flags;
      LoadKvTile(tile, iteration, blocks, flags, *stages);
      stages->Advance();
    }
  }

  // Coordinates of blocks that are not assigned lie outside of the tensors: zeros arrive.
  __device__ void LoadKvTile(const volatile WorkTile& tile, int iteration, const int (&blocks)[2],
                             int flags, PipelineState<C::kStages> stage) {
    constexpr int kBytes = kBlockSize * C::kDim, kValueBytes = kBlockSize * C::kValueDim;
    const int at = stage.index;
    Wait(&shared_.key_empty[at], stage.phase ^ 1);
    if (lane_ == 0) {
      shared_.flags[at] = flags;
      ArriveExpect(&shared_.key_full[at], 2 * kBytes);
      for (int i = 0; i < 2; ++i) {
        int token = 0, plane = a_.key_planes.Of(blocks[i], tile.kv_head);
        if (!p_.paged) {
          plane = tile.kv_head;
          token = blocks[i] < 0 ? static_cast<int>(p_.ragged.num_tokens)
                                : tile.ragged_token + (tile.last_kv_tile - iteration) * C::kKeys +
                                      i * kBlockSize;
        }
        for (int slice = 0; slice < C::kSlices; ++slice) {
          CopyBox(&a_.key, shared_.key[at] + (slice * C::kKeys + i * kBlockSize) * C::kSlice,
                  &shared_.key_full[at], slice * C::kSlice, token, plane);
        }
        if constexpr (C::kTail > 0) {
          constexpr int kWhole = C::kSlices * C::kSlice;
          CopyBox(&a_.key_tail, shared_.key[at] + C::kKeys * kWhole + i * kBlockSize * C::kTail,
                  &shared_.key_full[at], kWhole, token, plane);
        }
      }
    }
    __syncwarp();
    Wait(&shared_.value_empty[at], stage.phase ^ 1);
    if (lane_ == 0) {
      uint64_t* barrier = &shared_.value_full[at];
      // The flags are copied because the next keys' flags may come before the scrubbing warps have
      // looked at these values.
      shared_.value_flags[at] = flags;
      const int assigned = (blocks[0] >= 0) + (blocks[1] >= 0);
      const int scale_bytes = kBlockSize * SizeOf(p_.cache.scale_dtype);
      ArriveExpect(barrier,
                   2 * kValueBytes + (C::kPerTokenScales ? 2 * assigned * scale_bytes : 0));
      for (int i = 0; i < 2; ++i) {
        CopyBox(&a_.value, shared_.value[at] + i * kValueBytes, barrier, 0, 0,
                a_.value_planes.Of(blocks[i], tile.kv_head));
        if (C::kPerTokenScales && blocks[i] >= 0) {
          CopyBulk(ScalesOf(p_.cache.k_scales, p_.cache.k_scale_strides, blocks[i], tile.kv_head),
                   shared_.raw_scales[at][0] + i * scale_bytes, barrier, scale_bytes);
          CopyBulk(ScalesOf(p_.cache.v_scales, p_.cache.v_scale_strides, blocks[i], tile.kv_head),
                   shared_.raw_scales[at][1] + i * scale_bytes, barrier, scale_bytes);
        }
      }
    }
    __syncwarp();
  }

  __device__ const char* ScalesOf(const void* scales, const CacheStrides& strides, int block,
                                  int kv_head) const {
    return static_cast<const char*>(scales) +
           strides.Plane(block, kv_head) * SizeOf(p_.cache.scale_dtype);
  }

  const Arguments& a_;
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
};

// NaN scrubbing. In KV tiles that some query sees only in part, the value of a masked key must not
// enter the product: 0 * NaN is NaN. Codes of unwritten tokens become 0. NaN codes of written
// tokens become 0 as well, and are listed for the consumers, which set the outputs of the rows that
// see them.
template <class C>
class ValueScrubber {
 public:
  __device__ ValueScrubber(const Arguments& arguments, Shared<C>& shared)
      : p_(arguments.p), shared_(shared), warp_(threadIdx.x / 32 - 1), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    PipelineState<2> queries;
    PipelineState<C::kStages> stages;
    bool ends = !C::kLazy;
    while (true) {
      Wait(&shared_.tile_found[queries.index], queries.phase);
      const WorkTile& tile = shared_.tile[queries.index];
      const int kv_tiles = tile.kv_tiles, last = tile.last_kv_tile, k_len = tile.k_len;
      if (kv_tiles >= 0) FindFactors(tile, queries.index);
      ArriveWarp(&shared_.query_full[queries.index]);
      ArriveWarp(&shared_.query_empty[queries.index]);
      if (kv_tiles < 0 && ends) return;
      queries.Advance();
      float max_v_scale = 1.0f;  // V's largest one in the iteration before
#pragma unroll 1
      for (int iteration = 0; iteration < kv_tiles; ++iteration) {
        const int at = stages.index;
        Wait(&shared_.value_full[at], stages.phase);
        const int written = min(max(k_len - (last - iteration) * C::kKeys, 0), C::kKeys);
        bool nan = false;
        if (shared_.value_flags[at] & kNeedsScrub) nan = Scrub(at, written);
        nan = __any_sync(~0u, nan);
        if constexpr (C::kPerTokenScales) {
          if (warp_ == 0) nan |= PrepareScales(at, written, shared_.value_flags[at], &max_v_scale);
        }
        if (lane_ == 0) shared_.nan_found[at][warp_] = nan;
        FenceAsyncProxy();
        ArriveWarp(&shared_.value_ready[at]);
        stages.Advance();
      }
      if constexpr (C::kLazy) {
        if (ends) return;
        ends = kv_tiles < 0;
      }
    }
  }

 private:
  // Reads, ahead of the consumers, what they would have to wait for at either end of a work tile.
  __device__ void FindFactors(const WorkTile& tile, int buffer) {
    const PagedCache& cache = p_.cache;
    const int kv_head = tile.kv_head;
    float factor = p_.softmax_scale * kLog2E;
    float output = p_.out_scale == nullptr ? 1.0f : 1.0f / p_.out_scale[0];
    if (!p_.paged) {
      factor *= Read(p_.ragged.k_descale, tile, 0, kv_head);
      output *= Read(p_.ragged.v_descale, tile, 0, kv_head);
    } else if (!IsDynamic(cache.type)) {
      const bool key = cache.k_granularity == ScaleScheme::kHead;
      const bool value = cache.v_granularity == ScaleScheme::kHead;
      factor *= LoadHeadScale(cache, cache.k_scales, key, kv_head);
      output *= LoadHeadScale(cache, cache.v_scales, value, kv_head);
    }
#pragma unroll 1
    for (int i = 32 * warp_ + lane_; i < C::kQueries; i += 32 * C::kScrubWarps) {
      float x = factor;
      if (i < tile.queries) x *= Read(p_.q_descale, tile, tile.token + i, kv_head);
      // Masked scores are -inf, which 0 would turn into NaN.
      shared_.factor[buffer][i] = x == 0.0f ? 1e-30f : x;
      shared_.visible[buffer][i] = QueryKeys(p_, tile, i);
    }
    if (warp_ != 2 || lane_ != 0) return;
    shared_.output_scale[buffer] = output;
    shared_.sink[buffer] = p_.sinks == nullptr ? -__builtin_huge_valf()
                                               : LoadScale(p_.sinks, p_.sinks_dtype, tile.head);
  }

  __device__ static float Read(const Descale& scale, const WorkTile& tile, int token, int kv_head) {
    return LoadDescale(scale, token, kv_head, tile);
  }

  static constexpr uint32_t kHigh = 0x80808080u;

  // Sets the high bit of every byte of `word` that is the code of a NaN, or of an infinity, which
  // e5m2 has: 0 times that is NaN as well.
  __device__ static uint32_t NaNBytes(uint32_t word) {
    constexpr bool kInfinities = C::kKvType == DType::kE5M2;
    constexpr uint32_t kExponent = kInfinities ? 0x7C7C7C7Cu : ~kHigh;
    return ((word & kExponent) + (kInfinities ? 0x04040404u : 0x01010101u)) & kHigh;
  }

  __device__ bool Scrub(int at, int written) {
    constexpr int kPieces = C::kKeys * C::kValueDim / 16;
    bool found = false;
#pragma unroll 1
    for (int i = warp_ * 32 + lane_; i < kPieces; i += 32 * C::kScrubWarps) {
      const int block = i / (4 * C::kValueDim), channel = i / 4 % C::kValueDim;
      const int piece = (i % 4) ^ (channel / 2 % 4);  // undoes the 64-byte swizzle
      const int token = block * kBlockSize + 16 * piece;
      uint32_t* words = reinterpret_cast<uint32_t*>(shared_.value[at] + 16 * i);
      const uint4 codes = *reinterpret_cast<const uint4*>(words);
      uint32_t tokens = 0;
      const uint32_t any =
          NaNBytes(codes.x) | NaNBytes(codes.y) | NaNBytes(codes.z) | NaNBytes(codes.w);
      if (any != 0 || token + 16 > written) {
#pragma unroll 1
        for (int w = 0; w < 4; ++w) tokens |= ScrubWord(w, written - token, words + w);
      }
      shared_.nan_tokens[at][channel][token / 16] = static_cast<uint16_t>(tokens);
      found |= tokens != 0;
    }
    return found;
  }

  // Word w of a piece holds tokens 2w, 2w + 1, 2w + 8 and 2w + 9. Returns those with NaN codes.
  __device__ static uint32_t ScrubWord(int w, int written, uint32_t* word) {
    uint32_t nan = NaNBytes(*word), tokens = 0, keep = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 2 * w + (i / 2) * 8 + i % 2;
      const uint32_t high = 0x80u << (8 * i);
      if (token >= written) nan &= ~high;
      if (nan & high) tokens |= 1u << token;
      if (token < written && !(nan & high)) keep |= 0xFFu << (8 * i);
    }
    *word &= keep;
    return tokens;
  }

  // Writes a KV tile's per-token scales in fp32. Tokens that do not exist get 1 for K, which keeps
  // masked scores, and 0 for V. So do, where some query sees only a part of the KV tile, tokens
  // with a NaN scale: they are listed for the consumers. Returns whether there are any. V's scales
  // are relative to the largest one, but not in such a KV tile: there each query has a largest one
  // of its own.
  __device__ bool PrepareScales(int at, int written, int flags, float* max_v_scale) {
    constexpr int kPer = C::kKeys / 32;
    float value[kPer], largest = 0.0f;
    bool found = false;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int token = lane_ + 32 * i;
      const bool exists = token < written && !(flags & (kUnassigned << (token / kBlockSize)));
      float key = 1.0f;
      value[i] = 0.0f;
      if (exists) {
        key = LoadScale(shared_.raw_scales[at][0], p_.cache.scale_dtype, token);
        value[i] = LoadScale(shared_.raw_scales[at][1], p_.cache.scale_dtype, token);
      }
      const bool scrubs = flags & kNeedsScrub;
      const bool poisoned[2] = {scrubs && !(fabsf(key) <= 3.0e38f),
                                scrubs && !(fabsf(value[i]) <= 3.0e38f)};
      if (poisoned[0]) key = 1.0f;
      if (poisoned[1]) value[i] = 0.0f;
      shared_.scales[at][0][token] = key == 0.0f ? 1e-30f : key;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned tokens = __ballot_sync(~0u, poisoned[half]);
        if (lane_ == 0) shared_.poisoned[at][half][i] = tokens;
        found |= tokens != 0;
      }
      largest = fmaxf(largest, fabsf(value[i]));
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
    largest = fmaxf(largest, kMinVScale);
    const bool per_row = flags & kNeedsScrub;
    const float inverse = per_row ? 1.0f : 1.0f / largest;
#pragma unroll
    for (int i = 0; i < kPer; ++i) shared_.scales[at][1][lane_ + 32 * i] = value[i] * inverse;
    if (lane_ == 0) {
      shared_.max_v_scale[at][0] = per_row ? -1.0f : largest;
      shared_.max_v_scale[at][1] = per_row ? *max_v_scale : VScaleRatio(*max_v_scale, largest);
    }
    if (!per_row) *max_v_scale = largest;
    return found;
  }

  const AttentionParams& p_;
  Shared<C>& shared_;
  const int warp_;  // 0 .. kScrubWarps - 1
  const int lane_;
};

}  // namespace fastattn::cuda::wgmma_fp8
