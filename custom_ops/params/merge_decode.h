// FastDeploy's merge_prefill_decode_output: the decoding sequences of one tensor into another.
#pragma once

#include <cstdint>

#include "params/common.h"

namespace fastattn {

// Copies the new tokens of every decoding sequence (seq_lens_encoder 0, seq_lens_decoder > 0);
// other tokens of `prefill` keep their contents.
struct MergeDecodeParams {
  void* prefill = nullptr;                // [T, row_bytes], written
  const void* decode = nullptr;           // [T, row_bytes]
  const int* seq_lens_encoder = nullptr;  // [batch]
  SeqMeta seqs;                           // without blocks and batch ids
  int64_t row_bytes = 0;                  // of one token
};

}  // namespace fastattn
