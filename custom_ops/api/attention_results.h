// Shapes and dtypes of what an attention returns.
#pragma once

#include <string>

#include "api/operator.h"
#include "common/head_dims.h"

namespace fastattn::api {

// `values` are V's shape, or as much of it as is known: the output has the heads of Q and V's
// channels.
inline Results AttentionResults(const Known& in, const Shape& values) {
  const KnownInput &q = in["q"], &out = in["out"];
  const std::string name = in.Text("out_dtype");
  phi::DataType dtype = q.dtype;
  if (out.given()) {
    dtype = out.dtype;
  } else if (in["out_scale"].given()) {
    dtype = phi::DataType::UINT8;
  } else if (name == "float32") {
    dtype = phi::DataType::FLOAT32;
  } else if (dtype != phi::DataType::FLOAT32 && dtype != phi::DataType::FLOAT16) {
    dtype = name == "float16" ? phi::DataType::FLOAT16 : phi::DataType::BFLOAT16;
  }
  const bool known = q.shape.size() == 3, has_lse = in.Flag("return_softmax_lse") && known;
  Shape shape = q.shape;
  if (known && values.size() == 3) shape[2] = values[2];
  return {{"result", shape, dtype},
          {"softmax_lse", has_lse ? Shape{shape[1], shape[0]} : Shape{1}, phi::DataType::FLOAT32}};
}

// Of queries over a paged cache, whose V has the channels that follow from Q's.
inline Results PagedResults(const Known& in) {
  Shape values = in["q"].shape;
  const int64_t head_dim = in["q"].size(2);
  if (AttentionHeadDims::Has(head_dim)) values[2] = ValueDim(static_cast<int>(head_dim));
  return AttentionResults(in, values);
}

}  // namespace fastattn::api
