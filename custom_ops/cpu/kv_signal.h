// FastDeploy's signals that a layer's cache is complete.
//
// A server that prefills for other servers has a process beside each worker that sends the blocks
// of a layer on as soon as they are written. It waits for the worker's signals, one a layer, which
// come over one of two channels:
//   "queue:<key>"           System V messages (FastDeploy's mode per_chunk)
//   "shm:<layer>:<step>"    two integers in shared memory of these names (per_query)
//   ""                      nobody waits
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace fastattn::cpu {

// The sender's end of a channel. A process has one for each, which is never destroyed: work that is
// queued on a GPU refers to it.
class KvSignals {
 public:
  // Sequences of a step at most: what a message has room for.
  static constexpr int kMostSeqs = 512;

  KvSignals() = default;
  KvSignals(const KvSignals&) = delete;
  KvSignals& operator=(const KvSignals&) = delete;
  virtual ~KvSignals() = default;

  // The end of `channel`, opened by the first call; null for "". Throws std::invalid_argument for a
  // channel of neither form, std::runtime_error if it cannot be opened.
  static KvSignals* Of(const std::string& channel);

  // Who may use the queues and the shared memory that this process makes from now on: a file's
  // mode, 0600 at first. What the receiver has made already keeps its own.
  static void SetMode(int mode);

  // A step begins. Its sequences that prefill are those with new_tokens[i] > 0; a step without any
  // sends nothing.
  void Begin(const int32_t* new_tokens, const int32_t* cached_tokens, int batch) noexcept;

  // A step begins that sends nothing: a warm-up.
  void BeginSilent() noexcept;

  // The caches of a layer are complete. Layers come in ascending order; one that has been signalled
  // in this step, or is below one, is not signalled again.
  //
  // Waits while the queue is full: it has room for a few messages, and none may be lost.
  // `interrupted` (may be null) is asked again and again meanwhile, without a lock held. Once it
  // says yes, the wait ends, and the layer counts as not signalled. Once SIGINT has come while a
  // thread waits that is not the main one, the step's signals end. After 5 s a line is logged.
  void Send(int layer, bool (*interrupted)() = nullptr) noexcept;

  // What went wrong since the last call, empty if nothing did. Senders on a GPU's stream have
  // nobody to throw at.
  std::string TakeError();

 protected:
  struct Prefill {
    int32_t slot;  // index of the sequence in the step
    int32_t cached_tokens;
    int32_t new_tokens;
  };

  virtual void SendBegin() {}
  // False where there is no room now.
  virtual bool TrySendLayer(int layer) = 0;
  void Fail(const std::string& what);
  const std::vector<Prefill>& prefills() const { return prefills_; }

 private:
  std::mutex mutex_;
  std::vector<Prefill> prefills_;  // empty: the step sends nothing
  int next_layer_ = 0;
  bool told_full_ = false;
  std::string error_;
  std::string channel_;
};

}  // namespace fastattn::cpu
