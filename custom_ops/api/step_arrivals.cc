#include "api/step_arrivals.h"

#if defined(FASTATTN_WITH_CUDA)

#include <algorithm>

namespace fastattn::api {

namespace {

// A layer's step without host lengths would ask Paddle for two tensors more than one with them,
// some 3 us of the host. So a thread keeps its last buffer: the kernels of its next step follow on
// the same stream. A step on another stream, or one that a graph captures, gets a buffer of its
// own, as its kernels may run at any time.
struct Kept {
  Tensor buffer;
  cudaStream_t stream = nullptr;
  int64_t floats = 0;  // the largest workspace that a step of this thread has asked for
};

Kept& KeptByThread() {
  thread_local Kept kept;
  return kept;
}

bool IsCaptured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // The default stream may not be asked while another one is captured.
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

constexpr int64_t kAlignment = 64;  // ints: 256 bytes

}  // namespace

void LendBuffer(const Tensor& like, cudaStream_t stream, int64_t num_counters, StepArrivals* step) {
  Kept& kept = KeptByThread();
  const bool captured = IsCaptured(stream);
  step->num_counters = num_counters;
  step->workspace = (num_counters + kAlignment - 1) / kAlignment * kAlignment;
  const int64_t ints = step->workspace + kept.floats;
  if (!captured && kept.buffer.defined() && kept.stream == stream &&
      kept.buffer.place() == like.place() && kept.buffer.numel() >= ints) {
    step->buffer = kept.buffer;
    return;
  }
  step->buffer = paddle::empty({ints}, phi::DataType::INT32, like.place());
  if (!captured) {
    kept.buffer = step->buffer;
    kept.stream = stream;
  }
}

float* LendWorkspace(int64_t floats, StepArrivals* step) {
  Kept& kept = KeptByThread();
  kept.floats = std::max(kept.floats, floats);
  if (step->buffer.numel() - step->workspace < floats) return nullptr;
  return reinterpret_cast<float*>(MutableData<int>(step->buffer) + step->workspace);
}

}  // namespace fastattn::api

#endif  // FASTATTN_WITH_CUDA
