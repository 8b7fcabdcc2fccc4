// V's bytes of the tokens that a CTA of the decode kernel takes, a warp each. A byte of V has a row
// of 64 tokens to itself, and tokens that follow each other in a sequence lie in one sector of it.
// Stored token by token, each of these sectors is asked for once a token. Here the warps exchange
// their codes through shared memory, so that neighbouring lanes hold neighbouring tokens of a
// channel: what falls into a sector is one request.
//
// Every token keeps an address of its own, so nothing is assumed of where tokens lie: some may be
// of other sequences or blocks, or of none.
#pragma once

#include <cstdint>

#include "cuda/cache/shared/head_lanes.cuh"
#include "params/common.h"

namespace fastattn::cuda {

// kStores: bytes of a lane, whose channels are as Map says. The CTA has blockDim.y warps, a power
// of 2, kMost at most.
template <typename Lane, typename Map, int kStores, int kMost>
class TokenColumns {
 public:
  static_assert(kMost <= 32 && kStores % 4 == 0);

  // Of this warp's token: the lane's codes, and where the byte of row 0 of KV head 0 goes (null:
  // nowhere).
  __device__ __forceinline__ void Put(const uint32_t (&codes)[kStores / 4], uint8_t* column) {
#pragma unroll
    for (int i = 0; i < kStores / 4; ++i) codes_[i][threadIdx.y][threadIdx.x] = codes[i];
    if (threadIdx.x == 0) columns_[threadIdx.y] = column;
  }

  // Once all warps have Put theirs: stores this warp's part of all tokens' bytes, of the heads from
  // first_head on. `share` of `shares` as in DecodeHead.
  __device__ __forceinline__ void Store(const CacheStrides& strides, int first_head, int num_heads,
                                        int share, int shares) const {
    const int thread = static_cast<int>(threadIdx.y * 32 + threadIdx.x);
    const int token = thread & static_cast<int>(blockDim.y - 1);
    const int from = thread >> (__ffs(blockDim.y) - 1);  // the lane whose codes they were
    const int head = first_head + from / Lane::kLanes, lane = from % Lane::kLanes;
    uint8_t* out = columns_[token];
    if (out == nullptr || head >= num_heads) return;
    out += head * strides.head + lane * strides.row;
    const int64_t step = Lane::kLanes * strides.row;  // to a lane's next channel
    uint32_t codes[kStores / 4];
#pragma unroll
    for (int i = 0; i < kStores / 4; ++i) codes[i] = codes_[i][token][from];
#pragma unroll
    for (int i = 0; i < kStores; ++i, out += step) {
      const int channel = Map::Channel(lane, i * (Lane::kValues / kStores));
      const bool there = Lane::kActive == Lane::kLanes || channel < Lane::kHeadDim;
      if (there && (i & (shares - 1)) == share) {
        *out = static_cast<uint8_t>(codes[i / 4] >> (8 * (i % 4)));
      }
    }
  }

 private:
  uint32_t codes_[kStores / 4][kMost][33];  // 33: lanes read several tokens' words at a time
  uint8_t* columns_[kMost];
};

}  // namespace fastattn::cuda
