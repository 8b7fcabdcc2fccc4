// New tokens of a step's longest sequence, guessed from what a server's host knows of the step. A
// guess that is too small or too large costs time, as attention_plan.h says, and nothing else.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan/attention_plan.h"

namespace fastattn {

// `tokens`: of the step; `seqs`: sequences that lengths are given for, whether they have tokens or
// not; `decode_tokens`: new tokens of a decoding sequence, at most; `prefills`: whether the server
// says that sequences are in prefill.
//
// A step without prefill has no more tokens than so many decoding sequences. The server's word is
// not enough: FastDeploy's draft models are never told of prefill.
inline int64_t NewTokensOfLongest(int64_t tokens, int64_t seqs, int64_t decode_tokens,
                                  bool prefills) {
  if (!prefills && tokens <= seqs * decode_tokens) return std::min(tokens, decode_tokens);
  // Mostly one chunk beside sequences that decode a token each: then no launch is needed for
  // sequences of a few tokens.
  const int64_t chunk = tokens - (seqs - 1);
  return decode_tokens == 1 && chunk >= kLongSeq ? chunk : tokens;
}

}  // namespace fastattn
