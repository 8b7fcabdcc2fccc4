// Producer warps of sparse latent attention: they gather the tokens that a query names, turn codes
// into bf16, and write key tiles as wgmma takes them.
//
// A warp has eight keys of each tile, in two passes of four; eight lanes share a key. Codes go
// through registers, so that the loads of the next pass are in flight while one is converted; bf16
// rows are copied asynchronously. Masked keys are zeros, and their memory is not read.
#pragma once

#include <cstdint>

#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/mla/attention/wgmma_sm90/work.cuh"

namespace fastattn::cuda::mla_sm90 {

// What producers and consumers share of a stage.
template <int kDim>
struct Stages {
  uint8_t keys[kStages][kDim / 64 * kBlockBytes];
};

// Key tiles that are ready, and stages that are free.
struct StageBarriers {
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t valid[kStages];  // bit i: key i of the tile exists
};

__device__ __forceinline__ uint4 LoadOnce(const uint8_t* address) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(address));
  return x;
}

__device__ __forceinline__ uint2 LoadOnce8(const uint8_t* address) {
  uint2 x;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(x.x), "=r"(x.y)
               : "l"(address));
  return x;
}

// 16 bytes into shared memory, zeros unless `valid`.
__device__ __forceinline__ void CopyOrZero(uint32_t target, const uint8_t* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
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
  uint4 scales;
};

// 16 codes times a scale, as bf16.
__device__ __forceinline__ void Dequantize(const uint4& codes, float scale, uint4 (&out)[2]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t pairs[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x[4];
    CodesToFloat<DType::kE4M3>(words[i], x);
    pairs[2 * i] = PackPair<DType::kBFloat16>(x[0] * scale, x[1] * scale);
    pairs[2 * i + 1] = PackPair<DType::kBFloat16>(x[2] * scale, x[3] * scale);
  }
  out[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  out[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

// 2^(exponent - 127); 255 is NaN.
__device__ __forceinline__ float PowerOfTwo(uint32_t exponent) {
  const uint32_t special = exponent == 0 || exponent == 255 ? 1u << 22 : 0;
  return __uint_as_float(exponent << 23 | special);
}

template <int kDim, MlaFormat kFormat>
class Gather {
 public:
  __device__ __forceinline__ Gather(const Arguments& args, const Work& work, uint8_t* keys,
                                    StageBarriers& barriers, int thread)
      : args_(args),
        work_(work),
        barriers_(barriers),
        keys_(SharedAddress(keys)),
        warp_(thread / 32),
        lane_(thread % 32) {
    if constexpr (kFormat == MlaFormat::kFp8) {
      const StaticScales scales(args.p);
      multiplier_[0] = scales.codes[0];
      multiplier_[1] = scales.codes[1];
    }
  }

  __device__ __forceinline__ void Run() {
    if (work_.begin >= work_.end) return;
    if constexpr (kFormat == MlaFormat::kBf16) {
      RunCopies();
    } else {
      RunCodes();
    }
  }

 private:
  static constexpr int kStageBytes = kDim / 64 * kBlockBytes;

  // Of the key that this lane finds: row lane % 8 of the warp's. page < 0: masked.
  struct Place {
    int page;
    uint32_t row;
  };

  __device__ __forceinline__ int FindSlot(int tile) const {
    if (tile >= work_.end) return -1;
    const bool extra = tile >= work_.first_extra;
    const MlaSelection& s = extra ? args_.p.extra : args_.p.keys;
    const int at = (extra ? tile - work_.first_extra : tile) * kKeys + 8 * warp_ + lane_ % 8;
    if (at >= (extra ? work_.lengths[1] : work_.lengths[0])) return -1;
    return __ldg(s.indices + work_.token * s.index_stride + at);
  }

  __device__ __forceinline__ Place Locate(int tile, int slot) const {
    const bool extra = tile >= work_.first_extra;
    const MlaCache& cache = extra ? args_.p.extra.cache : args_.p.keys.cache;
    const Divisor& size = extra ? args_.page_size[1] : args_.page_size[0];
    const int page = static_cast<int>(size.Quotient(static_cast<uint32_t>(slot)));
    const bool valid = slot >= 0 && page < cache.num_pages;
    return {valid ? page : -1, static_cast<uint32_t>(slot) - page * size.divisor};
  }

  // Address of the key of pass `pass` that this lane shares; null: masked.
  __device__ __forceinline__ const uint8_t* AddressOf(int tile, const Place& place, int pass,
                                                      const uint8_t** scales) const {
    const int from = 4 * pass + lane_ / 8;
    const int page = __shfl_sync(kFullWarp, place.page, from);
    const uint32_t row = __shfl_sync(kFullWarp, place.row, from);
    if (page < 0) return nullptr;
    const MlaCache& cache =
        tile >= work_.first_extra ? args_.p.extra.cache : args_.p.keys.cache;
    const uint8_t* base = static_cast<const uint8_t*>(cache.data) + page * cache.page_stride;
    if constexpr (kFormat == MlaFormat::kFp8x584) {
      *scales = base + cache.ScalePlane() + row * kMlaScalePlaneBytes;
    }
    return base + row * cache.row_stride;
  }

  __device__ __forceinline__ void Load(int tile, const Place& place, int pass,
                                       KeyPart* part) const {
    const uint8_t* scales = nullptr;
    const uint8_t* key = AddressOf(tile, place, pass, &scales);
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) part->codes[i] = zero;
    part->rope = part->scales = zero;
    if (key == nullptr) return;
    const int part16 = lane_ % 8 * 16;
    constexpr bool kHalfTile = kFormat == MlaFormat::kFp8x584;  // 448 codes
#pragma unroll
    for (int i = 0; i < (kHalfTile ? 3 : 4); ++i) {
      part->codes[i] = LoadOnce(key + 128 * i + part16);
    }
    if constexpr (kFormat == MlaFormat::kFp8x656) {
      part->scales = LoadOnce(key + 512);
      part->rope = LoadOnce(key + 528 + part16);
    } else if constexpr (kFormat == MlaFormat::kFp8x584) {
      if (part16 < 64) part->codes[3] = LoadOnce(key + 384 + part16);
      part->rope = LoadOnce(key + 448 + part16);
      const uint2 exponents = LoadOnce8(scales);
      part->scales.x = exponents.x;
      part->scales.y = exponents.y;
    } else {
      part->scales.x = 1;  // not masked
      if (kDim > 512 && part16 < 64) part->rope = LoadOnce(key + 512 + part16);
    }
  }

  // Scale of the lane's codes i.
  __device__ __forceinline__ float ScaleOf(const KeyPart& part, int i, int tile) const {
    if constexpr (kFormat == MlaFormat::kFp8x656) {
      const uint32_t words[4] = {part.scales.x, part.scales.y, part.scales.z, part.scales.w};
      return __uint_as_float(words[i]);
    } else if constexpr (kFormat == MlaFormat::kFp8x584) {
      const uint32_t word = i < 2 ? part.scales.x : part.scales.y;
      return PowerOfTwo(word >> (16 * (i % 2) + 2 * (lane_ & 4)) & 0xFF);
    } else {
      return part.scales.x == 0                ? 0.0f
             : tile >= work_.first_extra ? multiplier_[1]
                                         : multiplier_[0];
    }
  }

  // Stores what became of 16 codes, `chunk` of 16 codes in a row. The lanes of a key would meet in
  // the same banks if all began with the first half.
  __device__ __forceinline__ void StoreCodes(uint32_t row_address, int row, int chunk,
                                             const uint4 (&x)[2]) const {
    const uint32_t block = row_address + chunk / 4 * kBlockBytes;
    const int first = chunk / 4 & 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int half = i ^ first;
      const int piece = 2 * (chunk % 4) + half;
      StoreShared(block + ((piece ^ (row & 7)) << 4), half ? x[1] : x[0]);
    }
  }

  __device__ __forceinline__ void Convert(int tile, const KeyPart& part, int pass,
                                          int stage) const {
    const int row = 8 * warp_ + 4 * pass + lane_ / 8;
    const uint32_t row_address = keys_ + stage * kStageBytes + row * 128;
    const int share = lane_ % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kFormat == MlaFormat::kFp8x584 && i == 3 && share >= 4) break;
      uint4 x[2];
      Dequantize(part.codes[i], ScaleOf(part, i, tile), x);
      StoreCodes(row_address, row, 8 * i + share, x);
    }
    if constexpr (kFormat == MlaFormat::kFp8) {
      if (kDim > 512 && share < 4) {
        uint4 x[2];
        Dequantize(part.rope, ScaleOf(part, 4, tile), x);
        StoreCodes(row_address, row, 32 + share, x);
      }
    } else {
      constexpr int kBlock = kFormat == MlaFormat::kFp8x584 ? 7 : 8;
      StoreShared(row_address + kBlock * kBlockBytes + ((share ^ (row & 7)) << 4), part.rope);
    }
  }

  __device__ __forceinline__ void Publish(const Place& place, int stage) const {
    const uint32_t valid = __ballot_sync(kFullWarp, place.page >= 0);
    if (lane_ == 0) {
      reinterpret_cast<uint8_t*>(&barriers_.valid[stage])[warp_] = static_cast<uint8_t>(valid);
    }
    FenceAsyncProxy();
    ArriveWarp(&barriers_.full[stage]);
  }

  __device__ __forceinline__ void RunCodes() const {
    Place place = Locate(work_.begin, FindSlot(work_.begin));
    int next_slot = FindSlot(work_.begin + 1);
    KeyPart first, second;
    Load(work_.begin, place, 0, &first);
    int stage = 0;
    uint32_t parity = 1;  // a fresh barrier's phase before the first counts as complete
    for (int tile = work_.begin; tile < work_.end; ++tile) {
      Load(tile, place, 1, &second);
      const Place next = Locate(tile + 1, next_slot);
      next_slot = FindSlot(tile + 2);
      Wait(&barriers_.empty[stage], parity);
      Convert(tile, first, 0, stage);
      Load(tile + 1, next, 0, &first);
      Convert(tile, second, 1, stage);
      Publish(place, stage);
      place = next;
      stage ^= 1;
      parity ^= stage == 0;
    }
  }

  __device__ __forceinline__ void RunCopies() const {
    int next_slot = FindSlot(work_.begin);
    int stage = 0;
    uint32_t parity = 1;
    for (int tile = work_.begin; tile < work_.end; ++tile) {
      const Place place = Locate(tile, next_slot);
      next_slot = FindSlot(tile + 1);
      Wait(&barriers_.empty[stage], parity);
#pragma unroll
      for (int pass = 0; pass < 2; ++pass) {
        const int row = 8 * warp_ + 4 * pass + lane_ / 8, share = lane_ % 8;
        const uint8_t* none = nullptr;
        const uint8_t* key = AddressOf(tile, place, pass, &none);
        const bool valid = key != nullptr;
        if (!valid) key = static_cast<const uint8_t*>(args_.p.keys.cache.data);
        uint32_t target =
            keys_ + stage * kStageBytes + row * 128 + ((share ^ (row & 7)) << 4);
#pragma unroll
        for (int i = 0; i < kDim / 64; ++i) {
          CopyOrZero(target + i * kBlockBytes, valid ? key + 128 * i + 16 * share : key, valid);
        }
      }
      asm volatile("cp.async.wait_all;" ::: "memory");
      Publish(place, stage);
      stage ^= 1;
      parity ^= stage == 0;
    }
  }

  const Arguments& args_;
  const Work& work_;
  StageBarriers& barriers_;
  uint32_t keys_;
  int warp_, lane_;
  float multiplier_[2] = {1.0f, 1.0f};
};

}  // namespace fastattn::cuda::mla_sm90
