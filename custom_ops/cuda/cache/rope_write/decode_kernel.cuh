// Decode and speculative steps: a warp, alone in its CTA, takes two (D 64: four) heads of one
// token, all Q, all K or all V, and runs only their code. Two rounds of loads: the sequences, the
// values, the bias, the norm's weights and the scales; then the block and the angles.
#pragma once

#include "common/layout.h"
#include "cuda/cache/rope_write/launch.h"
#include "cuda/cache/shared/head_transform.cuh"
#include "cuda/cache/shared/seq_window.cuh"
#include "cuda/cache/shared/stream_grid.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda {

// Brings a kernel's parameters into the constant cache while it has to wait anyway.
template <typename Params>
__device__ __forceinline__ void TouchParameters(const Params& p) {
#if __CUDA_ARCH__ >= 900
  int bits = 0;
#pragma unroll
  for (unsigned i = 0; i < sizeof(p); i += 64) {
    bits ^= *reinterpret_cast<const int*>(reinterpret_cast<const char*>(&p) + i);
  }
  if (bits == 0x5bd1e995) __nanosleep(1);  // harmless, but keeps the loads
#endif
}

inline constexpr int kDecodeThreads = 32;
inline constexpr int kValueShares = 4;

template <typename Traits>
using DecodeLane = LaneShape<Traits::kIn, Traits::kHeadDim, 4>;

// V's codes are single bytes, a channel's row of 64 bytes apart. Neighbouring lanes take
// neighbouring channels, so that a store of the warp touches half as many 128-byte lines.
template <typename Lane>
struct StridedMap {
  static __device__ __forceinline__ int Channel(int lane, int i) { return lane + i * Lane::kLanes; }
};

// Which heads a warp works on, and what does not depend on the token's sequence.
struct DecodeHead {
  int token;
  int lane;  // of the head
  int head;
  bool active;  // false: past the last head
  int share;    // of `shares` warps that share the stores of V
  int shares;   // a power of 2
};

template <typename Traits>
__device__ __forceinline__ DecodeHead HeadOfLane(int group, int num_heads) {
  using Lane = DecodeLane<Traits>;
  DecodeHead at;
  at.token = blockIdx.y;
  at.lane = threadIdx.x % Lane::kLanes;
  const int head = group * Lane::kHeads + threadIdx.x % 32 / Lane::kLanes;
  at.active = head < num_heads;
  at.head = at.active ? head : 0;
  at.share = 0, at.shares = 1;
  return at;
}

// Block of a token's place, -1 where there is none, as the table has it: nothing waits for it here.
__device__ __forceinline__ int LoadBlock(const StepParams& p, const WarpPlace& place) {
  const SeqMeta& seqs = p.rope.seqs;
  const uint32_t index = place.position / kBlockSize;
  if (place.batch_idx < 0 || index >= static_cast<uint32_t>(seqs.max_blocks)) return -1;
  return seqs.block_tables[static_cast<int64_t>(place.batch_idx) * seqs.max_blocks + index];
}

// The block if the cache has it, else -1. The compiler would look at it where it is loaded.
__device__ __forceinline__ int ValidBlock(const StepParams& p, int block) {
  block = KeepInLoop(block);
  return block < p.rope.cache.num_blocks ? block : -1;
}

enum class HeadKind { kQuery, kKey, kValue };

// Index of a head among [Q heads, K heads, V heads].
template <HeadKind kKind>
__device__ __forceinline__ int FusedHead(const RopeWriteCacheParams& p, int head) {
  if constexpr (kKind == HeadKind::kQuery) return head;
  const int before = kKind == HeadKind::kValue ? p.cache.num_kv_heads : 0;
  return head + before + p.num_heads;
}

// A lane's values of a head and what is to happen to them. All that does not depend on the token's
// sequence is asked for at once.
template <typename Traits, typename Lane, HeadKind kKind>
struct DecodeValues {
  using Options = typename Traits::Options;
  static constexpr bool kNorm = Options::kNorm && kKind != HeadKind::kValue;

  uint32_t words[Lane::kWords];
  RawParameters<Traits, Lane> bias;     // where there is one
  RawParameters<Traits, Lane> weights;  // of the norm, where there is one
  LaneRotation<Traits, Lane, kDecodeThreads / 32> rotation;

  __device__ __forceinline__ DecodeValues(const RopeWriteCacheParams& p, const void* source,
                                          int64_t stride, const DecodeHead& at) {
    using Element = typename fastattn::Element<Traits::kIn>::Storage;
    LoadHalves<Lane::kWords, Lane::kDistance>(static_cast<const Element*>(source) +
                                                  at.token * stride + at.head * Lane::kHeadDim +
                                                  at.lane * Lane::kHalf,
                                              words);
    if (HasBias<Options>(p)) {
      const int first = FusedHead<kKind>(p, at.head) * Lane::kHeadDim;
      bias.Load(p.bias, p.bias_dtype, first, at.lane);
    }
    if constexpr (kNorm) {
      const HeadNorm<Traits, Lane> norm(p, kKind == HeadKind::kQuery, at.lane);
      if (norm.weight != nullptr) weights.Load(norm.weight, norm.dtype, 0, at.lane);
    }
  }

  // Asks for the angles of a token that has a place. Every lane of the warp takes part.
  __device__ __forceinline__ void LoadAngles(const RopeWriteCacheParams& p, uint32_t position,
                                             int lane) {
    if constexpr (kKind != HeadKind::kValue) rotation.Load(p, position, lane);
  }

  // To the head as it is stored. Every lane of the warp takes part.
  __device__ __forceinline__ void Transform(const RopeWriteCacheParams& p, int lane) {
    if constexpr (kKind != HeadKind::kValue || Options::kBias) {
      float x[Lane::kValues];
      UnpackWords<Lane>(words, x);
      if (HasBias<Options>(p)) {
        float b[Lane::kValues];
        bias.Unpack(p.bias_dtype, b);
#pragma unroll
        for (int i = 0; i < Lane::kValues; ++i) x[i] = Add(x[i], b[i]);
      }
      const auto norm = [&](float (&values)[Lane::kValues]) {
        const HeadNorm<Traits, Lane> head(p, kKind == HeadKind::kQuery, lane);
        if (head.weight == nullptr) return;
        float all[Lane::kValues];
        weights.Unpack(head.dtype, all);
        const auto weight = [&](int half, float (&w)[Lane::kHalf]) {
#pragma unroll
          for (int i = 0; i < Lane::kHalf; ++i) w[i] = all[half * Lane::kHalf + i];
        };
        NormLane<Lane>(p.rms_norm_eps, weight, values);
      };
      if constexpr (kKind != HeadKind::kValue) {
        TransformLane<Traits, Lane, false>(p, rotation, lane, norm, x);
      }
      PackWords<Traits::kIn>(x, words);
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void DecodeQuery(const StepParams& p, const SeqWindow& window, int given,
                                            const DecodeHead& at) {
  using Lane = DecodeLane<Traits>;
  const RopeWriteCacheParams& rope = p.rope;
  DecodeValues<Traits, Lane, HeadKind::kQuery> values(rope, p.q, p.q_stride, at);
  const float scale = rope.q_quant == QQuant::kPerTensor ? *rope.q_scale : 1.0f;
  const WarpPlace place = FindPlace(rope.seqs, window, given, at.token);
  if (place.batch_idx >= 0) {
    values.LoadAngles(rope, place.position, at.lane);
    values.Transform(rope, at.lane);
  } else {
#pragma unroll
    for (int i = 0; i < Lane::kWords; ++i) values.words[i] = 0;
  }
  StoreQuery<Lane>(values.words, rope, Reciprocal(scale), at.token, at.head, at.lane, at.active);
}

// K, and V of type none.
template <typename Traits, HeadKind kKind>
__device__ __forceinline__ void DecodeTokenMajor(const StepParams& p, const SeqWindow& window,
                                                 int given, const DecodeHead& at) {
  using Lane = DecodeLane<Traits>;
  constexpr bool kKey = kKind == HeadKind::kKey;
  const PagedCache& cache = p.rope.cache;
  DecodeValues<Traits, Lane, kKind> values(p.rope, kKey ? p.k : p.v, kKey ? p.k_stride : p.v_stride,
                                           at);
  const float scale = HeadScale<Traits>(cache, cache.k_scales, cache.k_granularity, at.head);
  const WarpPlace place = FindPlace(p.rope.seqs, window, given, at.token);
  const int loaded_block = LoadBlock(p, place);
  if constexpr (Traits::kRope) {
    if (place.batch_idx >= 0) {
      values.LoadAngles(p.rope, place.position, at.lane);
      values.Transform(p.rope, at.lane);
    }
  }
  const int block = ValidBlock(p, loaded_block);
  const int slot = place.position % kBlockSize;
  const CacheStrides& strides = kKey ? cache.key_strides : cache.value_strides;
  StoreTokenMajor<Traits, Lane>(
      values.words, cache, kKey ? cache.key : cache.value, cache.k_scales, cache.k_granularity,
      scale, at.head, at.lane, strides.Row(block, at.head, slot),
      cache.k_scale_strides.Plane(block, at.head) + slot, at.active && block >= 0);
}

template <typename Traits>
__device__ __forceinline__ void DecodeValue(const StepParams& p, const SeqWindow& window, int given,
                                            const DecodeHead& at) {
  using Lane = DecodeLane<Traits>;
  using Map = StridedMap<Lane>;
  const PagedCache& cache = p.rope.cache;
  using Options = typename Traits::Options;
  using Element = typename fastattn::Element<Traits::kIn>::Storage;
  const Element* source =
      static_cast<const Element*>(p.v) + at.token * p.v_stride + at.head * Lane::kHeadDim;
  Element loaded[Lane::kValues];
#pragma unroll
  for (int i = 0; i < Lane::kValues; ++i) loaded[i] = source[Map::Channel(at.lane, i)];
  RawParameters<Traits, Lane> bias;
  if (HasBias<Options>(p.rope)) {
    const int first = FusedHead<HeadKind::kValue>(p.rope, at.head) * Lane::kHeadDim;
    bias.template LoadEach<Map>(p.rope.bias, p.rope.bias_dtype, first, at.lane);
  }
  const float scale = HeadScale<Traits>(cache, cache.v_scales, cache.v_granularity, at.head);
  const WarpPlace place = FindPlace(p.rope.seqs, window, given, at.token);
  const int loaded_block = LoadBlock(p, place);
  uint32_t words[Lane::kWords];
#pragma unroll
  for (int i = 0; i < Lane::kWords; ++i) {
    if constexpr (Traits::kIn == DType::kFloat32) {
      words[i] = FloatBits(loaded[i]);
    } else {
      words[i] = loaded[2 * i] | static_cast<uint32_t>(loaded[2 * i + 1]) << 16;
    }
  }
  if constexpr (Options::kBias) {
    if (HasBias<Options>(p.rope)) {
      float x[Lane::kValues];
      float b[Lane::kValues];
      UnpackWords<Lane>(words, x);
      bias.Unpack(p.rope.bias_dtype, b);
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) x[i] = Add(x[i], b[i]);
      PackWords<Traits::kIn>(x, words);
    }
  }
  int block = loaded_block;
  if constexpr (IsDynamic(Traits::kType)) block = ValidBlock(p, block);  // scales are stored, too
  const int slot = place.position % kBlockSize;
  uint32_t codes[Lane::kCodeWords];
  QuantizeLane<Traits, Lane, Map>(words, cache, cache.v_scales, cache.v_granularity, scale, at.head,
                                  at.lane, cache.v_scale_strides.Plane(block, at.head) + slot,
                                  at.active && block >= 0 && at.share == 0, codes);
  block = ValidBlock(p, block);
  if (!at.active || block < 0) return;
  const CacheStrides& strides = cache.value_strides;
  uint8_t* out =
      static_cast<uint8_t*>(cache.value) + strides.Row(block, at.head, at.lane) + TokenSlot(slot);
  const int64_t step = Lane::kLanes * strides.row;  // to a lane's next channel
#pragma unroll
  for (int i = 0; i < Lane::kValues; ++i, out += step) {
    if ((i & (at.shares - 1)) == at.share) {
      *out = static_cast<uint8_t>(codes[i / 4] >> (8 * (i % 4)));
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kDecodeThreads)
    StepDecodeKernel(const __grid_constant__ StepParams p, float seqs_per_token, bool small_grid) {
  using Lane = DecodeLane<Traits>;
  const SeqMeta& seqs = p.rope.seqs;
  const int q_heads = Traits::kRope ? p.rope.num_heads : 0;
  const int kv_heads = p.rope.cache.num_kv_heads;
  const int q_groups = (q_heads + Lane::kHeads - 1) / Lane::kHeads;
  const int kv_groups = (kv_heads + Lane::kHeads - 1) / Lane::kHeads;
  // A small step has warps to spare: the scattered stores of V are what takes longest.
  const int value_shares = Traits::kQuantized && small_grid ? kValueShares : 1;
  const int value_groups = kv_groups * value_shares;
  const int group = blockIdx.x;
  const int token = blockIdx.y;
  TouchParameters(p);
  PdlWait();
  // The next kernel's CTAs would gather where this one's finish first, unless there is room.
  if (small_grid) PdlLaunchDependents();
  const SeqWindow window = LoadWindow(seqs, static_cast<int>(token * seqs_per_token));
  const int given = GivenSeq(seqs, token);
  if (group < value_groups) {
    DecodeHead at = HeadOfLane<Traits>(group >> (value_shares == kValueShares ? 2 : 0), kv_heads);
    at.share = group & (value_shares - 1);
    at.shares = value_shares;
    if constexpr (Traits::kQuantized) {
      DecodeValue<Traits>(p, window, given, at);
    } else {
      DecodeTokenMajor<Traits, HeadKind::kValue>(p, window, given, at);
    }
  } else if (group < value_groups + kv_groups) {
    DecodeTokenMajor<Traits, HeadKind::kKey>(p, window, given,
                                             HeadOfLane<Traits>(group - value_groups, kv_heads));
  } else if constexpr (Traits::kRope) {
    DecodeQuery<Traits>(p, window, given,
                        HeadOfLane<Traits>(group - value_groups - kv_groups, q_heads));
  }
  if (group == gridDim.x - 1 && token == 0) {
    for (int i = 4 * threadIdx.x; i < p.rope.num_arrivals; i += 4 * kDecodeThreads) {
      *reinterpret_cast<int4*>(p.rope.arrivals + i) = make_int4(0, 0, 0, 0);
    }
  }
}

}  // namespace fastattn::cuda
