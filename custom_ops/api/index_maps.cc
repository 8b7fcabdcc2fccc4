#include "cpu/index_maps.h"

#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/ranges.h"
#include "api/slot_table.h"
#include "params/index_maps.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/index_maps/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kSlotsOp = "topk_to_slots";
constexpr const char* kWindowOp = "window_indices";
constexpr const char* kShortOp = "short_context_indices";
constexpr const char* kCombineOp = "combine_topk_window";

const std::initializer_list<phi::DataType> kIndexDtypes = {phi::DataType::INT32,
                                                           phi::DataType::INT64};

IndexArray ParseIndexArray(const char* op, const char* name, const Tensor& tensor, int64_t rows,
                           const phi::Place& place) {
  Arg(op, name, tensor).On(place).Dtype(kIndexDtypes).Dims({rows}).Contiguous();
  return {Data(tensor), tensor.dtype() == phi::DataType::INT64};
}

RowSequences ParseSequences(const char* op, const OptionalTensor& ids, int64_t rows,
                            const phi::Place& place, const char* name = "batch_ids") {
  if (Get(ids) == nullptr) return {};
  return {ParseIndexArray(op, name, *Get(ids), rows, place)};
}

// [rows, columns] of int32, columns side by side.
void CheckList(const char* op, const char* name, const Tensor& list, int64_t rows,
               const phi::Place& place) {
  Arg(op, name, list).On(place).Dtype({phi::DataType::INT32}).Dims({rows, -1}).LastDimContiguous();
  RequireFits(op, name, SizesOf(list)[1]);
}

int64_t RowStride(const Tensor& tensor) { return tensor.numel() == 0 ? 0 : StridesOf(tensor)[0]; }

// The results of a map, and where they lie.
struct MapResult {
  Tensor indices, lengths;
  MapOutput out;
};

MapResult NewResult(const char* op, const char* name, int64_t rows, int64_t columns, int64_t width,
                    const phi::Place& place) {
  CheckedProduct(op, name, {rows, width, static_cast<int64_t>(sizeof(int32_t))});
  MapResult result;
  result.indices = paddle::empty({rows, width}, phi::DataType::INT32, place);
  result.lengths = paddle::empty({rows}, phi::DataType::INT32, place);
  result.out.indices = MutableData<int32_t>(result.indices);
  result.out.lengths = MutableData<int32_t>(result.lengths);
  result.out.rows = rows;
  result.out.columns = columns;
  result.out.width = width;
  return result;
}

// The first of some tensors that has elements: an empty one may have no place.
const Tensor& WithElements(const Tensor& a, const Tensor& b) { return a.numel() > 0 ? a : b; }

// Runs a map where a tensor is.
template <typename Map>
std::vector<Tensor> RunMap(const char* op, const Tensor& where, const Map& map, bool compact,
                           const MapResult& result) {
  if (result.out.rows == 0) return {result.indices, result.lengths};
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(where)) {
    LaunchOnGpu(op, where, [&](cudaStream_t stream) {
      return cuda::LaunchIndexMap(map, result.out, compact, stream);
    });
    return {result.indices, result.lengths};
  }
#endif
  RequireCpu(op, where.place());
  Guarded(op, [&] { cpu::RunIndexMap(map, result.out, compact); });
  return {result.indices, result.lengths};
}

// Columns of two lists, rounded up to a multiple; -1 if one of them is not known.
int64_t PaddedWidth(int64_t first, int64_t second, int64_t multiple) {
  if (first < 0 || second < 0 || multiple < 1) return -1;
  return (first + second + multiple - 1) / multiple * multiple;
}

// A map of each row to as many indices.
Results MapResults(const char* name, int64_t rows, int64_t width) {
  return {{name, {rows, width}, phi::DataType::INT32}, {"lengths", {rows}, phi::DataType::INT32}};
}

Results SlotsResults(const Known& in) {
  const KnownInput &indices = in["indices"], &row_ids = in["row_ids"];
  return MapResults("slots", row_ids.given() ? row_ids.size(0) : indices.size(0), indices.size(1));
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kSlotsOp, TopkToSlots, SlotsResults,
                  (const Strided<Tensor>& indices, const Tensor& block_tables,
                   const OptionalTensor& batch_ids, const OptionalTensor& row_ids,
                   int64_t block_size, int64_t block_stride, int64_t num_blocks, bool compact,
                   int64_t rank, int64_t world_size, int64_t interleave)) {
  const Arg arg(kSlotsOp, "indices", indices), tables_arg(kSlotsOp, "block_tables", block_tables);
  const Tensor& where = WithElements(indices, block_tables);
  const phi::Place place = where.place();
  arg.Dtype({phi::DataType::INT32}).Rank(2);
  const int64_t num_rows = SizesOf(indices)[0], columns = SizesOf(indices)[1];
  CheckList(kSlotsOp, "indices", indices, num_rows, place);
  int64_t rows = num_rows;
  if (Get(row_ids) != nullptr) {
    Arg(kSlotsOp, "row_ids", *Get(row_ids)).Rank(1);
    rows = SizesOf(*Get(row_ids))[0];
  }
  CheckRange(kSlotsOp, "block_size", block_size, 1);
  CheckRange(kSlotsOp, "block_stride", block_stride, block_size);
  CheckRange(kSlotsOp, "num_blocks", num_blocks, -1);
  CheckRange(kSlotsOp, "world_size", world_size, 1);
  CheckRange(kSlotsOp, "interleave", interleave, 1);
  CheckRange(kSlotsOp, "rank", rank, 0);
  if (rank >= world_size) {
    Fail("ValueError", kSlotsOp, "rank", "expected less than world_size = ", world_size, ", got ",
         rank);
  }
  TopkToSlotsParams p;
  p.indices = Data<int32_t>(indices);
  p.num_rows = num_rows;
  p.row_stride = RowStride(indices);
  p.sources = ParseSequences(kSlotsOp, row_ids, rows, place, "row_ids");
  p.seqs = ParseSequences(kSlotsOp, batch_ids, rows, place);
  p.slots = ParseSlotTable(kSlotsOp, block_tables, place, block_size, num_blocks);
  p.slots.block_stride = block_stride;
  p.rank = static_cast<int32_t>(rank);
  p.world_size = static_cast<int32_t>(world_size);
  p.interleave = static_cast<int32_t>(interleave);
  return RunMap(kSlotsOp, where, p, compact,
                NewResult(kSlotsOp, "indices", rows, columns, columns, place));
}

namespace {

Results WindowResults(const Known& in) {
  return MapResults("indices", in["positions"].size(0), in.Integer("window"));
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kWindowOp, WindowIndices, WindowResults,
                  (const Tensor& positions, const OptionalTensor& batch_ids,
                   const OptionalTensor& block_tables, const OptionalTensor& starts, int64_t window,
                   int64_t block_size, int64_t num_blocks)) {
  Arg(kWindowOp, "positions", positions).Dtype(kIndexDtypes).Rank(1).Contiguous();
  const phi::Place place = positions.place();
  const int64_t rows = SizesOf(positions)[0];
  CheckRange(kWindowOp, "window", window, 1);
  CheckRange(kWindowOp, "block_size", block_size, 1);
  CheckRange(kWindowOp, "num_blocks", num_blocks, -1);
  WindowParams p;
  p.positions = ParseIndexArray(kWindowOp, "positions", positions, rows, place);
  p.seqs = ParseSequences(kWindowOp, batch_ids, rows, place);
  if (Get(block_tables) != nullptr) {
    p.slots = ParseSlotTable(kWindowOp, *Get(block_tables), place, block_size, num_blocks);
  }
  if (Get(starts) != nullptr) {
    Arg(kWindowOp, "starts", *Get(starts))
        .On(place)
        .Dtype({phi::DataType::INT32})
        .Rank(1)
        .Contiguous();
    if (Get(block_tables) != nullptr) {
      Fail("ValueError", kWindowOp, "starts", "expected block_tables or starts, got both");
    }
    p.starts = GivenData<int32_t>(*Get(starts));
    p.num_starts = SizesOf(*Get(starts))[0];
  }
  p.window = window;
  return RunMap(kWindowOp, positions, p, false,
                NewResult(kWindowOp, "window", rows, window, window, place));
}

namespace {

Results ShortResults(const Known& in) {
  return MapResults("indices", in["positions"].size(0), in.Integer("k"));
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kShortOp, ShortContextIndices, ShortResults,
                  (const Tensor& positions, const OptionalTensor& batch_ids, int64_t k,
                   int64_t compress_ratio)) {
  Arg(kShortOp, "positions", positions).Dtype(kIndexDtypes).Rank(1).Contiguous();
  const phi::Place place = positions.place();
  const int64_t rows = SizesOf(positions)[0];
  CheckRange(kShortOp, "k", k, 1);
  CheckRange(kShortOp, "compress_ratio", compress_ratio, 1);
  ShortContextParams p;
  p.positions = ParseIndexArray(kShortOp, "positions", positions, rows, place);
  p.seqs = ParseSequences(kShortOp, batch_ids, rows, place);
  p.ratio = compress_ratio;
  p.columns = k;
  return RunMap(kShortOp, positions, p, false, NewResult(kShortOp, "k", rows, k, k, place));
}

namespace {

Results CombineResults(const Known& in) {
  const KnownInput& topk = in["topk"];
  return MapResults("indices", topk.size(0),
                    PaddedWidth(topk.size(1), in["window"].size(1), in.Integer("multiple")));
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kCombineOp, CombineTopkWindow, CombineResults,
                  (const Strided<Tensor>& topk, const Strided<Tensor>& window,
                   const OptionalTensor& topk_lengths, const OptionalTensor& window_lengths,
                   const OptionalTensor& batch_ids, int64_t seq_stride, int64_t window_offset,
                   int64_t multiple)) {
  const Arg arg(kCombineOp, "topk", topk), window_arg(kCombineOp, "window", window);
  const Tensor& where = WithElements(topk, window);
  const phi::Place place = where.place();
  arg.Dtype({phi::DataType::INT32}).Rank(2);
  const int64_t rows = SizesOf(topk)[0];
  CheckList(kCombineOp, "topk", topk, rows, place);
  CheckList(kCombineOp, "window", window, rows, place);
  CheckRange(kCombineOp, "seq_stride", seq_stride, 0);
  CheckRange(kCombineOp, "window_offset", window_offset, 0);
  CheckRange(kCombineOp, "multiple", multiple, 1);
  const auto lengths = [&](const char* name, const OptionalTensor& tensor) -> const int32_t* {
    if (Get(tensor) == nullptr) return nullptr;
    Arg(kCombineOp, name, *Get(tensor))
        .On(place)
        .Dtype({phi::DataType::INT32})
        .Dims({rows})
        .Contiguous();
    return Data<int32_t>(*Get(tensor));
  };
  CombineParams p;
  p.topk = {Data<int32_t>(topk), lengths("topk_lengths", topk_lengths), RowStride(topk),
            SizesOf(topk)[1], 0};
  p.window = {Data<int32_t>(window), lengths("window_lengths", window_lengths), RowStride(window),
              SizesOf(window)[1], window_offset};
  p.seqs = ParseSequences(kCombineOp, batch_ids, rows, place);
  p.seq_stride = seq_stride;
  const int64_t columns = p.topk.columns + p.window.columns;
  const int64_t width = PaddedWidth(p.topk.columns, p.window.columns, multiple);
  RequireFits(kCombineOp, "window", width);
  return RunMap(kCombineOp, where, p, true,
                NewResult(kCombineOp, "topk", rows, columns, width, place));
}

}  // namespace fastattn::api
