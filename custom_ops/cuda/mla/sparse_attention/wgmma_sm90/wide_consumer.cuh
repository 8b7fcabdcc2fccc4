// Consumers of the wide kernel of sparse latent attention (wide_kernel.cuh): scores, softmax and
// outputs.
#pragma once

#include <cstdint>

#include "cuda/common/quad.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_half.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/finish.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/products.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/wide_shared.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

// A consumer's outputs: 64 heads x 256 channels, in halves of 128.
using HalfOutput = float[2][64];

// Softmax of one head in a lane.
struct WideRow {
  float largest = -INFINITY;    // score of this lane's, in base 2
  float reference = -INFINITY;  // probabilities are in units of 2^reference
  float sum = 0.0f;             // of this lane's
};

// A tile's P, of a lane, in halves of 32 keys.
using Probabilities = uint32_t[2][8];

__device__ __forceinline__ void Clear(HalfOutput& out) {
#pragma unroll
  for (int i = 0; i < 128; ++i) out[i / 64][i % 64] = 0.0f;
}

__device__ __forceinline__ void Keep(HalfOutput& out) {
  KeepFloats(out[0]);
  KeepFloats(out[1]);
}

__device__ __forceinline__ void Keep(Probabilities& pairs) {
  KeepRegisters(pairs[0]);
  KeepRegisters(pairs[1]);
}

// Multiplies a consumer's outputs with one factor for each of a thread's two rows.
__device__ __forceinline__ void Rescale(HalfOutput& out, float low, float high) {
  if (!__any_sync(kFullWarp, low != 1.0f || high != 1.0f)) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      out[i][4 * j] *= low;
      out[i][4 * j + 1] *= low;
      out[i][4 * j + 2] *= high;
      out[i][4 * j + 3] *= high;
    }
  }
}

// kPair: one of two CTAs of a cluster (pair.cuh).
template <int kDim, MlaFormat kFormat, bool kPair>
class WideConsumer {
 public:
  using Shared = WideShared<kDim, kFormat>;
  static constexpr DType kType = kOperand<kFormat>;
  static constexpr int kStages = kWideStages;
  static constexpr bool kHalf = kType == DType::kFloat16;
  // By how much scores may exceed their row's reference, in base 2. P in fp16 has little room.
  static constexpr float kGrowth = kHalf ? 1.0f : 8.0f;

  __device__ __forceinline__ WideConsumer(const Arguments& args, Shared& shared)
      : args_(args), shared_(shared), warp_(threadIdx.x / 32 % 4), lane_(threadIdx.x % 32) {}

  // kIndex: consumer 0 or 1.
  template <int kIndex>
  __device__ __forceinline__ void Run() {
    const float log2_scale = args_.p.softmax_scale * kLog2E * StaticScales(args_.p).common;
    LoadQuery<kDim, kWideHeads, 256>(args_.p, Work(args_, blockIdx.x, kWideHeads), threadIdx.x,
                                     shared_.query);
    for (unsigned index = blockIdx.x; index < args_.work_tiles; index += gridDim.x) {
      const Work work(args_, index, kWideHeads);
      HalfOutput out;
      Clear(out);
      WaitCopies();
      SyncNamed<256>(1);
      if constexpr (kHalf) {
        QueryToHalf<kDim, kWideHeads, 8>(shared_.query, shared_.query_powers, threadIdx.x / 32,
                                         lane_);
        FenceAsyncProxy();
        SyncNamed<256>(1);
      } else if (!(log2_scale > 0.0f)) {
        MultiplyQuery<kDim * kWideHeads, 256>(shared_.query, log2_scale < 0.0f ? -1.0f : log2_scale,
                                              threadIdx.x);
        FenceAsyncProxy();
        SyncNamed<256>(1);
      }
      if constexpr (kIndex == 0) {
        WideRow rows[2];
        float scales[2] = {log2_scale, log2_scale};
        if constexpr (kHalf) {
          scales[0] *= shared_.query_powers[16 * warp_ + lane_ / 4];
          scales[1] *= shared_.query_powers[16 * warp_ + lane_ / 4 + 8];
        } else {
          // The query has the sign, and 0, so that the largest score is that of the largest
          // product.
          if (!(log2_scale > 0.0f)) scales[0] = log2_scale < 0.0f ? -log2_scale : 1.0f;
        }
        largest_ = 0.0f;
        if (work.begin < work.end) RunScores(work, scales, out, rows);
        Finish(work, rows);
      } else {
        RunOutputs(work, out);
      }
      SyncNamed<256>(2);
      if (index + gridDim.x < args_.work_tiles) {
        LoadQuery<kDim, kWideHeads, 256>(args_.p, Work(args_, index + gridDim.x, kWideHeads),
                                         threadIdx.x, shared_.query);
      }
      Store(work, out, 256 * kIndex);
    }
  }

 private:
  __device__ __forceinline__ void Advance() {
    ++tiles_;
    stage_ = (stage_ + 1) % kStages;
    parity_ ^= stage_ == 0;
  }

  // Consumer 1.
  __device__ __forceinline__ void RunOutputs(const Work& work, HalfOutput& out) {
    const uint64_t left = OperandDescriptor<128>(SharedAddress(shared_.probabilities));
    for (int tile = work.begin; tile < work.end; ++tile) {
      WaitFull();
      Wait(&shared_.probabilities_full[0], tiles_ & 1);
      const int row = 16 * warp_ + lane_ / 4;
      Rescale(out, shared_.rescale[row], shared_.rescale[row + 8]);
      Keep(out);
      FenceProducts();
      const uint32_t values = SharedAddress(shared_.stages.keys[stage_]) + 4 * kBlockBytes;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k == 2) {
          Wait(&shared_.probabilities_full[1], tiles_ & 1);
          FenceProducts();
        }
        const uint64_t right = TransposedDescriptor<kBlockBytes>(values) + k * (2048 / 16);
        Outputs<kType>(out[0], left + 2 * k, right);
        Outputs<kType>(out[1], left + 2 * k, right + 2 * kBlockBytes / 16);
        if (k % 2 == 1) CommitProducts();  // half of the keys
      }
      WaitGroups<1>();
      Release(stage_, 0);
      WaitGroups<0>();
      Keep(out);
      ArriveWarp(&shared_.probabilities_empty);
      Release(stage_, 1);
      Advance();
    }
  }

  // Consumer 0. With two stages the products of the next scores follow those of the outputs, so
  // that nothing but the softmax has the tensor cores wait.
  __device__ __forceinline__ void RunScores(const Work& work, const float (&scales)[2],
                                            HalfOutput& out, WideRow (&rows)[2]) {
    float scores[32];
    WaitFull();
    Score(scores);
    WaitGroups<0>();
    KeepFloats(scores);
    for (int tile = work.begin; tile + 1 < work.end; ++tile) {
      Probabilities pairs;
      Weigh(scores, scales, out, rows, pairs);
      const int used = stage_;
      Advance();
      // Keys that are not there yet may wait for this stage.
      const bool there = __all_sync(kFullWarp, TestWait(&shared_.barriers.full[stage_], parity_));
      if (!there) ReleaseHalves<1>(used);
      WaitFull();
      Score(scores);
      if (there) ReleaseHalves<2>(used);
      WaitGroups<0>();
      Keep(out);
      KeepFloats(scores);
      Keep(pairs);
    }
    Probabilities pairs;
    Weigh(scores, scales, out, rows, pairs);
    ReleaseHalves<1>(stage_);
    Keep(out);
    Keep(pairs);
    Advance();
  }

  // Releases a stage, a half each time that a group of products ends. kPending: groups that have
  // been issued since those of the first half.
  template <int kPending>
  __device__ __forceinline__ void ReleaseHalves(int stage) const {
    WaitGroups<kPending>();
    Release(stage, 0);
    WaitGroups<kPending - 1>();
    Release(stage, 1);
  }

  // The warp reads half of a stage no more. Of a pair, CTA i fills half i of both.
  __device__ __forceinline__ void Release(int stage, int half) const {
    if constexpr (kPair) {
      __syncwarp();
      if (ArrivesForWarp(lane_)) ArriveInCluster(&shared_.barriers.empty[stage][0], half);
    } else {
      ArriveWarp(&shared_.barriers.empty[stage][half]);
    }
  }

  // Softmax of a tile's scores, and issue of O += P V: half of the keys after the other, so that
  // the products over the first fill the exponentials of the second.
  __device__ __forceinline__ void Weigh(float (&scores)[32], const float (&scales)[2],
                                        HalfOutput& out, WideRow (&rows)[2], Probabilities& pairs) {
    ScaleScores(scores, scales);
    float units = 1.0f, to_units = 1.0f;
    if constexpr (kHalf) {
      units = UpdateLargest();
      to_units = ToUnits(largest_);
    }
    float rescale[2];
    const float scale = kHalf ? 1.0f : scales[0];
    FollowScores(scores, scale, rows, rescale);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows[h].sum *= rescale[h];
      rescale[h] *= units;
    }
    Rescale(out, rescale[0], rescale[1]);
    Wait(&shared_.probabilities_empty, (tiles_ + 1) & 1);
    if (lane_ % 4 == 0) {
      shared_.rescale[16 * warp_ + lane_ / 4] = rescale[0];
      shared_.rescale[16 * warp_ + lane_ / 4 + 8] = rescale[1];
    }
    Keep(out);
    const uint32_t values = SharedAddress(shared_.stages.keys[stage_]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Exponentials(half, scores, scale, to_units, rows, pairs[half]);
      KeepRegisters(pairs[half]);
      FenceProducts();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t* left = pairs[half] + 4 * k;
        const uint64_t right =
            TransposedDescriptor<kBlockBytes>(values) + (2 * half + k) * (2048 / 16);
        MultiplyHalfRegisters<kType, true, 1>(out[0], left, right);
        MultiplyHalfRegisters<kType, true, 1>(out[1], left, right + 2 * kBlockBytes / 16);
      }
      CommitProducts();
      Share(half, pairs[half]);
    }
  }

  __device__ __forceinline__ void WaitFull() const {
    if constexpr (kPair) {
      Wait(&shared_.barriers.full[stage_], parity_);  // no fence here: the sender has one
    } else {
      WaitTile(&shared_.barriers.full[stage_], parity_);
    }
  }

  // Issues S = Q K^T of a stage.
  __device__ __forceinline__ void Score(float (&scores)[32]) {
    uint64_t query = OperandDescriptor<128>(SharedAddress(shared_.query));
    uint64_t keys = OperandDescriptor<128>(SharedAddress(shared_.stages.keys[stage_]));
    // Else the compiler keeps the descriptors of all products in registers, and has none left.
    asm volatile("" : "+l"(query), "+l"(keys));
    FenceProducts();
#pragma unroll
    for (int block = 0; block < kDim / 64; ++block) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = block * (kBlockBytes / 16) + 2 * k;
        if (block == 0 && k == 0) {
          Scores<kType, false>(scores, query + at, keys + at);
        } else {
          Scores<kType, true>(scores, query + at, keys + at);
        }
      }
    }
    CommitProducts();
    // While it is waited for anyway; with keys' powers no register is left.
    if constexpr (!kHalf) all_valid_ = AllValid(ValidOf(shared_.barriers.valid[stage_]));
  }

  // Columns 8 * j + 2 * (lane % 4), + 1 of the powers of a tile's keys.
  __device__ __forceinline__ float2 PowersOf(int j) const {
    return *reinterpret_cast<const float2*>(
        &shared_.barriers.powers[stage_][8 * j + 2 * (lane_ % 4)]);
  }

  // Scores in base 2, but for 16-bit keys, whose exponentials multiply. Those of masked keys are
  // -inf.
  __device__ __forceinline__ void ScaleScores(float (&scores)[32], const float (&scales)[2]) const {
    if constexpr (kHalf) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 powers = PowersOf(j);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scores[4 * j + 2 * h] *= scales[h] * powers.x;
          scores[4 * j + 2 * h + 1] *= scales[h] * powers.y;
        }
      }
    } else if (all_valid_) {
      return;
    }
    const uint4 valid = ValidOf(shared_.barriers.valid[stage_]);
    if (AllValid(valid)) return;
    const uint32_t words[4] = {valid.x, valid.y, valid.z, valid.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      // Byte 2 * j + lane % 4 / 2 has the keys 8 * j + 4 * (lane % 4 / 2) to + 3.
      const uint32_t bits = words[j / 2] >> (16 * (j % 2) + 4 * (lane_ & 2) + 2 * (lane_ & 1));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if ((bits >> e & 1) == 0) scores[4 * j + e] = scores[4 * j + 2 + e] = -INFINITY;
      }
    }
  }

  // Takes the powers of a tile's keys into account, and returns what the outputs so far are
  // multiplied with to be in units of the largest one.
  __device__ __forceinline__ float UpdateLargest() {
    float largest = largest_;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 powers = PowersOf(j);
      largest = fmaxf(largest, fmaxf(powers.x, powers.y));
    }
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
    const float units = largest_ == largest ? 1.0f : largest_ * Reciprocal(largest);
    largest_ = largest;
    return units;
  }

  // Takes a tile's scores into account. rescale: what the sums and outputs so far are multiplied
  // with. References follow only where a score exceeds one by more than kGrowth: multiplying all
  // outputs takes longer than anything else here, and a larger P is as precise.
  __device__ __forceinline__ void FollowScores(const float (&scores)[32], float scale,
                                               WideRow (&rows)[2], float (&rescale)[2]) const {
    bool grows = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float even = -INFINITY, odd = -INFINITY;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        even = fmaxf(even, scores[4 * j + 2 * h]);
        odd = fmaxf(odd, scores[4 * j + 2 * h + 1]);
      }
      rows[h].largest = fmaxf(rows[h].largest, fmaxf(even, odd) * scale);
      rescale[h] = 1.0f;
      grows = grows || rows[h].largest - rows[h].reference > kGrowth;
    }
    if (!__any_sync(kFullWarp, grows)) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float largest = OfRow(rows[h].largest);
      if (largest - rows[h].reference > kGrowth) {
        rescale[h] = WeightOf(rows[h].reference, largest);
        rows[h].reference = largest;
      }
    }
  }

  // The largest value of the four lanes of a row.
  static __device__ __forceinline__ float OfRow(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
    return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
  }

  // P of half of a tile's keys.
  __device__ __forceinline__ void Exponentials(int half, const float (&scores)[32], float scale,
                                               float to_units, WideRow (&rows)[2],
                                               uint32_t (&pairs)[8]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float shift = ShiftOf(rows[h].reference);
      float sum = 0.0f;
#pragma unroll
      for (int j = 4 * half; j < 4 * half + 4; ++j) {
        float a = Exp2(fmaf(scores[4 * j + 2 * h], scale, -shift));
        float b = Exp2(fmaf(scores[4 * j + 2 * h + 1], scale, -shift));
        sum += a + b;
        if constexpr (kHalf) {
          const float2 powers = PowersOf(j);
          a *= powers.x * to_units;
          b *= powers.y * to_units;
        }
        // Word 2 * (j % 2) + h of the operand of 16 keys.
        pairs[4 * (j / 2 % 2) + 2 * (j % 2) + h] = PackPair<kType>(a, b);
      }
      rows[h].sum += sum;
    }
  }

  // Gives P of half of a tile's keys to consumer 1.
  __device__ __forceinline__ void Share(int half, const uint32_t (&pairs)[8]) const {
    const int row = 16 * warp_ + lane_ % 8 + (lane_ & 8);
    const uint32_t base = SharedAddress(shared_.probabilities) + row * 128;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t words[4] = {pairs[4 * k], pairs[4 * k + 1], pairs[4 * k + 2],
                                 pairs[4 * k + 3]};
      const int chunk = 4 * half + 2 * k + lane_ / 16;
      StoreMatrices<false>(base + ((chunk ^ (row & 7)) << 4), words);
    }
    FenceAsyncProxy();
    ArriveWarp(&shared_.probabilities_full[half]);
  }

  __device__ __forceinline__ void Finish(const Work& work, WideRow (&rows)[2]) const {
    float common = StaticScales(args_.p).common;
    if constexpr (kHalf) common *= largest_ * (1.0f / kProbabilityScale);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows[h].sum += __shfl_xor_sync(kFullWarp, rows[h].sum, 1);
      rows[h].sum += __shfl_xor_sync(kFullWarp, rows[h].sum, 2);
      const float largest = OfRow(rows[h].largest);
      const int row = 16 * warp_ + lane_ / 4 + 8 * h;
      if (lane_ % 4 == 0 && work.head + row < args_.p.heads) {
        const RowState state = {rows[h].reference, rows[h].sum};
        shared_.factor[row] = FinishRow(args_, work, work.head + row, state, largest, common);
      }
    }
  }

  // Writes 256 channels of the outputs from `channel` on.
  __device__ __forceinline__ void Store(const Work& work, const HalfOutput& out,
                                        int channel) const {
    const MlaSparseParams& p = args_.p;
    const bool partial = args_.splits > 1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * warp_ + lane_ / 4 + 8 * h, head = work.head + row;
      const bool exists = head < p.heads;
      const float factor = exists ? shared_.factor[row] : 0.0f;
      const int64_t at = (work.token * p.heads + head) * kMlaValueDim + channel;
      if (partial) {
        if (!exists) continue;
        float* target = args_.partial + work.split * p.tokens * p.heads * kMlaValueDim + at;
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          *reinterpret_cast<float2*>(target + 8 * j + 2 * (lane_ % 4)) =
              make_float2(out[j / 16][4 * (j % 16) + 2 * h] * factor,
                          out[j / 16][4 * (j % 16) + 2 * h + 1] * factor);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 32; j += 4) {  // four lanes exchange 32 channels: 8 for each
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int from = 4 * ((j + i) % 16) + 2 * h;
            words[i] = PackPair<DType::kBFloat16>(out[j / 16][from] * factor,
                                                  out[j / 16][from + 1] * factor);
          }
          TransposeQuad(words);
          if (exists) {
            __stcs(reinterpret_cast<uint4*>(p.out + at + 8 * j + 8 * (lane_ % 4)),
                   make_uint4(words[0], words[1], words[2], words[3]));
          }
        }
      }
    }
  }

  const Arguments& args_;
  Shared& shared_;
  int warp_, lane_;
  int stage_ = 0;
  uint32_t parity_ = 0;
  uint32_t tiles_ = 0;      // so far
  bool all_valid_ = false;  // keys of the tile whose scores were issued last; 16 bits
  float largest_ = 0.0f;    // fp16: power of the keys, so far
};

}  // namespace fastattn::cuda::mla_sparse_sm90
