// NaN scrubbing. In KV tiles that some query sees only in part, the value of a masked key must not
// enter the product: 0 * NaN is NaN. Values of unwritten tokens become 0. Those of written tokens
// that are not finite become 0 as well, and are listed for the consumers, which set the outputs of
// the rows that see them.
#pragma once

#include "cuda/attention/wgmma_sm90/q16/config.h"

namespace fastattn::cuda::wgmma_q16 {

template <class C>
class NanScrubber {
 public:
  __device__ explicit NanScrubber(Shared<C>& shared) : shared_(shared), lane_(threadIdx.x % 32) {}

  // A warp takes every `stride`-th group of 16 tokens from `first` to `last`. Returns whether
  // values of written tokens are not finite.
  __device__ bool Scrub(int at, int written, int first, int last, int stride) {
    bool bad = false;
#pragma unroll 1
    for (int group = first; group < last; group += stride) {
#pragma unroll 2
      for (int i = 0; i < C::kValueDim / 16; ++i) {
        if constexpr (C::kTokenMajorV) {
          constexpr int kPieces = C::kValueDim / 8;
          const int token = 16 * group + (32 * i + lane_) / kPieces;
          bad |= ScrubPiece(RowPiece(at, token, lane_ % kPieces), token < written ? 8 : 0);
        } else {
          const int eight = 2 * group + lane_ % 2;
          bad |= ScrubPiece(ChannelPiece(at, 16 * i + lane_ / 2, eight), written - 8 * eight);
        }
      }
    }
    if (!__any_sync(~0u, bad)) return false;
#pragma unroll 1
    for (int group = first; group < last; group += stride) ListNonFinite(at, group);
    return true;
  }

 private:
  // Sets 0xFFFF in either half that is no finite number.
  __device__ static uint32_t NonFinite(uint32_t pair) {
    constexpr uint32_t kExponent = C::kOperand == DType::kBFloat16 ? 0x7F807F80u : 0x7C007C00u;
    constexpr uint32_t kStep = C::kOperand == DType::kBFloat16 ? 0x00800080u : 0x04000400u;
    return (((pair & kExponent) + kStep) >> 15 & 0x00010001u) * 0xFFFFu;
  }

  // The piece with channels 8 * piece .. + 7 of a token.
  __device__ uint4* RowPiece(int at, int token, int piece) const {
    return reinterpret_cast<uint4*>(shared_.value[at] + (piece / 8 * C::kKeys + token) * C::kSlice +
                                    16 * ((piece ^ token) % 8));
  }

  // The piece with tokens 8 * eight .. + 7 of a channel.
  __device__ uint4* ChannelPiece(int at, int channel, int eight) const {
    return reinterpret_cast<uint4*>(shared_.value[at] +
                                    (eight / 8 * C::kValueDim + channel) * C::kSlice +
                                    16 * ((eight ^ channel) % 8));
  }

  // Keeps the first `kept` of eight values; returns whether one of them is not finite.
  __device__ static bool ScrubPiece(uint4* piece, int kept) {
    uint4 v = *piece;
    if (kept < 8) {
      v.x &= Kept(kept), v.y &= Kept(kept - 2), v.z &= Kept(kept - 4), v.w &= Kept(kept - 6);
      *piece = v;
    }
    return (NonFinite(v.x) | NonFinite(v.y) | NonFinite(v.z) | NonFinite(v.w)) != 0;
  }

  __device__ static uint32_t Kept(int count) {
    return count >= 2 ? ~0u : count == 1 ? 0xFFFFu : 0u;
  }

  // Lists them and makes them 0. A lane takes whole channels. This is rare and slow.
  __device__ void ListNonFinite(int at, int group) {
    __syncwarp();
#pragma unroll 1
    for (int channel = lane_; channel < C::kValueDim; channel += 32) {
      uint32_t tokens = 0;
#pragma unroll 1
      for (int i = 0; i < 16; ++i) {
        uint4* piece = C::kTokenMajorV ? RowPiece(at, 16 * group + i, channel / 8)
                                       : ChannelPiece(at, channel, 2 * group + i / 8);
        uint16_t* value = reinterpret_cast<uint16_t*>(piece) + (C::kTokenMajorV ? channel : i) % 8;
        if (NonFinite(*value) == 0) continue;
        *value = 0;
        tokens |= 1u << i;
      }
      shared_.nan_tokens[at][channel][group] = static_cast<uint16_t>(tokens);
    }
  }

  Shared<C>& shared_;
  const int lane_;
};

}  // namespace fastattn::cuda::wgmma_q16
