// Checked arguments of the indexer's logits: of those themselves, and of the top-k of them.
#pragma once

#include <string>

#include "api/check.h"
#include "api/operator.h"
#include "params/mqa_logits.h"

namespace fastattn::api {

// Everything of a call but `out` and `row_stride`. A negative `max_seqlen_k`: a column for each
// key.
LogitsParams RaggedLogits(const char* op, const Tensor& q, const Tensor& keys,
                          const Tensor& k_scales, const Tensor& weights, const Tensor& starts,
                          const Tensor& ends, const OptionalTensor& q_scales, int64_t max_seqlen_k,
                          const std::string& quant);

LogitsParams PagedLogits(const char* op, const Tensor& q, const Tensor& cache,
                         const Tensor& weights, const Tensor& context_lens,
                         const Tensor& block_tables, const OptionalTensor& q_scales,
                         int64_t max_context_len, int64_t page_size, const std::string& quant);

// Rows of the paged operators' results, of queries [B, next_n, H, D]; -1 is unknown.
inline int64_t NumQueries(const KnownInput& q) {
  return q.size(0) < 0 || q.size(1) < 0 ? -1 : q.size(0) * q.size(1);
}

}  // namespace fastattn::api
