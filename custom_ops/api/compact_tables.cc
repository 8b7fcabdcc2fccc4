#include "params/compact_tables.h"

#include <algorithm>
#include <vector>

#include "api/attention_arguments.h"
#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/ranges.h"
#include "cpu/compact_tables.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/compact_tables/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "compact_block_tables";

// The tensor whose place the others must have: an empty one may have none.
const Tensor& WithPlace(const Tensor& tables, const Tensor& cu_seqlens_q) {
  return tables.numel() > 0 ? tables : cu_seqlens_q;
}

Results CompactResults(const Known& in) {
  const KnownInput& tables = in["block_tables"];
  const int64_t running = in["seq_lens_this_time"].size(0), slots = tables.size(0);
  const int64_t batch = running < 0 || slots < 0 ? -1 : std::min(running, slots);
  const int64_t tokens = in.Flag("want_masks") ? in.Integer("num_tokens") : 0;
  return {{"tables", {batch, tables.size(1)}, phi::DataType::INT32},
          {"seq_lens", {batch}, phi::DataType::INT32},
          {"masks", {tokens, 2}, phi::DataType::INT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, CompactBlockTables, CompactResults,
                  (const Tensor& block_tables, const Tensor& cu_seqlens_q,
                   const Tensor& seq_lens_decoder, const Tensor& seq_lens_this_time,
                   const OptionalTensor& mask_offsets, int64_t num_tokens, int64_t num_blocks,
                   int64_t block_size, bool causal, int64_t window_left, int64_t window_right,
                   bool want_masks)) {
  Arg(kOp, "block_tables", block_tables);
  Arg(kOp, "cu_seqlens_q", cu_seqlens_q);
  const Tensor& where = WithPlace(block_tables, cu_seqlens_q);
  const phi::Place place = where.place();
  CompactTablesParams p;
  CheckRange(kOp, "num_tokens", num_tokens, 0);
  p.num_blocks = CheckRange(kOp, "num_blocks", num_blocks, 0);
  p.block_size = CheckRange(kOp, "block_size", block_size, 1);
  p.causal = causal;
  p.window_left = WindowSide(kOp, window_left);
  p.window_right = WindowSide(kOp, window_right);
  p.seqs = ParseSeqs(kOp, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time, nullptr,
                     num_tokens, place);
  if (const Tensor* given = Get(mask_offsets); given != nullptr) {
    Arg(kOp, "mask_offsets", *given)
        .On(place)
        .Dtype({phi::DataType::INT32})
        .Dims({num_tokens, 2})
        .Contiguous();
    if (!want_masks) Fail("ValueError", kOp, "mask_offsets", "expected None without want_masks");
    p.mask_offsets = Data<int>(*given);
  }
  const int64_t batch = p.seqs.batch, max_blocks = p.seqs.max_blocks;
  constexpr auto kInt = phi::DataType::INT32;
  Tensor tables = paddle::empty({batch, max_blocks}, kInt, place);
  Tensor seq_lens = paddle::empty({batch}, kInt, place);
  Tensor local_masks = paddle::empty({want_masks ? num_tokens : 0, 2}, kInt, place);
  Tensor before;  // workspace
  p.tables = MutableData<int>(tables);
  p.seq_lens = MutableData<int>(seq_lens);
  if (want_masks) {
    CheckedProduct(kOp, "block_tables", {batch, max_blocks + 1, SizeOf(DType::kFloat32)});
    before = paddle::empty({batch, max_blocks + 1}, kInt, place);
    p.before = MutableData<int>(before);
    p.local_masks = MutableData<int>(local_masks);
  }
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(where)) {
    LaunchOnGpu(kOp, where,
                [&](cudaStream_t stream) { return cuda::LaunchCompactBlockTables(p, stream); });
    return {tables, seq_lens, local_masks};
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] { cpu::CompactBlockTables(p); });
  return {tables, seq_lens, local_masks};
}

}  // namespace fastattn::api
