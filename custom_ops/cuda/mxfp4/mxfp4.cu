// mxfp4_quantize and mxfp4_dequantize.
//
// A warp converts 32 blocks: 4 rounds of 8 blocks, 8 elements a lane, so that every load and store
// of values is 16 bytes a lane and contiguous over the warp. The codes of a lane's 4 rounds are 4
// bytes each; a transposition among 4 lanes turns them into one block's 16 bytes a lane.
#include "common/dispatch.h"
#include "common/exact.h"
#include "common/fp4.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/e2m1.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/common/unaligned.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/mxfp4/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRounds = 4;
constexpr int kBlocksPerRound = 32 * kChunk / kMxBlock;  // of a warp
constexpr int kBlocksPerWarp = kRounds * kBlocksPerRound;
constexpr int kBlocksPerCta = kThreads / 32 * kBlocksPerWarp;

// MXFP4 blocks of a tensor, `per_row` of them in a row.
struct Blocks {
  int64_t count;
  int64_t per_row;
};

// kPlain: the rows are contiguous, at an address that is aligned for 16-byte loads.
template <DType kIn, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    QuantizeKernel(const __grid_constant__ Mxfp4QuantizeParams p, Blocks blocks) {
  constexpr bool kHalf = kFitsHalf<kIn>;
  const int lane = threadIdx.x % 32;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * kBlocksPerCta + threadIdx.x / 32 * kBlocksPerWarp;
  const int64_t last = blocks.count - 1;
  PdlWait();
  Raw<kIn> raw[kRounds];
  if constexpr (kPlain) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int64_t block = min(first + i * kBlocksPerRound + lane / 4, last);
      raw[i] = LoadRaw<kIn>(p.x, block * kMxBlock + lane % 4 * kChunk, true);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int64_t block = min(first + i * kBlocksPerRound + lane / 4, last);
      const int64_t row = block / blocks.per_row;
      const int64_t column = (block - row * blocks.per_row) * kMxBlock + lane % 4 * kChunk;
      raw[i] = LoadRawUnaligned<kIn>(p.x, row * p.x_row_stride + column, true);
    }
  }
  PdlLaunchDependents();
  uint32_t codes[kRounds];
  uint32_t bytes = 0;  // the exponent of round i in byte i
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    float x[kChunk];
    Unpack<kIn>(raw[i], x);
    float amax = 0.0f;  // fmaxf passes over a NaN
#pragma unroll
    for (int j = 0; j < kChunk; ++j) amax = fmaxf(amax, fabsf(x[j]));
    const uint8_t byte = MxScaleByte(LanesMax<4>(FloatBits(amax)));
    bytes |= static_cast<uint32_t>(byte) << (8 * i);
    const float inverse = UE8M0Inverse(byte);
    if constexpr (kIn == DType::kBFloat16) {
      codes[i] = PackE2M1OfBf16x8(raw[i].low, __byte_perm(FloatBits(inverse), 0, 0x3232));
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[j] = Mul(x[j], inverse);
      codes[i] = PackE2M1x8<kHalf>(x);
    }
  }
  TransposeQuad(codes);
  const int64_t block = first + lane % 4 * kBlocksPerRound + lane / 4;
  if (block > last) return;
  reinterpret_cast<uint4*>(p.codes)[block] = make_uint4(codes[0], codes[1], codes[2], codes[3]);
  p.scales[block] = static_cast<uint8_t>(bytes >> (8 * (lane % 4)));
}

template <DType kOut>
__device__ __forceinline__ void StoreChunk(void* x, int64_t element,
                                           const float (&values)[kChunk]) {
  uint4* out = reinterpret_cast<uint4*>(static_cast<char*>(x) + element * SizeOf(kOut));
  if constexpr (kOut == DType::kFloat32) {
    out[0] = make_uint4(FloatBits(values[0]), FloatBits(values[1]), FloatBits(values[2]),
                        FloatBits(values[3]));
    out[1] = make_uint4(FloatBits(values[4]), FloatBits(values[5]), FloatBits(values[6]),
                        FloatBits(values[7]));
  } else {
    out[0] = make_uint4(PackPair<kOut>(values[0], values[1]), PackPair<kOut>(values[2], values[3]),
                        PackPair<kOut>(values[4], values[5]), PackPair<kOut>(values[6], values[7]));
  }
}

// kAligned: the codes' address is aligned for 16-byte loads.
template <DType kOut, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    DequantizeKernel(const __grid_constant__ Mxfp4DequantizeParams p, int64_t count) {
  const int lane = threadIdx.x % 32;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * kBlocksPerCta + threadIdx.x / 32 * kBlocksPerWarp;
  const int64_t block = min(first + lane % 4 * kBlocksPerRound + lane / 4, count - 1);
  PdlWait();
  uint32_t codes[kRounds];
  if constexpr (kAligned) {
    const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(p.codes) + block);
    codes[0] = loaded.x, codes[1] = loaded.y, codes[2] = loaded.z, codes[3] = loaded.w;
  } else {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const uint8_t* from = p.codes + block * (kMxBlock / 2) + 4 * i;
      codes[i] = __ldg(from) | __ldg(from + 1) << 8 | __ldg(from + 2) << 16 |
                 static_cast<uint32_t>(__ldg(from + 3)) << 24;
    }
  }
  const float own_scale = UE8M0ToFloat(__ldg(p.scales + block));
  PdlLaunchDependents();
  TransposeQuad(codes);
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const float scale = __shfl_sync(kFullWarp, own_scale, (lane & ~3) + i);
    float x[kChunk];
    UnpackE2M1x8(codes[i], x);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) x[j] = Mul(x[j], scale);
    const int64_t target = first + i * kBlocksPerRound + lane / 4;
    if (target < count) StoreChunk<kOut>(p.x, target * kMxBlock + lane % 4 * kChunk, x);
  }
}

dim3 Ctas(int64_t blocks) { return dim3(GridSize((blocks + kBlocksPerCta - 1) / kBlocksPerCta)); }

}  // namespace

cudaError_t LaunchMxfp4Quantize(const Mxfp4QuantizeParams& p, cudaStream_t stream) {
  const Blocks blocks{p.rows * (p.cols / kMxBlock), p.cols / kMxBlock};
  if (blocks.count == 0) return cudaSuccess;
  // Contiguous rows are one long row.
  const bool plain = p.x_row_stride == p.cols && IsAligned(p.x, 16);
  cudaError_t status = cudaSuccess;
  dispatch<DType::kBFloat16, DType::kFloat16, DType::kFloat32>(p.dtype, "dtype", [&](auto dtype) {
    constexpr DType kIn = decltype(dtype)::value;
    const auto kernel = plain ? QuantizeKernel<kIn, true> : QuantizeKernel<kIn, false>;
    status = LaunchPdl(kernel, Ctas(blocks.count), dim3(kThreads), stream, p, blocks);
  });
  return status;
}

cudaError_t LaunchMxfp4Dequantize(const Mxfp4DequantizeParams& p, cudaStream_t stream) {
  const int64_t count = p.rows * (p.cols / kMxBlock);
  if (count == 0) return cudaSuccess;
  const bool aligned = IsAligned(p.codes, 16);
  cudaError_t status = cudaSuccess;
  dispatch<DType::kBFloat16, DType::kFloat16, DType::kFloat32>(p.dtype, "dtype", [&](auto dtype) {
    constexpr DType kOut = decltype(dtype)::value;
    const auto kernel = aligned ? DequantizeKernel<kOut, true> : DequantizeKernel<kOut, false>;
    status = LaunchPdl(kernel, Ctas(count), dim3(kThreads), stream, p, count);
  });
  return status;
}

}  // namespace fastattn::cuda
