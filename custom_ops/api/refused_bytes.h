// When to ask an allocator again for memory that it did not have.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <mutex>

namespace fastattn {

// Paddle's allocator waits for seconds before it gives up, so not every call may ask. What it
// refused may be there later: after kFirstPause, then after twice as long each time, at most
// kLongestPause. Less than it refused may be there at once. The time is the caller's, from any
// point on.
class RefusedBytes {
 public:
  using Time = std::chrono::milliseconds;

  static constexpr Time kFirstPause{10'000};
  static constexpr Time kLongestPause{600'000};

  bool MayAsk(int64_t bytes, Time now) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return pause_ == Time::zero() || bytes < bytes_ || now >= next_;
  }

  // The allocator gave up; `now` is the time after that.
  void Refuse(int64_t bytes, Time now) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_ = pause_ == Time::zero() ? bytes : std::min(bytes, bytes_);
    pause_ = pause_ == Time::zero() ? kFirstPause : std::min(2 * pause_, kLongestPause);
    next_ = now + pause_;
  }

  // It had so many: no size up to that one is refused any more.
  void Grant(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes >= bytes_) pause_ = Time::zero();
  }

 private:
  mutable std::mutex mutex_;
  int64_t bytes_ = 0;          // the least that was refused
  Time pause_ = Time::zero();  // zero: nothing is refused
  Time next_{};
};

}  // namespace fastattn
