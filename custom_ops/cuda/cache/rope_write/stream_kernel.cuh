// Prompts of rope_write_cache_kv, two kinds of CTA in one launch: streaming CTAs give a token to
// each warp, which walks over its Q and K heads, a few at a time (LaneShape), one or two steps of
// loads ahead; cos, sin and the norms' weights are read once. V CTAs take one KV head of a tile, as
// in tile_kernel.cuh.
#pragma once

#include "cuda/cache/rope_write/tile_kernel.cuh"

namespace fastattn::cuda {

// Steps whose loads are in flight: as many as the registers of 24 warps leave room for.
template <typename Options>
inline constexpr int kStepsAhead = Options::kBias || Options::kNorm ? 1 : 2;

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

template <typename Traits>
__global__ void __launch_bounds__(kStreamThreads, 3)
    StepStreamKernel(const __grid_constant__ StepParams p,
                     const __grid_constant__ StreamGrid grid) {
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
    WriteTile<Traits>(p, index % kv_heads, index / kv_heads, grid.seqs_per_tile,
                      TileOutput::kValues);
  }
}

}  // namespace fastattn::cuda
