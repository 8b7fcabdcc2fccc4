// The kernels that a process has registered: where the PTX of each lies, and what launches need.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "machine.h"

namespace virtual_gpu {

// Shared memory of a CTA on sm_90.
constexpr int kMaxShared = 227 * 1024;
constexpr int kDefaultShared = 48 * 1024;

// The fat binary of one object file. Its text is parsed when a kernel of it is first asked for.
class FatBinary {
 public:
  explicit FatBinary(const void* wrapper) : wrapper_(wrapper) {}

  // Throws what Parse throws, at every call, or for a binary without uncompressed PTX.
  const Module& module();
  // A directive of three numbers of an entry, such as ".maxntid", or zeros.
  Dim3 Directive(const std::string& entry, const std::string& directive) const;

 private:
  size_t PlaceOf(const std::string& entry) const;
  void Read();

  const void* wrapper_;
  std::string text_;
  std::unique_ptr<Module> module_;
};

struct Kernel {
  FatBinary* binary = nullptr;
  std::string name;
  int max_dynamic_shared = kDefaultShared;
  // Of the first launch:
  const Function* function = nullptr;
  uint64_t max_threads = 0;
  int64_t static_shared = 0;
  Dim3 cluster;  // that it was compiled for; zeros: any

  void Prepare();
};

}  // namespace virtual_gpu
