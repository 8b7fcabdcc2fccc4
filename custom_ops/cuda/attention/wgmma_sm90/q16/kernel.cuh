// Attention of 16-bit queries for sm_90a: bf16 or fp16 queries over K and V of the same type, or
// over codes of 8 bits (e4m3, e5m2, int8) or 4 (int4), for sequences of many new tokens.
//
// The folder is named by its queries, q16: they are what all its variants have in common. V and P
// have 16 bits in the product P V as well, but the product Q K^T has the operands of Config's
// kElement: 16 bits, or the codes of K, e4m3 or int8, against a query of two codes.
//
// Work tile: 128 query tokens of one head. The grid is persistent: one CTA a multiprocessor takes
// work tile after work tile (../common/tile_scheduler.cuh, paired_tile_scheduler.cuh). Its mainloop
// goes over KV tiles of 128 keys, two cache blocks, from the last visible one downwards.
//
// Warps, 12 of them, in three warpgroups:
//  - producer of 16-bit K and V (producer_16bit.cuh): TileFinder, KvLoader, two ScrubWarps;
//  - producer of codes (producer_codes.cuh, converter.cuh): CodeLoader finds tiles and loads Q,
//    codes and scales; three Converter warps turn codes into 16-bit operands and scrub NaNs;
//  - two consumers of 64 queries each: S = Q K^T, softmax, O += P V. They ping-pong: a named
//    barrier lets one issue its products while the other has its exponentials.
//
// Barriers (mbarriers of Shared; full/empty pairs):
//  - tile_found, query_full/query_empty: two buffers of a work tile; Q itself lies there once, and
//    query_read (codes) or query_done (16 bits) say when it may be overwritten: large heads' Q over
//    codes is read by the products, else it goes to registers;
//  - key_full/key_empty, value_full/value_empty: stages of operands; value_ready: V has been
//    scrubbed;
//  - codes_full/codes_empty: stages of codes; scale_full/scale_empty: stages of per-token scales;
//  - named barriers 1 and 2: ping-pong; 3: the converters, before they scrub.
//
// Numerics: a row's shift moves only where a probability gets too large (consumer.cuh). Codes are
// exact in fp16; K's codes may be operands as they lie, against a query of two codes
// (query_codes.cuh). P and V are 16 bits; O is fp32. Constant scales of K and the softmax scale are
// one factor of the query; per-token K scales multiply columns of scores; per-token V scales
// multiply V, relative to a power of two (per_token_scales.cuh), or where keys are masked per row
// (row_v_scales.cuh). Per-channel and constant V scales belong to the epilogue.
//
// Reading order: config.h, this file, producer_16bit.cuh or producer_codes.cuh and converter.cuh,
// consumer.cuh with query*.cuh and row_*.cuh, ../common/epilogue.cuh; launch.cu for the tensor
// maps.
#pragma once

#include "cuda/attention/wgmma_sm90/common/launch_persistent.h"
#include "cuda/attention/wgmma_sm90/common/roles.cuh"
#include "cuda/attention/wgmma_sm90/q16/consumer.cuh"
#include "cuda/attention/wgmma_sm90/q16/converter.cuh"
#include "cuda/attention/wgmma_sm90/q16/producer_16bit.cuh"
#include "cuda/attention/wgmma_sm90/q16/producer_codes.cuh"
#include "cuda/attention/wgmma_sm90/q16/variant.h"

namespace fastattn::cuda::wgmma_q16 {

// 64 K registers for 128 threads of the producer and 256 of the consumers.
inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;

template <class C>
__device__ __forceinline__ void InitBarriers(Shared<C>& shared) {
  constexpr int kWarp = kWarpArrivals, kConsumerWarps = 4 * C::kConsumers * kWarp;
  constexpr int kHelpers = C::kHelperWarps * kWarp, kScrubWarps = C::kScrubWarps * kWarp;
  for (int i = 0; i < 2; ++i) {
    InitBarrier(&shared.tile_found[i], C::kQuantized ? 1 : kWarp);
    InitBarrier(&shared.query_full[i], C::kQuantized ? 1 + kHelpers : kWarp);
    // Besides the consumers arrive the converters, or the loader and the scrubbing warps.
    InitBarrier(&shared.query_empty[i],
                kConsumerWarps + (C::kQuantized ? kHelpers : kWarp + kScrubWarps));
    InitBarrier(&shared.query_done[i], 4 * kWarp);
  }
  InitBarrier(&shared.query_read, kConsumerWarps);
  for (int i = 0; i < C::kKeyStages; ++i) {
    InitBarrier(&shared.key_full[i], C::kQuantized && !C::kLoadsKeyOperands ? kHelpers : 1);
    InitBarrier(&shared.key_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < C::kValueStages; ++i) {
    InitBarrier(&shared.value_full[i], 1);
    InitBarrier(&shared.value_ready[i], C::kQuantized ? kHelpers : kScrubWarps);
    InitBarrier(&shared.value_empty[i], kConsumerWarps);
    // Written as one word: no warp ever writes the bytes that stand for none.
    *reinterpret_cast<int*>(shared.nan_found[i]) = 0;
  }
  for (int i = 0; i < C::kCodeStages; ++i) {
    InitBarrier(&shared.codes_full[i], 1);
    InitBarrier(&shared.codes_empty[i], kHelpers);
  }
  for (int i = 0; i < C::kScaleStages; ++i) {
    InitBarrier(&shared.scale_full[i], kWarp);
    InitBarrier(&shared.scale_empty[i], kConsumerWarps + kHelpers);
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
    if constexpr (C::kNibbleOperands) {
      for (int i = threadIdx.x; i < 16 * C::kKeys; i += C::kThreads) {
        shared.key_bias[i] = NibbleQuery<C>::kKeyBias;
      }
      for (int i = threadIdx.x; i < 64 * 16 * C::kConsumers; i += C::kThreads) {
        shared.query_bias[i / (64 * 16)][i % (64 * 16)] = 0;
      }
    }
    FenceAsyncProxy();
  }
  BeginRoles();
  if (threadIdx.x < 128) {
    ReleaseRegisters<kProducerRegisters>();
    if (threadIdx.x < 32) {
      PrefetchMaps(arguments);
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
  __trap();  // a build for sm_90 without its own features: better than output left unwritten
#endif
}

// A softcap is a kernel of its own: iterations without one are better off without its instructions.
template <DType kElement, int kDim, Source kSource, bool kPerTokenScales>
cudaError_t LaunchVariant(const Arguments& arguments, cudaStream_t stream) {
  using Plain = Config<kElement, kDim, kSource, kPerTokenScales, false>;
  using Capped = Config<kElement, kDim, kSource, kPerTokenScales, true>;
  if (arguments.p.softcap > 0.0f) {
    return LaunchPersistent<Kernel<Capped>, Capped, Shared<Capped>>(arguments, stream);
  }
  return LaunchPersistent<Kernel<Plain>, Plain, Shared<Plain>>(arguments, stream);
}

}  // namespace fastattn::cuda::wgmma_q16
