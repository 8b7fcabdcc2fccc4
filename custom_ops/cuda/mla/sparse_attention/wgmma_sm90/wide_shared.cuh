// Shared memory and registers of the wide kernel of sparse latent attention.
#pragma once

#include <cstdint>

#include "cuda/mla/sparse_attention/wgmma_sm90/pair.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/stages.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

inline constexpr int kWideHeads = 64;
inline constexpr int kWideProducers = 8;  // warps
inline constexpr int kWideThreads = 256 + 32 * kWideProducers;
// Of 512 that four threads have.
inline constexpr int kScoreRegisters = 208;
inline constexpr int kOutputRegisters = 160;
inline constexpr int kProducerRegisters = 72;
inline constexpr int kWideStages = 2;  // of keys
// Beside stages of 512 channels there is room for a slot of each producer warp.
template <MlaFormat kFormat>
inline constexpr int kWideSlots = kFormat == MlaFormat::kFp8x584 ? 1 : 0;

template <int kDim, MlaFormat kFormat>
struct alignas(1024) WideShared {
  Stages<kDim, kWideStages> stages;
  uint8_t query[kDim / 64 * kWideHeads * 128];
  uint8_t probabilities[kWideHeads * 128];
  float rescale[kWideHeads];
  float factor[kWideHeads];
  float query_powers[kWideHeads];  // fp16: what the query's rows were divided by
  StageBarriers<kWideStages> barriers;
  uint64_t probabilities_full[2];  // halves, of 32 keys
  uint64_t probabilities_empty;
  alignas(16) uint8_t slots[kWideSlots<kFormat> * kWideProducers * kSlotBytes + 16];
};

template <bool kPair, int kDim, MlaFormat kFormat>
__device__ __forceinline__ void InitBarriers(WideShared<kDim, kFormat>& shared) {
  for (int i = 0; i < kWideStages; ++i) {
    InitBarrier(&shared.barriers.full[i], kPair ? 1 : kFullArrivals<kFormat, kWideProducers>);
    for (uint64_t& pass : shared.barriers.own[i]) {
      InitBarrier(&pass, kFullArrivals<kFormat, kPairProducers>);
    }
    InitBarrier(&shared.barriers.empty[i][0], (kPair ? 16 : 8) * kWarpArrivals);
    InitBarrier(&shared.barriers.empty[i][1], 8 * kWarpArrivals);
  }
  InitBarrier(&shared.probabilities_full[0], 4 * kWarpArrivals);
  InitBarrier(&shared.probabilities_full[1], 4 * kWarpArrivals);
  InitBarrier(&shared.probabilities_empty, 4 * kWarpArrivals);
  FenceBarrierInit();
}

}  // namespace fastattn::cuda::mla_sparse_sm90
