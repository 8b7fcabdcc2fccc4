// Rows that a CTA holds in its registers: every column is counted, none is read twice.
//
// The first count is by the upper 11 bits of the values in fp16, which are finer than those of fp32
// wherever fp16 has the range. Few values then share the k-th largest one's bin, and their ranks
// are found in pairs. Where many do, equal ones end it; others are counted by their keys.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/topk_key.h"
#include "cuda/common/mbarrier.cuh"
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

// Threads that look through the bins, 8 each, and their named barrier.
inline constexpr int kHalfFinders = 256;
inline constexpr int kFinderBarrier = 1;

// What is larger than the k-th largest: x >= above. What is equal: others with x >= equal. `all`:
// no more are equal than are wanted.
struct ShortThreshold {
  float above, equal;
  bool all;
};

// x, in a register: the compiler would compute it anew wherever it is used, in up to ten
// instructions for an address.
template <typename T>
__device__ __forceinline__ T Kept(T x) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
  return x;
}

// *to = value where `there`, without a branch.
__device__ __forceinline__ void StoreIf(bool there, int32_t* to, int32_t value) {
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.s32 there, %2, 0;\n"
      "@there st.global.s32 [%0], %1;\n"
      "}" ::"l"(to),
      "r"(value), "r"(static_cast<int>(there))
      : "memory");
}

__device__ __forceinline__ float FloatOfKey(uint32_t key) {
  return __uint_as_float((key >> 31) != 0 ? key & 0x7FFFFFFFu : ~key);
}

// A row's values in the threads' registers, 4 columns side by side, a warp's columns in one piece.
template <int kThreads, int kVectors, bool kAligned>
struct ShortRow {
  static constexpr int kOwn = 4 * kVectors;

  float values[kOwn];  // NaN outside the range
  int origin, end;     // columns from a 16-byte boundary on; kAligned: origin is 0

  int own;  // the thread's first column

  __device__ __forceinline__ ShortRow() {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x - lane;
    own = Kept(static_cast<int>(4 * (warp * kVectors + lane)));
  }
  __device__ __forceinline__ int ColumnOf(int i) const { return own + i / 4 * 128 + i % 4; }
  __device__ __forceinline__ bool HasBegun(int i) const {
    return kAligned || ColumnOf(i) >= origin;
  }
  __device__ __forceinline__ bool IsInside(int i) const { return HasBegun(i) && ColumnOf(i) < end; }

  // Whole vectors first, all at once: a branch for each would wait for the one before.
  __device__ __forceinline__ void Load(const float* base) {
    bool partial = false;
#pragma unroll
    for (int i = 0; i < kOwn; i += 4) {
      const int at = ColumnOf(i);
      const bool whole = HasBegun(i) && at + 4 <= end;
      uint4 four = make_uint4(kShortNan, kShortNan, kShortNan, kShortNan);
      if (whole) four = __ldg(reinterpret_cast<const uint4*>(base + at));
      values[i] = __uint_as_float(four.x), values[i + 1] = __uint_as_float(four.y);
      values[i + 2] = __uint_as_float(four.z), values[i + 3] = __uint_as_float(four.w);
      partial = partial || (!whole && at < end);
    }
    if (!partial) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int first = i - i % 4;
      if ((!HasBegun(first) || ColumnOf(first) + 4 > end) && IsInside(i)) {
        values[i] = __ldg(base + ColumnOf(i));
      }
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
    const uint32_t both = 0x10001u << kHalfShift;
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kOwn; i += 2) {
      const uint32_t other = (HalfPair(values[i], values[i + 1]) ^ bin * both) & bits * both;
      if ((other & 0xFFFF) == 0) mask |= 1u << i;
      if (other < 0x10000) mask |= 2u << i;
    }
    return mask;
  }

  // Calls visit(value) for the values in a mask.
  template <typename Call>
  __device__ __forceinline__ void Visit(uint32_t mask, const Call& visit) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if ((mask >> i & 1) != 0) visit(values[i]);
    }
  }
};

// The bin of the `wanted`-th largest half, from +inf down to -inf, and then NaN. By a few warps: a
// multiprocessor full of threads is bound by the number of their instructions.
template <int kThreads>
__device__ __forceinline__ void FindHalf(TopkScratch* scratch, uint32_t wanted) {
  constexpr int kOwn = kTopkBins / kHalfFinders;
  const int thread = threadIdx.x;
  if (thread < kHalfFinders) {
    const bool positive = thread < kHalfFinders / 2;
    const int low = positive ? kTopkBins / 2 - (thread + 1) * kOwn : thread * kOwn;
    uint32_t own[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(scratch->counts + low + i);
      own[i] = four.x, own[i + 1] = four.y, own[i + 2] = four.z, own[i + 3] = four.w;
    }
    // -0 is counted with +0, and NaN at the very end, where -NaN would be.
    if (thread == 0) own[kOwn - 1] = 0;
    if (thread == kHalfFinders / 2 - 1) own[0] += scratch->counts[kHalfMinusBin];
    if (thread == kHalfFinders / 2) own[0] = 0;
    if (thread == kHalfFinders - 1) own[kOwn - 1] = scratch->counts[kHalfNanBin];
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += own[i];
    uint32_t above = SumBefore<kHalfFinders>(sum, scratch->warp_sums[0],
                                             [] { SyncNamed<kHalfFinders>(kFinderBarrier); });
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
  }
  __syncthreads();
}

// The `wanted`-th largest of `count` few values, in scratch->least, in scratch->above how many are
// larger, and in scratch->equal how many are equal. A warp ranks two at a time.
template <int kThreads>
__device__ __forceinline__ void RankFew(TopkScratch* scratch, uint32_t count, uint32_t wanted) {
  constexpr uint32_t kWarps = kThreads / 32;
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
  for (uint32_t at = threadIdx.x / 32; at < count; at += 2 * kWarps) {
    // The last one again where there is no second.
    const float mine[2] = {scratch->few[at], scratch->few[min(at + kWarps, count - 1)]};
    uint32_t sums[2] = {};
#pragma unroll 1
    for (uint32_t i = 0; i < count; i += 64) {
#pragma unroll
      for (uint32_t part = 0; part < 64; part += 32) {
        const uint32_t j = i + part + lane;
        const float other = j < count ? scratch->few[j] : __uint_as_float(kShortNan);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          sums[h] += other > mine[h] ? 1u : other == mine[h] ? 1u << 16 : 0u;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t sum = __reduce_add_sync(kFullWarp, sums[h]);
      const uint32_t larger = sum & 0xFFFF, equal = sum >> 16;
      if (lane == 0 && larger < wanted && wanted <= larger + equal) {
        scratch->least = TopkKey(__float_as_uint(mine[h]));
        scratch->above = larger;
        scratch->equal = equal;
      }
    }
  }
}

// Keys from least to greatest; `all`: each of them is among the k largest.
struct ShortKeys {
  uint32_t least, greatest;
  bool all;
};

// The keys' interval in which the `wanted`-th largest of a bin lies, for a bin of many. Changes
// `wanted` as Select does.
template <int kThreads, int kVectors, bool kAligned>
__device__ __forceinline__ ShortKeys NarrowBin(const ShortRow<kThreads, kVectors, kAligned>& row,
                                               uint32_t bin, uint32_t count, uint32_t* wanted,
                                               TopkScratch* scratch) {
  uint32_t least = ~0u, greatest = 0;
  row.Visit(row.MaskOf(bin), [&](float x) {
    const uint32_t key = TopkKey(__float_as_uint(x));
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
  if (count == *wanted || least == greatest) return {least, greatest, count == *wanted};
  const TopkInterval all{least, 32 - __clz(static_cast<int>(greatest - least))};
  const TopkInterval found = Select<kThreads>(all, wanted, 0, scratch, [&](const auto& add) {
#pragma unroll
    for (int i = 0; i < row.kOwn; ++i) {
      const uint32_t key = TopkKey(__float_as_uint(row.values[i]));
      add(key, key >= least && key <= greatest);
    }
  });
  return {found.low, min(found.low + ((1u << found.bits) - 1), greatest),
          scratch->equal == *wanted};
}

// The threshold of the k largest, and how many of those equal to it are among them.
template <int kThreads, int kVectors, bool kAligned>
__device__ __forceinline__ ShortThreshold FindThreshold(ShortRow<kThreads, kVectors, kAligned>* row,
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
    return {1.0f, 0.0f, false};
  }
  ShortKeys keys;
  if (count <= kTopkFew) {
    const uint32_t mask = row->MaskOf(bin);
    if (mask != 0) {
      uint32_t at = atomicAdd(&scratch->number, static_cast<uint32_t>(__popc(mask)));
      row->Visit(mask, [&](float x) { scratch->few[at++] = x; });
    }
    __syncthreads();
    RankFew<kThreads>(scratch, count, *wanted);
    __syncthreads();
    *wanted -= scratch->above;
    keys = {scratch->least, scratch->least, scratch->equal == *wanted};
  } else {
    keys = NarrowBin(*row, bin, count, wanted, scratch);
  }
  return {FloatOfKey(keys.greatest + 1), FloatOfKey(keys.least), keys.all};
}

// Sum over the lanes up to this one: a shuffle tells whether there is a lane that far before.
__device__ __forceinline__ uint32_t SumThrough(uint32_t x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        ".reg .u32 other;\n"
        "shfl.sync.up.b32 other|there, %0, %1, 0, 0xFFFFFFFF;\n"
        "@there add.u32 %0, %0, other;\n"
        "}"
        : "+r"(x)
        : "r"(distance));
  }
  return x;
}

// Numbers of values of each of a thread's vectors, in bytes of a word: of a warp's, at most 128.
struct VectorCounts {
  uint32_t own, before, all;  // of the thread, of the lanes before it, of the warp

  __device__ __forceinline__ void Sum() {
    const uint32_t through = SumThrough(own);
    before = through - own;
    all = __shfl_sync(kFullWarp, through, 31);
  }
  __device__ __forceinline__ uint32_t Of(int j) const { return all >> 8 * j & 0xFF; }
  __device__ __forceinline__ uint32_t Before(int j) const { return before >> 8 * j & 0xFF; }
  __device__ __forceinline__ uint32_t Total(int vectors) const {
    uint32_t sum = 0;
    for (int j = 0; j < vectors; ++j) sum += Of(j);
    return sum;
  }
};

// Writes the columns of the k largest in ascending order. `kAll`: all that are equal to the k-th.
template <bool kAll, int kThreads, int kVectors, bool kAligned>
__device__ __forceinline__ void WriteShort(const ShortRow<kThreads, kVectors, kAligned>& row,
                                           const ShortThreshold& threshold, uint32_t wanted,
                                           int32_t* out, TopkScratch* scratch) {
  static_assert(kVectors <= 4, "bytes of a word");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float least = kAll ? threshold.equal : threshold.above;
  VectorCounts larger = {}, equal = {};
#pragma unroll
  for (int i = 0; i < row.kOwn; ++i) {
    const float x = row.values[i];
    const uint32_t one = 1u << 8 * (i / 4);
    larger.own += x >= least ? one : 0;
    if (!kAll) equal.own += x >= threshold.equal ? one : 0;  // larger ones as well
  }
  if (!kAll) equal.own -= larger.own;
  const int column = kAligned ? row.own : row.own - row.origin;
  out = Kept(out);
  larger.Sum();
  if (!kAll) equal.Sum();
  // Larger ones in the lower half, equal ones in the upper.
  if (lane == 0)
    scratch->warp_sums[0][warp] = larger.Total(kVectors) + (kAll ? 0 : equal.Total(kVectors) << 16);
  __syncthreads();
  const uint32_t sums = __reduce_add_sync(kFullWarp, lane < warp ? scratch->warp_sums[0][lane] : 0);
  uint32_t larger_before = sums & 0xFFFF, equal_before = sums >> 16;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    uint32_t at = larger_before + larger.Before(j), equals = equal_before + equal.Before(j);
    larger_before += larger.Of(j), equal_before += equal.Of(j);
#pragma unroll
    for (int i = 4 * j; i < 4 * j + 4; ++i) {
      const float x = row.values[i];
      const bool is_larger = x >= least;
      const bool is_equal = !kAll && !is_larger && x >= threshold.equal;
      StoreIf(is_larger || (is_equal && equals < wanted),
              out + (kAll ? at : at + min(equals, wanted)), column + i / 4 * 128 + i % 4);
      at += is_larger;
      equals += is_equal;
    }
  }
}

// A CTA of a row, for at most kThreads * kVectors * 4 columns from a 16-byte boundary on.
// `kAligned`: ranges begin with rows, and these at 16-byte boundaries.
template <int kThreads, int kVectors, bool kAligned>
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
  // Rows of so few columns need no 64-bit numbers. All that no other kernel writes is computed
  // ahead of the wait.
  const int64_t row = blockIdx.x;
  const auto columns = static_cast<int>(p.columns), k = static_cast<int>(p.k);
  const float* first = Kept(p.logits + row * p.row_stride);
  int32_t* out = p.indices + row * p.k;
  ShortRow<kThreads, kVectors, kAligned> mine;
  PdlWait();
  PdlLaunchDependents();
  const int length = p.lengths[row];
  int start = 0;
  if (!kAligned && p.starts != nullptr) {
    start = min(max(p.starts[row], 0), columns);
    first += start;
  }
  // Columns are read before their number is known: up to the row's end, that is no harm.
  mine.origin = kAligned ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(first) / 4 % 4);
  mine.end = mine.origin + columns - start;
  mine.Load(first - mine.origin);
  const int size = min(max(length, 0), columns - start);
  if (size <= k) {
    for (int i = threadIdx.x; i < k; i += kThreads) out[i] = i < size ? i : -1;
    return;
  }
  mine.Shorten(mine.origin + size);
  auto wanted = static_cast<uint32_t>(k);
  const ShortThreshold threshold = FindThreshold(&mine, &wanted, scratch);
  if (threshold.all) {
    WriteShort<true>(mine, threshold, wanted, out, scratch);
  } else {
    WriteShort<false>(mine, threshold, wanted, out, scratch);
  }
}

}  // namespace fastattn::cuda
