// convert_cache_layout: one CTA moves the bytes of one (block, KV head) from one order to another,
// to another tensor or (convert_cache_blocks) in place. It has read them all before it writes.
//
// fastattn and fastdeploy hold the same 16-byte pieces in other places (K: 16 channels of a token,
// in TokenSlot order for fastdeploy; V: 16 tokens of a channel in TokenSlot order for both), so
// those conversions move pieces through registers. Logical V is [64, D]: it meets the others by 4x4
// byte transpositions and a token-major copy in shared memory.
//
// A range of 256 blocks takes about 12 us. Without PDL, ranges that follow each other would wait
// for launches a tenth of their time.

#include "common/dispatch.h"
#include "common/head_dims.h"
#include "common/layout.h"
#include "cuda/cache/convert/launch.h"
#include "cuda/cache/shared/block_pieces.cuh"
#include "cuda/common/bytes.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kCopyThreads = 128;

// Threads of a CTA: a whole number of tokens' pieces.
constexpr int ConvertThreads(int head_dim) { return head_dim % 3 == 0 ? 96 : 128; }

__device__ __forceinline__ uint4 Flip(uint4 x, uint32_t mask) {
  return make_uint4(x.x ^ mask, x.y ^ mask, x.z ^ mask, x.w ^ mask);
}

// Loads bytes. Those that the same kernel overwrites may not go through the read-only cache: the
// compiler may move its loads past a barrier.
template <bool kInPlace>
__device__ __forceinline__ uint4 Load(const uint8_t* address) {
  const auto* piece = reinterpret_cast<const uint4*>(address);
  if constexpr (kInPlace) {
    return *piece;
  } else {
    return __ldg(piece);
  }
}

template <CacheLayout kSrc, CacheLayout kDst, int kHeadDim, bool kInPlace>
__global__ void __launch_bounds__(ConvertThreads(kHeadDim))
    ConvertKeyKernel(const __grid_constant__ ConvertLayoutParams p, uint32_t flip) {
  constexpr int kThreads = ConvertThreads(kHeadDim);
  constexpr int kPieces = kBlockSize * kHeadDim / 16 / kThreads;
  const uint8_t* src = static_cast<const uint8_t*>(p.src) + p.SrcPlane(blockIdx.x);
  uint8_t* dst = static_cast<uint8_t*>(p.dst) + p.DstPlane(blockIdx.x);
  PdlWait();
  PdlLaunchDependents();
  uint4 pieces[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const PieceOfThread at = KeyPieceOfThread<kHeadDim, kThreads>(i);
    pieces[i] = Load<kInPlace>(src + KeyPiece<kSrc, kHeadDim>(at.token, at.group));
  }
  if constexpr (kInPlace) __syncthreads();
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const PieceOfThread at = KeyPieceOfThread<kHeadDim, kThreads>(i);
    uint4 piece = Flip(pieces[i], flip);
    if constexpr (kSrc == CacheLayout::kFastDeploy && kDst != CacheLayout::kFastDeploy) {
      piece = SlotsToOrder(piece);
    }
    if constexpr (kSrc != CacheLayout::kFastDeploy && kDst == CacheLayout::kFastDeploy) {
      piece = OrderToSlots(piece);
    }
    *reinterpret_cast<uint4*>(dst + KeyPiece<kDst, kHeadDim>(at.token, at.group)) = piece;
  }
}

template <CacheLayout kSrc, CacheLayout kDst, int kHeadDim, bool kInPlace>
__global__ void __launch_bounds__(ConvertThreads(kHeadDim))
    ConvertValueKernel(const __grid_constant__ ConvertLayoutParams p, uint32_t flip) {
  constexpr int kThreads = ConvertThreads(kHeadDim);
  constexpr bool kFromLogical = kSrc == CacheLayout::kLogical;
  constexpr bool kToLogical = kDst == CacheLayout::kLogical;
  __shared__ TokenMajorTile<kHeadDim> tile;
  const uint8_t* src = static_cast<const uint8_t*>(p.src) + p.SrcPlane(blockIdx.x);
  uint8_t* dst = static_cast<uint8_t*>(p.dst) + p.DstPlane(blockIdx.x);
  const int group = threadIdx.x % 4;
  // A thread has four channels of each round.
  constexpr int kRounds = (kHeadDim + kThreads - 1) / kThreads;
  const auto channel_of = [](int round) {
    return static_cast<int>(threadIdx.x) / 4 * 4 + round * kThreads;
  };
  const auto active = [&](int round) { return channel_of(round) < kHeadDim; };

  PdlWait();
  PdlLaunchDependents();
  uint4 pieces[kRounds][4];  // [channel], 16 tokens of `group` in TokenSlot order
  if constexpr (kFromLogical) {
    for (int i = threadIdx.x; i < kBlockSize * kHeadDim / 16; i += kThreads) {
      const int token = i / (kHeadDim / 16), column = i % (kHeadDim / 16) * 16;
      *reinterpret_cast<uint4*>(tile.codes + tile.Offset(token) + column) =
          Load<kInPlace>(src + i * static_cast<int>(sizeof(uint4)));
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (active(round)) GatherPieces(tile, channel_of(round), group, pieces[round]);
    }
  } else {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (!active(round)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pieces[round][i] =
            Load<kInPlace>(src + ValuePiece<kSrc, kHeadDim>(channel_of(round) + i, group));
      }
    }
  }
  if constexpr (kInPlace && !kFromLogical && !kToLogical) __syncthreads();
  if constexpr (kToLogical) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (active(round)) ScatterPieces(pieces[round], channel_of(round), group, tile);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kBlockSize * kHeadDim / 16; i += kThreads) {
      const int token = i / (kHeadDim / 16), column = i % (kHeadDim / 16) * 16;
      const uint4 codes = *reinterpret_cast<const uint4*>(tile.codes + tile.Offset(token) + column);
      reinterpret_cast<uint4*>(dst)[i] = Flip(codes, flip);
    }
  } else {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (!active(round)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<uint4*>(dst + ValuePiece<kDst, kHeadDim>(channel_of(round) + i, group)) =
            Flip(pieces[round][i], flip);
      }
    }
  }
}

// A CTA copies a plane. A kernel rather than a memory copy: Paddle 2.6 cannot capture
// other nodes in a CUDA graph.
__global__ void __launch_bounds__(kCopyThreads)
    CopyKernel(const __grid_constant__ ConvertLayoutParams p, int element_bytes) {
  constexpr int kUnroll = 4;
  const int pieces = kBlockSize * p.row_elements * element_bytes / static_cast<int>(sizeof(uint4));
  const auto* src = reinterpret_cast<const uint4*>(static_cast<const char*>(p.src) +
                                                   p.SrcPlane(blockIdx.x) * element_bytes);
  auto* dst =
      reinterpret_cast<uint4*>(static_cast<char*>(p.dst) + p.DstPlane(blockIdx.x) * element_bytes);
  for (int first = threadIdx.x; first < pieces; first += kCopyThreads * kUnroll) {
    uint4 values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kCopyThreads < pieces) values[i] = __ldg(src + first + i * kCopyThreads);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kCopyThreads < pieces) dst[first + i * kCopyThreads] = values[i];
    }
  }
}

template <CacheLayout kSrc, CacheLayout kDst, bool kInPlace>
cudaError_t Launch(const ConvertLayoutParams& p, uint32_t flip, cudaStream_t stream) {
  const unsigned grid = GridSize(p.num_planes);
  cudaError_t status = cudaSuccess;
  const auto run = [&](auto row) {
    constexpr int kRow = decltype(row)::value;
    auto kernel = ConvertKeyKernel<kSrc, kDst, kRow, kInPlace>;
    if constexpr (ValueDim(kRow) == kRow) {
      if (p.is_value) kernel = ConvertValueKernel<kSrc, kDst, kRow, kInPlace>;
    }
    status = LaunchPdl(kernel, dim3(grid), dim3(ConvertThreads(kRow)), stream, p, flip);
  };
  if constexpr (kSrc != CacheLayout::kFastDeploy && kDst != CacheLayout::kFastDeploy) {
    if (CodesPerByte(p.type, p.is_value) == 2) {
      dispatch<32, 48, 64, 96, 128>(p.row_elements, "bytes of a token", run);
      return status;
    }
  }
  AttentionHeadDims::Dispatch(p.row_elements, run);
  return status;
}

}  // namespace

cudaError_t LaunchConvertLayout(const ConvertLayoutParams& p, cudaStream_t stream) {
  if (p.num_planes == 0) return cudaSuccess;
  const bool same_bytes = p.type == CacheType::kNone || p.src_layout == p.dst_layout;
  const bool in_place = p.src == p.dst;
  if (same_bytes && in_place) return cudaSuccess;
  if (same_bytes) {
    const int element_bytes = p.type == CacheType::kNone ? SizeOf(DType::kBFloat16) : 1;
    return LaunchKernel(CopyKernel, GridSize(p.num_planes), kCopyThreads, stream, p, element_bytes);
  }
  const bool fastdeploy =
      p.src_layout == CacheLayout::kFastDeploy || p.dst_layout == CacheLayout::kFastDeploy;
  const uint32_t flip = fastdeploy && IsInt8(p.type) ? 0x80808080u : 0u;
  constexpr CacheLayout kA = CacheLayout::kFastattn, kD = CacheLayout::kFastDeploy,
                        kL = CacheLayout::kLogical;
  cudaError_t status = cudaSuccess;
  dispatch<kA, kD, kL>(p.src_layout, "src", [&](auto src) {
    dispatch<kA, kD, kL>(p.dst_layout, "dst", [&](auto dst) {
      if constexpr (decltype(src)::value != decltype(dst)::value) {
        constexpr CacheLayout kSrc = decltype(src)::value, kDst = decltype(dst)::value;
        status = in_place ? Launch<kSrc, kDst, true>(p, flip, stream)
                          : Launch<kSrc, kDst, false>(p, flip, stream);
      }
    });
  });
  return status;
}

}  // namespace fastattn::cuda
