// quantize_fp8. A segment is the part of a row that one scale covers: the whole row, or a group.
//
// Segments of 8 * 2^k elements up to 256 whose rows are 16-byte aligned take the vector kernel: a
// segment in 2^k lanes, 8 elements a lane, x read once. Everything else takes one CTA a segment,
// which reads x twice (the second time from cache).
#include "common/dispatch.h"
#include "common/exact.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/quantize/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;

// The problem of a launch: `count` segments of `length` elements, `per_row` of them in a row.
struct Segments {
  int64_t count;
  int64_t per_row;
  int64_t length;
};

__device__ __forceinline__ uint32_t WarpMax(uint32_t x, int lanes) {
  for (int offset = 1; offset < lanes; offset *= 2) {
    x = max(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
}

template <DType kIn, QuantGranularity kGranularity>
__global__ void __launch_bounds__(kThreads)
    QuantizeVectorKernel(const __grid_constant__ QuantizeFp8Params p, Segments segments,
                         int lanes) {
  constexpr bool kDynamic =
      kGranularity == QuantGranularity::kToken || kGranularity == QuantGranularity::kGroup;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int64_t row = index / segments.per_row;
  const int64_t column = index % segments.per_row * segments.length +
                         static_cast<int64_t>(threadIdx.x % lanes) * kChunk;
  const bool active = index < segments.count;
  const auto raw = LoadRaw<kIn>(p.x, row * p.x_row_stride + column, active);
  float x[kChunk];
  Unpack<kIn>(raw, x);
  float scale;
  if constexpr (kDynamic) {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) amax = max(amax, AbsBits(x[i]));
    scale = DynamicScale(WarpMax(amax, lanes), kActivationAmaxFloor, kE4M3Max);
    if (active && threadIdx.x % lanes == 0) p.scales[index] = scale;
  } else {
    scale = __ldg(p.scales);
  }
  const float inverse = Div(1.0f, scale);
  uint32_t words[2];
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    words[w] = PackCodes<DType::kE4M3>(Mul(x[4 * w], inverse), Mul(x[4 * w + 1], inverse),
                                       Mul(x[4 * w + 2], inverse), Mul(x[4 * w + 3], inverse));
  }
  if (active) {
    *reinterpret_cast<uint2*>(p.codes + row * p.codes_row_stride + column) =
        make_uint2(words[0], words[1]);
  }
}

template <DType kIn>
__device__ __forceinline__ float LoadOne(const void* x, int64_t index) {
  if constexpr (kIn == DType::kFloat32) {
    return __ldg(static_cast<const float*>(x) + index);
  } else {
    return Element<kIn>::Load(__ldg(static_cast<const uint16_t*>(x) + index));
  }
}

// Maximum over a CTA, in all threads.
__device__ __forceinline__ uint32_t BlockMax(uint32_t x) {
  __shared__ uint32_t warps[kThreads / 32];
  x = WarpMax(x, 32);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[threadIdx.x % (kThreads / 32)];
  return WarpMax(x, kThreads / 32);
}

template <DType kIn, QuantGranularity kGranularity>
__global__ void __launch_bounds__(kThreads)
    QuantizeSegmentKernel(const __grid_constant__ QuantizeFp8Params p, Segments segments) {
  constexpr bool kDynamic =
      kGranularity == QuantGranularity::kToken || kGranularity == QuantGranularity::kGroup;
  const int64_t index = blockIdx.x;
  const int64_t row = index / segments.per_row;
  const int64_t column = index % segments.per_row * segments.length;
  const int64_t in = row * p.x_row_stride + column;
  float scale;
  if constexpr (kDynamic) {
    uint32_t amax = 0;
    for (int64_t i = threadIdx.x; i < segments.length; i += kThreads) {
      amax = max(amax, AbsBits(LoadOne<kIn>(p.x, in + i)));
    }
    scale = DynamicScale(BlockMax(amax), kActivationAmaxFloor, kE4M3Max);
    if (threadIdx.x == 0) p.scales[index] = scale;
  } else {
    scale = __ldg(p.scales);
  }
  const float inverse = Div(1.0f, scale);
  uint8_t* codes = p.codes + row * p.codes_row_stride + column;
  for (int64_t i = threadIdx.x; i < segments.length; i += kThreads) {
    codes[i] = static_cast<uint8_t>(
        PackCodes<DType::kE4M3>(Mul(LoadOne<kIn>(p.x, in + i), inverse), 0.0f, 0.0f, 0.0f));
  }
}

// The per-tensor amax as bits in scales[0], which starts as 0.
template <DType kIn>
__global__ void __launch_bounds__(kThreads)
    AmaxKernel(const __grid_constant__ QuantizeFp8Params p) {
  const int64_t total = p.rows * p.cols;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  uint32_t amax = 0;
  const bool vectors = p.cols % kChunk == 0 && p.x_row_stride % kChunk == 0 &&
                       reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (vectors) {
    for (int64_t i = first * kChunk; i < total; i += stride * kChunk) {
      const auto raw = LoadRaw<kIn>(p.x, i / p.cols * p.x_row_stride + i % p.cols, true);
      float x[kChunk];
      Unpack<kIn>(raw, x);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) amax = max(amax, AbsBits(x[j]));
    }
  } else {
    for (int64_t i = first; i < total; i += stride) {
      amax = max(amax, AbsBits(LoadOne<kIn>(p.x, i / p.cols * p.x_row_stride + i % p.cols)));
    }
  }
  amax = BlockMax(amax);
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned*>(p.scales), amax);
}

// Kernels rather than memory sets: Paddle 2.6 cannot capture other nodes in a CUDA graph.
__global__ void ClearScaleKernel(float* scale) { *scale = 0.0f; }

__global__ void FinishTensorScaleKernel(float* scale) {
  *scale = DynamicScale(FloatBits(*scale), kActivationAmaxFloor, kE4M3Max);
}

template <DType kIn, QuantGranularity kGranularity>
cudaError_t LaunchSegments(const QuantizeFp8Params& p, cudaStream_t stream) {
  // With one scale for the tensor, rows may be cut into segments of any length.
  constexpr bool kOneScale =
      kGranularity == QuantGranularity::kStatic || kGranularity == QuantGranularity::kTensor;
  const bool aligned =
      p.cols % kChunk == 0 && p.x_row_stride % kChunk == 0 && p.codes_row_stride % kChunk == 0 &&
      reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && reinterpret_cast<uintptr_t>(p.codes) % 8 == 0;
  int64_t length = kGranularity == QuantGranularity::kGroup ? p.group_size : p.cols;
  if (kOneScale && aligned) length = kChunk;
  const Segments segments{p.rows * (p.cols / length), p.cols / length, length};
  const int64_t lanes = length / kChunk;
  if (aligned && length % kChunk == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0) {
    const int64_t ctas = (segments.count * lanes + kThreads - 1) / kThreads;
    return LaunchKernel(QuantizeVectorKernel<kIn, kGranularity>, GridSize(ctas), kThreads, stream,
                        p, segments, static_cast<int>(lanes));
  }
  return LaunchKernel(QuantizeSegmentKernel<kIn, kGranularity>, GridSize(segments.count), kThreads,
                      stream, p, segments);
}

template <DType kIn>
cudaError_t LaunchTensorAmax(const QuantizeFp8Params& p, cudaStream_t stream) {
  cudaError_t status = LaunchKernel(ClearScaleKernel, 1, 1, stream, p.scales);
  if (status != cudaSuccess) return status;
  const int64_t wanted = (p.rows * p.cols + kThreads * kChunk - 1) / (kThreads * kChunk);
  constexpr int64_t kMaxCtas = 1024;  // a few a multiprocessor: each loops over the rest
  status = LaunchKernel(AmaxKernel<kIn>, GridSize(wanted < kMaxCtas ? wanted : kMaxCtas), kThreads,
                        stream, p);
  if (status != cudaSuccess) return status;
  return LaunchKernel(FinishTensorScaleKernel, 1, 1, stream, p.scales);
}

}  // namespace

cudaError_t LaunchQuantizeFp8(const QuantizeFp8Params& p, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  using G = QuantGranularity;
  dispatch<DType::kBFloat16, DType::kFloat16, DType::kFloat32>(p.dtype, "dtype", [&](auto dtype) {
    constexpr DType kIn = decltype(dtype)::value;
    if (p.rows * p.cols == 0) {
      // An empty tensor still has a per-tensor scale: the floor's.
      if (p.granularity == G::kTensor) {
        status = LaunchKernel(ClearScaleKernel, 1, 1, stream, p.scales);
        if (status == cudaSuccess) {
          status = LaunchKernel(FinishTensorScaleKernel, 1, 1, stream, p.scales);
        }
      }
      return;
    }
    switch (p.granularity) {
      case G::kTensor:
        status = LaunchTensorAmax<kIn>(p, stream);
        if (status == cudaSuccess) status = LaunchSegments<kIn, G::kTensor>(p, stream);
        return;
      case G::kStatic:
        status = LaunchSegments<kIn, G::kStatic>(p, stream);
        return;
      case G::kToken:
        status = LaunchSegments<kIn, G::kToken>(p, stream);
        return;
      case G::kGroup:
        status = LaunchSegments<kIn, G::kGroup>(p, stream);
        return;
    }
  });
  return status;
}

}  // namespace fastattn::cuda
