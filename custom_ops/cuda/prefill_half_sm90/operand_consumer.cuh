// A consumer warpgroup of operands.
//
// A warpgroup's own chain, from the scores of a step to its probabilities, is what limits the
// kernel: the products of both take less time. So the chain has no maximum in it. A tile's first
// step finds the rows' maxima, which the shifts are set from; the others take exponentials at once,
// and only where a sum of them is too large, the maximum is found, the shift moved, and they are
// found again. Values are waited for where the product that reads them is issued, and the product
// of the step before is done when packing begins, so that nothing is left behind the exponentials.
#pragma once

#include "cuda/prefill_half_sm90/consumer.cuh"

namespace fastattn::cuda::prefill_half_sm90 {

template <class C>
class OperandConsumer : private Consumer<C> {
  using Base = Consumer<C>;
  using Base::factor_;
  using Base::group_;
  using Base::lane_;
  using Base::o_;
  using Base::p_;
  using Base::probabilities_;
  using Base::query_;
  using Base::s_;
  using Base::shared_;
  using Base::shift_;
  using Base::start_;
  using Base::step_;
  using Base::subtracted_;
  using Base::sums_;

 public:
  using Base::Base;

  __device__ __forceinline__ void Run() {
    if (group_ == 1) ArriveNamed<256>(Base::kTurnBarrier + 0);
    Ring<2> tiles;
    if (NextTile(tiles)) {
      Base::IssueFirst();
      while (true) {
        WaitProducts<0>(s_);
        Base::LoadTile(tiles.index);
        const int steps = shared_.tile[tiles.index].steps;
        FirstStep(steps == 1);
#pragma unroll 1
        for (int i = 1; i < steps; ++i) NextStep(i + 1 == steps);
        tiles.Advance();
        const bool more = NextTile(tiles);
        if (!more) break;
        // The first scores of a tile run under the output of the tile before.
        Issue<true>();
        WaitProducts<1>(o_);
        Base::Finish(tiles.index ^ 1, step_ - 1);
      }
      const typename Base::RightOperands value = Base::ValueOperand();
      Base::WaitForValues();
      FenceProducts();
      Base::IssueValues(value);
      WaitProducts<0>(o_);
      Base::Finish(tiles.index ^ 1, step_);
    }
    // Takes the last turn that the other warpgroup has left.
    if (group_ == 0) SyncNamed<256>(Base::kTurnBarrier + 0);
  }

 private:
  // Of a thread's probabilities of a row and step, which fp16 holds.
  static constexpr float kMost = 32768.0f;
  // Probabilities that are found before there are registers to pack them into.
  static constexpr int kEarly = 16;

  // Waits for a tile; false if there are no more. Each is a phase of the queries' barrier.
  __device__ __forceinline__ bool NextTile(const Ring<2>& tiles) {
    Wait(&shared_.query_full[group_], tiles.index);
    if (shared_.tile[tiles.index].steps < 0) return false;
    query_.Take(p_, shared_, tiles.index, group_);
    return true;
  }

  // The scores of the next step and the P * V of this one; kAcross: the next one is of another
  // tile.
  template <bool kAcross>
  __device__ __forceinline__ void Issue() {
    const uint64_t query = query_.Operand(), key = Base::KeyOperand();
    const typename Base::RightOperands value = Base::ValueOperand();
    Base::WaitForKeys();
    Base::WaitForValues();
    Base::BeginTurn();
    FenceProducts();
    if constexpr (kAcross) Base::IssueValues(value);
    Base::template IssueScores<true>(query, key);
    if constexpr (!kAcross) Base::IssueValues(value);
    Base::EndTurn();
    ++step_;
  }

  // `last`: of the tile.
  __device__ __forceinline__ void FirstStep(bool last) {
    FinishScores(last);
    float part[2];
    FollowMaximum<false>(part);
    AddSums(part);
  }

  __device__ __forceinline__ void NextStep(bool last) {
    Issue<false>();
    WaitProducts<1>(s_);
    start_ -= C::kKeys;
    FinishScores(last);
    float part[2];
    FindProbabilities<true>(part);
    if (__any_sync(~0u, !(part[0] <= most_[0] && part[1] <= most_[1]))) FollowMaximum<true>(part);
    AddSums(part);
  }

  // Ends the use of the tile's queries, too. A predicate and no branch: the compiler is to see that
  // the warp stays together.
  __device__ __forceinline__ void FinishScores(bool last) {
    typename Base::KeyScales scales{};
    Base::FinishScores(scales);
    if (last && ArrivesForWarp(lane_)) Arrive(&shared_.query_done[group_]);
  }

  // Moves the shifts to the step's largest scores and finds the probabilities. kScale: there is an
  // output already.
  template <bool kScale>
  __device__ __forceinline__ void FollowMaximum(float (&part)[2]) {
    float largest[2], wanted[2], alpha[2];
    Base::FindLargest(largest, wanted);
    const bool far = Base::MoveMaximum(largest, wanted, alpha);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      subtracted_[h] = Base::Shift(h);
      // Without a score above -inf there is no shift, and far ones are looked at in every step.
      const bool usable = shift_[h] > kMinusInf && !prefill_sm90::IsFar(shift_[h]);
      most_[h] = usable ? kMost : -1.0f;
    }
    if constexpr (kScale) {
#pragma unroll
      for (int i = 0; i < C::kOut; ++i) o_[i] *= alpha[i / 2 % 2];
    }
    FindProbabilities<false>(part);
    if (far) LoadFactors(shared_, Base::buffer_, factor_);
  }

  __device__ __forceinline__ void AddSums(const float (&part)[2]) {
    sums_.Add(0, part[0]);
    sums_.Add(1, part[1]);
  }

  __device__ __forceinline__ float Probability(int i) const {
    return Exp2(fmaf(s_[i], factor_[i / 2 % 2], -subtracted_[i / 2 % 2]));
  }

  // The step's probabilities, packed, and this thread's sums of them. Scores stay, in case that
  // they are needed again. kBehind: ends the product that reads the probabilities of the step
  // before.
  template <bool kBehind>
  __device__ __forceinline__ void FindProbabilities(float (&part)[2]) {
    float early[kEarly];
    if constexpr (kBehind) {
#pragma unroll
      for (int i = 0; i < kEarly; ++i) early[i] = Probability(i);
      WaitProducts<0>(o_);
      KeepRegisters(probabilities_);
      Base::ReleaseValues(step_ - 1, start_ + C::kKeys);
    }
    part[0] = part[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < C::kScores; i += 2) {
      const float a = kBehind && i < kEarly ? early[i % kEarly] : Probability(i);
      const float b = kBehind && i < kEarly ? early[(i + 1) % kEarly] : Probability(i + 1);
      part[i / 2 % 2] += a;
      part[i / 2 % 2] += b;
      probabilities_[i / 2] = PackPair<C::kOperand>(a, b);
    }
  }

  float most_[2];  // of a step's sums, with this shift
};

}  // namespace fastattn::cuda::prefill_half_sm90
