#include "cpu/kv_signal.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <thread>

namespace fastattn::cpu {

namespace {

using Clock = std::chrono::steady_clock;

// A wait for a queue that is full. At first it looks often: a receiver that works makes room soon.
constexpr auto kImpatience = std::chrono::milliseconds(5);
constexpr auto kShortSleep = std::chrono::microseconds(50);
constexpr auto kLongSleep = std::chrono::milliseconds(1);
constexpr auto kTellAfter = std::chrono::seconds(5);

std::atomic<int> new_mode{0600};

// Ctrl-C while a thread waits that Python's handlers do not run in: that of a program, or of a
// GPU's driver. Python's own handler only notes that the signal came, and its main thread sees to
// that once the program or the GPU is done, which would be never. So a handler is put ahead of it
// for the time of the wait. Where the signal ends the process, or is ignored, nothing is changed.
class InterruptWatch {
 public:
  InterruptWatch() {
    const std::lock_guard<std::mutex> lock(Mutex());
    if (watches++ > 0) return;
    struct sigaction action = {};
    installed = false;
    if (sigaction(SIGINT, nullptr, &before) != 0) return;
    if ((before.sa_flags & SA_SIGINFO) == 0 &&
        (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN)) {
      return;
    }
    action = before;
    action.sa_flags |= SA_SIGINFO;
    action.sa_sigaction = Note;
    installed = sigaction(SIGINT, &action, nullptr) == 0;
  }

  ~InterruptWatch() {
    const std::lock_guard<std::mutex> lock(Mutex());
    struct sigaction now = {};
    if (--watches > 0 || !installed) return;
    // Another handler may have come meanwhile, which stays.
    const bool ours = sigaction(SIGINT, nullptr, &now) == 0 && now.sa_sigaction == Note;
    if (ours) sigaction(SIGINT, &before, nullptr);
  }

  InterruptWatch(const InterruptWatch&) = delete;
  InterruptWatch& operator=(const InterruptWatch&) = delete;

  bool Interrupted() const { return count.load() != first_; }

 private:
  static std::mutex& Mutex() {
    static auto& mutex = *new std::mutex;
    return mutex;
  }

  static void Note(int number, siginfo_t* info, void* context) {
    ++count;
    if ((before.sa_flags & SA_SIGINFO) != 0) {
      before.sa_sigaction(number, info, context);
    } else {
      before.sa_handler(number);
    }
  }

  static std::atomic<int> count;
  static struct sigaction before;
  static int watches;
  static bool installed;

  const int first_ = count.load();
};

std::atomic<int> InterruptWatch::count{0};
struct sigaction InterruptWatch::before = {};
int InterruptWatch::watches = 0;
bool InterruptWatch::installed = false;

std::string WithErrno(const std::string& what) { return what + ": " + std::strerror(errno); }

// A message a layer: number of sequences that prefill, layer, and for each of those its slot,
// cached and new tokens. The receiver takes messages of one size only.
class QueueSignals : public KvSignals {
 public:
  explicit QueueSignals(key_t key) : queue_(msgget(key, IPC_CREAT | new_mode.load())) {
    if (queue_ < 0) throw std::runtime_error(WithErrno("msgget"));
  }

 private:
  static constexpr int kHeader = 2, kFields = 3;

  struct Message {
    long type = 1;  // NOLINT(runtime/int): as msgsnd wants it
    int32_t text[kHeader + kFields * kMostSeqs] = {};
  };

  bool TrySendLayer(int layer) override {
    int32_t* text = message_.text;
    *text++ = static_cast<int32_t>(prefills().size());
    *text++ = layer;
    for (const Prefill& prefill : prefills()) {
      *text++ = prefill.slot;
      *text++ = prefill.cached_tokens;
      *text++ = prefill.new_tokens;
    }
    if (msgsnd(queue_, &message_, sizeof(message_.text), IPC_NOWAIT) == 0) return true;
    if (errno == EAGAIN || errno == EINTR) return false;
    Fail(WithErrno("msgsnd"));
    return true;  // it will never have room
  }

  int queue_;
  Message message_;
};

// An integer in shared memory.
class SharedInteger {
 public:
  explicit SharedInteger(const std::string& name) {
    const int file = shm_open(("/" + name).c_str(), O_CREAT | O_RDWR, new_mode.load());
    if (file < 0) throw std::runtime_error(WithErrno("shm_open " + name));
    void* memory = MAP_FAILED;
    if (ftruncate(file, sizeof(int32_t)) == 0) {
      memory = mmap(nullptr, sizeof(int32_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    }
    const std::string error = memory == MAP_FAILED ? WithErrno("mmap " + name) : "";
    close(file);
    if (!error.empty()) throw std::runtime_error(error);
    value_ = static_cast<int32_t*>(memory);
  }

  int32_t Get() const { return __atomic_load_n(value_, __ATOMIC_ACQUIRE); }
  void Set(int32_t value) { __atomic_store_n(value_, value, __ATOMIC_RELEASE); }

 private:
  int32_t* value_;  // mapped for as long as the process lives
};

// The last complete layer of the step, and the number of the step, which wraps around.
class SharedSignals : public KvSignals {
 public:
  SharedSignals(const std::string& layer, const std::string& step) : layer_(layer), step_(step) {
    layer_.Set(-1);
  }

 private:
  static constexpr int32_t kSteps = 100003;

  // In this order: a receiver that sees the new step must not see a layer of the one before.
  void SendBegin() override {
    layer_.Set(-1);
    step_.Set((step_.Get() + 1) % kSteps);
  }
  bool TrySendLayer(int layer) override {
    layer_.Set(layer);
    return true;
  }

  SharedInteger layer_;
  SharedInteger step_;
};

// The part of `channel` behind `kind` and a colon, or null.
const char* After(const char* kind, const std::string& channel) {
  const size_t size = std::strlen(kind);
  const bool matches = channel.compare(0, size, kind) == 0 && channel[size] == ':';
  return matches ? channel.c_str() + size + 1 : nullptr;
}

std::unique_ptr<KvSignals> Open(const std::string& channel) {
  if (const char* key = After("queue", channel)) {
    size_t read = 0;
    long long value = 0;  // NOLINT(runtime/int): what stoll returns
    try {
      value = std::stoll(key, &read);
    } catch (const std::logic_error&) {
      read = 0;
    }
    if (read == std::strlen(key) && read > 0 && value == static_cast<key_t>(value)) {
      return std::make_unique<QueueSignals>(static_cast<key_t>(value));
    }
  }
  if (const char* names = After("shm", channel)) {
    const std::string both = names;
    const size_t colon = both.find(':');
    const bool apart = colon != std::string::npos && colon > 0 && colon + 1 < both.size();
    if (apart && both.find_first_of(":/", colon + 1) == std::string::npos &&
        both.find('/') == std::string::npos) {
      return std::make_unique<SharedSignals>(both.substr(0, colon), both.substr(colon + 1));
    }
  }
  throw std::invalid_argument("expected '', queue:<key> or shm:<layer>:<step>, got '" + channel +
                              "'");
}

}  // namespace

KvSignals* KvSignals::Of(const std::string& channel) {
  if (channel.empty()) return nullptr;
  static std::mutex mutex;
  static auto& opened = *new std::map<std::string, std::unique_ptr<KvSignals>>();
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<KvSignals>& signals = opened[channel];
  if (signals == nullptr) {
    try {
      signals = Open(channel);
    } catch (...) {
      opened.erase(channel);
      throw;
    }
    signals->prefills_.reserve(kMostSeqs);
    signals->channel_ = channel;
  }
  return signals.get();
}

void KvSignals::SetMode(int mode) { new_mode = mode; }

void KvSignals::Begin(const int32_t* new_tokens, const int32_t* cached_tokens, int batch) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  prefills_.clear();
  for (int i = 0; i < batch && i < kMostSeqs; ++i) {
    if (new_tokens[i] > 0) prefills_.push_back({i, cached_tokens[i], new_tokens[i]});
  }
  next_layer_ = 0;
  SendBegin();
}

void KvSignals::BeginSilent() noexcept { Begin(nullptr, nullptr, 0); }

void KvSignals::Send(int layer, bool (*interrupted)()) noexcept {
  const Clock::time_point begin = Clock::now();
  std::unique_ptr<InterruptWatch> watch;
  while (true) {
    const Clock::duration waited = Clock::now() - begin;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (prefills_.empty() || layer < next_layer_) return;
      if (TrySendLayer(layer)) {
        next_layer_ = layer + 1;
        return;
      }
      if (waited >= kTellAfter && !told_full_) {
        told_full_ = true;
        std::fprintf(stderr,
                     "fastattn: send_kv_signal: layer %d has waited for 5 s: %s is full, as its "
                     "receiver takes no messages\n",
                     layer, channel_.c_str());
      }
    }
    if (interrupted != nullptr && interrupted()) return;
    if (waited < kImpatience) {
      std::this_thread::sleep_for(kShortSleep);
      continue;
    }
    std::this_thread::sleep_for(kLongSleep);
    if (syscall(SYS_gettid) == getpid()) continue;
    if (watch == nullptr) watch = std::make_unique<InterruptWatch>();
    if (watch->Interrupted()) {
      // Signals of later layers may be queued already, and would wait as well.
      const std::lock_guard<std::mutex> lock(mutex_);
      prefills_.clear();
      std::fprintf(stderr,
                   "fastattn: send_kv_signal: interrupted: layers from %d on of this step are not "
                   "signalled\n",
                   layer);
      return;
    }
  }
}

void KvSignals::Fail(const std::string& what) {
  if (error_.empty()) error_ = what;
}

std::string KvSignals::TakeError() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string error;
  error.swap(error_);
  return error;
}

}  // namespace fastattn::cpu
