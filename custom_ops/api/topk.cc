#include "cpu/topk.h"

#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/ranges.h"
#include "api/sizes.h"
#include "params/topk.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/topk/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "topk_indices";

void CheckOut(const Tensor& out, const Tensor& logits, const Tensor& lengths,
              const OptionalTensor& starts, int64_t rows, int64_t k) {
  Arg(kOp, "out", out)
      .On(logits.place())
      .Dtype({phi::DataType::INT32})
      .Dims({rows, k})
      .Contiguous();
  RequireApart(kOp, "out", out,
               {{"logits", &logits}, {"lengths", &lengths}, {"starts", Get(starts)}});
}

Results TopkResults(const Known& in) {
  return {{"indices", {in["logits"].size(0), in.Integer("k")}, phi::DataType::INT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, TopkIndices, TopkResults,
                  (const Strided<Tensor>& logits, const Tensor& lengths,
                   const OptionalTensor& starts, OptionalTensor& out, int64_t k)) {
  Arg(kOp, "logits", logits).Rank(2).Dtype({phi::DataType::FLOAT32}).LastDimContiguous();
  const Sizes shape = SizesOf(logits);
  const int64_t rows = shape[0];
  Arg(kOp, "lengths", lengths)
      .On(logits.place())
      .Dtype({phi::DataType::INT32})
      .Dims({rows})
      .Contiguous();
  if (const Tensor* given = Get(starts)) {
    Arg(kOp, "starts", *given)
        .On(logits.place())
        .Dtype({phi::DataType::INT32})
        .Dims({rows})
        .Contiguous();
  }
  CheckRange(kOp, "k", k, 1, kTopkMaxK);
  if (shape[1] > kTopkMaxColumns) {
    Fail("ValueError", kOp, "logits", "expected at most ", kTopkMaxColumns, " columns, got ",
         shape[1]);
  }
  const Tensor* given = Get(out);
  if (given != nullptr) CheckOut(*given, logits, lengths, starts, rows, k);
  CheckedProduct(kOp, "k", {rows, k, static_cast<int64_t>(sizeof(int32_t))});
  Tensor indices =
      given != nullptr ? *given : paddle::empty({rows, k}, phi::DataType::INT32, logits.place());
  TopkParams p;
  p.logits = Data<float>(logits);
  p.lengths = Data<int32_t>(lengths);
  p.starts = Get(starts) == nullptr ? nullptr : Data<int32_t>(*Get(starts));
  p.indices = MutableData<int32_t>(indices);
  p.rows = rows;
  p.columns = shape[1];
  p.row_stride = logits.numel() == 0 ? 0 : StridesOf(logits)[0];
  p.k = k;
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(lengths)) {
    LaunchOnGpu(kOp, lengths, [&](cudaStream_t stream) { return cuda::LaunchTopk(p, stream); });
    return {indices};
  }
#endif
  RequireCpu(kOp, lengths.place());
  Guarded(kOp, [&] { cpu::TopkIndices(p); });
  return {indices};
}

}  // namespace fastattn::api
