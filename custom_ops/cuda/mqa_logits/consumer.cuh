// A consumer warpgroup: products of its tiles with the segment's queries, ReLU, weights and the sum
// over heads in registers.
//
// A thread has two keys (rows lane / 4 and + 8 of its warp's 16) and two of every eight columns, so
// that heads are summed in registers and over the four lanes of a key.
#pragma once

#include "cuda/mqa_logits/e2m1_operand.cuh"
#include "cuda/mqa_logits/pipeline.cuh"
#include "cuda/mqa_logits/products.cuh"
#include "cuda/mqa_logits/wide_rows.cuh"

namespace fastattn::cuda::mqa_logits {

// What is left of a tile when its stage has been given back.
struct TileKeys {
  int key;              // whose logit the lane writes: its first in even lanes, its second in odd
  float scale;          // or factor, of that key
  uint32_t unassigned;  // bit h: key h has no page
  uint32_t wide;        // lanes whose key h is wide, 0 for FP8: see WideRows
};

template <class C>
class Consumer {
 public:
  __device__ Consumer(const Arguments& arguments, Shared<C>& shared)
      : p_(arguments.p),
        shared_(shared),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32 % 4),
        number_(threadIdx.x / 128 - 1),
        row_(Kept(16 * warp_ + lane_ / 4)),
        own_row_(Kept(row_ + 8 * (lane_ & 1))),
        codes_(Kept(row_ * C::kCodeBytes + lane_ % 4 * 16)),
        selector_(C::kFp8 ? 0 : Kept(lane_ % 4 * 0x1111 + 0x4400)),
        ones_(C::kFp8 ? 0 : static_cast<uint32_t>(shared.magnitudes[kMostShift + 1])) {}

  __device__ void Run() {
    Ring<2> segments;
    int turn = 0;  // consumer of the next tile
    while (true) {
      const int buffer = segments.index;
      Wait(&shared_.query_full[buffer], segments.phase);
      const int tiles = shared_.segments[buffer].tiles, tile = shared_.segments[buffer].tile;
      if (tiles < 0) return;
      LoadWeights(buffer);
      if constexpr (C::kQueries == 1) cells_ = shared_.cells[buffer][0];
      wide_ = !C::kFp8 && shared_.wide[buffer] != 0;
      // Tiles of this warpgroup: number_ - turn, and every kConsumers-th from there.
      const int first = (number_ - turn + C::kConsumers) % C::kConsumers;
      stages_.Advance(min(first, tiles));
      if constexpr (kLaneQueries) {
        RunLaneQueries(buffer, tile, first, tiles);
      } else {
        RunTiles(buffer, tile, first, tiles);
      }
      turn = (turn + tiles) % C::kConsumers;
      ArriveWarp(&shared_.query_empty[buffer]);
      segments.Advance();
    }
  }

 private:
  static constexpr int kRegisters = C::kColumns / 2;  // accumulators of a product
  // Each of the four lanes of a key writes one query's logits: its range is read once a segment.
  // FP8 of contiguous keys only, where neither a key without a page nor a wide row can be.
  static constexpr bool kLaneQueries = C::kFp8 && !C::kPaged && C::kQueries == 4;

  // x, in a register where these are not scarce: what follows from a lane's number would be
  // computed anew for each tile.
  __device__ __forceinline__ static int Kept(int x) {
    return C::kColumns == 64 ? __shfl_sync(~0u, x, threadIdx.x % 32) : x;
  }

  __device__ __forceinline__ uint64_t KeyOperand(int stage) const {
    return OperandDescriptor<kDim>(SharedAddress(shared_.key[stage]));
  }
  __device__ __forceinline__ uint64_t QueryOperand(int buffer) const {
    return OperandDescriptor<kDim>(SharedAddress(shared_.query[buffer]));
  }

  // Whether columns j are rectified as x + |x|, twice the value, with half the weight: an addition
  // takes half the time of a maximum, in the unit of the sums. Of pages half of the columns are, so
  // that both units are used; 256 columns of contiguous keys leave that unit more time.
  __device__ __forceinline__ static constexpr bool Adds(int j) { return !C::kPaged || j % 4 < 2; }
  __device__ __forceinline__ static float Rectified(float x, int j) {
    return Adds(j) ? x + fabsf(x) : Relu(x);
  }

  __device__ __forceinline__ void LoadWeights(int buffer) {
#pragma unroll
    for (int j = 0; j < C::kColumns / 8; ++j) {
      const float2 w =
          *reinterpret_cast<const float2*>(shared_.weights[buffer] + 8 * j + 2 * (lane_ % 4));
      const float unit = Adds(j) ? 0.5f : 1.0f;
      weights_[2 * j] = w.x * unit, weights_[2 * j + 1] = w.y * unit;
    }
  }

  __device__ __forceinline__ TileKeys LoadScales(int stage, int tile) const {
    TileKeys keys;
    keys.key = tile * kTileKeys + own_row_;
    keys.wide = 0;
    keys.unassigned = C::kPaged ? shared_.unassigned[stage] >> 2 * warp_ & 3 : 0;
    if constexpr (C::kFp8) {
      const float* scales = reinterpret_cast<const float*>(shared_.Scales(stage));
      keys.scale = scales[own_row_];
    }
    return keys;
  }

  __device__ __forceinline__ void RunTiles(int buffer, int tile, int first, int tiles) {
    const uint64_t columns = QueryOperand(buffer);
#pragma unroll 1
    for (int i = first; i < tiles; i += C::kConsumers) {
      const int stage = stages_.index;
      Wait(&shared_.key_full[stage], stages_.phase);
      TileKeys keys = LoadScales(stage, tile + i);
      float a[kRegisters];
      if constexpr (C::kFp8) {
        FenceProducts();
        MultiplyTile(a, KeyOperand(stage), columns);
        WaitProducts<0>(a);
        ArriveWarp(&shared_.key_empty[stage]);
      } else {
        uint32_t operand[16];
        LoadOperand(stage, &keys, operand);
        ArriveWarp(&shared_.key_empty[stage]);
        FenceProducts();
        MultiplyTile(a, operand, columns);
        WaitProducts<0>(a);
        KeepRegisters(operand);
        if (wide_) keys.wide = ~0u;
      }
      stages_.Advance(min(C::kConsumers, tiles - i));  // those in between are others'
      SumHeads(a, keys, buffer);
      if constexpr (!C::kFp8) {
        if (keys.wide != 0) WideRows(buffer, keys);
      }
    }
  }

  // The same where lane i % 4 has query i % 4. A tile's logits are stored once the next tile's
  // products have been issued: these would otherwise wait for the stores.
  __device__ __forceinline__ void RunLaneQueries(int buffer, int tile, int first, int tiles) {
    const uint64_t columns = QueryOperand(buffer);
    const QueryCells cells = shared_.cells[buffer][lane_ % 4];
    float sums[2], scales[2];  // of the lane's two keys
    int key = -1;              // the first of these, of the tile before
    const auto store = [&]() {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = key + 8 * h;
        if (at >= cells.begin && at < cells.end) {
          StoreHere(cells.origin + at, sums[h] * scales[h]);
        }
      }
    };
#pragma unroll 1
    for (int i = first; i < tiles; i += C::kConsumers) {
      const int stage = stages_.index;
      Wait(&shared_.key_full[stage], stages_.phase);
      float a[kRegisters];
      FenceProducts();
      MultiplyTile(a, KeyOperand(stage), columns);
      if (key >= 0) store();
      const float* tile_scales = reinterpret_cast<const float*>(shared_.Scales(stage));
      scales[0] = tile_scales[row_], scales[1] = tile_scales[row_ + 8];
      key = (tile + i) * kTileKeys + row_;
      WaitProducts<0>(a);
      ArriveWarp(&shared_.key_empty[stage]);
      stages_.Advance(min(C::kConsumers, tiles - i));
      SumLaneQueries(a, sums);
    }
    if (key >= 0) store();
  }

  // A store that stays where it is written, between products and the wait for them.
  __device__ __forceinline__ static void StoreHere(float* to, float value) {
    asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
  }

  // MXFP4: lane i % 4 has block i % 4 of its two keys; its words are the steps of the product.
  __device__ __forceinline__ void LoadOperand(int stage, TileKeys* keys, uint32_t (&operand)[16]) {
    const uint32_t* scales = reinterpret_cast<const uint32_t*>(shared_.Scales(stage)) + row_;
    const uint8_t* codes = shared_.key[stage] + codes_;
    // The lane's block's exponent bytes of both keys, each twice, and the largest of each key: as
    // halves of a word, which are compared at once.
    const uint32_t one = scales[0], two = scales[8];
    const uint32_t mine = PermuteBytes(one, two, selector_);
    const uint32_t largest =
        __vmaxu2(__vmaxu2(PermuteBytes(one, two, 0x4400), PermuteBytes(one, two, 0x5511)),
                 __vmaxu2(PermuteBytes(one, two, 0x6622), PermuteBytes(one, two, 0x7733)));
    const uint32_t least = largest - 0x01010101u * kMostShift;
    const uint32_t raised = __vmaxu2(mine, least), shifts = raised - least;
    const uint32_t plain = __vmaxu2(__vminu2(largest, 0x01010101u * (127 + kMostFactor)),
                                    0x01010101u * (127 - kMostFactor));
    const bool rare = ((raised ^ mine) | (plain ^ largest)) != 0;
    int shift[2] = {static_cast<int>(shifts & 0xFF), static_cast<int>(shifts >> 24)};
    const uint32_t own = PermuteBytes(largest, 0, lane_ & 1 ? 0x4443 : 0x4440);
    keys->scale = PlainFactor(static_cast<int>(own));
    uint4 words[2];
    words[0] = *reinterpret_cast<const uint4*>(codes);
    words[1] = *reinterpret_cast<const uint4*>(codes + 8 * C::kCodeBytes);
    if (__any_sync(~0u, rare)) {
      bool wide[2] = {};
      shift[0] = ShiftOf(mine & 0xFF, largest & 0xFF, words[0], &wide[0]);
      shift[1] = ShiftOf(mine >> 24, largest >> 24, words[1], &wide[1]);
      keys->scale = RowFactor(own);
      // A bit for each key of the warp: key h of a lane at bit 4 * (lane / 4) + h.
      keys->wide = AnyOfFour(__ballot_sync(~0u, wide[0])) | AnyOfFour(__ballot_sync(~0u, wide[1]))
                                                                << 1;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint2 magnitudes = reinterpret_cast<const uint2*>(shared_.magnitudes)[shift[h]];
      const uint32_t four[4] = {words[h].x, words[h].y, words[h].z, words[h].w};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        ToE4M3(four[s], magnitudes, ones_, &operand[4 * s + h], &operand[4 * s + h + 2]);
      }
    }
  }

  // Bit 4 i: whether one of bits 4 i .. 4 i + 3 is set.
  __device__ __forceinline__ static uint32_t AnyOfFour(uint32_t bits) {
    bits |= bits >> 2;
    return (bits | bits >> 1) & 0x11111111u;
  }

  // The lane's share of a query's sums over heads: those of its columns, of both keys.
  __device__ __forceinline__ float2 SumColumns(const float (&d)[kRegisters], int q) const {
    constexpr int kBlocks = C::kHeads / 8;
    float x[2][2] = {};
#pragma unroll
    for (int j = q * kBlocks; j < (q + 1) * kBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float w = weights_[2 * j + e];
        x[0][e] = fmaf(Rectified(d[4 * j + e], j), w, x[0][e]);
        x[1][e] = fmaf(Rectified(d[4 * j + 2 + e], j), w, x[1][e]);
      }
    }
    return make_float2(x[0][0] + x[0][1], x[1][0] + x[1][1]);
  }

  // Sums of both keys for query lane % 4, by a transposition among the four lanes of a key: with
  // lane ^ 1 a lane exchanges the queries of the other parity, with lane ^ 2 one of the two left.
  // The order of the additions is that of SumHeads, and so are the bits.
  __device__ __forceinline__ void SumLaneQueries(const float (&d)[kRegisters],
                                                 float (&sums)[2]) const {
    const bool odd = lane_ & 1, upper = lane_ & 2;
    float shares[2][4];  // [key][query]
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float2 x = SumColumns(d, q);
      shares[0][q] = x.x, shares[1][q] = x.y;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float pairs[2];  // over two lanes, of queries 2 i + (lane & 1)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float even = shares[h][2 * i], other = shares[h][2 * i + 1];
        const float given = __shfl_xor_sync(~0u, odd ? even : other, 1);
        pairs[i] = (odd ? other : even) + given;
      }
      const float given = __shfl_xor_sync(~0u, upper ? pairs[0] : pairs[1], 2);
      sums[h] = (upper ? pairs[1] : pairs[0]) + given;
    }
  }

  // Writes a tile's logits. Lane i % 4 writes those of key (i & 1), of every other query from
  // (i >> 1 & 1) on, or of the one that there is.
  __device__ __forceinline__ void SumHeads(const float (&d)[kRegisters], const TileKeys& keys,
                                           int buffer) {
    const bool odd = lane_ & 1, upper = lane_ & 2;
    float sums[C::kQueries];
#pragma unroll
    for (int q = 0; q < C::kQueries; ++q) {
      const float2 x = SumColumns(d, q);
      const float given = __shfl_xor_sync(~0u, odd ? x.x : x.y, 1);
      sums[q] = (odd ? x.y : x.x) + given;
    }
    const bool hidden = odd ? keys.unassigned & 2 : keys.unassigned & 1;
    const bool wide = !C::kFp8 && keys.wide >> ((lane_ & 28) + (odd ? 1 : 0)) & 1;
    if constexpr (C::kQueries == 1) {
      const float sum = sums[0] + __shfl_xor_sync(~0u, sums[0], 2);
      if (!upper && !wide) Write(buffer, 0, keys.key, hidden, sum * keys.scale);
    } else {
#pragma unroll
      for (int q = 0; q < C::kQueries; q += 2) {
        const float given = __shfl_xor_sync(~0u, upper ? sums[q] : sums[q + 1], 2);
        const float sum = (upper ? sums[q + 1] : sums[q]) + given;
        if (!wide) {
          Write(buffer, q + (upper ? 1 : 0), keys.key, hidden, sum * keys.scale);
        }
      }
    }
  }

  __device__ __forceinline__ void Write(int buffer, int query, int key, bool hidden, float value) {
    const QueryCells cells = C::kQueries == 1 ? cells_ : shared_.cells[buffer][query];
    if (key >= cells.begin && key < cells.end) {
      cells.origin[key] = hidden ? -__builtin_huge_valf() : value;
    }
  }

  // Logits of keys that keys.wide names, or of all.
  __device__ void WideRows(int buffer, const TileKeys& keys) {
    const Segment& segment = shared_.segments[buffer];
    const int tile_key = keys.key - own_row_ + 16 * warp_;
#pragma unroll 1
    for (int row = 0; row < 16; ++row) {
      const int h = row / 8, key = tile_key + row;
      if (!(keys.wide >> (row % 8 * 4 + h) & 1)) continue;
      if (keys.unassigned >> h & 1) {
        for (int q = lane_; q < C::kQueries; q += 32) Write(buffer, q, key, true, 0.0f);
        continue;
      }
      const uint8_t* codes = p_.keys + int64_t{key} * C::kCodeBytes;
      const uint8_t* scales = p_.key_scales + int64_t{key} * kLogitsScaleBytes;
      if constexpr (C::kPaged) {
        const int64_t block = key / p_.page_size, at = key - block * p_.page_size;
        const uint8_t* page =
            p_.cache + max(p_.PageOf(segment.sequence, block), int64_t{0}) * p_.page_stride;
        codes = page + at * C::kCodeBytes;
        scales = page + p_.page_size * C::kCodeBytes + at * kLogitsScaleBytes;
      }
#pragma unroll 1
      for (int q = 0; q < segment.rows; ++q) {
        const QueryCells cells = shared_.cells[buffer][q];
        if (key < cells.begin || key >= cells.end) continue;
        const float value = WideLogit<C::kHeads>(p_, segment.row + q, codes, scales, lane_);
        if (lane_ == 0) cells.origin[key] = value;
      }
    }
  }

  const LogitsParams& p_;
  Shared<C>& shared_;
  const int lane_, warp_, number_;
  Ring<C::kStages> stages_;
  const int row_, own_row_;  // of a tile: the lane's first key, the one whose logit it writes
  const int codes_;          // where in a stage the lane's block of its first key is
  const uint32_t selector_;  // of the lane's block in its keys' exponents
  const uint32_t ones_;
  QueryCells cells_;  // of a segment of one query
  bool wide_;         // a head of the segment's is no row of e4m3
  float weights_[C::kColumns / 4];
};

}  // namespace fastattn::cuda::mqa_logits
