// A consumer warpgroup runs the mainloop: 64 queries of a work tile against each of its KV tiles.
//
// A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16, and of every eight columns the
// two from 2 * (lane % 4): the scores' registers, packed to 16 bits, are the left operand of P * V
// as they stand.
//
// What limits the kernel is a warpgroup's own chain from the scores of a KV tile to its
// probabilities: the products of both warpgroups take less time. So the chain has no maximum in it.
// The first iteration of a work tile finds the rows' maxima, which set the shifts; the others take
// exponentials at once, and only where one of them is too large are the maximum found, the row's
// shift moved and the exponentials found again. Rows whose own exponentials are not too large keep
// their shifts, and so their bits, whatever the others see. The wait for values stands where the
// product that reads them is issued, and the product of the iteration before is done when packing
// begins, so that nothing is left behind the exponentials.
#pragma once

#include <type_traits>

#include "common/bounds.h"
#include "common/numeric.h"
#include "cuda/attention/wgmma_sm90/common/epilogue.cuh"
#include "cuda/attention/wgmma_sm90/common/softmax.cuh"
#include "cuda/attention/wgmma_sm90/common/tile_scheduler.cuh"
#include "cuda/attention/wgmma_sm90/q16/column_factors.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/key_scales.cuh"
#include "cuda/attention/wgmma_sm90/q16/nan_outputs.cuh"
#include "cuda/attention/wgmma_sm90/q16/query.cuh"
#include "cuda/attention/wgmma_sm90/q16/query_codes.cuh"
#include "cuda/attention/wgmma_sm90/q16/query_nibbles.cuh"
#include "cuda/attention/wgmma_sm90/q16/row_sums.cuh"
#include "cuda/attention/wgmma_sm90/q16/row_v_scales.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/softcap.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_half.cuh"

namespace fastattn::cuda::wgmma_q16 {

// The class of the left operand of the scores.
template <class C>
struct QueryOf {
  using Halves = std::conditional_t<C::kQuantized, ConvertedQuery<C>, SharedQuery<C>>;
  using Registers = std::conditional_t<C::kNibbleOperands, NibbleQuery<C>, RegisterQuery<C>>;
  using Type = std::conditional_t<C::kKeyCodeOperands, CodeQuery<C>,
                                  std::conditional_t<C::kQueryInRegisters, Registers, Halves>>;
};

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
    PipelineState<2> tiles;
    if (NextTile(tiles)) {
      IssueFirst();
      while (true) {
        WaitForScores<0>();
        LoadTile(tiles.index);
        const int kv_tiles = shared_.tile[tiles.index].kv_tiles;
        FirstIteration(kv_tiles == 1);
#pragma unroll 1
        for (int i = 1; i < kv_tiles; ++i) NextIteration(i + 1 == kv_tiles);
        tiles.Advance();
        const bool more = NextTile(tiles);
        if (!more) break;
        // The first scores of a work tile run under the epilogue of the one before.
        Issue<true>();
        WaitProducts<1>(o_);
        Finish(tiles.index ^ 1, iteration_ - 1);
      }
      const RightOperands value = ValueOperand();
      WaitForValues();
      FenceProducts();
      IssueValues(value);
      WaitProducts<0>(o_);
      Finish(tiles.index ^ 1, iteration_);
    }
    // Takes the last arrival of the other warpgroup.
    if (group_ == 0) SyncNamed<256>(kPingPongBarrier + 0);
  }

 private:
  using Scales = std::conditional_t<C::kColumnFactors, ColumnFactors, KeyScales>;
  static constexpr int kPingPongBarrier = 1;
  // Probabilities that are found before there are registers to pack them into.
  static constexpr int kEarly = C::kQuantized ? 0 : 16;
  // Scores are found as integers, whose bits with a bias are scores plus kBias in fp32.
  static constexpr bool kIntegers = C::kKeyCodeOperands && C::kElement == DType::kInt8;
  // The first products of integers are issued ahead of the ping-pong barrier, but not with
  // per-token scales, which gain nothing by it.
  static constexpr bool kLatePingPong = kIntegers && !C::kPerTokenScales;
  static constexpr float kBias = CodeQuery<C>::kBiasValue;

  __device__ __forceinline__ void PingPongWait() { SyncNamed<256>(kPingPongBarrier + group_); }

  // Ping-pong: one warpgroup issues its products after the other has.
  __device__ __forceinline__ void PingPongArrive() {
    ArriveNamed<256>(kPingPongBarrier + 1 - group_);
  }

  __device__ __forceinline__ void LoadTile(int buffer) {
    buffer_ = buffer;
    start_ = shared_.tile[buffer].last_kv_tile * C::kKeys;
    int begin = 0, end = kMaxKeys;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      shift_[h] = kMinusInf;
      const int2 visible = shared_.visible[buffer][QueryIndex<true>(h)];
      begin = max(begin, visible.x);
      end = min(end, visible.y);
    }
    if constexpr (kIntegers) {
      float factor[2];
      LoadFactors(shared_, buffer_, factor);
      all_biased_ =
          __all_sync(~0u, CodeQuery<C>::IsBiased(factor[0]) && CodeQuery<C>::IsBiased(factor[1]));
    }
    if constexpr (C::kColumnFactors) {
      float factor[2];
      LoadFactors(shared_, buffer_, factor);
      all_plain_ = __all_sync(~0u, factor[0] == 1.0f && factor[1] == 1.0f);
    }
    // These keys are seen by all of the warp's queries.
    begin = __reduce_max_sync(~0u, begin);
    end = __reduce_min_sync(~0u, end);
    if (lane_ == 0) Unmasked() = make_int2(begin, end);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < C::kOut; ++i) o_[i] = 0.0f;
    sums_.Start();
    row_v_scales_.Start();
  }

  // The range of keys that all of the warp's queries see lies in shared memory, as registers are
  // short.
  __device__ __forceinline__ int2& Unmasked() { return shared_.unmasked[threadIdx.x / 32 - 4]; }

  // Ends a work tile whose last product is done.
  __device__ __forceinline__ void Finish(int buffer, uint32_t last_iteration) {
    KeepRegisters(probabilities_);
    sums_.Keep();
    float sum[2];
    sums_.Take(sum);
    ReleaseValues(last_iteration, start_);
    if constexpr (C::kPerChannelScales) {
      if (UsesValueChannels(p_)) ScaleOutputs(shared_, buffer, shift_, o_);
    }
    if constexpr (kIntegers) {
      // With a bias no score counts as far, so the factor is the work tile's.
      CodeQuery<C>::FinishShift(factor_, shift_);
    }
    RestoreNanFactors(shared_, buffer, sum);
    const float common = C::kPerTokenScales ? shared_.v_scale[buffer] : 1.0f;
    const float v_scale[2] = {row_v_scales_.VScale(0, common), row_v_scales_.VScale(1, common)};
    Epilogue<C>::Write(p_, shared_, buffer, o_, shift_, sum, v_scale);
    ArriveWarp(&shared_.query_empty[buffer]);
  }

  // --- products ---------------------------------------------------------------------------------

  __device__ __forceinline__ auto QueryOperand() const {
    if constexpr (C::kNibbleOperands) {
      return query_.Bias(shared_, group_);
    } else if constexpr (C::kKeyCodeOperands) {
      return uint64_t{0};
    } else {
      return query_.Operand();
    }
  }

  // The descriptor of the next iteration's keys.
  __device__ __forceinline__ uint64_t KeyOperand() const {
    constexpr int kRow = C::kKeyCodeOperands ? C::kDim : 128;
    return OperandDescriptor<kRow>(Uniform(SharedAddress(shared_.key[KeyStage(iteration_ + 1)])));
  }

  // What an iteration's probabilities are multiplied with.
  struct RightOperands {
    uint64_t values;
    uint64_t ones;
  };

  __device__ __forceinline__ RightOperands ValueOperand() const {
    const uint32_t address = Uniform(SharedAddress(shared_.value[ValueStage(iteration_)]));
    return {C::kTokenMajorV ? TransposedDescriptor<C::kKeys * C::kSlice>(address)
                            : OperandDescriptor<128>(address),
            RowSums<C>::Operand(shared_, row_v_scales_.Own())};
  }

  // kBegin: where the ping-pong barrier is late, it has not been waited for.
  template <bool kBegin, class Operand>
  __device__ __forceinline__ void IssueScores(const Operand& query, uint64_t key) {
    if constexpr (kIntegers) {
      query_.Multiply(integers_[0], integers_[1], key, [&] {
        if (kBegin && kLatePingPong) PingPongWait();
      });
    } else if constexpr (C::kNibbleOperands) {
      query_.Multiply(s_, key, query);
    } else if constexpr (C::kKeyCodeOperands) {
      query_.Multiply(s_, key);
    } else {
      constexpr int kKeySlice = C::kKeys * C::kSlice / 16;
      query_.template Multiply<false>(s_, 0, query, key);
#pragma unroll
      for (int k = 1; k < C::kHeadDim / 16; ++k) {
        query_.template Multiply<true>(s_, k, query, key + k / 4 * kKeySlice + k % 4 * 2);
      }
    }
    CommitProducts();
  }

  template <int kPending>
  __device__ __forceinline__ void WaitForScores() {
    if constexpr (kIntegers) {
      WaitProducts<kPending>(integers_[0]);
      WaitProducts<kPending>(integers_[1]);
#pragma unroll
      for (int i = 0; i < C::kScores; ++i) s_[i] = __int_as_float(integers_[i / 32][i % 32]);
    } else {
      WaitProducts<kPending>(s_);
    }
  }

  __device__ __forceinline__ void IssueValues(const RightOperands& value) {
    constexpr int kBlock = C::kValueDim * C::kSlice / 16;
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k) {
      const int offset = C::kTokenMajorV ? k * 128 : k / 4 * kBlock + k % 4 * 2;
      MultiplyHalfRegisters<C::kOperand, true, C::kTokenMajorV>(o_, probabilities_ + 4 * k,
                                                                value.values + offset);
      sums_.Multiply(probabilities_ + 4 * k, value.ones);
    }
    CommitProducts();
  }

  // --- mainloop
  // ------------------------------------------------------------------------------------

  // Waits for a work tile; false if there are no more. Each one is a phase of the queries' barrier.
  __device__ __forceinline__ bool NextTile(const PipelineState<2>& tiles) {
    Wait(&shared_.query_full[C::kQuantized ? 0 : group_], tiles.index);
    const int buffer = tiles.index;
    if (shared_.tile[buffer].kv_tiles < 0) return false;
    query_.Take(p_, shared_, buffer, group_);
    if constexpr (C::kQueryInRegisters) ArriveWarp(&shared_.query_read);
    return true;
  }

  // Iterations are counted over all work tiles.
  __device__ __forceinline__ static uint32_t KeyStage(uint32_t iteration) {
    return iteration % C::kKeyStages;
  }
  __device__ __forceinline__ static uint32_t ValueStage(uint32_t iteration) {
    return iteration % C::kValueStages;
  }
  __device__ __forceinline__ uint32_t ScaleStage() const { return iteration_ % C::kScaleStages; }

  __device__ __forceinline__ void WaitForKeys() {
    Wait(&shared_.key_full[KeyStage(iteration_ + 1)], (iteration_ + 1) / C::kKeyStages % 2);
  }

  __device__ __forceinline__ void IssueFirst() {
    const auto query = QueryOperand();
    const uint64_t key = KeyOperand();
    WaitForKeys();
    if (!kLatePingPong) PingPongWait();
    FenceProducts();
    IssueScores<true>(query, key);
    PingPongArrive();
    ++iteration_;
  }

  // Issues the scores of the next iteration and the P * V of this one; kAcross: the next one is of
  // another work tile.
  template <bool kAcross>
  __device__ __forceinline__ void Issue() {
    const auto query = QueryOperand();
    const uint64_t key = KeyOperand();
    const RightOperands value = ValueOperand();
    WaitForKeys();
    WaitForValues();
    if (kAcross || !kLatePingPong) PingPongWait();
    FenceProducts();
    if constexpr (kAcross) IssueValues(value);
    IssueScores<!kAcross>(query, key);
    if constexpr (!kAcross) IssueValues(value);
    PingPongArrive();
    ++iteration_;
  }

  // `last`: the iteration is the work tile's last one.
  __device__ __forceinline__ void FirstIteration(bool last) {
    Scales scales = LoadScales();
    const int flags = TakeScores(scales);
    if constexpr (C::kSoftcap) Softcap();
    FinishScores(flags, last);
    FollowMaximum<false>({true, true});
    if constexpr (C::kPerTokenScales) {
      if (row_v_scales_.Change(shared_, ScaleStage())) FollowRowVScales();
      ReleaseScales();
    }
  }

  // The softmax runs while the other warpgroup's products do, and this one's P * V. With a softcap
  // it waits for P * V first, as it needs the registers of its probabilities.
  __device__ __forceinline__ void NextIteration(bool last) {
    Issue<false>();
    Scales scales = LoadScales();
    WaitForScores<1>();
    start_ -= C::kKeys;
    if constexpr (C::kSoftcap) FinishProducts();
    const int flags = TakeScores(scales);
    if constexpr (C::kSoftcap) Softcap();
    FinishScores(flags, last);
    constexpr bool kBehind = !C::kSoftcap && kEarly > 0;
    if constexpr (!C::kSoftcap && !kBehind) FinishProducts();
    if constexpr (C::kPerTokenScales) {
      if (!row_v_scales_.Change(shared_, ScaleStage())) FollowVScale();
    }
    KvTileSums<C> sums;
    if constexpr (C::kColumnFactors) {
      FindColumnProbabilities<C, false>(Columns(), s_, guard_, {}, probabilities_, sums);
    } else {
      FindProbabilities<kBehind>(shift_, sums);
    }
    if (__any_sync(~0u, sums.Exceed())) {
      const bool moves[2] = {Exceeds(sums, 0), Exceeds(sums, 1)};
      FollowMaximum<true>(moves);
    } else {
      sums_.Add(sums);
    }
    if constexpr (C::kPerTokenScales) {
      // Change() is asked again because registers are short; the stage is this iteration's until it
      // is released.
      if (row_v_scales_.Change(shared_, ScaleStage())) FollowRowVScales();
      ReleaseScales();
    }
  }

  __device__ __forceinline__ void WaitForValues() {
    Wait(&shared_.value_ready[ValueStage(iteration_)], iteration_ / C::kValueStages % 2);
  }

  // Ends the use of an iteration's values, whose product is done; `start` is their first key.
  __device__ __forceinline__ void ReleaseValues(uint32_t iteration, int start) {
    const uint32_t at = ValueStage(iteration);
    if constexpr (!C::kFiniteValues) {
      const int found = *reinterpret_cast<const int*>(shared_.nan_found[at]);
      if (found != 0) SetNanOutputs(shared_, found, at, buffer_, start, o_);
    }
    ArriveWarp(&shared_.value_empty[at]);
  }

  // --- softmax ----------------------------------------------------------------------------------

  // Ends the use of the KV tile's keys, whose flags it returns, and applies per-token scales.
  __device__ __forceinline__ int TakeScores(Scales& scales) {
    const int flags = shared_.flags[KeyStage(iteration_)];
    ArriveWarp(&shared_.key_empty[KeyStage(iteration_)]);
    if constexpr (kIntegers && !C::kPerTokenScales) {
      if (!all_biased_) {
        float factor[2];
        LoadFactors(shared_, buffer_, factor);
        CodeQuery<C>::DropBias(factor, s_);
      }
    }
    if constexpr (C::kColumnFactors) {
      // A factor of 1 changes no bit: the warp's other queries do not matter.
      if (!all_plain_) MultiplyRows(shared_, buffer_, s_);
    } else if constexpr (C::kPerTokenScales) {
      ScaleScores<C>(scales, kIntegers ? kBias : 0.0f, s_);
    }
    return flags;
  }

  // Applies masks, and ends the use of a work tile's queries.
  __device__ __forceinline__ void FinishScores(int flags, bool last) {
    const int2 common = Unmasked();
    const bool full = start_ >= common.x && start_ + C::kKeys <= common.y;
    // Factors that stand for NaN are in KV tiles that need scrubbing.
    constexpr int kMasks = 3 * kUnassigned | (C::kColumnFactors ? kNeedsScrub : 0);
    if (!full || (flags & kMasks)) {
      MaskKeys<C>(shared_, buffer_, start_, flags, [&] { return Columns(); }, s_);
    }
    if constexpr (!C::kQueryInRegisters) {
      uint64_t* done = C::kQuantized ? &shared_.query_read : &shared_.query_done[group_];
      // This is a predicate and no branch, so that the compiler sees that the warp stays together.
      if (last && ArrivesForWarp(lane_)) Arrive(done);
    }
  }

  __device__ __forceinline__ Scales LoadScales() {
    Scales scales{};
    if constexpr (C::kPerTokenScales) {
      Wait(&shared_.scale_full[ScaleStage()], iteration_ / C::kScaleStages % 2);
    }
    if constexpr (C::kPerTokenScales && !C::kColumnFactors) {
      scales.address = SharedAddress(shared_.key_scales[ScaleStage()][lane_ % 4]);
#pragma unroll
      for (int j = 0; j < KeyScales::kAhead; ++j) scales.Load(j);
    }
    return scales;
  }

  // The factors of the KV tile's keys, from the first ones on.
  __device__ __forceinline__ ColumnFactors Columns() const {
    return ColumnFactors(SharedAddress(shared_.key_scales[ScaleStage()][lane_ % 4]));
  }

  // Ends the use of the KV tile's scales.
  __device__ __forceinline__ void ReleaseScales() {
    const uint32_t at = ScaleStage();
    if (shared_.poison_found[at]) SetPoisonedOutputs(shared_, at, buffer_, start_, o_);
    ArriveWarp(&shared_.scale_empty[at]);
  }

  // Turns products into capped scores, in units of log2.
  __device__ __forceinline__ void Softcap() {
    const ScoreCap cap(p_.softcap);
    LoadFactors(shared_, buffer_, factor_);
#pragma unroll
    for (int i = 0; i < C::kScores; ++i) s_[i] = cap(s_[i] * factor_[i / 2 % 2]);
    factor_[0] = factor_[1] = 1.0f;
  }

  // Finds the largest score of either row, and the shift below it.
  __device__ __forceinline__ void FindLargest(float (&largest)[2], float (&wanted)[2]) const {
    float largest_of[4];
    if constexpr (C::kColumnFactors) {
      FindLargestOfColumns<C>(Columns(), s_, largest_of);
    } else {
#pragma unroll
      for (int i = 0; i < C::kScores; ++i)
        largest_of[i % 4] = i < 4 ? s_[i] : MaxNaN(largest_of[i % 4], s_[i]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = MaxNaN(largest_of[2 * h], largest_of[2 * h + 1]);
      largest[h] = MaxNaN(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
      largest[h] = MaxNaN(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
      wanted[h] = fmaf(largest[h], C::kColumnFactors ? 1.0f : factor_[h], -kLogPeak);
    }
  }

  __device__ __forceinline__ void MoveMaximum(const bool (&moves)[2], const float (&largest)[2],
                                              float (&wanted)[2], float (&alpha)[2],
                                              bool (&far)[2]) {
    far[0] = moves[0] && IsFar(0, wanted[0]);
    far[1] = moves[1] && IsFar(1, wanted[1]);
    if constexpr (C::kColumnFactors) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (far[h]) wanted[h] = ShiftBelow(largest[h]);
      }
    } else if (__any_sync(~0u, far[0] || far[1])) {
      MultiplyFarScores(s_, factor_, far, largest, wanted);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float before = shift_[h];
      wanted[h] = MaxNaN(before, wanted[h]);
      // A NaN in the shift stays.
      shift_[h] = !moves[h] || wanted[h] - before <= 0 ? before : wanted[h];
      alpha[h] = OrderedExp2(before - Shift(h));
      sums_.Follow(h, alpha[h]);
    }
  }

  // Whether a score is far from 0. With a bias none is. factor_ is the work tile's.
  __device__ __forceinline__ bool IsFar(int h, float score) const {
    return !(kIntegers && CodeQuery<C>::IsBiased(factor_[h])) && IsFarScore(score);
  }

  // Whether one of the four threads of row h has a probability of it that is too large.
  __device__ __forceinline__ bool Exceeds(const KvTileSums<C>& sums, int h) const {
    const unsigned votes = __ballot_sync(~0u, sums.Exceeds(h, probabilities_));
    return (votes >> (lane_ & ~3) & 0xF) != 0;
  }

  // What is subtracted from the scores: nothing while no visible one is above -inf.
  __device__ __forceinline__ float Shift(int h) const {
    return shift_[h] == kMinusInf ? 0.0f : shift_[h];
  }

  // Moves the shifts of the rows in `moves` to the KV tile's largest scores and finds the
  // probabilities. kScale: there is an output already.
  template <bool kScale>
  __device__ __forceinline__ void FollowMaximum(const bool (&moves)[2]) {
    if constexpr (!C::kSoftcap && !C::kColumnFactors) LoadFactors(shared_, buffer_, factor_);
    float largest[2], wanted[2], alpha[2];
    bool far[2];
    FindLargest(largest, wanted);
    MoveMaximum(moves, largest, wanted, alpha, far);
    if constexpr (kScale) {
      sums_.Rescale(alpha);
#pragma unroll
      for (int i = 0; i < C::kOut; ++i) o_[i] *= alpha[i / 2 % 2];
    }
    KvTileSums<C> sums;
    const float shift[2] = {Shift(0), Shift(1)};
    if constexpr (C::kColumnFactors) {
      FindColumnProbabilities<C, true>(Columns(), s_, shift, far, probabilities_, sums);
    } else {
      FindProbabilities<false>(shift, sums);
    }
    sums_.Add(sums);
    if constexpr (C::kSoftcap) return;
    if constexpr (!C::kColumnFactors) LoadFactors(shared_, buffer_, factor_);
    // Far scores need a look in every iteration: without a factor, or a shift, probabilities exceed
    // any bound.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool is_far = IsFar(h, shift_[h]);
      if constexpr (C::kColumnFactors) {
        guard_[h] = is_far ? NAN : shift_[h];
      } else {
        if (is_far) factor_[h] = NAN;
      }
    }
  }

  __device__ __forceinline__ float Probability(const float (&shift)[2], int i) const {
    return OrderedExp2(fmaf(s_[i], factor_[i / 2 % 2], -shift[i / 2 % 2]));
  }

  // Finds the KV tile's probabilities, packed, and what is kept of their sums. The scores stay, in
  // case they are needed again. A row without a shift (it is -inf) gets probabilities that exceed
  // any bound. kBehind: ends the product that reads the probabilities of the iteration before.
  template <bool kBehind>
  __device__ __forceinline__ void FindProbabilities(const float (&shift)[2], KvTileSums<C>& sums) {
    float early[kEarly + 1];
    if constexpr (kBehind) {
#pragma unroll
      for (int i = 0; i < kEarly; ++i) early[i] = Probability(shift, i);
      FinishProducts();
    }
#pragma unroll
    for (int i = 0; i < C::kScores; i += 2) {
      const float a = kBehind && i < kEarly ? early[i % (kEarly + 1)] : Probability(shift, i);
      const float b =
          kBehind && i < kEarly ? early[(i + 1) % (kEarly + 1)] : Probability(shift, i + 1);
      probabilities_[i / 2] = PackPair<C::kOperand>(a, b);
      sums.Add(i / 2, a, b, probabilities_);
    }
  }

  // Ends the P * V of the iteration before.
  __device__ __forceinline__ void FinishProducts() {
    WaitProducts<0>(o_);
    KeepRegisters(probabilities_);
    sums_.Keep();
    ReleaseValues(iteration_ - 1, start_ + C::kKeys);
  }

  __device__ __forceinline__ void FollowRowVScales() {
    float ratio[2];
    row_v_scales_.Follow(shared_, ScaleStage(), buffer_, start_, probabilities_, sums_, ratio);
#pragma unroll
    for (int i = 0; i < C::kOut; ++i) o_[i] *= ratio[i / 2 % 2];
  }

  // Rescales the output to the KV tile's V scale, which probabilities do not contain.
  __device__ __forceinline__ void FollowVScale() {
    const float ratio = shared_.v_scale_ratio[ScaleStage()];
    if (ratio != 1.0f) {
#pragma unroll
      for (int i = 0; i < C::kOut; ++i) o_[i] *= ratio;
    }
  }

  const AttentionParams& p_;
  Shared<C>& shared_;
  const int group_;
  const int lane_;
  typename QueryOf<C>::Type query_;
  uint32_t iteration_ = ~0u;  // the one whose softmax is under way
  int start_;                 // first key of the KV tile
  int buffer_;                // of the work tile
  RowSums<C> sums_;
  RowVScales<C> row_v_scales_;
  float shift_[2], factor_[2];
  float guard_[2];  // column factors: the shift, or NaN where scores are far
  float s_[C::kScores];
  int32_t integers_[2][32];  // scores of int8 in the making
  bool all_biased_;          // all scores of the warp have kBias
  bool all_plain_;           // column factors: no query of the warp has a factor
  float o_[C::kOut];
  uint32_t probabilities_[C::kScores / 2];
};

}  // namespace fastattn::cuda::wgmma_q16
