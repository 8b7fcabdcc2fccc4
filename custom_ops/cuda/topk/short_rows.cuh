// Rows that a CTA holds in its registers: every column is counted, none is read twice.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/topk_key.h"
#include "cuda/common/pdl.cuh"
#include "cuda/topk/select.cuh"
#include "params/topk.h"

namespace fastattn::cuda {

// Keys of 4 columns. Those outside [begin, end) get 0, so that NaN is 1 here: a key that no number
// has either.
__device__ __forceinline__ uint4 ShortKeys(const uint4& bits, int at, int begin, int end) {
  const auto key = [&](uint32_t x, int i) {
    return at + i >= begin && at + i < end ? max(TopkKey(x), 1u) : 0u;
  };
  return make_uint4(key(bits.x, 0), key(bits.y, 1), key(bits.z, 2), key(bits.w, 3));
}

// The 4 columns from `at` on of those from 0 to `size`, which start `origin` behind a boundary.
__device__ __forceinline__ uint4 LoadWithin(const float* base, int at, int origin, int size) {
  if (at >= origin && at + 4 <= size) return __ldg(reinterpret_cast<const uint4*>(base + at));
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool there = at + i >= origin && at + i < size;
    bits[i] = there ? __float_as_uint(__ldg(base + at + i)) : 0;
  }
  return make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

// Larger and equal ones of 4 keys, in the lower and the upper half.
__device__ __forceinline__ uint32_t CountChosen(const uint4& keys, const TopkInterval& interval) {
  const auto one = [&](uint32_t key) {
    return interval.IsBelow(key) ? 1u : interval.Has(key) ? 1u << 16 : 0u;
  };
  return one(keys.x) + one(keys.y) + one(keys.z) + one(keys.w);
}

// A CTA of a row, for at most kThreads * kVectors * 4 columns from a 16-byte boundary on.
template <int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) ShortTopkKernel(const TopkParams p) {
  __shared__ TopkScratch shared;
  TopkScratch* scratch = &shared;
  for (int i = threadIdx.x; i < kTopkBins; i += kThreads) scratch->counts[i] = 0;
  PdlWait();
  PdlLaunchDependents();
  const int64_t row = blockIdx.x;
  const int64_t start = p.starts == nullptr ? 0 : p.starts[row];
  // Columns are read before their number is known: up to the row's end, that is no harm.
  const TopkRange whole = TopkRangeOf(start, p.columns, p.columns);
  const float* range_begin = p.logits + row * p.row_stride + whole.begin;
  const int origin = static_cast<int>(reinterpret_cast<uintptr_t>(range_begin) / 4 % 4);
  const float* base = range_begin - origin;
  uint4 keys[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    keys[j] = LoadWithin(base, 4 * (j * kThreads + static_cast<int>(threadIdx.x)), origin,
                         origin + static_cast<int>(whole.size));
  }
  const auto size = static_cast<int>(TopkRangeOf(start, p.lengths[row], p.columns).size);
  int32_t* out = p.indices + row * p.k;
  const auto k = static_cast<int>(p.k);
  if (size <= k) {
    for (int i = threadIdx.x; i < k; i += kThreads) out[i] = i < size ? i : -1;
    return;
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    keys[j] = ShortKeys(keys[j], 4 * (j * kThreads + static_cast<int>(threadIdx.x)), origin,
                        origin + size);
  }
  __syncthreads();  // the counts are clear
  auto wanted = static_cast<uint32_t>(k);
  const TopkInterval interval = Select<kThreads>({}, &wanted, 0, scratch, [&](const auto& count) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      count(keys[j].x, true);
      count(keys[j].y, true);
      count(keys[j].z, true);
      count(keys[j].w, true);
    }
  });
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t before[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const uint32_t own = CountChosen(keys[j], interval);
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
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const uint32_t four[4] = {keys[j].x, keys[j].y, keys[j].z, keys[j].w};
    uint32_t larger = before[j] & 0xFFFF, equal = before[j] >> 16;
    const int column = 4 * (j * kThreads + static_cast<int>(threadIdx.x)) - origin;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (interval.IsBelow(four[i])) {
        out[larger++ + min(equal, wanted)] = column + i;
      } else if (interval.Has(four[i])) {
        if (equal < wanted) out[larger + equal] = column + i;
        ++equal;
      }
    }
  }
}

}  // namespace fastattn::cuda
