// Counters that the rope_write_cache_kv of a backend's step sets to 0 for its paged_attention,
// whose CTAs then join their partial results without a kernel of its own for that. An operator that
// is called alone has none: nobody could set them to 0 without a kernel more.
#pragma once

#include "api/check.h"

namespace fastattn::api {

struct StepArrivals {
  Tensor counters;  // undefined until the kernel that sets them to 0 is launched
};

// The step that this thread runs, or null. _direct sets it through DirectTable.
StepArrivals*& CurrentStep();

// Takes part in the step of this thread while it lives.
class StepScope {
 public:
  StepScope(StepArrivals*& current, StepArrivals* step) : current_(current) { current_ = step; }
  ~StepScope() { current_ = nullptr; }
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;

 private:
  StepArrivals*& current_;
};

}  // namespace fastattn::api
