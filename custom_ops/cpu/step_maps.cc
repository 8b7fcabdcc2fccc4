#include "cpu/step_maps.h"

#include "cpu/parallel.h"

namespace fastattn::cpu {

void TokenMaps(const TokenMapsParams& p) {
  ParallelFor(p.num_tokens, 8, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) p.Write(token);
  });
}

void QueryRows(const QueryRowsParams& p) {
  ParallelFor(p.rows, p.max_blocks + 8 * p.tile, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t seq = p.SeqOf(row);
      for (int64_t query = 0; query < p.tile; ++query) p.WriteQuery(seq, row, query);
      const int32_t* table = p.TableOf(seq);
      int32_t* to = p.row_tables + row * p.max_blocks;
      for (int64_t i = 0; i < p.max_blocks; ++i) to[i] = table == nullptr ? kNoIndex : table[i];
    }
  });
  for (int64_t token = 0; token < p.num_tokens; ++token) p.WriteToken(token);
}

}  // namespace fastattn::cpu
