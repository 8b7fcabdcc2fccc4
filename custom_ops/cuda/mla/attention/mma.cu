// Dense latent attention with mma.sync, for every GPU from sm_80 on, every page size and stride.
//
// A CTA of four warps has 16 rows (heads of new tokens, token by token) and meets tiles of 32 keys,
// dequantised into shared memory once, as keys and as values:
//  - scores: each warp 8 keys, all channels;
//  - softmax: eight threads a row;
//  - output: each warp 128 of the 512 channels, fp32 in registers.
//
// The schedule counts tiles of 64 keys: two of these.

#include "common/dispatch.h"
#include "cuda/common/exp2.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/mla/attention/finish.cuh"
#include "cuda/mla/attention/launch.h"
#include "cuda/mla/attention/schedule.cuh"
#include "cuda/mla/attention/token.cuh"

namespace fastattn::cuda::mla_attention {

namespace {

constexpr int kRows = kMlaAttentionMmaRows;
constexpr int kKeys = 32;
constexpr int kThreads = 128;
constexpr int kPitch = 576 + 8;  // channels; rows begin 16 bytes further in the banks
constexpr int kScorePitch = kKeys + 1;
constexpr int kWeightPitch = kKeys + 8;

struct Shared {
  uint16_t q[kRows][kPitch];
  uint16_t keys[kKeys][kPitch];
  uint16_t weights[kRows][kWeightPitch];
  float scores[kRows][kScorePitch];
  float keep[kRows];    // factor of the output so far
  float factor[kRows];  // of the output at last
  uint8_t assigned[kKeys];
  int64_t sums[kThreads / 32];
  Share share;
};

__device__ __forceinline__ uint32_t Pair(const uint16_t* address) {
  return *reinterpret_cast<const uint32_t*>(address);
}

// Rows past the sequence's last are 0.
template <int kChannels>
__device__ __forceinline__ void LoadQuery(const MlaAttentionParams& p, const Segment& segment,
                                          int row0, Shared& shared) {
  for (int i = threadIdx.x; i < kRows * (kChannels / 8); i += kThreads) {
    const int r = i / (kChannels / 8), chunk = i % (kChannels / 8), row = row0 + r;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (row < segment.seq.q_len * p.heads) {
      const int64_t token = segment.seq.q_begin + row / p.heads;
      const uint16_t* q = p.q + token * p.q_token_stride + row % p.heads * p.q_head_stride;
      bits = __ldg(reinterpret_cast<const uint4*>(q) + chunk);
    }
    *reinterpret_cast<uint4*>(&shared.q[r][8 * chunk]) = bits;
  }
}

template <MlaFormat kFormat>
__device__ __forceinline__ void LoadKeys(const MlaAttentionParams& p, const Divisor& page_size,
                                         const Segment& segment, int key0, float scale,
                                         Shared& shared) {
  constexpr int kChunks = kDim<kFormat> / 8;
  const int lane = threadIdx.x % 32;
  for (int j = threadIdx.x / 32; j < kKeys; j += kThreads / 32) {
    Token token{nullptr, nullptr};
    if (key0 + j < segment.seq.k_limit) {
      token = FindToken<kFormat>(p, page_size, segment.batch_idx, key0 + j);
    }
    for (int chunk = lane; chunk < kChunks; chunk += 32) {
      *reinterpret_cast<uint4*>(&shared.keys[j][8 * chunk]) =
          LoadChunk<kFormat>(token, chunk, scale);
    }
    if (lane == 0) shared.assigned[j] = token.codes != nullptr;
  }
}

// Keys 8 * warp on, all rows.
template <int kChannels>
__device__ __forceinline__ void Score(Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = lane / 4, pair = 2 * (lane % 4);
  const uint16_t* a = &shared.q[row][pair];
  const uint16_t* b = &shared.keys[8 * warp + row][pair];
  float c[4] = {};
#pragma unroll 4
  for (int k = 0; k < kChannels; k += 16) {
    Mma<DType::kBFloat16>(c, Pair(a + k), Pair(a + k + 8 * kPitch), Pair(a + k + 8),
                          Pair(a + k + 8 * kPitch + 8), Pair(b + k), Pair(b + k + 8));
  }
  const int column = 8 * warp + pair;
  shared.scores[row][column] = c[0];
  shared.scores[row][column + 1] = c[1];
  shared.scores[row + 8][column] = c[2];
  shared.scores[row + 8][column + 1] = c[3];
}

// Of the row that a thread has with seven others.
struct RowState {
  float maximum = -INFINITY;
  float sum = 0.0f;  // of this thread's columns
};

template <typename F>
__device__ __forceinline__ float OfEight(float x, F&& f) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2) x = f(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// `seen`: keys of this tile that the row sees.
__device__ __forceinline__ void Weigh(int seen, float scale, RowState& state, Shared& shared) {
  const int row = threadIdx.x / 8, first = 4 * (threadIdx.x % 8);
  float scores[4];
  bool masked[4];
  float maximum = state.maximum;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    masked[i] = first + i >= seen || shared.assigned[first + i] == 0;
    scores[i] = shared.scores[row][first + i];
    maximum = masked[i] ? maximum : fmaxf(maximum, scores[i] * scale);
  }
  maximum = OfEight(maximum, [](float a, float b) { return fmaxf(a, b); });
  const float shift = maximum == -INFINITY ? 0.0f : maximum;
  const float keep = WeightOf(state.maximum, maximum);
  state.sum *= keep;
  state.maximum = maximum;
  float weights[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weights[i] = masked[i] ? 0.0f : Exp2(fmaf(scores[i], scale, -shift));
    state.sum += weights[i];
  }
  const uint2 bits = make_uint2(PackPair<DType::kBFloat16>(weights[0], weights[1]),
                                PackPair<DType::kBFloat16>(weights[2], weights[3]));
  *reinterpret_cast<uint2*>(&shared.weights[row][first]) = bits;
  if (threadIdx.x % 8 == 0) shared.keep[row] = keep;
}

// Values of keys that not all rows see.
__device__ __forceinline__ void ScrubKeys(int first, Shared& shared) {
  for (int i = 64 * max(first, 0) + threadIdx.x; i < 64 * kKeys; i += kThreads) {
    uint4* chunk = reinterpret_cast<uint4*>(&shared.keys[i / 64][i % 64 * 8]);
    *chunk = FiniteChannels(*chunk);
  }
}

// Channels 128 * warp on.
__device__ __forceinline__ void AddValues(float (&out)[16][4], const Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = lane / 4, pair = 2 * (lane % 4);
  const float keep[2] = {shared.keep[row], shared.keep[row + 8]};
#pragma unroll
  for (int n = 0; n < 16; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[n][i] *= keep[i / 2];
  }
  const int token = lane % 16, channel = 128 * warp + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kKeys; k += 16) {
    const uint16_t* a = &shared.weights[row][k + pair];
    const uint32_t a0 = Pair(a), a1 = Pair(a + 8 * kWeightPitch);
    const uint32_t a2 = Pair(a + 8), a3 = Pair(a + 8 * kWeightPitch + 8);
#pragma unroll
    for (int n = 0; n < 16; n += 2) {
      const uint4 b =
          LoadMatricesTransposed(SharedAddress(&shared.keys[k + token][channel + 8 * n]));
      Mma<DType::kBFloat16>(out[n], a0, a1, a2, a3, b.x, b.y);
      Mma<DType::kBFloat16>(out[n + 1], a0, a1, a2, a3, b.z, b.w);
    }
  }
}

__device__ __forceinline__ void Store(const MlaAttentionParams& p, const Segment& segment, int row0,
                                      bool whole, float* partial, const float (&out)[16][4],
                                      const Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = lane / 4 + 8 * half, row = row0 + r;
    if (row >= segment.seq.q_len * p.heads) continue;
    const float factor = shared.factor[r];
    const int64_t at = int64_t{segment.seq.q_begin} * p.heads + row;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      // A row without a key has no output, not 0 times one that is NaN.
      const float a = factor == 0.0f ? 0.0f : out[n][2 * half] * factor;
      const float b = factor == 0.0f ? 0.0f : out[n][2 * half + 1] * factor;
      const int channel = 128 * warp + 8 * n + 2 * (lane % 4);
      if (whole && p.out_float == nullptr) {
        *reinterpret_cast<uint32_t*>(p.out + at * kMlaAttentionChannels + channel) =
            PackPair<DType::kBFloat16>(a, b);
      } else {
        float* row_out =
            whole ? p.out_float + at * kMlaAttentionChannels : partial + r * kMlaAttentionChannels;
        *reinterpret_cast<float2*>(row_out + channel) = make_float2(a, b);
      }
    }
  }
}

template <MlaFormat kFormat>
__device__ __forceinline__ void RunSegment(const MlaAttentionParams& p,
                                           const MlaAttentionPlan& plan, const Divisor& page_size,
                                           const Workspace& workspace, const Segment& segment,
                                           Shared& shared) {
  const int sub = blockIdx.x % plan.group_ctas;
  const int row0 = static_cast<int>(segment.row) + sub * kRows;
  const Seq& seq = segment.seq;
  if (row0 >= seq.q_len * p.heads) return;
  const int own_tiles = TilesBefore(p, seq, row0 + kRows);
  const int least = VisibleKeys(p, seq, row0 / p.heads);
  const int own_row = row0 + threadIdx.x / 8;
  const int seen = own_row < seq.q_len * p.heads ? VisibleKeys(p, seq, own_row / p.heads) : 0;
  const float scale = kFormat == MlaFormat::kFp8 ? __ldg(p.scale) : 1.0f;
  __syncthreads();  // nobody reads what the segment before left in shared memory
  LoadQuery<kDim<kFormat>>(p, segment, row0, shared);
  float out[16][4] = {};
  RowState state;
  const int end = min(segment.end, own_tiles) * (kTileKeys / kKeys);
  for (int tile = segment.begin * (kTileKeys / kKeys); tile < end; ++tile) {
    const int key0 = tile * kKeys;
    LoadKeys<kFormat>(p, page_size, segment, key0, scale, shared);
    __syncthreads();
    Score<kDim<kFormat>>(shared);
    __syncthreads();
    if (key0 + kKeys > least) ScrubKeys(least - key0, shared);
    Weigh(seen - key0, p.softmax_scale * kLog2E, state, shared);
    __syncthreads();
    AddValues(out, shared);
    __syncthreads();
  }
  const bool whole = segment.begin == 0 && segment.end == segment.tiles;
  const int64_t slot = PartialSlot(blockIdx.x, segment.begin > 0);
  const float sum = OfEight(state.sum, [](float a, float b) { return a + b; });
  if (threadIdx.x % 8 == 0 && own_row < seq.q_len * p.heads) {
    const int r = threadIdx.x / 8;
    if (whole) {
      const int head = own_row % p.heads;
      const Normaliser row_end = FinishRow(p, state.maximum, sum, head);
      shared.factor[r] = row_end.factor;
      StoreLse(p, seq.q_begin + own_row / p.heads, head, row_end.lse);
    } else {
      shared.factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
      workspace.lse[slot * kRows + r] = sum == 0.0f ? -INFINITY : state.maximum + log2f(sum);
    }
  }
  __syncthreads();
  Store(p, segment, row0, whole, workspace.partial + slot * kRows * kMlaAttentionChannels, out,
        shared);
}

template <MlaFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    MmaKernel(const __grid_constant__ MlaAttentionParams p,
              const __grid_constant__ MlaAttentionPlan plan, Divisor page_size) {
  extern __shared__ __align__(16) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int group = blockIdx.x / plan.group_ctas;
  PdlWait();
  PdlLaunchDependents();
  FindShare<kThreads>(p, plan, group, shared.sums, &shared.share);
  __syncthreads();
  const Workspace workspace = WorkspaceOf(p, plan);
  Walker<true> walker(p, plan, shared.share, group);
  Segment segment;
  Note note;
  while (walker.Next(&segment)) {
    RunSegment<kFormat>(p, plan, page_size, workspace, segment, shared);
    if (segment.merged > 0) {
      note = {segment.merged, segment.seq.q_begin, static_cast<int>(segment.row),
              segment.seq.q_len * p.heads};
    }
  }
  if (threadIdx.x == 0 && blockIdx.x % plan.group_ctas == 0) WriteNote(workspace, group, note);
}

template <MlaFormat kFormat>
cudaError_t LaunchFormat(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                         cudaStream_t stream) {
  DeviceFacts facts;
  const cudaError_t status = AllowShared<MmaKernel<kFormat>>(sizeof(Shared), &facts);
  if (status != cudaSuccess) return status;
  return LaunchPdlWithShared(MmaKernel<kFormat>, dim3(plan.groups * plan.group_ctas),
                             dim3(kThreads), sizeof(Shared), stream, p, plan,
                             Divisor(static_cast<uint32_t>(p.cache.page_size)));
}

}  // namespace

cudaError_t LaunchMma(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                      cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  dispatch<MlaFormat::kBf16, MlaFormat::kFp8, MlaFormat::kFp8x656, MlaFormat::kFp8x584,
           MlaFormat::kFp8x528>(p.cache.format, "cache_format", [&](auto format) {
    status = LaunchFormat<decltype(format)::value>(p, plan, stream);
  });
  return status;
}

}  // namespace fastattn::cuda::mla_attention
