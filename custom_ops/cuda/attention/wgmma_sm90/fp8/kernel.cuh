// FP8 attention for sm_90a: e4m3 queries over e4m3 or e5m2 K and V, for sequences of many new
// tokens.
//
// Work tile: 128 query tokens of one head (common/work_tile.h). The grid is persistent: one CTA a
// multiprocessor takes work tile after work tile, in an order found on the device (common/
// tile_scheduler.cuh, paired_tile_scheduler.cuh). Its mainloop goes over KV tiles of 128 keys, two
// cache blocks, from the last visible one downwards.
//
// Warps, 12 of them, in three warpgroups:
//  - producer: warp 0 (KvLoader) finds the work tile and its blocks and loads Q, K, V and per-token
//    scales with TMA; warps 1-3 (ValueScrubber) read the tile's scales and masks ahead, scrub NaNs
//    out of V where keys are masked, and turn per-token scales into fp32.
//  - two consumers of 64 queries each: S = Q K^T, softmax, P to e4m3, O += P V. They ping-pong:
//    named barriers let one have its exponentials while the other's products run. With
//    Config::kLazy (head_dim 128, e4m3, constant scales) they are LazyConsumers.
//
// Barriers (mbarriers of Shared; full/empty pairs):
//  - tile_found, query_full/query_empty: two buffers of a work tile, its queries, factors and
//    masks;
//  - key_full/key_empty, value_full/value_empty: kStages stages; value_ready: V has been scrubbed;
//  - named barriers 1 and 2: ping-pong.
//
// Shared memory (config.h): Q twice; kStages stages of K, V and scales; lists of NaN values; what
// the scheduler knows. One CTA fills a multiprocessor.
//
// Numerics: scores in fp32, exp2 with a running maximum; P is 2^8 times its value before the cast.
// Each KV tile's P V is added to fp32 registers (two-level accumulation, Config::kTwoLevel).
// LazyConsumer: a shift that follows the maximum where it must, so that P is 2^5 to 432 times its
// value where it is largest, and two KV tiles at a time. Scales
// of Q and K that are constant over a tile and the softmax scale are one factor; per-token K scales
// multiply columns of scores, V scales columns of P, relative to the largest of the KV tile (or of
// what the row sees, where some keys are masked); a constant V scale belongs to the epilogue.
//
// Reading order: config.h, this file, producer.cuh, consumer.cuh, lazy_consumer.cuh, then
// ../common/{softmax,epilogue,tile_scheduler}.cuh; transpose.cu and launch.cu for ragged V and the
// tensor maps.
#pragma once

#include <type_traits>

#include "cuda/attention/wgmma_sm90/common/launch_persistent.h"
#include "cuda/attention/wgmma_sm90/common/roles.cuh"
#include "cuda/attention/wgmma_sm90/fp8/consumer.cuh"
#include "cuda/attention/wgmma_sm90/fp8/lazy_consumer.cuh"
#include "cuda/attention/wgmma_sm90/fp8/producer.cuh"
#include "cuda/attention/wgmma_sm90/fp8/variant.h"

namespace fastattn::cuda::wgmma_fp8 {

// 64 K registers for 128 threads of the producer and 256 of the consumers.
inline constexpr int kProducerRegisters = 40;
inline constexpr int kConsumerRegisters = 232;

template <class C>
__device__ __forceinline__ void InitBarriers(Shared<C>& shared) {
  constexpr int kConsumerWarps = 4 * C::kConsumers * kWarpArrivals;
  constexpr int kScrubWarps = C::kScrubWarps * kWarpArrivals;
  for (int i = 0; i < 2; ++i) {
    InitBarrier(&shared.tile_found[i], 1);
    InitBarrier(&shared.query_full[i], 1 + kScrubWarps);
    InitBarrier(&shared.query_empty[i], kConsumerWarps + kScrubWarps);
  }
  for (int i = 0; i < C::kStages; ++i) {
    InitBarrier(&shared.key_full[i], 1);
    InitBarrier(&shared.key_empty[i], kConsumerWarps);
    InitBarrier(&shared.value_full[i], 1);
    InitBarrier(&shared.value_ready[i], kScrubWarps);
    InitBarrier(&shared.value_empty[i], kConsumerWarps);
    shared.nan_found[i][3] = 0;
  }
  if constexpr (C::kLazy) {
    for (int i = 0; i < 16 * C::kConsumers; ++i) (&shared.failed[0][0][0])[i] = 0;
  }
  FenceBarrierInit();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    Kernel(const __grid_constant__ Arguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(memory);
  if (threadIdx.x == 0) InitBarriers(shared);
  BeginRoles();
  if (threadIdx.x < 128) {
    ReleaseRegisters<kProducerRegisters>();
    if (threadIdx.x < 32) {
      PrefetchMaps(arguments);
      KvLoader<C>(arguments, shared).Run();
    } else {
      ValueScrubber<C>(arguments, shared).Run();
    }
  } else {
    ClaimRegisters<kConsumerRegisters>();
    std::conditional_t<C::kLazy, LazyConsumer<C>, Consumer<C>>(arguments, shared).Run();
  }
#else
  __trap();  // a build for sm_90 without its own features: better than output left unwritten
#endif
}

template <int kDim, bool kTokenScales, bool kSoftcap, DType kCodes>
cudaError_t LaunchVariant(const Arguments& arguments, cudaStream_t stream) {
  using C = Config<kDim, kTokenScales, kSoftcap, kCodes>;
  return LaunchPersistent<Kernel<C>, C, Shared<C>>(arguments, stream);
}

}  // namespace fastattn::cuda::wgmma_fp8
