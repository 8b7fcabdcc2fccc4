#include "cpu/merge_decode.h"

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/token_rows.h"

namespace fastattn::cpu {

void MergeDecode(const MergeDecodeParams& p) {
  ParallelFor(p.rows.batch, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (p.seq_lens_encoder[row] > 0 || p.rows.seq_lens_decoder[row] <= 0) continue;
      const NewTokens tokens = NewTokensOf(p.rows, static_cast<int>(row));
      if (tokens.count == 0) continue;
      const int64_t first = tokens.first * p.row_bytes;
      std::memcpy(static_cast<char*>(p.prefill) + first, static_cast<const char*>(p.decode) + first,
                  tokens.count * p.row_bytes);
    }
  });
}

}  // namespace fastattn::cpu
