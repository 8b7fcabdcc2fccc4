#include "cpu/merge_decode.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/token_seqs.h"

namespace fastattn::cpu {

void MergeDecode(const MergeDecodeParams& p) {
  // A core copies 16 bytes a nanosecond; sequences count with their average length.
  const int64_t bytes = p.seqs.num_tokens * p.row_bytes;
  const int64_t work = bytes / 16 / std::max(p.seqs.batch, 1);
  ParallelFor(p.seqs.batch, work, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (p.seq_lens_encoder[b] > 0 || p.seqs.seq_lens_decoder[b] <= 0) continue;
      const TokenRange<int64_t> tokens = NewTokensOf(p.seqs, static_cast<int>(b));
      if (tokens.count == 0) continue;
      const int64_t first = tokens.begin * p.row_bytes;
      std::memcpy(static_cast<char*>(p.prefill) + first, static_cast<const char*>(p.decode) + first,
                  tokens.count * p.row_bytes);
    }
  });
}

}  // namespace fastattn::cpu
