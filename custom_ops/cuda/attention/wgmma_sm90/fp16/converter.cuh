// Converts codes to 16-bit operands: three warps of the producer warpgroup share each KV tile's
// codes of V and, where they are no operands as they lie, of K.
#pragma once

#include <type_traits>

#include "common/numeric.h"
#include "cuda/attention/shared/format.cuh"
#include "cuda/attention/wgmma_sm90/fp16/config.h"
#include "cuda/attention/wgmma_sm90/fp16/nan_scrub.cuh"
#include "cuda/attention/wgmma_sm90/fp16/nibbles.cuh"
#include "cuda/attention/wgmma_sm90/fp16/tile_factors.cuh"
#include "cuda/common/mbarrier.cuh"

namespace fastattn::cuda::wgmma_fp16 {

template <class C>
class Converter {
 public:
  __device__ Converter(const Arguments& arguments, Shared<C>& shared)
      : p_(arguments.p), shared_(shared), warp_(threadIdx.x / 32 - 1), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    if constexpr (C::kNibbles) {
      RunFormat<Format<DType::kInt4>>();
    } else if constexpr (C::kKeyCodeOperands) {
      RunFormat<Format<C::kElement>>();
    } else {
      const DType codes = p_.paged ? p_.cache.dtype : p_.ragged.dtype;
      if (codes == DType::kInt8) {
        RunFormat<Format<DType::kInt8>>();
      } else if (codes == DType::kE4M3) {
        RunFormat<Format<DType::kE4M3>>();
      } else {
        RunFormat<Format<DType::kE5M2>>();
      }
    }
  }

 private:
  // A KV tile's codes are groups of 512 bytes, 16 a lane; a warp takes kBatch groups at a time, so
  // that it waits for shared memory once. Per-token scales take registers.
  static constexpr int kGroup = 512;
  static constexpr int kBatch = C::kPerTokenScales ? 2 : 4;
  static constexpr int kBatches = C::kCodeBytes / (kGroup * kBatch);
  static constexpr int kRounds = (kBatches + C::kHelperWarps - 1) / C::kHelperWarps;
  static constexpr int kNamedBarrier = 3;  // after those of the ping-pong

  // Converts the codes of work tiles in the loader's order.
  template <class F>
  __device__ __forceinline__ void RunFormat() {
    SetTiles({});
    while (true) {
      Wait(&shared_.tile_found[Tiles().Index()], Tiles().Phase());
      if (TileNow().kv_tiles >= 0) {
        FindFactors<C>(p_, shared_, TileNow(), Tiles().Index(), warp_);
      }
      __syncwarp();
      if (TileNow().kv_tiles < 0) break;
      if (ArrivesForWarp(lane_)) Arrive(&shared_.query_full[0]);
#pragma unroll 1
      for (int iteration = -1; iteration < TileNow().kv_tiles; ++iteration) {
        if constexpr (!C::kLoadsKeyOperands) {
          if (iteration + 1 < TileNow().kv_tiles) ConvertKeys<F>(iteration + 1);
        }
        if (iteration >= 0) ConvertValues<F>(iteration);
      }
      __syncwarp();
      PackedPipelineState<2> tiles = Tiles();
      if (ArrivesForWarp(lane_)) Arrive(&shared_.query_empty[tiles.Index()]);
      tiles.Advance();
      SetTiles(tiles);
    }
    if (ArrivesForWarp(lane_)) Arrive(&shared_.query_full[0]);
  }

  // The warp's pipeline state of work tiles lies in shared memory, as registers are short.
  __device__ __forceinline__ PackedPipelineState<2> Tiles() const {
    const volatile int& count = shared_.converter_tiles[warp_];
    return {count};
  }
  __device__ __forceinline__ void SetTiles(PackedPipelineState<2> tiles) {
    __syncwarp();
    if (lane_ == 0) shared_.converter_tiles[warp_] = tiles.count;
    __syncwarp();
  }
  __device__ __forceinline__ const volatile WorkTile& TileNow() const {
    return shared_.tile[Tiles().Index()];
  }

  template <class F>
  __device__ __forceinline__ void ConvertKeys(int iteration) {
    // Keys are an iteration ahead of the values, but for a work tile's first.
    static_assert(C::kLoadsKeyOperands || C::kKeyStages == C::kValueStages);
    PackedPipelineState<C::kKeyStages> keys{values_.count};
    if (iteration > 0) keys.Advance();
    const int at = keys.Index(), code_stage = code_stages_.Index();
    Wait(&shared_.codes_full[code_stage], code_stages_.Phase());
    Wait(&shared_.key_empty[at], keys.Phase() ^ 1);
    if constexpr (C::kNibbleOperands) {
      ConvertNibbleKeys(shared_.codes[code_stage], shared_.key[at]);
    } else {
      ConvertRows<F>(shared_.codes[code_stage], shared_.key[at]);
    }
    if (warp_ == 0 && lane_ == 0) shared_.flags[at] = shared_.code_flags[code_stage];
    if (C::kNibbleOperands && iteration > 0) {
      // Consumers want them together with the values that are converted next, whose fence will do.
      ReturnCodes(code_stage);
    } else {
      Finish(code_stage, &shared_.key_full[at], nullptr);
    }
  }

  template <class F>
  __device__ __forceinline__ void ConvertValues(int iteration) {
    const int at = values_.Index(), code_stage = code_stages_.Index();
    Wait(&shared_.codes_full[code_stage], code_stages_.Phase());
    Wait(&shared_.value_empty[at], values_.Phase() ^ 1);
    if constexpr (C::kPerTokenScales) Wait(&shared_.scale_full[scales_.Index()], scales_.Phase());
    if constexpr (C::kNibbleOperands) {
      ConvertNibbleValues(shared_.codes[code_stage], shared_.value[at]);
    } else if constexpr (C::kTokenMajorV) {
      ConvertRows<F>(shared_.codes[code_stage], shared_.value[at]);
    } else {
      ConvertChannels<F>(shared_.codes[code_stage], shared_.value[at]);
    }
    bool found = false;
    // Every integer is finite.
    if constexpr (!C::kFiniteValues && !std::is_same_v<F, Format<DType::kInt8>>) {
      if (shared_.code_flags[code_stage] & kNeedsScrub) {
        // Other warps scrub the values than converted them.
        SyncNamed<32 * C::kHelperWarps>(kNamedBarrier);
        NanScrubber<C> scrubber(shared_);
        const int written = TileNow().k_len - (TileNow().last_kv_tile - iteration) * C::kKeys;
        found = scrubber.Scrub(at, written, warp_, C::kKeys / 16, C::kHelperWarps);
      }
    }
    if (lane_ == 0) shared_.nan_found[at][warp_] = found;
    uint64_t* key_full = nullptr;
    if (C::kNibbleOperands && iteration + 1 < TileNow().kv_tiles) {
      PackedPipelineState<C::kKeyStages> keys{values_.count};
      keys.Advance();
      key_full = &shared_.key_full[keys.Index()];
    }
    Finish(code_stage, &shared_.value_ready[at], key_full);
    values_.Advance();
    if constexpr (C::kPerTokenScales) {
      if (ArrivesForWarp(lane_)) Arrive(&shared_.scale_empty[scales_.Index()]);
      scales_.Advance();
    }
  }

  // Hands the operands over, and those that `others` stands for, and the codes' stage back.
  __device__ __forceinline__ void Finish(int code_stage, uint64_t* full, uint64_t* others) {
    FenceAsyncProxy();
    __syncwarp();
    if (ArrivesForWarp(lane_)) {
      if (others != nullptr) Arrive(others);
      Arrive(full);
      Arrive(&shared_.codes_empty[code_stage]);
    }
    code_stages_.Advance();
  }

  // Hands back a stage of codes alone.
  __device__ __forceinline__ void ReturnCodes(int code_stage) {
    ArriveWarp(&shared_.codes_empty[code_stage]);
    code_stages_.Advance();
  }

  // Has the warp's share of a KV tile's codes stored, `in` + 16 bytes a lane; loads are a batch
  // ahead. Batches go round between the warps, from one KV tile to the next.
  template <class Store>
  __device__ __forceinline__ void Convert(const uint8_t* in, const Store& store) {
    const int first = (warp_ + C::kHelperWarps - Turn()) % C::kHelperWarps;
    in += first * kBatch * kGroup;
    uint4 codes[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) codes[i] = *reinterpret_cast<const uint4*>(in + i * kGroup);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int batch = first + round * C::kHelperWarps;
      if (batch >= kBatches) break;
      in += C::kHelperWarps * kBatch * kGroup;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        store(batch, i, codes[i]);
        if (round + 1 < kRounds && batch + C::kHelperWarps < kBatches) {
          codes[i] = *reinterpret_cast<const uint4*>(in + i * kGroup);
        }
      }
    }
  }

  // Does so batch by batch: store(batch, codes, next) calls next(i) when it has used codes[i].
  template <class Store>
  __device__ __forceinline__ void ConvertBatches(const uint8_t* in, const Store& store) {
    const int first = (warp_ + C::kHelperWarps - Turn()) % C::kHelperWarps;
    in += first * kBatch * kGroup;
    uint4 codes[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) codes[i] = *reinterpret_cast<const uint4*>(in + i * kGroup);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int batch = first + round * C::kHelperWarps;
      if (batch >= kBatches) break;
      in += C::kHelperWarps * kBatch * kGroup;
      store(batch, codes, [&](int i) {
        if (round + 1 < kRounds && batch + C::kHelperWarps < kBatches) {
          codes[i] = *reinterpret_cast<const uint4*>(in + i * kGroup);
        }
      });
    }
  }

  // The warp that takes the next first batch: each conversion moves on by one.
  __device__ __forceinline__ int Turn() const {
    static_assert((C::kLoadsKeyOperands ? C::kValueStages : C::kCodeStages) == C::kHelperWarps);
    return C::kLoadsKeyOperands ? values_.Index() : code_stages_.Index();
  }

  // Converts tokens with their channels side by side. In each eight lanes, four take one token and
  // four another: their stores meet no bank twice.
  template <class F>
  __device__ __forceinline__ void ConvertRows(const uint8_t* codes, uint8_t* target) {
    constexpr int kPieces = C::kDim / 16, kTokens = 32 / kPieces;
    const int piece = lane_ % kPieces, token = (lane_ / kPieces) ^ (piece / 4);
    uint8_t* out = target + piece / 4 * C::kKeys * C::kSlice + token * C::kSlice;
    const int chunk = 16 * ((2 * (piece % 4)) ^ token);
    Convert(codes + token * C::kDim + 16 * piece, [&](int batch, int i, const uint4& v) {
      uint32_t w[8];
      F::Widen(v.x, &w[0], &w[1]);
      F::Widen(v.y, &w[2], &w[3]);
      F::Widen(v.z, &w[4], &w[5]);
      F::Widen(v.w, &w[6], &w[7]);
      const int at = chunk ^ (kTokens * i % 8 * 16);
      uint8_t* row = out + (batch * kBatch + i) * kTokens * C::kSlice;
      *reinterpret_cast<uint4*>(row + at) = make_uint4(w[0], w[1], w[2], w[3]);
      *reinterpret_cast<uint4*>(row + (at ^ 16)) = make_uint4(w[4], w[5], w[6], w[7]);
    });
  }

  // Converts channels with their 64 tokens side by side, in TokenSlot order: the low pairs of a
  // piece's words are tokens 0 .. 7, the high ones 8 .. 15. Values are multiplied with their
  // per-token scales, if there are any.
  template <class F>
  __device__ __forceinline__ void ConvertChannels(const uint8_t* codes, uint8_t* target) {
    const int piece = lane_ % 4, channel = lane_ / 4;
    uint8_t* out = target + channel * C::kSlice;
    const int at = 16 * ((2 * piece) ^ channel);
    uint4 low_scales, high_scales;
    Convert(codes + 16 * lane_, [&](int batch, int i, const uint4& v) {
      if (C::kPerTokenScales && i == 0) {
        const int token = (batch >= kBatches / 2 ? kBlockSize : 0) + 16 * piece;
        const auto* scales =
            reinterpret_cast<const uint4*>(shared_.value_scales[scales_.Index()] + token);
        low_scales = scales[0];
        high_scales = scales[1];
      }
      uint4 low, high;
      F::Widen(v.x, &low.x, &high.x);
      F::Widen(v.y, &low.y, &high.y);
      F::Widen(v.z, &low.z, &high.z);
      F::Widen(v.w, &low.w, &high.w);
      if constexpr (C::kPerTokenScales) {
        low = Scaled(low, low_scales);
        high = Scaled(high, high_scales);
      }
      uint8_t* row = out + (batch * kBatch + i) * 8 * C::kSlice;
      *reinterpret_cast<uint4*>(row + at) = low;
      *reinterpret_cast<uint4*>(row + (at ^ 16)) = high;
    });
  }

  // Converts tokens with their channels side by side for NibbleQuery: of a lane's 32 channels chunk
  // n has channels n and n + 4 of every eight. In each eight lanes, those of the second slice take
  // other tokens: their stores meet no bank twice.
  __device__ __forceinline__ void ConvertNibbleKeys(const uint8_t* codes, uint8_t* target) {
    constexpr int kPieces = C::kDim / 32, kTokens = 32 / kPieces;
    const int piece = lane_ % kPieces, token = (lane_ / kPieces) ^ (piece / 2 * 2);
    uint8_t* out = target + piece / 2 * C::kKeys * C::kSlice + token * C::kSlice;
    const int at = 16 * ((4 * (piece % 2)) ^ (token % 8));
    Convert(codes + token * C::kDim / 2 + 16 * piece, [&](int batch, int i, const uint4& v) {
      uint32_t a[4], b[4], c[4], d[4];
      NibblesToOperands(v.x, a);
      NibblesToOperands(v.y, b);
      NibblesToOperands(v.z, c);
      NibblesToOperands(v.w, d);
      uint8_t* row = out + (batch * kBatch + i) * kTokens * C::kSlice;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        *reinterpret_cast<uint4*>(row + (at ^ (16 * n))) = make_uint4(a[n], b[n], c[n], d[n]);
      }
    });
  }

  // Converts channels, two in a byte, with their 64 tokens side by side, as ConvertChannels does:
  // half of a lane's tokens after the other, as registers are short. Of each eight lanes four begin
  // with the low ones and four with the high ones, so that their stores meet no bank twice.
  __device__ __forceinline__ void ConvertNibbleValues(const uint8_t* codes, uint8_t* target) {
    const int piece = lane_ % 4, channel = lane_ / 4 * 2, begin = lane_ / 4 % 2;
    uint8_t* out = target + channel * C::kSlice;
    const int at = 16 * ((2 * piece + begin) ^ (channel % 8));
    ConvertBatches(codes + 16 * lane_, [&](int batch, const uint4(&v)[kBatch], const auto& next) {
      const int token = (batch >= kBatches / 2 ? kBlockSize : 0) + 16 * piece;
      const auto* scales =
          reinterpret_cast<const uint4*>(shared_.value_scales[scales_.Index()] + token);
      uint8_t* rows = out + batch * kBatch * 16 * C::kSlice;
      StoreNibbleValues(v, begin, scales[begin], rows, at, [](int) {});
      StoreNibbleValues(v, begin ^ 1, scales[begin ^ 1], rows, at ^ 16, next);
    });
  }

  // Low (half 0) or high tokens of a lane. Chunks of odd channels are swizzled the other way round.
  template <class Next>
  __device__ __forceinline__ static void StoreNibbleValues(const uint4 (&v)[kBatch], int half,
                                                           const uint4& scales, uint8_t* rows,
                                                           int at, const Next& next) {
    const TokenScales tokens[4] = {TokenScales(scales.x), TokenScales(scales.y),
                                   TokenScales(scales.z), TokenScales(scales.w)};
    const uint32_t bytes = half == 0 ? 0x4140 : 0x4342;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      uint4 x, y;
      ScaleNibbles(v[i].x, bytes, tokens[0], &x.x, &y.x);
      ScaleNibbles(v[i].y, bytes, tokens[1], &x.y, &y.y);
      ScaleNibbles(v[i].z, bytes, tokens[2], &x.z, &y.z);
      ScaleNibbles(v[i].w, bytes, tokens[3], &x.w, &y.w);
      next(i);
      uint8_t* even = rows + i * 16 * C::kSlice;
      *reinterpret_cast<uint4*>(even + at) = x;
      *reinterpret_cast<uint4*>(even + C::kSlice + (at ^ 16)) = y;
    }
  }

  __device__ __forceinline__ static uint32_t Scaled(uint32_t values, uint32_t scales) {
    const __half2 x = __hmul2(*reinterpret_cast<const __half2*>(&values),
                              *reinterpret_cast<const __half2*>(&scales));
    return *reinterpret_cast<const uint32_t*>(&x);
  }

  __device__ __forceinline__ static uint4 Scaled(const uint4& values, const uint4& scales) {
    return make_uint4(Scaled(values.x, scales.x), Scaled(values.y, scales.y),
                      Scaled(values.z, scales.z), Scaled(values.w, scales.w));
  }

  const AttentionParams& p_;
  Shared<C>& shared_;
  const int warp_;  // 0 .. kHelperWarps - 1
  const int lane_;
  PackedPipelineState<C::kValueStages> values_;
  PackedPipelineState<C::kCodeStages> code_stages_;
  PackedPipelineState<C::kScaleStages> scales_;
};

}  // namespace fastattn::cuda::wgmma_fp16
