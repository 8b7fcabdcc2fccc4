#include "params/indexer_topk.h"

#include <algorithm>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/logits_arguments.h"
#include "api/operator.h"
#include "api/ranges.h"
#include "api/sizes.h"
#include "cpu/mqa_logits.h"
#include "cpu/topk.h"
#include "plan/indexer_topk.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/indexer_topk/launch.h"
#include "cuda/mqa_logits/launch.h"
#include "cuda/topk/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kRaggedTopkOp = "indexer_topk";
constexpr const char* kPagedTopkOp = "paged_indexer_topk";

void CheckSizes(const char* op, const LogitsParams& p, int64_t k, int64_t workspace_bytes) {
  CheckRange(op, "k", k, 1, kTopkMaxK);
  if (workspace_bytes < 1) {
    Fail("ValueError", op, "workspace_bytes", "expected at least 1, got ", workspace_bytes);
  }
  if (p.columns > kTopkMaxColumns) {
    Fail("ValueError", op, p.paged ? "max_context_len" : "max_seqlen_k", "expected at most ",
         kTopkMaxColumns, " columns, got ", p.columns);
  }
  CheckedProduct(op, "k", {p.rows, k, static_cast<int64_t>(sizeof(int32_t))});
}

// Allocates the result, or takes `out`.
Tensor SetIndices(const char* op, const OptionalTensor& out, const phi::Place& place, int64_t rows,
                  int64_t k, std::initializer_list<NamedTensor> inputs) {
  const Tensor* given = Get(out);
  if (given == nullptr) return paddle::empty({rows, k}, phi::DataType::INT32, place);
  Arg(op, "out", *given).On(place).Dtype({phi::DataType::INT32}).Dims({rows, k}).Contiguous();
  RequireApart(op, "out", *given, inputs);
  return *given;
}

// Whether the lengths of rows are nowhere as they are.
bool MakesLengths(const LogitsParams& p) { return !p.paged || (!p.lens_per_row && p.next_n > 1); }

// Columns of the longest row. A CPU has the lengths and makes no others, whatever the bound is.
int64_t ColumnsInUse(const LogitsParams& p) {
  int64_t columns = 0;
  for (int64_t row = 0; row < p.rows && columns < p.columns; ++row) {
    const bool absolute = !p.paged && !p.relative;
    columns = std::max(columns, absolute ? p.RangeOf(row).end : TopkLengthOf(p, row));
  }
  return std::min(columns, p.columns);
}

// Calls run(tile) for each tile, until one fails.
template <typename Run>
auto ForEachTile(const IndexerTopkParams& p, Run&& run) {
  decltype(run(p.TileOf(0, 1))) status{};
  for (int64_t first = 0; first < p.logits.rows && status == decltype(status){};) {
    const int64_t count = p.RowsOf(first);
    status = run(p.TileOf(first, count));
    first += count;
  }
  return status;
}

void RunTiles(const char* op, LogitsParams logits, int64_t k, int64_t workspace_bytes,
              const Tensor& q, Tensor* indices) {
  if (logits.rows == 0) return;
  if (!IsGpu(q.place())) {
    RequireCpu(op, q.place());
    logits.columns = ColumnsInUse(logits);
  }
  const bool makes_lengths = MakesLengths(logits);
  const IndexerTopkPlan plan =
      PlanIndexerTopk(logits.rows, logits.columns, workspace_bytes, makes_lengths);
  Tensor workspace = paddle::empty({plan.Words()}, phi::DataType::FLOAT32, q.place());
  IndexerTopkParams p;
  p.logits = logits;
  p.logits.out = MutableData<float>(workspace);
  p.logits.row_stride = plan.row_stride;
  p.indices = MutableData<int32_t>(*indices);
  p.k = k;
  p.tile_rows = plan.tile_rows;
  int32_t* const made = reinterpret_cast<int32_t*>(p.logits.out + plan.tile_rows * plan.row_stride);
  p.lengths = makes_lengths ? made : logits.context_lens;
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(q)) {
    LaunchOnGpu(op, q, [&](cudaStream_t stream) {
      if (makes_lengths) {
        const cudaError_t status = cuda::LaunchTopkLengths(logits, made, stream);
        if (status != cudaSuccess) return status;
      }
      return ForEachTile(p, [&](const IndexerTopkTile& tile) {
        const cudaError_t status = cuda::LaunchMqaLogits(tile.logits, stream);
        return status != cudaSuccess ? status : cuda::LaunchTopk(tile.topk, stream);
      });
    });
    return;
  }
#endif
  Guarded(op, [&] {
    for (int64_t row = 0; makes_lengths && row < logits.rows; ++row) {
      made[row] = static_cast<int32_t>(TopkLengthOf(logits, row));
    }
    ForEachTile(p, [&](const IndexerTopkTile& tile) {
      cpu::MqaLogits(tile.logits, tile.topk.lengths);
      cpu::TopkIndices(tile.topk);
      return 0;
    });
  });
}

Results TopkResults(const Known& in) {
  return {{"indices", {in["q"].size(0), in.Integer("k")}, phi::DataType::INT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kRaggedTopkOp, IndexerTopk, TopkResults,
                  (const Tensor& q, const Tensor& keys, const Tensor& k_scales,
                   const Tensor& weights, const Tensor& starts, const Tensor& ends,
                   const OptionalTensor& q_scales, OptionalTensor& out, int64_t k,
                   int64_t max_seqlen_k, int64_t workspace_bytes, const std::string& quant)) {
  const LogitsParams p = RaggedLogits(kRaggedTopkOp, q, keys, k_scales, weights, starts, ends,
                                      q_scales, max_seqlen_k, quant);
  CheckSizes(kRaggedTopkOp, p, k, workspace_bytes);
  Tensor indices = SetIndices(kRaggedTopkOp, out, q.place(), p.rows, k,
                              {{"q", &q},
                               {"keys", &keys},
                               {"k_scales", &k_scales},
                               {"weights", &weights},
                               {"starts", &starts},
                               {"ends", &ends},
                               {"q_scales", Get(q_scales)}});
  RunTiles(kRaggedTopkOp, p, k, workspace_bytes, q, &indices);
  return {indices};
}

namespace {

Results PagedTopkResults(const Known& in) {
  return {{"indices", {NumQueries(in["q"]), in.Integer("k")}, phi::DataType::INT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kPagedTopkOp, PagedIndexerTopk, PagedTopkResults,
                  (const Tensor& q, const Strided<Tensor>& cache, const Tensor& weights,
                   const Tensor& context_lens, const Strided<Tensor>& block_tables,
                   const OptionalTensor& q_scales, OptionalTensor& out, int64_t k,
                   int64_t max_context_len, int64_t page_size, int64_t workspace_bytes,
                   const std::string& quant)) {
  const LogitsParams p = PagedLogits(kPagedTopkOp, q, cache, weights, context_lens, block_tables,
                                     q_scales, max_context_len, page_size, quant);
  CheckSizes(kPagedTopkOp, p, k, workspace_bytes);
  Tensor indices = SetIndices(kPagedTopkOp, out, q.place(), p.rows, k,
                              {{"q", &q},
                               {"cache", &cache},
                               {"weights", &weights},
                               {"context_lens", &context_lens},
                               {"block_tables", &block_tables},
                               {"q_scales", Get(q_scales)}});
  RunTiles(kPagedTopkOp, p, k, workspace_bytes, q, &indices);
  return {indices};
}

}  // namespace fastattn::api
