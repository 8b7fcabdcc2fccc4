#include "cpu/mqa_logits.h"

#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/direct.h"
#include "api/logits_arguments.h"
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

}  // namespace

std::vector<Tensor> MqaLogits(const Tensor& q, const Tensor& keys, const Tensor& k_scales,
                              const Tensor& weights, const Tensor& starts, const Tensor& ends,
                              const OptionalTensor& q_scales, const OptionalTensor& out,
                              int64_t max_seqlen_k, const std::string& quant) {
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

std::vector<Tensor> PagedMqaLogits(const Tensor& q, const Tensor& cache, const Tensor& weights,
                                   const Tensor& context_lens, const Tensor& block_tables,
                                   const OptionalTensor& q_scales, const OptionalTensor& out,
                                   int64_t max_context_len, int64_t page_size,
                                   const std::string& quant) {
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

// An error gives unknown sizes; the kernel raises it.
std::vector<Shape> MqaLogitsInferShape(const Shape& q, const Shape& keys, const Shape& k_scales,
                                       const Shape& weights, const Shape& starts, const Shape& ends,
                                       const paddle::optional<Shape>& q_scales,
                                       const paddle::optional<Shape>& out, int64_t max_seqlen_k,
                                       const std::string& quant) {
  const int64_t columns = max_seqlen_k >= 0 ? max_seqlen_k : keys.empty() ? -1 : keys[0];
  return {{q.empty() ? -1 : q[0], columns}};
}

std::vector<phi::DataType> MqaLogitsInferDtype(
    const phi::DataType& q, const phi::DataType& keys, const phi::DataType& k_scales,
    const phi::DataType& weights, const phi::DataType& starts, const phi::DataType& ends,
    const paddle::optional<phi::DataType>& q_scales, const paddle::optional<phi::DataType>& out,
    int64_t max_seqlen_k, const std::string& quant) {
  return {phi::DataType::FLOAT32};
}

std::vector<Shape> PagedMqaLogitsInferShape(const Shape& q, const Shape& cache,
                                            const Shape& weights, const Shape& context_lens,
                                            const Shape& block_tables,
                                            const paddle::optional<Shape>& q_scales,
                                            const paddle::optional<Shape>& out,
                                            int64_t max_context_len, int64_t page_size,
                                            const std::string& quant) {
  const bool known = q.size() == 4 && q[0] >= 0 && q[1] >= 0;
  return {{known ? q[0] * q[1] : -1, max_context_len}};
}

std::vector<phi::DataType> PagedMqaLogitsInferDtype(
    const phi::DataType& q, const phi::DataType& cache, const phi::DataType& weights,
    const phi::DataType& context_lens, const phi::DataType& block_tables,
    const paddle::optional<phi::DataType>& q_scales, const paddle::optional<phi::DataType>& out,
    int64_t max_context_len, int64_t page_size, const std::string& quant) {
  return {phi::DataType::FLOAT32};
}

}  // namespace fastattn::api

PD_BUILD_OP(fastattn_mqa_logits)
    .Inputs({"q", "keys", "k_scales", "weights", "starts", "ends", paddle::Optional("q_scales"),
             paddle::Optional("out")})
    .Outputs({"logits", paddle::Optional("out_out")})
    .SetInplaceMap({{paddle::Optional("out"), paddle::Optional("out_out")}})
    .Attrs({"max_seqlen_k: int64_t", "quant: std::string"})
    .SetKernelFn(PD_KERNEL(fastattn::api::Registered<&fastattn::api::MqaLogits>::Run))
    .SetInferShapeFn(PD_INFER_SHAPE(fastattn::api::MqaLogitsInferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fastattn::api::MqaLogitsInferDtype));

PD_BUILD_OP(fastattn_paged_mqa_logits)
    .Inputs({"q", "cache", "weights", "context_lens", "block_tables", paddle::Optional("q_scales"),
             paddle::Optional("out")})
    .Outputs({"logits", paddle::Optional("out_out")})
    .SetInplaceMap({{paddle::Optional("out"), paddle::Optional("out_out")}})
    .Attrs({"max_context_len: int64_t", "page_size: int64_t", "quant: std::string"})
    .SetKernelFn(PD_KERNEL(fastattn::api::Registered<&fastattn::api::PagedMqaLogits>::Run))
    .SetInferShapeFn(PD_INFER_SHAPE(fastattn::api::PagedMqaLogitsInferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fastattn::api::PagedMqaLogitsInferDtype));

namespace fastattn::api {

namespace {

const bool kDirectMqaLogits = AddDirect<&MqaLogits>("fastattn_mqa_logits", {"out"});
const bool kDirectPagedMqaLogits =
    AddDirect<&PagedMqaLogits>("fastattn_paged_mqa_logits", {"cache", "block_tables", "out"});

}  // namespace

}  // namespace fastattn::api
