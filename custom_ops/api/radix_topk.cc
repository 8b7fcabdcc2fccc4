// FastDeploy's radix_topk_ragged_transform: topk_indices, and where its indices go.
#include <algorithm>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/ranges.h"
#include "api/slot_table.h"
#include "cpu/index_maps.h"
#include "cpu/topk.h"
#include "params/index_maps.h"
#include "params/topk.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/index_maps/launch.h"
#include "cuda/topk/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "radix_topk_ragged_transform";

// A vector of int32 with at least `least` elements.
const int32_t* ParseVector(const char* name, const Tensor& tensor, int64_t least,
                           const phi::Place& place) {
  Arg(kOp, name, tensor).On(place).Dtype({phi::DataType::INT32}).Rank(1).Contiguous();
  if (SizesOf(tensor)[0] < least) {
    Fail("ValueError", kOp, name, "expected at least ", least, " elements, got ",
         SizesOf(tensor)[0]);
  }
  return Data<int32_t>(tensor);
}

// Fills in which rows there are, and returns the length of each slot's rows: of `slots` slots.
const int32_t* ParseStep(const Tensor& offsets, const Tensor& lengths,
                         const OptionalTensor& seq_len_decoder,
                         const OptionalTensor& batch_id_per_token, int64_t slots,
                         const phi::Place& place, PlaceTopkParams* params) {
  const bool decode = Get(seq_len_decoder) != nullptr;
  params->offsets = ParseVector("offsets", offsets, 0, place);
  params->num_offsets = SizesOf(offsets)[0];
  const int32_t* row_lengths = ParseVector("lengths", lengths, decode ? 0 : slots, place);
  if (Get(batch_id_per_token) != nullptr) {
    const Tensor& ids = *Get(batch_id_per_token);
    ParseVector("batch_id_per_token", ids, 0, place);
    params->batch_ids = GivenData<int32_t>(ids);
    params->num_tokens = SizesOf(ids)[0];
    RequireFits(kOp, "batch_id_per_token", params->num_tokens);
  }
  if (!decode) return row_lengths;
  params->seq_lens = ParseVector("seq_len_decoder", *Get(seq_len_decoder), slots, place);
  params->num_slots = slots;
  return params->seq_lens;
}

// Calls run(params) for each head: the rows of a head of all slots.
template <typename F>
void ForEachHead(TopkParams p, int64_t heads, F&& run) {
  const float* logits = p.logits;
  int32_t* indices = p.indices;
  const int64_t row_stride = p.row_stride;
  p.rows /= heads;
  p.row_stride *= heads;
  for (int64_t head = 0; head < heads; ++head) {
    p.logits = logits + head * row_stride;
    p.indices = indices + head * p.rows * p.k;
    run(p);
  }
}

}  // namespace

FASTATTN_OPERATOR(void, kOp, RadixTopkRaggedTransform, NoResults,
                  (const Strided<Tensor>& input, Tensor& output, const Tensor& offsets,
                   const Tensor& lengths, const OptionalTensor& seq_len_decoder,
                   const OptionalTensor& batch_id_per_token, const OptionalTensor& block_tables,
                   int64_t top_k, int64_t q_num_heads, int64_t block_size)) {
  Arg(kOp, "input", input).Dtype({phi::DataType::FLOAT32}).Rank(2).LastDimContiguous();
  // An empty tensor may have no place, and without output there is nothing to do.
  const Arg output_arg(kOp, "output", output);
  const phi::Place place = output.place();
  Arg(kOp, "input", input).On(place);
  const int64_t rows = SizesOf(input)[0], columns = SizesOf(input)[1];
  CheckRange(kOp, "top_k", top_k, 1, kTopkMaxK);
  if (columns > kTopkMaxColumns) {
    Fail("ValueError", kOp, "input", "expected at most ", kTopkMaxColumns, " columns, got ",
         columns);
  }
  CheckRange(kOp, "block_size", block_size, 1);
  if (q_num_heads < 0 || (q_num_heads > 0 && rows % q_num_heads != 0)) {
    Fail("ValueError", kOp, "q_num_heads", "expected 0 or a divisor of ", rows, " rows, got ",
         q_num_heads);
  }
  Arg(kOp, "output", output).On(place).Dtype({phi::DataType::INT32}).Dims({-1, top_k}).Contiguous();
  const int64_t heads = q_num_heads == 0 ? 1 : q_num_heads;

  PlaceTopkParams m;
  const int32_t* row_lengths =
      ParseStep(offsets, lengths, seq_len_decoder, batch_id_per_token, rows / heads, place, &m);
  if (m.seq_lens == nullptr && (SizesOf(output)[0] < rows || m.num_offsets < rows)) {
    Fail("ValueError", kOp, SizesOf(output)[0] < rows ? "output" : "offsets", "expected at least ",
         rows, " rows, as input has, got ", std::min(SizesOf(output)[0], m.num_offsets));
  }
  if (Get(block_tables) != nullptr) {
    m.slots = ParseSlotTable(kOp, *Get(block_tables), place, block_size, -1);
  }
  RequireApart(kOp, "output", output,
               {{"input", &input},
                {"offsets", &offsets},
                {"lengths", &lengths},
                {"seq_len_decoder", Get(seq_len_decoder)},
                {"batch_id_per_token", Get(batch_id_per_token)},
                {"block_tables", Get(block_tables)}});
  if (rows == 0 || output.numel() == 0) return;
  CheckedProduct(kOp, "top_k", {rows, top_k, static_cast<int64_t>(sizeof(int32_t))});
  Tensor indices = paddle::empty({rows, top_k}, phi::DataType::INT32, place);

  TopkParams p;
  p.logits = Data<float>(input);
  p.lengths = row_lengths;
  p.indices = MutableData<int32_t>(indices);
  p.rows = rows;
  p.columns = columns;
  p.row_stride = input.numel() == 0 ? 0 : StridesOf(input)[0];
  p.k = top_k;
  m.indices = p.indices;
  m.num_out_rows = SizesOf(output)[0];
  m.rows = rows;
  m.heads = heads;
  m.columns = top_k;
  const MapOutput out = {MutableData<int32_t>(output), nullptr, m.num_out_rows, top_k, top_k};
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(output)) {
    LaunchOnGpu(kOp, output, [&](cudaStream_t stream) {
      cudaError_t status = cudaSuccess;
      ForEachHead(p, heads, [&](const TopkParams& part) {
        if (status == cudaSuccess) status = cuda::LaunchTopk(part, stream);
      });
      return status == cudaSuccess ? cuda::LaunchPlaceTopk(m, out, stream) : status;
    });
    return;
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] {
    ForEachHead(p, heads, [](const TopkParams& part) { cpu::TopkIndices(part); });
    cpu::PlaceTopk(m, out);
  });
}

}  // namespace fastattn::api
