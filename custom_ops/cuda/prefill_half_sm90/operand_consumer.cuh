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
  using Base::sum_;

 public:
  using Base::Base;

  __device__ __forceinline__ void Run() {
    if (group_ == 1) ArriveNamed<256>(Base::kTurnBarrier + 0);
    Ring<2> tiles;
    if (NextTile(tiles)) {
      Base::IssueFirst();
      while (true) {
        WaitProducts<0>(s_);
        StartTile(tiles.index);
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
      const uint64_t value = Base::ValueOperand();
      WaitForValues();
      FenceProducts();
      Base::IssueValues(value);
      WaitProducts<0>(o_);
      Base::Finish(tiles.index ^ 1, step_);
    }
    // Takes the last turn that the other warpgroup has left.
    if (group_ == 0) SyncNamed<256>(Base::kTurnBarrier + 0);
  }

 private:
  // How far a maximum may rise before the shift follows, in units of log2: P stays within fp16.
  static constexpr float kSlack = 6.0f;

  // Waits for a tile; false if there are no more. Each is a phase of the queries' barrier.
  __device__ __forceinline__ bool NextTile(const Ring<2>& tiles) {
    Wait(&shared_.query_full[group_], tiles.index);
    if (shared_.tile[tiles.index].steps < 0) return false;
    query_.Take(p_, shared_, tiles.index, group_);
    return true;
  }

  __device__ __forceinline__ void StartTile(int buffer) {
    Base::LoadTile(buffer);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      subtracted_[h] = 0.0f;
      limit_[h] = kMinusInf;
    }
  }

  __device__ __forceinline__ void WaitForValues() {
    Wait(&shared_.value_ready[Base::ValueStage(step_)], step_ / C::kValueStages % 2);
  }

  // The scores of the next step and the P * V of this one; kAcross: the next one is of another
  // tile.
  template <bool kAcross>
  __device__ __forceinline__ void Issue() {
    const uint64_t query = query_.Operand(), key = Base::KeyOperand();
    const uint64_t value = Base::ValueOperand();
    Base::WaitForKeys();
    WaitForValues();
    Base::BeginTurn();
    FenceProducts();
    if constexpr (kAcross) Base::IssueValues(value);
    Base::IssueScores(query, key);
    if constexpr (!kAcross) Base::IssueValues(value);
    Base::EndTurn();
    ++step_;
  }

  // `last`: of the tile.
  __device__ __forceinline__ void FirstStep(bool last) {
    FinishScores(last);
    float alpha[2];
    bool far;
    FollowMaximum(alpha, &far);
    FindProbabilities(far);
  }

  __device__ __forceinline__ void NextStep(bool last) {
    Issue<false>();
    WaitProducts<1>(s_);
    start_ -= C::kKeys;
    FinishScores(last);
    float alpha[2];
    bool far;
    const bool risen = FollowMaximum(alpha, &far);
    WaitProducts<0>(o_);
    KeepRegisters(probabilities_);
    Base::ReleaseValues(step_ - 1, start_ + C::kKeys);
    if (risen) {
#pragma unroll
      for (int i = 0; i < C::kOut; ++i) o_[i] *= alpha[i / 2 % 2];
    }
    FindProbabilities(far);
  }

  // Ends the use of the tile's queries, too. A predicate and no branch: the compiler is to see that
  // the warp stays together.
  __device__ __forceinline__ void FinishScores(bool last) {
    Base::FinishScores();
    if (last && lane_ == 0) Arrive(&shared_.query_done[group_]);
  }

  // Finds the largest scores, and what is subtracted from scores where that has to change. Returns
  // whether it has, for some row of the warp; only then alpha is known. `far`: the factors are
  // those of this step only.
  __device__ __forceinline__ bool FollowMaximum(float (&alpha)[2], bool* far) {
    float largest[2], wanted[2];
    Base::FindLargest(largest, wanted);
    *far = false;
    if (!__any_sync(~0u, !(wanted[0] <= limit_[0] && wanted[1] <= limit_[1]))) return false;
    *far = Base::MoveMaximum(largest, wanted, alpha);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      subtracted_[h] = Base::Shift(h);
      // Far scores are looked at in every step.
      limit_[h] = prefill_sm90::IsFar(shift_[h]) ? kMinusInf : shift_[h] + kSlack;
    }
    return true;
  }

  // The step's probabilities, packed, and their sums.
  __device__ __forceinline__ void FindProbabilities(bool far) {
#pragma unroll
    for (int i = 0; i < C::kScores; ++i) {
      const int h = i / 2 % 2;
      s_[i] = Exp2(fmaf(s_[i], factor_[h], -subtracted_[h]));
      sum_[h] += s_[i];
    }
    Base::PackProbabilities();
    if (far) LoadFactors(shared_, Base::buffer_, factor_);
  }

  float subtracted_[2];  // from scores: the shift, or 0 while that is -inf
  float limit_[2];       // of what the shift would be, below which it stays
};

}  // namespace fastattn::cuda::prefill_half_sm90
