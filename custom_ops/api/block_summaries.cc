#include "params/block_summaries.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "api/attention_arguments.h"
#include "api/key_transform.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/ranges.h"
#include "cpu/block_summaries.h"
#include "params/topk.h"
#if defined(FASTATTN_WITH_CUDA)
#include "api/device.h"
#include "cuda/block_summaries/launch.h"
#include "cuda/topk/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kUpdate = "update_block_summaries";
constexpr const char* kSelect = "select_key_blocks";

SummaryKind ParseKind(const char* op, const std::string& kind) {
  if (kind == "mean") return SummaryKind::kMean;
  if (kind == "minmax") return SummaryKind::kMinMax;
  if (kind == "pooled") return SummaryKind::kPooled;
  Fail("ValueError", op, "kind", "expected mean, minmax or pooled, got '", kind, "'");
}

// `cache`: blocks, KV heads and channels; -1 where the tensor tells them.
BlockSummaries ParseSummaries(const char* op, const Tensor& tensor, int64_t granularity,
                              const std::string& kind, const Sizes& cache,
                              const phi::Place& place) {
  BlockSummaries summaries;
  summaries.kind = ParseKind(op, kind);
  if (granularity != 16 && granularity != 32 && granularity != 64 && granularity != 128) {
    Fail("ValueError", op, "granularity", "expected 16, 32, 64 or 128 tokens, got ", granularity);
  }
  summaries.granularity = static_cast<int>(granularity);
  Arg(op, "summaries", tensor)
      .On(place)
      .Dtype({phi::DataType::FLOAT32, phi::DataType::BFLOAT16})
      .Dims({cache[0], cache[1], kBlockSize / summaries.Tokens(), SummaryRows(summaries.kind),
             cache[2]})
      .Contiguous();
  const Sizes shape = SizesOf(tensor);
  for (int64_t size : shape) RequireFits(op, "summaries", size);
  summaries.data = MutableAddress(tensor);
  summaries.dtype = ToDType(op, "summaries", tensor.dtype());
  summaries.num_blocks = static_cast<int>(shape[0]);
  summaries.num_kv_heads = static_cast<int>(shape[1]);
  summaries.head_dim = static_cast<int>(shape[4]);
  return summaries;
}

const float* ParseWeights(const Tensor* weights, const BlockSummaries& summaries,
                          const phi::Place& place) {
  constexpr const char* kName = "pool_weights";
  const bool pooled = summaries.kind == SummaryKind::kPooled;
  if (weights == nullptr && pooled) {
    Fail("ValueError", kUpdate, kName, "kind 'pooled' needs weights, got None");
  }
  if (weights == nullptr) return nullptr;
  if (!pooled) Fail("ValueError", kUpdate, kName, "expected None: they belong to kind 'pooled'");
  Arg(kUpdate, kName, *weights)
      .On(place)
      .Dtype({phi::DataType::FLOAT32})
      .Dims({summaries.num_kv_heads, summaries.granularity, summaries.head_dim})
      .Contiguous();
  return Data<float>(*weights);
}

ScoreReduction ParseReduction(const std::string& reduction) {
  if (reduction == "max") return ScoreReduction::kMax;
  if (reduction == "sum") return ScoreReduction::kSum;
  Fail("ValueError", kSelect, "reduction", "expected max or sum, got '", reduction, "'");
}

#if defined(FASTATTN_WITH_CUDA)

// Bytes of scores and of what is chosen by them that are in memory at a time.
constexpr int64_t kWorkBytes = int64_t{64} << 20;

// Scores, top-k and lists of as many tokens at a time as have room.
void SelectOnGpu(const SelectBlocksParams& p, const Tensor& selected, const phi::Place& place) {
  const AttentionParams& a = p.attention;
  const int64_t tokens = a.seqs.num_tokens, heads = a.num_kv_heads;
  const int64_t keys = std::max<int64_t>(int64_t{a.seqs.max_blocks} * kBlockSize, tokens);
  SelectBlocksWork work;
  work.columns = (keys / p.summaries.granularity + 4) / 4 * 4;  // rows of 16 bytes
  RequireFits(kSelect, "block_tables", work.columns);
  // A list with room for all blocks has them all.
  const int64_t scored = p.Scored() < work.columns ? p.Scored() : 0;
  const int64_t room = kWorkBytes / (4 * (work.columns + scored) * heads);
  const int64_t count = std::clamp<int64_t>(room, 1, tokens), rows = count * heads;
  Tensor scores = paddle::empty({rows, work.columns}, phi::DataType::FLOAT32, place);
  Tensor ints = paddle::empty({rows * (3 + scored)}, phi::DataType::INT32, place);
  work.scores = MutableData<float>(scores);
  work.ends = MutableData<int>(ints);
  work.starts = work.ends + rows;
  work.lengths = work.starts + rows;
  work.chosen = work.lengths + rows;
  TopkParams topk;
  topk.logits = work.scores;
  topk.lengths = work.lengths;
  topk.starts = work.starts;
  topk.indices = work.chosen;
  topk.columns = topk.row_stride = work.columns;
  topk.k = scored;
  LaunchOnGpu(kSelect, selected, [&](cudaStream_t stream) {
    cudaError_t status = cudaSuccess;
    for (int64_t begin = 0; begin < tokens && status == cudaSuccess; begin += count) {
      work.begin = static_cast<int>(begin);
      work.count = static_cast<int>(std::min(count, tokens - begin));
      topk.rows = work.count * heads;
      status = cuda::LaunchBlockScores(p, work, stream);
      if (status == cudaSuccess && scored > 0) status = cuda::LaunchTopk(topk, stream);
      if (status == cudaSuccess) status = cuda::LaunchBlockLists(p, work, stream);
    }
    return status;
  });
}

#endif

Results SelectedResults(const Known& in) {
  return {{"selected",
           {in["q"].size(0), in["summaries"].size(1), in.Integer("k")},
           phi::DataType::INT32}};
}

}  // namespace

FASTATTN_OPERATOR(void, kUpdate, UpdateBlockSummaries, NoResults,
                  (Tensor & summaries, const Strided<Tensor>& key_cache,
                   const Strided<Tensor>& value_cache, const Tensor& block_tables,
                   const Tensor& cu_seqlens_q, const Tensor& seq_lens_decoder,
                   const Tensor& seq_lens_this_time, const Strided<OptionalTensor>& cache_k_scales,
                   const Strided<OptionalTensor>& cache_v_scales,
                   const OptionalTensor& pool_weights, const OptionalTensor& k_center,
                   int64_t granularity, const std::string& kind,
                   const std::string& cache_quant_type, const std::string& fp8_format,
                   const std::string& k_rotation)) {
  Arg(kUpdate, "summaries", summaries);
  Arg(kUpdate, "key_cache", key_cache);
  const phi::Place place = key_cache.numel() > 0 ? key_cache.place() : block_tables.place();
  UpdateSummariesParams p;
  p.cache = ParsePagedCache(kUpdate,
                            {key_cache, value_cache, Get(cache_k_scales), Get(cache_v_scales),
                             cache_quant_type, fp8_format},
                            place);
  p.transform = ParseKeyTransform(kUpdate, Get(k_center), k_rotation, p.cache, place);
  p.summaries = ParseSummaries(kUpdate, summaries, granularity, kind,
                               {p.cache.num_blocks, p.cache.num_kv_heads, p.cache.head_dim}, place);
  p.pool_weights = ParseWeights(Get(pool_weights), p.summaries, place);
  p.seqs = ParseSeqs(kUpdate, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time,
                     nullptr, std::numeric_limits<int>::max(), place);
  RequireApart(kUpdate, "summaries", summaries,
               {{"key_cache", &key_cache},
                {"value_cache", &value_cache},
                {"cache_k_scales", Get(cache_k_scales)},
                {"cache_v_scales", Get(cache_v_scales)},
                {"block_tables", &block_tables},
                {"cu_seqlens_q", &cu_seqlens_q},
                {"seq_lens_decoder", &seq_lens_decoder},
                {"seq_lens_this_time", &seq_lens_this_time},
                {"pool_weights", Get(pool_weights)},
                {"k_center", Get(k_center)}});
#if defined(FASTATTN_WITH_CUDA)
  if (IsGpu(place)) {
    LaunchOnGpu(kUpdate, summaries,
                [&](cudaStream_t stream) { return cuda::LaunchUpdateSummaries(p, stream); });
    return;
  }
#endif
  RequireCpu(kUpdate, place);
  Guarded(kUpdate, [&] { cpu::UpdateBlockSummaries(p); });
}

FASTATTN_OPERATOR(Outputs, kSelect, SelectKeyBlocks, SelectedResults,
                  (const Strided<Tensor>& q, const Tensor& summaries, const Tensor& block_tables,
                   const Tensor& cu_seqlens_q, const Tensor& seq_lens_decoder,
                   const Tensor& seq_lens_this_time, const Strided<OptionalTensor>& q_descale,
                   int64_t k, int64_t granularity, const std::string& kind,
                   const std::string& reduction, int64_t first_blocks, int64_t last_blocks)) {
  SelectBlocksParams p;
  AttentionParams& a = p.attention;
  ParseQuery(kSelect, q, &a);
  const phi::Place place = q.numel() > 0 ? q.place() : block_tables.place();
  p.summaries = ParseSummaries(kSelect, summaries, granularity, kind, {-1, -1, -1}, place);
  CheckHeads(kSelect, "summaries", p.summaries.num_kv_heads, p.summaries.head_dim, &a);
  a.seqs = ParseSeqs(kSelect, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time,
                     nullptr, q.shape()[0], place);
  p.reduction = ParseReduction(reduction);
  p.k = CheckRange(kSelect, "k", k, 1, kTopkMaxK);
  p.first_blocks = CheckRange(kSelect, "first_blocks", first_blocks, 0);
  p.last_blocks = CheckRange(kSelect, "last_blocks", last_blocks, 1);
  if (int64_t{p.first_blocks} + p.last_blocks > k) {
    Fail("ValueError", kSelect, "k",
         "expected at least first_blocks + last_blocks = ", int64_t{p.first_blocks} + p.last_blocks,
         ", got ", k);
  }
  AttentionArgs args;
  args.q_descale = Get(q_descale);
  args.softmax_scale = 1.0f;
  args.causal = true;
  ParseCommon(kSelect, args, place, &a);
  const int64_t tokens = a.seqs.num_tokens;
  CheckedProduct(kSelect, "k", {tokens, a.num_kv_heads, k, SizeOf(DType::kFloat32)});
  Tensor selected = paddle::empty({tokens, a.num_kv_heads, k}, phi::DataType::INT32, place);
  p.selected = MutableData<int>(selected);
#if defined(FASTATTN_WITH_CUDA)
  if (IsGpu(place)) {
    if (selected.numel() > 0) SelectOnGpu(p, selected, place);
    return {selected};
  }
#endif
  RequireCpu(kSelect, place);
  Guarded(kSelect, [&] { cpu::SelectKeyBlocks(p); });
  return {selected};
}

}  // namespace fastattn::api
