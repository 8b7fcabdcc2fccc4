// Arguments that both operators of latent attention take, and how they are checked.
#pragma once

#include <initializer_list>
#include <string>

#include "api/check.h"

namespace fastattn::api {

// Heads of queries [tokens, heads, dim].
int ParseMlaHeads(const char* op, const Sizes& q_shape);

// Null without sinks.
const float* ParseMlaSinks(const char* op, const Tensor* sinks, int heads, const phi::Place& place);

// Output [tokens, heads, 512] of type `out_dtype`, bfloat16 or float32: `given`, which lies apart
// from `inputs`, or a new one. It fills the two fields of the parameters, of which one stays null.
Tensor ParseMlaOut(const char* op, const Tensor* given, const std::string& out_dtype, Sizes shape,
                   const phi::Place& place, std::initializer_list<NamedTensor> inputs,
                   uint16_t** out, float** out_float);

phi::DataType MlaOutDtype(const std::string& out_dtype);

}  // namespace fastattn::api
