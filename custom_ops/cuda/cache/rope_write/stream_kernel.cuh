// Prompts of rope_write_cache_kv, two kinds of CTA in one launch: streaming CTAs give a token to
// each warp, which walks over its Q and K heads, a few at a time (LaneShape), with two steps of
// loads under way in a ring in shared memory; cos, sin and the norms' weights are read once. V CTAs
// take one KV head of a tile, as in tile_kernel.cuh.
#pragma once

#include <algorithm>

#include "cuda/cache/rope_write/tile_kernel.cuh"
#include "cuda/cache/shared/step_ring.cuh"
#include "cuda/common/prefetch.cuh"

namespace fastattn::cuda {

// CTAs an SM: 64 registers a thread. An option that may lie anywhere, or be any, takes more, and so
// do the tiles of large heads. Rotations of K have more to do at once with 80.
template <typename Traits>
inline constexpr int kStreamCtas = Traits::kHeadDim > 128                            ? 2
                                   : Traits::Options::kAny || Traits::kTransformsKey ? 3
                                                                                     : 4;

// A bias of the input's type comes with the values, as it lies in memory.
template <typename Options>
inline constexpr bool kBiasAhead = Options::kBias && !Options::kAny;

template <typename Traits>
using StreamRing = StepRing<StreamLane<Traits>, kBiasAhead<typename Traits::Options> ? 2 : 1>;

// Shared memory of a streaming or a V CTA.
template <typename Traits>
inline constexpr int kStreamBytes =
    std::max<int>(sizeof(ValueTile<Traits::Value::kCodeBytes>), StreamRing<Traits>::kBytes);

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

// One token's Q and K heads, or a share of them. kNormFirst: as norm_before_rope says (not read for
// kAny); a loop with both orders would spill.
template <typename Traits, bool kNormFirst>
__device__ __forceinline__ void StreamToken(const StepParamsOf<Traits>& p, const StreamGrid& grid,
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

  // K's heads follow Q's, and V's follow them: a step whose last heads are none of its own reads
  // the next ones, as far as there are any.
  const int lane_bytes = (group * Lane::kHeadDim + lane * Lane::kHalf) * 2;
  const char* source = static_cast<const char*>(p.q) + token * p.q_stride * 2 + lane_bytes;
  const bool bias_ahead =
      kBiasAhead<Options> && HasBias<Options>(rope) && rope.bias_dtype == Traits::kIn;
  const int all_heads = q_heads + 2 * cache.num_kv_heads - group;
  const int k_shift = q_heads - q_steps * kHeads;
  StreamRing<Traits> ring(SharedBytes<kStreamBytes<Traits>>());
  const auto load = [&](int step) {
    const int head = step * kHeads + (step < q_steps ? 0 : k_shift);
    if (step < end_step && head < all_heads) {
      const int64_t offset = static_cast<int64_t>(head) * (Lane::kHeadDim * 2);
      ring.template Copy<false>(0, source + offset);
      if (bias_ahead) {
        const unsigned thread = KeepInLoop(threadIdx.x);
        const unsigned own =
            (thread % 32 / Lane::kLanes * Lane::kHeadDim + thread % Lane::kLanes * Lane::kHalf) * 2;
        ring.template Copy<true>(1, static_cast<const char*>(rope.bias) + offset + own);
      }
    }
    ring.Commit();
  };
#pragma unroll
  for (int i = 0; i < kStepsAhead; ++i) load(first_step + i);

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
    ring.Drain();
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
    if (bias_ahead) {
      float b[Lane::kValues];
      ring.Read(1, words);
      UnpackWords<Lane>(words, b);
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) x[i] = Add(x[i], b[i]);
    }
    // Read before the next copy writes there.
#pragma unroll
    for (int i = 0; i < Lane::kValues; ++i) asm volatile("" : "+f"(x[i]));
    load(step + kStepsAhead);
    if (!bias_ahead && HasBias<Options>(rope)) {
      const int last = q_heads + cache.num_kv_heads - 1;
      AddBias<Traits, Lane>(rope, is_q ? min(q_head, last) : min(q_heads + k_head, last), lane, x);
    }
    if constexpr (Options::kAny) {
      TransformLane<Traits, Lane, true>(rope, rotation, lane,
                                        HeadNorm<Traits, Lane>(rope, is_q, lane), x);
    } else {
      if constexpr (kSharedNorm && kNormFirst) Norm::Apply(rope, is_q, lane, x);
      rotation.Apply(rope, lane, x);
      if constexpr (kSharedNorm && !kNormFirst) Norm::Apply(rope, is_q, lane, x);
    }
    PackWords<Traits::kIn>(x, rounded);
    if (is_q) {
      RotateQuery<Traits, Lane>(p, lane, rounded);
      StoreQuery<Lane>(rounded, rope, q_inverse, KeepInLoop(token), q_head, lane, q_head < q_heads);
    } else {
      const int here = KeepInLoop(block), at = KeepInLoop(slot);
      const bool store = here >= 0 && k_head < cache.num_kv_heads;
      const int head = store ? k_head : 0;
      const float scale = HeadScale<Traits>(cache, cache.k_scales, cache.k_granularity, head);
      StoreKey<Traits, Lane, kTakesFeedback<Traits>>(
          rounded, p, cache, scale, head, lane, cache.key_strides.Row(here, k_head, at),
          cache.k_scale_strides.Plane(here, k_head) + at * Traits::kTokenScales, store);
    }
  }
}

// Asks for a warp's first steps ahead of the wait for the kernel before.
template <typename Traits>
__device__ __forceinline__ void PrefetchSteps(const StepParams& p, const StreamGrid& grid) {
  constexpr int kHeadBytes = Traits::kHeadDim * 2;
  constexpr int kStepBytes = StreamLane<Traits>::kHeads * kHeadBytes;
  static_assert(kStepsAhead * kStepBytes <= 32 * 128, "a line a lane");
  const int token = blockIdx.x / grid.shares * (kStreamThreads / 32) + threadIdx.x / 32;
  const int line = threadIdx.x % 32 * 128;
  const int first = blockIdx.x % grid.shares * grid.steps_per_share * kStepBytes;
  const int heads = p.rope.num_heads + 2 * p.rope.cache.num_kv_heads;
  if (token >= p.rope.seqs.num_tokens || line >= kStepsAhead * kStepBytes) return;
  if (first + line >= heads * kHeadBytes) return;
  PrefetchL2(static_cast<const char*>(p.q) + token * p.q_stride * 2 + first + line);
}

template <typename Traits>
__global__ void __launch_bounds__(kStreamThreads, kStreamCtas<Traits>)
    StepStreamKernel(const __grid_constant__ StepParamsOf<Traits> p,
                     const __grid_constant__ StreamGrid grid) {
  if constexpr (Traits::kTransformsKey) {
    if (blockIdx.x < grid.stream_ctas) PrefetchSteps<Traits>(p, grid);
  }
  PdlWait();
  PdlLaunchDependents();
  if (blockIdx.x < grid.stream_ctas) {
    using Options = typename Traits::Options;
    if (Options::kNorm && !Options::kAny && p.rope.norm_before_rope) {
      StreamToken<Traits, true>(p, grid, blockIdx.x);
    } else {
      StreamToken<Traits, false>(p, grid, blockIdx.x);
    }
  } else {
    const unsigned index = blockIdx.x - grid.stream_ctas;
    const int kv_heads = p.rope.cache.num_kv_heads;
    WriteTile<typename Traits::Value, kStreamBytes<Traits>>(
        p, index % kv_heads, index / kv_heads, grid.seqs_per_tile, TileOutput::kValues);
  }
}

}  // namespace fastattn::cuda
