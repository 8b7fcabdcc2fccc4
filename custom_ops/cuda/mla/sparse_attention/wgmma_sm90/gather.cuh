// Producer warps of sparse latent attention: they gather the tokens that a query names, turn codes
// into fp16, and write key tiles as wgmma takes them.
//
// A warp has four or eight keys of each tile, in passes of four; eight lanes share a key. Rows are
// copied to shared memory asynchronously: bf16 rows to their place in a stage; codes to where their
// values will lie, or to slots of the warp, so that nothing is synchronised between warps. Loads
// into registers would wait for lines of the L1 cache, which shared memory leaves almost nothing
// of, and all accesses to shared memory behind them. Masked keys are zeros, and their memory is not
// read.
#pragma once

#include <cstdint>

#include "cuda/mla/sparse_attention/wgmma_sm90/stages.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

// kWarps gather kTileKeys keys of each tile, all or half of them. Codes are copied where their
// values will lie; with kSlots to so many slots of each warp, as many passes ahead; with a single
// slot a tile's second pass still goes to its place.
template <int kDim, MlaFormat kFormat, int kWarps, int kStages, int kTileKeys = kKeys,
          int kSlots = 0>
class Gather {
 public:
  __device__ __forceinline__ Gather(const Arguments& args, uint8_t* keys,
                                    StageBarriers<kStages>& barriers, int thread, int first_key = 0,
                                    uint8_t* slots = nullptr)
      : args_(args),
        barriers_(barriers),
        lane_(thread % 32),
        first_row_(first_key + thread / 32 * (kPair ? 4 : kRows)) {
    const int row = first_row_ + lane_ / 8, share = lane_ % 8;
    const uint32_t address = SharedAddress(keys) + row * 128;
    raw_ = SharedAddress(keys) + first_row_ * 128 + lane_ * 16;
    slots_ = SharedAddress(slots) + thread / 32 * (kSlots * kSlotBytes) + lane_ * 16;
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
    } else if constexpr (kSlots == 0) {
      RunCodes(work);
    } else if constexpr (kSlots == 1) {
      RunMixed(work);
    } else {
      RunSlots(work);
    }
  }

 private:
  static constexpr int kStageBytes = kDim / 64 * kBlockBytes;
  static constexpr bool kPair = kTileKeys < kKeys;
  static constexpr int kRows = kTileKeys / kWarps;  // of a warp
  static constexpr int kPasses = kRows / 4;
  static constexpr int kJoint = kPair ? kPasses : 1;  // passes that are converted side by side
  static_assert(!kPair || kPasses == kPairPasses);
  // Between the rows of a warp's passes. A pass of a pair's CTA lies together in all warps, so that
  // it is copied to the other CTA at once.
  static constexpr int kPassRows = kPair ? 4 * kWarps : 4;
  static constexpr int kPassBytes = kPassRows * 128;  // in a block
  static constexpr int kLook = 32 / kRows;            // tiles whose slots are looked up at once

  // Where the key lies that this lane finds.
  struct Place {
    uint32_t key;     // 16 bytes; kMasked
    uint32_t scales;  // of kFp8x584: 8 bytes
  };
  static constexpr uint32_t kMasked = 0xFFFFFFFF;

  // What a key of this lane's is multiplied with.
  struct KeyScale {
    float factor;  // power of two; 0: masked
    uint32_t own;  // SplitScale of OwnScale times the factor
  };

  // Row i of a warp's, from its first one.
  static __device__ __forceinline__ int RowOf(int i) {
    return kPassRows == 4 ? i : i / 4 * kPassRows + i % 4;
  }

  // Of row lane % kRows of the warp's, kLook tiles from `first` on.
  __device__ __forceinline__ int FindSlot(const Work& work, int first) const {
    const int tile = first + lane_ / kRows;
    if (tile >= work.end) return -1;
    const bool extra = tile >= work.first_extra;
    const MlaSelection& s = extra ? args_.p.extra : args_.p.keys;
    const int at =
        (extra ? tile - work.first_extra : tile) * kKeys + first_row_ + RowOf(lane_ % kRows);
    if (at >= (extra ? work.lengths[1] : work.lengths[0])) return -1;
    return s.indices[work.token * s.index_stride + at];  // without __ldg: see prefetch.cuh
  }

  __device__ __forceinline__ Place Locate(const Work& work, int first, int slot) const {
    const bool extra = first + lane_ / kRows >= work.first_extra;
    const MlaCache& cache = extra ? args_.p.extra.cache : args_.p.keys.cache;
    const Divisor& size = extra ? args_.page_size[1] : args_.page_size[0];
    const int page = static_cast<int>(size.Quotient(static_cast<uint32_t>(slot)));
    if (slot < 0 || page >= cache.num_pages) return {kMasked, 0};
    const uint32_t row = static_cast<uint32_t>(slot) - page * size.divisor;
    const int64_t base = page * cache.page_stride;
    Place place = {static_cast<uint32_t>((base + row * cache.row_stride) / 16), 0};
    if constexpr (kFormat == MlaFormat::kFp8x584) {
      place.scales =
          static_cast<uint32_t>((base + cache.ScalePlane() + row * ScalePlaneBytes(kFormat)) / 8);
    }
    return place;
  }

  __device__ __forceinline__ void StartLooking(const Work& work) {
    slot_ = FindSlot(work, work.begin);
  }

  // Finds the keys of a tile. Tiles come in order.
  __device__ __forceinline__ void Look(const Work& work, int tile) {
    at_ = (tile - work.begin) % kLook * kRows;
    if (at_ != 0) return;
    place_ = Locate(work, tile, slot_);
    slot_ = FindSlot(work, tile + kLook);
  }

  // Of the key of pass `pass` that this lane shares.
  __device__ __forceinline__ uint32_t OfPass(uint32_t place, int pass) const {
    return __shfl_sync(kFullWarp, place, at_ + 4 * pass + lane_ / 8);
  }

  __device__ __forceinline__ const uint8_t* Base(bool extra) const {
    return static_cast<const uint8_t*>(extra ? args_.p.extra.cache.data : args_.p.keys.cache.data);
  }

  // Between the parts of codes that a lane copies: to where their values will lie, or to a slot.
  static constexpr int PartBytes(bool in_place) { return in_place ? kBlockBytes : 512; }

  // Where the codes of a pass are, this lane's; the scales of its key.
  __device__ __forceinline__ uint32_t CodesAt(int stage, int pass) const {
    return raw_ + stage * kStageBytes + pass * kPassBytes;
  }
  __device__ __forceinline__ uint32_t SlotAt(int slot) const { return slots_ + slot * kSlotBytes; }
  template <bool kInPlace>
  __device__ __forceinline__ uint32_t ScalesOf(uint32_t codes) const {
    return codes + 5 * PartBytes(kInPlace) - (kInPlace ? 0 : lane_ * 16 - lane_ / 8 * 16);
  }

  // Starts to copy this lane's share of a key. In a slot a key's scales stand once.
  template <bool kInPlace>
  __device__ __forceinline__ void Load(bool extra, uint32_t to, int pass) const {
    constexpr int kPartBytes = PartBytes(kInPlace);
    const uint32_t at = OfPass(place_.key, pass);
    const bool copies_scales = kInPlace || lane_ % 8 == 0;
    const uint8_t* base = Base(extra);
    const bool valid = at != kMasked;
    const uint8_t* key = base + (valid ? uint64_t{at} * 16 : 0);
    const uint32_t share = lane_ % 8 * 16u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // The last 64 of 448 codes: four lanes have them.
      const bool some = valid && (kFormat != MlaFormat::kFp8x584 || i < 3 || share < 64);
      CopyOrZero(to + i * kPartBytes, some ? key + 128 * i + share : base, some);
    }
    if constexpr (kFormat == MlaFormat::kFp8x656) {
      CopyOrZero(to + 4 * kPartBytes, valid ? key + 528 + share : base, valid);
      if (copies_scales) CopyOrZero(ScalesOf<kInPlace>(to), valid ? key + 512 : base, valid);
    } else if constexpr (kFormat == MlaFormat::kFp8x584) {
      CopyOrZero(to + 4 * kPartBytes, valid ? key + 448 + share : base, valid);
      const uint32_t scales = OfPass(place_.scales, pass);
      if (copies_scales) {
        Copy8OrZero(ScalesOf<kInPlace>(to), base + (valid ? uint64_t{scales} * 8 : 0), valid);
      }
    } else if constexpr (kDim > 512) {
      const bool some = valid && share < 64;
      CopyOrZero(to + 4 * kPartBytes, some ? key + 512 + share : base, some);
    }
  }

  // What Load has copied. valid: bit i: row i of the pass exists.
  template <bool kInPlace>
  __device__ __forceinline__ KeyPart Read(uint32_t from, uint32_t valid) const {
    constexpr int kPartBytes = PartBytes(kInPlace);
    KeyPart part;
#pragma unroll
    for (int i = 0; i < 4; ++i) part.codes[i] = LoadShared(from + i * kPartBytes);
    if constexpr (kFormat != MlaFormat::kFp8 || kDim > 512) {
      part.rope = LoadShared(from + 4 * kPartBytes);
    }
    if constexpr (kFormat == MlaFormat::kFp8) {
      part.scales = make_uint2(valid >> (lane_ / 8) & 1, 0);
    } else {
      const uint4 scales = LoadShared(ScalesOf<kInPlace>(from));
      part.scales = make_uint2(scales.x, scales.y);
      if constexpr (kFormat == MlaFormat::kFp8x656) {
        const uint32_t low = lane_ & 1 ? scales.y : scales.x,
                       high = lane_ & 1 ? scales.w : scales.z;
        part.scales.x = lane_ & 2 ? high : low;
      }
    }
    return part;
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

  // Whether a key has anything but zeros, and the exponent field of a bound of its values: from its
  // scales, and then, of lanes that share it, with its rotated channels.
  struct Bound {
    uint32_t largest = 0, exponent = 0, magnitude = 0;
  };

  // Of the lanes `apart` too. The passes' exchanges run side by side.
  template <int kCount>
  __device__ __forceinline__ void Exchange(Bound (&bounds)[kCount], int apart) const {
#pragma unroll
    for (Bound& x : bounds) {
      x.magnitude = max(x.magnitude, __shfl_xor_sync(kFullWarp, x.magnitude, apart));
      if (kFormat == MlaFormat::kFp8x656 && apart < 4) {  // NaN is the largest
        x.largest = max(x.largest, __shfl_xor_sync(kFullWarp, x.largest, apart));
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ void ScalesOfKeys(const KeyPart (&parts)[kCount], bool extra,
                                               KeyScale (&scales)[kCount]) const {
    Bound bounds[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint2 own = parts[i].scales;
      Bound& x = bounds[i];
      if constexpr (kFormat == MlaFormat::kFp8) {
        x.largest = own.x;
        x.exponent = ExponentField(OwnScale(parts[i], extra) * 448.0f);
      } else {
        x.magnitude = MaxMagnitude(parts[i].rope);
        if constexpr (kFormat == MlaFormat::kFp8x656) {
          x.largest = own.x & 0x7FFFFFFFu;
        } else {
          x.largest = __vmaxu4(own.x, own.y & 0x00FFFFFFu);
          x.largest = __vmaxu4(x.largest, x.largest >> 16);
          x.largest = max(x.largest & 0xFF, x.largest >> 8 & 0xFF);
          x.exponent = min(x.largest + 8, 255u);
        }
      }
    }
    if constexpr (kFormat != MlaFormat::kFp8) {
      Exchange(bounds, 1);
      Exchange(bounds, 2);
      Exchange(bounds, 4);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Bound& x = bounds[i];
      if constexpr (kFormat == MlaFormat::kFp8x656) {
        x.exponent = ExponentField(__uint_as_float(x.largest) * 448.0f);
      }
      x.exponent = max(x.exponent, x.magnitude >> 7);
      const bool zeros = (x.largest | x.magnitude) == 0;
      scales[i].factor = zeros ? 0.0f : Reciprocal(KeyPower(x.exponent));
      scales[i].own = kFormat == MlaFormat::kFp8x584
                          ? 0
                          : SplitScale(OwnScale(parts[i], extra) * scales[i].factor);
    }
  }

  // kCount passes from `pass` on.
  template <int kCount>
  __device__ __forceinline__ void Convert(bool extra, const KeyPart (&parts)[kCount], int pass) {
    KeyScale scales[kCount];
    ScalesOfKeys(parts, extra, scales);
    bool exact = true;  // fp16 holds the scales, such as powers of two
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (lane_ % 8 == 0) {
        const float factor = scales[i].factor;
        barriers_.powers[stage_][first_row_ + kPassRows * (pass + i) + lane_ / 8] =
            factor == 0.0f ? 0.0f : Reciprocal(factor);
      }
      exact = exact && (scales[i].own & 0x7FFF0000u) == 0;
    }
    if (kFormat == MlaFormat::kFp8x584 || __all_sync(kFullWarp, exact)) {
      PutKeys<true>(parts, scales, pass);
    } else {
      PutKeys<false>(parts, scales, pass);
    }
  }

  template <bool kExact, int kCount>
  __device__ __forceinline__ void PutKeys(const KeyPart (&parts)[kCount],
                                          const KeyScale (&scales)[kCount], int pass) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t rows = RowsOf(pass + i);
      PutAllCodes<kExact>((codes_ ^ Turn(pass + i)) + rows, parts[i], scales[i].own,
                          scales[i].factor);
      if constexpr (kFormat != MlaFormat::kFp8) {
        constexpr int kBlock = kFormat == MlaFormat::kFp8x584 ? 7 : 8;
        StoreShared((piece_ ^ Turn(pass + i)) + rows + kBlock * kBlockBytes,
                    ToHalf(parts[i].rope, scales[i].factor));
      }
      if constexpr (kPair) {
        if (i + 1 < kCount) ArriveWarp(&barriers_.own[stage_][i]);  // the last one: RunCodes
      }
    }
  }

  // Where the keys of a pass begin. A pass is four rows, half a swizzle pattern: in every other one
  // of those that follow each other the lanes' places are turned.
  __device__ __forceinline__ uint32_t RowsOf(int pass) const {
    return stage_ * kStageBytes + kPassBytes * pass;
  }
  static __device__ __forceinline__ uint32_t Turn(int pass) {
    return kPassRows % 8 == 0 ? 0 : 64 * (pass % 2);
  }

  __device__ __forceinline__ uint32_t ValidBits() const {
    return __ballot_sync(kFullWarp, place_.key != kMasked) >> at_;
  }

  // valid: bit i: row i of the warp's exists.
  __device__ __forceinline__ void StoreValid(uint32_t valid) const {
    if (lane_ < kRows / 4) {
      reinterpret_cast<uint8_t*>(
          &barriers_.valid[stage_][first_row_ / 32])[first_row_ % 32 / 4 + kPassRows / 4 * lane_] =
          static_cast<uint8_t>(valid >> (4 * lane_) & 15);
    }
  }

  __device__ __forceinline__ void Advance() {
    stage_ = (stage_ + 1) % kStages;
    parity_ ^= stage_ == 0;
  }

  __device__ __forceinline__ uint64_t* Free(int stage) const {
    return &barriers_.empty[stage][kPair ? 0 : first_row_ / 32];
  }
  __device__ __forceinline__ uint64_t* Full() const {
    return kPair ? &barriers_.own[stage_][kPairPasses - 1] : &barriers_.full[stage_];
  }

  // Starts to copy a tile that has been looked up into a free stage.
  __device__ __forceinline__ void LoadTile(bool extra, int stage) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) Load<true>(extra, CodesAt(stage, i), i);
    CommitCopies();
  }

  // Whether this warp's rows of the next stage are free; it waits for them if it shall.
  __device__ __forceinline__ bool NextIsFree(int next, bool wait) const {
    const uint32_t parity = parity_ ^ (next == 0);
    if (!wait) return __all_sync(kFullWarp, TestWait(Free(next), parity));
    Wait(Free(next), parity);
    return true;
  }

  // The next tile's copies begin as soon as its stage is free, which is looked for between passes.
  __device__ __forceinline__ void RunCodes(const Work& work) {
    StartLooking(work);
    Look(work, work.begin);
    uint32_t valid = ValidBits();
    Wait(Free(stage_), parity_);
    LoadTile(work.begin >= work.first_extra, stage_);
    for (int tile = work.begin; tile < work.end; ++tile) {
      const int next = (stage_ + 1) % kStages;
      const bool last = tile + 1 >= work.end;
      if (!last) Look(work, tile + 1);
      bool loads = false;  // the next tile's copies have begun
#pragma unroll 1
      for (int pass = 0; pass <= kPasses; pass += kJoint) {
        const bool done = pass == kPasses;
        if (done) {
          StoreValid(valid);
          ArriveWarp(Full());
        }
        if (!last && !loads && NextIsFree(next, done)) {
          LoadTile(tile + 1 >= work.first_extra, next);
          loads = true;
        }
        if (done) break;
        if (loads) {
          WaitCopyGroups<1>();
        } else {
          WaitCopyGroups<0>();
        }
        KeyPart parts[kJoint];
#pragma unroll
        for (int i = 0; i < kJoint; ++i) {
          parts[i] = Read<true>(CodesAt(stage_, pass + i), valid >> (4 * (pass + i)));
        }
        __syncwarp();  // all lanes have their codes before one writes values there
        Convert(tile >= work.first_extra, parts, pass);
      }
      Advance();
      valid = ValidBits();
    }
  }

  // Of a tile's two passes the first goes through a slot, whatever stage is free, the second to
  // where its values will lie: the next tile's copies are under way while one is converted.
  __device__ __forceinline__ void RunMixed(const Work& work) {
    static_assert(kPasses == 2 && kStages == 2);
    StartLooking(work);
    Look(work, work.begin);
    uint32_t valid = ValidBits();
    Load<false>(work.begin >= work.first_extra, SlotAt(0), 0);
    CommitCopies();
    bool loads = false;  // the copies of the tile's second pass have begun
#pragma unroll 1
    for (int tile = work.begin; tile < work.end; ++tile) {
      const bool extra = tile >= work.first_extra, last = tile + 1 >= work.end;
      const bool next_extra = tile + 1 >= work.first_extra;
      if (!loads) {
        Wait(Free(stage_), parity_);
        Load<true>(extra, CodesAt(stage_, 1), 1);
        CommitCopies();
      }
      if (!last) Look(work, tile + 1);
      WaitCopyGroups<1>();
      __syncwarp();  // scales are another lane's copies
      {
        const KeyPart parts[1] = {Read<false>(SlotAt(0), valid)};
        __syncwarp();  // all lanes have their codes before new ones arrive
        if (!last) Load<false>(next_extra, SlotAt(0), 0);
        CommitCopies();
        Convert(extra, parts, 0);
      }
      const int next = (stage_ + 1) % kStages;
      loads = !last && NextIsFree(next, false);
      if (loads) {
        Load<true>(next_extra, CodesAt(next, 1), 1);
        CommitCopies();
        WaitCopyGroups<2>();
      } else {
        WaitCopyGroups<1>();
      }
      const KeyPart parts[1] = {Read<true>(CodesAt(stage_, 1), valid >> 4)};
      __syncwarp();  // all lanes have their codes before one writes values there
      Convert(extra, parts, 1);
      StoreValid(valid);
      ArriveWarp(Full());
      Advance();
      valid = ValidBits();
    }
  }

  // Passes of all tiles go through the slots in order, whatever stage is free.
  __device__ __forceinline__ void RunSlots(const Work& work) {
    StartLooking(work);
    const int passes = (work.end - work.begin) * kPasses;
    int loaded = 0, slot = 0;
    uint32_t ahead = 0;  // four bits for each pass in a slot, the next one's lowest: valid rows
    const auto load = [&](int to, int waiting) {
      const int tile = work.begin + loaded / kPasses, pass = loaded % kPasses;
      if (pass == 0) Look(work, tile);
      Load<false>(tile >= work.first_extra, SlotAt(to), pass);
      ahead |= (ValidBits() >> (4 * pass) & 15) << (4 * waiting);
      ++loaded;
    };
#pragma unroll 1
    for (int i = 0; i < kSlots; ++i) {
      if (loaded < passes) load(i, i);
      CommitCopies();
    }
    uint32_t valid = 0;  // of the tile
    int tile = work.begin, pass = 0;
#pragma unroll 1
    while (tile < work.end) {
      WaitCopyGroups<kSlots - 1>();
      __syncwarp();  // scales are another lane's copies
      const KeyPart parts[1] = {Read<false>(SlotAt(slot), ahead)};
      __syncwarp();  // all lanes have their codes before new ones arrive
      valid |= (ahead & 15) << (4 * pass);
      ahead >>= 4;
      if (loaded < passes) load(slot, kSlots - 1);
      CommitCopies();
      slot = slot + 1 == kSlots ? 0 : slot + 1;
      if (pass == 0) Wait(Free(stage_), parity_);
      Convert(tile >= work.first_extra, parts, pass);
      if (++pass < kPasses) continue;
      StoreValid(valid);
      ArriveWarp(Full());
      Advance();
      valid = 0;
      pass = 0;
      ++tile;
    }
  }

  __device__ __forceinline__ void RunCopies(const Work& work) {
    StartLooking(work);
    for (int tile = work.begin; tile < work.end; ++tile) {
      Look(work, tile);
      Wait(Free(stage_), parity_);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int share = lane_ % 8;
        const uint32_t at = OfPass(place_.key, pass);
        const bool valid = at != kMasked;
        // Any memory of the cache will do for an address that is not read.
        const uint8_t* base = Base(tile >= work.first_extra);
        const uint8_t* key = valid ? base + uint64_t{at} * 16 + 16 * share : base;
        const int step = valid ? 128 : 0;
        const uint32_t target = (piece_ ^ Turn(pass)) + RowsOf(pass);
#pragma unroll
        for (int i = 0; i < kDim / 64; ++i) {
          CopyOrZero(target + i * kBlockBytes, key + step * i, valid);
        }
      }
      // Each lane's copies arrive when they have ended: the next tile's begin before.
      StoreValid(ValidBits());
      ArriveWarp(Full());
      ArriveAfterCopies(Full());
      Advance();
    }
  }

  const Arguments& args_;
  StageBarriers<kStages>& barriers_;
  int stage_ = 0;
  uint32_t parity_ = 1;  // a fresh barrier's phase before the first counts as complete
  int lane_;
  int first_row_;  // of this warp in a tile
  int slot_ = -1;  // of the tiles to be looked up next
  Place place_ = {kMasked, 0};
  int at_ = 0;      // first lane that has a row of the tile looked up last
  uint32_t raw_;    // where this lane's codes of stage 0, pass 0 go
  uint32_t slots_;  // or of slot 0
  uint32_t piece_;  // where 16 bytes of this lane's key go: stage 0, pass 0, block 0
  uint32_t codes_;  // where its first 16 codes go, the half that it stores first
  float multiplier_[2] = {1.0f, 1.0f};
};

}  // namespace fastattn::cuda::mla_sparse_sm90
