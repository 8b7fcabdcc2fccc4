// FastDeploy's signals that a layer's cache is complete, in the order of the stream that writes it.
#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/process.h"
#include "cpu/kv_signal.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/host_calls/launch.h"
#endif

namespace fastattn::api {

namespace {

using cpu::KvSignals;

constexpr const char* kBegin = "begin_kv_signals";
constexpr const char* kSend = "send_kv_signal";

// What fastattn_set_interrupt_check() set.
std::atomic<bool (*)()> interrupt_check{nullptr};

// The sender's end of a channel, or null. Raises what a signal sent before ran into.
KvSignals* SignalsOf(const char* op, const std::string& channel) {
  EndOfChecks();  // it may open a queue
  KvSignals* signals = nullptr;
  std::string error;
  try {
    signals = KvSignals::Of(channel);
    if (signals != nullptr) error = signals->TakeError();
  } catch (const std::invalid_argument& refused) {
    Fail("ValueError", op, "channel", refused.what());
  } catch (const std::runtime_error& failed) {
    error = failed.what();
  }
  if (!error.empty()) Fail("RuntimeError", op, "channel", channel, ": ", error);
  return signals;
}

void CheckLengths(const char* name, const Tensor& tensor, int batch, const phi::Place& place) {
  Arg(kBegin, name, tensor).On(place).Dtype({phi::DataType::INT32}).Contiguous();
  if (tensor.numel() < batch) {
    Fail("ValueError", kBegin, name, "expected at least batch = ", batch, " elements, got shape ",
         ShapeText(SizesOf(tensor)));
  }
}

#if defined(FASTATTN_WITH_CUDA)

// What a stream's host call works on. Calls that are captured in a graph refer to it for as long as
// the graph lives, so there is one for each value, and none is freed.
struct HostCall {
  KvSignals* signals;
  int value;               // layer, or number of sequences
  const int32_t* lengths;  // new tokens, then cached tokens, kMostSeqs each
};

HostCall* HostCallFor(KvSignals* signals, int value, const int32_t* lengths) {
  static std::mutex mutex;
  static auto& calls = *new std::map<std::pair<const void*, int>, HostCall>();
  const std::lock_guard<std::mutex> lock(mutex);
  // Lengths have an address of their own, so a step's key is never a layer's.
  const void* owner = lengths != nullptr ? static_cast<const void*>(lengths) : signals;
  return &calls.insert({{owner, value}, {signals, value, lengths}}).first->second;
}

void BeginOnHost(void* argument) {
  const auto& call = *static_cast<const HostCall*>(argument);
  call.signals->Begin(call.lengths, call.lengths + KvSignals::kMostSeqs, call.value);
}

void BeginSilentOnHost(void* argument) {
  static_cast<const HostCall*>(argument)->signals->BeginSilent();
}

void SendOnHost(void* argument) {
  const auto& call = *static_cast<const HostCall*>(argument);
  call.signals->Send(call.value);
}

// Host memory for the lengths of a step. Copies into it wait for the calls of the step before,
// which come earlier in the stream.
int32_t* LengthsFor(KvSignals* signals) {
  static std::mutex mutex;
  static auto& lengths = *new std::map<KvSignals*, void*>();
  const std::lock_guard<std::mutex> lock(mutex);
  void*& memory = lengths[signals];
  if (memory == nullptr) {
    constexpr size_t kBytes = 2 * KvSignals::kMostSeqs * sizeof(int32_t);
    CheckCuda(kBegin, cuda::AllocateHost(kBytes, &memory));
  }
  return static_cast<int32_t*>(memory);
}

void BeginOnGpu(KvSignals* signals, const Tensor& new_tokens, const Tensor& cached_tokens,
                int batch, bool silent) {
  DeviceGuard guard(kBegin, new_tokens.place().GetDeviceId());
  const cudaStream_t stream = StreamOf(new_tokens);
  CheckCuda(kBegin, cuda::JoinHostCalls(stream));
  if (silent) {
    HostCall* call = HostCallFor(signals, -1, nullptr);
    CheckCuda(kBegin, cuda::LaunchHostCall(BeginSilentOnHost, call, stream));
    return;
  }
  int32_t* lengths = LengthsFor(signals);
  const size_t bytes = static_cast<size_t>(batch) * sizeof(int32_t);
  const void* sources[] = {Data(new_tokens), Data(cached_tokens)};
  for (int i = 0; i < 2; ++i) {
    int32_t* to = lengths + i * KvSignals::kMostSeqs;
    CheckCuda(kBegin, cuda::LaunchCopyToHost(sources[i], to, bytes, stream));
  }
  HostCall* call = HostCallFor(signals, batch, lengths);
  CheckCuda(kBegin, cuda::LaunchHostCall(BeginOnHost, call, stream));
}

#endif

Results BeginResults(const Known&) { return {{"opened", {1}, phi::DataType::INT32}}; }

}  // namespace

FASTATTN_OPERATOR(Outputs, kBegin, BeginKvSignals, BeginResults,
                  (const Tensor& seq_lens_encoder, const Tensor& seq_lens_decoder, int batch,
                   bool silent, const std::string& channel)) {
  if (batch < 0 || batch > KvSignals::kMostSeqs) {
    Fail("ValueError", kBegin, "batch", "expected 0 to ", KvSignals::kMostSeqs,
         " sequences, which a message has room for, got ", batch);
  }
  const phi::Place place = seq_lens_encoder.place();
  CheckLengths("seq_lens_encoder", seq_lens_encoder, batch, place);
  CheckLengths("seq_lens_decoder", seq_lens_decoder, batch, place);
  KvSignals* signals = SignalsOf(kBegin, channel);
  Tensor done = paddle::empty({1}, phi::DataType::INT32, phi::CPUPlace());
  *done.data<int32_t>() = signals == nullptr ? 0 : 1;
  if (signals == nullptr) return {done};
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(seq_lens_encoder)) {
    BeginOnGpu(signals, seq_lens_encoder, seq_lens_decoder, batch, silent);
    return {done};
  }
#endif
  RequireCpu(kBegin, place);
  if (silent) {
    signals->BeginSilent();
  } else {
    signals->Begin(Data<int32_t>(seq_lens_encoder), Data<int32_t>(seq_lens_decoder), batch);
  }
  return {done};
}

FASTATTN_OPERATOR(void, kSend, SendKvSignal, NoResults,
                  (Tensor & key_cache, Tensor& value_cache, int layer_id,
                   const std::string& channel)) {
  if (layer_id < 0) Fail("ValueError", kSend, "layer_id", "expected at least 0, got ", layer_id);
  Arg(kSend, "key_cache", key_cache);
  Arg(kSend, "value_cache", value_cache).On(key_cache.place());
  ToDType(kSend, "key_cache", key_cache.dtype());
  ToDType(kSend, "value_cache", value_cache.dtype());
  KvSignals* signals = SignalsOf(kSend, channel);
  if (signals == nullptr) return;
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(key_cache)) {
    LaunchOnGpu(kSend, key_cache, [&](cudaStream_t stream) {
      return cuda::LaunchHostCallBeside(SendOnHost, HostCallFor(signals, layer_id, nullptr),
                                        stream);
    });
    return;
  }
#endif
  RequireCpu(kSend, key_cache.place());
  signals->Send(layer_id, interrupt_check);
}

}  // namespace fastattn::api

void fastattn_set_interrupt_check(bool (*check)()) { fastattn::api::interrupt_check = check; }

void fastattn_set_kv_signal_mode(int mode) { fastattn::cpu::KvSignals::SetMode(mode); }
