// What of a slice of columns may be among the row's k largest, in one pass over memory.
//
// A sample of the row tells a guess that somewhat more than k of its columns exceed. Whatever the
// guess, the result is exact: columns above it are candidates, those equal to it are marked in a
// bitmap, and the caller sees from their numbers whether the k largest are among them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/topk_key.h"
#include "cuda/topk/select.cuh"

namespace fastattn::cuda {

inline constexpr uint32_t kTopkNan = 0x7FFFFFFFu;
inline constexpr uint32_t kTopkLeastNumber = 0x007FFFFFu;  // key of -inf

// Columns that a thread takes at a time, and that are sampled of a row.
inline constexpr int kStreamVectors = 4;
inline constexpr int kWarpChunk = kStreamVectors * 128;
inline constexpr int kTopkSample = 4096;
// Vectors of 4 that are sampled side by side: a sector of memory.
inline constexpr int kSampleRun = 2;

// Columns [begin, end) of a row, counted from a 16-byte boundary at or before the row's range.
struct TopkSlice {
  const float* base;
  int begin, end;

  // Column of the slice's first bit in a bitmap.
  __device__ __forceinline__ int First() const { return begin & ~3; }
};

// Candidates of a CTA, in no order. `count` may exceed the capacity: then not all are there.
struct TopkCandidates {
  uint32_t* bits;    // of the floats
  int32_t* columns;  // from the slice's first on
  uint32_t capacity;
};

// The 4 columns from `at` on; NaN outside the slice.
__device__ __forceinline__ uint4 LoadVector(const TopkSlice& slice, int at) {
  if (at >= slice.begin && at + 4 <= slice.end) {
    return __ldg(reinterpret_cast<const uint4*>(slice.base + at));
  }
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool there = at + i >= slice.begin && at + i < slice.end;
    bits[i] = there ? __float_as_uint(__ldg(slice.base + at + i)) : kTopkNan;
  }
  return make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

// A float that about `rank` of a sample of the row exceed or equal. Where many equal it, it is one
// of them. The same in all CTAs of a cluster.
template <int kThreads>
__device__ __forceinline__ float GuessThreshold(const TopkSlice& row, uint32_t rank,
                                                TopkScratch* scratch) {
  constexpr int kVectors = kTopkSample / 4 / kThreads;
  constexpr int kRuns = kTopkSample / 4 / kSampleRun;
  const auto runs = static_cast<uint32_t>(max((row.end + 3) / 4 / kSampleRun, 1));
  uint4 four[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const uint32_t thread = j * kThreads + threadIdx.x;
    const uint32_t stratum = thread / kSampleRun;
    // A place in the stratum that follows no pattern, so that columns in periods are sampled alike.
    const uint64_t place = (stratum << 16) + ((stratum + 1) * 0x9E3779B1u >> 16);
    const auto run = static_cast<int>(place * runs / (uint64_t{kRuns} << 16));
    four[j] = LoadVector(row, 4 * (run * kSampleRun + static_cast<int>(thread % kSampleRun)));
  }
  uint32_t wanted = rank;
  const TopkInterval interval =
      Select<kThreads>({}, &wanted, 8 + rank / 32, scratch, [&](const auto& count) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          count(TopkKey(four[j].x), true);
          count(TopkKey(four[j].y), true);
          count(TopkKey(four[j].z), true);
          count(TopkKey(four[j].w), true);
        }
      });
  const uint32_t key = max(interval.low, kTopkLeastNumber);
  return __uint_as_float((key >> 31) != 0 ? key & 0x7FFFFFFFu : ~key);
}

// How many of the sample are to exceed the guess, so that it is almost never too high.
__device__ __forceinline__ uint32_t SampleRank(uint32_t k, int64_t size) {
  const float mean = static_cast<float>(k) * kTopkSample / static_cast<float>(size);
  const float rank = mean + 5.0f * sqrtf(mean) + 8.0f;
  return min(static_cast<uint32_t>(rank), static_cast<uint32_t>(kTopkSample));
}

// Bits of the lanes' 4 columns, as a bitmap's words: lane 8 i has word i.
__device__ __forceinline__ uint32_t WordOf(uint32_t four) {
  uint32_t word = four << 4 * (threadIdx.x % 8);
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {
    word |= __shfl_xor_sync(kFullWarp, word, distance);
  }
  return word;
}

__device__ __forceinline__ float LaneOf(const uint4& v, int i) {
  return __uint_as_float(i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w);
}

// The columns of a slice, a chunk of a CTA at a time, the next one on its way.
template <int kThreads>
struct TopkStream {
  static constexpr int kChunk = kThreads * 4 * kStreamVectors;

  uint4 next[kStreamVectors];

  static __device__ __forceinline__ int Mine() {
    return threadIdx.x / 32 * kWarpChunk + 4 * (threadIdx.x % 32);
  }

  __device__ __forceinline__ void Load(const TopkSlice& slice, int chunk) {
    if (chunk >= slice.begin && chunk + kChunk <= slice.end) {
      const auto* mine = reinterpret_cast<const uint4*>(slice.base + chunk + Mine());
#pragma unroll
      for (int j = 0; j < kStreamVectors; ++j) next[j] = __ldg(mine + 32 * j);
    } else {
#pragma unroll
      for (int j = 0; j < kStreamVectors; ++j) {
        next[j] = LoadVector(slice, chunk + Mine() + 128 * j);
      }
    }
  }

  // Calls visit(vectors, column) for each chunk: column counts from the slice's first.
  template <typename Visit>
  __device__ __forceinline__ void Run(const TopkSlice& slice, const Visit& visit) {
    const int first = slice.First();
#pragma unroll 1
    for (int chunk = first; chunk < slice.end; chunk += kChunk) {
      uint4 now[kStreamVectors];
#pragma unroll
      for (int j = 0; j < kStreamVectors; ++j) now[j] = next[j];
      Load(slice, chunk + kChunk);
      visit(now, chunk - first + Mine());
    }
  }
};

// Appends the columns above the guess and marks those equal to it. Adds to scratch->offers.
template <int kThreads>
__device__ __forceinline__ void Collect(const TopkSlice& slice, float guess,
                                        TopkStream<kThreads>* stream,
                                        const TopkCandidates& candidates, uint32_t* equal_bits,
                                        TopkScratch* scratch) {
  const int lane = threadIdx.x % 32, size = slice.end - slice.First();
  uint32_t equals = 0;
  stream->Run(slice, [&](const uint4* four, int column) {
    uint32_t above = 0;
    bool equal = false;
#pragma unroll
    for (int j = 0; j < kStreamVectors; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = LaneOf(four[j], i);
        above |= x > guess ? 1u << (4 * j + i) : 0;
        equal = equal || x == guess;
      }
    }
    if (__any_sync(kFullWarp, equal)) {
#pragma unroll
      for (int j = 0; j < kStreamVectors; ++j) {
        uint32_t mask = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) mask |= LaneOf(four[j], i) == guess ? 1u << i : 0;
        equals += __popc(mask);
        const uint32_t word = WordOf(mask);
        const int at = column + 128 * j;
        if (lane % 8 == 0 && at < size) equal_bits[at / 32] = word;
      }
    }
    const uint32_t count = __popc(above);
    uint32_t sum = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t other = __shfl_up_sync(kFullWarp, sum, distance);
      if (lane >= distance) sum += other;
    }
    const uint32_t all = __shfl_sync(kFullWarp, sum, 31);
    if (all == 0) return;
    uint32_t base = 0;
    if (lane == 0) base = atomicAdd(&scratch->offers[0], all);
    base = __shfl_sync(kFullWarp, base, 0);
    if (base + all > candidates.capacity) return;
    uint32_t at = base + sum - count;
#pragma unroll
    for (int j = 0; j < kStreamVectors; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((above >> (4 * j + i) & 1) != 0) {
          candidates.bits[at] = __float_as_uint(LaneOf(four[j], i));
          candidates.columns[at] = column + 128 * j + i;
          ++at;
        }
      }
    }
  });
  equals = __reduce_add_sync(kFullWarp, equals);
  if (lane == 0 && equals != 0) atomicAdd(&scratch->offers[1], equals);
}

}  // namespace fastattn::cuda
