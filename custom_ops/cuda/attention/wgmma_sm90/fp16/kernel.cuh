// Attention of long query rows with 16-bit operands on Hopper: TMA, WGMMA, warp specialisation,
// persistent CTAs. docs/kernels.md explains the pipeline.
#pragma once

#include "cuda/attention/wgmma_sm90/common/launch_persistent.h"
#include "cuda/attention/wgmma_sm90/fp16/consumer.cuh"
#include "cuda/attention/wgmma_sm90/fp16/converter.cuh"
#include "cuda/attention/wgmma_sm90/fp16/operands.cuh"
#include "cuda/attention/wgmma_sm90/fp16/producer.cuh"
#include "cuda/attention/wgmma_sm90/fp16/variant.h"

namespace fastattn::cuda::wgmma_fp16 {

// 64 K registers: 128 threads of the producer and 256 consumers.
inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;

template <class C>
__device__ __forceinline__ void InitBarriers(Shared<C>& shared) {
  constexpr int kWarp = kWarpArrivals, kWarps = 4 * C::kConsumers * kWarp;
  constexpr int kSides = C::kSideWarps * kWarp, kCleaners = C::kCleaners * kWarp;
  for (int i = 0; i < 2; ++i) {
    InitBarrier(&shared.tile_found[i], C::kCodes ? 1 : kWarp);
    InitBarrier(&shared.query_full[i], C::kCodes ? 1 + kSides : kWarp);
    // Besides the consumers: the converters; or the loader and the cleaners.
    InitBarrier(&shared.query_empty[i], kWarps + (C::kCodes ? kSides : kWarp + kCleaners));
    InitBarrier(&shared.query_done[i], 4 * kWarp);
  }
  InitBarrier(&shared.query_read, kWarps);
  for (int i = 0; i < C::kKeyStages; ++i) {
    InitBarrier(&shared.key_full[i], C::kCodes && !C::kKeyCodes ? kSides : 1);
    InitBarrier(&shared.key_empty[i], kWarps);
  }
  for (int i = 0; i < C::kValueStages; ++i) {
    InitBarrier(&shared.value_full[i], 1);
    InitBarrier(&shared.value_ready[i], C::kCodes ? kSides : kCleaners);
    InitBarrier(&shared.value_empty[i], kWarps);
    // As one word: no warp ever writes the bytes that have none.
    *reinterpret_cast<int*>(shared.nan_found[i]) = 0;
  }
  for (int i = 0; i < C::kRawSlots; ++i) {
    InitBarrier(&shared.raw_full[i], 1);
    InitBarrier(&shared.raw_empty[i], kSides);
  }
  for (int i = 0; i < C::kScaleSlots; ++i) {
    InitBarrier(&shared.scale_full[i], kWarp);
    InitBarrier(&shared.scale_empty[i], kWarps + kSides);
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
  if constexpr (C::kCodes) {
    for (int i = threadIdx.x; i < 512; i += C::kThreads) {
      const int column = i / 64, piece = (i / 8 % 8) ^ column;  // undoes the 128-byte swizzle
      shared.ones[i] = piece < 2 ? 0x3C00 : 0;
    }
    FenceAsyncProxy();
  }
  __syncthreads();
  PdlWait();
  PdlLaunchDependents();  // it takes the multiprocessors that this one leaves
  if (threadIdx.x < 128) {
    ReleaseRegisters<kProducerRegisters>();
    if (threadIdx.x < 32) {
      if (threadIdx.x == 0) {
        PrefetchMap(&arguments.query);
        PrefetchMap(&arguments.key);
        PrefetchMap(&arguments.value);
      }
      __syncwarp();
      if constexpr (C::kCodes) {
        Loader<C>(arguments, shared).Run();
      } else {
        OperandLoader<C>(arguments, shared).Run();
      }
    } else if constexpr (C::kCodes) {
      Converter<C>(arguments, shared).Run();
    } else if (threadIdx.x < 64) {
      Finder<C>(arguments, shared).Run();
    } else {
      Cleaner<C>(shared).Run();
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
template <DType kElement, int kDim, Source kSource, bool kTokenScales>
cudaError_t LaunchVariant(const Arguments& arguments, cudaStream_t stream) {
  using wgmma_fp8::LaunchPersistent;
  using Plain = Config<kElement, kDim, kSource, kTokenScales, false>;
  using Capped = Config<kElement, kDim, kSource, kTokenScales, true>;
  if (arguments.p.softcap > 0.0f) {
    return LaunchPersistent<Kernel<Capped>, Capped, Shared<Capped>>(arguments, stream);
  }
  return LaunchPersistent<Kernel<Plain>, Plain, Shared<Plain>>(arguments, stream);
}

}  // namespace fastattn::cuda::wgmma_fp16
