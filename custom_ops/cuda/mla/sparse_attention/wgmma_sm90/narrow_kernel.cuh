// Sparse latent attention for at most 8 or 16 heads: keys and channels are the rows of the
// products, heads their columns, so that nothing is computed for heads that are not there. The time
// goes into reading the tokens.
//
// Warpgroups: two consumers, S^T = K Q^T, softmax, O^T += V^T P^T, and two of producers
// (gather.cuh; of bf16 keys four), which fill two stages of 64 keys. Each stage has its consumer:
// they take every other tile, each with a softmax and outputs of its own, and merge them at the end
// of the work tile. One alone would have the tile's time in chains of small products.
//
// Barriers (mbarriers): full/empty of the stages. Named barriers 1 and 2: the warps of a consumer;
// 3 and 4: both, in turn where they merge.
#pragma once

#include <cstdint>

#include "cuda/common/pdl.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_half.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/finish.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/gather.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/products.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

template <MlaFormat kFormat>
inline constexpr int kNarrowProducers = kFormat == MlaFormat::kBf16 ? 16 : 8;  // warps
inline constexpr int kNarrowStages = 2;
// Passes of codes that a producer warp copies ahead.
template <MlaFormat kFormat>
inline constexpr int kNarrowSlots = kFormat == MlaFormat::kBf16 ? 0 : 3;
template <MlaFormat kFormat>
inline constexpr int kNarrowThreads = 256 + 32 * kNarrowProducers<kFormat>;
// Of 480 that six threads have, or 512 of four.
template <MlaFormat kFormat>
inline constexpr int kNarrowConsumerRegisters = kFormat == MlaFormat::kBf16 ? 128 : 152;
template <MlaFormat kFormat>
inline constexpr int kNarrowProducerRegisters = kFormat == MlaFormat::kBf16 ? 56 : 104;

template <int kDim, MlaFormat kFormat, int kHeads>
struct alignas(1024) NarrowShared {
  Stages<kDim, kNarrowStages> stages;
  uint8_t query[kDim / 64 * kHeads * 128];
  uint8_t probabilities[2][kDim == 512 ? kHeads * 128 : 16];  // see Probabilities
  float exchange[2][4][kHeads];                               // of a consumer's warps
  alignas(16) uint8_t slots[kNarrowSlots<kFormat> * kNarrowProducers<kFormat> * kSlotBytes + 16];
  float query_powers[kHeads];  // fp16: what the query's rows were divided by
  StageBarriers<kNarrowStages> barriers;
};

template <int kDim, MlaFormat kFormat, int kHeads>
class NarrowConsumer {
 public:
  using Shared = NarrowShared<kDim, kFormat, kHeads>;
  static constexpr DType kType = kOperand<kFormat>;
  static constexpr bool kHalf = kType == DType::kFloat16;
  static constexpr int kColumns = kHeads / 4;  // a thread's: 2 * (j) + e, head 8 * j + 2 * q + e

  // group: consumer 0 or 1. Both run the same instructions, which have to be fetched, too.
  __device__ __forceinline__ NarrowConsumer(const Arguments& args, Shared& shared, int group)
      : args_(args),
        shared_(shared),
        group_(group),
        warp_(threadIdx.x / 32 % 4),
        lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void Run() {
    const float common = StaticScales(args_.p).common;
    const float log2_scale = args_.p.softmax_scale * kLog2E * common;
    for (unsigned index = blockIdx.x; index < args_.work_tiles; index += gridDim.x) {
      const Work work(args_, index, kHeads);
      SyncNamed<256>(3);  // the last query has been read, and what was merged
      LoadQuery<kDim, kHeads, 256>(args_.p, work, threadIdx.x, shared_.query);
      WaitCopies();
      SyncNamed<256>(3);
      float scales[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) scales[c] = log2_scale;
      if constexpr (kHalf) {
        QueryToHalf<kDim, kHeads, 8>(shared_.query, shared_.query_powers, threadIdx.x / 32, lane_);
        FenceAsyncProxy();
        SyncNamed<256>(3);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          scales[c] *= shared_.query_powers[8 * (c / 2) + 2 * (lane_ % 4) + c % 2];
        }
      }
      RunTile(work, scales, common);
    }
  }

 private:
  using Output = float[8][kHeads / 2];

  __device__ __forceinline__ void RunTile(const Work& work, const float (&scales)[kColumns],
                                          float common) {
    Output out;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < kHeads / 2; ++j) out[i][j] = 0.0f;
    }
    RowState heads[kColumns];
    largest_ = 0.0f;
    for (int tile = work.begin; tile < work.end; ++tile, ++tiles_) {
      if (tiles_ % 2 != group_) continue;
      WaitTile(&shared_.barriers.full[group_], tiles_ / 2 & 1);
      float scores[kHeads / 2], rescale[kColumns];
      Score(scores);
      Softmax(scores, scales, heads, rescale);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < kHeads / 2; ++j) out[i][j] *= rescale[2 * (j / 4) + j % 2];
        KeepFloats(out[i]);
      }
      FenceProducts();
      const uint32_t values = SharedAddress(shared_.stages.keys[group_]);
      uint64_t right = OperandDescriptor<128>(Probabilities());
      uint64_t left = TransposedDescriptor<kBlockBytes>(values);
      asm volatile("" : "+l"(left), "+l"(right));  // as in Score
      // Neighbours in the order have accumulators of their own.
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          Narrow<kType, true, 1>(out[i], left + i * (kBlockBytes / 16) + k * (2048 / 16),
                                 right + 2 * k);
        }
        if (k % 2 == 1) CommitProducts();  // half of the keys
      }
      WaitGroups<1>();
      ArriveWarp(&shared_.barriers.empty[group_][0]);
      WaitGroups<0>();
#pragma unroll
      for (int i = 0; i < 8; ++i) KeepFloats(out[i]);
      ArriveWarp(&shared_.barriers.empty[group_][1]);
    }
    float weights[2][kColumns];
    SyncNamed<256>(3);  // the query has been read: consumer 1 leaves its outputs in its place
    if (group_ == 1) GiveHeads(heads);
    Merge<0>(out, heads, weights);
    SyncNamed<256>(3);  // consumer 0 has read a quarter: the next takes its place
    Merge<1>(out, heads, weights);
    SyncNamed<256>(3);
    Merge<2>(out, heads, weights);
    SyncNamed<256>(3);
    Merge<3>(out, heads, weights);
    if (group_ == 0) Finish(work, out, heads, common);
  }

  // P of this consumer's tile: in place of keys 32 on of the rotated channels, which are not among
  // the values.
  __device__ __forceinline__ uint32_t Probabilities() const {
    if constexpr (kDim == 512) return SharedAddress(shared_.probabilities[group_]);
    return SharedAddress(shared_.stages.keys[group_]) + 8 * kBlockBytes + 32 * 128;
  }

  // What consumer 1 has, in place of the query: a quarter of its outputs; of its threads, maxima
  // and sums of heads, and the power of the keys.
  struct Mergeed {
    float floats[kHeads][128];
    float heads[kHeads / 2 + 1][128];
  };
  __device__ __forceinline__ Mergeed& InQuery() const {
    static_assert(sizeof(Mergeed) <= sizeof(shared_.query));
    return *reinterpret_cast<Mergeed*>(shared_.query);
  }

  // Consumer 1 leaves what it has to the thread of consumer 0 that has the same part.
  __device__ __forceinline__ void GiveHeads(const RowState (&heads)[kColumns]) const {
    const int thread = threadIdx.x % 128;
    const auto merged = InQuery().heads;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      merged[2 * c][thread] = heads[c].maximum;
      merged[2 * c + 1][thread] = heads[c].sum;
    }
    merged[2 * kColumns][thread] = largest_;
  }

  // weights: what the outputs of both are multiplied with.
  __device__ __forceinline__ void MergeHeads(RowState (&heads)[kColumns],
                                             float (&weights)[2][kColumns]) {
    const int thread = threadIdx.x % 128;
    const auto merged = InQuery().heads;
    float units[2] = {1.0f, 1.0f};
    if constexpr (kHalf) {
      const float other = merged[2 * kColumns][thread];
      const float largest = fmaxf(largest_, other);
      if (largest_ != largest) units[0] = largest_ * Reciprocal(largest);
      if (other != largest) units[1] = other * Reciprocal(largest);
      largest_ = largest;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float other = merged[2 * c][thread];
      const float maximum = fmaxf(heads[c].maximum, other);
      const float mine = WeightOf(heads[c].maximum, maximum), its = WeightOf(other, maximum);
      heads[c].sum = heads[c].sum * mine + merged[2 * c + 1][thread] * its;
      heads[c].maximum = maximum;
      weights[0][c] = mine * units[0];
      weights[1][c] = its * units[1];
    }
  }

  // A quarter of the outputs, from consumer 1 to consumer 0, which has both from here on.
  template <int kPart>
  __device__ __forceinline__ void Merge(Output& out, RowState (&heads)[kColumns],
                                        float (&weights)[2][kColumns]) {
    constexpr int kFloats = kHeads;
    const auto floats = InQuery().floats;
    const int thread = threadIdx.x % 128;
    if (group_ == 1) {
#pragma unroll
      for (int i = 0; i < kFloats; ++i) {
        const int at = kPart * kFloats + i;
        floats[i][thread] = out[at / (kHeads / 2)][at % (kHeads / 2)];
      }
      SyncNamed<256>(4);  // the quarter is there
    } else {
      SyncNamed<256>(4);
      if constexpr (kPart == 0) MergeHeads(heads, weights);
#pragma unroll
      for (int i = 0; i < kFloats; ++i) {
        const int at = kPart * kFloats + i, j = at % (kHeads / 2), c = 2 * (j / 4) + j % 2;
        float& x = out[at / (kHeads / 2)][j];
        x = x * weights[0][c] + floats[i][thread] * weights[1][c];
      }
    }
  }

  // Several sums, each of every kSums-th product: one would be a chain of products.
  __device__ __forceinline__ void Score(float (&scores)[kHeads / 2]) const {
    uint64_t keys = OperandDescriptor<128>(SharedAddress(shared_.stages.keys[group_]));
    uint64_t query = OperandDescriptor<128>(SharedAddress(shared_.query));
    // Else the compiler keeps the descriptors of all products in registers, and has none left.
    asm volatile("" : "+l"(query), "+l"(keys));
    constexpr int kSums = kHeads == 8 ? 4 : 2;
    float sums[kSums][kHeads / 2];
    FenceProducts();
#pragma unroll
    for (int block = 0; block < kDim / 64; ++block) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t left = keys + block * (kBlockBytes / 16) + 2 * k;
        const uint64_t right = query + block * (kHeads * 128 / 16) + 2 * k;
        if (block == 0 && k < kSums) {
          Narrow<kType, false, 0>(sums[k % kSums], left, right);
        } else {
          Narrow<kType, true, 0>(sums[k % kSums], left, right);
        }
      }
    }
    CommitProducts();
    WaitGroups<0>();
#pragma unroll
    for (int k = 0; k < kSums; ++k) KeepFloats(sums[k]);
#pragma unroll
    for (int i = 0; i < kHeads / 2; ++i) {
      scores[i] = sums[0][i] + sums[1][i];
      if constexpr (kSums == 4) scores[i] += sums[2][i] + sums[3][i];
    }
  }

  // Maximum or sum over the lanes that have other keys of the same heads.
  template <class F>
  static __device__ __forceinline__ float OverKeys(float x, F f) {
    x = f(x, __shfl_xor_sync(kFullWarp, x, 4));
    x = f(x, __shfl_xor_sync(kFullWarp, x, 8));
    return f(x, __shfl_xor_sync(kFullWarp, x, 16));
  }

  // Leaves P in shared memory, a row of keys for each head.
  __device__ __forceinline__ void Softmax(float (&scores)[kHeads / 2],
                                          const float (&scales)[kColumns],
                                          RowState (&heads)[kColumns], float (&rescale)[kColumns]) {
    float powers[2] = {1.0f, 1.0f}, units = 1.0f;  // of this thread's keys; of the outputs so far
    if constexpr (kHalf) {
      const float* all = shared_.barriers.powers[group_];
      powers[0] = all[16 * warp_ + lane_ / 4];
      powers[1] = all[16 * warp_ + lane_ / 4 + 8];
      float largest = fmaxf(largest_, fmaxf(all[lane_], all[lane_ + 32]));
#pragma unroll
      for (int i = 1; i < 32; i *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, i));
      }
      if (largest != largest_) units = largest_ * Reciprocal(largest);
      largest_ = largest;
    }
    // Byte i: bit k: key 16 * warp + 4 * i + k.
    const uint32_t valid =
        reinterpret_cast<const uint32_t*>(&shared_.barriers.valid[group_][warp_ / 2])[warp_ % 2];
    const uint32_t mine = valid >> (lane_ / 16 * 8 + lane_ / 4 % 4);
#pragma unroll
    for (int i = 0; i < kHeads / 2; ++i) {
      const bool key = mine >> (i / 2 % 2 * 16) & 1;
      scores[i] = key ? scores[i] * (scales[2 * (i / 4) + i % 2] * powers[i / 2 % 2]) : -INFINITY;
    }
    float maximum[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int at = 4 * (c / 2) + c % 2;
      maximum[c] =
          OverKeys(fmaxf(scores[at], scores[at + 2]), [](float a, float b) { return fmaxf(a, b); });
      if (lane_ < 4) shared_.exchange[group_][warp_][8 * (c / 2) + 2 * lane_ + c % 2] = maximum[c];
    }
    SyncNamed<128>(1 + group_);
    uint32_t pairs[kColumns];  // matrices of 8 keys x 8 heads: 2 * j + h
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int head = 8 * (c / 2) + 2 * (lane_ % 4) + c % 2;
      float m = heads[c].maximum;
#pragma unroll
      for (int w = 0; w < 4; ++w) m = fmaxf(m, shared_.exchange[group_][w][head]);
      const float weight = WeightOf(heads[c].maximum, m);
      heads[c].maximum = m;
      heads[c].sum *= weight;
      rescale[c] = weight * units;
    }
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
      const float shift[2] = {ShiftOf(heads[2 * j].maximum), ShiftOf(heads[2 * j + 1].maximum)};
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float a = Exp2(scores[4 * j + 2 * h] - shift[0]);
        const float b = Exp2(scores[4 * j + 2 * h + 1] - shift[1]);
        sum[0] += a;
        sum[1] += b;
        const float factor = kHalf ? powers[h] * ToUnits(largest_) : 1.0f;
        pairs[2 * j + h] = PackPair<kType>(a * factor, b * factor);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) heads[2 * j + e].sum += sum[e];
    }
    // Lane 8 * i + r names row r of matrix i, a head, at the eight keys of the matrix.
    const int matrix = lane_ / 8, head = matrix / 2 * 8 + lane_ % 8;
    const int chunk = 2 * warp_ + matrix % 2;
    const uint32_t address = Probabilities() + head % kHeads * 128 + ((chunk ^ (head & 7)) << 4);
    if constexpr (kHeads == 16) {
      StoreMatrices<true>(address, pairs);
    } else {
      StoreTransposed(address, pairs);
    }
    FenceAsyncProxy();
    SyncNamed<128>(1 + group_);
  }

  __device__ __forceinline__ void Finish(const Work& work, const Output& out,
                                         RowState (&heads)[kColumns], float common) const {
    const MlaSparseParams& p = args_.p;
    if constexpr (kHalf) common *= largest_ * (1.0f / kProbabilityScale);
    SyncNamed<128>(1 + group_);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float sum = OverKeys(heads[c].sum, [](float a, float b) { return a + b; });
      if (lane_ < 4) shared_.exchange[group_][warp_][8 * (c / 2) + 2 * lane_ + c % 2] = sum;
    }
    SyncNamed<128>(1 + group_);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int local = 8 * (c / 2) + 2 * (lane_ % 4) + c % 2, head = work.head + local;
      if (head >= p.heads) continue;
      RowState row = heads[c];
      row.sum = 0.0f;
#pragma unroll
      for (int w = 0; w < 4; ++w) row.sum += shared_.exchange[group_][w][local];
      // Every thread of a head finishes it; the LSE is the same in all.
      const float factor = FinishRow(args_, work, head, row, row.maximum, common);
      const int64_t at = (work.token * p.heads + head) * kMlaValueDim + 16 * warp_ + lane_ / 4;
      if (args_.splits > 1) {
        float* target = args_.partial + work.split * p.tokens * p.heads * kMlaValueDim + at;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          target[64 * i] = out[i][4 * (c / 2) + c % 2] * factor;
          target[64 * i + 8] = out[i][4 * (c / 2) + 2 + c % 2] * factor;
        }
      } else {
        uint16_t* target = p.out + at;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint32_t pair = PackPair<DType::kBFloat16>(
              out[i][4 * (c / 2) + c % 2] * factor, out[i][4 * (c / 2) + 2 + c % 2] * factor);
          target[64 * i] = static_cast<uint16_t>(pair);
          target[64 * i + 8] = static_cast<uint16_t>(pair >> 16);
        }
      }
    }
  }

  const Arguments& args_;
  Shared& shared_;
  int group_, warp_, lane_;
  int tiles_ = 0;         // so far, of both consumers
  float largest_ = 0.0f;  // fp16: power of the keys, so far
};

template <int kDim, MlaFormat kFormat, int kHeads>
__global__ void __launch_bounds__(kNarrowThreads<kFormat>, 1)
    NarrowKernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t bytes[];
  auto& shared = *reinterpret_cast<NarrowShared<kDim, kFormat, kHeads>*>(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kNarrowStages; ++i) {
      InitBarrier(&shared.barriers.full[i], kFullArrivals<kFormat, kNarrowProducers<kFormat>>);
      InitBarrier(&shared.barriers.empty[i][0], 4 * kWarpArrivals);
      InitBarrier(&shared.barriers.empty[i][1], 4 * kWarpArrivals);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  PdlWait();
  PdlLaunchDependents();
  if (threadIdx.x >= 256) {
    ReleaseRegisters<kNarrowProducerRegisters<kFormat>>();
    Gather<kDim, kFormat, kNarrowProducers<kFormat>, kNarrowStages, kKeys, kNarrowSlots<kFormat>>
        gather(args, shared.stages.keys[0], shared.barriers, threadIdx.x - 256, 0, shared.slots);
    for (unsigned index = blockIdx.x; index < args.work_tiles; index += gridDim.x) {
      gather.Run(Work(args, index, kHeads));
    }
  } else {
    ClaimRegisters<kNarrowConsumerRegisters<kFormat>>();
    NarrowConsumer<kDim, kFormat, kHeads> c(args, shared,
                                            __shfl_sync(kFullWarp, threadIdx.x / 128, 0));
    c.Run();
  }
#else
  __trap();
#endif
}

}  // namespace fastattn::cuda::mla_sparse_sm90
