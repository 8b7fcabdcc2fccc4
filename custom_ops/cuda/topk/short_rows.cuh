// Rows that a CTA holds in its registers: every column is counted, none is read twice.
//
// The first count is by the upper 11 bits of the values in fp16, which are finer than those of fp32
// wherever fp16 has the range. Few values then share the k-th largest one's bin, and their ranks
// are found in pairs. Where many do, equal ones end it; others are counted by their keys.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/topk_key.h"
#include "cuda/common/pdl.cuh"
#include "cuda/topk/half_pair.cuh"
#include "cuda/topk/select.cuh"
#include "params/topk.h"

namespace fastattn::cuda {

inline constexpr uint32_t kShortNan = 0x7FFFFFFFu;

// Bins of fp16 values, by sign, exponent and 5 bits of the mantissa.
inline constexpr int kHalfShift = 5;
inline constexpr uint32_t kHalfNanBin = 0x7FFF >> kHalfShift;  // no other value is in it
inline constexpr uint32_t kHalfZeroBin = 0;                    // together with that of -0
inline constexpr uint32_t kHalfMinusBin = 0x8000 >> kHalfShift;

// What is larger than the k-th largest: x >= above. What is equal: others with x >= equal.
struct ShortThreshold {
  float above, equal;
};

__device__ __forceinline__ float FloatOfKey(uint32_t key) {
  return __uint_as_float((key >> 31) != 0 ? key & 0x7FFFFFFFu : ~key);
}

// A row's values in the threads' registers, 4 columns side by side.
template <int kThreads, int kVectors>
struct ShortRow {
  static constexpr int kOwn = 4 * kVectors;

  float values[kOwn];  // NaN outside the range
  int origin, end;     // columns from a 16-byte boundary on

  static __device__ __forceinline__ int ColumnOf(int i) {
    return 4 * (i / 4 * kThreads + static_cast<int>(threadIdx.x)) + i % 4;
  }
  __device__ __forceinline__ bool IsInside(int i) const {
    return ColumnOf(i) >= origin && ColumnOf(i) < end;
  }

  // Whole vectors first, all at once: a branch for each would wait for the one before.
  __device__ __forceinline__ void Load(const float* base) {
    bool partial = false;
#pragma unroll
    for (int i = 0; i < kOwn; i += 4) {
      const int at = ColumnOf(i);
      const bool whole = at >= origin && at + 4 <= end;
      uint4 four = make_uint4(kShortNan, kShortNan, kShortNan, kShortNan);
      if (whole) four = __ldg(reinterpret_cast<const uint4*>(base + at));
      values[i] = __uint_as_float(four.x), values[i + 1] = __uint_as_float(four.y);
      values[i + 2] = __uint_as_float(four.z), values[i + 3] = __uint_as_float(four.w);
      partial = partial || (!whole && at < end);
    }
    if (!partial) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = ColumnOf(i - i % 4);
      if ((at < origin || at + 4 > end) && IsInside(i)) values[i] = __ldg(base + ColumnOf(i));
    }
  }
  __device__ __forceinline__ void Shorten(int new_end) {
    if (new_end == end) return;
    end = new_end;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!IsInside(i)) values[i] = __uint_as_float(kShortNan);
    }
  }

  // Adds the values to the bins of their halves.
  __device__ __forceinline__ void CountHalves(uint32_t* counts) {
#pragma unroll
    for (int i = 0; i < kOwn; i += 2) {
      const uint32_t pair = HalfPair(values[i], values[i + 1]);
      atomicAdd(counts + ((pair & 0xFFFF) >> kHalfShift), 1u);
      atomicAdd(counts + (pair >> (16 + kHalfShift)), 1u);
    }
  }

  // Which values are in a bin, except NaN's.
  __device__ __forceinline__ uint32_t MaskOf(uint32_t bin) const {
    const uint32_t bits = bin == kHalfZeroBin ? 0x7FFFu >> kHalfShift : 0xFFFFu >> kHalfShift;
    const uint32_t low_bits = bits << kHalfShift, low = bin << kHalfShift;
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kOwn; i += 2) {
      const uint32_t pair = HalfPair(values[i], values[i + 1]);
      mask |= (pair & low_bits) == low ? 1u << i : 0;
      mask |= (pair & low_bits << 16) == low << 16 ? 2u << i : 0;
    }
    return mask;
  }

  // Calls visit(key) for the values in a mask.
  template <typename Call>
  __device__ __forceinline__ void Visit(uint32_t mask, const Call& visit) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if ((mask >> i & 1) != 0) visit(TopkKey(__float_as_uint(values[i])));
    }
  }
};

// The bin of the `wanted`-th largest half, from +inf down to -inf, and then NaN.
template <int kThreads>
__device__ __forceinline__ void FindHalf(TopkScratch* scratch, uint32_t wanted) {
  constexpr int kOwn = kTopkBins / kThreads;
  const int thread = threadIdx.x;
  const bool positive = thread < kThreads / 2;
  const int low = positive ? kTopkBins / 2 - (thread + 1) * kOwn : thread * kOwn;
  uint32_t own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i += 2) {
    const uint2 two = *reinterpret_cast<const uint2*>(scratch->counts + low + i);
    own[i] = two.x, own[i + 1] = two.y;
  }
  // -0 is counted with +0, and NaN at the very end, where -NaN would be.
  if (thread == 0) own[kOwn - 1] = 0;
  if (thread == kThreads / 2 - 1) own[0] += scratch->counts[kHalfMinusBin];
  if (thread == kThreads / 2) own[0] = 0;
  if (thread == kThreads - 1) own[kOwn - 1] = scratch->counts[kHalfNanBin];
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += own[i];
  uint32_t above = SumBefore<kThreads>(sum, scratch->warp_sums[0]);
  if (above < wanted && wanted <= above + sum) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = positive ? kOwn - 1 - i : i;
      const uint32_t count = positive ? own[kOwn - 1 - i] : own[i];
      if (above < wanted && wanted <= above + count) {
        scratch->digit = low + at;
        scratch->above = above;
        scratch->equal = count;
      }
      above += count;
    }
  }
  __syncthreads();
}

// The `wanted`-th largest of `count` few keys, in scratch->least, and in scratch->above how many
// are larger.
template <int kThreads>
__device__ __forceinline__ void RankFew(TopkScratch* scratch, uint32_t count, uint32_t wanted) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
  for (uint32_t at = threadIdx.x / 32; at < count; at += kThreads / 32) {
    const uint32_t key = scratch->few[at];
    uint32_t sum = 0;
#pragma unroll
    for (uint32_t i = lane; i < kTopkFew + lane; i += 32) {
      const uint32_t other = scratch->few[i];
      sum += i >= count ? 0u : other > key ? 1u : other == key ? 1u << 16 : 0u;
    }
    sum = __reduce_add_sync(kFullWarp, sum);
    const uint32_t larger = sum & 0xFFFF, equal = sum >> 16;
    if (lane == 0 && larger < wanted && wanted <= larger + equal) {
      scratch->least = key;
      scratch->above = larger;
    }
  }
}

// The keys' interval in which the `wanted`-th largest of a bin lies, both ends included, for a bin
// of many. Changes `wanted` as Select does.
template <int kThreads, int kVectors>
__device__ __forceinline__ uint2 NarrowBin(const ShortRow<kThreads, kVectors>& row, uint32_t bin,
                                           uint32_t count, uint32_t* wanted, TopkScratch* scratch) {
  uint32_t least = ~0u, greatest = 0;
  row.Visit(row.MaskOf(bin), [&](uint32_t key) {
    least = min(least, key);
    greatest = max(greatest, key);
  });
  least = __reduce_min_sync(kFullWarp, least);
  greatest = __reduce_max_sync(kFullWarp, greatest);
  if (threadIdx.x % 32 == 0) {
    atomicMin(&scratch->least, least);
    atomicMax(&scratch->greatest, greatest);
  }
  ClearCounts<kThreads>(scratch);
  __syncthreads();
  least = scratch->least;
  greatest = scratch->greatest;
  if (count == *wanted || least == greatest) return make_uint2(least, greatest);
  const TopkInterval all{least, 32 - __clz(static_cast<int>(greatest - least))};
  const TopkInterval found = Select<kThreads>(all, wanted, 0, scratch, [&](const auto& add) {
#pragma unroll
    for (int i = 0; i < row.kOwn; ++i) {
      const uint32_t key = TopkKey(__float_as_uint(row.values[i]));
      add(key, key >= least && key <= greatest);
    }
  });
  return make_uint2(found.low, min(found.low + ((1u << found.bits) - 1), greatest));
}

// The threshold of the k largest, and how many of those equal to it are among them.
template <int kThreads, int kVectors>
__device__ __forceinline__ ShortThreshold FindThreshold(ShortRow<kThreads, kVectors>* row,
                                                        uint32_t* wanted, TopkScratch* scratch) {
  row->CountHalves(scratch->counts);
  __syncthreads();
  FindHalf<kThreads>(scratch, *wanted);
  const uint32_t bin = scratch->digit, count = scratch->equal;
  *wanted -= scratch->above;
  if (bin == kTopkBins - 1) {  // all numbers, and the first of the NaNs
#pragma unroll
    for (int i = 0; i < row->kOwn; ++i) {
      const float x = row->values[i];
      row->values[i] = x == x ? 1.0f : row->IsInside(i) ? 0.0f : -1.0f;
    }
    return {1.0f, 0.0f};
  }
  uint2 keys;
  if (count <= kTopkFew) {
    const uint32_t mask = row->MaskOf(bin);
    if (mask != 0) {
      uint32_t at = atomicAdd(&scratch->number, static_cast<uint32_t>(__popc(mask)));
      row->Visit(mask, [&](uint32_t key) { scratch->few[at++] = key; });
    }
    __syncthreads();
    RankFew<kThreads>(scratch, count, *wanted);
    __syncthreads();
    *wanted -= scratch->above;
    keys = make_uint2(scratch->least, scratch->least);
  } else {
    keys = NarrowBin(*row, bin, count, wanted, scratch);
  }
  return {FloatOfKey(keys.y + 1), FloatOfKey(keys.x)};
}

// Writes the columns of the k largest in ascending order.
template <int kThreads, int kVectors>
__device__ __forceinline__ void WriteShort(const ShortRow<kThreads, kVectors>& row,
                                           const ShortThreshold& threshold, uint32_t wanted,
                                           int32_t* out, int k, TopkScratch* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t before[kVectors];  // larger ones in the lower half, equal ones in the upper
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = row.values[4 * j + i];
      own += x >= threshold.above ? 1u : x >= threshold.equal ? 1u << 16 : 0u;
    }
    uint32_t sum = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t other = __shfl_up_sync(kFullWarp, sum, distance);
      if (lane >= distance) sum += other;
    }
    before[j] = sum - own;
    if (lane == 31) scratch->warp_sums[j][warp] = sum;
  }
  __syncthreads();
  uint32_t base_count = 0;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const uint32_t sums = lane < kThreads / 32 ? scratch->warp_sums[j][lane] : 0;
    before[j] += base_count + __reduce_add_sync(kFullWarp, lane < warp ? sums : 0);
    base_count += __reduce_add_sync(kFullWarp, sums);
  }
#if defined(FASTATTN_TOPK_STAGED)
  int32_t* to = k <= kTopkBins ? reinterpret_cast<int32_t*>(scratch->counts) : out;
#else
  int32_t* to = out;
#endif
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    uint32_t larger = before[j] & 0xFFFF, equal = before[j] >> 16;
#pragma unroll
    for (int i = 4 * j; i < 4 * j + 4; ++i) {
      const float x = row.values[i];
      const bool is_larger = x >= threshold.above;
      const bool is_equal = !is_larger && x >= threshold.equal;
      if (is_larger || (is_equal && equal < wanted)) {
        to[larger + min(equal, wanted)] = row.ColumnOf(i) - row.origin;
      }
      larger += is_larger;
      equal += is_equal;
    }
  }
#if defined(FASTATTN_TOPK_STAGED)
  if (k > kTopkBins) return;
  __syncthreads();
  for (int i = threadIdx.x; i < k; i += kThreads) out[i] = to[i];
#endif
}

// A CTA of a row, for at most kThreads * kVectors * 4 columns from a 16-byte boundary on.
template <int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) ShortTopkKernel(const TopkParams p) {
  __shared__ TopkScratch shared;
  TopkScratch* scratch = &shared;
  ClearCounts<kThreads>(scratch);
  if (threadIdx.x == 0) {
    scratch->number = 0;
    scratch->least = ~0u;
    scratch->greatest = 0;
  }
  __syncthreads();
  PdlWait();
  PdlLaunchDependents();
  const int64_t row = blockIdx.x;
  const int32_t length = p.lengths[row];
  const int64_t start = p.starts == nullptr ? 0 : p.starts[row];
  // Columns are read before their number is known: up to the row's end, that is no harm.
  const TopkRange whole = TopkRangeOf(start, p.columns, p.columns);
  const float* first = p.logits + row * p.row_stride + whole.begin;
  ShortRow<kThreads, kVectors> mine;
  mine.origin = static_cast<int>(reinterpret_cast<uintptr_t>(first) / 4 % 4);
  mine.end = mine.origin + static_cast<int>(whole.size);
  mine.Load(first - mine.origin);
  const auto size = static_cast<int>(TopkRangeOf(start, length, p.columns).size);
  int32_t* out = p.indices + row * p.k;
  const auto k = static_cast<int>(p.k);
  if (size <= k) {
    for (int i = threadIdx.x; i < k; i += kThreads) out[i] = i < size ? i : -1;
    return;
  }
  mine.Shorten(mine.origin + size);
  auto wanted = static_cast<uint32_t>(k);
  const ShortThreshold threshold = FindThreshold(&mine, &wanted, scratch);
  WriteShort(mine, threshold, wanted, out, k, scratch);
}

}  // namespace fastattn::cuda
