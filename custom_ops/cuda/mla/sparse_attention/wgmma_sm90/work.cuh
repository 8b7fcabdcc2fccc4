// What the CTAs of sparse latent attention do, and what their kernels share.
//
// A work tile is one query token, a group of its heads, and a split of its keys: a contiguous range
// of key tiles. The tiles of the second selection follow those of the first. The grid is
// persistent: a CTA takes every gridDim.x-th work tile.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/mbarrier.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/variant.h"
#include "plan/mla_sparse_attention.h"

namespace fastattn::cuda::mla_sparse_sm90 {

inline constexpr int kKeys = kMlaSparseTileKeys;  // of a tile
inline constexpr int kBlockBytes = kKeys * 128;   // 64 channels of a tile, rows swizzled over 128

__device__ __forceinline__ int LengthOf(const MlaSelection& s, int64_t token) {
  if (s.topk == 0) return 0;
  const int length = s.lengths == nullptr ? s.topk : s.lengths[token];
  return min(max(length, 0), s.topk);
}

// A work tile.
struct Work {
  int64_t token;
  int head;  // the first one
  int split;
  int lengths[2];
  int first_extra;  // tile at which the second selection begins
  int begin, end;   // tiles

  __device__ __forceinline__ Work(const Arguments& args, unsigned index, int heads_per_group) {
    const unsigned item = index / args.head_groups;  // groups of a token run side by side
    head = index % args.head_groups * heads_per_group;
    token = item / args.splits;
    split = item % args.splits;
    lengths[0] = LengthOf(args.p.keys, token);
    lengths[1] = LengthOf(args.p.extra, token);
    first_extra = (lengths[0] + kKeys - 1) / kKeys;
    const int tiles = first_extra + (lengths[1] + kKeys - 1) / kKeys;
    const int each = static_cast<unsigned>(tiles) / args.splits,
              rest = tiles - each * static_cast<int>(args.splits);
    begin = split * each + min(split, rest);
    end = begin + each + (split < rest);
  }
};

// A static scale multiplies scores and outputs; where both selections have one, codes of the
// second are multiplied with the ratio. A scale that cannot be divided by multiplies all codes.
struct StaticScales {
  float common = 1.0f;
  float codes[2] = {1.0f, 1.0f};

  __device__ __forceinline__ explicit StaticScales(const MlaSparseParams& p) {
    if (p.keys.cache.format != MlaFormat::kFp8) return;
    const float first = *p.keys.scale;
    const float second = p.extra.topk > 0 ? *p.extra.scale : first;
    const bool usable = fabsf(first) >= 1e-30f && fabsf(first) <= 1e30f;
    common = usable ? first : 1.0f;
    codes[0] = usable ? 1.0f : first;
    codes[1] = usable ? second / first : second;
  }
};

// 16 bytes into shared memory, asynchronously; zeros unless `valid`. Without a cache policy: ptxas
// 13.0 turns cp.async with one into instructions that the GPU refuses, where it unrolls the loop.
__device__ __forceinline__ void CopyOrZero(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Waits for the thread's copies, and orders them before wgmma.
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  FenceAsyncProxy();
}

// 8 bytes, for an address of which 16 would not be aligned.
__device__ __forceinline__ void Copy8OrZero(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 8 : 0)
               : "memory");
}

__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all but the last kPending of the thread's groups of copies.
template <int kPending>
__device__ __forceinline__ void WaitCopyGroups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives at a barrier once the thread's copies so far have ended.
__device__ __forceinline__ void ArriveAfterCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

// Starts to copy the query: heads of the group in rows of 128 bytes, swizzled, block after block of
// 64 channels.
template <int kDim, int kRows, int kThreads>
__device__ __forceinline__ void LoadQuery(const MlaSparseParams& p, const Work& work, int thread,
                                          uint8_t* shared) {
  constexpr int kChunks = kDim / 8;
  const uint16_t* q = p.q + work.token * p.q_token_stride + work.head * p.q_head_stride;
  const int heads = p.heads - work.head;
#pragma unroll 2
  for (int i = thread; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int at = chunk / 8 * (kRows * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
    CopyOrZero(SharedAddress(shared + at), row < heads ? q + row * p.q_head_stride + 8 * chunk : q,
               row < heads);
  }
}

}  // namespace fastattn::cuda::mla_sparse_sm90
