// Chooses the kernel and the CTA shape of a merge, for one input dtype.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <numeric>

#include "common/dispatch.h"
#include "cuda/common/launch.cuh"
#include "cuda/merge/dense_kernel.cuh"
#include "cuda/merge/launch.h"
#include "cuda/merge/scalar_kernel.cuh"
#include "cuda/merge/vector_kernel.cuh"

namespace fastattn::cuda {

inline int CeilPowerOfTwo(int64_t x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

inline int Log2(int64_t power) {
  int log2 = 0;
  while (int64_t{1} << log2 < power) ++log2;
  return log2;
}

// Whether everything is 16-byte aligned (the output as far as a pack's elements go) and fits 32-bit
// strides.
inline bool FitsVectors(const MergeParams& p, int width) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  if (p.head_dim % width != 0 || p.head_dim == 0) return false;
  if (address(p.prefix_output) % 16 != 0 || address(p.suffix_output) % 16 != 0) return false;
  if (address(p.output) % (width * SizeOf(StoredType(p.output_kind, p.dtype))) != 0) return false;
  for (const int64_t stride : {p.prefix_token_stride, p.prefix_head_stride, p.suffix_token_stride,
                               p.suffix_head_stride, p.output_token_stride, p.output_head_stride}) {
    if (stride % width != 0) return false;
  }
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  for (const int64_t extent :
       {p.prefix_token_stride, p.prefix_head_stride, p.suffix_token_stride, p.suffix_head_stride,
        p.output_token_stride, p.output_head_stride, p.prefix_lse_head_stride,
        p.prefix_lse_token_stride, p.suffix_lse_head_stride, p.suffix_lse_token_stride,
        p.output_lse_head_stride, p.output_lse_token_stride, p.output_scales_token_stride,
        p.num_tokens + kMaxMergeThreads, int64_t{p.num_heads} * p.head_dim + kMaxMergeThreads}) {
    if (extent > kMost || extent < -kMost) return false;
  }
  return true;
}

inline MergePointers PointersOf(const MergeParams& p) {
  return {p.prefix_output, p.suffix_output, p.prefix_lse, p.suffix_lse,
          p.output_scale,  p.output,        p.output_lse, p.output_scales};
}

inline MergeVectorParams VectorParams(const MergeParams& p) {
  const auto narrow = [](int64_t x) { return static_cast<int>(x); };
  MergeVectorParams v;
  static_cast<MergePointers&>(v) = PointersOf(p);
  v.num_tokens = narrow(p.num_tokens);
  v.merged_tokens = narrow(p.merged_tokens);
  v.num_heads = p.num_heads;
  v.packs = 0;
  v.prefix_token_stride = narrow(p.prefix_token_stride);
  v.prefix_head_stride = narrow(p.prefix_head_stride);
  v.suffix_token_stride = narrow(p.suffix_token_stride);
  v.suffix_head_stride = narrow(p.suffix_head_stride);
  v.output_token_stride = narrow(p.output_token_stride);
  v.output_head_stride = narrow(p.output_head_stride);
  v.prefix_lse_head_stride = narrow(p.prefix_lse_head_stride);
  v.prefix_lse_token_stride = narrow(p.prefix_lse_token_stride);
  v.suffix_lse_head_stride = narrow(p.suffix_lse_head_stride);
  v.suffix_lse_token_stride = narrow(p.suffix_lse_token_stride);
  v.output_lse_head_stride = narrow(p.output_lse_head_stride);
  v.output_lse_token_stride = narrow(p.output_lse_token_stride);
  v.output_scales_token_stride = narrow(p.output_scales_token_stride);
  v.log2_segment = 0;
  return v;
}

// `lanes` threads a head, and heads in multiples of `head_multiple`.
struct MergeShape {
  int lanes = 0;
  int head_multiple = 1;
  int segment = 1;
};

// Threads of a head for dynamic FP8, where a group's threads must be an aligned power of two inside
// a warp; lanes = 0 when they cannot be.
inline MergeShape DynamicShape(const MergeParams& p, int width) {
  const int packs = p.head_dim / width;
  MergeShape shape;
  if (p.group_size == p.head_dim) {
    // A head is a group: idle threads fill it up to a power of two.
    shape.segment = CeilPowerOfTwo(packs);
    shape.lanes = shape.segment;
  } else if (p.group_size % width == 0 &&
             CeilPowerOfTwo(p.group_size / width) * width == p.group_size) {
    shape.segment = p.group_size / width;
    shape.lanes = packs;
    shape.head_multiple = shape.segment / std::gcd(packs, shape.segment);
  }
  if (shape.segment > 32 || shape.lanes * shape.head_multiple > kMaxMergeThreads) shape.lanes = 0;
  return shape;
}

// For parameters that FitsVectors. Returns whether this kernel can do them, and sets `status` then.
template <DType kIn, MergeOutput kOutput>
bool LaunchMergeVectors(const MergeParams& p, cudaStream_t stream, cudaError_t& status) {
  constexpr int kThreads = 128;
  constexpr int kTokens = 8;  // fp32 LSEs in a sector
  constexpr int kWidth = kPackWidth<kIn>;
  MergeVectorParams v = VectorParams(p);
  v.packs = p.head_dim / kWidth;
  MergeShape shape;
  shape.lanes = v.packs;
  if constexpr (kOutput == MergeOutput::kDynamicFp8) {
    shape = DynamicShape(p, kWidth);
    v.log2_segment = Log2(shape.segment);
  }
  if (shape.lanes == 0 || shape.lanes > kMaxMergeThreads) return false;

  const int per_token = shape.lanes * shape.head_multiple;
  int tokens = CeilPowerOfTwo(p.num_tokens < kTokens ? p.num_tokens : kTokens);
  while (tokens > 1 && tokens * per_token > kThreads) tokens /= 2;
  int heads = shape.head_multiple;
  while (heads < p.num_heads && 2 * heads * tokens * shape.lanes <= kThreads) heads *= 2;
  const int64_t columns = (int64_t{p.num_heads} + heads - 1) / heads;
  if (columns > 65535) return false;
  const dim3 grid(static_cast<unsigned>((p.num_tokens + tokens - 1) / tokens),
                  static_cast<unsigned>(columns));
  const dim3 block(shape.lanes, heads, tokens);
  status = LaunchKernel(MergeVectorKernel<kIn, kOutput>, grid, block, stream, v);
  return true;
}

// Whether heads follow each other in memory, all LSEs have the same strides, and rows * lanes and
// LSE indices fit 31 bits.
inline bool IsDense(const MergeParams& p, int64_t lanes) {
  const int64_t token = int64_t{p.num_heads} * p.head_dim;
  for (const int64_t stride : {p.prefix_head_stride, p.suffix_head_stride, p.output_head_stride}) {
    if (stride != p.head_dim) return false;
  }
  for (const int64_t stride :
       {p.prefix_token_stride, p.suffix_token_stride, p.output_token_stride}) {
    if (stride != token) return false;
  }
  const int64_t head_stride = p.output_lse_head_stride, token_stride = p.output_lse_token_stride;
  if (p.prefix_lse_head_stride != head_stride || p.suffix_lse_head_stride != head_stride ||
      p.prefix_lse_token_stride != token_stride || p.suffix_lse_token_stride != token_stride) {
    return false;
  }
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  return head_stride >= 0 && token_stride >= 0 &&
         head_stride * p.num_heads + token_stride * p.num_tokens <= kMost &&
         p.num_tokens * p.num_heads * lanes <= kMost - kDenseMergeThreads;
}

// Returns and sets the same as LaunchMergeVectors.
template <DType kIn, MergeOutput kOutput, int kPacks>
bool LaunchMergeDense(const MergeParams& p, cudaStream_t stream, cudaError_t& status) {
  constexpr int kWidth = kPackWidth<kIn>;
  const int packs = p.head_dim / kWidth;
  const int lanes = CeilPowerOfTwo((packs + kPacks - 1) / kPacks);
  if (lanes > 32 || !IsDense(p, lanes)) return false;
  MergeDenseParams d;
  d.log2_segment = 0;
  if constexpr (kOutput == MergeOutput::kDynamicFp8) {
    // A group is a row, or an aligned power of two of threads none of which idles.
    int segment = lanes;
    if (p.group_size != p.head_dim) {
      segment = p.group_size / kWidth;
      if (kPacks > 1 || packs != lanes || p.group_size % kWidth != 0) return false;
      if (segment > 32 || CeilPowerOfTwo(segment) != segment) return false;
    }
    if (p.output_scales_token_stride * p.group_size != int64_t{p.num_heads} * p.head_dim) {
      return false;
    }
    d.log2_segment = Log2(segment);
  }
  static_cast<MergePointers&>(d) = PointersOf(p);
  d.rows = static_cast<uint32_t>(p.num_tokens * p.num_heads);
  d.merged_rows = static_cast<uint32_t>(p.merged_tokens * p.num_heads);
  d.heads = Divisor(static_cast<uint32_t>(p.num_heads));
  d.packs = static_cast<uint32_t>(packs);
  d.lse_head_stride = static_cast<int>(p.output_lse_head_stride);
  d.lse_token_stride = static_cast<int>(p.output_lse_token_stride);
  d.log2_lanes = Log2(lanes);
  const uint32_t threads = d.rows << d.log2_lanes;
  const dim3 grid((threads + kDenseMergeThreads - 1) / kDenseMergeThreads);
  const auto kernel = packs == lanes * kPacks ? MergeDenseKernel<kIn, kOutput, kPacks, true>
                                              : MergeDenseKernel<kIn, kOutput, kPacks, false>;
  status = LaunchPdl(kernel, grid, dim3(kDenseMergeThreads), stream, d);
  return true;
}

template <DType kIn, MergeOutput kOutput>
cudaError_t LaunchMergeScalars(const MergeParams& p, cudaStream_t stream) {
  constexpr int64_t kMostX = std::numeric_limits<int>::max(), kMostY = 65535;
  int64_t heads = 1;
  if (kOutput == MergeOutput::kDynamicFp8 && p.head_dim > 0) {
    heads = p.group_size / std::gcd(p.group_size, p.head_dim);  // least common multiple, in heads
  }
  const int64_t spans = (p.num_heads + heads - 1) / heads;
  const dim3 grid(static_cast<unsigned>(p.num_tokens < kMostX ? p.num_tokens : kMostX),
                  static_cast<unsigned>(spans < kMostY ? spans : kMostY));
  return LaunchKernel(MergeScalarKernel<kIn, kOutput>, grid, kScalarMergeThreads, stream, p, heads);
}

// Whether a thread should take two packs, which share the work for the weights. That pays where
// there are threads enough for a whole GPU and all tensors fit its L2 cache. When data come from
// DRAM, more threads are better.
inline bool TwoPacks(const MergeParams& p, int width) {
  constexpr int64_t kOneWave = 1 << 18, kCacheBytes = 40 << 20;
  const int64_t packs = p.num_tokens * p.num_heads * (p.head_dim / width);
  const int64_t bytes = packs * (32 + width * SizeOf(StoredType(p.output_kind, p.dtype)));
  return p.head_dim > 32 * width || (packs > kOneWave && bytes < kCacheBytes);
}

template <DType kIn>
cudaError_t LaunchMergeVariant(const MergeParams& p, cudaStream_t stream) {
  using M = MergeOutput;
  constexpr int kWidth = kPackWidth<kIn>;
  cudaError_t status = cudaSuccess;
  const auto launch = [&](auto output) {
    constexpr M kOutput = decltype(output)::value;
    if (FitsVectors(p, kWidth)) {
      if (TwoPacks(p, kWidth) && LaunchMergeDense<kIn, kOutput, 2>(p, stream, status)) return;
      if (LaunchMergeDense<kIn, kOutput, 1>(p, stream, status)) return;
      if (LaunchMergeVectors<kIn, kOutput>(p, stream, status)) return;
    }
    status = LaunchMergeScalars<kIn, kOutput>(p, stream);
  };
  if constexpr (kIn == DType::kFloat32) {
    dispatch<M::kPlain, M::kFloat16, M::kBFloat16, M::kStaticFp8, M::kDynamicFp8>(p.output_kind,
                                                                                  "output", launch);
  } else {
    dispatch<M::kPlain, M::kStaticFp8, M::kDynamicFp8>(p.output_kind, "output", launch);
  }
  return status;
}

}  // namespace fastattn::cuda
