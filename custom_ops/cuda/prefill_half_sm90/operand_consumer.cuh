// A consumer warpgroup of operands.
//
// A step's own chain, from its scores to its probabilities, is what limits the kernel: the other
// warpgroup's products take less time. So a step waits for its values where it issues the product
// that reads them, moves the maximum only where that is needed, and has the product of the step
// before behind it when its exponentials begin: nothing is left behind them, and probabilities are
// packed among them.
#pragma once

#include "cuda/prefill_half_sm90/consumer.cuh"

namespace fastattn::cuda::prefill_half_sm90 {

template <class C>
class OperandConsumer : private Consumer<C> {
  using Base = Consumer<C>;
  using Base::group_;
  using Base::lane_;
  using Base::o_;
  using Base::p_;
  using Base::probabilities_;
  using Base::query_;
  using Base::s_;
  using Base::shared_;
  using Base::start_;
  using Base::step_;
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
    float alpha[2];
    bool far;
    Base::FollowMaximum(alpha, &far);
    Base::FindProbabilities(far);
  }

  __device__ __forceinline__ void NextStep(bool last) {
    Issue<false>();
    WaitProducts<1>(s_);
    start_ -= C::kKeys;
    FinishScores(last);
    float alpha[2];
    bool far;
    const bool risen = Base::FollowMaximum(alpha, &far);
    WaitProducts<0>(o_);
    KeepRegisters(probabilities_);
    Base::ReleaseValues(step_ - 1, start_ + C::kKeys);
    if (risen) {
#pragma unroll
      for (int i = 0; i < C::kOut; ++i) o_[i] *= alpha[i / 2 % 2];
    }
    Base::FindProbabilities(far);
  }

  // Ends the use of the tile's queries, too. A predicate and no branch: the compiler is to see that
  // the warp stays together.
  __device__ __forceinline__ void FinishScores(bool last) {
    typename Base::KeyScales scales{};
    Base::FinishScores(scales);
    if (last && lane_ == 0) Arrive(&shared_.query_done[group_]);
  }
};

}  // namespace fastattn::cuda::prefill_half_sm90
