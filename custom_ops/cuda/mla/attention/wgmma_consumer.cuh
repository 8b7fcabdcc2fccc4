// The Hopper kernel's consumers. The left warpgroup computes scores and weights, and 256 channels
// of the output; the right one gets the weights through shared memory and has the other 256.
#pragma once

#include <type_traits>

#include "cuda/common/exp2.cuh"
#include "cuda/mla/attention/finish.cuh"
#include "cuda/mla/attention/products.cuh"
#include "cuda/mla/attention/wgmma_shared.cuh"

namespace fastattn::cuda::mla_attention {

// Both warpgroups: rows past the sequence's last are 0.
template <class C>
__device__ __forceinline__ void LoadQuery(const MlaAttentionParams& p, const Segment& segment,
                                          const Part& part, Shared<C>& shared) {
  const int thread = threadIdx.x - C::kProducerThreads;
  const int r = thread / 4, row = part.row0 + r, chunk = thread % 4 * 2;
  const bool there = row < part.rows;
  const int64_t token = segment.seq.q_begin + (there ? row / p.heads : 0);
  const uint16_t* q =
      p.q + token * p.q_token_stride + (there ? row % p.heads : 0) * p.q_head_stride;
  uint4 bits[2 * C::kPieces];
#pragma unroll
  for (int i = 0; i < 2 * C::kPieces; ++i) {
    bits[i] = make_uint4(0, 0, 0, 0);
    if (there) bits[i] = __ldg(reinterpret_cast<const uint4*>(q) + i / 2 * 8 + chunk + i % 2);
  }
#pragma unroll
  for (int i = 0; i < 2 * C::kPieces; ++i) {
    *reinterpret_cast<uint4*>(shared.q + i / 2 * kPieceBytes + Swizzled(r, chunk + i % 2)) =
        bits[i];
  }
  FenceAsyncProxy();
  SyncNamed<256>(kBothBarrier);  // and both have read the last segment's factors
}

// This thread's rows of the tile; the other one is 8 further on.
__device__ __forceinline__ int OwnRow() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

__device__ __forceinline__ void Rescale(float (&out)[128], float keep0, float keep1) {
  if (__all_sync(kFullWarp, keep0 == 1.0f && keep1 == 1.0f)) return;
#pragma unroll
  for (int i = 0; i < 128; i += 4) {
    out[i] *= keep0;
    out[i + 1] *= keep0;
    out[i + 2] *= keep1;
    out[i + 3] *= keep1;
  }
}

// Weights of 16 keys times 256 channels of their values.
template <class C, typename Weights>
__device__ __forceinline__ void AddValues(float (&out)[128], Weights weights, uint64_t values) {
  if constexpr (C::kTma) {
    MultiplyValues(out, weights, values);
  } else {
    MultiplyValueHalves(out, weights, values, 2 * kPieceBytes / 16);
  }
}

// Channels `first` to `first + 255`.
template <class C>
__device__ __forceinline__ void StoreOutput(const MlaAttentionParams& p, const Segment& segment,
                                            const Part& part, float* partial, int first,
                                            const float (&out)[128], const Shared<C>& shared) {
  const int column = first + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = OwnRow() + 8 * half, row = part.row0 + r;
    if (row >= part.rows) continue;
    const float factor = shared.factor[r];
    const int64_t at = int64_t{segment.seq.q_begin} * p.heads + row;
    const bool rounded = part.whole && p.out_float == nullptr;
    uint16_t* target = p.out + at * kMlaAttentionChannels + column;
    float* target_part = (part.whole ? p.out_float + at * kMlaAttentionChannels
                                     : partial + int64_t{r} * kMlaAttentionChannels) +
                         column;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      // A row without a key has no output, not 0 times one that is NaN.
      const float a = factor == 0.0f ? 0.0f : out[4 * j + 2 * half] * factor;
      const float b = factor == 0.0f ? 0.0f : out[4 * j + 2 * half + 1] * factor;
      if (rounded) {
        *reinterpret_cast<uint32_t*>(target + 8 * j) = PackPair<DType::kBFloat16>(a, b);
      } else {
        *reinterpret_cast<float2*>(target_part + 8 * j) = make_float2(a, b);
      }
    }
  }
}

// Scores become weights, relative to the new maximum.
__device__ __forceinline__ void WeighScores(bool masked, int seen0, int seen1, uint64_t assigned,
                                            bool positive, float scale, float (&scores)[32],
                                            float (&maximum)[2], float (&sum)[2], float (&keep)[2],
                                            uint32_t (&weights)[16]) {
  if (!positive) {
#pragma unroll
    for (float& x : scores) x *= scale;
  }
  const float factor = positive ? scale : 1.0f;
  if (masked) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int column = i / 4 * 8 + 2 * static_cast<int>(threadIdx.x % 4) + i % 2;
      const bool sees = column < (i % 4 < 2 ? seen0 : seen1) && (assigned >> column & 1);
      scores[i] = sees ? scores[i] : -INFINITY;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      most = fmaxf(most, fmaxf(scores[i + 2 * h], scores[i + 2 * h + 1]));
    }
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
    most = fmaxf(maximum[h], most * factor);
    keep[h] = WeightOf(maximum[h], most);
    maximum[h] = most;
    const float shift = most == -INFINITY ? 0.0f : most;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float a = Exp2(fmaf(scores[i + 2 * h], factor, -shift));
      const float b = Exp2(fmaf(scores[i + 2 * h + 1], factor, -shift));
      total += a + b;
      weights[i / 2 + h] = PackPair<DType::kBFloat16>(a, b);
    }
    sum[h] = sum[h] * keep[h] + total;
  }
}

// LSE of row `r` of the tile, and the factor of its output.
__device__ __forceinline__ void FinishTileRow(const MlaAttentionParams& p, const Segment& segment,
                                              const Part& part, const Workspace& workspace,
                                              int64_t slot, int r, float maximum, float sum,
                                              float* factor) {
  const int row = part.row0 + r;
  if (part.whole) {
    const int head = row % p.heads;
    const Normaliser end = FinishRow(p, maximum, sum, head);
    *factor = end.factor;
    StoreLse(p, segment.seq.q_begin + row / p.heads, head, end.lse);
  } else {
    const bool none = sum == 0.0f;
    *factor = none ? 0.0f : 1.0f / sum;
    workspace.lse[slot * kTileRows + r] = none ? -INFINITY : maximum + log2f(sum);
  }
}

template <class C>
class LeftConsumer {
 public:
  __device__ __forceinline__ LeftConsumer(const Arguments& args, Shared<C>& shared)
      : args_(args), shared_(shared), scale_(args.p.softmax_scale * kLog2E) {
    positive_ = scale_ > 0.0f;
    query_ = OperandDescriptor<128>(SharedAddress(shared.q));
  }

  __device__ __forceinline__ void Run(const Segment& segment, const Part& part,
                                      const Workspace& workspace) {
    const MlaAttentionParams& p = args_.p;
    LoadQuery<C>(p, segment, part, shared_);
    float out[128], scores[32];
    uint32_t weights[16];
#pragma unroll
    for (float& x : out) x = 0.0f;
#pragma unroll
    for (float& x : scores) x = 0.0f;
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    int seen[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = part.row0 + OwnRow() + 8 * h;
      seen[h] = row < part.rows ? VisibleKeys(p, segment.seq, row / p.heads) : 0;
    }
    const auto take = [&](int tile, auto more) {
      WaitGroups<0>();
      KeepFloats(scores);
      const int stage = at_.stage(), key0 = tile * kTileKeys;
      const uint64_t assigned = shared_.assigned[stage];
      const bool edge = key0 + kTileKeys > part.least;
      if (edge) Scrub(part.least - key0, shared_.keys[stage]);
      float keep[2];
      WeighScores(edge || assigned != ~uint64_t{0}, seen[0] - key0, seen[1] - key0, assigned,
                  positive_, scale_, scores, maximum, sum, keep, weights);
      PassWeights(keep, weights);  // first: what the right one leaves late is loaded late
      Rescale(out, keep[0], keep[1]);
      FenceProducts();
      const uint64_t values = TransposedDescriptor<kPieceBytes>(SharedAddress(shared_.keys[stage]));
#pragma unroll
      for (int k = 0; k < 4; ++k) AddValues<C>(out, weights + 4 * k, values + k * 2048 / 16);
      CommitProducts();
      ++at_.count;
      if constexpr (decltype(more)::value) Score(scores);
      WaitGroups<decltype(more)::value ? 1 : 0>();
      KeepFloats(out);
      KeepRegisters(weights);
      ArriveWarp(&shared_.left_empty[stage]);
    };
    if (part.begin < part.end) {
      Score(scores);
      for (int tile = part.begin; tile + 1 < part.end; ++tile) take(tile, std::true_type{});
      take(part.end - 1, std::false_type{});
    }
    Finish(segment, part, workspace, maximum, sum);
    float* partial = workspace.partial + Slot(part) * kTileRows * kMlaAttentionChannels;
    StoreOutput<C>(p, segment, part, partial, 0, out, shared_);
  }

 private:
  // Queues the products of the tile at at_.
  __device__ __forceinline__ void Score(float (&scores)[32]) {
    const int stage = at_.stage();
    const uint64_t keys = OperandDescriptor<128>(SharedAddress(shared_.keys[stage]));
    Wait(&shared_.right_full[stage], at_.phase());
    FenceProducts();
#pragma unroll
    for (int i = 0; i < 4 * kHalfPieces; ++i) {
      const int offset = (kHalfPieces + i / 4) * (kPieceBytes / 16) + i % 4 * 2;
      MultiplyScores(scores, query_ + offset, keys + offset, i > 0);
    }
    Wait(&shared_.left_full[stage], at_.phase());
    FenceProducts();
#pragma unroll
    for (int i = 0; i < 4 * (C::kPieces - kHalfPieces); ++i) {
      // The last piece first, then 0 to 3.
      const int rest = C::kPieces - 2 * kHalfPieces;
      const int piece = i / 4 < rest ? 2 * kHalfPieces + i / 4 : i / 4 - rest;
      const int offset = piece * (kPieceBytes / 16) + i % 4 * 2;
      MultiplyScores(scores, query_ + offset, keys + offset, 1);
    }
    CommitProducts();
  }

  // Values of keys from `first` on, which not all rows see.
  __device__ __forceinline__ void Scrub(int first, uint8_t* keys) {
    const int begin = max(first, 0);
    for (int i = begin * 64 + static_cast<int>(threadIdx.x % 128); i < kTileKeys * 64; i += 128) {
      uint4* chunk =
          reinterpret_cast<uint4*>(keys + i % 64 / 8 * kPieceBytes + i / 64 * 128 + i % 8 * 16);
      *chunk = FiniteChannels(*chunk);
    }
    FenceAsyncProxy();
    SyncNamed<128>(kLeftBarrier);
  }

  // Weights and factors to the right warpgroup.
  __device__ __forceinline__ void PassWeights(const float (&keep)[2],
                                              const uint32_t (&weights)[16]) {
    const int lane = threadIdx.x % 32;
    Wait(&shared_.weights_empty, at_.count & 1 ^ 1);
    const int row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t target = SharedAddress(shared_.weights);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      StoreMatrices(target + Swizzled(row, 2 * k + lane / 16), weights + 4 * k);
    }
    if (lane % 4 == 0) {
      shared_.keep[0][OwnRow()] = keep[0];
      shared_.keep[0][OwnRow() + 8] = keep[1];
    }
    FenceAsyncProxy();
    ArriveWarp(&shared_.weights_full[0]);
  }

  __device__ __forceinline__ static int64_t Slot(const Part& part) {
    return PartialSlot(blockIdx.x, part.continued);
  }

  // LSE, and the factors of both warpgroups' outputs.
  __device__ __forceinline__ void Finish(const Segment& segment, const Part& part,
                                         const Workspace& workspace, const float (&maximum)[2],
                                         float (&sum)[2]) {
    const MlaAttentionParams& p = args_.p;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(kFullWarp, sum[h], 1);
      sum[h] += __shfl_xor_sync(kFullWarp, sum[h], 2);
      const int r = OwnRow() + 8 * h, row = part.row0 + r;
      if (threadIdx.x % 4 != 0 || row >= part.rows) continue;
      FinishTileRow(p, segment, part, workspace, Slot(part), r, maximum[h], sum[h],
                    &shared_.factor[r]);
    }
    SyncNamed<256>(kBothBarrier);  // the factors are there, and the query has been read
  }

  const Arguments& args_;
  Shared<C>& shared_;
  TileCount at_;
  uint64_t query_;
  float scale_;  // to base 2
  bool positive_;
};

template <class C>
class RightConsumer {
 public:
  __device__ __forceinline__ RightConsumer(const Arguments& args, Shared<C>& shared)
      : args_(args), shared_(shared) {}

  __device__ __forceinline__ void Run(const Segment& segment, const Part& part,
                                      const Workspace& workspace) {
    LoadQuery<C>(args_.p, segment, part, shared_);
    float out[128];
#pragma unroll
    for (float& x : out) x = 0.0f;
    const uint64_t weights = OperandDescriptor<128>(SharedAddress(shared_.weights));
    for (int tile = part.begin; tile < part.end; ++tile) {
      const int stage = at_.stage();
      Wait(&shared_.right_full[stage], at_.phase());
      Wait(&shared_.weights_full[0], at_.count & 1);
      Rescale(out, shared_.keep[0][OwnRow()], shared_.keep[0][OwnRow() + 8]);
      FenceProducts();
      const uint64_t values = TransposedDescriptor<kPieceBytes>(
          SharedAddress(shared_.keys[stage] + kHalfPieces * kPieceBytes));
#pragma unroll
      for (int k = 0; k < 4; ++k) AddValues<C>(out, weights + 2 * k, values + k * 2048 / 16);
      CommitProducts();
      WaitGroups<0>();
      KeepFloats(out);
      ArriveWarp(&shared_.weights_empty);
      ArriveWarp(&shared_.right_empty[stage]);
      ++at_.count;
    }
    SyncNamed<256>(kBothBarrier);  // the factors are there
    float* partial = workspace.partial +
                     PartialSlot(blockIdx.x, part.continued) * kTileRows * kMlaAttentionChannels;
    StoreOutput<C>(args_.p, segment, part, partial, 256, out, shared_);
  }

 private:
  const Arguments& args_;
  Shared<C>& shared_;
  TileCount at_;
};

}  // namespace fastattn::cuda::mla_attention
