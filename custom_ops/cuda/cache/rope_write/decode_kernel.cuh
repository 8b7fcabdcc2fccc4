// Decode and speculative steps: a warp takes two (D 64: four) heads of one token, all Q, all K or
// all V, and runs only their code. It is alone in its CTA, or beside those of the next tokens where
// sequences have several. Two rounds of loads: the sequences, the values, the bias, the norm's
// weights and the scales; then the block and the angles. What they need is computed before the
// kernel waits for its predecessor. The first round is free of branches: loads whose results are
// used behind one are all waited for together.
#pragma once

#include <type_traits>

#include "common/block_table.h"
#include "common/layout.h"
#include "common/static_scales.h"
#include "cuda/cache/rope_write/launch.h"
#include "cuda/cache/rope_write/token_columns.cuh"
#include "cuda/cache/shared/group_scales.cuh"
#include "cuda/cache/shared/head_transform.cuh"
#include "cuda/cache/shared/key_transform.cuh"
#include "cuda/cache/shared/quantize_lane.cuh"
#include "cuda/cache/shared/seq_window.cuh"
#include "cuda/cache/shared/store_token.cuh"
#include "cuda/cache/shared/stream_grid.cuh"
#include "cuda/common/parameters.cuh"
#include "cuda/common/pdl.cuh"
#include "plan/rope_write.h"

namespace fastattn::cuda {

inline constexpr int kDecodeThreads = 32;
inline constexpr int kValueShares = 4;

// Whether there are CTAs of several tokens, for steps with several of a sequence.
template <typename Traits>
inline constexpr bool kTakesTogether = Traits::kQuantized && !Traits::Options::kAny;

template <typename Traits>
using DecodeLane = LaneShape<Traits::kIn, Traits::kHeadDim, 4>;

// V's codes are single bytes, a channel's row of 64 bytes apart. Neighbouring lanes take
// neighbouring channels, so that a store of the warp touches half as many 128-byte lines.
template <typename Lane>
struct StridedMap {
  static __device__ __forceinline__ int Channel(int lane, int i) { return lane + i * Lane::kLanes; }
};

// The same for bytes that are two channels.
template <typename Lane>
struct StridedPairMap {
  static __device__ __forceinline__ int Channel(int lane, int i) {
    return 2 * (lane + i / 2 * Lane::kLanes) + i % 2;
  }
};

// Which heads a warp works on, and what does not depend on the token's sequence.
struct DecodeHead {
  int token;
  int lane;        // of the head
  int first_head;  // of the warp
  int head;
  bool active;  // false: past the last head
  int share;    // of `shares` warps that share the stores of V
  int shares;   // a power of 2
};

template <typename Traits>
__device__ __forceinline__ DecodeHead HeadOfLane(int token, int group, int num_heads) {
  using Lane = DecodeLane<Traits>;
  DecodeHead at;
  at.token = token;
  at.lane = threadIdx.x % Lane::kLanes;
  at.first_head = group * Lane::kHeads;
  const int head = at.first_head + threadIdx.x % 32 / Lane::kLanes;
  at.active = head < num_heads;
  at.head = at.active ? head : 0;
  at.share = 0, at.shares = 1;
  return at;
}

// Where a warp finds its token's sequence and block.
struct DecodeSeq {
  SeqMeta seqs;
  int token;
  int guess;

  __device__ __forceinline__ DecodeSeq(const SeqMeta& seqs, int token, float seqs_per_token)
      : seqs(seqs), token(token), guess(static_cast<int>(token * seqs_per_token)) {}

  __device__ __forceinline__ void Compute(bool block, EarlyValues& early) {
    early(guess);
    early.Hold(seqs.batch), early.Hold(seqs.batch_id_per_token);
    early.Hold(seqs.cu_seqlens_q), early.Hold(seqs.seq_lens_this_time);
    early.Hold(seqs.seq_lens_decoder);
    if (block) early.Hold(seqs.block_tables), early.Hold(seqs.max_blocks);
  }

  // The token's place. `load` asks for what does not depend on it, together with the sequences. All
  // lanes of the warp take part.
  template <typename Load>
  __device__ __forceinline__ WarpPlace Find(Load&& load) const {
    const SeqWindow window = LoadWindow(seqs, guess);
    const int given = GivenSeq(seqs, token);
    load();
    return FindPlace(seqs, window, given, token);
  }
};

// Block of a token's place, -1 where there is none, as the table has it: nothing waits for it here.
// kHeadTables: by the table of the lane's head, of `num_heads`.
template <bool kHeadTables>
__device__ __forceinline__ int LoadBlock(const SeqMeta& seqs, const WarpPlace& place, int head,
                                         int num_heads) {
  const uint32_t index = place.position / kBlockSize;
  if (place.batch_idx < 0 || index >= static_cast<uint32_t>(seqs.max_blocks)) return -1;
  if constexpr (kHeadTables) {
    const int64_t table = seqs.TableOf(place.batch_idx, head, num_heads);
    return *BlockEntry(seqs.block_tables, seqs.max_blocks, table, index);
  }
  return *BlockEntry(seqs.block_tables, seqs.max_blocks, place.batch_idx, index);
}

// The block if the cache has it, else -1. The compiler would look at it where it is loaded.
__device__ __forceinline__ int ValidBlock(const StepParams& p, int block) {
  return BlockOrNegative(KeepInLoop(block), p.rope.cache.num_blocks);
}

// One scale as it lies in memory: an fp32 or a bf16 value, or none (1).
class DecodeScale {
 public:
  // Of a static type's head or tensor. Scales of channels are not read here.
  template <typename Traits>
  static __device__ __forceinline__ DecodeScale OfHead(const PagedCache& cache, const void* scales,
                                                       ScaleScheme granularity, int head) {
    DecodeScale scale;
    if constexpr (Traits::kQuantized && !Traits::Side::kDynamic) {
      scale.given_ = granularity != ScaleScheme::kChannel;
      scale.half_ = cache.scale_dtype == DType::kBFloat16;
      scale.from_ = static_cast<const char*>(scales) +
                    HeadScaleIndex(granularity, head) * (scale.half_ ? 2 : 4);
    }
    return scale;
  }

  static __device__ __forceinline__ DecodeScale OfQuery(const RopeWriteCacheParams& p) {
    DecodeScale scale;
    scale.given_ = p.q_quant == QQuant::kPerTensor;
    scale.from_ = p.q_scale;
    return scale;
  }

  __device__ __forceinline__ void Compute(EarlyValues& early) {
    early(from_), early.Hold(given_), early.Hold(half_);
  }

  __device__ __forceinline__ void Load() {
    asm volatile(
        "{\n"
        ".reg .pred word, half;\n"
        "setp.eq.s32 word, %3, 1;\n"
        "setp.eq.s32 half, %3, 2;\n"
        "@word ld.global.b32 %0, [%2];\n"
        "@half ld.global.u16 %1, [%2];\n"
        "}\n"
        : "=r"(word_bits_), "=r"(half_bits_)
        : "l"(from_), "r"(given_ ? (half_ ? 2 : 1) : 0));
  }

  __device__ __forceinline__ float Value() const {
    return given_ ? BitsFloat(half_ ? half_bits_ << 16 : word_bits_) : 1.0f;
  }

 private:
  const void* from_ = nullptr;
  bool given_ = false;
  bool half_ = false;
  uint32_t word_bits_, half_bits_;
};

enum class HeadKind { kQuery, kKey, kValue };

// Index of a head among [Q heads, K heads, V heads].
template <HeadKind kKind>
__device__ __forceinline__ int FusedHead(const RopeWriteCacheParams& p, int head) {
  if constexpr (kKind == HeadKind::kQuery) return head;
  const int before = kKind == HeadKind::kValue ? p.cache.num_kv_heads : 0;
  return head + before + p.num_heads;
}

// One head's part of a parameter.
struct HeadParameter {
  const void* data;
  DType dtype;

  __device__ __forceinline__ HeadParameter(const void* parameter, DType dtype, int first)
      : data(static_cast<const char*>(parameter) +
             static_cast<int64_t>(first) * (dtype == DType::kFloat32 ? 4 : 2)),
        dtype(dtype) {}

  __device__ __forceinline__ void Compute(EarlyValues& early) const {
    early(data), early(static_cast<int>(dtype));
  }
};

// A lane's values of a head and what is to happen to them. All that does not depend on the token's
// sequence is asked for at once.
template <typename Traits, typename Lane, HeadKind kKind>
struct DecodeValues {
  using Options = typename Traits::Options;
  using Element = typename fastattn::Element<Traits::kIn>::Storage;
  static constexpr bool kRotated = kKind != HeadKind::kValue;
  static constexpr bool kNorm = Options::kNorm && kRotated;

  const Element* source;
  HeadParameter bias_at;
  HeadParameter weights_at;
  bool norm_given;

  uint32_t words[Lane::kWords];
  RawParameters<Traits, Lane> bias;     // where there is one
  RawParameters<Traits, Lane> weights;  // of the norm, where there is one
  LaneRotation<Traits, Lane, kDecodeThreads / 32> rotation;

  // Where there are no weights or no bias, the head itself is read as if it were some.
  __device__ __forceinline__ DecodeValues(const RopeWriteCacheParams& p, const void* rows,
                                          int64_t stride, const DecodeHead& at)
      : source(static_cast<const Element*>(rows) + at.token * stride + at.head * Lane::kHeadDim),
        bias_at(p.bias, p.bias_dtype, FusedHead<kKind>(p, at.head) * Lane::kHeadDim),
        weights_at(kKind == HeadKind::kQuery ? p.q_norm_weight : p.k_norm_weight,
                   kKind == HeadKind::kQuery ? p.q_norm_dtype : p.k_norm_dtype, 0),
        norm_given(weights_at.data != nullptr) {
    if constexpr (kNorm) {
      if (!norm_given) weights_at = HeadParameter(source, DType::kBFloat16, 0);
    }
    if constexpr (Options::kBias && Options::kAsked) {
      if (!HasBias<Options>(p)) bias_at = HeadParameter(source, DType::kBFloat16, 0);
    }
  }

  __device__ __forceinline__ void Compute(RopeWriteCacheParams& p, EarlyValues& early) const {
    early(source);
    if constexpr (Options::kBias) bias_at.Compute(early);
    if constexpr (kNorm) weights_at.Compute(early), early.Hold(p.norm_before_rope);
    if constexpr (kRotated) {
      early.Hold(p.style), early.Hold(p.cos), early.Hold(p.sin);
      early.Hold(p.rotary_stride), early.Hold(p.last_position);
      early.Hold(p.rotary_seq_stride);
    }
  }

  __device__ __forceinline__ void Load(const RopeWriteCacheParams& p, int lane) {
    if (Lane::IsActive(lane)) {
      LoadHalves<Lane::kWords, Lane::kDistance>(source + lane * Lane::kHalf, words);
    } else {
#pragma unroll
      for (int i = 0; i < Lane::kWords; ++i) words[i] = 0;
    }
    if constexpr (Options::kBias) bias.Load(bias_at.data, bias_at.dtype, 0, lane);
    if constexpr (kNorm) weights.Load(weights_at.data, weights_at.dtype, 0, lane);
  }

  // Makes a position wait for what Load asked for. What is asked for by this position is then not
  // waited for where the values are first used.
  __device__ __forceinline__ void MakeWait(const EarlyValues& early, uint32_t& position) const {
    position |= words[0] & early.Zero();
  }

  // Asks for the angles of a token that has a place. Every lane of the warp takes part.
  __device__ __forceinline__ void LoadAngles(const RopeWriteCacheParams& p, const WarpPlace& place,
                                             int lane) {
    if constexpr (kRotated) rotation.Load(p, place, lane);
  }

  // To the head as it is stored. Every lane of the warp takes part. What needs no angle stands in
  // front, where the angles are still on their way.
  __device__ __forceinline__ void Transform(const RopeWriteCacheParams& p, int lane) {
    if constexpr (kRotated || Options::kBias) {
      float x[Lane::kValues];
      UnpackWords<Lane>(words, x);
      if (HasBias<Options>(p)) {
        float b[Lane::kValues];
        bias.Unpack(bias_at.dtype, b);
#pragma unroll
        for (int i = 0; i < Lane::kValues; ++i) x[i] = Add(x[i], b[i]);
      }
      float all[Lane::kValues];
      if constexpr (kNorm) {
        weights.Unpack(weights_at.dtype, all);
#pragma unroll
        for (int i = 0; i < Lane::kValues; ++i) asm volatile("" : "+f"(all[i]));
      }
      const auto norm = [&](float (&values)[Lane::kValues]) {
        if (!norm_given) return;
        const auto weight = [&](int half, float (&w)[Lane::kHalf]) {
#pragma unroll
          for (int i = 0; i < Lane::kHalf; ++i) w[i] = all[half * Lane::kHalf + i];
        };
        NormLane<Lane>(p.rms_norm_eps, weight, values);
      };
      if constexpr (kRotated) {
        TransformLane<Traits, Lane, false>(p, rotation, lane, norm, x);
      }
      PackWords<Traits::kIn>(x, words);
    }
  }
};

__device__ __forceinline__ float KeepFloat(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// The wait for the kernel before. The next kernel's CTAs would gather where this one's finish
// first, unless there is room.
template <bool kTogether>
__device__ __forceinline__ void BeginDecode() {
  PdlWait();
  constexpr int kBound = kTogether ? kReleasingGridTogether : kReleasingGrid;
  if (gridDim.x * gridDim.y <= kBound) PdlLaunchDependents();
}

template <typename Traits, bool kTogether>
__device__ __forceinline__ void DecodeQuery(const StepParamsOf<Traits>& p, DecodeSeq& seq,
                                            const DecodeHead& at) {
  using Lane = DecodeLane<Traits>;
  RopeWriteCacheParams rope = p.rope;
  EarlyValues early;
  DecodeValues<Traits, Lane, HeadKind::kQuery> values(rope, p.q, p.q_stride, at);
  DecodeScale scale = DecodeScale::OfQuery(rope);
  early.Touch(p), seq.Compute(false, early), values.Compute(rope, early);
  scale.Compute(early), early.Hold(rope.q_quant);
  early.Finish();
  BeginDecode<kTogether>();
  WarpPlace place = seq.Find([&] { values.Load(rope, at.lane), scale.Load(); });
  values.MakeWait(early, place.position);
  float inverse;
  if (place.batch_idx >= 0) {
    values.LoadAngles(rope, place, at.lane);
    inverse = KeepFloat(Reciprocal(scale.Value()));
    values.Transform(rope, at.lane);
    RotateQuery<Traits, Lane>(p, at.lane, values.words);
  } else {
    inverse = Reciprocal(scale.Value());
#pragma unroll
    for (int i = 0; i < Lane::kWords; ++i) values.words[i] = 0;
  }
  StoreQuery<Lane>(values.words, rope, inverse, at.token, at.head, at.lane, at.active);
}

// K, and V of type none.
template <typename Traits, HeadKind kKind, bool kTogether, bool kFeedsBack, bool kHeadTables>
__device__ __forceinline__ void DecodeTokenMajor(const StepParamsOf<Traits>& p, DecodeSeq& seq,
                                                 const DecodeHead& at) {
  using Lane = DecodeLane<Traits>;
  constexpr bool kKey = kKind == HeadKind::kKey;
  const PagedCache& cache = p.rope.cache;
  RopeWriteCacheParams rope = p.rope;
  EarlyValues early;
  DecodeValues<Traits, Lane, kKind> values(p.rope, kKey ? p.k : p.v, kKey ? p.k_stride : p.v_stride,
                                           at);
  DecodeScale scale =
      DecodeScale::OfHead<Traits>(cache, cache.k_scales, cache.k_granularity, at.head);
  early.Touch(p), seq.Compute(true, early), values.Compute(rope, early), scale.Compute(early);
  early.Finish();
  BeginDecode<kTogether>();
  WarpPlace place = seq.Find([&] { values.Load(rope, at.lane), scale.Load(); });
  if constexpr (Traits::kRope) values.MakeWait(early, place.position);
  const int loaded_block = LoadBlock<kHeadTables>(seq.seqs, place, at.head, cache.num_kv_heads);
  Inverse inverse = {1.0f};
  if constexpr (Traits::kRope) {
    if (place.batch_idx >= 0) {
      values.LoadAngles(rope, place, at.lane);
      inverse.value = KeepFloat(Reciprocal(scale.Value()));
      values.Transform(rope, at.lane);
    }
  } else {
    inverse.value = Reciprocal(scale.Value());
  }
  const int block = ValidBlock(p, loaded_block);
  const int slot = place.position % kBlockSize;
  const CacheStrides& strides = kKey ? cache.key_strides : cache.value_strides;
  if constexpr (kKey && Traits::kTransformsKey) {
    StoreKey<Traits, Lane, kFeedsBack>(
        values.words, p, cache, inverse, at.head, at.lane, strides.Row(block, at.head, slot),
        cache.k_scale_strides.Plane(block, at.head) + slot * Traits::kTokenScales,
        at.active && block >= 0);
  } else {
    StoreTokenMajor<Traits, Lane>(
        values.words, cache, kKey ? cache.key : cache.value, cache.k_scales, cache.k_granularity,
        inverse, at.head, at.lane, strides.Row(block, at.head, slot),
        cache.k_scale_strides.Plane(block, at.head) + slot * Traits::kTokenScales,
        at.active && block >= 0);
  }
}

// kTogether: all warps of the CTA take part.
template <typename Traits, bool kTogether, bool kHeadTables>
__device__ __forceinline__ void DecodeValue(const StepParams& p, DecodeSeq& seq,
                                            const DecodeHead& at) {
  using Lane = DecodeLane<Traits>;
  using Map = std::conditional_t<Traits::kNibbles, StridedPairMap<Lane>, StridedMap<Lane>>;
  const PagedCache& cache = p.rope.cache;
  using Options = typename Traits::Options;
  using Element = typename fastattn::Element<Traits::kIn>::Storage;
  EarlyValues early;
  const Element* source =
      static_cast<const Element*>(p.v) + at.token * p.v_stride + at.head * Lane::kHeadDim;
  const HeadParameter bias_at(p.rope.bias, p.rope.bias_dtype,
                              FusedHead<HeadKind::kValue>(p.rope, at.head) * Lane::kHeadDim);
  DecodeScale scale =
      DecodeScale::OfHead<Traits>(cache, cache.v_scales, cache.v_granularity, at.head);
  early.Touch(p), seq.Compute(true, early), early(source), scale.Compute(early);
  if constexpr (Options::kBias) bias_at.Compute(early);
  early.Finish();
  BeginDecode<kTogether>();
  Element loaded[Lane::kValues];
  RawParameters<Traits, Lane> bias;
  const WarpPlace place = seq.Find([&] {
#pragma unroll
    for (int i = 0; i < Lane::kValues; ++i) {
      const int channel = Map::Channel(at.lane, i);
      const bool there = Lane::kActive == Lane::kLanes || channel < Lane::kHeadDim;
      loaded[i] = there ? source[channel] : Element{};
    }
    if (HasBias<Options>(p.rope)) {
      bias.template LoadEach<Map>(bias_at.data, bias_at.dtype, 0, at.lane);
    }
    scale.Load();
  });
  const int loaded_block = LoadBlock<kHeadTables>(seq.seqs, place, at.head, cache.num_kv_heads);
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
  const Inverse inverse = {Reciprocal(scale.Value())};
  int block = loaded_block;
  if constexpr (Traits::Side::kDynamic) block = ValidBlock(p, block);  // scales are stored, too
  const int slot = place.position % kBlockSize;
  constexpr int kStores = Lane::kValues / CodesPerByte(Traits::kCode);
  uint32_t codes[kStores / 4];
  const int64_t scale_index =
      cache.v_scale_strides.Plane(block, at.head) + slot * Traits::kTokenScales;
  const bool stores_scale = at.active && block >= 0 && at.share == 0;
  if constexpr (Traits::kNibbles) {
    QuantizeFourBits<Traits, Lane, true>(words, cache, cache.v_scales, at.lane, scale_index,
                                         stores_scale, codes);
  } else {
    QuantizeLane<Traits, Lane, Map>(words, cache, cache.v_scales, cache.v_granularity, inverse,
                                    at.head, at.lane, scale_index, stores_scale, codes);
  }
  block = ValidBlock(p, block);
  const CacheStrides& strides = cache.value_strides;
  if constexpr (kTogether) {
    __shared__ TokenColumns<Lane, Map, kStores, kMostTokensTogether> columns;
    uint8_t* const column =
        static_cast<uint8_t*>(cache.value) + strides.Plane(block, 0) + TokenSlot(slot);
    columns.Put(codes, at.active && block >= 0 ? column : nullptr);  // lane 0 has an active head
    __syncthreads();
    columns.Store(strides, at.first_head, cache.num_kv_heads, at.share, at.shares);
    return;
  }
  if (!at.active || block < 0) return;
  uint8_t* out =
      static_cast<uint8_t*>(cache.value) + strides.Row(block, at.head, at.lane) + TokenSlot(slot);
  const int64_t step = Lane::kLanes * strides.row;  // to a lane's next channel
#pragma unroll
  for (int i = 0; i < kStores; ++i, out += step) {
    const int channel = Map::Channel(at.lane, i * CodesPerByte(Traits::kCode));
    const bool there = Lane::kActive == Lane::kLanes || channel < Lane::kHeadDim;
    if (there && (i & (at.shares - 1)) == at.share) {
      *out = static_cast<uint8_t>(codes[i / 4] >> (8 * (i % 4)));
    }
  }
}

constexpr int MostDecodeThreads(bool together) {
  return together ? kMostTokensTogether * kDecodeThreads : kDecodeThreads;
}

// Grid: groups of heads (of V, of K, of Q), and tokens. With kTogether a CTA has several tokens, a
// warp each. Error feedback takes many registers, so steps with it have a kernel of their own, and
// so have those with a block table for each KV head, which no other kernel takes.
template <typename Traits, bool kTogether, bool kFeedsBack = false, bool kHeadTables = false>
__global__ void __launch_bounds__(MostDecodeThreads(kTogether))
    StepDecodeKernel(const __grid_constant__ StepParamsOf<Traits> p, float seqs_per_token,
                     bool small_grid) {
  using Value = typename Traits::Value;
  constexpr int kHeads = DecodeLane<Traits>::kHeads, kValueHeads = DecodeLane<Value>::kHeads;
  const int q_heads = Traits::kRope ? p.rope.num_heads : 0;
  const int kv_heads = p.rope.cache.num_kv_heads;
  const int k_groups = (kv_heads + kHeads - 1) / kHeads;
  const int v_groups = (kv_heads + kValueHeads - 1) / kValueHeads;
  // A small step has warps to spare: the scattered stores of V are what takes longest.
  const int value_shares = Traits::kQuantized && small_grid ? kValueShares : 1;
  const int value_groups = v_groups * value_shares;
  const int group = blockIdx.x;
  int token = blockIdx.y;
  bool past = false;  // a warp without a token, which V's warps need all the same
  if constexpr (kTogether) {
    token = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);
    past = token >= p.rope.seqs.num_tokens;
    if (past) token = p.rope.seqs.num_tokens - 1;
  }
  DecodeSeq seq(p.rope.seqs, token, seqs_per_token);
  if (group < value_groups) {
    DecodeHead at =
        HeadOfLane<Value>(token, group >> (value_shares == kValueShares ? 2 : 0), kv_heads);
    at.share = group & (value_shares - 1);
    at.shares = value_shares;
    if (past) at.active = false;
    if constexpr (Traits::kQuantized) {
      DecodeValue<Value, kTogether, kHeadTables>(p, seq, at);
    } else {
      DecodeTokenMajor<Value, HeadKind::kValue, kTogether, false, kHeadTables>(p, seq, at);
    }
  } else if (past) {
    return;
  } else if (group < value_groups + k_groups) {
    DecodeTokenMajor<Traits, HeadKind::kKey, kTogether, kFeedsBack, kHeadTables>(
        p, seq, HeadOfLane<Traits>(token, group - value_groups, kv_heads));
  } else if constexpr (Traits::kRope) {
    DecodeQuery<Traits, kTogether>(
        p, seq, HeadOfLane<Traits>(token, group - value_groups - k_groups, q_heads));
  }
  if (group == gridDim.x - 1 && token == 0) {
    for (int i = 4 * threadIdx.x; i < p.rope.num_arrivals; i += 4 * kDecodeThreads) {
      *reinterpret_cast<int4*>(p.rope.arrivals + i) = make_int4(0, 0, 0, 0);
    }
  }
}

}  // namespace fastattn::cuda
