// A thread takes kWidth neighbouring channels of a token and head through all states.
//
// Every thread of a row computes the row's weights: the LSEs of a warp are a few words that lie in
// one sector, and a decode step, whose partial results come from two to eight ranks, has fewer
// threads than the GPU. So nothing is exchanged between threads.
#include <type_traits>

#include "common/dispatch.h"
#include "common/merge_many.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/merge_many/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;

constexpr int kAtOnce = 4;  // states whose loads are under way together

// kWidth values of a state as they were loaded.
template <DType kIn, int kWidth>
struct Piece {
  using Storage = typename Element<kIn>::Storage;
  static_assert(kWidth == 1 || kWidth * SizeOf(kIn) == sizeof(uint4));
  std::conditional_t<kWidth == 1, Storage, uint4> raw;

  __device__ __forceinline__ void Load(const void* outputs, int64_t element, bool active) {
    const Storage* from = static_cast<const Storage*>(outputs) + element;
    raw = {};
    if (active) raw = *reinterpret_cast<const decltype(raw)*>(from);
  }

  __device__ __forceinline__ void Get(float (&x)[kWidth]) const {
    if constexpr (kWidth == 1) {
      x[0] = Element<kIn>::Load(raw);
    } else if constexpr (kIn == DType::kFloat32) {
      x[0] = __uint_as_float(raw.x);
      x[1] = __uint_as_float(raw.y);
      x[2] = __uint_as_float(raw.z);
      x[3] = __uint_as_float(raw.w);
    } else {
      Unpack<kIn>(Raw<kIn>{raw, make_uint4(0, 0, 0, 0)}, x);
    }
  }
};

template <DType kStored, int kWidth>
__device__ __forceinline__ void Store(void* output, int64_t element, const float (&x)[kWidth]) {
  using Storage = typename Element<kStored>::Storage;
  Storage* to = static_cast<Storage*>(output) + element;
  if constexpr (kWidth == 1) {
    *to = Element<kStored>::Store(x[0]);
  } else if constexpr (kStored == DType::kFloat32) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    constexpr int kWords = kWidth * SizeOf(kStored) / 4;
    uint32_t words[kWords];
    if constexpr (kStored == DType::kE4M3) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        words[w] = PackCodes<DType::kE4M3>(x[4 * w], x[4 * w + 1], x[4 * w + 2], x[4 * w + 3]);
      }
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w] = PackPair<kStored>(x[2 * w], x[2 * w + 1]);
    }
    if constexpr (kWords == 4) {
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint32_t*>(to) = words[0];
    }
  }
}

template <DType kIn, MergeOutput kOutput, int kWidth>
__global__ void __launch_bounds__(kThreads)
    MergeManyKernel(const __grid_constant__ MergeManyParams p) {
  PdlWait();
  PdlLaunchDependents();
  const float empty = -INFINITY;
  const int packs = p.head_dim / kWidth;
  const int64_t items = p.num_tokens * p.num_heads * packs;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < items; i += step) {
    const int64_t row = i / packs;
    const int pack = static_cast<int>(i - row * packs);
    const int64_t token = row / p.num_heads;
    const int head = static_cast<int>(row - token * p.num_heads);
    const float sink =
        p.sinks == nullptr ? empty : StateLse(LoadScale(p.sinks, p.sinks_dtype, head));
    const float* lses = p.lses + head * p.lse_head_stride + token * p.lse_token_stride;
    const auto lse = [&](int n) { return StateLse(lses[n * p.lse_state_stride]); };
    const MergeTotal total = TotalOfStates(p.num_states, sink, lse);

    const int64_t from = token * p.token_stride + head * p.head_stride + pack * kWidth;
    float merged[kWidth] = {};
    bool first = true;
    for (int base = 0; base < p.num_states; base += kAtOnce) {
      Piece<kIn, kWidth> pieces[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        pieces[j].Load(p.outputs, from + (base + j) * p.state_stride, base + j < p.num_states);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float x = base + j < p.num_states ? lse(base + j) : empty;
        if (x == empty) continue;  // its memory may hold anything
        const float weight = WeightOfState(x, total);
        float state[kWidth];
        pieces[j].Get(state);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float term = Mul(state[c], weight);
          merged[c] = first ? term : Add(merged[c], term);
        }
        first = false;
      }
    }
    if constexpr (kOutput == MergeOutput::kStaticFp8) {
      const float inverse = Div(1.0f, *p.output_scale);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) merged[c] = Mul(merged[c], inverse);
    }
    Store<StoredType(kOutput, kIn)>(
        p.output, token * p.output_token_stride + head * p.output_head_stride + pack * kWidth,
        merged);
    if (pack == 0) {
      const MergeTotal counted =
          p.sinks_in_lse || sink == empty ? total : TotalOfStates(p.num_states, empty, lse);
      p.output_lse[head * p.num_tokens + token] = LseOfTotal(counted);
    }
  }
}

bool IsMultiple(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

bool FitsVectors(const MergeManyParams& p, int width) {
  if (p.head_dim % width != 0 || !IsMultiple(p.outputs, 16)) return false;
  if (!IsMultiple(p.output, width * SizeOf(StoredType(p.output_kind, p.dtype)))) return false;
  for (const int64_t stride : {p.state_stride, p.token_stride, p.head_stride, p.output_token_stride,
                               p.output_head_stride}) {
    if (stride % width != 0) return false;
  }
  return true;
}

template <DType kIn, MergeOutput kOutput>
cudaError_t Launch(const MergeManyParams& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / SizeOf(kIn);
  constexpr int64_t kMostCtas = 1 << 20;  // then a thread takes several
  const bool vectors = FitsVectors(p, kWidth);
  const int64_t items = p.num_tokens * p.num_heads * (p.head_dim / (vectors ? kWidth : 1));
  const int64_t ctas = (items + kThreads - 1) / kThreads;
  const auto kernel =
      vectors ? MergeManyKernel<kIn, kOutput, kWidth> : MergeManyKernel<kIn, kOutput, 1>;
  return LaunchPdl(kernel, dim3(static_cast<unsigned>(ctas < kMostCtas ? ctas : kMostCtas)),
                   dim3(kThreads), stream, p);
}

}  // namespace

cudaError_t LaunchMergeManyAttnStates(const MergeManyParams& p, cudaStream_t stream) {
  using M = MergeOutput;
  if (p.num_tokens == 0 || p.num_heads == 0 || p.head_dim == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16>(p.dtype, "dtype", [&](auto dtype) {
    constexpr DType kIn = decltype(dtype)::value;
    const auto run = [&](auto output) { status = Launch<kIn, decltype(output)::value>(p, stream); };
    if constexpr (kIn == DType::kFloat32) {
      dispatch<M::kPlain, M::kFloat16, M::kBFloat16, M::kStaticFp8>(p.output_kind, "output", run);
    } else {
      dispatch<M::kPlain, M::kStaticFp8>(p.output_kind, "output", run);
    }
  });
  return status;
}

}  // namespace fastattn::cuda
