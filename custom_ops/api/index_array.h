// Arguments that hold positions or slots.
#pragma once

#include "api/check.h"
#include "params/index_array.h"

namespace fastattn::api {

// Checks a contiguous int32 or int64 tensor; a size of -1 takes any number of elements.
inline IndexArray ToIndexArray(const char* op, const char* name, const Tensor& tensor,
                               const phi::Place& place, int64_t size) {
  Arg(op, name, tensor)
      .On(place)
      .Dtype({phi::DataType::INT32, phi::DataType::INT64})
      .Dims({size})
      .Contiguous();
  return {Data(tensor), tensor.dtype() == phi::DataType::INT64};
}

}  // namespace fastattn::api
