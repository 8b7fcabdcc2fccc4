// The index maps on a GPU: a CTA for each row. A compact row is dealt out to warps in contiguous
// shares, so that its order stays: each warp counts its indices and writes behind those of the
// warps before it.
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/index_maps/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 8;  // values of a thread in a round of a compact row
constexpr int kRound = kThreads * kItems;

// Writes a row in place; thread 0 returns one past its last index.
template <typename Map>
__device__ __forceinline__ int64_t WriteInPlace(const Map& map, int64_t row, const MapOutput& out,
                                                int32_t* to, int* ends) {
  const auto begun = map.Begin(row);
  int end = 0;
  for (int64_t column = threadIdx.x; column < out.width; column += kThreads) {
    const int32_t index = column < out.columns ? map.At(begun, column) : kNoIndex;
    to[column] = index;
    if (index >= 0) end = static_cast<int>(column) + 1;
  }
  if (out.lengths == nullptr) return 0;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    end = max(end, __shfl_xor_sync(kFullWarp, end, lanes));
  }
  if (threadIdx.x % 32 == 0) ends[threadIdx.x / 32] = end;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) end = max(end, ends[warp]);
  return end;
}

// Writes a row's indices to its front, and -1 behind them; returns their number.
template <typename Map>
__device__ __forceinline__ int64_t WriteCompact(const Map& map, int64_t row, const MapOutput& out,
                                                int32_t* to, int* counts) {
  const auto begun = map.Begin(row);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t lower = (1u << lane) - 1;
  int64_t written = 0;
  for (int64_t base = 0; base < out.columns; base += kRound) {
    const int64_t size = out.columns - base < kRound ? out.columns - base : kRound;
    const int steps = static_cast<int>((size + kThreads - 1) / kThreads);  // of a warp, 32 each
    const int64_t first = base + warp * (steps * 32) + lane;
    int32_t values[kItems];
    uint32_t found[kItems];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t column = first + i * 32;
      values[i] = i < steps && column < out.columns ? map.At(begun, column) : kNoIndex;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      found[i] = __ballot_sync(kFullWarp, values[i] >= 0);
      count += __popc(found[i]);
    }
    __syncthreads();  // the counts of the round before have been read
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? counts[w] : 0;
      all += counts[w];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (values[i] >= 0) to[written + before + __popc(found[i] & lower)] = values[i];
      before += __popc(found[i]);
    }
    written += all;
  }
  for (int64_t column = written + threadIdx.x; column < out.width; column += kThreads) {
    to[column] = kNoIndex;
  }
  return written;
}

template <typename Map, bool kCompact>
__global__ void __launch_bounds__(kThreads)
    MapKernel(const __grid_constant__ Map map, const __grid_constant__ MapOutput out) {
  __shared__ int counts[kWarps];
  const int64_t row = blockIdx.x;
  int32_t* to = out.indices + row * out.width;
  PdlWait();
  PdlLaunchDependents();
  int64_t length;
  if constexpr (kCompact) {
    length = WriteCompact(map, row, out, to, counts);
  } else {
    length = WriteInPlace(map, row, out, to, counts);
  }
  if (threadIdx.x == 0 && out.lengths != nullptr) out.lengths[row] = static_cast<int32_t>(length);
}

// First token of a slot, in all threads; -1 if it has none.
__device__ __forceinline__ int64_t FirstToken(const PlaceTopkParams& p, int64_t slot, int* firsts) {
  constexpr int kNone = 0x7FFFFFFF;
  int first = kNone;
  for (int64_t base = 0; base < p.num_tokens; base += kThreads) {
    const int64_t token = base + threadIdx.x;
    const bool here = token < p.num_tokens && __ldg(p.batch_ids + token) == slot;
    if (here) first = static_cast<int>(token);
    if (__syncthreads_or(here)) break;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    first = min(first, __shfl_xor_sync(kFullWarp, first, lanes));
  }
  if (threadIdx.x % 32 == 0) firsts[threadIdx.x / 32] = first;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) first = min(first, firsts[warp]);
  return first == kNone ? -1 : first;
}

__global__ void __launch_bounds__(kThreads)
    PlaceKernel(const __grid_constant__ PlaceTopkParams p, const __grid_constant__ MapOutput out) {
  __shared__ int firsts[kWarps];
  const int64_t row = blockIdx.x;
  PdlWait();
  PdlLaunchDependents();
  int64_t first = -1;
  if (p.seq_lens != nullptr && p.batch_ids != nullptr) {
    first = FirstToken(p, row / p.heads, firsts);
  }
  const int64_t out_row = p.OutRow(row, first);
  if (out_row < 0) return;
  WriteInPlace(p, row, out, out.indices + out_row * out.width, firsts);
}

template <typename Map>
cudaError_t Launch(const Map& map, const MapOutput& out, bool compact, cudaStream_t stream) {
  if (out.rows == 0) return cudaSuccess;
  const auto kernel = compact ? MapKernel<Map, true> : MapKernel<Map, false>;
  return LaunchPdl(kernel, dim3(GridSize(out.rows)), dim3(kThreads), stream, map, out);
}

}  // namespace

cudaError_t LaunchIndexMap(const TopkToSlotsParams& p, const MapOutput& out, bool compact,
                           cudaStream_t stream) {
  return Launch(p, out, compact, stream);
}

cudaError_t LaunchIndexMap(const WindowParams& p, const MapOutput& out, bool compact,
                           cudaStream_t stream) {
  return Launch(p, out, compact, stream);
}

cudaError_t LaunchIndexMap(const ShortContextParams& p, const MapOutput& out, bool compact,
                           cudaStream_t stream) {
  return Launch(p, out, compact, stream);
}

cudaError_t LaunchIndexMap(const CombineParams& p, const MapOutput& out, bool compact,
                           cudaStream_t stream) {
  return Launch(p, out, compact, stream);
}

cudaError_t LaunchPlaceTopk(const PlaceTopkParams& p, const MapOutput& out, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return LaunchPdl(PlaceKernel, dim3(GridSize(p.rows)), dim3(kThreads), stream, p, out);
}

}  // namespace fastattn::cuda
