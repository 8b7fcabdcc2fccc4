// mla_qkv_norm_rope_write on a GPU. A warp takes kHeads query heads of a token, or its key. A lane
// has 8 neighbouring channels of either half of a head, so that a warp's loads and stores are 512
// bytes side by side; the rotated channels are the last lanes' in the second half.
#include <limits>

#include "common/exact.h"
#include "common/mla_scale.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "cuda/common/index_load.cuh"
#include "cuda/common/inverse_rms.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/common/rotate.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/mla/cache/encode.cuh"
#include "cuda/mla/cache/launch.h"
#include "cuda/mla/cache/row.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kHeads = 1;  // of a warp
constexpr int kHalfChunks = kMlaQkvDim / 2 / kChunk;
constexpr int kFirstRotatedLane = 32 - kMlaRopeChunks;
constexpr int kTileLanes = FactsOf(MlaFormat::kFp8x584).tile / kChunk;
static_assert(kHalfChunks == 32, "a chunk of each half a lane");

// A head in the lanes of a warp.
struct HeadLane {
  static constexpr int kHeadDim = kMlaQkvDim;
  static constexpr int kLanes = 32;
  static constexpr int kHalf = kChunk;
  static constexpr int kValues = 2 * kChunk;
};

struct QkvGrid {
  Divisor units;   // of a token: its key, then kHeads heads each
  uint32_t count;  // of units
  bool few;
};

// Up to so many units a launch takes as long as the work. They are spread over CTAs of two warps,
// and the next kernel is let in before the loads, not behind them.
constexpr uint32_t kFewUnits = 1024;
constexpr int kFewWarps = 2;

__device__ __forceinline__ void Widen(uint4 pairs, float* x) {
  float values[kChunk];
  Unpack<DType::kBFloat16>(Raw<DType::kBFloat16>{pairs, pairs}, values);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = values[i];
}

__device__ __forceinline__ uint4 Narrow(const float* x) {
  constexpr DType kOut = DType::kBFloat16;
  return make_uint4(PackPair<kOut>(x[0], x[1]), PackPair<kOut>(x[2], x[3]),
                    PackPair<kOut>(x[4], x[5]), PackPair<kOut>(x[6], x[7]));
}

using LaneAngles = Angles<kChunk / 2>;

__device__ __forceinline__ void NormAndRotate(float eps, const LaneAngles& angles, bool rotated,
                                              uint4& low, uint4& high) {
  float x[HeadLane::kValues];
  Widen(low, x);
  Widen(high, x + kChunk);
  const float inverse = InverseRms<HeadLane>(x, eps);
#pragma unroll
  for (float& value : x) value = Mul(value, inverse);
  low = Narrow(x);
  float second[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) second[i] = x[kChunk + i];
  if (rotated) angles.Rotate<false>(second);
  high = Narrow(second);
}

// Rotates a key and writes it. All lanes take part.
__device__ __forceinline__ void WriteKey(MlaRow row, const LaneAngles& angles, int lane, uint4 low,
                                         uint4 high) {
  const bool rotated = lane >= kFirstRotatedLane;
  if (rotated) {
    float x[kChunk];
    Widen(high, x);
    angles.Rotate<false>(x);
    high = Narrow(x);
  }
  __syncwarp();
  float scales[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t pair = LanesMax2<kTileLanes>(AmaxPair(half == 0 ? low : high));
    scales[half] = PowerOfTwoFp8Scale(max(pair << 16, pair & 0xFFFF0000u));
  }
  uint2* codes = reinterpret_cast<uint2*>(row.codes);
  codes[lane] = Encode(low, PowerOfTwoQuotient(scales[0]));
  if (rotated) {
    constexpr int kRope = FactsOf(MlaFormat::kFp8x584).latent;
    reinterpret_cast<uint4*>(row.codes + kRope)[lane - kFirstRotatedLane] = high;
  } else {
    codes[32 + lane] = Encode(high, PowerOfTwoQuotient(scales[1]));
  }
  if (lane % kTileLanes == 0) {
    constexpr int kTiles = 32 / kTileLanes;  // of a half
    row.scales[lane / kTileLanes] = PowerOfTwoToUe8m0(scales[0]);
    row.scales[kTiles + lane / kTileLanes] = rotated ? 0 : PowerOfTwoToUe8m0(scales[1]);
  }
}

// kPlain: see IsPlain.
template <bool kPlain>
__global__ void __launch_bounds__(kMlaThreads)
    QkvKernel(const __grid_constant__ MlaQkvParams p, QkvGrid grid, uint32_t slots,
              Divisor page_size) {
  const uint32_t unit = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t token = grid.units.Quotient(unit);
  PdlWait();
  if (grid.few) PdlLaunchDependents();
  if (unit >= grid.count) return;
  const int own = static_cast<int>(unit - token * grid.units.divisor) - 1;
  const bool rotated = lane >= kFirstRotatedLane;
  LoadedIndex position;
  position.Load(p.rotations.positions, token);
  LaneAngles angles;
  const int pair = (lane - kFirstRotatedLane) * (kChunk / 2);

  if (own < 0) {
    if (token >= p.num_slots) return;
    LoadedIndex loaded;
    loaded.Load(p.slots, token);
    const auto* from = reinterpret_cast<const uint4*>(p.kv + token * p.kv_stride);
    const uint4 low = __ldg(from + lane), high = __ldg(from + 32 + lane);
    const int64_t row_of_table = p.rotations.RowOf(position.Value());
    angles.template Load<kPlain>(p.rotations, row_of_table, pair, rotated);
    PdlLaunchDependents();
    const int64_t slot = loaded.Value();
    if (slot < 0 || slot >= slots) return;
    const uint32_t page = page_size.Quotient(static_cast<uint32_t>(slot));
    const uint32_t row = static_cast<uint32_t>(slot) - page * page_size.divisor;
    WriteKey(MlaRowOf(p.cache, MlaFormat::kFp8x584, page, row), angles, lane, low, high);
    return;
  }

  // Queries may be written over, so that they are not read as constants.
  const int first = own * kHeads;
  const uint16_t* q = p.q + token * p.q_token_stride;
  uint4 low[kHeads], high[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    low[i] = high[i] = make_uint4(0, 0, 0, 0);
    if (first + i < p.num_heads) {
      const auto* from = reinterpret_cast<const uint4*>(q + (first + i) * p.q_head_stride);
      low[i] = from[lane];
      high[i] = from[32 + lane];
    }
  }
  angles.template Load<kPlain>(p.rotations, p.rotations.RowOf(position.Value()), pair, rotated);
  PdlLaunchDependents();
  uint16_t* out = p.q_out + token * p.out_token_stride;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (first + i >= p.out_heads) break;
    if (first + i < p.num_heads) {
      NormAndRotate(p.rms_norm_eps, angles, rotated, low[i], high[i]);
    }
    auto* to = reinterpret_cast<uint4*>(out + (first + i) * p.out_head_stride);
    to[lane] = low[i];
    to[32 + lane] = high[i];
  }
}

}  // namespace

cudaError_t LaunchMlaQkvNormRopeWrite(const MlaQkvParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  const int64_t units = (int64_t{p.out_heads} + kHeads - 1) / kHeads + 1;
  if (p.num_tokens > (std::numeric_limits<int32_t>::max() - kMlaWarps) / units) {
    return cudaErrorInvalidValue;  // 8 TiB of queries
  }
  QkvGrid grid;
  grid.units = Divisor(static_cast<uint32_t>(units));
  grid.count = static_cast<uint32_t>(p.num_tokens * units);
  const auto slots = static_cast<uint32_t>(p.cache.num_pages * p.cache.page_size);
  grid.few = grid.count <= kFewUnits;
  const int warps = grid.few ? kFewWarps : kMlaWarps;
  const dim3 ctas((grid.count + warps - 1) / warps);
  const auto kernel = IsPlain(p.rotations) ? QkvKernel<true> : QkvKernel<false>;
  return LaunchPdl(kernel, ctas, dim3(32 * warps), stream, p, grid, slots,
                   Divisor(static_cast<uint32_t>(p.cache.page_size)));
}

}  // namespace fastattn::cuda
