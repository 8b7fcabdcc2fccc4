// A consumer warpgroup runs the mainloop: 64 queries of a work tile against each of its KV tiles.
//
// A thread holds rows lane / 4 and + 8 of its warp's 16, and of every eight columns the two from
// 2 * (lane % 4). V's tokens lie in TokenSlot order: the scores' registers, packed to e4m3, are the
// left operand of P * V as they stand.
#pragma once

#include "common/bounds.h"
#include "cuda/attention/wgmma_sm90/common/epilogue.cuh"
#include "cuda/attention/wgmma_sm90/common/softmax.cuh"
#include "cuda/attention/wgmma_sm90/fp8/arithmetic.cuh"
#include "cuda/attention/wgmma_sm90/fp8/config.h"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/softcap.cuh"
#include "cuda/common/warp_scan.cuh"
#include "cuda/common/wgmma.cuh"

namespace fastattn::cuda::wgmma_fp8 {

template <class C>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Arguments& arguments, Shared<C>& shared)
      : p_(arguments.p),
        shared_(shared),
        group_(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0)),
        lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void Run() {
    if (group_ == 1) ArriveNamed<256>(kPingPongBarrier + 0);
    if constexpr (C::kSerial) {
      RunSerial();
    } else {
      RunOverlapped();
    }
    // Takes the last arrival of the other warpgroup.
    if (group_ == 0) SyncNamed<256>(kPingPongBarrier + 0);
  }

 protected:
  // Scores and products of an iteration overlap.
  __device__ __forceinline__ void RunOverlapped() {
    PipelineState<2> queries;
    if (NextTile(queries)) {
      IssueFirst();
      WaitProducts<0>(s_);
      while (true) {
        LoadTile(queries.index);
        FirstSoftmax();
        const int kv_tiles = shared_.tile[queries.index].kv_tiles;
#pragma unroll 1
        for (int i = 1; i < kv_tiles; ++i) NextIteration();
        queries.Advance();
        if (!NextTile(queries)) break;
        // The first scores of a tile run with the last P * V of the tile before, and under its
        // output.
        IssueBoth();
        Finish(queries.index ^ 1);
        WaitProducts<0>(s_);
      }
      FenceProducts();
      IssueValues();
      Finish(queries.index ^ 1);
    }
  }

  // They follow each other (Config::kSerial).
  __device__ __forceinline__ void RunSerial() {
    PipelineState<2> queries;
    while (NextTile(queries)) {
      LoadTile(queries.index);
      const int kv_tiles = shared_.tile[queries.index].kv_tiles;
      float max_v_scale = 1.0f;
#pragma unroll 1
      for (int i = 0; i < kv_tiles; ++i) {
        if (i > 0) start_ -= C::kKeys;
        IssueFirst();
        WaitProducts<0>(s_);
        FirstSoftmax();
        AddHalf<0>();
        AddHalf<1>();
        if constexpr (C::kPerTokenScales) max_v_scale = shared_.max_v_scale[values_.index][0];
        ReleaseValues(start_);
      }
      const int buffer = queries.index;
      float v_scale[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        v_scale[h] = max_v_scale < 0.0f ? shared_.row_v_scale[QueryIndex(h)] : max_v_scale;
      }
      RestoreNanFactors(shared_, buffer, sum_);
      Epilogue<C>::Write(p_, shared_, buffer, o_, shift_, sum_, v_scale);
      ArriveWarp(&shared_.query_empty[buffer]);
      queries.Advance();
    }
  }

  // Adds the P * V of half of the channels.
  template <int kHalf>
  __device__ __forceinline__ void AddHalf() {
    constexpr int kFirst = kHalf * C::kProduct;
    FenceProducts();
    IssueValues<kHalf>();
    WaitProducts<0>(product_);
    KeepRegisters(probabilities_);
#pragma unroll
    for (int i = 0; i < C::kProduct; ++i) {
      o_[kFirst + i] = fmaf(o_[kFirst + i], pending_[i / 2 % 2], product_[i]);
    }
  }

  static constexpr int kPingPongBarrier = 1;
  static_assert(C::kTwoLevel || !(C::kValuesFirst || C::kSerial));

  // Ping-pong: the warpgroups take the exponentials in turn, so that the special function units are
  // busy with one's while the other waits for products, looks for maxima and issues products.
  //
  // The barriers' numbers depend on what the synchronisation is to follow, by a bit that is never
  // set (no sum is negative): nothing else keeps the compiler from moving them.
  __device__ __forceinline__ void PingPongWait() {
    SyncNamed<256>(kPingPongBarrier + group_ + (IsImpossible(shift_[1]) ? 1 : 0));
  }

  // NaNs that are computed have one payload, not this one.
  __device__ __forceinline__ static bool IsImpossible(float x) {
    return __float_as_int(x) == 0x7FABCDEF;
  }

  __device__ __forceinline__ void PingPongArrive(float sum) {
    ArriveNamed<256>(kPingPongBarrier + 1 - group_ + (sum < 0.0f ? 1 : 0));
  }

  __device__ __forceinline__ void LoadTile(int buffer) {
    start_ = shared_.tile[buffer].last_kv_tile * C::kKeys;
    buffer_ = buffer;
    int begin = 0, end = kMaxKeys;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      shift_[h] = kMinusInf;
      sum_[h] = 0.0f;
      pending_[h] = 0.0f;
      const int2 visible = shared_.visible[buffer][QueryIndex(h)];
      begin = max(begin, visible.x);
      end = min(end, visible.y);
    }
    LoadFactors(shared_, buffer_, factor_);
    if constexpr (!C::kLazy) {
      unmasked_begin_ = __reduce_max_sync(~0u, begin);
      unmasked_end_ = __reduce_min_sync(~0u, end);
    }
#pragma unroll
    for (int i = 0; i < C::kOut; ++i) o_[i] = 0.0f;
  }

  // Ends a work tile whose last product has been issued.
  __device__ __forceinline__ void Finish(int buffer) {
    float v_scale[2] = {1.0f, 1.0f};
    if constexpr (C::kPerTokenScales) {
      const float max_v_scale = shared_.max_v_scale[values_.index][0];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        v_scale[h] = max_v_scale < 0.0f ? shared_.row_v_scale[QueryIndex(h)] : max_v_scale;
      }
    }
    AddProduct<0>();
    ReleaseValues(start_);
    RestoreNanFactors(shared_, buffer, sum_);
    Epilogue<C>::Write(p_, shared_, buffer, o_, shift_, sum_, v_scale);
    ArriveWarp(&shared_.query_empty[buffer]);
  }

  // --- products ---------------------------------------------------------------------------------

  __device__ __forceinline__ void IssueScores() {
    const uint64_t key = OperandDescriptor<C::kSlice>(SharedAddress(shared_.key[0])) +
                         keys_.index * (C::kKeys * C::kDim / 16);
    MultiplyShared<false, C::kKvType>(s_, query_operand_, key);
#pragma unroll
    for (int k = 1; k < std::min(C::kSlices * C::kSlice, C::kHeadDim) / 32; ++k) {
      constexpr int kSteps = C::kSlice / 32;
      const int slice = k / kSteps, offset = 2 * (k % kSteps);
      MultiplyShared<true, C::kKvType>(s_, query_operand_ + slice * (64 * C::kSlice / 16) + offset,
                                       key + slice * (C::kKeys * C::kSlice / 16) + offset);
    }
    if constexpr (C::kTail > 0) {
      constexpr int kWhole = C::kSlices * C::kSlice;
      const uint64_t tail = OperandDescriptor<C::kTail>(SharedAddress(shared_.key[0])) +
                            keys_.index * (C::kKeys * C::kDim / 16) + C::kKeys * kWhole / 16;
#pragma unroll
      for (int k = 0; k < C::kTail / 32; ++k) {
        MultiplyShared<true, C::kKvType>(s_, query_tail_ + 2 * k, tail + 2 * k);
      }
    }
    CommitProducts();
  }

  // kHalf: which half of the channels, where a product has that many (Config::kSerial).
  template <int kHalf = 0>
  __device__ __forceinline__ void IssueValues() {
    const uint64_t value = OperandDescriptor<kBlockSize>(SharedAddress(shared_.value[0])) +
                           values_.index * (C::kKeys * C::kValueDim / 16) +
                           kHalf * (2 * C::kProduct * kBlockSize / 16);
    constexpr int kBlock = kBlockSize * C::kValueDim / 16;
    auto& target = Target();
    MultiplyRegisters<!C::kTwoLevel, C::kKvType>(target, probabilities_, value);
#pragma unroll
    for (int k = 1; k < C::kKeys / 32; ++k) {
      MultiplyRegisters<true, C::kKvType>(target, probabilities_ + 4 * k,
                                          value + k / 2 * kBlock + k % 2 * 2);
    }
    CommitProducts();
  }

  __device__ __forceinline__ float (&Target()) [C::kProduct] {
    if constexpr (C::kTwoLevel) {
      return product_;
    } else {
      return o_;
    }
  }

  // --- mainloop ---------------------------------------------------------------------------------

  // Waits for a work tile; false if there are no more.
  __device__ __forceinline__ bool NextTile(const PipelineState<2>& queries) {
    Wait(&shared_.query_full[queries.index], queries.phase);
    query_operand_ = OperandDescriptor<C::kSlice>(
        SharedAddress(shared_.query[queries.index] + group_ * 64 * C::kDim));
    if constexpr (C::kTail > 0) {
      query_tail_ = OperandDescriptor<C::kTail>(SharedAddress(
          shared_.query[queries.index] + (group_ * C::kDim + C::kSlices * C::kSlice) * 64));
    }
    return shared_.tile[queries.index].kv_tiles >= 0;
  }

  __device__ __forceinline__ void IssueFirst() {
    Wait(&shared_.key_full[keys_.index], keys_.phase);
    flags_ = shared_.flags[keys_.index];
    FenceProducts();
    IssueScores();
  }

  // Issues the scores of an iteration and the P * V of the one before.
  __device__ __forceinline__ void IssueBoth() {
    Wait(&shared_.key_full[keys_.index], keys_.phase);
    flags_ = shared_.flags[keys_.index];
    FenceProducts();
    if constexpr (C::kValuesFirst) {
      IssueValues();
      IssueScores();
    } else {
      IssueScores();
      IssueValues();
    }
  }

  __device__ __forceinline__ void FirstSoftmax() {
    FinishScores();
    float alpha[2];
    const bool far = FindMaximum(alpha);
    PingPongWait();
    WaitForValues();
    FindProbabilities(alpha);
    if (far) LoadFactors(shared_, buffer_, factor_);
  }

  __device__ __forceinline__ void NextIteration() {
    IssueBoth();
    float alpha[2];
    if constexpr (C::kValuesFirst) {
      AddProduct<1>();
      ReleaseValues(start_);
      WaitProducts<0>(s_);
    } else {
      WaitProducts<1>(s_);
    }
    start_ -= C::kKeys;
    FinishScores();
    const bool far = FindMaximum(alpha);
    PingPongWait();
    WaitForValues();
    if constexpr (C::kValuesFirst) {
      FindProbabilities(alpha);
    } else {
      WaitProducts<0>(Target());
      KeepRegisters(probabilities_);
      Exponentials<true, false>(alpha, alpha);
      ReleaseValues(start_ + C::kKeys);
      SetPending(alpha);
    }
    if (far) LoadFactors(shared_, buffer_, factor_);
  }

  // Waits for the KV tile's values, which only the next product needs. The wait stands here, and
  // depends on the maximum, because the compiler moves a wait for products up as far as it can, but
  // not past this.
  __device__ __forceinline__ void WaitForValues() {
    const int never = __any_sync(~0u, IsImpossible(shift_[0]));
    Wait(&shared_.value_ready[stage_], stage_phase_ ^ never);
  }

  // Finds the exponentials where the product of the iteration before has been added.
  __device__ __forceinline__ void FindProbabilities(const float (&alpha)[2]) {
    if constexpr (C::kPerTokenScales) {
      if (flags_ & kNeedsScrub) {
        float inverse[2], ratio[2];
        FindRowVScales(inverse, ratio);
        Exponentials<false, true>(alpha, inverse);
#pragma unroll
        for (int h = 0; h < 2; ++h) pending_[h] = alpha[h] * ratio[h];
        return;
      }
    }
    Exponentials<false, false>(alpha, alpha);
    SetPending(alpha);
  }

  // Where some query sees only a part of the KV tile, the output of each row is relative to the
  // largest scale of V that the row itself sees: the scale of a key that only another row sees must
  // not take its bits. `inverse`: what V's scales are multiplied with; `ratio`: what the output is.
  __device__ __forceinline__ void FindRowVScales(float (&inverse)[2], float (&ratio)[2]) {
    const float before_lane = MaxOfLanesBefore(LargestOfLane());
    float largest[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = LargestSeen(shared_.visible[buffer_][QueryIndex(h)], before_lane);
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& row_v_scale = shared_.row_v_scale[QueryIndex(h)];
      const float before = flags_ & kAfterScrub ? row_v_scale : shared_.max_v_scale[stage_][1];
      // A KV tile without a visible key changes nothing.
      const float v_scale = largest[h] > 0.0f ? fmaxf(largest[h], kMinVScale) : before;
      inverse[h] = 1.0f / v_scale;
      ratio[h] = VScaleRatio(before, v_scale);
      __syncwarp();
      if (lane_ % 4 == 0) row_v_scale = v_scale;
    }
    __syncwarp();
  }

  // The largest of V's scales of this lane's four keys, NaNs left out.
  __device__ __forceinline__ float LargestOfLane() const {
    static_assert(C::kKeys <= 128);
    if (4 * lane_ >= C::kKeys) return 0.0f;
    const auto x = *reinterpret_cast<const float4*>(shared_.scales[stage_][1] + 4 * lane_);
    return fmaxf(fmaxf(fmaxf(0.0f, fabsf(x.x)), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
  }

  // The largest of V's scales of the KV tile among keys that a query sees. `before_lane`: that of
  // the keys before this lane's four.
  __device__ __forceinline__ float LargestSeen(int2 visible, float before_lane) const {
    const float* scales = shared_.scales[stage_][1];
    const int begin = visible.x - start_, end = min(visible.y - start_, C::kKeys);
    if (__any_sync(~0u, begin > 0 && end > 0)) {  // a window begins in the KV tile
      float largest = 0.0f;
#pragma unroll 1
      for (int i = 2 * (lane_ % 4); i < C::kKeys; i += i % 2 == 0 ? 1 : 7) {
        if (i >= begin && i < end) largest = fmaxf(largest, fabsf(scales[i]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      return fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    }
    const int last = max(end, 1) - 1;
    const auto x = *reinterpret_cast<const float4*>(scales + last / 4 * 4);
    float largest = __shfl_sync(~0u, before_lane, last / 4);
    largest = fmaxf(largest, fabsf(x.x));
    if (last % 4 >= 1) largest = fmaxf(largest, fabsf(x.y));
    if (last % 4 >= 2) largest = fmaxf(largest, fabsf(x.z));
    if (last % 4 >= 3) largest = fmaxf(largest, fabsf(x.w));
    return end > 0 ? largest : 0.0f;
  }

  // Sets what the output is multiplied with when the iteration's product is added.
  __device__ __forceinline__ void SetPending(const float (&alpha)[2]) {
    // The output is relative to the KV tile's largest scale of V.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float ratio = C::kPerTokenScales ? shared_.max_v_scale[stage_][1] : 1.0f;
      if constexpr (C::kPerTokenScales) {
        if (flags_ & kAfterScrub) {
          ratio = VScaleRatio(shared_.row_v_scale[QueryIndex(h)], shared_.max_v_scale[stage_][0]);
        }
      }
      pending_[h] = alpha[h] * ratio;
    }
  }

  // Waits for the P * V in flight and adds it. The output is rescaled to the maximum one iteration
  // late, so that both are one FMA. Without two-level accumulation the tensor core has added it.
  template <int kInFlight>
  __device__ __forceinline__ void AddProduct() {
    WaitProducts<kInFlight>(Target());
    KeepRegisters(probabilities_);
    if constexpr (C::kTwoLevel) {
#pragma unroll
      for (int i = 0; i < C::kOut; ++i) o_[i] = fmaf(o_[i], pending_[i / 2 % 2], product_[i]);
    }
  }

  // Ends the use of the values whose product has been added; `start` is their first key.
  __device__ __forceinline__ void ReleaseValues(int start) {
    const int found = *reinterpret_cast<const int*>(shared_.nan_found[values_.index]) & 0xFFFFFF;
    if (found != 0) SetNanOutputs(start, buffer_);
    ArriveWarp(&shared_.value_empty[values_.index]);
    values_.Advance();
  }

  // --- softmax ----------------------------------------------------------------------------------

  // Ends the use of the KV tile's keys, applies scales, softcap and masks.
  __device__ __forceinline__ void FinishScores() {
    const int at = keys_.index;
    ArriveWarp(&shared_.key_empty[at]);
    if constexpr (C::kPerTokenScales) Wait(&shared_.value_ready[at], keys_.phase);
    if constexpr (C::kSoftcap) Softcap(at);
    // LazyConsumer has no registers for its warps' own range.
    const bool full = C::kLazy ? !(flags_ & kNeedsScrub)
                               : start_ >= unmasked_begin_ && start_ + C::kKeys <= unmasked_end_;
    if (!full || (flags_ & (3 * kUnassigned))) MaskScores(shared_, buffer_, start_, flags_, s_);
    stage_ = at;
    stage_phase_ = keys_.phase;
    keys_.Advance();
  }

  // Turns products into capped scores, in units of log2.
  __device__ __forceinline__ void Softcap(int at) {
    const ScoreCap cap(p_.softcap);
    if constexpr (C::kPerTokenScales) {
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; ++j) ScaleColumns(shared_.scales[at][0], j, s_);
    }
#pragma unroll
    for (int i = 0; i < C::kScores; ++i) {
      s_[i] = cap(s_[i] * factor_[i / 2 % 2]);
    }
  }

  // The logarithm of a row's largest P.
  __device__ __forceinline__ float LogPeak() const {
    if constexpr (!C::kLazy) return kLogPeak;
    const bool exact = shared_.exact_iterations[buffer_] == shared_.tile[buffer_].kv_tiles;
    return exact ? kLogPeak : kLazyLogPeak;
  }

  // Returns whether the factors are those of this KV tile only.
  __device__ __forceinline__ bool FindMaximum(float (&alpha)[2]) {
    float largest_of[4];
#pragma unroll
    for (int i = 0; i < C::kScores; ++i) {
      // Masked scores are -inf already, and stay it: the scales are positive.
      if (C::kPerTokenScales && !C::kSoftcap && i % 4 == 0) {
        ScaleColumns(shared_.scales[stage_][0], i / 4, s_);
      }
      largest_of[i % 4] = i < 4 ? s_[i] : MaxNaN(largest_of[i % 4], s_[i]);
    }
    float largest[2], wanted[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = MaxNaN(largest_of[2 * h], largest_of[2 * h + 1]);
      largest[h] = MaxNaN(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
      largest[h] = MaxNaN(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
      wanted[h] = C::kSoftcap ? ShiftBelow(largest[h]) : fmaf(largest[h], factor_[h], -LogPeak());
    }
    bool any_far = false;
    if constexpr (!C::kSoftcap) {
      const bool far[2] = {IsFarScore(wanted[0]), IsFarScore(wanted[1])};
      any_far = __any_sync(~0u, far[0] || far[1]);
      if (any_far) MultiplyFarScores(s_, factor_, far, largest, wanted);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float before = shift_[h];
      shift_[h] = MaxNaN(before, wanted[h]);
      alpha[h] = OrderedExp2(before - Shift(h));
      sum_[h] *= alpha[h];
    }
    return any_far;
  }

  __device__ __forceinline__ float Factor(int h) const { return C::kSoftcap ? 1.0f : factor_[h]; }

  // What is subtracted from the scores: nothing while no visible one is above -inf.
  __device__ __forceinline__ float Shift(int h) const {
    return shift_[h] == kMinusInf ? 0.0f : shift_[h];
  }

  // Finds the KV tile's exponentials, their sums and codes. The product before is added among them
  // (or the output scaled, where the tensor core adds it), so that one fills the other's waits.
  // kRowVScales: V's scales are multiplied with `inverse` (see FindRowVScales).
  template <bool kAdd, bool kRowVScales>
  __device__ __forceinline__ void Exponentials(const float (&alpha)[2], const float (&inverse)[2]) {
    constexpr int kPerOutput = C::kSerial ? 1 : C::kScores / C::kOut;
    constexpr int kPingPongAt = C::kScores - 4;  // the other warpgroup needs some cycles to wake up
    const float shift[2] = {Shift(0), Shift(1)};
#pragma unroll
    for (int i = 0; i < C::kScores; ++i) {
      const int h = i / 2 % 2;
      s_[i] = OrderedExp2(fmaf(s_[i], Factor(h), -shift[h]));
      if (kAdd && i % kPerOutput == 0) {
        const int k = i / kPerOutput;
        if constexpr (C::kTwoLevel) {
          o_[k] = Fma(o_[k], pending_[k / 2 % 2], product_[k]);
        } else {
          o_[k] *= alpha[k / 2 % 2];
        }
      }
      sum_[h] += s_[i];
      if (i + 1 == kPingPongAt) PingPongArrive(sum_[h]);
      if (C::kPerTokenScales && i % 4 == 3) {
        if constexpr (kRowVScales) {
          ScaleByRowVScales(i / 4, inverse);
        } else {
          ScaleColumns(shared_.scales[stage_][1], i / 4, s_);
        }
      }
      if (i % 8 == 7) {
        PackWord(i / 8 * 2);
        PackWord(i / 8 * 2 + 1);
      }
    }
  }

  // ScaleColumns() with V's scales relative to each row's own, which no visible one exceeds.
  __device__ __forceinline__ void ScaleByRowVScales(int j, const float (&inverse)[2]) {
    const float* scales = shared_.scales[stage_][1] + 8 * j + 2 * (lane_ % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) s_[4 * j + i] *= Clamped(scales[i % 2] * inverse[i / 2]);
  }

  // The scale of a masked key may be far above the row's; 0 times infinity is NaN.
  __device__ __forceinline__ static float Clamped(float x) { return fmaxf(fminf(x, 1.0f), -1.0f); }

  // Word w of the left operand of P * V.
  __device__ __forceinline__ void PackWord(int w) {
    const int at = 8 * (w / 2) + 2 * (w % 2);
    probabilities_[w] = PackE4M3(s_[at], s_[at + 1], s_[at + 4], s_[at + 5]);
  }

  // Sets the outputs of rows that see a NaN value (see ValueScrubber).
  __device__ __forceinline__ void SetNanOutputs(int start, int buffer) {
    const auto* tokens = reinterpret_cast<const uint32_t*>(shared_.nan_tokens[values_.index]);
#pragma unroll 1
    for (int w = 0; w < C::kKeys / 32; ++w) {
      uint32_t seen[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int2 visible = shared_.visible[buffer][QueryIndex(h)];
        const int begin = Clamp(visible.x - start - 32 * w, 0, 32);
        const int end = Clamp(visible.y - start - 32 * w, 0, 32);
        const uint64_t bits = (uint64_t{1} << end) - 1;
        seen[h] = static_cast<uint32_t>(bits) & ~static_cast<uint32_t>((uint64_t{1} << begin) - 1);
      }
      uint32_t whole = 0;
      if constexpr (C::kPerTokenScales) {
        whole = shared_.poisoned[values_.index][1][w];
        const uint32_t scores = shared_.poisoned[values_.index][0][w];
        if (scores & seen[0]) sum_[0] = NAN;
        if (scores & seen[1]) sum_[1] = NAN;
      }
#pragma unroll
      for (int i = 0; i < C::kOut; ++i) {
        const int channel = 8 * (i / 4) + 2 * (lane_ % 4) + i % 2;
        if ((tokens[channel * (C::kKeys / 32) + w] | whole) & seen[i / 2 % 2]) o_[i] = NAN;
      }
    }
  }

  const AttentionParams& p_;
  Shared<C>& shared_;
  const int group_;
  const int lane_;
  PipelineState<C::kStages> keys_, values_;
  uint64_t query_operand_;
  uint64_t query_tail_;
  int stage_ = 0;  // of the KV tile
  uint32_t stage_phase_ = 0;
  int flags_;                          // of the KV tile
  int start_;                          // first key of the KV tile
  int buffer_;                         // of the work tile
  int unmasked_begin_, unmasked_end_;  // keys that all of the warp's queries see
  float shift_[2], sum_[2], factor_[2], pending_[2];
  float s_[C::kScores];
  float o_[C::kOut];
  float product_[C::kTwoLevel ? C::kProduct : 1];
  uint32_t probabilities_[C::kKeys / 8];
};

}  // namespace fastattn::cuda::wgmma_fp8
