// Attention of long query rows with 16-bit operands on Hopper: TMA, WGMMA, warp specialisation,
// persistent CTAs. docs/kernels.md explains the pipeline.
#pragma once

#include "cuda/attention/wgmma_sm90/common/launch_persistent.h"
#include "cuda/attention/wgmma_sm90/fp16/consumer.cuh"
#include "cuda/attention/wgmma_sm90/fp16/converter.cuh"
#include "cuda/attention/wgmma_sm90/fp16/producer_16bit.cuh"
#include "cuda/attention/wgmma_sm90/fp16/producer_codes.cuh"

namespace fastattn::cuda::wgmma_fp16 {

// 64 K registers: 128 threads of the producer and 256 consumers.
inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;

template <class C>
__device__ __forceinline__ void InitBarriers(Shared<C>& shared) {
  constexpr int kWarp = kWarpArrivals, kWarps = 4 * C::kConsumers * kWarp;
  constexpr int kHelpers = C::kHelperWarps * kWarp, kScrubWarps = C::kScrubWarps * kWarp;
  for (int i = 0; i < 2; ++i) {
    InitBarrier(&shared.tile_found[i], C::kQuantized ? 1 : kWarp);
    InitBarrier(&shared.query_full[i], C::kQuantized ? 1 + kHelpers : kWarp);
    // Besides the consumers: the converters; or the loader and the cleaners.
    InitBarrier(&shared.query_empty[i], kWarps + (C::kQuantized ? kHelpers : kWarp + kScrubWarps));
    InitBarrier(&shared.query_done[i], 4 * kWarp);
  }
  InitBarrier(&shared.query_read, kWarps);
  for (int i = 0; i < C::kKeyStages; ++i) {
    InitBarrier(&shared.key_full[i], C::kQuantized && !C::kKeyCodeOperands ? kHelpers : 1);
    InitBarrier(&shared.key_empty[i], kWarps);
  }
  for (int i = 0; i < C::kValueStages; ++i) {
    InitBarrier(&shared.value_full[i], 1);
    InitBarrier(&shared.value_ready[i], C::kQuantized ? kHelpers : kScrubWarps);
    InitBarrier(&shared.value_empty[i], kWarps);
    // As one word: no warp ever writes the bytes that have none.
    *reinterpret_cast<int*>(shared.nan_found[i]) = 0;
  }
  for (int i = 0; i < C::kCodeStages; ++i) {
    InitBarrier(&shared.codes_full[i], 1);
    InitBarrier(&shared.codes_empty[i], kHelpers);
  }
  for (int i = 0; i < C::kScaleStages; ++i) {
    InitBarrier(&shared.scale_full[i], kWarp);
    InitBarrier(&shared.scale_empty[i], kWarps + kHelpers);
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
  if constexpr (C::kQuantized) {
    for (int i = threadIdx.x; i < 512; i += C::kThreads) {
      const int column = i / 64, piece = (i / 8 % 8) ^ column;  // undoes the 128-byte swizzle
      shared.ones[i] = piece < 2 ? 0x3C00 : 0;
    }
    FenceAsyncProxy();
  }
  __syncthreads();
  WaitForEarlierKernels();
  AllowNextKernel();  // it takes the multiprocessors that this one leaves
  if (threadIdx.x < 128) {
    ReleaseRegisters<kProducerRegisters>();
    if (threadIdx.x < 32) {
      if (threadIdx.x == 0) {
        PrefetchMap(&arguments.query);
        PrefetchMap(&arguments.key);
        PrefetchMap(&arguments.value);
      }
      __syncwarp();
      if constexpr (C::kQuantized) {
        CodeLoader<C>(arguments, shared).Run();
      } else {
        KvLoader<C>(arguments, shared).Run();
      }
    } else if constexpr (C::kQuantized) {
      Converter<C>(arguments, shared).Run();
    } else if (threadIdx.x < 64) {
      TileFinder<C>(arguments, shared).Run();
    } else {
      ScrubWarp<C>(shared).Run();
    }
  } else {
    ClaimRegisters<kConsumerRegisters>();
    Consumer<C>(arguments, shared).Run();
  }
#else
  __trap();  // a build for sm_90 without its own features; rather than leaving rows unwritten
#endif
}

// A softcap is a kernel of its own: steps without one are better off without its instructions.
template <DType kElement, int kDim, Source kSource, bool kPerTokenScales>
cudaError_t LaunchConfig(const Arguments& arguments, cudaStream_t stream) {
  using Plain = Config<kElement, kDim, kSource, kPerTokenScales, false>;
  using Capped = Config<kElement, kDim, kSource, kPerTokenScales, true>;
  if (arguments.p.softcap > 0.0f) {
    return LaunchPersistent<Kernel<Capped>, Capped, Shared<Capped>>(arguments, stream);
  }
  return LaunchPersistent<Kernel<Plain>, Plain, Shared<Plain>>(arguments, stream);
}

}  // namespace fastattn::cuda::wgmma_fp16
