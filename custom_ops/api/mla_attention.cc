#include "cpu/mla_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/mla_arguments.h"
#include "api/mla_cache.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/ranges.h"
#include "api/softmax_scale.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/mla/attention/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "mla_attention";

void ParseMlaQuery(const Tensor& q, const phi::Place& place, MlaAttentionParams* p) {
  p->dim = FactsOf(p->cache.format).latent + kMlaRopeDim;
  Arg(kOp, "q", q)
      .On(place)
      .Dtype({phi::DataType::BFLOAT16})
      .Dims({-1, -1, p->dim})
      .LastDimContiguous();
  const Sizes shape = SizesOf(q), strides = StridesOf(q);
  RequireFits(kOp, "q", shape[0]);
  p->heads = ParseMlaHeads(kOp, shape);
  p->q = Data<uint16_t>(q);
  p->q_token_stride = strides[0];
  p->q_head_stride = shape[1] == 1 ? p->dim : strides[1];
  if (q.numel() > 0) RequireAligned(kOp, "q", q, kVectorBytes);
}

#if defined(FASTATTN_WITH_CUDA)
void RunOnGpu(const phi::Place& place, const Tensor& anchor, MlaAttentionParams* p) {
  RequireFits(kOp, "q", int64_t{p->seqs.num_tokens} * p->heads);
  const DeviceGuard guard(kOp, place.GetDeviceId());
  int64_t floats = 0;
  CheckCuda(kOp, cuda::MlaAttentionWorkspaceFloats(*p, &floats));
  Tensor workspace;
  if (floats > 0) {
    workspace = paddle::empty({floats}, phi::DataType::FLOAT32, place);
    p->workspace = MutableData<float>(workspace);
  }
  Guarded(kOp, [&] { CheckCuda(kOp, cuda::LaunchMlaAttention(*p, StreamOf(anchor))); });
}
#endif

// Results of a call whose arguments are right.
std::vector<Tensor> RunMlaAttention(const Tensor& out, bool return_softmax_lse,
                                    const phi::Place& place, MlaAttentionParams* p) {
  const int64_t tokens = p->seqs.num_tokens;
  Tensor lse;  // undefined unless asked for
  if (return_softmax_lse) {
    lse = paddle::empty({p->heads, tokens}, phi::DataType::FLOAT32, place);
    p->lse = MutableData<float>(lse);
  }
  if (out.numel() == 0) return {out, lse};
#if defined(FASTATTN_WITH_CUDA)
  if (IsGpu(place)) {
    RunOnGpu(place, out, p);
    return {out, lse};
  }
#endif
  RequireCpu(kOp, place);
  if (p->clear_padding) {
    void* bytes = p->out_float != nullptr ? static_cast<void*>(p->out_float) : p->out;
    std::memset(bytes, 0, static_cast<size_t>(out.numel()) * phi::SizeOf(out.dtype()));
  }
  if (p->lse != nullptr) {
    std::fill(p->lse, p->lse + lse.numel(), -std::numeric_limits<float>::infinity());
  }
  Guarded(kOp, [&] { cpu::MlaAttention(*p); });
  return {out, lse};
}

Results MlaResults(const Known& in) {
  const int64_t tokens = in["q"].size(0), heads = in["q"].size(1);
  const bool has_lse = in.Flag("return_softmax_lse");
  return {{"result", {tokens, heads, kMlaValueDim}, MlaOutDtype(in.Text("out_dtype"))},
          {"softmax_lse", has_lse ? Shape{heads, tokens} : Shape{1}, phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, MlaAttention, MlaResults,
                  (const Strided<Tensor>& q, const Strided<Tensor>& cache,
                   const Tensor& block_tables, const Tensor& cu_seqlens_q,
                   const Tensor& seq_lens_decoder, const Tensor& seq_lens_this_time,
                   const OptionalTensor& scale, const OptionalTensor& sinks, OptionalTensor& out,
                   int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale, bool causal,
                   bool return_softmax_lse, const std::string& cache_format, int page_size,
                   const std::string& out_dtype)) {
  MlaAttentionParams p;
  const MlaFormat format = ParseMlaFormat(kOp, cache_format);
  Arg(kOp, "q", q);
  const phi::Place place = q.numel() > 0 ? q.place() : block_tables.place();
  p.cache = ParseMlaCache(kOp, cache, format, page_size, place);
  ParseMlaQuery(q, place, &p);
  p.scale = ParseMlaScale(kOp, Get(scale), format, place);
  p.seqs = ParseSeqs(kOp, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time, nullptr,
                     SizesOf(q)[0], place);
  p.sinks = ParseMlaSinks(kOp, Get(sinks), p.heads, place);
  p.softmax_scale = ParseSoftmaxScale(kOp, softmax_scale, p.dim);
  p.causal = causal;
  p.max_seqlen_q = LengthBound(kOp, "max_seqlen_q", max_seqlen_q);
  p.max_seqlen_k = LengthBound(kOp, "max_seqlen_k", max_seqlen_k);
  p.clear_padding = Get(out) == nullptr;
  const Tensor result =
      ParseMlaOut(kOp, Get(out), out_dtype, {p.seqs.num_tokens, p.heads, kMlaValueDim}, place,
                  {{"q", &q},
                   {"cache", &cache},
                   {"scale", Get(scale)},
                   {"block_tables", &block_tables},
                   {"cu_seqlens_q", &cu_seqlens_q},
                   {"seq_lens_decoder", &seq_lens_decoder},
                   {"seq_lens_this_time", &seq_lens_this_time},
                   {"sinks", Get(sinks)}},
                  &p.out, &p.out_float);
  return RunMlaAttention(result, return_softmax_lse, place, &p);
}

}  // namespace fastattn::api
