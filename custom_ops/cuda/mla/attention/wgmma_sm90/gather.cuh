// Producer warps of sparse latent attention: they gather the tokens that a query names, turn codes
// into fp16, and write key tiles as wgmma takes them.
//
// A warp has 8 or 16 keys of each tile, in passes of four; eight lanes share a key. Codes go
// through registers: those of the next tile, or of the next two, are in flight while one is
// converted. bf16 rows are copied asynchronously. Masked keys are zeros, and their memory is not
// read.
#pragma once

#include <cstdint>

#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/mla/attention/wgmma_sm90/scaling.cuh"

namespace fastattn::cuda::mla_sm90 {

// What producers and consumers share of a stage.
template <int kDim>
struct Stages {
  uint8_t keys[kStages][kDim / 64 * kBlockBytes];
};

// Key tiles that are ready, and stages that are free.
struct StageBarriers {
  uint64_t full[kStages];
  uint64_t empty[kStages][2];    // of the keys 0 to 31, and of the others
  uint4 valid[kStages];          // byte i: bit k: key 4 * i + k of the tile exists
  float powers[kStages][kKeys];  // what fp16 keys were divided by; 0: masked
};

// Whether all keys of a tile exist.
__device__ __forceinline__ bool AllValid(const uint4& valid) {
  return (valid.x & valid.y & valid.z & valid.w) == 0x0F0F0F0Fu;
}

__device__ __forceinline__ uint4 LoadOnce(const uint8_t* address) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ uint32_t LoadOnce4(const uint8_t* address) {
  uint32_t x;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
  return x;
}

__device__ __forceinline__ uint2 LoadOnce8(const uint8_t* address) {
  uint2 x;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(x.x), "=r"(x.y)
               : "l"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ void StoreShared(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// One lane's share of a key: 16 codes of each 128, and 16 bytes of what follows.
struct KeyPart {
  uint4 codes[4];
  uint4 rope;
  uint2 scales;  // fp32 scale lane % 4, all exponents, or whether the key exists
};

// A scale as the sum of two fp16 numbers, the larger one in the low half.
__device__ __forceinline__ uint32_t SplitScale(float scale) {
  const float high = __half2float(__float2half_rn(scale));
  return PackPair<DType::kFloat16>(high, scale - high);
}

// 16 codes times a scale, in fp16. kExact: fp16 holds the scale. Else the product is rounded once
// but for what the product with the scale's smaller part loses.
template <bool kExact>
__device__ __forceinline__ void Dequantize(const uint4& codes, uint32_t scale, uint4 (&out)[2]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  const __half2 both = *reinterpret_cast<const __half2*>(&scale);
  const __half2 high = __low2half2(both), low = __high2half2(both);
  uint32_t pairs[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (16 * (i % 2)));
    const __half2 code(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3));
    const __half2 x = kExact ? __hmul2(code, high) : __hfma2(code, high, __hmul2(code, low));
    pairs[i] = *reinterpret_cast<const uint32_t*>(&x);
  }
  out[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  out[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

// 2^(exponent - 127); 255 is NaN.
__device__ __forceinline__ float PowerOfTwo(uint32_t exponent) {
  const uint32_t special = exponent == 0 || exponent == 255 ? 1u << 22 : 0;
  return __uint_as_float(exponent << 23 | special);
}

// kWarps gather the keys; kAhead tiles of codes are in flight.
template <int kDim, MlaFormat kFormat, int kWarps, int kAhead>
class Gather {
 public:
  __device__ __forceinline__ Gather(const Arguments& args, uint8_t* keys, StageBarriers& barriers,
                                    int thread)
      : args_(args), barriers_(barriers), lane_(thread % 32), first_row_(thread / 32 * kRows) {
    const int row = first_row_ + lane_ / 8, share = lane_ % 8;
    const uint32_t address = SharedAddress(keys) + row * 128;
    piece_ = address + ((share ^ (row & 7)) << 4);
    codes_ = address + share / 4 * kBlockBytes + (((2 * (share % 4) + share / 4) ^ (row & 7)) << 4);
    if constexpr (kFormat == MlaFormat::kFp8) {
      const StaticScales scales(args.p);
      multiplier_[0] = scales.codes[0];
      multiplier_[1] = scales.codes[1];
    }
  }

  // Gathers the keys of a work tile.
  __device__ __forceinline__ void Run(const Work& work) {
    if (work.begin >= work.end) return;
    if constexpr (kFormat == MlaFormat::kBf16) {
      RunCopies(work);
    } else {
      RunCodes(work);
    }
  }

 private:
  static constexpr int kStageBytes = kDim / 64 * kBlockBytes;
  static constexpr int kRows = kKeys / kWarps;  // of a warp
  static constexpr int kPasses = kRows / 4;

  // Of the key that this lane finds: row lane % kRows of the warp's. page < 0: masked.
  struct Place {
    int page;
    uint32_t row;
  };

  __device__ __forceinline__ int FindSlot(const Work& work, int tile) const {
    if (tile >= work.end) return -1;
    const bool extra = tile >= work.first_extra;
    const MlaSelection& s = extra ? args_.p.extra : args_.p.keys;
    const int at = (extra ? tile - work.first_extra : tile) * kKeys + first_row_ + lane_ % kRows;
    if (at >= (extra ? work.lengths[1] : work.lengths[0])) return -1;
    return __ldg(s.indices + work.token * s.index_stride + at);
  }

  __device__ __forceinline__ Place Locate(const Work& work, int tile, int slot) const {
    const bool extra = tile >= work.first_extra;
    const MlaCache& cache = extra ? args_.p.extra.cache : args_.p.keys.cache;
    const Divisor& size = extra ? args_.page_size[1] : args_.page_size[0];
    const int page = static_cast<int>(size.Quotient(static_cast<uint32_t>(slot)));
    const bool valid = slot >= 0 && page < cache.num_pages;
    return {valid ? page : -1, static_cast<uint32_t>(slot) - page * size.divisor};
  }

  // Address of the key of pass `pass` that this lane shares; null: masked.
  __device__ __forceinline__ const uint8_t* AddressOf(const Work& work, int tile,
                                                      const Place& place, int pass,
                                                      const uint8_t** scales) const {
    const int from = 4 * pass + lane_ / 8;
    const int page = __shfl_sync(kFullWarp, place.page, from);
    const uint32_t row = __shfl_sync(kFullWarp, place.row, from);
    if (page < 0) return nullptr;
    const MlaCache& cache = tile >= work.first_extra ? args_.p.extra.cache : args_.p.keys.cache;
    const uint8_t* base = static_cast<const uint8_t*>(cache.data) + page * cache.page_stride;
    if constexpr (kFormat == MlaFormat::kFp8x584) {
      *scales = base + cache.ScalePlane() + row * ScalePlaneBytes(kFormat);
    }
    return base + row * cache.row_stride;
  }

  __device__ __forceinline__ void Load(const Work& work, int tile, const Place& place, int pass,
                                       KeyPart* part) const {
    const uint8_t* scales = nullptr;
    const uint8_t* key = AddressOf(work, tile, place, pass, &scales);
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const int share = lane_ % 8 * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) part->codes[i] = zero;
    part->rope = zero;
    part->scales = make_uint2(0, 0);
    if (key != nullptr) LoadCodes(key, scales, share, part);
  }

  __device__ __forceinline__ void LoadCodes(const uint8_t* key, const uint8_t* scales, int share,
                                            KeyPart* part) const {
    constexpr bool kHalfTile = kFormat == MlaFormat::kFp8x584;  // 448 codes
#pragma unroll
    for (int i = 0; i < (kHalfTile ? 3 : 4); ++i) {
      part->codes[i] = LoadOnce(key + 128 * i + share);
    }
    if constexpr (kFormat == MlaFormat::kFp8x656) {
      part->scales.x = LoadOnce4(key + 512 + share / 16 % 4 * 4);
      part->rope = LoadOnce(key + 528 + share);
    } else if constexpr (kFormat == MlaFormat::kFp8x584) {
      if (share < 64) part->codes[3] = LoadOnce(key + 384 + share);
      part->rope = LoadOnce(key + 448 + share);
      part->scales = LoadOnce8(scales);
    } else {
      part->scales.x = 1;  // not masked
      if (kDim > 512 && share < 64) part->rope = LoadOnce(key + 512 + share);
    }
  }

  // Scale of this lane; of kFp8x656 there are four for eight lanes.
  __device__ __forceinline__ float OwnScale(const KeyPart& part, bool extra) const {
    if constexpr (kFormat == MlaFormat::kFp8x656) return __uint_as_float(part.scales.x);
    return part.scales.x == 0 ? 0.0f : extra ? multiplier_[1] : multiplier_[0];
  }

  // Split scale of the lane's codes i. own: that of OwnScale.
  __device__ __forceinline__ uint32_t ScaleOf(const KeyPart& part, int i, uint32_t own,
                                              float factor) const {
    if constexpr (kFormat == MlaFormat::kFp8x656) {
      return __shfl_sync(kFullWarp, own, (lane_ & ~7) + i);
    } else if constexpr (kFormat == MlaFormat::kFp8x584) {
      const uint32_t word = i < 2 ? part.scales.x : part.scales.y;
      const float scale = PowerOfTwo(word >> (16 * (i % 2) + 2 * (lane_ & 4)) & 0xFF);
      return PackPair<DType::kFloat16>(scale * factor, 0.0f);
    } else {
      return own;
    }
  }

  // Converts and stores codes i of a key, 32 bytes in a block. The lanes of a key would meet in the
  // same banks if all began with the first half.
  template <bool kExact>
  __device__ __forceinline__ void PutCodes(uint32_t address, int i, uint4 codes,
                                           uint32_t scale) const {
    if (lane_ & 4) codes = make_uint4(codes.z, codes.w, codes.x, codes.y);
    uint4 x[2];
    Dequantize<kExact>(codes, scale, x);
    StoreShared(address + i * (2 * kBlockBytes), x[0]);
    StoreShared((address ^ 16) + i * (2 * kBlockBytes), x[1]);
  }

  // All codes of a pass.
  template <bool kExact>
  __device__ __forceinline__ void PutAllCodes(uint32_t address, const KeyPart& part, uint32_t own,
                                              float factor) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t scale = ScaleOf(part, i, own, factor);
      if (kFormat == MlaFormat::kFp8x584 && i == 3 && (lane_ & 4)) break;  // the rope's place
      PutCodes<kExact>(address, i, part.codes[i], scale);
    }
    if constexpr (kFormat == MlaFormat::kFp8 && kDim > 512) {
      if ((lane_ & 4) == 0) PutCodes<kExact>(address, 4, part.rope, own);
    }
  }

  // What a key is multiplied with; tells the consumers its reciprocal.
  __device__ __forceinline__ float FactorOf(const KeyPart& part, bool extra, int pass) const {
    // The exponent field of a bound of the key's values; whether there is anything but zeros.
    uint32_t exponent, largest = 0;
    if constexpr (kFormat == MlaFormat::kFp8) {
      exponent = ExponentField(OwnScale(part, extra) * 448.0f);
    } else {
      if constexpr (kFormat == MlaFormat::kFp8x656) {
        largest = part.scales.x & 0x7FFFFFFFu;
#pragma unroll
        for (int i = 1; i < 4; i *= 2) {
          largest = max(largest, __shfl_xor_sync(kFullWarp, largest, i));  // NaN is the largest
        }
        exponent = ExponentField(__uint_as_float(largest) * 448.0f);
      } else {
        largest = __vmaxu4(part.scales.x, part.scales.y & 0x00FFFFFFu);
        largest = __vmaxu4(largest, largest >> 16);
        largest = max(largest & 0xFF, largest >> 8 & 0xFF);
        exponent = min(largest + 8, 255u);
      }
      uint32_t magnitude = MaxMagnitude(part.rope);
#pragma unroll
      for (int i = 1; i < 8; i *= 2) {
        magnitude = max(magnitude, __shfl_xor_sync(kFullWarp, magnitude, i));
      }
      largest |= magnitude;
      exponent = max(exponent, magnitude >> 7);
    }
    const float power = KeyPower(exponent);
    if (lane_ % 8 == 0) {
      const bool masked = kFormat == MlaFormat::kFp8 ? part.scales.x == 0 : largest == 0;
      barriers_.powers[stage_][first_row_ + 4 * pass + lane_ / 8] = masked ? 0.0f : power;
    }
    return Reciprocal(power);
  }

  __device__ __forceinline__ void Convert(bool extra, const KeyPart& part, int pass) const {
    const uint32_t rows = RowsOf(pass);
    const uint32_t codes = (codes_ ^ Turn(pass)) + rows;
    const float factor = FactorOf(part, extra, pass);
    if constexpr (kFormat == MlaFormat::kFp8x584) {
      PutAllCodes<true>(codes, part, 0, factor);
    } else {
      const uint32_t own = SplitScale(OwnScale(part, extra) * factor);
      if (__all_sync(kFullWarp, (own & 0x7FFF0000u) == 0)) {  // such as powers of two
        PutAllCodes<true>(codes, part, own, factor);
      } else {
        PutAllCodes<false>(codes, part, own, factor);
      }
    }
    if constexpr (kFormat != MlaFormat::kFp8) {
      constexpr int kBlock = kFormat == MlaFormat::kFp8x584 ? 7 : 8;
      StoreShared((piece_ ^ Turn(pass)) + rows + kBlock * kBlockBytes, ToHalf(part.rope, factor));
    }
  }

  // Where the keys of a pass begin. A pass is four rows, half a swizzle pattern: in every other one
  // the lanes' places are turned.
  __device__ __forceinline__ uint32_t RowsOf(int pass) const {
    return stage_ * kStageBytes + 512 * pass;
  }
  static __device__ __forceinline__ uint32_t Turn(int pass) { return 64 * (pass % 2); }

  __device__ __forceinline__ uint32_t ValidBits(const Place& place) const {
    return __ballot_sync(kFullWarp, place.page >= 0);
  }

  // valid: bit i: row i of the warp's exists.
  __device__ __forceinline__ void StoreValid(uint32_t valid) const {
    if (lane_ < kRows / 4) {
      reinterpret_cast<uint8_t*>(&barriers_.valid[stage_])[first_row_ / 4 + lane_] =
          static_cast<uint8_t>(valid >> (4 * lane_) & 15);
    }
  }

  __device__ __forceinline__ void Advance() {
    stage_ ^= 1;
    parity_ ^= stage_ == 0;
  }

  __device__ __forceinline__ void Publish(uint32_t valid) {
    StoreValid(valid);
    FenceAsyncProxy();
    ArriveWarp(&barriers_.full[stage_]);
    Advance();
  }

  __device__ __forceinline__ void RunCodes(const Work& work) {
    KeyPart parts[kAhead][kPasses];
    uint32_t valid[kAhead];
    int slots[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) slots[a] = FindSlot(work, work.begin + a);
    int slot = FindSlot(work, work.begin + kAhead);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int tile = work.begin + a;
      const Place place = Locate(work, tile, slots[a]);
      valid[a] = ValidBits(place);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) Load(work, tile, place, i, &parts[a][i]);
    }
    for (int first = work.begin; first < work.end; first += kAhead) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int tile = first + a, later = tile + kAhead;
        if (tile >= work.end) break;
        const Place place = Locate(work, later, slot);
        slot = FindSlot(work, later + 1);
        Wait(&barriers_.empty[stage_][first_row_ / 32], parity_);
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          Convert(tile >= work.first_extra, parts[a][i], i);
          Load(work, later, place, i, &parts[a][i]);
          __syncwarp();  // or ptxas has the loads of all passes wait for all conversions
        }
        Publish(valid[a]);
        valid[a] = ValidBits(place);
      }
    }
  }

  __device__ __forceinline__ void RunCopies(const Work& work) {
    int next_slot = FindSlot(work, work.begin);
    for (int tile = work.begin; tile < work.end; ++tile) {
      const Place place = Locate(work, tile, next_slot);
      next_slot = FindSlot(work, tile + 1);
      Wait(&barriers_.empty[stage_][first_row_ / 32], parity_);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int share = lane_ % 8;
        const uint8_t* none = nullptr;
        const uint8_t* key = AddressOf(work, tile, place, pass, &none);
        const bool valid = key != nullptr;
        // Any memory of the cache will do for an address that is not read.
        key = valid ? key + 16 * share : static_cast<const uint8_t*>(args_.p.keys.cache.data);
        const int step = valid ? 128 : 0;
        const uint32_t target = (piece_ ^ Turn(pass)) + RowsOf(pass);
#pragma unroll
        for (int i = 0; i < kDim / 64; ++i) {
          CopyOrZero(target + i * kBlockBytes, key + step * i, valid);
        }
      }
      WaitCopies();
      Publish(ValidBits(place));
    }
  }

  const Arguments& args_;
  StageBarriers& barriers_;
  int stage_ = 0;
  uint32_t parity_ = 1;  // a fresh barrier's phase before the first counts as complete
  int lane_;
  int first_row_;   // of this warp in a tile
  uint32_t piece_;  // where 16 bytes of this lane's key go: stage 0, pass 0, block 0
  uint32_t codes_;  // where its first 16 codes go, the half that it stores first
  float multiplier_[2] = {1.0f, 1.0f};
};

}  // namespace fastattn::cuda::mla_sm90
