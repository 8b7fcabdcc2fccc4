#include "cpu/parallel.h"

#if defined(_OPENMP)
#include <omp.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#endif

namespace fastattn::cpu {

#if defined(_OPENMP)
namespace {

// Whether this process came from fork() and has not called exec() since: Linux's PF_FORKNOEXEC,
// among the flags of /proc/self/stat. False where that file cannot be read.
bool IsForked() {
  constexpr unsigned long kForkNoExec = 0x40;
  std::FILE* file = std::fopen("/proc/self/stat", "r");
  if (file == nullptr) return false;
  char text[1024] = {};
  const size_t size = std::fread(text, 1, sizeof(text) - 1, file);
  std::fclose(file);
  text[size] = '\0';
  // The program's name, in parentheses, may hold anything, parentheses among it.
  const char* rest = std::strrchr(text, ')');
  unsigned long flags = 0;
  if (rest == nullptr || std::sscanf(rest + 1, " %*c %*d %*d %*d %*d %*d %lu", &flags) != 1) {
    return false;
  }
  return (flags & kForkNoExec) != 0;
}

// Found when the library is loaded, which may be in the child.
const pid_t kLoadedIn = getpid();
const bool kLoadedInChild = IsForked();

}  // namespace

// GNU's OpenMP hangs in a process that was forked after it had started threads: the child counts on
// threads that only its parent has. Whether the parent had any cannot be told, so a forked process
// works with one thread.
int64_t MaxThreads() {
  if (kLoadedInChild || getpid() != kLoadedIn || omp_in_parallel()) return 1;
  return omp_get_max_threads();
}
#else
int64_t MaxThreads() { return 1; }
#endif

}  // namespace fastattn::cpu
