// Prompts of rope_write_cache_kv, two kinds of CTA in one launch: streaming CTAs give a token to
// each warp, which walks over its Q and K heads, a few at a time (LaneShape), one or two steps of
// loads ahead; cos, sin and the norms' weights are read once. V CTAs take one KV head of a tile, as
// in tile_kernel.cuh.
#pragma once

#include <algorithm>

#include "cuda/cache/rope_write/tile_kernel.cuh"
#include "cuda/common/shared_address.cuh"

namespace fastattn::cuda {

// Steps whose loads are in flight: as many as the registers of 24 warps leave room for.
template <typename Options>
inline constexpr int kStepsAhead = Options::kBias || Options::kNorm ? 1 : 2;

#ifndef ROPE_CTAS
#define ROPE_CTAS 3
#endif
#ifndef ROPE_RING
#define ROPE_RING 0  // steps ahead through shared memory, steps with a bias or a norm
#endif
#ifndef ROPE_RING_PLAIN
#define ROPE_RING_PLAIN 0  // the others
#endif

// Steps whose values are on their way into shared memory; 0: they come into registers.
template <typename Options>
inline constexpr int kRingSteps = Options::kAny                       ? 0
                                  : Options::kBias && Options::kNorm ? (ROPE_RING > 2 ? 2 : ROPE_RING)
                                  : Options::kBias || Options::kNorm ? ROPE_RING
                                                                     : ROPE_RING_PLAIN;

// A warp's steps on their way into shared memory, kParts tensors of them. Every lane copies and
// reads its own bytes only, so that nothing but its own copies is waited for.
template <typename Lane, int kSteps, int kParts, int kWarps>
struct StepRing {
  static constexpr int kVectors = Lane::kWords / 4;  // of 16 bytes, a part
  static constexpr int kPart = kVectors * 32 * 16;   // bytes
  static constexpr int kStep = kParts * kPart;
  static_assert(Lane::kWords % 4 == 0);

  uint32_t first;     // address of the lane's bytes
  uint32_t slot = 0;  // offset of the step that is next

  static constexpr int kBytes = kWarps * kSteps * kStep;

  __device__ __forceinline__ explicit StepRing(char* space)
      : first(SharedAddress(space) + threadIdx.x / 32 * (kSteps * kStep) + threadIdx.x % 32 * 16) {}
  template <int kDistance>
  __device__ __forceinline__ void Copy(int part, const void* from) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const char* source =
          static_cast<const char*>(from) + Halves<Lane::kWords, kDistance>::Offset(i);
      if (part == 0) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                         first + slot + part * kPart + i * 512),
                     "l"(source)
                     : "memory");
      } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(
                         first + slot + part * kPart + i * 512),
                     "l"(source)
                     : "memory");
      }
    }
  }
  __device__ __forceinline__ void Commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
    Next();
  }
  __device__ __forceinline__ void Next() {
    if constexpr ((kSteps & (kSteps - 1)) == 0) {
      slot = (slot + kStep) & (kSteps * kStep - 1);
    } else {
      slot += kStep;
      if (slot == kSteps * kStep) slot = 0;
    }
  }
  __device__ __forceinline__ void Wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kSteps - 1) : "memory");
  }
  __device__ __forceinline__ void Read(int part, uint32_t (&words)[Lane::kWords]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[4 * i]), "=r"(words[4 * i + 1]), "=r"(words[4 * i + 2]),
                     "=r"(words[4 * i + 3])
                   : "r"(first + slot + part * kPart + i * 512)
                   : "memory");
    }
  }
};

template <typename Traits>
using StreamRing = StepRing<StreamLane<Traits>, kRingSteps<typename Traits::Options>,
                            Traits::Options::kBias ? 2 : 1, kStreamThreads / 32>;

template <typename Traits>
constexpr int StreamBytes() {
  constexpr int kTile = sizeof(ValueTile<Traits::kHeadDim>);
  if constexpr (kRingSteps<typename Traits::Options> > 0) {
    return std::max(kTile, StreamRing<Traits>::kBytes);
  } else {
    return kTile;
  }
}

// Waits for a lane's angles, by an operation that leaves their bits (the CTA has one dimension).
// Loads are waited for in groups: a first use in the loop would wait for the next step's values,
// too, in every step.
template <typename Lane>
__device__ __forceinline__ void WaitForAngles(LaneAngles<Lane>& angles) {
  const auto wait = [](float& x) { x = BitsFloat(FloatBits(x) | threadIdx.z); };
  wait(angles.cos[0]);
  wait(angles.sin[Lane::kHalf - 1]);
}

// Q of a token that belongs to no sequence.
template <typename Lane>
__device__ __forceinline__ void StoreZeroQueries(const RopeWriteCacheParams& p, float q_inverse,
                                                 int token, int first_step, int end_step) {
  const uint32_t zeros[Lane::kWords] = {};
  // Nothing that is computed here is to stay in registers for tokens of a sequence.
  const unsigned thread = KeepInLoop(threadIdx.x);
  const int group = thread % 32 / Lane::kLanes;
  const int lane = thread % Lane::kLanes;
  for (int step = KeepInLoop(first_step); step < end_step; ++step) {
    const int head = step * Lane::kHeads + group;
    StoreQuery<Lane>(zeros, p, q_inverse, KeepInLoop(token), head, lane, head < p.num_heads);
  }
}

// One token's Q and K heads, or a share of them. K follows Q in memory. kNormFirst: as
// norm_before_rope says (not read for kAny); a loop with both orders would spill.
template <typename Traits, bool kNormFirst>
__device__ __forceinline__ void StreamToken(const StepParams& p, const StreamGrid& grid,
                                            unsigned cta) {
  using Lane = StreamLane<Traits>;
  using Options = typename Traits::Options;
  constexpr int kHeads = Lane::kHeads;
  const RopeWriteCacheParams& rope = p.rope;
  const PagedCache& cache = rope.cache;
  const int share = cta % grid.shares;
  const int token = cta / grid.shares * (kStreamThreads / 32) + threadIdx.x / 32;
  if (token >= rope.seqs.num_tokens) return;
  const int group = threadIdx.x % 32 / Lane::kLanes;
  const int lane = threadIdx.x % Lane::kLanes;
  const int q_heads = rope.num_heads;
  const int q_steps = (q_heads + kHeads - 1) / kHeads;
  const int k_steps = (cache.num_kv_heads + kHeads - 1) / kHeads;
  const int first_step = share * grid.steps_per_share;
  const int end_step = min(first_step + grid.steps_per_share, q_steps + k_steps);

  constexpr int kAhead = kStepsAhead<Options>;
  constexpr bool kFewRegisters = kAhead == 1;
  const auto keep = [](auto x) { return kFewRegisters ? KeepInLoop(x) : x; };
  const int lane_offset = group * Lane::kHeadDim + lane * Lane::kHalf;
  const uint16_t* source = static_cast<const uint16_t*>(p.q) + token * p.q_stride + lane_offset;
  asm volatile("" : "+l"(source));  // two registers, else computed in every step
  // A bias of the input's type comes with the values, as it lies in memory.
  const bool early_bias =
      HasBias<Options>(rope) && !Options::kAny && rope.bias_dtype == Traits::kIn;
  uint32_t bias[Lane::kWords] = {};
  const auto load = [&](int step, uint32_t (&words)[Lane::kWords], float& scale) {
    const bool is_q = step < q_steps;
    const int head = (is_q ? step : step - q_steps) * kHeads;
    const int first = is_q ? 0 : q_heads * Lane::kHeadDim;
    if (step < end_step && head + group < (is_q ? q_heads : cache.num_kv_heads)) {
      LoadHalves<Lane::kWords, Lane::kDistance>(source + first + head * Lane::kHeadDim, words);
      if (early_bias) {
        const unsigned thread = keep(threadIdx.x);
        const unsigned own = thread % 32 / Lane::kLanes * Lane::kHeadDim +
                             thread % Lane::kLanes * Lane::kHalf + first + head * Lane::kHeadDim;
        LoadHalves<Lane::kWords, Lane::kDistance>(static_cast<const uint16_t*>(rope.bias) + own,
                                                  bias);
      }
      if (!kFewRegisters && !is_q) {
        scale = HeadScale<Traits>(cache, cache.k_scales, cache.k_granularity, head + group);
      }
    }
  };
  uint32_t words[kAhead][Lane::kWords] = {};
  float scales[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    scales[i] = 1.0f;
    load(first_step + i, words[i], scales[i]);
  }

  constexpr bool kSharedNorm = Options::kNorm && !Options::kAny;  // registers
  using Norm = SharedNorm<Lane, kStreamThreads / 32>;
  Norm norm;
  if constexpr (kSharedNorm) norm.Load(rope);
  const SeqWindow window = LoadWindow(rope.seqs, static_cast<int>(token * grid.seqs_per_token));
  const WarpPlace place = FindPlace(rope.seqs, window, GivenSeq(rope.seqs, token), token);
  const bool owned = place.batch_idx >= 0;
  LaneRotation<Traits, Lane, kStreamThreads / 32> rotation;
  int block = -1;
  if (owned) {
    rotation.Load(rope, place, lane);
    if (end_step > q_steps) {
      block = BlockOf(rope.seqs, cache.num_blocks, place.batch_idx, place.position / kBlockSize);
    }
  }
  const int slot = place.position % kBlockSize;
  const float q_inverse = rope.q_quant == QQuant::kPerTensor ? Reciprocal(*rope.q_scale) : 0.0f;

  if (!owned) {
    StoreZeroQueries<Lane>(rope, q_inverse, token, first_step, min(end_step, q_steps));
    return;
  }
  if constexpr (kFewRegisters) WaitForAngles<Lane>(rotation.angles);
  if constexpr (kSharedNorm) norm.Store(rope);

  const auto work = [&](int step, uint32_t (&words)[Lane::kWords], float& next_scale) {
    const bool is_q = step < q_steps;
    const unsigned thread = keep(threadIdx.x);
    const int lane = thread % Lane::kLanes;
    const int group = thread % 32 / Lane::kLanes;
    const int q_head = step * kHeads + group;
    const int k_head = (step - q_steps) * kHeads + group;
    uint32_t rounded[Lane::kWords];
    float scale = next_scale;
    float x[Lane::kValues];
    UnpackWords<Lane>(words, x);
    if (early_bias) {
      float b[Lane::kValues];
      UnpackWords<Lane>(bias, b);
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) x[i] = Add(x[i], b[i]);
    }
    if constexpr (kFewRegisters && !Options::kBias) {
      // In front of the next load, which takes the registers of these words.
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) asm volatile("" : "+f"(x[i]));
    }
    load(step + kAhead, words, next_scale);
    if (!early_bias && HasBias<Options>(rope)) {
      const int last = q_heads + cache.num_kv_heads - 1;
      AddBias<Traits, Lane>(rope, is_q ? min(q_head, last) : min(q_heads + k_head, last), lane, x);
    }
    const auto normalise = [&](float (&values)[Lane::kValues]) {
      if constexpr (kSharedNorm) {
        Norm::Apply(rope, is_q, lane, values);
      } else {
        HeadNorm<Traits, Lane>(rope, is_q, lane)(values);
      }
    };
    if constexpr (Options::kAny) {
      TransformLane<Traits, Lane, true>(rope, rotation, lane, normalise, x);
    } else {
      if constexpr (Options::kNorm && kNormFirst) normalise(x);
      rotation.Apply(rope, lane, x);
      if constexpr (Options::kNorm && !kNormFirst) normalise(x);
    }
    PackWords<Traits::kIn>(x, rounded);
    if (is_q) {
      StoreQuery<Lane>(rounded, rope, q_inverse, keep(token), q_head, lane, q_head < q_heads);
    } else {
      const int here = keep(block), at = keep(slot);
      const bool store = here >= 0 && k_head < cache.num_kv_heads;
      const int head = store ? k_head : 0;
      if (kFewRegisters) {
        scale = HeadScale<Traits>(cache, cache.k_scales, cache.k_granularity, head);
      }
      StoreTokenMajor<Traits, Lane>(rounded, cache, cache.key, cache.k_scales, cache.k_granularity,
                                    scale, head, lane, cache.key_strides.Row(here, k_head, at),
                                    cache.k_scale_strides.Plane(here, k_head) + at, store);
    }
  };
  for (int step = first_step; step < end_step; step += kAhead) {
    work(step, words[0], scales[0]);
    if constexpr (kAhead == 2) {
      if (step + 1 < end_step) work(step + 1, words[1], scales[1]);
    }
  }
}

// StreamToken with the values, and a bias of their type, ahead in shared memory.
template <typename Traits, bool kNormFirst>
__device__ __forceinline__ void StreamTokenRing(const StepParams& p, const StreamGrid& grid,
                                                unsigned cta) {
  using Lane = StreamLane<Traits>;
  using Options = typename Traits::Options;
  constexpr int kHeads = Lane::kHeads;
  constexpr int kSteps = kRingSteps<Options>;
  const RopeWriteCacheParams& rope = p.rope;
  const PagedCache& cache = rope.cache;
  const int share = cta % grid.shares;
  const int token = cta / grid.shares * (kStreamThreads / 32) + threadIdx.x / 32;
  if (token >= rope.seqs.num_tokens) return;
  const int group = threadIdx.x % 32 / Lane::kLanes;
  const int lane = threadIdx.x % Lane::kLanes;
  const int q_heads = rope.num_heads;
  const int q_steps = (q_heads + kHeads - 1) / kHeads;
  const int k_steps = (cache.num_kv_heads + kHeads - 1) / kHeads;
  const int first_step = share * grid.steps_per_share;
  const int end_step = min(first_step + grid.steps_per_share, q_steps + k_steps);

  // K's heads follow Q's, and V's follow them: a step whose last heads are none of its own reads
  // the next ones, as far as there are any.
  const int lane_bytes = (group * Lane::kHeadDim + lane * Lane::kHalf) * 2;
  const char* source = static_cast<const char*>(p.q) + token * p.q_stride * 2 + lane_bytes;
  const char* bias_source = static_cast<const char*>(rope.bias) + lane_bytes;
  const bool early_bias = HasBias<Options>(rope) && rope.bias_dtype == Traits::kIn;
  const int all_heads = q_heads + 2 * cache.num_kv_heads - group;
  const int k_shift = q_heads - q_steps * kHeads;
  StreamRing<Traits> ring(SharedBytes<StreamBytes<Traits>()>());
  const auto load = [&](int step) {
    const int head = step * kHeads + (step < q_steps ? 0 : k_shift);
    if (step < end_step && head < all_heads) {
      const int64_t offset = static_cast<int64_t>(head) * (Lane::kHeadDim * 2);
      ring.template Copy<Lane::kDistance>(0, source + offset);
      if (early_bias) ring.template Copy<Lane::kDistance>(1, bias_source + offset);
    }
    ring.Commit();
  };
#pragma unroll
  for (int i = 0; i < kSteps; ++i) load(first_step + i);

  constexpr bool kSharedNorm = Options::kNorm;
  using Norm = SharedNorm<Lane, kStreamThreads / 32>;
  Norm norm;
  if constexpr (kSharedNorm) norm.Load(rope);
  const SeqWindow window = LoadWindow(rope.seqs, static_cast<int>(token * grid.seqs_per_token));
  const WarpPlace place = FindPlace(rope.seqs, window, GivenSeq(rope.seqs, token), token);
  const bool owned = place.batch_idx >= 0;
  LaneRotation<Traits, Lane, kStreamThreads / 32> rotation;
  int block = -1;
  if (owned) {
    rotation.Load(rope, place, lane);
    if (end_step > q_steps) {
      block = BlockOf(rope.seqs, cache.num_blocks, place.batch_idx, place.position / kBlockSize);
    }
  }
  const int slot = place.position % kBlockSize;
  const float q_inverse = rope.q_quant == QQuant::kPerTensor ? Reciprocal(*rope.q_scale) : 0.0f;

  if (!owned) {
    StoreZeroQueries<Lane>(rope, q_inverse, token, first_step, min(end_step, q_steps));
    return;
  }
  WaitForAngles<Lane>(rotation.angles);
  if constexpr (kSharedNorm) norm.Store(rope);

  for (int step = first_step; step < end_step; ++step) {
    const bool is_q = step < q_steps;
    const unsigned thread = KeepInLoop(threadIdx.x);
    const int lane = thread % Lane::kLanes;
    const int group = thread % 32 / Lane::kLanes;
    const int q_head = step * kHeads + group;
    const int k_head = (step - q_steps) * kHeads + group;
    uint32_t words[Lane::kWords];
    uint32_t rounded[Lane::kWords];
    float x[Lane::kValues];
    ring.Wait();
    ring.Read(0, words);
    UnpackWords<Lane>(words, x);
    if (early_bias) {
      float b[Lane::kValues];
      ring.Read(1, words);
      UnpackWords<Lane>(words, b);
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) x[i] = Add(x[i], b[i]);
    }
    // Read before the next copy writes there.
#pragma unroll
    for (int i = 0; i < Lane::kValues; ++i) asm volatile("" : "+f"(x[i]));
    load(step + kSteps);
    if (!early_bias && HasBias<Options>(rope)) {
      const int last = q_heads + cache.num_kv_heads - 1;
      AddBias<Traits, Lane>(rope, is_q ? min(q_head, last) : min(q_heads + k_head, last), lane, x);
    }
    if constexpr (kSharedNorm && kNormFirst) Norm::Apply(rope, is_q, lane, x);
    rotation.Apply(rope, lane, x);
    if constexpr (kSharedNorm && !kNormFirst) Norm::Apply(rope, is_q, lane, x);
    PackWords<Traits::kIn>(x, rounded);
    if (is_q) {
      StoreQuery<Lane>(rounded, rope, q_inverse, KeepInLoop(token), q_head, lane, q_head < q_heads);
    } else {
      const int here = KeepInLoop(block), at = KeepInLoop(slot);
      const bool store = here >= 0 && k_head < cache.num_kv_heads;
      const int head = store ? k_head : 0;
      const float scale = HeadScale<Traits>(cache, cache.k_scales, cache.k_granularity, head);
      StoreTokenMajor<Traits, Lane>(rounded, cache, cache.key, cache.k_scales, cache.k_granularity,
                                    scale, head, lane, cache.key_strides.Row(here, k_head, at),
                                    cache.k_scale_strides.Plane(here, k_head) + at, store);
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kStreamThreads, ROPE_CTAS)
    StepStreamKernel(const __grid_constant__ StepParams p,
                     const __grid_constant__ StreamGrid grid) {
  PdlWait();
  PdlLaunchDependents();
  if (blockIdx.x < grid.stream_ctas) {
    using Options = typename Traits::Options;
    if constexpr (kRingSteps<Options> > 0) {
      if (Options::kNorm && p.rope.norm_before_rope) {
        StreamTokenRing<Traits, true>(p, grid, blockIdx.x);
      } else {
        StreamTokenRing<Traits, false>(p, grid, blockIdx.x);
      }
    } else if (Options::kNorm && !Options::kAny && p.rope.norm_before_rope) {
      StreamToken<Traits, true>(p, grid, blockIdx.x);
    } else {
      StreamToken<Traits, false>(p, grid, blockIdx.x);
    }
  } else {
    const unsigned index = blockIdx.x - grid.stream_ctas;
    const int kv_heads = p.rope.cache.num_kv_heads;
    WriteTile<Traits, StreamBytes<Traits>()>(p, index % kv_heads, index / kv_heads,
                                             grid.seqs_per_tile, TileOutput::kValues);
  }
}

}  // namespace fastattn::cuda
