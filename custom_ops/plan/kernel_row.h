// A row of a table of kernels, and how the kernel of a call is chosen from a table.
//
// A table belongs to a family of operators. Its rows are in the order in which they are tried, and
// the last one serves every call, so that a choice always has a result. What a row lacks for a call
// it says in words, and `python -m fastattn explain` prints them.
#pragma once

#include <cstddef>

namespace fastattn {

// Why a kernel does not serve a call; null: it serves it.
using Reason = const char*;

inline constexpr Reason kTakenBefore = "a kernel before it in the table takes the call";

// The GPUs that run a kernel: from one compute capability on, up to another, by the first number.
struct Architectures {
  int first;
  int last;
  Reason elsewhere;  // on other GPUs

  constexpr bool Have(int major) const { return first <= major && major <= last; }
};

inline constexpr Architectures kFromSm80{8, 1 << 30, "it needs a GPU from sm_80 on"};
inline constexpr Architectures kOnlySm90{9, 9, "it runs on sm_90 only"};

template <typename Kernel, typename Request>
struct KernelRow {
  using RequestType = Request;

  Kernel kernel;     // the enum value with which launchers find it
  const char* name;  // in docs, FASTATTN_LOG and `python -m fastattn explain`
  Architectures architectures;
  Reason (*lacks)(const Request&);  // on a GPU that runs it

  constexpr Reason WhyNot(const Request& request, int major) const {
    return architectures.Have(major) ? lacks(request) : architectures.elsewhere;
  }
};

// Of a row that serves every call.
template <typename Request>
constexpr Reason LacksNothing(const Request&) {
  return nullptr;
}

// The first row that serves the call. `major` is of the compute capability.
template <typename Row, std::size_t kRows>
constexpr const Row& ChooseKernel(const Row (&rows)[kRows],
                                  const typename Row::RequestType& request, int major) {
  for (std::size_t i = 0; i + 1 < kRows; ++i) {
    if (rows[i].WhyNot(request, major) == nullptr) return rows[i];
  }
  return rows[kRows - 1];
}

}  // namespace fastattn
