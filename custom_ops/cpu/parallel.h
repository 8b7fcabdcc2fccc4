// Threading of the CPU kernels: one rule says how many threads a call takes.
//
// A call takes one thread for each kThreadWork of its work, at least one and at most
// MaxThreads(). On a busy machine a thread that is woken may have to wait for a core for several
// milliseconds, and the call waits with it: a small call is done sooner by one thread alone.
//
// Work is counted in nanoseconds of one core, about one for each channel that is read, converted
// and written. It is an estimate from the call's sizes; nothing is measured. Results do not depend
// on it: an iteration's arithmetic depends neither on its thread nor on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace fastattn::cpu {

inline constexpr int64_t kThreadWork = int64_t{1} << 20;

// Threads that a call may have now (see parallel.cc).
int64_t MaxThreads();

// Threads that `iterations` of `work` each are worth.
inline int64_t ThreadsFor(int64_t iterations, int64_t work) {
  const int64_t worth = static_cast<int64_t>(static_cast<double>(iterations) *
                                             static_cast<double>(work) / kThreadWork);
  const int64_t threads = std::min(iterations, worth);
  return threads <= 1 ? 1 : std::min(threads, MaxThreads());
}

// The first exception of a region's threads. One that leaves an OpenMP region ends the process, so
// it is kept, and the thread that made the call throws it again.
class RegionError {
 public:
  // From a handler of a thread.
  void Keep() noexcept {
    if (!taken_.test_and_set()) error_ = std::current_exception();
  }

  // After the region.
  void Rethrow() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  std::exception_ptr error_;
};

// Runs f(begin, end) over [0, n) in contiguous ranges, one a thread. `work` is that of an
// iteration. Throws what a range threw; the others run to their end.
template <typename F>
void ParallelFor(int64_t n, int64_t work, F&& f) {
  if (n <= 0) return;
#if defined(_OPENMP)
  const int threads = static_cast<int>(ThreadsFor(n, work));
  if (threads > 1) {
    RegionError error;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) {
      try {
        f(n * t / threads, n * (t + 1) / threads);
      } catch (...) {
        error.Keep();
      }
    }
    error.Rethrow();
    return;
  }
#endif
  f(int64_t{0}, n);
}

}  // namespace fastattn::cpu
