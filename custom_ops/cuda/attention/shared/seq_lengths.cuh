// Lengths of a sequence as the attention kernels read them, by the rules of common/seq_lengths.h.
//
// One reader for each family of kernels: what they load first, and through which cache, is part of
// the machine code that they were measured with.
#pragma once

#include <cstdint>

#include "common/seq_lengths.h"
#include "cuda/attention/shared/forms.cuh"
#include "params/attention.h"

namespace fastattn::cuda {

// Lengths of a sequence, and which of its keys can be addressed.
struct SeqShape {
  int q_begin;      // the sequence's first token in q
  int q_len;        // its new tokens
  int k_len;        // its keys, those of the new tokens included
  int k_limit;      // keys that can be addressed
  int64_t k_begin;  // ragged K and V: first key
};

// mma_sm80: through the read-only cache.
__device__ __forceinline__ SeqShape LoadSeqShape(const AttentionParams& p, int b) {
  using Form = Sm80Form;
  SeqShape seq;
  const SeqMeta& seqs = p.seqs;
  const int start = __ldg(seqs.cu_seqlens_q + b), end = __ldg(seqs.cu_seqlens_q + b + 1);
  seq.q_begin = RaggedBegin<Form>(start, seqs.num_tokens);
  seq.q_len = RaggedEnd<Form>(seq.q_begin, end, seqs.num_tokens) - seq.q_begin;
  if (p.paged) {
    seq.q_len = NewTokens<Form>(__ldg(seqs.seq_lens_this_time + b), seq.q_len);
    seq.k_len = PagedKeys<Form>(__ldg(seqs.seq_lens_decoder + b), seq.q_len, kMaxKeys);
    seq.k_limit = min(seq.k_len, KeysInTable<int>(seqs.max_blocks));
    seq.k_begin = 0;
  } else {
    const int tokens = static_cast<int>(min(p.ragged.num_tokens, int64_t{kMaxKeys}));
    const int begin = RaggedBegin<Form>(__ldg(p.ragged.cu_seqlens_k + b), tokens);
    seq.k_len = RaggedEnd<Form>(begin, __ldg(p.ragged.cu_seqlens_k + b + 1), tokens) - begin;
    seq.k_limit = seq.k_len;
    seq.k_begin = begin;
  }
  return seq;
}

// wgmma_sm90: a sequence's keys among the tokens of ragged K and V. They need no bound of their
// own, as the launcher refuses more tokens than an int holds.
__device__ __forceinline__ TokenRange<int> LoadRaggedKeys(const AttentionParams& p, int b) {
  const int tokens = static_cast<int>(p.ragged.num_tokens);
  return RaggedTokens(p.ragged.cu_seqlens_k[b], p.ragged.cu_seqlens_k[b + 1], tokens);
}

// wgmma_sm90: sets q_begin, q_len and k_len, in place.
template <class Seq>
__device__ __forceinline__ void LoadSeqLengths(const AttentionParams& p, int b, Seq* seq) {
  const SeqMeta& seqs = p.seqs;
  seq->q_begin = RaggedBegin(seqs.cu_seqlens_q[b], seqs.num_tokens);
  const int end = RaggedEnd(seq->q_begin, seqs.cu_seqlens_q[b + 1], seqs.num_tokens);
  if (p.paged) {
    seq->q_len = NewTokens(seqs.seq_lens_this_time[b], end - seq->q_begin);
    seq->k_len = PagedKeys(seqs.seq_lens_decoder[b], seq->q_len, kMaxCachedKeys + seq->q_len);
  } else {
    seq->q_len = end - seq->q_begin;
    seq->k_len = LoadRaggedKeys(p, b).count;
  }
}

}  // namespace fastattn::cuda
