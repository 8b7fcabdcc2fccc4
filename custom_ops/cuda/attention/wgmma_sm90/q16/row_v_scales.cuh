// V's per-token scales where a query may see only a part of a KV tile.
//
// Elsewhere a KV tile's values are multiplied with their scales before the products, relative to
// one power of two for all queries. In such a KV tile what one query's output is relative to must
// not depend on what another query sees: the values are multiplied with the mantissas of their
// scales alone, and the probabilities of a row with the powers of two, over the largest one that
// the row sees.
#pragma once

#include "cuda/attention/wgmma_sm90/common/epilogue.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/row_sums.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/shared_address.cuh"
#include "cuda/common/warp_scan.cuh"

namespace fastattn::cuda::wgmma_q16 {

template <class C>
class RowVScales {
 public:
  __device__ __forceinline__ void Start() { own_ = false; }

  // Whether each row has a V scale of its own. Their sums do not come from the products then.
  __device__ __forceinline__ bool Own() const { return C::kPerTokenScales && own_; }

  // Whether a KV tile needs Follow().
  __device__ __forceinline__ bool Change(const Shared<C>& shared, uint32_t slot) const {
    return own_ || IsOwn(shared, slot);
  }

  // What row h's output is relative to; `common`: where rows have no scale of their own.
  __device__ __forceinline__ float VScale(int h, float common) const {
    return Own() ? v_scale_[h] : common;
  }

  // Takes up a KV tile whose probabilities are in `words`: `ratio` is what the outputs so far are
  // multiplied with. No product is under way.
  __device__ __forceinline__ void Follow(const Shared<C>& shared, uint32_t slot, int buffer,
                                         int start, uint32_t (&words)[C::kScores / 2],
                                         RowSums<C>& sums, float (&ratio)[2]) {
    const float common = fabsf(shared.common_v_scale[slot]);
    const bool own = IsOwn(shared, slot);
    const int before_lane = own ? MaxOfLanesBefore(LargestOfLane(shared, slot)) : 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float before = own_ ? v_scale_[h] : common;
      float v_scale = common;
      if (own) {
        v_scale = fmaxf(before, LargestSeen(shared, slot, buffer, start, h, before_lane));
        sums.AddRow(h, Scale(shared, slot, h, v_scale, words));
      }
      // The ratio is finite, so that an output of 0 stays 0.
      ratio[h] = fminf(before / v_scale, 0x1p127f);
      v_scale_[h] = v_scale;
    }
    own_ = own;
  }

 private:
  // The flag is read again where it is asked for: registers are short.
  __device__ __forceinline__ static bool IsOwn(const Shared<C>& shared, uint32_t slot) {
    const volatile float& common = shared.common_v_scale[slot];
    return __float_as_int(common) < 0;
  }

  // No scale needs a smaller power of two.
  static constexpr int kLeastExponent = C::kNibbleOperands ? 73 : 61;

  // A thread's columns are two of every eight.
  __device__ __forceinline__ static uint32_t Exponents(const Shared<C>& shared, uint32_t slot) {
    return SharedAddress(shared.value_exponents[slot]) + 2 * (Lane<true>() % 4);
  }

  // Loads two exponents. Volatile, because all at once would take too many registers.
  __device__ __forceinline__ static int2 LoadPair(uint32_t address) {
    uint16_t pair;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(pair) : "r"(address));
    return make_int2(pair & 0xFF, pair >> 8);
  }

  __device__ __forceinline__ static uint32_t LoadFour(const Shared<C>& shared, uint32_t slot,
                                                      int token) {
    uint32_t four;
    asm volatile("ld.shared.u32 %0, [%1];"
                 : "=r"(four)
                 : "r"(SharedAddress(shared.value_exponents[slot]) + token));
    return four;
  }

  __device__ __forceinline__ static int LargestOf(uint32_t four) {
    const uint32_t two = __vmaxu4(four, four >> 16);
    return static_cast<int>(max(two & 0xFF, two >> 8 & 0xFF));
  }

  // The largest exponent of this lane's four tokens.
  __device__ __forceinline__ static int LargestOfLane(const Shared<C>& shared, uint32_t slot) {
    static_assert(C::kKeys <= 128);
    const int first = 4 * Lane<true>();
    return first < C::kKeys ? LargestOf(LoadFour(shared, slot, first)) : 0;
  }

  // The largest power of two among the scales of tokens that row h sees. `before_lane`: the largest
  // exponent of the tokens before this lane's four.
  __device__ __forceinline__ static float LargestSeen(const Shared<C>& shared, uint32_t slot,
                                                      int buffer, int start, int h,
                                                      int before_lane) {
    const int2 visible = shared.visible[buffer][QueryIndex<true>(h)];
    const int begin = visible.x - start, end = min(visible.y - start, C::kKeys);
    int largest = kLeastExponent;
    if (__any_sync(~0u, begin > 0 && end > 0)) {  // a window begins in the KV tile
      const uint32_t exponents = Exponents(shared, slot);
      const int first = 2 * (Lane<true>() % 4);
#pragma unroll 1
      for (int i = 0; i < C::kKeys; i += 8) {
        const int2 pair = LoadPair(exponents + i);
        const int token = first + i;
        if (token >= begin && token < end) largest = max(largest, pair.x);
        if (token + 1 >= begin && token + 1 < end) largest = max(largest, pair.y);
      }
      largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
    } else {
      const int last = max(end, 1) - 1;
      const uint32_t seen = LoadFour(shared, slot, last / 4 * 4) & (~0u >> (24 - last % 4 * 8));
      const int before = __shfl_sync(~0u, before_lane, last / 4);
      if (end > 0) largest = max(largest, max(before, LargestOf(seen)));
    }
    return __int_as_float(largest << 23);
  }

  // Multiplies row h's probabilities; returns the sum of what they were.
  __device__ __forceinline__ static float Scale(const Shared<C>& shared, uint32_t slot, int h,
                                                float v_scale, uint32_t (&words)[C::kScores / 2]) {
    const uint32_t exponents = Exponents(shared, slot);
    const int top = static_cast<int>(__float_as_uint(v_scale) >> 23);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < C::kKeys / 8; ++i) {
      uint32_t& word = words[2 * i + h];
      const float2 p = __half22float2(*reinterpret_cast<const __half2*>(&word));
      sum += p.x;
      sum += p.y;
      // Exponents of masked keys may be above the top.
      const int2 pair = LoadPair(exponents + 8 * i);
      const int x = max(min(pair.x - top, 0), -126), y = max(min(pair.y - top, 0), -126);
      word = PackPair<DType::kFloat16>(p.x * __uint_as_float((127 + x) << 23),
                                       p.y * __uint_as_float((127 + y) << 23));
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    return sum + __shfl_xor_sync(~0u, sum, 2);
  }

  bool own_;
  float v_scale_[2];
};

}  // namespace fastattn::cuda::wgmma_q16
