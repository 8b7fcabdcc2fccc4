// save_partial_states on a GPU. A thread moves four neighbouring values and their four scores.
#include <limits>

#include "common/dispatch.h"
#include "common/exact.h"
#include "common/numeric.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "cuda/common/index_load.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/unaligned.cuh"
#include "cuda/indexer/encode.cuh"
#include "cuda/indexer/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kFour = 4;

struct StatesGrid {
  Divisor fours;   // of a token's values
  Divisor ratio;   // positions of a group
  uint32_t count;  // of fours in all
  bool aligned;    // ape, for vectors of 4
};

// Four elements as they lie in memory.
template <DType kIn>
struct Four;

template <>
struct Four<DType::kFloat32> {
  uint4 raw;

  __device__ __forceinline__ void Load(const void* base, int64_t element) {
    raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const float*>(base) + element));
  }
  __device__ __forceinline__ void Store(void* base, int64_t element) const {
    *reinterpret_cast<uint4*>(static_cast<float*>(base) + element) = raw;
  }
  __device__ __forceinline__ void Get(float (&x)[kFour]) const {
    x[0] = BitsFloat(raw.x), x[1] = BitsFloat(raw.y);
    x[2] = BitsFloat(raw.z), x[3] = BitsFloat(raw.w);
  }
  __device__ __forceinline__ void Set(const float (&x)[kFour]) {
    raw = make_uint4(FloatBits(x[0]), FloatBits(x[1]), FloatBits(x[2]), FloatBits(x[3]));
  }
};

template <>
struct Four<DType::kBFloat16> {
  uint2 raw;

  __device__ __forceinline__ void Load(const void* base, int64_t element) {
    raw = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(base) + element));
  }
  __device__ __forceinline__ void Store(void* base, int64_t element) const {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + element) = raw;
  }
  __device__ __forceinline__ void Get(float (&x)[kFour]) const {
    x[0] = BitsFloat(raw.x << 16), x[1] = BitsFloat(raw.x & 0xFFFF0000u);
    x[2] = BitsFloat(raw.y << 16), x[3] = BitsFloat(raw.y & 0xFFFF0000u);
  }
  __device__ __forceinline__ void Set(const float (&x)[kFour]) {
    raw =
        make_uint2(PackPair<DType::kBFloat16>(x[0], x[1]), PackPair<DType::kBFloat16>(x[2], x[3]));
  }
};

// position % ratio of a position that is not negative.
__device__ __forceinline__ int64_t Phase(int64_t position, const Divisor& ratio) {
  if (position >> 31 == 0) {
    const auto n = static_cast<uint32_t>(position);
    return n - ratio.Quotient(n) * ratio.divisor;
  }
  return position % ratio.divisor;
}

template <DType kIn, DType kState>
__global__ void __launch_bounds__(kThreads)
    StatesKernel(const __grid_constant__ PartialStatesParams p, StatesGrid grid) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  PdlWait();
  if (index >= grid.count) return;
  const uint32_t token = grid.fours.Quotient(index);
  const int channel = static_cast<int>(index - token * grid.fours.divisor) * kFour;
  // Values and scores are loaded whether or not there is a place for them: nothing waits then.
  LoadedIndex loaded_slot, loaded_position;
  loaded_slot.Load(p.slots, token);
  loaded_position.Load(p.positions, token);
  Four<kIn> value, score;
  value.Load(p.kv_score, token * p.kv_stride + channel);
  score.Load(p.kv_score, token * p.kv_stride + p.width + channel);
  const int64_t slot = loaded_slot.Value(), position = loaded_position.Value();
  int64_t block, row;
  SplitSlot(slot, p.state_block, &block, &row);
  if (slot < 0 || block >= p.num_blocks || position < 0) return;
  float bias[kFour], x[kFour];
  LoadFour(p.ape, p.ape_dtype, Phase(position, grid.ratio) * p.width + channel, grid.aligned, bias);
  PdlLaunchDependents();
  score.Get(x);
#pragma unroll
  for (int i = 0; i < kFour; ++i) x[i] = PartialScore(x[i], bias[i]);
  Four<kState> out;
  out.Set(x);
  const int64_t at = block * p.block_stride + row * p.row_stride + channel;
  out.Store(p.state, at + p.width);
  if constexpr (kIn == kState) {
    value.Store(p.state, at);
  } else {
    value.Get(x);
    out.Set(x);
    out.Store(p.state, at);
  }
}

}  // namespace

cudaError_t LaunchSavePartialStates(const PartialStatesParams& p, cudaStream_t stream) {
  if (p.num_slots == 0 || p.width == 0 || p.num_blocks == 0) return cudaSuccess;
  const int64_t fours = p.width / kFour;
  if (p.num_slots > (std::numeric_limits<int32_t>::max() - kThreads) / fours) {
    return cudaErrorInvalidValue;  // 64 GiB of states
  }
  StatesGrid grid;
  grid.fours = Divisor(static_cast<uint32_t>(fours));
  grid.ratio = Divisor(static_cast<uint32_t>(p.ratio));
  grid.count = static_cast<uint32_t>(p.num_slots * fours);
  grid.aligned = IsAligned(p.ape, 16);
  const dim3 ctas((grid.count + kThreads - 1) / kThreads);
  cudaError_t status = cudaSuccess;
  dispatch<DType::kFloat32, DType::kBFloat16>(p.kv_dtype, "kv_score dtype", [&](auto in) {
    dispatch<DType::kFloat32, DType::kBFloat16>(p.state_dtype, "state dtype", [&](auto state) {
      status = LaunchPdl(StatesKernel<decltype(in)::value, decltype(state)::value>, ctas,
                         dim3(kThreads), stream, p, grid);
    });
  });
  return status;
}

}  // namespace fastattn::cuda
