// The consumer whose iterations mostly find no maximum (Config::kLazy).
//
// The first iterations of a work tile find maxima as Consumer's do. Behind them a row's shift
// stays, P takes the place of the scores, and where four P of a thread together leave e4m3, the
// row's shift moves and its P are multiplied (FollowShifts). The tensor cores add the P * V of two
// iterations.
//
// A P that is infinite cannot be brought back. It makes the row's sum infinite or NaN, and so do a
// NaN and a row that sees no key in the first iterations; a sum that is finite says that nothing of
// the kind happened. Rows without a finite sum, and those whose scores are far from 0, are left out
// of the output, and the producer brings the work tile again, for them alone, with maxima in all of
// its iterations. So no query or key of another row moves a row's bits. The masks of its work tile
// do: they say which iterations find maxima.
#pragma once

#include "cuda/attention/wgmma_sm90/fp8/consumer.cuh"

namespace fastattn::cuda::wgmma_fp8 {

template <class C>
class LazyConsumer : private Consumer<C> {
  using Base = Consumer<C>;
  using Base::buffer_;
  using Base::factor_;
  using Base::flags_;
  using Base::group_;
  using Base::keys_;
  using Base::lane_;
  using Base::o_;
  using Base::p_;
  using Base::pending_;
  using Base::probabilities_;
  using Base::product_;
  using Base::s_;
  using Base::shared_;
  using Base::shift_;
  using Base::stage_;
  using Base::stage_phase_;
  using Base::start_;
  using Base::sum_;
  using Base::values_;

 public:
  using Base::Base;

  __device__ __forceinline__ void Run() {
    if (group_ == 1) ArriveNamed<256>(Base::kPingPongBarrier + 0);
    PipelineState<2> queries;
    if (Base::NextTile(queries)) {
      RunTiles(queries);
      // None follows, but the last one may come again.
      queries.Advance();
      if (Base::NextTile(queries)) RunAgain(queries.index);
    }
    // Takes the last arrival of the other warpgroup.
    if (group_ == 0) SyncNamed<256>(Base::kPingPongBarrier + 0);
  }

 private:
  static constexpr float kMost = 432.0f;  // e4m3 ends at 448

  // Runs work tiles until there is none.
  __device__ __forceinline__ void RunTiles(PipelineState<2>& queries) {
    Base::IssueFirst();
    WaitProducts<0>(s_);
    while (true) {
      Base::LoadTile(queries.index);
      Base::FirstSoftmax();
      const int exact = shared_.exact_iterations[queries.index];
      int more = shared_.tile[queries.index].kv_tiles - exact, holds = 0;
#pragma unroll 1
      for (int i = 1; i < exact; ++i) Base::NextIteration();
      if (more > 0) RaisePeaks();
#pragma unroll 1
      while (more > 0) {
        LazyIteration<false>();
        holds = 1;
        if (--more == 0) break;
        LazyIteration<true>();
        holds = 0;
        --more;
      }
      queries.Advance();
      if (!Base::NextTile(queries)) {
        FenceProducts();
        IssueValues<true>(holds);
        WaitProducts<0>(product_);
        Finish(queries.index ^ 1);
        return;
      }
      // The first scores of a tile run under the output of the tile before.
      Wait(&shared_.key_full[keys_.index], keys_.phase);
      flags_ = shared_.flags[keys_.index];
      FenceProducts();
      IssueValues<true>(holds);
      Base::IssueScores();
      WaitProducts<1>(product_);
      Finish(queries.index ^ 1);
      WaitProducts<0>(s_);
    }
  }

  // Runs the last work tile again. (Others come again among RunTiles()'s. A way back into its loop
  // would cost registers.)
  __device__ __forceinline__ void RunAgain(int buffer) {
    Base::IssueFirst();
    WaitProducts<0>(s_);
    Base::LoadTile(buffer);
    Base::FirstSoftmax();
#pragma unroll 1
    for (int i = shared_.exact_iterations[buffer]; i > 1; --i) Base::NextIteration();
    FenceProducts();
    IssueValues<false>(0);
    WaitProducts<0>(product_);
    Finish(buffer);
  }

  // Issues P * V, which is added to what product_ holds: if `add` or, without kMayAdd, not.
  template <bool kMayAdd>
  __device__ __forceinline__ void IssueValues(int add) {
    const uint64_t value = OperandDescriptor<kBlockSize>(SharedAddress(shared_.value[0])) +
                           values_.index * (C::kKeys * C::kValueDim / 16);
    constexpr int kBlock = kBlockSize * C::kValueDim / 16;
    if constexpr (kMayAdd) {
      MultiplyRegistersIf(product_, probabilities_, value, add);
    } else {
      MultiplyRegisters<false, C::kKvType>(product_, probabilities_, value);
    }
#pragma unroll
    for (int k = 1; k < C::kKeys / 32; ++k) {
      MultiplyRegisters<true, C::kKvType>(product_, probabilities_ + 4 * k,
                                          value + k / 2 * kBlock + k % 2 * 2);
    }
    CommitProducts();
  }

  // An iteration that finds no maximum. kSecond: product_ holds the P * V of an iteration already;
  // that of the iteration before is added to it, and both then to the output.
  template <bool kSecond>
  __device__ __forceinline__ void LazyIteration() {
    Wait(&shared_.key_full[keys_.index], keys_.phase);
    flags_ = shared_.flags[keys_.index];
    FenceProducts();
    Base::IssueScores();
    if constexpr (kSecond) {
      IssueValues<true>(1);
    } else {
      IssueValues<false>(0);
    }
    WaitProducts<1>(s_);
    start_ -= C::kKeys;
    Base::FinishScores();
    // As PingPongWait() and WaitForValues(), which follow the maximum.
    SyncNamed<256>(Base::kPingPongBarrier + group_ +
                   (Base::IsImpossible(s_[C::kScores - 1]) ? 1 : 0));
    const int never = __any_sync(~0u, Base::IsImpossible(s_[C::kScores - 2]));
    Wait(&shared_.value_ready[stage_], stage_phase_ ^ never);
    WaitProducts<0>(product_);
    KeepRegisters(probabilities_);
    const float most = FindExponentials<kSecond>();
    Base::ReleaseValues(start_ + C::kKeys);
    if (__any_sync(~0u, !(most <= kMost))) FollowShifts<!kSecond>();
  }

  // Finds the KV tile's exponentials, their sums and codes with the shifts as they are. Returns the
  // thread's largest sum of four. kAdd: adds product_ to the output.
  template <bool kAdd>
  __device__ __forceinline__ float FindExponentials() {
    constexpr int kPingPongAt = C::kScores - 4;
    static_assert(C::kOut == C::kScores);
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < C::kScores; ++i) {
      const int h = i / 2 % 2;
      s_[i] = OrderedExp2(fmaf(s_[i], factor_[h], -shift_[h]));
      if constexpr (kAdd) o_[i] = Fma(o_[i], pending_[h], product_[i]);
      if (i + 1 == kPingPongAt) Base::PingPongArrive(s_[i]);
      if (i % 8 != 7) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float four = SumOfFour(i - 7 + 2 * r);
        sum_[r] += four;
        most = i == 7 && r == 0 ? four : MaxNaN(most, four);
      }
      Base::PackWord(i / 8 * 2);
      Base::PackWord(i / 8 * 2 + 1);
    }
    if constexpr (kAdd) pending_[0] = pending_[1] = 1.0f;
    return most;
  }

  // Of a row's P of eight columns.
  __device__ __forceinline__ float SumOfFour(int i) const {
    return (s_[i] + s_[i + 1]) + (s_[i + 4] + s_[i + 5]);
  }

  // Moves the shifts of rows whose P are too large, and multiplies what is relative to them.
  // Whether a row's shift moves is a matter of the row alone, as its bits are. kHolds: product_ is
  // not in the output yet.
  template <bool kHolds>
  __device__ __forceinline__ void FollowShifts() {
    KeepFloats(s_);  // else the compiler keeps the sums of four found before
    float alpha[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = 0.0f, four = 0.0f;
#pragma unroll
      for (int i = 2 * h; i < C::kScores; i += 8) {
        largest = fmaxf(largest, fmaxf(fmaxf(s_[i], s_[i + 1]), fmaxf(s_[i + 4], s_[i + 5])));
        four = MaxNaN(four, SumOfFour(i));
      }
      const bool moves = InRow(__ballot_sync(~0u, !(four <= kMost)));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const float peak = IsOfFewKeys(sum_[h], largest) ? kLogPeak : kLazyLogPeak;
      const float by = moves ? fmaxf(__log2f(largest) - peak, 0.0f) : 0.0f;
      alpha[h] = OrderedExp2(-by);
      shift_[h] += by;
      sum_[h] *= alpha[h];
      pending_[h] *= alpha[h];
    }
    if constexpr (kHolds) {
#pragma unroll
      for (int i = 0; i < C::kProduct; ++i) product_[i] *= alpha[i / 2 % 2];
    }
#pragma unroll
    for (int i = 0; i < C::kScores; ++i) s_[i] *= alpha[i / 2 % 2];
#pragma unroll
    for (int w = 0; w < C::kKeys / 8; ++w) Base::PackWord(w);
  }

  // Makes the largest P of rows in which few keys have most of the weight kPeak, behind the
  // iterations that have found their maxima.
  __device__ __forceinline__ void RaisePeaks() {
    constexpr float kLargest = 1 << static_cast<int>(kLazyLogPeak);
    const bool few[2] = {IsOfFewKeys(sum_[0], kLargest), IsOfFewKeys(sum_[1], kLargest)};
    if (!__any_sync(~0u, few[0] || few[1])) return;
    float alpha[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      alpha[h] = few[h] ? kPeak / kLargest : 1.0f;
      shift_[h] -= few[h] ? kLogPeak - kLazyLogPeak : 0.0f;
      sum_[h] *= alpha[h];
      pending_[h] *= alpha[h];
    }
#pragma unroll
    for (int i = 0; i < C::kScores; ++i) s_[i] *= alpha[i / 2 % 2];
#pragma unroll
    for (int w = 0; w < C::kKeys / 8; ++w) Base::PackWord(w);
  }

  // Whether a row's sum so far, of which this thread has an addend, is that of few keys, relative
  // to its largest P. Many keys of little weight beside them are lost below e4m3's least P: fewer
  // of them if the largest P is kPeak. Where it is kPeak / 8, at least 8 times as much is the sum,
  // and what is lost, relative to it, is no more.
  __device__ __forceinline__ static bool IsOfFewKeys(float sum, float largest) {
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return sum < kPeak / (1 << static_cast<int>(kLazyLogPeak)) * largest;
  }

  // Whether one of the row's four lanes has voted.
  __device__ __forceinline__ static bool InRow(unsigned votes) {
    unsigned lane;  // read again: a register is kept by the loop
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return (votes >> (lane & ~3u) & 0xF) != 0;
  }

  // Ends a work tile whose last product has been found.
  __device__ __forceinline__ void Finish(int buffer) {
    KeepRegisters(probabilities_);
#pragma unroll
    for (int i = 0; i < C::kOut; ++i) o_[i] = fmaf(o_[i], pending_[i / 2 % 2], product_[i]);
    Base::ReleaseValues(start_);
    OutputRows rows(shared_.tile[buffer], QueryIndex<true>(0));
    LeaveOut(buffer, rows);
    RestoreNanFactors(shared_, buffer, sum_);
    const float v_scale[2] = {1.0f, 1.0f};
    Epilogue<C>::Write(p_, shared_, rows, buffer, o_, shift_, sum_, v_scale);
    ArriveWarp(&shared_.query_empty[buffer]);
  }

  // Leaves out rows that failed and notes them; when the work tile is done again, those that had
  // not.
  __device__ __forceinline__ void LeaveOut(int buffer, OutputRows& rows) {
    uint32_t* failed = shared_.failed[buffer][threadIdx.x / 32 - 4];
    const bool again = shared_.is_again[buffer];
    const bool exact = shared_.exact_iterations[buffer] == shared_.tile[buffer].kv_tiles;
    unsigned votes[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Neither infinite nor NaN; a row without a key has no shift.
      const bool right = exact || (sum_[h] <= 3.0e38f && !IsFarScore(shift_[h]));
      votes[h] = again ? failed[h] : __ballot_sync(~0u, !right && rows.token[h] >= 0);
      if (InRow(votes[h]) != again) rows.token[h] = -1;
    }
    __syncwarp();
    if (lane_ < 2) failed[lane_] = again ? 0 : lane_ == 0 ? votes[0] : votes[1];
  }
};

}  // namespace fastattn::cuda::wgmma_fp8
