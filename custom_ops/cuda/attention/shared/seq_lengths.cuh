// Lengths of a sequence, cut to the tensors: nothing that the metadata says is trusted.
#pragma once

#include <cstdint>

#include "params/attention.h"

namespace fastattn::cuda {

__device__ __forceinline__ int Clamp(int x, int low, int high) { return max(low, min(x, high)); }

// Bounds on lengths, positions and windows, so that their sums fit into an int. The kernel families
// differ: mma_sm80 bounds all keys of a sequence by 2^30 and loads lengths through the read-only
// cache; wgmma_sm90 bounds the cached keys by 2^29 and loads lengths plainly. They are arguments of
// one rule, and not one value, because each is part of a family's measured machine code.
struct Sm80Bounds {
  static constexpr int kMaxKeys = 1 << 30;
  static constexpr int kMaxWindowLeft = kMaxKeys;
  static constexpr int kMaxWindowRight = kMaxKeys - 1;

  static __device__ __forceinline__ int Load(const int* length) { return __ldg(length); }
  static __device__ __forceinline__ int Cut(int x, int low, int high) {
    return min(max(x, low), high);
  }
  static __device__ __forceinline__ int MaxCached(int q_len) { return kMaxKeys - q_len; }
  static __device__ __forceinline__ int MaxRagged(int64_t num_tokens) {
    return static_cast<int>(min(num_tokens, static_cast<int64_t>(kMaxKeys)));
  }
};

struct Sm90Bounds {
  static constexpr int kMaxKeys = 1 << 29;
  static constexpr int kMaxWindowLeft = kMaxKeys;
  static constexpr int kMaxWindowRight = kMaxKeys;

  static __device__ __forceinline__ int Load(const int* length) { return *length; }
  static __device__ __forceinline__ int Cut(int x, int low, int high) {
    return Clamp(x, low, high);
  }
  static __device__ __forceinline__ int MaxCached(int) { return kMaxKeys; }
  // The launcher refuses more tokens than an int holds.
  static __device__ __forceinline__ int MaxRagged(int64_t num_tokens) {
    return static_cast<int>(num_tokens);
  }
};

// Keys [begin, end).
struct KeyRange {
  int begin;
  int end;
};

// A sequence's keys among the tokens of ragged K and V.
template <class Bounds>
__device__ __forceinline__ KeyRange LoadRaggedKeys(const AttentionParams& p, int batch_idx) {
  const int last = Bounds::MaxRagged(p.ragged.num_tokens);
  const int begin = Bounds::Cut(Bounds::Load(p.ragged.cu_seqlens_k + batch_idx), 0, last);
  const int end = Bounds::Cut(Bounds::Load(p.ragged.cu_seqlens_k + batch_idx + 1), begin, last);
  return {begin, end};
}

struct SeqLengths {
  int q_begin;
  int q_len;
  int k_len;
};

// Sets q_begin (the sequence's first token in q), q_len (its new tokens) and k_len (its keys, those
// of the new tokens included). They are set in place because the kernels' machine code depends on
// it.
template <class Bounds, class Seq>
__device__ __forceinline__ void LoadSeqLengths(const AttentionParams& p, int batch_idx, Seq* seq) {
  const SeqMeta& seqs = p.seqs;
  const int b = batch_idx;
  seq->q_begin = Bounds::Cut(Bounds::Load(seqs.cu_seqlens_q + b), 0, seqs.num_tokens);
  const int end =
      Bounds::Cut(Bounds::Load(seqs.cu_seqlens_q + b + 1), seq->q_begin, seqs.num_tokens);
  if (p.paged) {
    seq->q_len = Bounds::Cut(Bounds::Load(seqs.seq_lens_this_time + b), 0, end - seq->q_begin);
    seq->k_len =
        Bounds::Cut(Bounds::Load(seqs.seq_lens_decoder + b), 0, Bounds::MaxCached(seq->q_len)) +
        seq->q_len;
  } else {
    seq->q_len = end - seq->q_begin;
    const KeyRange keys = LoadRaggedKeys<Bounds>(p, b);
    seq->k_len = keys.end - keys.begin;
  }
}

}  // namespace fastattn::cuda
