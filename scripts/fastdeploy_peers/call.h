// What a caller without Paddle hands to an operator of FastDeploy's: plain arrays, called by
// ctypes.

#pragma once

#include <string>
#include <vector>

#include "paddle/extension.h"

extern "C" {

/// A tensor, or none where `pointer` is null. `type` is a value of phi::DataType.
struct PeerTensor {
  void* pointer;
  int type;
  int rank;
  int64_t dims[6];
};

/// Where an operator runs, and the memory that it may allocate from.
struct PeerCall {
  cudaStream_t stream;
  void* workspace;
  size_t bytes;
};
}

namespace standin {

inline paddle::Tensor Given(const PeerTensor& tensor) {
  common::DDim dims(tensor.dims, tensor.dims + tensor.rank);
  return {tensor.pointer, static_cast<phi::DataType>(tensor.type), dims};
}

inline paddle::optional<paddle::Tensor> GivenOrNone(const PeerTensor& tensor) {
  if (tensor.pointer == nullptr) return {};
  return Given(tensor);
}

/// Runs an operator; the message of what it threw, or null.
template <typename F>
const char* Run(const PeerCall& where, F&& operate) {
  static std::string message;
  call = {where.stream, static_cast<char*>(where.workspace), where.bytes, 0};
  try {
    operate();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace standin
