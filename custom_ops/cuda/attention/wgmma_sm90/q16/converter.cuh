// Converts codes to 16-bit operands: three warps of the producer warpgroup share each KV tile's
// codes of V and, where they are no operands as they lie, of K. Where a KV tile's come in parts,
// each part is one warp's.
#pragma once

#include <type_traits>

#include "common/numeric.h"
#include "cuda/attention/shared/format.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/nan_scrub.cuh"
#include "cuda/attention/wgmma_sm90/q16/nibbles.cuh"
#include "cuda/attention/wgmma_sm90/q16/tile_factors.cuh"
#include "cuda/common/mbarrier.cuh"

namespace fastattn::cuda::wgmma_q16 {

template <class C>
class Converter {
 public:
  __device__ Converter(const Arguments& arguments, Shared<C>& shared)
      : p_(arguments.p), shared_(shared), warp_(threadIdx.x / 32 - 1), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    if constexpr (C::kKeyCodeOperands) {
      RunFormat<Format<C::kElement>>();
    } else if constexpr (C::kNibbles) {
      RunFormat<Format<DType::kInt8>>();  // every code is finite, too
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
  static constexpr int kBatch = C::kPerTokenScales || C::kLarge ? 2 : 4;
  static constexpr int kGroups = C::kCodeBytes / kGroup;  // of a stage
  static constexpr int kBatches = kGroups / kBatch;
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
    const int at = keys.Index();
    Wait(&shared_.key_empty[at], keys.Phase() ^ 1);
    int flags;
    if constexpr (C::kNibbleOperands) {
      flags = ConvertNibbleKeys(shared_.key[at]);
    } else if constexpr (C::kNibbles) {
      flags = ConvertNibbleRows(shared_.key[at]);
    } else {
      flags = ConvertRows<F>(shared_.key[at]);
    }
    if (warp_ == 0 && lane_ == 0) shared_.flags[at] = flags;
    if (C::kNibbleOperands && iteration > 0) {
      // Consumers want them together with the values that are converted next, whose fence will do.
      ReturnCodes();
    } else {
      Finish(&shared_.key_full[at], nullptr);
    }
  }

  template <class F>
  __device__ __forceinline__ void ConvertValues(int iteration) {
    const int at = values_.Index();
    Wait(&shared_.value_empty[at], values_.Phase() ^ 1);
    if constexpr (C::kPerTokenScales) Wait(&shared_.scale_full[scales_.Index()], scales_.Phase());
    int flags;
    if constexpr (C::kNibbleOperands) {
      flags = ConvertNibbleValues(shared_.value[at]);
    } else if constexpr (C::kNibbles) {
      flags = ConvertNibbleChannels(shared_.value[at]);
    } else if constexpr (C::kTokenMajorV) {
      flags = ConvertRows<F>(shared_.value[at]);
    } else {
      flags = ConvertChannels<F>(shared_.value[at]);
    }
    bool found = false;
    // Every int8 code is finite.
    if constexpr (!std::is_same_v<F, Format<DType::kInt8>>) {
      if (flags & kNeedsScrub) {
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
    Finish(&shared_.value_ready[at], key_full);
    values_.Advance();
    if constexpr (C::kPerTokenScales) {
      if (ArrivesForWarp(lane_)) Arrive(&shared_.scale_empty[scales_.Index()]);
      scales_.Advance();
    }
  }

  // Hands the operands over, and those that `others` stands for, and the codes' stage back.
  __device__ __forceinline__ void Finish(uint64_t* full, uint64_t* others) {
    FenceAsyncProxy();
    __syncwarp();
    if (ArrivesForWarp(lane_)) {
      if (others != nullptr) Arrive(others);
      Arrive(full);
      if constexpr (C::kCodeParts == 1) Arrive(&shared_.codes_empty[code_stages_.Index()]);
    }
    if constexpr (C::kCodeParts == 1) code_stages_.Advance();
  }

  // Hands back a stage of codes alone.
  __device__ __forceinline__ void ReturnCodes() {
    ArriveWarp(&shared_.codes_empty[code_stages_.Index()]);
    code_stages_.Advance();
  }

  // Has the warp's share of a KV tile's codes stored, 16 bytes a lane of each group, `offset` of
  // this one; loads are a batch ahead. Returns the codes' flags.
  template <int kFirst = 0, class Store>
  __device__ __forceinline__ int Convert(int offset, const Store& store) {
    if constexpr (C::kCodeParts > 1) {
      return ConvertParts<kFirst>(offset, store);
    } else {
      return ConvertWhole(offset, store);
    }
  }

  template <class Store>
  __device__ __forceinline__ int ConvertWhole(int offset, const Store& store) {
    return ConvertBatches(offset, [&](int batch, const uint4(&codes)[kBatch], const auto& next) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        store(batch * kBatch + i, i, codes[i]);
        next(i);
      }
    });
  }

  // Does so batch by batch: store(batch, codes, next) calls next(i) when it has used codes[i].
  template <class Store>
  __device__ __forceinline__ int ConvertBatches(int offset, const Store& store) {
    const int code_stage = code_stages_.Index();
    Wait(&shared_.codes_full[code_stage], code_stages_.Phase());
    // Batches go round between the warps, from one KV tile to the next.
    const int first = (warp_ + C::kHelperWarps - Turn()) % C::kHelperWarps;
    const uint8_t* in = shared_.codes[code_stage] + offset + first * kBatch * kGroup;
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
    return shared_.code_flags[code_stage];
  }

  // Does so part by part, each of which one warp converts; they go round, from kFirst on. All warps
  // wait for every part and hand its stage back: a parity tells phases apart only to who saw the
  // one before.
  template <int kFirst, class Store>
  __device__ __forceinline__ int ConvertParts(int offset, const Store& store) {
    int flags = 0;
#pragma unroll 1
    for (int part = 0; part < C::kCodeParts; ++part) {
      const int at = code_stages_.Index();
      Wait(&shared_.codes_full[at], code_stages_.Phase());
      if ((part + kFirst) % C::kHelperWarps == warp_) {
        const uint8_t* in = shared_.codes[at] + offset;
        uint4 codes[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          codes[i] = *reinterpret_cast<const uint4*>(in + i * kGroup);
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          store(part * kGroups + i, i, codes[i % kBatch]);
          if (i + kBatch < kGroups) {
            codes[i % kBatch] = *reinterpret_cast<const uint4*>(in + (i + kBatch) * kGroup);
          }
        }
      }
      flags = shared_.code_flags[at];
      __syncwarp();
      if (ArrivesForWarp(lane_)) Arrive(&shared_.codes_empty[at]);
      code_stages_.Advance();
    }
    return flags;
  }

  // The warp that takes the next first batch: each conversion moves on by one.
  __device__ __forceinline__ int Turn() const {
    static_assert((C::kLoadsKeyOperands ? C::kValueStages : C::kCodeStages) == C::kHelperWarps);
    return C::kLoadsKeyOperands ? values_.Index() : code_stages_.Index();
  }

  // Converts tokens with their channels side by side. In each eight lanes, four take one token and
  // four another, of another slice: their stores meet no bank twice, nor do their loads.
  template <class F>
  __device__ __forceinline__ int ConvertRows(uint8_t* target) {
    constexpr int kPieces = C::kDim / 16, kTokens = 32 / kPieces;
    int piece = lane_ % kPieces, token = (lane_ / kPieces) ^ (piece / 4);
    if constexpr (C::kLarge) {
      token = lane_ / 4 % kTokens;
      piece = ((lane_ / 8) ^ token) * 4 + lane_ % 4;
    }
    uint8_t* out = target + piece / 4 * C::kKeys * C::kSlice + token * C::kSlice;
    const int chunk = 16 * ((2 * (piece % 4)) ^ token);
    return Convert(token * C::kDim + 16 * piece, [&](int group, int i, const uint4& v) {
      uint32_t w[8];
      F::Widen(v.x, &w[0], &w[1]);
      F::Widen(v.y, &w[2], &w[3]);
      F::Widen(v.z, &w[4], &w[5]);
      F::Widen(v.w, &w[6], &w[7]);
      const int at = chunk ^ (kTokens * i % 8 * 16);
      uint8_t* row = out + group * kTokens * C::kSlice;
      *reinterpret_cast<uint4*>(row + at) = make_uint4(w[0], w[1], w[2], w[3]);
      *reinterpret_cast<uint4*>(row + (at ^ 16)) = make_uint4(w[4], w[5], w[6], w[7]);
    });
  }

  // Converts channels with their 64 tokens side by side, in TokenSlot order: the low pairs of a
  // piece's words are tokens 0 .. 7, the high ones 8 .. 15. Values are multiplied with their
  // per-token scales, if there are any.
  template <class F>
  __device__ __forceinline__ int ConvertChannels(uint8_t* target) {
    const int piece = lane_ % 4, channel = lane_ / 4;
    uint8_t* out = target + channel * C::kSlice;
    const int at = 16 * ((2 * piece) ^ channel);
    uint4 low_scales, high_scales;
    return Convert<1>(16 * lane_, [&](int group, int i, const uint4& v) {
      if (C::kPerTokenScales && i == 0) {
        const int token = FirstToken(group) + 16 * piece;
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
      uint8_t* row = out + group * 8 * C::kSlice;
      *reinterpret_cast<uint4*>(row + at) = low;
      *reinterpret_cast<uint4*>(row + (at ^ 16)) = high;
    });
  }

  // Converts tokens with their channels side by side for NibbleQuery: of a lane's 32 channels chunk
  // n has channels n and n + 4 of every eight. In each eight lanes, those of the second slice take
  // other tokens: their stores meet no bank twice.
  __device__ __forceinline__ int ConvertNibbleKeys(uint8_t* target) {
    constexpr int kPieces = C::kDim / 32, kTokens = 32 / kPieces;
    const int piece = lane_ % kPieces, token = (lane_ / kPieces) ^ (piece / 2 * 2);
    uint8_t* out = target + piece / 2 * C::kKeys * C::kSlice + token * C::kSlice;
    const int at = 16 * ((4 * (piece % 2)) ^ (token % 8));
    return Convert(token * C::kDim / 2 + 16 * piece, [&](int group, int, const uint4& v) {
      uint32_t a[4], b[4], c[4], d[4];
      NibblesToOperands(v.x, a);
      NibblesToOperands(v.y, b);
      NibblesToOperands(v.z, c);
      NibblesToOperands(v.w, d);
      uint8_t* row = out + group * kTokens * C::kSlice;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        *reinterpret_cast<uint4*>(row + (at ^ (16 * n))) = make_uint4(a[n], b[n], c[n], d[n]);
      }
    });
  }

  // Converts channels, two in a byte, with their 64 tokens side by side, as ConvertChannels does:
  // half of a lane's tokens after the other, as registers are short. Of each eight lanes four begin
  // with the low ones and four with the high ones, so that their stores meet no bank twice.
  __device__ __forceinline__ int ConvertNibbleValues(uint8_t* target) {
    const int piece = lane_ % 4, channel = lane_ / 4 * 2, begin = lane_ / 4 % 2;
    uint8_t* out = target + channel * C::kSlice;
    const int at = 16 * ((2 * piece + begin) ^ (channel % 8));
    return ConvertBatches(16 * lane_, [&](int batch, const uint4(&v)[kBatch], const auto& next) {
      const int token = FirstToken(batch * kBatch) + 16 * piece;
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

  // Converts 4-bit codes of tokens of a large head, as ConvertRows does. Eight lanes take four
  // tokens: their stores meet no bank twice.
  __device__ __forceinline__ int ConvertNibbleRows(uint8_t* target) {
    constexpr int kTokens = 4;
    static_assert(C::kDim == 256 && kGroups % 2 == 0);
    const int token = lane_ / 2 % kTokens, piece = lane_ % 2 + lane_ / 8 * 2;
    uint8_t* out = target + piece / 2 * C::kKeys * C::kSlice + token * C::kSlice;
    const int chunk = 16 * ((piece % 2 * 4) ^ token);
    return Convert(token * C::kDim / 2 + 16 * piece, [&](int group, int i, const uint4& v) {
      uint8_t* row = out + group * kTokens * C::kSlice;
      const int at = chunk ^ (kTokens * i % 8 * 16);
      *reinterpret_cast<uint4*>(row + at) = NibblesToHalves(v.x);
      *reinterpret_cast<uint4*>(row + (at ^ 16)) = NibblesToHalves(v.y);
      *reinterpret_cast<uint4*>(row + (at ^ 32)) = NibblesToHalves(v.z);
      *reinterpret_cast<uint4*>(row + (at ^ 48)) = NibblesToHalves(v.w);
    });
  }

  // ConvertChannels of bytes that are two channels each.
  __device__ __forceinline__ int ConvertNibbleChannels(uint8_t* target) {
    const int piece = lane_ % 4, channel = lane_ / 4 * 2;
    uint8_t* out = target + channel * C::kSlice;
    const int at = 16 * ((2 * piece) ^ (channel % 8));
    uint4 low_scales, high_scales;
    return Convert<1>(16 * lane_, [&](int group, int i, const uint4& v) {
      if (i == 0) {
        const int token = FirstToken(group) + 16 * piece;
        const auto* scales =
            reinterpret_cast<const uint4*>(shared_.value_scales[scales_.Index()] + token);
        low_scales = scales[0];
        high_scales = scales[1];
      }
      uint8_t* even = out + group * 16 * C::kSlice;
      uint8_t* odd = even + C::kSlice;  // whose chunks are swizzled the other way round
      uint4 x, y;
      NibblesToHalves<false>(v.x, &x.x, &y.x);
      NibblesToHalves<false>(v.y, &x.y, &y.y);
      NibblesToHalves<false>(v.z, &x.z, &y.z);
      NibblesToHalves<false>(v.w, &x.w, &y.w);
      *reinterpret_cast<uint4*>(even + at) = Scaled(x, low_scales);
      *reinterpret_cast<uint4*>(odd + (at ^ 16)) = Scaled(y, low_scales);
      NibblesToHalves<true>(v.x, &x.x, &y.x);
      NibblesToHalves<true>(v.y, &x.y, &y.y);
      NibblesToHalves<true>(v.z, &x.z, &y.z);
      NibblesToHalves<true>(v.w, &x.w, &y.w);
      *reinterpret_cast<uint4*>(even + (at ^ 16)) = Scaled(x, high_scales);
      *reinterpret_cast<uint4*>(odd + at) = Scaled(y, high_scales);
    });
  }

  // First token of a group's block in the KV tile.
  __device__ __forceinline__ static int FirstToken(int group) {
    return C::kBlocks == 2 && group >= kGroups / 2 ? kBlockSize : 0;
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

}  // namespace fastattn::cuda::wgmma_q16
