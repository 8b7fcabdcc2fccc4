#include "cpu/sparse_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "api/attention_arguments.h"
#include "api/attention_results.h"
#include "api/key_transform.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/query_transform.h"
#include "api/ranges.h"
#include "cpu/query_transform.h"
#if defined(FASTATTN_WITH_CUDA)
#include "api/device.h"
#include "cuda/attention/launch.h"
#include "cuda/attention/query_transform/launch.h"
#include "cuda/sparse_attention/launch.h"
#include "plan/attention.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "sparse_paged_attention";

// Entries of a list, at most: kernels count keys in an int.
constexpr int64_t kMostEntries = int64_t{1} << 24;

KeyLists ParseLists(const Tensor& selected, const Tensor* lengths, int64_t granularity,
                    const phi::Place& place, const AttentionParams& p) {
  KeyLists lists;
  const Arg arg(kOp, "selected", selected);
  arg.On(place).Dtype({phi::DataType::INT32}).Rank(3).LastDimContiguous();
  const Sizes shape = SizesOf(selected);
  const int64_t tokens = p.seqs.num_tokens;
  if (shape[0] != tokens || (shape[1] != 1 && shape[1] != p.num_kv_heads)) {
    Fail("ValueError", kOp, "selected", "expected shape [", tokens, ", 1, width] or [", tokens,
         ", ", p.num_kv_heads, ", width] (tokens, 1 or KV heads, entries), got ", ShapeText(shape));
  }
  if (shape[2] > kMostEntries) {
    Fail("ValueError", kOp, "selected", "expected at most ", kMostEntries, " entries a list, got ",
         shape[2]);
  }
  if (granularity != 1 && granularity != 4 && granularity != 16 && granularity != 32 &&
      granularity != 64 && granularity != 128) {
    Fail("ValueError", kOp, "granularity", "expected 1, 4, 16, 32, 64 or 128 tokens, got ",
         granularity);
  }
  lists.groups = static_cast<int>(shape[1]);
  lists.width = static_cast<int>(shape[2]);
  lists.granularity = static_cast<int>(granularity);
  if (selected.numel() > 0) {
    const Sizes strides = StridesOf(selected);
    lists.entries = Data<int>(selected);
    lists.token_stride = strides[0];
    lists.group_stride = strides[1];
  }
  if (lengths == nullptr) return lists;
  Arg(kOp, "selected_lens", *lengths)
      .On(place)
      .Dtype({phi::DataType::INT32})
      .Dims({tokens, shape[1]})
      .Contiguous();
  lists.lengths = Data<int>(*lengths);
  return lists;
}

#if defined(FASTATTN_WITH_CUDA)

// Bytes that block tables of lists may take; beyond, lists are read as they are.
constexpr int64_t kMostTableBytes = int64_t{256} << 20;

// Whether lists become block tables: of whole blocks, which are all that a query sees.
bool TakesTables(const SparseAttentionParams& p, int64_t slots) {
  const AttentionParams& a = p.attention;
  const int64_t bytes = 4 * int64_t{a.seqs.num_tokens} * a.num_kv_heads * (slots + 1);
  // A scale of a query's sequence would be that of the token.
  const bool own_scale = a.q_descale.data == nullptr || a.q_descale.batch_stride == 0;
  return p.lists.granularity % kBlockSize == 0 && p.window == 0 && p.sink_tokens == 0 &&
         slots > 0 && bytes <= kMostTableBytes && own_scale &&
         (slots + 1) * kBlockSize < int64_t{1} << 30;
}

// The call over block tables of the lists: the kernel that every GPU has (docs/kernels).
cudaError_t RunTables(const SparseAttentionParams& p, const phi::Place& place, int64_t slots,
                      cudaStream_t stream) {
  AttentionParams a = p.attention;
  const int64_t tokens = a.seqs.num_tokens, table = tokens * a.num_kv_heads * (slots + 1);
  Tensor ints = paddle::empty({table + 3 * tokens + 1}, phi::DataType::INT32, place);
  ListTables tables;
  tables.block_tables = MutableData<int>(ints);
  tables.cu_seqlens_q = tables.block_tables + table;
  tables.seq_lens_decoder = tables.cu_seqlens_q + tokens + 1;
  tables.seq_lens_this_time = tables.seq_lens_decoder + tokens;
  tables.slots = static_cast<int>(slots);
  a.seqs.block_tables = tables.block_tables;
  a.seqs.cu_seqlens_q = tables.cu_seqlens_q;
  a.seqs.seq_lens_decoder = tables.seq_lens_decoder;
  a.seqs.seq_lens_this_time = tables.seq_lens_this_time;
  a.seqs.batch_id_per_token = nullptr;
  a.seqs.batch = a.seqs.num_tokens;
  a.seqs.max_blocks = tables.slots + 1;
  a.seqs.head_tables = true;
  a.max_seqlen_q = 1;
  a.max_seqlen_k = (tables.slots + 1) * kBlockSize;
  cuda::DeviceFacts facts;
  cudaError_t status = cuda::GetDeviceFacts(place.GetDeviceId(), &facts);
  if (status != cudaSuccess) return status;
  const AttentionDecision decision = DecideAttention(a, {facts.major, facts.processors, 0, {}});
  Tensor workspace;
  if (decision.workspace > 0) {
    workspace = paddle::empty({decision.workspace}, phi::DataType::FLOAT32, place);
    a.workspace = MutableData<float>(workspace);
  }
  status = cuda::LaunchListTables(p, tables, stream);
  return status == cudaSuccess ? cuda::LaunchAttention(a, decision, {}, stream) : status;
}

void RunOnGpu(const Tensor& out, const QueryTransform& transform, const SparseAttentionParams& p) {
  const AttentionParams& a = p.attention;
  if (a.out == nullptr) return;
  if (a.q_dtype == DType::kFloat32) {
    Fail("NotImplementedError", kOp, "q", "float32 queries have no CUDA kernel in this build");
  }
  RequireFits(kOp, "q", static_cast<int64_t>(a.seqs.num_tokens) * a.num_heads);
  RequireAlignedCache(kOp, a.cache);
  LaunchOnGpu(kOp, out, [&](cudaStream_t stream) {
    cudaError_t status = cuda::LaunchTransformQuery(transform.before, stream);
    const int64_t slots = int64_t{p.lists.width} * std::max(p.lists.granularity / kBlockSize, 1);
    if (status == cudaSuccess) {
      status = TakesTables(p, slots) ? RunTables(p, out.place(), slots, stream)
                                     : cuda::LaunchSparseAttention(p, stream);
    }
    if (status == cudaSuccess) status = cuda::LaunchShiftScores(transform.after, stream);
    return status;
  });
}

#endif

Outputs RunSparse(const AttentionArgs& args, const phi::Place& place, SparseAttentionParams* p) {
  AttentionParams& a = p->attention;
  Tensor out =
      args.out ? *args.out : paddle::empty(OutputShape(args, a), ToPhi(a.out_dtype), place);
  Tensor lse;  // undefined unless asked for
  if (args.return_softmax_lse) {
    lse = paddle::empty({a.num_heads, a.seqs.num_tokens}, phi::DataType::FLOAT32, place);
    a.lse = MutableData<float>(lse);
  }
  a.out = MutableData(out);
  a.clear_padding = args.out == nullptr;
  QueryTransform transform;
  transform.Take(place, args.transform, &a);
#if defined(FASTATTN_WITH_CUDA)
  if (IsGpu(place)) {
    RunOnGpu(out, transform, *p);
    return {out, lse};
  }
#endif
  RequireCpu(kOp, place);
  if (a.clear_padding && out.numel() > 0) {
    std::memset(MutableData(out), 0, static_cast<size_t>(out.numel()) * phi::SizeOf(out.dtype()));
  }
  if (a.lse != nullptr) {
    const int64_t count = static_cast<int64_t>(a.num_heads) * a.seqs.num_tokens;
    std::fill(a.lse, a.lse + count, -std::numeric_limits<float>::infinity());
  }
  Guarded(kOp, [&] {
    if (transform.Prepares()) cpu::TransformQuery(transform.before);
    cpu::SparseAttention(*p);
    if (transform.Finishes()) cpu::ShiftScores(transform.after);
  });
  return {out, lse};
}

}  // namespace

FASTATTN_OPERATOR(
    Outputs, kOp, SparsePagedAttention, PagedResults,
    (const Strided<Tensor>& q, const Strided<Tensor>& key_cache, const Strided<Tensor>& value_cache,
     const Tensor& block_tables, const Tensor& cu_seqlens_q, const Tensor& seq_lens_decoder,
     const Tensor& seq_lens_this_time, const Strided<Tensor>& selected,
     const OptionalTensor& selected_lens, const Strided<OptionalTensor>& cache_k_scales,
     const Strided<OptionalTensor>& cache_v_scales, const Strided<OptionalTensor>& q_descale,
     const OptionalTensor& sinks, const OptionalTensor& out_scale, OptionalTensor& out,
     const OptionalTensor& k_center, int64_t max_seqlen_q, int64_t max_seqlen_k,
     int64_t granularity, int64_t window, int64_t sink_tokens, float softmax_scale, float softcap,
     bool return_softmax_lse, const std::string& out_dtype, const std::string& cache_quant_type,
     const std::string& fp8_format, const std::string& k_rotation)) {
  SparseAttentionParams p;
  AttentionParams& a = p.attention;
  ParseQuery(kOp, q, &a);
  const auto place = q.numel() > 0 ? q.place() : block_tables.place();
  a.paged = true;
  a.cache =
      ParsePagedCache(kOp,
                      {key_cache, value_cache, Get(cache_k_scales), Get(cache_v_scales),
                       cache_quant_type, fp8_format, CacheLayout::kFastattn, nullptr, HeadDimOf(q)},
                      place);
  CheckHeads(kOp, "key_cache", a.cache.num_kv_heads, a.cache.head_dim, &a);
  if (a.cache.type == CacheType::kNone && a.q_dtype != a.cache.dtype) {
    Fail("TypeError", kOp, "q", "expected dtype ", NameOf(a.cache.dtype), " as the cache has, got ",
         q.dtype());
  }
  a.seqs = ParseSeqs(kOp, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time, nullptr,
                     q.shape()[0], place);
  p.lists = ParseLists(selected, Get(selected_lens), granularity, place, a);
  p.window = CheckRange(kOp, "window", window, 0);
  p.sink_tokens = CheckRange(kOp, "sink_tokens", sink_tokens, 0);
  AttentionArgs args;
  args.q_descale = Get(q_descale);
  args.sinks = Get(sinks);
  args.out_scale = Get(out_scale);
  args.out = Get(out);
  args.out_dtype = out_dtype;
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  args.causal = true;
  args.max_seqlen_q = max_seqlen_q;
  args.max_seqlen_k = max_seqlen_k;
  args.return_softmax_lse = return_softmax_lse;
  args.transform = ParseKeyTransform(kOp, Get(k_center), k_rotation, a.cache, place);
  ParseCommon(kOp, args, place, &a);
  if (args.out != nullptr) {
    RequireApart(kOp, "out", *args.out,
                 {{"q", &q},
                  {"key_cache", &key_cache},
                  {"value_cache", &value_cache},
                  {"cache_k_scales", Get(cache_k_scales)},
                  {"cache_v_scales", Get(cache_v_scales)},
                  {"block_tables", &block_tables},
                  {"cu_seqlens_q", &cu_seqlens_q},
                  {"seq_lens_decoder", &seq_lens_decoder},
                  {"seq_lens_this_time", &seq_lens_this_time},
                  {"selected", &selected},
                  {"selected_lens", Get(selected_lens)},
                  {"k_center", Get(k_center)}});
  }
  return RunSparse(args, place, &p);
}

}  // namespace fastattn::api
