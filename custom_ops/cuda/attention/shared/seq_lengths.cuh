// Lengths of a sequence, cut to the tensors: nothing that the metadata says is trusted.
//
// One rule with two forms, which differ in their bounds and in the order of their loads: each is
// part of the measured machine code of its kernels. mma_sm80 (and the clearing of padding) bounds
// all keys of a sequence by 2^30 and loads through the read-only cache; wgmma_sm90 bounds the
// cached keys by 2^29. Ragged keys need no bound of their own there, as the launcher refuses more
// tokens than an int holds.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/attention.h"

namespace fastattn::cuda {

__device__ __forceinline__ int Clamp(int x, int low, int high) { return max(low, min(x, high)); }

// Bounds on positions and windows, so that their sums fit into an int.
struct Sm80Bounds {
  static constexpr int kMaxKeys = 1 << 30;

  // The key after the last one of a window to the right of `position`.
  static __device__ __forceinline__ int WindowEnd(int position, const int& right) {
    return position + 1 + min(right, kMaxKeys - 1);
  }
};

struct Sm90Bounds {
  static constexpr int kMaxKeys = 1 << 29;

  static __device__ __forceinline__ int WindowEnd(int position, const int& right) {
    return position + min(right, kMaxKeys) + 1;
  }
};

// Lengths of a sequence, and which of its keys can be addressed.
struct SeqShape {
  int q_begin;      // the sequence's first token in q
  int q_len;        // its new tokens
  int k_len;        // its keys, those of the new tokens included
  int k_limit;      // keys that can be addressed
  int64_t k_begin;  // ragged K and V: first key
};

__device__ __forceinline__ SeqShape LoadSeqShape(const AttentionParams& p, int b) {
  constexpr int kMaxKeys = Sm80Bounds::kMaxKeys;
  SeqShape seq;
  const SeqMeta& seqs = p.seqs;
  const int q_begin = __ldg(seqs.cu_seqlens_q + b), q_end = __ldg(seqs.cu_seqlens_q + b + 1);
  seq.q_begin = min(max(q_begin, 0), seqs.num_tokens);
  seq.q_len = min(max(q_end, seq.q_begin), seqs.num_tokens) - seq.q_begin;
  if (p.paged) {
    seq.q_len = min(max(__ldg(seqs.seq_lens_this_time + b), 0), seq.q_len);
    seq.k_len = min(max(__ldg(seqs.seq_lens_decoder + b), 0), kMaxKeys - seq.q_len) + seq.q_len;
    seq.k_limit = min(seq.k_len, min(seqs.max_blocks, kMaxKeys / kBlockSize) * kBlockSize);
    seq.k_begin = 0;
  } else {
    const int last = static_cast<int>(min(p.ragged.num_tokens, static_cast<int64_t>(kMaxKeys)));
    const int k_begin = min(max(__ldg(p.ragged.cu_seqlens_k + b), 0), last);
    seq.k_len = min(max(__ldg(p.ragged.cu_seqlens_k + b + 1), k_begin), last) - k_begin;
    seq.k_limit = seq.k_len;
    seq.k_begin = k_begin;
  }
  return seq;
}

// A sequence's first key among the tokens of ragged K and V, and the number of its keys.
__device__ __forceinline__ int2 LoadRaggedKeys(const AttentionParams& p, int b) {
  const int tokens = static_cast<int>(p.ragged.num_tokens);
  const int begin = Clamp(p.ragged.cu_seqlens_k[b], 0, tokens);
  return make_int2(begin, Clamp(p.ragged.cu_seqlens_k[b + 1], begin, tokens) - begin);
}

// Sets q_begin, q_len and k_len, in place.
template <class Seq>
__device__ __forceinline__ void LoadSeqLengths(const AttentionParams& p, int b, Seq* seq) {
  const SeqMeta& seqs = p.seqs;
  seq->q_begin = Clamp(seqs.cu_seqlens_q[b], 0, seqs.num_tokens);
  const int end = Clamp(seqs.cu_seqlens_q[b + 1], seq->q_begin, seqs.num_tokens);
  if (p.paged) {
    seq->q_len = Clamp(seqs.seq_lens_this_time[b], 0, end - seq->q_begin);
    seq->k_len = Clamp(seqs.seq_lens_decoder[b], 0, Sm90Bounds::kMaxKeys) + seq->q_len;
  } else {
    seq->q_len = end - seq->q_begin;
    seq->k_len = LoadRaggedKeys(p, b).y;
  }
}

}  // namespace fastattn::cuda
