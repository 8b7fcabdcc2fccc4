// Threading of the CPU kernels.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#include <unistd.h>
#endif

namespace fastattn::cpu {

#if defined(_OPENMP)
// Threads that a parallel region may have. GNU's OpenMP waits for ever in a process forked from one
// that has used threads: they are not there any more.
inline int64_t AvailableThreads() {
  static const pid_t first_user = getpid();
  return omp_in_parallel() || getpid() != first_user ? 1 : omp_get_max_threads();
}
#endif

// Runs f(begin, end) over [0, n) in contiguous pieces of at least `grain` items, one a thread.
template <typename F>
void ParallelFor(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
#if defined(_OPENMP)
  const int64_t pieces = (n + grain - 1) / grain;
  const int64_t available = pieces > 1 ? AvailableThreads() : 1;
  const int threads = static_cast<int>(pieces < available ? pieces : available);
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) {
      f(n * t / threads, n * (t + 1) / threads);
    }
    return;
  }
#endif
  f(int64_t{0}, n);
}

}  // namespace fastattn::cpu
