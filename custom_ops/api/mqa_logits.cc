#include "cpu/mqa_logits.h"

#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/logits_arguments.h"
#include "api/operator.h"
#include "api/sizes.h"
#include "params/mqa_logits.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/mqa_logits/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kRaggedOp = "mqa_logits";
constexpr const char* kPagedOp = "paged_mqa_logits";

// Allocates the result, or takes `out`.
Tensor SetOut(const char* op, const OptionalTensor& out, const phi::Place& place,
              std::initializer_list<NamedTensor> inputs, LogitsParams* p) {
  CheckedProduct(op, "out", {p->rows, p->columns, static_cast<int64_t>(sizeof(float))});
  const Tensor* given = Get(out);
  if (given != nullptr) {
    Arg(op, "out", *given)
        .On(place)
        .Dtype({phi::DataType::FLOAT32})
        .Dims({p->rows, p->columns})
        .LastDimContiguous();
    RequireNoOverlap(op, "out", *given);
    RequireApart(op, "out", *given, inputs);
  }
  Tensor result = given != nullptr
                      ? *given
                      : paddle::empty({p->rows, p->columns}, phi::DataType::FLOAT32, place);
  p->out = MutableData<float>(result);
  p->row_stride = p->rows > 1 && result.numel() > 0 ? StridesOf(result)[0] : p->columns;
  return result;
}

void Run(const char* op, const LogitsParams& p, const Tensor& q) {
  if (p.rows == 0 || p.columns == 0) return;
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(q)) {
    LaunchOnGpu(op, q, [&](cudaStream_t stream) { return cuda::LaunchMqaLogits(p, stream); });
    return;
  }
#endif
  RequireCpu(op, q.place());
  Guarded(op, [&] { cpu::MqaLogits(p); });
}

Results LogitsResults(const Known& in) {
  const int64_t most = in.Integer("max_seqlen_k");
  const int64_t columns = most >= 0 ? most : in["keys"].size(0);
  return {{"logits", {in["q"].size(0), columns}, phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kRaggedOp, MqaLogits, LogitsResults,
                  (const Tensor& q, const Tensor& keys, const Tensor& k_scales,
                   const Tensor& weights, const Tensor& starts, const Tensor& ends,
                   const OptionalTensor& q_scales, OptionalTensor& out, int64_t max_seqlen_k,
                   const std::string& quant)) {
  LogitsParams p = RaggedLogits(kRaggedOp, q, keys, k_scales, weights, starts, ends, q_scales,
                                max_seqlen_k, quant);
  Tensor logits = SetOut(kRaggedOp, out, q.place(),
                         {{"q", &q},
                          {"keys", &keys},
                          {"k_scales", &k_scales},
                          {"weights", &weights},
                          {"starts", &starts},
                          {"ends", &ends},
                          {"q_scales", Get(q_scales)}},
                         &p);
  Run(kRaggedOp, p, q);
  return {logits};
}

namespace {

Results PagedLogitsResults(const Known& in) {
  const int64_t columns = in.Integer("max_context_len");
  return {{"logits", {NumQueries(in["q"]), columns}, phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kPagedOp, PagedMqaLogits, PagedLogitsResults,
                  (const Tensor& q, const Strided<Tensor>& cache, const Tensor& weights,
                   const Tensor& context_lens, const Strided<Tensor>& block_tables,
                   const OptionalTensor& q_scales, OptionalTensor& out, int64_t max_context_len,
                   int64_t page_size, const std::string& quant)) {
  LogitsParams p = PagedLogits(kPagedOp, q, cache, weights, context_lens, block_tables, q_scales,
                               max_context_len, page_size, quant);
  Tensor logits = SetOut(kPagedOp, out, q.place(),
                         {{"q", &q},
                          {"cache", &cache},
                          {"weights", &weights},
                          {"context_lens", &context_lens},
                          {"block_tables", &block_tables},
                          {"q_scales", Get(q_scales)}},
                         &p);
  Run(kPagedOp, p, q);
  return {logits};
}

}  // namespace fastattn::api
