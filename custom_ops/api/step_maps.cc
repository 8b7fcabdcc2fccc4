#include "cpu/step_maps.h"

#include <algorithm>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/ranges.h"
#include "api/slot_table.h"
#include "params/step_maps.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/index_maps/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kTokensOp = "token_maps";
constexpr const char* kRowsOp = "query_rows";
// Queries of a row, at most: a row's CTA has a thread for each.
constexpr int64_t kMostQueries = 64;

// Checks a server's buffer, which may have any shape and more elements than are read.
const Arg& CheckBuffer(const Arg& arg, const char* op, const char* name, const Tensor& tensor,
                       const char* of, int64_t count, const phi::Place& place) {
  arg.On(place).Contiguous();
  if (tensor.numel() < count) {
    Fail("ValueError", op, name, "expected values of ", count, " ", of, ", got shape ",
         ShapeText(SizesOf(tensor)));
  }
  return arg;
}

IndexArray ParseTokens(const char* op, const char* name, const Tensor& tensor, int64_t num_tokens,
                       const phi::Place& place) {
  const Arg arg(op, name, tensor);
  CheckBuffer(arg, op, name, tensor, "tokens", num_tokens, place)
      .Dtype({phi::DataType::INT32, phi::DataType::INT64});
  return {Data(tensor), tensor.dtype() == phi::DataType::INT64};
}

// Starts of sequences; returns the number of these.
int64_t ParseStarts(const char* op, const Tensor& starts, const phi::Place& place) {
  Arg(op, "cu_seqlens_q", starts).On(place).Dtype({phi::DataType::INT32}).Rank(1).Contiguous();
  const int64_t size = SizesOf(starts)[0];
  if (size < 1) {
    Fail("ValueError", op, "cu_seqlens_q", "expected shape [B + 1], got ",
         ShapeText(SizesOf(starts)));
  }
  RequireFits(op, "cu_seqlens_q", size);
  return size - 1;
}

Tensor NewIndices(const char* op, const Shape& shape, const phi::Place& place) {
  const int64_t count = CheckedProduct(op, "num_tokens", Sizes(shape));
  CheckedProduct(op, "num_tokens", {count, static_cast<int64_t>(sizeof(int32_t))});
  return paddle::empty(shape, phi::DataType::INT32, place);
}

// A step without sequences has a row all the same: operators refuse to be without any.
int64_t RowsOf(int64_t num_tokens, int64_t batch, int64_t tile) {
  if (num_tokens < 0 || batch < 0 || tile < 1) return -1;
  return tile == 1 ? num_tokens : num_tokens / tile + std::max<int64_t>(batch, 1);
}

Results TokenResults(const Known& in) {
  const Shape tokens = {in.Integer("num_tokens")};
  return {{"seqs", tokens, phi::DataType::INT32},
          {"positions", tokens, phi::DataType::INT32},
          {"slots", tokens, phi::DataType::INT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kTokensOp, TokenMaps, TokenResults,
                  (const Tensor& batch_ids, const Tensor& block_tables, const Tensor& cu_seqlens_q,
                   const Tensor& seq_lens_decoder, const OptionalTensor& position_ids,
                   int64_t num_tokens, int64_t block_size, int64_t num_blocks)) {
  const Arg first(kTokensOp, "cu_seqlens_q", cu_seqlens_q);
  const phi::Place place = cu_seqlens_q.place();
  CheckRange(kTokensOp, "num_tokens", num_tokens, 0);
  CheckRange(kTokensOp, "block_size", block_size, 1);
  CheckRange(kTokensOp, "num_blocks", num_blocks, -1);
  TokenMapsParams p;
  p.num_tokens = num_tokens;
  p.batch = ParseStarts(kTokensOp, cu_seqlens_q, place);
  p.batch_ids = ParseTokens(kTokensOp, "batch_ids", batch_ids, num_tokens, place);
  if (Get(position_ids) != nullptr) {
    p.given = ParseTokens(kTokensOp, "position_ids", *Get(position_ids), num_tokens, place);
  }
  const Arg cached(kTokensOp, "seq_lens_decoder", seq_lens_decoder);
  CheckBuffer(cached, kTokensOp, "seq_lens_decoder", seq_lens_decoder, "sequences", p.batch, place)
      .Dtype({phi::DataType::INT32});
  p.slots = ParseSlotTable(kTokensOp, block_tables, place, block_size, num_blocks);
  p.starts = Data<int32_t>(cu_seqlens_q);
  p.cached = Data<int32_t>(seq_lens_decoder);
  Tensor seqs = NewIndices(kTokensOp, {num_tokens}, place);
  Tensor positions = NewIndices(kTokensOp, {num_tokens}, place);
  Tensor slots = NewIndices(kTokensOp, {num_tokens}, place);
  p.seqs = MutableData<int32_t>(seqs);
  p.positions = MutableData<int32_t>(positions);
  p.places = MutableData<int32_t>(slots);
  const std::vector<Tensor> results = {seqs, positions, slots};
  if (num_tokens == 0) return results;
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(cu_seqlens_q)) {
    LaunchOnGpu(kTokensOp, cu_seqlens_q,
                [&](cudaStream_t stream) { return cuda::LaunchTokenMaps(p, stream); });
    return results;
  }
#endif
  RequireCpu(kTokensOp, place);
  cpu::TokenMaps(p);
  return results;
}

namespace {

Results RowResults(const Known& in) {
  const int64_t tile = in.Integer("tile"), tokens = in["positions"].size(0);
  const int64_t starts = in["cu_seqlens_q"].size(0);
  const int64_t rows = tile == 1 ? tokens : RowsOf(tokens, starts < 1 ? -1 : starts - 1, tile);
  return {{"lengths", {rows, tile}, phi::DataType::INT32},
          {"row_tables", {rows, in["block_tables"].size(1)}, phi::DataType::INT32},
          {"token_of_query", {rows < 0 ? -1 : rows * tile}, phi::DataType::INT32},
          {"query_of_token", {tokens}, phi::DataType::INT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kRowsOp, QueryRows, RowResults,
                  (const Tensor& batch_ids, const Tensor& positions, const Tensor& block_tables,
                   const Tensor& cu_seqlens_q, int64_t tile)) {
  const Arg first(kRowsOp, "cu_seqlens_q", cu_seqlens_q);
  const phi::Place place = cu_seqlens_q.place();
  CheckRange(kRowsOp, "tile", tile, 1, kMostQueries);
  Arg(kRowsOp, "positions", positions).On(place).Dtype({phi::DataType::INT32}).Rank(1).Contiguous();
  Arg(kRowsOp, "block_tables", block_tables)
      .On(place)
      .Dtype({phi::DataType::INT32})
      .Rank(2)
      .Contiguous();
  QueryRowsParams p;
  p.num_tokens = SizesOf(positions)[0];
  RequireFits(kRowsOp, "positions", p.num_tokens);
  p.batch = ParseStarts(kRowsOp, cu_seqlens_q, place);
  p.batch_ids = ParseTokens(kRowsOp, "batch_ids", batch_ids, p.num_tokens, place);
  p.num_tables = SizesOf(block_tables)[0];
  p.max_blocks = SizesOf(block_tables)[1];
  p.tile = tile;
  p.rows = RowsOf(p.num_tokens, p.batch, tile);
  Tensor lengths = NewIndices(kRowsOp, {p.rows, tile}, place);
  Tensor tables = NewIndices(kRowsOp, {p.rows, p.max_blocks}, place);
  Tensor tokens = NewIndices(kRowsOp, {p.rows * tile}, place);
  Tensor queries = NewIndices(kRowsOp, {p.num_tokens}, place);
  p.positions = Data<int32_t>(positions);
  p.starts = Data<int32_t>(cu_seqlens_q);
  p.tables = Data<int32_t>(block_tables);
  p.lengths = MutableData<int32_t>(lengths);
  p.row_tables = MutableData<int32_t>(tables);
  p.token_of_query = MutableData<int32_t>(tokens);
  p.query_of_token = MutableData<int32_t>(queries);
  const std::vector<Tensor> results = {lengths, tables, tokens, queries};
  if (p.rows == 0) return results;  // no tokens
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(cu_seqlens_q)) {
    LaunchOnGpu(kRowsOp, cu_seqlens_q,
                [&](cudaStream_t stream) { return cuda::LaunchQueryRows(p, stream); });
    return results;
  }
#endif
  RequireCpu(kRowsOp, place);
  cpu::QueryRows(p);
  return results;
}

}  // namespace fastattn::api
