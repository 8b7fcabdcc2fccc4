// Two CTAs of a cluster that share key tiles: CTA i gathers half i of each tile into its own stage,
// and a warp of it copies that half into the other's, one pass of the conversion while the next is
// converted.
//
// A half is free when the consumers of both CTAs have released it, so that a copy out of it has
// ended, too, before it is filled again.
#pragma once

#include <cstdint>

#include "cuda/common/cluster.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/gather.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

inline constexpr int kPairProducers = 4;  // warps
// In place of kProducerRegisters of both warpgroups.
inline constexpr int kPairProducerRegisters = 104;
inline constexpr int kPairSenderRegisters = 40;

// All threads of both CTAs.
__device__ __forceinline__ void SyncCluster() {
  __syncwarp();
  ArriveAtCluster();
  WaitForCluster();
}

// Arrives at the barrier of CTA `rank`: nothing is read any more. A release in the cluster's scope
// would wait for all of the thread's accesses to memory as the GPU sees them, 1000 cycles and more.
__device__ __forceinline__ void ArriveInCluster(uint64_t* barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(
                   AddressInCluster(rank, SharedAddress(barrier)))
               : "memory");
}

// Copies shared memory into the other CTA's; `barrier` there counts the bytes.
__device__ __forceinline__ void CopyToPeer(uint32_t target, uint32_t source, uint32_t bytes,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(target),
      "r"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// One warp. Codes only: bf16 keys are copied faster from the L2 cache twice.
template <int kDim, int kStages>
class PairSender {
 public:
  __device__ __forceinline__ PairSender(uint8_t* keys, StageBarriers<kStages>& barriers, int rank)
      : barriers_(barriers), keys_(SharedAddress(keys) + rank * kHalfBytes), rank_(rank) {}

  __device__ __forceinline__ void Run(const Work& work) {
    for (int tile = work.begin; tile < work.end; ++tile) {
#pragma unroll
      for (int pass = 0; pass < kPairPasses; ++pass) Send(pass);
      stage_ = (stage_ + 1) % kStages;
      parity_ ^= stage_ == 0;
    }
  }

 private:
  __device__ __forceinline__ void Send(int pass) const {
    Wait(&barriers_.own[stage_][pass], parity_);
    FenceAsyncProxy();
    const int lane = threadIdx.x % 32;
    const bool last = pass + 1 == kPairPasses;
    if (last && lane == 0) ArriveExpect(&barriers_.full[stage_], kBytes);
    __syncwarp();
    uint32_t source = keys_ + stage_ * (kBlocks * kBlockBytes) + lane * kBlockBytes, bytes = 0;
    if (lane < kBlocks) {
      source += pass * kPassBytes;
      bytes = kPassBytes;
    } else if (last && lane == kBlocks) {
      source = SharedAddress(&barriers_.valid[stage_][rank_]);
      bytes = 16;
    } else if (last && lane == kBlocks + 1) {
      source = SharedAddress(&barriers_.powers[stage_][kKeys / 2 * rank_]);
      bytes = 4 * kKeys / 2;
    }
    if (bytes != 0) {
      CopyToPeer(AddressInCluster(rank_ ^ 1, source), source, bytes,
                 AddressInCluster(rank_ ^ 1, SharedAddress(&barriers_.full[stage_])));
    }
  }

  static constexpr int kBlocks = kDim / 64;
  static constexpr int kHalfBytes = kKeys / 2 * 128;  // of a block
  static constexpr int kPassBytes = kHalfBytes / kPairPasses;
  static constexpr uint32_t kBytes = kBlocks * kHalfBytes + 16 + 4 * kKeys / 2;

  StageBarriers<kStages>& barriers_;
  uint32_t keys_;
  uint32_t rank_;
  int stage_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace fastattn::cuda::mla_sparse_sm90
