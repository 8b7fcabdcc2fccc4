// Output and LSE of the tokens that belong to no sequence.
#pragma once

#include <cstdint>

#include "common/head_dims.h"
#include "cuda/attention/shared/seq_lengths.cuh"
#include "params/attention.h"

namespace fastattn::cuda {

// Tokens [begin, end) get output 0, where p.clear_padding says so, and LSE -inf. All threads take
// part. kOwnValueDim: V may have fewer channels than K.
template <bool kOwnValueDim>
__device__ __forceinline__ void ClearTokens(const AttentionParams& p, int begin, int end) {
  if (begin >= end) return;
  if (p.clear_padding) {
    // A token's output is a multiple of 64 bytes.
    const int64_t bytes = static_cast<int64_t>(p.num_heads) *
                          (kOwnValueDim ? ValueDim(p.head_dim) : p.head_dim) * SizeOf(p.out_dtype);
    char* out = static_cast<char*>(p.out);
    for (int64_t i = begin * bytes / 16 + threadIdx.x; i < end * bytes / 16; i += blockDim.x) {
      reinterpret_cast<uint4*>(out)[i] = make_uint4(0, 0, 0, 0);
    }
  }
  if (p.lse != nullptr) {
    const int64_t tokens = end - begin;
    for (int64_t i = threadIdx.x; i < tokens * p.num_heads; i += blockDim.x) {
      p.lse[i / tokens * p.seqs.num_tokens + begin + i % tokens] = __int_as_float(0xFF800000);
    }
  }
}

// The CTAs share the sequences of a task: each clears what lies between the end of its sequences'
// new tokens and the next sequence, the first one also what lies before all sequences.
template <bool kOwnValueDim>
__device__ __forceinline__ void ClearPadding(const AttentionParams& p, int first_seq,
                                             int num_seqs) {
  const int last_seq = first_seq + num_seqs;
  if (blockIdx.x == 0 && first_seq == 0) {
    ClearTokens<kOwnValueDim>(p, 0,
                              RaggedBegin<Sm80Form>(p.seqs.cu_seqlens_q[0], p.seqs.num_tokens));
  }
  for (int b = first_seq + blockIdx.x; b < last_seq; b += gridDim.x) {
    const SeqShape seq = LoadSeqShape(p, b);
    const int next = b + 1 == p.seqs.batch ? p.seqs.num_tokens
                                           : min(p.seqs.cu_seqlens_q[b + 1], p.seqs.num_tokens);
    ClearTokens<kOwnValueDim>(p, seq.q_begin + seq.q_len, next);
  }
}

}  // namespace fastattn::cuda
